"""CCT-R: Learning Semi-Supervised Medical Image Segmentation from Spatial Registration (Liu et al.;
WACV 2025; arXiv 2409.10422).

    python cct_r.py                                       the built-in phantom, no data needed
    python cct_r.py --data path/to/acdc                   real scans: register, train, score
    python cct_r.py --no-rsl --no-reps --no-contrast      cross teaching alone; a flag a part
    python cct_r.py --predict IMAGES --checkpoint FILE.pt segment new volumes

A few volumes have labels, many have none. Two networks of different kinds, a U-Net and a Swin-UNet,
teach each other on the unlabelled slices (cross teaching), and a contrast at pixel level keeps
classes apart. Registration adds what no network knows: a labelled volume's label, warped onto an
unlabelled one, is a pseudo-label that does not depend on any network (RSL), and pixels of two
volumes that registration brings to one place are the same anatomy, whatever networks say (REPS).

Paper, code, and what we chose. [paper]: its abstract, captions and published reviews, for no text
of its method section could be read; [base]: the published code of MCSC (BMVC 2023), which it
extends; [ours]: silent there, or changed by us. The authors' repository holds a README only.
 1. Registration is done offline [paper]. How is ours: every volume to every labelled one, in the
    box about the labelled volume's label; affine from 225 near starts and, at each of two scales,
    the shift of highest correlation over a longer way; then corrected: the piece of the volume
    that it found is registered to the whole labelled volume; then each way the flow of a smooth
    velocity, coarse to fine, on the signed square of local cross-correlation.
 2. Best registration selection (BRS) by cycle consistency [paper]; its score is the mean of
    || T_back(T_there(x)) - x || over the labelled volume's organs [ours]: over the whole box, most
    of it background, it does not rank registrations (results/cct_r.md).
 3. RSL: labels warped by the best registration [paper]; one-hot, linearly, then arg max; for both
    networks 0.5 (cross-entropy + Dice), weight omega_0 exp(-5 (t/T)^2), omega_0 = 1 [ours].
    `--atlases 3` averages the one-hot labels of the three smallest cycle errors [ours].
 4. REPS: registration finds positives, for an anchor "the anatomically-closest point to the anchor
    in each 3D volume" [paper, Fig. 2]. Ours: a step's anchors, half of them organ, are one group of
    the contrast of no. 6, for each network by itself, and at first of labelled slices alone, as
    there. A memory bank gives each anchor further positives: of every other volume the one feature
    whose common place is nearest, if within 8 mm; a common place is found through the best partner
    in the frame of the first labelled volume. The bank is never a negative. `--radius .001` leaves
    only the group: a control.
 5. Cross teaching: Dice with the other's arg max, 0.1 exp(-5 (1 - t/T_r)^2), T_r = 3/4 of the steps
    [base]. In all losses of the two networks Dice of all classes, squared denominators [base]; in
    the baseline that of the other scripts: foreground, linear [ours].
 6. Local contrast with class-balanced denominators at two levels, both networks, labelled slices
    alone for the first 7.5 % of the steps [base]. A group is a block of every image and network,
    each of its own place; projectors of two layers, 128 wide, the last shared [base]; by level
    [ours]. Blocks of 12 x 12 pixels of which every second row and column counts, 6 random groups a
    step [ours]; [base]: 19 x 19 of 224, all. At the coarse level up to 4 groups of blocks of 6 x 6
    cells of 8 x 8 pixels, the class of a cell is that of its middle [ours]. We do not copy the
    base's defects: features and labels in different orders, a row of blocks too few, the U-Net left
    in eval mode.
 7. Labelled and unlabelled slices have forward passes of their own [ours]; [base]: one batch. See
    pix2rep.py, no. 12. So the U-Net's running statistics, by which it is scored, are a mean over
    both, labelled slices with changed intensities and unlabelled ones as they are.
 8. Each network sees a labelled slice with intensities of its own; unlabelled ones keep theirs, for
    there the networks' answers are labels, and those of slices as they are were better [ours].
    `--base-views`: flips and rotations alone, also in the baseline [base].
 9. U-Net 16 to 256 channels, the result; Swin-UNet with patches of 4 x 4 [base]; three stages of 48
    to 192 channels (a fourth would have 3 x 3 tokens), window 6, a 3 x 3 convolution in every
    block, from scratch [ours]; [base]: Swin-T, four stages from 96 channels, window 7, ImageNet
    weights, which we do not have.
10. AdamW, 40 000 steps of 2 + 2 slices at 224 x 224, rates 5e-4 (U-Net) and 1e-4, weight decay 5e-4
    [base]; 4800 steps at 96 x 96, cosine, rates 2e-3 and 5e-4, weight decay 1e-4 [ours]. The
    baseline is that of the other scripts, with 8 labelled slices a step. **Compare at equal
    labelled slices seen, too**: `--labelled-batch` and `--batch` set them, and the log and a line
    before the table have how many there were. With all four parts off the row is the baseline
    itself, to the digit.
11. Warped labels are used for unlabelled training volumes only. The true labels of these are read
    in one place, for Fig. 4 and to judge the registration (`--no-peek` forbids it). Test patients
    choose nothing; the last checkpoint is scored [ours]. "One case" is 23 slices of patient 099 in
    [base], all 32 here.

Letters: B slices drawn at once (2B: those of both networks), C channels, K classes, S network size,
V slices of a volume, Z, Y, X and z, y, x voxels of a box and its control points, d features of a
pixel, n pixels of a group or anchors, G groups, N slices of a dataset, t of T steps; in the bank U
volumes of M features each; in the losses z features, y classes, i an anchor, P(i) and R(i) its
positives; u an unlabelled volume, l* its best labelled partner.
"""
import hashlib
import json
import math
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import DataError, cosine, photometric, spatial_grid, warp

METHOD = "cct_r"
REGISTRATION_VERSION = 6            # one more for any change of code that changes a registration
TURN = .5                           # registration: turn of the near affine starts in rad
REFINED = 4                         # near starts that are refined
FAR_SCALES = (.85, 1.)              # of the far starts: chosen on a large labelled CT
# control points along the longest side, images made smaller by, least voxels along a side
LEVELS = ((5, 4, 64), (9, 2, 0), (15, 1, 0), (25, 1, 64))
REGISTRATION_STEPS = 40             # of Adam: of the affine maps, and of each level

# ---------------------------------------------------------------------------------------- options

# name, on real data, on the phantom (None: the same), in the base (None: not known), what it is
OPTIONS = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients"),
    ("seeds", [0, 1, 2], [0], None, "seeds of training"),
    ("width", 16, None, 16, "channels of the first U-Net level"),
    ("swin_dim", 48, None, 96, "channels of the Swin-UNet's first stage, divisible by 6"),
    ("window", None, None, 7,
     "tokens along a window's side; default: the least divisor of size / 16 from 4 on"),
    ("spacing", None, 2.5, 1.5, "mm a pixel in plane; 2 on ACDC (base: slices resized)"),
    ("size", None, 64, 224, "S, crop in pixels, divisible by 16; 96 on ACDC"),
    ("stiffness", .3, None, None, "of registration: weight of the velocity's mean square gradient"),
    ("no_brs", False, None, None, "ablation: partners at random, not by cycle consistency"),
    ("atlases", 1, None, None, "labelled volumes whose warped labels RSL averages (ours)"),
    ("steps", 4800, 240, 40000, "T, steps of training, also from scratch"),
    ("labelled_batch", 2, 4, 2, "labelled slices a step, seen by both networks"),
    ("unlabelled_batch", 2, None, 2, "unlabelled slices a step, seen by both networks"),
    ("batch", 8, None, None, "slices a step from scratch, all labelled"),
    ("lr", 2e-3, None, 5e-4, "of the U-Net and of scratch, AdamW, cosine to 0 (base: poly 0.9)"),
    ("swin_lr", 5e-4, None, 1e-4, "of the Swin-UNet and the projectors, after 5 % warm-up"),
    ("pretrained_lr", 1e-3, None, None, "of a U-Net that starts from --init (ours)"),
    ("weight_decay", 1e-4, None, 5e-4, "of both networks and the projectors; from scratch 1e-4"),
    ("rotation", .5, None, None, "largest rotation in rad, without --base-views"),
    ("base_views", False, None, None, "flips and rotations alone [base], also from scratch"),
    ("no_cross_teaching", False, None, None, "ablation: no cross teaching"),
    ("no_contrast", False, None, None, "ablation: no local contrast"),
    ("no_rsl", False, None, None, "ablation: no warped labels"),
    ("no_reps", False, None, None, "ablation: no positives from registration"),
    ("cross_weight", .1, None, .1, "w of cross teaching, after its ramp"),
    ("rsl_weight", 1., None, None, "omega_0 of RSL, at the first step"),
    ("contrast_weight", .002, None, .002,
     "lambda_c of the local contrast, a mean over both networks (base: 0.001 for each)"),
    ("reps_weight", .01, None, None, "lambda_r of REPS, a sum over both networks"),
    ("temperature", .1, None, .1, "tau"),
    ("projection", 128, None, 128, "d, width of the projectors; 2d in between"),
    ("block", 12, None, 19, "side in pixels of a local block; in coarse cells half of it"),
    ("groups", 6, None, 144, "groups of blocks of the fine map a step (base: all)"),
    ("bank", 128, None, None, "M, features of a volume in a memory bank"),
    ("anchors", 256, None, None, "anchors of REPS a step and network, half of them organ"),
    ("radius", 8., None, None, "mm, how near a positive's place must be"),
    ("no_peek", False, None, None, "never read labels of unlabelled volumes, not even for Fig. 4"),
    ("peek_every", 100, 20, None, "steps between points of Fig. 4"),
]
PAPER_ALSO = ("ImageNet weights and a fourth stage in the Swin-UNet, poly decay, and whole slices "
              "resized to 224 pixels, for which 1.5 mm stands (ACDC's median); coarse blocks "
              "of 14 x 14 cells, which are half of --block here; see --base-views")


def check(run):
    """Refuse impossible options. Raises DataError."""
    o = run.o
    most = len(run.split["train"])
    if "labelled" not in o.given:                                  # not typed: fewer, no refusal
        o.labelled = [n for n in o.labelled if n < most] or [1]
    if o.window is None:                                           # 6 on ACDC, 4 on the phantom
        side = o.size // 16                                        # of the deepest map
        o.window = next((w for w in range(4, side) if side % w == 0), side)
    common.refuse([
        (min(o.labelled_batch, o.unlabelled_batch) < 1,
         "--labelled-batch and --unlabelled-batch must be 1 or more"),
        (o.swin_dim < 6 or o.swin_dim % 6,
         f"--swin-dim {o.swin_dim}: use a multiple of 6, for its three heads and two halves"),
        (o.window < 2, f"--window {o.window}: use 2 or more"),
        (nothing_on(o) and o.init, "--init: with all four parts off this is scratch; drop one"),
        (o.atlases < 1, f"--atlases {o.atlases}: use 1 or more"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (o.block < 4 or o.block // 2 > o.size // 8,
         f"--block {o.block}: use 4 to {o.size // 4 + 1}, for a coarse map of {o.size // 8}"),
        (o.stiffness < 0 or o.radius <= 0, "--stiffness must be 0 or more, --radius above 0"),
        (min(o.peek_every, o.groups, o.bank, o.projection) < 1,
         "--peek-every, --groups, --bank and --projection must be 1 or more"),
        (o.anchors < 2, f"--anchors {o.anchors}: use 2 or more"),
        (max(o.labelled) >= most,
         f"--labelled {max(o.labelled)}: leaves no training patient without label; use fewer"),
    ])


def nothing_on(o):
    """True where all four parts are off, which leaves the supervised baseline."""
    return o.no_cross_teaching and o.no_contrast and o.no_rsl and o.no_reps


def row_name(o):
    """The name of the trained rows: cct_r, and what is switched off."""
    parts = ("no_cross_teaching", "no_contrast", "no_rsl", "no_reps", "no_brs", "base_views")
    return "-".join([METHOD] + [part for part in parts if getattr(o, part)])


# ----------------------------------------------------------------------------------------- losses


def dice_loss(logits, label, eps=1e-5):
    """Soft Dice loss of the base: all K classes, background too, squared denominators [base].

        1 - mean over k of (2 sum(p y) + eps) / (sum p^2 + sum y^2 + eps)

    Sums over batch and pixels. logits [B, K, h, w], label [B, h, w]. Returns a scalar.
    """
    p = logits.float().softmax(1)                                  # [B, K, h, w]
    y = F.one_hot(label, logits.shape[1]).movedim(-1, 1).to(p)     # [B, K, h, w]
    both = (p * y).sum((0, 2, 3))                                  # [K]
    either = (p.square() + y.square()).sum((0, 2, 3))              # [K]
    return 1 - ((2 * both + eps) / (either + eps)).mean()


def segmentation_loss(logits, label):
    """0.5 (cross-entropy + soft Dice) [base]; logits [B, K, h, w], label [B, h, w]."""
    return .5 * (F.cross_entropy(logits, label) + dice_loss(logits, label))


def cross_teaching_loss(logits_1, logits_2):
    """Dice(p1, argmax p2) + Dice(p2, argmax p1) [base]; logits [B, K, h, w]."""
    return dice_loss(logits_1, logits_2.argmax(1)) + dice_loss(logits_2, logits_1.argmax(1))


def ramp_up(t, T):
    """exp(-5 (1 - min(t / T, 1))^2), from 0.007 at t = 0 to 1 at T [base]."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2)


def decay(t, T):
    """exp(-5 (t / T)^2), from 1 at t = 0 to 0.007 at T [ours]; best early: the paper's."""
    return math.exp(-5 * (t / T) ** 2)


def balanced_parts(z, y, temperature):
    """The sums of the balanced contrast for every pixel i of a group, each [..., n].

    z [..., n, d] of length 1, y [..., n] whole numbers. Returns

        sum_{p in P(i)} z_i.z_p / tau,    |P(i)|,    D_i = sum_{a != i} exp(z_i.z_a / tau) / w_ia

    P(i): the others of i's class; w_ia = N_{y_a}, the number of pixels of a's class, without i.
    D_i is returned times exp(-1 / tau): its exponents are then at most 0, and nothing overflows.
    """
    # The plain double loop, of which the lines below are the matrix form:
    #   for i in range(n):
    #       P = [p for p in range(n) if p != i and y[p] == y[i]]
    #       attract[i] = sum(z[i] @ z[p] / tau for p in P)
    #       D[i] = sum(exp(z[i] @ z[a] / tau) / w[i, a] for a in range(n) if a != i)
    Y = F.one_hot(y.long()).float()                                # [..., n, K]
    N = Y.sum(-2, keepdim=True)                                    # [..., 1, K]: N_c
    w = (N - Y).clamp(min=1)                                       # [..., n, K]: w_ia, by a's class
    count = (Y * (N - Y)).sum(-1)                                  # [..., n]: |P(i)|
    # sum_{p in P(i)} z_i.z_p = z_i . (sum of its class) - z_i.z_i
    own_class = Y @ (Y.mT @ z)                                     # [..., n, d]
    attract = ((z * own_class).sum(-1) - 1) / temperature          # [..., n]
    others = 1 - torch.eye(z.shape[-2], device=z.device)           # [n, n]: a != i
    E = ((z @ z.mT - 1) / temperature).exp() * others              # [..., n, n]
    # w_ia depends on the classes of i and a alone: sum over each class, then divide by its w
    by_class = E @ Y                                               # [..., n, K]
    D = (by_class / w).sum(-1)                                     # [..., n]
    return attract, count, D


def mean_contrast(attract, count, D, temperature):
    """Mean of L_i = log D_i - attract_i / count_i over the i with count > 0; 0 without any.

    log D_i is the same for all p in P(i), so it leaves their mean.
    """
    log_D = D.clamp(min=1e-30).log() + 1 / temperature             # D came times exp(-1 / tau)
    has_positive = count > 0
    L = (log_D - attract / count.clamp(min=1)) * has_positive
    return L.sum() / has_positive.sum().clamp(min=1)


def balanced_contrastive_loss(z, y, temperature):
    """Class-balanced supervised contrast in a group [base]: pixels of one class attract.

        L_i = - 1/|P(i)| sum_{p in P(i)} [ z_i.z_p/tau - log sum_{a != i} exp(z_i.z_a/tau) / w_ia ]
        w_ia = N_{y_a}, the number of pixels of a's class, without i itself if it is of that class

    All others repel, and by w the background, which is most of them, does not drown the rest. z
    [n, d] before normalisation, y [n] whole numbers; or G groups at once, [G, n, d] and [G, n].
    Returns a scalar, the mean over the anchors that have a positive; 0 without any.
    """
    z = F.normalize(z.float(), dim=-1)
    attract, count, D = balanced_parts(z, y, temperature)
    return mean_contrast(attract, count, D, temperature)


def reps_loss(z, y, r, near, temperature):
    """REPS: what registration takes for an anchor's place in other volumes joins its positives.

        L_i = - 1/(|P(i)| + |R(i)|) { sum_{p in P(i)} [ z_i.z_p/tau - log D_i ]
                                      + sum_{q in R(i)} [ z_i.r_q/tau - log D_i ] }    (REPS)
        D_i = sum_{a != i in the group} exp(z_i.z_a/tau) / w_ia
              + 1/|R(i)| sum_{q in R(i)} exp(z_i.r_q/tau)

    P(i) and w_ia as in `balanced_contrastive_loss`, the group being the anchors; the last sum only
    where R(i) is not empty. So what R(i) holds is never a negative, and needs no class. z [n, d]
    before normalisation, y [n]; r [n, U, d] of length 1: r_q, the candidate of each volume q, near
    [n, U]: whether q is in R(i). Returns a scalar, the mean over the anchors that have a positive.
    """
    z = F.normalize(z.float(), dim=-1)
    attract, count, D = balanced_parts(z, y, temperature)
    sim = (z[:, None] * r).sum(-1) / temperature                   # [n, U]
    E = (sim - 1 / temperature).exp()                              # times exp(-1 / tau), as D
    from_bank = near.sum(1)                                        # [n]: |R(i)|
    D = D + (E * near).sum(1) / from_bank.clamp(min=1)
    attract = attract + (sim * near).sum(1)
    return mean_contrast(attract, count + from_bank, D, temperature)


def cut(x, size, offset=(0, 0)):
    """Local blocks of maps: [B, C, H, W] -> [B, G, size^2, C], G = (H / size) (W / size) blocks.

    offset: rows and columns left out at the top and left where `size` does not divide H, W. Labels
    go through here as well, as [B, 1, H, W], so that features and labels are in the same order by
    construction.
    """
    B, C, H, W = x.shape
    h, w = H // size, W // size
    top, left = offset
    x = x[:, :, top:top + h * size, left:left + w * size]
    x = x.reshape(B, C, h, size, w, size)
    x = x.permute(0, 2, 4, 3, 5, 1)                                # [B, h, w, size, size, C]
    return x.reshape(B, h * w, size * size, C)                     # [B, G, size^2, C]


def local_contrast(maps, labels, size, groups, temperature):
    """Contrast in up to `groups` groups of local blocks: loss [base], draw of the groups [ours].

    A group has one block of every image of every network, each at a place of its own: the blocks of
    an image are permuted. Groups of background alone are skipped [base]. maps: projected features
    of each network [B, d, h, w]; labels: for each network the classes [B, h, w] of its pixels.
    Returns a scalar.
    """
    H, W = maps[0].shape[2:]
    # rows and columns to leave out at the top and left: 0 to what `size` leaves over
    offset = [int(torch.randint(side % size + 1, ())) for side in (H, W)]
    z = torch.cat([cut(m, size, offset) for m in maps])            # [2B, G, size^2, d]
    y = torch.cat([cut(c[:, None], size, offset) for c in labels])         # [2B, G, size^2, 1]
    order = torch.rand(z.shape[:2]).argsort(1).to(z.device)        # [2B, G], a permutation a row
    image = torch.arange(len(z), device=z.device)[:, None]         # [2B, 1]
    z = z[image, order].transpose(0, 1).flatten(1, 2)              # [G, 2B size^2, d]
    y = y[image, order].transpose(0, 1).flatten(1)                 # [G, 2B size^2]
    some = torch.nonzero((y > 0).any(1))[:, 0]                     # groups with an organ
    some = some[torch.randperm(len(some))[:groups]]
    if not len(some):
        return z.sum() * 0
    return balanced_contrastive_loss(z[some], y[some], temperature)


class MemoryBank(nn.Module):
    """The last M = `size` pixel features of each volume, of one network, with their common places.

    The oldest are overwritten; of more than M at once M are taken, evenly. A module, so that its
    state is saved as that of networks is.
    """
    def __init__(self, volumes, size, dim):
        super().__init__()
        self.register_buffer("z", torch.zeros(volumes, size, dim))
        # mm; empty: more than 1 km from all places
        self.register_buffer("place", torch.full((volumes, size, 3), 1e6))
        self.register_buffer("next", torch.zeros(volumes, dtype=torch.long))

    def push(self, z, place, volume):
        """Add features z [n, d] (unit length, detached) at places [n, 3] of volumes [n]."""
        size = self.z.shape[1]
        for v in volume.unique():
            own = torch.nonzero(volume == v)[:, 0]
            m = min(len(own), size)
            every = torch.arange(m, device=own.device)             # [m]
            own = own[every * len(own) // m]                       # evenly: organ comes first
            index = (self.next[v] + every) % size                  # [m]: a ring, the oldest go
            self.z[v, index] = z[own]
            self.place[v, index] = place[own]
            self.next[v] = (self.next[v] + m) % size

    def nearest(self, place, volume, radius):
        """R(i): from every volume but the own the one feature nearest to each place [n, 3] in mm.

        Returns (features [n, U, d], whether within `radius` mm [n, U]).
        """
        away = torch.cdist(place, self.place.flatten(0, 1))        # [n, U M]
        away = away.unflatten(1, self.place.shape[:2])             # [n, U, M]
        distance, index = away.min(2)                              # [n, U] each
        every = torch.arange(len(self.z), device=place.device)     # [U]
        near = (distance <= radius) & (every != volume[:, None])
        return self.z[every, index], near


# --------------------------------------------------------------------------------------- training


class Maps(NamedTuple):
    """What the two networks make of a batch: lists of two, the U-Net's and the Swin-UNet's."""
    logits: list                                                   # [B, K, S, S]
    coarse: list                                                   # [B, d, S/8, S/8], projected
    fine: list                                                     # [B, d, S/2, S/2], projected


def unet_maps(unet, x):
    """The decoder's first map [B, 8 width, S/8, S/8] and its last [B, width, S, S]."""
    *skips, x = unet.encoder(x)                                    # from fine to coarse
    maps = []
    decoder = unet.decoder
    for up, block, skip in zip(decoder.ups, decoder.blocks, reversed(skips)):
        x = block(torch.cat([up(x), skip], 1))                     # [B, half the channels, 2h, 2w]
        maps.append(x)
    return maps[0], maps[-1]


class Projector(nn.Module):
    """Maps of both networks -> d features a pixel [base]; at one level, coarse or fine.

    1 x 1 convolution to 2d channels, ReLU, 1 x 1 convolution to d, the last one shared by the two
    networks. Features of the Swin-UNet are LayerNormed first.
    """
    def __init__(self, unet_width, swin_width, d):
        super().__init__()
        self.norm = nn.LayerNorm(swin_width)
        self.unet = nn.Conv2d(unet_width, 2 * d, 1)
        self.swin = nn.Conv2d(swin_width, 2 * d, 1)
        self.last = nn.Conv2d(2 * d, d, 1)

    def forward(self, unet_map, swin_map):
        """[B, unet_width, h, w], [B, swin_width, h, w] -> list of two [B, d, h, w]."""
        swin_map = self.norm(swin_map.movedim(1, -1)).movedim(-1, 1)
        hidden = [self.unet(unet_map).relu(), self.swin(swin_map).relu()]  # [B, 2d, h, w] each
        return [self.last(h) for h in hidden]


class Students(nn.Module):
    """The U-Net and the Swin-UNet, and for the contrast a projector for each of two levels."""
    def __init__(self, run):
        super().__init__()
        o = run.o
        self.unet = run.unet()
        self.swin = SwinUNet(run.channels, len(run.classes), o.swin_dim, o.window)
        self.project_coarse = Projector(8 * o.width, 2 * o.swin_dim, o.projection)
        self.project_fine = Projector(o.width, o.swin_dim // 2, o.projection)

    def forward(self, views):
        """Each network on its view [B, C, S, S]: `Maps`."""
        unet_coarse, unet_fine = unet_maps(self.unet, views[0])
        swin_coarse, swin_fine = self.swin.maps(views[1])          # the same sizes
        logits = [self.unet.head(unet_fine).float(), self.swin.head(swin_fine).float()]
        coarse = self.project_coarse(unet_coarse, swin_coarse)
        # of the fine map every second pixel, a sixteenth of the pairs to compare
        half = [x[..., ::2, ::2] for x in (unet_fine, swin_fine)]
        return Maps(logits, coarse, self.project_fine(*half))


class Batch(NamedTuple):
    """Slices for a step."""
    views: list                                                    # for each network [B, C, S, S]
    label: torch.Tensor                                            # [B, S, S], true or warped
    place: torch.Tensor                                            # [B, S, S, 3] mm, nan: none
    volume: torch.Tensor                                           # [B]


def base_grid(n, size, device):
    """Sampling grids [n, S, S, 2] of the base's views, about the image's centre.

    Half of them are turned by quarters and flipped, a quarter rotated by up to 20 degrees.
    """
    kind = torch.rand(n)                                           # below 0.5, to 0.75, above
    quarters = math.pi / 2 * torch.randint(4, (n,))
    small = math.pi / 9 * (2 * torch.rand(n) - 1)
    angle = torch.where(kind < .75, small, 0.)
    angle = torch.where(kind < .5, quarters, angle)
    flip = torch.where(kind < .5, -1., 1.)
    zero = torch.zeros(n)
    cos = angle.cos()
    sin = angle.sin()
    rows = [flip * cos, -sin, zero,
            flip * sin, cos, zero]
    theta = torch.stack(rows, 1).view(n, 2, 3).to(device)
    return F.affine_grid(theta, (n, 1, size, size), align_corners=False)


def random_grid(o, n, device):
    """Sampling grids [n, S, S, 2] of the run's own views, or of the base's."""
    if o.base_views:
        return base_grid(n, o.size, device)
    return spatial_grid(n, o.size, o.rotation, device)


def draw_batch(run, numbers, n, places, warped=None):
    """A `Batch` of n random slices of `numbers`, moved at random.

    places: common places [N, 3, S, S]; warped: pseudo-labels [N, S, S] of unlabelled slices.
    Without, slices have their true labels, and for each network intensities of its own (not with
    --base-views).
    """
    o, dataset = run.o, run.dataset
    pick = common.random_slices(numbers, n)                        # [B]
    grid = random_grid(o, n, run.device)                           # [B, S, S, 2]
    x = warp(dataset.image(pick, run.device), grid)                # [B, C, S, S]
    place = places[pick].to(run.device).float()                    # [B, 3, S, S]
    place = F.grid_sample(place, grid, "nearest", align_corners=False)
    # outside the image grid_sample gives 0, which is a place
    outside = (grid.abs() > 1).any(-1, keepdim=True)               # [B, S, S, 1]
    place = place.movedim(1, -1).masked_fill(outside, torch.nan)   # [B, S, S, 3]
    views = [x, x]                                                 # see no. 8
    if warped is not None:
        label = warped[pick].to(run.device).long()                 # [B, S, S]
    else:
        label = dataset.label(pick, run.device)
        if not o.base_views:
            views = [photometric(x), photometric(x)]
    views = [common.channels_last(v) for v in views]
    volume = torch.from_numpy(dataset.volume[pick]).to(run.device)
    return Batch(views, warp(label, grid, "nearest"), place, volume)


class Pixels(NamedTuple):
    """What the two contrasts compare; lists of two: the U-Net's and the Swin-UNet's."""
    coarse: list                                                   # [B, d, S/8, S/8], projected
    fine: list                                                     # [B, d, S/2, S/2]
    classes: list                                                  # [B, S, S]
    place: torch.Tensor                                            # [B, S, S, 3] mm, nan: none
    volume: torch.Tensor                                           # [B]


def pixels_of(batch, maps, classes):
    """The `Pixels` of a batch, its `Maps` and, for each network, the classes of its pixels."""
    return Pixels(maps.coarse, maps.fine, classes, batch.place, batch.volume)


def joined(a, b):
    """The `Pixels` of labelled and of unlabelled slices in one batch."""
    def of_both_networks(x, y):
        return [torch.cat([x[0], y[0]]), torch.cat([x[1], y[1]])]

    return Pixels(of_both_networks(a.coarse, b.coarse), of_both_networks(a.fine, b.fine),
                  of_both_networks(a.classes, b.classes),
                  torch.cat([a.place, b.place]), torch.cat([a.volume, b.volume]))


def cell_classes(y, side):
    """The class in the middle of each cell of a label: [B, S, S] -> [B, *side].

    "nearest-exact": "nearest" takes a cell's corner, which for 8 x 8 pixels is 3.5 off its middle.
    """
    small = F.interpolate(y[:, None].float(), side, mode="nearest-exact")          # [B, 1, *side]
    return small[:, 0].long()


def contrast_terms(o, pixels):
    """The local contrast at both levels: a scalar."""
    side = pixels.coarse[0].shape[2:]
    small = [cell_classes(y, side) for y in pixels.classes]        # [B, S/8, S/8]
    half = [y[:, ::2, ::2] for y in pixels.classes]                # [B, S/2, S/2]
    # coarse: up to 4 groups of blocks of block / 2 cells, a cell is 8 x 8 pixels (ours)
    at_coarse = local_contrast(pixels.coarse, small, o.block // 2, 4, o.temperature)
    # fine: every second pixel, so block / 2 of them are `block` pixels
    at_fine = local_contrast(pixels.fine, half, o.block // 2, o.groups, o.temperature)
    return at_coarse + at_fine


def draw_anchors(known, organ, n):
    """n random pixels of the mask `known` [B, h, w], half of them organ, or fewer if there are not.

    Returns [n, 3]: image, row, column.
    """
    some = []
    for kind in (known & organ, known & ~organ):
        pixels = torch.nonzero(kind)                               # [pixels, 3]
        few = torch.randperm(len(pixels))[:n // 2]
        some.append(pixels[few.to(pixels.device)])
    return torch.cat(some)


def reps_terms(o, banks, pixels):
    """REPS of both networks at anchors that have a common place; fills the banks. A scalar."""
    L = 0.
    places = pixels.place[:, ::2, ::2]                             # [B, S/2, S/2, 3]
    known = places.isfinite().all(-1)                              # [B, S/2, S/2]
    for net, bank in enumerate(banks):
        y = pixels.classes[net][:, ::2, ::2]                       # [B, S/2, S/2]
        b, row, column = draw_anchors(known, y > 0, o.anchors).T   # [n] each
        if len(b):
            z = pixels.fine[net][b, :, row, column]                # [n, d]
            place = places[b, row, column]                         # [n, 3]
            volume = pixels.volume[b]                              # [n]
            r, near = bank.nearest(place, volume, o.radius)
            L = L + reps_loss(z, y[b, row, column], r, near, o.temperature)
            bank.push(F.normalize(z.detach().float(), dim=1), place, volume)
    return L


def start_training(run, seed):
    """The `Students`, their U-Net from --init if given, and AdamW with two groups."""
    o = run.o
    torch.manual_seed(seed)
    students = run.place(Students(run))
    if run.start:
        common.load_weights(students.unet, run.start["unet"], run.start["parts"])
    peak = o.pretrained_lr if run.start else o.lr
    rest = [p for name, p in students.named_parameters() if not name.startswith("unet.")]
    groups = [{"params": students.unet.parameters(), "peak": peak, "warm_up": 0},
              {"params": rest, "peak": o.swin_lr, "warm_up": .05 * o.steps}]
    return students, torch.optim.AdamW(groups, weight_decay=o.weight_decay)


def set_rates(optimiser, step, T):
    """Each group's peak times its warm-up times half a cosine, both from step 0."""
    for group in optimiser.param_groups:
        warm = min(1, (step + 1) / (group["warm_up"] + 1))
        group["lr"] = group["peak"] * warm * cosine(step, T)


def train(run, row, registered):
    """Train both networks on a row's labelled slices and on those of all other training patients.

    registered: the `Registered` of this number of patients. Returns the `Students`.
    """
    o, dataset, T = run.o, run.dataset, run.o.steps
    patients = run.patients(row.labelled)
    own = dataset.of_patients(patients, labelled=True)
    others = dataset.of_patients(set(run.split["train"]) - set(patients))
    students, optimiser = start_training(run, row.seed)
    banks = [MemoryBank(len(run.cases), o.bank, o.projection) for net in (0, 1)]
    banks = nn.ModuleList(banks).to(run.device)
    for step in run.steps(row.name, T, (students, banks), optimiser):
        set_rates(optimiser, step, T)
        labelled = draw_batch(run, own, o.labelled_batch, registered.places)
        unlabelled = draw_batch(run, others, o.unlabelled_batch, registered.places,
                                registered.warped)
        with run.autocast():
            maps = students(labelled.views)
            maps_u = students(unlabelled.views)                    # by themselves: see no. 7
        L_sup = sum(segmentation_loss(logits, labelled.label) for logits in maps.logits)
        L_CT = L_RSL = L_contrast = L_REPS = 0.
        if not o.no_cross_teaching:
            L_CT = cross_teaching_loss(*maps_u.logits)
        # L_RSL = sum over both networks of 0.5 (CE + Dice)(p_u, y~_u)    (RSL) [ours]
        # y~_u(x) = y_l*(T_back(x)), a warped label, never the true one: pixel x of u takes the
        # label of the best partner l* (BRS) at T_back(x); made in `Registered.place_volume`
        if not o.no_rsl:
            L_RSL = sum(segmentation_loss(logits, unlabelled.label) for logits in maps_u.logits)
        pixels = pixels_of(labelled, maps, [labelled.label] * 2)
        if step >= .075 * T:                                       # labelled slices alone at first
            # the class of an unlabelled pixel is what the other network says
            unet, swin = (logits.argmax(1) for logits in maps_u.logits)
            pixels = joined(pixels, pixels_of(unlabelled, maps_u, [swin, unet]))
        if not o.no_contrast:
            L_contrast = contrast_terms(o, pixels)
        if not o.no_reps:
            L_REPS = reps_terms(o, banks, pixels)
        # L = L_sup + w(t) L_CT + omega(t) L_RSL + lambda_c L_contrast + lambda_r L_REPS    [ours]
        w = o.cross_weight * ramp_up(step, .75 * T)
        omega = o.rsl_weight * decay(step, T)
        loss = L_sup + w * L_CT + omega * L_RSL
        loss = loss + o.contrast_weight * L_contrast + o.reps_weight * L_REPS
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            run.log(row.name, step=step, sup=L_sup, cross=L_CT, RSL=L_RSL, contrast=L_contrast,
                    REPS=L_REPS, weight_cross=w, weight_RSL=omega)
        if not o.no_peek and (step % o.peek_every == 0 or step == T - 1):
            run.log(row.name, step=step, **peek(run, students, others, registered.warped))
    run.log(row.name, labelled_seen=T * o.labelled_batch)
    return students


def baseline_batch(run, numbers):
    """--batch random slices for the baseline: image [B, C, S, S], label [B, S, S]."""
    o = run.o
    if not o.base_views:
        return common.labelled_batch(run, numbers, o.batch)        # as in the other scripts
    pick = common.random_slices(numbers, o.batch)                  # [B]
    grid = base_grid(o.batch, o.size, run.device)                  # [B, S, S, 2]
    image = warp(run.dataset.image(pick, run.device), grid)
    label = warp(run.dataset.label(pick, run.device), grid, "nearest")
    return common.channels_last(image), label


def finetune(run, row):
    """The supervised baseline, as in the other scripts: the U-Net alone on the labelled slices."""
    o = run.o
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    unet = run.place(run.unet())
    optimiser = torch.optim.AdamW(unet.parameters(), weight_decay=1e-4)
    for step in run.steps(row.name, o.steps, (unet,), optimiser):
        optimiser.param_groups[0]["lr"] = o.lr * cosine(step, o.steps)
        image, label = baseline_batch(run, numbers)                # [B, C, S, S], [B, S, S]
        with run.autocast():
            logits = unet(image).float()                           # [B, K, S, S]
        ce = F.cross_entropy(logits, label)
        dice = common.dice_loss(logits, label)
        optimiser.zero_grad()
        (ce + dice).backward()
        optimiser.step()
        if step % 50 == 0:
            run.log(row.name, step=step, cross_entropy=ce, dice_loss=dice,
                    cross_entropy_chance=math.log(len(run.classes)))
    run.log(row.name, labelled_seen=o.steps * o.batch)
    return unet


# ------------------------------------------------------------------ what looks at held-back labels

# Only here are labels of unlabelled volumes read, to draw Fig. 4 and to judge the registration.
# Nothing that trains sees what these functions return; --no-peek switches them off.


def mean_dice(run, pred, truth):
    """Mean Dice over the foreground classes of two label maps of equal shape."""
    scores = common.dice_score(pred, truth, range(1, len(run.classes)))
    return common.nanmean(scores.values())


def evenly(items, n):
    """At most n of the items, evenly from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(n, len(items)))
    return [items[int(k)] for k in places]


@torch.no_grad()
def peek(run, students, unlabelled, warped):
    """Dice of three kinds of pseudo-labels on 64 of the slices `unlabelled`, pooled."""
    few = np.array(evenly(unlabelled, 64))
    truth = run.dataset.label(few).numpy()                         # [64, S, S]
    x = run.dataset.image(few, run.device)
    keep = (truth < 255).all((1, 2))                               # where there is a label
    students.eval()
    maps = students([common.channels_last(x), x])
    students.train()
    unet, swin = (logits.argmax(1).cpu().numpy() for logits in maps.logits)
    return {"peek_unet": mean_dice(run, unet[keep], truth[keep]),
            "peek_swin": mean_dice(run, swin[keep], truth[keep]),
            "peek_registration": mean_dice(run, warped[few].numpy()[keep], truth[keep])}


def peek_registration(run, registered, u, n):
    """Mean label Dice of the pair (u, n) before, after the affine map, and after all.

    On the voxels of volume u; {} where it has no label.
    """
    volume = Stack(run.dataset, u)
    truth = run.dataset.label(volume.numbers).numpy()              # [V, S, S]
    if (truth == 255).any():
        return {}
    pair = registered.pairs[u, n]
    still = torch.zeros_like(pair["back"])
    found = {}
    with registered.device:
        kinds = {"dice_before": {"A": torch.eye(3, 4), "back": still},
                 "dice_affine": {"A": pair["A"], "back": still},
                 "dice_after": pair}
        for name, kind in kinds.items():
            label = registered.frames[n].warp_label(kind, volume)
            found[name] = mean_dice(run, label.cpu().numpy(), truth)
    return found


# ----------------------------------------------------------------- registration: places and values

# From here on everything is in mm. A volume is a stack of prepared slices with voxels of (slice,
# row, column) mm, and a place is (z, y, x) in mm about the volume's centre, so that volumes of any
# size and spacing share one kind of coordinate. New tensors are made on the default device, which
# `Registered` sets: the GPU if there is one.


def points(shape, step, centre=0.):
    """The places of the voxels of a grid, [Z, Y, X, 3] in mm; shape in voxels, the rest in mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, step)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) + centre


def apart(shape, step, counts):
    """mm between `counts` voxels or points along each axis of a grid: shape in voxels of `step`."""
    return [n * mm / count for n, mm, count in zip(shape, step, counts)]


def half_size(shape, step):
    """Half the size of a grid in mm, [3]."""
    return torch.tensor([n * mm / 2 for n, mm in zip(shape, step)])


def sample(x, p, step, padding="zeros"):
    """Values [B, C, ...] of x [B, C, Z, Y, X], voxels of `step` mm, at the places p [B, ..., 3]."""
    grid = (p / half_size(x.shape[2:], step)).flip(-1)             # x, y, z in [-1, 1]
    grid = grid.flatten(1, -2)[:, None, None]                      # [B, 1, 1, n, 3]
    values = F.grid_sample(x, grid, "bilinear", padding, align_corners=False)      # [B, C, 1, 1, n]
    return values[:, :, 0, 0].unflatten(-1, p.shape[1:-1])         # [B, C, ...]


def inside(p, shape, step):
    """1 where a place lies inside a volume, else 0: p [B, ..., 3] -> [B, 1, ...]."""
    return (p.abs() <= half_size(shape, step)).all(-1)[:, None].float()


def move(A, p):
    """x -> M x + b for affine maps A = [M | b] [B, 3, 4] at the places p [(B,) Z, Y, X, 3]."""
    p = p.expand(len(A), *p.shape[-4:])                            # [B, Z, Y, X, 3]
    M, b = A.split([3, 1], 2)                                      # [B, 3, 3], [B, 3, 1]
    moved = p.flatten(1, -2) @ M.mT + b.mT                         # [B, n, 3]
    return moved.view(p.shape)


def displaced(p, u):
    """x -> x + u(x): places p [Z, Y, X, 3] and displacements u [B, 3, Z, Y, X] of them."""
    return p + u.movedim(1, -1)                                    # [B, Z, Y, X, 3]


def resize(x, shape):
    """Trilinear in between: [B, C, z, y, x] -> [B, C, *shape]."""
    return F.interpolate(x, shape, mode="trilinear")


def band(n, radius):
    """[n, n], row k the mean over the places within `radius` of k."""
    place = torch.arange(n)
    near = ((place[:, None] - place).abs() <= radius).float()
    return near / near.sum(1, keepdim=True)


def box_mean(x, radius):
    """Mean over boxes of 2 radius + 1 voxels along z, y, x: [B, C, Z, Y, X], cut at the border."""
    Z, Y, X = x.shape[2:]
    x = torch.einsum("bczyx,kz->bckyx", x, band(Z, radius[0]))
    x = torch.einsum("bczyx,ky->bczkx", x, band(Y, radius[1]))
    return torch.einsum("bczyx,kx->bczyk", x, band(X, radius[2]))


def local_correlation(a, b, weight, radius=(1, 2, 2), flat=1e-3):
    """Local normalised cross-correlation, squared with its sign, mean over `weight`.

        cc = cov |cov| / (var a var b)    in boxes about every voxel

    which makes it blind to slow changes of intensity. Where `a`, the fixed image, is flat (variance
    below `flat`), there is nothing to compare, and a voxel counts less. [B, 1, Z, Y, X] each -> [B]
    in [-1, 1].
    """
    products = torch.cat([a, b, a * a, b * b, a * b], 1)           # [B, 5, Z, Y, X]
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = box_mean(products, radius).split(1, 1)
    cov = mean_ab - mean_a * mean_b
    var_a = (mean_aa - mean_a * mean_a).clamp(min=0)
    var_b = (mean_bb - mean_b * mean_b).clamp(min=0)
    weight = weight * var_a / (var_a + flat)
    cc = cov * cov.abs() / (var_a * var_b + 1e-8)
    total = weight.flatten(1).sum(1).clamp(min=1e-3)               # [B]
    return (cc * weight).flatten(1).sum(1) / total


# --------------------------------------------------------------- registration: affine, then smooth


def after_another(A, B):
    """The affine map x -> A(B(x)) of two [B, 3, 4]."""
    M, b = A.split([3, 1], 2)                                      # [B, 3, 3], [B, 3, 1]
    turned, shifted = (M @ B).split([3, 1], 2)
    return torch.cat([turned, shifted + b], 2)


def inverse(A):
    """The inverse of affine maps [B, 3, 4]."""
    M, b = A.split([3, 1], 2)                                      # [B, 3, 3], [B, 3, 1]
    back = torch.linalg.inv(M)
    return torch.cat([back, -back @ b], 2)


def affine_starts(reach, turn):
    """225 affine maps [225, 3, 4]: turns about z in rad, shifts of up to `reach` [3] mm."""
    shifts = [torch.linspace(-1, 1, n) * r for n, r in zip((3, 5, 5), reach)]
    turns = torch.tensor([-turn, 0., turn])
    angle, dz, dy, dx = torch.cartesian_prod(turns, *shifts).T     # [225] each
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros(len(angle))
    rows = [zero + 1, zero, zero, dz,
            zero, cos, -sin, dy,
            zero, sin, cos, dx]
    return torch.stack(rows, 1).view(-1, 3, 4)


def shifted_correlation(fixed, moving, least=.75):
    """Normalised cross-correlation of two grids, one of them shifted by every number of voxels.

    By FFT, over what both masks hold (Padfield, CVPR 2010); -1 where that is less than `least` of
    the smaller mask. fixed, moving [B, 2, Z, Y, X]: image and mask, voxels of one size; either may
    be one for all. Returns [B, *size], size that of both together: element k has fixed[i] beside
    moving[i + k]; from the size of `moving` on k stands for k - size, which is negative.
    """
    size = [n + m for n, m in zip(fixed.shape[2:], moving.shape[2:])]      # no shift wraps round

    def moments(x):                                                # [B, 3, ...]: mask, x, x^2
        image, mask = x.split(1, 1)
        return torch.fft.rfftn(torch.cat([mask, image, image * image], 1), size)

    f = moments(fixed).conj()                                      # [B, 3, ...], complex
    m = moments(moving)
    both = torch.fft.irfftn(f[:, 0] * m[:, 0], size).clamp(min=1)  # [B, *size]: voxels in both

    def mean(a, b):                                                # of f^a m^b over these voxels
        return torch.fft.irfftn(f[:, a] * m[:, b], size) / both

    mean_f = mean(1, 0)                                            # [B, *size]
    mean_m = mean(0, 1)
    var_f = (mean(2, 0) - mean_f * mean_f).clamp(min=1e-3)
    var_m = (mean(0, 2) - mean_m * mean_m).clamp(min=1e-3)
    cc = (mean(1, 1) - mean_f * mean_m) / (var_f * var_m).sqrt()
    smaller = torch.minimum(fixed[:, 1].sum((1, 2, 3)), moving[:, 1].sum((1, 2, 3)))       # [B]
    return cc.masked_fill(both < least * smaller[:, None, None, None], -1.)


def far_reach(fixed, moving, p, step):
    """How far from its place the box is sought by `far_starts`, [B, 3] mm.

    A sixth of the box; along z also half of what the other scan is taller than the scanned part of
    the box, which may lie anywhere in it. Arguments as of `register_affine`.
    """
    voxel = p[1, 1, 1] - p[0, 0, 0]                                # [3] mm
    tall_f = fixed[:, 1].amax((2, 3)).sum(1) * voxel[0]            # [B] mm of scan along z
    tall_m = moving[:, 1].amax((2, 3)).sum(1) * step[0]
    longer = (tall_f - tall_m).abs()[:, None]                      # [B, 1]
    side = p[-1, -1, -1] - p[0, 0, 0]                              # [3] mm
    return side / 6 + longer / 2 * torch.tensor([1., 0., 0.])      # [B, 3]


def far_starts(fixed, moving, p, step):
    """For each of the n FAR_SCALES the shift that correlates best: affine maps [n, B, 3, 4].

    Local correlation ranks starts well that are near, this one those that are far. Arguments as of
    `register_affine`.
    """
    voxel = p[1, 1, 1] - p[0, 0, 0]                                # [3] mm
    spacing = voxel.cpu().tolist()
    centre = p.mean((0, 1, 2))                                     # [3]
    reach = far_reach(fixed, moving, p, step) + voxel / 2          # [B, 3] mm: one shift at least
    maps = []
    for scale in FAR_SCALES:
        # `moving` made larger: voxel j of `seen` is what lies at scale (g_0 + j voxel)
        sides = [n * mm for n, mm in zip(moving.shape[2:], step)]
        counts = [math.ceil(s / (scale * v)) for s, v in zip(sides, spacing)]
        g = points(counts, spacing)                                # [Z, Y, X, 3] mm
        seen = sample(moving, (scale * g).expand(len(moving), *g.shape), step)     # [B, 2, Z, Y, X]
        cc = shifted_correlation(fixed, seen)                      # [B, *size]
        k = [torch.arange(n) for n in cc.shape[1:]]                # each [size]
        k = [torch.where(i < n, i, i - len(i)) for i, n in zip(k, counts)]         # negative, too
        k = torch.stack(torch.meshgrid(*k, indexing="ij"), -1)     # [*size, 3] voxels
        # voxel i of the box lies at x = p_0 + i voxel and belongs to j = i + k, at scale x + b
        b = scale * (k * voxel + g[0, 0, 0] - p[0, 0, 0])          # [*size, 3] mm
        moved = (scale * centre + b - centre).abs()                # how far the box's middle moves
        near = (moved <= reach[:, None, None, None]).all(-1)       # [B, *size]
        best = cc.masked_fill(~near, -2.).flatten(1).argmax(1)     # [B]
        b = b.flatten(0, 2)[best]                                  # [B, 3]
        M = scale * torch.eye(3).expand(len(b), 3, 3)
        maps.append(torch.cat([M, b[..., None]], 2))               # [B, 3, 4]
    return torch.stack(maps)


def register_affine(fixed, moving, p, step):
    """Affine maps [M | b] (mm) such that `moving` at M x + b looks like `fixed` at x.

    fixed [B, 2, Z, Y, X]: image and mask of its scan at the places p [Z, Y, X, 3]; moving likewise
    in voxels of `step` mm; either may be one for all. Refined are the far starts, and of 225 near
    ones (turns about z, shifts of up to a sixth of the box) the best four of every volume. Returns
    ([B, 3, 4], their similarity [B]).
    """
    B = max(len(fixed), len(moving))
    with torch.no_grad():
        far = far_starts(fixed, moving, p, step)                   # [2, B, 3, 4]
    fixed = fixed.expand(B, *fixed.shape[1:])
    moving = moving.expand(B, *moving.shape[1:])

    def similarity(A, number):                                     # [b, 3, 4], [b] -> [b]
        f, w_f = fixed[number].split(1, 1)                         # [b, 1, Z, Y, X] each
        m, w_m = sample(moving[number], move(A, p), step).split(1, 1)
        return local_correlation(f, m, w_f * w_m)

    side = p[-1, -1, -1] - p[0, 0, 0]                              # [3] mm
    starts = affine_starts(side / 6, TURN)                         # [225, 3, 4]
    every = torch.arange(B)
    with torch.no_grad():
        found = [similarity(A.expand(B, 3, 4), every) for A in starts]
    best = torch.stack(found).topk(REFINED, 0).indices             # [4, B]: numbers of starts
    A = torch.cat([starts[best], far])                             # [n = 6, B, 3, 4]: to be refined
    n = len(A)
    whose = every.repeat(n)                                        # [n B]: volume of each
    A, s = refine_affine(A.flatten(0, 1), partial(similarity, number=whose), step[1])
    choice = s.view(n, B).argmax(0) * B + every                    # [B]: start k of b is k B + b
    return A[choice], s[choice]


def refine_affine(A, similarity, mm):
    """Adam from the maps A [n, 3, 4] towards a larger `similarity`; mm: a voxel, for the rate.

    Returns the maps before the last step and their similarity [n].
    """
    M, b = A.split([3, 1], 2)                                      # [n, 3, 3], [n, 3, 1]
    change = torch.zeros_like(M, requires_grad=True)
    shift = torch.zeros_like(b, requires_grad=True)
    groups = [{"params": change, "peak": .02}, {"params": shift, "peak": mm / 4}]
    optimiser = torch.optim.Adam(groups)
    for n in range(REGISTRATION_STEPS):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(n, REGISTRATION_STEPS)
        turned = M @ (torch.eye(3) + change)                       # [n, 3, 3]
        now = torch.cat([turned, b + shift], 2)                    # [n, 3, 4]
        s = similarity(now)                                        # [n]
        optimiser.zero_grad()
        (.3 * change.square().sum() - s.sum()).backward()          # not far from the start
        optimiser.step()
    return now.detach(), s.detach()


def exponential(v, places, squarings=5):
    """The displacement [B, 3, z, y, x] of the flow along a stationary velocity v (mm), likewise.

    Such a flow cannot fold but for its discretisation. places [z, y, x, 3]: the control points
    about the box's centre.
    """
    size = places[-1, -1, -1] - places[0, 0, 0]
    step = [size[k].item() / (n - 1) for k, n in enumerate(v.shape[2:])]
    # one small step v / 2^n, doubled n times: u <- u + u(x + u(x))
    u = v / 2 ** squarings
    for _ in range(squarings):
        u = u + sample(u, displaced(places, u), step, padding="border")
    return u


def control_points(shape, step, across):
    """Control points over a box [z, y, x, 3], `across` along its longest side, 3 at least."""
    size = [n * mm for n, mm in zip(shape, step)]
    counts = [max(3, round(across * s / max(size))) for s in size]
    return points(counts, apart(shape, step, counts))


def roughness(v, mm):
    """Mean square gradient [B] of a velocity v [B, 3, z, y, x] with control points `mm` apart."""
    total = 0.
    for axis in (0, 1, 2):
        gradient = v.diff(dim=2 + axis) / mm[axis]
        total = total + gradient.square().mean((1, 2, 3, 4))
    return total


def register_deformable(fixed, moving, weight, step, stiffness):
    """Smooth displacements u (mm) such that `moving` at x + u(x) looks like `fixed` at x.

    fixed, moving, weight [B, 1, Z, Y, X] on one grid with voxels of `step` mm; the weight moves
    with `moving`. Coarse to fine: LEVELS, between the control points u is trilinear. `stiffness`
    weighs the mean square of the velocity's gradient. Returns u at the control points,
    [B, 3, z, y, x].
    """
    whole = fixed.shape[2:]
    v = torch.zeros(len(fixed), 3, 3, 3, 3)                        # [B, 3, z, y, x]: at rest
    for across, smaller, least in LEVELS:
        if max(whole) < least:                                     # a small box needs no more
            continue
        places = control_points(whole, step, across)               # [z, y, x, 3]
        between = apart(whole, step, places.shape[:3])             # mm between control points
        # so many slices become one that it is not thicker than a pixel is wide
        merged = max(1, int(smaller * step[1] / step[0] + 1e-6))
        shape = [math.ceil(n / k) for n, k in zip(whole, (merged, smaller, smaller))]
        voxel = apart(whole, step, shape)                          # mm, on this level
        small = [F.interpolate(x, shape, mode="area") for x in (fixed, moving, weight)]
        f = small[0]                                               # [B, 1, *shape]
        m_and_w = torch.cat(small[1:], 1)                          # [B, 2, *shape]
        p = points(shape, voxel)                                   # [*shape, 3]
        v = resize(v, places.shape[:3]).requires_grad_()           # [B, 3, z, y, x]
        optimiser = torch.optim.Adam([v])
        for n in range(REGISTRATION_STEPS):
            optimiser.param_groups[0]["lr"] = voxel[1] / 5 * cosine(n, REGISTRATION_STEPS)
            u = resize(exponential(v, places), shape)              # [B, 3, *shape]
            m, w = sample(m_and_w, displaced(p, u), voxel).split(1, 1)
            loss = stiffness * roughness(v, between) - local_correlation(f, m, w)    # [B]
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        v = v.detach()
    return exponential(v, places)


def jacobian(u, shape, step):
    """Determinants of the Jacobian of x -> x + u(x), below 0 where space is turned inside out.

    u [B, 3, z, y, x] (mm) on a grid of `shape` with voxels of `step` mm -> [B, Z-1, Y-1, X-1].
    """
    d = resize(u, shape)                                           # [B, 3, Z, Y, X]
    along_z = d.diff(dim=2)[:, :, :, :-1, :-1] / step[0]
    along_y = d.diff(dim=3)[:, :, :-1, :, :-1] / step[1]
    along_x = d.diff(dim=4)[:, :, :-1, :-1, :] / step[2]
    J = torch.stack([along_z, along_y, along_x], -1)               # [B, 3, Z-1, Y-1, X-1, 3]
    return torch.linalg.det(J.movedim(1, -2) + torch.eye(3))


def cycle_error(there, back, p, step):
    """|| T_back(T_there(x)) - x || in mm at the places p [Z, Y, X, 3]; 0: they undo each other.

    there, back [B, 3, Z, Y, X]: displacements on a grid with voxels of `step` mm, whose centre is
    the origin of p; of the affine map nothing is left, as A and its inverse cancel. Returns
    [B, Z, Y, X].
    """
    every = p.expand(len(there), *p.shape)                         # [B, Z, Y, X, 3]
    x = displaced(p, sample(there, every, step, padding="border"))
    x = displaced(x, sample(back, x, step, padding="border"))
    return (x - p).norm(dim=-1)


# -------------------------------------------------------------- registration: of a whole dataset


class Stack:
    """Volume n of a dataset: numbers of its slices, shape (V, S, S), voxels of `step` mm.

    scanned: the shape without the padding of a scan that is smaller than the crop.
    """
    def __init__(self, dataset, n):
        mm = dataset.info["target"]
        case = dataset.info["cases"][n]
        self.numbers = np.flatnonzero(dataset.volume == n)         # [V]
        V = len(self.numbers)
        S = dataset.images.shape[2]
        rows, columns = common.resampled(case["shape"], case["spacing"], mm)
        self.shape = (V, S, S)
        self.scanned = (V, min(S, rows), min(S, columns))
        self.step = (case["spacing"][0], mm, mm)

    def points(self):
        """The places of its voxels, [V, S, S, 3]."""
        return points(self.shape, self.step)


def registration_grid(run):
    """Shape and voxels (mm) of the grid of all volumes: twice the pixel, 2/3 of a thick slice.

    As the training volumes need it; no other is registered.
    """
    info = run.dataset.info
    train = [c for c in info["cases"] if c["patient"] in run.split["train"]]
    thick = [c["spacing"][0] for c in train]
    deep = max(c["spacing"][0] * c["shape"][0] for c in train)
    pixel = 2 * info["target"]
    side = info["size"] // 2
    step = (max(float(np.median(thick)) / 1.5, pixel), pixel, pixel)
    return (math.ceil(deep / step[0]), side, side), step


def on_grid(dataset, n, p):
    """Volume n (the mean of its channels) and the mask of its scan at the places p [Z, Y, X, 3].

    Returns [1, 2, Z, Y, X].
    """
    volume = Stack(dataset, n)
    image = dataset.image(volume.numbers, torch.get_default_device())      # [V, C, S, S]
    image = image.mean(1)[None, None]                              # [1, 1, V, S, S]
    half = F.avg_pool3d(image, (1, 2, 2))                          # [1, 1, V, S/2, S/2]
    thick, mm, _ = volume.step
    mask = inside(p[None], volume.scanned, volume.step)            # [1, 1, Z, Y, X]
    image = sample(half, p[None], (thick, 2 * mm, 2 * mm), padding="border")
    return torch.cat([image * mask, mask], 1)


class Box(NamedTuple):
    """A labelled volume in the box about its label."""
    p: torch.Tensor                                                # [Z, Y, X, 3], places in it
    step: tuple                                                    # mm
    image: torch.Tensor                                            # [1, 1, Z, Y, X]
    weight: torch.Tensor                                           # [1, 1, Z, Y, X], 1 in the scan


class Frame:
    """One labelled volume; in a box about its label others are registered to it.

    The box is wider than the label by a fifth each way. box: on the voxels of registration; coarse:
    on larger ones, for the affine map; label: one-hot [1, K, V, S, S]; organs [Z, Y, X]: 1 in the
    organs of `box`; whole [1, 2, Z, Y, X]: image and mask of all of the volume, to be moved itself.
    """
    def __init__(self, run, n):
        dataset = run.dataset
        self.volume = Stack(dataset, n)
        label = dataset.label(self.volume.numbers, torch.get_default_device())     # [V, S, S]
        one_hot = F.one_hot(label, len(run.classes)).float()       # [V, S, S, K]
        self.label = one_hot.movedim(-1, 0)[None]                  # [1, K, V, S, S]
        organs = self.volume.points()[label > 0]                   # [n, 3]
        if not len(organs):
            name = dataset.info["cases"][n]["name"]
            raise DataError(f"{name}: no labelled voxel lies in the crop; use a larger --size, or "
                            "leave this case out")
        lo, hi = organs.amin(0), organs.amax(0)
        self.centre = (lo + hi) / 2
        size = ((hi - lo) * 1.4).cpu().tolist()

        def box_with(step):
            counts = [max(4, math.ceil(s / mm)) for s, mm in zip(size, step)]
            p = points(counts, step, self.centre)
            return Box(p, step, *on_grid(dataset, n, p).split(1, 1))

        shape, step = registration_grid(run)
        self.box = box_with(step)
        self.coarse = box_with([max(s, 2 * step[1]) for s in step])
        background = self.label[:, :1]
        self.organs = sample(1 - background, self.box.p[None], self.volume.step)[0, 0]
        self.whole = on_grid(dataset, n, points(shape, step))

    def places(self, pair, y):
        """T_back(y): the places y [..., 3] of another volume in this one; nan outside the box."""
        A, back, box = pair["A"], pair["back"], self.box
        shape = box.p.shape[:3]
        x = (y - A[:, 3]) @ torch.linalg.inv(A[:, :3]).T           # x' = A^-1 y
        x = (x - self.centre)[None]                                # [1, ..., 3], about the centre
        between = apart(shape, box.step, back.shape[1:])           # mm between control points
        d = sample(back[None], x, between, padding="border")       # [1, 3, ...]
        there = displaced(x, d) + self.centre
        outside = inside(x, shape, box.step)[0, 0] == 0            # [...]
        return torch.where(outside[..., None], torch.nan, there[0])

    def warp_one_hot(self, pair, volume):
        """This volume's label, one-hot, linearly, on the voxels of a `Stack`: [K, V, S, S].

        Pulled: a voxel y of the other takes the label at T_back(y), so that labels go from here to
        there by the map from there to here. Where no label arrives, as outside the box or beyond
        the volume's last slice, there is background; the K values of a voxel sum to 1.
        """
        x = self.places(pair, volume.points()).nan_to_num(1e6)     # [V, S, S, 3]
        there = sample(self.label, x[None], self.volume.step)[0]   # [K, V, S, S]
        there[0] += 1 - there.sum(0)
        return there

    def warp_label(self, pair, volume):
        """The same as a label map: [V, S, S]."""
        return self.warp_one_hot(pair, volume).argmax(0)


def register_batch(frame, moving, step, stiffness):
    """Register volumes to a frame, and the frame's volume to them: a list of B pairs.

        T_there: frame -> volume,  x -> A (x + there(x))
        T_back:  volume -> frame,  y -> x' + back(x'),  x' = A^-1 y

    The two displacements are found independently; both are over the frame's box, in mm. moving
    [B, 2, Z, Y, X]: image and mask, voxels of `step` mm. A pair is a dict: A [3, 4]; there, back
    [3, z, y, x] at control points; similarity `before`, after A (`affine`) and `after` T_there;
    `cycle` error in mm (mean over the frame's organs); share of voxels that T_back has `folded`.
    """
    box = frame.box
    coarse = frame.coarse
    p = box.p - frame.centre                                       # [Z, Y, X, 3]
    shape = p.shape[:3]
    fixed = torch.cat([coarse.image, coarse.weight], 1)            # [1, 2, Z, Y, X]
    A, _ = register_affine(fixed, moving, coarse.p, step)
    # the piece of the volume that A has found, registered to the whole labelled volume, corrects A
    piece = sample(moving, move(A, coarse.p), step)                # [B, 2, Z, Y, X]
    correction, _ = register_affine(piece, frame.whole, coarse.p, step)
    A = after_another(A, inverse(correction))
    every = box.p.expand(len(moving), *box.p.shape)                # [B, Z, Y, X, 3]
    m_first, w_first = sample(moving, every, step).split(1, 1)     # [B, 1, Z, Y, X] each
    m, w = sample(moving, move(A, box.p), step).split(1, 1)
    f = box.image.expand_as(m)
    w = box.weight * w                                             # 1 where both are scanned
    there = register_deformable(f, m, w, box.step, stiffness)
    back = register_deformable(m, f, w, box.step, stiffness)
    with torch.no_grad():
        u = resize(there, shape)                                   # [B, 3, Z, Y, X]
        error = cycle_error(u, resize(back, shape), p, box.step)   # [B, Z, Y, X]
        moved = sample(m, displaced(p, u), box.step)
        J = jacobian(back, shape, box.step)                        # [B, Z-1, Y-1, X-1]
        found = {"A": A, "there": there, "back": back,
                 "before": local_correlation(f, m_first, box.weight * w_first),
                 "affine": local_correlation(f, m, w),
                 "after": local_correlation(f, moved, w),
                 "folded": (J <= 0).float().mean((1, 2, 3)),
                 "cycle": (error * frame.organs).sum((1, 2, 3)) / frame.organs.sum()}
    pairs = []
    for b in range(len(moving)):
        pairs.append({name: values[b].clone() for name, values in found.items()})
    return pairs


def register_all(run, volumes, labelled):
    """Register every volume to every labelled one.

    Returns {(volume, labelled): pair}, {labelled: Frame}, and the seconds it took. A batch is one
    file in the cache, under a key that holds the dataset and the options, so that a second run
    reads, and a killed run goes on. There is nothing random in it.
    """
    o = run.o
    dataset = run.dataset
    shape, step = registration_grid(run)
    data = Path(dataset.images.filename).parent.name               # the key of the prepared slices
    how = [REGISTRATION_VERSION, TURN, REFINED, FAR_SCALES, LEVELS, REGISTRATION_STEPS, o.stiffness]
    made_of = json.dumps([*how, data, volumes])
    key = hashlib.sha1(made_of.encode()).hexdigest()[:16]
    folder = common.make_folder(Path(o.cache) / f"registration-{key}")
    frames = {n: Frame(run, n) for n in labelled}
    batches = [volumes[b:b + 16] for b in range(0, len(volumes), 16)]
    grid = points(shape, step)                                     # [Z, Y, X, 3]
    here = torch.get_default_device()
    pairs = {}
    moving = {}
    seconds = 0.
    todo = [(n, batch) for n in labelled for batch in batches]
    for n, batch in tqdm(todo, "register", disable=None):
        file = folder / f"{n}-{batch[0]}.pt"
        if not file.exists():
            begun = common.clock(run.device)
            for u in batch:
                if u not in moving:
                    moving[u] = on_grid(dataset, u, grid)          # [1, 2, Z, Y, X]
            images = torch.cat([moving[u] for u in batch])         # [B, 2, Z, Y, X]
            made = register_batch(frames[n], images, step, o.stiffness)
            ours = file.with_suffix(f".{os.getpid()}")             # two runs may make it at once
            common.save_checkpoint(ours, method=METHOD, options={}, pairs=made,
                                   seconds=common.clock(run.device) - begun)
            ours.replace(file)
        content = common.load_checkpoint(file, METHOD)
        seconds += content["seconds"]
        for u, pair in zip(batch, content["pairs"]):
            pairs[u, n] = {name: value.to(here) for name, value in pair.items()}
    return pairs, frames, seconds


class Registered:
    """What registration knows with the first n labelled patients.

    volumes, labelled: numbers of the training volumes, and of those with a label; pairs, frames,
    seconds: of `register_all`, on `device`; warped uint8 [N, S, S]: labels for slices of unlabelled
    volumes, else 0; places float16 [N, 3, S, S]: common places of slices in mm, nan where there is
    none.
    """
    def __init__(self, run, n):
        patients = run.patients(n)
        patient = [case.patient for case in run.cases]
        self.volumes = [v for v, p in enumerate(patient) if p in run.split["train"]]
        self.labelled = [v for p in patients for v in self.volumes
                         if patient[v] == p and run.cases[v].label]
        self.o = run.o
        # on mps 3D sampling and pooling are missing
        self.device = torch.device("cpu") if run.device.type == "mps" else run.device
        N, S = len(run.dataset.volume), run.o.size
        self.warped = torch.zeros(N, S, S, dtype=torch.uint8)
        self.places = torch.full((N, 3, S, S), torch.nan, dtype=torch.float16)
        with self.device:                                          # new tensors are made there
            self.pairs, self.frames, self.seconds = register_all(run, self.volumes, self.labelled)
            for u in self.volumes:
                self.place_volume(Stack(run.dataset, u), u)

    def partners(self, volume):
        """BRS: the labelled volumes by their cycle error, l* first; never the volume itself.

        With --no-brs they are in random order, whatever their registration is worth.
        """
        def cycle(n):
            return self.pairs[volume, n]["cycle"].item()

        others = [n for n in self.labelled if n != volume]
        if self.o.no_brs:                                          # its own order for each volume
            order = np.random.default_rng(volume).permutation(len(others))
            return [others[k] for k in order]
        return sorted(others, key=cycle)

    def place_volume(self, volume, u):
        """Fill in the warped label and the common places of volume number u, a `Stack`.

        The label is that of the best partner l*, or the mean over the best --atlases. A pixel goes
        to l*, and from there to the frame of the first labelled volume, the common one.
        """
        first = self.labelled[0]
        x = volume.points()                                        # [V, S, S, 3]
        if u in self.labelled:                                     # its own partner
            partner = u
        else:
            partners = self.partners(u)
            partner = partners[0]
            x = self.frames[partner].places(self.pairs[u, partner], x)
            votes = 0.
            for n in partners[:self.o.atlases]:
                votes = votes + self.frames[n].warp_one_hot(self.pairs[u, n], volume)
            self.warped[volume.numbers] = votes.argmax(0).byte().cpu()
        if partner != first:
            x = self.frames[first].places(self.pairs[partner, first], x.nan_to_num(1e6))
        self.places[volume.numbers] = x.movedim(-1, 1).half().cpu()        # [V, 3, S, S]


# ---------------------------------------------------------------------------------- the Swin-UNet


def to_windows(x, w):
    """[B, H, W, C] -> [B, windows, w^2, C]."""
    B, H, W, C = x.shape
    x = x.view(B, H // w, w, W // w, w, C).transpose(2, 3)         # [B, H/w, W/w, w, w, C]
    return x.reshape(B, -1, w * w, C)


def from_windows(x, w, H, W):
    """The inverse of `to_windows`."""
    x = x.view(len(x), H // w, W // w, w, w, -1)
    return x.transpose(2, 3).reshape(len(x), H, W, -1)


@lru_cache(maxsize=64)
def attention_mask(H, W, w, shift, device):
    """0 between tokens that may see each other, -inf elsewhere, for an H x W map rolled by -shift.

    After the roll, windows at the border hold tokens from opposite sides of the image: each side
    keeps to itself. Returns [windows, w^2, w^2].
    """
    rolled_rows = torch.arange(H, device=device) < shift
    rolled_columns = torch.arange(W, device=device) < shift
    kind = 2 * rolled_rows[:, None] + 1 * rolled_columns           # [H, W], before the roll
    kind = kind.roll((-shift, -shift), (0, 1))
    kind = to_windows(kind[None, ..., None], w)[0, ..., 0]         # [windows, w^2]
    return torch.where(kind[:, :, None] == kind[:, None], 0., -torch.inf)


class WindowAttention(nn.Module):
    """Attention among the tokens of one window, with a learnt bias for every relative position."""
    def __init__(self, dim, window, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=.02)
        side = torch.arange(window)
        place = torch.cartesian_prod(side, side)                   # [n, 2]: row, column
        away = place[:, None] - place + window - 1                 # [n, n, 2] in 0 .. 2 window - 2
        index = away[..., 0] * (2 * window - 1) + away[..., 1]     # [n, n]
        self.register_buffer("index", index, persistent=False)

    def forward(self, x, mask):
        """x [B, w, n, dim] (w windows), mask [w, n, n], -inf between regions -> [B, w, n, dim]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))       # [B, w, n, 3, heads, d]
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                    # [B, w, heads, n, d]
        bias = self.bias[self.index].movedim(-1, 0)                # [heads, n, n]
        bias = bias + mask[:, None]                                # [w, heads, n, n]
        # softmax(q k' / sqrt(d) + bias) v
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q))    # [B, w, heads, n, d]
        return self.project(x.transpose(2, 3).flatten(3))


class SwinBlock(nn.Module):
    """Attention in windows, shifted or not, and a perceptron, both residual: [B, H, W, C].

    A 3 x 3 convolution of each channel comes first (Chu et al. 2021): windows do not know where in
    the image they are, and with few scans that is hard to do without (ours; results/cct_r.md).
    """
    def __init__(self, dim, window, heads, shift):
        super().__init__()
        self.window = window
        self.shift = shift
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm_1 = nn.LayerNorm(dim)
        self.norm_2 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, window, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        H, W = x.shape[1:3]
        w = self.window
        shift = self.shift if max(H, W) > w else 0                 # one window: nothing to shift
        x = x + self.place(x.movedim(-1, 1)).movedim(1, -1)        # convolved as [B, C, H, W]
        y = self.norm_1(x).roll((-shift, -shift), (1, 2))
        y = to_windows(y, w)                                       # [B, windows, w^2, C]
        y = self.attention(y, attention_mask(H, W, w, shift, x.device))
        y = from_windows(y, w, H, W)                               # [B, H, W, C]
        x = x + y.roll((shift, shift), (1, 2))
        return x + self.mlp(self.norm_2(x))


def stage(dim, window, heads):
    """Two blocks, the second one shifted by half a window: [B, H, W, dim]."""
    return nn.Sequential(SwinBlock(dim, window, heads, 0),
                         SwinBlock(dim, window, heads, window // 2))


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]: four neighbours side by side, then linear."""
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = F.pixel_unshuffle(x.movedim(-1, 1), 2).movedim(1, -1)          # [B, H/2, W/2, 4C]
        return self.reduce(self.norm(x))


class PatchExpanding(nn.Module):
    """[B, H, W, C] -> [B, f H, f W, C_out]: linear, then every token becomes f x f tokens."""
    def __init__(self, dim, out, factor):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor ** 2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x):
        x = self.expand(x).movedim(-1, 1)                          # [B, f^2 C_out, H, W]
        return self.norm(F.pixel_shuffle(x, self.factor).movedim(1, -1))


class SwinUNet(nn.Module):
    """A U-Net of Swin blocks (Cao et al. 2021; Liu et al. 2021) on patches of 4 x 4.

    Three stages down, two up, skips between them. Any input size: it pads to a multiple of 16
    windows; where `window` divides S / 16 there is nothing to pad.
    """
    def __init__(self, channels, classes, dim, window):
        super().__init__()
        self.unit = 16 * window                                    # a side that all windows divide
        self.patches = nn.Conv2d(channels, dim, 4, 4)
        self.patch_norm = nn.LayerNorm(dim)
        self.down_1 = stage(dim, window, 3)
        self.down_2 = stage(2 * dim, window, 6)
        self.down_3 = stage(4 * dim, window, 12)
        self.merge_1 = PatchMerging(dim)
        self.merge_2 = PatchMerging(2 * dim)
        self.norm = nn.LayerNorm(4 * dim)
        self.expand_2 = PatchExpanding(4 * dim, 2 * dim, 2)
        self.expand_1 = PatchExpanding(2 * dim, dim, 2)
        self.join_2 = nn.Linear(4 * dim, 2 * dim)
        self.join_1 = nn.Linear(2 * dim, dim)
        self.up_2 = stage(2 * dim, window, 6)
        self.up_1 = stage(dim, window, 3)
        self.last = PatchExpanding(dim, dim // 2, 4)
        self.head = nn.Conv2d(dim // 2, classes, 1)

    def maps(self, x):
        """[B, C, H, W] -> a coarse map [B, 2 dim, H/8, W/8] and a fine one [B, dim / 2, H, W]."""
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % self.unit, 0, -H % self.unit))
        x = self.patch_norm(self.patches(x).movedim(1, -1))        # [B, H/4, W/4, dim]
        skip_1 = self.down_1(x)
        skip_2 = self.down_2(self.merge_1(skip_1))                 # [B, H/8, W/8, 2 dim]
        x = self.norm(self.down_3(self.merge_2(skip_2)))           # [B, H/16, W/16, 4 dim]
        x = self.join_2(torch.cat([self.expand_2(x), skip_2], -1))
        coarse = self.up_2(x)                                      # [B, H/8, W/8, 2 dim]
        x = self.join_1(torch.cat([self.expand_1(coarse), skip_1], -1))
        fine = self.last(self.up_1(x))                             # [B, H, W, dim / 2]
        coarse = coarse[:, :math.ceil(H / 8), :math.ceil(W / 8)]
        return coarse.movedim(-1, 1), fine[:, :H, :W].movedim(-1, 1)

    def forward(self, x):                                          # [B, C, H, W] -> [B, K, H, W]
        return self.head(self.maps(x)[1])


# ---------------------------------------------------------------------------------------- figures


def pair_row(run, registered, u, n):
    """The line of registration.csv about the pair (u, n); label Dice only without --no-peek."""
    pair = registered.pairs[u, n]
    row = {"volume": run.cases[u].name, "labelled": run.cases[n].name}
    for name in ("before", "affine", "after"):
        row[f"similarity_{name}"] = float(pair[name])
    row["folded_percent"] = 100 * float(pair["folded"])
    row["cycle_error_mm"] = float(pair["cycle"])
    if not run.o.no_peek:
        row.update(peek_registration(run, registered, u, n))
    return row


def registrations(run):
    """{n: what registration knows with the first n labelled patients}, computed or read."""
    registered = {n: Registered(run, n) for n in sorted(run.o.labelled)}
    if not run.o.claims:                                           # a worker's parent has done this
        most = registered[max(run.o.labelled)]
        run.log("registration", seconds=most.seconds)              # when it was made
        write_registrations(run, most)
    return registered


def write_registrations(run, registered):
    """registration.csv, a line a pair; printed: means over all pairs, and over BRS's partners."""
    pairs = [(u, n) for u, n in registered.pairs if u != n]
    rows = [pair_row(run, registered, u, n) for u, n in pairs]
    taken = [row for row, (u, n) in zip(rows, pairs)
             if u not in registered.labelled and registered.partners(u)[0] == n]
    columns = dict.fromkeys(k for row in rows for k in row)        # not all volumes have a Dice
    table = [{k: row.get(k, "") for k in columns} for row in rows]
    common.write_csv(run.out / "registration.csv", table)
    print(f"registration of {len(rows)} pairs, in brackets the {len(taken)} partners taken:")
    for name in list(columns)[2:]:
        every = common.nanmean([row[name] for row in rows if name in row])
        some = common.nanmean([row[name] for row in taken if name in row])
        print(f"  {name:18} {every:6.3f} ({some:.3f})")
    judged = [row for row in rows if "dice_after" in row]
    if judged:                                                     # Spearman's
        errors = ranks([row["cycle_error_mm"] for row in judged])
        dice = ranks([row["dice_after"] for row in judged])
        correlation = np.corrcoef(errors, dice)[0, 1]
        print(f"  rank correlation of cycle error and Dice {correlation:.2f}")


def ranks(values):
    """The place of each value in their order, from 0: [n]."""
    return np.argsort(np.argsort(values))


@torch.no_grad()
def draw_registration(run, registered):
    """registration.png: some volumes and their partners, on the middle slice of the box.

    Fixed; moving before, after the affine map, after T_there; the Jacobian of T_back, which moves
    the labels, folded voxels in red.
    """
    some = evenly([u for u in registered.volumes if u not in registered.labelled], 4)
    figure, axes = common.new_figure(len(some), 5)
    for u, row in zip(some, axes):
        n = registered.partners(u)[0]
        pair = registered.pairs[u, n]
        with registered.device:
            pictures, J = registration_pictures(run, registered, u, n)
        titles = [f"fixed: {run.cases[n].name}", f"moving: {run.cases[u].name}",
                  f"affine, {float(pair['affine']):.2f}", f"deformed, {float(pair['after']):.2f}"]
        for axis, picture, title in zip(row, pictures, titles):
            common.show(axis, picture.cpu(), title=title)
        row[4].imshow(J.cpu(), cmap="gray", vmin=0, vmax=2)
        row[4].imshow(np.ma.masked_greater(J.cpu(), 0), cmap="autumn")
        row[4].set_title(f"T_back: {100 * float(pair['folded']):.2f} % folded\n"
                         f"cycle {float(pair['cycle']):.1f} mm", fontsize=8)
    common.save_figure(figure, run.out / "figures/registration.png")


def registration_pictures(run, registered, u, n):
    """Four pictures of the pair (u, n) and T_back's Jacobian, on the middle slice of the box."""
    shape, step = registration_grid(run)
    moving = on_grid(run.dataset, u, points(shape, step))          # [1, 2, Z, Y, X]
    pair = registered.pairs[u, n]
    box = registered.frames[n].box
    whole = box.p.shape[:3]
    there = pair["there"][None]                                    # [1, 3, z, y, x]
    A = pair["A"][None]
    end = displaced(box.p, resize(there, whole))                   # [1, Z, Y, X, 3]
    images = [box.image]
    for p in (box.p[None], move(A, box.p), move(A, end)):
        images.append(sample(moving, p, step))
    J = jacobian(pair["back"][None], whole, box.step)[0]           # [Z-1, Y-1, X-1]
    middle = len(box.p) // 2
    return [x[0, 0, middle] for x in images], J[min(middle, len(J) - 1)]


def choose_anchor(run, registered):
    """A pixel in the middle of the largest organ of the first labelled volume.

    Returns (slice number, row, column, class).
    """
    numbers = Stack(run.dataset, registered.labelled[0]).numbers
    label = run.dataset.label(numbers)                             # [V, S, S]
    k = int(torch.bincount(label[label > 0]).argmax())
    v = int((label == k).sum((1, 2)).argmax())
    pixels = torch.nonzero(label[v] == k)                          # [n, 2]
    far = (pixels - pixels.float().mean(0)).norm(dim=1)            # [n]
    row, column = pixels[far.argmin()].tolist()
    return numbers[v], row, column, k


@torch.no_grad()
def draw_correspondences(run, registered, net):
    """correspondences.png, the paper's Fig. 2: positives of one anchor, by labels and by places.

    Above, label-guided: every pixel that `net` gives the anchor's class, right or wrong. Below,
    registration-guided (REPS): in each volume the one pixel nearest to the anchor's common place.
    """
    dataset, o = run.dataset, run.o
    number, row, column, k = choose_anchor(run, registered)
    spot = registered.places[number, :, row, column].float()       # [3] mm
    some = evenly([u for u in registered.volumes if u not in registered.labelled], 5)
    figure, axes = common.new_figure(2, 1 + len(some))
    kinds = (f"label-guided: {run.classes[k]}", "registration-guided")
    for axis, kind in zip(axes[:, 0], kinds):
        common.show(axis, dataset.image(np.array([number]))[0, 0], title=f"anchor, {kind}")
        axis.plot(column, row, "o", color="C3", markersize=5, mec="white", mew=.5)
    for u, (above, below) in zip(some, axes[:, 1:].T):
        numbers = Stack(dataset, u).numbers
        places = registered.places[numbers].float()                # [V, 3, S, S]
        far = (places.nan_to_num(1e6) - spot[:, None, None]).norm(dim=1)   # [V, S, S] mm
        v, y, x = np.unravel_index(int(far.argmin()), far.shape)
        image = dataset.image(numbers[[v]], run.device)            # [1, C, S, S]
        mine = net(image).argmax(1)[0].cpu() == k                  # [S, S]
        picture = image[0, 0].cpu()
        common.show(above, picture, k * mine, len(run.classes), run.cases[u].name)
        common.show(below, picture, title=f"slice {v + 1}, {far.min():.1f} mm")
        if far.min() <= o.radius:
            below.plot(x, y, "o", color="C3", markersize=5, mec="white", mew=.5)
    common.save_figure(figure, run.out / "figures/correspondences.png")


def draw_pseudo_labels(run):
    """pseudo_labels.png, the paper's Fig. 4: Dice of three kinds of pseudo-labels over training.

    On unlabelled slices; a panel a number of labelled patients.
    """
    log = [r for r in common.read_log(run.out) if "peek_unet" in r]
    figure, axes = common.new_figure(1, len(run.o.labelled), 3.6, 3)
    kinds = {"peek_unet": "U-Net", "peek_swin": "Swin-UNet", "peek_registration": "registration"}
    for axis, n in zip(axes[0], run.o.labelled):
        name = common.Row(row_name(run.o), n, run.o.seeds[0]).name
        rows = {r["step"]: r for r in log if r["phase"] == name}   # of a step the last
        steps = sorted(rows)
        axis.axis("on")
        for kind, label in kinds.items():
            axis.plot(steps, [rows[s][kind] for s in steps], label=label)
        axis.set(xlabel="step", ylim=(0, 1), title=name)
        axis.grid(alpha=.3)
    axes[0, 0].set_ylabel("Dice, unlabelled slices")
    axes[0, 0].legend()
    common.save_figure(figure, run.out / "figures/pseudo_labels.png")


# ------------------------------------------------------------------------------------------- main

LOOK = """what registration brings onto a labelled scan (the fourth column should look like the
first) can take its label, by the map that goes back. pseudo_labels.png beside it has the Dice of
such labels and of the networks' own over training: see how soon, or whether, the networks overtake
the registration."""


def main(arguments=None):
    o = common.parse_options(METHOD, __doc__, OPTIONS, arguments, PAPER_ALSO, "base")
    if o.predict:
        return common.predict_files(o)
    run = common.Run(o)
    check(run)
    methods = run.choose("scratch", row_name(o))
    run.begin()
    registered = {}
    if row_name(o) in methods and not nothing_on(o):
        registered = registrations(run)
    for row in run.rows():
        if row.method == "scratch" or nothing_on(o):
            run.score(row, finetune(run, row))
        else:
            students = train(run, row, registered[row.labelled])
            run.score(row, students.unet, Swin=students.swin)
    nets = run.first_nets(common.build_unet, "scratch", row_name(o))
    common.draw_overlays(run, nets)
    if not registered:
        return run.report("overlays.png", common.LOOK_ROWS)
    print(f"labelled slices seen: scratch {o.steps * o.batch}, each network of CCT-R "
          f"{o.steps * o.labelled_batch}")
    few = registered[min(o.labelled)]                              # the fewest labels show the most
    draw_registration(run, few)
    draw_correspondences(run, few, list(nets.values())[-1])
    if not o.no_peek:
        draw_pseudo_labels(run)
    run.report("registration.png", LOOK)


if __name__ == "__main__":
    common.run_main(main)
