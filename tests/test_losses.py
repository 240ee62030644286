"""SAL's losses against float64 double loops straight from the formulas, hand-worked numbers and
invariants."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lowered

import common
import macl
from sal import (best_matches, global_positional_loss, local_alignment_loss, matched_pairs,
                 pair_kinds, random_pair_similarity, sample_pairs, uniformity_loss)

# ---------------------------------------------------------------------------------------- oracles


def unit(v):
    """A vector at unit length."""
    return v / max(math.sqrt(sum(a * a for a in v)), 1e-12)


def pixels(x):
    """The pixels of a map [C, h, w] as unit vectors in float64."""
    return [unit(v) for v in x.reshape(len(x), -1).T.astype(np.float64)]


def la_one_way(p, q):
    """Mean over the vectors p of |1 - the best match among q|."""
    total = 0
    for a in p:
        best = max(float(a @ b) for b in q)
        total += abs(1 - best)
    return total / len(p)


def la_oracle(x_i, x_j):
    """Eq. (LA) of maps [C, h, w], both directions averaged."""
    p = pixels(x_i)
    q = pixels(x_j)
    return (la_one_way(p, q) + la_one_way(q, p)) / 2


def wla_oracle(x_i, x_j, r):
    """Eq. (WLA): the mean of Eq. (LA) over the r^2 windows."""
    _, h, w = x_i.shape
    total = 0
    for a in range(r):
        for b in range(r):
            rows = slice(a * h // r, (a + 1) * h // r)
            columns = slice(b * w // r, (b + 1) * w // r)
            total += la_oracle(x_i[:, rows, columns], x_j[:, rows, columns])
    return total / r ** 2


def gp_oracle(z, position, t, tau):
    """Eq. (GP), anchor by anchor in float64; anchors without a positive are left out."""
    z = [unit(v) for v in z.astype(np.float64)]
    anchors = []
    for a in range(len(z)):
        others = [b for b in range(len(z)) if b != a]
        similar = {b: math.exp(float(z[a] @ z[b]) / tau) for b in others}
        P = [b for b in others if abs(position[a] - position[b]) < t]
        if P:
            logs = [math.log(similar[p] / sum(similar.values())) for p in P]
            anchors.append(-sum(logs) / len(P))
    return sum(anchors) / len(anchors)


def uniformity_oracle(x, volume, spared=()):
    """L_U over all places of maps [n, C, h, w], pair by pair in float64.

    spared: {((view, place), (view, place))} that are left out.
    """
    points = []
    for n, (view, number) in enumerate(zip(x.double().numpy(), volume)):
        for place, vector in enumerate(pixels(view)):
            points.append((n, number, place, vector))
    repelled = []
    for n, number, place, u in points:
        for other_n, other_number, other_place, v in points:
            out = ((n, place), (other_n, other_place)) in spared
            if (number, place) != (other_number, other_place) and not out:
                repelled.append(math.exp(4 * float(u @ v)))
    return math.log(sum(repelled) / len(repelled))


# ------------------------------------------------------------------------------------- LA and WLA


@pytest.mark.parametrize("r", [1, 2, 3])
def test_wla_equals_the_double_loop(r):
    rng = np.random.default_rng(r)
    x_i, x_j = rng.normal(size=(2, 3, 5, 6, 12))                   # B = 3, C = 5, h = 6, w = 12
    want = np.mean([wla_oracle(a, b, r) for a, b in zip(x_i, x_j)])
    got = local_alignment_loss(torch.tensor(x_i), torch.tensor(x_j), r)
    assert got.item() == pytest.approx(want, abs=1e-6)


def test_la_by_hand():
    # two pixels of i: (1, 0) and (0, 1); two of j: (1, 1) / sqrt 2 and (-1, 0)
    x_i = torch.tensor([[1., 0.], [0., 1.]]).view(1, 2, 1, 2)      # [1, C = 2, 1, 2]
    x_j = torch.tensor([[1., -1.], [1., 0.]]).view(1, 2, 1, 2)
    # best matches of i: .7071, .7071; of j: .7071, 0
    half = math.sqrt(.5)
    rows = ((1 - half) + (1 - half)) / 2
    columns = ((1 - half) + (1 - 0)) / 2
    got = local_alignment_loss(x_i, x_j, 1).item()
    assert got == pytest.approx((rows + columns) / 2, abs=1e-6)


def test_one_window_is_la():
    x_i, x_j = torch.randn(2, 2, 8, 12, 12)
    want = np.mean([la_oracle(a, b) for a, b in zip(x_i.numpy(), x_j.numpy())])
    assert local_alignment_loss(x_i, x_j, 1).item() == pytest.approx(want, abs=1e-5)
    assert local_alignment_loss(x_i, x_j).item() == pytest.approx(want, abs=1e-5)


def test_windows_only_forbid_matches():
    x_i, x_j = torch.randn(2, 2, 8, 12, 12)
    la = [local_alignment_loss(x_i, x_j, r).item() for r in (1, 2, 4, 12)]
    assert la == sorted(la)                                        # fewer and fewer candidates
    assert la[0] < la[-1]
    # r = h: each pixel has one candidate
    pixelwise = 1 - torch.cosine_similarity(x_i, x_j, dim=1)
    assert la[-1] == pytest.approx(pixelwise.mean().item(), abs=1e-6)


def test_la_invariants():
    def la(a, b, r):
        return local_alignment_loss(a, b, r).item()

    x = torch.randn(2, 8, 6, 6)
    y = torch.randn(2, 8, 6, 6)
    assert la(x, x, 2) == pytest.approx(0, abs=1e-6)
    assert la(x, y, 3) == pytest.approx(la(y, x, 3), abs=1e-6)
    assert la(x, 5 * y, 3) == pytest.approx(la(x, y, 3), abs=1e-6)
    # LA does not mind where the match is, WLA does
    shuffled = y.flatten(2)[:, :, torch.randperm(36)].view_as(y)
    assert la(x, shuffled, 1) == pytest.approx(la(x, y, 1), abs=1e-6)
    assert la(x, shuffled, 3) != pytest.approx(la(x, y, 3), abs=1e-6)


def test_windows_that_do_not_divide_the_map_are_refused():
    x = torch.randn(2, 8, 6, 6)
    with pytest.raises(ValueError, match="windows = 4 does not divide"):
        local_alignment_loss(x, x, 4)


@pytest.mark.parametrize("r, radius", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_matches_within_a_radius(r, radius):
    """Window by window, place by place: the best of those in the window and at most so far away."""
    x_i, x_j = torch.randn(2, 1, 5, 4, 6, generator=torch.Generator().manual_seed(r))
    p = pixels(x_i[0].numpy())
    q = pixels(x_j[0].numpy())
    best = []
    match = []
    for a in range(24):
        ya, xa = divmod(a, 6)
        found = {}
        for b in range(24):
            yb, xb = divmod(b, 6)
            window = ya * r // 4 == yb * r // 4 and xa * r // 6 == xb * r // 6
            if window and (ya - yb) ** 2 + (xa - xb) ** 2 <= radius ** 2:
                found[b] = float(p[a] @ q[b])
        match.append(max(found, key=found.get))
        best.append(1 - found[match[-1]])
    assert best_matches(x_i, x_j, r, radius)[0].tolist() == match
    # LA averages both directions
    forward = 2 * local_alignment_loss(x_i, x_j, r, radius)
    back = [1 - float(q[b] @ p[m]) for b, m in enumerate(best_matches(x_j, x_i, r, radius)[0])]
    assert forward.item() == pytest.approx(np.mean(best) + np.mean(back), abs=1e-5)


def test_a_long_radius_is_none_and_a_short_one_is_the_place_itself():
    x_i, x_j = torch.randn(2, 2, 5, 6, 6)
    la = local_alignment_loss(x_i, x_j)
    assert torch.equal(local_alignment_loss(x_i, x_j, 1, 99), la)
    assert local_alignment_loss(x_i, x_j, 1, .5) == pytest.approx(
        local_alignment_loss(x_i, x_j, 6).item(), abs=1e-6)


def test_matched_pairs_by_hand():
    """One row of three places: i = (a, b, c), j = (b, b', -a); b' is a little off b."""
    a, b, c = torch.eye(4)[:3]
    off = F.normalize(b + .2 * torch.eye(4)[3] + .1 * c, dim=0)
    x_i = torch.stack([a, b, c]).T.view(1, 4, 1, 3)
    x_j = torch.stack([b, off, -a]).T.view(1, 4, 1, 3)
    # i's best: a with b or b' (both 0: the first), b with b, c with b'; j's: b, b, not a (first: b)
    want = [[1, 0, 0], [1, 1, 1], [0, 1, 0]]
    assert matched_pairs(x_i, x_j, 1, 0)[0].int().tolist() == want


# --------------------------------------------------------------------------------------------- GP


@pytest.mark.parametrize("t", [.05, .3, 2.])
def test_gp_equals_the_loop(t):
    rng = np.random.default_rng(4)
    z = rng.normal(size=(14, 6))
    position = rng.integers(1, 9, 14) / 8
    got = global_positional_loss(torch.tensor(z), torch.tensor(position), t, .1)
    assert got.item() == pytest.approx(gp_oracle(z, position, t, .1), abs=1e-5)


def test_gp_by_hand():
    # z_1 = z_2 = (1, 0), z_3 = (0, 1), tau = 1; 1 and 2 are close, 3 has no positive
    z = torch.tensor([[1., 0.], [2., 0.], [0., 3.]])
    position = torch.tensor([.1, .2, .9])
    # for both anchors
    want = -math.log(math.e / (math.e + 1))
    assert global_positional_loss(z, position, .35, 1.).item() == pytest.approx(want, abs=1e-6)


def test_gp_chance_level():
    """All alike: ln(n - 1)."""
    position = torch.linspace(.1, 1, 10)
    loss = global_positional_loss(torch.ones(10, 4), position, .35, .1)
    assert loss.item() == pytest.approx(math.log(9), abs=1e-5)


def test_gp_without_a_positive_is_zero():
    """And the zero has a gradient, of zeros."""
    z = torch.randn(3, 4, requires_grad=True)
    loss = global_positional_loss(z, torch.tensor([.25, .5, .75]), .24, .1)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(z.grad, torch.zeros(3, 4))


def test_gp_does_not_mind_the_order():
    position = torch.linspace(.1, 1, 10)
    z = torch.randn(10, 4)
    order = torch.randperm(10)
    shuffled = global_positional_loss(z[order], position[order], .35, .1).item()
    want = global_positional_loss(z, position, .35, .1).item()
    assert shuffled == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite(dtype):
    x = torch.randn(4, 8, 8, 8)
    x[0] = 0                                                       # a blank slice
    conv = torch.nn.Conv2d(8, 8, 1, bias=False)                    # which stays blank
    position = torch.tensor([.2, .4, .6, .8])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x)
        la = local_alignment_loss(*y.chunk(2), 2)
        gp = global_positional_loss(y.mean((2, 3)), position, .35, .1)
    assert y.dtype == dtype
    for loss in (la, gp):
        assert loss.dtype == torch.float32
        conv.zero_grad()
        loss.backward(retain_graph=True)
        assert torch.isfinite(conv.weight.grad).all()
        assert conv.weight.grad.abs().sum() > 0


# -------------------------------------------------------------------------------- L_U and collapse


def test_uniformity_equals_the_double_loop():
    x = torch.randn(5, 3, 2, 3)                                    # 6 places: all are taken
    volume = [0, 0, 1, 2, 2]
    want = uniformity_oracle(x, volume)
    assert uniformity_loss(x, volume).item() == pytest.approx(want, abs=1e-5)


def test_uniformity_spares_the_matches():
    """Of views 0 and 2, and of 1 and 3, in both directions, and of no other two."""
    x = torch.randn(4, 3, 2, 3)
    volume = [0, 1, 0, 1]
    matched = matched_pairs(*x.chunk(2), 1, 0)                     # [2, 6, 6]
    spared = set()
    for b, p, q in matched.nonzero().tolist():
        spared |= {((b, p), (b + 2, q)), ((b + 2, q), (b, p))}
    want = uniformity_oracle(x, volume, spared)
    assert uniformity_loss(x, volume, spared=matched).item() == pytest.approx(want, abs=1e-5)
    assert uniformity_loss(x, volume).item() != pytest.approx(want, abs=1e-3)


def test_uniformity_has_a_gradient():
    def loss(x):
        torch.manual_seed(0)                                       # the same places
        return uniformity_loss(x, [0, 0, 1, 1])

    lowered(loss, torch.randn(4, 6, 4, 4), .1)


def test_uniformity_of_equal_features_is_four():
    equal = torch.ones(5, 3, 2, 3)
    assert uniformity_loss(equal, [0, 0, 1, 2, 2]).item() == pytest.approx(4, abs=1e-5)


def test_uniformity_lets_the_views_of_a_place_agree():
    """Each place orthogonal to the others: fine in two views of one volume, not in two volumes,
    where it is a code of the place."""
    two = torch.eye(6).view(1, 6, 2, 3).repeat(2, 1, 1, 1)
    assert uniformity_loss(two, [0, 0]).item() == pytest.approx(0, abs=1e-5)
    assert uniformity_loss(two, [0, 1]).item() > .5


def la_alone(x):
    """LA of the two views in x."""
    return local_alignment_loss(*x.chunk(2), 1)


def la_and_uniformity(x):
    """LA and L_U of two views of eight volumes."""
    volume = [*range(8)] * 2
    return la_alone(x) + uniformity_loss(x, volume)


def train_encoder(loss_of):
    """A small encoder on smooth random pictures, two views each, for 120 steps.

    Returns (LA, LA between strangers, mean similarity of a random pair) at the end.
    """
    torch.manual_seed(0)
    encoder = common.Encoder(1, 4, 3)
    embed = torch.nn.Conv2d(32, 16, 1, bias=False)
    optimiser = torch.optim.Adam([*encoder.parameters(), *embed.parameters()], .01)
    for _ in range(120):
        pictures = F.interpolate(torch.rand(8, 1, 8, 8), 48, mode="bicubic")
        views = common.photometric(pictures.repeat(2, 1, 1, 1))    # [16, 1, 48, 48]
        x = embed(encoder(views)[3])                               # [16, 16, 6, 6]
        loss = loss_of(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    i, j = x.detach().chunk(2)
    strangers = local_alignment_loss(i, j.roll(1, 0), 1)
    return la_alone(x).item(), strangers.item(), random_pair_similarity(x).item()


def test_la_alone_collapses():
    la, strangers, random_pairs = train_encoder(la_alone)
    assert la < .01
    assert strangers < .02                                         # every pixel matches every other
    assert random_pairs > .85


def test_uniformity_prevents_the_collapse():
    la, strangers, random_pairs = train_encoder(la_and_uniformity)
    assert la < .35
    assert strangers > la + .1
    assert abs(random_pairs) < .1


# ---------------------------------------------------------------------------------- like positions


def dataset_position(V):
    """Positions of a volume of V slices as `SliceDataset` has them."""
    return torch.from_numpy(((np.arange(V) + 1) / V).astype(np.float32))


def test_neighbours_of_ten_slices_are_close_at_a_tenth():
    """|i-j| / V = t exactly, nine times: rounding may not decide (it took 4 of the 9)."""
    close = common.is_close(dataset_position(10), .1)
    assert close.diagonal(1).tolist() == [True] * 9
    assert close.diagonal(2).tolist() == [False] * 8
    assert torch.equal(close, close.T)
    # both scripts take their positives from it
    assert torch.equal(macl.positive_pairs(dataset_position(10), .1)[:10, 10:], close)
    assert (pair_kinds([0] * 10, range(10), [10] * 10, .1).diagonal(1) == 2).all()
    z = torch.randn(10, 4)
    got = global_positional_loss(z, dataset_position(10), .1, .1).item()
    assert got == pytest.approx(global_positional_loss(z, dataset_position(10), .15, .1).item())


@pytest.mark.parametrize("t", [.05, .1, .15, .2, .35, 1.])
def test_like_positions_in_whole_numbers(t):
    """Every pair of slices of volumes of up to 40 slices: |m (i+1) - n (j+1)| / (n m) <= t."""
    for n, m in ((8, 8), (10, 10), (20, 20), (40, 40), (7, 12), (10, 40)):
        position = torch.cat([dataset_position(n), dataset_position(m)])
        close = common.is_close(position, t)[:n, n:]
        for i in range(n):
            for j in range(m):
                away = abs(m * (i + 1) - n * (j + 1))
                assert close[i, j] == (100 * away <= round(100 * t) * n * m)


# ------------------------------------------------------------------------------ the kinds of pairs

# Views of volume 0: slices 2, 2, 3, 9 of 10; of volume 1: slices 5 (position .3, as slice 2 of 10),
# 18 (.95) and 2 (.15) of 20.
VOLUME = [0, 0, 0, 0, 1, 1, 1]
NUMBER = [2, 2, 3, 9, 5, 18, 2]
DEPTH = [10, 10, 10, 10, 20, 20, 20]
POSITION = (torch.tensor(NUMBER) + 1) / torch.tensor(DEPTH)
KINDS = [[0, 1, 2, 4, 3, 4, 3],
         [1, 0, 2, 4, 3, 4, 3],
         [2, 2, 0, 4, 3, 4, 3],
         [4, 4, 4, 0, 4, 3, 4],
         [3, 3, 3, 4, 0, 4, 2],
         [4, 4, 4, 3, 4, 0, 4],
         [3, 3, 3, 4, 2, 4, 0]]


def test_kinds_of_pairs_by_hand():
    assert pair_kinds(VOLUME, NUMBER, DEPTH, .35).tolist() == KINDS


def test_gp_attracts_the_kinds_1_to_3():
    kinds = torch.tensor(KINDS)
    away = (POSITION[:, None] - POSITION[None]).abs()
    positives = (away < .35) & ~torch.eye(7, dtype=torch.bool)
    assert torch.equal(positives, (kinds >= 1) & (kinds <= 3))


def test_gp_written_with_the_kinds_is_gp():
    z = torch.randn(7, 4)
    anchors = []
    for a in range(7):
        others = [b for b in range(7) if b != a]
        sim = torch.cosine_similarity(z[a][None], z, dim=1) / .1
        repelled = sim[others].logsumexp(0)
        attracted = [sim[p] for p in others if KINDS[a][p] in (1, 2, 3)]
        anchors.append(repelled - torch.stack(attracted).mean())
    want = torch.stack(anchors).mean().item()
    got = global_positional_loss(z, POSITION, .35, .1).item()
    assert got == pytest.approx(want, abs=1e-5)


class TwoVolumes:
    """In place of a dataset: two volumes, of 8 and of 20 slices."""
    depth = np.repeat([8, 20], [8, 20])
    slice = np.concatenate([np.arange(8), np.arange(20)])
    volume = np.repeat([0, 1], [8, 20])


def test_sampled_pairs_are_of_kind_1_or_2_and_reach_every_close_slice():
    torch.manual_seed(0)
    d = TwoVolumes
    kinds = pair_kinds(d.volume, d.slice, d.depth, .35)            # [28, 28]
    i, j = sample_pairs(d, np.arange(28), 4000, .35)
    other = i != j
    assert set(kinds[i[other], j[other]].tolist()) == {2}
    assert not other.all()                                         # kind 1: a slice with itself
    for n in range(28):
        close = set()
        for m in range(28):
            away = 100 * abs(d.slice[m] - d.slice[n])              # whole numbers: 7 / 20 is a tie
            if d.volume[m] == d.volume[n] and away <= 35 * d.depth[n]:
                close.add(m)
        assert set(j[i == n]) == close
