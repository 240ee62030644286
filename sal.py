"""SAL: Self-Supervised Alignment Learning for Medical Image Segmentation (Li, Ouyang, Wan;
ISBI 2024; arXiv 2406.15699).

    python sal.py                                         the built-in phantom, no data needed
    python sal.py --data path/to/acdc                     real scans: pre-train, fine-tune, score
    python sal.py --data A --pretrain-data B C            pre-train on B and C, fine-tune on A
    python sal.py --predict IMAGES --checkpoint FILE.pt   segment new volumes

Two close slices of one scan show nearly the same anatomy, so most pixels of one have a match in
the other. The local alignment loss (LA) lets every pixel pick its best match and pulls the two
together; the global positional loss (GP) uses where a slice lies in its volume. Pre-train the
encoder with both, without labels; then fine-tune a U-Net with few labels.

What LA is worth, a run a line; the default has GP, repulsion and LA:

    python sal.py --weight-la 0 --weight-u 0 --out runs/gp        GP alone
    python sal.py --weight-la 0 --out runs/gp-u                   GP and repulsion
    python sal.py --windows 8 --out runs/same-place               LA of the same place alone
    python sal.py --spare-matches --out runs/spared               no repulsion of LA's own matches
    python sal.py --weight-gp 0 --out runs/la-u                   LA and repulsion, no GP

(8 is the side of the phantom's feature map, size / 2^level; 12 on ACDC. Without GP only the
encoder's levels 0 to `level` are trained, and taken.)

Paper, code, and what we chose. [paper]: stated there; [PCL]: Zeng et al., MICCAI 2021, what
"positional" means in this field; [ours]: the paper is silent or we could not read it. The authors
published no code. The paper has three numbered equations, which could not be read: the names (LA),
(WLA), (GP) are ours.
 1. LA pulls the best match of every pixel to similarity 1 with MAE, on slices with |i-j| / V < t
    [paper, Fig. 2]; |i-j| / V = t counts as close [ours]. Both directions (rows and columns of A)
    are averaged [ours].
 2. WLA cuts the map into r x r windows and matches inside each [paper, Figs. 1, 2]. r = 4 [ours].
 3. X = N(E(F(S))): encoder F, linear embedding E, L2 norm over channels N [paper, by a review]. E
    has no bias, X comes from encoder level 3, 12 x 12 places at 96 x 96 [ours].
 4. GP: the paper's equation could not be read, so it is PCL's loss, z = pool, linear, ReLU, linear,
    tau = 0.1, t = 0.35 on ACDC and 0.1 on CT [PCL], for us on all sets but ACDC [ours]. PCL's
    factor tau / 0.07 is left out; LA takes the same t, as its own is not known [ours]:
    `--threshold`, `--threshold-la`. With `--data`, each set of `--pretrain-data` has its own t,
    unless one is typed [ours].
 5. Total: L_GP + lambda L_WLA, lambda = 1, and our L_U beside them [ours].
 6. LA has no repulsion and is 0 when all features are equal; L_U repels pixels of different places,
    and those of one place in different volumes. Without it LA collapses (results/sal.md). The log
    has `WLA_strangers` beside WLA: the same loss between views that do not belong together: of
    another pair, nearly always of another volume, and moved otherwise. Off unless asked for:
    matches within a `--radius` of the own place, `--spare-matches` [ours].
 7. Pairs: slice i at random, j at random with |i-j| / V < t of LA, j = i allowed, so that all four
    kinds of pairs occur (Fig. 1 has "different selections" of pairs; what the four are is our
    reading). The two are moved by the same transform, or there would be no place to align, and get
    intensities of their own [ours].
 8. Pre-training by AdamW 1e-3 with a cosine (PCL: SGD 0.1); fine-tuning by cross-entropy + Dice,
    AdamW, the encoder slower than the new decoder (PCL: cross-entropy, Adam 5e-5) [ours]. The
    encoder is loaded, the decoder starts from scratch [PCL].
 9. PCL pre-trains on all frames of ACDC's cine scans, we on ED and ES, or on other sets with
    `--pretrain-data`; slices of two sets are never positives. One pre-training serves all seeds, so
    the spread over seeds is that of fine-tuning. The last checkpoint is scored; test patients
    choose nothing [ours].

Letters: B pairs in a batch, n = 2B views, N slices of the pool, C channels, h, w size of a feature
map, S network size (S_i: slice i), V slices in a volume, i slice number, K classes; t threshold,
r windows along a side, A similarities, sim cosine similarity, p, q places of a map, a, b views (in
(GP) p is one too), d length of z. The paper's F and N are `unet.encoder` and `F.normalize`.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UNet, cosine, photometric, spatial_grid, warp

METHOD = "sal"

# ---------------------------------------------------------------------------------------- options

# name, on real data, on the phantom (None: the same), in the paper (None: not known), what it is
OPTIONS = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients"),
    ("seeds", [0, 1, 2], [0], None, "seeds of fine-tuning"),
    ("width", 16, None, None, "channels of the first U-Net level (PCL: 48 on ACDC)"),
    ("spacing", None, 2.5, None, "mm a pixel in plane; 2 on ACDC"),
    ("size", None, 64, None, "S, crop in pixels, divisible by 16; 96 on ACDC"),
    ("pretrain_data", [], None, None, "folders to pre-train on instead of --data; need no labels"),
    ("pretrain_steps", 8000, 1000, None, "steps of pre-training (PCL: 300 epochs)"),
    ("pretrain_lr", 1e-3, None, None, "AdamW, cosine to 0 (PCL: SGD 0.1)"),
    ("pretrain_seed", 1000, None, None, "seed of pre-training"),
    ("pretrain_rotation", .5, None, None, "largest rotation of a pair in rad (PCL: pi)"),
    ("pairs", 16, None, None, "B, pairs of slices a step (PCL: 32 slices)"),
    ("threshold", None, .35, None,
     "t of GP, a share of the volume's length; 0.35 on ACDC (PCL), else 0.1"),
    ("threshold_la", None, .35, None,
     "t of LA and of the choice of pairs; 0.35 on ACDC, else 0.1 (paper: not known)"),
    ("temperature", .1, None, None, "tau of GP (PCL: 0.1)"),
    ("weight_gp", 1., None, None, "of L_GP; 0: LA and L_U alone"),
    ("weight_la", 1., None, None, "lambda, of L_WLA; 0: GP and L_U alone; --weight-u 0 too: GP"),
    ("weight_u", 1., None, None, "of L_U, ours; 0: LA as we read the paper, which collapses"),
    ("windows", 4, None, None, "r: r x r windows; r divides h and w; 1: whole map; h: same place"),
    ("radius", 0, None, None,
     "how far from its own place a match may lie, in places; 0: no limit (ours)"),
    ("spare_matches", False, None, None, "L_U does not repel what LA has just matched (ours)"),
    ("level", 3, None, None, "encoder level of X: size S / 2^level"),
    ("steps", 4800, 240, None, "steps of fine-tuning, also from scratch (PCL: 100 epochs)"),
    ("batch", 8, None, None, "labelled slices a step (PCL: 10)"),
    ("lr", 2e-3, None, None, "of new layers and of scratch, AdamW, cosine to 0 (PCL: Adam 5e-5)"),
    ("pretrained_lr", 1e-4, 1e-3, None, "of pre-trained layers"),
    ("rotation", .5, None, None, "largest rotation in fine-tuning in rad"),
]


def usual_threshold(cases):
    """t for a set: 0.35 on ACDC, at most 3 slices of 10 apart (PCL); else 0.1, PCL's on CT."""
    return .35 if cases.layout == "ACDC" else .1


def check(run):
    """Fill in t, which depends on the data, and refuse impossible options. Raises DataError.

    t becomes a list, one for each set, if several sets are pre-trained on.
    """
    o = run.o
    usual = [usual_threshold(cases) for cases in run.sources or [run.cases]]
    t = usual if len(usual) > 1 else usual[0]
    if o.threshold is None:
        o.threshold = t
    if o.threshold_la is None:
        o.threshold_la = t
    common.refuse([(o.level not in range(5), f"--level {o.level}: use 0 to 4")])
    side = o.size // 2 ** o.level                                  # of the feature map
    common.refuse([
        (o.windows < 1 or side % o.windows,
         f"--windows {o.windows}: does not divide the {side} x {side} map of --level {o.level}; "
         f"use a divisor of {side}"),
        (o.radius < 0, f"--radius {o.radius}: use 1 or more places, or 0 for no limit"),
        (min(o.weight_gp, o.weight_la, o.weight_u) < 0,
         "--weight-gp --weight-la --weight-u: use 0 or more"),
        (o.weight_gp == o.weight_la == 0,
         "--weight-gp 0 --weight-la 0: nothing of the paper is left to train; drop one of them"),
        (o.spare_matches and not (o.weight_la and o.weight_u),
         "--spare-matches: spares LA's matches from L_U; needs --weight-la and --weight-u above 0"),
        (not 0 < np.min(o.threshold) <= 1,                         # a number, or our list
         f"--threshold {o.threshold}: use a share of the volume's length in (0, 1]"),
        (not 0 < np.min(o.threshold_la) <= 1,
         f"--threshold-la {o.threshold_la}: use a share of the volume's length in (0, 1]"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (o.pretrain_steps < 1, "--pretrain-steps: use 1 or more"),
        (o.pairs < 2, "--pairs: use 2 or more"),
    ])


# ----------------------------------------------------------------------------------------- losses


def to_windows(X, r):
    """Cut maps [B, C, h, w] into r x r windows: [B r^2, hw/r^2, C], a window's pixels as rows."""
    B, C, h, w = X.shape
    X = X.view(B, C, r, h // r, r, w // r)                         # [B, C, r, h/r, r, w/r]
    X = X.permute(0, 2, 4, 3, 5, 1)                                # [B, r, r, h/r, w/r, C]
    return X.reshape(B * r * r, -1, C)                             # [B r^2, hw/r^2, C]


def near(h, w, radius):
    """Which two places of an h x w map lie at most `radius` places apart: bool [hw, hw]."""
    place = torch.arange(h * w)
    y = place // w
    x = place % w
    dy = y[:, None] - y                                            # [hw, hw]
    dx = x[:, None] - x
    return dy ** 2 + dx ** 2 <= radius ** 2


def similarities(x_i, x_j, windows, radius):
    """A of every window, [B r^2, hw/r^2, hw/r^2] cosines; below -1 where a match is not sought.

    x_i, x_j [B, C, h, w] before normalisation. Raises ValueError if r does not divide h and w.
    """
    h, w = x_i.shape[2:]
    if h % windows or w % windows:
        raise ValueError(f"windows = {windows} does not divide the feature map of {h} x {w}")
    # X = N(E(F(S))): unit length over channels
    X_i = to_windows(F.normalize(x_i.float(), dim=1), windows)     # [B r^2, hw/r^2, C]
    X_j = to_windows(F.normalize(x_j.float(), dim=1), windows)
    # A = X_i^T X_j in the paper, where pixels are columns; here they are rows
    with torch.autocast(x_i.device.type, enabled=False):           # float32 also under autocast
        A = X_i @ X_j.mT                                           # [B r^2, hw/r^2, hw/r^2]
    if radius:
        far = ~near(h // windows, w // windows, radius)            # [hw/r^2, hw/r^2]
        A = A.masked_fill(far.to(A.device), -2)
    return A


def local_alignment_loss(x_i, x_j, windows=1, radius=0):
    """Windowed local alignment loss (WLA); with one window it is (LA).

        L_LA(i,j) = 1/(hw) sum_p | 1 - max_q A[p,q] |                         (LA)
        L_WLA(i,j) = 1/r^2 sum_k L_LA(window k of i, window k of j)           (WLA)

    x_i, x_j: maps E(F(S_i)), E(F(S_j)) [B, C, h, w] of close slices, before normalisation;
    `windows` = r divides h and w; with a `radius` q also lies within that many places of p (ours).
    Returns a scalar in [0, 2]. Both directions are averaged (ours). Raises ValueError if r does not
    divide h and w.
    """
    A = similarities(x_i, x_j, windows, radius)                    # [B r^2, hw/r^2, hw/r^2]
    # | 1 - max_q A[p,q] |, mean over the pixels p of a window and over the windows
    forward = (1 - A.amax(2)).abs().mean()                         # rows: pixels of i
    backward = (1 - A.amax(1)).abs().mean()                        # columns: pixels of j
    return (forward + backward) / 2


def best_matches(x_i, x_j, windows, radius):
    """The place q in j that LA finds for every place p in i: maps [B, C, h, w] -> [B, hw]."""
    B, _, h, w = x_i.shape
    A = similarities(x_i, x_j, windows, radius)
    q = A.argmax(2).unflatten(0, (B, -1))                          # [B, r^2, hw/r^2], in the window
    place = torch.arange(h * w, device=q.device)
    place = to_windows(place.view(1, 1, h, w), windows)[..., 0]    # [r^2, hw/r^2]: window -> map
    match = torch.empty_like(q).flatten(1)                         # [B, hw]
    match[:, place.flatten()] = place.expand_as(q).gather(2, q).flatten(1)
    return match


def matched_pairs(x_i, x_j, windows, radius):
    """Which p of i and q of j LA has matched, in either direction: bool [B, hw, hw]."""
    hw = x_i[0, 0].numel()
    there = F.one_hot(best_matches(x_i, x_j, windows, radius), hw)         # [B, hw, hw]
    back = F.one_hot(best_matches(x_j, x_i, windows, radius), hw)
    return (there + back.mT) > 0


def global_positional_loss(z, position, threshold, temperature):
    """Global positional loss: InfoNCE; positives are slices at a like position, of any subject.

        L_GP = - mean_a 1/|P(a)| sum_{p in P(a)}
                   log( exp(sim(z_a,z_p)/tau) / sum_{b != a} exp(sim(z_a,z_b)/tau) )     (GP)

    z [n, d]: image-level projections; position [n]: (i + 1) / V of slice i, in the k-th set + 2k;
    threshold t, one or [n]; temperature tau. Returns a scalar, chance level ln(n - 1). An anchor
    without positive is left out (ours); 0 without any.
    """
    n = len(z)
    z = F.normalize(z.float(), dim=1)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    # P(a) = { b != a : |pos_a - pos_b| < t }
    P = common.is_close(position, threshold).to(z.device) & ~itself        # [n, n] bool
    # log( exp(sim(z_a,z_p)/tau) / sum_{b != a} exp(sim(z_a,z_b)/tau) )
    with torch.autocast(z.device.type, enabled=False):             # float32 also under autocast
        sim = z @ z.T / temperature                                # [n, n]: sim(z_a,z_b)/tau
    others = sim.masked_fill(itself, -torch.inf)
    log_prob = sim - others.logsumexp(1, keepdim=True)             # [n, n]
    # - 1/|P(a)| sum_{p in P(a)} ..., then the mean over the anchors a that have a positive
    count = P.sum(1)                                               # [n]: |P(a)|
    per_anchor = -(log_prob * P).sum(1) / count.clamp(min=1)       # [n]
    if not count.any():
        return z.sum() * 0                                         # 0 that backward can start at
    return per_anchor[count > 0].mean()


def uniformity_loss(x, volume, places=16, sharpness=4., spared=None):
    """What LA lacks: different places repel, so that equal features cannot win.

        L_U = log mean exp(s sim(X_a[p], X_b[q]))    (ours, after Wang and Isola 2020)

    s = `sharpness`; over m = `places` (or hw, if fewer) random places p, q of all n views a, b.
    Repelled are different places, of one volume or two, and the same place of two volumes: without
    that the network could read the place off the zero padding and make LA 0 without anatomy.
    Different places may be what LA has just matched, unless `spared` [n/2, hw, hw] has that p of
    view a and q of view a + n/2; two volumes may be ED and ES of one heart. x [n, C, h, w] before
    normalisation, volume [n]. Returns a scalar: about 0.1 when pixels are unrelated, 4 when all are
    equal.
    """
    n = len(x)
    hw = x[0, 0].numel()
    place = torch.randperm(hw)[:places].to(x.device)               # [m], the same in all views
    m = len(place)
    X = F.normalize(x.float(), dim=1).flatten(2)                   # [n, C, hw]
    X = X[:, :, place].movedim(1, 2).flatten(0, 1)                 # [n m, C], view by view
    volume = torch.as_tensor(volume, device=x.device)
    of_volume = volume.repeat_interleave(m)                        # [n m]
    of_place = place.repeat(n)                                     # [n m]
    other_volume = of_volume[:, None] != of_volume                 # [n m, n m]
    other_place = of_place[:, None] != of_place
    repelled = other_volume | other_place
    if spared is not None:
        a = torch.arange(n // 2, device=x.device)
        spared = spared[:, place][:, :, place]                     # [n/2, m, m]
        pairs = repelled.view(n, m, n, m)                          # [a, p, b, q], the same memory
        pairs[a, :, a + n // 2] &= ~spared
        pairs[a + n // 2, :, a] &= ~spared.mT
    with torch.autocast(x.device.type, enabled=False):
        scaled = (sharpness * X) @ X.T                             # [n m, n m]: s sim
    scaled = scaled[repelled]                                      # [pairs that repel]
    return scaled.logsumexp(0) - math.log(len(scaled))             # log of a mean of exponentials


def pair_kinds(volume, slice_number, depth, threshold):
    """The four kinds of pairs among n views, our reading of Fig. 1: [n, n] of 1..4, diagonal 0.

    1 two views of one slice; 2 two close slices of one volume; 3 a like position in different
    volumes; 4 far apart. GP attracts kinds 1, 2, 3 and repels all; LA takes each view and its
    partner, a pair of kind 1 or 2 if LA's t is not larger than GP's. All views are of one set;
    volume, slice_number, depth (= V): [n] each; threshold: of GP. For reading and tests: training
    does not call it.
    """
    volume = torch.as_tensor(np.asarray(volume))
    i = torch.as_tensor(np.asarray(slice_number))
    V = torch.as_tensor(np.asarray(depth))
    same_volume = volume[:, None] == volume[None]
    same_slice = same_volume & (i[:, None] == i[None])
    close = common.is_close((i + 1) / V, threshold)                # [n, n]
    kinds = torch.full(close.shape, 4)
    kinds[close & ~same_volume] = 3
    kinds[close & same_volume] = 2
    kinds[same_slice] = 1
    return kinds.fill_diagonal_(0)


@torch.no_grad()
def random_pair_similarity(x):
    """Collapse indicator: mean cosine similarity of a pixel to one far away in the view before.

    x [n, C, h, w]. 1 when all features are equal: LA is then 0 and teaches nothing.
    """
    X = F.normalize(x.float(), dim=1).flatten(2)                   # [n, C, hw]
    far = X.shape[2] // 2 + 1                                      # about half the image away
    other = X.roll(1, 0).roll(far, 2)
    return (X * other).sum(1).mean()


# ----------------------------------------------------------------------------------- pre-training


class Heads(nn.Module):
    """What pre-training puts on the encoder and throws away: E, and the projection of GP."""
    def __init__(self, widths, level, dim=64):
        super().__init__()
        self.level = level
        self.embed = nn.Conv2d(widths[level], dim, 1, bias=False)  # E
        self.project = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.ReLU(),
                                     nn.Linear(widths[-1], 128))

    def forward(self, features):
        """Encoder features -> (x [n, dim, h, w] before normalisation, z [n, 128])."""
        pooled = features[-1].mean((2, 3))                         # [n, C]
        return self.embed(features[self.level]), self.project(pooled)


def sample_pairs(dataset, numbers, n_pairs, threshold):
    """Numbers in the dataset of the slices i [B], at random, and j [B], near: |i-j| / V < t.

    threshold: t, one or that of each slice of the dataset. j = i is allowed: two views of one
    slice. Drawn from torch's generator.
    """
    first = common.random_slices(numbers, n_pairs)                 # [B]: numbers in the dataset
    V = dataset.depth[first]
    t = np.broadcast_to(threshold, dataset.depth.shape)[first]     # [B]
    i = dataset.slice[first]                                       # [B]: numbers in the volume
    # the largest |i-j| whose positions are close: |i-j| / V < t + TIE, as `common.is_close` has it
    reach = np.ceil((t + common.TIE) * V).astype(int) - 1
    lo = np.maximum(i - reach, 0)
    hi = np.minimum(i + reach, V - 1)
    j = lo + (torch.rand(n_pairs).numpy() * (hi - lo + 1)).astype(int)
    return first, first + j - i


def by_slice(threshold, pool):
    """t of every slice of the pool [N]: `threshold` is one number, or one for each of its sets."""
    return np.broadcast_to(threshold, len(pool.datasets))[pool.part]


def note_lonely(pool, t):
    """Say so if many slices of the pool have no partner but themselves, as in short volumes.

    t: of LA, of every slice of the pool [N].
    """
    V = pool.depth
    lonely = ((t + common.TIE) * V <= 1)[pool.numbers].mean()      # the share of them
    if lonely > .2:
        print(f"t of LA: {lonely:.0%} of the slices have no other slice as near, as |i-j| / V < t "
              "leaves j = i alone; a larger --threshold-la, as .35, gives them one")


def pair_batch(run, pool):
    """B pairs of close slices as views [2B, C, S, S] (all i, then all j), and numbers [2B]."""
    o = run.o
    t = by_slice(o.threshold_la, pool)                             # [N]
    pick = np.concatenate(sample_pairs(pool, pool.numbers, o.pairs, t))
    # the same place for both slices of a pair, intensities each their own (ours)
    grid = spatial_grid(o.pairs, o.size, o.pretrain_rotation, run.device)
    grid = grid.repeat(2, 1, 1, 1)                                 # [2B, S, S, 2]
    views = photometric(warp(pool.image(pick, run.device), grid))  # [2B, C, S, S]
    return common.channels_last(views), pick


def pretrain(run):
    """Train encoder and heads on all training slices, without labels; returns pretrained.pt."""
    o = run.o
    pool = common.pretraining_slices(run, run.dataset)
    note_lonely(pool, by_slice(o.threshold_la, pool))
    torch.manual_seed(o.pretrain_seed)
    unet = run.place(run.unet(classes=2))                          # its encoder alone is used
    heads = Heads(unet.encoder.widths, o.level).to(run.device)
    parameters = [*unet.encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5)
    for step in run.steps("pretrain", o.pretrain_steps, (unet, heads), optimiser):
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * cosine(step, o.pretrain_steps)
        views, pick = pair_batch(run, pool)                        # [2B, C, S, S], [2B]
        with run.autocast():
            x, z = heads(unet.encoder(views))                      # [2B, C, h, w], [2B, d]
        # positions of the k-th set have 2k added, so none is close to one of another set
        position = torch.from_numpy(pool.position[pick])           # [2B]
        t = by_slice(o.threshold, pool)[pick]                      # [2B]
        L_GP = global_positional_loss(z, position, t, o.temperature)
        x_i, x_j = x.chunk(2)                                      # all i, all j: [B, C, h, w]
        L_WLA = local_alignment_loss(x_i, x_j, o.windows, o.radius)
        spared = None
        if o.spare_matches:
            spared = matched_pairs(x_i, x_j, o.windows, o.radius)  # [B, hw, hw]
        L_U = uniformity_loss(x, pool.volume[pick], spared=spared)
        # L = L_GP + lambda L_WLA    (total), and our L_U, each with its weight
        loss = o.weight_gp * L_GP + o.weight_la * L_WLA + o.weight_u * L_U
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            with torch.no_grad():                                  # views of other pairs
                strangers = local_alignment_loss(x_i, x_j.roll(1, 0), o.windows, o.radius)
            run.log("pretrain", step=step, GP=L_GP, GP_chance=math.log(2 * o.pairs - 1), WLA=L_WLA,
                    WLA_strangers=strangers, U=L_U, random_pairs=random_pair_similarity(x))
    return run.save_pretrained(unet=unet.state_dict(), parts=trained_parts(o),
                               heads=heads.state_dict())


def trained_parts(o):
    """What pre-training trains of the U-Net, and fine-tuning takes: LA stops at its level."""
    if o.weight_gp:
        return ["encoder"]
    return [f"encoder.blocks.{level}" for level in range(o.level + 1)]


# ------------------------------------------------------------------------------------ fine-tuning


def finetune(run, row, start=None):
    """Train a U-Net on the labelled slices of a row, from scratch or from pretrained.pt."""
    o = run.o
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    unet = run.place(run.unet())
    taken = []
    if start:
        taken, _ = common.load_weights(unet, start["unet"], start["parts"])
    old = [p for k, p in unet.named_parameters() if k in taken]
    new = [p for k, p in unet.named_parameters() if k not in taken]
    # "peak" is ours, for the schedule; AdamW passes it on
    groups = [{"params": old, "peak": o.pretrained_lr}, {"params": new, "peak": o.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
    for step in run.steps(row.name, o.steps, (unet,), optimiser):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(step, o.steps)
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


# ---------------------------------------------------------------------------------------- figures


@torch.no_grad()
def feature_maps(run, images, pretrained=None):
    """X [V, C, h, w] of the slices [V, C, S, S] of one volume; a random network, or pretrained."""
    torch.manual_seed(run.o.pretrain_seed)                         # as pre-training starts
    unet = run.unet(classes=2)
    heads = Heads(unet.encoder.widths, run.o.level)
    if pretrained:
        common.load_weights(unet, pretrained["unet"], ["encoder"])
        heads.load_state_dict(pretrained["heads"])
    features = unet.to(run.device).encoder(images)                 # with batch statistics
    x, _ = heads.to(run.device)(features)
    return F.normalize(x.float(), dim=1).cpu()


def draw_matches(run, pretrained):
    """matches.png: pixels of slice i and their best matches in slice i + 1, before and after.

    Sought where training seeks them: in the window of --windows, within --radius.
    """
    o = run.o
    dataset = run.dataset
    first = dataset.of_patients(run.split["val"])[0]
    slices = first + np.arange(dataset.depth[first])
    images = dataset.image(slices, run.device)                     # [V, C, S, S]
    i = len(images) // 2 - 1
    picture = images[:, 0].cpu()                                   # [V, S, S]
    figure, axes = common.new_figure(1, 5, 3.0, 3.2)
    query, *matches = axes[0, :3]
    heats = axes[0, 3:]
    common.show(query, picture[i], title="slice i, query pixels")
    for column, weights in enumerate([None, pretrained]):
        title = ["before", "after"][column]
        X = feature_maps(run, images, weights)                     # [V, C, h, w]
        h, w = X.shape[2:]
        A = X[i].flatten(1).T @ X[i + 1].flatten(1)                # [hw, hw] cosine similarities
        match = best_matches(X[[i]], X[[i + 1]], o.windows, o.radius)[0]       # [hw]
        similarity = A.gather(1, match[:, None])                   # [hw, 1]
        common.show(matches[column], picture[i + 1],
                    title=f"slice i+1, best matches {title}\nmean best similarity "
                          f"{similarity.mean():.2f}, all pairs {A.mean():.2f}")
        for n in range(9):                                         # a 3 x 3 pattern of queries
            y = [h // 3, h // 2, 2 * h // 3][n // 3]
            x = [w // 3, w // 2, 2 * w // 3][n % 3]
            best = int(match[y * w + x])
            mark_place(query, y, x, o.size / w, f"C{n}")
            mark_place(matches[column], best // w, best % w, o.size / w, f"C{n}")
        middle = (h // 2) * w + w // 2
        heats[column].imshow(A[middle].view(h, w), cmap="magma", vmin=-.5, vmax=1)
        heats[column].set_title(f"similarity to the middle\npixel of slice i, {title}", fontsize=8)
    common.save_figure(figure, run.out / "figures/matches.png")


def mark_place(axis, y, x, pixels, colour):
    """Mark the place (y, x) of a feature map on the image, of which a place covers `pixels`."""
    column = (x + .5) * pixels - .5
    row = (y + .5) * pixels - .5
    axis.plot(column, row, "o", color=colour, markersize=5, mec="white")


# ------------------------------------------------------------------------------------------- main

LOOK = """in the two maps on the right much of the next slice is
like the middle pixel before pre-training, and after it hardly anything but that pixel's own place.
In the table, `gain` is what that is worth beside the same network from scratch."""
LOOK_UNREPELLED = """the two maps on the right. Without L_U nothing
keeps the pixels of a slice apart: random_pairs in log.jsonl near 1 means that all are alike."""
LOOK_INIT = """the networks of this run; what the weights of --init have learnt is drawn by the run
that made them. In the table, `gain` is what they are worth beside the same network from scratch."""


def main(arguments=None):
    o = common.parse_options(METHOD, __doc__, OPTIONS, arguments)
    if o.predict:
        return common.predict_files(o)
    run = common.Run(o)
    check(run)
    methods = run.choose("scratch", "sal")
    run.begin()
    start = run.pretrained()
    if start is None and "sal" in methods:
        start = pretrain(run)
    for row in run.rows():
        unet = finetune(run, row, start if row.method == "sal" else None)
        run.score(row, unet)
    common.draw_overlays(run, run.first_nets(common.build_unet, "scratch", "sal"))
    if not start:
        return run.report("overlays.png", common.LOOK_ROWS)
    if o.init:
        return run.report("overlays.png", LOOK_INIT)
    draw_matches(run, start)
    run.report("matches.png", LOOK if o.weight_u else LOOK_UNREPELLED)


if __name__ == "__main__":
    common.run_main(main)
