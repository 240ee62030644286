"""CCT-R: Learning Semi-Supervised Medical Image Segmentation from Spatial Registration (Liu et al.; WACV 2025; arXiv 2409.10422).

    python cct_r.py                                       the built-in phantom, no data needed
    python cct_r.py --data ../shared/data/acdc            real scans: register, train with few labels, score, draw
    python cct_r.py --no-rsl --no-reps --no-contrast      cross teaching alone; every part has its flag
    python cct_r.py --predict IMAGES --checkpoint FILE.pt segment new volumes

A few volumes have labels, many have none. Two networks of different kinds, a U-Net and a Swin-UNet, teach each other on the
unlabelled slices (cross teaching), and a contrast at pixel level keeps classes apart. Registration adds what no network knows:
a labelled volume's label, warped onto an unlabelled one, is a pseudo-label that does not depend on any network (RSL), and pixels
of two volumes that registration brings to one place are the same anatomy, whatever the networks say (REPS).

Paper, code, and what we chose. [paper]: its abstract, captions and published reviews, for no text of its method section could be
read; [base]: the code of MCSC (BMVC 2023), which it extends; [ours]: silent there, or changed by us. The authors' repository has
no code.
 1. Registration is done offline [paper]. How is ours: every volume to every labelled one, in the box about the labelled volume's
    label; affine from 225 starts, corrected from the other side; then each way the flow of a smooth velocity, coarse to fine, on
    the signed square of local cross-correlation.
 2. Best registration selection by cycle consistency [paper]; its score: || T_back(T_there(x)) - x ||, mean over the labelled
    volume's organs [ours]: over the whole box, most of it background, it does not rank registrations (README).
 3. RSL: labels warped by the best registration [paper]; one-hot, linearly, then arg max; 0.5 (cross-entropy + Dice) for both
    networks, weight omega_0 exp(-5 (t/T)^2), omega_0 = 1 [ours].
 4. REPS: positives from registration, from a memory bank [paper]. Common place: through the best partner to the frame of the first
    labelled volume; the 4 nearest features of other volumes within 8 mm; its own term beside the contrast [ours].
 5. Cross teaching: Dice with the other's arg max, 0.1 exp(-5 (1 - t/T_r)^2), T_r = 3/4 of the steps [base].
 6. Local contrast with class-balanced denominators at two levels, in blocks, both networks and all images together, labelled
    slices alone for the first 7.5 % of the steps [base]. Blocks of 12 x 12 pixels of which every second row and column counts, 6
    random ones a step [ours]; [base]: 19 x 19, all. We do not copy its defects: features and labels in different orders, a row of
    blocks too few, the U-Net left in eval mode.
 7. Labelled and unlabelled slices have forward passes of their own [ours]; [base]: one batch. See pix2rep.py, no. 12.
 8. Each network sees a labelled slice with intensities of its own; the unlabelled ones keep theirs, for there the
    networks' answers are labels, and those of slices as they are were better (README) [ours].
 9. U-Net 16 to 256 channels, the result; Swin-UNet with patches of 4 x 4 [base]; three stages of 48 to 192 channels, window 6,
    a 3 x 3 convolution in every block, from scratch [ours]; [base]: Swin-T, ImageNet weights, window 7 (`--swin-dim 96
    --window 7 --swin-weights FILE`).
10. AdamW, 40 000 steps of 2 + 2 slices at 224 x 224 [base]; 1200 steps of 2 + 2 at 96 x 96, cosine [ours]. The baseline has the
    same steps with 8 labelled slices, as many as the two networks see together, and is that of the other methods' scripts. The
    U-Net sees 2 of them a step and is far from done after 1200; `--steps 4800` helps both (README).
11. Warped labels are used for unlabelled training volumes only. The labels of these volumes are read in one place, to draw Fig. 4
    and to judge the registration (`--no-peek` forbids it). Test patients choose nothing; the last checkpoint is scored [ours].

Letters: B slices in a batch, C channels, K classes, S network size, V slices of a volume, Z, Y, X and z, y, x voxels of a box and
its control points, d features of a pixel, n pixels of a group or anchors, G groups, M features in the bank, N slices of a dataset.
"""
import argparse, hashlib, json, math, sys, time
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm, trange

import common
from common import (PHANTOM_VERSION, DataError, UNet, default_grid, find_cases, make_phantom, photometric, spatial_grid,
                    split_patients, warp)

METHOD = "cct_r"
REGISTRATION_VERSION = 4
SCRATCH_OPTIONS = ("data", "split", "precision", "width", "spacing", "size", "steps", "batch", "lr", "rotation")

# ------------------------------------------------------------------------------------------------ options


def parse_options(arguments=None):
    """The options of a run; `None` is filled in by `resolve` once the data are known. --paper changes the defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = p.add_argument_group("run")
    run.add_argument("--data", help="folder of a dataset (default: the phantom, made on the first run)")
    run.add_argument("--out", default="runs/cct_r", help="folder for results")
    run.add_argument("--cache", default="cache", help="folder for prepared slices and registrations")
    run.add_argument("--labelled", type=int, nargs="+", help="numbers of labelled patients (default: 1 3 7; phantom: 1 3)")
    run.add_argument("--seeds", type=int, nargs="+", help="seeds of training (default: 0 1 2; phantom: 0)")
    run.add_argument("--split", choices=["test", "val"], default="test", help="patients to score; choose options on val")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-every", type=int, default=200, help="steps between checkpoints for --resume")
    run.add_argument("--init", help="start the U-Net of CCT-R from this pretrained.pt of sal.py, pix2rep.py or macl.py (ours)")
    run.add_argument("--scratch", metavar="RUN", help="read the rows from scratch (supervised only) out of this finished "
                     "run of any method")
    run.add_argument("--paper", action="store_true", help="the published configuration, for a GPU; other options still win")
    run.add_argument("--predict", nargs="+", metavar="IMAGE", help="segment these NIfTI files with --checkpoint into --out")
    run.add_argument("--checkpoint", help="a trained network of a run, for --predict")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                     help="bfloat16: convolutions under autocast, twice as fast where the processor has it")
    run.add_argument("--no-peek", action="store_true", help="never read labels of unlabelled volumes, not even for Fig. 4")
    run.add_argument("--peek-every", type=int, default=100, help="steps between points of Fig. 4")
    net = p.add_argument_group("networks and grid")
    net.add_argument("--width", type=int, default=16, help="channels of the first U-Net level (base: 16)")
    net.add_argument("--swin-dim", type=int, default=48, help="channels of the Swin-UNet's first stage, divisible by 6 (base: 96)")
    net.add_argument("--window", type=int, default=6, help="tokens along a window's side (base: 7)")
    net.add_argument("--swin-weights", metavar="FILE", help="start the Swin-UNet's encoder from these Swin-T weights; needs "
                     "--swin-dim 96 --window 7 (base: ImageNet)")
    net.add_argument("--spacing", type=float, help="mm a pixel in plane (default: 2 on ACDC)")
    net.add_argument("--size", type=int, help="crop in pixels, divisible by 16 (default: 96 on ACDC; base: 224)")
    reg = p.add_argument_group("registration")
    reg.add_argument("--stiffness", type=float, default=.3, help="weight of the velocity's mean square gradient (ours)")
    reg.add_argument("--no-brs", action="store_true", help="ablation: partners in turn, not by cycle consistency")
    train = p.add_argument_group("training")
    train.add_argument("--steps", type=int, help="optimiser steps, also of the baseline (base: 40000)")
    train.add_argument("--batch", type=int, default=8, help="slices through a network in a step: two networks with a quarter "
                       "labelled, a quarter unlabelled each; baseline: all labelled (base: 8, as 2 x (2 + 2))")
    train.add_argument("--lr", type=float, default=2e-3, help="of the U-Net, AdamW, cosine to 0 (base: 5e-4, poly 0.9)")
    train.add_argument("--swin-lr", type=float, default=5e-4, help="of the Swin-UNet, after 5 %% warm-up (base: 1e-4)")
    train.add_argument("--init-lr", type=float, default=1e-3, help="of a U-Net that starts from --init (ours)")
    train.add_argument("--rotation", type=float, default=.5, help="largest rotation in rad")
    train.add_argument("--no-cross-teaching", action="store_true", help="ablation")
    train.add_argument("--no-contrast", action="store_true", help="ablation")
    train.add_argument("--no-rsl", action="store_true", help="ablation: no warped labels")
    train.add_argument("--no-reps", action="store_true", help="ablation: no positives from registration")
    train.add_argument("--cross-weight", type=float, default=.1, help="of cross teaching, after its ramp (base: 0.1)")
    train.add_argument("--rsl-weight", type=float, default=1., help="omega_0 of RSL, at the first step (paper: not known)")
    train.add_argument("--contrast-weight", type=float, default=.002, help="of the local contrast (base: 0.001 a network)")
    train.add_argument("--reps-weight", type=float, default=.01, help="of REPS (paper: not known)")
    train.add_argument("--temperature", type=float, default=.1, help="tau (base: 0.1)")
    train.add_argument("--projection", type=int, default=64, help="d, width of the projectors (base: 128)")
    train.add_argument("--block", type=int, default=12, help="side in pixels of a local block (base: 19 of 224)")
    train.add_argument("--groups", type=int, default=6, help="blocks of the full map a step (base: all)")
    train.add_argument("--bank", type=int, default=4096, help="features of the memory bank (paper: not known)")
    train.add_argument("--anchors", type=int, default=256, help="anchors of REPS a step (paper: not known)")
    train.add_argument("--positives", type=int, default=4, help="positives of an anchor at most (paper: not known)")
    train.add_argument("--radius", type=float, default=8., help="mm, how near a positive's place must be (paper: not known)")
    if p.parse_args(arguments).paper:
        p.set_defaults(**PAPER)
    return p.parse_args(arguments)


# ------------------------------------------------------------------------------------------------ registration: places and values

# Everything in this chapter is in mm. A volume is a stack of prepared slices with voxels of (slice, row, column) mm, and a place
# is (z, y, x) in mm about the volume's centre, so that volumes of any size and spacing share one kind of coordinate.


def points(shape, step, centre=0.):
    """The places of the voxels of a grid: [Z, Y, X, 3] in mm; shape in voxels, step in mm, centre in mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, step)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) + centre


def sample(x, p, step, mode="bilinear", padding="zeros"):
    """Values [B, C, ...] of volumes x [B, C, Z, Y, X] with voxels of `step` mm at the places p [B, ..., 3]."""
    half = torch.tensor([n * mm / 2 for n, mm in zip(x.shape[2:], step)])
    grid = (p / half).flip(-1).flatten(1, -2)[:, None, None]               # [B, 1, 1, n, 3]; grid_sample wants x, y, z in [-1, 1]
    return F.grid_sample(x, grid, mode, padding, align_corners=False)[:, :, 0, 0].unflatten(-1, p.shape[1:-1])


def inside(p, shape, step):
    """1 where a place lies inside a volume, else 0: p [B, ..., 3] -> [B, 1, ...]."""
    half = torch.tensor([n * mm / 2 for n, mm in zip(shape, step)])
    return (p.abs() <= half).all(-1)[:, None].float()


def move(A, p):
    """x -> A x + b for affine maps [A | b] of shape [B, 3, 4], at the places p [Z, Y, X, 3] or [B, Z, Y, X, 3]."""
    p = p.expand(len(A), *p.shape[-4:])
    return (p.flatten(1, -2) @ A[:, :, :3].mT + A[:, None, :, 3]).view(p.shape)


def box_mean(x, radius):
    """Mean over boxes of 2 radius + 1 voxels along z, y, x of [B, C, Z, Y, X], as three products with banded matrices."""
    for axis, r in zip("zyx", radius):
        n = torch.arange(x.shape["bczyx".index(axis)])
        band = ((n[:, None] - n).abs() <= r).to(x)                         # [n, n]; its rows are the boxes
        x = torch.einsum(f"bczyx,k{axis}->bc{'zyx'.replace(axis, 'k')}", x, band / band.sum(1, keepdim=True))
    return x


def local_correlation(a, b, weight, radius=(1, 2, 2), flat=1e-3):
    """Local normalised cross-correlation, squared with its sign, mean over `weight`: [B, 1, Z, Y, X] each -> [B] in [-1, 1].

        cc = cov |cov| / (var a var b)    in boxes about every voxel, which makes it blind to slow changes of intensity

    Where `a`, the fixed image, is flat (variance below `flat`), there is nothing to compare, and a voxel counts less.
    """
    a_, b_, aa, bb, ab = box_mean(torch.cat([a, b, a * a, b * b, a * b], 1), radius).split(1, 1)
    cov, var_a, var_b = ab - a_ * b_, (aa - a_ * a_).clamp(min=0), (bb - b_ * b_).clamp(min=0)
    weight = weight * var_a / (var_a + flat)
    cc = cov * cov.abs() / (var_a * var_b + 1e-8)
    return (cc * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-3)


# ---------------------------------------------------------------------------------------------- registration: affine, then smooth


def register_affine(fixed, weight, p, moving, step, steps=40, keep=4, turn=.5):
    """Affine maps [A | b] [B, 3, 4] (mm) such that `moving` at A x + b looks like `fixed` at x, and their similarity [B].

    fixed, weight [B, 1, Z, Y, X] on the places p [Z, Y, X, 3]; moving [B, 2, ...]: image and a mask of its scan, voxels of `step`
    mm; either may be one for all. From 225 starts (turns about z, shifts of up to a sixth of the box) the best `keep` of every
    volume are refined by Adam.
    """
    B, reach = max(len(fixed), len(moving)), (p.amax((0, 1, 2)) - p.amin((0, 1, 2))) / 6
    fixed, weight, moving = (x.expand(B, *x.shape[1:]) for x in (fixed, weight, moving))
    shifts = [torch.linspace(-1, 1, n) * r for n, r in zip((3, 5, 5), reach)]
    start = torch.cartesian_prod(torch.tensor([-turn, 0., turn]), *shifts)                   # [225, 4]: angle, dz, dy, dx
    cos, sin, zero = start[:, 0].cos(), start[:, 0].sin(), torch.zeros(len(start))
    dz, dy, dx = start[:, 1:].unbind(1)
    A = torch.stack([zero + 1, zero, zero, dz, zero, cos, -sin, dy, zero, sin, cos, dx], 1).view(-1, 3, 4)   # [225, 3, 4]

    def similarity(A, number):                                             # [b, 3, 4], [b] -> [b]
        m, w = sample(moving[number], move(A, p), step).split(1, 1)        # [b, 1, Z, Y, X] each
        return local_correlation(fixed[number], m, weight[number] * w)
    with torch.no_grad():
        found = torch.stack([similarity(a.expand(B, 3, 4), torch.arange(B)) for a in A])     # [225, B]
    best, number = found.topk(keep, 0).indices.flatten(), torch.arange(B).repeat(keep)       # [keep B]
    M, t = (torch.zeros(len(best), 3, n, requires_grad=True) for n in (3, 1))
    optimiser = torch.optim.Adam([{"params": M, "peak": .02}, {"params": t, "peak": step[1] / 4}])
    for n in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * .5 * (1 + math.cos(math.pi * n / steps))
        now = torch.cat([A[best, :, :3] @ (torch.eye(3) + M), A[best, :, 3:] + t], 2)        # [keep B, 3, 4]
        s = similarity(now, number)
        optimiser.zero_grad()
        (.3 * M.square().sum() - s.sum()).backward()
        optimiser.step()
    choice = s.detach().view(keep, B).argmax(0) * B + torch.arange(B)
    return now.detach()[choice], s.detach()[choice]


def exponential(v, places, squarings=5):
    """The displacement [B, 3, z, y, x] of the flow along a stationary velocity v, which cannot fold but for its discretisation.

    One small step v / 2^n, doubled n times: u <- u + u(x + u(x)). places [z, y, x, 3]: the control points about the box's centre.
    """
    step = [(places[-1, -1, -1, k] - places[0, 0, 0, k]).item() / (n - 1) for k, n in enumerate(v.shape[2:])]
    u = v / 2 ** squarings
    for _ in range(squarings):
        u = u + sample(u, places + u.movedim(1, -1), step, padding="border")
    return u


def control_points(shape, step, across):
    """The places of a grid of control points over a box, `across` of them along its longest side, at least three along each."""
    size = [n * mm for n, mm in zip(shape, step)]
    counts = [max(3, round(across * s / max(size))) for s in size]
    return points(counts, [s / n for s, n in zip(size, counts)])


def register_deformable(fixed, moving, weight, step, levels=((9, 2), (15, 1)), steps=40, stiffness=.3):
    """Smooth displacements u [B, 3, z, y, x] (mm) of control points such that `moving` at x + u(x) looks like `fixed` at x.

    fixed, moving, weight [B, 1, Z, Y, X] on one grid with voxels of `step` mm. Coarse to fine: `levels` are the numbers of control
    points along the longest side, between which u is trilinear, and the factor by which the images are made smaller in plane.
    `stiffness` weighs the mean square of the velocity's gradient.
    """
    whole, v = fixed.shape[2:], torch.zeros(len(fixed), 3, 3, 3, 3)
    for across, smaller in levels:
        places = control_points(whole, step, across)                       # [z, y, x, 3]
        mm = [s * n / k for s, n, k in zip(step, whole, places.shape)]     # between control points
        shape = [whole[0], *(math.ceil(n / smaller) for n in whole[1:])]   # [Z, Y / smaller, X / smaller]
        small = [s * n / k for s, n, k in zip(step, whole, shape)]         # the voxels of this level
        f, m, w = (F.interpolate(x, shape, mode="area") for x in (fixed, moving, weight))
        p, both = points(shape, small), torch.cat([m, w], 1)
        v = F.interpolate(v, places.shape[:3], mode="trilinear").requires_grad_()            # [B, 3, z, y, x]
        optimiser = torch.optim.Adam([v])
        for n in range(steps):
            optimiser.param_groups[0]["lr"] = small[1] / 5 * .5 * (1 + math.cos(math.pi * n / steps))
            d = F.interpolate(exponential(v, places), shape, mode="trilinear")               # [B, 3, Z, Y, X]
            m, w = sample(both, p + d.movedim(1, -1), small).split(1, 1)
            rough = sum((v.diff(dim=k) / mm[k - 2]).square().mean((1, 2, 3, 4)) for k in (2, 3, 4))     # [B]
            optimiser.zero_grad()
            (stiffness * rough - local_correlation(f, m, w)).sum().backward()
            optimiser.step()
        v = v.detach()
    return exponential(v, places)


def jacobian(u, shape, step):
    """Determinants of the Jacobian of x -> x + u(x), below 0 where space is turned inside out: [B, 3, z, y, x] (mm) on a grid of
    `shape` with voxels of `step` mm -> [B, Z-1, Y-1, X-1]."""
    d = F.interpolate(u, shape, mode="trilinear")                          # [B, 3, Z, Y, X]
    J = torch.stack([d.diff(dim=2)[..., :-1, :-1] / step[0], d.diff(dim=3)[:, :, :-1, :, :-1] / step[1],
                     d.diff(dim=4)[:, :, :-1, :-1] / step[2]], -1)         # [B, 3, Z-1, Y-1, X-1, 3]
    return torch.linalg.det(J.movedim(1, -2) + torch.eye(3))


def folded(u, shape, step):
    """Share of voxels [B] that x -> x + u(x) folds; arguments as those of `jacobian`."""
    return (jacobian(u, shape, step) <= 0).float().mean((1, 2, 3))


def cycle_error(there, back, p, step):
    """|| T_back(T_there(x)) - x || in mm at the places p [Z, Y, X, 3]: [B, Z, Y, X]. 0 where the two undo each other.

    there, back [B, 3, Z, Y, X]: displacements on a grid with voxels of `step` mm about the centre of p's volume.
    """
    x = p + sample(there, p.expand(len(there), *p.shape), step, padding="border").movedim(1, -1)        # [B, Z, Y, X, 3]
    return (x + sample(back, x, step, padding="border").movedim(1, -1) - p).norm(dim=-1)


# ------------------------------------------------------------------------------------------------ registration: of a whole dataset


def voxels(dataset, n):
    """Of volume n of a dataset: its shape (V, S, S), its voxels in mm (slice, row, column), and the numbers of its slices."""
    numbers, S, mm = np.flatnonzero(dataset.volume == n), dataset.info["size"], dataset.info["target"]
    return (len(numbers), S, S), (dataset.info["cases"][n]["spacing"][0], mm, mm), numbers


def stack(dataset, n):
    """Volume n of a dataset as [1, 1, V, S, S]; of several channels their mean."""
    return dataset.image(voxels(dataset, n)[2]).mean(1)[None, None]


def registration_grid(dataset):
    """Shape and voxels (mm) of the grid that all volumes are brought to: twice the pixel, and two thirds of a thick slice."""
    thick = [c["spacing"][0] for c in dataset.info["cases"]]
    deep = max(c["spacing"][0] * c["shape"][0] for c in dataset.info["cases"])
    step = (max(float(np.median(thick)) / 1.5, 2 * dataset.info["target"]), *[2 * dataset.info["target"]] * 2)
    return (math.ceil(deep / step[0]), *[dataset.info["size"] // 2] * 2), step


def on_grid(image, spacing, p):
    """The volume [1, 1, V, S, S] at half its size in plane, at the places p [Z, Y, X, 3]: image and mask of the scan,
    [1, 2, Z, Y, X]."""
    half = F.avg_pool3d(image, (1, 2, 2))                                  # [1, 1, V, S/2, S/2]
    w = inside(p[None], image.shape[2:], spacing)                          # [1, 1, Z, Y, X]
    return torch.cat([sample(half, p[None], (spacing[0], 2 * spacing[1], 2 * spacing[2]), padding="border") * w, w], 1)


class Frame:
    """One labelled volume, and the box about its label (wider by a fifth each way) in which all others are registered to it.

    label: one-hot [1, K, V, S, S]; p: places of the box's grid about the volume's centre.
    """
    def __init__(self, dataset, n, shape, step, classes):
        self.step = step
        image, (_, self.spacing, numbers) = stack(dataset, n), voxels(dataset, n)
        label = dataset.label(numbers)                                     # [V, S, S]
        self.label = F.one_hot(label, classes).movedim(-1, 0)[None].float()                  # [1, K, V, S, S]
        where = points(label.shape, self.spacing)[label > 0]               # [n, 3]: the organs
        lo, hi = where.amin(0), where.amax(0)
        self.centre, size = (lo + hi) / 2, (hi - lo) * 1.4
        self.p = points([max(4, math.ceil(s / mm)) for s, mm in zip(size.tolist(), step)], step, self.centre)
        self.fixed, self.weight = on_grid(image, self.spacing, self.p).split(1, 1)      # [1, 1, Z, Y, X] each
        wide = [max(s, 2 * step[1]) for s in step]                         # the affine map is found on fewer voxels
        self.p_wide = points([max(4, math.ceil(s / mm)) for s, mm in zip(size.tolist(), wide)], wide, self.centre)
        self.fixed_wide, self.weight_wide = on_grid(image, self.spacing, self.p_wide).split(1, 1)
        self.organs = sample(1 - self.label[:, :1], self.p[None], self.spacing)[0, 0]        # [Z, Y, X]: 1 in the organs
        self.whole = on_grid(image, self.spacing, points(shape, step))     # [1, 2, Z, Y, X]: all of it, to be moved itself

    def places(self, pair, y):
        """Where the places y [..., 3] of the other volume lie in this one, by its `pair`; nan outside the box."""
        A = pair["A"]
        x = (y - A[:, 3]) @ torch.linalg.inv(A[:, :3]).T - self.centre     # about the box's centre
        size = self.control_step(pair)
        d = sample(pair["back"][None], x[None], size, padding="border")[0].movedim(0, -1)
        out = ~inside(x[None], self.p.shape[:3], self.step)[0, 0].bool()
        return torch.where(out[..., None], torch.nan, x + d + self.centre)

    def control_step(self, pair):
        """mm between the control points of a pair's displacements."""
        return [n * mm / k for n, mm, k in zip(self.p.shape, self.step, pair["back"].shape[1:])]

    def warp_label(self, pair, shape, spacing):
        """This volume's label on the voxels of the other [V, S, S]: one-hot, warped linearly, then arg max; background outside."""
        x = self.places(pair, points(shape, spacing))                      # [V, S, S, 3]
        there = sample(self.label, x.nan_to_num(1e6)[None], self.spacing)[0]                 # [K, V, S, S]
        there[0] += 1e-3                                                   # where all are 0
        return there.argmax(0)


def after_another(A, B):
    """The affine map x -> A(B(x)) of two [B, 3, 4]."""
    return torch.cat([A[:, :, :3] @ B[:, :, :3], A[:, :, :3] @ B[:, :, 3:] + A[:, :, 3:]], 2)


def inverse(A):
    """The inverse of affine maps [B, 3, 4]."""
    M = torch.linalg.inv(A[:, :, :3])
    return torch.cat([M, -M @ A[:, :, 3:]], 2)


def register_batch(frame, moving, step, stiffness):
    """Register the volumes `moving` [B, 2, Z, Y, X] (image, mask; voxels of `step` mm) to a frame, and the frame's volume to them.

    T_there(x) = A (x + there(x)) takes the frame to the volume, T_back(y) = x' + back(x') with x' = A^-1 y takes it back; the two
    displacements are found independently. A list of B pairs: A [3, 4], "there" and "back" [3, z, y, x] in the frame; similarity
    before, after A and after all; cycle error in mm (mean over the frame's organs) and folded share of T_back.
    """
    p, local, B, shape = frame.p, frame.p - frame.centre, len(moving), frame.p.shape[:3]
    A, _ = register_affine(frame.fixed_wide, frame.weight_wide, frame.p_wide, moving, step)
    # from the other side: the box that A has found in the volume, registered to the whole volume of the frame, corrects A
    found = sample(moving, move(A, frame.p_wide), step).split(1, 1)
    A = after_another(A, inverse(register_affine(*found, frame.p_wide, frame.whole, step)[0]))
    first = sample(moving, p.expand(B, *p.shape), step).split(1, 1)        # [B, 1, Z, Y, X] each: image and mask
    m, w = sample(moving, move(A, p), step).split(1, 1)
    f, w = frame.fixed.expand_as(m), frame.weight * w
    there, back = (register_deformable(a, b, w, frame.step, stiffness=stiffness) for a, b in ((f, m), (m, f)))
    with torch.no_grad():
        d, d_back = (F.interpolate(u, shape, mode="trilinear") for u in (there, back))       # [B, 3, Z, Y, X]
        after = local_correlation(f, sample(m, local + d.movedim(1, -1), frame.step), w)
        error = cycle_error(d, d_back, local, frame.step)                  # [B, Z, Y, X]
        rows = dict(A=A, there=there, back=back, before=local_correlation(f, first[0], frame.weight * first[1]),
                    affine=local_correlation(f, m, w), after=after, folded=folded(back, shape, frame.step),
                    cycle=(error * frame.organs).sum((1, 2, 3)) / frame.organs.sum())
    return [{k: v[b].clone() for k, v in rows.items()} for b in range(B)]


def register_all(dataset, volumes, labelled, classes, o):
    """Register every volume of `volumes` to every one of `labelled` (numbers of volumes): {(volume, labelled): pair}, frames.

    A batch is one file in the cache, under a key that holds the dataset and the options, so that a second run reads, and a killed
    run goes on. There is nothing random in it.
    """
    shape, step = registration_grid(dataset)
    data = Path(dataset.images.filename).parent.name                       # the key of the prepared slices: files and options
    key = hashlib.sha1(json.dumps([REGISTRATION_VERSION, data, volumes, o.stiffness]).encode()).hexdigest()[:16]
    folder = common.make_folder(Path(o.cache) / f"registration-{key}")
    frames, pairs = {n: Frame(dataset, n, shape, step, classes) for n in labelled}, {}
    jobs = [(n, volumes[b:b + 16]) for n in labelled for b in range(0, len(volumes), 16)]
    moving = {}
    for n, batch in tqdm(jobs, "register", disable=None):
        file = folder / f"{n}-{batch[0]}.pt"
        if not file.exists():
            for u in batch:
                if u not in moving:
                    moving[u] = on_grid(stack(dataset, u), voxels(dataset, u)[1], points(shape, step))
            made = register_batch(frames[n], torch.cat([moving[u] for u in batch]), step, o.stiffness)
            common.save_checkpoint(file, method=METHOD, options={}, pairs=made)
        for u, pair in zip(batch, common.load_checkpoint(file, METHOD)["pairs"]):
            pairs[u, n] = pair
    return pairs, frames


def best_partner(pairs, volume, others, brs=True):
    """BRS: the labelled volume l* whose registration with `volume` has the smallest cycle error; never the volume itself.

    Without `brs`, partners are taken in turn, whatever their registration is worth.
    """
    others = [n for n in others if n != volume]
    return min(others, key=lambda n: pairs[volume, n]["cycle"].item()) if brs else others[volume % len(others)]


def common_places(dataset, pairs, frames, volumes, labelled, brs):
    """For every slice: warped label [N, S, S] (uint8) and common place [N, 3, S, S] (float16, mm; nan outside).

    A pixel goes to its best partner l*, and from there to the frame of the first labelled volume, the common one.
    """
    N, S, first = len(dataset.volume), dataset.info["size"], labelled[0]
    label, place = torch.zeros(N, S, S, dtype=torch.uint8), torch.full((N, 3, S, S), torch.nan, dtype=torch.float16)
    for u in volumes:
        shape, spacing, numbers = voxels(dataset, u)
        y = points(shape, spacing)                               # [V, S, S, 3]
        if u in labelled:
            x, partner = y, u
        else:
            partner = best_partner(pairs, u, labelled, brs)
            x = frames[partner].places(pairs[u, partner], y)
            label[numbers] = frames[partner].warp_label(pairs[u, partner], shape, spacing).byte()
        if partner != first:
            x = frames[first].places(pairs[partner, first], x.nan_to_num(1e6))
        place[numbers] = x.movedim(-1, 1).half()
    return label, place


# ------------------------------------------------------------------------------------------------ the Swin-UNet


class WindowAttention(nn.Module):
    """Attention among the tokens of one window, with a learnt bias for every relative position; names as in Swin's checkpoints."""
    def __init__(self, dim, window, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=.02)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))             # [n, 2]: row, column
        away = place[:, None] - place + window - 1                         # [n, n, 2] in 0 .. 2 window - 2
        self.register_buffer("relative_position_index", away[..., 0] * (2 * window - 1) + away[..., 1], persistent=False)

    def forward(self, x, mask):                                            # [B w, n, dim], [w, n, n] with -inf between regions
        Bw, n, dim = x.shape
        q, k, v = self.qkv(x).view(Bw, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # [B w, heads, n, dim / heads] each
        bias = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)     # [heads, n, n]
        bias = (bias + mask[:, None]).to(q)                                # [w, heads, n, n]
        # softmax(q k' / sqrt(d) + bias) v
        logits = (q * q.shape[-1] ** -.5) @ k.mT                           # [B w, heads, n, n]
        x = (logits.unflatten(0, (-1, len(mask))) + bias).flatten(0, 1).softmax(-1).to(v) @ v    # [B w, heads, n, dim / heads]
        return self.proj(x.transpose(1, 2).reshape(Bw, n, dim))


def to_windows(x, w):
    """[B, H, W, C] -> [B (H/w)(W/w), w^2, C]."""
    B, H, W, C = x.shape
    return x.view(B, H // w, w, W // w, w, C).transpose(2, 3).reshape(-1, w * w, C)


def from_windows(x, w, H, W):
    """The inverse of `to_windows`."""
    x = x.view(-1, H // w, W // w, w, w, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, H, W, x.shape[-1])


@lru_cache(maxsize=64)
def attention_mask(H, W, w, shift, real_h, real_w):
    """0 between tokens that may see each other, -inf elsewhere: [windows, w^2, w^2] for an H x W map rolled by -shift.

    After the roll, windows at the border hold tokens from opposite sides of the image, and tokens of the padding beyond
    real_h x real_w: each keeps to its own kind.
    """
    region = lambda n, real: (n < shift).long() + 2 * (n >= real).long()   # rolled to the other side, padding, both or neither
    kind = 4 * region(torch.arange(H), real_h)[:, None] + region(torch.arange(W), real_w)    # [H, W], before the roll
    kind = to_windows(kind.roll((-shift, -shift), (0, 1))[None, ..., None], w)[..., 0]       # [windows, w^2]
    return torch.where(kind[:, :, None] == kind[:, None], 0., -torch.inf)


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window in every second block, and a perceptron, both residual: [B, H, W, C].

    A 3 x 3 convolution of each channel comes first (Chu et al. 2021): windows do not know where in the image they are, and with
    few scans that is hard to do without (ours; README).
    """
    def __init__(self, dim, window, heads, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        B, H, W, C = x.shape
        w = self.window
        pad_h, pad_w, shift = -H % w, -W % w, self.shift if max(H, W) > w else 0             # one window: nothing to shift
        x = x + self.place(x.movedim(-1, 1)).movedim(1, -1)                # convolved as [B, C, H, W]
        y = F.pad(self.norm1(x), (0, 0, 0, pad_w, 0, pad_h)).roll((-shift, -shift), (1, 2))  # [B, H + pad_h, W + pad_w, C]
        mask = attention_mask(H + pad_h, W + pad_w, w, shift, H, W).to(x.device)
        y = from_windows(self.attn(to_windows(y, w), mask), w, H + pad_h, W + pad_w)
        x = x + y.roll((shift, shift), (1, 2))[:, :H, :W]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]: four neighbours side by side, then linear."""
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x))


class PatchExpanding(nn.Module):
    """[B, H, W, C] -> [B, f H, f W, C_out]: linear, then every token becomes f x f tokens."""
    def __init__(self, dim, out, factor):
        super().__init__()
        self.factor, self.expand, self.norm = factor, nn.Linear(dim, factor ** 2 * out, bias=False), nn.LayerNorm(out)

    def forward(self, x):
        B, H, W, _ = x.shape
        f = self.factor
        x = self.expand(x).view(B, H, W, f, f, -1).transpose(2, 3)         # [B, H, f, W, f, C_out]
        return self.norm(x.reshape(B, f * H, f * W, -1))


class SwinUNet(nn.Module):
    """A U-Net of Swin blocks (Cao et al. 2021; Liu et al. 2021): patches of 4 x 4, three stages down, two up, skips between them.

    Any input size: it pads to a multiple of 16 inside, and every block pads to its window. The encoder's names are those of
    Swin-T's published checkpoints, for `load_swin`.
    """
    def __init__(self, channels, classes, dim=48, window=6, depths=(2, 2, 2), heads=(3, 6, 12)):
        super().__init__()
        stage = lambda d, depth, h: nn.ModuleList(SwinBlock(d, window, h, window // 2 * (n % 2)) for n in range(depth))
        dims = [dim * 2 ** n for n in range(len(depths))]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, 4, 4), "norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(nn.ModuleDict({"blocks": stage(d, n, h)}) for d, n, h in zip(dims, depths, heads))
        for d, layer in zip(dims[:-1], self.layers):
            layer["downsample"] = PatchMerging(d)
        self.norm = nn.LayerNorm(dims[-1])
        self.ups = nn.ModuleList(PatchExpanding(2 * d, d, 2) for d in dims[-2::-1])
        self.joins = nn.ModuleList(nn.Linear(2 * d, d) for d in dims[-2::-1])
        self.up_blocks = nn.ModuleList(stage(d, n, h) for d, n, h in zip(dims[-2::-1], depths[-2::-1], heads[-2::-1]))
        self.last = PatchExpanding(dim, dim // 2, 4)
        self.head = nn.Conv2d(dim // 2, classes, 1)

    def maps(self, x):
        """[B, C, H, W] -> the maps at an eighth of the size [B, 2 dim, ...] and at full size [B, dim / 2, H, W]."""
        H, W = x.shape[2:]
        unit = 4 * 2 ** (len(self.layers) - 1)
        x = self.patch_embed["proj"](F.pad(x, (0, -W % unit, 0, -H % unit))).movedim(1, -1)  # [B, H/4, W/4, dim]
        x, skips, ups = self.patch_embed["norm"](x), [], []
        for layer in self.layers:
            for block in layer["blocks"]:
                x = block(x)
            skips.append(x)
            x = layer["downsample"](x) if "downsample" in layer else self.norm(x)
        for up, join, blocks, skip in zip(self.ups, self.joins, self.up_blocks, skips[-2::-1]):
            x = join(torch.cat([up(x), skip], -1))
            for block in blocks:
                x = block(x)
            ups.append(x)
        coarse = ups[-2]                                                   # the last is at S / 4
        return coarse.movedim(-1, 1)[..., :-(-H // 8), :-(-W // 8)], self.last(x).movedim(-1, 1)[..., :H, :W]

    def forward(self, x):
        return self.head(self.maps(x)[1])


def load_swin(net, path):
    """Start the encoder of a `SwinUNet` from a Swin-T state dict (as timm and the authors publish it). Raises DataError.

    The three input channels of the first layer are summed where the network has one. Only layers that both have are taken.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path}: not a state dict ({type(error).__name__}); give Swin-T weights as published") from None
    state, own = state.get("model", state), net.state_dict()
    if own["patch_embed.proj.weight"].shape[1] == 1 and "patch_embed.proj.weight" in state:
        state = {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"].sum(1, keepdim=True)}
    taken = {k: v for k, v in state.items() if k in own and k.startswith(("patch_embed.", "layers."))}
    wrong = [k for k, v in taken.items() if v.shape != own[k].shape]
    if wrong or not taken:
        raise DataError(f"{path}: {wrong[0] if wrong else 'no layer'} fits; Swin-T needs --swin-dim 96 --window 7")
    net.load_state_dict({**own, **taken})
    print(f"{path}: Swin gives {len(taken)} tensors, {len(own) - len(taken)} start fresh")


# ------------------------------------------------------------------------------------------------ losses


def segmentation_loss(logits, label):
    """0.5 (cross-entropy + soft Dice) [base]; logits [B, K, h, w], label [B, h, w]."""
    return .5 * (F.cross_entropy(logits, label) + common.dice_loss(logits, label))


def cross_teaching_loss(logits_1, logits_2):
    """Dice(p1, argmax p2) + Dice(p2, argmax p1) [base]: each network learns the other's labels; logits [B, K, h, w]."""
    return common.dice_loss(logits_1, logits_2.argmax(1)) + common.dice_loss(logits_2, logits_1.argmax(1))


def ramp_up(t, T):
    """exp(-5 (1 - min(t / T, 1))^2), from 0.007 at t = 0 to 1 at T [base]."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2)


def decay(t, T):
    """exp(-5 (t / T)^2), from 1 at t = 0 to 0.007 at T: the registration is best early (ours)."""
    return math.exp(-5 * (t / T) ** 2)


def balanced_contrastive_loss(z, y, temperature):
    """Class-balanced supervised contrast within a group [base]: pixels of one class attract, all others repel.

        L_i = - 1/|P(i)| sum_{p in P(i)} [ z_i.z_p/tau - log sum_{a != i} exp(z_i.z_a/tau) / w_ia ]
        w_ia = N_{y_a}, the number of pixels of a's class, without i itself if it is of that class

    so that the background, which is most of the pixels, does not drown the rest. z [n, d] before normalisation, y [n] whole
    numbers; or G groups at once, [G, n, d] and [G, n]. A scalar, the mean over the anchors that have a positive; 0 without any.
    """
    z, Y = F.normalize(z.float(), dim=-1), F.one_hot(y.long()).float()     # [..., n, d], [..., n, K]
    with torch.autocast(z.device.type, enabled=False):
        sim = z @ z.mT / temperature                                       # [..., n, n]
        # w_ia depends on the classes of i and a alone: sum the exponentials of each class (E @ Y), then divide by its w
        E = (sim - 1 / temperature).exp() * (1 - torch.eye(z.shape[-2], device=z.device))    # sim <= 1 / tau: no overflow; a != i
        N = Y.sum(-2, keepdim=True)                                        # [..., 1, K]: N_c
        log_sum = (E @ Y / (N - Y).clamp(min=1)).sum(-1).clamp(min=1e-30).log() + 1 / temperature      # [..., n]
        # sum_{p in P(i)} z_i.z_p = z_i . (sum of its class) - z_i.z_i
        count = (Y * (N - Y)).sum(-1)                                      # [..., n]: |P(i)|
        positive = ((z * (Y @ (Y.mT @ z))).sum(-1) - 1) / temperature      # [..., n]
    L = (log_sum - positive / count.clamp(min=1)) * (count > 0)            # [..., n]
    return L.sum() / (count > 0).sum().clamp(min=1)


def cut(x, size, offset=(0, 0)):
    """Local blocks of maps [B, C, H, W]: G = (H / size)(W / size) groups [G, B size^2, C], the same block of all images in one.

    offset: rows and columns left out at the top and left where `size` does not divide H, W. Labels go through here as well, as
    [B, 1, H, W], so that features and labels are in the same order by construction.
    """
    B, C, H, W = x.shape
    h, w = H // size, W // size
    x = x[:, :, offset[0]:offset[0] + h * size, offset[1]:offset[1] + w * size]
    return x.reshape(B, C, h, size, w, size).permute(2, 4, 0, 3, 5, 1).reshape(h * w, B * size * size, C)


def local_contrast(maps, labels, size, groups, temperature):
    """Contrast in up to `groups` random local blocks, over all images and both networks; groups of background alone are skipped.

    maps: projected features of each network [B, d, h, w]; labels: for each network the classes [B, h, w] of its pixels.
    """
    H, W = maps[0].shape[2:]
    offset = [int(torch.randint(n % size + 1, ())) for n in (H, W)]        # every row and column has its turn
    z = torch.cat([cut(m, size, offset) for m in maps], 1)                 # [G, n, d]
    y = torch.cat([cut(l[:, None], size, offset)[..., 0] for l in labels], 1)                # [G, n]
    some = torch.nonzero((y > 0).any(1))[:, 0]
    some = some[torch.randperm(len(some))[:groups]]
    return balanced_contrastive_loss(z[some], y[some], temperature) if len(some) else z.sum() * 0


class MemoryBank(nn.Module):
    """The last `size` pixel features of one network, each with its common place (mm) and volume; the oldest are overwritten."""
    def __init__(self, size, dim):
        super().__init__()                                                 # a module, so that its state is saved as theirs is
        self.register_buffer("z", torch.zeros(size, dim))
        self.register_buffer("place", torch.full((size, 3), 1e6))
        self.register_buffer("volume", torch.full((size,), -1))            # -1: empty
        self.register_buffer("next", torch.tensor(0))

    def push(self, z, place, volume):
        """Add features z [n, d] (unit length, detached) at places [n, 3] of volumes [n]."""
        index = (torch.arange(len(z), device=self.z.device) + self.next) % len(self.z)
        self.z[index], self.place[index], self.volume[index] = z, place, volume
        self.next.copy_((self.next + len(z)) % len(self.z))

    def nearest(self, place, volume, radius, k):
        """The k entries of *other* volumes nearest to each place [n, 3]: (indices [n, k], whether within `radius` mm [n, k])."""
        far = torch.cdist(place, self.place).masked_fill(volume[:, None] == self.volume, torch.inf)      # [n, M]
        distance, index = far.topk(min(k, far.shape[1]), 1, largest=False)
        return index, distance <= radius


def reps_loss(z, place, volume, bank, radius, k, temperature):
    """REPS: positives are the bank's features of other volumes at the nearest common places, whatever any network predicts.

        L_REPS = - mean_i 1/|R(i)| sum_{p in R(i)} log exp(z_i.z_p/tau) / sum_{a in bank} exp(z_i.z_a/tau)    (REPS)

    z [n, d] before normalisation, place [n, 3] in mm, volume [n]. A scalar; anchors without a positive are left out; 0 if all are.
    """
    z, filled = F.normalize(z.float(), dim=1), bank.volume >= 0
    R, near = bank.nearest(place, volume, radius, k)                       # [n, k] each
    if not near.any():
        return z.sum() * 0
    with torch.autocast(z.device.type, enabled=False):
        sim = z @ bank.z.clone().T / temperature                           # [n, M]; a copy: `push` comes before backward
    log_prob = sim - sim.masked_fill(~filled, -torch.inf).logsumexp(1, keepdim=True)
    count = near.sum(1)                                                    # [n]: |R(i)|
    L = -(log_prob.gather(1, R) * near).sum(1) / count.clamp(min=1)
    return L.sum() / (count > 0).sum()


# ------------------------------------------------------------------------------------------------ training


class Students(nn.Module):
    """The U-Net and the Swin-UNet, and for the contrast a projector for two levels of each, [B, C, h, w] -> [B, d, h, w]."""
    def __init__(self, channels, classes, o):
        super().__init__()
        self.unet = UNet(channels, classes, o.width)
        self.swin = SwinUNet(channels, classes, o.swin_dim, o.window)
        widths = ((8 * o.width, o.width), (2 * o.swin_dim, o.swin_dim // 2))
        self.projectors = nn.ModuleList(nn.ModuleList(nn.Conv2d(C, o.projection, 1) for C in pair) for pair in widths)

    def forward(self, views):
        """Each network on its view [B, C, S, S]: logits 2 x [B, K, S, S], features 2 x ([B, d, S/8, S/8], [B, d, S/2, S/2])."""
        encoded = self.unet.encoder(views[0])
        maps = [(self.unet.decoder(encoded, 1), self.unet.decoder(encoded)), self.swin.maps(views[1])]
        logits = [net.head(full).float() for net, (_, full) in zip((self.unet, self.swin), maps)]
        # of the full map every second pixel, a sixteenth of the pairs to compare
        return logits, [(g[0](coarse), g[1](full[..., ::2, ::2])) for g, (coarse, full) in zip(self.projectors, maps)]


def draw_batch(dataset, numbers, n, warped, places, o, device):
    """n random slices, moved at random; each network sees the labelled ones with intensities of its own.

    Returns views 2 x [n, C, S, S]; labels [n, S, S], the true ones or, for unlabelled slices, `warped` [N, S, S]; common places
    [n, S, S, 3] in mm, nan where there is none; volumes [n].
    """
    pick = numbers[torch.randint(len(numbers), (n,)).numpy()]
    grid = spatial_grid(n, o.size, o.rotation, device)                     # [n, S, S, 2]
    label = dataset.label(pick, device) if warped is None else warped[pick].to(device).long()
    place = F.grid_sample(places[pick].to(device).float(), grid, "nearest", align_corners=False)     # [n, 3, S, S]
    outside = (grid.abs() > 1).any(-1)                                     # grid_sample has 0 there, which is a place
    place = place.movedim(1, -1).masked_fill(outside[..., None], torch.nan)
    x = warp(dataset.image(pick, device), grid)
    views = [photometric(x), photometric(x)] if warped is None else [x, x]                   # see no. 8
    views = [v.contiguous(memory_format=torch.channels_last) for v in views]
    return views, warp(label, grid, "nearest"), place, torch.from_numpy(dataset.volume[pick]).to(device)


def contrast_terms(maps, labels, o):
    """The local contrast of one batch at both levels; maps 2 x (coarse, full), labels 2 x [B, S, S], of each network's pixels."""
    coarse, full = zip(*maps)
    small = [F.interpolate(y[:, None].float(), coarse[0].shape[2:]).long()[:, 0] for y in labels]        # nearest: [B, S/8, S/8]
    return (local_contrast(coarse, small, o.block // 2, 4, o.temperature) +
            local_contrast(full, [y[:, ::2, ::2] for y in labels], o.block // 2, o.groups, o.temperature))


def reps_terms(full, place, volume, banks, o):
    """REPS of both networks, at random pixels that have a common place; full 2 x [B, d, S/2, S/2]. Fills the banks."""
    place = place[:, ::2, ::2]                                             # [B, S/2, S/2, 3]
    b, r, c = torch.nonzero(place.isfinite().all(-1)).T                    # image, row, column
    few = torch.randperm(len(b))[:o.anchors].to(b.device)
    b, r, c = b[few], r[few], c[few]                                       # [n] each
    where, who, L = place[b, r, c], volume[b], 0.
    for m, bank in zip(full, banks):
        z = m[b, :, r, c]                                                  # [n, d]
        L = L + reps_loss(z, where, who, bank, o.radius, o.positives, o.temperature)
        bank.push(F.normalize(z.detach().float(), dim=1), where, who)
    return L


def terms(students, banks, labelled, rest, step, o):
    """The losses of one step and their weights, two dicts with the same keys; labelled, rest: what `draw_batch` returns."""
    (views, y, place, volume), (views_u, y_warped, place_u, volume_u), T = labelled, rest, o.steps
    with torch.autocast(y.device.type, o.dtype, enabled=o.dtype != torch.float32):
        logits, maps = students(views)
        logits_u, maps_u = students(views_u)                               # by themselves: see no. 7
    L, weight = {"sup": sum(segmentation_loss(l, y) for l in logits)}, {"sup": 1.}
    if not o.no_cross_teaching:
        L["cross"], weight["cross"] = cross_teaching_loss(*logits_u), o.cross_weight * ramp_up(step, .75 * T)
    if not o.no_rsl:
        L["RSL"], weight["RSL"] = sum(segmentation_loss(l, y_warped) for l in logits_u), o.rsl_weight * decay(step, T)
    if not o.no_contrast:
        both = step >= .075 * T                                            # the labelled slices alone at first [base]
        pair = [[torch.cat([a, b]) for a, b in zip(*m)] if both else m[0] for m in zip(maps, maps_u)]
        other = [l.argmax(1) for l in logits_u[::-1]]                      # an unlabelled pixel's class: the other network's
        labels = [torch.cat([y, y_u]) if both else y for y_u in other]
        L["contrast"], weight["contrast"] = contrast_terms(pair, labels, o), o.contrast_weight
    if not o.no_reps:
        full = [torch.cat([a[1], b[1]]) for a, b in zip(maps, maps_u)]
        L["REPS"] = reps_terms(full, torch.cat([place, place_u]), torch.cat([volume, volume_u]), banks, o)
        weight["REPS"] = o.reps_weight
    return L, weight


def train(name, dataset, numbers, unlabelled, prior, classes, seed, o, device, out, start=None):
    """Train both networks on the labelled slices `numbers` and the slices `unlabelled`; returns the `Students`.

    prior: (warped labels [N, S, S], common places [N, 3, S, S]) of all slices, from `common_places`.
    """
    torch.manual_seed(seed)
    students = Students(dataset.info["channels"], classes, o).to(device, memory_format=torch.channels_last)
    if start:
        common.load_weights(students.unet, start["unet"], start["parts"])
    if o.swin_weights:
        load_swin(students.swin, o.swin_weights)
    others = [*students.swin.parameters(), *students.projectors.parameters()]
    optimiser = torch.optim.AdamW([{"params": students.unet.parameters(), "peak": o.init_lr if start else o.lr},
                                   {"params": others, "peak": o.swin_lr}], lr=o.lr, weight_decay=1e-4)
    banks = nn.ModuleList(MemoryBank(o.bank, o.projection) for _ in range(2)).to(device)
    (warped, places), state, step, T = prior, out / "training.pt", 0, o.steps
    if o.resume and state.exists() and common.load_checkpoint(state, METHOD, o.saved).get("run") == name:
        step = common.resume_training(state, METHOD, o.saved, (students, banks), optimiser)
    bar = trange(step, T, initial=step, total=T, desc=name, disable=None)
    for step in bar:
        for group, warm in zip(optimiser.param_groups, (0, .05 * T)):      # a transformer needs a warm-up
            group["lr"] = group["peak"] * min(1, (step + 1) / (warm + 1)) * .5 * (1 + math.cos(math.pi * step / T))
        labelled = draw_batch(dataset, numbers, o.batch // 4, None, places, o, device)
        rest = draw_batch(dataset, unlabelled, o.batch // 4, warped, places, o, device)
        L, weight = terms(students, banks, labelled, rest, step, o)
        # L = L_sup + w(t) L_CT + omega(t) L_RSL + lambda_c L_contrast + lambda_r L_REPS
        loss = sum(weight[k] * L[k] for k in L)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == T - 1:
            row = {k: v.item() for k, v in L.items()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase=name, step=step, **row, **{f"weight_{k}": v for k, v in weight.items()})
        if not o.no_peek and (step % o.peek_every == 0 or step == T - 1):
            common.log(out, phase=name, step=step, **peek(students, dataset, unlabelled, warped, o, device))
        if (step + 1) % o.save_every == 0:
            common.save_training(state, METHOD, o.saved, step + 1, (students, banks), optimiser, run=name)
    return students


def finetune(name, dataset, numbers, classes, seed, o, device, out):
    """The supervised baseline: the U-Net alone on the labelled slices, the same steps; that of all other methods' scripts."""
    torch.manual_seed(seed)
    unet = UNet(dataset.info["channels"], classes, o.width).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=o.lr, weight_decay=1e-4)
    state, step = out / "finetuning.pt", 0
    if o.resume and state.exists() and common.load_checkpoint(state, METHOD, o.saved).get("run") == name:
        step = common.resume_training(state, METHOD, o.saved, (unet,), optimiser)
    bar = trange(step, o.steps, initial=step, total=o.steps, desc=name, disable=None)
    for step in bar:
        optimiser.param_groups[0]["lr"] = o.lr * .5 * (1 + math.cos(math.pi * step / o.steps))
        pick = numbers[torch.randint(len(numbers), (o.batch,)).numpy()]
        grid = spatial_grid(o.batch, o.size, o.rotation, device)           # [B, S, S, 2]
        label = warp(dataset.label(pick, device), grid, "nearest")         # [B, S, S]
        image = photometric(warp(dataset.image(pick, device), grid)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            logits = unet(image).float()                                   # [B, K, S, S]
        ce, dice = F.cross_entropy(logits, label), common.dice_loss(logits, label)
        optimiser.zero_grad()
        (ce + dice).backward()
        optimiser.step()
        if step % 50 == 0 or step == o.steps - 1:
            row = dict(cross_entropy=ce.item(), cross_entropy_chance=math.log(classes), dice_loss=dice.item())
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            common.log(out, phase=name, step=step, **row)
        if (step + 1) % o.save_every == 0:
            common.save_training(state, METHOD, o.saved, step + 1, (unet,), optimiser, run=name)
    return unet


# ------------------------------------------------------------------------------------------------ what looks at held-back labels

# Only here are labels of unlabelled volumes read, to draw Fig. 4 and to judge the registration. Nothing that trains sees what
# these two functions return; --no-peek switches both off.


@torch.no_grad()
def peek(students, dataset, unlabelled, warped, o, device):
    """Dice of three kinds of pseudo-labels on 64 unlabelled slices, pooled: both networks' and the registration's."""
    few = unlabelled[np.linspace(0, len(unlabelled) - 1, min(64, len(unlabelled))).astype(int)]
    truth, x = dataset.label(few).numpy(), dataset.image(few, device)
    keep = (truth < 255).all((1, 2))                                       # volumes without any label
    classes = range(1, students.unet.head.out_channels)
    score = lambda pred: common.nanmean(common.dice_score(pred[keep], truth[keep], classes).values())
    students.eval()
    logits, _ = students([x.contiguous(memory_format=torch.channels_last), x])
    students.train()
    return {"peek_unet": score(logits[0].argmax(1).cpu().numpy()), "peek_swin": score(logits[1].argmax(1).cpu().numpy()),
            "peek_registration": score(warped[few].numpy())}


def peek_registration(dataset, pairs, frames, volume, n, classes):
    """Mean label Dice of one pair before, after the affine map, and after all, on the volume's own slices."""
    shape, spacing, numbers = voxels(dataset, volume)
    truth, pair = dataset.label(numbers).numpy(), pairs[volume, n]
    if (truth == 255).any():
        return {}
    still = torch.zeros_like(pair["back"])
    kinds = {"dice_before": dict(A=torch.eye(3, 4), back=still), "dice_affine": dict(A=pair["A"], back=still), "dice_after": pair}
    score = lambda p: common.dice_score(frames[n].warp_label(p, shape, spacing).numpy(), truth, range(1, classes))
    return {k: common.nanmean(score(p).values()) for k, p in kinds.items()}


# ------------------------------------------------------------------------------------------------ evaluation and figures


def row_name(o):
    """The name of the trained rows: cct_r, and what is switched off."""
    off = [k for k in ("cross_teaching", "contrast", "rsl", "reps", "brs") if getattr(o, f"no_{k}")]
    return METHOD + "".join(f"-no_{k}" for k in off)


def register(dataset, cases, split, n, o):
    """Registration for the first n labelled patients: (pairs, frames, numbers of volumes, labelled volumes, prior)."""
    volumes = [v for v, c in enumerate(cases) if c.patient in split["train"]]
    labelled = [v for p in split["labelled"][:n] for v, c in enumerate(cases) if c.patient == p and c.label]
    pairs, frames = register_all(dataset, volumes, labelled, len(cases.classes), o)
    return pairs, frames, volumes, labelled, common_places(dataset, pairs, frames, volumes, labelled, not o.no_brs)


def run_one(method, n, seed, dataset, cases, split, prior, o, device, out, start):
    """Train and score the network or networks of a row (or read them, if finished and we resume): [(run row, volume rows)]."""
    name = f"{method}_n{n}_s{seed}"
    path, patients = out / f"{name}.pt", split["labelled"][:n]
    if o.scratch and method == "scratch":                                  # another method's run: the same U-Net and steps
        made = {k: o.saved[k] for k in SCRATCH_OPTIONS}
        scored = {method: common.load_checkpoint(Path(o.scratch) / f"{name}.pt", None, made)["rows"]}
    elif o.resume and path.exists():
        content = common.load_checkpoint(path, METHOD, o.saved)
        scored = {method: content["rows"], **({f"{method}, Swin": content["swin_rows"]} if method != "scratch" else {})}
    else:
        begin, numbers = time.time(), dataset.of_patients(patients, labelled=True)
        rest = dataset.of_patients([p for p in split["train"] if p not in patients])
        classes, extra = len(cases.classes), {}
        score = lambda net: common.score(net, dataset, cases, split[o.split], device, o.dtype)
        if method == "scratch":
            unet = finetune(name, dataset, numbers, classes, seed, o, device, out)
            scored = {method: score(unet)}
        else:
            students = train(name, dataset, numbers, rest, prior, classes, seed, o, device, out, start)
            unet = students.unet
            scored = {method: score(unet), f"{method}, Swin": score(students.swin)}
            extra = dict(swin=students.swin.state_dict(), swin_rows=scored[f"{method}, Swin"])
        common.save_checkpoint(path, method=METHOD, options=o.saved, unet=unet.state_dict(), rows=scored[method],
                               classes=cases.classes, channels=cases.channels, modality=cases.modality, **extra)
        common.log(out, phase=name, seconds=time.time() - begin)
    result = []
    for way, rows in scored.items():
        run = common.run_row(way, n, seed, patients, rows)
        print(f"{way} n{n} s{seed}: mean Dice {run['mean_dice']:.3f}  HD95 {run['hd95_mm']:.1f} mm  missed {run['missed']} of "
              f"{run['n_scores']}")
        result.append((run, [{"method": way, "labelled": n, "seed": seed, **r} for r in rows]))
    return result


def build(content):
    """The U-Net of a checkpoint written by `run_one`."""
    unet = UNet(content["channels"], len(content["classes"]), content["options"]["width"])
    unet.load_state_dict(content["unet"])
    return unet.eval()


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks of two lists."""
    rank = lambda x: np.argsort(np.argsort(x))
    return float(np.corrcoef(rank(a), rank(b))[0, 1])


def write_registrations(dataset, cases, pairs, frames, o, out):
    """registration.csv, a line a pair, and its means in print; label Dice only where --no-peek does not forbid it."""
    rows = []
    for (u, n), pair in pairs.items():
        if u == n:
            continue
        row = {"volume": cases[u].name, "labelled": cases[n].name, **{f"similarity_{k}": float(pair[k]) for k in (
            "before", "affine", "after")}, "folded_percent": 100 * float(pair["folded"]), "cycle_error_mm": float(pair["cycle"])}
        rows.append({**row, **({} if o.no_peek else peek_registration(dataset, pairs, frames, u, n, len(cases.classes)))})
    columns = dict.fromkeys(k for r in rows for k in r)                    # a volume without any label has no Dice
    common.write_csv(out / "registration.csv", [{k: r.get(k, "") for k in columns} for r in rows])
    mean = lambda key, some=rows: np.mean([r[key] for r in some])
    print(f"registration: {len(rows)} pairs, similarity {mean('similarity_before'):.3f} before, "
          f"{mean('similarity_affine'):.3f} affine, {mean('similarity_after'):.3f} after; folded {mean('folded_percent'):.3f} %, "
          f"cycle error {mean('cycle_error_mm'):.1f} mm")
    judged = [r for r in rows if "dice_after" in r]
    if judged:
        volumes = dict.fromkeys(r["volume"] for r in judged)
        best = [min((r for r in judged if r["volume"] == v), key=lambda r: r["cycle_error_mm"]) for v in volumes]
        print(f"label Dice of all pairs {mean('dice_before', judged):.3f} before, {mean('dice_affine', judged):.3f} affine, "
              f"{mean('dice_after', judged):.3f} after; of the partners BRS takes {mean('dice_before', best):.3f}, "
              f"{mean('dice_affine', best):.3f}, {mean('dice_after', best):.3f}; rank correlation of cycle error and Dice "
              f"{rank_correlation([r['cycle_error_mm'] for r in judged], [r['dice_after'] for r in judged]):.2f}")


@torch.no_grad()
def draw_registration(dataset, cases, pairs, frames, volumes, labelled, o, path):
    """Registrations of some volumes with their best partner, on the frame's middle slice: fixed, moving before, affine, after, and
    the Jacobian determinant with folded voxels in red."""
    shape, step = registration_grid(dataset)
    others = [u for u in volumes if u not in labelled]
    some = [others[int(k)] for k in np.linspace(0, len(others) - 1, min(4, len(others)))]
    figure, axes = common.new_figure(len(some), 5)
    for u, row in zip(some, axes):
        n = best_partner(pairs, u, labelled, not o.no_brs)
        frame, pair = frames[n], pairs[u, n]
        moving, middle = on_grid(stack(dataset, u), voxels(dataset, u)[1], points(shape, step)), len(frame.p) // 2
        d = F.interpolate(pair["there"][None], frame.p.shape[:3], mode="trilinear")          # [1, 3, Z, Y, X]
        affine = move(pair["A"][None], frame.p)
        after = move(pair["A"][None], frame.p + d[0].movedim(0, -1))
        for axis, x, title in ((row[0], frame.fixed[0, 0], f"fixed: {cases[n].name}"),
                               (row[1], sample(moving, frame.p[None], step)[0, 0], f"moving: {cases[u].name}"),
                               (row[2], sample(moving, affine, step)[0, 0], f"affine, {float(pair['affine']):.2f}"),
                               (row[3], sample(moving, after, step)[0, 0], f"deformed, {float(pair['after']):.2f}")):
            common.show(axis, x[middle], title=title)
        J = jacobian(pair["there"][None], frame.p.shape[:3], frame.step)[0]
        row[4].imshow(J[min(middle, len(J) - 1)], cmap="gray", vmin=0, vmax=2)
        row[4].imshow(np.ma.masked_greater(J[min(middle, len(J) - 1)], 0), cmap="autumn")
        row[4].set_title(f"Jacobian, {100 * float(pair['folded']):.2f} % folded\ncycle {float(pair['cycle']):.1f} mm", fontsize=8)
    common.save_figure(figure, path)


def draw_pseudo_labels(out, names, path):
    """Fig. 4: Dice of the networks' and the registration's pseudo-labels on unlabelled slices, over training; a panel a run."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if "peek_unet" in line]
    figure, axes = common.new_figure(1, len(names), 3.6, 3)
    for axis, name in zip(axes[0], names):
        rows = {r["step"]: r for r in log if r["phase"] == name}           # the last of each step, if a run was resumed
        axis.axis("on")
        for key, label in (("unet", "U-Net"), ("swin", "Swin-UNet"), ("registration", "registration")):
            axis.plot(sorted(rows), [rows[s][f"peek_{key}"] for s in sorted(rows)], label=label)
        axis.set(xlabel="step", ylim=(0, 1), title=name)
        axis.grid(alpha=.3)
    axes[0, 0].set_ylabel("Dice, unlabelled slices")
    axes[0, 0].legend()
    common.save_figure(figure, path)


def draw_correspondences(dataset, cases, prior, volumes, o, path):
    """What REPS takes for the same place: pixels of one slice, and in other volumes those nearest to them in the common frame."""
    places = prior[1].float().nan_to_num(1e6)                              # [N, 3, S, S]
    some, S = [volumes[int(k)] for k in np.linspace(0, len(volumes) - 1, min(6, len(volumes)))], o.size
    numbers = voxels(dataset, some[0])[2]
    query = places[numbers[len(numbers) // 2]]                             # [3, S, S]: the first volume's middle slice
    spots = [(S // 2 + dy, S // 2 + dx) for dy in (-S // 8, 0, S // 8) for dx in (-S // 8, 0, S // 8)]
    figure, axes = common.new_figure(1, len(some))
    for axis, v in zip(axes[0], some):
        numbers = voxels(dataset, v)[2]
        centre = (places[numbers] - query[:, S // 2, S // 2, None, None]).norm(dim=1)        # [V, S, S] mm
        number = numbers[int(centre.amin((1, 2)).argmin())]                # the slice with the centre's place
        common.show(axis, dataset.image(np.array([number]))[0, 0], title=f"{cases[v].name}, slice {dataset.slice[number] + 1}")
        for k, (r, c) in enumerate(spots):
            far = (places[number] - query[:, r, c, None, None]).norm(dim=0)                  # [S, S] mm
            if far.min() <= o.radius:
                y, x = divmod(int(far.argmin()), S)
                axis.plot(x, y, "o", color=f"C{k}", markersize=4, mec="white", mew=.5)
    common.save_figure(figure, path)


def draw_all(dataset, cases, split, kept, o, device, out, summary):
    """The figures of a finished run, into out/figures; kept: what `register` returned for the fewest labelled patients."""
    pairs, frames, volumes, labelled, prior = kept
    name, n, seed = row_name(o), min(o.labelled), o.seeds[0]               # the fewest labels show the most
    common.draw_dice_curve(summary, out / "figures/dice.png")
    nets = {}
    for method in ("scratch", name):
        folder = Path(o.scratch) if o.scratch and method == "scratch" else out
        nets[f"{method}, {n} labelled"] = build(common.load_checkpoint(folder / f"{method}_n{n}_s{seed}.pt")).to(device)
    common.draw_overlays(dataset, cases, split[o.split][:4], nets, device, out / "figures/overlays.png")
    draw_registration(dataset, cases, pairs, frames, volumes, labelled, o, out / "figures/registration.png")
    draw_correspondences(dataset, cases, prior, volumes, o, out / "figures/correspondences.png")
    if not o.no_peek:
        draw_pseudo_labels(out, [f"{name}_n{n}_s{seed}" for n in o.labelled], out / "figures/pseudo_labels.png")


# ------------------------------------------------------------------------------------------------ main

# Three labelled patients of the phantom are 336 pairs to register; seven would be 784.
PHANTOM = dict(labelled=[1, 3], seeds=[0], steps=160, spacing=2.5, size=64)
REAL = dict(labelled=[1, 3, 7], seeds=[0, 1, 2], steps=1200)
# --paper: what is known of the base method's configuration [base]
PAPER = dict(size=224, steps=40000, batch=8, lr=5e-4, swin_lr=1e-4, swin_dim=96, window=7, projection=128, block=19, groups=144)


def resolve(o, cases):
    """Fill in the options that depend on the data and refuse impossible ones; o.saved is what a checkpoint must match."""
    for key, value in (REAL if o.data else PHANTOM).items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    if o.spacing is None or o.size is None:
        spacing, size = default_grid(cases)
        o.spacing, o.size = o.spacing or spacing, o.size or size
    problems = [
        (o.size % 16 or o.size < 32, f"--size {o.size}: use a multiple of 16, 32 or more"),
        (o.batch < 8 or o.batch % 4, f"--batch {o.batch}: two networks see a quarter labelled and a quarter not; use 8, 12, 16 ..."),
        (o.swin_dim % 6, f"--swin-dim {o.swin_dim}: use a multiple of 6, for its three heads and two halves"),
        (o.window < 2, f"--window {o.window}: use 2 or more"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (o.block < 4 or o.block > o.size, f"--block {o.block}: use 4 to {o.size}, the image's size"),
        (o.stiffness < 0 or o.radius <= 0, "--stiffness must be 0 or more, --radius above 0"),
        (min(o.steps, o.save_every, o.peek_every, o.groups, o.anchors, o.positives, *o.labelled) < 1 or o.bank < o.anchors,
         "steps, --save-every, --peek-every, --groups, --anchors, --positives and --labelled must be 1 or more, --bank not below "
         "--anchors"),
        (o.scratch and not Path(o.scratch).is_dir(), f"--scratch {o.scratch}: is not the folder of a run")]
    for wrong, message in problems:
        if wrong:
            raise DataError(message)
    o.dtype = getattr(torch, o.precision)
    aside = ("resume", "device", "cache", "out", "predict", "checkpoint", "scratch", "paper", "dtype", "saved", "save_every",
             "no_peek", "peek_every")
    o.saved = {k: v for k, v in vars(o).items() if k not in aside}


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
    print(f"{root}: {cases.layout}, {len(cases)} volumes, {len(dataset.volume)} slices, classes {', '.join(cases.classes)}")
    print("\n".join(f"warning: {w}" for w in cases.warnings) + "\n" * bool(cases.warnings) +
          f"split {split['rule']}: {len(split['train'])} train, {len(split['val'])} val, {len(split['test'])} test; labelled in "
          f"this order: {' '.join(split['labelled'][:max(o.labelled)])}")
    print(f"options {o.saved}\non {device}, {torch.get_num_threads()} threads")
    begin = time.time()
    registered = {n: register(dataset, cases, split, n, o) for n in sorted(o.labelled)}      # what 1 needs, 3 reads from the cache
    pairs, frames, *_ = registered[max(o.labelled)]
    common.log(out, phase="registration", seconds=time.time() - begin)
    write_registrations(dataset, cases, pairs, frames, o, out)
    runs, volume_rows = [], []
    for n, (*_, prior) in registered.items():
        for seed in o.seeds:
            for method in ("scratch", row_name(o)):
                for run, rows in run_one(method, n, seed, dataset, cases, split, prior, o, device, out, start):
                    runs.append(run), volume_rows.extend(rows)
                summary, gains = common.write_results(out, runs, volume_rows, cases.classes)
    draw_all(dataset, cases, split, registered[min(o.labelled)], o, device, out, summary)
    print(f"\n{common.table(summary, gains, cases.classes)}\n{common.RULE}.\n{len(split[o.split])} {o.split} patients, mean ± "
          f"std over {len(o.seeds)} seeds; gain over scratch in Dice points; "
          f"{sum(common.seconds_by_phase(out).values()):.0f} s. Results in {out}/")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
