"""MACL: losses against float64 loops and by hand, the two branches, what fine-tuning takes."""
import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noted_rates, options, refused, run_here, started

import common
import macl
import sal
from macl import dense_contrastive_loss, equivariant_loss, global_contrastive_loss


def contrast_oracle(z_a, z_b, position, t, tau):
    """Eq. (9), the mean over the anchors, vector by vector in float64."""
    z = []
    for v in np.concatenate([z_a, z_b]).astype(np.float64):
        z.append(v / math.sqrt(sum(x * x for x in v)))
    pos = [*position, *position]
    n = 2 * len(z_a)

    def sim(i, k):
        return sum(x * y for x, y in zip(z[i], z[k])) / tau

    total = 0.
    for i in range(n):
        omega = [j for j in range(n) if j != i and abs(pos[i] - pos[j]) < t]
        denominator = sum(math.exp(sim(i, k)) for k in range(n) if k != i)
        terms = [math.log(math.exp(sim(i, j)) / denominator) for j in omega]
        total -= sum(terms) / len(omega)
    return total / n


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("t", [.05, .35, 1.])
def test_global_equals_the_loop(t):
    rng = np.random.default_rng(0)
    z_a, z_b = rng.normal(size=(2, 6, 5)) * 3
    position = rng.random(6)
    got = global_contrastive_loss(*map(torch.tensor, (z_a, z_b, position)), t, .1)
    assert got.item() == pytest.approx(contrast_oracle(z_a, z_b, position, t, .1), rel=1e-5)


@pytest.mark.parametrize("t", [.05, .35])
def test_dense_equals_the_loop_over_pixels(t):
    rng = np.random.default_rng(1)
    z_a, z_b = rng.normal(size=(2, 4, 5, 2, 3))
    position = rng.random(4)
    a, b, p = map(torch.tensor, (z_a, z_b, position))
    oracle = []
    loop = []
    for y in range(2):
        for x in range(3):
            oracle.append(contrast_oracle(z_a[:, :, y, x], z_b[:, :, y, x], position, t, .1))
            pixel = global_contrastive_loss(a[:, :, y, x], b[:, :, y, x], p, t, .1)
            loop.append(pixel.item())
    got = dense_contrastive_loss(a, b, p, t, .1).item()
    assert got == pytest.approx(np.mean(oracle), rel=1e-5)
    assert got == pytest.approx(np.mean(loop), rel=1e-6)


def test_contrast_by_hand():
    # N = 2, tau = 1, z_1 = z~_1 = (1,0), z_2 = z~_2 = (0,1):
    # similarities 1 to the own other branch, 0 to the two others
    z = torch.eye(2)
    log_sum = math.log(math.e + 2)
    far = torch.tensor([.1, .9])                                   # Omega+: the own other branch
    near = torch.tensor([.5, .5])                                  # Omega+: all three
    of_far = global_contrastive_loss(z, z, far, .35, 1.)
    of_near = global_contrastive_loss(z, z, near, .35, 1.)
    assert of_far.item() == pytest.approx(log_sum - 1, abs=1e-6)
    assert of_near.item() == pytest.approx(log_sum - 1 / 3, abs=1e-6)
    maps = z[:, :, None, None].expand(2, 2, 3, 3)
    dense = dense_contrastive_loss(maps, maps, far, .35, 1.)
    assert dense.item() == pytest.approx(log_sum - 1, abs=1e-6)
    # one pixel of nine where the branches are exchanged: own other branch 0, one other 1, one 0
    swapped = maps.clone()
    swapped[:, :, 1, 1] = z.flip(0)
    dense = dense_contrastive_loss(maps, swapped, far, .35, 1.)
    assert dense.item() == pytest.approx(log_sum - 8 / 9, abs=1e-6)


def test_chance_level_and_invariants():
    torch.manual_seed(0)
    one = torch.ones(5, 4)
    p = torch.rand(5)
    collapsed = global_contrastive_loss(one, one, p, .35, .1)
    assert collapsed.item() == pytest.approx(math.log(9), abs=1e-5)        # collapse is chance
    a, b = torch.randn(2, 5, 4, 2, 2)
    order = torch.randperm(5)

    def loss(a, b, p=p):
        return dense_contrastive_loss(a, b, p, .35, .1).item()

    want = loss(a, b)
    assert loss(a[order], b[order], p[order]) == pytest.approx(want, abs=1e-5)     # batch order
    assert loss(3 * a, .1 * b) == pytest.approx(want, abs=1e-5)            # length of vectors
    assert loss(b, a) == pytest.approx(want, abs=1e-5)                     # branches exchanged
    assert loss(a.flip(2), b.flip(2)) == pytest.approx(want, abs=1e-5)     # both maps moved
    assert abs(loss(a.flip(2), b) - want) > 1e-3                           # one: other pixels meet


def test_positives_by_position():
    three = torch.tensor([.25, .5, 1.])
    want = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(3):
        want[i, i + 3] = True
        want[i + 3, i] = True
    assert torch.equal(macl.positive_pairs(three, .24), want)
    assert macl.positive_pairs(three, .25).sum() == 6 + 8          # a tie is close
    assert macl.positive_pairs(three, .26).sum() == 6 + 8          # both views of both
    one_place = macl.positive_pairs(torch.tensor([.3, .3]), 1e-6)
    assert torch.equal(one_place, ~torch.eye(4, dtype=torch.bool))
    volume = (torch.arange(10) + 1) / 10                           # all slices of one volume
    assert macl.positive_pairs(volume, 1.).sum() == 20 * 19
    assert macl.positive_pairs(volume, .05).sum() == 20
    with pytest.raises(ValueError, match="threshold = 0"):
        global_contrastive_loss(torch.eye(2), torch.eye(2), torch.ones(2), 0, .1)


def test_equivariant_by_hand():
    full = torch.arange(16.).view(1, 1, 4, 4)
    # scaled by 0.25 to one pixel: bilinear between its four middle pixels, (5 + 6 + 9 + 10) / 4
    pixel = torch.full((1, 1, 1, 1), 5.)
    assert equivariant_loss(pixel, full).item() == pytest.approx(2.5)
    # scaled by 0.5: the means of the 2 x 2 blocks, 2.5 4.5 10.5 12.5
    small = torch.tensor([[[[1., 4.], [10., 10.]]]])
    assert equivariant_loss(small, full).item() == pytest.approx((1.5 + .5 + .5 + 2.5) / 4)
    x = torch.randn(2, 3, 8, 8)
    assert equivariant_loss(x, x).item() == 0


@pytest.mark.parametrize("loss", ["g", "d", "ER"])
def test_gradients_under_autocast(loss):
    torch.manual_seed(0)
    p = torch.rand(6)
    maps = torch.randn(2, 6, 8, 4, 4)

    def call(a, b):
        if loss == "g":
            return global_contrastive_loss(a.mean((2, 3)), b.mean((2, 3)), p, .35, .1)
        if loss == "d":
            return dense_contrastive_loss(a, b, p, .35, .1)
        return equivariant_loss(a, b)

    grads = []
    for on in (False, True):
        x = maps[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            value = call(x, maps[1])
        value.backward()
        assert value.dtype == torch.float32
        grads.append(x.grad)
    assert grads[0].isfinite().all()
    assert grads[0].abs().max() > 0
    assert torch.allclose(*grads, atol=1e-6)
    x = (maps[0] * 1e-4).bfloat16().requires_grad_()
    call(x, maps[1].bfloat16()).backward()
    assert x.grad.isfinite().all()


def test_pcl_is_the_positional_loss_of_sal():
    """L_g is PCL's loss, which sal.py uses as its global positional loss."""
    torch.manual_seed(0)
    z = torch.randn(12, 5)
    p = torch.rand(6)
    want = sal.global_positional_loss(z, p.repeat(2), .35, .1).item()
    got = global_contrastive_loss(*z.chunk(2), p, .35, .1).item()
    assert got == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------- the two branches


def network(blocks, eq7=False):
    """A tiny U-Net and its heads."""
    torch.manual_seed(0)
    unet = common.UNet(1, 2, 4)
    return unet, macl.Heads(unet.encoder.widths, blocks, eq7)


@pytest.mark.parametrize("blocks", range(5))
def test_shapes_for_any_number_of_decoder_blocks(blocks):
    S = 2 * 2 ** (4 + blocks)                                      # 2 x 2 at the bottom
    unet, heads = network(blocks)
    pairs = macl.branches(unet, heads, torch.rand(4, 3, 1, S, S))
    h = S // 16
    C = 64 // 2 ** blocks
    shapes = {k: [tuple(x.shape) for x in v] for k, v in pairs.items()}
    assert shapes == {"g": [(3, 128), (3, 128)], "ER": [(3, 64, 2, 2), (3, 64, h, h)],
                      "d": [(3, C, h, h), (3, C, h, h)]}
    assert (heads.g_ins is heads.g_ins_aux) == (blocks == 0)


def test_which_view_goes_where():
    """Z^g and Z~^g come from V1 and V2; the maps from I1 and I2."""
    unet, heads = network(2)
    views = [torch.rand(2, 1, 64, 64, requires_grad=True) for _ in range(4)]       # I1 I2 V1 V2
    pairs = macl.branches(unet.eval(), heads.eval(), views)
    used = []
    for x in (*pairs["g"], *pairs["ER"], *pairs["d"]):
        grads = torch.autograd.grad(x.square().sum(), views, retain_graph=True, allow_unused=True)
        used.append([n for n, g in enumerate(grads) if g is not None and g.abs().max() > 0])
    assert used == [[2], [3], [0], [1], [0], [1]]


def test_every_view_has_batch_statistics_of_its_own():
    """While training, Z^g and Z~^g of V1, V2 do not depend on I1 and I2."""
    unet, heads = network(2)
    I1, I2, V1, V2 = torch.rand(4, 3, 1, 64, 64)
    first = macl.branches(unet, heads, (I1, I2, V1, V2))["g"]
    other = macl.branches(unet, heads, (5 * I1, 5 * I2, V1, V2))["g"]
    alone = macl.branches(unet, heads, (I1, I2, V1, V2), dense=False)["g"]
    for n in (0, 1):
        assert torch.equal(first[n], other[n]) and torch.equal(first[n], alone[n])


def decoder_gradient(x, unet):
    """The gradient of x in the decoder's first layer, None where x does not depend on it."""
    weight = unet.decoder.ups[0].weight
    grads = torch.autograd.grad(x.square().sum(), weight, retain_graph=True, allow_unused=True)
    return grads[0]


def test_the_decoder_is_in_the_dominant_branch_alone():
    views = torch.rand(4, 2, 1, 64, 64)
    unet, heads = network(2)
    pairs = macl.branches(unet, heads, views)
    assert decoder_gradient(pairs["g"][0], unet).abs().max() > 0
    assert decoder_gradient(pairs["d"][0], unet).abs().max() > 0
    assert decoder_gradient(pairs["g"][1], unet) is None
    assert decoder_gradient(pairs["d"][1], unet) is None
    unet, heads = network(2, eq7=True)                             # Eq. 7 has no d in Z^g
    assert decoder_gradient(macl.branches(unet, heads, views)["g"][0], unet) is None


def test_pcl_computes_no_maps():
    unet, heads = network(0)
    views = torch.rand(4, 2, 1, 64, 64)
    assert set(macl.branches(unet, heads, views, dense=False)) == {"g"}


def test_the_encoder_is_shared_and_the_branches_are_asymmetric():
    unet, heads = network(2)
    unet.eval()
    heads.eval()
    views = torch.rand(4, 2, 1, 64, 64)
    pairs = macl.branches(unet, heads, views)
    weight = unet.encoder.blocks[0][0].weight
    for x in (*pairs["g"], *pairs["ER"], *pairs["d"]):             # each branch trains it
        gradient = torch.autograd.grad(x.square().sum(), weight, retain_graph=True)[0]
        assert gradient.abs().max() > 0
    sizes = []

    def note(module, inputs, outputs):
        sizes.append(tuple(inputs[0].shape))

    handle = unet.encoder.register_forward_hook(note)
    with torch.no_grad():
        weight.add_(.5)
        moved = macl.branches(unet, heads, views)
    handle.remove()
    assert sizes == 2 * [(2, 1, 64, 64), (2, 1, 16, 16)]           # one encoder, two sizes
    for key in pairs:
        for before, after in zip(pairs[key], moved[key]):
            assert not torch.allclose(before, after)
    # the same, each view by itself: the encoder on full images, encoder and decoder on small ones
    I1, I2, V1, V2 = views
    Y_aux = unet.encoder(I2)[-1]
    want = {"g": (heads.g_ins(decoded(unet, V1)), heads.g_ins_aux(unet.encoder(V2)[-1])),
            "ER": (unet.encoder(quarter(I1))[-1], Y_aux),
            "d": (decoded(unet, I1), heads.g_pix_aux(Y_aux))}
    for key in want:
        for got, alone in zip(moved[key], want[key]):
            assert torch.allclose(got, alone, atol=1e-5), key


def quarter(x):
    """down for two decoder blocks: bilinear."""
    return F.interpolate(x, scale_factor=.25, mode="bilinear")


def decoded(unet, x):
    """d(e(down(x))) with two blocks."""
    return unet.decoder(unet.encoder(quarter(x)), 2)


# ------------------------------------------------------------------------------------------ views


def view_options(*words):
    """Options for `four_views`."""
    return common.parse_options("macl", "", macl.OPTIONS, list(words))


def test_views():
    torch.manual_seed(0)
    X = torch.rand(4, 1, 32, 32)
    I1, I2, V1, V2 = macl.four_views(X, view_options())
    assert torch.equal(I1, X)                                      # T_fix: the identity
    assert torch.equal(I2, X)
    assert not torch.allclose(V1, V2)
    assert not torch.allclose(V1, X)
    assert V1.max() <= 1 + 1e-6                                    # T_var moves only
    I1, I2, _, _ = macl.four_views(X, view_options("--t-fix", "photometric"))
    assert not torch.allclose(I1, I2)
    assert not torch.allclose(I1, X)


def test_T_var_is_affine():
    """A ramp of intensities stays a ramp, turned and scaled: no elastic waves."""
    torch.manual_seed(0)
    ramp = torch.arange(64.).expand(4, 1, 64, 64)
    V1 = macl.four_views(ramp, view_options())[2]
    inner = V1[:, 0, 22:42, 22:42]                                 # reads inside the image
    assert inner.diff(n=2, dim=1).abs().max() < 1e-3
    assert inner.diff(n=2, dim=2).abs().max() < 1e-3
    assert inner.diff(dim=2).abs().max() > 1e-3


def test_T_var_of_the_code():
    """Two of three are turned, scaled and bent; the others are mirrored at most."""
    torch.manual_seed(0)
    n, S = 4000, 8
    grid = macl.code_grid(n, S, "cpu").double()                    # [n, S, S, 2]
    ends = torch.tensor([-1 + 1 / S, 1 - 1 / S])                   # of the pixels' centres
    across = (grid[:, :, -1] - grid[:, :, 0]).mean(1) / (ends[1] - ends[0])        # [n, 2]
    down = (grid[:, -1] - grid[:, 0]).mean(1) / (ends[1] - ends[0])
    assert grid.mean((1, 2)).abs().max() < .02                     # the middle stays
    still = (across[:, 1].abs() < 1e-6) & (down[:, 0].abs() < 1e-6)
    still &= (across[:, 0].abs() - 1).abs() < 1e-6
    assert still.double().mean() == pytest.approx(.33, abs=.03)
    for axis, way in ((across, 0), (down, 1)):
        signs = axis[still, way].sign()
        assert signs.mean().abs() < .1                             # each axis mirrored or not
    assert (across[still, 0] * down[still, 1]).sign().mean().abs() < .1    # independently
    moved = ~still
    scale = across[moved].norm(dim=1)
    assert scale.min() == pytest.approx(.7, abs=.03)
    assert scale.max() == pytest.approx(1.3, abs=.03)
    assert scale.mean() == pytest.approx(1, abs=.02)
    angle = torch.atan2(across[moved, 1], across[moved, 0])
    for quarter_turn in range(4):                                  # every direction as often
        low = -math.pi + quarter_turn * math.pi / 2
        share = ((angle >= low) & (angle < low + math.pi / 2)).double().mean()
        assert share == pytest.approx(.25, abs=.04)
    # what is left, once the affine part is taken out, are waves of 0.4 to 1.4 % of half the width
    x = grid[:, :1] + (grid[:, -1:] - grid[:, :1]) * torch.linspace(0, 1, S)[:, None, None]
    bent = (grid - x)[:, 1:-1].std((1, 2, 3))
    assert bent[still].max() < 1e-6
    assert .002 < bent[moved].min() < bent[moved].max() < .03


def test_T_fix_of_the_code_by_hand(monkeypatch):
    """Brightness .5, contrast 1.2, sigma 1 on one bright pixel: the Gaussian, scaled to [0, 1]."""
    draws = iter([.5, 1.2, 1.])
    monkeypatch.setattr(macl, "uniform", fixed(draws))
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 1
    got = macl.code_intensities(x)[0, 0]
    side = math.exp(-.5)
    want = torch.zeros(7, 7)
    want[2:5, 2:5] = torch.tensor([[side ** 2, side, side ** 2], [side, 1, side],
                                   [side ** 2, side, side ** 2]])
    assert torch.allclose(got, want, atol=1e-6)
    torch.manual_seed(0)
    monkeypatch.undo()
    x = torch.rand(5, 1, 16, 16)
    x[0] = .3                                                      # a blank slice
    got = macl.code_intensities(x)
    assert got.isfinite().all()
    assert got[1:].amin((1, 2, 3)).tolist() == [0] * 4
    assert got[1:].amax((1, 2, 3)).tolist() == [1] * 4


def fixed(draws):
    """In place of `uniform`: the next of these numbers for every image."""
    def uniform(n, lo, hi, device):
        return torch.full((n,), next(draws))
    return uniform


def test_views_of_the_code(monkeypatch):
    """V1 is T_var of I1, V2 of I2: the branches differ in intensities as I1 and I2 do."""
    torch.manual_seed(0)
    X = torch.rand(3, 1, 32, 32)
    o = view_options("--t-var", "code", "--t-fix", "code")
    I1, I2, V1, V2 = macl.four_views(X, o)
    assert not torch.allclose(I1, I2)
    assert not torch.allclose(V1, I1)
    assert V1.shape == V2.shape == X.shape

    def noted(x, o):
        return x

    monkeypatch.setattr(macl, "T_var", noted)
    I1, I2, V1, V2 = macl.four_views(X, o)
    assert V1 is I1
    assert V2 is I2


# ------------------------------------------------------------------------ training, what is taken


@pytest.fixture(scope="module")
def begin(phantom, tmp_path_factory):
    """begin(*words) -> a run that is ready to pre-train at 32 x 32 with one decoder block."""
    work = tmp_path_factory.mktemp("macl")
    small = ["--pretrain-size", 32, "--decoder-blocks", 1]

    def of(*words):
        out = work / f"run{len(list(work.iterdir()))}"
        place = ["--data", phantom, "--cache", work / "cache", "--out", out]
        return started("macl", *place, *small, *words)[1]
    return of


def finetuned(run_, start=None):
    """The U-Net fine-tuned on one patient, from scratch or from `start`."""
    row = common.Row("x", 1, 0)
    return macl.finetune(run_, row, start)


TAKEN = ("encoder.", "decoder.ups.0.", "decoder.blocks.0.")


def test_pretrained_weights_reach_the_fine_tuned_network(begin):
    """Encoder and decoder blocks are taken as they are; the rest starts as from scratch."""
    run_ = begin("--lr", 0, "--pretrained-lr", 0)
    start = macl.pretrain(run_, run_.dataset)
    written = common.load_checkpoint(run_.out / "pretrained.pt", "macl", run_.kept())
    assert set(start) == set(written) >= {"unet", "heads", "parts"}
    assert start["parts"] == ["encoder", "decoder.ups.0", "decoder.blocks.0"]
    torch.manual_seed(1000)
    before = common.UNet(1, 2, 4).state_dict()
    tuned = finetuned(run_, start)
    for (name, value), fresh in zip(tuned.named_parameters(), finetuned(run_).parameters()):
        if name.startswith(TAKEN):
            assert torch.equal(value, start["unet"][name])
            assert not torch.equal(value, before[name])            # it was trained
        else:
            assert torch.equal(value, fresh)
            untouched = torch.equal(start["unet"][name], before[name])
            assert untouched or name.startswith("head")            # the head has two classes there


def test_taken_layers_have_their_own_rate(begin):
    run_ = begin("--pretrained-lr", 0, "--pretrain-steps", 1)
    start = macl.pretrain(run_, run_.dataset)
    for name, value in finetuned(run_, start).named_parameters():
        assert torch.equal(value, start["unet"][name]) == name.startswith(TAKEN), name
    run_ = begin("--lr", 0)
    torch.manual_seed(0)
    drawn = run_.unet().state_dict()                               # as fine-tuning draws them
    for name, value in finetuned(run_, start).named_parameters():
        if not name.startswith(TAKEN):
            assert torch.equal(value, drawn[name]), name
        elif value.ndim == 4:
            assert not torch.equal(value, start["unet"][name]), name


def test_rate_of_pretraining(begin, monkeypatch):
    run_ = begin("--pretrain-lr", 2)
    seen = noted_rates(monkeypatch)
    macl.pretrain(run_, run_.dataset)
    assert seen == [[pytest.approx(1 + math.cos(math.pi * t / 6))] for t in range(6)]


def test_positions_are_those_of_the_slices(begin, monkeypatch):
    run_ = begin("--pretrain-steps", 1)
    positions = []
    loss = macl.global_contrastive_loss

    def noted(Z_g, Z_g_aux, position, *rest):
        positions.extend(position.tolist())
        return loss(Z_g, Z_g_aux, position, *rest)

    def first_slices(numbers, n):
        return numbers[:n]

    monkeypatch.setattr(macl, "global_contrastive_loss", noted)
    monkeypatch.setattr(common, "random_slices", first_slices)
    macl.pretrain(run_, run_.dataset)
    assert positions == pytest.approx(run_.dataset.position[run_.train[:4]].tolist())


def test_every_weight_counts(begin):
    """Without L_g its head is not trained as before, nor that of L_d without L_d; L_ER has none."""
    def heads(*words):
        run_ = begin("--pretrain-steps", 1, *words)
        weights = macl.pretrain(run_, run_.dataset)["heads"]
        assert {"g", "d", "ER"} <= set(common.read_log(run_.out)[0])
        return weights["g_ins.2.weight"], weights["g_pix_aux.0.weight"]

    g_ins, g_pix = heads()
    assert not torch.equal(heads("--lambda1", 0)[0], g_ins)
    assert not torch.equal(heads("--lambda2", 0)[1], g_pix)
    no_er = heads("--lambda3", 0)
    assert torch.equal(no_er[1], g_pix)
    assert torch.equal(no_er[0], g_ins)


def test_rows_of_table_III(begin):
    """What each of the paper's four configurations trains: PCL, + decoder, + L_ER, + L_d."""
    first = ["--decoder-blocks", 0, "--lambda2", 0, "--lambda3", 0]
    trained = {}
    for name, words in (("pcl", first), ("decoder", first[2:]), ("er", first[2:4]), ("macl", [])):
        run_ = begin("--pretrain-steps", 1, *words)
        start = macl.pretrain(run_, run_.dataset)
        torch.manual_seed(1000)
        unet = common.UNet(1, 2, 4)
        heads = macl.Heads(unet.encoder.widths, run_.o.decoder_blocks, False)
        logged = set(common.read_log(run_.out)[0])
        trained[name] = {
            "decoder": not torch.equal(start["unet"]["decoder.ups.0.weight"],
                                       unet.state_dict()["decoder.ups.0.weight"]),
            "g_pix": not torch.allclose(start["heads"]["g_pix_aux.0.weight"],
                                        heads.state_dict()["g_pix_aux.0.weight"], atol=1e-6),
            "logged": len(logged & {"g", "d", "ER"})}
    assert trained == {"pcl": {"decoder": False, "g_pix": False, "logged": 1},
                       "decoder": {"decoder": True, "g_pix": False, "logged": 1},
                       "er": {"decoder": True, "g_pix": False, "logged": 3},
                       "macl": {"decoder": True, "g_pix": True, "logged": 3}}


def test_the_total_is_the_weighted_sum(begin, monkeypatch):
    """Eq. (8): L_MLC = lambda1 L_g + lambda2 L_d + lambda3 L_ER."""
    run_ = begin("--pretrain-steps", 1, "--lambda1", 2, "--lambda2", 3, "--lambda3", 5)
    losses = []
    backward = torch.Tensor.backward

    def noted(self):
        losses.append(self.item())
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    macl.pretrain(run_, run_.dataset)
    row = common.read_log(run_.out)[0]
    assert losses == [pytest.approx(2 * row["g"] + 3 * row["d"] + 5 * row["ER"], rel=1e-5)]


def test_optimiser_of_pretraining():
    unet, heads = network(2)
    adam = macl.pretrain_optimiser(unet, heads, view_options())
    sgd = macl.pretrain_optimiser(unet, heads, view_options("--pretrain-optimiser", "sgd"))
    assert isinstance(adam, torch.optim.AdamW)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == .9
    own = [*unet.encoder.parameters(), *heads.parameters()]
    for module in (*unet.decoder.ups[:2], *unet.decoder.blocks[:2]):
        own += module.parameters()
    for optimiser in (adam, sgd):
        assert {id(p) for p in optimiser.param_groups[0]["params"]} == {id(p) for p in own}


@pytest.mark.parametrize("flags, blocks", [
    ((), 1),
    (("--lambda1", 0), 1),
    (("--lambda2", 0), 1),
    (("--lambda2", 0, "--eq7"), 0),                                # L_g from the encoder
    (("--lambda1", 0, "--lambda2", 0), 0),                         # L_ER alone
])
def test_decoder_blocks_are_taken_where_a_loss_trains_them(flags, blocks, begin):
    run_ = begin("--pretrain-steps", 2, *flags)
    start = macl.pretrain(run_, run_.dataset)
    assert start["parts"] == ["encoder", "decoder.ups.0", "decoder.blocks.0"][:1 + 2 * blocks]
    torch.manual_seed(run_.o.pretrain_seed)
    before = run_.unet(classes=2).state_dict()["decoder.ups.0.weight"]
    assert torch.equal(start["unet"]["decoder.ups.0.weight"], before) == (not blocks)


def test_equivariance_trains_the_encoder(begin):
    """L_ER alone falls when it is trained alone."""
    run_ = begin("--pretrain-steps", 60, "--pretrain-lr", .01, "--lambda1", 0,
                 "--lambda2", 0)
    macl.pretrain(run_, run_.dataset)
    steps = {r["step"]: r["ER"] for r in common.read_log(run_.out) if "step" in r}
    assert steps[50] < .7 * steps[0]


def test_pretraining_is_at_its_own_size(begin, monkeypatch):
    """The images come from the dataset at --pretrain-size, from training patients alone."""
    run_ = begin("--pretrain-size", 64, "--pretrain-steps", 2)
    large = common.prepare(run_.cases, run_.o.spacing, 64, run_.o.cache)
    assert run_.dataset.info["size"] == 32
    seen = []
    image = large.image

    def noted(numbers, device):
        seen.extend(numbers)
        return image(numbers, device)

    monkeypatch.setattr(large, "image", noted)
    macl.pretrain(run_, large)
    assert len(seen) == 2 * 4
    assert set(seen) <= set(run_.train)
    assert (large.volume == run_.dataset.volume).all()             # numbers mean the same slices


def test_scratch_is_the_scratch_of_sal(begin, phantom, tmp_path):
    run_ = begin()
    other = started("sal", "--data", phantom, "--cache", run_.o.cache, "--out", tmp_path / "o")[1]
    row = common.Row("scratch", 1, 0)
    of_sal = sal.finetune(other, row)
    for a, b in zip(finetuned(run_).parameters(), of_sal.parameters()):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- the script


def test_what_macl_writes(finished):
    out, _, _ = finished("macl")
    first = common.read_log(out)[0]
    assert first["chance"] == pytest.approx(math.log(7))           # 2 x 4 views: ln(2N - 1)
    assert {"g", "d", "ER", "ER_strangers", "step"} <= set(first)
    figures = {f.name for f in (out / "figures").iterdir()}
    assert figures == {"dice.png", "overlays.png", "heat.png", "branches.png"}
    content = common.load_checkpoint(out / "pretrained.pt", "macl")
    assert content["parts"] == ["encoder", "decoder.ups.0", "decoder.blocks.0", "decoder.ups.1",
                                "decoder.blocks.1"]
    assert set(content["heads"]) > {"g_ins.2.weight", "g_ins_aux.2.weight", "g_pix_aux.0.weight"}


def test_init_says_what_is_taken(finished, phantom):
    """--init with MACL's own weights, then with another method's encoder."""
    out, work, _ = finished("macl")
    words = ["--data", phantom, *options("macl")]
    done = run_here("macl", *words, "--init", out / "pretrained.pt", "--out", "init_macl", cwd=work)
    assert done.returncode == 0, done.stderr
    assert ("macl gives 88 tensors (encoder, decoder.ups.0, decoder.blocks.0, decoder.ups.1, "
            "decoder.blocks.1)") in done.stdout
    assert ("start fresh (decoder.blocks.2, decoder.blocks.3, decoder.ups.2, decoder.ups.3, "
            "head)") in done.stdout
    assert "other scans" not in done.stdout
    assert same_network(work / "init_macl", out)                   # as if pre-trained here
    content = common.load_checkpoint(out / "pretrained.pt")
    common.save_checkpoint(work / "sal_for_macl.pt", method="sal",
                           options={"cases": "others"}, unet=content["unet"], parts=["encoder"])
    words += ["--init", work / "sal_for_macl.pt", "--out", "init_sal"]
    done = run_here("macl", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "sal gives" in done.stdout
    assert "pre-trained on other scans" in done.stdout
    assert not (work / "init_sal/pretrained.pt").exists()
    assert not (work / "init_sal/figures/branches.png").exists()   # there are no heads
    assert not same_network(work / "init_sal", out)


def same_network(one, two):
    """Whether two runs have the same fine-tuned network of one patient and seed 0.

    After four steps the scores would be equal for other networks, too.
    """
    networks = [common.load_checkpoint(f / "macl_n1_s0.pt")["unet"] for f in (one, two)]
    return all(torch.equal(networks[0][k], networks[1][k]) for k in networks[0])


def scratch_scores(folder):
    """The lines of per_volume.csv of scratch with one patient and seed 0."""
    lines = csv.DictReader((folder / "per_volume.csv").open())
    return [t for t in lines if (t["method"], t["labelled"], t["seed"]) == ("scratch", "1", "0")]


PCL = ["--decoder-blocks", 0, "--lambda2", 0, "--lambda3", 0]


def test_pcl_reads_scratch(finished, phantom):
    out, work, _ = finished("macl")
    words = ["--data", phantom, *options("macl"), *PCL, "--scratch", out]
    done = run_here("macl", *words, "--out", "pcl", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "| 1 | pcl |" in done.stdout
    assert "| macl |" not in done.stdout
    assert not (work / "pcl/scratch_n1_s0.pt").exists()
    assert scratch_scores(work / "pcl") == scratch_scores(out) != []
    assert {"d", "ER"}.isdisjoint(common.read_log(work / "pcl")[0])
    assert (work / "pcl/figures/branches.png").exists()
    refused(run_here("macl", *words, "--lr", .03, "--out", "pcl_r", cwd=work), "lr =")


@pytest.mark.parametrize("flags", [
    ["--decoder-blocks", 3, "--pretrain-size", 128, "--eq7", "--precision", "bfloat16"],
    ["--t-fix", "photometric", "--pretrain-optimiser", "sgd", "--lambda1", 0, "--threshold", .35,
     "--split", "val"],
    ["--t-var", "code", "--t-fix", "code", "--lambda2", 0],
])
def test_options(flags, finished, phantom):
    _, work, _ = finished("macl")
    words = ["--data", phantom, *options("macl"), *flags, "--out", "o" + flags[0]]
    done = run_here("macl", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "gain over scratch" in done.stdout


def test_the_papers_configuration(capsys):
    o = view_options("--data", "x", "--paper")
    assert (o.width, o.spacing, o.size, o.pretrain_size) == (32, 1.25, 352, 512)
    assert (o.pretrain_steps, o.pretrain_batch, o.pretrain_lr) == (8200, 16, .1)
    assert (o.pretrain_optimiser, o.t_var, o.t_fix) == ("sgd", "code", "identity")
    assert (o.decoder_blocks, o.temperature) == (2, .1)
    assert (o.lambda1, o.lambda2, o.lambda3) == (1., .5, 1.)
    assert not o.eq7
    assert (o.batch, o.lr, o.pretrained_lr) == (5, 5e-4, 5e-4)
    typed = view_options("--paper", "--width", "8", "--pretrain-optimiser", "adamw")
    assert (typed.width, typed.pretrain_optimiser) == (8, "adamw") # a given option wins
    with pytest.raises(common.DataError, match="does not exist"):
        macl.main(["--data", "no such folder", "--paper"])
    assert "cross-entropy alone" in capsys.readouterr().out        # what no number can set


def checked(phantom, *words):
    """The options of a run after `check`, nothing prepared."""
    words = ["--data", phantom, *options("macl"), *words]
    run_ = common.Run(view_options(*map(str, words)))
    macl.check(run_)
    return run_.o


@pytest.mark.parametrize("flags, message", [
    (["--pretrain-size", 96], "--pretrain-size 96.*use a multiple of 64"),
    (["--decoder-blocks", 4, "--pretrain-size", 128], "use a multiple of 256"),
    (["--decoder-blocks", 0, "--pretrain-size", 16], "use a multiple of 16, 32 or more"),
    (["--decoder-blocks", 5], "--decoder-blocks 5: use 0 to 4"),
    (["--decoder-blocks", -1], "--decoder-blocks -1: use 0 to 4"),
    (["--lambda1", 0, "--lambda2", 0, "--lambda3", 0], "one of them above 0"),
    (["--lambda3", -1], "--lambda1"),
    (["--threshold", 0], "--threshold 0.0"),
    (["--threshold", 1.5], "--threshold 1.5"),
    (["--temperature", 0], "--temperature 0.0"),
    (["--pretrain-batch", 1], "--pretrain-batch: 2"),
    (["--pretrain-steps", 0], "--pretrain-steps"),
    (["--pretrain-optimiser", "adam"], "--pretrain-optimiser adam: use adamw or sgd"),
    (["--t-var", "none"], "--t-var none: use affine or code"),
    (["--t-fix", "none"], "--t-fix none: use identity, code or photometric"),
])
def test_bad_options_of_macl(flags, message, phantom):
    with pytest.raises(common.DataError, match=message):
        checked(phantom, *flags)


def test_default_pretrain_size(phantom):
    """--size rounded up to a multiple of 64; what is given wins."""
    assert checked(phantom, "--size", 96).pretrain_size == 64      # the tiny options give 64
    for size, want in ((32, 64), (64, 64), (96, 128), (144, 192)):
        o = view_options("--data", str(phantom), "--size", str(size), "--spacing", "2")
        assert o.pretrain_size is None
        macl.check(common.Run(o))
        assert o.pretrain_size == want
