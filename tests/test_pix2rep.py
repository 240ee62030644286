"""Pix2Rep: losses against float64 loops and by hand, phi exact, the frozen probe, Mean Teacher, the script as a user runs it."""
import csv, json, math, signal, subprocess, sys, time

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, ROOT, SHARED, TINY_PIX2REP as TINY, refused, run, save, volume

import common
import data
import pix2rep
from pix2rep import barlow_twins_loss, effective_rank, few_shot, found_partners, info_nce_loss, labels_needed, pixel_pairs, random_affine

CPU = torch.device("cpu")


def info_nce_oracle(z_a, z_b, tau):
    """Eq. (InfoNCE), vector by vector in float64."""
    z = [v / math.sqrt(sum(x * x for x in v)) for v in np.concatenate([z_a, z_b]).astype(np.float64)]
    n, total = len(z_a), 0.
    sim = lambda i, k: sum(x * y for x, y in zip(z[i], z[k]))
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        denominator = sum(math.exp(sim(i, k) / tau) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(sim(i, partner) / tau) / denominator)
    return total / (2 * n)


def barlow_oracle(u_a, u_b, lam):
    """Eq. (Barlow), entry by entry in float64."""
    standard = lambda u: (u - u.mean(0)) / u.std(0)
    u_a, u_b = standard(u_a.astype(np.float64)), standard(u_b.astype(np.float64))
    P, d = u_a.shape
    loss = 0.
    for a in range(d):
        for b in range(d):
            c = sum(u_a[p, a] * u_b[p, b] for p in range(P)) / P
            loss += (c - 1) ** 2 if a == b else lam * c ** 2
    return loss


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("tau", [.1, .53])
def test_info_nce_equals_the_loop(tau):
    z_a, z_b = np.random.default_rng(0).normal(size=(2, 9, 5)) * 3
    got = info_nce_loss(torch.tensor(z_a), torch.tensor(z_b), tau).item()
    assert got == pytest.approx(info_nce_oracle(z_a, z_b, tau), abs=1e-5)


def test_info_nce_by_hand():
    # n = 2, tau = 1: z_1 = z'_1 = (1,0), z_2 = z'_2 = (0,1). Every vector: partner e^1, two others e^0
    z = torch.eye(2)
    assert info_nce_loss(z, z, 1.).item() == pytest.approx(-math.log(math.e / (math.e + 2)), abs=1e-6)
    # z'_1 and z'_2 exchanged: the partner has similarity 0, one other 1, one other 0
    assert info_nce_loss(z, z.flip(0), 1.).item() == pytest.approx(-math.log(1 / (math.e + 2)), abs=1e-6)


def test_info_nce_chance_level_and_minimum():
    torch.manual_seed(0)
    n = 400
    equal, random = torch.ones(n, 8), torch.randn(2, n, 512)
    assert info_nce_loss(equal, equal, .1).item() == pytest.approx(math.log(2 * n - 1), abs=1e-4)        # collapse: exactly chance
    assert info_nce_loss(*random, 1.).item() == pytest.approx(math.log(2 * n - 1), abs=.01)              # unrelated: chance
    z = random[0]
    same = info_nce_loss(z, z, .1).item()
    assert same < .1 and all(same < info_nce_loss(z, z + e * random[1], .1).item() for e in (.3, 1.))
    order = torch.randperm(n)
    assert info_nce_loss(z[order], (z + 1)[order], .5).item() == pytest.approx(info_nce_loss(z, z + 1, .5).item(), abs=1e-5)
    assert info_nce_loss(3 * z, .2 * z, .1).item() == pytest.approx(same, abs=1e-5)                      # length does not count


def test_barlow_equals_the_loop():
    u_a, u_b = np.random.default_rng(1).normal(size=(2, 12, 4)) * [1, 5, .1, 20] + [3, -50, 0, 7]
    got = barlow_twins_loss(torch.tensor(u_a), torch.tensor(u_b), 5e-3).item()
    assert got == pytest.approx(barlow_oracle(u_a, u_b, 5e-3), rel=1e-4)


def test_barlow_by_hand():
    # P = 4, two channels that are uncorrelated and standardised: C = identity for identical views, loss 0
    u = torch.tensor([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
    assert barlow_twins_loss(u, u, 1.).item() == pytest.approx(0, abs=1e-6)
    # the second channel a copy of the first: C is all ones, two entries off the diagonal
    assert barlow_twins_loss(u[:, [0, 0]], u[:, [0, 0]], .005).item() == pytest.approx(2 * .005, abs=1e-6)
    # the second view's channels exchanged: diagonal 0, off-diagonal 1
    assert barlow_twins_loss(u, u.flip(1), .005).item() == pytest.approx(2 + 2 * .005, abs=1e-6)
    # one sign turned: C[0,0] = -1
    assert barlow_twins_loss(u, u * torch.tensor([-1., 1.]), .005).item() == pytest.approx(4, abs=1e-6)


def test_barlow_does_not_see_the_scale_of_a_channel():
    torch.manual_seed(0)
    u_a, u_b = torch.randn(2, 500, 6)
    want = barlow_twins_loss(u_a, u_b, .01).item()
    scale, shift = torch.tensor([1., 3., .2, 10., 5., 1.]), torch.tensor([0., 5., -2., 30., 1., 1.])
    assert barlow_twins_loss(u_a * scale + shift, u_b * scale.flip(0) - shift, .01).item() == pytest.approx(want, rel=1e-3)
    assert barlow_twins_loss(u_a, u_a, 0.).item() == pytest.approx(0, abs=1e-6)                          # diagonal 1 for identical views
    assert want == pytest.approx(6, abs=1)                                                               # unrelated: about d


@pytest.mark.parametrize("loss", [lambda a, b: info_nce_loss(a, b, .1), lambda a, b: barlow_twins_loss(a, b, 5e-3)])
def test_gradients_under_autocast(loss):
    """The losses stay float32 where the network is bfloat16, and their gradients are finite and those of float32."""
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
    assert grads[0].isfinite().all() and grads[0].abs().max() > 0 and torch.allclose(*grads, atol=1e-6)
    x = (a * 1e-4).bfloat16().requires_grad_()
    loss(x, x.detach()).backward()
    assert x.grad.isfinite().all()


def test_collapse_indicators():
    torch.manual_seed(0)
    z = torch.randn(300, 16)
    assert found_partners(z, 2 * z + .01 * torch.randn(300, 16)) == 1
    assert found_partners(z, torch.randn(300, 16)) < .05
    assert found_partners(torch.ones(300, 16), torch.ones(300, 16)) == pytest.approx(1 / 300)
    assert effective_rank(z) > 15 and effective_rank(torch.ones(300, 16)) <= 1.01
    assert effective_rank(torch.randn(300, 1) * torch.ones(1, 16)) == pytest.approx(1, abs=.01)
    assert effective_rank(z + 50) == pytest.approx(effective_rank(z), abs=.01)                           # about the mean
    square = torch.tensor([[1., 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])                              # two equal singular values
    assert effective_rank(square) == pytest.approx(2, abs=1e-3)


# ------------------------------------------------------------------------------------------------ phi


def quarter_turn(size):
    """The grid of phi = a rotation by 90 degrees of one image."""
    theta = torch.tensor([[[0., -1, 0], [1, 0, 0]]])
    return F.affine_grid(theta, (1, 1, size, size), align_corners=False)


def test_moving_features_is_moving_the_image():
    torch.manual_seed(0)
    x, turn = torch.rand(1, 3, 8, 8), quarter_turn(8)
    turned = common.warp(x, turn)
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-6) or torch.allclose(turned, x.rot90(-1, (2, 3)), atol=1e-6)
    f = lambda x: torch.stack([x.prod(1), x[:, 0].exp() - x[:, 1], (7 * x[:, 2]).sin()], 1)              # pointwise: exact
    assert torch.allclose(common.warp(f(x), turn), f(common.warp(x, turn)), atol=1e-5)
    f = torch.nn.Conv2d(3, 4, 1, bias=False)                                                             # linear: for any phi
    grid, _ = random_affine(1, 8, 1.5, (.4, .9), CPU)
    assert torch.allclose(common.warp(f(x), grid), f(common.warp(x, grid)), atol=1e-6)


def test_a_real_network_turned():
    """A U-Net whose kernels are made symmetric commutes with rotations by 90 degrees."""
    torch.manual_seed(0)
    f = pix2rep.Backbone(1, pix2rep.parse_options(["--width", "4", "--dim", "8", "--depth", "2"]))         # batch statistics
    for m in f.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            with torch.no_grad():
                m.weight.copy_(sum(m.weight.rot90(k, (2, 3)) for k in range(4)) / 4)
    x, turn = torch.rand(1, 1, 16, 16), quarter_turn(16)
    with torch.no_grad():
        moved, other = common.warp(f(x), turn), f(common.warp(x, turn))
        assert torch.allclose(moved, other, atol=1e-3) and moved.std(dim=(2, 3)).max() > .1
        a, b = pixel_pairs(f(x), f(common.warp(x, turn)), turn, torch.ones(1, 16, 16, dtype=torch.bool), 64)
        assert torch.allclose(a, b, atol=1e-3)                                                           # sampled pixels as well
        wrong = pixel_pairs(f(x), f(common.warp(x, turn)), turn.flip(-1), torch.ones(1, 16, 16, dtype=torch.bool), 64)
        assert not torch.allclose(*wrong, atol=.1)                                                     # x and y exchanged


def test_no_pixel_from_outside_the_image():
    torch.manual_seed(0)
    for rotation, scale in ((math.pi / 2, (.33, .95)), (math.pi, (.9, 1.)), (0., (1., 1.))):
        grid, valid = random_affine(64, 16, rotation, scale, CPU)
        inside = common.warp(torch.ones(64, 1, 16, 16), grid)[:, 0]                                      # below 1 where 0 flows in
        assert (inside[valid] > 1 - 1e-5).all() and valid.any(2).any(1).all()
        place = torch.rand(64, 2, 16, 16)
        for n in (128, None):
            a, b = pixel_pairs(torch.cat([place, torch.ones(64, 1, 16, 16)], 1), torch.cat([place, valid[:, None].float()], 1), grid, valid, n)
            assert (a[:, 2] > 1 - 1e-5).all() and (b[:, 2] == 1).all() and len(a) == (n or valid.sum())
    assert valid.all()                                                                                   # the identity loses nothing
    grid, valid = random_affine(64, 16, math.pi, (.9, 1.), CPU)
    assert .5 < valid.float().mean() < 1                                                                 # and rotation some


def test_sampled_pixels_are_those_of_the_whole_map():
    """The n sampled pairs of vectors are among the pairs of all valid pixels, evenly from every image."""
    torch.manual_seed(0)
    f_a, f_b = torch.randn(2, 4, 6, 8, 8)
    grid, valid = random_affine(4, 8, 1., (.5, 1.), CPU)
    a, b = pixel_pairs(f_a, f_b, grid, valid, 40)
    every_a, every_b = pixel_pairs(f_a, f_b, grid, valid)
    assert a.shape == b.shape == (40, 6) and len(every_a) == valid.sum()
    near = (torch.cat([a, b], 1)[:, None] - torch.cat([every_a, every_b], 1)).norm(dim=2).min(1)
    assert near.values.max() < 1e-4
    image = torch.arange(4)[:, None, None].expand(4, 8, 8)[valid]
    assert image[near.indices].bincount().tolist() == [10] * 4


def test_the_crop_lies_inside_and_turns_and_flips():
    torch.manual_seed(0)
    grid, valid = random_affine(500, 16, 0., (.33, .95), CPU)
    assert grid.abs().max() <= 1 and valid.float().mean() > .9                                           # but for half a pixel at the border
    side = (grid[:, 0, 0] - grid[:, -1, -1]).abs() / (2 - 2 / 16)                                        # [500, 2]
    assert .33 <= side.min() and side.max() <= .95 and side.std() > .1
    right, down = grid[:, 0, -1, 0] > grid[:, 0, 0, 0], grid[:, -1, 0, 1] > grid[:, 0, 0, 1]
    assert all(.4 < x.float().mean() < .6 for x in (right, down, right == down))
    x = torch.rand(50, 1, 16, 16)
    t = pix2rep.random_intensity(x, 1.)
    assert (torch.corrcoef(torch.stack([x.flatten(), t.flatten()]))[0, 1]) < -.5
    torch.manual_seed(3)
    t = pix2rep.random_intensity(x, 0.)
    torch.manual_seed(3)
    assert torch.equal(t, common.photometric(x))


# ------------------------------------------------------------------------------------------------ probing, Mean Teacher


@pytest.fixture(scope="module")
def setting(phantom, tmp_path_factory):
    """(options, cases, dataset) of the tiny phantom."""
    o = pix2rep.parse_options(["--data", str(phantom), *TINY])
    cases = data.find_cases(phantom)
    pix2rep.resolve(o, cases)
    return o, cases, common.prepare(cases, o.spacing, o.size, tmp_path_factory.mktemp("cache"))


def test_linear_probing_leaves_the_backbone(setting, tmp_path):
    o, cases, dataset = setting
    torch.manual_seed(5)
    f = pix2rep.Backbone(1, o)
    f(torch.rand(8, 1, 32, 32))                                                                          # running statistics of its own
    start = {"unet": f.unet.state_dict(), "parts": ["encoder", "decoder"], "widen": f.widen.state_dict()}
    want = {k: v.clone() for k, v in f.state_dict().items() if not k.startswith("unet.head")}
    net = pix2rep.linear_probe("x", dataset, np.arange(10), np.arange(20), 4, 0, o, CPU, tmp_path, start)
    got = net[0].state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items()) and not net[0].training
    torch.manual_seed(0)
    pix2rep.Backbone(1, o)
    assert not torch.equal(net[1].weight, torch.nn.Conv2d(o.dim, 4, 1).weight)                           # but the head has learnt
    random = pix2rep.linear_probe("x", dataset, np.arange(10), np.arange(20), 4, 0, o, CPU, tmp_path)
    assert any(k.endswith("running_mean") and v.abs().max() > 0 for k, v in random[0].state_dict().items())


def test_pretrained_weights_reach_the_fine_tuned_network(setting, tmp_path):
    o, cases, dataset = setting
    torch.manual_seed(5)
    f, still = pix2rep.Backbone(1, o), pix2rep.parse_options([*TINY, "--backbone-lr", "0", "--head-lr", "0", "--lr", "0"])
    pix2rep.resolve(still, cases)
    start = {"unet": f.unet.state_dict(), "parts": ["encoder", "decoder"], "widen": f.widen.state_dict()}
    tuned = pix2rep.finetune("x", dataset, np.arange(10), None, 4, 0, still, CPU, tmp_path, start)
    scratch = pix2rep.finetune("x", dataset, np.arange(10), None, 4, 0, still, CPU, tmp_path)
    for (k, v), s in zip(tuned.named_parameters(), scratch.parameters()):
        assert torch.equal(v, s) if k.startswith("head") else torch.equal(v, start["unet"][k])
        assert k.startswith("head") or v.ndim < 4 or not torch.equal(v, s)


def test_the_teacher_is_the_moving_average(setting, tmp_path):
    o, cases, _ = setting
    torch.manual_seed(0)
    student, teacher = common.UNet(1, 4, 4), common.UNet(1, 4, 4)
    old = {k: v.double().clone() for k, v in teacher.state_dict().items()}
    student(torch.rand(4, 1, 32, 32))
    pix2rep.update_teacher(teacher, student, .9)
    for k, v in teacher.state_dict().items():
        new = student.state_dict()[k]
        want = .9 * old[k] + .1 * new.double() if v.is_floating_point() else new
        assert torch.allclose(v.double(), want.double(), atol=1e-6), k
    pix2rep.update_teacher(teacher, student, 0.)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values()))


def test_mean_teacher_by_hand_and_unlabelled_slices_count(setting, tmp_path):
    logits = torch.tensor([[[[0.]], [[math.log(3.)]]]])                                                  # probabilities 1/4, 3/4
    assert pix2rep.consistency_loss(logits, torch.tensor([[[[.5]], [[.5]]]])).item() == pytest.approx(2 * .25 ** 2)
    assert pix2rep.consistency_loss(logits, logits.softmax(1)).item() == 0
    o, cases, dataset = setting
    nets = [pix2rep.finetune("x", dataset, np.arange(10), unlabelled, 4, 0, o, CPU, tmp_path, None, True)
            for unlabelled in (np.arange(10, 20), np.arange(10, 20), np.arange(20, 30))]
    weight = [n.encoder.blocks[0][0].weight for n in nets]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


def test_few_shot_takes_every_group_equally():
    case = lambda p, g: data.Case(f"{p}_0", p, [], None, g)
    patients = [f"p{n:02}" for n in range(20)]
    cases = [case(p, "ABCDE"[n // 4]) for n, p in enumerate(patients)]
    group = {c.patient: c.group for c in cases}
    assert few_shot(cases, patients, 3) == patients[:3] and few_shot(cases, patients, 7) == patients[:7]
    for n in (5, 10, 20):
        got = few_shot(cases, patients, n)
        assert len(set(got)) == n and all([group[p] for p in got].count(g) == n // 5 for g in "ABCDE")
    assert few_shot(cases, patients, 5) == ["p00", "p04", "p08", "p12", "p16"]
    assert few_shot([case(p, "") for p in patients], patients, 5) == patients[:5]                        # no groups known


def test_labels_needed():
    row = lambda method, n, dice: {"method": method, "labelled": n, "mean_dice": {"mean": dice}}
    summary = [row("scratch", 1, .5), row("scratch", 4, .7), row("scratch", 16, .8), row("pix2rep", 1, .7)]
    assert labels_needed(summary, .7) == pytest.approx(4) and labels_needed(summary, .6) == pytest.approx(2)
    assert labels_needed(summary, .4) == 1 and labels_needed(summary, .9) == math.inf
    assert labels_needed(summary, .75) == pytest.approx(8)


def test_the_papers_configuration(setting):
    o = pix2rep.parse_options(["--data", "x", "--paper"])
    assert (o.width, o.depth, o.dim, o.projection, o.size, o.pixels, o.temperature) == (64, 5, 1024, 256, 128, 1000, .53)
    assert pix2rep.parse_options(["--paper", "--temperature", ".1"]).temperature == .1                   # a given option wins
    small = pix2rep.parse_options(["--data", "x", "--paper", "--width", "4", "--dim", "32"])
    pix2rep.resolve(small, setting[1])
    f = pix2rep.Backbone(1, small).eval()
    assert f(torch.rand(1, 1, 64, 64)).shape == (1, 32, 64, 64) and len(f.unet.encoder.blocks) == 6


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished tiny run with Mean Teacher: (its folder, the work folder with the cache, what it printed)."""
    work = tmp_path_factory.mktemp("work")
    done = run("pix2rep.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 1, 2, "--mean-teacher", "--out", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "out", work, done.stdout


def test_what_a_run_writes(finished):
    out, _, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(r["labelled"], r["seed"], r["method"]) for r in metrics["rows"]] == [
        (n, 0, w) for n in (1, 2) for w in pix2rep.WAYS + pix2rep.TEACHER_WAYS]
    assert len(metrics["gains"]) == 10 and metrics["seconds"]["pretrain"] > 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first = next(r for r in log if r["phase"] == "pretrain")
    assert first["chance"] == pytest.approx(math.log(2 * 64 - 1)) and {"loss", "found", "found_chance", "rank", "step"} <= set(first)
    assert any("consistency" in r for r in log if r["phase"] == "pix2rep-mt_n1_s0")
    assert {f.name for f in (out / "figures").iterdir()} == {"dice.png", "overlays.png", "similarity.png", "embeddings.png",
                                                              "annotation_saved.png"}
    assert "| 2 | pix2rep-mt |" in printed and "annotation saved: pix2rep with 1" in printed and "1 labelled: phantom" in printed
    start = common.load_checkpoint(out / "pretrained.pt")
    assert start["parts"] == ["encoder", "decoder"]
    common.load_weights(common.UNet(1, 4, 4), start["unet"], start["parts"])                             # starts a plain U-Net


def test_the_same_command_gives_the_same_numbers_and_scratch_is_read(finished, phantom):
    """Another loss: the rows from scratch are those of the first run, whether trained again or read with --scratch."""
    out, work, _ = finished
    rows = {}
    for name, extra in (("again", []), ("read", ["--scratch", "out"])):
        done = run("pix2rep.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 1, "--loss", "barlow", "--mean-teacher", *extra,
                   "--out", name, cwd=work)
        assert done.returncode == 0, done.stderr
        rows[name] = [(t["method"], t["dice"]) for t in csv.DictReader((work / name / "per_volume.csv").open())]
        assert (work / name / "scratch_n1_s0.pt").exists() == (name == "again")
    assert rows["again"] == rows["read"]
    first = [(t["method"], t["dice"]) for t in csv.DictReader((out / "per_volume.csv").open()) if (t["labelled"], t["seed"]) == ("1", "0")]
    own = {"scratch", "random-probe", "scratch-mt"}
    assert [r for r in first if r[0] in own] == [r for r in rows["again"] if r[0] in own]
    log = [json.loads(line) for line in (work / "again/log.jsonl").read_text().splitlines()]
    assert log[0]["chance"] == 8                                                                         # Barlow: unrelated views give d
    refused(run("pix2rep.py", "--data", phantom, *TINY, "--seeds", 0, "--scratch", "out", "--lr", ".01", "--out", "r", cwd=work), "lr =")


def test_scratch_is_the_scratch_of_sal(setting, phantom, tmp_path):
    """The same U-Net, seeds and steps: the baseline of all methods is one and the same."""
    import sal
    o, cases, dataset = setting
    other = sal.parse_options(["--data", str(phantom), "--size", "32", "--spacing", "5", "--width", "4", "--steps", "4", "--batch", "4",
                               "--windows", "2"])
    sal.resolve(other, cases)
    one = pix2rep.finetune("x", dataset, np.arange(10), None, 4, 0, o, CPU, tmp_path)
    two = sal.finetune("x", dataset, np.arange(10), 4, 0, other, CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_resume_adds_mean_teacher(finished, phantom):
    out, work, _ = finished
    go = lambda *extra: run("pix2rep.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 1, "--out", "later", *extra, cwd=work)
    assert go().returncode == 0
    made = (work / "later/pix2rep_n1_s0.pt").stat().st_mtime_ns
    done = go("--resume", "--mean-teacher")
    assert done.returncode == 0 and "pix2rep-mt_n1_s0" in done.stdout and (work / "later/pix2rep_n1_s0.pt").stat().st_mtime_ns == made
    rows = lambda file: [t for t in csv.DictReader(file.open()) if (t["labelled"], t["seed"]) == ("1", "0")]
    assert rows(work / "later/per_volume.csv") == rows(out / "per_volume.csv")


@pytest.mark.parametrize("flags", [["--loss", "barlow", "--precision", "bfloat16"], ["--depth", "3", "--inversion", ".5", "--crop", ".33", ".95"]])
def test_options(flags, finished, phantom):
    done = run("pix2rep.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 2, *flags, "--out", "o" + flags[1], cwd=finished[1])
    assert done.returncode == 0 and "annotation saved" in done.stdout, done.stderr


def test_kill_and_resume(finished, phantom):
    """Killed with SIGKILL in pre-training, probing and fine-tuning, and resumed: the numbers of the undisturbed run."""
    out, work, _ = finished
    command = [sys.executable, str(ROOT / "pix2rep.py"), "--data", str(phantom), *TINY, "--seeds", "0", "--labelled", "1", "2",
               "--mean-teacher", "--out", "killed"]
    killed = 0
    for target in ("pretraining.pt", "pretrained.pt", "random-probe_n1_s0.pt", "finetuning.pt", "pix2rep-mt_n1_s0.pt", None):
        resume = ["--resume"] if (work / "killed").exists() else []
        process = subprocess.Popen(command + resume, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        before = {f: f.stat().st_mtime_ns for f in (work / "killed").glob("*")} if resume else {}
        while target and process.poll() is None:
            file = work / "killed" / target
            if file.exists() and before.get(file) != file.stat().st_mtime_ns:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert killed >= 4 and process.returncode == 0
    assert (work / "killed/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def test_predict_equals_the_scored_prediction(finished, phantom, tmp_path):
    out, _, _ = finished
    for way in ("probe", "pix2rep-mt"):
        rows = [t for t in csv.DictReader((out / "per_volume.csv").open()) if (t["method"], t["labelled"], t["seed"]) == (way, "2", "0")]
        case = rows[0]["case"]
        done = run("pix2rep.py", "--predict", phantom / f"imagesTr/{case}.nii.gz", "--checkpoint", out / f"{way}_n2_s0.pt", "--out", tmp_path)
        assert done.returncode == 0, done.stderr
        pred = np.asarray(nib.load(tmp_path / f"predictions/{case}.nii.gz").dataobj)
        truth = np.asarray(nib.load(phantom / f"labelsTr/{case}.nii.gz").dataobj)
        want = [float(t["dice"]) for t in rows if t["case"] == case]
        assert list(common.dice_score(pred, truth, [1, 2, 3]).values()) == pytest.approx(want, abs=.02)


def test_bad_options(finished, phantom, tmp_path):
    out, work, _ = finished
    go = lambda *extra: run("pix2rep.py", "--data", phantom, *TINY, "--out", tmp_path / "o", *extra, cwd=work)
    refused(go("--size", 40), "--size 40", "2^depth")
    refused(go("--depth", 0), "--depth 0")
    refused(go("--pixels", 4), "--pixels 4")
    refused(go("--temperature", 0), "--temperature")
    refused(go("--crop", .9, .3), "--crop 0.9 0.3")
    refused(go("--scratch", tmp_path / "no"), "--scratch", "not the folder of a run")
    refused(go("--labelled", 99), "--labelled 99", "only")
    refused(go("--init", out / "pix2rep_n1_s0.pt"), "no weights to start from")
    refused(go("--init", out / "pretrained.pt", "--dim", 16), "dim = 8, now 16")
    common.save_checkpoint(work / "sal.pt", method="sal", options={}, unet={}, parts=["encoder"])
    refused(go("--init", work / "sal.pt"), "checkpoint of sal, not of pix2rep")
    assert not (tmp_path / "o").exists()
    refused(run("pix2rep.py", "--predict", "x.nii", "--checkpoint", out / "pretrained.pt"), "no segmentation head", "pix2rep_n7_s0.pt")


@pytest.mark.skipif(not (SHARED / "acdc").is_dir(), reason="real scans are not on this machine")
def test_acdc_few_shot_by_group():
    cases = data.find_cases(SHARED / "acdc")
    order, group = data.split_patients(cases)["labelled"], {c.patient: c.group for c in cases}
    assert few_shot(cases, order, 7) == order[:7] and few_shot(cases, order, 1) == ["patient099"]
    assert sorted(group[p] for p in few_shot(cases, order, 10)) == sorted(2 * ["DCM", "HCM", "MINF", "NOR", "RV"])
