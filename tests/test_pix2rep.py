"""Pix2Rep: losses against float64 loops and by hand, phi, the frozen probe, Mean Teacher, rows."""
import csv
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, noted_rates, options, refused, run_here, started

import common
import data
import pix2rep
from common import Row
from pix2rep import (barlow_twins_loss, effective_rank, few_shot, found_partners, info_nce_loss,
                     labels_needed, pixel_pairs, random_affine)

CPU = torch.device("cpu")


def unit(v):
    return v / math.sqrt(sum(x * x for x in v))


def info_nce_oracle(z_a, z_b, tau):
    """Eq. (InfoNCE), vector by vector in float64."""
    z = [unit(v) for v in np.concatenate([z_a, z_b]).astype(np.float64)]
    n = len(z_a)
    total = 0.
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        denominator = 0.
        for k in range(2 * n):
            if k != i:
                denominator += math.exp(sum(z[i] * z[k]) / tau)
        total -= math.log(math.exp(sum(z[i] * z[partner]) / tau) / denominator)
    return total / (2 * n)


def barlow_oracle(u_a, u_b, lam):
    """Eq. (Barlow), entry by entry in float64."""
    u_a = (u_a - u_a.mean(0)) / u_a.std(0)
    u_b = (u_b - u_b.mean(0)) / u_b.std(0)
    P, d = u_a.shape
    loss = 0.
    for a in range(d):
        for b in range(d):
            c = sum(u_a[p, a] * u_b[p, b] for p in range(P)) / P
            loss += (c - 1) ** 2 if a == b else lam * c ** 2
    return loss


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("tau", [.1, .53])
def test_info_nce_equals_the_loop(tau):
    z_a, z_b = np.random.default_rng(0).normal(size=(2, 9, 5)) * 3
    got = info_nce_loss(torch.tensor(z_a), torch.tensor(z_b), tau).item()
    assert got == pytest.approx(info_nce_oracle(z_a, z_b, tau), abs=1e-5)


def test_info_nce_by_hand():
    # n = 2, tau = 1: z_1 = z'_1 = (1,0), z_2 = z'_2 = (0,1)
    # every vector: partner e^1, two others e^0
    z = torch.eye(2)
    want = -math.log(math.e / (math.e + 2))
    assert info_nce_loss(z, z, 1.).item() == pytest.approx(want, abs=1e-6)
    # z'_1 and z'_2 exchanged: the partner has similarity 0, one other 1, one other 0
    want = -math.log(1 / (math.e + 2))
    assert info_nce_loss(z, z.flip(0), 1.).item() == pytest.approx(want, abs=1e-6)


def test_info_nce_chance_level():
    torch.manual_seed(0)
    n = 400
    chance = math.log(2 * n - 1)
    equal = torch.ones(n, 8)
    assert info_nce_loss(equal, equal, .1).item() == pytest.approx(chance, abs=1e-4)    # collapse
    a, b = torch.randn(2, n, 512)
    assert info_nce_loss(a, b, 1.).item() == pytest.approx(chance, abs=.01)             # unrelated


def test_info_nce_minimum_and_invariants():
    torch.manual_seed(0)
    z, noise = torch.randn(2, 400, 512)
    same = info_nce_loss(z, z, .1).item()
    assert same < .1
    for much in (.3, 1.):
        assert same < info_nce_loss(z, z + much * noise, .1).item()
    order = torch.randperm(400)
    want = info_nce_loss(z, z + 1, .5).item()
    assert info_nce_loss(z[order], (z + 1)[order], .5).item() == pytest.approx(want, abs=1e-5)
    assert info_nce_loss(3 * z, .2 * z, .1).item() == pytest.approx(same, abs=1e-5)     # no lengths


def test_barlow_equals_the_loop():
    scale = [1, 5, .1, 20]
    shift = [3, -50, 0, 7]
    u_a, u_b = np.random.default_rng(1).normal(size=(2, 12, 4)) * scale + shift
    got = barlow_twins_loss(torch.tensor(u_a), torch.tensor(u_b), 5e-3).item()
    assert got == pytest.approx(barlow_oracle(u_a, u_b, 5e-3), rel=1e-4)


def test_barlow_by_hand():
    # P = 4, two channels, uncorrelated and standardised: C = identity for identical views, loss 0
    u = torch.tensor([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
    assert barlow_twins_loss(u, u, 1.).item() == pytest.approx(0, abs=1e-6)
    # the second channel a copy of the first: C is all ones, two entries off the diagonal
    copied = u[:, [0, 0]]
    assert barlow_twins_loss(copied, copied, .005).item() == pytest.approx(2 * .005, abs=1e-6)
    # the second view's channels exchanged: diagonal 0, off-diagonal 1
    want = 2 + 2 * .005
    assert barlow_twins_loss(u, u.flip(1), .005).item() == pytest.approx(want, abs=1e-6)
    # one sign turned: C[0,0] = -1
    turned = u * torch.tensor([-1., 1.])
    assert barlow_twins_loss(u, turned, .005).item() == pytest.approx(4, abs=1e-6)


def test_barlow_does_not_see_the_scale_of_a_channel():
    torch.manual_seed(0)
    u_a, u_b = torch.randn(2, 500, 6)
    want = barlow_twins_loss(u_a, u_b, .01).item()
    assert want == pytest.approx(6, abs=1)                         # unrelated: about d
    scale = torch.tensor([1., 3., .2, 10., 5., 1.])
    shift = torch.tensor([0., 5., -2., 30., 1., 1.])
    got = barlow_twins_loss(u_a * scale + shift, u_b * scale.flip(0) - shift, .01).item()
    assert got == pytest.approx(want, rel=1e-3)
    # diagonal 1 for identical views
    assert barlow_twins_loss(u_a, u_a, 0.).item() == pytest.approx(0, abs=1e-6)


def nce(a, b):
    return info_nce_loss(a, b, .1)


def barlow(a, b):
    return barlow_twins_loss(a, b, 5e-3)


@pytest.mark.parametrize("loss", [nce, barlow])
def test_gradients_under_autocast(loss):
    """The losses stay float32 where the network is bfloat16, and so do their gradients."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 16)
    grads = []
    for on in (False, True):
        x = a.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            value = loss(x, b)
        assert value.dtype == torch.float32
        value.backward()
        grads.append(x.grad)
    assert grads[0].isfinite().all()
    assert grads[0].abs().max() > 0
    assert torch.allclose(*grads, atol=1e-6)
    x = (a * 1e-4).bfloat16().requires_grad_()
    loss(x, x.detach()).backward()
    assert x.grad.isfinite().all()


def test_found_partners():
    torch.manual_seed(0)
    z = torch.randn(300, 16)
    other = torch.randn(300, 16)
    assert found_partners(z, 2 * z + .01 * other) == 1
    assert found_partners(z, other) < .05
    equal = torch.ones(300, 16)
    assert found_partners(equal, equal) == pytest.approx(1 / 300)


def test_effective_rank():
    torch.manual_seed(0)
    z = torch.randn(300, 16)
    assert effective_rank(z) > 15
    assert effective_rank(torch.ones(300, 16)) <= 1.01
    line = torch.randn(300, 1) * torch.ones(1, 16)
    assert effective_rank(line) == pytest.approx(1, abs=.01)
    want = effective_rank(z)
    assert effective_rank(z + 50) == pytest.approx(want, abs=.01)  # about the mean
    square = torch.tensor([[1., 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(square) == pytest.approx(2, abs=1e-3)    # two equal singular values


# ------------------------------------------------------------------------------ phi, t, and pixels


def quarter_turn(size):
    """The grid of phi = a rotation by 90 degrees of one image."""
    theta = torch.tensor([[[0., -1, 0], [1, 0, 0]]])
    return F.affine_grid(theta, (1, 1, size, size), align_corners=False)


def pointwise(x):
    """A map of single pixels: [B, 3, S, S] -> [B, 3, S, S]."""
    return torch.stack([x.prod(1), x[:, 0].exp() - x[:, 1], (7 * x[:, 2]).sin()], 1)


def test_moving_features_is_moving_the_image():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    turn = quarter_turn(8)
    turned = common.warp(x, turn)
    ways = [x.rot90(1, (2, 3)), x.rot90(-1, (2, 3))]
    assert any(torch.allclose(turned, way, atol=1e-6) for way in ways)
    # a pointwise f: exact for a turn by 90 degrees
    assert torch.allclose(common.warp(pointwise(x), turn), pointwise(turned), atol=1e-5)
    # a linear f: exact for any phi
    linear = torch.nn.Conv2d(3, 4, 1, bias=False)
    grid, _ = random_affine(1, 8, 1.5, (.4, .9), CPU)
    assert torch.allclose(common.warp(linear(x), grid), linear(common.warp(x, grid)), atol=1e-6)


@torch.no_grad()
def test_a_real_network_turned():
    """A U-Net whose kernels are made symmetric commutes with rotations by 90 degrees."""
    torch.manual_seed(0)
    f = pix2rep.Backbone(1, width=4, depth=2, dim=8)               # with batch statistics
    for m in f.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            m.weight.copy_(sum(m.weight.rot90(k, (2, 3)) for k in range(4)) / 4)
    x = torch.rand(1, 1, 16, 16)
    turn = quarter_turn(16)
    before = f(x)
    after = f(common.warp(x, turn))
    moved = common.warp(before, turn)
    assert torch.allclose(moved, after, atol=1e-3)
    assert moved.std(dim=(2, 3)).max() > .1
    every = torch.ones(1, 16, 16, dtype=torch.bool)
    a, b = pixel_pairs(before, after, turn, every, 64)             # sampled pixels as well
    assert torch.allclose(a, b, atol=1e-3)
    a, b = pixel_pairs(before, after, turn.flip(-1), every, 64)    # x and y exchanged
    assert not torch.allclose(a, b, atol=.1)


@pytest.mark.parametrize("rotation, scale", [(math.pi / 2, (.33, .95)), (math.pi, (.9, 1.)),
                                             (0., (1., 1.))])
def test_no_pixel_from_outside_the_image(rotation, scale):
    torch.manual_seed(0)
    grid, valid = random_affine(64, 16, rotation, scale, CPU)
    ones = torch.ones(64, 1, 16, 16)
    inside = common.warp(ones, grid)[:, 0]                         # below 1 where 0 flows in
    assert (inside[valid] > 1 - 1e-5).all()
    assert valid.flatten(1).any(1).all()                           # every image has valid pixels
    place = torch.rand(64, 2, 16, 16)
    f_a = torch.cat([place, ones], 1)
    f_b = torch.cat([place, valid[:, None].float()], 1)
    for n in (128, None):
        a, b = pixel_pairs(f_a, f_b, grid, valid, n)
        assert (a[:, 2] > 1 - 1e-5).all()
        assert (b[:, 2] == 1).all()
        assert len(a) == (n or valid.sum())


def test_the_mask_is_not_too_strict():
    torch.manual_seed(0)
    _, valid = random_affine(64, 16, 0., (1., 1.), CPU)
    assert valid.all()                                             # the identity loses nothing
    _, valid = random_affine(64, 16, math.pi, (.9, 1.), CPU)
    assert .5 < valid.float().mean() < 1                           # and rotation some


def test_sampled_pixels_are_those_of_the_whole_map():
    """The n sampled pairs are among those of all valid pixels of the batch, none of them twice."""
    torch.manual_seed(0)
    f_a, f_b = torch.randn(2, 4, 6, 8, 8)
    grid, valid = random_affine(4, 8, 1., (.5, 1.), CPU)
    a, b = pixel_pairs(f_a, f_b, grid, valid, 40)
    every_a, every_b = pixel_pairs(f_a, f_b, grid, valid)
    assert a.shape == b.shape == (40, 6)
    assert len(every_a) == valid.sum()
    sampled = torch.cat([a, b], 1)                                 # [40, 12]
    every = torch.cat([every_a, every_b], 1)                       # [P, 12]
    near = (sampled[:, None] - every).norm(dim=2).min(1)
    assert near.values.max() < 1e-4
    assert len(near.indices.unique()) == 40                        # without replacement
    image = torch.arange(4)[:, None, None].expand(4, 8, 8)[valid]
    assert len(image[near.indices].unique()) == 4                  # of every image
    a, _ = pixel_pairs(f_a, f_b, grid, valid, 4 * 8 * 8)           # more than there are: all
    assert len(a) == valid.sum()


def test_the_crop_lies_inside_and_turns_and_flips():
    torch.manual_seed(0)
    grid, valid = random_affine(500, 16, 0., (.33, .95), CPU)
    assert grid.abs().max() <= 1
    assert valid.float().mean() > .9                               # but half a pixel at the border
    side = (grid[:, 0, 0] - grid[:, -1, -1]).abs() / (2 - 2 / 16)  # [500, 2]
    assert .33 <= side.min()
    assert side.max() <= .95
    assert side.std() > .1
    right = grid[:, 0, -1, 0] > grid[:, 0, 0, 0]
    down = grid[:, -1, 0, 1] > grid[:, 0, 0, 1]
    for share in (right, down, right == down):                     # and the flips are independent
        assert .4 < share.float().mean() < .6


def test_a_turned_crop_is_a_square_of_its_angle():
    torch.manual_seed(0)
    grid, _ = random_affine(500, 16, 1., (.5, .9), CPU)
    along = grid[:, 0, -1] - grid[:, 0, 0]                         # [500, 2]: (x, y) of a row
    across = grid[:, -1, 0] - grid[:, 0, 0]
    assert torch.allclose((along * across).sum(1), torch.zeros(500), atol=1e-5)
    assert torch.allclose(along.norm(dim=1), across.norm(dim=1), atol=1e-5)
    angle = torch.atan(along[:, 1] / along[:, 0])                  # whatever is flipped
    assert angle.abs().max() < 1 + 1e-5
    assert angle.min() < -.9
    assert angle.max() > .9


def test_inversion():
    torch.manual_seed(0)
    x = torch.rand(50, 1, 16, 16)
    t = pix2rep.random_intensity(x, 1.)
    both = torch.stack([x.flatten(), t.flatten()])
    assert torch.corrcoef(both)[0, 1] < -.5
    torch.manual_seed(3)
    t = pix2rep.random_intensity(x, 0.)
    torch.manual_seed(3)
    assert torch.equal(t, common.photometric(x))


# ------------------------------------------------------------------------- probing, Mean Teacher


@pytest.fixture
def begun(finished, phantom, tmp_path):
    """begun(words ...) -> a `Run` of the tiny phantom with these options, ready to train."""
    cache = finished("pix2rep")[1] / "cache"
    runs = []

    def of(*words):
        out = tmp_path / f"run{len(runs)}"
        _, run_ = started("pix2rep", "--data", phantom, "--cache", cache, "--out", out, *words)
        runs.append(run_)
        return run_
    return of


def start_of(f):
    """What pretrained.pt would hold of a backbone f."""
    return {"unet": f.unet.state_dict(), "parts": ["encoder", "decoder"],
            "widen": f.widen.state_dict()}


def test_linear_probing_leaves_the_backbone(begun):
    run_ = begun()
    torch.manual_seed(5)
    f = pix2rep.load_backbone(run_)
    f(torch.rand(8, 1, 32, 32))                                    # running statistics of its own
    want = {k: v.clone() for k, v in f.state_dict().items() if not k.startswith("unet.head")}
    net = pix2rep.linear_probe(run_, Row("probe", 1, 0), start_of(f))
    got = net[0].state_dict()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert not net[0].training
    torch.manual_seed(0)                                           # the head as it was drawn
    pix2rep.load_backbone(run_)
    head = torch.nn.Conv2d(run_.o.dim, 4, 1)
    assert not torch.equal(net[1].weight, head.weight)             # has learnt


def test_a_random_backbone_has_statistics_of_training_slices(begun):
    run_ = begun()
    net = pix2rep.linear_probe(run_, Row("random-probe", 1, 0))
    torch.manual_seed(0)
    want = pix2rep.load_backbone(run_).state_dict()
    moved = 0
    for name, value in net[0].state_dict().items():
        if name.endswith("running_mean"):
            moved += value.abs().max() > 0
        elif name.endswith("weight") or name.endswith("bias"):
            assert torch.equal(value, want[name]), name            # random, and frozen
        elif name.endswith("num_batches_tracked"):
            assert value == 20
    assert moved > 0


def test_a_random_backbone_is_scored_with_the_statistics_it_would_have(begun):
    """Scored with running statistics its maps spread as with those of a batch.

    A running mean with momentum 0.1 would keep 0.9^20 = 12 % of where it starts in every layer, and
    the deeper the flatter (0.04 instead of 0.6 on ACDC).
    """
    run_ = begun()
    f = pix2rep.load_backbone(run_)
    pix2rep.set_statistics(run_, f)
    normalisations = [m for m in f.modules() if hasattr(m, "momentum")]
    assert isinstance(normalisations[-1], torch.nn.BatchNorm1d)    # that of `widen`
    for module in normalisations:
        assert module.momentum is None                             # a mean, nothing of the start
        assert module.num_batches_tracked == 20
    images = pix2rep.photometric(run_.dataset.image(run_.train, "cpu"))
    scored = f.eval()(images).std((0, 2, 3)).mean()
    batch = f.train()(images).std((0, 2, 3)).mean()
    assert .75 < (scored / batch).item() < 1.3


def test_pretraining_trains_every_part(begun):
    run_ = begun("--pretrain-steps", 1)
    torch.manual_seed(1000)
    before = pix2rep.load_backbone(run_)                           # as pre-training starts
    start = pix2rep.pretrain(run_)
    for name, value in before.unet.named_parameters():
        if value.ndim == 4:
            assert torch.equal(start["unet"][name], value) == name.startswith("head"), name
    assert not torch.equal(start["widen"]["0.weight"], before.widen[0].weight)
    drawn = pix2rep.projector(run_.o).state_dict()                 # drawn after the backbone
    assert not torch.equal(start["projector"]["0.weight"], drawn["0.weight"])


def test_rate_of_pretraining(begun, monkeypatch):
    """5 % warm-up, cosine."""
    run_ = begun("--pretrain-lr", 2, "--pretrain-steps", 40)
    seen = noted_rates(monkeypatch)
    pix2rep.pretrain(run_)
    cosine = [1 + math.cos(math.pi * t / 40) for t in range(40)]
    cosine[0] *= .5
    assert seen == [[pytest.approx(rate)] for rate in cosine]


def test_both_views_come_to_the_same_pixels(begun, monkeypatch):
    """With the image itself for features, and no change of intensities, partners are equal."""
    run_ = begun("--pretrain-steps", 1)
    pairs = pix2rep.pixel_pairs
    seen = []

    def image_as_map(f, t_x, phi_t_x, one_pass):
        return t_x.expand(-1, run_.o.width, -1, -1), phi_t_x.expand(-1, run_.o.width, -1, -1)

    def noted(*arguments):
        seen.append(pairs(*arguments))
        return seen[-1]

    def unchanged(x, inversion):
        return x

    monkeypatch.setattr(pix2rep, "two_maps", image_as_map)
    monkeypatch.setattr(pix2rep, "pixel_pairs", noted)
    monkeypatch.setattr(pix2rep, "random_intensity", unchanged)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)       # maps have no weights
    pix2rep.pretrain(run_)
    a, b = seen[0]
    assert torch.allclose(a, b, atol=1e-5)
    assert a.std() > .05


def test_student_and_teacher_see_one_slice_and_intensities_of_their_own(begun, monkeypatch):
    run_ = begun()
    seen = []

    def brighter(x):
        return x + 1

    def net(x):
        seen.append(x)
        return x.expand(-1, 4, -1, -1)

    monkeypatch.setattr(pix2rep, "photometric", brighter)
    pix2rep.on_unlabelled(run_, net, net, 3)
    teacher, student = seen
    assert torch.equal(student, teacher + 1)


def test_the_teacher_begins_as_a_mean_of_all_so_far(begun, monkeypatch):
    run_ = begun("--mean-teacher", "--teacher-alpha", .8)
    alphas = []

    def noted(teacher, student, alpha):
        alphas.append(alpha)

    monkeypatch.setattr(pix2rep, "update_teacher", noted)
    pix2rep.finetune(run_, Row("scratch-mt", 1, 0))
    assert alphas == pytest.approx([min(.8, 1 - 1 / (t + 1)) for t in range(12)])


def test_pretrained_weights_reach_the_fine_tuned_network(begun):
    run_ = begun("--pretrained-lr", 0, "--head-lr", 0, "--lr", 0)
    torch.manual_seed(5)
    start = start_of(pix2rep.load_backbone(run_))
    tuned = pix2rep.finetune(run_, Row("pix2rep", 1, 0), start)
    scratch = pix2rep.finetune(run_, Row("scratch", 1, 0))
    for (name, value), fresh in zip(tuned.named_parameters(), scratch.parameters()):
        if name.startswith("head"):
            assert torch.equal(value, fresh), name
        else:
            assert torch.equal(value, start["unet"][name]), name
            assert value.ndim < 4 or not torch.equal(value, fresh), name


@pytest.mark.parametrize("still, moves", [("--pretrained-lr", "head"), ("--head-lr", "encoder")])
def test_backbone_and_head_have_rates_of_their_own(still, moves, begun):
    run_ = begun(still, 0)
    torch.manual_seed(5)
    start = start_of(pix2rep.load_backbone(run_))
    torch.manual_seed(0)
    drawn = run_.unet().state_dict()
    tuned = pix2rep.finetune(run_, Row("pix2rep", 1, 0), start)
    for name, value in tuned.named_parameters():
        if value.ndim == 4:
            first = drawn[name] if name.startswith("head") else start["unet"][name]
            moved = not torch.equal(value, first)
            assert moved == (name.startswith("head") == (moves == "head")), name


def test_the_teacher_is_the_moving_average():
    torch.manual_seed(0)
    student = common.UNet(1, 4, 4)
    teacher = common.UNet(1, 4, 4)
    old = {k: v.double().clone() for k, v in teacher.state_dict().items()}
    student(torch.rand(4, 1, 32, 32))
    new = student.state_dict()
    pix2rep.update_teacher(teacher, student, .9)
    for name, value in teacher.state_dict().items():
        want = new[name].double()
        if value.is_floating_point():
            want = .9 * old[name] + .1 * want
        assert torch.allclose(value.double(), want, atol=1e-6), name
    pix2rep.update_teacher(teacher, student, 0.)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, new[name]), name


def test_mean_teacher_by_hand():
    logits = torch.tensor([[[[0.]], [[math.log(3.)]]]])            # probabilities 1/4, 3/4
    half = torch.tensor([[[[.5]], [[.5]]]])
    assert pix2rep.consistency_loss(logits, half).item() == pytest.approx(2 * .25 ** 2)
    assert pix2rep.consistency_loss(logits, logits.softmax(1)).item() == 0
    assert pix2rep.ramp(0, 10) == pytest.approx(math.exp(-5))
    assert pix2rep.ramp(5, 10) == pytest.approx(math.exp(-1.25))
    assert pix2rep.ramp(10, 10) == pix2rep.ramp(25, 10) == 1


def test_unlabelled_slices_count_for_the_teacher_only(begun):
    run_ = begun()
    weights = {}
    for method in ("scratch", "scratch-mt"):
        for name, unlabelled in (("one", np.arange(10, 20)), ("again", np.arange(10, 20)),
                                 ("other", np.arange(20, 30))):
            run_.train = unlabelled
            net = pix2rep.finetune(run_, Row(method, 1, 0))
            weights[method, name] = net.encoder.blocks[0][0].weight
    assert torch.equal(weights["scratch-mt", "one"], weights["scratch-mt", "again"])
    assert not torch.equal(weights["scratch-mt", "one"], weights["scratch-mt", "other"])
    assert torch.equal(weights["scratch", "one"], weights["scratch", "other"])


def test_a_teacher_is_kept_only_where_there_is_one(begun):
    """A row's file has the student, and with Mean Teacher the teacher as well, who is frozen."""
    run_ = begun()
    nets = {}
    for method, modules in (("scratch", 1), ("scratch-mt", 2)):
        nets[method] = pix2rep.finetune(run_, Row(method, 1, 0))
        state = common.load_checkpoint(run_.out / f"finetuning_{method}_n1_s0.pt")
        assert len(state["modules"]) == modules
    assert all(p.requires_grad for p in nets["scratch"].parameters())
    assert not any(p.requires_grad for p in nets["scratch-mt"].parameters())
    teacher = nets["scratch-mt"].state_dict()
    for name, value in state["modules"][1].items():
        assert torch.equal(value, teacher[name]), name


@pytest.mark.parametrize("method", ["random-probe", "scratch-mt"])
def test_a_probe_and_a_teacher_go_on_in_the_middle(method, begun, monkeypatch):
    """Interrupted at step 2 of 4 and resumed: the weights of the undisturbed training."""
    run_ = begun("--steps", 4, "--probe-steps", 4, "--save-every", 2)
    row = Row(method, 1, 0)
    train = pix2rep.linear_probe if method.endswith("probe") else pix2rep.finetune
    whole = train(run_, row)
    save = common.save_checkpoint

    def save_and_stop(path, **content):
        save(path, **content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", save_and_stop)
        train(run_, row)
    assert common.load_checkpoint(run_.out / f"finetuning_{row.name}.pt")["step"] == 2
    run_.o.resume = True
    assert same_weights(train(run_, row).state_dict(), whole.state_dict())


def same_weights(a, b):
    """Whether two state dicts are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------ few-shot and saved annotation


def test_few_shot_takes_every_group_equally():
    patients = [f"p{n:02}" for n in range(20)]
    group = {p: "ABCDE"[n // 4] for n, p in enumerate(patients)}
    cases = [data.Case(f"{p}_0", p, [], None, group[p]) for p in patients]
    assert few_shot(cases, patients, 3) == patients[:3]
    assert few_shot(cases, patients, 7) == patients[:7]
    for n in (5, 10, 20):
        got = few_shot(cases, patients, n)
        assert len(set(got)) == n
        for g in "ABCDE":
            assert [group[p] for p in got].count(g) == n // 5
    assert few_shot(cases, patients, 5) == ["p00", "p04", "p08", "p12", "p16"]
    unknown = [data.Case(f"{p}_0", p, [], None, "") for p in patients]
    assert few_shot(unknown, patients, 5) == patients[:5]
    cases[0] = data.Case("p00_0", "p00", [], None, "")             # of one nobody knows the group
    assert few_shot(cases, patients, 5) == patients[:5]


@pytest.mark.skipif(not (SHARED / "acdc").is_dir(), reason="real scans are not on this machine")
def test_acdc_few_shot_by_group():
    cases = data.find_cases(SHARED / "acdc")
    order = data.split_patients(cases)["labelled"]
    group = {c.patient: c.group for c in cases}
    assert few_shot(cases, order, 7) == order[:7]
    assert few_shot(cases, order, 1) == ["patient099"]
    ten = sorted(group[p] for p in few_shot(cases, order, 10))
    assert ten == sorted(2 * ["DCM", "HCM", "MINF", "NOR", "RV"])


def test_labels_needed():
    summary = []
    for method, n, dice in (("scratch", 16, .8), ("scratch", 1, .5), ("scratch", 4, .7),
                            ("pix2rep", 1, .7)):
        summary.append({"method": method, "labelled": n, "mean_dice": {"mean": dice}})
    assert labels_needed(summary, .7) == pytest.approx(4)
    assert labels_needed(summary, .6) == pytest.approx(2)
    assert labels_needed(summary, .75) == pytest.approx(8)
    assert labels_needed(summary, .4) == 1
    assert labels_needed(summary, .9) == math.inf


# --------------------------------------------------------------------------- the paper's numbers


def paper_options(*words):
    return common.parse_options("pix2rep", "", pix2rep.OPTIONS, ["--data", "x", "--paper", *words])


def test_the_papers_configuration():
    o = paper_options()
    got = (o.width, o.depth, o.dim, o.projection, o.size, o.pixels, o.temperature, o.pretrained_lr)
    assert got == (64, 5, 1024, 256, 128, 1000, .53, 5e-5)
    assert (o.batch, o.pretrain_batch) == (16, 8)
    assert paper_options("--temperature", ".1").temperature == .1  # what is typed wins
    f = pix2rep.Backbone(1, 4, o.depth, 32).eval()
    assert f(torch.rand(1, 1, 64, 64)).shape == (1, 32, 64, 64)
    assert len(f.unet.encoder.blocks) == 6


def test_paper_with_barlow_has_the_rate_of_v2(begun, capsys):
    small = ["--paper", "--size", 64]
    assert begun(*small).o.pretrain_lr == 4.7e-4
    assert begun(*small, "--loss", "barlow").o.pretrain_lr == 5e-4
    assert "5e-4, the rate of v2" in capsys.readouterr().out
    typed = begun(*small, "--loss", "barlow", "--pretrain-lr", 1e-2)
    assert typed.o.pretrain_lr == 1e-2


# ------------------------------------------------------------------------------------- the script

METHODS = ["scratch", "random-probe", "probe", "pix2rep", "scratch-mt", "pix2rep-mt"]


def per_volume(folder):
    """The lines of per_volume.csv as dicts."""
    return list(csv.DictReader((folder / "per_volume.csv").open()))


@pytest.fixture(scope="module")
def taught(finished, phantom):
    """The finished tiny run, to which --resume has added Mean Teacher: (folder, work, printed)."""
    out, work, _ = finished("pix2rep")
    shutil.copytree(out, work / "taught")
    words = ["--data", phantom, *options("pix2rep"), "--labelled", 1, 2, "--seeds", 0, 1]
    done = run_here("pix2rep", *words, "--resume", "--mean-teacher", "--out", "taught", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "taught", work, done.stdout


@pytest.fixture(scope="module")
def barlow_run(taught, phantom):
    """Another loss, and the rows of one seed trained anew: its folder."""
    work = taught[1]
    done = run_here("pix2rep", "--data", phantom, *options("pix2rep"), "--loss", "barlow",
                    "--mean-teacher", "--out", "barlow", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "barlow"


def test_what_pix2rep_writes(taught):
    out, _, printed = taught
    figures = {f.name for f in (out / "figures").iterdir()}
    assert figures == {"dice.png", "overlays.png", "similarity.png", "embeddings.png",
                       "annotation_saved.png"}
    assert "annotation saved: pix2rep with 1" in printed
    log = common.read_log(out)
    first = next(r for r in log if r["phase"] == "pretrain")
    assert first["chance"] == pytest.approx(math.log(2 * 64 - 1))  # 64 pixels: ln(2n - 1)
    assert first["found_chance"] == 1 / 64
    assert {"loss", "found", "rank", "step"} <= set(first)
    first = next(r for r in log if r["phase"] == "probe_n1_s0")
    assert first["cross_entropy_chance"] == pytest.approx(math.log(4))


def test_pretrained_weights_start_a_plain_unet(finished):
    start = common.load_checkpoint(finished("pix2rep")[0] / "pretrained.pt", "pix2rep")
    assert start["parts"] == ["encoder", "decoder"]
    taken, fresh = common.load_weights(common.UNet(1, 4, 4), start["unet"], start["parts"])
    assert fresh == ["head.bias", "head.weight"]
    assert "widen.0.weight" not in taken
    assert start["widen"]["0.weight"].shape == (8, 4)              # D, width


def test_resume_adds_mean_teacher(taught, finished, barlow_run):
    out, _, printed = taught
    before = finished("pix2rep")[0]
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    got = [(r["labelled"], r["seed"], r["method"]) for r in rows]
    assert got == [(n, s, m) for n in (1, 2) for s in (0, 1) for m in METHODS]
    assert "| 2 | pix2rep-mt |" in printed
    old = [t for t in per_volume(out) if not t["method"].endswith("-mt")]
    assert old == per_volume(before)
    for file in before.glob("*_n*.pt"):
        assert (out / file.name).read_bytes() == file.read_bytes() # read, not trained again
    log = common.read_log(out)
    for method in ("scratch-mt", "pix2rep-mt"):
        assert any("consistency" in r for r in log if r["phase"] == f"{method}_n1_s0")
    assert not any("consistency" in r for r in log if r["phase"] == "pix2rep_n1_s0")


def trained(folder, method):
    """The weights of a row with one patient and seed 0; the Dice of tiny runs is too coarse."""
    return common.load_checkpoint(folder / f"{method}_n1_s0.pt", "pix2rep")["unet"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_pretraining_do_not_depend_on_it(method, taught, barlow_run):
    same = same_weights(trained(taught[0], method), trained(barlow_run, method))
    assert same == (method in pix2rep.BASELINES)


def test_the_log_of_barlow(barlow_run):
    first = common.read_log(barlow_run)[0]
    assert first["chance"] == 8                                    # unrelated views give d
    assert "rank" in first


def test_scratch_reads_all_rows_without_pretraining(taught, barlow_run, phantom):
    out, work, _ = taught
    words = ["--data", phantom, *options("pix2rep"), "--loss", "barlow", "--mean-teacher"]
    done = run_here("pix2rep", *words, "--scratch", "taught", "--out", "read", cwd=work)
    assert done.returncode == 0, done.stderr
    made = {f.name for f in (work / "read").glob("*_n1_s0.pt")}
    assert made == {"probe_n1_s0.pt", "pix2rep_n1_s0.pt", "pix2rep-mt_n1_s0.pt"}
    for method in pix2rep.PRETRAINED:
        assert same_weights(trained(work / "read", method), trained(barlow_run, method))
    assert per_volume(work / "read") == per_volume(barlow_run)
    assert not (work / "read/figures/annotation_saved.png").exists()       # one number of patients
    words += ["--scratch", "taught", "--out", "refused"]
    refused(run_here("pix2rep", *words, "--lr", .03, cwd=work), "scratch_n1_s0.pt", "lr =")
    refused(run_here("pix2rep", *words, "--dim", 16, cwd=work), "random-probe_n1_s0.pt", "dim =")
    refused(run_here("pix2rep", *words, "--teacher-weight", 1, cwd=work), "scratch-mt_n1_s0.pt",
            "teacher_weight =")


def test_scratch_of_another_script(finished, phantom):
    """The row scratch of sal.py is read, and the random backbone, which it has not, is trained."""
    out, work, _ = finished("sal")
    words = ["--data", phantom, *options("pix2rep"), "--scratch", out]
    done = run_here("pix2rep", *words, "--out", "sals", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "sals/scratch_n1_s0.pt").exists()
    own = finished("pix2rep")[0]
    assert same_weights(trained(work / "sals", "random-probe"), trained(own, "random-probe"))
    want = [t for t in per_volume(out) if t["method"] == "scratch"]
    want = [t for t in want if (t["labelled"], t["seed"]) == ("1", "0")]
    assert [t for t in per_volume(work / "sals") if t["method"] == "scratch"] == want
    refused(run_here("pix2rep", *words, "--depth", 3, "--out", "shallow", cwd=work), "depth =")


def test_init_skips_pretraining(finished, phantom):
    out, work, _ = finished("pix2rep")
    words = ["--data", phantom, *options("pix2rep")]
    done = run_here("pix2rep", *words, "--init", out / "pretrained.pt", "--out", "init", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "init/pretrained.pt").exists()
    for method in ("scratch", "random-probe", "probe", "pix2rep"):
        assert same_weights(trained(work / "init", method), trained(out, method))


def test_each_view_has_batch_statistics_of_its_own(begun):
    f = pix2rep.load_backbone(begun())
    x, y = torch.rand(2, 3, 1, 32, 32)
    own, _ = pix2rep.two_maps(f, x, y, False)
    beside, _ = pix2rep.two_maps(f, x, 5 * y, False)
    assert torch.equal(own, beside)
    shared, _ = pix2rep.two_maps(f, x, 5 * y, True)
    assert not torch.allclose(own, shared)


@pytest.mark.parametrize("flags", [
    ["--loss", "barlow", "--precision", "bfloat16"],
    ["--depth", 3, "--inversion", .5, "--crop", .33, .95, "--one-pass"],
])
def test_options(flags, finished, phantom):
    _, work, _ = finished("pix2rep")
    words = ["--data", phantom, *options("pix2rep"), *flags, "--labelled", 2]
    done = run_here("pix2rep", *words, "--out", f"o{flags[1]}", cwd=work)
    assert done.returncode == 0, done.stderr
    made = json.loads((work / f"o{flags[1]}/options.json").read_text())
    assert made[flags[0].strip("-")] == flags[1]
    assert "| 2 | probe |" in done.stdout


@pytest.mark.parametrize("method", ["random-probe", "pix2rep-mt"])
def test_predict_with_a_probe_and_a_teacher(method, taught, begun, phantom, tmp_path):
    """--predict gives the label map of the checkpoint, here with a head drawn at random."""
    content = common.load_checkpoint(taught[0] / f"{method}_n2_s0.pt")
    torch.manual_seed(0)
    for name in {"1.weight", "head.weight"} & content["unet"].keys():
        content["unet"][name].normal_()                            # else all is background
    common.save_checkpoint(tmp_path / "net.pt", **content)
    run_ = begun()
    case = run_.cases[0].name
    done = run_here("pix2rep", "--predict", phantom / f"imagesTr/{case}.nii.gz",
                    "--checkpoint", tmp_path / "net.pt", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    pred = np.asarray(nib.load(tmp_path / f"predictions/{case}.nii.gz").dataobj)
    info = run_.dataset.info["cases"][0]
    assert info["name"] == case
    images = run_.dataset.image(np.arange(info["shape"][0]))
    want = common.predict(pix2rep.build(content), images, info["shape"], info["spacing"],
                          run_.o.spacing)
    got = np.bincount(pred.ravel(), minlength=4)                   # voxels of each class
    want = want.flatten().bincount(minlength=4).numpy()
    assert (want > .01 * want.sum()).sum() >= 2
    assert abs(got - want).sum() < .02 * want.sum()


@pytest.mark.parametrize("method", METHODS)
def test_build_gives_back_the_network(method, begun):
    """From a row's checkpoint: the network that was scored."""
    run_ = begun()
    row = Row(method, 1, 0)
    train = pix2rep.linear_probe if method.endswith("probe") else pix2rep.finetune
    run_.begun = 0
    net = train(run_, row)
    run_.score(row, net)
    built = pix2rep.build(common.load_checkpoint(run_.out / f"{row.name}.pt")).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(built(x), net.eval()(x), atol=1e-5)
    assert same_weights(built.state_dict(), net.state_dict())


@pytest.mark.parametrize("flags, message", [
    (["--size", 48, "--depth", 5], "--size 48: use a multiple of 32"),
    (["--depth", 0], "--depth 0"),
    (["--loss", "simclr"], "--loss simclr: use infonce or barlow"),
    (["--temperature", 0], "--temperature 0.0"),
    (["--crop", .9, .3], "--crop 0.9 0.3"),
    (["--crop", .9], "--crop 0.9: "),
    (["--projection", 0], "--projection must be 1 or more"),
    (["--probe-steps", 0], "--probe-steps, .* must be 1 or more"),
    (["--mean-teacher", "--batch", 1], "--batch 1: --mean-teacher needs 2"),
])
def test_bad_options_of_pix2rep(flags, message, begun, tmp_path):
    with pytest.raises(common.DataError, match=message):
        begun(*flags)
    assert not list(tmp_path.iterdir())                            # nothing was begun


def test_bad_starts(finished, begun, phantom, tmp_path):
    out, work, _ = finished("pix2rep")
    own = out / "pretrained.pt"
    with pytest.raises(common.DataError, match="dim = 8, now 16"):
        begun("--init", own, "--dim", 16)
    assert not list(tmp_path.iterdir())
    words = ["--data", phantom, *options("pix2rep"), "--out", tmp_path / "o"]
    refused(run_here("pix2rep", *words, "--init", finished("sal")[0] / "pretrained.pt", cwd=work),
            "checkpoint of sal, not of pix2rep")
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------- figures


def test_queries_are_the_middle_of_each_class():
    label = torch.zeros(7, 9, dtype=torch.long)
    label[1:4, 1:4] = 1                                            # its centre is (2, 2)
    label[5, 2:7] = 3                                              # class 2 is absent
    assert pix2rep.chosen_queries(label, 9) == [(2, 2, 1), (5, 4, 3)]
    ring = torch.ones(5, 5, dtype=torch.long)
    ring[1:4, 1:4] = 0                                             # the centre is not of the class
    y, x, k = pix2rep.chosen_queries(ring, 5)[0]
    assert ring[y, x] == k == 1
    assert pix2rep.chosen_queries(torch.zeros(8, 8, dtype=torch.long), 8) == [(4, 4, 0)]


def test_the_plane_is_that_of_largest_variance():
    """Two channels vary, the third does not: the plane has the first two, largest first."""
    torch.manual_seed(0)
    maps = torch.zeros(2, 3, 8, 8)
    maps[:, 2] = 4 * torch.rand(2, 8, 8)
    maps[:, 0] = torch.rand(2, 8, 8)
    plane = pix2rep.principal_plane(maps)
    assert plane.shape == (2, 8, 8, 2)
    assert plane.min() == 0
    assert plane.max() == 1
    both = torch.stack([plane[..., 0].flatten(), maps[:, 2].flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) > .98
    both = torch.stack([plane[..., 1].flatten(), maps[:, 0].flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) > .98


def test_the_key_mixes_its_corners():
    corners = torch.tensor([[0., 0], [1, 0], [0, 1], [1, 1]])
    colours = pix2rep.plane_colours(corners)
    assert len(colours.unique(dim=0)) == 4
    middle = pix2rep.plane_colours(torch.tensor([[.5, .5]]))[0]
    assert torch.allclose(middle, colours.mean(0))
