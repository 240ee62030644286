"""SAL's losses against float64 double loops straight from the formulas, hand-worked numbers and invariants."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import sal
from sal import global_positional_loss, local_alignment_loss, pair_kinds, random_pair_similarity


def unit(v):
    return v / max(math.sqrt(sum(a * a for a in v)), 1e-12)


def la_oracle(x_i, x_j):
    """Eq. (LA), both directions averaged: loops over the pixels of maps [C, h, w] in float64."""
    p = [unit(v) for v in x_i.reshape(len(x_i), -1).T.astype(np.float64)]
    q = [unit(v) for v in x_j.reshape(len(x_j), -1).T.astype(np.float64)]
    one = sum(abs(1 - max(float(a @ b) for b in q)) for a in p) / len(p)
    two = sum(abs(1 - max(float(a @ b) for a in p)) for b in q) / len(q)
    return (one + two) / 2


def wla_oracle(x_i, x_j, r):
    """Eq. (WLA): the mean of Eq. (LA) over the r^2 windows."""
    total, (_, h, w) = 0, x_i.shape
    for a in range(r):
        for b in range(r):
            cut = np.s_[:, a * h // r:(a + 1) * h // r, b * w // r:(b + 1) * w // r]
            total += la_oracle(x_i[cut], x_j[cut])
    return total / r ** 2


def gp_oracle(z, position, t, tau):
    """Eq. (GP), anchor by anchor in float64; anchors without a positive are left out."""
    z, anchors = [unit(v) for v in z.astype(np.float64)], []
    for a in range(len(z)):
        P = [b for b in range(len(z)) if b != a and abs(position[a] - position[b]) < t]
        denominator = sum(math.exp(float(z[a] @ z[b]) / tau) for b in range(len(z)) if b != a)
        if P:
            anchors.append(-sum(math.log(math.exp(float(z[a] @ z[p]) / tau) / denominator) for p in P) / len(P))
    return sum(anchors) / len(anchors)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_wla_equals_the_double_loop(r):
    rng = np.random.default_rng(r)
    x_i, x_j = rng.normal(size=(2, 3, 5, 6, 12))                           # B = 3, C = 5, h = 6, w = 12
    want = np.mean([wla_oracle(a, b, r) for a, b in zip(x_i, x_j)])
    assert local_alignment_loss(torch.tensor(x_i), torch.tensor(x_j), r).item() == pytest.approx(want, abs=1e-6)


def test_la_by_hand():
    # two pixels of i: (1,0) and (0,1); two of j: (1,1)/sqrt 2 and (-1,0). Best of rows: .7071, .7071; of columns: .7071, 0
    x_i = torch.tensor([[1., 0.], [0., 1.]]).view(1, 2, 1, 2)              # [1, C = 2, 1, 2]: columns are pixels
    x_j = torch.tensor([[1., -1.], [1., 0.]]).view(1, 2, 1, 2)
    rows, columns = 1 - math.sqrt(.5), (1 - math.sqrt(.5) + 1) / 2
    assert local_alignment_loss(x_i, x_j, 1).item() == pytest.approx((rows + columns) / 2, abs=1e-6)


def test_windows_of_one_is_la_and_windows_only_forbid_matches():
    x_i, x_j = torch.randn(2, 2, 8, 12, 12).unbind(0)
    la = [local_alignment_loss(x_i, x_j, r).item() for r in (1, 2, 4, 12)]
    assert la[0] == pytest.approx(np.mean([la_oracle(a, b) for a, b in zip(x_i.numpy(), x_j.numpy())]), abs=1e-5)
    assert la == sorted(la) and la[0] < la[-1]                             # a smaller window has fewer candidates
    pixelwise = (1 - torch.cosine_similarity(x_i, x_j, dim=1)).mean().item()
    assert la[-1] == pytest.approx(pixelwise, abs=1e-6)                    # r = h: each pixel has one candidate


def test_la_invariants():
    x = torch.randn(2, 8, 6, 6)
    y = torch.randn(2, 8, 6, 6)
    assert local_alignment_loss(x, x, 2).item() == pytest.approx(0, abs=1e-6)
    assert local_alignment_loss(x, y, 3).item() == pytest.approx(local_alignment_loss(y, x, 3).item(), abs=1e-6)
    assert local_alignment_loss(x, 5 * y, 3).item() == pytest.approx(local_alignment_loss(x, y, 3).item(), abs=1e-6)
    shuffled = y.flatten(2)[:, :, torch.randperm(36)].view_as(y)           # LA does not mind where the match is
    assert local_alignment_loss(x, shuffled, 1).item() == pytest.approx(local_alignment_loss(x, y, 1).item(), abs=1e-6)
    with pytest.raises(ValueError, match="windows = 4 does not divide"):
        local_alignment_loss(x, y, 4)


@pytest.mark.parametrize("t", [.05, .3, 2.])
def test_gp_equals_the_loop(t):
    rng = np.random.default_rng(4)
    z, position = rng.normal(size=(14, 6)), rng.integers(1, 9, 14) / 8
    got = global_positional_loss(torch.tensor(z), torch.tensor(position), t, .1).item()
    assert got == pytest.approx(gp_oracle(z, position, t, .1), abs=1e-5)


def test_gp_by_hand():
    # z_1 = z_2 = (1,0), z_3 = (0,1), tau = 1; 1 and 2 are close, 3 has no positive: -log(e / (e + 1)) for both anchors
    z, position = torch.tensor([[1., 0.], [2., 0.], [0., 3.]]), torch.tensor([.1, .2, .9])
    assert global_positional_loss(z, position, .35, 1.).item() == pytest.approx(-math.log(math.e / (math.e + 1)), abs=1e-6)


def test_gp_chance_level_threshold_and_empty():
    position = torch.linspace(.1, 1, 10)
    same = torch.ones(10, 4)
    assert global_positional_loss(same, position, .35, .1).item() == pytest.approx(math.log(9), abs=1e-5)   # ln(n - 1)
    z = torch.randn(3, 4, requires_grad=True)
    loss = global_positional_loss(z, torch.tensor([.25, .5, .75]), .25, .1)         # |pos - pos| = t is not < t
    assert loss.item() == 0
    loss.backward()
    order = torch.randperm(10)
    w = torch.randn(10, 4)
    assert global_positional_loss(w[order], position[order], .35, .1).item() == pytest.approx(
        global_positional_loss(w, position, .35, .1).item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite(dtype):
    x = torch.randn(4, 8, 8, 8)
    x[0] = 0                                                               # a blank slice
    conv = torch.nn.Conv2d(8, 8, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x)
        loss = local_alignment_loss(*y.chunk(2), 2) + global_positional_loss(y.mean((2, 3)), torch.tensor([.2, .4, .6, .8]), .35, .1)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(conv.weight.grad).all() and conv.weight.grad.abs().sum() > 0


def test_uniformity_equals_the_double_loop():
    x, volume = torch.randn(5, 3, 2, 3), [0, 0, 1, 2, 2]                   # 6 places: all are taken
    points = [(volume[a], p, x[a].flatten(1)[:, p].double().numpy()) for a in range(5) for p in range(6)]
    pairs = [math.exp(4 * float(np.dot(unit(u), unit(v)))) for i, (va, p, u) in enumerate(points)
             for j, (vb, q, v) in enumerate(points) if (va, p) != (vb, q)]
    assert sal.uniformity_loss(x, volume).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-5)
    assert sal.uniformity_loss(torch.ones(5, 3, 2, 3), volume).item() == pytest.approx(4, abs=1e-5)      # all equal
    # an image and its other view may agree: exact copies of volume 0's pixels do not repel each other
    two = torch.eye(6).view(1, 6, 2, 3).repeat(2, 1, 1, 1)                 # two views, each place orthogonal to the others
    assert sal.uniformity_loss(two, [0, 0]).item() == pytest.approx(0, abs=1e-5)
    assert sal.uniformity_loss(two, [0, 1]).item() > .5                    # a code of the place in different volumes does


def train_encoder(loss_of):
    """A small encoder on smooth random pictures, two views each; (LA, LA between strangers, mean random pair) at the end."""
    torch.manual_seed(0)
    encoder, embed = common.Encoder(1, 4, 3), torch.nn.Conv2d(32, 16, 1, bias=False)
    optimiser = torch.optim.Adam([*encoder.parameters(), *embed.parameters()], .01)
    for _ in range(120):
        pictures = F.interpolate(torch.rand(8, 1, 8, 8), 48, mode="bicubic")
        x = embed(encoder(common.photometric(pictures.repeat(2, 1, 1, 1)))[3])                # [16, 16, 6, 6]
        loss = loss_of(x)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    i, j = x.chunk(2)
    return (local_alignment_loss(i, j, 1).item(), local_alignment_loss(i, j.roll(1, 0), 1).item(), random_pair_similarity(x).item())


def test_la_alone_collapses_and_uniformity_prevents_it():
    la, strangers, random_pairs = train_encoder(lambda x: local_alignment_loss(*x.chunk(2), 1))
    assert la < .01 and strangers < .02 and random_pairs > .85             # every pixel matches every other
    la, strangers, random_pairs = train_encoder(lambda x: local_alignment_loss(*x.chunk(2), 1) + sal.uniformity_loss(x, [*range(8)] * 2))
    assert la < .35 and strangers > la + .1 and abs(random_pairs) < .1


def test_which_pair_enters_which_loss():
    # views of volume 0: slices 2, 2, 3, 9 of 10; volume 1: slices 5 (position .3, as slice 2 of 10), 18 (.95), 2 (.15) of 20
    volume, number, depth = [0, 0, 0, 0, 1, 1, 1], [2, 2, 3, 9, 5, 18, 2], [10, 10, 10, 10, 20, 20, 20]
    kinds = pair_kinds(volume, number, depth, .35)
    want = [[0, 1, 2, 4, 3, 4, 3],
            [1, 0, 2, 4, 3, 4, 3],
            [2, 2, 0, 4, 3, 4, 3],
            [4, 4, 4, 0, 4, 3, 4],
            [3, 3, 3, 4, 0, 4, 2],
            [4, 4, 4, 3, 4, 0, 4],
            [3, 3, 3, 4, 2, 4, 0]]
    assert kinds.tolist() == want
    position = (torch.tensor(number) + 1) / torch.tensor(depth)
    # GP attracts exactly kinds 1 to 3: the loss written with the kinds is the loss
    positives = ((position[:, None] - position[None]).abs() < .35) & ~torch.eye(7, dtype=torch.bool)
    assert torch.equal(positives, (kinds >= 1) & (kinds <= 3))
    z = torch.randn(7, 4)
    by_kind = []
    for a in range(7):
        others = [b for b in range(7) if b != a]
        sim = torch.cosine_similarity(z[a][None], z, dim=1) / .1
        by_kind.append(-torch.stack([sim[p] - sim[others].logsumexp(0) for p in others if kinds[a, p] in (1, 2, 3)]).mean())
    assert global_positional_loss(z, position, .35, .1).item() == pytest.approx(torch.stack(by_kind).mean().item(), abs=1e-5)


class FakeDataset:
    """Two volumes of 8 and 20 slices."""
    depth = np.repeat([8, 20], [8, 20])
    slice = np.concatenate([np.arange(8), np.arange(20)])
    volume = np.repeat([0, 1], [8, 20])


def test_sampled_pairs_are_kind_1_or_2_and_reach_every_close_slice():
    torch.manual_seed(0)
    d = FakeDataset
    i, j = sal.sample_pairs(d, np.arange(28), 4000, .35)
    kinds = [int(pair_kinds(d.volume[[a, b]], d.slice[[a, b]], d.depth[[a, b]], .35)[0, 1]) for a, b in zip(i, j)]
    assert set(kinds) == {1, 2}
    for n in range(28):
        close = {m for m in range(28) if d.volume[m] == d.volume[n] and abs(d.slice[m] - d.slice[n]) / d.depth[n] < .35}
        assert set(j[i == n]) == close
