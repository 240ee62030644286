"""Pix2Rep: Dense Self-Supervised Learning for Medical Image Segmentation (Seince et al.; MIDL 2024; arXiv 2407.20395).

    python pix2rep.py                                     the built-in phantom, no data needed, below 3 minutes on 2 cores
    python pix2rep.py --loss barlow --mean-teacher        the other loss; Mean Teacher on the unlabelled slices as well
    python pix2rep.py --data ../shared/data/acdc          real scans: pre-train, probe, fine-tune, score, draw
    python pix2rep.py --predict IMAGES --checkpoint FILE.pt

Give every pixel a vector: f, the whole U-Net, with an output map of D channels. Moving an image by phi must move its vectors,
and changing its intensities by t must change nothing: phi(f(t(x))) = f(phi(t'(x))), pixel by pixel. InfoNCE pulls the two
vectors of a pixel together and pushes n sampled pixels apart; Barlow Twins makes their channels agree and be uncorrelated.
No label is used. Then few labels teach a 1x1 head (linear probing) or the whole network (fine-tuning).

Paper, code, and what we chose. [paper]: MIDL 2024; [v2]: Pix2Rep-v2, arXiv 2609.01427; [code]: the published code, which has
the contrastive loss only and does not run as it stands; [ours]: silent there, or changed by us.
 1. Symmetric InfoNCE over the 2n vectors of n pixels sampled from the whole batch, n = 1000, tau = 0.53 [code]; tau = 0.1, and
    n / B pixels from every image [ours].
 2. Barlow Twins over all valid pixels of the batch, lambda = 5e-3, d = 256 [v2]; d = 64 [ours].
 3. The ground-truth trap: the published code crops every volume with the box of its ground-truth mask, before pre-training and
    at test time too, which leaks the answer. We crop about the image centre and read labels in fine-tuning and scoring only.
 4. No mask in the code: it samples pixels that phi brought in from outside the image as well. We carry a validity mask
    through phi and sample only pixels whose pre-image, with its neighbours for the interpolation, lies inside [ours].
 5. phi is one affine per image: rotation up to pi/2, crop of side 0.33 to 0.95 at a random place, flips [code]; crop 0.7 to 1
    [ours]. One grid moves the image and the features.
 6. phi comes after the projector g [code]. g and our widening layer see single pixels, so we put phi before them, on the narrow
    map of the U-Net: the same up to interpolation and batch statistics, and a fraction of the cost [ours].
 7. t, t': noise, blur, gamma, bias field, inversion [code]; `common.photometric`, the augmentation of all our methods, without
    inversion (`--inversion`; it slowed learning down) [ours].
 8. U-Net of width 64 with 5 poolings and an output map of D = 1024 channels [code]; width 16, 4 poolings, and the last map of
    16 channels widened to D = 64 by a 1x1 layer, so that the trunk starts the same U-Net as every other method's [ours].
 9. Pre-training: Adam 4.7e-4, batch 8, 200 epochs [code], AdamW 5e-4, warm-up, cosine [v2]; AdamW 1e-3 so [ours].
10. Linear probing: backbone frozen, a 1x1 head on the D channels, Adam 7.6e-3 [code]; AdamW 3e-2, cosine, cross-entropy + Dice.
    Its row from scratch is a frozen random backbone whose batch statistics are set by 20 batches of training slices [ours].
11. Fine-tuning: Adam 5e-5 backbone, 1e-2 head, soft Dice [code]; AdamW 1e-3, 5e-3, cosine, cross-entropy + Dice, a new head on
    the trunk, so that the network is that of the row from scratch [ours].
12. Mean Teacher on top [paper]; its details are ours: half of every batch unlabelled, squared difference of probabilities, the
    teacher sees the slice without change of intensities, weight 5 after a ramp of 40 % of the steps, the teacher is scored. The
    unlabelled half has a forward pass of its own: in one batch, normalisation told the halves apart (Dice 0.73 -> 0.59).
13. Few-shot: for n >= 5 the same number of patients from each of ACDC's five groups [code]; we do so where 5 divides n, and take
    the split's own order otherwise, so that 1, 3, 7 are the patients of our other methods [ours].
14. One pre-training serves all seeds, so the spread over seeds is that of fine-tuning. The last checkpoint is scored [ours].

Letters: B slices in a batch, n sampled pixels, P valid pixels, C channels of an image, D of the output map, d of the projector,
S network size, V slices in a figure, U unlabelled slices, K classes.
"""
import argparse, copy, math, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

import common
from common import (PHANTOM_VERSION, DataError, UNet, default_grid, find_cases, make_phantom, photometric, spatial_grid,
                    split_patients, uniform, warp)

METHOD = "pix2rep"
WAYS = ("scratch", "random-probe", "probe", "pix2rep")                     # rows of the table; --mean-teacher adds two
TEACHER_WAYS = ("scratch-mt", "pix2rep-mt")
PRETRAINED_WAYS = ("probe", "pix2rep", "pix2rep-mt")
SCRATCH_OPTIONS = ("data", "split", "precision", "width", "depth", "dim", "spacing", "size", "probe_steps", "probe_lr", "steps",
                   "batch", "lr", "rotation", "teacher_alpha", "teacher_weight")             # what the other rows depend on

# ------------------------------------------------------------------------------------------------ options


def parse_options(arguments=None):
    """The options of a run; `None` is filled in by `resolve` once the data are known. --paper changes the defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="folder of a dataset (default: the phantom, made on the first run)")
    run.add_argument("--out", default="runs/pix2rep", help="folder for results")
    run.add_argument("--cache", default="cache", help="folder for prepared slices")
    run.add_argument("--labelled", type=int, nargs="+", default=[1, 3, 7], help="numbers of labelled patients")
    run.add_argument("--seeds", type=int, nargs="+", help="seeds of probing and fine-tuning (default: 0 1 2; phantom: 0)")
    run.add_argument("--split", choices=["test", "val"], default="test", help="patients to score; choose options on val")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints for --resume")
    run.add_argument("--init", help="skip pre-training: start from this pretrained.pt of pix2rep.py")
    run.add_argument("--scratch", metavar="RUN", help="read the rows from scratch out of this finished run: they do not depend "
                     "on pre-training")
    run.add_argument("--paper", action="store_true", help="the published configuration, for a GPU; other options still win")
    run.add_argument("--predict", nargs="+", metavar="IMAGE", help="segment these NIfTI files with --checkpoint into --out")
    run.add_argument("--checkpoint", help="a trained network of a run, for --predict")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                     help="bfloat16: convolutions under autocast, twice as fast where the processor has it")
    net = p.add_argument_group("network and grid")
    net.add_argument("--width", type=int, default=16, help="channels of the first U-Net level (code: 64)")
    net.add_argument("--depth", type=int, default=4, help="poolings (code: 5)")
    net.add_argument("--dim", type=int, default=64, help="D, channels of the output map (code: 1024)")
    net.add_argument("--projection", type=int, default=64, help="d, width of the projector g (code and v2: 256)")
    net.add_argument("--spacing", type=float, help="mm a pixel in plane (default: 2 on ACDC)")
    net.add_argument("--size", type=int, help="crop in pixels, divisible by 2^depth (default: 96 on ACDC; code: 128)")
    pre = p.add_argument_group("pre-training")
    pre.add_argument("--loss", choices=["infonce", "barlow"], default="infonce", help="(paper: infonce; v2: barlow)")
    pre.add_argument("--pretrain-steps", type=int, help="(code and v2: 200 epochs, on ACDC's 70 patients 32800 steps)")
    pre.add_argument("--pretrain-batch", type=int, default=8, help="B, slices a step, two views each (code: 8)")
    pre.add_argument("--pretrain-lr", type=float, default=1e-3, help="AdamW, 5 %% warm-up, cosine (code: Adam 4.7e-4; v2: 5e-4)")
    pre.add_argument("--pixels", type=int, default=1000, help="n, pixels of InfoNCE a step (code: 1000)")
    pre.add_argument("--temperature", type=float, default=.1, help="tau of InfoNCE (code: 0.53)")
    pre.add_argument("--lam", type=float, default=5e-3, help="lambda of Barlow Twins (v2: 5e-3)")
    pre.add_argument("--pretrain-rotation", type=float, default=math.pi / 2, help="largest rotation of phi in rad (code: pi/2)")
    pre.add_argument("--crop", type=float, nargs=2, default=[.7, 1.], help="side of phi's crop, smallest and largest, of the "
                     "image's (code: 0.33 0.95)")
    pre.add_argument("--inversion", type=float, default=0., help="probability that t inverts intensities (code: 0.35)")
    fine = p.add_argument_group("linear probing and fine-tuning; steps, batch, rotation and --lr are the same for scratch")
    fine.add_argument("--probe-steps", type=int, help="optimiser steps of the 1x1 head (code: not known)")
    fine.add_argument("--probe-lr", type=float, default=3e-2, help="of the head on a frozen backbone (code: Adam 7.6e-3)")
    fine.add_argument("--steps", type=int, help="optimiser steps of fine-tuning (code: not known)")
    fine.add_argument("--batch", type=int, default=8, help="labelled slices a step (code: not known)")
    fine.add_argument("--lr", type=float, default=2e-3, help="of the whole network from scratch, AdamW, cosine to 0 (ours)")
    fine.add_argument("--backbone-lr", type=float, default=1e-3, help="of a pre-trained backbone (code: Adam 5e-5)")
    fine.add_argument("--head-lr", type=float, default=5e-3, help="of the head on it (code: 1e-2)")
    fine.add_argument("--rotation", type=float, default=.5, help="largest rotation in rad")
    fine.add_argument("--mean-teacher", action="store_true", help="also fine-tune with Mean Teacher, pre-trained and scratch; "
                      "with --resume it adds these rows to a finished run")
    fine.add_argument("--teacher-alpha", type=float, default=.99, help="decay of the teacher (v2: not known)")
    fine.add_argument("--teacher-weight", type=float, default=5., help="of the consistency, after its ramp (v2: not known)")
    if p.parse_args(arguments).paper:
        p.set_defaults(**PAPER)
    return p.parse_args(arguments)


# ------------------------------------------------------------------------------------------------ losses


def info_nce_loss(z_a, z_b, temperature):
    """Symmetric InfoNCE over 2n vectors, Eq. (InfoNCE): every vector must find its partner among the 2n - 1 others.

    z_a, z_b: the two views' vectors of n pixels [n, d], before normalisation; temperature tau. Returns a scalar; its chance
    level is ln(2n - 1).
    """
    n = len(z_a)
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)                  # [2n, d], unit length
    with torch.autocast(z.device.type, enabled=False):                     # float32 also under autocast
        sim = z @ z.T / temperature                                        # [2n, 2n] cosine similarities / tau
    sim = sim.fill_diagonal_(-torch.inf)                                   # k != a: no vector is compared with itself
    # l(a, b) = - log exp(sim(a,b)/tau) / sum_{k != a} exp(sim(a,k)/tau): cross-entropy whose right answer is the partner,
    # n places further. L = 1/(2n) sum_i [ l(z_i, z'_i) + l(z'_i, z_i) ]   (InfoNCE)
    partner = torch.arange(2 * n, device=z.device).roll(n)                 # [2n]: n ... 2n-1, 0 ... n-1
    return F.cross_entropy(sim, partner)


def barlow_twins_loss(u_a, u_b, lam):
    """Barlow Twins over pixels, Eq. (Barlow): the d x d cross-correlation of the two views' channels should be the identity.

    u_a, u_b: the vectors of P pixels [P, d], before standardisation; lam = lambda. Returns a scalar. Cost: P d^2, and no
    P x P matrix anywhere.
    """
    # each component to zero mean and unit std over the P pixels: batch normalisation without parameters
    u_a, u_b = (F.batch_norm(u.float(), None, None, training=True, eps=1e-8) for u in (u_a, u_b))
    with torch.autocast(u_a.device.type, enabled=False):                   # float32 also under autocast
        C = u_a.T @ u_b / len(u_a)                                         # [d, d]   C[a,b] = 1/P sum_p u(p)_a u'(p)_b
    diagonal = C.diagonal()
    # L = sum_a (C[a,a] - 1)^2 + lambda sum_a sum_{b != a} C[a,b]^2    (Barlow)
    return (diagonal - 1).square().sum() + lam * (C.square().sum() - diagonal.square().sum())


@torch.no_grad()
def found_partners(z_a, z_b):
    """Share of pixels whose nearest neighbour in the other view (cosine) is their partner: 1/n is chance, and collapse."""
    a, b = (F.normalize(z.float(), dim=1) for z in (z_a, z_b))             # [n, d]
    return ((a @ b.T).argmax(1) == torch.arange(len(a), device=a.device)).float().mean().item()


@torch.no_grad()
def effective_rank(z):
    """exp(entropy of the normalised singular values) of vectors [n, d] about their mean (Roy and Vetterli 2007): 1 to d."""
    s = torch.linalg.svdvals((z - z.mean(0)).float())
    p = s / s.sum().clamp(min=1e-12)
    return (-(p * p.clamp(min=1e-12).log()).sum()).exp().item()


# ------------------------------------------------------------------------------------------------ pre-training


class Backbone(nn.Module):
    """f: the whole U-Net up to its last 3x3 convolution (`trunk`), and a 1x1 layer that widens this map to D channels.

    `widen` and the projector g work pixel by pixel, on vectors [n, channels]. So phi may come before them, on the narrow map
    of the trunk, and InfoNCE computes them only for the pixels that it samples.
    """
    def __init__(self, channels, o):
        super().__init__()
        self.unet = UNet(channels, 2, o.width, o.depth)                    # its head is not used here
        self.widen = nn.Sequential(nn.Linear(o.width, o.dim, bias=False), nn.BatchNorm1d(o.dim), nn.LeakyReLU(.01))

    def trunk(self, x):                                                    # [B, C, S, S] -> [B, width, S, S]
        return self.unet.decoder(self.unet.encoder(x))

    def forward(self, x):                                                  # [B, C, S, S] -> [B, D, S, S]
        x = self.trunk(x).movedim(1, -1)                                   # [B, S, S, width]
        return self.widen(x.flatten(0, 2)).unflatten(0, x.shape[:3]).movedim(-1, 1)


def load_backbone(channels, o, start=None):
    """f with the weights that pretrained.pt holds (`start`), or random."""
    f = Backbone(channels, o)
    if start:
        common.load_weights(f.unet, start["unet"], start["parts"])
        f.widen.load_state_dict(start["widen"])
    return f


def projector(o):
    """g: a two-layer perceptron on the vectors of pixels [n, D] -> [n, d]; on a map this would be two 1x1 convolutions."""
    return nn.Sequential(nn.Linear(o.dim, o.projection, bias=False), nn.BatchNorm1d(o.projection), nn.ReLU(),
                         nn.Linear(o.projection, o.projection))


def random_affine(n, size, rotation, scale, device):
    """phi: n random crops, rotated and flipped, as (sampling grids [n, S, S, 2], validity masks [n, S, S]).

    scale: (smallest, largest) side of the crop, of the image's; rotation: largest angle in rad. A pixel is valid where its
    pre-image and all its neighbours for the interpolation lie inside the image.
    """
    angle, s = uniform(n, -rotation, rotation, device), uniform(n, *scale, device)
    flip_x, flip_y = uniform(n, -1, 1, device).sign(), uniform(n, -1, 1, device).sign()
    dx, dy = uniform(n, -1, 1, device) * (1 - s), uniform(n, -1, 1, device) * (1 - s)      # the upright crop lies inside
    cos, sin = angle.cos() * s, angle.sin() * s
    # input place = s R(angle) Flip (output place) + offset
    theta = torch.stack([cos * flip_x, -sin * flip_y, dx, sin * flip_x, cos * flip_y, dy], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)   # [n, S, S, 2]; pixel centres end at 1 - 1/S
    return grid, (grid.abs() <= 1 - 1 / size + 1e-6).all(-1)


def random_intensity(x, inversion):
    """t: `photometric`, and with probability `inversion` black for white; [B, C, S, S]."""
    x = photometric(x)
    inverted = (torch.rand(len(x)) < inversion).to(x.device)[:, None, None, None]
    return torch.where(inverted, 1 - x, x)


def view_batch(dataset, numbers, o, device):
    """The two views of B random slices, stacked [2B, C, S, S]: t(x), then phi(t'(x)); with phi's grid and validity mask."""
    pick = numbers[torch.randint(len(numbers), (o.pretrain_batch,)).numpy()]
    x = dataset.image(pick, device)                                        # [B, C, S, S]
    grid, valid = random_affine(len(x), o.size, o.pretrain_rotation, o.crop, device)
    views = torch.cat([random_intensity(x, o.inversion), warp(random_intensity(x, o.inversion), grid)])
    return views.contiguous(memory_format=torch.channels_last), grid, valid


def pixel_pairs(f_a, f_b, grid, valid, n=None):
    """The vectors (phi(f_a), f_b) of the same n valid pixels, [n, D] each: n / B random ones of every image; all if n is None.

    f_a, f_b: maps [B, D, S, S]; f_a is moved by the very grid that moved the image.
    """
    if n is None:
        return warp(f_a, grid).movedim(1, -1)[valid], f_b.movedim(1, -1)[valid]              # [P, D] each
    B, D = f_a.shape[:2]
    place = torch.multinomial(valid.flatten(1).float().cpu(), n // B, replacement=True).to(f_a.device)   # [B, n/B]
    there = grid.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, 2))                 # [B, n/B, 2] pre-images
    a = warp(f_a, there[:, :, None])[..., 0]                               # [B, D, n/B]: phi, computed where it is needed
    b = f_b.flatten(2).gather(2, place[:, None].expand(-1, D, -1))         # [B, D, n/B]
    return a.movedim(1, -1).flatten(0, 1), b.movedim(1, -1).flatten(0, 1)  # [n, D] each


def pretrain(dataset, numbers, o, device, out):
    """Train f and g on the slices `numbers` without labels; writes pretrained.pt."""
    begin = time.time()
    torch.manual_seed(1000)
    f = Backbone(dataset.info["channels"], o).to(device, memory_format=torch.channels_last)
    g = projector(o).to(device)
    parameters = [*f.unet.encoder.parameters(), *f.unet.decoder.parameters(), *f.widen.parameters(), *g.parameters()]
    optimiser = torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5)
    state, step, T = out / "pretraining.pt", 0, o.pretrain_steps
    if o.resume and state.exists():
        step = common.resume_training(state, METHOD, o.saved, (f, g), optimiser)
    bar = trange(step, T, initial=step, total=T, desc="pre-train", disable=None)
    for step in bar:
        warm_up = min(1, (step + 1) / (.05 * T))                           # 5 % of the steps, then a cosine [v2]
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * warm_up * .5 * (1 + math.cos(math.pi * step / T))
        views, grid, valid = view_batch(dataset, numbers, o, device)       # [2B, C, S, S], [B, S, S, 2], [B, S, S]
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            maps = f.trunk(views).float()                                  # [2B, width, S, S]
            pairs = torch.cat(pixel_pairs(*maps.chunk(2), grid, valid, o.pixels if o.loss == "infonce" else None))
            vectors = f.widen(pairs)                                       # [2n, D], or [2P, D] for Barlow Twins
            z_a, z_b = g(vectors).chunk(2)                                 # [n, d] each
        loss = info_nce_loss(z_a, z_b, o.temperature) if o.loss == "infonce" else barlow_twins_loss(z_a, z_b, o.lam)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == T - 1:
            few = torch.linspace(0, len(z_a) - 1, min(1000, len(z_a)), device=device).long()     # pixels of all images
            pair = [z[few].float() for z in (z_a, z_b)]
            if o.loss == "barlow":                                         # as this loss compares them
                pair = [F.batch_norm(z, None, None, training=True) for z in pair]
            row = dict(loss=loss.item(), chance=math.log(2 * len(z_a) - 1) if o.loss == "infonce" else o.projection,
                       found=found_partners(*pair), found_chance=1 / len(few), rank=effective_rank(vectors[few]))
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase="pretrain", step=step, **row)
        if (step + 1) % o.save_every == 0 or step == T - 1:
            common.save_training(state, METHOD, o.saved, step + 1, (f, g), optimiser)
    common.save_checkpoint(out / "pretrained.pt", method=METHOD, options=o.saved, unet=f.unet.state_dict(),
                           parts=["encoder", "decoder"], widen=f.widen.state_dict(), projector=g.state_dict())
    common.log(out, phase="pretrain", seconds=time.time() - begin)


# ------------------------------------------------------------------------------------------------ linear probing, fine-tuning


def labelled_batch(dataset, numbers, n, o, device):
    """n labelled slices, moved and recoloured at random: image [n, C, S, S], label [n, S, S]."""
    pick = numbers[torch.randint(len(numbers), (n,)).numpy()]
    grid = spatial_grid(n, o.size, o.rotation, device)                     # [n, S, S, 2]
    label = warp(dataset.label(pick, device), grid, "nearest")             # [n, S, S]
    image = photometric(warp(dataset.image(pick, device), grid)).contiguous(memory_format=torch.channels_last)
    return image, label


def set_rate(optimiser, step, steps):
    """Cosine from each group's own peak to 0."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * .5 * (1 + math.cos(math.pi * step / steps))


def linear_probe(name, dataset, numbers, unlabelled, classes, seed, o, device, out, start=None):
    """Train a 1x1 head on the frozen maps f(x), pre-trained or random; returns the network f, head."""
    torch.manual_seed(seed)
    f, head = load_backbone(dataset.info["channels"], o, start), nn.Conv2d(o.dim, classes, 1)
    f = f.to(device, memory_format=torch.channels_last)
    head.to(device)
    if not start:                                                          # a random f has no batch statistics of its own
        with torch.no_grad():
            for _ in range(20):
                f(photometric(dataset.image(unlabelled[torch.randint(len(unlabelled), (o.batch,)).numpy()], device)))
    f.eval().requires_grad_(False)                                         # frozen: weights and running statistics
    optimiser = torch.optim.AdamW([{"params": head.parameters(), "peak": o.probe_lr}], weight_decay=0)
    for step in trange(o.probe_steps, desc=name, disable=None):
        set_rate(optimiser, step, o.probe_steps)
        image, label = labelled_batch(dataset, numbers, o.batch, o, device)                  # [B, C, S, S], [B, S, S]
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            maps = f(image)                                                # [B, D, S, S]
        logits = head(maps.float())                                        # [B, K, S, S]
        ce, dice = F.cross_entropy(logits, label), common.dice_loss(logits, label)
        optimiser.zero_grad()
        (ce + dice).backward()
        optimiser.step()
        if step % 50 == 0 or step == o.probe_steps - 1:
            common.log(out, phase=name, step=step, cross_entropy=ce.item(), dice_loss=dice.item())
    return nn.Sequential(f, head)


@torch.no_grad()
def update_teacher(teacher, student, alpha):
    """Mean Teacher: theta' <- alpha theta' + (1 - alpha) theta, for weights and running statistics alike."""
    for mean, value in zip(teacher.state_dict().values(), student.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - alpha)
        else:
            mean.copy_(value)                                              # the counters of batch normalisation


def consistency_loss(logits, target):
    """Mean Teacher: mean square between the student's class probabilities and the teacher's; logits, target [B, K, S, S]."""
    return (logits.softmax(1) - target).square().sum(1).mean()


def agreement(student, teacher, dataset, unlabelled, n, o, device):
    """The consistency loss on n unlabelled slices; the teacher sees them without the change of intensities.

    They go through the student apart from the labelled slices: in one batch, batch normalisation would tell the two apart.
    """
    pick = unlabelled[torch.randint(len(unlabelled), (n,)).numpy()]
    x = warp(dataset.image(pick, device), spatial_grid(n, o.size, o.rotation, device))       # [n, C, S, S]
    x, x_t = (v.contiguous(memory_format=torch.channels_last) for v in (x, photometric(x)))
    with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
        with torch.no_grad():
            target = teacher(x).float().softmax(1)                         # [n, K, S, S]
        return consistency_loss(student(x_t).float(), target)


def finetune(name, dataset, numbers, unlabelled, classes, seed, o, device, out, start=None, mean_teacher=False):
    """Train a U-Net on the labelled slices `numbers`, from scratch or from `start` (what pretrained.pt holds).

    With `mean_teacher`, half of every batch are slices of `unlabelled`, on which the student has to agree with its teacher; the
    teacher is returned.
    """
    torch.manual_seed(seed)
    unet = UNet(dataset.info["channels"], classes, o.width, o.depth).to(device, memory_format=torch.channels_last)
    if start:
        common.load_weights(unet, start["unet"], start["parts"])
    backbone, head = (o.backbone_lr, o.head_lr) if start else (o.lr, o.lr)
    optimiser = torch.optim.AdamW([{"params": [*unet.encoder.parameters(), *unet.decoder.parameters()], "peak": backbone},
                                   {"params": unet.head.parameters(), "peak": head}], lr=o.lr, weight_decay=1e-4)
    teacher = copy.deepcopy(unet).eval().requires_grad_(False)             # its targets come from running statistics
    U = o.batch // 2 if mean_teacher else 0                                # unlabelled slices of a batch
    state, step = out / "finetuning.pt", 0
    if o.resume and state.exists() and common.load_checkpoint(state, METHOD, o.saved).get("run") == name:
        step = common.resume_training(state, METHOD, o.saved, (unet, teacher), optimiser)
    bar = trange(step, o.steps, initial=step, total=o.steps, desc=name, disable=None)
    for step in bar:
        set_rate(optimiser, step, o.steps)
        image, label = labelled_batch(dataset, numbers, o.batch - U, o, device)              # [B - U, C, S, S], [B - U, S, S]
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            logits = unet(image).float()                                   # [B - U, K, S, S]
        ce, dice = F.cross_entropy(logits, label), common.dice_loss(logits, label)
        loss, row = ce + dice, dict(cross_entropy=ce.item(), cross_entropy_chance=math.log(classes), dice_loss=dice.item())
        if mean_teacher:
            L_MT = agreement(unet, teacher, dataset, unlabelled, U, o, device)
            ramp = math.exp(-5 * (1 - min(1, step / (.4 * o.steps))) ** 2) # over the first 40 % of the steps
            loss, row["consistency"] = loss + o.teacher_weight * ramp * L_MT, L_MT.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if mean_teacher:
            update_teacher(teacher, unet, min(o.teacher_alpha, 1 - 1 / (step + 1)))
        if step % 50 == 0 or step == o.steps - 1:
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase=name, step=step, **row)
        if (step + 1) % o.save_every == 0:
            common.save_training(state, METHOD, o.saved, step + 1, (unet, teacher), optimiser, run=name)
    return teacher if mean_teacher else unet


# ------------------------------------------------------------------------------------------------ evaluation and figures


def few_shot(cases, patients, n):
    """The n labelled patients: the first n of `patients`, or, where n >= 5 and the number of pathology groups (ACDC: five)
    divides it, the first of every group, the same number from each as long as no group runs out [code]."""
    group = {c.patient: c.group for c in cases}
    groups = {group[p] for p in patients} - {""}
    if n < 5 or len(groups) < 2 or n % len(groups):
        return patients[:n]
    turn = {p: (sum(group[q] == group[p] for q in patients[:i]), i) for i, p in enumerate(patients)}
    return sorted(patients, key=turn.get)[:n]                              # the first of every group, then the second, ...


def labels_needed(summary, dice, baseline="scratch"):
    """How many labelled patients the baseline needs for this mean Dice: linear in log n between its runs; inf beyond them."""
    runs = sorted((r["labelled"], r["mean_dice"]["mean"]) for r in summary if r["method"] == baseline)
    if runs[0][1] >= dice:
        return float(runs[0][0])
    for (n_a, a), (n_b, b) in zip(runs, runs[1:]):
        if a < dice <= b:
            return math.exp(math.log(n_a) + (dice - a) / (b - a) * math.log(n_b / n_a))
    return math.inf


def checkpoint_path(way, n, seed, o, out):
    """Where the network of a row lies: in the run's folder, or in --scratch if the row does not depend on pre-training."""
    folder = Path(o.scratch) if o.scratch and way not in PRETRAINED_WAYS else out
    return folder / f"{way}_n{n}_s{seed}.pt"


def run_one(way, n, seed, dataset, cases, split, o, device, out, start):
    """Train and score one network (or read it, if it is finished and we resume); returns (run row, volume rows)."""
    path, patients = checkpoint_path(way, n, seed, o, out), few_shot(cases, split["labelled"], n)
    if path.parent != out:
        rows = common.load_checkpoint(path, METHOD, {k: o.saved[k] for k in SCRATCH_OPTIONS})["rows"]
    elif o.resume and path.exists():
        rows = common.load_checkpoint(path, METHOD, o.saved)["rows"]
    else:
        begin, name = time.time(), path.stem
        numbers, unlabelled = dataset.of_patients(patients, labelled=True), dataset.of_patients(split["train"])
        arguments = (name, dataset, numbers, unlabelled, len(cases.classes), seed, o, device, out)
        own = start if way in PRETRAINED_WAYS else None
        net = linear_probe(*arguments, own) if way.endswith("probe") else finetune(*arguments, own, way.endswith("-mt"))
        trained = time.time()
        rows = common.score(net, dataset, cases, split[o.split], device, o.dtype)
        common.save_checkpoint(path, method=METHOD, options=o.saved, way=way, unet=net.state_dict(), rows=rows,
                               classes=cases.classes, channels=cases.channels, modality=cases.modality)
        common.log(out, phase=name, seconds=time.time() - begin, seconds_scoring=time.time() - trained)
    run = common.run_row(way, n, seed, patients, rows)
    print(f"{path.stem:22} mean Dice {run['mean_dice']:.3f}  HD95 {run['hd95_mm']:.1f} mm  missed {run['missed']} of "
          f"{run['n_scores']}")
    return run, [{"method": way, "labelled": n, "seed": seed, **r} for r in rows]


def build(content):
    """The network of a checkpoint written by `run_one`."""
    channels, classes, o = content["channels"], len(content["classes"]), argparse.Namespace(**content["options"])
    if content["way"].endswith("probe"):
        net = nn.Sequential(Backbone(channels, o), nn.Conv2d(o.dim, classes, 1))
    else:
        net = UNet(channels, classes, o.width, o.depth)
    net.load_state_dict(content["unet"])
    return net.eval()


@torch.no_grad()
def pixel_embeddings(images, o, device, start=None):
    """f(x) with unit length [V, D, S, S] of slices [V, C, S, S], of a random backbone or of what pretrained.pt holds."""
    torch.manual_seed(1000)
    f = load_backbone(images.shape[1], o, start).to(device)
    f.train(not start)                                                     # a random backbone has batch statistics only
    return F.normalize(f(images).float(), dim=1).cpu()


def draw_similarity(dataset, patients, o, device, start, path):
    """Fig. 2: a query pixel, and in slices of other patients the cosine similarity to it, before and after pre-training."""
    images = dataset.image(common.middle_slices(dataset, patients), device)       # [V, C, S, S]
    picture, S, q = images[:, 0].cpu(), o.size, o.size // 2
    figure, axes = common.new_figure(3, len(images))
    common.show(axes[0, 0], picture[0], title=f"query: {patients[0]}")
    axes[0, 0].plot(q, q, "o", color="tab:green", mec="white")
    for row, (title, weights, mark) in enumerate((("before", None, "X"), ("after", start, "o")), 1):
        maps = pixel_embeddings(images, o, device, weights)                # [V, D, S, S]
        sim = torch.einsum("d,vdhw->vhw", maps[0, :, q, q], maps)          # [V, S, S]
        for v in range(len(images)):
            axes[row, v].imshow(sim[v], cmap="magma", vmin=-.2, vmax=1)
            axes[row, v].set_title(f"similarity {title}", fontsize=8)
            if v:
                best = int(sim[v].argmax())
                common.show(axes[0, v], picture[v], title=f"{patients[v]}: best match\nX before, o after")
                axes[0, v].plot(best % S, best // S, mark, color="tab:red" if mark == "X" else "tab:green", mec="white")
    common.save_figure(figure, path)


def draw_embeddings(dataset, cases, patients, o, device, start, path):
    """Fig. 4: the vectors of all pixels reduced to three colours by PCA (ours; the paper: t-SNE), beside image and label."""
    numbers = common.middle_slices(dataset, patients)
    images = dataset.image(numbers, device)
    figure, axes = common.new_figure(len(images), 4)
    for column, (title, weights) in enumerate((("before", None), ("after", start)), 2):
        x = pixel_embeddings(images, o, device, weights).movedim(1, -1)    # [V, S, S, D]
        x = x - x.mean((0, 1, 2))
        _, axis = torch.linalg.eigh(x.flatten(0, 2).T @ x.flatten(0, 2))   # [D, D], largest variance last
        colours = x @ axis[:, -3:].flip(1)                                 # [V, S, S, 3]
        lo, hi = colours.flatten(0, 2).quantile(torch.tensor([.02, .98]), dim=0)
        for v in range(len(images)):
            axes[v, column].imshow(((colours[v] - lo) / (hi - lo)).clamp(0, 1))
            axes[v, column].set_title(f"vectors {title}", fontsize=8)
    for v, patient in enumerate(patients):
        common.show(axes[v, 0], images[v, 0].cpu(), title=patient)
        label = dataset.label(numbers[v:v + 1])[0]
        common.show(axes[v, 1], images[v, 0].cpu(), label * (label < 255), len(cases.classes), "label")
    common.save_figure(figure, path)


def draw_annotation_saved(summary, path):
    """Fig. 3, read sideways: how many labelled patients scratch needs for the Dice that fine-tuning reaches with n."""
    figure, axes = common.new_figure(1, 1, 5, 3.4)
    axis = axes[0, 0]
    axis.axis("on")
    for way in ("scratch", METHOD):
        rows = sorted((r["labelled"], r["mean_dice"]["mean"]) for r in summary if r["method"] == way)
        axis.semilogx(*zip(*rows), marker="o", label=way)
    most = max(r["labelled"] for r in summary)
    for n, dice in rows:                                                   # the fine-tuned ones
        needed = labels_needed(summary, dice)
        axis.annotate("", (min(needed, 1.5 * most), dice), (n, dice), arrowprops={"arrowstyle": "->", "ls": ":"})
        text = f"{n} for {needed:.1f}" if needed < math.inf else f"{n} for more than {most}"
        axis.text(n, dice, text, ha="left", va="bottom", fontsize=8)
    ticks = sorted({r["labelled"] for r in summary})
    axis.set_xticks(ticks, ticks)
    axis.margins(.2, .1)
    axis.minorticks_off()
    axis.set(xlabel="labelled patients", ylabel="mean Dice", title="labelled patients: with pre-training for without")
    axis.grid(alpha=.3)
    axis.legend(loc="lower right")
    common.save_figure(figure, path)


def draw_all(dataset, cases, split, o, device, out, start, summary):
    """The figures of a finished run, into out/figures."""
    common.draw_dice_curve(summary, out / "figures/dice.png")
    draw_annotation_saved(summary, out / "figures/annotation_saved.png")
    nets, n, seed = {}, min(o.labelled), o.seeds[0]                        # the fewest labels show the most
    for way in ("scratch", "probe", METHOD):
        nets[f"{way}, {n} labelled"] = build(common.load_checkpoint(checkpoint_path(way, n, seed, o, out))).to(device)
    common.draw_overlays(dataset, cases, split[o.split][:4], nets, device, out / "figures/overlays.png")
    draw_similarity(dataset, split["val"][:5], o, device, start, out / "figures/similarity.png")
    draw_embeddings(dataset, cases, split["val"][:4], o, device, start, out / "figures/embeddings.png")


# ------------------------------------------------------------------------------------------------ main

# The phantom stays below 3 minutes on 2 cores, so its pre-training is too short to be more than a demonstration.
PHANTOM = dict(seeds=[0], pretrain_steps=160, steps=120, probe_steps=50, spacing=2.5, size=64)
REAL = dict(seeds=[0, 1, 2], pretrain_steps=8000, steps=1200, probe_steps=300)
# --paper: the published configuration; 32800 steps of 8 are 200 epochs of the 1312 slices of ACDC's 70 training patients
PAPER = dict(width=64, depth=5, dim=1024, projection=256, size=128, spacing=1.5, pretrain_batch=8, pretrain_steps=32800,
             pretrain_lr=4.7e-4, pixels=1000, temperature=.53, pretrain_rotation=math.pi / 2, crop=[.33, .95], inversion=.35,
             probe_lr=7.6e-3, backbone_lr=5e-5, head_lr=1e-2)


def resolve(o, cases):
    """Fill in the options that depend on the data and refuse impossible ones; o.saved is what a checkpoint must match."""
    for key, value in (REAL if o.data else PHANTOM).items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    if o.spacing is None or o.size is None:
        spacing, size = default_grid(cases)
        o.spacing, o.size = o.spacing or spacing, o.size or size
    unit = 2 ** o.depth if o.depth > 0 else 0
    counts = (o.pretrain_steps, o.steps, o.probe_steps, o.save_every, o.batch, o.pretrain_batch, o.dim,
              o.projection, *o.labelled)
    problems = [
        (not unit or o.size % unit or o.size < 2 * unit, f"--size {o.size}, --depth {o.depth}: use a size that 2^depth divides, "
                                                         "and at least twice that"),
        (min(counts) < 1, "steps, --save-every, batches, --dim, --projection and --labelled must be 1 or more"),
        (o.mean_teacher and o.batch < 2, f"--batch {o.batch}: --mean-teacher needs 2 or more, half of them unlabelled"),
        (o.pixels < 2 * o.pretrain_batch, f"--pixels {o.pixels}: use at least two an image, {2 * o.pretrain_batch} or more"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (not 0 < o.crop[0] <= o.crop[1] <= 1, f"--crop {o.crop[0]} {o.crop[1]}: use the smallest and largest side, in (0, 1]"),
        (o.scratch and not Path(o.scratch).is_dir(), f"--scratch {o.scratch}: is not the folder of a run")]
    for wrong, message in problems:
        if wrong:
            raise DataError(message)
    o.dtype = getattr(torch, o.precision)
    aside = ("resume", "device", "cache", "out", "predict", "checkpoint", "scratch", "mean_teacher", "paper", "dtype", "saved",
             "save_every")
    o.saved = {k: v for k, v in vars(o).items() if k not in aside}


def load_own_start(o):
    """--init: a pretrained.pt of this method (probing needs the widening layer as well). Raises DataError."""
    start = common.load_checkpoint(o.init, METHOD, {k: o.saved[k] for k in ("width", "depth", "dim")})
    if "widen" not in start:
        raise DataError(f"{o.init}: holds no weights to start from; give a pretrained.pt")
    return start


def expected_seconds(dataset, cases, o, device, n_scored):
    """A guess of the whole run's seconds, from five timed steps of the U-Net."""
    unet = UNet(cases.channels, len(cases.classes), o.width, o.depth).to(device, memory_format=torch.channels_last)
    step = common.step_seconds(unet, torch.rand(o.batch, cases.channels, o.size, o.size, device=device), o.dtype)
    each = len(o.labelled) * len(o.seeds)                                  # networks of one row
    rows = (1 if o.scratch else 2) * each
    # rough factors, in this step's time: pre-training on 2B views, fine-tuning, the frozen probe; 0.12 s a volume
    fits = rows * (1.25 * o.steps + .6 * o.probe_steps + o.mean_teacher * 1.4 * o.steps)
    pre = (2.8 if o.loss == "infonce" else 4.) * o.pretrain_steps * o.pretrain_batch / o.batch * (not o.init)
    return step * (pre + fits) + rows * (2 + o.mean_teacher) * n_scored * .12


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
    start = load_own_start(o) if o.init else None
    dataset = common.prepare(cases, o.spacing, o.size, o.cache)
    out = common.start_run(o.out, o.saved, o.resume)
    numbers = dataset.of_patients(split["train"])
    print(f"{root}: {cases.layout}, {len(cases)} volumes, {len(dataset.volume)} slices, classes {', '.join(cases.classes)}")
    print("\n".join(f"warning: {w}" for w in cases.warnings) + "\n" * bool(cases.warnings) +
          f"split {split['rule']}: {len(split['train'])} train ({len(numbers)} slices), {len(split['val'])} val, "
          f"{len(split['test'])} test")
    for n in o.labelled:
        print(f"{n} labelled: {' '.join(few_shot(cases, split['labelled'], n))}")
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
            for way in WAYS + TEACHER_WAYS * o.mean_teacher:
                run, rows = run_one(way, n, seed, dataset, cases, split, o, device, out, start)
                runs.append(run), volume_rows.extend(rows)
                summary, gains = common.write_results(out, runs, volume_rows, cases.classes)
    draw_all(dataset, cases, split, o, device, out, start, summary)
    print(f"\n{common.table(summary, gains, cases.classes)}\n{common.RULE}.\n{len(split[o.split])} {o.split} patients, mean ± "
          f"std over {len(o.seeds)} seeds; gain over scratch in Dice points; "
          f"{sum(common.seconds_by_phase(out).values()):.0f} s. Results in {out}/")
    for row in (r for r in summary if r["method"] == METHOD):
        needed = labels_needed(summary, row["mean_dice"]["mean"])
        print(f"annotation saved: {METHOD} with {row['labelled']} labelled is as good as scratch with "
              f"{f'{needed:.1f}' if needed < math.inf else f'more than {max(o.labelled)}'}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
