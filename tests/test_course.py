"""course/: every blank fails its check and every original passes; every planted bug is caught by a
test of this suite; what a wrong attempt is told; bad use; the indices on the pages.

The first chapter has tests of the scripts themselves, for bugs that no other test caught.
"""
import ast
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, save, started, volume

import cct_r
import common
import data

sys.path.insert(0, str(ROOT / "course"))
import exercise as course
import index

# ---------------------------------------------------- of the scripts: what the bugs have asked for


def test_prepared_images_do_not_depend_on_labels(tmp_path):
    """The same scan with its label and without gives the same slices."""
    image, _ = volume(0, (40, 36, 4))
    label = np.zeros((40, 36, 4), np.uint8)
    label[18:24, 10:16] = 1
    save(tmp_path / "d/images/a.nii.gz", image, (2, 2, 8))
    save(tmp_path / "d/images/b.nii.gz", image, (2, 2, 8))
    save(tmp_path / "d/labels/a.nii.gz", label, (2, 2, 8))
    slices = common.prepare(data.find_cases(tmp_path / "d"), 2., 32, tmp_path / "cache")
    assert (slices.labels[:4] == 1).any()
    assert (slices.labels[4:] == 255).all()
    assert np.array_equal(slices.images[:4], slices.images[4:])


def test_fine_tuning_reads_the_labels_of_its_patients_alone(phantom, tmp_path, monkeypatch):
    """No label of another patient, be it from the prepared slices or from the files."""
    place = ["--data", phantom, "--cache", tmp_path / "cache", "--out", tmp_path / "o"]
    sal, run = started("sal", *place)
    asked = []
    label = common.SliceDataset.label

    def noted(self, numbers, *device):
        asked.extend(numbers)
        return label(self, numbers, *device)

    def refused(case, cases):
        raise AssertionError(f"the label of {case.name} is read in training")

    monkeypatch.setattr(common.SliceDataset, "label", noted)
    monkeypatch.setattr(common, "read_label", refused)
    sal.finetune(run, common.Row("scratch", 1, 0))
    assert len(asked) > 0
    assert set(asked) <= set(run.dataset.of_patients(run.patients(1)))


def test_peeking_leaves_the_networks_in_training_mode():
    o = SimpleNamespace(width=4, swin_dim=12, window=4, projection=8)

    def unet():
        return common.UNet(1, 4, 4)

    def image(numbers, device):
        return torch.rand(len(numbers), 1, 32, 32)

    def label(numbers):
        return torch.zeros(len(numbers), 32, 32, dtype=torch.int64)

    slices = SimpleNamespace(image=image, label=label)
    run = SimpleNamespace(o=o, channels=1, classes=list("abcd"), device="cpu", dataset=slices,
                          unet=unet)
    students = cct_r.Students(run)
    cct_r.peek(run, students, np.arange(3), torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert students.training
    assert all(module.training for module in students.modules())


# ------------------------------------------------------------------------------ exercises and bugs

EXERCISES = [e["name"] for e in course.course()["exercise"]]
BUGS = range(1, len(course.course()["bug"]) + 1)


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A folder in place of course/mine."""
    monkeypatch.setattr(course, "MINE", tmp_path / "mine")
    return tmp_path / "mine"


def restore(folder):
    """Put the repository's scripts in place of those of a copy."""
    for script in course.SCRIPTS:
        (folder / f"{script}.py").write_text(course.read(ROOT, script))


@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_fails_and_the_original_passes(name, mine, capsys):
    assert course.main(["start", name]) == 0
    printed = capsys.readouterr().out
    script = name.split(".")[0]
    blank = course.read(mine / name, script)
    line = int(re.search(r"\.py:(\d+)", printed)[1])
    assert "NotImplementedError" in blank.splitlines()[line - 1]
    path = name.split(".")[1:]
    old = course.find_function(ast.parse(course.read(ROOT, script)), path)
    new = course.find_function(ast.parse(blank), path)
    assert ast.get_docstring(new) == ast.get_docstring(old)
    assert ast.dump(new.args) == ast.dump(old.args)
    assert len(new.body) == 2                                      # docstring, raise
    assert course.main(["check", name]) == 1
    assert "not written yet" in capsys.readouterr().out
    restore(mine / name)
    assert course.main(["check", name]) == 0, capsys.readouterr().out
    assert "hold; done" in capsys.readouterr().out


@pytest.mark.parametrize("number", BUGS)
def test_a_planted_bug_is_caught_by_the_suite(number, mine, capsys):
    bug = course.find_bug(str(number))
    assert course.main(["bug", str(number)]) == 0
    printed = capsys.readouterr().out
    assert bug["symptom"] in printed
    assert bug["name"] not in printed                              # the student is to find it
    assert course.main(["check", "bug", str(number)]) == 1
    printed = capsys.readouterr().out
    assert "FAILS" in printed
    assert bug["name"] not in printed
    restore(mine / f"bug_{number}")
    assert course.main(["check", "bug", str(number)]) == 0, capsys.readouterr().out
    assert bug["seen"] in capsys.readouterr().out


def test_what_a_bug_is_measured_with_parses():
    for number in BUGS:
        bug = course.find_bug(str(number))
        compile(bug.get("tool", ""), f"measure.py of bug {number}", "exec")
        assert ("measure.py" in bug["measure"]) == ("tool" in bug)


def test_losses_phi_scores_and_pairs_are_there():
    """What the course promises to cover."""
    assert len(EXERCISES) >= 12
    assert len(BUGS) >= 6
    for script in ("sal", "pix2rep", "macl", "cct_r"):
        losses = re.findall(r"^def (\w+_loss)\(", course.read(ROOT, script), re.MULTILINE)
        assert {f"{script}.{name}" for name in losses} <= set(EXERCISES)
    others = {"sal.sample_pairs", "macl.positive_pairs", "pix2rep.random_affine",
              "common.dice_score", "common.surface_distances", "pix2rep.update_teacher",
              "cct_r.cycle_error", "cct_r.MemoryBank.nearest"}
    assert others <= set(EXERCISES)


# ---------------------------------------------------------------------------- a student's attempts


def attempt(name, body, mine, capsys):
    """What `check` prints for a body of the function; `body` has the function's indent."""
    assert course.main(["start", name]) == 0
    file = mine / name / f"{name.split('.')[0]}.py"
    blank = re.search(r" *raise NotImplementedError.*\n", file.read_text())[0]
    file.write_text(file.read_text().replace(blank, body))
    capsys.readouterr()
    assert course.main(["check", name]) == 1
    return capsys.readouterr().out


def test_a_sum_for_a_mean_is_told(mine, capsys):
    body = """\
    A = similarities(x_i, x_j, windows, radius)
    forward = (1 - A.amax(2)).abs().sum()
    backward = (1 - A.amax(1)).abs().sum()
    return (forward + backward) / 2
"""
    printed = attempt("sal.local_alignment_loss", body, mine, capsys)
    assert re.search("FAILS  hand-worked example.*\n.*2 times as large. A sum where", printed)
    assert "holds  gradient" in printed
    assert "amax" not in printed                                   # never a solution


def test_a_missing_transpose_is_told(mine, capsys):
    body = """\
    u_a = standardise(u_a)
    u_b = standardise(u_b)
    C = u_a @ u_b / len(u_a)
    diagonal = C.diagonal()
    on = (diagonal - 1).square().sum()
    return on + lam * (C.square().sum() - diagonal.square().sum())
"""
    printed = attempt("pix2rep.barlow_twins_loss", body, mine, capsys)
    assert "FAILS  hand-worked example" in printed
    assert "a transpose, a missing axis?" in printed
    assert "line" in printed


def test_a_turned_sign_is_told(mine, capsys):
    body = """\
    down_full = F.interpolate(y_full, y_small.shape[2:], mode="bilinear")
    return -F.l1_loss(y_small, down_full)
"""
    printed = attempt("macl.equivariant_loss", body, mine, capsys)
    assert "the sign is turned" in printed


def test_what_is_no_number_is_told(mine, capsys):
    """A loss that is right but in bfloat16: what the test asks, instead of nothing."""
    body = """\
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)
    sim = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(sim, torch.arange(len(z)).roll(len(z_a)))
"""
    printed = attempt("pix2rep.info_nce_loss", body, mine, capsys)
    assert re.search("FAILS  gradient.*\n.*does not hold: assert torch.allclose", printed)
    assert printed.endswith("4 of 5 hold.\n")


# ----------------------------------------------------------------------------------------- bad use


def refused(words, capsys):
    """The one line that bad use gets, with exit code 2."""
    capsys.readouterr()
    assert course.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")
    return printed.err


def test_bad_use_gets_one_line(mine, capsys):
    assert "no such exercise" in refused(["start", "sal.nothing"], capsys)
    assert "no such exercise" in refused(["check", "../sal"], capsys)
    for number in ("0", "999", "x", "-1"):
        assert "no such bug; use 1 to" in refused(["bug", number], capsys)
    assert "not understood" in refused(["begin", "sal.sample_pairs"], capsys)
    assert "begin with" in refused(["check", "sal.sample_pairs"], capsys)
    assert "begin with" in refused(["check", "bug", "1"], capsys)
    assert not mine.exists()


def test_work_is_never_overwritten(mine, capsys):
    name = "cct_r.cross_teaching_loss"
    course.main(["start", name])
    course.main(["bug", "1"])
    for words, folder in ((["start", name], name), (["bug", "1"], "bug_1")):
        file = mine / folder / "cct_r.py"
        file.write_text("my work")
        assert "may hold your work" in refused(words, capsys)
        assert file.read_text() == "my work"
    assert sorted(f.name for f in mine.iterdir()) == ["bug_1", name]


def test_a_file_that_does_not_parse_is_named(mine, capsys):
    name = "cct_r.cross_teaching_loss"
    course.main(["start", name])
    file = mine / name / "cct_r.py"
    text = file.read_text()
    kept = sys.modules["cct_r"]
    for more, word in (("def (:\n", "does not parse"), ("x = y\n", "NameError")):
        broken = text + more
        file.write_text(broken)
        line = refused(["check", name], capsys)
        assert word in line
        assert "nothing was checked" in line
        assert file.read_text() == broken
    assert sys.modules["cct_r"] is kept                            # the scripts are those of before


def test_a_function_that_was_renamed_is_named(mine, capsys):
    name = "sal.sample_pairs"
    course.main(["start", name])
    file = mine / name / "sal.py"
    file.write_text(file.read_text().replace("def sample_pairs", "def pairs"))
    line = refused(["check", name], capsys)
    assert "cannot import name 'sample_pairs'" in line
    assert "is the function still there" in line


def test_a_changed_script_is_named(monkeypatch, capsys):
    """A function or a line that the course needs and that is gone: one line, nothing written."""
    monkeypatch.setattr(course, "read", lambda folder, script: "x = 1\n")
    assert "no such function" in refused(["start", "sal.sample_pairs"], capsys)
    assert "0 times, not once" in refused(["bug", "1"], capsys)


# ------------------------------------------------------------------------------------------- pages


def test_the_pages_hold_the_index(capsys):
    """`python course/index.py` writes them anew."""
    assert index.main(["--check"]) == 0, capsys.readouterr().out


def test_every_number_in_the_comments_is_in_an_index():
    """An equation, figure or table that a comment names is on the method's page."""
    for paper in course.course()["paper"]:
        tags = [tag for _, tag, _ in paper["has"]]
        for number, text in index.notes(course.read(ROOT, paper["script"])):
            named = re.findall(r"(?:Fig\. \d+|Table [IVX]+|(?<=  )\(\d+\)|(?<=Eq\. )\(\d+\))", text)
            for name in named:
                assert name in tags, f"{paper['script']}.py:{number}: {name}"


def test_a_moved_line_is_noticed(tmp_path, monkeypatch, capsys):
    """A page that no longer fits its script differs, and index.py writes it anew."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "results", root / "results", ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(ROOT / "course", root / "course", ignore=shutil.ignore_patterns("mine"))
    for script in course.SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", root)
    (root / "sal.py").write_text(course.read(ROOT, "sal").replace("\nMETHOD", "\n\nMETHOD", 1))
    for module in (course, index):
        monkeypatch.setattr(module, "ROOT", root)
        monkeypatch.setattr(module, "HERE", root / "course")
    assert index.main(["--check"]) == 1
    assert capsys.readouterr().out == "results/sal.md: index differs\n"
    assert index.main([]) == 0
    assert index.main(["--check"]) == 0
    assert (root / "results/macl.md").read_text() == (ROOT / "results/macl.md").read_text()


def test_links_of_the_course_lead_somewhere():
    page = ROOT / "course/README.md"
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert len(links) > 0
    for link in links:
        assert (page.parent / link).exists(), link
