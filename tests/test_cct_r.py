"""CCT-R: registration against analytic transforms, the Swin-UNet, every loss against float64 loops, the bank, the script itself."""
import csv, json, math, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, ROOT, SHARED, TINY_CCT_R as TINY, refused, run

import cct_r
import common
import data
from cct_r import MemoryBank, SwinUNet, balanced_contrastive_loss, cycle_error, register_affine, register_deformable, sample

CPU, STEP = torch.device("cpu"), (6., 4., 4.)


def scene(p, seed=3):
    """A smooth scene of 40 blobs at the places p [..., 3] in mm."""
    g, value = torch.Generator().manual_seed(seed), 0.
    for _ in range(40):
        middle, width = (torch.rand(3, generator=g) - .5) * torch.tensor([100., 130., 130.]), 8 + 8 * torch.rand(1, generator=g)
        value = value + torch.rand(1, generator=g) * torch.exp(-(p - middle).square().sum(-1) / (2 * width ** 2))
    return value


# ------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize("step", [(6., 4., 4.), (10., 2.5, 4.)])
def test_points_and_sample(step):
    """Places are mm about the centre; sampling a volume at its own voxels gives it back, on any spacing; outside is 0."""
    p = cct_r.points((4, 5, 7), step)
    assert p.shape == (4, 5, 7, 3) and p.mean((0, 1, 2)).abs().max() < 1e-5
    assert torch.allclose(p[1, 1, 1] - p[0, 0, 0], torch.tensor(step)) and torch.allclose(p[2, 2, 3], torch.tensor([.5, 0, 0]) * torch.tensor(step))
    x = torch.rand(2, 3, 4, 5, 7)
    assert torch.allclose(sample(x, p.expand(2, 4, 5, 7, 3), step), x, atol=1e-5)
    assert sample(x, p.expand(2, 4, 5, 7, 3) + 1000, step).abs().max() == 0
    ramp = (p * torch.tensor([1., 2., 3.])).sum(-1)[None, None]                                          # linear in mm
    q = torch.tensor([[1., -2., 3.]])
    assert sample(ramp, q[None], step).item() == pytest.approx(1 - 4 + 9, abs=1e-4)


@pytest.mark.parametrize("step", [(6., 4., 4.), (8., 3., 5.)])
def test_a_known_affine_is_recovered(step):
    A = torch.eye(3, 4)[None] + torch.tensor([[[.05, 0, 0, 5.], [0, .08, -.1, -9.], [0, .1, -.05, 7.]]])
    p, big = cct_r.points((16, 32, 32), step), cct_r.points((26, 52, 52), step)
    fixed = scene(p)[None, None]
    moving = scene((big - A[0, :, 3]) @ torch.linalg.inv(A[0, :, :3]).T)[None, None]                     # moving(A x + b) = fixed(x)
    got, similarity = register_affine(fixed, torch.ones_like(fixed), p, torch.cat([moving, torch.ones_like(moving)], 1), step)
    error = (cct_r.move(got, p) - cct_r.move(A, p))[0] / torch.tensor(step)
    assert similarity > .9 and error.abs().mean() < .5 and error.abs().max() < 1                         # voxels


def test_affine_maps_one_after_another_and_back():
    torch.manual_seed(0)
    A, B, p = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4, 5, 6, 3)
    assert torch.allclose(cct_r.move(cct_r.after_another(A, B), p), cct_r.move(A, cct_r.move(B, p)), atol=1e-4)
    assert torch.allclose(cct_r.move(cct_r.inverse(A), cct_r.move(A, p)), p, atol=1e-3)


def test_a_known_smooth_field_is_recovered():
    p = cct_r.points((16, 32, 32), STEP)
    d = 8 * torch.stack([0 * p[..., 0], torch.sin(p[..., 2] / 30), torch.cos(p[..., 1] / 30)])[None]     # [1, 3, Z, Y, X] mm
    moving, fixed = scene(p)[None, None], scene(p + d[0].movedim(0, -1))[None, None]                     # moving(x + d) = fixed(x)
    u = register_deformable(fixed, moving, torch.ones_like(fixed), STEP)
    error = (F.interpolate(u, p.shape[:3], mode="trilinear") - d).norm(dim=1)
    assert error.mean() < .45 * d.norm(dim=1).mean() and error.mean() < 4                                # below a voxel
    before, after = (cct_r.local_correlation(fixed, x, torch.ones_like(fixed)) for x in (
        moving, sample(moving, p + F.interpolate(u, p.shape[:3], mode="trilinear").movedim(1, -1), STEP)))
    assert after > .9 > before and cct_r.folded(u, p.shape[:3], STEP) == 0


def test_identical_volumes_stay_where_they_are():
    p = cct_r.points((12, 24, 24), STEP)
    x = scene(p)[None, None]
    A, s = register_affine(x, torch.ones_like(x), p, torch.cat([x, torch.ones_like(x)], 1), STEP)
    assert (cct_r.move(A, p) - p).norm(dim=-1).max() < 1 and s > .99                                     # mm
    u = register_deformable(x, x, torch.ones_like(x), STEP)
    assert u.norm(dim=1).mean() < 1 and u.abs().max() < 4


def test_local_correlation_by_hand():
    torch.manual_seed(0)
    a, w = torch.rand(1, 1, 6, 8, 8), torch.ones(1, 1, 6, 8, 8)
    assert cct_r.local_correlation(a, 2 * a + 3, w).item() == pytest.approx(1, abs=1e-3)                 # blind to contrast and brightness
    assert cct_r.local_correlation(a, -a, w).item() == pytest.approx(-1, abs=1e-3)
    assert abs(cct_r.local_correlation(a, torch.rand(1, 1, 6, 8, 8), w).item()) < .1
    x = torch.rand(1, 2, 5, 6, 7)
    want = F.avg_pool3d(x, (3, 5, 5), 1, (1, 2, 2), count_include_pad=False)                             # boxes as torch has them
    assert torch.allclose(cct_r.box_mean(x, (1, 2, 2)), want, atol=1e-6)


def test_cycle_error():
    p = cct_r.points((8, 16, 16), STEP)
    shift = torch.zeros(1, 3, 8, 16, 16)
    shift[:, 1] = 5.
    assert cycle_error(shift, -shift, p, STEP).max() < 1e-4                                              # exact inverses
    assert cycle_error(shift, 0 * shift, p, STEP).mean().item() == pytest.approx(5, abs=1e-3)
    assert cycle_error(shift, shift, p, STEP).mean().item() == pytest.approx(10, abs=1e-3)
    v = 4 * torch.randn(1, 3, 4, 5, 5)
    places = cct_r.control_points((8, 16, 16), STEP, 5)
    v = v[:, :, :places.shape[0], :places.shape[1], :places.shape[2]]
    there, back = (F.interpolate(cct_r.exponential(s * v, places), p.shape[:3], mode="trilinear") for s in (1, -1))
    inner = cycle_error(there, back, p, STEP)[:, 2:-2, 3:-3, 3:-3]
    assert inner.mean() < .25 * there.norm(dim=1).mean()                                                 # the flow backwards undoes the flow


def test_folding_is_counted():
    p = cct_r.points((6, 12, 12), STEP)
    flat = torch.zeros(1, 3, 6, 12, 12)
    assert cct_r.folded(flat, p.shape[:3], STEP) == 0
    fold = flat.clone()
    fold[:, 2, :, :, 6:] = -12.                                                                          # these columns jump three voxels to the left
    J = cct_r.jacobian(fold, p.shape[:3], STEP)[0]
    assert (J[:, :, 5] == -2).all() and (J[:, :, 4] == 1).all() and (J[:, :, 6] == 1).all()              # 1 + (-12 mm) / (4 mm)
    assert cct_r.folded(fold, p.shape[:3], STEP).item() == pytest.approx(1 / 11)
    stretch = flat.clone()
    stretch[0] = .5 * p.movedim(-1, 0)
    assert torch.allclose(cct_r.jacobian(stretch, p.shape[:3], STEP), torch.tensor(1.5 ** 3), atol=1e-4)


# ------------------------------------------------------------------------------------------------ the Swin-UNet


def test_windows_and_their_inverse():
    x = torch.rand(2, 12, 18, 5)
    w = cct_r.to_windows(x, 6)
    assert w.shape == (2 * 6, 36, 5) and torch.equal(w[1], x[0, :6, 6:12].reshape(36, 5)) and torch.equal(cct_r.from_windows(w, 6, 12, 18), x)


@pytest.mark.parametrize("H, W, real_h, real_w, shift", [(12, 12, 12, 12, 3), (12, 18, 10, 13, 3), (6, 6, 5, 6, 0)])
def test_attention_mask(H, W, real_h, real_w, shift):
    """Two tokens of a window see each other if, before the roll, they were as near as in the window, and both real or both padding."""
    mask = cct_r.attention_mask(H, W, 6, shift, real_h, real_w)
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1)
    before = cct_r.to_windows(place.roll((-shift, -shift), (0, 1))[None], 6)                             # [windows, 36, 2]
    for window, tokens in zip(mask, before.tolist()):
        for i, (a, b) in enumerate(tokens):
            for j, (c, d) in enumerate(tokens):
                near = abs(a - c) < 6 and abs(b - d) < 6
                alike = (a < real_h) == (c < real_h) and (b < real_w) == (d < real_w)
                assert (window[i, j] == 0) == (near and alike)


@pytest.mark.parametrize("size", [(96, 96), (50, 70), (33, 20)])
def test_any_size(size):
    net = SwinUNet(2, 5, 12, 4)
    assert net(torch.rand(1, 2, *size)).shape == (1, 5, *size)
    coarse, full = net.maps(torch.rand(1, 2, *size))
    assert coarse.shape == (1, 24, -(-size[0] // 8), -(-size[1] // 8)) and full.shape == (1, 6, *size)


def test_no_token_sees_across_the_border_and_shifted_windows_join():
    """One unshifted block keeps to its windows; with a shifted one, a change reaches the next window, but never the far side."""
    torch.manual_seed(0)
    x = torch.rand(1, 18, 18, 12)
    y = x.clone()
    y[:, 0, 0] += torch.rand(12)
    changed = lambda *blocks: (torch.nn.Sequential(*blocks)(x) - torch.nn.Sequential(*blocks)(y)).abs().amax(-1)[0] > 1e-7
    plain, shifted = cct_r.SwinBlock(12, 6, 3, 0), cct_r.SwinBlock(12, 6, 3, 3)
    assert torch.equal(changed(plain).nonzero().amax(0), torch.tensor([5, 5]))
    assert torch.equal(changed(shifted).nonzero().amax(0), torch.tensor([2, 2]))                         # rolled windows do not wrap around
    assert torch.equal(changed(plain, shifted).nonzero().amax(0), torch.tensor([8, 8]))


def test_relative_position_bias():
    """The bias of a pair of tokens depends on their offset alone: [dy, dx] and nothing else."""
    index = cct_r.WindowAttention(6, 3, 2).relative_position_index
    offsets = {}
    for i in range(9):
        for j in range(9):
            offsets.setdefault((i // 3 - j // 3, i % 3 - j % 3), set()).add(int(index[i, j]))
    assert len(offsets) == 25 and all(len(v) == 1 for v in offsets.values()) and len(set.union(*offsets.values())) == 25


def test_swin_weights(tmp_path):
    net = SwinUNet(1, 4, 12, 4)
    state = {"patch_embed.proj.weight": torch.rand(12, 3, 4, 4), "layers.0.blocks.1.attn.qkv.weight": torch.rand(36, 12),
             "layers.0.downsample.reduction.weight": torch.rand(24, 48), "head.weight": torch.rand(1000, 96)}
    torch.save({"model": state}, tmp_path / "swin.pth")
    cct_r.load_swin(net, tmp_path / "swin.pth")
    assert torch.equal(net.layers[0]["blocks"][1].attn.qkv.weight, state["layers.0.blocks.1.attn.qkv.weight"])
    assert torch.allclose(net.patch_embed["proj"].weight[:, 0], state["patch_embed.proj.weight"].sum(1))
    with pytest.raises(common.DataError, match="--swin-dim 96 --window 7"):
        cct_r.load_swin(SwinUNet(1, 4, 24, 4), tmp_path / "swin.pth")
    (tmp_path / "bad.pth").write_text("no")
    with pytest.raises(common.DataError, match="not a state dict"):
        cct_r.load_swin(net, tmp_path / "bad.pth")


# ------------------------------------------------------------------------------------------------ losses


def balanced_oracle(z, y, tau):
    """The class-balanced contrast, pixel by pixel in float64."""
    z, n, losses = z / np.linalg.norm(z, axis=1, keepdims=True), len(z), []
    for i in range(n):
        P = [p for p in range(n) if p != i and y[p] == y[i]]
        if P:
            total = sum(math.exp(z[i] @ z[a] / tau) / (sum(y == y[a]) - (y[a] == y[i])) for a in range(n) if a != i)
            losses.append(-sum(z[i] @ z[p] / tau - math.log(total) for p in P) / len(P))
    return sum(losses) / len(losses)


def test_balanced_contrast_equals_the_loop():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(2, 14, 4)), rng.choice([0, 0, 0, 1, 2], (2, 14))
    y[0, 0] = 3                                                                                          # alone in its class: no positive
    want = [balanced_oracle(a, b, .1) for a, b in zip(z, y)]
    one = [balanced_contrastive_loss(torch.tensor(a), torch.tensor(b), .1).item() for a, b in zip(z, y)]
    assert one == pytest.approx(want, rel=1e-5)
    counts = [sum(sum(b == k) > 1 for k in b) for b in y]                                                # anchors with a positive
    both = balanced_contrastive_loss(torch.tensor(z), torch.tensor(y), .1).item()
    assert both == pytest.approx(np.average(want, weights=counts), rel=1e-5)                             # two groups: mean over all anchors


def test_class_balance_by_hand():
    """tau = 1, an anchor like its one partner (1,0), against background (0,1): copying the background changes nothing for it."""
    z = torch.tensor([[1., 0], [1, 0], [0, 1], [0, 1]])
    y = torch.tensor([1, 1, 0, 0])
    # class 1: own class e^1 / 1, the other 2 e^0 / 2; class 0: the same
    assert balanced_contrastive_loss(z, y, 1.).item() == pytest.approx(-1 + math.log(math.e + 1), abs=1e-6)
    many, labels = torch.cat([z, z[2:].repeat(10, 1)]), torch.cat([y, y[2:].repeat(10)])
    assert balanced_contrastive_loss(many, labels, 1.).item() == pytest.approx(-1 + math.log(math.e + 1), abs=1e-5)
    assert balanced_contrastive_loss(z, torch.arange(4), 1.).item() == 0                                 # nobody has a positive


def test_features_and_labels_are_cut_in_the_same_order():
    """Every pixel's feature is its class: the order is right if and only if the two agree after cutting."""
    torch.manual_seed(0)
    y = torch.randint(0, 4, (3, 10, 14))
    z = F.one_hot(y, 4).movedim(-1, 1).float()
    for offset in ((0, 0), (2, 1)):
        features, labels = cct_r.cut(z, 4, offset), cct_r.cut(y[:, None], 4, offset)[..., 0]
        assert features.shape == (2 * 3, 3 * 16, 4) and torch.equal(features.argmax(-1), labels)
    assert torch.equal(cct_r.cut(y[:, None], 4)[1, :16, 0], y[0, :4, 4:8].flatten())                     # one block is local
    perfect = cct_r.local_contrast([z, z], [y, y], 4, 6, .1)
    wrong = cct_r.local_contrast([z, z], [y, y.transpose(1, 2).reshape(3, 10, 14)], 4, 6, .1)
    assert perfect < .1 < wrong


def test_groups_of_background_are_skipped():
    y = torch.zeros(1, 8, 8, dtype=torch.long)
    z = torch.rand(1, 5, 8, 8, requires_grad=True)
    assert cct_r.local_contrast([z, z], [y, y], 4, 9, .1).item() == 0
    y[0, 0, :2] = 1
    loss = cct_r.local_contrast([z, z], [y, y], 4, 9, .1)
    loss.backward()
    assert z.grad[..., :4, :4].abs().max() > 0 and z.grad[..., 4:, :].abs().max() == 0 and z.grad[..., :, 4:].abs().max() == 0


def test_memory_bank():
    bank = MemoryBank(4, 2)
    where = torch.tensor([[0., 0, 0], [0, 0, 3], [0, 0, 9]])
    bank.push(torch.eye(3)[:, :2], where, torch.tensor([7, 8, 8]))
    index, near = bank.nearest(torch.tensor([[0., 0, 1]]), torch.tensor([5]), 2.5, 3)
    assert index[0, :2].tolist() == [0, 1] and near[0].tolist() == [True, True, False]                   # nearest first, the third too far
    index, near = bank.nearest(torch.tensor([[0., 0, 1]]), torch.tensor([7]), 2.5, 3)
    assert index[0, 0] == 1 and near[0].tolist() == [True, False, False]                                 # never the own volume
    bank.push(torch.ones(2, 2), torch.tensor([[5., 5, 5], [6, 6, 6]]), torch.tensor([1, 2]))             # one place free: the oldest goes
    assert bank.volume.tolist() == [2, 8, 8, 1] and bank.place[0].tolist() == [6, 6, 6] and bank.next == 1
    _, near = MemoryBank(4, 2).nearest(where, torch.tensor([1, 2, 3]), 5., 2)
    assert not near.any()                                                                                # empty


def test_reps_equals_the_loop():
    rng = np.random.default_rng(0)
    n, M, tau, radius = 6, 20, .1, 8.
    z, where, who = rng.normal(size=(n, 5)), rng.uniform(-10, 10, (n, 3)), rng.integers(0, 4, n)
    b_z, b_where, b_who = rng.normal(size=(M, 5)), rng.uniform(-10, 10, (M, 3)), rng.integers(0, 4, M)
    where[0] = 500                                                                                       # nothing near: left out
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    bank = MemoryBank(M + 5, 5)                                                                          # five places stay empty
    bank.push(torch.tensor(unit(b_z)).float(), torch.tensor(b_where).float(), torch.tensor(b_who))
    losses = []
    for i in range(n):
        R = sorted((np.linalg.norm(where[i] - b_where[a]), a) for a in range(M) if b_who[a] != who[i])[:3]
        R = [a for d, a in R if d <= radius]
        s = unit(z)[i] @ unit(b_z).T / tau
        if R:
            losses.append(-sum(math.log(math.exp(s[p]) / np.exp(s).sum()) for p in R) / len(R))
    assert 0 < len(losses) < n
    got = cct_r.reps_loss(torch.tensor(z), torch.tensor(where).float(), torch.tensor(who), bank, radius, 3, tau)
    assert got.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_segmentation_and_cross_teaching():
    torch.manual_seed(0)
    a, b, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    p = a.double().softmax(1)
    ce = -p.gather(1, y[:, None]).log().mean()
    dice = np.mean([1 - 2 * p[:, k][y == k].sum() / (p[:, k].sum() + (y == k).sum()) for k in (1, 2)])
    assert cct_r.segmentation_loss(a, y).item() == pytest.approx(.5 * (ce.item() + dice), abs=1e-5)
    a.requires_grad_(), b.requires_grad_()
    loss = cct_r.cross_teaching_loss(a, b)
    assert loss.item() == pytest.approx(common.dice_loss(a, b.argmax(1)).item() + common.dice_loss(b, a.argmax(1)).item())
    sure = 50 * F.one_hot(y, 3).movedim(-1, 1).float()
    assert cct_r.cross_teaching_loss(sure, sure).item() == pytest.approx(0, abs=1e-4)


def test_ramp_and_decay():
    assert [cct_r.ramp_up(t, 100) for t in (0, 50, 100, 200)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert [cct_r.decay(t, 100) for t in (0, 50, 100)] == pytest.approx([1, math.exp(-1.25), math.exp(-5)])


# ------------------------------------------------------------------------------------------------ registration of a dataset


@pytest.fixture(scope="module")
def setting(phantom, tmp_path_factory):
    """(options, cases, split, dataset) of the tiny phantom."""
    o = cct_r.parse_options(["--data", str(phantom), *TINY, "--cache", str(tmp_path_factory.mktemp("cache"))])
    cases = data.find_cases(phantom)
    cct_r.resolve(o, cases)
    return o, cases, data.split_patients(cases), common.prepare(cases, o.spacing, o.size, o.cache)


@pytest.fixture(scope="module")
def registered(setting):
    o, cases, split, dataset = setting
    return cct_r.register(dataset, cases, split, 2, o)


def test_registration_helps_and_is_cached(setting, registered, monkeypatch):
    o, cases, split, dataset = setting
    pairs, frames, volumes, labelled, _ = registered
    assert set(pairs) == {(u, n) for u in volumes for n in labelled} and len(labelled) == 4
    judged = [cct_r.peek_registration(dataset, pairs, frames, u, n, 4) for u, n in pairs if u != n]
    mean = {k: np.mean([r[k] for r in judged]) for k in judged[0]}
    assert mean["dice_before"] + .2 < mean["dice_affine"] < mean["dice_after"]
    assert all(float(p["folded"]) < .005 for p in pairs.values())
    monkeypatch.setattr(cct_r, "register_batch", None)                                                   # a second run must not register
    again, _ = cct_r.register_all(dataset, volumes, labelled, 4, o)
    assert all(torch.equal(again[k][name], pairs[k][name]) for k in pairs for name in pairs[k])
    with pytest.raises(TypeError):
        cct_r.register_all(dataset, volumes, labelled, 4, cct_r.argparse.Namespace(**{**vars(o), "stiffness": .5}))     # other options do


def test_a_volume_is_its_own_best_match_and_its_label_comes_back(setting, registered):
    _, cases, _, dataset = setting
    pairs, frames, _, labelled, _ = registered
    n = labelled[0]
    shape, spacing, numbers = cct_r.voxels(dataset, n)
    back = frames[n].warp_label(pairs[n, n], shape, spacing).numpy()
    assert common.nanmean(common.dice_score(back, dataset.label(numbers).numpy(), [1, 2, 3]).values()) > .9
    assert pairs[n, n]["cycle"] < min(pairs[u, n]["cycle"] for u in range(len(cases)) if u != n and (u, n) in pairs)
    still = dict(A=torch.eye(3, 4), back=torch.zeros_like(pairs[n, n]["back"]))                          # the identity: exactly the label
    assert np.array_equal(frames[n].warp_label(still, shape, spacing).numpy(), dataset.label(numbers).numpy())
    assert set(np.unique(back)) <= set(range(4))                                                         # label values are kept


def test_places_and_partners(setting, registered):
    o, cases, split, dataset = setting
    pairs, frames, volumes, labelled, (warped, places) = registered
    u = next(v for v in volumes if v not in labelled)
    best = cct_r.best_partner(pairs, u, labelled)
    assert all(pairs[u, best]["cycle"] <= pairs[u, n]["cycle"] for n in labelled)
    assert {cct_r.best_partner(pairs, v, labelled, False) for v in volumes} == set(labelled)     # in turn
    assert cct_r.best_partner(pairs, labelled[0], labelled) != labelled[0]
    shape, spacing, numbers = cct_r.voxels(dataset, labelled[0])
    assert torch.allclose(places[numbers].movedim(1, -1).float(), cct_r.points(shape, spacing), atol=.1)   # the common frame itself
    assert warped[numbers].max() == 0                                                                    # warped labels: for unlabelled volumes only
    assert warped[cct_r.voxels(dataset, u)[2]].max() == 3
    outside = [i for i in range(len(dataset.volume)) if dataset.volume[i] not in volumes]
    assert warped[outside].max() == 0 and places[outside].isnan().all()                                  # validation and test: nothing


def test_labels_of_unlabelled_volumes_are_not_read(setting, registered, monkeypatch, tmp_path):
    """With --no-peek a whole training touches the labels of labelled patients alone."""
    o, cases, split, dataset = setting
    asked, label = [], common.SliceDataset.label
    monkeypatch.setattr(common.SliceDataset, "label", lambda self, n, *a: (asked.extend(np.atleast_1d(n)), label(self, n, *a))[1])
    quiet = cct_r.argparse.Namespace(**{**vars(o), "no_peek": True})
    own, rest = dataset.of_patients(split["labelled"][:1]), dataset.of_patients(split["labelled"][1:])
    prior = cct_r.register(dataset, cases, split, 1, quiet)[-1]
    cct_r.train("x", dataset, own, rest, prior, 4, 0, quiet, CPU, tmp_path)
    assert set(asked) <= set(own) and len(asked) > 0


@pytest.mark.parametrize("shift", (0, 2))
def test_the_convolution_tells_a_block_where_it_is(shift):
    """Tokens that are all alike: without the convolution they stay alike wherever they lie."""
    torch.manual_seed(0)
    block, x = cct_r.SwinBlock(12, 4, 3, shift), torch.randn(12).expand(1, 8, 8, 12)
    spread = lambda: block(x).flatten(0, 2).std(0).max().item()
    assert spread() > 1e-2
    torch.nn.init.zeros_(block.place.weight)
    assert spread() < 1e-5


def test_views(setting, registered):
    """Labelled slices have other intensities for each network, unlabelled ones their own; labels and places move with them."""
    o, cases, split, dataset = setting
    warped, places = registered[-1]
    numbers = dataset.of_patients(split["labelled"][1:])
    torch.manual_seed(0)
    views, y, place, volume = cct_r.draw_batch(dataset, numbers, 4, None, places, o, CPU)
    assert not torch.equal(*views)
    torch.manual_seed(0)
    same, y_warped, place_again, _ = cct_r.draw_batch(dataset, numbers, 4, warped, places, o, CPU)
    assert torch.equal(*same) and torch.equal(place.nan_to_num(0), place_again.nan_to_num(0))
    torch.manual_seed(0)
    pick = numbers[torch.randint(len(numbers), (4,)).numpy()]
    grid = common.spatial_grid(4, o.size, o.rotation, CPU)
    assert torch.equal(same[0], common.warp(dataset.image(pick), grid)) and np.array_equal(volume, dataset.volume[pick])
    assert torch.equal(y, common.warp(dataset.label(pick), grid, "nearest"))
    assert torch.equal(y_warped, common.warp(warped[pick].long(), grid, "nearest"))


def test_every_part_trains(setting, registered, tmp_path):
    """Each flag changes the trained network; the losses are logged with their weights."""
    o, cases, split, dataset = setting
    own, rest = dataset.of_patients(split["labelled"][:1]), dataset.of_patients(split["labelled"][1:])

    def trained(**flags):
        some = cct_r.argparse.Namespace(**{**vars(o), "no_peek": True, "reps_weight": 1., "contrast_weight": 1., **flags})
        return cct_r.train("x", dataset, own, rest, registered[-1], 4, 0, some, CPU, tmp_path).unet.head.weight.detach()
    full = trained()
    assert torch.equal(full, trained())
    for flag in ("no_cross_teaching", "no_rsl", "no_contrast", "no_reps"):
        assert not torch.equal(full, trained(**{flag: True})), flag
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["weight_cross"] == pytest.approx(.1 * math.exp(-5)) and first["weight_RSL"] == pytest.approx(o.rsl_weight)
    assert {"sup", "cross", "RSL", "contrast", "REPS"} <= set(first)


def test_scratch_is_the_scratch_of_sal(setting, phantom, tmp_path):
    import sal
    o, cases, _, dataset = setting
    other = sal.parse_options(["--data", str(phantom), "--size", "32", "--spacing", "5", "--width", "4", "--steps", "4", "--batch", "8",
                               "--windows", "2"])
    sal.resolve(other, cases)
    one = cct_r.finetune("x", dataset, np.arange(10), 4, 0, o, CPU, tmp_path)
    two = sal.finetune("x", dataset, np.arange(10), 4, 0, other, CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished tiny run: (its folder, the work folder with the cache, what it printed)."""
    work = tmp_path_factory.mktemp("work")
    done = run("cct_r.py", "--data", phantom, *TINY, "--seeds", 0, "--out", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "out", work, done.stdout


def test_what_a_run_writes(finished):
    out, _, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(r["method"], r["labelled"]) for r in metrics["rows"]] == [(m, 1) for m in ("scratch", "cct_r", "cct_r, Swin")]
    assert {f.name for f in (out / "figures").iterdir()} == {"dice.png", "overlays.png", "registration.png", "correspondences.png",
                                                              "pseudo_labels.png"}
    table = list(csv.DictReader((out / "registration.csv").open()))
    assert len(table) == 8 * 2 - 2 and {"similarity_before", "similarity_after", "dice_before", "dice_after", "folded_percent",
                                        "cycle_error_mm"} <= set(table[0])
    assert "rank correlation of cycle error" in printed and "| 1 | cct_r, Swin |" in printed and not list(out.rglob("*partial*"))


def test_kill_and_resume(finished, phantom):
    """Killed with SIGKILL in registration and in training, and resumed: the numbers of the undisturbed run."""
    out, work, _ = finished
    command = [sys.executable, str(ROOT / "cct_r.py"), "--data", str(phantom), *TINY, "--seeds", "0", "--out", "killed", "--cache",
               "cache2"]
    killed = 0
    for target in ("../cache2/registration-*/*.pt", "scratch_n1_s0.pt", "training.pt", None):
        resume = ["--resume"] if (work / "killed").exists() else []
        before = set((work / "killed").glob(target)) if target else set()
        process = subprocess.Popen(command + resume, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        while target and process.poll() is None:
            if (work / "killed").exists() and set((work / "killed").glob(target)) - before:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert killed >= 2 and process.returncode == 0
    assert (work / "killed/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def test_options_init_and_scratch(finished, phantom):
    out, work, _ = finished
    content = common.load_checkpoint(out / "scratch_n1_s0.pt")
    common.save_checkpoint(work / "sal.pt", method="sal", options={}, unet=content["unet"], parts=["encoder"])
    done = run("cct_r.py", "--data", phantom, *TINY, "--seeds", 0, "--no-brs", "--no-peek", "--no-reps", "--precision", "bfloat16", "--init",
               work / "sal.pt", "--out", "o", cwd=work)
    assert done.returncode == 0 and "| 1 | cct_r-no_reps-no_brs |" in done.stdout and "sal gives" in done.stdout, done.stderr
    assert not (work / "o/figures/pseudo_labels.png").exists() and "dice_after" not in (work / "o/registration.csv").read_text()
    done = run("cct_r.py", "--data", phantom, *TINY, "--seeds", 0, "--no-rsl", "--scratch", "out", "--out", "o2", cwd=work)
    assert done.returncode == 0 and not (work / "o2/scratch_n1_s0.pt").exists(), done.stderr
    refused(run("cct_r.py", "--predict", "x.nii", "--checkpoint", work / "sal.pt"), "checkpoint of sal, not of cct_r")


def test_bad_options(phantom):
    cases = data.find_cases(phantom)
    for words, extra in ((("--size 40",), ["--size", "40"]), (("--batch 10", "quarter"), ["--batch", "10"]), (("--swin-dim 20", "multiple of 6"), ["--swin-dim", "20"]),
                         (("--temperature",), ["--temperature", "0"]), (("--block 99",), ["--block", "99"]), (("--bank",), ["--bank", "3"]),
                         (("not the folder of a run",), ["--scratch", "nowhere"])):
        with pytest.raises(common.DataError) as error:
            cct_r.resolve(cct_r.parse_options(["--data", "x", *TINY, *extra]), cases)
        assert all(w in str(error.value) for w in words)
