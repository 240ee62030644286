"""The four scripts as a user runs them: what they write, bad input, kill, resume, predict.

In a process of their own: the `finished` runs, killed and resumed ones, a refusal of each script
(its exit code) and a full disk. The rest goes through main() in this process.
"""
import csv
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (SCRIPTS, SHARED, command, options, refused, run, run_here, save, started,
                      volume, written)

import common
import data

# rows of a tiny run with one labelled patient and one seed, in the order of the table
ROWS = {
    "sal": ["scratch", "sal"],
    "pix2rep": ["scratch", "random-probe", "probe", "pix2rep"],
    "macl": ["scratch", "macl"],
    "cct_r": ["scratch", "cct_r", "cct_r, Swin"],
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


def per_volume(folder):
    """The lines of per_volume.csv as dicts."""
    return list(csv.DictReader((folder / "per_volume.csv").open()))


def test_names_of_the_tiny_runs_are_those_of_the_scripts():
    for script in SCRIPTS:
        assert importlib.import_module(script).METHOD == script


# ----------------------------------------------------------------------------- what a run writes


@every_script
def test_what_a_run_writes(script, finished):
    out, _, printed = finished(script)
    metrics = json.loads((out / "metrics.json").read_text())
    rows = [(r["method"], r["labelled"], r["seed"]) for r in metrics["rows"]]
    assert rows == [(m, n, s) for n in (1, 2) for s in (0, 1) for m in ROWS[script]]
    for r in metrics["rows"]:
        assert len(r["patients"]) == r["labelled"]
        assert set(r["dice"]) == {"RV", "Myo", "LV"}
        assert r["n_volumes"] == 2
        assert {"mean_dice", "hd95_mm", "assd_mm", "missed"} <= set(r)
    assert all(s["n"] == 2 for s in metrics["summary"])
    assert len(metrics["gains"]) == 2 * (len(ROWS[script]) - 1)
    assert metrics["peak_memory_mb"] > 100
    assert {"rule", "versions"} <= set(metrics)
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    assert json.loads((out / "options.json").read_text())["width"] == 4
    assert "gain over scratch" in printed
    assert "split 70 / 10 / 20" in printed
    assert "figures/" in printed                                   # what to look at
    assert {"dice.png", "overlays.png"} <= {f.name for f in (out / "figures").iterdir()}
    assert not list(out.rglob("*partial*"))


@every_script
def test_means_follow_from_the_volumes(script, finished):
    out, _, _ = finished(script)
    table = per_volume(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(table) == len(metrics["rows"]) * 2 * 3              # volumes, classes
    for r in metrics["rows"]:
        key = (r["method"], str(r["labelled"]), str(r["seed"]))
        own = [t for t in table if (t["method"], t["labelled"], t["seed"]) == key]
        dice = [np.nanmean([float(t["dice"]) for t in own if t["class"] == k]) for k in r["dice"]]
        assert r["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-9)


@every_script
def test_test_patients_are_scored_and_none_is_labelled(script, finished, phantom):
    out, _, _ = finished(script)
    split = data.split_patients(data.find_cases(phantom))
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    scored = {t["patient"] for t in per_volume(out)}
    assert scored == set(split["test"])
    for r in rows:
        assert set(r["patients"]) <= set(split["labelled"])


@pytest.mark.parametrize("script", ["sal", "pix2rep", "macl"])
def test_what_training_reads(script, finished, phantom, tmp_path, monkeypatch):
    """Pre-training: slices of training patients, no label. A row: labels of its own patients."""
    _, work, _ = finished(script)
    words = ["--data", phantom, "--cache", work / "cache", "--out", tmp_path / "o"]
    module, run_ = started(script, *words)
    read = {"image": [], "label": []}
    for kind in read:
        whole = getattr(common.SliceDataset, kind)

        def watched(self, numbers, device="cpu", kind=kind, whole=whole):
            read[kind].extend(np.asarray(numbers).tolist())
            return whole(self, numbers, device)

        monkeypatch.setattr(common.SliceDataset, kind, watched)
    more = ()
    if script == "macl":                                           # pre-trains at a size of its own
        o = run_.o
        more = (common.prepare(run_.cases, o.spacing, o.pretrain_size, o.cache),)
    start = module.pretrain(run_, *more)
    train = set(run_.train.tolist())
    assert read["image"]
    assert set(read["image"]) <= train
    assert not read["label"]
    own = set(run_.dataset.of_patients(run_.patients(1)).tolist())
    trainings = [module.finetune]
    if script == "pix2rep":
        trainings.append(module.linear_probe)
    for training in trainings:
        for begin in (start, None):
            read["label"].clear()
            training(run_, common.Row(script, 1, 0), begin)
            assert read["label"]
            assert set(read["label"]) <= own
    assert set(read["image"]) <= train


@every_script
def test_log_has_one_json_object_a_line(script, finished):
    out, _, _ = finished(script)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    phases = {r["phase"] for r in log}
    assert {"scratch_n1_s0", f"{script}_n2_s1"} <= phases
    numbers = [v for r in log for v in r.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()


def test_scratch_is_the_same_in_all_scripts(finished):
    """The same steps, seed and slices: the same Dice to the digit (cct_r has another batch)."""
    def dice(script):
        rows = json.loads((finished(script)[0] / "metrics.json").read_text())["rows"]
        return [r["dice"] for r in rows if r["method"] == "scratch"]
    assert dice("sal") == dice("pix2rep") == dice("macl")


def test_scratch_of_cct_r_is_that_of_sal(finished, phantom):
    _, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), "--batch", 8, "--labelled", 1, 2, "--seeds", 0, 1]
    done = run_here("sal", *words, "--pretrain-steps", 1, "--out", "batch8", cwd=work)
    assert done.returncode == 0
    want = [t for t in per_volume(finished("cct_r")[0]) if t["method"] == "scratch"]
    got = [t for t in per_volume(work / "batch8") if t["method"] == "scratch"]
    assert got == want


def test_default_data_is_the_phantom(tmp_path):
    """Without --data the 80 volumes of the phantom, made by the first run."""
    done = run_here("sal", *options("sal"), "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "80 volumes" in done.stdout
    assert (tmp_path / "out/figures/overlays.png").exists()


# ---------------------------------------------------------------------- pre-training on other scans

PRETRAINING = pytest.mark.parametrize("script", ["sal", "pix2rep", "macl"])


@pytest.fixture(scope="module")
def foreign(phantom, tmp_path_factory):
    """Three folders without labels: plain MR scans, CT in HU, and one with copies of scans of the
    phantom: a test case as it is, a validation case compressed anew as another type and turned, and
    a training case; and another scan of the patient whose test case was copied."""
    root = tmp_path_factory.mktemp("foreign")
    for n, shape in enumerate([(40, 30, 5), (40, 30, 7)]):
        save(root / f"mr/images/a{n}.nii.gz", volume(n, shape)[0], (5, 5, 8))
    image = volume(7, (80, 80, 6))[0] * 5 - 600
    save(root / "ct/images/ct1.nii.gz", image, (4, 4, 3))
    info = {"modality": {"0": "CT"}, "labels": {"0": "background"}}
    (root / "ct/images").rename(root / "ct/imagesTr")
    (root / "ct/dataset.json").write_text(json.dumps(info))
    split = data.split_patients(data.find_cases(phantom))
    copies = root / "copies/images"
    copies.mkdir(parents=True)
    here = phantom / "imagesTr"
    shutil.copy(here / f"{split['test'][0]}_ED.nii.gz", copies / "secret_ED.nii.gz")
    save(copies / "secret_ES.nii.gz", volume(8, (40, 30, 5))[0], (5, 5, 8))
    shutil.copy(here / f"{split['train'][0]}_ED.nii.gz", copies / "known.nii.gz")
    native = nib.load(here / f"{split['val'][0]}_ES.nii.gz")
    turned = np.asarray(native.dataobj).astype(np.float32)[::-1]   # and its header does not say so
    turned = turned / turned.max()                                 # scaled as well
    nib.save(nib.Nifti1Image(turned, native.affine), copies / "again.nii")
    other = volume(9, (40, 30, 5))[0]                              # resampled, say: by its name
    save(copies / f"{split['test'][0]}_ED.nii.gz", other, (5, 5, 8))
    return root


def pretraining_run(script, phantom, work, out, *folders):
    """(module, run) of a script that pre-trains on these folders."""
    words = ["--data", phantom, "--cache", work / "cache", "--out", out]
    return started(script, *words, "--pretrain-data", *folders)


def test_copies_of_held_out_scans_are_left_out(finished, phantom, foreign, tmp_path, capsys):
    """By name, and a scan of the same patient with them."""
    _, work, _ = finished("sal")
    folders = [foreign / "mr", foreign / "copies"]
    _, run_ = pretraining_run("sal", phantom, work, tmp_path / "o", *folders)
    capsys.readouterr()
    pool = common.pretraining_slices(run_, run_.dataset)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"pre-training on {folders[0]}: 2 volumes, 12 slices; on average ")
    assert said[1].startswith(f"pre-training on {folders[1]}: 1 volumes, ")
    namesake = f"{run_.split['test'][0]}_ED"
    assert said[2].endswith(f"or of the same patient as one: again, {namesake}, secret_ED, "
                            "secret_ES")
    known = next(c for c in run_.cases if c.patient == run_.split["train"][0])
    V = data.read_case(known, run_.cases).image.shape[1]
    assert len(pool.numbers) == 12 + V
    assert pool.depth.tolist() == [5] * 5 + [7] * 7 + [V] * V
    assert pool.volume.tolist() == [0] * 5 + [1] * 7 + [2] * V
    assert pool.slice.tolist() == [*range(5), *range(7), *range(V)]
    assert pool.position[[0, 4, 5, 11]] == pytest.approx([.2, 1, 1 / 7, 1])
    assert pool.position[[12, -1]] == pytest.approx([2 + 1 / V, 3])
    close = common.is_close(pool.position, 1.)                     # within each folder alone
    assert close[:12, :12].all()
    assert close[12:, 12:].all()
    assert not close[:12, 12:].any()
    own = run_.dataset.of_patients(run_.split["train"])[:V]        # the same slices, in the order
    assert torch.equal(pool.image(np.arange(12, 12 + V)), run_.dataset.image(own))     # asked for
    mixed = np.array([12 + V - 1, 0, 12, 11])
    want = [pool.image(np.array([n]))[0] for n in mixed]
    assert torch.equal(pool.image(mixed), torch.stack(want))


def test_share_outside_the_crop(finished, phantom, foreign, tmp_path, capsys):
    """CT of 80 x 80 pixels of 4 mm, crop of 32 x 32 of 5 mm: 1 - 32^2 / 64^2 = 75 %."""
    _, work, _ = finished("sal")
    _, run_ = pretraining_run("sal", phantom, work, tmp_path / "o", foreign / "ct")
    capsys.readouterr()
    pool = common.pretraining_slices(run_, run_.dataset)
    said = capsys.readouterr().out
    assert "1 volumes, 6 slices; on average 75% of a volume lies outside the crop" in said
    assert "32 x 32 pixels of 5.0 mm, at most 75%, CT" in said
    # CT by its own window, not by percentiles as the MR of --data
    v = data.read_case(run_.sources[0][0], run_.sources[0])
    want = common.to_network(torch.from_numpy(data.normalise(v.image, "CT")).movedim(1, 0),
                             v.spacing, 5., 32)
    assert torch.allclose(pool.image(np.arange(6)), want, atol=1e-3)


@PRETRAINING
def test_what_pretraining_on_other_scans_reads(script, finished, phantom, foreign, tmp_path,
                                               monkeypatch):
    """Slices of the other folder, and of --data, if named, its training patients; no label."""
    _, work, _ = finished("sal")
    module, run_ = pretraining_run(script, phantom, work, tmp_path / "o", foreign / "mr", phantom)
    read = {}
    image = common.SliceDataset.image

    def watched(self, numbers, device="cpu"):
        names = [self.info["cases"][k]["patient"] for k in self.volume[numbers]]
        read.setdefault(len(self.volume), set()).update(names)
        return image(self, numbers, device)

    monkeypatch.setattr(common.SliceDataset, "image", watched)
    monkeypatch.setattr(common.SliceDataset, "label", None)
    more = ()
    if script == "macl":
        o = run_.o
        more = (common.prepare(run_.cases, o.spacing, o.pretrain_size, o.cache),)
    start = module.pretrain(run_, *more)
    assert start["options"]["pretrain_data"] == [str(foreign / "mr"), str(phantom)]
    other = read.pop(12)
    assert other <= {"a0", "a1"}
    own = set.union(*read.values())
    assert own
    assert own <= set(run_.split["train"])


def test_without_other_scans_the_pool_is_the_training_slices(finished, phantom, tmp_path):
    _, work, _ = finished("sal")
    words = ["--data", phantom, "--cache", work / "cache", "--out", tmp_path / "o"]
    _, run_ = started("sal", *words)
    d = run_.dataset
    pool = common.pretraining_slices(run_, d)
    assert torch.equal(pool.image(pool.numbers), d.image(run_.train))
    for name in ("slice", "depth", "position"):
        assert np.array_equal(getattr(pool, name), getattr(d, name)[run_.train])
    same = d.volume[run_.train]
    assert np.array_equal(pool.volume[:, None] == pool.volume, same[:, None] == same)


def test_resume_with_other_scans(finished, phantom, foreign):
    """The folders are a part of what the run is; resumed, it has the numbers of one go."""
    _, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), "--out", "foreign", "--pretrain-data"]
    done = run("sal", *words, foreign / "mr", foreign / "ct", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "on average" in done.stdout
    used = json.loads((work / "foreign/options.json").read_text())
    assert used["pretrain_data"] == [str(foreign / "mr"), str(foreign / "ct")]
    table = per_volume(work / "foreign")
    refused(run("sal", *words, foreign / "mr", "--resume", cwd=work), "run made with pretrain_")
    (work / "foreign/pretrained.pt").unlink()
    (work / "foreign/sal_n1_s0.pt").unlink()
    done = run("sal", *words, foreign / "mr", foreign / "ct", "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    assert per_volume(work / "foreign") == table


def test_other_scans_that_do_not_fit(finished, phantom, foreign, tmp_path):
    out, work, _ = finished("sal")
    for c in (0, 1):
        save(tmp_path / f"two/imagesTr/x_000{c}.nii.gz", volume(c)[0])
    info = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0}}
    (tmp_path / "two/dataset.json").write_text(json.dumps(info))
    leak = tmp_path / "leak/images"
    leak.mkdir(parents=True)
    shutil.copy(foreign / "copies/images/secret_ED.nii.gz", leak)

    def go(*words):
        here = ["--data", phantom, "--cache", work / "cache", "--out", tmp_path / "o"]
        module, run_ = started("sal", *here, *words)
        common.pretraining_slices(run_, run_.dataset)

    for folders, why in [([tmp_path / "two"], "two: 2 channels, .* has 1"),
                         ([tmp_path / "nothing"], "does not exist"),
                         ([foreign / "mr", foreign / "ct/../mr"], "every folder once"),
                         ([foreign / "mr", "--init", out / "pretrained.pt"], "with --init"),
                         ([leak.parent], "nothing is left to pre-train on")]:
        with pytest.raises(common.DataError, match=why):
            go("--pretrain-data", *folders)


# ------------------------------------------------------------------------- repeat, kill and resume


@every_script
def test_kill_and_resume(script, finished, phantom):
    """Killed again and again and resumed: the numbers of the undisturbed run, to the byte.

    So the same command gives the same numbers, too.
    """
    out, work, _ = finished(script)
    words = ["--data", phantom, *options(script), "--labelled", 1, 2, "--seeds", 0, 1]
    words += ["--out", f"killed_{script}", "--save-every", 1]
    killed = work / f"killed_{script}"
    deaths = 0
    first = "options.json" if script == "cct_r" else "pretraining.pt"
    targets = [first, f"finetuning_{script}_n1_s1.pt"]             # the latter after whole rows
    for target in [*targets, None]:
        resume = ["--resume"] if killed.exists() else []
        before = target and written(killed / target)
        process = subprocess.Popen(command(script, *words, *resume), cwd=work,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while target and process.poll() is None:
            if written(killed / target) != before:
                process.send_signal(signal.SIGKILL)
                deaths += 1
                break
            time.sleep(.002)
        _, errors = process.communicate(timeout=1800)
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert deaths == len(targets)
    assert process.returncode == 0
    assert (killed / "per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def test_a_resumed_run_may_have_more_rows(finished, phantom):
    out, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), "--out", "grown"]
    assert run_here("sal", *words, cwd=work).returncode == 0
    done = run_here("sal", *words, "--labelled", 1, 2, "--seeds", 0, 1, "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "grown/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def test_a_resumed_run_needs_the_same_scans(phantom, tmp_path):
    """One more patient changes the split: neither the run nor its baseline may be used."""
    shutil.copytree(phantom, tmp_path / "d")
    words = ["--data", tmp_path / "d", *options("sal"), "--out", "o"]
    assert run_here("sal", *words, cwd=tmp_path).returncode == 0
    for file in (tmp_path / "d").glob("*Tr/phantom006*"):
        shutil.copy(file, file.with_name(file.name.replace("006", "007")))
    refused(run_here("sal", *words, "--resume", cwd=tmp_path), "run made with cases")
    done = run_here("sal", *words, "--out", "p", "--scratch", "o", cwd=tmp_path)
    refused(done, "made with cases")
    assert not (tmp_path / "p").exists()                           # found before pre-training


def test_scratch_of_other_patients_is_refused(finished, phantom, tmp_path):
    out, work, _ = finished("sal")
    content = common.load_checkpoint(out / "scratch_n1_s0.pt")
    content["patients"] = ["somebody"]
    (tmp_path / "other").mkdir()
    common.save_checkpoint(tmp_path / "other/scratch_n1_s0.pt", **content)
    words = ["--data", phantom, *options("sal"), "--scratch", tmp_path / "other"]
    refused(run_here("sal", *words, "--out", "q", cwd=work), "trained on somebody", "--scratch")


def test_scratch_of_other_views_is_refused(finished, phantom):
    """--base-views changes the baseline, so a row made with it is not the other scripts' row."""
    _, work, _ = finished("sal")
    words = ["--data", phantom, *options("cct_r"), "--base-views", "--rows", "scratch"]
    assert run("cct_r", *words, "--out", "views", cwd=work).returncode == 0
    words = ["--data", phantom, *options("sal"), "--batch", 8, "--scratch", "views"]
    refused(run("sal", *words, "--out", "v", cwd=work), "made with base_views = True")


# ------------------------------------------------------------------------------------ new volumes


@every_script
def test_predict(script, finished, tmp_path):
    out, _, _ = finished(script)
    image = volume(0, (40, 30, 5))[0]
    one = save(tmp_path / "one.nii.gz", image, (1.5, 1.5, 8), "RAS")
    two = save(tmp_path / "two.nii", image[..., :1], (1.5, 1.5, 8), "PSL")
    network = out / f"{script}_n2_s0.pt"
    done = run_here(script, "--predict", one, two, "--checkpoint", network, "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    for name, source in (("one", one), ("two", two)):
        label = nib.load(tmp_path / f"p/predictions/{name}.nii.gz")
        native = nib.load(source)
        assert label.shape == native.shape
        assert np.allclose(label.affine, native.affine)
        assert label.get_data_dtype() == np.uint8
        assert np.asarray(label.dataobj).max() <= 3


@every_script
def test_predict_equals_the_scored_prediction(script, finished, phantom, tmp_path):
    out, _, _ = finished(script)
    key = (script, "2", "0")
    own = [t for t in per_volume(out) if (t["method"], t["labelled"], t["seed"]) == key]
    case = own[0]["case"]
    network = out / f"{script}_n2_s0.pt"
    image = phantom / f"imagesTr/{case}.nii.gz"
    run_here(script, "--predict", image, "--checkpoint", network, "--out", tmp_path)
    pred = np.asarray(nib.load(tmp_path / f"predictions/{case}.nii.gz").dataobj)
    truth = np.asarray(nib.load(phantom / f"labelsTr/{case}.nii.gz").dataobj)
    want = {t["class"]: float(t["dice"]) for t in own if t["case"] == case}
    got = common.dice_score(pred, truth, [1, 2, 3])
    assert list(got.values()) == pytest.approx([want[k] for k in ("RV", "Myo", "LV")], abs=.02)


def test_predict_names_a_header_that_says_nothing(finished, tmp_path):
    out, _, _ = finished("sal")
    image = volume(0, (40, 30, 5))[0]
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "silent.nii.gz")
    words = ["--checkpoint", out / "sal_n2_s0.pt", "--out", tmp_path]
    done = run_here("sal", "--predict", tmp_path / "silent.nii.gz", *words)
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stdout
    assert "silent" in done.stdout


def test_init_from_another_methods_weights(finished, phantom):
    out, work, _ = finished("sal")
    content = common.load_checkpoint(out / "pretrained.pt")
    del content["heads"]
    content["method"] = "macl"
    content["parts"] = ["encoder", "decoder"]
    common.save_checkpoint(work / "macl.pt", **content)
    words = ["--data", phantom, *options("sal"), "--init", work / "macl.pt", "--out", "of_macl"]
    done = run_here("sal", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "of_macl/pretrained.pt").exists()
    assert "macl gives" in done.stdout


# -------------------------------------------------------------------------------------- bad input


def test_bad_paths_and_options(finished, phantom, tmp_path):
    out, work, _ = finished("sal")

    def go(*extra):
        words = ["--data", phantom, *options("sal"), "--out", tmp_path / "o"]
        return run_here("sal", *words, *extra, cwd=work)

    refused(run_here("sal", "--data", tmp_path / "nothing", cwd=tmp_path), "does not exist")
    refused(go("--labelled", 1, 99), "--labelled 99", "only")
    refused(go("--labelled", 0), "--labelled", "1 or more")
    refused(go("--seeds", 0, 0), "--seeds", "once")
    refused(go("--size", 40), "--size 40", "multiple of 16")
    refused(go("--spacing", "nan"), "--spacing nan")
    refused(go("--pretrain-lr", -1), "--pretrain-lr -1.0", "0 or more")
    refused(go("--scratch", tmp_path / "nothing"), "--scratch", "not the folder of a run")
    refused(go("--device", "mps" if torch.cuda.is_available() else "cuda:7"), "not available")
    refused(go("--init", out / "options.json"), "options.json", "not a checkpoint")
    refused(go("--init", out / "sal_n1_s0.pt"), "no weights to start from")
    refused(go("--init", out / "pretrained.pt", "--width", 8), "weights do not fit", "--width")
    assert not (tmp_path / "o").exists()                           # nothing was begun
    assert run_here("sal", "--winndows", 3).returncode == 2


def test_bad_predictions(finished, tmp_path):
    out, work, _ = finished("sal")
    network = out / "sal_n1_s0.pt"

    def go(script, file, *words):
        return run_here(script, "--predict", tmp_path / file, "--out", tmp_path, *words, cwd=work)

    refused(go("sal", "x.nii"), "--checkpoint")
    refused(go("sal", "no.nii", "--checkpoint", network), "no.nii")
    refused(go("sal", "x.nii", "--checkpoint", out / "pretrained.pt"), "no segmentation head")
    refused(go("macl", "x.nii", "--checkpoint", network), "checkpoint of sal, not of macl")
    content = torch.load(network, weights_only=True)
    torch.save({**content, "modality": "[0, 1]"}, tmp_path / "npz.pt")
    refused(go("sal", "x.nii", "--checkpoint", tmp_path / "npz.pt"), "trained on npz slices")


@every_script
def test_a_run_is_never_overwritten_or_mixed(script, finished, phantom):
    out, work, _ = finished(script)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    words = ["--data", phantom, *options(script), "--labelled", 1, 2, "--seeds", 0, 1]
    words += ["--out", script]
    refused(run(script, *words, cwd=work), "holds a run already", "--resume")
    refused(run_here(script, *words, "--resume", "--lr", 3, cwd=work), "lr = 0.01, now 3.0")
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_bad_scan_among_good_ones(phantom, tmp_path):
    shutil.copytree(phantom, tmp_path / "d")
    file = tmp_path / "d/imagesTr/phantom003_ES.nii.gz"
    file.write_bytes(file.read_bytes()[:2000])
    done = run_here("sal", "--data", tmp_path / "d", *options("sal"), "--out", "o", cwd=tmp_path)
    refused(done, "phantom003_ES.nii.gz", "not a readable")
    assert not list((tmp_path / "cache").glob("*"))                # no half cache


def test_a_validation_patient_without_label(phantom, tmp_path):
    shutil.copytree(phantom, tmp_path / "d")
    for file in (tmp_path / "d/labelsTr").glob("*"):
        if file.name[:10] > "phantom002":
            file.unlink()
    done = run_here("sal", "--data", tmp_path / "d", *options("sal"), "--out", "o", cwd=tmp_path)
    refused(done, "2 patients with labels")


def test_unwritable_and_full_output(finished, phantom, tmp_path):
    _, work, _ = finished("sal")
    (tmp_path / "file").write_text("x")
    words = ["--data", phantom, *options("sal"), "--out"]
    refused(run_here("sal", *words, tmp_path / "file/o", cwd=work), "cannot be written")

    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))        # of one file

    done = run("sal", *words, tmp_path / "full", cwd=work, preexec_fn=full_disk)
    refused(done, "cannot be written", "full")
    assert json.loads((tmp_path / "full/options.json").read_text())
    assert not list((tmp_path / "full").rglob("*partial*"))


# ------------------------------------------------------------------------------------- real scans

GRIDS = {"acdc": ["--spacing", 6], "Task04_Hippocampus": ["--size", 48, "--spacing", 1.5]}


def real_scans(name):
    """The folder of a set of real scans; the test is skipped where it is not on this machine."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not on this machine")
    return SHARED / name


@pytest.mark.parametrize("name", GRIDS)
def test_real_scans(name, tmp_path):
    """The whole script on real scans, a few steps (of ACDC the first 12 patients)."""
    folder = real_scans(name)
    if name == "acdc":
        patients = sorted((folder / "training").glob("patient*"))[:12]
        folder = tmp_path / "acdc"
        folder.mkdir()
        for patient in patients:
            (folder / patient.name).symlink_to(patient)
    words = [*options("sal"), "--split", "val", *GRIDS[name], "--windows", 1, "--out", "o"]
    done = run_here("sal", "--data", folder, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_keeps_the_truth(name):
    """Labels on the network's grid and back again lose little."""
    cases = data.find_cases(real_scans(name))
    spacing, size = data.default_grid(cases)
    worst = []
    for case in cases[::37]:
        if case.label:
            v = data.read_case(case, cases)
            label = torch.from_numpy(v.label).long()
            one_hot = F.one_hot(label, len(cases.classes)).movedim(-1, 1).float()
            placed = common.to_network(one_hot, v.spacing, spacing, size)
            back = common.to_native(placed, v.label.shape, v.spacing, spacing)
            score = common.dice_score(back, v.label, range(1, len(cases.classes)))
            worst.append(min(score.values()))
    assert min(worst) > .85, worst
    assert np.mean(worst) > .93, worst
