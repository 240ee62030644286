"""The pages: every table comes from a kept run, every link leads somewhere."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]


def make(folder, *words):
    """Run results/tables.py of this copy of the repository."""
    return subprocess.run([sys.executable, folder / "results/tables.py", *map(str, words)],
                          text=True, capture_output=True, timeout=600)


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages and runs."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_the_pages_hold_what_the_runs_say(copy):
    done = make(copy, "--check")
    assert done.returncode == 0, done.stderr


def test_a_digit_changed_by_hand_is_found(copy):
    page = copy / "results/phantom.md"
    text = page.read_text()
    found = re.search(r"\| demo_sal \| 1 \| sal \| 0\.(\d)", text)
    digit = str((int(found[1]) + 1) % 10)
    page.write_text(text[:found.start(1)] + digit + text[found.end(1):])
    done = make(copy, "--check")
    assert done.returncode == 1
    assert "phantom.md" in done.stderr
    assert make(copy).returncode == 0                              # written anew
    assert page.read_text() == text


def test_runs_of_other_patients_are_not_compared(copy):
    runs = copy / "results/runs"
    done = make(copy, runs / "demo_sal", runs / "val_sal_240")
    assert done.returncode == 1
    assert "split is val" in done.stderr
    done = make(copy, runs / "nothing")
    assert "not a finished run" in done.stderr


def test_the_phantom_is_not_compared_with_scans():
    """Options say None for the phantom's data, which is a value like any other."""
    phantom = tables.read_run(ROOT / "results/runs/demo_sal")
    scans = {**phantom, "name": "acdc", "options": {**phantom["options"], "data": "path/to/acdc"}}
    tables.comparable([phantom, phantom])
    for pair in ([phantom, scans], [scans, phantom]):
        with pytest.raises(tables.RunError, match="data is"):
            tables.comparable(pair)


def test_gain_and_interval_by_hand():
    """Two patients with gains 10 and 30: the mean is 20, and drawn anew 10, 20 or 30."""
    volumes = []
    for patient, gain in (("a", .1), ("b", .3)):
        for method, dice in (("scratch", .5), ("sal", .5 + gain)):
            for seed, away in ((0, -.05), (1, .05)):               # seeds are averaged
                volumes.append({"method": method, "labelled": "1", "seed": str(seed),
                                "patient": patient, "case": patient, "class": "RV",
                                "dice": str(dice + away)})
            volumes.append({"method": method, "labelled": "1", "seed": "0", "patient": patient,
                            "case": patient, "class": "LV", "dice": "nan"})        # left out

    def interval():
        rows = [tables.scores({"volumes": volumes}, method, 1) for method in ("sal", "scratch")]
        return tables.interval(*rows)

    assert interval() == pytest.approx([10, 30])
    volumes.append({**volumes[0], "seed": "2", "dice": ".1"})      # a seed that scratch alone has
    volumes.append({**volumes[-1], "method": "sal", "seed": "3"})  # and one that it has not
    assert interval() == pytest.approx([10, 30])
    dice = {("a", "RV", "ED", "0"): 1., ("a", "RV", "ES", "0"): 3., ("a", "RV", "ES", "1"): 9.}
    assert tables.by_patient(dice, {"0"}) == {("a", "RV"): 2.}
    nan = float("nan")
    means = tables.mean_dice(np.array([[1., nan, 6.], [3., nan, nan]]))
    assert means == 4.                                             # of RV 2, of LV 6; none of Myo


def test_an_organ_that_is_seen_where_none_is_counts_in_the_interval():
    """Scratch has Dice 0 there and ours none at all: the gain's means know it, so does this."""
    volumes = []
    for patient in "abcd":
        for method in ("scratch", "sal"):
            dice = {"a": {"scratch": "0", "sal": "nan"}}.get(patient, {}).get(method, ".6")
            volumes.append({"method": method, "labelled": "1", "seed": "0", "patient": patient,
                            "case": patient, "class": "gallbladder", "dice": dice})
    run = {"volumes": volumes}
    low, high = tables.interval(tables.scores(run, "sal", 1), tables.scores(run, "scratch", 1))
    assert low == 0                                                # "a" is not drawn
    assert high > 15                                               # drawn once: .6 less .45


def test_means_of_the_kept_runs_follow_from_their_volumes():
    for folder in sorted((ROOT / "results/runs").iterdir()):
        run = tables.read_run(folder)
        for row in run["metrics"]["rows"]:
            key = (row["method"], str(row["labelled"]), str(row["seed"]))
            dice = []
            for name in row["dice"]:
                own = [float(v["dice"]) for v in run["volumes"]
                       if (v["method"], v["labelled"], v["seed"], v["class"]) == (*key, name)]
                dice.append(np.nanmean(own))
            assert row["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-9), folder
        assert re.match(r"commit \w{7}; python \w+\.py ", (folder / "run.txt").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    here = [link for link in links if not link.startswith("http")]
    for link in here:
        assert (page.parent / link).exists(), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_metrics_of_the_kept_runs_are_json():
    def no_nan(word):
        raise AssertionError(word)

    for file in sorted((ROOT / "results/runs").glob("*/metrics.json")):
        json.loads(file.read_text(), parse_constant=no_nan)


# --------------------------------------------------------------------- kinds of tables, own runs


def test_dice_against_labelled_patients(copy):
    """The mean of the seeds as the run has it; what no run backs is "not run"."""
    page = copy / "results/new.md"
    page.write_text("<!-- dice 1 7: ours = demo_sal sal; gone = demo_gone sal -->\n<!-- end -->\n")
    assert make(copy).returncode == 0
    summary = json.loads((copy / "results/runs/demo_sal/metrics.json").read_text())["summary"]
    dice = next(r["mean_dice"] for r in summary if r["method"] == "sal")
    assert page.read_text().splitlines()[1:-1] == [
        "| | 1 | 7 |", "| --- | --- | --- |",
        f"| ours | {dice['mean']:.3f} ± {dice['std']:.3f} | not run |",
        "| gone | not run | not run |"]
    assert make(copy, "--check").returncode == 0
    page.write_text("<!-- dice 1: a = length_scratch_300 scratch; b = test_scratch scratch -->\n"
                    "<!-- end -->\n")
    assert "split is test, that of length_scratch_300 val" in make(copy).stderr


def test_pairs_of_rows(copy):
    """A row over scratch of its own run is the gain of the table of runs; over itself it is 0."""
    page = copy / "results/new.md"
    page.write_text("<!-- pairs 1 7: a = demo_sal sal - demo_sal scratch; "
                    "b = demo_sal sal - demo_sal sal; c = demo_sal sal - demo_gone sal -->\n"
                    "<!-- end -->\n<!-- runs: demo_sal -->\n<!-- end -->\n")
    assert make(copy).returncode == 0
    lines = page.read_text().splitlines()
    by_seed, gain = next(line for line in lines if "| sal |" in line).split(" | ")[-2:]
    zeros = "+0.0 [+0.0, +0.0] (+0.0, +0.0, +0.0)"
    assert lines[1:6] == ["| | 1 | 7 |", "| --- | --- | --- |",
                          f"| a | {gain.rstrip(' |')} ({by_seed}) | not run |",
                          f"| b | {zeros} | not run |", "| c | not run | not run |"]
    runs = copy / "results/runs"
    done = make(copy, "--pair", runs / "demo_sal", "sal", runs / "demo_sal", "scratch")
    assert done.stdout == f"1 labelled: {gain.rstrip(' |')} ({by_seed})\n"
    done = make(copy, "--pair", runs / "demo_sal", "sal", runs / "val_sal_240", "sal")
    assert (done.returncode, "split is val" in done.stderr) == (1, True)
    assert "--pair needs" in make(copy, "--pair", runs / "demo_sal").stderr


def test_patients_that_scratch_needs(copy):
    """Halfway from 1 to 4 patients over their logarithm are 2; beyond the line is no number."""
    curve = {4: .8, 1: .6, 16: .9}
    assert tables.patients_needed(.7, curve) == "2.0"
    assert tables.patients_needed(.85, curve) == "8.0"
    assert tables.patients_needed(.8, curve) == "4.0"
    assert tables.patients_needed(.5, curve) == "1 or fewer"
    assert tables.patients_needed(.95, curve) == "more than 16"
    page = copy / "results/new.md"
    page.write_text("<!-- needs 1 7 18: a = test_scratch scratch; b = test_gone sal "
                    "- test_scratch test_18_70 -->\n<!-- end -->\n")
    assert make(copy).returncode == 0
    assert page.read_text().splitlines()[3:-1] == ["| a | 1 or fewer | 7.0 | not run |",
                                                  "| b | not run | not run | not run |"]


def test_registration_by_hand(copy):
    """Two volumes, two labelled patients, of whom the second has two frames."""
    columns = ["volume", "labelled", "similarity_after", "folded_percent", "cycle_error_mm",
               "dice_before", "dice_affine", "dice_after"]
    pairs = [["x", "a", .5, 0, 1, .1, .2, .3],                     # BRS's for x
             ["x", "b_1", .6, 0, 2, .1, .2, .9],                   # its most similar, and best
             ["x", "b_2", .4, 0, 3, .1, .2, .3],
             ["y", "a", .7, .4, 4, .1, .2, .5],                    # y's most similar
             ["y", "b_1", .1, 0, 9, .1, .2, .6],                   # its best
             ["y", "b_2", .2, 0, 2.5, .1, .2, .4],                 # BRS's for y
             ["b_1", "a", .1, .2, 8, .4, .8, .8]]                  # b has labels of its own
    run = copy / "results/runs/hand"
    shutil.copytree(copy / "results/runs/demo_sal", run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["rows"] = [{"labelled": 1, "patients": ["a"]}, {"labelled": 2, "patients": ["a", "b"]}]
    (run / "metrics.json").write_text(json.dumps(metrics))
    lines = [columns, *pairs]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    (run / "registration.csv").write_text(text)
    page = copy / "results/new.md"
    page.write_text("<!-- registration: hand -->\n<!-- end -->\n"
                    "<!-- registration: gone -->\n<!-- end -->\n")
    assert make(copy).returncode == 0
    lines = page.read_text().splitlines()
    one = "0.200 | 0.400 | 0.533 | 0.533 | 0.533 | 0.533 | 0.200 %; 0.40 % | 1.00"
    assert lines[3] == f"| 1 | 3 | {one} |"
    cells = lines[4].split(" | ")
    assert cells[:2] == ["| 2", "7"]
    assert cells[5:8] == ["0.350", "0.700", "0.750"]
    assert lines[7] == "not run"


def test_commands_of_the_runs(copy):
    page = copy / "results/new.md"
    page.write_text("<!-- commands: demo_sal -->\n<!-- end -->\n")
    assert make(copy).returncode == 0
    run = (copy / "results/runs/demo_sal/run.txt").read_text().strip()
    commit, command, machine, minutes = run.split("; ")
    line = page.read_text().splitlines()[1]
    assert line == f"- `{command}` ({commit}; {machine}; {minutes})"


def test_own_runs_as_table_and_curve(finished, tmp_path):
    """A finished run as the scripts leave it: printed, drawn, and kept without its path."""
    out, work, _ = finished("sal")
    data = json.loads((out / "options.json").read_text())["data"]
    done = subprocess.run([sys.executable, ROOT / "results/tables.py", out], cwd=tmp_path,
                          text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| sal | 2 | sal | 0." in done.stdout
    assert (tmp_path / "tables.png").stat().st_size > 5000
    shutil.copytree(ROOT / "results", tmp_path / "results")
    done = make(tmp_path, "--keep", out)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "results/runs/sal"
    assert sorted(f.name for f in kept.iterdir()) == sorted(tables.KEPT)
    for file in kept.iterdir():
        assert data not in file.read_text()
    assert f" --data path/to/{Path(data).name} " in (kept / "run.txt").read_text()
    (tmp_path / "sal").mkdir()
    for name in tables.KEPT:
        text = (out / name).read_text()
        if name == "run.txt":                                      # the path last, and in another
            text = f"commit x; python sal.py --out {data}-o --data={data}; 1 threads; 1 min\n"
        (tmp_path / "sal" / name).write_text(text)
    assert make(tmp_path, "--keep", tmp_path / "sal").returncode == 0
    end = (kept / "run.txt").read_text()
    assert end == f"commit x; python sal.py --out {data}-o --data=path/to/{Path(data).name}; " \
                  "1 threads; 1 min\n"
    assert (kept / "per_volume.csv").read_text() == (out / "per_volume.csv").read_text()
    assert re.match(r"commit \S+.*; python sal\.py .*; .* threads; \d+ min\n$",
                    (kept / "run.txt").read_text())
