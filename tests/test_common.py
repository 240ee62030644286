"""U-Net, Dice, distances, grids, prepared slices, augmentation, summary: by hand, by brute force, by invariants."""
import json, math, os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save, volume

import common
import data
from common import UNet, dice_loss, dice_score, surface_distances


# ------------------------------------------------------------------------------------------------ U-Net

@pytest.mark.parametrize("blocks,shape", [(0, (64, 2, 2)), (1, (32, 4, 4)), (2, (16, 8, 8)), (3, (8, 16, 16)), (4, (4, 32, 32))])
def test_partial_decoder(blocks, shape):
    unet = UNet(1, 4, width=4).eval()
    features = unet.encoder(torch.randn(2, 1, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [(4 * 2 ** l, 32 >> l, 32 >> l) for l in range(5)]
    assert unet.decoder(features, blocks).shape[1:] == shape


def test_partial_decoder_leaves_later_blocks_untouched():
    unet = UNet(1, 4, width=4)
    unet.decoder(unet.encoder(torch.randn(2, 1, 32, 32)), 2).sum().backward()
    used = [all(p.grad is not None for p in block.parameters()) for block in unet.decoder.blocks]
    assert used == [True, True, False, False]
    assert unet(torch.randn(1, 1, 48, 48)).shape == (1, 4, 48, 48)


def test_load_weights_takes_only_the_named_parts():
    one, two = UNet(1, 2, 4), UNet(1, 4, 4)
    before = {k: v.clone() for k, v in two.state_dict().items()}
    taken, fresh = common.load_weights(two, one.state_dict(), ["encoder"])
    assert all(k.startswith("encoder") for k in taken) and not any(k.startswith("encoder") for k in fresh)
    for k, v in two.state_dict().items():
        assert torch.equal(v, one.state_dict()[k] if k in taken else before[k])
    part = common.load_weights(two, one.state_dict(), ["decoder.blocks.0"])[0]
    assert part and all(k.startswith("decoder.blocks.0.") for k in part)
    with pytest.raises(data.DataError, match=r"encoder.blocks.0.0.weight is \(8, 1, 3, 3\) here and \(4, 1, 3, 3\)"):
        common.load_weights(UNet(1, 2, 8), one.state_dict(), ["encoder"])


# ------------------------------------------------------------------------------------------------ Dice and distances

def test_dice_score_by_hand():
    truth = np.array([[1, 1, 0], [2, 2, 0]])
    pred = np.array([[1, 0, 0], [2, 2, 2]])
    got = dice_score(pred, truth, [1, 2, 3])
    assert got[1] == pytest.approx(2 / 3) and got[2] == pytest.approx(4 / 5) and math.isnan(got[3])
    assert dice_score(pred, truth * 0, [1])[1] == 0 and dice_score(torch.tensor(pred), torch.tensor(pred), [1])[1] == 1


def test_dice_loss_by_hand_and_float64():
    logits, label = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    p, total = logits.softmax(1).numpy(), 0
    for k in (1, 2):
        y = (label == k).numpy()
        total += (2 * sum(p[b, k, i, j] * y[b, i, j] for b in range(2) for i in range(4) for j in range(4)) + 1e-5) / (
            p[:, k].sum() + y.sum() + 1e-5)
    assert dice_loss(logits, label).item() == pytest.approx(1 - total / 2, abs=1e-6)
    sure = F.one_hot(label, 3).movedim(-1, 1).float() * 100
    assert dice_loss(sure, label).item() == pytest.approx(0, abs=1e-5)


def brute_distances(a, b, spacing):
    """HD95 and ASSD by a loop over every voxel and neighbour."""
    def surface(m):
        points = []
        for v in np.argwhere(m):
            inside = 0
            for axis in range(m.ndim):
                for step in (-1, 1):
                    w = v.copy()
                    w[axis] += step
                    inside += bool((w >= 0).all() and (w < m.shape).all() and m[tuple(w)])
            if inside < 2 * m.ndim:
                points.append(v * np.asarray(spacing))
        return points
    s, t = surface(a), surface(b)
    ab = [min(math.dist(p, q) for q in t) for p in s]
    ba = [min(math.dist(p, q) for q in s) for p in t]
    return max(np.percentile(ab, 95), np.percentile(ba, 95)), (sum(ab) + sum(ba)) / (len(ab) + len(ba))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (8, 1.5, 1.25)])
def test_distances_equal_brute_force(spacing):
    rng = np.random.default_rng(0)
    for _ in range(3):
        a, b = rng.random((2, 4, 7, 6)) > .6
        assert surface_distances(a, b, spacing) == pytest.approx(brute_distances(a, b, spacing), abs=1e-4)


def test_distances_by_hand():
    a, b = np.zeros((2, 5, 5, 5), bool)
    a[2, 2, 2], b[3, 2, 2] = 1, 1
    assert surface_distances(a, b, (10, 1, 1)) == pytest.approx((10, 10))         # one slice apart: 10 mm
    b[:] = 0
    b[2, 2, 4] = 1
    assert surface_distances(a, b, (10, 1, 1.5)) == pytest.approx((3, 3))
    assert surface_distances(a, a, (10, 1, 1)) == (0, 0)
    full, hole = np.ones((2, 5, 5, 5), bool)
    hole[2, 2, 2] = 0                                                             # a hole has a surface of its own, 6 voxels
    assert surface_distances(full, hole, (1, 1, 1))[1] == pytest.approx(6 * 1 / (98 + 104))
    empty = np.zeros_like(a)
    assert all(math.isnan(v) for pair in ((a, empty), (empty, a), (empty, empty)) for v in surface_distances(*pair, (1, 1, 1)))


# ------------------------------------------------------------------------------------------------ scores and summary

def row(case, name, dice, hd95, missed=0):
    return {"case": case, "patient": case, "class": name, "dice": dice, "hd95_mm": hd95, "assd_mm": hd95, "missed": missed}


def test_run_row_and_summary_by_hand():
    nan = math.nan
    rows = [row("a", "RV", .8, 4.), row("b", "RV", 0., nan, 1), row("a", "LV", .9, 2.), row("b", "LV", nan, nan)]
    run = common.run_row("scratch", 1, 0, ["p"], rows)
    assert run["dice"] == pytest.approx({"RV": .4, "LV": .9}) and run["mean_dice"] == pytest.approx(.65)
    assert run["hd95_mm"] == pytest.approx(3) and (run["missed"], run["n_scores"], run["n_volumes"]) == (1, 3, 2)
    better = {**run, "method": "sal", "mean_dice": .75}
    runs = [run, better, {**run, "seed": 1}, {**better, "seed": 1, "mean_dice": .60}]
    summary, gains = common.summarise(runs)
    assert gains[0]["per_seed"] == pytest.approx([.10, -.05]) and gains[0]["gain"] == pytest.approx(.025)
    assert gains[0]["std"] == pytest.approx(np.std([.10, -.05], ddof=1))
    assert summary[1]["mean_dice"] == pytest.approx({"mean": .675, "std": np.std([.75, .6], ddof=1)})
    text = common.table(summary, gains, ["background", "RV", "LV"])
    one = common.table(*common.summarise(runs[:2]), ["background", "RV", "LV"])
    assert "| +10.0 |" in one and "±" not in one                                  # one seed has no spread
    assert "+2.5 ± 10.6" in text and "2 of 6" in text and len({line.count("|") for line in text.splitlines()}) == 1


# ------------------------------------------------------------------------------------------------ grids and slices

@pytest.mark.parametrize("shape,spacing,size", [((3, 61, 47), (9., 1.3, 1.7), 64), ((2, 90, 121), (9., 1.1, .8), 64), ((2, 64, 64), (5., 2., 2.), 64)])
def test_round_trip_native_network_native(shape, spacing, size):
    V, H, W = shape
    y, x = np.meshgrid(np.arange(H) * spacing[1], np.arange(W) * spacing[2], indexing="ij")
    centre = (H - 1) / 2 * spacing[1], (W - 1) / 2 * spacing[2]
    label = np.zeros(shape, int)
    label[:, np.hypot(y - centre[0] - 6, x - centre[1] + 9) < 16] = 1             # off the centre: a flip would show
    label[:, np.hypot(y - centre[0] + 8, x - centre[1] - 3) < 7] = 2
    one_hot = F.one_hot(torch.from_numpy(label), 3).movedim(-1, 1).float()
    network = common.to_network(one_hot, spacing, 2., size)
    assert network.shape == (V, 3, size, size)
    back = common.to_native(network, shape, spacing, 2.).numpy()
    assert back.shape == shape
    score = dice_score(back, label, [1, 2])
    assert score[1] > .97 and score[2] > .95
    for k in (1, 2):                                                              # not even half a pixel of drift
        assert np.abs(np.argwhere(back == k).mean(0) - np.argwhere(label == k).mean(0)).max() < .25


def test_outside_the_crop_is_background():
    probs = torch.zeros(1, 2, 32, 32)
    probs[:, 1] = 1
    back = common.to_native(probs, (1, 100, 100), (9., 1., 1.), 1.)
    assert back[0, 34:66, 34:66].all() and back.sum() == 32 * 32


@pytest.fixture
def plain(tmp_path):
    for n in range(3):
        image, label = volume(n, (40, 36, 4 + n))
        save(tmp_path / "d/images" / f"c{n}.nii.gz", image, (2, 2, 8))
        if n != 1:
            save(tmp_path / "d/labels" / f"c{n}.nii.gz", label, (2, 2, 8))
    return tmp_path


def test_prepared_slices(plain):
    cases = data.find_cases(plain / "d")
    d = common.prepare(cases, 2., 32, plain / "cache")
    assert d.images.shape == (15, 1, 32, 32) and isinstance(d.images, np.memmap) and isinstance(d.labels, np.memmap)
    assert d.volume.tolist() == [0] * 4 + [1] * 5 + [2] * 6 and d.slice.tolist() == [*range(4), *range(5), *range(6)]
    assert d.position[4:9] == pytest.approx([.2, .4, .6, .8, 1.])
    assert (d.labels[4:9] == 255).all() and d.labels[:4].max() == 3               # no label is 255, never class 0
    assert d.of_patients(["c1", "c2"]).tolist() == list(range(4, 15))
    assert d.of_patients(["c1", "c2"], labelled=True).tolist() == list(range(9, 15))
    v = data.read_case(cases[2], cases)
    want = data.normalise(v.image, "MR")[0, :, 2:34, 4:36] if v.image.shape[2:] == (36, 40) else None
    assert np.allclose(d.images[9:, 0], want, atol=1e-3) and np.array_equal(d.labels[9:], v.label[:, 2:34, 4:36])


def test_cache_is_used_and_made_anew(plain, monkeypatch):
    cases = data.find_cases(plain / "d")
    first = common.prepare(cases, 2., 32, plain / "cache")
    written = []
    monkeypatch.setattr(common, "_write_slices", lambda *a, w=common._write_slices: (written.append(1), w(*a)))
    common.prepare(data.find_cases(plain / "d"), 2., 32, plain / "cache")
    assert not written                                                            # second start: nothing read
    common.prepare(cases, 2.5, 32, plain / "cache")
    assert len(written) == 1                                                      # another option
    save(plain / "d/images/c0.nii.gz", volume(9, (40, 36, 4))[0], (2, 2, 8))
    third = common.prepare(data.find_cases(plain / "d"), 2., 32, plain / "cache")
    assert len(written) == 2 and not np.array_equal(third.images[:4], first.images[:4])   # another file
    os.utime(plain / "d/labels/c0.nii.gz", ns=(1, 1))
    common.prepare(data.find_cases(plain / "d"), 2., 32, plain / "cache")
    assert len(written) == 3                                                      # another time of a label
    assert not list((plain / "cache").glob("*partial*"))


def test_two_runs_prepare_at_once(plain, monkeypatch):
    """While one run writes its slices another finishes the same ones: both go on with them."""
    cases, write = data.find_cases(plain / "d"), common._write_slices

    def slow(*arguments):
        monkeypatch.setattr(common, "_write_slices", write)
        with monkeypatch.context() as other:
            other.setattr(common.os, "getpid", lambda: 1)
            common.prepare(cases, 2., 32, plain / "cache")
        write(*arguments)
    monkeypatch.setattr(common, "_write_slices", slow)
    assert len(common.prepare(cases, 2., 32, plain / "cache").images) == 15 and not list((plain / "cache").glob("*partial*"))


# ------------------------------------------------------------------------------------------------ augmentation

def test_spatial_grid_identity_and_one_transform_for_image_and_label():
    x = torch.rand(2, 1, 32, 32)
    grid = common.spatial_grid(2, 32, 0., "cpu", scale=0, shift=0, elastic=0)
    assert torch.allclose(common.warp(x, grid), x, atol=1e-5)
    label = (torch.arange(32)[:, None] // 8 + torch.zeros(2, 32, 32)).long()
    grid = common.spatial_grid(2, 32, 1., "cpu", shift=0)
    moved, image = common.warp(label, grid, "nearest"), common.warp(label[:, None].float(), grid, "nearest")[:, 0]
    assert torch.equal(moved, image.long()) and set(moved.unique().tolist()) <= set(range(4))


def test_rotation_by_a_right_angle():
    x = torch.rand(1, 1, 16, 16)
    torch.manual_seed(0)
    grid = common.spatial_grid(1, 16, 0., "cpu", scale=0, shift=0, elastic=0)
    quarter = torch.stack([-grid[..., 1], grid[..., 0]], -1)                      # sample at the rotated place
    assert torch.allclose(common.warp(x, quarter), x.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
        common.warp(x, quarter), x.rot90(-1, (2, 3)), atol=1e-5)


def test_photometric_is_seeded_finite_and_per_image():
    x = torch.rand(1, 1, 32, 32).repeat(4, 1, 1, 1)
    torch.manual_seed(3)
    one = common.photometric(x)
    torch.manual_seed(3)
    assert torch.equal(one, common.photometric(x)) and torch.isfinite(one).all()
    assert not torch.allclose(one[0], one[1], atol=.01) and torch.equal(x[0], x[1])
    assert torch.isfinite(common.photometric(torch.zeros(2, 1, 32, 32))).all()


# ------------------------------------------------------------------------------------------------ prediction, checkpoints

def test_predict_keeps_the_mode_of_the_network():
    unet = UNet(1, 3, 4)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    label = common.predict(unet, torch.rand(5, 1, 32, 32), (5, 40, 30), (8., 2., 2.), 2.)
    assert unet.training and label.shape == (5, 40, 30)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())    # running statistics too
    unet.eval()
    common.predict(unet, torch.rand(1, 1, 32, 32), (1, 40, 30), (8., 2., 2.), 2.)
    assert not unet.training


def test_checkpoint_round_trip_and_atomic(tmp_path):
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, method="sal", options={"width": 4}, x=torch.arange(3))
    assert torch.equal(common.load_checkpoint(path, "sal", {"width": 4})["x"], torch.arange(3))
    with pytest.raises(data.DataError, match="checkpoint of sal, not of macl"):
        common.load_checkpoint(path, "macl")
    with pytest.raises(data.DataError, match="width = 4, now 8"):
        common.load_checkpoint(path, "sal", {"width": 8})
    with pytest.raises(data.DataError, match="cannot be written"):
        common.write_atomic(tmp_path / "no" / "b.json", "x")
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]


def test_training_state_continues_bit_for_bit(tmp_path):
    def steps(net, optimiser, n):
        for _ in range(n):
            loss = (net(torch.randn(4, 3)) ** 2).mean()
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    def fresh():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), .1)
    whole = fresh()
    steps(*whole, 6)
    half = fresh()
    steps(*half, 3)
    common.save_training(tmp_path / "s.pt", "sal", {}, 3, half[:1], half[1])
    torch.manual_seed(99)
    again = fresh()
    assert common.resume_training(tmp_path / "s.pt", "sal", {}, again[:1], again[1]) == 3
    steps(*again, 3)
    assert torch.equal(whole[0].weight, again[0].weight)


def test_metrics_json_has_no_nan(tmp_path):
    run = common.run_row("scratch", 1, 0, ["p"], [row("a", "RV", math.nan, math.nan)])
    (tmp_path / "log.jsonl").write_text('{"phase": "pretrain", "seconds": 3}\n{"phase": "x", "sec{"phase": "y", "seconds": 1}\\n{"phase": "z", "se')      # a line cut by a kill
    common.write_results(tmp_path, [run], [], ["background", "RV"])
    assert common.seconds_by_phase(tmp_path) == {"pretrain": 3}
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(c))["rows"][0]["mean_dice"] is None
