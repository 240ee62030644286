"""U-Net, Dice, distances, grids, slices, augmentation, options and runs: by hand, by brute force,
by invariants."""
import importlib
import json
import math
import os
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS, label_as_image, lowered, save, volume

import common
import data
from common import UNet, dice_loss, dice_score, surface_distances

nan = math.nan

# ------------------------------------------------------------------------------------------ U-Net


@pytest.mark.parametrize("blocks, shape", [
    (0, (64, 2, 2)),
    (1, (32, 4, 4)),
    (2, (16, 8, 8)),
    (3, (8, 16, 16)),
    (4, (4, 32, 32)),
])
def test_partial_decoder(blocks, shape):
    unet = UNet(1, 4, width=4).eval()
    features = unet.encoder(torch.randn(2, 1, 32, 32))
    shapes = [tuple(f.shape[1:]) for f in features]
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert unet.decoder(features, blocks).shape[1:] == shape


def test_partial_decoder_leaves_later_blocks_untouched():
    unet = UNet(1, 4, width=4)
    features = unet.encoder(torch.randn(2, 1, 32, 32))
    unet.decoder(features, 2).sum().backward()
    used = []
    for block in unet.decoder.blocks:
        used.append(all(p.grad is not None for p in block.parameters()))
    assert used == [True, True, False, False]


def test_unet_keeps_the_size():
    assert UNet(1, 4, width=4)(torch.randn(1, 1, 48, 48)).shape == (1, 4, 48, 48)
    assert UNet(2, 3, width=4, depth=2)(torch.randn(1, 2, 20, 20)).shape == (1, 3, 20, 20)


def test_load_weights_takes_only_the_named_parts():
    one = UNet(1, 2, 4)
    two = UNet(1, 4, 4)
    before = {k: v.clone() for k, v in two.state_dict().items()}
    taken, fresh = common.load_weights(two, one.state_dict(), ["encoder"])
    assert sorted(taken + fresh) == sorted(before)
    assert all(k.startswith("encoder.") for k in taken)
    assert not any(k.startswith("encoder.") for k in fresh)
    for k, v in two.state_dict().items():
        want = one.state_dict()[k] if k in taken else before[k]
        assert torch.equal(v, want)


def test_load_weights_takes_a_part_of_the_decoder():
    one = UNet(1, 2, 4)
    two = UNet(1, 4, 4)
    taken, _ = common.load_weights(two, one.state_dict(), ["decoder.blocks.0"])
    assert taken
    assert all(k.startswith("decoder.blocks.0.") for k in taken)


def test_load_weights_refuses_another_width():
    one = UNet(1, 2, 4)
    why = r"encoder.blocks.0.0.weight is \(8, 1, 3, 3\) here and \(4, 1, 3, 3\)"
    with pytest.raises(data.DataError, match=why):
        common.load_weights(UNet(1, 2, 8), one.state_dict(), ["encoder"])
    with pytest.raises(data.DataError, match="encoder.blocks.0.0.weight is .* and missing there"):
        common.load_weights(UNet(1, 2, 4), {}, ["encoder"])


# ----------------------------------------------------------------------------- Dice and distances


def test_dice_score_by_hand():
    truth = np.array([[1, 1, 0], [2, 2, 0]])
    pred = np.array([[1, 0, 0], [2, 2, 2]])
    got = dice_score(pred, truth, [1, 2, 3])
    assert got[1] == pytest.approx(2 / 3)
    assert got[2] == pytest.approx(4 / 5)
    assert math.isnan(got[3])                                      # absent in both
    assert dice_score(pred, truth * 0, [1])[1] == 0                # absent in one
    assert dice_score(torch.tensor(pred), torch.tensor(pred), [1])[1] == 1


def test_dice_loss_equals_the_float64_loop():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 4))
    p = logits.softmax(1).numpy()
    dice = 0
    for k in (1, 2):
        both = 0
        either = 0
        for b in range(2):
            for i in range(4):
                for j in range(4):
                    y = float(label[b, i, j] == k)
                    both += p[b, k, i, j] * y
                    either += p[b, k, i, j] + y
        dice += (2 * both + 1e-5) / (either + 1e-5)
    assert dice_loss(logits, label).item() == pytest.approx(1 - dice / 2, abs=1e-6)


def test_dice_loss_has_a_gradient():
    truth = torch.randint(0, 3, (2, 6, 6))
    lowered(lambda logits: common.dice_loss(logits, truth), torch.randn(2, 3, 6, 6), .1)


def test_dice_loss_of_the_truth_is_zero():
    label = torch.randint(0, 3, (2, 4, 4))
    sure = F.one_hot(label, 3).movedim(-1, 1).float() * 100
    assert dice_loss(sure, label).item() == pytest.approx(0, abs=1e-5)
    wrong = F.one_hot((label + 1) % 3, 3).movedim(-1, 1).float() * 100
    assert dice_loss(wrong, label).item() == pytest.approx(1, abs=1e-5)


def brute_surface(mask, spacing):
    """Places in mm of the voxels of a mask with a neighbour outside, by a loop over all."""
    points = []
    for v in np.argwhere(mask):
        inside = 0
        for axis in range(mask.ndim):
            for step in (-1, 1):
                w = v.copy()
                w[axis] += step
                if (w >= 0).all() and (w < mask.shape).all():
                    inside += bool(mask[tuple(w)])
        if inside < 2 * mask.ndim:
            points.append(v * np.asarray(spacing))
    return points


def brute_distances(a, b, spacing):
    """HD95 and ASSD by a loop over every pair of surface voxels."""
    s = brute_surface(a, spacing)
    t = brute_surface(b, spacing)
    ab = [min(math.dist(p, q) for q in t) for p in s]
    ba = [min(math.dist(p, q) for q in s) for p in t]
    hd95 = max(np.percentile(ab, 95), np.percentile(ba, 95))
    return hd95, np.mean(ab + ba)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (8, 1.5, 1.25)])
def test_distances_equal_brute_force(spacing):
    rng = np.random.default_rng(0)
    for _ in range(3):
        a, b = rng.random((2, 4, 7, 6)) > .6
        want = brute_distances(a, b, spacing)
        assert surface_distances(a, b, spacing) == pytest.approx(want, abs=1e-9)


def ball(n, radius, centre):
    """n points on a sphere, rounded to the voxels of an image of 3 x 1.5 x 1.5 mm."""
    x = np.random.default_rng(0).normal(size=(n, 3))
    x = radius * x / np.linalg.norm(x, axis=1, keepdims=True) + centre
    return np.unique((x / (3, 1.5, 1.5)).round(), axis=0) * (3, 1.5, 1.5)


def test_nearest_points_equal_brute_force():
    """Surfaces that all but meet, one far outside and one inside the other, points all over."""
    organ = ball(2000, 40, (200, 200, 200))
    everywhere = np.random.default_rng(1).integers(0, 256, (2000, 3)) * (3, 1.5, 1.5)
    others = {
        "moved by little": ball(2000, 42, (203, 201, 199)),
        "far outside": ball(2000, 30, (500, 100, 300)),
        "inside": ball(1000, 9, (201, 200, 200)),
        "everywhere": everywhere,
    }
    for name, other in others.items():
        for a, b in ((organ, other), (other, organ)):
            assert len(a) * len(b) > 400_000                       # enough to be halved
            want = np.linalg.norm(a[:, None] - b, axis=-1).min(1)
            assert np.abs(common._nearest(a, b) - want).max() < 1e-9, name


def test_nearest_of_a_single_point():
    many = np.random.default_rng(0).normal(size=(250_000, 3))
    want = np.linalg.norm(many[17] + .001 - many, axis=1).min()
    assert common._nearest(many[17:18] + .001, many) == pytest.approx([want])


def cube(*voxels):
    """A mask of 5 x 5 x 5 with these voxels."""
    mask = np.zeros((5, 5, 5), bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def test_distances_of_surfaces_that_share_voxels_by_hand():
    """Of 2 and 3 voxels, of which 2 are shared; the third is 2 mm from them."""
    two = cube((2, 2, 1), (2, 2, 2))
    three = cube((2, 2, 1), (2, 2, 2), (2, 2, 4))
    hd95, assd = surface_distances(two, three, (5, 5, 1))
    assert hd95 == pytest.approx(np.percentile([0, 0, 2], 95))
    assert assd == pytest.approx(2 / 5)
    assert surface_distances(two, two, (5, 5, 1)) == (0, 0)


def test_distances_of_single_voxels_by_hand():
    one = cube((2, 2, 2))
    assert surface_distances(one, cube((3, 2, 2)), (10, 1, 1)) == pytest.approx((10, 10))
    assert surface_distances(one, cube((2, 2, 4)), (10, 1, 1.5)) == pytest.approx((3, 3))
    assert surface_distances(one, one, (10, 1, 1)) == (0, 0)


def test_a_hole_has_a_surface_of_its_own():
    full = np.ones((5, 5, 5), bool)
    hole = full.copy()
    hole[2, 2, 2] = False
    # its 6 voxels are 1 mm from the outer surface, of 98 voxels
    _, assd = surface_distances(full, hole, (1, 1, 1))
    assert assd == pytest.approx(6 * 1 / (98 + 98 + 6))


def test_distance_to_an_empty_mask_is_nan():
    some = cube((2, 2, 2))
    empty = cube()
    for pair in ((some, empty), (empty, some), (empty, empty)):
        hd95, assd = surface_distances(*pair, (1, 1, 1))
        assert math.isnan(hd95)
        assert math.isnan(assd)


# ------------------------------------------------------------------------------ scores and summary


def score_line(case, name, dice, mm, missed=0):
    """A line of per_volume.csv: one class of one volume."""
    return {"case": case, "patient": case, "class": name, "dice": dice, "hd95_mm": mm,
            "assd_mm": mm, "missed": missed}


@pytest.fixture
def two_volumes():
    """A row of metrics.json, of two volumes and two classes, one of them missed, one absent."""
    lines = [score_line("a", "RV", .8, 4.), score_line("b", "RV", 0., nan, 1),
             score_line("a", "LV", .9, 2.), score_line("b", "LV", nan, nan)]
    return common.run_row(common.Row("scratch", 1, 0), ["p"], lines)


def test_run_row_by_hand(two_volumes):
    run = two_volumes
    assert run["method"] == "scratch"
    assert run["labelled"] == 1
    assert run["seed"] == 0
    assert run["patients"] == ["p"]
    assert run["dice"] == pytest.approx({"RV": .4, "LV": .9})
    assert run["mean_dice"] == pytest.approx(.65)
    assert run["hd95_mm"] == pytest.approx(3)
    assert run["missed"] == 1
    assert run["n_scores"] == 3
    assert run["n_volumes"] == 2


def test_summary_and_gain_by_hand(two_volumes):
    scratch = two_volumes
    sal = {**scratch, "method": "sal", "mean_dice": .75}
    runs = [scratch, sal, {**scratch, "seed": 1}, {**sal, "seed": 1, "mean_dice": .60}]
    summary, gains = common.summarise(runs)
    assert gains[0]["per_seed"] == pytest.approx([.10, -.05])
    assert gains[0]["gain"] == pytest.approx(.025)
    assert gains[0]["std"] == pytest.approx(np.std([.10, -.05], ddof=1))
    want = {"mean": .675, "std": np.std([.75, .6], ddof=1)}
    assert summary[1]["mean_dice"] == pytest.approx(want)
    text = common.table(summary, gains, ["background", "RV", "LV"])
    assert "+2.5 ± 10.6" in text
    assert "2 of 6" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_one_seed_has_no_spread(two_volumes):
    sal = {**two_volumes, "method": "sal", "mean_dice": .75}
    text = common.table(*common.summarise([two_volumes, sal]), ["background", "RV", "LV"])
    assert "| +10.0 |" in text
    assert "±" not in text


# ------------------------------------------------------------------------------- grids and slices


def two_discs(shape, spacing):
    """A label map with two discs off the centre, so that a flip would show."""
    V, H, W = shape
    y = (np.arange(H) - (H - 1) / 2) * spacing[1]
    x = (np.arange(W) - (W - 1) / 2) * spacing[2]
    y, x = np.meshgrid(y, x, indexing="ij")
    label = np.zeros(shape, int)
    label[:, np.hypot(y - 6, x + 9) < 16] = 1
    label[:, np.hypot(y + 8, x - 3) < 7] = 2
    return label


@pytest.mark.parametrize("shape, spacing", [
    ((3, 61, 47), (9., 1.3, 1.7)),
    ((2, 90, 121), (9., 1.1, .8)),
    ((2, 64, 64), (5., 2., 2.)),
])
def test_round_trip_native_network_native(shape, spacing):
    label = two_discs(shape, spacing)
    one_hot = F.one_hot(torch.from_numpy(label), 3).movedim(-1, 1).float()
    network = common.to_network(one_hot, spacing, 2., 64)
    assert network.shape == (len(label), 3, 64, 64)
    back = common.to_native(network, shape, spacing, 2.).numpy()
    assert back.shape == shape
    score = dice_score(back, label, [1, 2])
    assert score[1] > .97
    assert score[2] > .95
    for k in (1, 2):                                               # not even half a pixel of drift
        drift = np.argwhere(back == k).mean(0) - np.argwhere(label == k).mean(0)
        assert np.abs(drift).max() < .25


def test_outside_the_crop_is_background():
    probs = torch.zeros(1, 2, 32, 32)
    probs[:, 1] = 1
    back = common.to_native(probs, (1, 100, 100), (9., 1., 1.), 1.)
    assert back[0, 34:66, 34:66].all()
    assert back.sum() == 32 * 32


@pytest.fixture
def plain(tmp_path):
    """Three volumes of 4, 5 and 6 slices in d/, the second without label."""
    for n in range(3):
        image, label = volume(n, (40, 36, 4 + n))
        save(tmp_path / f"d/images/c{n}.nii.gz", image, (2, 2, 8))
        if n != 1:
            save(tmp_path / f"d/labels/c{n}.nii.gz", label, (2, 2, 8))
    return tmp_path


def prepared(plain, target=2.):
    """The slices of `plain`, found and prepared anew."""
    return common.prepare(data.find_cases(plain / "d"), target, 32, plain / "cache")


def test_prepared_slices(plain):
    d = prepared(plain)
    assert d.images.shape == (15, 1, 32, 32)
    assert isinstance(d.images, np.memmap)
    assert isinstance(d.labels, np.memmap)
    assert d.volume.tolist() == [0] * 4 + [1] * 5 + [2] * 6
    assert d.slice.tolist() == [*range(4), *range(5), *range(6)]
    assert d.depth.tolist() == [4] * 4 + [5] * 5 + [6] * 6
    assert d.first.tolist() == [0, 4, 9]
    assert d.position[4:9] == pytest.approx([.2, .4, .6, .8, 1.])
    assert (d.labels[4:9] == 255).all()                            # no label is never class 0
    assert d.labels[:4].max() == 3


def test_slices_of_patients(plain):
    d = prepared(plain)
    assert d.of_patients(["c1", "c2"]).tolist() == list(range(4, 15))
    assert d.of_patients(["c1", "c2"], labelled=True).tolist() == list(range(9, 15))


def test_prepared_slices_are_the_crop_of_the_volume(plain):
    cases = data.find_cases(plain / "d")
    v = data.read_case(cases[2], cases)
    assert v.image.shape == (1, 6, 36, 40)
    d = prepared(plain)                                            # of its own 2 mm, so cropped
    want = data.normalise(v.image, "MR")[0, :, 2:34, 4:36]
    assert np.allclose(d.images[9:, 0], want, atol=1e-3)
    assert np.array_equal(d.labels[9:], v.label[:, 2:34, 4:36])
    image = d.image(np.array([9, 11]))
    assert image.dtype == torch.float32
    assert np.allclose(image[:, 0], want[[0, 2]], atol=1e-3)
    assert np.array_equal(d.label(np.array([9, 11])), v.label[[0, 2], 2:34, 4:36])


def test_cache_is_used_and_made_anew(plain, monkeypatch):
    first = prepared(plain)
    write = common._write_slices
    written = []

    def counted(*arguments):
        written.append(1)
        write(*arguments)

    monkeypatch.setattr(common, "_write_slices", counted)
    prepared(plain)
    assert len(written) == 0                                       # second start: nothing read
    prepared(plain, target=2.5)
    assert len(written) == 1                                       # another option
    save(plain / "d/images/c0.nii.gz", volume(9, (40, 36, 4))[0], (2, 2, 8))
    third = prepared(plain)
    assert len(written) == 2                                       # another file
    assert not np.array_equal(third.images[:4], first.images[:4])
    os.utime(plain / "d/labels/c0.nii.gz", ns=(1, 1))
    prepared(plain)
    assert len(written) == 3                                       # another time of a label
    assert not list((plain / "cache").glob("*partial*"))


def test_a_link_that_leads_nowhere(plain):
    cases = data.find_cases(plain / "d")
    image = plain / "d/images/c0.nii.gz"
    image.unlink()
    image.symlink_to(plain / "gone.nii.gz")
    with pytest.raises(data.DataError, match="c0.nii.gz: cannot be read"):
        common.prepare(cases, 2., 32, plain / "cache")


def test_two_runs_prepare_at_once(plain, monkeypatch):
    """While one run writes its slices another finishes the same ones: both go on with them."""
    write = common._write_slices

    def slow(*arguments):
        monkeypatch.setattr(common, "_write_slices", write)
        with monkeypatch.context() as other:
            other.setattr(common.os, "getpid", lambda: 1)
            prepared(plain)
        write(*arguments)

    monkeypatch.setattr(common, "_write_slices", slow)
    assert len(prepared(plain).images) == 15
    assert not list((plain / "cache").glob("*partial*"))


# ----------------------------------------------------------------------------------- augmentation


def middle(n, lo, hi, device):
    """In place of `uniform`: the middle of the range, which moves nothing."""
    return torch.full((n,), (lo + hi) / 2, device=device)


def test_spatial_grid_of_the_middle_is_the_identity(monkeypatch):
    monkeypatch.setattr(common, "uniform", middle)
    x = torch.rand(2, 1, 32, 32)
    grid = common.spatial_grid(2, 32, .5, "cpu", elastic=0)
    assert torch.allclose(common.warp(x, grid), x, atol=1e-5)


def test_rotation_by_a_right_angle(monkeypatch):
    def quarter_turn(n, lo, hi, device):
        return torch.full((n,), hi if hi > 1 else 0.)

    monkeypatch.setattr(common, "uniform", quarter_turn)
    x = torch.rand(1, 1, 16, 16)
    grid = common.spatial_grid(1, 16, math.pi / 2, "cpu", elastic=0)
    assert torch.allclose(common.warp(x, grid), x.rot90(1, (2, 3)), atol=1e-5)


def test_shifts_and_scale_of_spatial_grid(monkeypatch):
    """What is drawn, in this order: angle, scale, shift of rows, shift of columns."""
    drawn = [0., math.log(.5), 2 / 16, 4 / 16]

    def one_after_another(n, lo, hi, device):
        return torch.full((n,), drawn.pop(0))

    monkeypatch.setattr(common, "uniform", one_after_another)
    grid = common.spatial_grid(1, 16, 1., "cpu", elastic=0)
    assert drawn == []
    centres = (torch.arange(16) + .5) / 8 - 1
    x = .5 * centres[None, :] + 4 / 16
    y = .5 * centres[:, None] + 2 / 16
    want = torch.stack([x.expand(16, 16), y.expand(16, 16)], -1)
    assert torch.allclose(grid[0], want, atol=1e-6)


def test_ranges_of_spatial_grid():
    """Rotation, scale and shift, read off 2000 grids: each fills its range and stays in it."""
    torch.manual_seed(0)
    grid = common.spatial_grid(2000, 16, .5, "cpu", elastic=0)     # [2000, 16, 16, 2]: x, y
    right = (grid[:, 0, 1] - grid[:, 0, 0]) * 8                    # a pixel to the right goes here
    down = (grid[:, 1, 0] - grid[:, 0, 0]) * 8
    scale = right.norm(dim=1)
    turned = torch.stack([-right[:, 1], right[:, 0]], 1)
    assert torch.allclose(down, turned, atol=1e-5)                 # neither sheared nor mirrored
    angle = torch.atan2(right[:, 1], right[:, 0])
    shift = grid.mean((1, 2))                                      # [2000, 2]
    for values, most in ((angle, .5), (scale.log(), .25), (shift[:, 0], .1), (shift[:, 1], .1)):
        assert values.max() == pytest.approx(most, rel=.02)
        assert values.min() == pytest.approx(-most, rel=.02)
        assert values.mean() == pytest.approx(0, abs=.05 * most)


def test_elastic_waves_of_spatial_grid(monkeypatch):
    monkeypatch.setattr(common, "uniform", middle)
    plain = common.spatial_grid(500, 32, 0., "cpu", elastic=0)
    waves = common.spatial_grid(500, 32, 0., "cpu", elastic=.1) - plain
    corner = waves[:, 0, 0]
    assert not torch.allclose(corner, waves[:, 16, 16], atol=.01)  # more than a shift
    assert .07 < waves.std() < .12
    default = common.spatial_grid(500, 32, 0., "cpu") - plain
    assert .02 < default.std() < .036


def test_one_transform_for_image_and_label():
    stripes = torch.arange(32)[:, None] // 8
    label = stripes.expand(2, 32, 32)
    grid = common.spatial_grid(2, 32, 1., "cpu")
    moved = common.warp(label, grid, "nearest")
    image = common.warp(label[:, None].float(), grid, "nearest")[:, 0]
    assert moved.dtype == torch.int64
    assert torch.equal(moved, image.long())
    assert set(moved.unique().tolist()) <= set(range(4))
    assert not torch.equal(moved, label)


def test_photometric_is_seeded_finite_and_per_image():
    x = torch.rand(1, 1, 32, 32).repeat(4, 1, 1, 1)
    before = x.clone()
    torch.manual_seed(3)
    one = common.photometric(x)
    torch.manual_seed(3)
    assert torch.equal(one, common.photometric(x))
    assert torch.isfinite(one).all()
    assert not torch.allclose(one[0], one[1], atol=.01)
    assert torch.equal(x, before)
    black = torch.zeros(2, 1, 32, 32)
    assert torch.isfinite(common.photometric(black)).all()


def test_random_slices_are_of_the_numbers_given():
    numbers = np.array([3, 5, 8])
    torch.manual_seed(0)
    drawn = common.random_slices(numbers, 50)
    assert drawn.shape == (50,)
    assert set(drawn) == {3, 5, 8}
    torch.manual_seed(0)
    assert np.array_equal(common.random_slices(numbers, 50), drawn)


def test_cosine_falls_from_one_to_zero():
    assert common.cosine(0, 100) == 1
    assert common.cosine(25, 100) == pytest.approx(.5 + math.sqrt(.125))
    assert common.cosine(50, 100) == pytest.approx(.5)
    assert common.cosine(100, 100) == pytest.approx(0)


class SquareSlices:
    """In place of a dataset: slice n has a square of class n, and its image is its label."""
    def label(self, numbers, device):
        label = torch.zeros(len(numbers), 32, 32, dtype=torch.int64)
        label[:, 6:20, 10:28] = torch.as_tensor(numbers)[:, None, None]
        return label

    def image(self, numbers, device):
        return self.label(numbers, device)[:, None].float()


def test_labelled_batch_moves_image_and_label_alike(monkeypatch):
    def unchanged(x):
        return x

    monkeypatch.setattr(common, "photometric", unchanged)
    options = SimpleNamespace(size=32, rotation=1.)
    run = SimpleNamespace(o=options, device=torch.device("cpu"), dataset=SquareSlices())
    torch.manual_seed(0)
    image, label = common.labelled_batch(run, np.array([1, 3]), 20)
    assert image.shape == (20, 1, 32, 32)
    assert label.shape == (20, 32, 32)
    assert set(label.amax((1, 2)).tolist()) == {1, 3}
    # interpolated, so different on the square's border alone
    same = (image[:, 0] - label).abs() < .01
    assert same.float().mean() > .8
    assert (image[:, 0] - label).abs().max() < 2.5                 # nowhere a whole 3 beside a 0
    assert len({tuple(one.flatten().tolist()) for one in label}) == 20


# -------------------------------------------------------------------------- prediction and scores


def test_predict_keeps_the_mode_and_statistics_of_the_network():
    unet = UNet(1, 3, 4)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    slices = torch.rand(5, 1, 32, 32)
    label = common.predict(unet, slices, (5, 40, 30), (8., 2., 2.), 2.)
    assert label.shape == (5, 40, 30)
    assert unet.training
    for k, v in unet.state_dict().items():
        assert torch.equal(v, state[k])
    unet.eval()
    common.predict(unet, slices[:1], (1, 40, 30), (8., 2., 2.), 2.)
    assert not unet.training


class Everywhere(torch.nn.Module):
    """A network that says one class, wherever it looks."""
    def __init__(self, k, classes):
        super().__init__()
        self.k = k
        self.classes = classes

    def forward(self, x):
        logits = x.new_zeros(len(x), self.classes, *x.shape[2:])
        logits[:, self.k] = 9
        return logits


@pytest.mark.parametrize("side", ["test", "val"])
def test_score_by_hand(side, phantom, tmp_path):
    """A network that says class 1 everywhere, on all labelled volumes of one side of the split."""
    run = opened(phantom, tmp_path, "--split", side)
    lines = common.score(Everywhere(1, 4), run)
    assert {r["patient"] for r in lines} == set(run.split[side])
    assert len(lines) == 2 * 3                                     # ED and ES, classes
    for case in run.cases:
        own = {r["class"]: r for r in lines if r["case"] == case.name}
        if case.patient not in run.split[side]:
            assert own == {}
            continue
        truth = data.read_label(case, run.cases)
        shape = truth.shape
        ones = torch.ones(shape[0], 1, 32, 32)
        probs = torch.cat([0 * ones, ones], 1)
        info = next(i for i in run.dataset.info["cases"] if i["name"] == case.name)
        pred = common.to_native(probs, shape, info["spacing"], 5.).numpy()
        assert own["RV"]["dice"] == dice_score(pred, truth, [1])[1]
        want = surface_distances(pred == 1, truth == 1, info["spacing"])
        assert (own["RV"]["hd95_mm"], own["RV"]["assd_mm"]) == want
        assert own["RV"]["missed"] == 0
        assert own["LV"]["dice"] == 0                              # there, and not found
        assert own["LV"]["missed"] == 1
        assert math.isnan(own["LV"]["hd95_mm"])


class Reads(torch.nn.Module):
    """A network whose input is the label itself."""
    def forward(self, x):
        return 9 * F.one_hot(x[:, 0].round().long().clamp(0, 3), 4).movedim(-1, 1).float()


def test_a_network_that_knows_the_labels_scores_high(phantom, tmp_path, monkeypatch):
    """Every slice comes back to its own place, every class to its own name."""
    monkeypatch.setattr(common.SliceDataset, "image", label_as_image)
    lines = common.score(Reads(), opened(phantom, tmp_path, "--spacing", 2.5, "--size", 64))
    assert min(line["dice"] for line in lines) > .8
    assert max(line["hd95_mm"] for line in lines) < 10


def test_a_class_absent_in_both_is_not_missed(phantom, tmp_path, monkeypatch):
    read = common.read_label

    def without_lv(case, cases):
        truth = read(case, cases)
        return np.where(truth == 3, 0, truth)

    monkeypatch.setattr(common, "read_label", without_lv)
    lines = common.score(Everywhere(1, 4), opened(phantom, tmp_path))
    for line in lines:
        assert line["missed"] == (line["class"] == "Myo")
        assert math.isnan(line["dice"]) == (line["class"] == "LV")


# -------------------------------------------------------------------------- files and checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, method="sal", options={"width": 4}, x=torch.arange(3))
    content = common.load_checkpoint(path, "sal", {"width": 4})
    assert torch.equal(content["x"], torch.arange(3))
    with pytest.raises(data.DataError, match="checkpoint of sal, not of macl"):
        common.load_checkpoint(path, "macl")
    with pytest.raises(data.DataError, match="width = 4, now 8"):
        common.load_checkpoint(path, "sal", {"width": 8})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.DataError, match="a.pt: not a checkpoint of this project"):
        common.load_checkpoint(path)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    common.write_atomic(path, "one")
    with pytest.raises(data.DataError, match="cannot be written"):
        common.write_atomic(tmp_path / "no/b.json", "x")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "replace", full)
    with pytest.raises(data.DataError, match="No space left"):
        common.write_atomic(path, "two")
    assert path.read_text() == "one"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_writing_turns_an_error_into_one_line():
    with pytest.raises(data.DataError) as caught:
        with common.writing("runs/x/a.pt"):
            raise OSError(28, "No space\nleft on device")
    line = str(caught.value)
    assert line.startswith("runs/x/a.pt: cannot be written (No space left on device)")
    assert "--resume" in line
    assert "\n" not in line
    assert caught.value.__suppress_context__                       # no second traceback


def test_writing_leaves_other_errors_alone():
    with pytest.raises(ZeroDivisionError):
        with common.writing("a.pt"):
            1 / 0


def test_without_nan():
    before = {"a": nan, "b": [1, nan, {"c": np.float64(nan), "d": "nan"}], "e": 0., "f": None}
    assert common.without_nan(before) == {"a": None, "b": [1, None, {"c": None, "d": "nan"}],
                                          "e": 0., "f": None}
    assert math.isnan(before["a"])                                 # a copy


def refuse_constant(name):
    """For json.loads: NaN and Infinity are not JSON."""
    pytest.fail(f"{name} in a JSON file")


def test_metrics_json_has_no_nan(tmp_path):
    row = common.run_row(common.Row("scratch", 1, 0), ["p"], [score_line("a", "RV", nan, nan)])
    run = SimpleNamespace(out=tmp_path, classes=["background", "RV"], runs=[row], volume_rows=[],
                          summary=[{"std": nan}], gains=[], device=torch.device("cpu"))
    (tmp_path / "log.jsonl").write_text('{"phase": "pretrain", "seconds": 3}\n')
    common.write_results(run)
    text = (tmp_path / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=refuse_constant)
    assert metrics["rows"][0]["mean_dice"] is None
    assert metrics["summary"] == [{"std": None}]
    assert metrics["seconds"] == {"pretrain": 3}
    (tmp_path / "metrics.json").write_text('{"peak_memory_mb": 10000000}')         # before --resume
    common.write_results(run)
    assert json.loads((tmp_path / "metrics.json").read_text())["peak_memory_mb"] == 10_000_000


def test_log_with_lines_cut_by_a_kill(tmp_path):
    common.log(tmp_path, phase="pretrain", seconds=3)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"phase": "x", "sec{"phase": "y", "seconds": 1}\n')
        file.write('{"phase": "z", "se')
    assert common.read_log(tmp_path) == [{"phase": "pretrain", "seconds": 3}]
    assert common.seconds_by_phase(tmp_path) == {"pretrain": 3}


def test_a_resumed_run_begins_a_new_line_of_the_log(tmp_path):
    common.start_run(tmp_path, {}, resume=False)
    (tmp_path / "log.jsonl").write_text('{"phase": "z", "se')
    common.start_run(tmp_path, {}, resume=True)
    common.log(tmp_path, phase="pretrain", seconds=3)
    common.log(tmp_path, phase="pretrain", seconds=4)
    assert common.seconds_by_phase(tmp_path) == {"pretrain": 4}    # the last line counts


# ---------------------------------------------------------------------------------------- options

# As in a script: name, on real data, on the phantom, in the paper, what it is.
TABLE = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients"),
    ("seeds", [0, 1, 2], [0], None, "seeds"),
    ("width", 16, None, 48, "channels of the first level"),
    ("spacing", None, 2.5, None, "mm a pixel"),
    ("size", None, 64, None, "pixels"),
    ("threshold", None, None, .25, "100 % of a volume"),
    ("steps", 1200, 240, 9000, "steps of fine-tuning"),
    ("batch", 8, None, None, "slices a step"),
    ("lr", 2e-3, None, None, "rate"),
    ("rotation", .5, None, None, "in rad"),
    ("kind", "soft", None, "hard", "a word"),
    ("teacher", False, None, True, "a second network"),
]
PAPER_ALSO = "a mean teacher"


def parsed(*words):
    """The options of a script with TABLE."""
    arguments = [str(w) for w in words]
    return common.parse_options("other", "What it is.", TABLE, arguments, PAPER_ALSO)


@pytest.mark.parametrize("words, steps, width, size, labelled", [
    ("", 240, 16, 64, [1]),
    ("--data d", 1200, 16, None, [1, 3, 7]),
    ("--paper", 9000, 48, 64, [1]),
    ("--data d --paper", 9000, 48, None, [1, 3, 7]),
    ("--steps 5 --labelled 2", 5, 16, 64, [2]),
    ("--data d --steps 5 --size 96", 5, 16, 96, [1, 3, 7]),
    ("--paper --steps 5 --width 16", 5, 16, 64, [1]),
    ("--data d --paper --steps 0 --labelled 2 4", 0, 48, None, [2, 4]),
])
def test_which_column_of_the_table(words, steps, width, size, labelled):
    """Typed, else the paper's with --paper, else the phantom's without --data, else ours."""
    o = parsed(*words.split())
    assert o.steps == steps
    assert o.width == width
    assert o.size == size
    assert o.labelled == labelled


def test_options_have_the_type_of_the_table():
    o = parsed("--lr", "1", "--labelled", "2", "4", "--threshold", "1", "--kind", "x", "--teacher")
    assert isinstance(o.lr, float)
    assert isinstance(o.threshold, float)
    assert o.labelled == [2, 4]
    assert o.kind == "x"
    assert o.teacher is True
    assert parsed().teacher is False
    assert parsed("--paper").teacher is True


def test_what_was_typed_is_given():
    names = {line[0] for line in TABLE}
    assert parsed("--paper").given & names == set()
    o = parsed("--width", "16", "--labelled", "1")
    assert o.given & names == {"width", "labelled"}
    assert o.method == "other"
    assert o.out == "runs/other"                                   # by its name, if not typed


@pytest.mark.parametrize("words", ["--widht 4", "--wid 4", "--width x", "--labelled"])
def test_mistyped_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*words.split())
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_paper_prints_what_no_number_sets(capsys):
    parsed("--data", "d")
    assert capsys.readouterr().out == ""
    parsed("--paper")
    assert PAPER_ALSO in capsys.readouterr().out


def test_no_paper_flag_without_a_paper_column():
    table = [line[:3] + (None,) + line[4:] for line in TABLE]
    assert common.parse_options("other", "", table, []).paper is False
    with pytest.raises(SystemExit):
        common.parse_options("other", "", table, ["--paper"])


def printed_help(table, capsys, monkeypatch):
    """{flag: what --help says of it}, on a screen so wide that it breaks no line."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        common.parse_options("other", "What it is.", table, ["--help"])
    assert caught.value.code == 0
    said = {}
    for entry in capsys.readouterr().out.split("\n  --")[1:]:
        flag, _, rest = entry.partition(" ")
        said["--" + flag] = " ".join(rest.split("\n\n")[0].split())
    return said


@pytest.mark.parametrize("script", [None, *SCRIPTS])
def test_help_shows_every_value_of_the_table(script, capsys, monkeypatch):
    table = importlib.import_module(script).OPTIONS if script else TABLE
    said = printed_help(table, capsys, monkeypatch)
    for name, real, phantom, paper, text in table:
        _, found, values = said["--" + name.replace("_", "-")].partition(f"{text} [")
        assert found
        assert values.endswith("]")
        values = values[:-1].split("; ")
        assert values[0] == ("by the data" if real is None else typed(real))
        want = [f"phantom: {typed(phantom)}"] if phantom is not None else []
        want += [f"paper: {typed(paper)}"] if paper is not None else []
        assert values[1:] == want


def typed(value):
    """A value as --help shows it."""
    if isinstance(value, list):
        return " ".join(typed(v) for v in value) or "none"
    if isinstance(value, bool):
        return {True: "on", False: "off"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def test_help_by_hand(capsys, monkeypatch):
    said = printed_help(TABLE, capsys, monkeypatch)
    assert said["--steps"] == "INT steps of fine-tuning [1200; phantom: 240; paper: 9000]"
    assert said["--threshold"] == "FLOAT 100 % of a volume [by the data; paper: 0.25]"
    labelled = "N [N ...] numbers of labelled patients [1 3 7; phantom: 1]"
    assert said["--labelled"] == labelled
    assert said["--teacher"] == "a second network [off; paper: on]"
    assert said["--batch"] == "INT slices a step [8]"
    assert "--paper" in said


# ------------------------------------------------------------------------------------------ a run

TINY = ["--spacing", "5", "--size", "32", "--width", "4", "--steps", "7", "--save-every", "2"]


def opened(phantom, folder, *words):
    """A run of TABLE's options on the phantom of 6 patients, ready to train, in `folder`/o."""
    here = ["--data", phantom, "--cache", phantom.parent / "cache", "--out", folder / "o"]
    o = parsed(*TINY, "--labelled", 1, "--seeds", 0, *here, *words)
    run = common.Run(o)
    run.begin()
    return run


def test_default_numbers_of_patients_become_fewer_rows(phantom, tmp_path, capsys):
    """Of 6 patients 4 train: of 1, 3 and 7 labelled ones 1 and 3 are left."""
    o = parsed("--data", phantom, *TINY, "--out", tmp_path / "o", "--cache", tmp_path / "cache")
    run = common.Run(o)
    assert run.o.labelled == [1, 3]
    assert "--labelled 1 3: only 4 training patients have labels" in capsys.readouterr().out


@pytest.mark.parametrize("default, left", [([7, 9], [4]), ([4, 5], [4]), ([2, 4], [2, 4])])
def test_the_most_labelled_patients_there_are(default, left, phantom, tmp_path):
    table = [("labelled", default, None, None, "")] + TABLE[1:]
    words = ["--data", str(phantom), *TINY, "--cache", str(tmp_path)]
    run = common.Run(common.parse_options("other", "", table, words))
    assert run.o.labelled == left


def test_typed_numbers_of_patients_are_kept_or_refused(phantom, tmp_path):
    assert opened(phantom, tmp_path, "--labelled", 2, 4).o.labelled == [2, 4]
    with pytest.raises(data.DataError, match="--labelled 5: only 4 training patients"):
        opened(phantom, tmp_path / "new", "--labelled", 1, 5)
    assert not (tmp_path / "new").exists()                         # nothing was begun


@pytest.mark.parametrize("words, why", [
    ("--size 40", "--size 40: use a multiple of 16"),
    ("--size 16", "--size 16: use a multiple of 16, 32 or more"),
    ("--labelled 0", "must be 1 or more"),
    ("--steps 0", "must be 1 or more"),
    ("--save-every 0", "must be 1 or more"),
    ("--batch 0", "must be 1 or more"),
    ("--scratch nowhere", "--scratch nowhere: is not the folder of a run"),
    ("--init nowhere.pt", "nowhere.pt: not a checkpoint"),
    ("--device abacus", "--device abacus: not available here"),
])
def test_impossible_options_are_refused_before_anything_is_written(words, why, phantom, tmp_path):
    with pytest.raises(data.DataError, match=why):
        opened(phantom, tmp_path, *words.split())
    assert not (tmp_path / "o").exists()


def test_refuse_raises_the_first_that_is_wrong():
    common.refuse([(False, "a"), (0, "b")])
    with pytest.raises(data.DataError, match="^b$"):
        common.refuse([(False, "a"), (True, "b"), (True, "c")])


def test_what_a_run_knows(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    assert run.classes == ["background", "RV", "Myo", "LV"]
    assert run.channels == 1
    assert set(run.train) == set(run.dataset.of_patients(run.split["train"]))
    assert not set(run.train) & set(run.dataset.of_patients(run.split["test"]))
    assert run.unet().head.out_channels == 4
    assert run.unet(classes=2).head.out_channels == 2
    assert run.kept()["width"] == 4
    assert not run.kept().keys() & common.FREE


def test_grid_by_the_data_where_none_is_given(phantom, tmp_path):
    o = parsed("--data", phantom, "--cache", tmp_path)
    run = common.Run(o)
    assert (o.spacing, o.size) == data.default_grid(run.cases)
    o = parsed("--data", phantom, "--cache", tmp_path, "--size", 32)
    common.Run(o)
    assert o.size == 32


# ------------------------------------------------------------------------ steps, killed and resumed


def train(run, phase="pretrain", seed=0, kill=None):
    """Seven steps of a small network with batch statistics on noise; killed at step `kill`.

    Returns (steps done, the weights as bytes).
    """
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    head = torch.nn.Linear(4, 2)
    optimiser = torch.optim.AdamW([*net.parameters(), *head.parameters()], .1)
    done = []
    for step in run.steps(phase, 7, (net, head), optimiser):
        if step == kill:
            break
        loss = (head(net(torch.randn(8, 3))) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        done.append(step)
    state = {**net.state_dict(), **head.state_dict(prefix="head.")}
    return done, {k: v.numpy().tobytes() for k, v in state.items()}


@pytest.mark.parametrize("phase", ["pretrain", "other_n1_s0"])
@pytest.mark.parametrize("kill, rest", [(5, [4, 5, 6]), (4, [4, 5, 6]), (1, [*range(7)])])
def test_killed_and_resumed_steps_give_the_same_bytes(phase, kill, rest, phantom, tmp_path):
    """Saved every two steps; the resumed process has other random numbers and weights."""
    done, whole = train(opened(phantom, tmp_path / "whole"), phase)
    assert done == [*range(7)]
    done, half = train(opened(phantom, tmp_path / "killed"), phase, kill=kill)
    assert done == [*range(kill)]
    assert half != whole
    # without a step before the first save there is nothing to go on with: the same seed again
    seed = 99 if rest[0] else 0
    done, resumed = train(opened(phantom, tmp_path / "killed", "--resume"), phase, seed)
    assert done == rest
    assert resumed == whole


def test_killed_twice(phantom, tmp_path):
    _, whole = train(opened(phantom, tmp_path / "whole"))
    train(opened(phantom, tmp_path / "killed"), kill=3)
    done, _ = train(opened(phantom, tmp_path / "killed", "--resume"), seed=98, kill=6)
    assert done == [2, 3, 4, 5]
    done, resumed = train(opened(phantom, tmp_path / "killed", "--resume"), seed=99)
    assert done == [6]
    assert resumed == whole


def test_finished_steps_are_not_done_again(phantom, tmp_path):
    """The last step is saved, also where --save-every does not divide their number."""
    _, whole = train(opened(phantom, tmp_path))
    done, resumed = train(opened(phantom, tmp_path, "--resume"), seed=99)
    assert done == []
    assert resumed == whole


def test_steps_of_another_row_are_not_taken_up(phantom, tmp_path):
    train(opened(phantom, tmp_path), "other_n1_s0", kill=5)
    done, _ = train(opened(phantom, tmp_path, "--resume"), "other_n1_s1")
    assert done == [*range(7)]


def test_steps_start_anew_without_resume(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    train(run, kill=5)
    done, _ = train(run)
    assert done == [*range(7)]


def test_steps_of_other_options_are_refused(phantom, tmp_path):
    train(opened(phantom, tmp_path), kill=5)
    run = opened(phantom, tmp_path, "--resume")
    run.o.lr = 1.
    with pytest.raises(data.DataError, match="lr = 0.002, now 1.0"):
        train(run)


def test_steps_log_their_seconds_once_they_are_done(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    train(run, kill=5)
    assert common.read_log(run.out) == []
    train(run)
    assert common.seconds_by_phase(run.out)["pretrain"] > 0


def test_training_state_holds_all_that_a_step_depends_on():
    net = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(net.parameters(), .1)
    net(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    state = common.training_state(3, (net,), optimiser)
    drawn = torch.rand(2)
    other = torch.nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters(), .5)
    assert common.resume_training(state, (other,), fresh) == 3
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(other.weight, net.weight)
    assert fresh.param_groups[0]["lr"] == .1
    assert len(fresh.state) == 2


def test_a_run_is_not_overwritten_and_not_resumed_with_other_options(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    before = (run.out / "options.json").read_text()
    with pytest.raises(data.DataError, match="holds a run already; add --resume"):
        opened(phantom, tmp_path)
    with pytest.raises(data.DataError, match="run made with lr = 0.002, now 3.0"):
        opened(phantom, tmp_path, "--resume", "--lr", 3)
    assert (run.out / "options.json").read_text() == before
    opened(phantom, tmp_path, "--resume", "--labelled", 1, 2, "--save-every", 3)   # these may


def test_pretrained_is_kept_for_a_resumed_run(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    assert run.pretrained() is None
    unet = run.unet(classes=2)
    saved = run.save_pretrained(unet=unet.state_dict(), parts=["encoder"])
    again = opened(phantom, tmp_path, "--resume").pretrained()
    for start in (saved, again):
        assert start["parts"] == ["encoder"]
        assert start["method"] == "other"
        assert torch.equal(start["unet"]["head.weight"], unet.head.weight)
    assert opened(phantom, tmp_path / "new").pretrained() is None
    file = run.out / "pretrained.pt"
    start = opened(phantom, tmp_path / "init", "--init", file).pretrained()
    assert torch.equal(start["unet"]["head.weight"], unet.head.weight)


# ------------------------------------------------------------------------------------------- rows


def fill(run):
    """Score a random network for every row that is still to do; returns their names."""
    names = []
    run.choose("scratch", "other")
    for row in run.rows():
        torch.manual_seed(zlib.crc32(row.name.encode()))           # a network of its own
        run.score(row, run.unet())
        names.append(row.name)
    return names


def results(run):
    """{(method, labelled, seed): row} of metrics.json, in its order."""
    rows = json.loads((run.out / "metrics.json").read_text())["rows"]
    return {(r["method"], r["labelled"], r["seed"]): r for r in rows}


@pytest.fixture(scope="module")
def filled(phantom, tmp_path_factory):
    """(The folder of a finished run of one labelled patient and two seeds, the run)."""
    folder = tmp_path_factory.mktemp("filled")
    run = opened(phantom, folder, "--seeds", 0, 1)
    names = fill(run)
    assert names == ["scratch_n1_s0", "other_n1_s0", "scratch_n1_s1", "other_n1_s1"]
    return folder, run


@pytest.fixture
def copied(filled, tmp_path):
    """A copy of that folder, to go on with."""
    shutil.copytree(filled[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_rows_are_scored_and_kept(filled):
    _, run = filled
    rows = results(run)
    want = [("scratch", 1, 0), ("other", 1, 0), ("scratch", 1, 1), ("other", 1, 1)]
    assert list(rows) == want
    assert len({r["mean_dice"] for r in rows.values()}) == 4       # four different networks
    assert len(run.volume_rows) == 4 * 2 * 3                       # volumes, classes
    log = [r for r in common.read_log(run.out) if r["phase"] == "other_n1_s1"]
    assert log[-1]["seconds"] >= log[-1]["seconds_scoring"] > 0


def test_finished_rows_are_not_done_again(filled, copied, phantom, capsys):
    capsys.readouterr()
    again = opened(phantom, copied, "--seeds", 0, 1, "--resume")
    assert fill(again) == []
    assert results(again) == results(filled[1])
    before = (filled[1].out / "per_volume.csv").read_text()
    assert (again.out / "per_volume.csv").read_text() == before
    assert "other n1 s1" in capsys.readouterr().out                # printed like a new one


def test_a_resumed_run_may_have_more_rows(filled, copied, phantom):
    again = opened(phantom, copied, "--labelled", 1, 2, "--seeds", 0, 1, "--resume")
    assert fill(again) == ["scratch_n2_s0", "other_n2_s0", "scratch_n2_s1", "other_n2_s1"]
    assert list(results(again))[:4] == list(results(filled[1]))
    assert len(results(again)) == 8
    assert len(results(again)[("other", 2, 0)]["patients"]) == 2


def test_a_row_that_is_not_there_is_trained(filled, copied, phantom):
    (copied / "o/other_n1_s0.pt").unlink()
    again = opened(phantom, copied, "--seeds", 0, 1, "--resume")
    assert fill(again) == ["other_n1_s0"]
    assert results(again) == results(filled[1])


def test_rows_of_other_options_are_refused(copied, phantom):
    again = opened(phantom, copied, "--resume")
    again.o.rotation = 0.
    with pytest.raises(data.DataError, match="rotation = 0.5, now 0.0"):
        fill(again)


def test_rows_of_other_classes_are_refused(filled, copied, phantom, tmp_path):
    """A dataset.json that was renamed: the same files and patients, other organs."""
    again = opened(phantom, copied, "--resume")
    again.classes = ["background", "LV", "Myo", "RV"]
    with pytest.raises(data.DataError, match="its classes are background, RV, Myo, LV, now"):
        fill(again)
    other = opened(phantom, tmp_path / "new", "--scratch", filled[0] / "o")
    other.classes = again.classes
    with pytest.raises(data.DataError, match="scratch_n1_s0.pt: its classes are"):
        fill(other)


def test_scratch_is_read_out_of_another_run(filled, phantom, tmp_path, capsys):
    """With other options of pre-training, and one row more, which is trained."""
    other = ["--scratch", filled[0] / "o", "--labelled", 1, 2, "--kind", "hard"]
    run = opened(phantom, tmp_path, *other)
    own = common.Row("other", 1, 0)                                # of scratch alone, not of this
    assert run.checkpoint(own) == run.out / "other_n1_s0.pt"
    capsys.readouterr()
    assert fill(run) == ["other_n1_s0", "scratch_n2_s0", "other_n2_s0"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if " not in " in line] == [
        f"scratch_n2_s0: not in {filled[0] / 'o'}, so it is trained here"]
    alone = opened(phantom, tmp_path / "alone", *other)
    alone.choose("scratch", "other")
    alone.chosen = ["other"]                                       # --rows other
    assert [row.name for row in alone.rows()] == ["other_n1_s0", "other_n2_s0"]
    assert "scratch_n2_s0: not in" in capsys.readouterr().out
    row = ("scratch", 1, 0)
    assert results(run)[row] == results(filled[1])[row]
    there = common.Row(*row)
    assert run.checkpoint(there) == filled[1].out / "scratch_n1_s0.pt"
    assert not (run.out / "scratch_n1_s0.pt").exists()
    assert run.checkpoint(common.Row("scratch", 2, 0)) == run.out / "scratch_n2_s0.pt"
    assert run.checkpoint(common.Row("other", 1, 0)) == run.out / "other_n1_s0.pt"


@pytest.mark.parametrize("option, value, why", [
    ("--width", 8, "width = 4, now 8"),
    ("--steps", 8, "steps = 7, now 8"),
    ("--lr", 1, "lr = 0.002, now 1.0"),
    ("--batch", 3, "batch = 8, now 3"),
    ("--rotation", 0, "rotation = 0.5, now 0.0"),
    ("--split", "val", "split = test, now val"),
    ("--spacing", 4, "spacing = 5.0, now 4.0"),
    ("--size", 64, "size = 32, now 64"),
    ("--precision", "bfloat16", "precision = float32, now bfloat16"),
])
def test_scratch_of_other_options_is_refused(option, value, why, filled, phantom, tmp_path):
    """Before anything is written, not after an hour of pre-training."""
    with pytest.raises(data.DataError, match=why):
        opened(phantom, tmp_path, "--scratch", filled[0] / "o", option, value)
    assert not (tmp_path / "o").exists()


def test_a_run_of_nothing_but_scratch_rows_of_another(filled, phantom, tmp_path):
    """Nothing was trained yet, so nothing was logged: --init beside --scratch begins like this."""
    run = opened(phantom, tmp_path, "--scratch", filled[0] / "o")
    run.choose("scratch")
    assert list(run.rows()) == []
    assert list(results(run)) == [("scratch", 1, 0)]


def test_networks_beside_the_first_have_rows_of_their_own(phantom, tmp_path):
    run = opened(phantom, tmp_path)
    run.choose("other")
    for row in run.rows():
        run.score(row, run.unet(), swin=Everywhere(1, 4))
    assert list(results(run)) == [("other", 1, 0), ("other, swin", 1, 0)]
    assert results(run)[("other, swin", 1, 0)]["missed"] == 4      # Myo and LV of two volumes
    again = opened(phantom, tmp_path, "--resume")
    again.choose("other")
    assert list(again.rows()) == []
    assert results(again) == results(run)


# --------------------------------------------------------------------------------------- the end


def test_first_networks_have_the_fewest_labels(filled, phantom, copied):
    run = opened(phantom, copied, "--labelled", 2, 1, "--seeds", 1, 0, "--resume")
    nets = run.first_nets(common.build_unet, "scratch", "other")
    assert list(nets) == ["scratch, 1 labelled", "other, 1 labelled"]
    for method in ("scratch", "other"):
        net = nets[f"{method}, 1 labelled"]
        want = common.load_checkpoint(filled[1].out / f"{method}_n1_s1.pt")["unet"]
        assert not net.training
        for k, v in net.state_dict().items():
            assert torch.equal(v, want[k])


def test_overlays_and_report(filled, phantom, copied, capsys):
    run = opened(phantom, copied, "--seeds", 0, 1, "--resume")
    fill(run)
    capsys.readouterr()
    common.draw_overlays(run, {"all RV": Everywhere(1, 4)})
    run.report("dice.png", "Look here.")
    for name in ("overlays.png", "dice.png"):
        assert (run.out / "figures" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| 1 | other |" in printed
    assert "1 test patients, mean ± std over 2 seeds" in printed
    assert printed.rstrip().endswith("Look here.")


def test_run_main_prints_one_line(capsys):
    def main():
        raise data.DataError("a.nii: bad\nfile")

    with pytest.raises(SystemExit) as caught:
        common.run_main(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a.nii: bad file\n"
