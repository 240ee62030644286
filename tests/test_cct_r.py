"""CCT-R: registration against analytic transforms, the Swin-UNet, every loss against float64 loops,
the memory bank, what trains, what is read of held-back labels, and what the script writes."""
import argparse
import copy
import csv
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import label_as_image, lowered, noted_rates, options, refused, run, started

import cct_r
import common
from cct_r import (MemoryBank, Stack, SwinUNet, balanced_contrastive_loss, cycle_error,
                   register_affine, register_deformable, sample)

STEP = (6., 4., 4.)


def scene(p, seed=3):
    """A smooth scene of 40 blobs at the places p [..., 3] in mm."""
    g = torch.Generator().manual_seed(seed)
    value = 0.
    for _ in range(40):
        middle = (torch.rand(3, generator=g) - .5) * torch.tensor([100., 130., 130.])
        width = 8 + 8 * torch.rand(1, generator=g)
        height = torch.rand(1, generator=g)
        far = (p - middle).square().sum(-1)
        value = value + height * torch.exp(-far / (2 * width ** 2))
    return value


def with_mask(x):
    """An image [1, 1, Z, Y, X] and the mask of a scan that is all there: [1, 2, Z, Y, X]."""
    return torch.cat([x, torch.ones_like(x)], 1)


# ----------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("step", [(6., 4., 4.), (10., 2.5, 4.)])
def test_points_and_sample(step):
    """Places are mm about the centre; sampling a volume at its own voxels gives it back."""
    p = cct_r.points((4, 5, 7), step)
    assert p.shape == (4, 5, 7, 3)
    assert p.mean((0, 1, 2)).abs().max() < 1e-5
    assert torch.allclose(p[1, 1, 1] - p[0, 0, 0], torch.tensor(step))
    assert torch.allclose(p[2, 2, 3], torch.tensor([.5 * step[0], 0, 0]))
    x = torch.rand(2, 3, 4, 5, 7)
    both = p.expand(2, 4, 5, 7, 3)
    assert torch.allclose(sample(x, both, step), x, atol=1e-5)
    assert sample(x, both + 1000, step).abs().max() == 0           # outside
    ramp = (p * torch.tensor([1., 2., 3.])).sum(-1)[None, None]    # linear in mm
    q = torch.tensor([[1., -2., 3.]])
    assert sample(ramp, q[None], step).item() == pytest.approx(1 - 4 + 9, abs=1e-4)


@pytest.mark.parametrize("step", [(6., 4., 4.), (8., 3., 5.)])
def test_a_known_affine_is_recovered(step):
    change = torch.tensor([[.05, 0, 0, 5.], [0, .08, -.1, -9.], [0, .1, -.05, 7.]])
    A = (torch.eye(3, 4) + change)[None]
    p = cct_r.points((16, 32, 32), step)
    big = cct_r.points((26, 52, 52), step)
    fixed = scene(p)[None, None]
    back = (big - A[0, :, 3]) @ torch.linalg.inv(A[0, :, :3]).T
    moving = with_mask(scene(back)[None, None])                    # moving(A x + b) = fixed(x)
    got, similarity = register_affine(with_mask(fixed), moving, p, step)
    error = (cct_r.move(got, p) - cct_r.move(A, p))[0] / torch.tensor(step)      # voxels
    assert similarity > .9
    assert error.abs().mean() < .5
    assert error.abs().max() < 1


def test_shifted_correlation_equals_loops():
    """Every shift k of a grid against another: fixed[i] beside moving[i + k], in both masks."""
    g = torch.Generator().manual_seed(5)
    fixed = torch.rand(1, 2, 3, 4, 5, generator=g)
    moving = torch.rand(2, 2, 4, 3, 6, generator=g)
    for x in (fixed, moving):
        x[:, 1] = (x[:, 1] > .2).float()
        x[:, 0] *= x[:, 1]
    got = cct_r.shifted_correlation(fixed, moving, least=.3)
    assert got.shape == (2, 7, 7, 11)
    compared = 0
    for b in range(2):
        least = .3 * min(fixed[0, 1].sum(), moving[b, 1].sum()).item()
        for k in itertools.product(range(-2, 4), range(-3, 3), range(-4, 6)):
            a = []
            for i in itertools.product(range(3), range(4), range(5)):
                j = [i[axis] + k[axis] for axis in range(3)]
                if all(0 <= j[axis] < moving.shape[2 + axis] for axis in range(3)):
                    if fixed[0, 1][i] * moving[b, 1][tuple(j)] > 0:
                        a.append((fixed[0, 0][i].item(), moving[b, 0][tuple(j)].item()))
            if len(a) < least:
                assert got[b][k] == -1                             # negative k: from the end
                continue
            f, m = np.array(a).T
            if f.var() > .01 and m.var() > .01:
                want = ((f - f.mean()) * (m - m.mean())).mean() / np.sqrt(f.var() * m.var())
                assert got[b][k].item() == pytest.approx(want, abs=1e-3)
                compared += 1
    assert compared > 80


@pytest.mark.parametrize("z", [63., -57.])
def test_an_affine_map_far_along_z_is_found(z):
    """The box of a short scan in a tall one, farther than the near starts reach."""
    p = cct_r.points((12, 32, 32), STEP)                           # 72 mm along z
    tall = cct_r.points((40, 32, 32), STEP)                        # 240 mm
    centre = torch.tensor([z, 0, 0])
    fixed = with_mask(scene(p + centre)[None, None])
    moving = with_mask(torch.stack([scene(tall), scene(tall - centre)])[:, None])      # 2: farther
    reach = cct_r.far_reach(fixed, moving, p, STEP)
    assert torch.allclose(reach[:, 0], torch.tensor(66 / 6 + (240 - 72) / 2))
    starts = cct_r.far_starts(fixed, moving, p, STEP)              # [2, 2, 3, 4]
    assert torch.allclose(starts[0, 0, :, :3], .85 * torch.eye(3))
    assert torch.equal(starts[1, 0, :, :3], torch.eye(3))
    assert (starts[1, 0, :, 3] - centre).abs().max() <= 3          # half a voxel
    assert starts[1, 1, 0, 3].abs() < 100                          # 2 z is out of reach
    off = torch.tensor([12., 0, 0])                                # the same box elsewhere
    again = cct_r.far_starts(fixed, moving[:1], p + off, STEP)
    assert torch.allclose(again[1, 0, :, 3], starts[1, 0, :, 3] - off, atol=1e-3)
    large = with_mask(scene(.85 * p + centre)[None, None])         # what is fixed, larger
    scaled = cct_r.far_starts(large, moving[:1], p, STEP)
    assert (scaled[0, 0, :, 3] - centre).abs().max() <= 3
    got, similarity = register_affine(fixed, moving[:1], p, STEP)
    assert similarity > .9
    assert (cct_r.move(got, p)[0] - p - centre).norm(dim=-1).mean() < 2


def test_a_large_box_has_more_levels():
    """Of less than 64 voxels along its longest side 15 control points at most, else 25."""
    for side, count in ((63, 15), (64, 25)):
        x = torch.rand(1, 1, side, 8, 8)
        u = register_deformable(x, x, torch.ones_like(x), (4., 4., 4.), .3)
        assert u.shape == (1, 3, count, 3, 3)


def test_padding_is_no_scan():
    """A scan of 20 x 24 pixels in a crop of 32 x 32: what lies about it is not compared."""
    info = {"target": 2., "cases": [{"shape": [3, 10, 24], "spacing": [6., 4., 2.]}]}
    slices = SimpleNamespace(info=info, volume=np.zeros(3, int), images=np.ones((3, 1, 32, 32)))
    slices.image = lambda numbers, device: torch.ones(3, 1, 32, 32)
    volume = Stack(slices, 0)
    assert volume.shape == (3, 32, 32)
    assert volume.scanned == (3, 20, 24)
    mask = cct_r.on_grid(slices, 0, volume.points())[0, 1]         # [3, 32, 32]
    assert mask[:, 6:26, 4:28].all()
    assert mask.sum() == 3 * 20 * 24


def test_affine_maps_one_after_another_and_back():
    torch.manual_seed(0)
    A = torch.randn(2, 3, 4)
    B = torch.randn(2, 3, 4)
    p = torch.randn(2, 4, 5, 6, 3)
    both = cct_r.move(cct_r.after_another(A, B), p)
    assert torch.allclose(both, cct_r.move(A, cct_r.move(B, p)), atol=1e-4)
    assert torch.allclose(cct_r.move(cct_r.inverse(A), cct_r.move(A, p)), p, atol=1e-3)


def test_a_known_smooth_field_is_recovered():
    p = cct_r.points((16, 32, 32), STEP)
    z, y, x = p.unbind(-1)
    d = 8 * torch.stack([0 * z, torch.sin(x / 30), torch.cos(y / 30)])[None]     # [1, 3, Z, Y, X]
    moving = scene(p)[None, None]
    fixed = scene(p + d[0].movedim(0, -1))[None, None]             # moving(x + d) = fixed(x)
    weight = torch.ones_like(fixed)
    u = register_deformable(fixed, moving, weight, STEP, .3)
    found = F.interpolate(u, p.shape[:3], mode="trilinear")
    error = (found - d).norm(dim=1)
    assert error.mean() < .45 * d.norm(dim=1).mean()
    assert error.mean() < 4                                        # below a voxel
    moved = sample(moving, p + found.movedim(1, -1), STEP)
    assert cct_r.local_correlation(fixed, moving, weight) < .9
    assert cct_r.local_correlation(fixed, moved, weight) > .9
    assert (cct_r.jacobian(u, p.shape[:3], STEP) > 0).all()


def test_identical_volumes_stay_where_they_are():
    p = cct_r.points((12, 24, 24), STEP)
    x = scene(p)[None, None]
    weight = torch.ones_like(x)
    A, similarity = register_affine(with_mask(x), with_mask(x), p, STEP)
    assert (cct_r.move(A, p) - p).norm(dim=-1).max() < 1           # mm
    assert similarity > .99
    u = register_deformable(x, x, weight, STEP, .3)
    assert u.norm(dim=1).mean() < 1
    assert u.abs().max() < 4


def test_local_correlation_by_hand():
    torch.manual_seed(0)
    a = torch.rand(1, 1, 6, 8, 8)
    w = torch.ones(1, 1, 6, 8, 8)
    other = torch.rand(1, 1, 6, 8, 8)
    # blind to contrast and brightness
    assert cct_r.local_correlation(a, 2 * a + 3, w).item() == pytest.approx(1, abs=1e-3)
    assert cct_r.local_correlation(a, -a, w).item() == pytest.approx(-1, abs=1e-3)
    assert abs(cct_r.local_correlation(a, other, w).item()) < .1


def test_box_mean_is_that_of_torch():
    x = torch.rand(1, 2, 5, 6, 7)
    want = F.avg_pool3d(x, (3, 5, 5), 1, (1, 2, 2), count_include_pad=False)
    assert torch.allclose(cct_r.box_mean(x, (1, 2, 2)), want, atol=1e-6)


def test_roughness_by_hand():
    """A velocity whose z grows by 3 mm from one control point to the next, 2 mm away along y."""
    v = torch.zeros(1, 3, 3, 4, 5)
    v[:, 0] = 3 * torch.arange(4.)[:, None]
    assert cct_r.roughness(v, (5., 2., 7.)).item() == pytest.approx(1.5 ** 2 / 3)
    assert cct_r.roughness(v + 9, (5., 2., 7.)).item() == pytest.approx(1.5 ** 2 / 3)


def test_cycle_error():
    p = cct_r.points((8, 16, 16), STEP)
    shift = torch.zeros(1, 3, 8, 16, 16)
    shift[:, 1] = 5.
    assert cycle_error(shift, -shift, p, STEP).max() < 1e-4        # exact inverses
    assert cycle_error(shift, 0 * shift, p, STEP).mean().item() == pytest.approx(5, abs=1e-3)
    assert cycle_error(shift, shift, p, STEP).mean().item() == pytest.approx(10, abs=1e-3)


def test_the_flow_backwards_undoes_the_flow():
    torch.manual_seed(0)
    p = cct_r.points((8, 16, 16), STEP)
    places = cct_r.control_points((8, 16, 16), STEP, 5)
    v = 4 * torch.randn(1, 3, *places.shape[:3])
    there = F.interpolate(cct_r.exponential(v, places), p.shape[:3], mode="trilinear")
    back = F.interpolate(cct_r.exponential(-v, places), p.shape[:3], mode="trilinear")
    inner = cycle_error(there, back, p, STEP)[:, 2:-2, 3:-3, 3:-3]
    assert inner.mean() < .25 * there.norm(dim=1).mean()


def test_folding_is_counted():
    p = cct_r.points((6, 12, 12), STEP)
    flat = torch.zeros(1, 3, 6, 12, 12)
    assert (cct_r.jacobian(flat, p.shape[:3], STEP) == 1).all()
    fold = flat.clone()
    fold[:, 2, :, :, 6:] = -12.                                    # these jump 3 voxels to the left
    J = cct_r.jacobian(fold, p.shape[:3], STEP)[0]
    assert (J[:, :, 5] == -2).all()                                # 1 + (-12 mm) / (4 mm)
    assert (J[:, :, 4] == 1).all()
    assert (J[:, :, 6] == 1).all()
    assert (J <= 0).float().mean().item() == pytest.approx(1 / 11)
    stretch = flat.clone()
    stretch[0] = .5 * p.movedim(-1, 0)
    J = cct_r.jacobian(stretch, p.shape[:3], STEP)
    assert torch.allclose(J, torch.tensor(1.5 ** 3), atol=1e-4)


# ---------------------------------------------------------------------------------- the Swin-UNet


def test_windows_and_their_inverse():
    x = torch.rand(2, 12, 18, 5)
    w = cct_r.to_windows(x, 6)
    assert w.shape == (2, 6, 36, 5)
    assert torch.equal(w[0, 1], x[0, :6, 6:12].reshape(36, 5))
    assert torch.equal(cct_r.from_windows(w, 6, 12, 18), x)


@pytest.mark.parametrize("H, W, shift", [(12, 12, 3), (12, 18, 3), (12, 12, 2), (6, 6, 0)])
def test_attention_mask(H, W, shift):
    """Tokens of a window see each other if they were as near before the roll."""
    mask = cct_r.attention_mask(H, W, 6, shift, torch.device("cpu"))
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    place = torch.stack([rows, columns], -1).roll((-shift, -shift), (0, 1))
    before = cct_r.to_windows(place[None], 6)[0]                   # [windows, 36, 2]
    for window, tokens in zip(mask, before.tolist()):
        for i, (a, b) in enumerate(tokens):
            for j, (c, d) in enumerate(tokens):
                assert (window[i, j] == 0) == (abs(a - c) < 6 and abs(b - d) < 6)


def test_attention_equals_the_loop():
    """softmax(q k' / sqrt(d) + bias) v of every window and head, with the mask."""
    torch.manual_seed(0)
    net = cct_r.WindowAttention(6, 2, 2).double()
    x = torch.rand(3, 2, 4, 6).double()                            # 3 images, 2 windows, 4 tokens
    mask = torch.zeros(2, 4, 4).double()
    mask[1, :2, 2:] = -torch.inf
    mask[1, 2:, :2] = -torch.inf
    want = torch.zeros(3, 2, 4, 6).double()
    qkv = net.qkv(x)
    for b in range(3):
        for w in range(2):
            for head in range(2):
                q, k, v = (qkv[b, w, :, 6 * n + 3 * head:][:, :3] for n in range(3))
                sim = q @ k.T / math.sqrt(3) + net.bias[net.index][..., head] + mask[w]
                want[b, w, :, 3 * head:3 * head + 3] = sim.softmax(1) @ v
    assert torch.allclose(net(x, mask), net.project(want))


@pytest.mark.parametrize("size", [(96, 96), (50, 70), (33, 20)])
def test_any_size(size):
    H, W = size
    net = SwinUNet(2, 5, 12, 4)
    assert net(torch.rand(1, 2, H, W)).shape == (1, 5, H, W)
    coarse, fine = net.maps(torch.rand(1, 2, H, W))
    assert coarse.shape == (1, 24, math.ceil(H / 8), math.ceil(W / 8))
    assert fine.shape == (1, 6, H, W)


def test_no_token_sees_across_the_border_and_shifted_windows_join():
    """A change stays in its window; shifted windows take it to the next, never to the far side."""
    torch.manual_seed(0)
    x = torch.rand(1, 18, 18, 12)
    y = x.clone()
    y[:, 0, 0] += torch.rand(12)

    def last_changed(*blocks):
        net = torch.nn.Sequential(*blocks)
        changed = (net(x) - net(y)).abs().amax(-1)[0] > 1e-7
        return changed.nonzero().amax(0).tolist()

    plain = cct_r.SwinBlock(12, 6, 3, 0)
    shifted = cct_r.SwinBlock(12, 6, 3, 3)
    assert last_changed(plain) == [5, 5]
    assert last_changed(shifted) == [2, 2]                         # no wrapping around
    assert last_changed(plain, shifted) == [8, 8]


@pytest.mark.parametrize("size, window", [(32, 2), (64, 4), (96, 6), (128, 4), (224, 7)])
def test_the_default_window_divides_every_map(phantom, size, window):
    words = ["--data", str(phantom), "--size", str(size), "--spacing", "5", "--block", "8"]
    run_ = common.Run(common.parse_options("cct_r", "", cct_r.OPTIONS, words))
    cct_r.check(run_)
    assert run_.o.window == window
    assert size // 16 % window == 0


def test_relative_position_bias():
    """The bias of a pair of tokens depends on their offset alone: [dy, dx] and nothing else."""
    index = cct_r.WindowAttention(6, 3, 2).index
    offsets = {}
    for i in range(9):
        for j in range(9):
            offset = (i // 3 - j // 3, i % 3 - j % 3)
            offsets.setdefault(offset, set()).add(int(index[i, j]))
    assert len(offsets) == 25
    assert all(len(found) == 1 for found in offsets.values())
    assert len(set.union(*offsets.values())) == 25


@pytest.mark.parametrize("shift", (0, 2))
def test_the_convolution_tells_a_block_where_it_is(shift):
    """Tokens that are all alike: without the convolution they stay alike wherever they lie."""
    torch.manual_seed(0)
    block = cct_r.SwinBlock(12, 4, 3, shift)
    x = torch.randn(12).expand(1, 8, 8, 12)
    assert block(x).flatten(0, 2).std(0).max() > 1e-2
    torch.nn.init.zeros_(block.place.weight)
    assert block(x).flatten(0, 2).std(0).max() < 1e-5


def test_merging_and_expanding_keep_neighbours_together():
    """A token of the merged map depends on its own 2 x 2 neighbours, and 2 x 2 on one token."""
    torch.manual_seed(0)
    x = torch.rand(1, 4, 6, 3)
    y = x.clone()
    y[0, 2:4, 4:6] += 1 + torch.rand(2, 2, 3)
    merge = cct_r.PatchMerging(3)
    changed = (merge(x) != merge(y)).any(-1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]
    x = torch.rand(1, 2, 3, 8)
    y = x.clone()
    y[0, 1, 2] += torch.rand(8)
    expand = cct_r.PatchExpanding(8, 4, 2)
    assert expand(x).shape == (1, 4, 6, 4)
    changed = (expand(x) != expand(y)).any(-1)[0]
    assert changed.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


# ----------------------------------------------------------------------------------------- losses


def unit(v):
    """Rows of length 1."""
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def balanced_oracle(z, y, tau):
    """The class-balanced contrast, pixel by pixel in float64."""
    z = unit(z)
    n = len(z)
    losses = []
    for i in range(n):
        P = [p for p in range(n) if p != i and y[p] == y[i]]
        if not P:
            continue
        total = 0.
        for a in range(n):
            if a != i:
                w = sum(y == y[a]) - (y[a] == y[i])
                total += math.exp(z[i] @ z[a] / tau) / w
        L = [z[i] @ z[p] / tau - math.log(total) for p in P]
        losses.append(-sum(L) / len(P))
    return sum(losses) / len(losses)


def test_balanced_contrast_equals_the_loop():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 14, 4))
    y = rng.choice([0, 0, 0, 1, 2], (2, 14))
    y[0, 0] = 3                                                    # alone in its class: no positive
    want = [balanced_oracle(a, b, .1) for a, b in zip(z, y)]
    z = torch.tensor(z)
    for n in range(2):
        one = balanced_contrastive_loss(z[n], torch.tensor(y[n]), .1)
        assert one.item() == pytest.approx(want[n], rel=1e-5)
    # two groups: the mean over all anchors that have a positive
    counts = [sum(sum(group == k) > 1 for k in group) for group in y]
    both = balanced_contrastive_loss(z, torch.tensor(y), .1)
    assert both.item() == pytest.approx(np.average(want, weights=counts), rel=1e-5)


def test_class_balance_by_hand():
    """tau = 1, anchors (1,0) against background (0,1), of which copies change nothing."""
    z = torch.tensor([[1., 0], [1, 0], [0, 1], [0, 1]])
    y = torch.tensor([1, 1, 0, 0])
    # class 1: own class e^1 / 1, the other 2 e^0 / 2; class 0: the same
    want = -1 + math.log(math.e + 1)
    assert balanced_contrastive_loss(z, y, 1.).item() == pytest.approx(want, abs=1e-6)
    many = torch.cat([z, z[2:].repeat(10, 1)])
    labels = torch.cat([y, y[2:].repeat(10)])
    assert balanced_contrastive_loss(many, labels, 1.).item() == pytest.approx(want, abs=1e-5)
    assert balanced_contrastive_loss(z, torch.arange(4), 1.).item() == 0       # no positive


def test_features_and_labels_are_cut_in_the_same_order():
    """Every pixel's feature is its class: the order is right if the two agree after cutting."""
    torch.manual_seed(0)
    y = torch.randint(0, 4, (3, 10, 14))
    z = F.one_hot(y, 4).movedim(-1, 1).float()
    for offset in ((0, 0), (2, 1)):
        features = cct_r.cut(z, 4, offset)
        labels = cct_r.cut(y[:, None], 4, offset)[..., 0]
        assert features.shape == (3, 2 * 3, 16, 4)
        assert torch.equal(features.argmax(-1), labels)
    second = cct_r.cut(y[:, None], 4)[0, 1, :, 0]
    assert torch.equal(second, y[0, :4, 4:8].flatten())            # one block is local
    other_order = y.transpose(1, 2).reshape(3, 10, 14)
    assert cct_r.local_contrast([z, z], [y, y], 4, 6, .1) < .1
    assert cct_r.local_contrast([z, z], [y, other_order], 4, 6, .1) > .1


def test_a_group_has_a_block_of_every_image_each_at_its_own_place(monkeypatch):
    """Each feature names its network, image and block: every block in one group, none twice."""
    torch.manual_seed(0)
    B, size, side = 3, 2, 8
    block = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = torch.arange(B).view(B, 1, 1).expand(B, side, side)
    maps = [torch.stack([torch.full((B, side, side), net), image, block.expand(B, side, side)], 1)
            for net in (0, 1)]
    groups = []
    monkeypatch.setattr(cct_r, "balanced_contrastive_loss", lambda z, y, t: groups.append((z, y)))
    labels = [m[:, 1] + 1 for m in maps]                           # the class: 1 + the image
    cct_r.local_contrast([m.float() for m in maps], labels, size, 99, .1)
    (z, y), = groups
    assert z.shape == (16, 2 * B * size ** 2, 3)
    assert torch.equal(y, z[..., 1].long() + 1)
    whole = z.view(16, 2 * B, size ** 2, 3)
    assert (whole == whole[:, :, :1]).all()                        # a block stays in one piece
    seen = {tuple(v) for v in whole[:, :, 0].reshape(-1, 3).int().tolist()}
    assert len(seen) == 2 * B * 16                                 # every block of every image once
    for group in whole[:, :, 0]:
        assert len({tuple(v) for v in group[:, :2].int().tolist()}) == 2 * B
    places = whole[:, :, 0, 2]                                     # [groups, network and image]
    assert all((places[:, 0] != places[:, k]).any() for k in range(1, 2 * B))


def test_groups_of_background_are_skipped():
    torch.manual_seed(0)
    y = torch.zeros(1, 8, 8, dtype=torch.long)
    z = torch.rand(1, 5, 8, 8, requires_grad=True)
    assert cct_r.local_contrast([z, z], [y, y], 4, 9, .1).item() == 0
    y[0, 0, :2] = 1
    still = torch.rand(1, 5, 8, 8)
    used = set()
    for _ in range(40):
        z.grad = None
        cct_r.local_contrast([z, still], [y, torch.zeros_like(y)], 4, 9, .1).backward()
        block = F.max_pool2d(z.grad.abs().amax(1), 4)[0] > 0       # [2, 2]: which blocks are in it
        used.add(tuple(map(tuple, block.nonzero().tolist())))
    assert used == {((0, 0),)}                                     # its partner is anywhere


def made_up_pixels(B=2, S=16, d=4):
    """`Pixels` of random features and classes, each network's own."""
    coarse = [torch.randn(B, d, S // 8, S // 8) for _ in range(2)]
    fine = [torch.randn(B, d, S // 2, S // 2) for _ in range(2)]
    classes = [torch.randint(0, 3, (B, S, S)) for _ in range(2)]
    place = torch.rand(B, S, S, 3)
    return cct_r.Pixels(coarse, fine, classes, place, torch.arange(B))


def test_what_the_contrast_compares(monkeypatch):
    """What contrast_terms hands to local_contrast: classes, sizes and groups at both levels."""
    torch.manual_seed(0)
    o = argparse.Namespace(block=8, groups=5, temperature=.1)
    calls = []

    def noted(*arguments):
        calls.append(arguments)
        return torch.tensor(1.)

    monkeypatch.setattr(cct_r, "local_contrast", noted)
    first, second = made_up_pixels(), made_up_pixels()
    pixels = cct_r.joined(first, second)
    assert cct_r.contrast_terms(o, pixels).item() == 2
    (coarse, small, *rest), (fine, half, *rest_fine) = calls
    assert rest == [4, 4, .1]
    assert rest_fine == [4, 5, .1]
    for net in (0, 1):
        classes = torch.cat([first.classes[net], second.classes[net]])
        assert torch.equal(half[net], classes[:, ::2, ::2])
        assert torch.equal(small[net], classes[:, 4::8, 4::8])
        assert torch.equal(fine[net], torch.cat([first.fine[net], second.fine[net]]))
        assert torch.equal(coarse[net], torch.cat([first.coarse[net], second.coarse[net]]))
    assert torch.equal(pixels.volume, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(pixels.place, torch.cat([first.place, second.place]))


def test_the_class_of_a_cell_is_that_of_its_middle():
    """A border that a cell's middle has or has not passed: at most a pixel beside it."""
    for k in range(8):                                             # at most a pixel off the middle
        ramp = (torch.arange(64) > 8 * k + 4).long().expand(1, 64, 64)
        assert cct_r.cell_classes(ramp, (8, 8))[0, 0].tolist() == [0] * (k + 1) + [1] * (7 - k)
        ramp = (torch.arange(64) > 8 * k + 2).long().expand(1, 64, 64)
        assert cct_r.cell_classes(ramp, (8, 8))[0, 0].tolist() == [0] * k + [1] * (8 - k)


def test_balanced_contrast_has_a_gradient():
    torch.manual_seed(0)
    y = torch.randint(0, 3, (20,))
    lowered(lambda z: balanced_contrastive_loss(z, y, .1), torch.randn(20, 5), .01)


def test_memory_bank():
    bank = MemoryBank(4, 2, 2)                                     # 4 volumes, 2 features each
    z = torch.eye(2)
    where = torch.tensor([[0., 0, 0], [0, 0, 3], [0, 0, 9]])
    bank.push(torch.cat([z, -z[:1]]), where, torch.tensor([1, 2, 2]))
    here = torch.tensor([[0., 0, 1], [0, 0, 8]])
    r, near = bank.nearest(here, torch.tensor([0, 2]), 2.5)
    assert near.tolist() == [[False, True, True, False],          # one of each other volume
                             [False, False, False, False]]        # never of the own one
    assert r[0, 1].tolist() == [1, 0]
    assert r[0, 2].tolist() == [0, 1]                              # at 3 mm, not at 9
    r, near = bank.nearest(here + torch.tensor([0., 0, 7]), torch.tensor([0, 0]), 2.5)
    assert near[0].tolist() == [False, False, True, False]
    assert r[0, 2].tolist() == [-1, 0]                             # at 9 mm, not at 3
    bank.push(5 * torch.ones(1, 2), torch.tensor([[7., 7, 7]]), torch.tensor([2]))
    assert bank.place[2].tolist() == [[7, 7, 7], [0, 0, 9]]        # the oldest goes
    assert bank.next.tolist() == [0, 1, 1, 0]
    five = torch.arange(5.)[:, None].expand(5, 3)
    bank.push(torch.rand(5, 2), five, torch.full((5,), 3))         # more than it holds: evenly
    assert bank.place[3].tolist() == [[0, 0, 0], [2, 2, 2]]
    _, near = MemoryBank(4, 2, 2).nearest(where, torch.tensor([1, 2, 3]), 5.)
    assert not near.any()                                          # empty


def reps_oracle(z, y, where, who, bank, radius, tau):
    """REPS pixel by pixel in float64; bank: a list of (feature, place, volume)."""
    z = unit(z)
    n = len(z)
    losses = []
    sizes = []
    for i in range(n):
        R = []
        for v in {volume for _, _, volume in bank} - {who[i]}:
            of_v = [(np.linalg.norm(where[i] - place), tuple(f)) for f, place, volume in bank
                    if volume == v]
            distance, f = min(of_v)
            if distance <= radius:
                R.append(np.array(f))
        D = 0.
        for a in range(n):
            if a != i:
                D += math.exp(z[i] @ z[a] / tau) / (sum(y == y[a]) - (y[a] == y[i]))
        if R:
            D += sum(math.exp(z[i] @ r / tau) for r in R) / len(R)
        positives = [z[p] for p in range(n) if p != i and y[p] == y[i]] + R
        if positives:
            L = [z[i] @ p / tau - math.log(D) for p in positives]
            losses.append(-sum(L) / len(positives))
        sizes.append((len(positives) - len(R), len(R)))
    return np.mean(losses), sizes


def test_reps_equals_the_loop():
    rng = np.random.default_rng(0)
    n, V, M, tau, radius = 9, 5, 6, .1, 8.
    z = rng.normal(size=(n, 5))
    y = np.array([0, 0, 0, 1, 1, 2, 3, 4, 0])                      # 2, 3, 4: alone in their class
    where = rng.uniform(-10, 10, (n, 3))
    who = rng.integers(0, V, n)
    where[7] = 500                                                 # nothing near: no positive
    where[8] = 500                                                 # only those of its class
    features = unit(rng.normal(size=(V * M - 8, 5)))               # volume 4 has none
    places = rng.uniform(-10, 10, (len(features), 3))
    volumes = np.arange(len(features)) % (V - 1)
    bank = MemoryBank(V, M, 5)
    bank.push(torch.tensor(features).float(), torch.tensor(places).float(), torch.tensor(volumes))
    entries = list(zip(features, places, volumes))
    want, sizes = reps_oracle(z, y, where, who, entries, radius, tau)
    assert {p > 0 for p, _ in sizes} == {r > 0 for _, r in sizes} == {True, False}
    assert sizes[7] == (0, 0)
    assert any(p == 0 and r > 1 for p, r in sizes)
    r, near = bank.nearest(torch.tensor(where).float(), torch.tensor(who), radius)
    assert near.sum(1).tolist() == [count for _, count in sizes]
    got = cct_r.reps_loss(torch.tensor(z), torch.tensor(y), r, near, tau)
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_reps_with_an_empty_bank_is_the_balanced_contrast():
    torch.manual_seed(0)
    z = torch.randn(8, 4)
    y = torch.randint(0, 3, (8,))
    r, near = MemoryBank(3, 5, 4).nearest(torch.rand(8, 3), torch.zeros(8).long(), 9.)
    assert cct_r.reps_loss(z, y, r, near, .1) == balanced_contrastive_loss(z, y, .1)


def test_the_bank_only_attracts():
    """Every step down the gradient turns an anchor towards what R(i) holds, whatever its class."""
    z = torch.tensor([[1., 0, 0]], requires_grad=True)
    r = torch.tensor([[[0., 1, 0], [0, 0, 1]]])
    near = torch.tensor([[True, False]])
    cct_r.reps_loss(z, torch.tensor([0]), r, near, 1.).backward()
    assert z.grad[0, 1] == 0                                       # alone in D_i: L_i = 0
    both = torch.tensor([[1., 0, 0], [1., .5, 0]])
    both.requires_grad_()
    near = torch.tensor([[True, False], [False, False]])
    cct_r.reps_loss(both, torch.tensor([0, 1]), r.expand(2, 2, 3), near, 1.).backward()
    assert both.grad[0, 1] < 0                                     # towards the near one
    assert both.grad[0, 2] == 0                                    # what is not near: nothing


def test_half_of_the_anchors_are_organ():
    torch.manual_seed(0)
    known = torch.rand(2, 20, 20) < .5
    organ = torch.rand(2, 20, 20) < .2
    for few, want in ((40, 20), (400, int((known & organ).sum()))):
        b, row, column = cct_r.draw_anchors(known, organ, few).T
        assert known[b, row, column].all()
        assert organ[b, row, column].sum() == want
        assert len(torch.unique(torch.stack([b, row, column], 1), dim=0)) == len(b)
    assert len(cct_r.draw_anchors(known & False, organ, 40)) == 0


def test_reps_anchors_have_a_place_and_fill_the_banks(monkeypatch):
    """Each network's features go to its bank, with the place and the volume of their pixel."""
    torch.manual_seed(0)
    asked = []
    loss = cct_r.reps_loss

    def noted(z, y, *rest):
        asked.append((z, y))
        return loss(z, y, *rest)

    monkeypatch.setattr(cct_r, "reps_loss", noted)
    o = argparse.Namespace(anchors=6, radius=8., temperature=.1)
    fine = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    place = torch.full((2, 8, 8, 3), torch.nan)
    place[1, 2:6, :] = torch.rand(4, 8, 3)                         # 2 x 4 places of every 2nd pixel
    place[0, 1::2, 1::2] = 3.                                      # never looked at
    organ = torch.zeros(2, 8, 8, dtype=torch.long)
    organ[:, :4] = 2
    organ[:, 1::2] = 3                                             # odd pixels: never looked at
    organ[:, :, 1::2] = 3
    volume = torch.tensor([7, 9])
    pixels = cct_r.Pixels([None] * 2, fine, [organ] * 2, place, volume)
    banks = [MemoryBank(10, 16, 3), MemoryBank(10, 16, 3)]
    L = cct_r.reps_terms(o, banks, pixels)
    assert L.item() > 0
    for features, bank in zip(fine, banks):
        assert bank.next.tolist() == [0] * 9 + [6]
        own = F.normalize(features[1], dim=0)                      # [3, 4, 4]
        for z, spot in zip(bank.z[9, :6], bank.place[9, :6]):
            row, column = (place[1, ::2, ::2] == spot).all(-1).nonzero()[0].tolist()
            assert torch.allclose(z, own[:, row, column])
    for (z, y), features in zip(asked, fine):
        for one, k in zip(z, y):
            row, column = (features[1] == one[:, None, None]).all(0).nonzero()[0].tolist()
            assert k == organ[1, 2 * row, 2 * column]
    nowhere = pixels._replace(place=place * torch.nan)
    assert cct_r.reps_terms(o, banks, nowhere) == 0


def dice_oracle(logits, y):
    """The base's Dice loss, class by class and pixel by pixel in float64."""
    p = logits.double().softmax(1).numpy()
    K = p.shape[1]
    total = 0.
    for k in range(K):
        both = squares = 0.
        for b, r, c in np.ndindex(*y.shape):
            hit = float(y[b, r, c] == k)
            both += p[b, k, r, c] * hit
            squares += p[b, k, r, c] ** 2 + hit ** 2
        total += (2 * both + 1e-5) / (squares + 1e-5)
    return 1 - total / K


def test_dice_is_the_bases():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 6)
    y = torch.randint(0, 3, (2, 6, 6))                             # class 3 is absent
    assert cct_r.dice_loss(logits, y).item() == pytest.approx(dice_oracle(logits, y), abs=1e-6)
    # by hand: one pixel, p = (3/4, 1/4), class 0: 1 - (1.5 / (9/16 + 1) + 0) / 2
    one = torch.tensor([math.log(3.), 0.]).view(1, 2, 1, 1)
    zero = torch.zeros(1, 1, 1, dtype=torch.long)
    assert cct_r.dice_loss(one, zero).item() == pytest.approx(1 - .96 / 2, abs=1e-4)
    sure = 50 * F.one_hot(y, 4).movedim(-1, 1).float()
    assert cct_r.dice_loss(sure, y).item() == pytest.approx(0, abs=1e-5)


def test_losses_of_logits_have_a_gradient():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 2, 4, 6, 6)
    y = torch.randint(0, 4, (2, 6, 6))
    for loss in (cct_r.dice_loss, cct_r.segmentation_loss):
        lowered(lambda x: loss(x, y), logits, .1)
    lowered(lambda x: cct_r.cross_teaching_loss(x, other), logits, .1)


def test_segmentation_loss():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8)
    y = torch.randint(0, 3, (2, 8, 8))
    ce = -logits.double().log_softmax(1).gather(1, y[:, None]).mean().item()
    want = .5 * (ce + dice_oracle(logits, y))
    assert cct_r.segmentation_loss(logits, y).item() == pytest.approx(want, abs=1e-5)


def test_cross_teaching():
    torch.manual_seed(0)
    a = torch.randn(2, 3, 8, 8)
    b = torch.randn(2, 3, 8, 8)
    want = dice_oracle(a, b.argmax(1)) + dice_oracle(b, a.argmax(1))
    assert cct_r.cross_teaching_loss(a, b).item() == pytest.approx(want, abs=1e-5)
    sure = 50 * F.one_hot(torch.randint(0, 3, (2, 8, 8)), 3).movedim(-1, 1).float()
    assert cct_r.cross_teaching_loss(sure, sure).item() == pytest.approx(0, abs=1e-4)


def test_the_projectors_are_the_bases():
    """Two layers, the last shared by both networks; the Swin-UNet's features LayerNormed first."""
    torch.manual_seed(0)
    project = cct_r.Projector(3, 6, 4)
    u = torch.randn(2, 3, 5, 5)
    s = torch.randn(2, 6, 5, 5)

    def layer(conv, x):
        return torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], x) + conv.bias[:, None, None]

    unet, swin = project(u, s)
    assert project.unet.out_channels == project.last.in_channels == 8
    assert torch.allclose(unet, layer(project.last, layer(project.unet, u).clamp(min=0)), atol=1e-5)
    normal = (s - s.mean(1, keepdim=True)) / (s.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    want = layer(project.last, layer(project.swin, normal).clamp(min=0))
    assert torch.allclose(swin, want, atol=1e-5)


def test_ramp_and_decay():
    ramp = [cct_r.ramp_up(t, 100) for t in (0, 50, 100, 200)]
    assert ramp == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    decay = [cct_r.decay(t, 100) for t in (0, 50, 100)]
    assert decay == pytest.approx([1, math.exp(-1.25), math.exp(-5)])


# ---------------------------------------------------------------------- registration of a dataset


@pytest.fixture(scope="module")
def setting(finished, phantom, tmp_path_factory):
    """The `Run` of the tiny phantom, with a copy of what `finished` has registered."""
    work = tmp_path_factory.mktemp("cct_r")
    _, tiny, _ = finished("cct_r")
    shutil.copytree(tiny / "cache", work / "cache")
    _, run_ = started("cct_r", "--data", phantom, "--cache", work / "cache", "--out", work / "o")
    return run_


@pytest.fixture(scope="module")
def registered(setting):
    """Registration with two labelled patients, four labelled volumes."""
    return cct_r.Registered(setting, 2)


def changed(run_, out=None, **options):
    """The same run with other options, and another folder for its log."""
    other = copy.copy(run_)
    other.o = argparse.Namespace(**{**vars(run_.o), **options})
    other.out = out or run_.out
    return other


def test_cycle_error_is_of_the_organs(setting, registered):
    (u, n), pair = next(item for item in registered.pairs.items() if item[0][0] != item[0][1])
    frame = registered.frames[n]
    shape = frame.box.p.shape[:3]
    there, back = (cct_r.resize(pair[k][None], shape) for k in ("there", "back"))
    error = cycle_error(there, back, frame.box.p - frame.centre, frame.box.step)[0]
    want = (error * frame.organs).sum() / frame.organs.sum()
    assert pair["cycle"].item() == pytest.approx(want.item(), rel=1e-4)
    assert abs(error.mean() / want - 1) > .01                      # the whole box has another


def test_registration_helps(setting, registered):
    pairs = registered.pairs
    assert set(pairs) == {(u, n) for u in registered.volumes for n in registered.labelled}
    assert len(registered.labelled) == 4
    judged = [cct_r.peek_registration(setting, registered, u, n) for u, n in pairs if u != n]
    mean = {k: np.mean([row[k] for row in judged]) for k in judged[0]}
    assert mean["dice_before"] + .2 < mean["dice_affine"] < mean["dice_after"]
    for (u, n), pair in pairs.items():
        assert pair["folded"] < .005
        assert pair["before"] < pair["after"] or u == n


def test_registration_is_cached(setting, registered, monkeypatch):
    """A second run does not register, a run with other options does."""
    monkeypatch.setattr(cct_r, "register_batch", None)
    again, _, seconds = cct_r.register_all(setting, registered.volumes, registered.labelled)
    assert seconds == registered.seconds > 1                       # what it took when it was made
    assert set(again) == set(registered.pairs)
    for key, pair in registered.pairs.items():
        assert all(torch.equal(again[key][name], pair[name]) for name in pair)
    other = changed(setting, stiffness=.5)
    with pytest.raises(TypeError):
        cct_r.register_all(other, registered.volumes, registered.labelled)


def test_a_killed_registration_goes_on(setting, registered, monkeypatch):
    """What is missing in the cache, and no more, is made again, to the same numbers."""
    label = registered.labelled[1]
    files = list((setting.out.parent / "cache").glob(f"registration-*/{label}-*.pt"))
    assert len(files) == 1
    files[0].unlink()
    made = []
    register_batch = cct_r.register_batch

    def counted(*arguments):
        made.append(arguments)
        return register_batch(*arguments)

    monkeypatch.setattr(cct_r, "register_batch", counted)
    again, _, _ = cct_r.register_all(setting, registered.volumes, registered.labelled)
    assert len(made) == 1
    for u in registered.volumes:
        pair = registered.pairs[u, label]
        assert all(torch.equal(again[u, label][name], pair[name]) for name in pair)


def test_a_volume_is_its_own_best_match_and_its_label_comes_back(setting, registered):
    n = registered.labelled[0]
    pair, frame = registered.pairs[n, n], registered.frames[n]
    volume = Stack(setting.dataset, n)
    truth = setting.dataset.label(volume.numbers).numpy()
    back = frame.warp_label(pair, volume).numpy()
    assert cct_r.mean_dice(setting, back, truth) > .9
    others = [registered.pairs[u, n]["cycle"] for u in registered.volumes if u != n]
    assert pair["cycle"] < min(others)
    # the identity: exactly the label
    still = {"A": torch.eye(3, 4), "back": torch.zeros_like(pair["back"])}
    assert np.array_equal(frame.warp_label(still, volume).numpy(), truth)
    assert set(np.unique(back)) <= set(range(4))                   # label values are kept


def test_partners(setting, registered):
    labelled = registered.labelled
    u = next(v for v in registered.volumes if v not in labelled)
    errors = [float(registered.pairs[u, n]["cycle"]) for n in registered.partners(u)]
    assert errors == sorted(errors)
    assert set(registered.partners(u)) == set(labelled)
    assert labelled[0] not in registered.partners(labelled[0])
    without = cct_r.Registered(changed(setting, no_brs=True), 2)
    assert {without.partners(v)[0] for v in registered.volumes} == set(labelled)
    assert without.partners(u) == without.partners(u)              # the same in every run
    assert not torch.equal(without.warped, registered.warped)


def test_random_partners_do_not_know_the_heart_phase(registered, monkeypatch):
    """--no-brs: volumes alternate between ED and ES, and the partner's phase must not follow."""
    monkeypatch.setattr(registered, "o", SimpleNamespace(no_brs=True))
    monkeypatch.setattr(registered, "labelled", [0, 1])
    same = [registered.partners(v)[0] % 2 == v % 2 for v in range(2, 102)]
    assert 30 < sum(same) < 70


def test_the_grid_of_registration_knows_training_volumes_alone(setting):
    """A deep or thick test volume does not change it."""
    want = cct_r.registration_grid(setting)
    cases = setting.dataset.info["cases"]
    deep = []
    for case in cases:
        scored = case["patient"] not in setting.split["train"]
        deep.append({**case, "spacing": [100., 1., 1.]} if scored else case)
    assert deep != cases
    dataset = SimpleNamespace(info={**setting.dataset.info, "cases": deep})
    assert cct_r.registration_grid(SimpleNamespace(dataset=dataset, split=setting.split)) == want


def test_beyond_an_atlas_there_is_background(setting, registered):
    """Warped one-hot labels sum to 1, also where the atlas has no voxel: there it says background.

    Else two atlases that end there would be outvoted by a third that does not.
    """
    u = next(v for v in registered.volumes if v not in registered.labelled)
    volume = Stack(setting.dataset, u)
    for n in registered.labelled:
        pair = registered.pairs[u, n]
        warped = registered.frames[n].warp_one_hot(pair, volume)   # [K, V, S, S]
        assert torch.allclose(warped.sum(0), torch.ones(()), atol=1e-5)
        outside = registered.frames[n].places(pair, volume.points()).isnan().any(-1)
        assert outside.any() and (warped[0][outside] == 1).all()


def test_labels_of_several_atlases(setting, registered):
    """The mean of the one-hot labels of the n smallest cycle errors, then arg max."""
    several = cct_r.Registered(changed(setting, atlases=3), 2)
    u = next(v for v in registered.volumes if v not in registered.labelled)
    volume = Stack(setting.dataset, u)
    three = registered.partners(u)[:3]
    votes = [registered.frames[n].warp_one_hot(registered.pairs[u, n], volume) for n in three]
    want = torch.stack(votes).double().mean(0).argmax(0)
    agree = several.warped[volume.numbers] == want                 # but for ties
    assert agree.float().mean() > .999
    assert not torch.equal(several.warped, registered.warped)
    best = registered.frames[three[0]].warp_label(registered.pairs[u, three[0]], volume)
    assert torch.equal(registered.warped[volume.numbers], best.byte())
    every = cct_r.Registered(changed(setting, atlases=99), 2)      # no more than there are: all
    assert every.warped.max() == 3
    assert torch.equal(several.places.nan_to_num(0), registered.places.nan_to_num(0))


def test_places(setting, registered):
    dataset = setting.dataset
    first = Stack(dataset, registered.labelled[0])
    own = registered.places[first.numbers].movedim(1, -1).float()
    assert torch.allclose(own, first.points(), atol=.1)            # the common frame itself
    assert registered.warped[first.numbers].max() == 0             # unlabelled volumes only
    u = next(v for v in registered.volumes if v not in registered.labelled)
    numbers = Stack(dataset, u).numbers
    assert registered.warped[numbers].max() == 3
    outside = np.flatnonzero(~np.isin(dataset.volume, registered.volumes))
    assert len(outside) > 0                                        # validation and test: nothing
    assert registered.warped[outside].max() == 0
    assert registered.places[outside].isnan().all()
    # a place of the unlabelled volume is where its partner's frame leads, from there to the first
    partner = registered.partners(u)[0]
    x = registered.frames[partner].places(registered.pairs[u, partner], Stack(dataset, u).points())
    if partner != registered.labelled[0]:
        pair = registered.pairs[partner, registered.labelled[0]]
        x = registered.frames[registered.labelled[0]].places(pair, x.nan_to_num(1e6))
    found = registered.places[numbers].movedim(1, -1).float()
    assert torch.allclose(found, x, atol=.1, equal_nan=True)
    assert found.isfinite().any()


def test_correspondences_are_the_nearest_places(setting, registered, monkeypatch):
    """Fig. 2: a dot on the pixel nearest to the anchor's place; above, all of its class."""
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: figures.append(figure))
    torch.manual_seed(0)
    net = setting.unet().eval()
    dataset = setting.dataset
    number, row, column, k = cct_r.choose_anchor(setting, registered)
    assert dataset.volume[number] == registered.labelled[0]
    assert dataset.label(np.array([number]))[0, row, column] == k
    unlabelled = [u for u in registered.volumes if u not in registered.labelled]
    some = copy.copy(registered)
    some.places = registered.places.clone()
    gone = Stack(dataset, unlabelled[0]).numbers
    some.places[gone] = torch.nan                                  # has no place: no dot
    cct_r.draw_correspondences(setting, some, net)
    spot = some.places[number, :, row, column].float()
    above, below = np.reshape(figures[0].axes, (2, -1))
    assert below[0].lines[0].get_xdata()[0] == column
    assert below[0].lines[0].get_ydata()[0] == row
    assert not below[1].lines
    for u, up, down in zip(unlabelled[1:], above[2:], below[2:]):
        best = (math.inf,)
        for n in Stack(dataset, u).numbers:
            for y, x in np.ndindex(32, 32):
                far = float((some.places[n, :, y, x].float() - spot).norm())
                if far < best[0]:
                    best = (far, y, x, n)
        far, y, x, n = best
        dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in down.lines]
        assert dots == ([(x, y)] if far <= setting.o.radius else [])
        label = net(dataset.image(np.array([n]))).argmax(1)[0] == k
        shaded = ~np.ma.getmaskarray(up.images[1].get_array())
        assert np.array_equal(shaded, label.numpy())


# --------------------------------------------------------------------------------------- training


def test_views(setting, registered):
    """Labelled slices have other intensities for each network, unlabelled ones their own."""
    dataset, o = setting.dataset, setting.o
    numbers = dataset.of_patients(setting.split["labelled"][1:])
    warped, places = registered.warped, registered.places
    torch.manual_seed(0)
    batch = cct_r.draw_batch(setting, numbers, 2, places)
    torch.manual_seed(0)
    rest = cct_r.draw_batch(setting, numbers, 2, places, warped)
    assert not torch.equal(*batch.views)
    assert torch.equal(*rest.views)
    assert torch.equal(batch.place.nan_to_num(0), rest.place.nan_to_num(0))
    torch.manual_seed(0)
    pick = numbers[torch.randint(len(numbers), (2,)).numpy()]
    grid = common.spatial_grid(len(pick), o.size, o.rotation, setting.device)
    assert torch.equal(rest.views[0], common.warp(dataset.image(pick), grid))
    assert np.array_equal(rest.volume, dataset.volume[pick])
    assert torch.equal(batch.label, common.warp(dataset.label(pick), grid, "nearest"))
    assert torch.equal(rest.label, common.warp(warped[pick].long(), grid, "nearest"))
    moved = common.warp(places[pick].float(), grid, "nearest").movedim(1, -1)    # with the pixels
    inside = (grid.abs() <= 1).all(-1)
    assert torch.equal(batch.place[inside].nan_to_num(0), moved[inside].nan_to_num(0))
    assert batch.place[~inside].isnan().all()
    assert (~inside).any()
    plain = cct_r.draw_batch(changed(setting, base_views=True), numbers, 2, places)
    assert torch.equal(*plain.views)                               # the base keeps intensities


def test_the_views_of_the_base():
    """Quarter turns and flips move pixels onto pixels; the rest turns by 20 degrees at most."""
    torch.manual_seed(0)
    grid = cct_r.base_grid(400, 6, torch.device("cpu"))
    x = torch.arange(36.).view(1, 1, 6, 6)
    views = common.warp(x.expand(400, 1, 6, 6), grid)[:, 0]
    whole = [torch.rot90(x[0, 0].flip(f) if f else x[0, 0], k) for f in ([], [1]) for k in range(4)]
    shares = [sum(torch.allclose(v, w, atol=1e-3) for v in views) / 400 for w in whole]
    assert shares[0] == pytest.approx(.25, abs=.07)                # as it is
    assert sum(shares[1:4]) == 0                                   # never turned and not flipped
    assert all(share == pytest.approx(.125, abs=.06) for share in shares[4:])
    a, c = grid[:, 0, 0], grid[:, 0, -1]                           # two corners
    angle = torch.atan2(c[:, 1] - a[:, 1], c[:, 0] - a[:, 0]).rad2deg()
    turned = angle[(angle.abs() > .1) & ((angle / 90 - (angle / 90).round()).abs() > 1e-3)]
    assert len(turned) / 400 == pytest.approx(.25, abs=.07)
    assert 15 < turned.abs().max() <= 20


def test_maps_of_both_networks(setting):
    students = cct_r.Students(setting)
    maps = students([torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)])
    for net in (0, 1):
        assert maps.logits[net].shape == (2, 4, 32, 32)
        assert maps.coarse[net].shape == (2, setting.o.projection, 4, 4)
        assert maps.fine[net].shape == (2, setting.o.projection, 16, 16)


def test_the_unets_maps_are_those_of_its_blocks_each_run_once(setting):
    torch.manual_seed(0)
    unet = setting.unet()
    x = torch.rand(2, 1, 32, 32)
    coarse, fine = cct_r.unet_maps(unet, x)
    norm = unet.decoder.blocks[0][1]
    assert norm.num_batches_tracked == 1
    encoded = unet.encoder(x)
    assert torch.equal(coarse, unet.decoder(encoded, 1))
    assert torch.equal(fine, unet.decoder(encoded))


def trained(run_, registered):
    """The weights of the U-Net's head after a tiny training."""
    students = cct_r.train(run_, common.Row("x", 1, 0), registered)
    return students.unet.head.weight.detach()


def test_every_part_trains(setting, registered, tmp_path):
    """Each flag changes the trained network; the same seed does not."""
    loud = {"no_peek": True, "reps_weight": 1., "contrast_weight": 1.}
    full = trained(changed(setting, tmp_path, **loud), registered)
    assert torch.equal(full, trained(changed(setting, tmp_path, **loud), registered))
    for flag in ("no_cross_teaching", "no_rsl", "no_contrast", "no_reps"):
        without = trained(changed(setting, tmp_path, **loud, **{flag: True}), registered)
        assert not torch.equal(full, without), flag


def test_every_loss_sees_its_slices(setting, tmp_path, monkeypatch):
    """True labels and warped ones, cross teaching, and in the contrast the other's classes."""
    calls = {}

    def note(name):
        function = getattr(cct_r, name)

        def noted(*arguments):
            made = function(*arguments)
            calls.setdefault(name, []).append((arguments, made))
            return made

        monkeypatch.setattr(cct_r, name, noted)

    for name in ("draw_batch", "segmentation_loss", "cross_teaching_loss", "contrast_terms"):
        note(name)
    registered = cct_r.Registered(setting, 1)
    trained(changed(setting, tmp_path, no_peek=True, steps=2), registered)
    (asked, labelled), (asked_u, unlabelled) = calls["draw_batch"][:2]
    own = set(registered.labelled)
    assert set(setting.dataset.volume[asked[1]]) == own
    assert not own & set(setting.dataset.volume[asked_u[1]])
    logits, labels = zip(*[arguments for arguments, _ in calls["segmentation_loss"][:4]])
    wanted = [labelled.label, labelled.label, unlabelled.label, unlabelled.label]
    assert [a is b for a, b in zip(labels, wanted)] == [True] * 4
    taught = calls["cross_teaching_loss"][0][0]
    assert taught[0] is logits[2]                                  # on the unlabelled slices
    assert taught[1] is logits[3]
    unet, swin = calls["cross_teaching_loss"][1][0]                # of the second step
    _, pixels = calls["contrast_terms"][1][0]
    B = setting.o.labelled_batch
    assert torch.equal(pixels.classes[0][B:], swin.argmax(1))
    assert torch.equal(pixels.classes[1][B:], unet.argmax(1))


def test_the_bases_views_move_image_and_label_alike(setting, monkeypatch):
    monkeypatch.setattr(common.SliceDataset, "image", label_as_image)
    own = setting.dataset.of_patients(setting.split["labelled"][:2])
    image, label = cct_r.baseline_batch(changed(setting, base_views=True, batch=40), own)
    organ = label > 0
    same = (image[:, 0] - label).abs() < .6                        # interpolated at borders
    assert same[organ].float().mean() > .85
    assert len({tuple(one.flatten().tolist()) for one in label}) > 20


def test_loss_is_the_sum_with_its_weights(setting, registered, tmp_path, monkeypatch):
    """L = L_sup + w(t) L_CT + omega(t) L_RSL + lambda_c L_contrast + lambda_r L_REPS."""
    weights = {"cross_weight": 2., "rsl_weight": 3., "contrast_weight": 5., "reps_weight": 7.}
    run_ = changed(setting, tmp_path, no_peek=True, **weights)
    losses = []
    backward = torch.Tensor.backward

    def noted(self):
        losses.append(self.item())
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    monkeypatch.setattr(cct_r, "reps_terms", lambda *arguments: torch.tensor(11.))
    trained(run_, registered)
    first = common.read_log(tmp_path)[0]
    assert first["weight_cross"] == pytest.approx(2 * math.exp(-5))
    assert first["weight_RSL"] == pytest.approx(3)
    assert min(first[k] for k in ("sup", "cross", "RSL", "contrast", "REPS")) > 0
    want = (first["sup"] + 2 * math.exp(-5) * first["cross"] + 3 * first["RSL"]
            + 5 * first["contrast"] + 7 * 11)
    assert losses[0] == pytest.approx(want, rel=1e-5)


def test_rates(setting, registered, tmp_path, monkeypatch):
    """The U-Net starts at --lr, or at --pretrained-lr from --init; the rest warms up."""
    seen = noted_rates(monkeypatch)
    run_ = changed(setting, tmp_path, no_peek=True, lr=1., swin_lr=2., pretrained_lr=3., steps=40)
    trained(run_, registered)
    cosine = [.5 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    warm = [min(1, (t + 1) / (.05 * 40 + 1)) for t in range(40)]
    assert [rates[0] for rates in seen] == pytest.approx(cosine)
    assert [rates[1] for rates in seen] == pytest.approx([2 * a * b for a, b in zip(cosine, warm)])
    seen.clear()
    run_.start = {"unet": setting.unet().state_dict(), "parts": ["encoder"]}
    trained(run_, registered)
    assert seen[0][0] == pytest.approx(3)


def test_the_unet_starts_from_init_and_the_baseline_does_not(setting, registered, tmp_path):
    run_ = changed(setting, tmp_path, no_peek=True, lr=0., swin_lr=0., pretrained_lr=0.)
    fresh = cct_r.finetune(run_, common.Row("scratch", 1, 0))
    torch.manual_seed(5)
    start = {"unet": setting.unet().state_dict(), "parts": ["encoder"]}
    run_.start = start
    students = cct_r.train(run_, common.Row("x", 1, 0), registered)
    for name, value in students.unet.named_parameters():
        if name.startswith("encoder"):
            assert torch.equal(value, start["unet"][name])
        elif value.ndim > 1:
            assert not torch.equal(value, start["unet"][name])
    again = cct_r.finetune(run_, common.Row("scratch", 1, 0))
    for a, b in zip(fresh.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_labels_of_unlabelled_volumes_are_not_read(setting, monkeypatch, tmp_path):
    """With --no-peek a whole training touches the labels of labelled patients alone."""
    asked = []
    label = common.SliceDataset.label

    def noted(self, numbers, *device):
        asked.extend(np.atleast_1d(numbers))
        return label(self, numbers, *device)

    monkeypatch.setattr(common.SliceDataset, "label", noted)
    quiet = changed(setting, tmp_path, no_peek=True)
    own = setting.dataset.of_patients(setting.split["labelled"][:1])
    registered = cct_r.Registered(quiet, 1)
    trained(quiet, registered)
    cct_r.write_registrations(quiet, registered)
    assert len(asked) > 0
    assert set(asked) <= set(own)
    asked.clear()
    trained(changed(setting, tmp_path, no_peek=False), registered)
    assert not set(asked) <= set(own)                              # so the count can fail


def test_only_training_volumes_get_into_the_banks_and_pseudo_labels(setting, registered, tmp_path,
                                                                   monkeypatch):
    """No validation or test patient: not in a bank, a warped label, a pair or a frame."""
    found = set()
    push = MemoryBank.push

    def noted(self, z, place, volume):
        found.update(volume.tolist())
        push(self, z, place, volume)

    monkeypatch.setattr(MemoryBank, "push", noted)
    trained(changed(setting, tmp_path, no_peek=True), registered)
    patient = [case.patient for case in setting.cases]
    training = {v for v, p in enumerate(patient) if p in setting.split["train"]}
    assert len(training) < len(patient)
    assert len(found) > len(registered.labelled)
    assert found <= training
    assert set(registered.frames) <= training
    assert {v for pair in registered.pairs for v in pair} <= training


def test_peek_by_hand(setting, registered):
    """Perfect and empty pseudo-labels, on unlabelled slices; the networks stay in training mode."""
    dataset = setting.dataset
    numbers = dataset.of_patients(setting.split["labelled"][1:])
    students = cct_r.Students(setting)
    truth = torch.zeros_like(registered.warped)
    truth[numbers] = dataset.label(numbers).byte()
    assert cct_r.peek(setting, students, numbers, truth)["peek_registration"] == 1
    found = cct_r.peek(setting, students, numbers, 0 * truth)
    assert found["peek_registration"] == 0
    assert set(found) == {"peek_unet", "peek_swin", "peek_registration"}
    assert students.training


def test_the_bases_configuration():
    o = common.parse_options("cct_r", "", cct_r.OPTIONS, ["--data", "x", "--paper"])
    assert (o.size, o.spacing, o.window, o.swin_dim) == (224, 1.5, 7, 96)
    assert (o.labelled_batch, o.unlabelled_batch, o.steps, o.weight_decay) == (2, 2, 40000, 5e-4)


# ------------------------------------------------------------------------------------- the script


def test_what_cct_r_writes(finished):
    out, _, printed = finished("cct_r")
    figures = {f.name for f in (out / "figures").iterdir()}
    assert figures == {"dice.png", "overlays.png", "registration.png", "correspondences.png",
                       "pseudo_labels.png"}
    table = list(csv.DictReader((out / "registration.csv").open()))
    assert len(table) == 8 * 4 - 4                                 # 4 of 8 volumes labelled
    assert set(table[0]) == {
        "volume", "labelled", "similarity_before", "similarity_affine", "similarity_after",
        "folded_percent", "cycle_error_mm", "dice_before", "dice_affine", "dice_after"}
    assert "registration of 28 pairs" in printed
    assert "rank correlation of cycle error" in printed
    assert "| 1 | cct_r, Swin |" in printed
    log = common.read_log(out)
    first = next(row for row in log if row["phase"] == "cct_r_n1_s0")
    assert {"sup", "cross", "RSL", "contrast", "REPS", "weight_cross", "weight_RSL"} <= set(first)
    seen = {row["phase"]: row["labelled_seen"] for row in log if "labelled_seen" in row}
    assert seen["cct_r_n1_s0"] == 12 * 2                           # steps, labelled slices a step
    assert seen["scratch_n1_s0"] == 12 * 8
    assert "labelled slices seen: scratch 96, each network of CCT-R 24" in printed
    steps = [row["step"] for row in log if row["phase"] == "cct_r_n1_s0" and "peek_unet" in row]
    o = json.loads((out / "options.json").read_text())
    assert steps == [*range(0, o["steps"], o["peek_every"]), o["steps"] - 1]       # and the last
    metrics = json.loads((out / "metrics.json").read_text())
    assert "registration" in metrics["seconds"]


def test_the_checkpoint_holds_both_networks(finished):
    out, _, _ = finished("cct_r")
    content = common.load_checkpoint(out / "cct_r_n1_s0.pt", "cct_r")
    net = SwinUNet(1, 4, 12, 2)
    net.load_state_dict(content["Swin"])
    assert set(content["rows"]) == {"", "Swin"}
    assert common.build_unet(content)(torch.rand(1, 1, 32, 32)).shape == (1, 4, 32, 32)
    assert "Swin" not in common.load_checkpoint(out / "scratch_n1_s0.pt", "cct_r")


def test_flags_and_init(finished, phantom):
    """Rows are named by what is off; --no-peek leaves out Fig. 4 and every label Dice."""
    out, work, _ = finished("cct_r")
    content = common.load_checkpoint(out / "scratch_n1_s0.pt")
    common.save_checkpoint(work / "start.pt", method="sal", options={}, unet=content["unet"],
                           parts=["encoder"])
    flags = ["--no-brs", "--no-peek", "--no-reps", "--precision", "bfloat16"]
    done = run("cct_r", "--data", phantom, *options("cct_r"), *flags, "--init", work / "start.pt",
               "--out", "flags", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "| 1 | cct_r-no_reps-no_brs |" in done.stdout
    assert "sal gives" in done.stdout
    assert not (work / "flags/figures/pseudo_labels.png").exists()
    assert "dice_after" not in (work / "flags/registration.csv").read_text()
    assert "rank correlation" not in done.stdout


def test_scratch_is_read_from_another_run(finished, phantom):
    out, work, _ = finished("cct_r")
    done = run("cct_r", "--data", phantom, *options("cct_r"), "--no-rsl", "--scratch", "cct_r",
               "--out", "other", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "other/scratch_n1_s0.pt").exists()

    def dice(folder):
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        key = ("scratch", 1, 0)
        return [r["dice"] for r in rows if (r["method"], r["labelled"], r["seed"]) == key]

    assert len(dice(out)) == 1
    assert dice(work / "other") == dice(out)


def test_all_parts_off_is_the_supervised_baseline_to_the_digit(finished, phantom):
    _, work, _ = finished("cct_r")
    off = ["--no-cross-teaching", "--no-contrast", "--no-rsl", "--no-reps"]
    done = run("cct_r", "--data", phantom, *options("cct_r"), *off, "--out", "off", cwd=work)
    assert done.returncode == 0, done.stderr
    rows = {}
    for r in csv.DictReader((work / "off/per_volume.csv").open()):
        rows.setdefault(r.pop("method"), []).append(r)
    name = "cct_r-no_cross_teaching-no_contrast-no_rsl-no_reps"
    assert set(rows) == {"scratch", name}
    assert rows[name] == rows["scratch"]
    a, b = (common.load_checkpoint(work / f"off/{row}_n1_s0.pt") for row in ("scratch", name))
    assert all(torch.equal(a["unet"][k], b["unet"][k]) for k in a["unet"])


def test_bad_options_of_cct_r(finished, phantom, tmp_path):
    _, work, _ = finished("cct_r")

    def wrong(*extra):
        with pytest.raises(common.DataError) as error:
            started("cct_r", "--data", phantom, "--out", tmp_path / "o", *extra)
        return str(error.value)

    assert "--labelled-batch" in wrong("--labelled-batch", 0)
    assert "--unlabelled-batch" in wrong("--unlabelled-batch", 0)
    assert "base_views" in wrong("--base-views", "--scratch", work / "cct_r")
    assert "multiple of 6" in wrong("--swin-dim", 20)
    assert "--window 1" in wrong("--window", 1)
    assert "--atlases 0" in wrong("--atlases", 0)
    assert "--temperature" in wrong("--temperature", 0)
    assert "--block 99" in wrong("--block", 99)
    assert "use 4 to 9" in wrong("--block", 10)                    # 9 // 2 of 4 coarse cells fit
    assert "--bank" in wrong("--bank", 0)
    assert "--stiffness" in wrong("--stiffness", -1)
    assert "--radius" in wrong("--radius", 0)
    assert "--peek-every" in wrong("--peek-every", 0)
    assert "--anchors 1" in wrong("--anchors", 1)
    assert "no training patient without label" in wrong("--labelled", 4)
    done = run("cct_r", "--data", phantom, *options("cct_r"), "--labelled-batch", 0, "--out",
               tmp_path / "o", cwd=work)
    refused(done, "--labelled-batch")
    assert not (tmp_path / "o").exists()                           # nothing was begun
