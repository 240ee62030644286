"""The script as a user runs it: default and other options, what it writes, bad input, kill and resume, --predict, --init."""
import csv, json, math, os, signal, subprocess, sys, time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, SHARED, TINY, refused, run, save, volume

import common
import data
import sal


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished tiny run: (its folder, the work folder with the cache, what it printed)."""
    work = tmp_path_factory.mktemp("work")
    done = run("sal.py", "--data", phantom, *TINY, "--seeds", 0, 1, "--labelled", 1, 2, "--out", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "out", work, done.stdout


def test_what_a_run_writes(finished):
    out, _, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(r["method"], r["labelled"], r["seed"]) for r in metrics["rows"]] == [
        (m, n, s) for n in (1, 2) for s in (0, 1) for m in ("scratch", "sal")]
    for r in metrics["rows"]:
        assert len(r["patients"]) == r["labelled"] and set(r["dice"]) == {"RV", "Myo", "LV"} and r["n_volumes"] == 2
        assert {"mean_dice", "hd95_mm", "assd_mm", "missed"} <= set(r)
    assert all(s["n"] == 2 for s in metrics["summary"]) and len(metrics["gains"]) == 2 and metrics["peak_memory_mb"] > 100
    assert {"rule", "seconds", "versions"} <= set(metrics) and metrics["seconds"]["pretrain"] > 0
    table = list(csv.DictReader((out / "per_volume.csv").open()))
    assert len(table) == 8 * 2 * 3                                        # runs x volumes x classes
    for r in metrics["rows"]:                                             # the means follow from the volumes
        own = [float(t["dice"]) for t in table if (t["method"], int(t["labelled"]), int(t["seed"])) == (r["method"], r["labelled"], r["seed"])]
        assert r["mean_dice"] == pytest.approx(np.nanmean(own), abs=1e-9)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first = next(r for r in log if r["phase"] == "pretrain")
    assert first["GP_chance"] == pytest.approx(math.log(7)) and {"GP", "WLA", "random_pairs", "step"} <= set(first)
    assert json.loads((out / "options.json").read_text())["width"] == 4
    assert {f.name for f in (out / "figures").iterdir()} == {"dice.png", "overlays.png", "matches.png"}
    assert "gain over scratch" in printed and "| 2 | sal |" in printed and "expect about" in printed and "split 70 / 10 / 20" in printed
    assert not list(out.rglob("*partial*"))


def test_test_patients_are_never_trained_on(finished, phantom):
    out, _, _ = finished
    split = data.split_patients(data.find_cases(phantom))
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    scored = {t["patient"] for t in csv.DictReader((out / "per_volume.csv").open())}
    assert scored == set(split["test"]) and not scored & {p for r in rows for p in r["patients"]} and not scored & set(split["train"])


def test_pretrained_encoder_reaches_the_fine_tuned_network(finished, phantom, tmp_path, monkeypatch):
    out, work, _ = finished
    o = sal.parse_options(["--data", str(phantom), *TINY, "--cache", str(work / "cache")])
    cases = data.find_cases(phantom)
    sal.resolve(o, cases)
    dataset = common.prepare(cases, o.spacing, o.size, o.cache)
    start, o.lr, o.encoder_lr = common.load_checkpoint(out / "pretrained.pt", "sal"), 0., 0.
    unet = sal.finetune("x", dataset, np.arange(10), 4, 0, o, torch.device("cpu"), tmp_path, start)
    scratch = sal.finetune("y", dataset, np.arange(10), 4, 0, o, torch.device("cpu"), tmp_path)
    for (k, v), s in zip(unet.named_parameters(), scratch.parameters()):
        if k.startswith("encoder"):
            assert torch.equal(v, start["unet"][k]) and (not torch.equal(v, s) or v.ndim == 1)
        else:
            assert torch.equal(v, s)                                      # decoder and head start the same in both


def test_the_same_command_gives_the_same_numbers(finished, phantom):
    out, work, _ = finished
    done = run("sal.py", "--data", phantom, *TINY, "--seeds", 0, 1, "--labelled", 1, 2, "--out", "twice", cwd=work)
    assert done.returncode == 0
    assert (work / "twice/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


@pytest.mark.parametrize("flags", [["--no-la"], ["--no-gp", "--no-uniformity"], ["--windows", "1", "--level", "2"],
                                   ["--threshold", ".1", "--split", "val"], ["--precision", "bfloat16", "--encoder-lr", "1e-3"]])
def test_options(flags, finished, phantom):
    done = run("sal.py", "--data", phantom, *TINY, "--seeds", 0, *flags, "--out", "o" + "".join(flags), cwd=finished[1])
    assert done.returncode == 0 and "gain over scratch" in done.stdout, done.stderr


def test_default_data_is_the_phantom(tmp_path):
    done = run("sal.py", *TINY, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and "80 volumes" in done.stdout and (tmp_path / "out/figures/overlays.png").exists(), done.stderr


def test_kill_and_resume(finished, phantom):
    """Killed with SIGKILL again and again, at whatever moment, and resumed: the numbers of the undisturbed run."""
    out, work, _ = finished
    command = [sys.executable, str(ROOT / "sal.py"), "--data", str(phantom), *TINY, "--seeds", "0", "1", "--labelled", "1", "2",
               "--out", "killed"]
    killed, seen = 0, set()
    for target in ("pretraining.pt", "pretrained.pt", "scratch_n1_s0.pt", "finetuning.pt", "sal_n1_s1.pt", None):
        resume = ["--resume"] if (work / "killed").exists() else []
        process = subprocess.Popen(command + resume, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        before = {f: f.stat().st_mtime_ns for f in (work / "killed").glob("*")} if resume else {}
        while target and process.poll() is None:
            file = work / "killed" / target
            if file.exists() and before.get(file) != file.stat().st_mtime_ns:
                process.send_signal(signal.SIGKILL)
                killed += 1
                seen.add(target)
                break
            time.sleep(.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert killed >= 4 and process.returncode == 0
    assert (work / "killed/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def test_predict(finished, tmp_path):
    out, _, _ = finished
    image = volume(0, (40, 30, 5))[0]
    one = save(tmp_path / "one.nii.gz", image, (1.5, 1.5, 8), "RAS")
    two = save(tmp_path / "two.nii", image[..., :1], (1.5, 1.5, 8), "PSL")
    done = run("sal.py", "--predict", one, two, "--checkpoint", out / "sal_n2_s0.pt", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    for name, source in (("one", one), ("two", two)):
        label, native = nib.load(tmp_path / f"p/predictions/{name}.nii.gz"), nib.load(source)
        assert label.shape == native.shape and np.allclose(label.affine, native.affine)
        assert label.get_data_dtype() == np.uint8 and np.asarray(label.dataobj).max() <= 3


def test_predict_equals_the_scored_prediction(finished, phantom, tmp_path):
    out, _, _ = finished
    table = [t for t in csv.DictReader((out / "per_volume.csv").open()) if (t["method"], t["labelled"], t["seed"]) == ("sal", "2", "0")]
    case = table[0]["case"]
    run("sal.py", "--predict", phantom / f"imagesTr/{case}.nii.gz", "--checkpoint", out / "sal_n2_s0.pt", "--out", tmp_path)
    pred = np.asarray(nib.load(tmp_path / f"predictions/{case}.nii.gz").dataobj)
    truth = np.asarray(nib.load(phantom / f"labelsTr/{case}.nii.gz").dataobj)
    want = {t["class"]: float(t["dice"]) for t in table if t["case"] == case}
    assert list(common.dice_score(pred, truth, [1, 2, 3]).values()) == pytest.approx([want[k] for k in ("RV", "Myo", "LV")], abs=.02)


def test_init_from_another_methods_weights(finished, phantom):
    out, work, _ = finished
    content = common.load_checkpoint(out / "pretrained.pt")
    del content["heads"]
    common.save_checkpoint(work / "macl.pt", **{**content, "method": "macl", "parts": ["encoder", "decoder"]})
    done = run("sal.py", "--data", phantom, *TINY, "--seeds", 0, "--init", work / "macl.pt", "--out", "init", cwd=work)
    assert done.returncode == 0 and not (work / "init/pretrained.pt").exists() and "macl gives" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ bad input

def test_bad_options_and_paths(finished, phantom, tmp_path):
    out, work, _ = finished
    go = lambda *extra: run("sal.py", "--data", phantom, *TINY, "--out", tmp_path / "o", *extra, cwd=work)
    refused(run("sal.py", "--data", tmp_path / "nothing", cwd=tmp_path), "does not exist")
    refused(go("--labelled", 1, 99), "--labelled 99", "only")
    refused(go("--size", 40), "--size 40", "multiple of 16")
    refused(go("--windows", 3), "--windows 3", "does not divide")
    refused(go("--no-la", "--no-gp"), "nothing is left")
    refused(go("--device", "cuda:7") if not torch.cuda.is_available() else go("--device", "mps"), "not available")
    refused(go("--init", out / "options.json"), "options.json", "not a checkpoint")
    refused(go("--init", out / "sal_n1_s0.pt"), "no weights to start from")
    refused(go("--init", out / "pretrained.pt", "--width", 8), "weights do not fit", "--width")
    refused(run("sal.py", "--predict", "x.nii"), "--checkpoint")
    refused(run("sal.py", "--predict", tmp_path / "no.nii", "--checkpoint", out / "sal_n1_s0.pt", "--out", tmp_path / "p"), "no.nii")
    refused(run("sal.py", "--predict", "x.nii", "--checkpoint", out / "pretrained.pt"), "no segmentation head")
    assert not (tmp_path / "o").exists()                                          # nothing was begun
    assert run("sal.py", "--winndows", 3).returncode == 2


def test_a_run_is_never_overwritten_or_mixed(finished, phantom):
    out, work, _ = finished
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    go = lambda *extra: run("sal.py", "--data", phantom, *TINY, "--seeds", 0, 1, "--labelled", 1, 2, "--out", "out", *extra, cwd=work)
    refused(go(), "holds a run already", "--resume")
    refused(go("--resume", "--lambda-la", 3), "lambda_la = 1.0, now 3.0")
    common.save_checkpoint(work / "other.pt", method="macl", options={}, unet={})
    refused(run("sal.py", "--predict", "x.nii", "--checkpoint", work / "other.pt"), "checkpoint of macl, not of sal")
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_bad_scan_among_good_ones(phantom, tmp_path):
    import shutil
    shutil.copytree(phantom, tmp_path / "d")
    file = tmp_path / "d/imagesTr/phantom003_ES.nii.gz"
    file.write_bytes(file.read_bytes()[:2000])
    refused(run("sal.py", "--data", tmp_path / "d", *TINY, "--out", "o", cwd=tmp_path), "phantom003_ES.nii.gz", "not a readable")
    assert not list((tmp_path / "cache").glob("*"))                               # no half cache


def test_a_validation_patient_without_label(phantom, tmp_path):
    import shutil
    shutil.copytree(phantom, tmp_path / "d")
    for file in (tmp_path / "d/labelsTr").glob("*"):
        if file.name[:10] > "phantom002":
            file.unlink()
    refused(run("sal.py", "--data", tmp_path / "d", *TINY, "--out", "o", cwd=tmp_path), "2 patients with labels")


def test_unwritable_and_full_output(finished, phantom, tmp_path):
    out, work, _ = finished
    (tmp_path / "file").write_text("x")
    refused(run("sal.py", "--data", phantom, *TINY, "--out", tmp_path / "file" / "o", cwd=work), "cannot be made")
    if os.name == "posix":                                                        # a full disk, as a limit on a file's size
        import resource
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        done = run("sal.py", "--data", phantom, *TINY, "--out", tmp_path / "full", cwd=work, preexec_fn=limit)
        refused(done, "cannot be written", "full")
        assert json.loads((tmp_path / "full/options.json").read_text()) and not list((tmp_path / "full").rglob("*partial*"))


# ------------------------------------------------------------------------------------------------ real scans

real = pytest.mark.skipif(not (SHARED / "acdc").is_dir(), reason="real scans are not on this machine")


@real
def test_acdc_is_found_and_split():
    cases = data.find_cases(SHARED / "acdc")
    assert cases.layout == "ACDC" and len(cases) == 200 and [c.name for c in cases if c.patient == "patient090"] == [
        "patient090_frame04", "patient090_frame11"]
    assert any("patient090_4d" in w for w in cases.warnings) and len(data.split_patients(cases)["train"]) == 70
    v = data.read_case(next(c for c in cases if c.name == "patient099_frame01"), cases)
    assert v.image.shape == (1, 16, 224, 154) and v.spacing == pytest.approx((5, 1.7857, 1.7857), abs=1e-3)


@real
@pytest.mark.parametrize("name", ["acdc", "Task04_Hippocampus"])
def test_real_scans(name, tmp_path):
    """The whole script on real scans, a few steps; and the crop keeps the truth: network grid and back, scored."""
    done = run("sal.py", "--data", SHARED / name, *TINY[4:], *(["--size", 32, "--spacing", 6] if name == "acdc" else ["--size", 48, "--windows", 2]),
               "--seeds", 0, "--split", "val", "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = data.find_cases(SHARED / name)
    spacing, size = data.default_grid(cases)
    lost = []
    for case in cases[::37]:
        if case.label:
            v = data.read_case(case, cases)
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(v.label).long(), len(cases.classes)).movedim(-1, 1).float()
            back = common.to_native(common.to_network(one_hot, v.spacing, spacing, size), v.label.shape, v.spacing, spacing)
            lost.append(min(common.dice_score(back, v.label, range(1, len(cases.classes))).values()))
    assert min(lost) > .85 and np.mean(lost) > .93, lost
