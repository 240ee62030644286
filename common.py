"""What all four methods need and no reader came for: the U-Net, Dice, prepared slices, augmentation, scores, checkpoints.

Letters: B batch, C channels, K classes, V slices of a volume, N slices of a dataset, H, W native size, S network size.
The lesson of each paper is in its own script; files and layouts are in data.py.
"""
import csv, hashlib, io, json, math, os, platform, resource, shutil, time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (PHANTOM_VERSION, Cases, DataError, channel_files, default_grid, find_cases, make_phantom, normalise, read_case,
                  read_image, read_label, split_patients, stem, write_nifti)   # a method script imports common alone

# ------------------------------------------------------------------------------------------------ U-Net


def conv_block(n_in, n_out):
    """Twice 3x3 convolution, batch normalisation, LeakyReLU: [B, n_in, h, w] -> [B, n_out, h, w]."""
    layers = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """`depth` + 1 blocks with 2x2 max-pooling between them; level l has width * 2^l channels at 1 / 2^l of the size."""
    def __init__(self, channels, width, depth):
        super().__init__()
        self.widths = [width * 2 ** level for level in range(depth + 1)]
        self.blocks = nn.ModuleList(conv_block(a, b) for a, b in zip([channels] + self.widths, self.widths))

    def forward(self, x):                                                  # [B, C, S, S]
        features = []
        for level, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if level else x)                  # [B, width 2^l, S / 2^l, S / 2^l]
            features.append(x)
        return features                                                    # level 0 (full size) to level `depth`


class Decoder(nn.Module):
    """Blocks from the deepest level upwards: transposed convolution, skip connection, convolutions."""
    def __init__(self, widths):
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))                   # (deeper, shallower), deepest first
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.blocks = nn.ModuleList(conv_block(2 * b, b) for _, b in pairs)

    def forward(self, features, blocks=None):
        """Run the first `blocks` blocks (all by default); 0 returns the encoder's deepest map."""
        x = features[-1]
        for n in range(len(self.blocks) if blocks is None else blocks):
            x = torch.cat([self.ups[n](x), features[-2 - n]], 1)           # [B, 2 width, 2h, 2w]
            x = self.blocks[n](x)                                          # [B, width, 2h, 2w]
        return x


class UNet(nn.Module):
    """2D U-Net (Ronneberger et al. 2015): `encoder`, `decoder`, and a 1x1 `head` apart. S must be divisible by 2^depth."""
    def __init__(self, channels=1, classes=4, width=16, depth=4):
        super().__init__()
        self.encoder = Encoder(channels, width, depth)
        self.decoder = Decoder(self.encoder.widths)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):                                                  # [B, C, S, S] -> [B, K, S, S]
        return self.head(self.decoder(self.encoder(x)))


def load_weights(unet, state, parts):
    """Copy what lies below `parts` (as "encoder" or "decoder.blocks.0") from `state`; returns (names taken, names fresh).

    Raises DataError where a tensor is missing in `state` or has another shape.
    """
    own = unet.state_dict()
    taken = sorted(k for k in own if any(k.startswith(p + ".") for p in parts))
    for k in taken:
        if k not in state or state[k].shape != own[k].shape:
            raise DataError(f"weights do not fit: {k} is {tuple(own[k].shape)} here and "
                            f"{tuple(state[k].shape) if k in state else 'missing'} there; use the same --width and channels")
    unet.load_state_dict({**own, **{k: state[k] for k in taken}})
    return taken, sorted(own.keys() - set(taken))


# ------------------------------------------------------------------------------------------------ Dice and distances


def dice_loss(logits, label, eps=1e-5):
    """Soft Dice loss: 1 - mean over foreground classes of 2 sum(p y) / (sum p + sum y), sums over batch and pixels.

    logits [B, K, h, w], label [B, h, w] with whole numbers below K; returns a scalar.
    """
    p = logits.float().softmax(1)[:, 1:]                                   # [B, K-1, h, w]
    y = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:].to(p)      # [B, K-1, h, w]
    dims = (0, 2, 3)
    return 1 - ((2 * (p * y).sum(dims) + eps) / (p.sum(dims) + y.sum(dims) + eps)).mean()


def dice_score(pred, truth, classes):
    """Dice of two label maps of equal shape for every class of `classes` (numbers): {class: value in [0, 1]}.

    Absent in both: nan. Absent in one of them: 0.
    """
    pred, truth = np.asarray(pred), np.asarray(truth)
    score = {}
    for k in classes:
        a, b = pred == k, truth == k
        size = int(a.sum()) + int(b.sum())
        score[k] = 2 * int((a & b).sum()) / size if size else math.nan
    return score


def _surface(mask):
    """The voxels of a mask with a face neighbour outside it (beyond the border is outside); same shape, bool."""
    inner, padded = mask.copy(), np.pad(mask, 1)
    for axis in range(mask.ndim):
        for step in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(step, step + mask.shape[axis])
            inner &= padded[tuple(window)]
    return mask & ~inner


def _distance_map(points, spacing):
    """Distance in mm of every voxel to the nearest True voxel, exact, one axis after the other: d_i = min_j d_j + (i - j)^2."""
    d = np.where(points, 0., np.inf)
    for axis, mm in enumerate(spacing):
        d = np.moveaxis(d, axis, 0)                                        # [n, ...]
        square = ((np.arange(len(d)) * mm) ** 2).reshape(-1, *[1] * (d.ndim - 1))
        out = np.full_like(d, np.inf)
        for j, row in enumerate(d):
            np.minimum(out[j:], row + square[:len(d) - j], out=out[j:])
            np.minimum(out[:j], row + square[j:0:-1], out=out[:j])
        d = np.moveaxis(out, 0, axis)
    return np.sqrt(d)


def surface_distances(pred, truth, spacing):
    """(HD95, ASSD) in mm of two binary masks of equal shape; spacing in mm along each axis; (nan, nan) if one is empty.

    HD95: the larger of the two directed 95th percentiles. ASSD: mean over all surface voxels of both masks.
    """
    pred, truth = np.asarray(pred, bool), np.asarray(truth, bool)
    if not pred.any() or not truth.any():
        return math.nan, math.nan
    found = np.argwhere(pred | truth)
    box = tuple(slice(lo, hi + 1) for lo, hi in zip(found.min(0), found.max(0)))
    a, b = (_surface(m[box]) for m in (pred, truth))
    ab, ba = _distance_map(b, spacing)[a], _distance_map(a, spacing)[b]    # from a to b, from b to a
    return float(max(np.percentile(ab, 95), np.percentile(ba, 95))), float(np.concatenate([ab, ba]).mean())


# ------------------------------------------------------------------------------------------------ native <-> network grid


def _place(x, size, value=0.):
    """Crop or pad the last two axes to `size` [rows, columns] about the centre."""
    for axis, want in ((-2, size[0]), (-1, size[1])):
        have = x.shape[axis]
        before = (want - have) // 2 if want > have else -((have - want) // 2)
        pad = [before, want - have - before]
        x = F.pad(x, pad if axis == -1 else [0, 0] + pad, value=value)     # negative padding crops
    return x


def _resampled(shape, spacing, target):
    """Rows and columns of a native slice once its pixels are `target` mm."""
    return [max(1, round(n * s / target)) for n, s in zip(shape[-2:], spacing[-2:])]


def to_network(image, spacing, target, size):
    """Slices float [V, C, H, W] with spacing (V, H, W) in mm -> [V, C, S, S] at `target` mm, about the image centre."""
    x = F.interpolate(image, _resampled(image.shape, spacing, target), mode="bilinear", antialias=True)
    return _place(x, (size, size))


def to_native(probs, shape, spacing, target):
    """Class probabilities [V, K, S, S] back on the native grid: label [V, H, W]; outside the crop is background."""
    resampled = _resampled(shape, spacing, target)
    rest, background = _place(probs[:, 1:], resampled), _place(probs[:, :1], resampled, 1.)
    placed = torch.cat([background, rest], 1)                              # [V, K, resampled rows, columns]
    return torch.cat([F.interpolate(p, tuple(shape[-2:]), mode="bilinear").argmax(1) for p in placed.split(8)])   # [V, H, W]


# ------------------------------------------------------------------------------------------------ prepared slices

CACHE_VERSION = 1


class SliceDataset:
    """All slices of a dataset on the network grid, memory-mapped. Made by `prepare`.

    images float16 [N, C, S, S] in [0, 1]; labels uint8 [N, S, S], 255 where the case has none; volume [N], the number of the
    case; position [N] = (i + 1) / V in (0, 1]; depth [N] = V. `info`: what `prepare` wrote in index.json.
    """
    def __init__(self, folder):
        self.info = json.loads((folder / "index.json").read_text())
        slices = np.array([c["shape"][0] for c in self.info["cases"]])     # V of each case
        shape = slices.sum(), self.info["channels"], self.info["size"], self.info["size"]
        self.images = np.memmap(folder / "images.raw", np.float16, "r", shape=shape)
        self.labels = np.memmap(folder / "labels.raw", np.uint8, "r", shape=(shape[0], *shape[2:]))
        self.volume = np.repeat(np.arange(len(slices)), slices)            # [N]
        self.depth = slices[self.volume]                                   # [N]
        self.first = np.cumsum(slices) - slices                            # first slice of each case
        self.slice = np.arange(len(self.volume)) - self.first[self.volume]
        self.position = ((self.slice + 1) / self.depth).astype(np.float32)

    def of_patients(self, patients, labelled=False):
        """Numbers of the slices of these patients (only of cases with a label, if `labelled`), in order."""
        patients = set(patients)
        take = np.array([c["patient"] in patients and (c["labelled"] or not labelled) for c in self.info["cases"]], bool)
        return np.flatnonzero(take[self.volume])

    def image(self, numbers, device="cpu"):
        """Images of these slices, float32 [B, C, S, S] in [0, 1]."""
        return torch.from_numpy(self.images[numbers]).to(device).float()

    def label(self, numbers, device="cpu"):
        """Labels of these slices, int64 [B, S, S]."""
        return torch.from_numpy(self.labels[numbers]).to(device).long()


def prepare(cases, target, size, cache):
    """The `SliceDataset` of `cases` at `target` mm and `size` pixels, from the folder `cache` or made there.

    Its key holds every file's name, size and time and the options, so that a change of either makes it anew.
    """
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
             for c in cases for f in (*c.files, *([c.label] if c.label else []))]
    key = hashlib.sha1(json.dumps([CACHE_VERSION, stats, target, size, cases.classes, cases.ranges]).encode()).hexdigest()[:16]
    folder = Path(cache) / key
    if (folder / "index.json").is_file():
        return SliceDataset(folder)
    partial = folder.with_name(f"{key}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_slices(cases, target, size, partial)
        os.replace(partial, folder)
    except OSError as error:
        if not (folder / "index.json").is_file():                          # else another run was faster, and made the same
            raise DataError(f"{partial}: cannot write the cache ({error.strerror}); free space or give --cache") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SliceDataset(folder)


def _write_slices(cases, target, size, folder):
    """Write images.raw, labels.raw and index.json, one volume in memory at a time."""
    index = []
    with open(folder / "images.raw", "wb") as image_file, open(folder / "labels.raw", "wb") as label_file:
        for case in tqdm(cases, "prepare", leave=False, disable=None):
            volume = read_case(case, cases)
            x = torch.from_numpy(normalise(volume.image, cases.modality)).movedim(1, 0)      # [V, C, H, W]
            image_file.write(to_network(x, volume.spacing, target, size).clamp(0, 1).half().numpy().tobytes())
            y = np.full((len(x), size, size), 255, np.uint8)
            for v in range(len(x) if volume.label is not None else 0):
                one_hot = F.one_hot(torch.from_numpy(volume.label[v:v + 1]).long(), len(cases.classes)).movedim(-1, 1).float()
                placed = to_network(one_hot, volume.spacing, target, size)[0]                # [K, S, S]
                placed[0] += 1e-3                                          # padding, where all are 0, is background
                y[v] = placed.argmax(0).byte().numpy()
            label_file.write(y.tobytes())
            index.append({"name": case.name, "patient": case.patient, "shape": list(volume.image.shape[1:]),
                          "spacing": list(volume.spacing), "labelled": volume.label is not None})
    (folder / "index.json").write_text(json.dumps(
        {"cases": index, "channels": cases.channels, "target": target, "size": size}))


# ------------------------------------------------------------------------------------------------ augmentation


def uniform(n, lo, hi, device):
    """n numbers in [lo, hi), drawn on the CPU so that every device sees the same."""
    return (lo + (hi - lo) * torch.rand(n)).to(device)


def photometric(x):
    """Random gamma, contrast, brightness, bias field, blur and noise, each image its own; [B, C, S, S], about [0, 1]."""
    n, device = len(x), x.device
    draw = lambda lo, hi: uniform(n, lo, hi, device)[:, None, None, None]  # [B, 1, 1, 1]
    x = x.clamp(0, 1) ** draw(-.5, .5).exp()
    x = (x - .5) * draw(.7, 1.3) + .5 + draw(-.15, .15)
    field = F.interpolate(torch.randn(n, 1, 4, 4).to(device) * .2, x.shape[-2:], mode="bicubic")     # [B, 1, S, S]
    x = x * field.exp()
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), draw(-1, 1).clamp(min=0))
    return x + torch.randn(x.shape).to(device) * draw(-.05, .08).clamp(min=0)


def spatial_grid(n, size, rotation, device, scale=.25, shift=.1, elastic=.03):
    """Sampling grids [n, S, S, 2] of random rotations (+-rad), scales (log), shifts and elastic waves (of the half width)."""
    angle, log_scale = uniform(n, -rotation, rotation, device), uniform(n, -scale, scale, device)
    cos, sin = angle.cos() * log_scale.exp(), angle.sin() * log_scale.exp()
    ty, tx = uniform(n, -shift, shift, device), uniform(n, -shift, shift, device)
    theta = torch.stack([cos, -sin, tx, sin, cos, ty], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)   # [n, S, S, 2]
    waves = F.interpolate(torch.randn(n, 2, 5, 5).to(device) * elastic, (size, size), mode="bicubic")   # [n, 2, S, S]
    return grid + waves.movedim(1, -1)


def warp(x, grid, mode="bilinear"):
    """Sample images [B, C, S, S], or labels [B, S, S] with mode "nearest", at the grid [B, S, S, 2]; outside is 0."""
    if x.ndim == 3:
        return F.grid_sample(x[:, None].float(), grid, mode, align_corners=False)[:, 0].long()
    return F.grid_sample(x, grid, mode, align_corners=False)


# ------------------------------------------------------------------------------------------------ prediction and scores


@torch.no_grad()
def predict(unet, images, shape, spacing, target, precision=torch.float32):
    """Label int64 [V, H, W] on the native grid from slices [V, C, S, S]; leaves the network in the mode it was in."""
    training = unet.training
    unet.eval()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        probs = torch.cat([unet(x).float().softmax(1) for x in images.split(32)])            # [V, K, S, S]
    unet.train(training)
    return to_native(probs, shape, spacing, target)


def score(unet, dataset, cases, patients, device, precision=torch.float32):
    """Score every labelled volume of these patients at its own resolution: a list of rows, one a volume and class."""
    rows = []
    for n, (case, info) in enumerate(zip(cases, dataset.info["cases"])):
        if case.patient not in patients or not info["labelled"]:
            continue
        slices = np.arange(dataset.first[n], dataset.first[n] + info["shape"][0])
        pred = predict(unet, dataset.image(slices, device), info["shape"], info["spacing"], dataset.info["target"], precision)
        pred, truth = pred.cpu().numpy(), read_label(case, cases)          # [V, H, W]
        for k, dice in dice_score(pred, truth, range(1, len(cases.classes))).items():
            hd95, assd = surface_distances(pred == k, truth == k, info["spacing"])
            rows.append({"case": case.name, "patient": case.patient, "class": cases.classes[k], "dice": dice,
                         "hd95_mm": hd95, "assd_mm": assd, "missed": int(math.isnan(hd95) and not math.isnan(dice))})
    return rows


RULE = ("Dice per volume and class at the volume's own resolution, mean over volumes, then over foreground classes; HD95 (larger "
        "directed 95th percentile) and ASSD in mm; absent in both: left out; absent in one: Dice 0, no distance, 'missed'")


def nanmean(values):
    """Mean of the values that are not nan; nan if there are none."""
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def spread(values):
    """Standard deviation (n - 1) of the values that are not nan; nan if there are fewer than two."""
    values = [v for v in values if not math.isnan(v)]
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def run_row(method, labelled, seed, patients, rows):
    """One row of metrics.json from the rows of `score`."""
    classes = list(dict.fromkeys(r["class"] for r in rows))
    mean = lambda key: {k: nanmean([r[key] for r in rows if r["class"] == k]) for k in classes}
    dice = mean("dice")
    return {"method": method, "labelled": labelled, "seed": seed, "patients": patients, "dice": dice,
            "mean_dice": nanmean(dice.values()), "hd95_mm": nanmean(mean("hd95_mm").values()),
            "assd_mm": nanmean(mean("assd_mm").values()), "missed": sum(r["missed"] for r in rows),
            "n_scores": sum(not math.isnan(r["dice"]) for r in rows), "n_volumes": len({r["case"] for r in rows})}


def summarise(runs, baseline="scratch"):
    """Mean and std over seeds for each (method, labelled), and the gain over the baseline; returns (summary, gains)."""
    summary, gains = [], []
    for method, labelled in dict.fromkeys((r["method"], r["labelled"]) for r in runs):
        same = [r for r in runs if (r["method"], r["labelled"]) == (method, labelled)]
        row = {"method": method, "labelled": labelled, "n": len(same), "missed": sum(r["missed"] for r in same),
               "n_scores": sum(r["n_scores"] for r in same)}
        values = {**{k: [r["dice"][k] for r in same] for k in same[0]["dice"]},
                  **{k: [r[k] for r in same] for k in ("mean_dice", "hd95_mm", "assd_mm")}}
        for key, v in values.items():
            row[key] = {"mean": nanmean(v), "std": spread(v)}
        summary.append(row)
        base = {r["seed"]: r["mean_dice"] for r in runs if (r["method"], r["labelled"]) == (baseline, labelled)}
        diff = [r["mean_dice"] - base[r["seed"]] for r in same if method != baseline and r["seed"] in base]
        if diff:
            gains.append({"method": method, "labelled": labelled, "gain": nanmean(diff), "per_seed": diff, "std": spread(diff)})
    return summary, gains


def table(summary, gains, classes):
    """The summary as a Markdown table, one line a method and number of labelled patients; Dice in [0, 1], gain in points."""
    cell = lambda mean, std, form: f"{mean:{form}}" if math.isnan(std) else f"{mean:{form}} ± {std:{form.strip('+')}}"
    heads = ["labelled", "method", *classes[1:], "mean Dice", "HD95 mm", "ASSD mm", "missed", "gain"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for r in sorted(summary, key=lambda r: r["labelled"]):
        gain = [cell(100 * g["gain"], 100 * g["std"], "+.1f") for g in gains
                if (g["method"], g["labelled"]) == (r["method"], r["labelled"])]
        dice = [cell(*r[k].values(), ".3f") for k in (*classes[1:], "mean_dice")]
        distances = [cell(*r[k].values(), ".1f") for k in ("hd95_mm", "assd_mm")]
        missed = f"{r['missed']} of {r['n_scores']}"
        lines.append("| " + " | ".join([str(r["labelled"]), r["method"], *dice, *distances, missed, *(gain or [""])]) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ runs, checkpoints, device


def pick_device(name="auto"):
    """The torch device: cuda, else mps, else cpu; or the one named. Raises DataError if that one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not there.get(name.split(":")[0]):
        raise DataError(f"--device {name}: not available here; use one of {', '.join(k for k, v in there.items() if v)}")
    return torch.device(next(k for k, v in there.items() if v) if name == "auto" else name)


def write_atomic(path, content):
    """Write bytes or text under a temporary name, then rename, so that a kill or a full disk never leaves half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or give another --out; "
                        "what was written before is intact, go on with --resume") from None


def save_checkpoint(path, **content):
    """torch.save to memory, then atomically to the file. Tensors, numbers, strings, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, method=None, options=None):
    """The content of a checkpoint. Raises DataError if unreadable, of another `method`, or made with other `options`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kind, made = content["method"], content["options"]
    except Exception as error:                                             # torch raises half a dozen kinds
        raise DataError(f"{path}: not a checkpoint of this project ({type(error).__name__}); give another file") from None
    if method and kind != method:
        raise DataError(f"{path}: checkpoint of {kind}, not of {method}; use {kind}'s script or another file")
    for key, value in (options or {}).items():
        if made.get(key) != value:
            raise DataError(f"{path}: made with {key} = {made.get(key)}, now {value}; use the same options or another --out")
    return content


def load_start(path, unet):
    """--init: the content of a pretrained.pt of any method, once its weights are known to fit `unet`. Raises DataError."""
    start = load_checkpoint(path)
    if "parts" not in start:
        raise DataError(f"{path}: holds no weights to start from; give a pretrained.pt")
    taken, fresh = load_weights(unet, start["unet"], start["parts"])
    layers = dict.fromkeys(".".join(k.split(".")[:-1][:3]) for k in fresh) # as decoder.blocks.3 or head, each once
    print(f"{path}: {start['method']} gives {len(taken)} tensors ({', '.join(start['parts'])}); {len(fresh)} start fresh "
          f"({', '.join(layers)})")
    return start


def save_training(path, method, options, step, modules, optimiser, **extra):
    """A training loop's whole state: weights, optimiser, step, random state (schedules are functions of the step)."""
    save_checkpoint(path, method=method, options=options, step=step, modules=[m.state_dict() for m in modules],
                    optimiser=optimiser.state_dict(), rng=torch.get_rng_state(), **extra)


def resume_training(path, method, options, modules, optimiser):
    """Load what `save_training` wrote into the modules and the optimiser; returns the step to go on with."""
    state = load_checkpoint(path, method, options)
    for module, weights in zip(modules, state["modules"]):
        module.load_state_dict(weights)
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def make_folder(path):
    """Make a folder for results, with those above it; returns it. Raises DataError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be made ({error.strerror}); give another --out") from None
    return path


def start_run(out, options, resume):
    """Make the folder of a run and write options.json. A folder that holds a run is left alone unless `resume`."""
    out = make_folder(Path(out) / "figures").parent
    path = out / "options.json"
    if path.exists() and not resume:
        raise DataError(f"{out}: holds a run already; add --resume to go on with it, or give another --out")
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise DataError(f"{path}: not JSON; remove it or give another --out") from None
        for key in options:
            if key in old and old[key] != options[key]:
                raise DataError(f"{path}: run made with {key} = {old[key]}, now {options[key]}; "
                                "resume with the same options or give another --out")
    write_atomic(path, json.dumps(options, indent=1))
    if (out / "log.jsonl").exists() and not (out / "log.jsonl").read_bytes().endswith(b"\n"):
        with open(out / "log.jsonl", "a") as file:
            file.write("\n")                                               # the last line was cut by a kill
    return out


def log(out, **row):
    """Append one JSON line to log.jsonl."""
    try:
        with open(Path(out) / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise DataError(f"{out}/log.jsonl: cannot be written ({error.strerror}); free space, then --resume") from None


def seconds_by_phase(out):
    """{phase: seconds} from the lines of log.jsonl that have seconds, those before a kill included."""
    seconds = {}
    for line in (Path(out) / "log.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:                                                 # cut by a kill
            continue
        if "seconds" in row:
            seconds[row["phase"]] = row["seconds"]
    return seconds


def step_seconds(net, x, precision):
    """Seconds of one forward and backward of `net` on images x [B, C, S, S], the mean of five."""
    x = x.contiguous(memory_format=torch.channels_last)
    for n in range(9):
        if n == 4:
            begin = time.time()                                            # the first steps warm up
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            y = net(x)
        y.float().mean().backward()
    return (time.time() - begin) / 5


def write_csv(path, rows):
    """A table from a list of dicts, atomically; the keys of the first are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def write_results(out, runs, volume_rows, classes):
    """metrics.json and per_volume.csv from all finished runs; returns (summary, gains)."""
    summary, gains = summarise(runs)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Linux" else 1024 ** 2)
    tidy = lambda x: ({k: tidy(v) for k, v in x.items()} if isinstance(x, dict) else [tidy(v) for v in x]
                      if isinstance(x, list) else None if isinstance(x, float) and math.isnan(x) else x)
    write_atomic(Path(out) / "metrics.json", json.dumps(tidy({
        "rule": RULE, "classes": classes, "rows": runs, "summary": summary, "gains": gains, "seconds": seconds_by_phase(out),
        "peak_memory_mb": round(memory), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                                      "numpy": np.__version__}}), indent=1))
    write_csv(Path(out) / "per_volume.csv", volume_rows)
    return summary, gains


def predict_files(o, device, method, build):
    """--predict: segment the NIfTI files o.predict with o.checkpoint, into o.out/predictions, on each file's own grid.

    build(content of the checkpoint) -> the network with its weights. Raises DataError.
    """
    if not o.checkpoint:
        raise DataError(f"--predict: needs --checkpoint, a fine-tuned network such as runs/{method}/{method}_n7_s0.pt")
    content = load_checkpoint(o.checkpoint, method)
    if "classes" not in content:
        raise DataError(f"{o.checkpoint}: holds no segmentation head; give a fine-tuned network such as {method}_n7_s0.pt")
    made, classes, unet = content["options"], content["classes"], build(content).to(device)
    if len({stem(f) for f in o.predict}) < len(o.predict):
        raise DataError("--predict: two images have the same name; segment them in two runs with different --out")
    out = make_folder(Path(o.out) / "predictions")
    like = Cases([], ".", "plain", classes, modality=content["modality"], channels=content["channels"])
    for file in map(Path, o.predict):
        image, spacing = read_image(channel_files(file, like.channels), like)                # [C, V, H, W]
        x = torch.from_numpy(normalise(image, like.modality)).movedim(1, 0)                  # [V, C, H, W]
        x = to_network(x, spacing, made["spacing"], made["size"]).to(device)                 # [V, C, S, S]
        label = predict(unet, x, image.shape[1:], spacing, made["spacing"]).cpu().numpy()    # [V, H, W]
        write_nifti(out / f"{stem(file)}.nii.gz", label, file)
        voxels = ", ".join(f"{n} {int((label == k).sum())} voxels" for k, n in enumerate(classes) if k)
        print(f"{out / stem(file)}.nii.gz: {voxels}")


# ------------------------------------------------------------------------------------------------ figures


def new_figure(rows, columns, width=2.2, height=2.2):
    """(figure, axes [rows, columns]) that needs no screen, with the axes' frames off."""
    import matplotlib                                                      # here: a second to import, and only figures need it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
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
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    if label is not None:
        axis.imshow(np.ma.masked_less(label, 1), cmap="viridis", alpha=.5, vmin=1, vmax=max(2, classes - 1),
                    interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=8)


def draw_overlays(dataset, cases, patients, nets, device, path):
    """Image, truth and the labels of each network of nets {title: network in eval mode} on the middle slices of the patients."""
    figure, axes = new_figure(len(patients), 2 + len(nets))
    for row, patient in zip(axes, patients):
        numbers = dataset.of_patients([patient], labelled=True)
        number = numbers[[dataset.depth[numbers[0]] // 2]]
        image, truth = dataset.image(number, device), dataset.label(number)[0]
        show(row[0], image[0, 0].cpu(), title=patient)
        show(row[1], image[0, 0].cpu(), truth, len(cases.classes), "truth")
        for axis, (title, net) in zip(row[2:], nets.items()):
            with torch.no_grad():
                pred = net(image).argmax(1)[0].cpu()                       # [S, S]
            show(axis, image[0, 0].cpu(), pred, len(cases.classes), title)
    save_figure(figure, path)


def draw_dice_curve(summary, path):
    """Mean Dice against the number of labelled patients, one line a method, bars of one std over seeds."""
    figure, axes = new_figure(1, 1, 4.5, 3.2)
    axis = axes[0, 0]
    axis.axis("on")
    for method in dict.fromkeys(r["method"] for r in summary):
        rows = sorted((r for r in summary if r["method"] == method), key=lambda r: r["labelled"])
        axis.errorbar([r["labelled"] for r in rows], [r["mean_dice"]["mean"] for r in rows],
                      [r["mean_dice"]["std"] for r in rows], marker="o", capsize=3, label=method)
    axis.set_xticks(sorted({r["labelled"] for r in summary}))
    axis.set(xlabel="labelled patients", ylabel="mean Dice, test patients")
    axis.grid(alpha=.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
