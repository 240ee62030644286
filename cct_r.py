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
    box about the labelled volume's label; affine from 225 starts, corrected from the other side;
    then each way the flow of a smooth velocity, coarse to fine, on the signed square of local
    cross-correlation.
 2. Best registration selection (BRS) by cycle consistency [paper]; its score is the mean of
    || T_back(T_there(x)) - x || over the labelled volume's organs [ours]: over the whole box, most
    of it background, it does not rank registrations (results/cct_r.md).
 3. RSL: labels warped by the best registration [paper]; one-hot, linearly, then arg max; for both
    networks 0.5 (cross-entropy + Dice), weight omega_0 exp(-5 (t/T)^2), omega_0 = 1 [ours].
 4. REPS: positives from registration, from a memory bank; for an anchor "the anatomically-closest
    point in each 3D volume" [paper, Fig. 2]. Ours: common place, through the best partner to the
    frame of the first labelled volume; the 4 nearest features of all other volumes together, which
    may be of one volume, within 8 mm; a term of its own beside the contrast, in which every other
    place is a negative: it repels what the contrast attracts.
 5. Cross teaching: Dice with the other's arg max, 0.1 exp(-5 (1 - t/T_r)^2), T_r = 3/4 of the steps
    [base]. Here and in all losses: Dice of the foreground, linear denominators [ours]; [base]: all
    classes, squared ones.
 6. Local contrast with class-balanced denominators at two levels, in blocks, both networks and all
    images together, labelled slices alone for the first 7.5 % of the steps [base]. Blocks of 12 x
    12 pixels of which every second row and column counts, 6 random ones a step, one place in all
    images; projectors of one layer [ours]; [base]: 19 x 19, all, of different places; two layers,
    the last shared. At the coarse level 4 blocks of 6 x 6 cells of 8 x 8 pixels [ours]; a known
    fault: the labels there are those of a cell's corner, 3.5 pixels off its middle. We do not copy
    the base's defects: features and labels in different orders, a row of blocks too few, the U-Net
    left in eval mode.
 7. Labelled and unlabelled slices have forward passes of their own [ours]; [base]: one batch. See
    pix2rep.py, no. 12.
 8. Each network sees a labelled slice with intensities of its own; unlabelled ones keep theirs, for
    there the networks' answers are labels, and those of slices as they are were better [ours].
 9. U-Net 16 to 256 channels, the result; Swin-UNet with patches of 4 x 4 [base]; three stages of 48
    to 192 channels, window 6, a 3 x 3 convolution in every block, from scratch [ours]; [base]:
    Swin-T, four stages from 96 channels, window 7, ImageNet weights, which we do not have.
10. AdamW, weight decay 5e-4, 40 000 steps of 2 + 2 slices at 224 x 224 [base]; weight decay 1e-4,
    1200 steps of 2 + 2 at 96 x 96, cosine [ours]. The baseline has the same steps with 8 labelled
    slices, as many as the two networks see together, and is that of the other scripts. The U-Net of
    CCT-R sees 2 of them a step and is far from done after 1200; `--steps 4800` helps both.
11. Warped labels are used for unlabelled training volumes only. The true labels of these are read
    in one place, for Fig. 4 and to judge the registration (`--no-peek` forbids it). Test patients
    choose nothing; the last checkpoint is scored [ours]. With one case [base] uses 23 slices of
    patient 099, we all 32. The paper's second set, an abdominal one (Synapse), was not run.

Letters: B slices drawn at once, a quarter of --batch (2B: labelled and unlabelled ones joined), C
channels, K classes, S network size, V slices of a volume, Z, Y, X and z, y, x voxels of a box and
its control points, d features of a pixel, n pixels of a group or anchors, G groups, M features in
the bank, N slices of a dataset, t of T steps.
"""
import hashlib
import json
import math
import time
from functools import lru_cache
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
REGISTRATION_VERSION = 4

# ---------------------------------------------------------------------------------------- options

# name, on real data, on the phantom (None: the same), in the base (None: not known), what it is
OPTIONS = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients"),
    ("seeds", [0, 1, 2], [0], None, "seeds of training"),
    ("width", 16, None, None, "channels of the first U-Net level (base: 16)"),
    ("swin_dim", 48, None, 96, "channels of the Swin-UNet's first stage, divisible by 6"),
    ("window", 6, None, 7, "tokens along a window's side"),
    ("spacing", None, 2.5, None, "mm a pixel in plane; 2 on ACDC"),
    ("size", None, 64, 224, "S, crop in pixels, divisible by 16; 96 on ACDC"),
    ("stiffness", .3, None, None, "of registration: weight of the velocity's mean square gradient"),
    ("no_brs", False, None, None, "ablation: partners in turn, not by cycle consistency"),
    ("steps", 1200, 240, 40000, "T, steps of training, also from scratch"),
    ("batch", 8, None, 8, "slices a step: for each network a quarter labelled and a quarter not; "
     "from scratch all labelled (base: 2 + 2 a network)"),
    ("lr", 2e-3, None, 5e-4, "of the U-Net and of scratch, AdamW, cosine to 0 (base: poly 0.9)"),
    ("swin_lr", 5e-4, None, 1e-4, "of the Swin-UNet, after 5 % warm-up"),
    ("pretrained_lr", 1e-3, None, None, "of a U-Net that starts from --init (ours)"),
    ("rotation", .5, None, None, "largest rotation in rad"),
    ("no_cross_teaching", False, None, None, "ablation"),
    ("no_contrast", False, None, None, "ablation"),
    ("no_rsl", False, None, None, "ablation: no warped labels"),
    ("no_reps", False, None, None, "ablation: no positives from registration"),
    ("cross_weight", .1, None, None, "of cross teaching, after its ramp (base: 0.1)"),
    ("rsl_weight", 1., None, None, "omega_0 of RSL, at the first step"),
    ("contrast_weight", .002, None, None, "of the local contrast (base: 0.001 a network)"),
    ("reps_weight", .01, None, None, "of REPS"),
    ("temperature", .1, None, None, "tau (base: 0.1)"),
    ("projection", 64, None, 128, "d, width of the projectors"),
    ("block", 12, None, 19, "side in pixels of a local block (base: 19 of 224)"),
    ("groups", 6, None, 144, "blocks of the full map a step (base: all)"),
    ("bank", 4096, None, None, "M, features of the memory bank"),
    ("anchors", 256, None, None, "anchors of REPS a step"),
    ("positives", 4, None, None, "positives of an anchor at most"),
    ("radius", 8., None, None, "mm, how near a positive's place must be"),
    ("no_peek", False, None, None, "never read labels of unlabelled volumes, not even for Fig. 4"),
    ("peek_every", 100, 20, None, "steps between points of Fig. 4"),
]
PAPER_ALSO = ("ImageNet weights and a fourth stage in the Swin-UNet, projectors of two layers, "
              "poly decay, weight decay 5e-4, and a pixel that we do not know (--spacing)")


def check(run):
    """Refuse impossible options. Raises DataError."""
    o = run.o
    most = len(run.split["train"])
    if "labelled" not in o.given:                                  # not typed: fewer, no refusal
        o.labelled = [n for n in o.labelled if n < most] or [1]
    common.refuse([
        (o.batch < 8 or o.batch % 4,
         f"--batch {o.batch}: each network sees a quarter labelled, a quarter not; use 8, 12, ..."),
        (o.swin_dim < 6 or o.swin_dim % 6,
         f"--swin-dim {o.swin_dim}: use a multiple of 6, for its three heads and two halves"),
        (o.window < 2, f"--window {o.window}: use 2 or more"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (o.block < 4 or o.block // 2 > o.size // 8,
         f"--block {o.block}: use 4 to {o.size // 4 + 1}, for a coarse map of {o.size // 8}"),
        (o.stiffness < 0 or o.radius <= 0, "--stiffness must be 0 or more, --radius above 0"),
        (min(o.peek_every, o.groups, o.anchors, o.positives, o.projection) < 1,
         "--peek-every, --groups, --anchors, --positives and --projection must be 1 or more"),
        (o.bank < o.anchors, f"--bank {o.bank}: use --anchors, {o.anchors}, or more"),
        (max(o.labelled) >= most,
         f"--labelled {max(o.labelled)}: leaves no training patient without label; use fewer"),
    ])


def row_name(o):
    """The name of the trained rows: cct_r, and what is switched off."""
    parts = ("no_cross_teaching", "no_contrast", "no_rsl", "no_reps", "no_brs")
    return "-".join([METHOD] + [part for part in parts if getattr(o, part)])


# ----------------------------------------------------------------------------------------- losses


def segmentation_loss(logits, label):
    """0.5 (cross-entropy + soft Dice) [base], Dice as in no. 5.

    logits [B, K, h, w], label [B, h, w]. Returns a scalar.
    """
    return .5 * (F.cross_entropy(logits, label) + common.dice_loss(logits, label))


def cross_teaching_loss(logits_1, logits_2):
    """Dice(p1, argmax p2) + Dice(p2, argmax p1) [base], Dice as in no. 5; logits [B, K, h, w]."""
    first = common.dice_loss(logits_1, logits_2.argmax(1))
    second = common.dice_loss(logits_2, logits_1.argmax(1))
    return first + second


def ramp_up(t, T):
    """exp(-5 (1 - min(t / T, 1))^2), from 0.007 at t = 0 to 1 at T [base]."""
    return math.exp(-5 * (1 - min(t / T, 1)) ** 2)


def decay(t, T):
    """exp(-5 (t / T)^2), from 1 at t = 0 to 0.007 at T: the registration is best early (ours)."""
    return math.exp(-5 * (t / T) ** 2)


def balanced_contrastive_loss(z, y, temperature):
    """Class-balanced supervised contrast in a group [base]: pixels of one class attract.

        L_i = - 1/|P(i)| sum_{p in P(i)} [ z_i.z_p/tau - log sum_{a != i} exp(z_i.z_a/tau) / w_ia ]
        w_ia = N_{y_a}, the number of pixels of a's class, without i itself if it is of that class

    All others repel, and by w the background, which is most of them, does not drown the rest. z
    [n, d] before normalisation, y [n] whole numbers; or G groups at once, [G, n, d] and [G, n].
    Returns a scalar, the mean over the anchors that have a positive; 0 without any.
    """
    # The plain double loop, of which the lines below are the matrix form:
    #   for i in range(n):
    #       P = [p for p in range(n) if p != i and y[p] == y[i]]
    #       total = sum(exp(z[i] @ z[a] / tau) / w[i, a] for a in range(n) if a != i)
    #       L[i] = log(total) - sum(z[i] @ z[p] / tau for p in P) / len(P)
    z = F.normalize(z.float(), dim=-1)                             # [..., n, d]
    Y = F.one_hot(y.long()).float()                                # [..., n, K]
    N = Y.sum(-2, keepdim=True)                                    # [..., 1, K]: N_c
    w = (N - Y).clamp(min=1)                                       # [..., n, K]: w_ia, by a's class
    count = (Y * (N - Y)).sum(-1)                                  # [..., n]: |P(i)|
    others = 1 - torch.eye(z.shape[-2], device=z.device)           # [n, n]: a != i
    with torch.autocast(z.device.type, enabled=False):             # float32 also under autocast
        sim = z @ z.mT / temperature                               # [..., n, n], at most 1 / tau
        E = (sim - 1 / temperature).exp() * others                 # so this cannot overflow
        # w_ia depends on the classes of i and a alone: sum over each class, then divide by its w
        total = (E @ Y / w).sum(-1)                                # [..., n]
        log_total = total.clamp(min=1e-30).log() + 1 / temperature
        # sum_{p in P(i)} z_i.z_p = z_i . (sum of its class) - z_i.z_i
        own_class = Y @ (Y.mT @ z)                                 # [..., n, d]
        positive = ((z * own_class).sum(-1) - 1) / temperature     # [..., n]
    has = count > 0
    L = (log_total - positive / count.clamp(min=1)) * has          # [..., n]
    return L.sum() / has.sum().clamp(min=1)


def cut(x, size, offset=(0, 0)):
    """Local blocks of maps: [B, C, H, W] -> [G, B size^2, C], the same block of all images in one.

    G = (H / size) (W / size); offset: rows and columns left out at the top and left where `size`
    does not divide H, W. Labels go through here as well, as [B, 1, H, W], so that features and
    labels are in the same order by construction.
    """
    B, C, H, W = x.shape
    h, w = H // size, W // size
    top, left = offset
    x = x[:, :, top:top + h * size, left:left + w * size]
    x = x.reshape(B, C, h, size, w, size)
    x = x.permute(2, 4, 0, 3, 5, 1)                                # [h, w, B, size, size, C]
    return x.reshape(h * w, B * size * size, C)                    # [G, B size^2, C]


def local_contrast(maps, labels, size, groups, temperature):
    """Contrast in up to `groups` random local blocks, over all images and both networks.

    maps: projected features of each network [B, d, h, w]; labels: for each network the classes
    [B, h, w] of its pixels. Groups of background alone are skipped. Returns a scalar.
    """
    H, W = maps[0].shape[2:]
    # rows and columns to leave out at the top and left: 0 to what `size` leaves over
    offset = [int(torch.randint(side % size + 1, ())) for side in (H, W)]
    z = torch.cat([cut(m, size, offset) for m in maps], 1)         # [G, n, d]
    y = torch.cat([cut(c[:, None], size, offset) for c in labels], 1)[..., 0]        # [G, n]
    some = torch.nonzero((y > 0).any(1))[:, 0]                     # groups with an organ
    some = some[torch.randperm(len(some))[:groups]]
    if not len(some):
        return z.sum() * 0
    return balanced_contrastive_loss(z[some], y[some], temperature)


class MemoryBank(nn.Module):
    """The last `size` pixel features of one network, each with its common place (mm) and volume.

    The oldest are overwritten. A module, so that its state is saved as that of networks is.
    """
    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("z", torch.zeros(size, dim))
        self.register_buffer("place", torch.full((size, 3), 1e6))  # empty: 1 km from all places
        self.register_buffer("volume", torch.full((size,), -1))    # -1: empty
        self.register_buffer("next", torch.tensor(0))

    def push(self, z, place, volume):
        """Add features z [n, d] (unit length, detached) at places [n, 3] of volumes [n]."""
        index = torch.arange(len(z), device=self.z.device) + self.next
        index = index % len(self.z)                                # [n]
        self.z[index] = z
        self.place[index] = place
        self.volume[index] = volume
        self.next.copy_((self.next + len(z)) % len(self.z))

    def nearest(self, place, volume, radius, k):
        """The k entries of *other* volumes nearest to each place [n, 3].

        Returns (indices [n, k], whether within `radius` mm [n, k]).
        """
        own = volume[:, None] == self.volume                       # [n, M]
        away = torch.cdist(place, self.place)                      # [n, M] in mm
        away = away.masked_fill(own, torch.inf)
        distance, index = away.topk(min(k, away.shape[1]), 1, largest=False)
        return index, distance <= radius


def reps_loss(z, place, volume, bank, radius, k, temperature):
    """REPS: positives are the bank's features of other volumes at the nearest common places.

        L_i = - 1/|R(i)| sum_{p in R(i)} log( exp(z_i.z_p/tau) / sum_{a in bank} exp(z_i.z_a/tau) )

    whatever any network predicts. z [n, d] before normalisation, place [n, 3] in mm, volume [n].
    Returns a scalar, the mean over the anchors that have a positive; 0 without any.
    """
    z = F.normalize(z.float(), dim=1)
    R, near = bank.nearest(place, volume, radius, k)               # [n, k] each: R(i), if near
    if not near.any():
        return z.sum() * 0
    with torch.autocast(z.device.type, enabled=False):
        sim = z @ bank.z.clone().T / temperature                   # [n, M]; `push` will change z
    filled = sim.masked_fill(bank.volume < 0, -torch.inf)
    log_prob = sim - filled.logsumexp(1, keepdim=True)             # [n, M]
    count = near.sum(1)                                            # [n]: |R(i)|
    L = -(log_prob.gather(1, R) * near).sum(1) / count.clamp(min=1)
    return L.sum() / (count > 0).sum()


# --------------------------------------------------------------------------------------- training


class Maps(NamedTuple):
    """What the two networks make of a batch: lists of two, the U-Net's and the Swin-UNet's."""
    logits: list                                                   # [B, K, S, S]
    coarse: list                                                   # [B, d, S/8, S/8], projected
    full: list                                                     # [B, d, S/2, S/2]: every second


class Students(nn.Module):
    """The U-Net and the Swin-UNet, and for the contrast a projector for two levels of each."""
    def __init__(self, run):
        super().__init__()
        o = run.o
        self.unet = run.unet()
        self.swin = SwinUNet(run.channels, len(run.classes), o.swin_dim, o.window)
        self.projectors = nn.ModuleDict({
            "unet_coarse": nn.Conv2d(8 * o.width, o.projection, 1),
            "unet_full": nn.Conv2d(o.width, o.projection, 1),
            "swin_coarse": nn.Conv2d(2 * o.swin_dim, o.projection, 1),
            "swin_full": nn.Conv2d(o.swin_dim // 2, o.projection, 1)})

    def forward(self, views):
        """Each network on its view [B, C, S, S]: `Maps`."""
        encoded = self.unet.encoder(views[0])
        unet_coarse = self.unet.decoder(encoded, 1)                # [B, 8 width, S/8, S/8]
        unet_full = self.unet.decoder(encoded)                     # [B, width, S, S]
        swin_coarse, swin_full = self.swin.maps(views[1])          # the same sizes
        logits = [self.unet.head(unet_full).float(), self.swin.head(swin_full).float()]
        to = self.projectors
        coarse = [to["unet_coarse"](unet_coarse), to["swin_coarse"](swin_coarse)]
        # of the full map every second pixel, a sixteenth of the pairs to compare
        full = [to["unet_full"](unet_full[..., ::2, ::2]),
                to["swin_full"](swin_full[..., ::2, ::2])]
        return Maps(logits, coarse, full)


class Batch(NamedTuple):
    """Slices for a step."""
    views: list                                                    # for each network [B, C, S, S]
    label: torch.Tensor                                            # [B, S, S], true or warped
    place: torch.Tensor                                            # [B, S, S, 3] mm, nan: none
    volume: torch.Tensor                                           # [B]


def draw_batch(run, numbers, places, warped=None):
    """A `Batch` of --batch / 4 random slices of `numbers`, moved at random.

    places: common places [N, 3, S, S]; warped: pseudo-labels [N, S, S] of unlabelled slices.
    Without, slices have their true labels, and for each network intensities of its own.
    """
    o, dataset = run.o, run.dataset
    pick = common.random_slices(numbers, o.batch // 4)             # [B]
    grid = spatial_grid(len(pick), o.size, o.rotation, run.device)         # [B, S, S, 2]
    x = warp(dataset.image(pick, run.device), grid)                # [B, C, S, S]
    place = places[pick].to(run.device).float()                    # [B, 3, S, S]
    place = F.grid_sample(place, grid, "nearest", align_corners=False)
    # outside the image grid_sample gives 0, which is a place
    outside = (grid.abs() > 1).any(-1, keepdim=True)               # [B, S, S, 1]
    place = place.movedim(1, -1).masked_fill(outside, torch.nan)   # [B, S, S, 3]
    if warped is None:
        label = dataset.label(pick, run.device)
        views = [photometric(x), photometric(x)]
    else:
        label = warped[pick].to(run.device).long()
        views = [x, x]                                             # see no. 8
    views = [common.channels_last(v) for v in views]
    volume = torch.from_numpy(dataset.volume[pick]).to(run.device)
    return Batch(views, warp(label, grid, "nearest"), place, volume)


def joined(first, second):
    """Labelled and unlabelled slices in one batch, for each network: two lists of two -> one."""
    return [torch.cat([a, b]) for a, b in zip(first, second)]


def contrast_terms(o, label, seen, seen_u=None):
    """The local contrast at both levels: a scalar.

    label [B, S, S] and `Maps` of labelled slices, `Maps` of unlabelled ones or None. The class of
    an unlabelled pixel is what the other network says.
    """
    coarse, full = seen.coarse, seen.full
    labels = [label, label]
    if seen_u:
        others = [seen_u.logits[1].argmax(1), seen_u.logits[0].argmax(1)]
        coarse = joined(coarse, seen_u.coarse)
        full = joined(full, seen_u.full)
        labels = joined(labels, others)
    # a known fault: "nearest" takes a corner of each cell of 8 x 8, 3.5 pixels off its middle
    side = coarse[0].shape[2:]
    small = [F.interpolate(y[:, None].float(), side)[:, 0].long() for y in labels]   # [B, S/8, S/8]
    half = [y[:, ::2, ::2] for y in labels]                        # [B, S/2, S/2]
    # coarse: 4 blocks of block / 2 cells, a cell is 8 x 8 pixels (ours)
    at_coarse = local_contrast(coarse, small, o.block // 2, 4, o.temperature)
    at_full = local_contrast(full, half, o.block // 2, o.groups, o.temperature)
    return at_coarse + at_full


def reps_terms(o, banks, full, place, volume):
    """REPS of both networks at random pixels that have a common place; fills the banks. A scalar.

    full: of each network [B, d, S/2, S/2]; place [B, S, S, 3] in mm; volume [B].
    """
    place = place[:, ::2, ::2]                                     # [B, S/2, S/2, 3]
    known = torch.nonzero(place.isfinite().all(-1))                # [pixels, 3]: image, row, column
    few = torch.randperm(len(known))[:o.anchors].to(known.device)
    b, r, c = known[few].T                                         # [n] each
    where, who = place[b, r, c], volume[b]                         # [n, 3], [n]
    L = 0.
    for features, bank in zip(full, banks):
        z = features[b, :, r, c]                                   # [n, d]
        L = L + reps_loss(z, where, who, bank, o.radius, o.positives, o.temperature)
        bank.push(F.normalize(z.detach().float(), dim=1), where, who)
    return L


def start_training(run, seed):
    """The `Students`, their U-Net from --init if given, and AdamW with two groups."""
    o = run.o
    torch.manual_seed(seed)
    students = run.place(Students(run))
    if run.start:
        common.load_weights(students.unet, run.start["unet"], run.start["parts"])
    peak = o.pretrained_lr if run.start else o.lr
    rest = [*students.swin.parameters(), *students.projectors.parameters()]
    groups = [{"params": students.unet.parameters(), "peak": peak, "warm_up": 0},
              {"params": rest, "peak": o.swin_lr, "warm_up": .05 * o.steps}]
    return students, torch.optim.AdamW(groups, weight_decay=1e-4)


def train(run, row, registered):
    """Train both networks on a row's labelled slices and on those of all other training patients.

    registered: the `Registered` of this number of patients. Returns the `Students`.
    """
    o, dataset, T = run.o, run.dataset, run.o.steps
    patients = run.patients(row.labelled)
    own = dataset.of_patients(patients, labelled=True)
    others = dataset.of_patients(set(run.split["train"]) - set(patients))
    students, optimiser = start_training(run, row.seed)
    banks = nn.ModuleList([MemoryBank(o.bank, o.projection), MemoryBank(o.bank, o.projection)])
    banks.to(run.device)
    for step in run.steps(row.name, T, (students, banks), optimiser):
        for group in optimiser.param_groups:
            warm = min(1, (step + 1) / (group["warm_up"] + 1))
            group["lr"] = group["peak"] * warm * cosine(step, T)
        labelled = draw_batch(run, own, registered.places)
        unlabelled = draw_batch(run, others, registered.places, registered.warped)
        with run.autocast():
            seen = students(labelled.views)
            seen_u = students(unlabelled.views)                    # by themselves: see no. 7
        L_sup = sum(segmentation_loss(logits, labelled.label) for logits in seen.logits)
        L_CT = L_RSL = L_contrast = L_REPS = 0.
        if not o.no_cross_teaching:
            L_CT = cross_teaching_loss(*seen_u.logits)
        # L_RSL = sum over both networks of 0.5 (CE + Dice)(p_u, y~_u), where y~_u = T(y_l*) is a
        # warped label, never the true one    (RSL) [ours]
        if not o.no_rsl:
            L_RSL = sum(segmentation_loss(logits, unlabelled.label) for logits in seen_u.logits)
        if not o.no_contrast:
            later = seen_u if step >= .075 * T else None           # labelled slices alone at first
            L_contrast = contrast_terms(o, labelled.label, seen, later)
        if not o.no_reps:
            place = torch.cat([labelled.place, unlabelled.place])
            volume = torch.cat([labelled.volume, unlabelled.volume])
            L_REPS = reps_terms(o, banks, joined(seen.full, seen_u.full), place, volume)
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
    return students


def finetune(run, row):
    """The supervised baseline, as in the other scripts: the U-Net alone on the labelled slices."""
    o = run.o
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    unet = run.place(run.unet())
    optimiser = torch.optim.AdamW(unet.parameters(), weight_decay=1e-4)
    for step in run.steps(row.name, o.steps, (unet,), optimiser):
        optimiser.param_groups[0]["lr"] = o.lr * cosine(step, o.steps)
        image, label = common.labelled_batch(run, numbers, o.batch)        # [B, C, S, S], [B, S, S]
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
    seen = students([common.channels_last(x), x])
    students.train()
    unet, swin = (logits.argmax(1).cpu().numpy() for logits in seen.logits)
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
    kinds = {"dice_before": {"A": torch.eye(3, 4), "back": still},
             "dice_affine": {"A": pair["A"], "back": still},
             "dice_after": pair}
    found = {}
    for name, kind in kinds.items():
        label = registered.frames[n].warp_label(kind, volume)
        found[name] = mean_dice(run, label.numpy(), truth)
    return found


# ----------------------------------------------------------------- registration: places and values

# From here on everything is in mm. A volume is a stack of prepared slices with voxels of (slice,
# row, column) mm, and a place is (z, y, x) in mm about the volume's centre, so that volumes of any
# size and spacing share one kind of coordinate.


def points(shape, step, centre=0.):
    """The places of the voxels of a grid, [Z, Y, X, 3] in mm; shape in voxels, the rest in mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, step)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) + centre


def half_size(shape, step):
    """Half the size of a grid in mm, [3]."""
    return torch.tensor([n * mm / 2 for n, mm in zip(shape, step)])


def sample(x, p, step, mode="bilinear", padding="zeros"):
    """Values [B, C, ...] of x [B, C, Z, Y, X], voxels of `step` mm, at the places p [B, ..., 3]."""
    grid = (p / half_size(x.shape[2:], step)).flip(-1)             # x, y, z in [-1, 1]
    grid = grid.flatten(1, -2)[:, None, None]                      # [B, 1, 1, n, 3]
    values = F.grid_sample(x, grid, mode, padding, align_corners=False)    # [B, C, 1, 1, n]
    return values[:, :, 0, 0].unflatten(-1, p.shape[1:-1])         # [B, C, ...]


def inside(p, shape, step):
    """1 where a place lies inside a volume, else 0: p [B, ..., 3] -> [B, 1, ...]."""
    return (p.abs() <= half_size(shape, step)).all(-1)[:, None].float()


def move(A, p):
    """x -> A x + b for affine maps [A | b] [B, 3, 4] at the places p [(B,) Z, Y, X, 3]."""
    p = p.expand(len(A), *p.shape[-4:])                            # [B, Z, Y, X, 3]
    moved = p.flatten(1, -2) @ A[:, :, :3].mT + A[:, None, :, 3]   # [B, n, 3]
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
    a_, b_, aa, bb, ab = box_mean(products, radius).split(1, 1)
    cov = ab - a_ * b_
    var_a = (aa - a_ * a_).clamp(min=0)
    var_b = (bb - b_ * b_).clamp(min=0)
    weight = weight * var_a / (var_a + flat)
    cc = cov * cov.abs() / (var_a * var_b + 1e-8)
    total = weight.flatten(1).sum(1).clamp(min=1e-3)               # [B]
    return (cc * weight).flatten(1).sum(1) / total


# --------------------------------------------------------------- registration: affine, then smooth


def after_another(A, B):
    """The affine map x -> A(B(x)) of two [B, 3, 4]."""
    M = A[:, :, :3]
    return torch.cat([M @ B[:, :, :3], M @ B[:, :, 3:] + A[:, :, 3:]], 2)


def inverse(A):
    """The inverse of affine maps [B, 3, 4]."""
    M = torch.linalg.inv(A[:, :, :3])
    return torch.cat([M, -M @ A[:, :, 3:]], 2)


def affine_starts(reach, turn):
    """225 affine maps [225, 3, 4]: turns about z in rad, shifts of up to `reach` [3] mm."""
    shifts = [torch.linspace(-1, 1, n) * r for n, r in zip((3, 5, 5), reach)]
    turns = torch.tensor([-turn, 0., turn])
    angle, dz, dy, dx = torch.cartesian_prod(turns, *shifts).T     # [225] each
    cos, sin = angle.cos(), angle.sin()
    zero = torch.zeros(len(angle))
    rows = [zero + 1, zero, zero, dz,
            zero, cos, -sin, dy,
            zero, sin, cos, dx]
    return torch.stack(rows, 1).view(-1, 3, 4)


def register_affine(fixed, weight, p, moving, step, steps=40, keep=4, turn=.5):
    """Affine maps [A | b] (mm) such that `moving` at A x + b looks like `fixed` at x.

    fixed, weight [B, 1, Z, Y, X] on the places p [Z, Y, X, 3]; moving [B, 2, ...]: image and mask
    of its scan, voxels of `step` mm; either may be one for all. From 225 starts (turns about z,
    shifts of up to a sixth of the box) the best `keep` of every volume are refined by Adam. Returns
    ([B, 3, 4], their similarity [B]).
    """
    B = max(len(fixed), len(moving))
    fixed, weight, moving = (x.expand(B, *x.shape[1:]) for x in (fixed, weight, moving))

    def similarity(A, number):                                     # [b, 3, 4], [b] -> [b]
        m, w = sample(moving[number], move(A, p), step).split(1, 1)        # [b, 1, Z, Y, X] each
        return local_correlation(fixed[number], m, weight[number] * w)

    reach = (p.amax((0, 1, 2)) - p.amin((0, 1, 2))) / 6            # [3] mm
    A = affine_starts(reach, turn)                                 # [225, 3, 4]
    every = torch.arange(B)
    with torch.no_grad():
        found = [similarity(a.expand(B, 3, 4), every) for a in A]
    best = torch.stack(found).topk(keep, 0).indices                # [keep, B]: numbers of starts
    A = A[best.flatten()]                                          # [keep B, 3, 4]
    number = every.repeat(keep)                                    # [keep B]: whose they are
    M = torch.zeros(len(A), 3, 3, requires_grad=True)
    t = torch.zeros(len(A), 3, 1, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": M, "peak": .02}, {"params": t, "peak": step[1] / 4}])
    for n in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(n, steps)
        turned = A[:, :, :3] @ (torch.eye(3) + M)
        now = torch.cat([turned, A[:, :, 3:] + t], 2)              # [keep B, 3, 4]
        s = similarity(now, number)                                # [keep B]
        optimiser.zero_grad()
        (.3 * M.square().sum() - s.sum()).backward()
        optimiser.step()
    s = s.detach()
    choice = s.view(keep, B).argmax(0) * B + every                 # [B]
    return now.detach()[choice], s[choice]


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
    return points(counts, [s / n for s, n in zip(size, counts)])


def roughness(v, mm):
    """Mean square gradient [B] of a velocity v [B, 3, z, y, x] with control points `mm` apart."""
    total = 0.
    for axis in (0, 1, 2):
        gradient = v.diff(dim=2 + axis) / mm[axis]
        total = total + gradient.square().mean((1, 2, 3, 4))
    return total


def register_deformable(fixed, moving, weight, step, levels=((9, 2), (15, 1)), steps=40,
                        stiffness=.3):
    """Smooth displacements u (mm) such that `moving` at x + u(x) looks like `fixed` at x.

    fixed, moving, weight [B, 1, Z, Y, X] on one grid with voxels of `step` mm. Coarse to fine:
    `levels` are the numbers of control points along the longest side, between which u is trilinear,
    and the factor by which the images are made smaller in plane. `stiffness` weighs the mean square
    of the velocity's gradient. Returns u at the control points, [B, 3, z, y, x].
    """
    whole = fixed.shape[2:]
    size = [n * mm for n, mm in zip(whole, step)]
    v = torch.zeros(len(fixed), 3, 3, 3, 3)
    for across, smaller in levels:
        places = control_points(whole, step, across)               # [z, y, x, 3]
        apart = [s / n for s, n in zip(size, places.shape)]        # mm between control points
        shape = [whole[0], math.ceil(whole[1] / smaller), math.ceil(whole[2] / smaller)]
        voxel = [s / n for s, n in zip(size, shape)]               # mm, on this level
        f, m, w = (F.interpolate(x, shape, mode="area") for x in (fixed, moving, weight))
        p = points(shape, voxel)                                   # [Z, Y/smaller, X/smaller, 3]
        both = torch.cat([m, w], 1)                                # [B, 2, Z, ...]
        v = resize(v, places.shape[:3]).requires_grad_()           # [B, 3, z, y, x]
        optimiser = torch.optim.Adam([v])
        for n in range(steps):
            optimiser.param_groups[0]["lr"] = voxel[1] / 5 * cosine(n, steps)
            u = resize(exponential(v, places), shape)              # [B, 3, Z, ...]
            m, w = sample(both, displaced(p, u), voxel).split(1, 1)
            loss = stiffness * roughness(v, apart) - local_correlation(f, m, w)      # [B]
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


def folded(u, shape, step):
    """Share of voxels [B] that x -> x + u(x) folds; arguments as those of `jacobian`."""
    return (jacobian(u, shape, step) <= 0).float().mean((1, 2, 3))


def cycle_error(there, back, p, step):
    """|| T_back(T_there(x)) - x || in mm at the places p [Z, Y, X, 3]; 0: they undo each other.

    there, back [B, 3, Z, Y, X]: displacements on a grid with voxels of `step` mm about the centre
    of p's volume; of the affine map nothing is left, as A and its inverse cancel. Returns
    [B, Z, Y, X].
    """
    every = p.expand(len(there), *p.shape)                         # [B, Z, Y, X, 3]
    x = displaced(p, sample(there, every, step, padding="border"))
    x = displaced(x, sample(back, x, step, padding="border"))
    return (x - p).norm(dim=-1)


# -------------------------------------------------------------- registration: of a whole dataset


class Stack:
    """Volume n of a dataset: numbers of its slices, shape (V, S, S), voxels of `step` mm."""
    def __init__(self, dataset, n):
        mm = dataset.info["target"]
        self.numbers = np.flatnonzero(dataset.volume == n)         # [V]
        self.shape = (len(self.numbers), *dataset.images.shape[2:])
        self.step = (dataset.info["cases"][n]["spacing"][0], mm, mm)

    def points(self):
        """The places of its voxels, [V, S, S, 3]."""
        return points(self.shape, self.step)


def registration_grid(dataset):
    """Shape and voxels (mm) of the grid of all volumes: twice the pixel, 2/3 of a thick slice."""
    thick = [c["spacing"][0] for c in dataset.info["cases"]]
    deep = max(c["spacing"][0] * c["shape"][0] for c in dataset.info["cases"])
    pixel = 2 * dataset.info["target"]
    side = dataset.info["size"] // 2
    step = (max(float(np.median(thick)) / 1.5, pixel), pixel, pixel)
    return (math.ceil(deep / step[0]), side, side), step


def on_grid(dataset, n, p):
    """Volume n (the mean of its channels) and the mask of its scan at the places p [Z, Y, X, 3].

    Returns [1, 2, Z, Y, X].
    """
    volume = Stack(dataset, n)
    image = dataset.image(volume.numbers).mean(1)[None, None]      # [1, 1, V, S, S]
    half = F.avg_pool3d(image, (1, 2, 2))                          # [1, 1, V, S/2, S/2]
    thick, mm, _ = volume.step
    mask = inside(p[None], volume.shape, volume.step)              # [1, 1, Z, Y, X]
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

    The box is wider than the label by a fifth each way. box: on the voxels of registration; wide:
    on larger ones; label: one-hot [1, K, V, S, S]; organs [Z, Y, X]: 1 in the organs of `box`;
    whole [1, 2, Z, Y, X]: image and mask of all of the volume, to be moved itself.
    """
    def __init__(self, run, n):
        dataset = run.dataset
        self.volume = Stack(dataset, n)
        label = dataset.label(self.volume.numbers)                 # [V, S, S]
        one_hot = F.one_hot(label, len(run.classes)).float()       # [V, S, S, K]
        self.label = one_hot.movedim(-1, 0)[None]                  # [1, K, V, S, S]
        organs = self.volume.points()[label > 0]                   # [n, 3]
        if not len(organs):
            name = dataset.info["cases"][n]["name"]
            raise DataError(f"{name}: no labelled voxel lies in the crop; use a larger --size, or "
                            "leave this case out")
        lo, hi = organs.amin(0), organs.amax(0)
        self.centre = (lo + hi) / 2
        size = ((hi - lo) * 1.4).tolist()

        def box(step):
            counts = [max(4, math.ceil(s / mm)) for s, mm in zip(size, step)]
            p = points(counts, step, self.centre)
            return Box(p, step, *on_grid(dataset, n, p).split(1, 1))

        shape, step = registration_grid(dataset)
        self.box = box(step)
        self.wide = box([max(s, 2 * step[1]) for s in step])
        background = self.label[:, :1]
        self.organs = sample(1 - background, self.box.p[None], self.volume.step)[0, 0]
        self.whole = on_grid(dataset, n, points(shape, step))

    def places(self, pair, y):
        """T_back(y): the places y [..., 3] of another volume in this one; nan outside the box."""
        A, back, box = pair["A"], pair["back"], self.box
        x = (y - A[:, 3]) @ torch.linalg.inv(A[:, :3]).T           # x' = A^-1 y
        x = (x - self.centre)[None]                                # [1, ..., 3], about the centre
        apart = [n * mm / k for n, mm, k in zip(box.p.shape, box.step, back.shape[1:])]
        d = sample(back[None], x, apart, padding="border")         # [1, 3, ...]
        there = displaced(x, d) + self.centre
        outside = inside(x, box.p.shape[:3], box.step)[0, 0] == 0  # [...]
        return torch.where(outside[..., None], torch.nan, there[0])

    def warp_label(self, pair, volume):
        """This volume's label on the voxels of the other, a `Stack`: [V, S, S], background outside.

        Pulled: a voxel y of the other takes the label at T_back(y), so that labels go from here to
        there by the map from there to here. One-hot, linearly, then arg max.
        """
        x = self.places(pair, volume.points()).nan_to_num(1e6)     # [V, S, S, 3]
        there = sample(self.label, x[None], self.volume.step)[0]   # [K, V, S, S]
        there[0] += 1e-3                                           # where all are 0
        return there.argmax(0)


def register_batch(frame, moving, step, stiffness):
    """Register volumes to a frame, and the frame's volume to them: a list of B pairs.

        T_there: frame -> volume,  x -> A (x + there(x))
        T_back:  volume -> frame,  y -> x' + back(x'),  x' = A^-1 y

    The two displacements are found independently; both are over the frame's box, in mm. moving
    [B, 2, Z, Y, X]: image and mask, voxels of `step` mm. A pair is a dict: A [3, 4]; there, back
    [3, z, y, x] at control points; similarity `before`, after A (`affine`) and `after` all; `cycle`
    error in mm (mean over the frame's organs); share of voxels that T_back has `folded`.
    """
    box, wide = frame.box, frame.wide
    p = box.p - frame.centre                                       # [Z, Y, X, 3]
    shape = p.shape[:3]
    A, _ = register_affine(wide.image, wide.weight, wide.p, moving, step)
    # from the other side: the box that A has found in the volume, registered to the whole volume of
    # the frame, corrects A
    image, weight = sample(moving, move(A, wide.p), step).split(1, 1)
    correction, _ = register_affine(image, weight, wide.p, frame.whole, step)
    A = after_another(A, inverse(correction))
    every = box.p.expand(len(moving), *box.p.shape)                # [B, Z, Y, X, 3]
    m_first, w_first = sample(moving, every, step).split(1, 1)     # [B, 1, Z, Y, X] each
    m, w = sample(moving, move(A, box.p), step).split(1, 1)
    f = box.image.expand_as(m)
    w = box.weight * w                                             # 1 where both are scanned
    there = register_deformable(f, m, w, box.step, stiffness=stiffness)
    back = register_deformable(m, f, w, box.step, stiffness=stiffness)
    with torch.no_grad():
        u = resize(there, shape)                                   # [B, 3, Z, Y, X]
        error = cycle_error(u, resize(back, shape), p, box.step)   # [B, Z, Y, X]
        moved = sample(m, displaced(p, u), box.step)
        found = {"A": A, "there": there, "back": back,
                 "before": local_correlation(f, m_first, box.weight * w_first),
                 "affine": local_correlation(f, m, w),
                 "after": local_correlation(f, moved, w),
                 "folded": folded(back, shape, box.step),
                 "cycle": (error * frame.organs).sum((1, 2, 3)) / frame.organs.sum()}
    return [{k: v[b].clone() for k, v in found.items()} for b in range(len(moving))]


def register_all(run, volumes, labelled):
    """Register every volume to every labelled one: {(volume, labelled): pair}, {labelled: Frame}.

    A batch is one file in the cache, under a key that holds the dataset and the options, so that a
    second run reads, and a killed run goes on. There is nothing random in it.
    """
    o, dataset = run.o, run.dataset
    shape, step = registration_grid(dataset)
    data = Path(dataset.images.filename).parent.name               # the key of the prepared slices
    made_of = json.dumps([REGISTRATION_VERSION, data, volumes, o.stiffness])
    key = hashlib.sha1(made_of.encode()).hexdigest()[:16]
    folder = common.make_folder(Path(o.cache) / f"registration-{key}")
    frames = {n: Frame(run, n) for n in labelled}
    batches = [volumes[b:b + 16] for b in range(0, len(volumes), 16)]
    grid = points(shape, step)                                     # [Z, Y, X, 3]
    pairs = {}
    moving = {}
    for n, batch in tqdm([(n, b) for n in labelled for b in batches], "register", disable=None):
        file = folder / f"{n}-{batch[0]}.pt"
        if not file.exists():
            for u in batch:
                if u not in moving:
                    moving[u] = on_grid(dataset, u, grid)          # [1, 2, Z, Y, X]
            images = torch.cat([moving[u] for u in batch])         # [B, 2, Z, Y, X]
            made = register_batch(frames[n], images, step, o.stiffness)
            common.save_checkpoint(file, method=METHOD, options={}, pairs=made)
        for u, pair in zip(batch, common.load_checkpoint(file, METHOD)["pairs"]):
            pairs[u, n] = pair
    return pairs, frames


class Registered:
    """What registration knows with the first n labelled patients.

    volumes, labelled: numbers of the training volumes, and of those with a label; pairs, frames: of
    `register_all`; warped uint8 [N, S, S]: labels for slices of unlabelled volumes, else 0; places
    float16 [N, 3, S, S]: common places of slices in mm, nan where there is none.
    """
    def __init__(self, run, n):
        patients = run.patients(n)
        patient = [case.patient for case in run.cases]
        self.volumes = [v for v, p in enumerate(patient) if p in run.split["train"]]
        self.labelled = [v for p in patients for v in self.volumes
                         if patient[v] == p and run.cases[v].label]
        self.brs = not run.o.no_brs
        self.pairs, self.frames = register_all(run, self.volumes, self.labelled)
        N, S = len(run.dataset.volume), run.o.size
        self.warped = torch.zeros(N, S, S, dtype=torch.uint8)
        self.places = torch.full((N, 3, S, S), torch.nan, dtype=torch.float16)
        for u in self.volumes:
            self.place_volume(Stack(run.dataset, u), u)

    def partner(self, volume):
        """BRS: the labelled volume l* with the smallest cycle error; never the volume itself.

        With --no-brs partners are taken in turn, whatever their registration is worth.
        """
        def cycle(n):
            return self.pairs[volume, n]["cycle"].item()

        others = [n for n in self.labelled if n != volume]
        return min(others, key=cycle) if self.brs else others[volume % len(others)]

    def place_volume(self, volume, u):
        """Fill in the warped label and the common places of volume number u, a `Stack`.

        A pixel goes to its best partner l*, and from there to the frame of the first labelled
        volume, the common one.
        """
        first = self.labelled[0]
        partner = u
        x = volume.points()                                        # [V, S, S, 3]
        if u not in self.labelled:
            partner = self.partner(u)
            pair = self.pairs[u, partner]
            frame = self.frames[partner]
            x = frame.places(pair, x)
            self.warped[volume.numbers] = frame.warp_label(pair, volume).byte()
        if partner != first:
            x = self.frames[first].places(self.pairs[partner, first], x.nan_to_num(1e6))
        self.places[volume.numbers] = x.movedim(-1, 1).half()      # [V, 3, S, S]


# ---------------------------------------------------------------------------------- the Swin-UNet


def to_windows(x, w):
    """[B, H, W, C] -> [B (H/w)(W/w), w^2, C]."""
    B, H, W, C = x.shape
    x = x.view(B, H // w, w, W // w, w, C).transpose(2, 3)         # [B, H/w, W/w, w, w, C]
    return x.reshape(-1, w * w, C)


def from_windows(x, w, H, W):
    """The inverse of `to_windows`."""
    x = x.view(-1, H // w, W // w, w, w, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, H, W, x.shape[-1])


@lru_cache(maxsize=64)
def attention_mask(H, W, w, shift, real_h, real_w):
    """0 between tokens that may see each other, -inf elsewhere, for an H x W map rolled by -shift.

    After the roll, windows at the border hold tokens from opposite sides of the image, and tokens
    of the padding beyond real_h x real_w: each keeps to its own kind. Returns [windows, w^2, w^2].
    """
    def kinds(n, real):                                            # [n]: +1 rolled, +2 padding
        place = torch.arange(n)
        return (place < shift).long() + 2 * (place >= real).long()

    kind = 4 * kinds(H, real_h)[:, None] + kinds(W, real_w)        # [H, W], before the roll
    kind = kind.roll((-shift, -shift), (0, 1))
    kind = to_windows(kind[None, ..., None], w)[..., 0]            # [windows, w^2]
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
        """x [B w, n, dim], mask [w, n, n] with -inf between regions -> [B w, n, dim]."""
        Bw, n, dim = x.shape
        qkv = self.qkv(x).view(Bw, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # [B w, heads, n, dim / heads]
        bias = self.bias[self.index].movedim(-1, 0)                # [heads, n, n]
        bias = (bias + mask[:, None]).to(q)                        # [w, heads, n, n]
        # softmax(q k' / sqrt(d) + bias) v
        logits = (q * q.shape[-1] ** -.5) @ k.mT                   # [B w, heads, n, n]
        logits = logits.unflatten(0, (-1, len(mask))) + bias       # [B, w, heads, n, n]
        weight = logits.flatten(0, 1).softmax(-1).to(v)            # [B w, heads, n, n]
        x = (weight @ v).transpose(1, 2)                           # [B w, n, heads, dim / heads]
        return self.project(x.reshape(Bw, n, dim))


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
        B, H, W, C = x.shape
        w = self.window
        shift = self.shift if max(H, W) > w else 0                 # one window: nothing to shift
        h_pad, w_pad = H + -H % w, W + -W % w                      # multiples of the window
        x = x + self.place(x.movedim(-1, 1)).movedim(1, -1)        # convolved as [B, C, H, W]
        y = F.pad(self.norm_1(x), (0, 0, 0, w_pad - W, 0, h_pad - H))
        y = to_windows(y.roll((-shift, -shift), (1, 2)), w)        # [windows, w^2, C]
        mask = attention_mask(h_pad, w_pad, w, shift, H, W).to(x.device)
        y = from_windows(self.attention(y, mask), w, h_pad, w_pad)         # [B, h_pad, w_pad, C]
        x = x + y.roll((shift, shift), (1, 2))[:, :H, :W]
        return x + self.mlp(self.norm_2(x))


def stage(dim, depth, window, heads):
    """`depth` blocks, every second one shifted by half a window: [B, H, W, dim]."""
    shifts = [window // 2 * (n % 2) for n in range(depth)]
    return nn.Sequential(*[SwinBlock(dim, window, heads, shift) for shift in shifts])


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]: four neighbours side by side, then linear."""
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = torch.cat(four, -1)                                    # [B, H/2, W/2, 4C]
        return self.reduce(self.norm(x))


class PatchExpanding(nn.Module):
    """[B, H, W, C] -> [B, f H, f W, C_out]: linear, then every token becomes f x f tokens."""
    def __init__(self, dim, out, factor):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor ** 2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x):
        B, H, W, _ = x.shape
        f = self.factor
        x = self.expand(x).view(B, H, W, f, f, -1).transpose(2, 3)         # [B, H, f, W, f, C_out]
        return self.norm(x.reshape(B, f * H, f * W, -1))


class SwinUNet(nn.Module):
    """A U-Net of Swin blocks (Cao et al. 2021; Liu et al. 2021) on patches of 4 x 4.

    Three stages down, two up, skips between them. Any input size: it pads to a multiple of 16
    inside, and every block pads to its window.
    """
    def __init__(self, channels, classes, dim=48, window=6, depths=(2, 2, 2), heads=(3, 6, 12)):
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, 4, 4)
        self.patch_norm = nn.LayerNorm(dim)
        self.down_1 = stage(dim, depths[0], window, heads[0])
        self.down_2 = stage(2 * dim, depths[1], window, heads[1])
        self.down_3 = stage(4 * dim, depths[2], window, heads[2])
        self.merge_1 = PatchMerging(dim)
        self.merge_2 = PatchMerging(2 * dim)
        self.norm = nn.LayerNorm(4 * dim)
        self.expand_2 = PatchExpanding(4 * dim, 2 * dim, 2)
        self.expand_1 = PatchExpanding(2 * dim, dim, 2)
        self.join_2 = nn.Linear(4 * dim, 2 * dim)
        self.join_1 = nn.Linear(2 * dim, dim)
        self.up_2 = stage(2 * dim, depths[1], window, heads[1])
        self.up_1 = stage(dim, depths[0], window, heads[0])
        self.last = PatchExpanding(dim, dim // 2, 4)
        self.head = nn.Conv2d(dim // 2, classes, 1)

    def maps(self, x):
        """[B, C, H, W] -> a coarse map [B, 2 dim, H/8, W/8] and a full one [B, dim / 2, H, W]."""
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % 16, 0, -H % 16))
        x = self.patch_norm(self.patches(x).movedim(1, -1))        # [B, H/4, W/4, dim]
        skip_1 = self.down_1(x)
        skip_2 = self.down_2(self.merge_1(skip_1))                 # [B, H/8, W/8, 2 dim]
        x = self.norm(self.down_3(self.merge_2(skip_2)))           # [B, H/16, W/16, 4 dim]
        x = self.join_2(torch.cat([self.expand_2(x), skip_2], -1))
        coarse = self.up_2(x)                                      # [B, H/8, W/8, 2 dim]
        x = self.join_1(torch.cat([self.expand_1(coarse), skip_1], -1))
        full = self.last(self.up_1(x))                             # [B, H, W, dim / 2]
        coarse = coarse[:, :math.ceil(H / 8), :math.ceil(W / 8)]
        return coarse.movedim(-1, 1), full[:, :H, :W].movedim(-1, 1)

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
    begun = time.time()
    registered = {n: Registered(run, n) for n in sorted(run.o.labelled)}
    if not run.o.claims:                                           # a worker's parent has done this
        run.log("registration", seconds=time.time() - begun)
        write_registrations(run, registered[max(run.o.labelled)])
    return registered


def write_registrations(run, registered):
    """registration.csv, a line a pair; printed: means over all pairs, and over BRS's partners."""
    pairs = [(u, n) for u, n in registered.pairs if u != n]
    rows = [pair_row(run, registered, u, n) for u, n in pairs]
    taken = [row for row, (u, n) in zip(rows, pairs) if registered.partner(u) == n]
    columns = dict.fromkeys(k for row in rows for k in row)        # not all volumes have a Dice
    table = [{k: row.get(k, "") for k in columns} for row in rows]
    common.write_csv(run.out / "registration.csv", table)
    print(f"registration of {len(rows)} pairs, in brackets the {len(taken)} partners taken:")
    for name in list(columns)[2:]:
        every, some = ([row[name] for row in kind if name in row] for kind in (rows, taken))
        print(f"  {name:18} {common.nanmean(every):6.3f} ({common.nanmean(some):.3f})")
    judged = [row for row in rows if "dice_after" in row]
    if judged:                                                     # Spearman's
        errors = np.argsort([row["cycle_error_mm"] for row in judged])
        dice = np.argsort([row["dice_after"] for row in judged])
        rank = np.corrcoef(np.argsort(errors), np.argsort(dice))[0, 1]
        print(f"  rank correlation of cycle error and Dice {rank:.2f}")


@torch.no_grad()
def draw_registration(run, registered):
    """registration.png: some volumes and their partners, on the middle slice of the box.

    Fixed, moving before, after the affine map, after all, and the Jacobian, folded voxels in red.
    """
    shape, step = registration_grid(run.dataset)
    some = evenly([u for u in registered.volumes if u not in registered.labelled], 4)
    figure, axes = common.new_figure(len(some), 5)
    for u, row in zip(some, axes):
        n = registered.partner(u)
        box = registered.frames[n].box
        pair = registered.pairs[u, n]
        moving = on_grid(run.dataset, u, points(shape, step))      # [1, 2, Z, Y, X]
        there = pair["there"][None]                                # [1, 3, z, y, x]
        A = pair["A"][None]
        end = displaced(box.p, resize(there, box.p.shape[:3]))     # [1, Z, Y, X, 3]
        pictures = [
            (box.image, f"fixed: {run.cases[n].name}"),
            (sample(moving, box.p[None], step), f"moving: {run.cases[u].name}"),
            (sample(moving, move(A, box.p), step), f"affine, {float(pair['affine']):.2f}"),
            (sample(moving, move(A, end), step), f"deformed, {float(pair['after']):.2f}")]
        middle = len(box.p) // 2
        for axis, (picture, title) in zip(row, pictures):
            common.show(axis, picture[0, 0, middle], title=title)
        J = jacobian(there, box.p.shape[:3], box.step)[0]          # [Z-1, Y-1, X-1]
        J = J[min(middle, len(J) - 1)]
        row[4].imshow(J, cmap="gray", vmin=0, vmax=2)
        row[4].imshow(np.ma.masked_greater(J, 0), cmap="autumn")
        row[4].set_title(f"Jacobian, {100 * float(pair['folded']):.2f} % folded\n"
                         f"cycle {float(pair['cycle']):.1f} mm", fontsize=8)
    common.save_figure(figure, run.out / "figures/registration.png")


def draw_correspondences(run, registered):
    """correspondences.png: what REPS takes for the same place.

    Nine pixels of one slice, and in other volumes those nearest to them in the common frame.
    """
    dataset, S = run.dataset, run.o.size
    places = registered.places.float()                             # [N, 3, S, S]
    some = evenly(registered.volumes, 6)
    numbers = Stack(dataset, some[0]).numbers
    query = places[numbers[len(numbers) // 2]]                     # [3, S, S]: its middle slice
    places = places.nan_to_num(1e6)                                # no place is far away
    rows = [S // 2 - S // 8, S // 2, S // 2 + S // 8]
    spots = [query[:, r, c] for r in rows for c in rows]           # [3] each
    figure, axes = common.new_figure(1, len(some))
    for axis, v in zip(axes[0], some):
        numbers = Stack(dataset, v).numbers
        # the slice with the place in the middle of the nine
        far = (places[numbers] - spots[4][:, None, None]).norm(dim=1)      # [V, S, S] mm
        number = numbers[int(far.amin((1, 2)).argmin())]
        picture = dataset.image(np.array([number]))[0, 0]          # [S, S]
        common.show(axis, picture, title=f"{run.cases[v].name}, slice {dataset.slice[number] + 1}")
        for k, spot in enumerate(spots):
            far = (places[number] - spot[:, None, None]).norm(dim=0)       # [S, S] mm
            if far.min() <= run.o.radius:
                y, x = divmod(int(far.argmin()), S)
                axis.plot(x, y, "o", color=f"C{k}", markersize=4, mec="white", mew=.5)
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

LOOK = """what registration brings onto a labelled scan can take its label: the fourth column
should look like the first. pseudo_labels.png beside it has the Dice of such labels and of the
networks' own over training: see how soon, or whether, the networks overtake the registration."""


def main(arguments=None):
    o = common.parse_options(METHOD, __doc__, OPTIONS, arguments, PAPER_ALSO, "base")
    if o.predict:
        return common.predict_files(o)
    run = common.Run(o)
    check(run)
    rows = run.choose("scratch", row_name(o))
    run.begin()
    registered = registrations(run) if row_name(o) in rows else {}
    for row in run.rows():
        if row.method == "scratch":
            run.score(row, finetune(run, row))
        else:
            students = train(run, row, registered[row.labelled])
            run.score(row, students.unet, Swin=students.swin)
    common.draw_overlays(run, run.first_nets(common.build_unet, "scratch", row_name(o)))
    if not registered:
        return run.report("overlays.png", common.LOOK_ROWS)
    few = registered[min(o.labelled)]                              # the fewest labels show the most
    draw_registration(run, few)
    draw_correspondences(run, few)
    if not o.no_peek:
        draw_pseudo_labels(run)
    run.report("registration.png", LOOK)


if __name__ == "__main__":
    common.run_main(main)
