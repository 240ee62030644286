"""What all four methods need and no reader came for: U-Net, Dice, prepared slices, augmentation,
scores, and a `Run`, which knows what was asked for, what is done, and where it is kept.

Letters: B batch, C channels, K classes, V slices of a volume, N slices of a dataset, H, W native
size, S network size. The lesson of each paper is in its own script; files and layouts are in
data.py.
"""
import argparse, csv, hashlib, io, json, math, os, platform, re, resource, shutil, subprocess, sys
import tempfile, time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm, trange

from data import (PHANTOM_VERSION, Cases, DataError, channel_files, default_grid, find_cases,
                  header_warnings, hounsfield_warnings, in_hounsfield, make_phantom, normalise,
                  read_case, read_image, read_label, split_patients, stem, write_nifti)

# ------------------------------------------------------------------------------------------ U-Net


def conv_block(n_in, n_out):
    """Twice 3x3 convolution, normalisation, LeakyReLU: [B, n_in, h, w] -> [B, n_out, h, w]."""
    layers = []
    for n in (n_in, n_out):
        layers.append(nn.Conv2d(n, n_out, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(n_out))
        layers.append(nn.LeakyReLU(0.01, inplace=True))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """`depth` + 1 blocks with 2x2 max-pooling between them.

    Level l has width * 2^l channels at 1 / 2^l of the size.
    """
    def __init__(self, channels, width, depth):
        super().__init__()
        self.widths = [width * 2 ** level for level in range(depth + 1)]
        pairs = zip([channels] + self.widths, self.widths)
        self.blocks = nn.ModuleList(conv_block(a, b) for a, b in pairs)

    def forward(self, x):                                          # [B, C, S, S]
        features = []
        for level, block in enumerate(self.blocks):
            if level:
                x = F.max_pool2d(x, 2)
            x = block(x)                                           # [B, width 2^l, S/2^l, S/2^l]
            features.append(x)
        return features                                            # level 0 (full size) to `depth`


class Decoder(nn.Module):
    """Blocks from the deepest level up: transposed convolution, skip connection, convolutions."""
    def __init__(self, widths):
        super().__init__()
        up = widths[::-1]                                          # from the deepest level
        pairs = list(zip(up, up[1:]))                              # (deeper, shallower)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.blocks = nn.ModuleList(conv_block(2 * b, b) for _, b in pairs)

    def forward(self, features, blocks=None):
        """Run the first `blocks` blocks (all by default); 0 returns the encoder's deepest map."""
        blocks = len(self.blocks) if blocks is None else blocks
        x = features[-1]
        for n in range(blocks):
            x = torch.cat([self.ups[n](x), features[-2 - n]], 1)   # [B, 2 width, 2h, 2w]
            x = self.blocks[n](x)                                  # [B, width, 2h, 2w]
        return x


class UNet(nn.Module):
    """2D U-Net (Ronneberger et al. 2015): `encoder`, `decoder`, and a 1x1 `head` apart.

    S must be divisible by 2^depth.
    """
    def __init__(self, channels=1, classes=4, width=16, depth=4):
        super().__init__()
        self.encoder = Encoder(channels, width, depth)
        self.decoder = Decoder(self.encoder.widths)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):                                          # [B, C, S, S] -> [B, K, S, S]
        return self.head(self.decoder(self.encoder(x)))


def load_weights(unet, state, parts):
    """Copy what lies below `parts` (as "encoder" or "decoder.blocks.0") from `state` to a U-Net.

    Returns (names taken, names fresh). Raises DataError where a tensor of `state` is missing or has
    another shape.
    """
    own = unet.state_dict()
    below = tuple(f"{part}." for part in parts)
    taken = sorted(k for k in own if k.startswith(below))
    for k in taken:
        here = tuple(own[k].shape)
        there = tuple(state[k].shape) if k in state else "missing"
        if here != there:
            raise DataError(f"weights do not fit: {k} is {here} here and {there} there; "
                            "use the same --width and channels")
        own[k] = state[k]
    unet.load_state_dict(own)
    return taken, sorted(own.keys() - set(taken))


# ----------------------------------------------------------------------------- Dice and distances


def dice_loss(logits, label, eps=1e-5):
    """Soft Dice loss: 1 - mean over foreground classes of 2 sum(p y) / (sum p + sum y).

    Sums over batch and pixels. logits [B, K, h, w], label [B, h, w] with whole numbers below K.
    Returns a scalar.
    """
    p = logits.float().softmax(1)[:, 1:]                           # [B, K-1, h, w]
    y = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:]    # [B, K-1, h, w]
    y = y.to(p)
    both = (p * y).sum((0, 2, 3))                                  # [K-1]
    either = p.sum((0, 2, 3)) + y.sum((0, 2, 3))                   # [K-1]
    return 1 - ((2 * both + eps) / (either + eps)).mean()


def dice_score(pred, truth, classes):
    """Dice of two label maps of equal shape for every class number of `classes`: {class: [0, 1]}.

    Absent in both: nan. Absent in one of them: 0.
    """
    pred = np.asarray(pred)
    truth = np.asarray(truth)
    score = {}
    for k in classes:
        a = pred == k
        b = truth == k
        size = int(a.sum()) + int(b.sum())
        score[k] = 2 * int((a & b).sum()) / size if size else math.nan
    return score


def _surface(mask):
    """The voxels of a mask with a face neighbour outside it (beyond the border is outside)."""
    inner = mask.copy()
    padded = np.pad(mask, 1)
    for axis in range(mask.ndim):
        for step in (0, 2):                                        # the neighbour before, and after
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(step, step + mask.shape[axis])
            inner &= padded[tuple(window)]
    return mask & ~inner


def _square_length(x):
    """|x|^2 of every row of x [n, axes]: [n]."""
    return np.einsum("ij,ij->i", x, x)


def _nearest(a, b):
    """Distance from every point of a [n, axes] to the nearest of b [m, axes], exact: [n].

    a is halved until few pairs are left. A part of it lies within r of its middle c; let p be the
    point of b nearest to c. Any other point q of b is needed only if some c + u, |u| <= r, may be
    nearer to q than to p:
        |c + u - q|^2 < |c + u - p|^2  =>  |c - q|^2 - |c - p|^2 < 2 u.(q - p) <= 2 r |q - p|
    """
    if len(a) < 2 or len(a) * len(b) <= 200_000:
        product = a @ b.T                                          # [n, m]
        closest = (_square_length(b) - 2 * product).argmin(1)      # |a - b|^2 less |a|^2
        return np.sqrt(_square_length(a - b[closest]))
    low = a.min(0)
    high = a.max(0)
    c = (low + high) / 2
    r = np.linalg.norm(high - c)
    from_c = _square_length(b - c)                                 # [m]
    p = b[from_c.argmin()]
    from_p = np.sqrt(_square_length(b - p))                        # [m]
    b = b[from_c - from_c.min() <= 2 * r * from_p]
    longest = (high - low).argmax()
    distance = np.empty(len(a))
    for half in np.array_split(a[:, longest].argsort(), 2):
        distance[half] = _nearest(a[half], b)
    return distance


def surface_distances(pred, truth, spacing):
    """(HD95, ASSD) in mm of two binary masks of equal shape; spacing in mm along each axis.

    HD95: the larger of the two directed 95th percentiles. ASSD: mean over all surface voxels of
    both masks. (nan, nan) if one is empty.
    """
    pred = np.asarray(pred, bool)
    truth = np.asarray(truth, bool)
    if not pred.any() or not truth.any():
        return math.nan, math.nan
    found = np.argwhere(pred | truth)
    box = tuple(slice(lo, hi + 1) for lo, hi in zip(found.min(0), found.max(0)))
    a = _surface(pred[box])
    b = _surface(truth[box])
    shared = np.zeros((a & b).sum())                               # their distance is 0
    directed = []
    for of, to in ((a, b), (b, a)):
        distance = _nearest(np.argwhere(of & ~to) * spacing, np.argwhere(to) * spacing)
        directed.append(np.concatenate([shared, distance]))
    hd95 = max(np.percentile(d, 95) for d in directed)
    return float(hd95), float(np.concatenate(directed).mean())


# ------------------------------------------------------------------------ native <-> network grid


def _place(x, size, value=0.):
    """Crop or pad the last two axes to `size` [rows, columns] about the centre."""
    for axis, want in ((-2, size[0]), (-1, size[1])):
        have = x.shape[axis]
        before = abs(want - have) // 2                             # so cropping undoes padding
        if want < have:
            before = -before
        pad = [before, want - have - before]                       # negative padding crops
        x = F.pad(x, pad if axis == -1 else [0, 0] + pad, value=value)
    return x


def resampled(shape, spacing, target):
    """Rows and columns of a native slice once its pixels are `target` mm."""
    return [max(1, round(n * mm / target)) for n, mm in zip(shape[-2:], spacing[-2:])]


def to_network(image, spacing, target, size):
    """Slices [V, C, H, W] of spacing (V, H, W) in mm -> [V, C, S, S] at `target` mm, centred."""
    new = resampled(image.shape, spacing, target)
    x = F.interpolate(image, new, mode="bilinear", antialias=True)
    return _place(x, (size, size))


def to_native(probs, shape, spacing, target):
    """Class probabilities [V, K, S, S] -> label [V, H, W], native; outside the crop: background."""
    new = resampled(shape, spacing, target)
    background = _place(probs[:, :1], new, 1.)
    rest = _place(probs[:, 1:], new)
    placed = torch.cat([background, rest], 1)                      # [V, K, resampled rows, columns]
    labels = []
    for p in placed.split(8):
        p = F.interpolate(p, tuple(shape[-2:]), mode="bilinear")   # [8, K, H, W]
        labels.append(p.argmax(1))
    return torch.cat(labels)                                       # [V, H, W]


# -------------------------------------------------------------------------------- prepared slices

CACHE_VERSION = 4                   # one more for any change of what `prepare` writes


class SliceDataset:
    """All slices of a dataset on the network grid, memory-mapped. Made by `prepare`.

    images float16 [N, C, S, S] in [0, 1]; labels uint8 [N, S, S], 255 where the case has none;
    volume [N], the number of the case; slice [N] = i; depth [N] = V; position [N] = (i + 1) / V in
    (0, 1]; first: the first slice of each case; info: what `prepare` wrote in index.json.
    """
    def __init__(self, folder):
        self.info = json.loads((folder / "index.json").read_text())
        slices = np.array([c["shape"][0] for c in self.info["cases"]])     # V of each case
        N, C, S = slices.sum(), self.info["channels"], self.info["size"]
        self.images = np.memmap(folder / "images.raw", np.float16, "r", shape=(N, C, S, S))
        self.labels = np.memmap(folder / "labels.raw", np.uint8, "r", shape=(N, S, S))
        self.volume = np.repeat(np.arange(len(slices)), slices)            # [N]
        self.depth = slices[self.volume]                                   # [N]
        self.first = np.cumsum(slices) - slices
        self.slice = np.arange(N) - self.first[self.volume]                # [N]
        self.position = ((self.slice + 1) / self.depth).astype(np.float32)

    def of_patients(self, patients, labelled=False):
        """Numbers of the slices of these patients, in order; `labelled`: of cases with a label."""
        patients = set(patients)
        take = []
        for case in self.info["cases"]:
            take.append(case["patient"] in patients and (case["labelled"] or not labelled))
        return np.flatnonzero(np.array(take, bool)[self.volume])

    def image(self, numbers, device="cpu"):
        """Images of these slices, float32 [B, C, S, S] in [0, 1]."""
        return torch.from_numpy(self.images[numbers]).to(device).float()

    def label(self, numbers, device="cpu"):
        """Labels of these slices, int64 [B, S, S]."""
        return torch.from_numpy(self.labels[numbers]).to(device).long()


def digest(content):
    """Sixteen letters that stand for lists, dicts, numbers and strings."""
    return hashlib.sha1(json.dumps(content).encode()).hexdigest()[:16]


def voxel_digest(image):
    """Sixteen letters that stand for the voxels of a scan, in whatever file and order they are.

    How often each grey value occurs, from the darkest on: so a copy that was compressed anew,
    stored as another type, turned, flipped or scaled has the same; one that was resampled, cropped
    or clipped has not.
    """
    _, counts = np.unique(image, return_counts=True)
    return hashlib.sha1(counts.astype(np.int64)).hexdigest()[:16]


def prepare(cases, target, size, cache):
    """The `SliceDataset` of `cases` at `target` mm and `size` pixels, from the folder `cache`.

    Made there if it is not yet. Its key holds every file's name, size and time and the options, so
    that a change of either makes it anew. Raises DataError.
    """
    files = []
    for case in cases:
        files.extend(case.files)
        if case.label:
            files.append(case.label)
    try:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); "
                        "bring it there or remove the case") from None
    key = digest([CACHE_VERSION, stats, target, size, cases.classes, cases.ranges, cases.modality,
                  cases.channels])
    folder = Path(cache) / key
    if (folder / "index.json").is_file():
        return SliceDataset(folder)
    partial = folder.with_name(f"{key}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)                     # a killed process of this number
    try:
        partial.mkdir(parents=True)
        _write_slices(cases, target, size, partial)
        os.replace(partial, folder)
    except OSError as error:
        if not (folder / "index.json").is_file():                  # else another run was faster
            raise DataError(f"{partial}: cannot write the cache ({error.strerror}); "
                            "free space or give --cache") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SliceDataset(folder)


def _network_label(label, spacing, target, size, classes):
    """A label map [V, H, W] on the network grid, uint8 [V, S, S]: one-hot, resampled, arg max."""
    out = np.empty((len(label), size, size), np.uint8)
    for v in range(len(label)):
        one = torch.from_numpy(label[v:v + 1]).long()
        one_hot = F.one_hot(one, classes).movedim(-1, 1).float()           # [1, K, H, W]
        placed = to_network(one_hot, spacing, target, size)[0]             # [K, S, S]
        placed[0] += 1e-3                                          # padding, all 0, is background
        out[v] = placed.argmax(0).byte().numpy()
    return out


def _write_slices(cases, target, size, folder):
    """Write images.raw, labels.raw and index.json, one volume in memory at a time."""
    index = []
    with open(folder / "images.raw", "wb") as images, open(folder / "labels.raw", "wb") as labels:
        for case in tqdm(cases, "prepare", leave=False, disable=None):
            volume = read_case(case, cases)
            x = torch.from_numpy(normalise(volume.image, cases.modality))  # [C, V, H, W]
            x = to_network(x.movedim(1, 0), volume.spacing, target, size)  # [V, C, S, S]
            images.write(x.clamp(0, 1).half().numpy().tobytes())
            y = np.full((len(x), size, size), 255, np.uint8)               # 255: no label
            if volume.label is not None:
                y = _network_label(volume.label, volume.spacing, target, size, len(cases.classes))
            labels.write(y.tobytes())
            index.append({"name": case.name, "patient": case.patient,
                          "shape": list(volume.image.shape[1:]), "spacing": list(volume.spacing),
                          "labelled": volume.label is not None,
                          "voxels": voxel_digest(volume.image),
                          "hounsfield": all(in_hounsfield(c) for c in volume.image)})
    info = {"cases": index, "channels": cases.channels, "target": target, "size": size}
    (folder / "index.json").write_text(json.dumps(info))


# -------------------------------------------------------------------------- slices to pre-train on


class Pool:
    """The slices that pre-training draws from, of one dataset or of several, numbered from 0.

    parts: [(SliceDataset, numbers of its slices)], whole volumes in order. slice, depth, position
    [N] and `image` as in `SliceDataset`; volume [N], counted through all sets; numbers [N]: 0, 1,
    2, ... Positions of the k-th dataset have 2 k added, so that none is close to one of another
    set: half-way up a heart is not half-way up an abdomen (ours).
    """
    def __init__(self, parts):
        def joined(name):
            return np.concatenate([getattr(dataset, name)[n] for dataset, n in parts])

        self.datasets = [dataset for dataset, _ in parts]
        self.part = np.repeat(np.arange(len(parts)), [len(n) for _, n in parts])       # [N]
        self.inside = np.concatenate([n for _, n in parts])        # [N]: number in its dataset
        self.slice = joined("slice")
        self.depth = joined("depth")
        self.position = joined("position").astype(float) + 2 * self.part
        self.volume = np.cumsum(self.slice == 0) - 1               # [N], counted through
        self.numbers = np.arange(len(self.part))

    def image(self, numbers, device="cpu"):
        """Images of these slices, float32 [B, C, S, S] in [0, 1]."""
        part = self.part[numbers]                                  # [B]
        images = []
        for k, dataset in enumerate(self.datasets):
            images.append(dataset.image(self.inside[numbers][part == k], device))
        order = part.argsort(kind="stable")                        # as the images stand now
        return torch.cat(images)[order.argsort()]


def find_sources(run):
    """The scans of --pretrain-data, a `Cases` a folder; without labels, unless it is --data itself.

    Makes them a part of what the run is (o.pretrain_cases). Raises DataError.
    """
    paths = getattr(run.o, "pretrain_data", [])                    # not all scripts ask
    refuse([
        (paths and run.o.init, "--pretrain-data: with --init there is no pre-training; drop one"),
        (len({Path(p).resolve() for p in paths}) < len(paths),
         "--pretrain-data: give every folder once"),
    ])
    sources = []
    for path in paths:
        own = Path(path).resolve() == run.root.resolve()
        cases = run.cases if own else find_cases(path)
        if cases.channels != run.channels:
            raise DataError(f"{path}: {cases.channels} channels, {run.root} has {run.channels}; "
                            "leave it out of --pretrain-data")
        if not own:
            # labels are neither read nor missed
            cases[:] = [replace(case, label=None) for case in cases]
            cases.warnings = [w for w in cases.warnings if " label" not in w]
        sources.append(cases)
    if paths:
        run.o.pretrain_cases = digest([[case.name for case in cases] for cases in sources])
    return sources


def pretraining_slices(run, dataset):
    """The `Pool` that pre-training draws from; dataset: the slices of --data at its size.

    Without --pretrain-data the training slices of --data. Else all of the folders named (of --data
    itself the training patients), less every patient of whom a scan has the voxels of a validation
    or test case of --data, wherever it lies, or whose name is that of such a patient: a copy that
    was resampled and renamed is not recognised. Every slice counts the same, so a large set counts
    more. Prints what came from where. Raises DataError.
    """
    o = run.o
    split = run.split
    if not run.sources:
        return Pool([(dataset, run.train)])
    held_out = set(split["val"] + split["test"])                   # patients
    voxels = {c["voxels"] for c in dataset.info["cases"] if c["patient"] in held_out}
    parts = []
    for path, cases in zip(o.pretrain_data, run.sources):
        source = dataset
        patients = set(split["train"])
        if cases is not run.cases:
            source = prepare(cases, o.spacing, dataset.info["size"], o.cache)
            patients = {case.patient for case in cases}
        copies = {c["patient"] for c in source.info["cases"]
                  if c["voxels"] in voxels or c["patient"] in held_out}
        numbers = source.of_patients(patients - copies)
        if len(numbers) == 0:
            raise DataError(f"{path}: nothing is left to pre-train on; "
                            "leave it out of --pretrain-data")
        parts.append((source, numbers))
        print(f"pre-training on {path}: {_source_text(source, numbers)}, {cases.modality}")
        if patients & copies:
            names = [case.name for case in cases if case.patient in patients & copies]
            print(f"left out, being a validation or test case of {run.root} or of the same patient "
                  f"as one: {', '.join(names)}")
        if cases is not run.cases:
            for warning in scan_warnings(cases, source):
                print(f"warning: {warning}")
    return Pool(parts)


def _source_text(source, numbers):
    """How many volumes and slices these are, and how much of a volume lies outside the crop."""
    target, size = source.info["target"], source.info["size"]
    outside = []
    for n in np.unique(source.volume[numbers]):
        case = source.info["cases"][n]
        rows, columns = resampled(case["shape"], case["spacing"], target)
        outside.append(1 - min(size, rows) * min(size, columns) / (rows * columns))
    return (f"{len(outside)} volumes, {len(numbers)} slices; on average {np.mean(outside):.0%} of "
            f"a volume lies outside the crop of {size} x {size} pixels of {target} mm, at most "
            f"{max(outside):.0%}")


def scan_warnings(cases, dataset):
    """What is odd about the scans, a line each: files left aside, silent headers, odd CT."""
    not_hu = []
    for case in dataset.info["cases"]:
        if cases.modality == "CT" and not case["hounsfield"]:
            not_hu.append(case["name"])
    silent = header_warnings([case.image for case in cases])
    return cases.warnings + silent + hounsfield_warnings(not_hu)


# ----------------------------------------------------------------------------------- augmentation


def uniform(n, lo, hi, device):
    """n numbers in [lo, hi), drawn on the CPU so that every device sees the same."""
    return (lo + (hi - lo) * torch.rand(n)).to(device)


def photometric(x):
    """Random gamma, contrast, brightness, bias field, blur and noise, each image its own.

    x [B, C, S, S], about [0, 1]; the same shape is returned.
    """
    def draw(lo, hi):
        return uniform(len(x), lo, hi, x.device)[:, None, None, None]      # [B, 1, 1, 1]

    x = x.clamp(0, 1) ** draw(-.5, .5).exp()
    x = (x - .5) * draw(.7, 1.3) + .5 + draw(-.15, .15)
    field = torch.randn(len(x), 1, 4, 4).to(x.device) * .2
    field = F.interpolate(field, x.shape[-2:], mode="bicubic")             # [B, 1, S, S]
    x = x * field.exp()
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), draw(-1, 1).clamp(min=0))
    return x + torch.randn(x.shape).to(x.device) * draw(-.05, .08).clamp(min=0)


def spatial_grid(n, size, rotation, device, elastic=.03):
    """Sampling grids [n, S, S, 2] of random affine maps and elastic waves.

    rotation: the largest angle in rad; scale e^(-0.25 ... 0.25), shifts of up to 0.1 and waves of
    std `elastic`, both of the half width.
    """
    angle = uniform(n, -rotation, rotation, device)
    scale = uniform(n, -.25, .25, device).exp()
    cos = angle.cos() * scale
    sin = angle.sin() * scale
    dy = uniform(n, -.1, .1, device)
    dx = uniform(n, -.1, .1, device)
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)   # [n, S, S, 2]
    waves = torch.randn(n, 2, 5, 5).to(device) * elastic
    waves = F.interpolate(waves, (size, size), mode="bicubic")             # [n, 2, S, S]
    return grid + waves.movedim(1, -1)


def warp(x, grid, mode="bilinear"):
    """Images [B, C, S, S], or labels [B, S, S] with mode "nearest", at the grid [B, S, S, 2].

    Outside is 0.
    """
    if x.ndim == 3:
        moved = F.grid_sample(x[:, None].float(), grid, mode, align_corners=False)
        return moved[:, 0].long()
    return F.grid_sample(x, grid, mode, align_corners=False)


TIE = 1e-6                      # positions are float32: two that differ by t exactly count as close


def is_close(position, threshold):
    """Which slices lie at a like position: position [n] -> bool [n, n].

    |pos_a - pos_b| < t, and ties count as close (ours), or rounding would decide about them: of 10
    slices and t = 0.1 every next neighbour is a tie. threshold: t, one number, or that of each
    slice [n], the same for all slices of a set.
    """
    position = torch.as_tensor(position)
    t = torch.as_tensor(threshold, dtype=torch.float64).view(-1, 1)        # [1, 1] or [n, 1]
    away = (position[:, None] - position[None]).abs()              # [n, n]
    return away < t + TIE


def random_slices(numbers, n):
    """n of the slice numbers, drawn with replacement from torch's generator: [n]."""
    return numbers[torch.randint(len(numbers), (n,)).numpy()]


def channels_last(x):
    """The same tensor with its channels last in memory, which is faster for convolutions.

    Left as it is on mps, where the backward pass of batch normalisation is wrong for it (2.13).
    """
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)


def labelled_batch(run, numbers, n):
    """n random slices of `numbers`, moved and recoloured: image [n, C, S, S], label [n, S, S]."""
    pick = random_slices(numbers, n)
    grid = spatial_grid(n, run.o.size, run.o.rotation, run.device)         # [n, S, S, 2]
    label = warp(run.dataset.label(pick, run.device), grid, "nearest")
    image = photometric(warp(run.dataset.image(pick, run.device), grid))
    return channels_last(image), label


def cosine(step, steps):
    """The share of a learning rate at `step`: half a cosine from 1 to 0."""
    return .5 * (1 + math.cos(math.pi * step / steps))


# -------------------------------------------------------------------------- prediction and scores


@torch.no_grad()
def predict(unet, images, shape, spacing, target, precision=torch.float32):
    """Label int64 [V, H, W] on the native grid of slices [V, C, S, S]; keeps the network's mode."""
    training = unet.training
    unet.eval()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        probs = [unet(x).float().softmax(1) for x in images.split(32)]
    unet.train(training)
    return to_native(torch.cat(probs), shape, spacing, target)     # of [V, K, S, S]


def score(net, run):
    """Score every labelled volume of --split at its own resolution: a row a volume and class."""
    dataset, classes = run.dataset, run.classes
    rows = []
    for n, (case, info) in enumerate(zip(run.cases, dataset.info["cases"])):
        if case.patient not in run.split[run.o.split] or not info["labelled"]:
            continue
        slices = dataset.first[n] + np.arange(info["shape"][0])
        images = dataset.image(slices, run.device)                 # [V, C, S, S]
        pred = predict(net, images, info["shape"], info["spacing"], run.o.spacing, run.dtype)
        pred = pred.cpu().numpy()                                  # [V, H, W]
        truth = read_label(case, run.cases)
        for k, dice in dice_score(pred, truth, range(1, len(classes))).items():
            hd95, assd = surface_distances(pred == k, truth == k, info["spacing"])
            missed = math.isnan(hd95) and not math.isnan(dice)
            rows.append({"case": case.name, "patient": case.patient, "class": classes[k],
                         "dice": dice, "hd95_mm": hd95, "assd_mm": assd, "missed": int(missed)})
    return rows


RULE = ("Dice per volume and class at the volume's own resolution, mean over volumes, then over "
        "foreground classes; HD95 (larger directed 95th percentile) and ASSD in mm; absent in "
        "both: left out; absent in one: Dice 0, no distance, 'missed'")


LOOK_ROWS = "the networks of the rows asked for."


def nanmean(values):
    """Mean of the values that are not nan; nan if there are none."""
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def spread(values):
    """Standard deviation (n - 1) of the values that are not nan; nan if fewer than two."""
    values = [v for v in values if not math.isnan(v)]
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def run_row(row, patients, rows):
    """One row of metrics.json from the rows of `score`."""
    classes = list(dict.fromkeys(r["class"] for r in rows))

    def mean(key):
        of_class = {k: nanmean([r[key] for r in rows if r["class"] == k]) for k in classes}
        return of_class, nanmean(of_class.values())

    dice, mean_dice = mean("dice")
    return {"method": row.method, "labelled": row.labelled, "seed": row.seed, "patients": patients,
            "dice": dice, "mean_dice": mean_dice, "hd95_mm": mean("hd95_mm")[1],
            "assd_mm": mean("assd_mm")[1], "missed": sum(r["missed"] for r in rows),
            "n_scores": sum(not math.isnan(r["dice"]) for r in rows),
            "n_volumes": len({r["case"] for r in rows})}


def summarise(runs, baseline="scratch"):
    """Mean and std over seeds for each (method, labelled), and the gain over the baseline.

    Returns (summary, gains), two lists of dicts.
    """
    summary = []
    gains = []
    for method, labelled in dict.fromkeys((r["method"], r["labelled"]) for r in runs):
        same = [r for r in runs if (r["method"], r["labelled"]) == (method, labelled)]
        row = {"method": method, "labelled": labelled, "n": len(same),
               "missed": sum(r["missed"] for r in same),
               "n_scores": sum(r["n_scores"] for r in same)}
        columns = {k: [r["dice"][k] for r in same] for k in same[0]["dice"]}
        for key in ("mean_dice", "hd95_mm", "assd_mm"):
            columns[key] = [r[key] for r in same]
        for key, values in columns.items():
            row[key] = {"mean": nanmean(values), "std": spread(values)}
        summary.append(row)
        base = {}
        for r in runs:
            if (r["method"], r["labelled"]) == (baseline, labelled):
                base[r["seed"]] = r["mean_dice"]
        diff = [r["mean_dice"] - base[r["seed"]] for r in same if r["seed"] in base]
        if diff and method != baseline:
            gains.append({"method": method, "labelled": labelled, "gain": nanmean(diff),
                          "per_seed": diff, "std": spread(diff)})
    return summary, gains


def _cell(mean, std, form, factor=1):
    """A number of a table: the mean, and ± std where there is one."""
    text = f"{factor * mean:{form}}"
    return text if math.isnan(std) else f"{text} ± {factor * std:{form.strip('+')}}"


def table(summary, gains, classes):
    """The summary as a Markdown table; Dice in [0, 1], gain in Dice points."""
    heads = ["labelled", "method", *classes[1:], "mean Dice", "HD95 mm", "ASSD mm", "missed"]
    heads.append("gain")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    gain = {(g["method"], g["labelled"]): _cell(g["gain"], g["std"], "+.1f", 100) for g in gains}
    for r in sorted(summary, key=lambda r: r["labelled"]):
        cells = [str(r["labelled"]), r["method"]]
        for key in (*classes[1:], "mean_dice"):
            cells.append(_cell(r[key]["mean"], r[key]["std"], ".3f"))
        for key in ("hd95_mm", "assd_mm"):
            cells.append(_cell(r[key]["mean"], r[key]["std"], ".1f"))
        cells += [f"{r['missed']} of {r['n_scores']}", gain.get((r["method"], r["labelled"]), "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------- files and checkpoints


@contextmanager
def writing(path):
    """Turn an OSError of the block into one line that names the file and the way on."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or give another "
                        "--out; what was written before is intact, go on with --resume") from None


def write_atomic(path, content):
    """Write bytes or text under a temporary name, then rename: a kill leaves no half file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    content = content.encode() if isinstance(content, str) else content
    with writing(path):
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_csv(path, rows):
    """A table from a list of dicts, atomically; the keys of the first are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def make_folder(path):
    """Make a folder for results, with those above it; returns it. Raises DataError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def save_checkpoint(path, **content):
    """torch.save, atomically. Tensors, numbers, strings, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, method=None, options=None):
    """The content of a checkpoint. DataError if unreadable, of another `method` or `options`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kind, made = content["method"], content["options"]
    except Exception as error:                                     # torch raises half a dozen kinds
        raise DataError(f"{path}: not a checkpoint of this project ({type(error).__name__}); "
                        "give another file") from None
    if method and kind != method:
        raise DataError(f"{path}: checkpoint of {kind}, not of {method}; "
                        f"use {kind}'s script or another file")
    for key, value in (options or {}).items():
        if made.get(key) != value:
            raise DataError(f"{path}: made with {key} = {made.get(key)}, now {value}; "
                            "use the same options, or another --out, --scratch or --init")
    return content


def load_start(o, unet):
    """--init: the content of a pretrained.pt of any method, if its weights fit `unet`.

    It may be of other scans. Then no one knows whether test patients of this run are among them,
    and that is said.
    """
    path = o.init
    start = load_checkpoint(path)
    if "parts" not in start:
        raise DataError(f"{path}: holds no weights to start from; give a pretrained.pt")
    taken, fresh = load_weights(unet, start["unet"], start["parts"])
    layers = dict.fromkeys(".".join(k.split(".")[:-1][:3]) for k in fresh)     # as decoder.blocks.3
    print(f"{path}: {start['method']} gives {len(taken)} tensors ({', '.join(start['parts'])}); "
          f"{len(fresh)} start fresh ({', '.join(layers)})")
    made = start["options"]
    if made.get("cases") != o.cases:
        print(f"{path}: pre-trained on other scans or another split; whether patients scored here "
              "were among them is not checked (--pretrain-data does)")
    return start


# ---------------------------------------------------------------------------------------- options

# What a resumed run may change: where things lie, what is printed or drawn, and which rows it has.
FREE = {"resume", "device", "cache", "out", "predict", "checkpoint", "scratch", "paper", "given",
        "method", "save_every", "labelled", "seeds", "mean_teacher", "no_peek", "peek_every",
        "rows", "workers", "claims", "arguments"}

# What the row "scratch" depends on, in every script; with equal ones it can be read by --scratch.
BASELINE = ["data", "cases", "split", "precision", "width", "depth", "spacing", "size", "steps",
            "batch", "lr", "rotation", "base_views"]


def _add_run_options(group, method):
    """The options that all scripts share and no paper names."""
    add = group.add_argument
    add("--data", help="folder of a dataset (default: the phantom, made on the first run)")
    add("--out", default=f"runs/{method}", help="new folder for results [%(default)s]")
    add("--cache", default="cache", help="folder for what is prepared once [%(default)s]")
    add("--split", choices=["test", "val"], default="test",
        help="patients to score [%(default)s]; choose options on val")
    add("--resume", action="store_true", help="go on with the run in --out; it may have more rows")
    add("--rows", nargs="+", metavar="ROW", help="train these rows of the table only, as: scratch "
        "(default: all; those that are done are read)")
    add("--workers", type=int, default=1, metavar="N", help="train N rows at once, in processes of "
        "their own that share the threads, or the GPU [%(default)s]")
    add("--claims", help=argparse.SUPPRESS)                        # how a run tells its workers
    add("--save-every", type=int, default=200, help="steps between saves [%(default)s]")
    add("--init", metavar="FILE", help="start from this pretrained.pt (no pre-training here)")
    add("--scratch", metavar="RUN", help="read the rows that need no pre-training out of this "
        "finished run of any method; train those that it does not have")
    add("--predict", nargs="+", metavar="IMAGE", help="segment these NIfTI files into "
        "--out/predictions")
    add("--checkpoint", metavar="FILE", help="the network for --predict")
    add("--device", default="auto", help="auto (cuda, else cpu), cuda, cuda:1, mps or cpu "
        "[%(default)s]")
    add("--precision", choices=["float32", "bfloat16"], default="float32",
        help="bfloat16: convolutions under autocast, twice as fast where the processor has it "
        "[%(default)s]")


def _shown(value):
    """A value of the table as it is typed: 1 3 7 for a list, four digits of a number; on, off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _add_table(group, table, source):
    """One flag a line of the table; its help shows our value, the phantom's and the source's."""
    for name, real, phantom, paper, text in table:
        known = [v for v in (real, phantom, paper) if v is not None]
        kind = known[0] if known else ""
        values = ["by the data" if real is None else _shown(real)]
        if phantom is not None:
            values.append(f"phantom: {_shown(phantom)}")
        if paper is not None:
            values.append(f"{source}: {_shown(paper)}")
        settings = {"help": f"{text} [{'; '.join(values)}]", "default": argparse.SUPPRESS}
        if isinstance(kind, bool):
            settings["action"] = "store_true"
        elif kind == []:                                           # none, until folders are named
            settings.update(nargs="+", metavar="PATH")
        elif isinstance(kind, list):
            settings.update(type=type(kind[0]), nargs="+", metavar="N")
        else:
            settings.update(type=type(kind), metavar=type(kind).__name__.upper())
        settings["help"] = settings["help"].replace("%", "%%")
        group.add_argument("--" + name.replace("_", "-"), **settings)


def parse_options(method, doc, table, arguments=None, paper_also="", source="paper"):
    """The options of a run, from the command line and the script's table.

    table: lines of (name, on real data, on the phantom, in the paper, what it is). None in the
    second column: decided by the data; in the third: as on real data; in the fourth: not known.
    Without --data the phantom's column is taken, with --paper the paper's; what is typed wins.
    paper_also: what is published and no number can set; --paper prints it. source: whose numbers
    the fourth column has, the paper's, its code's or its base's.
    """
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_run_options(p.add_argument_group("run"), method)
    published = any(line[3] is not None for line in table)
    columns = "on real data; on the phantom" + f"; in the {source}" * published
    _add_table(p.add_argument_group(f"{method}.py [{columns}]"), table, source)
    if published:
        p.add_argument("--paper", action="store_true", help=f"take the numbers of the {source}, "
                       "for a GPU; what is typed wins")
    o = p.parse_args(arguments)
    o.paper = getattr(o, "paper", False)
    o.method = method
    o.given = set(vars(o))
    o.arguments = sys.argv[1:] if arguments is None else arguments
    for name, real, phantom, paper, _ in table:
        value = real
        if not o.data and phantom is not None:
            value = phantom
        if o.paper and paper is not None:
            value = paper
        setattr(o, name, getattr(o, name, value))
    if o.paper and paper_also:
        print(f"--paper sets numbers only; published is also {paper_also}")
    return o


def refuse(problems):
    """Raise DataError with the first message of [(wrong, message)] whose `wrong` is true."""
    for wrong, message in problems:
        if wrong:
            raise DataError(message)


def pick_device(name="auto"):
    """The torch device: cuda, else cpu; or the one named, if it is there (DataError).

    mps is taken only where it is named: nobody has run these scripts on it.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    known = not number or (number.isascii() and number.isdigit())
    if not known or int(number or 0) >= there.get(kind, 0):
        found = [k for k, n in there.items() if n]
        found += [f"cuda:{n}" for n in range(1, there["cuda"])]
        raise DataError(f"--device {name}: not available here; use one of {', '.join(found)}")
    return torch.device("cuda:0" if name == "cuda" else name)      # as its tensors say


def emulates_bfloat16(device):
    """Whether the device is a GPU that has no bfloat16 of its own and would be slower with it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


def clock(device):
    """Seconds since some moment, once the device has done what it was given.

    A GPU works on after the call that gave it something to do has returned.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.monotonic()


def peak_memory(device):
    """The most memory that was in use so far: {"peak_memory_mb"}, on a GPU "peak_gpu_memory_mb".

    MB of 2^20 bytes, of this process, or of the largest of its --workers that have ended; of a GPU
    of this process alone.
    """
    unit = 1024 if platform.system() == "Linux" else 1024 ** 2     # of ru_maxrss: KiB, or bytes
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(who).ru_maxrss for who in both)
    memory = {"peak_memory_mb": round(most / unit)}
    if device.type == "cuda":
        memory["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    return memory


# ------------------------------------------------------------------------------------------ a run


class Row(NamedTuple):
    """A row of the table: one network to train."""
    method: str
    labelled: int
    seed: int

    @property
    def name(self):
        return f"{self.method}_n{self.labelled}_s{self.seed}"


class Run:
    """One run of a script: what every function would otherwise be handed one by one.

    o options, device, dtype, cases, classes (names), channels, split; after `begin` also dataset,
    train (numbers of all training slices, labelled or not) and out (folder). A script calls it; it
    calls no script.
    """
    def __init__(self, o):
        """Find the data (or make the phantom), fill in what depends on it, check, load --init.

        The run's own folder is not touched yet.
        """
        self.o = o
        self.device = pick_device(o.device)
        torch.backends.cudnn.deterministic = True                  # of a GPU's convolutions
        self.dtype = getattr(torch, o.precision)
        self.root = Path(o.data) if o.data else Path(o.cache) / f"phantom-{PHANTOM_VERSION}"
        if not o.data and not self.root.exists():
            make_phantom(self.root)
        self.cases = find_cases(self.root)
        self.classes = self.cases.classes
        self.channels = self.cases.channels
        self.split = split_patients(self.cases)
        if o.spacing is None or o.size is None:
            spacing, size = default_grid(self.cases)
            o.spacing = spacing if o.spacing is None else o.spacing
            o.size = size if o.size is None else o.size
        o.depth = getattr(o, "depth", 4)                           # not all scripts ask
        o.base_views = getattr(o, "base_views", False)
        who = [[case.name, case.patient, bool(case.label)] for case in self.cases]
        o.cases = digest([who, self.split])                        # other scans: another run
        self.check()
        self.sources = find_sources(self)                          # of --pretrain-data
        self.start = load_start(o, self.unet()) if o.init else None
        self.baselines = {"scratch": BASELINE}                     # rows that --scratch may read
        self.runs = []                                             # rows of metrics.json
        self.volume_rows = []                                      # rows of per_volume.csv
        self.seconds = 0.                                          # of the last training loop
        if o.claims:                                               # of a worker: its parent's
            self.parent = int(Path(o.claims).name.split("-")[1])

    def check(self):
        """Fit the default --labelled to the data; refuse what is impossible. Raises DataError."""
        o, most = self.o, len(self.split["labelled"])
        unit = 2 ** o.depth
        if "labelled" not in o.given:                              # not typed: fewer, no refusal
            fewer = [n for n in o.labelled if n <= most] or [most]
            if fewer != o.labelled:
                print(f"--labelled {_shown(fewer)}: only {most} training patients have labels")
            o.labelled = fewer
        for name, value in vars(o).items():
            flag = f"--{name.replace('_', '-')} {value}"
            if isinstance(value, float):
                refuse([(not math.isfinite(value), f"{flag}: use a finite number"),
                        (name.endswith("lr") and value < 0, f"{flag}: use 0 or more")])
        refuse([
            (len(set(o.labelled)) < len(o.labelled) or len(set(o.seeds)) < len(o.seeds),
             "--labelled, --seeds: give every number once"),
            (o.size % unit or o.size < 2 * unit,
             f"--size {o.size}: use a multiple of {unit}, {2 * unit} or more"),
            (o.spacing <= 0, f"--spacing {o.spacing}: use mm above 0"),
            (o.width < 1, f"--width {o.width}: use 1 or more"),
            (max(o.labelled) > most,
             f"--labelled {max(o.labelled)}: only {most} training patients have labels"),
            (min(o.steps, o.save_every, o.batch, o.workers, *o.labelled) < 1,
             "--steps, --save-every, --batch, --workers and --labelled must be 1 or more"),
            (o.scratch and not Path(o.scratch).is_dir(),
             f"--scratch {o.scratch}: is not the folder of a run"),
            (o.precision == "bfloat16" and emulates_bfloat16(self.device),
             f"--precision bfloat16: {self.device} only emulates it; use float32"),
        ])

    def unet(self, classes=None):
        """A U-Net of this run's channels, width and depth, with random weights."""
        classes = classes or len(self.classes)
        return UNet(self.channels, classes, self.o.width, self.o.depth)

    def patients(self, n):
        """The n labelled patients of a row: the first in the split's order. (Pix2Rep: by group.)"""
        return self.split["labelled"][:n]

    def kept(self):
        """The options that a checkpoint must share to belong to this run."""
        return {k: v for k, v in vars(self.o).items() if k not in FREE}

    def begin(self):
        """Prepare the slices, make the folder with options.json, and print what was found."""
        o, split = self.o, self.split
        self.dataset = prepare(self.cases, o.spacing, o.size, o.cache)
        self.train = self.dataset.of_patients(split["train"])
        for row in self.all_rows(self.baselines):
            self.shared(row)                                       # raises if it does not fit
        if o.claims:                                               # a worker: its parent began
            self.out = Path(o.out)
            return
        self.out = start_run(o.out, vars(o), o.resume)
        self.begun = clock(self.device)
        self.note_start()
        print(f"{self.root}: {self.cases.layout}, {len(self.cases)} volumes, "
              f"{len(self.dataset.volume)} slices, classes {', '.join(self.classes)}")
        for warning in scan_warnings(self.cases, self.dataset):
            print(f"warning: {warning}")
        print(f"split {split['rule']}: {len(split['train'])} train ({len(self.train)} slices), "
              f"{len(split['val'])} val, {len(split['test'])} test")
        for n in o.labelled:
            print(f"{n} of {len(split['labelled'])} labelled: {' '.join(self.patients(n))}")
        print(f"options {self.kept()}\non {self.device}, {torch.get_num_threads()} threads")
        if self.device.type != "cpu":
            print("a GPU repeats a run nearly, not to the last digit: its sums have no fixed order")

    def note_start(self):
        """Add a line to run.txt: commit, command, machine; a run that ends adds its minutes."""
        o = self.o
        path = self.out / "run.txt"
        before = path.read_text() if path.exists() else ""
        typed = " ".join(map(str, o.arguments))
        workers = f", {o.workers} workers" if o.workers > 1 else ""
        self.started = f"{before}commit {commit()}; python {o.method}.py {typed}; "
        self.started += machine(self.device) + workers
        write_atomic(path, self.started + "\n")

    def autocast(self):
        """The context in which networks run: float32, or bfloat16 with --precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, net):
        """The network on the run's device, its convolutions' channels last (see channels_last)."""
        if self.device.type == "mps":
            return net.to(self.device)
        return net.to(self.device, memory_format=torch.channels_last)

    def log(self, phase, **values):
        """Append one JSON line to log.jsonl; tensors are read. DataError if one is not finite."""
        row = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.item()
                if not math.isfinite(value):
                    raise DataError(f"{phase}, step {values.get('step')}: {name} is {value}; "
                                    "use a lower rate, and another --out")
            row[name] = value
        log(self.out, phase=phase, **row)

    # ------------------------------------------------------------ training

    def steps(self, phase, total, modules, optimiser):
        """The steps of a training loop that are still to do: resumed, with a bar, saved as it goes.

        phase: "pretrain" or the name of a row. modules: all that has weights or state.
        """
        name = "pretraining.pt" if phase == "pretrain" else f"finetuning_{phase}.pt"
        path = self.out / name
        begun = clock(self.device)
        first = 0
        if self.o.resume and path.exists():
            state = load_checkpoint(path, self.o.method, self.kept())
            first = resume_training(state, modules, optimiser)
            begun -= state["seconds"]                              # of the runs before
        for step in trange(first, total, initial=first, total=total, desc=phase, disable=None):
            yield step
            if self.o.claims and os.getppid() != self.parent:      # a worker's parent was killed
                sys.exit(1)
            if (step + 1) % self.o.save_every == 0 or step == total - 1:
                save_checkpoint(path, method=self.o.method, options=self.kept(),
                                seconds=clock(self.device) - begun,
                                **training_state(step + 1, modules, optimiser))
        self.seconds = clock(self.device) - begun
        self.log(phase, seconds=self.seconds)

    def pretrained(self):
        """What there is to start from: --init, or the pretrained.pt of a resumed run; else None."""
        path = self.out / "pretrained.pt"
        if self.start is None and self.o.resume and path.exists():
            self.start = load_checkpoint(path, self.o.method, self.kept())
        return self.start

    def save_pretrained(self, **content):
        """Write pretrained.pt and return what it holds, with tensors on the CPU."""
        path = self.out / "pretrained.pt"
        save_checkpoint(path, method=self.o.method, options=self.kept(), **content)
        return load_checkpoint(path)

    # ------------------------------------------------------------ rows

    def choose(self, *methods):
        """The rows of the script's table, or those of them that --rows names. Raises DataError."""
        chosen = self.o.rows or methods
        for method in chosen:
            refuse([(method not in methods,
                     f"--rows {method}: is no row of this run; use some of {', '.join(methods)}")])
        self.methods = methods
        self.chosen = chosen
        return chosen

    def rows(self):
        """The rows that are still to be trained, one after another; finished ones are read."""
        if self.o.claims:
            yield from self.claimed_rows()
            sys.exit()                                             # the parent does the rest
        if self.o.scratch:
            self.note_missing()
        workers = Workers(self) if self.o.workers > 1 else None
        for row in self.all_rows(self.methods):
            wanted = row.method in self.chosen
            if workers and wanted and self.shared(row) is None:
                workers.wait(self.out / f"{row.name}.pt")
            content = self.finished(row)
            if content is not None:
                self.collect(row, content)
            elif wanted:
                yield row
        if workers:
            workers.end()

    def note_missing(self):
        """Print which baselines --scratch lacks."""
        for row in self.all_rows(self.baselines):
            if self.checkpoint(row).exists():
                continue
            if row.method in self.chosen:
                print(f"{row.name}: not in {self.o.scratch}, so it is trained here")
            elif row.method == "scratch":
                print(f"{row.name}: not in {self.o.scratch}, so nothing is compared with it")

    def claimed_rows(self):
        """The rows that this worker is the first to take; its parent collects them."""
        for row in self.all_rows(self.chosen):
            if self.finished(row) is None and claim(self.o.claims, row):
                yield row

    def all_rows(self, methods):
        """The rows of these methods in the order of the table."""
        o = self.o
        return [Row(m, n, seed) for n in o.labelled for seed in o.seeds for m in methods]

    def checkpoint(self, row):
        """Where the network of a done row lies: in the run, or a baseline's in --scratch."""
        path = self.out / f"{row.name}.pt"
        if path.exists() or not self.o.scratch or row.method not in self.baselines:
            return path
        return Path(self.o.scratch) / path.name

    def load_row(self, path, method, options):
        """The checkpoint of a row; DataError if of another `method`, `options` or classes."""
        content = load_checkpoint(path, method, options)
        if content["classes"] != self.classes:
            raise DataError(f"{path}: its classes are {', '.join(content['classes'])}, now "
                            f"{', '.join(self.classes)}; use another --out, or no --scratch")
        return content

    def shared(self, row):
        """The checkpoint of a row in --scratch, or None. DataError if made otherwise."""
        if not self.o.scratch or row.method not in self.baselines:
            return None
        path = Path(self.o.scratch) / f"{row.name}.pt"
        if not path.exists():
            return None
        options = self.kept()
        content = self.load_row(path, None, {k: options[k] for k in self.baselines[row.method]})
        if content["patients"] != self.patients(row.labelled):
            raise DataError(f"{path}: trained on {' '.join(content['patients'])}, this run takes "
                            f"{' '.join(self.patients(row.labelled))}; leave out --scratch")
        return content

    def finished(self, row):
        """The checkpoint of a row that is done, here (--resume) or in --scratch; else None."""
        path = self.out / f"{row.name}.pt"
        if (self.o.resume or self.o.workers > 1) and path.exists():
            return self.load_row(path, self.o.method, self.kept())
        return self.shared(row)

    def score(self, row, net, **others):
        """Score the trained network of a row, save both, and print a line.

        others: networks scored beside it, as Swin=...
        """
        nets = {"": net, **others}
        begun = clock(self.device)
        content = {"rows": {k: score(v, self) for k, v in nets.items()},
                   "patients": self.patients(row.labelled),
                   "method": self.o.method, "row": row.method, "options": self.kept(),
                   "classes": self.classes, "channels": self.channels,
                   "modality": self.cases.modality, "unet": net.state_dict(),
                   **{k: v.state_dict() for k, v in others.items()}}
        scoring = clock(self.device) - begun
        # before the checkpoint, at which a parent of workers counts the row as done
        self.log(row.name, seconds=self.seconds + scoring, seconds_scoring=scoring)
        save_checkpoint(self.out / f"{row.name}.pt", **content)
        (self.out / f"finetuning_{row.name}.pt").unlink(missing_ok=True)   # it is done
        if not self.o.claims:
            self.collect(row, content)

    def collect(self, row, content):
        """Add the scores of a row's checkpoint to metrics.json and per_volume.csv."""
        for name, rows in content["rows"].items():
            method = f"{row.method}, {name}" if name else row.method
            line = run_row(row._replace(method=method), content["patients"], rows)
            self.runs.append(line)
            about = {"method": method, "labelled": row.labelled, "seed": row.seed}
            self.volume_rows += [{**about, **r} for r in rows]
            title = f"{method} n{row.labelled} s{row.seed}"
            print(f"{title:24} mean Dice {line['mean_dice']:.3f}  HD95 {line['hd95_mm']:.1f} mm  "
                  f"missed {line['missed']} of {line['n_scores']}")
        self.summary, self.gains = summarise(self.runs)
        write_results(self)

    # ------------------------------------------------------------ the end

    def first_nets(self, build, *methods):
        """{title: network} of these methods, with the fewest labels, which show the most.

        A method without such a row (--rows) is left out.
        """
        nets = {}
        for method in methods:
            row = Row(method, min(self.o.labelled), self.o.seeds[0])
            if not self.checkpoint(row).exists():
                continue
            net = build(load_checkpoint(self.checkpoint(row)))
            nets[f"{method}, {row.labelled} labelled"] = net.to(self.device).eval()
        return nets

    def report(self, figure, words):
        """Draw the Dice curve, print the table, its rule, and what to look at in which figure."""
        o = self.o
        draw_dice_curve(self.summary, o.split, self.out / "figures/dice.png")
        seconds = sum(seconds_by_phase(self.out).values())
        minutes = (clock(self.device) - self.begun) / 60
        write_atomic(self.out / "run.txt", f"{self.started}; {minutes:.0f} min\n")
        print(f"\n{table(self.summary, self.gains, self.classes)}\n{RULE}.\n"
              f"{len(self.split[o.split])} {o.split} patients, mean ± std over {len(o.seeds)} "
              f"seeds; gain over scratch in Dice points; {seconds:.0f} s. Results in {self.out}/\n"
              f"Look at {self.out}/figures/{figure}: {words}")


def claim(folder, row):
    """Whether a worker is the first that takes this row: it makes the file that says so."""
    try:
        (Path(folder) / row.name).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False


class Workers:
    """--workers: N processes of the same command, each training the next row nobody has taken.

    They share the threads and skip what is done; the run that started them reads their rows.
    """
    def __init__(self, run):
        N = run.o.workers
        threads = max(1, torch.get_num_threads() // N)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        script = Path(__file__).with_name(f"{run.o.method}.py")
        self.claims = tempfile.TemporaryDirectory(prefix=f"rows-{os.getpid()}-")
        command = [sys.executable, script, *run.o.arguments, "--resume"]
        command += ["--claims", self.claims.name]
        print(f"{N} workers, {threads} threads each", flush=True)
        self.processes = []
        for n in range(N):
            with open(Path(self.claims.name) / f"worker{n}.err", "w") as errors:
                process = subprocess.Popen(command, env=environment, stderr=errors,
                                           stdout=subprocess.DEVNULL)
            self.processes.append(process)

    def wait(self, path):
        """Until this file is there, or all workers have ended. DataError if one has failed."""
        ended = False
        while not path.exists() and not ended:
            time.sleep(.2)
            codes = [process.poll() for process in self.processes]
            ended = None not in codes
            for n, code in enumerate(codes):
                if code:
                    self.stop(n, code)

    def end(self):
        """Wait until all have tidied up; their rows are there."""
        for process in self.processes:
            process.wait()

    def stop(self, n, code):
        """End all workers, and raise what the n-th said last."""
        for process in self.processes:
            process.terminate()
            process.wait()
        lines = (Path(self.claims.name) / f"worker{n}.err").read_text().strip().splitlines()
        said = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        raise DataError(f"--workers: one has stopped: {said}; go on with --resume")


def commit():
    """The commit of this repository, "and changes" where files were changed since; or unknown."""
    git = ["git", "describe", "--always", "--abbrev=7", "--dirty= and changes"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True,
                               check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def machine(device):
    """What the run ran on: GPU or processor, cores, threads."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = re.findall(r"model name\s*: (.*)", info.read_text())
        name = models[0] if models else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def run_main(main):
    """Run a script's main; a DataError is one line and exit code 2."""
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def training_state(step, modules, optimiser):
    """A training loop's whole state: weights, optimiser, step, random state."""
    return {"step": step, "modules": [m.state_dict() for m in modules],
            "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}


def resume_training(state, modules, optimiser):
    """Load what `training_state` returned; returns the step to go on with."""
    for module, weights in zip(modules, state["modules"]):
        module.load_state_dict(weights)
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def start_run(out, options, resume):
    """Make the folder of a run and write options.json. Without `resume` no run is touched."""
    out = make_folder(Path(out) / "figures").parent
    path = out / "options.json"
    leave = ("given", "method", "resume", "claims", "arguments")
    options = {k: v for k, v in options.items() if k not in leave}
    if path.exists() and not resume:
        raise DataError(f"{out}: holds a run already; add --resume to go on with it, "
                        "or give another --out")
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise DataError(f"{path}: not JSON; remove it or give another --out") from None
        for key, value in options.items():                         # what was typed comes first
            if key not in FREE and key in old and old[key] != value:
                raise DataError(f"{path}: run made with {key} = {old[key]}, now {value}; "
                                "resume with the same options or give another --out")
    write_atomic(path, json.dumps(options, indent=1))
    path = out / "log.jsonl"
    with writing(path), open(path, "a+b") as file:
        file.seek(0)
        if not (b"\n" + file.read()).endswith(b"\n"):
            file.write(b"\n")                                      # the last line was cut by a kill
    return out


def log(out, **row):
    """Append one JSON line to log.jsonl."""
    path = Path(out) / "log.jsonl"
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(without_nan(row)) + "\n")


def read_log(out):
    """The lines of log.jsonl; one that a kill has cut is left out."""
    rows = []
    for line in (Path(out) / "log.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def seconds_by_phase(out):
    """{phase: seconds} from log.jsonl; the last line of a phase counts."""
    return {r["phase"]: r["seconds"] for r in read_log(out) if "seconds" in r}


def without_nan(x):
    """The same dicts and lists with None for nan, which JSON does not have."""
    if isinstance(x, dict):
        return {k: without_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [without_nan(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def write_results(run):
    """metrics.json and per_volume.csv from all rows that are done.

    Of memory the most, also of the times before --resume.
    """
    path = run.out / "metrics.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    memory = {name: max(mb, before.get(name, 0)) for name, mb in peak_memory(run.device).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}
    metrics = {"rule": RULE, "classes": run.classes, "rows": run.runs, "summary": run.summary,
               "gains": run.gains, "seconds": seconds_by_phase(run.out),
               **memory, "versions": versions}
    write_atomic(path, json.dumps(without_nan(metrics), indent=1))
    write_csv(run.out / "per_volume.csv", run.volume_rows)


# ------------------------------------------------------------------------------------ new volumes


def build_unet(content):
    """The U-Net of a row's checkpoint."""
    o = content["options"]
    unet = UNet(content["channels"], len(content["classes"]), o["width"], o["depth"])
    unet.load_state_dict(content["unet"])
    return unet


def predict_files(o, build=build_unet):
    """--predict: segment the NIfTI files o.predict with o.checkpoint, each on its own grid.

    Label maps go to o.out/predictions. build(content of the checkpoint) -> the network. Raises
    DataError.
    """
    if not o.checkpoint:
        raise DataError("--predict: needs --checkpoint, a fine-tuned network such as "
                        f"runs/{o.method}/{o.method}_n7_s0.pt")
    content = load_checkpoint(o.checkpoint, o.method)
    if "classes" not in content:
        raise DataError(f"{o.checkpoint}: holds no segmentation head; "
                        f"give a fine-tuned network such as {o.method}_n7_s0.pt")
    if len({stem(f) for f in o.predict}) < len(o.predict):
        raise DataError("--predict: two images have the same name; "
                        "segment them in two runs with different --out")
    if content["modality"] == "[0, 1]":
        raise DataError(f"{o.checkpoint}: trained on npz slices, which say neither mm nor HU; "
                        "no NIfTI file is like them, train on the scans as NIfTI")
    device = pick_device(o.device)
    made = content["options"]
    classes = content["classes"]
    unet = build(content).to(device)
    out = make_folder(Path(o.out) / "predictions")
    for warning in header_warnings(o.predict):
        print(f"warning: {warning}")
    like = Cases([], ".", "plain", classes, modality=content["modality"],
                 channels=content["channels"])
    for file in map(Path, o.predict):
        first = file.with_name(re.sub(r"_\d{4}\.nii", "_0000.nii", file.name))
        if like.channels > 1 and first != file and first in map(Path, o.predict):
            continue                                               # read with its first channel
        image, spacing = read_image(channel_files(file, like.channels), like)      # [C, V, H, W]
        if like.modality == "CT" and not all(in_hounsfield(c) for c in image):
            print(f"warning: {hounsfield_warnings([file.name])[0]}")
        x = torch.from_numpy(normalise(image, like.modality)).movedim(1, 0)        # [V, C, H, W]
        x = to_network(x, spacing, made["spacing"], made["size"]).to(device)       # [V, C, S, S]
        label = predict(unet, x, image.shape[1:], spacing, made["spacing"])        # [V, H, W]
        label = label.cpu().numpy()
        path = out / f"{stem(file)}.nii.gz"
        with writing(path):
            write_nifti(path, label, file)
        voxels = [f"{name} {int((label == k).sum())} voxels" for k, name in enumerate(classes) if k]
        print(f"{path}: {', '.join(voxels)}")


# ---------------------------------------------------------------------------------------- figures


def new_figure(rows, columns, width=2.2, height=2.2):
    """(figure, axes [rows, columns]) that needs no screen, with the axes' frames off."""
    import matplotlib                                              # here: a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def save_figure(figure, path):
    """Write the figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def middle_slices(dataset, patients):
    """Numbers of the middle slice of each patient's first volume."""
    first = [dataset.of_patients([p])[0] for p in patients]
    return np.array([n + dataset.depth[n] // 2 for n in first])


def show(axis, image, label=None, classes=4, title=None):
    """A slice [S, S] in grey, with its label [S, S] over it in colour."""
    axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1)
    if label is not None:
        axis.imshow(np.ma.masked_less(np.asarray(label), 1), cmap="viridis", alpha=.5, vmin=1,
                    vmax=max(2, classes - 1), interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=8)


@torch.no_grad()
def draw_overlays(run, nets):
    """overlays.png: image, truth and the labels of each network of nets {title: network}.

    On the middle slices of four of the patients that were scored.
    """
    dataset, K = run.dataset, len(run.classes)
    patients = run.split[run.o.split][:4]
    figure, axes = new_figure(len(patients), 2 + len(nets))
    for row, patient in zip(axes, patients):
        numbers = dataset.of_patients([patient], labelled=True)
        number = numbers[[dataset.depth[numbers[0]] // 2]]
        image = dataset.image(number, run.device)                  # [1, C, S, S]
        picture = image[0, 0].cpu()
        show(row[0], picture, title=patient)
        show(row[1], picture, dataset.label(number)[0], K, "truth")
        for axis, (title, net) in zip(row[2:], nets.items()):
            label = net(image).argmax(1)[0].cpu()                  # [S, S]
            show(axis, picture, label, K, title)
    save_figure(figure, run.out / "figures/overlays.png")


def draw_dice_curve(summary, split, path):
    """Mean Dice against the number of labelled patients; bars of one std over seeds."""
    figure, axes = new_figure(1, 1, 4.5, 3.2)
    axis = axes[0, 0]
    axis.axis("on")
    for method in dict.fromkeys(r["method"] for r in summary):
        rows = [r for r in summary if r["method"] == method]
        rows.sort(key=lambda r: r["labelled"])
        axis.errorbar([r["labelled"] for r in rows], [r["mean_dice"]["mean"] for r in rows],
                      [r["mean_dice"]["std"] for r in rows], marker="o", capsize=3, label=method)
    axis.set_xticks(sorted({r["labelled"] for r in summary}))
    axis.set(xlabel="labelled patients", ylabel=f"mean Dice, {split} patients")
    axis.grid(alpha=.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
