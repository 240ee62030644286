"""MACL: losses against float64 loops and by hand, the two branches, what fine-tuning takes, the script as a user runs it."""
import csv, json, math, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, TINY_MACL as TINY, refused, run

import common
import data
import macl
import sal
from macl import dense_contrastive_loss, equivariant_loss, global_contrastive_loss

CPU = torch.device("cpu")


def contrast_oracle(z_a, z_b, position, t, tau):
    """Eq. (9), the mean over the anchors, vector by vector in float64."""
    unit = lambda v: v / math.sqrt(sum(x * x for x in v))
    z, pos, n = [unit(v) for v in np.concatenate([z_a, z_b]).astype(np.float64)], [*position, *position], 2 * len(z_a)
    sim = lambda i, k: sum(x * y for x, y in zip(z[i], z[k])) / tau
    total = 0.
    for i in range(n):
        omega = [j for j in range(n) if j != i and abs(pos[i] - pos[j]) < t]
        denominator = sum(math.exp(sim(i, k)) for k in range(n) if k != i)
        total -= sum(math.log(math.exp(sim(i, j)) / denominator) for j in omega) / len(omega)
    return total / n


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("t", [.05, .35, 1.])
def test_global_equals_the_loop(t):
    rng = np.random.default_rng(0)
    z_a, z_b, position = *rng.normal(size=(2, 6, 5)) * 3, rng.random(6)
    got = global_contrastive_loss(torch.tensor(z_a), torch.tensor(z_b), torch.tensor(position), t, .1)
    assert got.item() == pytest.approx(contrast_oracle(z_a, z_b, position, t, .1), rel=1e-5)


@pytest.mark.parametrize("t", [.05, .35])
def test_dense_equals_the_loop_over_pixels(t):
    rng = np.random.default_rng(1)
    z_a, z_b, position = *rng.normal(size=(2, 4, 5, 2, 3)), rng.random(4)
    per_pixel = [contrast_oracle(z_a[:, :, y, x], z_b[:, :, y, x], position, t, .1) for y in range(2) for x in range(3)]
    a, b, p = torch.tensor(z_a), torch.tensor(z_b), torch.tensor(position)
    assert dense_contrastive_loss(a, b, p, t, .1).item() == pytest.approx(np.mean(per_pixel), rel=1e-5)
    loop = [global_contrastive_loss(a[:, :, y, x], b[:, :, y, x], p, t, .1) for y in range(2) for x in range(3)]
    assert dense_contrastive_loss(a, b, p, t, .1).item() == pytest.approx(torch.stack(loop).mean().item(), rel=1e-6)


def test_contrast_by_hand():
    # N = 2, tau = 1, z_1 = z~_1 = (1,0), z_2 = z~_2 = (0,1): similarities 1 to the own other branch, 0 to the two others
    z, log_sum = torch.eye(2), math.log(math.e + 2)
    far, near = torch.tensor([.1, .9]), torch.tensor([.5, .5])
    assert global_contrastive_loss(z, z, far, .35, 1.).item() == pytest.approx(log_sum - 1, abs=1e-6)               # Omega+ = own other branch
    assert global_contrastive_loss(z, z, near, .35, 1.).item() == pytest.approx(log_sum - 1 / 3, abs=1e-6)          # Omega+ = all three
    maps = z[:, :, None, None].expand(2, 2, 3, 3)
    assert dense_contrastive_loss(maps, maps, far, .35, 1.).item() == pytest.approx(log_sum - 1, abs=1e-6)
    # one pixel of nine where the branches are exchanged: own other branch 0, one other 1, one other 0
    swapped = maps.clone()
    swapped[:, :, 1, 1] = z.flip(0)
    assert dense_contrastive_loss(maps, swapped, far, .35, 1.).item() == pytest.approx(log_sum - 8 / 9, abs=1e-6)


def test_chance_level_and_invariants():
    torch.manual_seed(0)
    one, p = torch.ones(5, 4), torch.rand(5)
    assert global_contrastive_loss(one, one, p, .35, .1).item() == pytest.approx(math.log(9), abs=1e-5)             # collapse is chance
    a, b = torch.randn(2, 5, 4, 2, 2)
    want = dense_contrastive_loss(a, b, p, .35, .1).item()
    order = torch.randperm(5)
    assert dense_contrastive_loss(a[order], b[order], p[order], .35, .1).item() == pytest.approx(want, abs=1e-5)    # batch order
    assert dense_contrastive_loss(3 * a, .1 * b, p, .35, .1).item() == pytest.approx(want, abs=1e-5)                # length of vectors
    assert dense_contrastive_loss(b, a, p, .35, .1).item() == pytest.approx(want, abs=1e-5)                         # branches exchanged
    assert dense_contrastive_loss(a.flip(2), b.flip(2), p, .35, .1).item() == pytest.approx(want, abs=1e-5)         # both maps moved
    assert abs(dense_contrastive_loss(a.flip(2), b, p, .35, .1).item() - want) > 1e-3                               # one moved: other pixels meet


def test_positives_by_position():
    P = macl.positive_pairs(torch.tensor([.25, .5, 1.]), .25)
    want = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(3):
        want[i, i + 3] = want[i + 3, i] = True                                                                      # |.25 - .5| < .25 is false
    assert torch.equal(P, want)
    assert macl.positive_pairs(torch.tensor([.25, .5, 1.]), .26).sum() == 6 + 8                                     # both views of both
    assert torch.equal(macl.positive_pairs(torch.tensor([.3, .3]), 1e-6), ~torch.eye(4, dtype=torch.bool))          # one place: all positive
    single = (torch.arange(10) + 1) / 10                                                                            # all slices of one volume
    assert macl.positive_pairs(single, 1.).sum() == 20 * 19 and macl.positive_pairs(single, .05).sum() == 20
    with pytest.raises(ValueError, match="threshold = 0"):
        global_contrastive_loss(torch.eye(2), torch.eye(2), torch.ones(2), 0, .1)


def test_equivariant_by_hand():
    full = torch.arange(16.).view(1, 1, 4, 4)
    # scaled by 0.25 to one pixel: bilinear between its four middle pixels, (5 + 6 + 9 + 10) / 4
    assert equivariant_loss(torch.full((1, 1, 1, 1), 5.), full).item() == pytest.approx(2.5)
    # scaled by 0.5: the means of the 2 x 2 blocks, 2.5 4.5 10.5 12.5; differences 1.5 0.5 0.5 2.5
    small = torch.tensor([[[[1., 4.], [10., 10.]]]])
    assert equivariant_loss(small, full).item() == pytest.approx((1.5 + .5 + .5 + 2.5) / 4)
    x = torch.randn(2, 3, 8, 8)
    assert equivariant_loss(x, x).item() == 0


@pytest.mark.parametrize("loss", ["g", "d", "ER"])
def test_gradients_under_autocast(loss):
    torch.manual_seed(0)
    p, maps = torch.rand(6), torch.randn(2, 6, 8, 4, 4)
    call = {"g": lambda a, b: global_contrastive_loss(a.mean((2, 3)), b.mean((2, 3)), p, .35, .1),
            "d": lambda a, b: dense_contrastive_loss(a, b, p, .35, .1), "ER": lambda a, b: equivariant_loss(a, b)}[loss]
    grads = []
    for on in (False, True):
        x = maps[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            value = call(x, maps[1])
        value.backward()
        assert value.dtype == torch.float32
        grads.append(x.grad)
    assert grads[0].isfinite().all() and grads[0].abs().max() > 0 and torch.allclose(*grads, atol=1e-6)
    x = (maps[0] * 1e-4).bfloat16().requires_grad_()
    call(x, maps[1].bfloat16()).backward()
    assert x.grad.isfinite().all()


def test_pcl_is_the_positional_loss_of_sal():
    """L_g is PCL's loss, which sal.py uses as its global positional loss."""
    torch.manual_seed(0)
    z, p = torch.randn(12, 5), torch.rand(6)
    want = sal.global_positional_loss(z, p.repeat(2), .35, .1).item()
    assert global_contrastive_loss(*z.chunk(2), p, .35, .1).item() == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------------------------ branches, what is taken


def options(phantom, *extra):
    o = macl.parse_options(["--data", str(phantom), *TINY, *map(str, extra)])
    cases = data.find_cases(phantom)
    macl.resolve(o, cases)
    return o, cases


@pytest.fixture(scope="module")
def setting(phantom, tmp_path_factory):
    """(options, cases, dataset) of the tiny phantom."""
    o, cases = options(phantom)
    return o, cases, common.prepare(cases, o.spacing, o.size, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("blocks", range(5))
def test_shapes_for_any_number_of_decoder_blocks(blocks, phantom):
    S = 2 * 2 ** (4 + blocks)                                                                                       # 2 x 2 at the bottom
    o, _ = options(phantom, "--decoder-blocks", blocks, "--pretrain-size", S)
    unet = common.UNet(1, 2, 4)
    heads = macl.Heads(unet.encoder.widths, blocks, o.eq7)
    pair = macl.branches(unet, heads, torch.rand(4, 3, 1, S, S), o)
    h, C = S // 16, 64 // 2 ** blocks
    assert {k: [tuple(x.shape) for x in v] for k, v in pair.items()} == {
        "g": [(3, 128)] * 2, "y": [(3, 64, 2, 2), (3, 64, h, h)], "l": [(3, C, h, h)] * 2}
    assert (heads.g_ins is heads.g_ins_aux) == (blocks == 0)


def test_which_view_goes_where(phantom):
    """Z^g and Z~^g come from V1 and V2; the maps from I1 and I2; Eq. 7 leaves the decoder out of Z^g; PCL computes no maps."""
    o, _ = options(phantom, "--pretrain-size", 64)
    torch.manual_seed(0)
    unet, views = common.UNet(1, 2, 4).eval(), [torch.rand(2, 1, 64, 64, requires_grad=True) for _ in range(4)]
    heads = macl.Heads(unet.encoder.widths, 2, False).eval()
    pair = macl.branches(unet, heads, views, o)
    used = lambda x: [n for n, g in enumerate(torch.autograd.grad(x.square().sum(), views, retain_graph=True, allow_unused=True))
                      if g is not None and g.abs().max() > 0]
    assert [used(x) for key in ("g", "y", "l") for x in pair[key]] == [[2], [3], [0], [1], [0], [1]]                # I1 I2 V1 V2
    decoder = lambda x: torch.autograd.grad(x.square().sum(), unet.decoder.ups[0].weight, retain_graph=True, allow_unused=True)[0]
    assert decoder(pair["g"][0]) is not None and decoder(pair["g"][1]) is None and decoder(pair["l"][0]).abs().max() > 0
    o.eq7, heads = True, macl.Heads(unet.encoder.widths, 2, True).eval()
    assert decoder(macl.branches(unet, heads, views, o)["g"][0]) is None
    o, _ = options(phantom, "--decoder-blocks", 0, "--lambda2", 0, "--lambda3", 0)
    assert set(macl.branches(unet, macl.Heads(unet.encoder.widths, 0, False), views, o)) == {"g"}


def test_the_encoder_is_shared_and_the_branches_are_asymmetric(phantom):
    o, _ = options(phantom, "--pretrain-size", 64)
    torch.manual_seed(0)
    unet, views = common.UNet(1, 2, 4).eval(), torch.rand(4, 2, 1, 64, 64)
    heads = macl.Heads(unet.encoder.widths, 2, False).eval()
    pair = macl.branches(unet, heads, views, o)
    sizes = []
    handle = unet.encoder.register_forward_hook(lambda module, x, y: sizes.append(tuple(x[0].shape)))
    w = unet.encoder.blocks[0][0].weight
    for x in (pair["g"][0], pair["g"][1], pair["y"][0], pair["y"][1], pair["l"][0], pair["l"][1]):
        assert torch.autograd.grad(x.square().sum(), w, retain_graph=True)[0].abs().max() > 0                       # each branch trains it
    with torch.no_grad():
        w.add_(.5)
        moved = macl.branches(unet, heads, views, o)
    handle.remove()
    assert sizes == [(4, 1, 64, 64), (4, 1, 16, 16)]                                                                # one encoder, two sizes
    assert all(not torch.allclose(a, b) for key in pair for a, b in zip(pair[key], moved[key]))
    # Y is the encoder's map of the bilinearly scaled image, L_ER compares it with the map of the full one
    small = torch.nn.functional.interpolate(views[0], scale_factor=.25, mode="bilinear")
    assert torch.allclose(moved["y"][0], unet.encoder(small)[-1], atol=1e-5)
    assert torch.allclose(moved["l"][0], unet.decoder(unet.encoder(small), 2), atol=1e-5)


def test_views(setting):
    o, _, dataset = setting
    torch.manual_seed(0)
    (I1, I2, V1, V2), pick = macl.view_batch(dataset, np.arange(20), o, CPU)
    assert torch.equal(I1, I2) and torch.equal(I1, dataset.image(pick)) and I1.shape == (4, 1, 32, 32)              # T_fix: identity
    assert not torch.allclose(V1, V2) and not torch.allclose(V1, I1) and V1.max() <= 1 + 1e-6                       # T_var moves only
    o2 = macl.argparse.Namespace(**{**vars(o), "photometric": True})
    (I1, I2, _, _), _ = macl.view_batch(dataset, np.arange(20), o2, CPU)
    assert not torch.allclose(I1, I2)


def test_pretrained_weights_reach_the_fine_tuned_network(phantom, setting, tmp_path):
    """Encoder and two decoder blocks are taken as they are; the other two blocks and the head start as from scratch."""
    _, cases, dataset = setting
    o, _ = options(phantom, "--lr", 0, "--taken-lr", 0, "--pretrain-size", 32, "--decoder-blocks", 1)
    macl.pretrain(dataset, np.arange(20), o, CPU, tmp_path)
    start = common.load_checkpoint(tmp_path / "pretrained.pt", "macl", o.saved)
    assert start["parts"] == ["encoder", "decoder.ups.0", "decoder.blocks.0"]
    tuned = macl.finetune("x", dataset, np.arange(10), 4, 0, o, CPU, tmp_path, start)
    scratch = macl.finetune("x", dataset, np.arange(10), 4, 0, o, CPU, tmp_path)
    torch.manual_seed(1000)
    before = common.UNet(1, 2, 4).state_dict()
    for (k, v), s in zip(tuned.named_parameters(), scratch.parameters()):
        if k.startswith(("encoder.", "decoder.ups.0.", "decoder.blocks.0.")):
            assert torch.equal(v, start["unet"][k]) and not torch.equal(v, before[k])                               # trained, and taken
        else:
            assert torch.equal(v, s)
            assert k.startswith("head") or torch.equal(start["unet"][k], before[k])                                 # not trained


def test_every_weight_counts_and_taken_layers_have_their_own_rate(phantom, setting, tmp_path):
    _, cases, dataset = setting
    weights = {}
    for n, extra in enumerate(([], ["--lambda1", 0], ["--lambda2", 0], ["--lambda3", 0])):
        o, _ = options(phantom, "--pretrain-size", 32, "--decoder-blocks", 1, "--pretrain-steps", 1, *extra)
        macl.pretrain(dataset, np.arange(20), o, CPU, tmp_path)
        weights[n] = common.load_checkpoint(tmp_path / "pretrained.pt")["heads"]
    for n, key in enumerate(("g_ins.2.weight", "g_pix_aux.0.weight", "g_pix_aux.0.weight"), 1):                     # L_g, L_d move their head,
        assert torch.equal(weights[0][key], weights[n][key]) == (n == 3), n                                         # L_ER has none
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"g", "d", "ER"} <= set(log[0])
    start = common.load_checkpoint(tmp_path / "pretrained.pt")
    o, _ = options(phantom, "--taken-lr", 0)
    tuned = macl.finetune("x", dataset, np.arange(10), 4, 0, o, CPU, tmp_path, start)
    assert all(torch.equal(p, start["unet"][k]) == k.startswith(("encoder.", "decoder.ups.0.", "decoder.blocks.0."))
               for k, p in tuned.named_parameters())


def test_equivariance_trains_the_encoder(phantom, setting, tmp_path):
    """L_ER alone falls when it is trained alone."""
    _, _, dataset = setting
    o, _ = options(phantom, "--pretrain-size", 32, "--decoder-blocks", 1, "--pretrain-steps", 60, "--lambda1", 0, "--lambda2", 0)
    macl.pretrain(dataset, np.arange(20), o, CPU, tmp_path)
    ER = [json.loads(line).get("ER") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ER[1] < .7 * ER[0]


def test_T_var_is_affine(setting):
    """A ramp of intensities stays a ramp, turned and scaled: no elastic waves."""
    o, _, dataset = setting

    class Ramp:
        image = staticmethod(lambda pick, device: torch.arange(64.).expand(len(pick), 1, 64, 64))
    (_, _, V1, _), _ = macl.view_batch(Ramp, np.arange(20), o, CPU)
    inner = V1[:, 0, 22:42, 22:42]                                                                                  # reads inside the image
    assert inner.diff(n=2, dim=1).abs().max() < 1e-3 and inner.diff(n=2, dim=2).abs().max() < 1e-3 < inner.diff(dim=2).abs().max()


def test_scratch_is_the_scratch_of_sal(setting, phantom, tmp_path):
    o, cases, dataset = setting
    other = sal.parse_options(["--data", str(phantom), "--size", "32", "--spacing", "5", "--width", "4", "--steps", "4", "--batch", "4",
                               "--windows", "2"])
    sal.resolve(other, cases)
    one = macl.finetune("x", dataset, np.arange(10), 4, 0, o, CPU, tmp_path)
    two = sal.finetune("x", dataset, np.arange(10), 4, 0, other, CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_papers_configuration(setting):
    o = macl.parse_options(["--data", "x", "--paper"])
    macl.resolve(o, setting[1])
    assert (o.width, o.spacing, o.pretrain_batch, o.pretrain_lr, o.sgd, o.decoder_blocks, o.temperature) == (32, 1.25, 16, .1, True, 2, .1)
    assert (o.lambda1, o.lambda2, o.lambda3, o.batch, o.photometric, o.eq7) == (1., .5, 1., 5, False, False)
    assert macl.parse_options(["--paper", "--width", "8"]).width == 8                                               # a given option wins


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A finished tiny run: (its folder, the work folder with the cache, what it printed)."""
    work = tmp_path_factory.mktemp("work")
    done = run("macl.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 1, 2, "--out", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "out", work, done.stdout


def test_what_a_run_writes(finished):
    out, _, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(r["method"], r["labelled"], r["seed"]) for r in metrics["rows"]] == [
        (m, n, 0) for n in (1, 2) for m in ("scratch", "macl")]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["chance"] == pytest.approx(math.log(7)) and {"g", "d", "ER", "ER_strangers", "step"} <= set(log[0])
    assert {f.name for f in (out / "figures").iterdir()} == {"dice.png", "overlays.png", "heat.png", "branches.png"}
    assert "macl gives 88 tensors (encoder, decoder.ups.0, decoder.blocks.0, decoder.ups.1, decoder.blocks.1)" in printed
    assert "start fresh (decoder.blocks.2, decoder.blocks.3, decoder.ups.2, decoder.ups.3, head)" in printed
    assert "gain over scratch" in printed and "| 2 | macl |" in printed and not list(out.rglob("*partial*"))


def test_pcl_reads_scratch_and_the_numbers_repeat(finished, phantom):
    """PCL with --scratch; and the same command again, killed and resumed, gives the numbers of the first run."""
    out, work, _ = finished
    done = run("macl.py", "--data", phantom, *TINY, "--seeds", 0, "--labelled", 1, 2, "--decoder-blocks", 0, "--lambda2", 0, "--lambda3",
               0, "--scratch", "out", "--out", "pcl", cwd=work)
    assert done.returncode == 0 and "| 2 | pcl |" in done.stdout and not (work / "pcl/scratch_n1_s0.pt").exists(), done.stderr
    rows = lambda folder: [t for t in csv.DictReader((work / folder / "per_volume.csv").open()) if t["method"] == "scratch"]
    assert rows("pcl") == rows("out")
    refused(run("macl.py", "--data", phantom, *TINY, "--seeds", 0, "--scratch", "out", "--lr", ".01", "--out", "r", cwd=work), "lr =")
    command = [sys.executable, str(ROOT / "macl.py"), "--data", str(phantom), *TINY, "--seeds", "0", "--labelled", "1", "2", "--out",
               "killed"]
    killed = 0
    for target in ("pretraining.pt", "pretrained.pt", "finetuning.pt", None):
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
    assert killed >= 2 and process.returncode == 0
    assert (work / "killed/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


@pytest.mark.parametrize("flags", [["--decoder-blocks", "3", "--pretrain-size", "128", "--eq7", "--precision", "bfloat16"],
                                   ["--photometric", "--sgd", "--lambda1", "0", "--threshold", ".35", "--split", "val"]])
def test_options(flags, finished, phantom):
    done = run("macl.py", "--data", phantom, *TINY, "--seeds", 0, *flags, "--out", "o" + flags[0], cwd=finished[1])
    assert done.returncode == 0 and "gain over scratch" in done.stdout, done.stderr


def test_init_and_predict(finished, phantom, tmp_path):
    """--init takes another method's encoder; --predict gives the labels that were scored."""
    import nibabel as nib
    out, work, _ = finished
    content = common.load_checkpoint(out / "pretrained.pt")
    common.save_checkpoint(work / "sal.pt", method="sal", options={}, unet=content["unet"], parts=["encoder"])
    done = run("macl.py", "--data", phantom, *TINY, "--seeds", 0, "--init", work / "sal.pt", "--out", "init", cwd=work)
    assert done.returncode == 0 and not (work / "init/pretrained.pt").exists() and "sal gives" in done.stdout, done.stderr
    rows = [t for t in csv.DictReader((out / "per_volume.csv").open()) if (t["method"], t["labelled"], t["seed"]) == ("macl", "2", "0")]
    case = rows[0]["case"]
    done = run("macl.py", "--predict", phantom / f"imagesTr/{case}.nii.gz", "--checkpoint", out / "macl_n2_s0.pt", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    pred = np.asarray(nib.load(tmp_path / f"predictions/{case}.nii.gz").dataobj)
    truth = np.asarray(nib.load(phantom / f"labelsTr/{case}.nii.gz").dataobj)
    want = [float(t["dice"]) for t in rows if t["case"] == case]
    assert list(common.dice_score(pred, truth, [1, 2, 3]).values()) == pytest.approx(want, abs=.02)


def test_bad_options(phantom):
    def bad(*extra):
        with pytest.raises(common.DataError) as error:
            options(phantom, *extra)
        return str(error.value)
    assert "96" in bad("--pretrain-size", 96) and "use a multiple of 64" in bad("--pretrain-size", 96)
    assert "use a multiple of 256" in bad("--decoder-blocks", 4, "--pretrain-size", 128)
    assert "--decoder-blocks 5: use 0 to 4" in bad("--decoder-blocks", 5) and "0 to 4" in bad("--decoder-blocks", -1)
    assert "one of them above 0" in bad("--lambda1", 0, "--lambda2", 0, "--lambda3", 0) and "--lambda1" in bad("--lambda3", -1)
    assert "--threshold 0.0" in bad("--threshold", 0) and "--temperature" in bad("--temperature", 0)
    assert "--size 40" in bad("--size", 40) and "--pretrain-batch 2" in bad("--pretrain-batch", 1)
    assert "not the folder of a run" in bad("--scratch", "nowhere")
    o, _ = options(phantom, "--size", 96)
    assert macl.parse_options(["--data", "x", "--size", "96"]).pretrain_size is None and o.pretrain_size == 64      # TINY gives it


def test_default_pretrain_size(phantom):
    for size, want in ((32, 64), (64, 64), (96, 128), (144, 192)):
        o = macl.parse_options(["--data", "x", "--size", str(size), "--spacing", "2"])
        macl.resolve(o, data.find_cases(phantom))
        assert o.pretrain_size == want
