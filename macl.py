"""MACL: Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training (Zeng et al.; IEEE JBHI;
arXiv 2309.11876).

    python macl.py                                        the built-in phantom, no data needed, below 3 minutes on 2 cores
    python macl.py --data ../shared/data/acdc             real scans: pre-train, fine-tune with few labels, score, draw
    python macl.py --decoder-blocks 0 --lambda2 0 --lambda3 0          PCL, the method that MACL extends
    python macl.py --predict IMAGES --checkpoint FILE.pt  segment new volumes

Contrast alone pre-trains an encoder and leaves the decoder random. MACL trains both together by making two branches of unequal
depth agree: the dominant branch sends a quarter-sized image through the encoder e and the first two decoder blocks d, the
auxiliary branch sends the full image through the same encoder. Both maps then have one size, and are compared at three levels:
whole slices (L_g), single pixels (L_d), and the encoder's own features at the two scales (L_ER). Slices at a like position in
their volumes are positives. No label is used. Then few labels fine-tune the U-Net, of which d gives half the decoder.

Paper, code, and what we chose. [paper]: stated there; [code]: the authors' published code, of which only pre-training works;
[PCL]: Zeng et al., MICCAI 2021, the base method; [ours]: silent there, or changed by us.
 1. Z^g, the dominant branch's image-level vector: Eq. 7 takes it from the encoder; Eq. 4, Fig. 2 and the code from the decoder's
    output, as we do. `--eq7` takes the other.
 2. tau = 0.1 [paper]; the code's constant factor tau / 0.07 of the loss is dropped [ours].
 3. Eq. 9 sums over the anchors i; the code averages, and so do we: L_g, L_d and their chance ln(2N - 1) do not grow with N.
 4. Positives: |pos_i - pos_j| < threshold; 0.1 on CHD, 0.05 on BraTS [code], 0.35 on ACDC [PCL]; 0.1 here [ours]: with 0.35, 58 %
    of ACDC's pairs are positive, and L_g and L_d hardly fall after 500 steps. A slice's other branch is at the same position, so
    no anchor is without a positive.
 5. Z^l is the decoder's output as it is; only the auxiliary branch has a g_pix: two (3x3 convolution, normalisation, LeakyReLU)
    [code]. g_ins: average pool, linear, ReLU, linear to 128 [code]. With 0 decoder blocks both branches are the same network and
    share g_ins, which makes the script PCL [ours].
 6. T_fix, the change of intensities in every view, is the identity, which the paper found best; `--photometric` uses ours.
    T_var moves V1 and V2 by translation, rotation, scale [paper]; +-10 % of half the width, 0.5 rad, e^+-0.25 [ours].
 7. down is bilinear [code: for maps; ours: for images]. k decoder blocks double the size k times, so the scale is 1 / 2^k.
 8. Small images: 96 / 4 = 24 pixels cannot be halved four times. We pre-train on a larger crop of the same pixel size, 128 x 128
    (`--pretrain-size`, a multiple of 2^(4 + k)), where the dominant branch has maps of 32 to 2 pixels, and fine-tune on 96 x 96
    like the other methods [ours]. 64 x 64 works as well and leaves one pixel at the bottom.
 9. Pre-training: SGD 0.1, cosine, batch 16, 100 epochs [paper], 0.01 [code]; AdamW 1e-3 (`--sgd` for the paper's) [ours].
10. Weights taken: encoder and the k decoder blocks [paper]. Fine-tuning: Adam 5e-4 to 5e-6, cross-entropy, batch 5, 100 epochs
    [paper]; AdamW, cross-entropy + Dice, new layers 2e-3, taken ones slower [ours].
11. The code's "test" list also picks the best epoch. Here the last checkpoint is scored; test patients choose nothing [ours].
12. U-Net of width 32 [code], ACDC at 1.25 mm, 352 x 352 [paper]; --paper uses 384, which can be halved often enough [ours].
13. One pre-training serves all seeds, so the spread over seeds is that of fine-tuning [ours].

Letters: N slices in a batch, C channels, S network size, k decoder blocks, h, w size of the dense maps (S / 16),
P = hw their pixels, V slices in a figure, K classes.
"""
import argparse, math, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

import common
from common import (PHANTOM_VERSION, DataError, UNet, conv_block, default_grid, find_cases, make_phantom, photometric,
                    spatial_grid, split_patients, warp)

METHOD = "macl"
SCRATCH_OPTIONS = ("data", "split", "precision", "width", "spacing", "size", "steps", "batch", "lr", "rotation")

# ------------------------------------------------------------------------------------------------ options


def parse_options(arguments=None):
    """The options of a run; `None` is filled in by `resolve` once the data are known. --paper changes the defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="folder of a dataset (default: the phantom, made on the first run)")
    run.add_argument("--out", default="runs/macl", help="folder for results")
    run.add_argument("--cache", default="cache", help="folder for prepared slices")
    run.add_argument("--labelled", type=int, nargs="+", default=[1, 3, 7], help="numbers of labelled patients")
    run.add_argument("--seeds", type=int, nargs="+", help="seeds of fine-tuning (default: 0 1 2; phantom: 0)")
    run.add_argument("--split", choices=["test", "val"], default="test", help="patients to score; choose options on val")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints for --resume")
    run.add_argument("--init", help="skip pre-training: start from this pretrained.pt, of any method (the rows "
                     "are still named macl)")
    run.add_argument("--scratch", metavar="RUN", help="read the rows from scratch out of this finished run of any method: "
                     "they do not depend on pre-training")
    run.add_argument("--paper", action="store_true", help="the published configuration, for a GPU; other options still win")
    run.add_argument("--predict", nargs="+", metavar="IMAGE", help="segment these NIfTI files with --checkpoint into --out")
    run.add_argument("--checkpoint", help="a fine-tuned network, for --predict")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                     help="bfloat16: convolutions under autocast, twice as fast where the processor has it")
    net = p.add_argument_group("network and grid")
    net.add_argument("--width", type=int, default=16, help="channels of the first U-Net level (code: 32)")
    net.add_argument("--spacing", type=float, help="mm a pixel in plane (default: 2 on ACDC; paper: 1.25)")
    net.add_argument("--size", type=int, help="crop of fine-tuning in pixels, divisible by 16 (default: 96 on ACDC; paper: 352)")
    pre = p.add_argument_group("pre-training")
    pre.add_argument("--pretrain-size", type=int, help="crop of pre-training in pixels, divisible by 2^(4 + decoder blocks) "
                     "(default: --size, rounded up to a multiple of 64)")
    pre.add_argument("--pretrain-steps", type=int, help="(paper: 100 epochs, on ACDC's 70 patients 8200 steps)")
    pre.add_argument("--pretrain-batch", type=int, default=16, help="N, slices a step (paper: 16)")
    pre.add_argument("--pretrain-lr", type=float, default=1e-3, help="AdamW, cosine to 0 (paper: SGD 0.1; code: 0.01)")
    pre.add_argument("--sgd", action="store_true", help="pre-train by SGD with momentum 0.9, as the paper, instead of AdamW")
    pre.add_argument("--decoder-blocks", type=int, default=2, help="k, blocks of the decoder in the dominant branch, whose "
                     "image is scaled by 1 / 2^k (paper: 2)")
    pre.add_argument("--lambda1", type=float, default=1., help="weight of L_g (paper: 1)")
    pre.add_argument("--lambda2", type=float, default=.5, help="weight of L_d (paper: 0.5)")
    pre.add_argument("--lambda3", type=float, default=1., help="weight of L_ER (paper: 1)")
    pre.add_argument("--threshold", type=float, default=.1, help="largest difference in position of positives, of the volume's "
                     "length (code: 0.1 on CHD; PCL: 0.35 on ACDC)")
    pre.add_argument("--temperature", type=float, default=.1, help="tau (paper: 0.1)")
    pre.add_argument("--pretrain-rotation", type=float, default=.5, help="largest rotation of T_var in rad (paper: not known)")
    pre.add_argument("--photometric", action="store_true", help="change the intensities of every view (paper: the identity)")
    pre.add_argument("--eq7", action="store_true", help="Z^g from the encoder, as Eq. 7 has it, instead of the decoder")
    fine = p.add_argument_group("fine-tuning; steps, batch, rotation and --lr are the same for scratch")
    fine.add_argument("--steps", type=int, help="optimiser steps (paper: 100 epochs)")
    fine.add_argument("--batch", type=int, default=8, help="slices a step (paper: 5)")
    fine.add_argument("--lr", type=float, default=2e-3, help="AdamW, cosine to 0 (paper: Adam 5e-4 to 5e-6)")
    fine.add_argument("--taken-lr", type=float, help="the same for pre-trained layers; scratch uses --lr (default: 2e-3; "
                      "phantom: 1e-3)")
    fine.add_argument("--rotation", type=float, default=.5, help="largest rotation in rad")
    if p.parse_args(arguments).paper:
        p.set_defaults(**PAPER)
    return p.parse_args(arguments)


# ------------------------------------------------------------------------------------------------ losses


def positive_pairs(position, threshold):
    """Omega+ as a matrix [2N, 2N] for N slices seen by two branches; position [N] in (0, 1]. Raises ValueError.

    Omega_i+ = { j != i : |pos_i - pos_j| < threshold }: at least the slice's own other branch.
    """
    if threshold <= 0:
        raise ValueError(f"threshold = {threshold}: use a number above 0, or no slice has a positive")
    position = torch.as_tensor(position).repeat(2)                         # [2N]: dominant, auxiliary
    return ((position[:, None] - position).abs() < threshold).fill_diagonal_(False)


def contrastive_loss(z, positive, temperature):
    """What L_g and L_d share: z [..., M, C] before normalisation, positive [M, M]; the mean over anchors and leading axes.

    For one anchor i:  - 1/|Omega_i+| sum_{j in Omega_i+} log exp(sim(z_i,z_j)/tau) / sum_{k != i} exp(sim(z_i,z_k)/tau)
    """
    z = F.normalize(z.float(), dim=-1)                                     # [..., M, C], unit length
    with torch.autocast(z.device.type, enabled=False):                     # float32 also under autocast
        sim = z @ z.mT / temperature                                       # [..., M, M]
    positive = positive.to(sim)
    itself = torch.zeros_like(positive).fill_diagonal_(-torch.inf)         # k != i: exp(-inf) = 0
    # - mean_j (sim_ij - log sum_k exp sim_ik) = log sum_{k != i} exp sim_ik - mean_{j in Omega_i+} sim_ij
    return ((sim + itself).logsumexp(-1) - (sim * (positive / positive.sum(1, keepdim=True))).sum(-1)).mean()


def global_contrastive_loss(z_a, z_b, position, threshold, temperature):
    """L_g, Eq. (9): image-level contrast between the branches, slices at a like position are positives.

    z_a = Z^g, z_b = Z~^g [N, d], before normalisation; position [N] in (0, 1]. A scalar, mean over the 2N anchors [code]
    (Eq. 9: sum); chance level ln(2N - 1). Raises ValueError if threshold <= 0.
    """
    positive = positive_pairs(position, threshold).to(z_a.device)          # [2N, 2N]
    return contrastive_loss(torch.cat([z_a, z_b]), positive, temperature)


def dense_contrastive_loss(z_a, z_b, position, threshold, temperature):
    """L_d, Eq. (10): L_g at every pixel s of the maps, across the 2N samples of the batch; then the mean over pixels.

    z_a = Z^l, z_b = Z~^l [N, C, h, w], before normalisation; position [N]. A scalar, chance level ln(2N - 1). All pixels at
    once: P = hw matrices of 2N x 2N. Raises ValueError if threshold <= 0.
    """
    positive = positive_pairs(position, threshold).to(z_a.device)          # [2N, 2N]
    z = torch.cat([x.flatten(2).permute(2, 0, 1) for x in (z_a, z_b)], 1)  # 2 x [N, C, h, w] -> 2 x [P, N, C] -> [P, 2N, C]
    return contrastive_loss(z, positive, temperature)


def equivariant_loss(y_small, y_full):
    """L_ER, Eq. (11): || Y - down(Y~) ||_1, mean absolute difference; the encoder's maps of the small and of the full image.

    y_small = Y [N, C, h', w'], y_full = Y~ [N, C, h, w], which is scaled down to h' x w' here. Returns a scalar.
    """
    return F.l1_loss(y_small.float(), F.interpolate(y_full.float(), y_small.shape[2:], mode="bilinear"))


# ------------------------------------------------------------------------------------------------ pre-training


class Heads(nn.Module):
    """What pre-training puts on the two branches and throws away: g_ins of each branch, and g_pix of the auxiliary one."""
    def __init__(self, widths, blocks, eq7, dim=128):
        super().__init__()
        C, C_dec = widths[-1], widths[-1 - blocks]                         # channels of the encoder's and the decoder's output
        g_ins = lambda n: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, dim), nn.ReLU(),
                                        nn.Linear(dim, dim))
        self.g_ins = g_ins(C if eq7 else C_dec)                            # [N, C, h, w] -> [N, 128]
        self.g_ins_aux = g_ins(C) if blocks else self.g_ins                # PCL: one network, one head
        self.g_pix_aux = conv_block(C, C_dec)                              # [N, C, h, w] -> [N, C_dec, h, w]


def view_batch(dataset, numbers, o, device):
    """I1, I2, V1, V2 of N random slices as a tuple of [N, C, S, S], Eq. (5), and their numbers [N]."""
    pick = numbers[torch.randint(len(numbers), (o.pretrain_batch,)).numpy()]
    X = dataset.image(pick, device).contiguous(memory_format=torch.channels_last)            # [N, C, S, S]
    # T_var: rotation, scale, translation, without the elastic waves of fine-tuning
    V = [warp(X, spatial_grid(len(X), X.shape[-1], o.pretrain_rotation, device, elastic=0.)) for _ in range(2)]
    views = [X, X, *V]
    return [photometric(x) for x in views] if o.photometric else views, pick                 # T_fix: the identity [paper]


def branches(unet, heads, views, o):
    """What the losses compare, Eqs. (6) and (7), as a dict of pairs (dominant, auxiliary).

    g: (Z^g, Z~^g) [N, 128]. With lambda2 or lambda3 also l: (Z^l, Z~^l) [N, C, h, w] and y: (Y, Y~), [N, C', h', w'] of the
    small image and [N, C', h, w] of the full one.
    """
    I1, I2, V1, V2 = views
    dense = o.lambda2 > 0 or o.lambda3 > 0                                 # PCL needs V alone
    down = lambda x: F.interpolate(x, scale_factor=.5 ** o.decoder_blocks, mode="bilinear")  # [N, C, S / 2^k, S / 2^k]
    # auxiliary branch: the encoder on the full image
    full = unet.encoder(torch.cat([V2, I2]) if dense else V2)[-1]          # [2N, C', h, w] or [N, C', h, w]
    # dominant branch: the same encoder on the small image, and k decoder blocks
    features = unet.encoder(down(torch.cat([V1, I1]) if dense else V1))    # last: [2N, C', h / 2^k, w / 2^k]
    decoded = unet.decoder(features, o.decoder_blocks)                     # [2N, C, h, w]
    N = len(V1)
    Z_g = heads.g_ins((features[-1] if o.eq7 else decoded)[:N])            # Z^g = g_ins(d(e(down(V1)))) (4); Eq. 7 without d
    out = {"g": (Z_g, heads.g_ins_aux(full[:N]))}                          # Z~^g = g~_ins(e(V2))
    if dense:
        Y, Y_aux = features[-1][N:], full[N:]                              # Y = e(down(I1)), Y~ = e(I2)
        out["y"] = Y, Y_aux
        out["l"] = decoded[N:], heads.g_pix_aux(Y_aux)                     # Z^l = d(Y), Z~^l = g~_pix(Y~)
    return out


def pretrain(dataset, numbers, o, device, out):
    """Train encoder, k decoder blocks and heads on the slices `numbers` without labels; writes pretrained.pt."""
    begin = time.time()
    torch.manual_seed(1000)
    unet = UNet(dataset.info["channels"], 2, o.width).to(device, memory_format=torch.channels_last)
    heads = Heads(unet.encoder.widths, o.decoder_blocks, o.eq7).to(device, memory_format=torch.channels_last)
    parts = trained_parts(o.decoder_blocks)
    own = tuple(f"{part}." for part in parts)
    parameters = [*(p for k, p in unet.named_parameters() if k.startswith(own)), *heads.parameters()]
    optimiser = (torch.optim.SGD(parameters, o.pretrain_lr, momentum=.9, weight_decay=1e-5) if o.sgd else
                 torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5))
    state, step, T = out / "pretraining.pt", 0, o.pretrain_steps
    if o.resume and state.exists():
        step = common.resume_training(state, METHOD, o.saved, (unet, heads), optimiser)
    bar = trange(step, T, initial=step, total=T, desc="pre-train", disable=None)
    for step in bar:
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * .5 * (1 + math.cos(math.pi * step / T))
        views, pick = view_batch(dataset, numbers, o, device)              # 4 x [N, C, S, S], [N]
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            pair = branches(unet, heads, views, o)
        position = torch.from_numpy(dataset.position[pick])                # [N]
        L = {"g": global_contrastive_loss(*pair["g"], position, o.threshold, o.temperature)}
        loss = o.lambda1 * L["g"]
        if "l" in pair:
            L["d"] = dense_contrastive_loss(*pair["l"], position, o.threshold, o.temperature)
            L["ER"] = equivariant_loss(*pair["y"])
            # L_MLC = lambda1 L_g + lambda2 L_d + lambda3 L_ER    (8)
            loss = loss + o.lambda2 * L["d"] + o.lambda3 * L["ER"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == T - 1:
            row = {**{k: v.item() for k, v in L.items()}, "chance": math.log(2 * o.pretrain_batch - 1)}
            if "l" in pair:                                                # L_ER's own chance level: another slice's map
                Y, Y_aux = (y.detach() for y in pair["y"])
                row["ER_strangers"] = equivariant_loss(Y, Y_aux.roll(1, 0)).item()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase="pretrain", step=step, **row)
        if (step + 1) % o.save_every == 0 or step == T - 1:
            common.save_training(state, METHOD, o.saved, step + 1, (unet, heads), optimiser)
    common.save_checkpoint(out / "pretrained.pt", method=METHOD, options=o.saved, unet=unet.state_dict(), parts=parts,
                           heads=heads.state_dict())
    common.log(out, phase="pretrain", seconds=time.time() - begin)


def trained_parts(blocks):
    """What pre-training trains of the U-Net, and fine-tuning takes: the encoder and the first `blocks` decoder blocks."""
    return ["encoder", *(f"decoder.{part}.{n}" for n in range(blocks) for part in ("ups", "blocks"))]


# ------------------------------------------------------------------------------------------------ fine-tuning


def finetune(name, dataset, numbers, classes, seed, o, device, out, start=None):
    """Train a U-Net on the labelled slices `numbers`, from scratch or from `start` (what pretrained.pt holds)."""
    torch.manual_seed(seed)
    unet = UNet(dataset.info["channels"], classes, o.width).to(device, memory_format=torch.channels_last)
    taken = common.load_weights(unet, start["unet"], start["parts"])[0] if start else []
    optimiser = torch.optim.AdamW([{"params": [p for k, p in unet.named_parameters() if k in taken], "peak": o.taken_lr},
                                   {"params": [p for k, p in unet.named_parameters() if k not in taken], "peak": o.lr}],
                                  lr=o.lr, weight_decay=1e-4)
    state, step = out / "finetuning.pt", 0
    if o.resume and state.exists() and common.load_checkpoint(state, METHOD, o.saved).get("run") == name:
        step = common.resume_training(state, METHOD, o.saved, (unet,), optimiser)
    bar = trange(step, o.steps, initial=step, total=o.steps, desc=name, disable=None)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * .5 * (1 + math.cos(math.pi * step / o.steps))
        pick = numbers[torch.randint(len(numbers), (o.batch,)).numpy()]
        grid = spatial_grid(o.batch, o.size, o.rotation, device)           # [N, S, S, 2]
        label = warp(dataset.label(pick, device), grid, "nearest")         # [N, S, S]
        image = photometric(warp(dataset.image(pick, device), grid)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            logits = unet(image).float()                                   # [N, K, S, S]
        ce, dice = F.cross_entropy(logits, label), common.dice_loss(logits, label)
        loss = ce + dice
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == o.steps - 1:
            row = dict(cross_entropy=ce.item(), cross_entropy_chance=math.log(classes), dice_loss=dice.item())
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase=name, step=step, **row)
        if (step + 1) % o.save_every == 0:
            common.save_training(state, METHOD, o.saved, step + 1, (unet,), optimiser, run=name)
    return unet


# ------------------------------------------------------------------------------------------------ evaluation and figures


def row_name(o):
    """The name of the pre-trained rows: "pcl" where the options make the script PCL."""
    return "pcl" if o.decoder_blocks == 0 and o.lambda2 == o.lambda3 == 0 else METHOD


def run_one(method, n, seed, dataset, cases, split, o, device, out, start):
    """Fine-tune and score one network (or read it, if it is finished and we resume); returns (run row, volume rows)."""
    name = f"{method}_n{n}_s{seed}"
    path, patients = out / f"{name}.pt", split["labelled"][:n]
    if o.scratch and method == "scratch":                                  # another method's run: the same U-Net and steps
        rows = common.load_checkpoint(Path(o.scratch) / f"{name}.pt", None, {k: o.saved[k] for k in SCRATCH_OPTIONS})["rows"]
    elif o.resume and path.exists():
        rows = common.load_checkpoint(path, METHOD, o.saved)["rows"]
    else:
        begin = time.time()
        numbers = dataset.of_patients(patients, labelled=True)
        own = None if method == "scratch" else start
        unet = finetune(name, dataset, numbers, len(cases.classes), seed, o, device, out, own)
        trained = time.time()
        rows = common.score(unet, dataset, cases, split[o.split], device, o.dtype)
        common.save_checkpoint(path, method=METHOD, options=o.saved, unet=unet.state_dict(), rows=rows, classes=cases.classes,
                               channels=cases.channels, modality=cases.modality)
        common.log(out, phase=name, seconds=time.time() - begin, seconds_scoring=time.time() - trained)
    run = common.run_row(method, n, seed, patients, rows)
    print(f"{name:20} mean Dice {run['mean_dice']:.3f}  HD95 {run['hd95_mm']:.1f} mm  missed {run['missed']} of "
          f"{run['n_scores']}")
    return run, [{"method": method, "labelled": n, "seed": seed, **r} for r in rows]


def build(content):
    """The network of a checkpoint written by `run_one`."""
    unet = UNet(content["channels"], len(content["classes"]), content["options"]["width"])
    unet.load_state_dict(content["unet"])
    return unet.eval()


def heat(maps):
    """Heat maps [V, h, w] in [0, 1]: the mean size of the channels of maps [V, C, h, w], each image by its own maximum."""
    heat = maps.float().abs().mean(1)                                      # [V, h, w]
    return (heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-9)).cpu()


@torch.no_grad()
def draw_branches(dataset, patients, o, device, start, path):
    """The inputs of the two branches and the maps they make of them, on one slice a patient; dataset: that of pre-training."""
    torch.manual_seed(0)
    unet = UNet(dataset.info["channels"], 2, o.width).to(device)
    heads = Heads(unet.encoder.widths, o.decoder_blocks, o.eq7).to(device)
    common.load_weights(unet, start["unet"], start["parts"])
    heads.load_state_dict(start["heads"])
    numbers, few = common.middle_slices(dataset, patients), argparse.Namespace(**vars(o))
    few.pretrain_batch, few.lambda2 = 1, 1.                                # draw the dense maps of PCL as well
    each = [view_batch(dataset, numbers[v:v + 1], few, device)[0] for v in range(len(numbers))]
    I1, I2, V1, V2 = (torch.cat(x) for x in zip(*each))                    # [V, C, S, S] each
    pair = branches(unet, heads, (I1, I2, V1, V2), few)
    I1_small, V1_small = (F.interpolate(x, scale_factor=.5 ** o.decoder_blocks, mode="bilinear") for x in (I1, V1))
    figure, axes = common.new_figure(len(patients), 8)
    for v, row in enumerate(axes):
        for axis, x, title in zip(row, (I2, V2, I1_small, V1_small), ("auxiliary: I2", "auxiliary: V2", "dominant: down(I1)",
                                                                      "dominant: down(V1)")):
            common.show(axis, x[v, 0].cpu(), title=f"{title}\n{x.shape[2]} x {x.shape[3]}")
        for axis, maps, title in zip(row[4:], (pair["y"][1], pair["y"][0], pair["l"][0], pair["l"][1]), (
                "auxiliary: Y~ = e(I2)", "dominant: Y = e(down(I1))", "dominant: Z^l = d(Y)", "auxiliary: Z~^l")):
            axis.imshow(heat(maps)[v], cmap="magma", vmin=0, vmax=1)
            axis.set_title(f"{title}\n{maps.shape[2]} x {maps.shape[3]}", fontsize=8)
    common.save_figure(figure, path)


@torch.no_grad()
def draw_heat(dataset, patients, o, device, start, path):
    """Where the encoder answers, before and after pre-training: heat maps of its two deepest levels over the image."""
    images = dataset.image(common.middle_slices(dataset, patients), device)       # [V, C, S, S]
    figure, axes = common.new_figure(len(patients), 5)
    for v, patient in enumerate(patients):
        common.show(axes[v, 0], images[v, 0].cpu(), title=patient)
    for column, (title, weights) in enumerate((("before", None), ("after", start))):
        torch.manual_seed(1000)
        unet = UNet(images.shape[1], 2, o.width).to(device)
        if weights:
            common.load_weights(unet, weights["unet"], weights["parts"])
        features = unet.encoder(images)                                    # batch statistics: a random network has no others
        for k, level in enumerate((3, 4)):
            maps = F.interpolate(heat(features[level])[:, None], images.shape[2:], mode="bilinear")[:, 0]    # [V, S, S]
            for v in range(len(images)):
                axis = axes[v, 1 + 2 * k + column]
                common.show(axis, images[v, 0].cpu(), title=f"level {level}, {title}")
                axis.imshow(maps[v], cmap="jet", alpha=.45, vmin=0, vmax=1)
    common.save_figure(figure, path)


def draw_all(dataset, large, cases, split, o, device, out, start, summary):
    """The figures of a finished run, into out/figures; dataset: that of fine-tuning, large: that of pre-training."""
    common.draw_dice_curve(summary, out / "figures/dice.png")
    nets, n, seed = {}, min(o.labelled), o.seeds[0]                        # the fewest labels show the most
    for method in ("scratch", row_name(o)):
        folder = Path(o.scratch) if o.scratch and method == "scratch" else out
        nets[f"{method}, {n} labelled"] = build(common.load_checkpoint(folder / f"{method}_n{n}_s{seed}.pt")).to(device)
    common.draw_overlays(dataset, cases, split[o.split][:4], nets, device, out / "figures/overlays.png")
    draw_heat(dataset, split["val"][:4], o, device, start, out / "figures/heat.png")
    if not o.init:                                                         # else there are no heads of these options
        draw_branches(large, split["val"][:3], o, device, start, out / "figures/branches.png")


# ------------------------------------------------------------------------------------------------ main

# The phantom stays below 3 minutes on 2 cores, so its pre-training is too short to be more than a demonstration.
PHANTOM = dict(seeds=[0], pretrain_steps=200, steps=150, taken_lr=1e-3, spacing=2.5, size=64)
REAL = dict(seeds=[0, 1, 2], pretrain_steps=4000, steps=1200, taken_lr=2e-3)
# --paper: the published configuration as far as it is known; 384 for its 352 pixels, 8200 steps of 16 for 100 epochs of ACDC
PAPER = dict(width=32, spacing=1.25, size=384, pretrain_size=384, pretrain_batch=16, pretrain_steps=8200, pretrain_lr=.1,
             sgd=True, batch=5, lr=5e-4, taken_lr=5e-4)


def resolve(o, cases):
    """Fill in the options that depend on the data and refuse impossible ones; o.saved is what a checkpoint must match."""
    for key, value in (REAL if o.data else PHANTOM).items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    if o.spacing is None or o.size is None:
        spacing, size = default_grid(cases)
        o.spacing, o.size = o.spacing or spacing, o.size or size
    if o.pretrain_size is None:                                            # 64 = 2^(4 + 2); the same for PCL, to compare
        o.pretrain_size = -(-o.size // 64) * 64
    k = o.decoder_blocks
    unit, lambdas = 2 ** (4 + k) if 0 <= k <= 4 else 0, (o.lambda1, o.lambda2, o.lambda3)
    problems = [
        (not unit, f"--decoder-blocks {k}: use 0 to 4"),
        (o.size % 16 or o.size < 32, f"--size {o.size}: use a multiple of 16, 32 or more"),
        (unit and (o.pretrain_size % unit or o.pretrain_size < max(unit, 32)),
         f"--pretrain-size {o.pretrain_size}: --decoder-blocks {k} scales it by 1/{2 ** k}, and the encoder halves that four "
         f"times; use a multiple of {unit}, or fewer blocks"),
        (min(lambdas) < 0 or not any(lambdas), "--lambda1 --lambda2 --lambda3: use 0 or more, and one of them above 0"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (not 0 < o.threshold <= 1, f"--threshold {o.threshold}: use a share of the volume's length in (0, 1]"),
        (min(o.pretrain_steps, o.steps, o.save_every, o.batch, *o.labelled) < 1 or o.pretrain_batch < 2, "steps, --save-every, "
         "--batch and --labelled must be 1 or more, --pretrain-batch 2 or more"),
        (o.scratch and not Path(o.scratch).is_dir(), f"--scratch {o.scratch}: is not the folder of a run")]
    for wrong, message in problems:
        if wrong:
            raise DataError(message)
    o.dtype = getattr(torch, o.precision)
    aside = ("resume", "device", "cache", "out", "predict", "checkpoint", "scratch", "paper", "dtype", "saved", "save_every")
    o.saved = {k: v for k, v in vars(o).items() if k not in aside}


def expected_seconds(dataset, cases, o, device, n_scored):
    """A guess of the whole run's seconds, from five timed steps of the U-Net."""
    unet = UNet(cases.channels, len(cases.classes), o.width).to(device, memory_format=torch.channels_last)
    step = common.step_seconds(unet, torch.rand(o.batch, cases.channels, o.size, o.size, device=device), o.dtype)
    fits = (1 if o.scratch else 2) * len(o.labelled) * len(o.seeds)
    # roughly: the encoder on one full image is 0.43 of this step; a full image and a small one, and twice that with L_d or L_ER
    views = (1 + .25 ** o.decoder_blocks) * (2 if o.lambda2 or o.lambda3 else 1)
    pre = .43 * views * o.pretrain_steps * o.pretrain_batch / o.batch * (o.pretrain_size / o.size) ** 2 * (not o.init)
    return step * (pre + 1.25 * fits * o.steps) + fits * n_scored * .12


def main(arguments=None):
    o = parse_options(arguments)
    device = common.pick_device(o.device)
    if o.predict:
        return common.predict_files(o, device, METHOD, build)
    root = Path(o.data) if o.data else Path(o.cache) / f"phantom-{PHANTOM_VERSION}"
    if not o.data and not root.exists():
        make_phantom(root)
    cases = find_cases(root)
    resolve(o, cases)
    split = split_patients(cases)
    if max(o.labelled) > len(split["labelled"]):
        raise DataError(f"--labelled {max(o.labelled)}: only {len(split['labelled'])} training patients have labels")
    start = common.load_start(o.init, UNet(cases.channels, len(cases.classes), o.width)) if o.init else None
    dataset, large = (common.prepare(cases, o.spacing, size, o.cache) for size in (o.size, o.pretrain_size))
    out = common.start_run(o.out, o.saved, o.resume)
    numbers = dataset.of_patients(split["train"])
    print(f"{root}: {cases.layout}, {len(cases)} volumes, {len(dataset.volume)} slices, classes {', '.join(cases.classes)}")
    print("\n".join(f"warning: {w}" for w in cases.warnings) + "\n" * bool(cases.warnings) +
          f"split {split['rule']}: {len(split['train'])} train ({len(numbers)} slices), {len(split['val'])} val, "
          f"{len(split['test'])} test; labelled in this order: {' '.join(split['labelled'][:max(o.labelled)])}")
    n_scored = sum(c.patient in split[o.split] for c in cases)
    print(f"options {o.saved}\non {device}, {torch.get_num_threads()} threads: expect about "
          f"{expected_seconds(dataset, cases, o, device, n_scored) / 60:.0f} min")
    if not start:
        if not (o.resume and (out / "pretrained.pt").exists()):
            pretrain(large, numbers, o, device, out)
        common.load_checkpoint(out / "pretrained.pt", METHOD, o.saved)     # of these options
        start = common.load_start(out / "pretrained.pt", UNet(cases.channels, len(cases.classes), o.width))
    runs, volume_rows = [], []
    for n in o.labelled:
        for seed in o.seeds:
            for method in ("scratch", row_name(o)):
                run, rows = run_one(method, n, seed, dataset, cases, split, o, device, out, start)
                runs.append(run), volume_rows.extend(rows)
                summary, gains = common.write_results(out, runs, volume_rows, cases.classes)
    draw_all(dataset, large, cases, split, o, device, out, start, summary)
    print(f"\n{common.table(summary, gains, cases.classes)}\n{common.RULE}.\n{len(split[o.split])} {o.split} patients, mean ± "
          f"std over {len(o.seeds)} seeds; gain over scratch in Dice points; "
          f"{sum(common.seconds_by_phase(out).values()):.0f} s. Results in {out}/")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
