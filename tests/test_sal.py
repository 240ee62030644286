"""SAL: its options, what it takes from pre-training, what it writes. Losses: test_losses.py."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, noted_rates, options, refused, run_here, started

import common
import data
import sal


def begun(phantom, work, tmp_path, *words):
    """(sal, its run with these options, ready to train)."""
    cache = work / "cache"
    return started("sal", "--data", phantom, "--cache", cache, "--out", tmp_path / "o", *words)


def test_what_sal_writes(finished):
    out, _, _ = finished("sal")
    log = common.read_log(out)
    first = next(r for r in log if r["phase"] == "pretrain")
    assert first["GP_chance"] == pytest.approx(math.log(7))        # 2 x 4 views: ln(n - 1)
    assert {"GP", "WLA", "WLA_strangers", "U", "random_pairs", "step"} <= set(first)
    assert (out / "figures/matches.png").exists()
    content = common.load_checkpoint(out / "pretrained.pt", "sal")
    assert content["parts"] == ["encoder"]
    used = json.loads((out / "options.json").read_text())
    assert used["threshold"] == used["threshold_la"] == .1         # with --data, and not ACDC


def test_pretrained_encoder_reaches_the_fine_tuned_network(finished, phantom, tmp_path):
    out, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--lr", 0, "--pretrained-lr", 0)
    start = common.load_checkpoint(out / "pretrained.pt", "sal")
    unet = sal.finetune(run_, common.Row("sal", 1, 0), start)
    scratch = sal.finetune(run_, common.Row("scratch", 1, 0))
    for (name, value), fresh in zip(unet.named_parameters(), scratch.parameters()):
        if name.startswith("encoder"):
            assert torch.equal(value, start["unet"][name])
            assert value.ndim == 1 or not torch.equal(value, fresh)
        else:
            assert torch.equal(value, fresh)                       # decoder and head start the same


def test_rates_of_the_two_groups(finished, phantom, tmp_path):
    """A pre-trained encoder has --pretrained-lr, all else --lr."""
    out, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrained-lr", 0)
    start = common.load_checkpoint(out / "pretrained.pt", "sal")
    unet = sal.finetune(run_, common.Row("sal", 1, 0), start)
    for name, value in unet.named_parameters():
        if name.startswith("encoder"):
            assert torch.equal(value, start["unet"][name])
    torch.manual_seed(0)
    drawn = run_.unet().state_dict()                               # as fine-tuning draws them
    assert not torch.equal(unet.head.weight, drawn["head.weight"])
    sal, run_ = begun(phantom, work, tmp_path / "other", "--lr", 0)
    unet = sal.finetune(run_, common.Row("sal", 1, 0), start)
    for name, value in unet.named_parameters():
        if not name.startswith("encoder"):
            assert torch.equal(value, drawn[name]), name
        elif value.ndim == 4:
            assert not torch.equal(value, start["unet"][name]), name


def test_rate_of_pretraining(finished, phantom, tmp_path, monkeypatch):
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrain-lr", 2)
    seen = noted_rates(monkeypatch)
    sal.pretrain(run_)
    assert seen == [[pytest.approx(1 + math.cos(math.pi * t / 6))] for t in range(6)]


def test_a_pair_is_moved_alike_and_told_apart(finished, phantom, tmp_path, monkeypatch):
    """Two views of one slice, intensities left alone: every pixel matches; and GP's positions."""
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrain-steps", 1)
    positions = []
    loss = sal.global_positional_loss

    def positional(z, position, *rest):
        positions.append(position)
        return loss(z, position, *rest)

    def same_slice(pool, numbers, n_pairs, threshold):
        return numbers[:n_pairs], numbers[:n_pairs]

    monkeypatch.setattr(sal, "global_positional_loss", positional)
    monkeypatch.setattr(sal, "sample_pairs", same_slice)
    monkeypatch.setattr(sal, "photometric", lambda x: x)
    sal.pretrain(run_)
    assert common.read_log(run_.out)[0]["WLA"] < 1e-5
    own = run_.dataset.position[run_.train[:4]]                    # 4 pairs
    assert positions[0].tolist() == pytest.approx([*own, *own])


def test_rates_follow_what_is_taken(finished, phantom, tmp_path):
    """--init with a decoder, as Pix2Rep's: it has --pretrained-lr as the encoder has, not --lr."""
    out, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrained-lr", 0)
    start = common.load_checkpoint(out / "pretrained.pt", "sal")
    start["parts"] = ["encoder", "decoder"]
    unet = sal.finetune(run_, common.Row("sal", 1, 0), start)
    for name, value in unet.named_parameters():
        assert torch.equal(value, start["unet"].get(name)) != name.startswith("head"), name


def test_each_threshold_has_its_loss(finished, phantom, tmp_path, monkeypatch):
    """--threshold is GP's, --threshold-la that of the pairs."""
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--threshold", .35, "--threshold-la", .2,
                      "--pretrain-steps", 1)
    seen = []
    pairs = sal.sample_pairs
    loss = sal.global_positional_loss

    def sample_pairs(dataset, numbers, n_pairs, threshold):
        seen.append(set(threshold))
        return pairs(dataset, numbers, n_pairs, threshold)

    def positional(z, position, threshold, temperature):
        seen.append(set(threshold))
        return loss(z, position, threshold, temperature)

    monkeypatch.setattr(sal, "sample_pairs", sample_pairs)
    monkeypatch.setattr(sal, "global_positional_loss", positional)
    sal.pretrain(run_)
    assert seen == [{.2}, {.35}]


def test_each_set_keeps_its_own_threshold(finished, phantom, tmp_path):
    """Of two sets pre-trained on, ACDC has t = 0.35 and the other 0.1, whatever slice is drawn."""
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrain-data", phantom)
    acdc = SimpleNamespace(layout="ACDC")
    run_.sources = [run_.cases, acdc]
    run_.o.threshold = run_.o.threshold_la = None
    sal.check(run_)
    assert run_.o.threshold == run_.o.threshold_la == [.1, .35]
    d = run_.dataset
    pool = common.Pool([(d, run_.train), (d, d.of_patients(run_.split["val"]))])
    t = sal.by_slice(run_.o.threshold, pool)
    assert (t == np.where(pool.part == 0, .1, .35)).all() and {*t} == {.1, .35}
    i, j = sal.sample_pairs(pool, pool.numbers, 400, t)
    assert (np.abs(pool.slice[i] - pool.slice[j]) < t[i] * pool.depth[i] + 1e-5).all()
    far = np.abs(pool.slice[i] - pool.slice[j])
    assert far[pool.part[i] == 1].max() > far[pool.part[i] == 0].max()
    close = common.is_close(pool.position, t)
    assert torch.equal(close, close.T)                             # two sets are never close
    one = pool.part == 1
    assert torch.equal(close[one][:, one], common.is_close(pool.position[one], .35))


def test_without_gp_only_the_levels_that_la_trains_are_taken(finished, phantom, tmp_path):
    """Deeper blocks get no gradient; handed over they would be random, at the rate of the rest."""
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--weight-gp", 0, "--level", 2, "--windows", 1,
                      "--pretrain-steps", 3, "--pretrained-lr", 0, "--lr", 0)
    start = sal.pretrain(run_)
    assert start["parts"] == ["encoder.blocks.0", "encoder.blocks.1", "encoder.blocks.2"]
    torch.manual_seed(1000)
    before = run_.unet(classes=2).state_dict()
    for name, value in start["unet"].items():
        if name.endswith("0.weight") and name.startswith("encoder"):
            taken = any(name.startswith(part) for part in start["parts"])
            moved = (value - before[name]).abs().max() > 1e-4      # more than weight decay
            assert moved == taken, name


def test_the_seed_of_pre_training(finished, phantom, tmp_path):
    _, work, _ = finished("sal")
    first = []
    for seed in (1, 1, 2):
        sal, run_ = begun(phantom, work, tmp_path / str(len(first)), "--pretrain-steps", 1,
                          "--pretrain-seed", seed)
        first.append(sal.pretrain(run_)["unet"]["encoder.blocks.0.0.weight"])
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_the_figure_seeks_where_training_seeks(finished, phantom, tmp_path, monkeypatch):
    """With windows of one place every pixel's match in matches.png is its own place."""
    out, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--windows", 4)     # 4 x 4 places at 32 x 32
    marked = []
    monkeypatch.setattr(sal, "mark_place", marking(marked))
    sal.draw_matches(run_, common.load_checkpoint(out / "pretrained.pt", "sal"))
    assert len(marked) == 2 * 9 * 2
    assert marked[::2] == marked[1::2]


def marking(marked):
    """In place of `mark_place`: append the place."""
    def mark_place(axis, y, x, pixels, colour):
        marked.append((y, x))
    return mark_place


def test_pairs_lie_in_one_volume_and_close(finished, phantom, tmp_path):
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--threshold", .35)
    d = run_.dataset
    seen = set()
    for _ in range(50):
        i, j = sal.sample_pairs(d, run_.train, 16, .35)
        assert (d.volume[i] == d.volume[j]).all()
        assert (np.abs(d.slice[i] - d.slice[j]) < .35 * d.depth[i]).all()
        assert set(j) <= set(run_.train)
        seen |= set(d.slice[j] - d.slice[i])
    assert {0, 1, -1, 2, -2} <= seen                               # itself, and both sides


def test_slices_without_a_partner_are_noted(capsys):
    """Of 8 slices none is nearer than a tenth of 8, and of 10 the next is just so near."""
    pool = SimpleNamespace(depth=np.array([8] * 8 + [10] * 10), numbers=np.arange(18))
    sal.note_lonely(pool, np.full(18, .1))
    assert "44% of the slices" in capsys.readouterr().out
    sal.note_lonely(pool, np.full(18, .35))
    pool.numbers = np.arange(8, 18)
    sal.note_lonely(pool, np.full(18, .1))
    assert capsys.readouterr().out == ""


def test_what_to_look_at_depends_on_the_repulsion(finished, phantom):
    _, work, printed = finished("sal")
    assert "that pixel's own place" in printed
    words = ["--data", phantom, *options("sal"), "--rows", "sal", "--weight-u", 0]
    done = run_here("sal", *words, "--pretrain-steps", 1, "--out", "unrepelled", cwd=work)
    assert "that pixel's own place" not in done.stdout
    assert "Without L_U nothing" in done.stdout


@pytest.mark.parametrize("flags", [
    ["--weight-la", 0, "--weight-u", 0],
    ["--weight-gp", 0, "--weight-u", 0],
    ["--windows", 1, "--level", 2, "--radius", 2, "--spare-matches"],
    ["--threshold", .1, "--threshold-la", .35, "--split", "val"],
    ["--weight-la", 0],
    ["--windows", 4],
    ["--precision", "bfloat16", "--pretrained-lr", 1e-3],
])
def test_options(flags, finished, phantom):
    _, work, _ = finished("sal")
    name = "o" + "".join(map(str, flags))
    done = run_here("sal", "--data", phantom, *options("sal"), *flags, "--out", name, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "gain over scratch" in done.stdout


def test_weights_are_those_of_the_sum(finished, phantom, tmp_path, monkeypatch):
    """loss = weight_gp L_GP + weight_la L_WLA + weight_u L_U, whatever the weights."""
    _, work, _ = finished("sal")
    sal, run_ = begun(phantom, work, tmp_path, "--pretrain-steps", 1, "--weight-gp", 2,
                      "--weight-la", 3, "--weight-u", 5)
    losses = []
    parts = {}
    backward = torch.Tensor.backward

    def watched(loss):
        losses.append(loss)
        backward(loss)

    def log(phase, **row):
        parts.update(row)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    monkeypatch.setattr(run_, "log", log)
    sal.pretrain(run_)
    want = 2 * parts["GP"] + 3 * parts["WLA"] + 5 * parts["U"]
    assert losses[0].item() == pytest.approx(want.item(), rel=1e-6)


def test_bad_options_of_sal(finished, phantom, tmp_path):
    _, work, _ = finished("sal")

    def go(*extra):
        words = ["--data", phantom, *options("sal"), "--out", tmp_path / "o"]
        return run_here("sal", *words, *extra, cwd=work)

    refused(go("--windows", 3), "--windows 3", "does not divide", "divisor of 4")
    refused(go("--level", 5), "--level 5")
    refused(go("--weight-la", 0, "--weight-gp", 0), "nothing of the paper is left")
    refused(go("--threshold", 0), "--threshold 0.0")
    refused(go("--threshold-la", 2), "--threshold-la 2.0")
    refused(go("--radius", -1), "--radius -1")
    refused(go("--pairs", 1), "--pairs")
    refused(go("--temperature", 0), "--temperature 0.0")
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not (SHARED / "acdc").is_dir(), reason="real scans are not on this machine")
def test_acdc_is_found_and_split():
    cases = data.find_cases(SHARED / "acdc")
    assert cases.layout == "ACDC"
    assert len(cases) == 200
    names = [c.name for c in cases if c.patient == "patient090"]
    assert names == ["patient090_frame04", "patient090_frame11"]
    assert any("patient090_4d" in w for w in cases.warnings)
    assert len(data.split_patients(cases)["train"]) == 70
    v = data.read_case(next(c for c in cases if c.name == "patient099_frame01"), cases)
    assert v.image.shape == (1, 16, 224, 154)
    assert v.spacing == pytest.approx((5, 1.7857, 1.7857), abs=1e-3)
