"""SAL: Self-Supervised Alignment Learning for Medical Image Segmentation (Li, Ouyang, Wan; ISBI 2024; arXiv 2406.15699).

    python sal.py                                         the built-in phantom, no data needed, about 3 minutes on 2 cores
    python sal.py --data ../shared/data/acdc              real scans: pre-train, fine-tune with few labels, score, draw
    python sal.py --predict IMAGES --checkpoint FILE.pt   segment new volumes

Two close slices of one scan show nearly the same anatomy, so most pixels of one have a match in the other. The local
alignment loss (LA) lets every pixel pick its best match and pulls the two together; the global positional loss (GP) uses
where a slice lies in its volume. Pre-train the encoder with both, without labels; then fine-tune a U-Net with few labels.

Paper, code, and what we chose. [paper]: stated there; [PCL]: Zeng et al., MICCAI 2021, what "positional" means in this field;
[ours]: the paper is silent or we could not read it. The authors published no code.
 1. LA pulls the best match of every pixel to similarity 1 with MAE, on slices with |i-j| / V < t [paper, Fig. 2]. Both directions
    (rows and columns of A) are averaged [ours].
 2. WLA matches inside r x r windows [paper, Figs. 1, 2]. r = 4 [ours].
 3. X = N(E(F(S))): encoder F, linear embedding E, L2 norm over channels N [paper]. E has no bias, X comes from encoder level 3
    (S / 8: 12 x 12 places at 96 x 96; the deepest map would have 6 x 6) [ours].
 4. GP: the paper's equation could not be read, so it is PCL's loss with tau = 0.1, t = 0.35, without its factor tau / 0.07 [PCL].
 5. Total: L_GP + lambda L_WLA; lambda = 1 [ours].
 6. LA has no repulsion and is won by features that teach nothing. Measured on ACDC: as we read it, WLA falls to 0.004 in 50 steps
    and random pairs of pixels reach similarity 0.98 (`--no-uniformity`). Batch-normalised E: 0.001 in 100 steps with random pairs
    at 0, so a code, not one vector. Whitened E: 0.016, slices of *other* volumes 0.037, so a code of the place, read off the zero
    padding. With L_U, which repels pixels that are no match (see `uniformity_loss`), neighbours reach 0.15 and other volumes stay
    at 0.73. The log prints WLA beside this WLA between strangers, its chance level [ours].
 7. Pairs: slice i at random, j at random with |i-j| / V < t, j = i allowed, so that all four kinds of Fig. 1 occur. The two are
    moved by the same transform, or there would be no place to align, and get intensities of their own [ours].
 8. Pre-training by AdamW 1e-3 with a cosine (PCL: SGD 0.1); fine-tuning by cross-entropy + Dice, AdamW, the encoder slower than
    the new decoder (PCL: cross-entropy, Adam 5e-5) [ours]. The encoder is loaded, the decoder starts from scratch [PCL].
 9. One pre-training serves all seeds, so the spread over seeds is that of fine-tuning. The last checkpoint is scored; test
    patients choose nothing [ours].

Letters: B pairs in a batch, n = 2B views, C channels, h, w size of a feature map, S network size, V slices in a volume,
i slice number, K classes.
"""
import argparse, math, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

import common
from common import (PHANTOM_VERSION, DataError, UNet, default_grid, find_cases, make_phantom, photometric, spatial_grid,
                    split_patients, warp)

METHOD = "sal"

# ------------------------------------------------------------------------------------------------ options


def parse_options(arguments=None):
    """The options of a run; `None` is filled in by `resolve` once the data are known."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="folder of a dataset (default: the phantom, made on the first run)")
    run.add_argument("--out", default="runs/sal", help="folder for results")
    run.add_argument("--cache", default="cache", help="folder for prepared slices")
    run.add_argument("--labelled", type=int, nargs="+", default=[1, 3, 7], help="numbers of labelled patients")
    run.add_argument("--seeds", type=int, nargs="+", help="seeds of fine-tuning (default: 0 1 2; phantom: 0)")
    run.add_argument("--split", choices=["test", "val"], default="test", help="patients to score; choose options on val")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints for --resume")
    run.add_argument("--init", help="skip pre-training: start from this pretrained.pt, of any method (the rows "
                     "are still named sal)")
    run.add_argument("--predict", nargs="+", metavar="IMAGE", help="segment these NIfTI files with --checkpoint into --out")
    run.add_argument("--checkpoint", help="a fine-tuned network, for --predict")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                     help="bfloat16: convolutions under autocast, twice as fast where the processor has it")
    net = p.add_argument_group("network and grid")
    net.add_argument("--width", type=int, default=16, help="channels of the first U-Net level (paper: not known)")
    net.add_argument("--spacing", type=float, help="mm a pixel in plane (default: 2 on ACDC)")
    net.add_argument("--size", type=int, help="crop in pixels, divisible by 16 (default: 96 on ACDC; paper: not known)")
    pre = p.add_argument_group("pre-training")
    pre.add_argument("--pretrain-steps", type=int, help="(PCL: 300 epochs)")
    pre.add_argument("--pairs", type=int, default=16, help="B, pairs of slices a step (PCL: 32 slices)")
    pre.add_argument("--pretrain-lr", type=float, default=1e-3, help="Adam, cosine to 0 (PCL: SGD 0.1)")
    pre.add_argument("--threshold", type=float, help="t, of the volume's length (PCL: 0.35 on ACDC, 0.1 on CT; default: 0.35 on "
                     "ACDC and the phantom, else 0.1)")
    pre.add_argument("--temperature", type=float, default=.1, help="tau of GP (PCL: 0.1)")
    pre.add_argument("--lambda-la", type=float, default=1., help="lambda, weight of LA (paper: not known)")
    pre.add_argument("--windows", type=int, default=4, help="r: r x r windows, r divides h and w (paper: WLA, r not known)")
    pre.add_argument("--level", type=int, default=3, help="encoder level of X: size S / 2^level (paper: not known)")
    pre.add_argument("--pretrain-rotation", type=float, default=.5, help="largest rotation of a pair in rad (PCL: pi)")
    pre.add_argument("--no-la", action="store_true", help="ablation: GP alone")
    pre.add_argument("--no-gp", action="store_true", help="ablation: LA alone")
    pre.add_argument("--no-uniformity", action="store_true", help="ablation: the paper's LA without our repulsion; collapses")
    fine = p.add_argument_group("fine-tuning, the same for scratch")
    fine.add_argument("--steps", type=int, help="optimiser steps (PCL: 100 epochs)")
    fine.add_argument("--batch", type=int, default=8, help="slices a step (PCL: 10)")
    fine.add_argument("--lr", type=float, default=2e-3, help="AdamW, cosine to 0 (PCL: Adam 5e-5 to 5e-6)")
    fine.add_argument("--encoder-lr", type=float, help="the same for a pre-trained encoder; scratch uses --lr (default: 1e-4; "
                      "phantom, pre-trained for 300 steps only: 1e-3)")
    fine.add_argument("--rotation", type=float, default=.5, help="largest rotation in rad")
    return p.parse_args(arguments)


# ------------------------------------------------------------------------------------------------ losses


def local_alignment_loss(x_i, x_j, windows=1):
    """Windowed local alignment loss, Eqs. (LA) and (WLA); `windows` = 1 is LA.

    x_i, x_j: maps E(F(S_i)), E(F(S_j)) [B, C, h, w] of close slices, before normalisation; `windows` = r divides h and w.
    Returns a scalar in [0, 2]. Both directions are averaged (ours). Raises ValueError if r does not divide h and w.
    """
    B, C, h, w = x_i.shape
    r = windows
    if h % r or w % r:
        raise ValueError(f"windows = {r} does not divide the feature map of {h} x {w}")
    # X = N(E(F(S))): unit length over channels
    X_i, X_j = (F.normalize(x.float(), dim=1) for x in (x_i, x_j))
    # cut into r^2 windows: [B, C, h, w] -> [B, C, r, h/r, r, w/r] -> [B r^2, hw/r^2, C]
    X_i, X_j = (X.view(B, C, r, h // r, r, w // r).permute(0, 2, 4, 3, 5, 1).reshape(B * r * r, -1, C) for X in (X_i, X_j))
    with torch.autocast(x_i.device.type, enabled=False):                   # float32 also under autocast
        A = X_i @ X_j.mT                                                   # [B r^2, hw/r^2, hw/r^2] cosine similarities
    # L_LA = 1/(hw) sum_p | 1 - max_q A[p,q] |    (LA); the mean over windows of equal size is (WLA)
    forward = (1 - A.amax(2)).abs().mean()                                 # rows: pixels of i
    backward = (1 - A.amax(1)).abs().mean()                                # columns: pixels of j
    return (forward + backward) / 2


def global_positional_loss(z, position, threshold, temperature):
    """Global positional loss, Eq. (GP): InfoNCE with every slice at a like position, of any subject, as a positive.

    z [n, d]: image-level projections; position [n] in (0, 1]; threshold t; temperature tau. Returns a scalar, chance level
    ln(n - 1). An anchor without positive is left out (ours); without any, the loss is 0.
    """
    n = len(z)
    z, position = F.normalize(z.float(), dim=1), position.to(z.device)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    # P(a) = { b != a : |pos_a - pos_b| < t }
    P = ((position[:, None] - position[None]).abs() < threshold) & ~itself             # [n, n]
    # log exp(sim(z_a,z_p)/tau) / sum_{b != a} exp(sim(z_a,z_b)/tau)
    with torch.autocast(z.device.type, enabled=False):                                 # float32 also under autocast
        sim = z @ z.T / temperature                                                    # [n, n]
    log_prob = sim - sim.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)    # [n, n]
    # L_GP = - mean_a 1/|P(a)| sum_{p in P(a)} ...
    count = P.sum(1)                                                                   # [n]
    per_anchor = -(log_prob * P).sum(1) / count.clamp(min=1)
    return per_anchor[count > 0].mean() if (count > 0).any() else z.sum() * 0


def uniformity_loss(x, volume, places=16, sharpness=4.):
    """What LA lacks (ours, after Wang and Isola 2020): pixels that are no match repel, so that equal features cannot win.

        L_U = log mean exp(4 sim(X_a[p], X_b[q]))   over pixels of `places` random places p, q of all n views a, b,
                                                    except the same place of the same volume

    x [n, C, h, w] before normalisation, volume [n]. 0 when pixels are unrelated, 4 when all are equal. Pixels of one place in
    different volumes are among the pairs: else a code of the place, read off the zero padding, makes LA 0 without anatomy.
    """
    n, places = len(x), min(places, x[0, 0].numel())
    place = torch.randperm(x[0, 0].numel())[:places].to(x.device)
    X = F.normalize(x.float(), dim=1).flatten(2)[:, :, place].movedim(1, 2).flatten(0, 1)     # [n places, C]
    same = torch.as_tensor(volume, device=x.device)[:, None].expand(n, places).flatten() * places + torch.arange(
        places, device=x.device).repeat(n)                                                    # [n places] volume and place
    with torch.autocast(x.device.type, enabled=False):
        S = (sharpness * X @ X.T)[same[:, None] != same[None]]                                # [pairs that repel]
    return S.logsumexp(0) - math.log(len(S))


def pair_kinds(volume, slice_number, depth, threshold):
    """The four kinds of pairs of Fig. 1 among n views, as a matrix [n, n] of 1..4 (0 on the diagonal).

    1 two views of one slice; 2 two close slices of one volume; 3 a like position in different volumes; 4 far apart.
    GP attracts kinds 1, 2, 3 and repels all; LA takes kinds 1 and 2. volume, slice_number, depth (= V): [n] each.
    """
    volume, i, V = (torch.as_tensor(np.asarray(x)) for x in (volume, slice_number, depth))
    same = volume[:, None] == volume[None]
    position = (i + 1) / V
    close = (position[:, None] - position[None]).abs() < threshold
    kinds = torch.where(close, torch.where(same, 2, 3), 4)
    kinds[same & (i[:, None] == i[None])] = 1
    return kinds.fill_diagonal_(0)


@torch.no_grad()
def random_pair_similarity(x):
    """Collapse indicator: mean cosine similarity of pixels at different places of different images; x [B, C, h, w].

    1 when all features are equal: LA is then 0 and teaches nothing.
    """
    X = F.normalize(x.float(), dim=1).flatten(2)                           # [B, C, hw]
    return (X * X.roll(1, 0).roll(X.shape[2] // 2 + 1, 2)).sum(1).mean()


# ------------------------------------------------------------------------------------------------ pre-training


class Heads(nn.Module):
    """What pre-training puts on the encoder and throws away: the linear embedding E and the projection of GP."""
    def __init__(self, widths, level, dim=64):
        super().__init__()
        self.level = level
        self.embed = nn.Conv2d(widths[level], dim, 1, bias=False)          # E
        self.project = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.ReLU(), nn.Linear(widths[-1], 128))

    def forward(self, features):
        """Encoder features -> (x [n, dim, h, w] before normalisation, z [n, 128])."""
        return self.embed(features[self.level]), self.project(features[-1].mean((2, 3)))


def sample_pairs(dataset, numbers, n_pairs, threshold):
    """Numbers of slices (i [B], j [B]): i at random, j at random among the slices of its volume with |i-j| / V < t.

    j = i is allowed: two views of one slice. Drawn from torch's generator.
    """
    i = numbers[torch.randint(len(numbers), (n_pairs,)).numpy()]
    V, s = dataset.depth[i], dataset.slice[i]
    reach = np.ceil(threshold * V - 1e-9).astype(int) - 1                  # the largest |i-j| with |i-j| / V < t
    lo, hi = np.maximum(s - reach, 0), np.minimum(s + reach, V - 1)
    j = lo + (torch.rand(n_pairs).numpy() * (hi - lo + 1)).astype(int)
    return i, i - s + j


def pair_batch(dataset, numbers, o, device):
    """B pairs of close slices as views [2B, C, S, S] (all i, then all j), and their numbers [2B]."""
    pick = np.concatenate(sample_pairs(dataset, numbers, o.pairs, o.threshold))
    # the same place for both slices of a pair, intensities each their own (ours)
    grid = spatial_grid(o.pairs, o.size, o.pretrain_rotation, device).repeat(2, 1, 1, 1)           # [2B, S, S, 2]
    views = photometric(warp(dataset.image(pick, device), grid))           # [2B, C, S, S]
    return views.contiguous(memory_format=torch.channels_last), pick


def pretrain(dataset, numbers, o, device, out):
    """Train encoder and heads on the slices `numbers` without labels; writes pretrained.pt."""
    begin = time.time()
    torch.manual_seed(1000)
    unet = UNet(dataset.info["channels"], 2, o.width).to(device, memory_format=torch.channels_last)
    heads = Heads(unet.encoder.widths, o.level).to(device)
    parameters = [*unet.encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5)
    state, step, T = out / "pretraining.pt", 0, o.pretrain_steps
    if o.resume and state.exists():
        step = common.resume_training(state, METHOD, o.saved, (unet, heads), optimiser)
    bar = trange(step, T, initial=step, total=T, desc="pre-train", disable=None)
    for step in bar:
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * .5 * (1 + math.cos(math.pi * step / T))
        views, pick = pair_batch(dataset, numbers, o, device)              # [2B, C, S, S], [2B]
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            x, z = heads(unet.encoder(views))                              # [2B, C, h, w], [2B, d]
        L_GP = global_positional_loss(z, torch.from_numpy(dataset.position[pick]), o.threshold, o.temperature)
        L_WLA = local_alignment_loss(*x.chunk(2), o.windows)
        L_U = uniformity_loss(x, dataset.volume[pick])
        # L = L_GP + lambda L_WLA    (total); L_U is ours
        loss = (0 if o.no_gp else L_GP) + (0 if o.no_la else o.lambda_la * (L_WLA + (0 if o.no_uniformity else L_U)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == T - 1:
            x_i, x_j = x.detach().chunk(2)                                 # WLA's chance level: slices of other pairs
            row = dict(GP=L_GP.item(), GP_chance=math.log(2 * o.pairs - 1), WLA=L_WLA.item(), U=L_U.item(),
                       WLA_strangers=local_alignment_loss(x_i, x_j.roll(1, 0), o.windows).item(),
                       random_pairs=random_pair_similarity(x).item())
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase="pretrain", step=step, **row)
        if step == 0:
            kinds = pair_kinds(dataset.volume[pick], dataset.slice[pick], dataset.depth[pick], o.threshold)
            common.log(out, phase="pretrain", step=0, pairs_of_kind={k: int((kinds == k).sum()) // 2 for k in (1, 2, 3, 4)})
        if (step + 1) % o.save_every == 0 or step == T - 1:
            common.save_training(state, METHOD, o.saved, step + 1, (unet, heads), optimiser)
    common.save_checkpoint(out / "pretrained.pt", method=METHOD, options=o.saved, unet=unet.state_dict(),
                           parts=["encoder"], heads=heads.state_dict())
    common.log(out, phase="pretrain", seconds=time.time() - begin)


# ------------------------------------------------------------------------------------------------ fine-tuning


def finetune(name, dataset, numbers, classes, seed, o, device, out, start=None):
    """Train a U-Net on the labelled slices `numbers`, from scratch or from `start` (what pretrained.pt holds)."""
    torch.manual_seed(seed)
    unet = UNet(dataset.info["channels"], classes, o.width).to(device, memory_format=torch.channels_last)
    if start:
        common.load_weights(unet, start["unet"], start["parts"])
    encoder_lr = o.encoder_lr if start else o.lr
    optimiser = torch.optim.AdamW([{"params": unet.encoder.parameters(), "peak": encoder_lr},
                                   {"params": [*unet.decoder.parameters(), *unet.head.parameters()], "peak": o.lr}],
                                  lr=o.lr, weight_decay=1e-4)
    state, step = out / "finetuning.pt", 0
    if o.resume and state.exists() and common.load_checkpoint(state, METHOD, o.saved).get("run") == name:
        step = common.resume_training(state, METHOD, o.saved, (unet,), optimiser)
    bar = trange(step, o.steps, initial=step, total=o.steps, desc=name, disable=None)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * .5 * (1 + math.cos(math.pi * step / o.steps))
        pick = numbers[torch.randint(len(numbers), (o.batch,)).numpy()]
        grid = spatial_grid(o.batch, o.size, o.rotation, device)           # [B, S, S, 2]
        label = warp(dataset.label(pick, device), grid, "nearest")         # [B, S, S]
        image = photometric(warp(dataset.image(pick, device), grid)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            logits = unet(image).float()                                   # [B, K, S, S]
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


def run_one(method, n, seed, dataset, cases, split, o, device, out, start):
    """Fine-tune and score one network (or read it, if it is finished and we resume); returns (run row, volume rows)."""
    name = f"{method}_n{n}_s{seed}"
    path = out / f"{name}.pt"
    patients = split["labelled"][:n]
    if o.resume and path.exists():
        rows = common.load_checkpoint(path, METHOD, o.saved)["rows"]
    else:
        begin = time.time()
        numbers = dataset.of_patients(patients, labelled=True)
        unet = finetune(name, dataset, numbers, len(cases.classes), seed, o, device, out, start if method == METHOD else None)
        trained = time.time()
        rows = common.score(unet, dataset, cases, split[o.split], device, o.dtype)
        common.save_checkpoint(path, method=METHOD, options=o.saved, unet=unet.state_dict(), rows=rows, classes=cases.classes,
                               channels=cases.channels, modality=cases.modality)
        common.log(out, phase=name, seconds=time.time() - begin, seconds_scoring=time.time() - trained)
    run = common.run_row(method, n, seed, patients, rows)
    print(f"{name:20} mean Dice {run['mean_dice']:.3f}  HD95 {run['hd95_mm']:.1f} mm  missed {run['missed']} of "
          f"{run['n_scores']}")
    return run, [{"method": method, "labelled": n, "seed": seed, **r} for r in rows]


@torch.no_grad()
def feature_maps(images, o, device, pretrained=None):
    """X [V, C, h, w] of the slices of one volume, of a random network or of what pretrained.pt holds."""
    torch.manual_seed(1000)
    unet = UNet(images.shape[1], 2, o.width)
    heads = Heads(unet.encoder.widths, o.level)
    if pretrained:
        common.load_weights(unet, pretrained["unet"], ["encoder"])
        heads.load_state_dict(pretrained["heads"])
    x, _ = heads.to(device)(unet.to(device).encoder(images))               # batch statistics: a random network has no others
    return F.normalize(x.float(), dim=1).cpu()


def draw_matches(dataset, patients, o, device, pretrained, path):
    """For pixels of slice i their best match in slice j = i + 1, before and after pre-training, and one similarity map."""
    first = dataset.of_patients(patients)[0]
    numbers = np.arange(first, first + dataset.depth[first])
    images = dataset.image(numbers, device)                                # [V, C, S, S]
    i = len(numbers) // 2 - 1
    figure, axes = common.new_figure(1, 5, 3.0, 3.2)
    picture, S = images[:, 0].cpu(), o.size
    common.show(axes[0, 0], picture[i], title="slice i, query pixels")
    for column, (title, weights) in enumerate((("before", None), ("after", pretrained))):
        X = feature_maps(images, o, device, weights)
        h, w = X.shape[2:]
        A = X[i].flatten(1).T @ X[i + 1].flatten(1)                        # [hw, hw] cosine similarities
        queries = [(y, x) for y in (h // 3, h // 2, 2 * h // 3) for x in (w // 3, w // 2, 2 * w // 3)]
        best, centre = A.max(1), (h // 2) * w + w // 2
        common.show(axes[0, 1 + column], picture[i + 1], title=f"slice i+1, best matches {title}\nmean best similarity "
                    f"{best.values.mean():.2f}, all pairs {A.mean():.2f}")
        for n, (y, x) in enumerate(queries):
            q = int(best.indices[y * w + x])
            for axis, (row, col) in ((axes[0, 0], (y, x)), (axes[0, 1 + column], (q // w, q % w))):
                axis.plot((col + .5) * S / w - .5, (row + .5) * S / h - .5, "o", color=f"C{n}", markersize=5, mec="white")
        axes[0, 3 + column].imshow(A[centre].view(h, w), cmap="magma", vmin=-.5, vmax=1)
        axes[0, 3 + column].set_title(f"similarity to the middle\npixel of slice i, {title}", fontsize=8)
    common.save_figure(figure, path)


def draw_all(dataset, cases, split, o, device, out, pretrained, summary):
    """The figures of a finished run, into out/figures."""
    common.draw_dice_curve(summary, out / "figures/dice.png")
    nets, n, seed = {}, min(o.labelled), o.seeds[0]                         # the fewest labels show the most
    for method in ("scratch", METHOD):
        nets[f"{method}, {n} labelled"] = build(common.load_checkpoint(out / f"{method}_n{n}_s{seed}.pt")).to(device).eval()
    common.draw_overlays(dataset, cases, split[o.split][:4], nets, device, out / "figures/overlays.png")
    if "heads" in pretrained and pretrained["method"] == METHOD:
        draw_matches(dataset, split["val"], o, device, pretrained, out / "figures/matches.png")


# ------------------------------------------------------------------------------------------------ main

# The phantom stays below 3 minutes on 2 cores, so its pre-training is too short to be more than a demonstration.
PHANTOM = dict(seeds=[0], pretrain_steps=300, steps=240, encoder_lr=1e-3, spacing=2.5, size=64)
REAL = dict(seeds=[0, 1, 2], pretrain_steps=8000, steps=1200, encoder_lr=1e-4)


def resolve(o, cases):
    """Fill in the options that depend on the data and refuse impossible ones; o.saved is what a checkpoint must match."""
    for key, value in (REAL if o.data else PHANTOM).items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    if o.threshold is None:                                                # thick slices are few: 0.35 of 10 slices is 3
        o.threshold = .35 if cases.layout == "ACDC" or not o.data else .1
    if o.spacing is None or o.size is None:
        spacing, size = default_grid(cases)
        o.spacing, o.size = o.spacing or spacing, o.size or size
    side = o.size // 2 ** o.level if 0 <= o.level <= 4 else 0
    problems = [
        (o.size % 16 or o.size < 32, f"--size {o.size}: use a multiple of 16, 32 or more"),
        (not side, f"--level {o.level}: use 0 to 4"),
        (side and (o.windows < 1 or side % o.windows), f"--windows {o.windows}: does not divide the {side} x {side} map of "
                                                       f"--level {o.level}; use a divisor of {side}"),
        (o.no_la and o.no_gp, "--no-la --no-gp: nothing is left to train; drop one of them"),
        (not 0 < o.threshold <= 1, f"--threshold {o.threshold}: use a share of the volume's length in (0, 1]"),
        (min(o.pretrain_steps, o.steps, o.save_every, o.batch, *o.labelled) < 1 or o.pairs < 2, "steps, --save-every, --batch "
         "and --labelled must be 1 or more, --pairs 2 or more")]
    for wrong, message in problems:
        if wrong:
            raise DataError(message)
    o.dtype = getattr(torch, o.precision)
    aside = ("resume", "device", "cache", "out", "predict", "checkpoint", "dtype", "saved", "save_every")
    o.saved = {k: v for k, v in vars(o).items() if k not in aside}


def expected_seconds(dataset, cases, o, device, n_scored):
    """A guess of the whole run's seconds, from five timed steps of the U-Net."""
    unet = UNet(cases.channels, len(cases.classes), o.width).to(device, memory_format=torch.channels_last)
    step = common.step_seconds(unet, torch.rand(o.batch, cases.channels, o.size, o.size, device=device), o.dtype)
    fits = 2 * len(o.labelled) * len(o.seeds)
    # as measured: pre-training, the encoder alone on 2B views, 0.85 of this step; fine-tuning 1.25 of it; 0.12 s a volume
    return step * (.85 * o.pretrain_steps * o.pairs / o.batch * (not o.init) + 1.25 * fits * o.steps) + fits * n_scored * .12


def build(content):
    """The network of a checkpoint written by `run_one`."""
    unet = UNet(content["channels"], len(content["classes"]), content["options"]["width"])
    unet.load_state_dict(content["unet"])
    return unet


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
    dataset = common.prepare(cases, o.spacing, o.size, o.cache)
    out = common.start_run(o.out, o.saved, o.resume)
    numbers = dataset.of_patients(split["train"])
    print(f"{root}: {cases.layout}, {len(cases)} volumes, {len(dataset.volume)} slices, classes {', '.join(cases.classes)}")
    print("\n".join(f"warning: {w}" for w in cases.warnings) + "\n" * bool(cases.warnings) +
          f"split {split['rule']}: {len(split['train'])} train ({len(numbers)} slices), {len(split['val'])} val, "
          f"{len(split['test'])} test; labelled in this order: {' '.join(split['labelled'][:max(o.labelled)])}")
    n_scored = sum(c.patient in split[o.split] for c in cases)
    print(f"options {o.saved}\non {device}, {torch.get_num_threads()} threads: expect about "
          f"{expected_seconds(dataset, cases, o, device, n_scored) / 60:.0f} min")
    if not start and o.resume and (out / "pretrained.pt").exists():
        start = common.load_checkpoint(out / "pretrained.pt", METHOD, o.saved)
    elif not start:
        pretrain(dataset, numbers, o, device, out)
        start = common.load_checkpoint(out / "pretrained.pt")
    runs, volume_rows = [], []
    for n in o.labelled:
        for seed in o.seeds:
            for method in ("scratch", METHOD):
                run, rows = run_one(method, n, seed, dataset, cases, split, o, device, out, start)
                runs.append(run), volume_rows.extend(rows)
                summary, gains = common.write_results(out, runs, volume_rows, cases.classes)
    draw_all(dataset, cases, split, o, device, out, start, summary)
    print(f"\n{common.table(summary, gains, cases.classes)}\n{common.RULE}.\n{len(split[o.split])} {o.split} patients, mean ± "
          f"std over {len(o.seeds)} seeds; gain over scratch in Dice points; "
          f"{sum(common.seconds_by_phase(out).values()):.0f} s. Results in {out}/")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
