"""From files to volumes, with numpy and nibabel alone (no torch): find the scans in a folder, recognise its layout,
read and check images and labels, split by patient, and make the built-in phantom.

    python data.py PATH                      what is there: layout, cases, shapes, spacings, labels, problems
    python data.py PATH --montage OUT.png    the same, and one slice of up to 24 cases with its labels
    python data.py phantom OUT               write the phantom to OUT as a Medical Segmentation Decathlon folder

Letters: C channels, V slices of a volume, H rows, W columns. Every volume is turned to [V, H, W] with V along the
thick axis, the patient's front up and the patient's right on the left, and turned back before anything is written.
It does not resample, crop or batch (common.py does), and it never looks at a label to decide what part of an image to use.
"""
import argparse, json, os, re, sys, zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform


class DataError(Exception):
    """Something a user can mend: the message names file, value and fix. Scripts print it and leave with exit code 2."""


@dataclass(frozen=True)
class Case:
    """One scan. `files` holds one image file, or one file a channel (nnU-Net), or one file a slice (npz)."""
    name: str
    patient: str                # cases of one patient (ED and ES of a heart) never fall on two sides of a split
    files: tuple
    label: Path | None = None
    group: str = ""             # pathology group, where the layout names one (ACDC)

    @property
    def image(self):
        return self.files[0]


class Cases(list):
    """A list of `Case` and what the folder says about all of them."""
    def __init__(self, cases, root, layout, classes, ranges=None, modality="MR", channels=1, warnings=()):
        super().__init__(cases)
        self.root, self.layout, self.modality, self.channels = Path(root), layout, modality, channels
        self.classes = list(classes)                            # names; class 0 is the background
        self.ranges = list(ranges or [(k, k) for k in range(len(classes))])   # raw values (lowest, highest) of each class
        self.warnings = list(warnings)


@dataclass
class Volume:
    """A scan in memory. image float32 [C, V, H, W]; label uint8 [V, H, W] or None; spacing (slice, row, column) in mm."""
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple


# ------------------------------------------------------------------------------------------------ layouts

ACDC = ["background", "RV", "Myo", "LV"]
HVSMR = ["background", "myocardium", "blood pool"]
MMWHS = {"background": (0, 0), "Myo": (205, 205), "LA": (420, 421), "LV": (500, 500), "RA": (550, 550), "RV": (600, 600),
         "aorta": (820, 820), "pulmonary artery": (850, 850)}   # a stray 421 belongs to LA
CHAOS = {"background": (0, 0), "liver": (55, 70), "right kidney": (110, 135), "left kidney": (175, 200),
         "spleen": (240, 255)}
SYNAPSE = ["background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"]
BTCV = ["background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland"]


def stem(path):
    """File name without .nii, .nii.gz or .npz."""
    return re.sub(r"(\.nii(\.gz)?|\.npz)$", "", Path(path).name)


def patient_of(name):
    """The patient of a case name: a time frame at its end (_ED, _ES, _frame07) is cut off."""
    return re.sub(r"[_-](ED|ES|frame\d+)$", "", name)


def _niftis(folder, pattern="*"):
    """NIfTI files of a folder in name order; dot files, which macOS scatters, are no scans."""
    return sorted(f for f in Path(folder).glob(pattern) if f.name.endswith((".nii", ".nii.gz")) and f.name[0] != ".")


def _pairs(images, labels, patient=patient_of):
    """Cases from {name: image files} and {name: label}; an image without label is an unlabelled case."""
    warnings = [f"{labels[n]}: label without image, skipped" for n in sorted(labels.keys() - images.keys())]
    unlabelled = sorted(images.keys() - labels.keys())
    if unlabelled:
        warnings.append(f"{len(unlabelled)} images without label, used without one: {', '.join(unlabelled[:3])}"
                        + (" ..." if len(unlabelled) > 3 else ""))
    return [Case(n, patient(n), tuple(images[n]), labels.get(n)) for n in sorted(images)], warnings


def _acdc(root):
    folders = sorted(f.parent for pattern in ("", "*/", "*/*/") for f in root.glob(pattern + "patient*/Info.cfg"))
    cases, warnings = [], []
    for folder in folders:
        info = dict(line.split(":", 1) for line in (folder / "Info.cfg").read_text(errors="replace").splitlines() if ":" in line)
        info = {k.strip(): v.strip() for k, v in info.items()}
        if not all(info.get(k, "").isdigit() for k in ("ED", "ES")):
            raise DataError(f"{folder / 'Info.cfg'}: no whole number for ED and ES; download the file again")
        files = {stem(f): f for f in _niftis(folder)}
        wanted = [f"{folder.name}_frame{int(info[k]):02d}" for k in ("ED", "ES")]      # never file order: patient090
        for name in wanted:
            if name in files:
                cases.append(Case(name, folder.name, (files[name],), files.get(name + "_gt"), info.get("Group", "")))
                if name + "_gt" not in files:
                    warnings.append(f"{files[name]}: no {name}_gt beside it, used without label")
            else:
                warnings.append(f"{folder}: Info.cfg names {name}, which is not there, skipped")
        for name in sorted(files.keys() - set(wanted) - {n + "_gt" for n in wanted}):
            why = "4D cine" if name.endswith("_4d") else "neither ED nor ES of Info.cfg"
            warnings.append(f"{files[name]}: {why}, skipped")
    return Cases(cases, root, "ACDC", ACDC, warnings=warnings) if folders else None


def _json_layouts(root):
    """MSD and nnU-Net v2: both have dataset.json, with `labels` the other way round."""
    path = root / "dataset.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text())
        nnunet = "channel_names" in info
        modalities = list(info["channel_names" if nnunet else "modality"].values())
        labels = {int(v): k for k, v in info["labels"].items()} if nnunet else {int(k): v for k, v in info["labels"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a dataset.json of MSD or nnU-Net v2 ({type(error).__name__}: {error}); mend it") from None
    if sorted(labels) != list(range(len(labels))):
        raise DataError(f"{path}: label values {sorted(labels)} are not 0, 1, 2, ...; renumber them")
    images, skipped = {}, []
    for file in _niftis(root / "imagesTr"):
        match = re.fullmatch(r"(.+)_(\d{4})", stem(file)) if nnunet else None
        if nnunet and not match:
            skipped.append(f"{file}: name does not end in a channel number (_0000), skipped")
            continue
        images.setdefault(match[1] if nnunet else stem(file), []).append(file)
    if nnunet and any(len(f) != len(modalities) for f in images.values()):
        name = next(n for n, f in images.items() if len(f) != len(modalities))
        raise DataError(f"{root / 'imagesTr' / name}: {len(images[name])} channel files, dataset.json names {len(modalities)}; "
                        "add the missing channels or remove the case")
    cases, warnings = _pairs(images, {stem(f): f for f in _niftis(root / "labelsTr")})
    if _niftis(root / "imagesTs"):
        warnings.append(f"{root / 'imagesTs'}: the challenge's test images are left alone (segment them with --predict)")
    modality = "CT" if any(str(m).upper() == "CT" for m in modalities) else str(modalities[0])
    return Cases(cases, root, "nnU-Net v2" if nnunet else "MSD", [labels[k] for k in sorted(labels)], modality=modality,
                 channels=len(modalities), warnings=skipped + warnings)


def _transunet(root):
    slices = {}
    for file in sorted([*root.glob("*.npz"), *root.glob("train_npz/*.npz")]):
        if match := re.fullmatch(r"(case\d+)_slice(\d+)", stem(file)):
            slices.setdefault(match[1], []).append((int(match[2]), file))
    cases = [Case(n, n, tuple(f for _, f in sorted(s)), None) for n, s in sorted(slices.items())]
    return Cases(cases, root, "TransUNet npz", SYNAPSE, modality="[0, 1]", warnings=[
        "npz slices carry no organ names and no spacing: the map of TransUNet and 1 mm are assumed, distances are in voxels"
        ]) if cases else None


def _btcv(root):
    if not (root / "img").is_dir():
        return None
    number = lambda f: "case" + re.sub(r"\D", "", stem(f))
    cases, warnings = _pairs({number(f): [f] for f in _niftis(root / "img")}, {number(f): f for f in _niftis(root / "label")})
    return Cases(cases, root, "BTCV", BTCV, modality="CT", warnings=warnings)


def _mmwhs(root):
    images = {stem(f)[:-6]: [f] for f in _niftis(root, "**/*_image.nii*")}
    cases, warnings = _pairs(images, {stem(f)[:-6]: f for f in _niftis(root, "**/*_label.nii*")})
    ct = bool(images) and all(n.lower().startswith("ct") for n in images)
    return Cases(cases, root, "MMWHS", MMWHS, MMWHS.values(), "CT" if ct else "MR", 1, warnings) if cases else None


def _hvsmr(root):
    files = {stem(f): f for f in _niftis(root, "**/training_axial_crop_pat*.nii*")}
    images = {n: [f] for n, f in files.items() if not n.endswith("-label")}
    cases, warnings = _pairs(images, {n[:-6]: f for n, f in files.items() if n.endswith("-label")})
    return Cases(cases, root, "HVSMR 2016", HVSMR, warnings=warnings) if cases else None


def _plain(root):
    """images/ and labels/ with equal names. The values are read from the labels; CHAOS shows by its grey values."""
    if not (root / "images").is_dir():
        return None
    cases, warnings = _pairs({stem(f): [f] for f in _niftis(root / "images")}, {stem(f): f for f in _niftis(root / "labels")})
    values = set()
    for case in cases:
        if case.label:
            values |= set(np.unique(_whole(_load(case.label)[0], case.label)).tolist())
    if values - {0} and max(values) > 8 and all(any(lo <= v <= hi for lo, hi in CHAOS.values()) for v in values):
        return Cases(cases, root, "CHAOS-NIfTI", CHAOS, CHAOS.values(), warnings=warnings)
    if values and sorted(values | {0}) != list(range(max(values) + 1)):
        raise DataError(f"{root / 'labels'}: label values {sorted(values)} are not consecutive; renumber them 0, 1, 2, ...")
    names = ["background"] + [f"class {k}" for k in range(1, max(values, default=1) + 1)]
    return Cases(cases, root, "plain", names, warnings=warnings)


def find_cases(path):
    """The scans below a folder, as `Cases` (a list of `Case` with layout, class names and warnings).

    Reads no image; of the plain layout it reads the labels, for their values.
    Layouts: ACDC, MSD, nnU-Net v2, TransUNet npz, raw BTCV, MMWHS, HVSMR 2016, plain, CHAOS-NIfTI (see README, "Data").
    Raises DataError where the path is missing, is no folder, is empty, or is of no known layout.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: {'is a file' if root.exists() else 'does not exist'}; give the folder of a dataset")
    for layout in (_acdc, _json_layouts, _transunet, _btcv, _mmwhs, _hvsmr, _plain):
        cases = layout(root)
        if cases:
            return cases
        if cases is not None:
            raise DataError(f"{root}: {cases.layout} layout, but it holds no images; check the download")
    found = ", ".join(sorted(f.name for f in root.iterdir())[:5]) or "nothing"
    raise DataError(f"{root}: no known layout (found {found}); arrange the scans as images/NAME.nii.gz and labels/NAME.nii.gz")


# ------------------------------------------------------------------------------------------------ reading and checking

def _load(path, header_only=False):
    """A NIfTI file as (array in file order, nibabel image). Raises DataError where it cannot be read."""
    try:
        image = nib.load(path)
        return None if header_only else np.ascontiguousarray(image.dataobj), image     # nibabel's are Fortran-ordered
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, EOFError, OSError, ValueError,
            zlib.error) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({type(error).__name__}: {str(error)[:80]}); "
                        "download it again or remove it") from None


def _whole(label, path):
    """The label array if every value is a whole number in [0, 65535]."""
    if not np.isfinite(label).all() or (label != np.round(label)).any() or label.min() < 0 or label.max() > 65535:
        raise DataError(f"{path}: label values from {label.min():g} to {label.max():g} are not all whole numbers >= 0; "
                        "save it again as integers (nearest-neighbour resampling)")
    return label.astype(np.int32)


def _turn(image, path):
    """How the file's grid is turned to [V, H, W]: (orientation to LPS, thick axis there, spacing in mm (V, H, W))."""
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: affine without volume; write a header with spacing and orientation")
    to_lps = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPS"))
    if not all(z > 0 for z in image.header.get_zooms()[:3]):
        raise DataError(f"{path}: spacing {image.header.get_zooms()[:3]} is not positive; write the header again")
    zooms = np.empty(3)                                                    # spacing along the axes of the LPS array
    zooms[to_lps[:, 0].astype(int)] = image.header.get_zooms()[:3]         # not the affine's: ACDC's sform says 1 mm
    thick = int(zooms.argmax()) if zooms.max() > 1.5 * np.median(zooms) else 2      # isotropic: axial slices
    order = [thick] + [a for a in (2, 1, 0) if a != thick]                 # [X, Y, Z] -> [V, H, W]
    return to_lps, order, tuple(float(zooms[a]) for a in order)


def read_nifti(path):
    """A NIfTI file as (array [V, H, W] or [V, H, W, C], spacing (V, H, W) in mm). Raises DataError."""
    array, image = _load(path)
    array = array.reshape(array.shape[:4]) if array.ndim > 4 and array.size == np.prod(array.shape[:4]) else array
    if array.ndim not in (3, 4):
        raise DataError(f"{path}: shape {array.shape} is not a 3D volume; remove it or split it")
    to_lps, order, spacing = _turn(image, path)
    return np.ascontiguousarray(apply_orientation(array, to_lps).transpose(*order, *range(3, array.ndim))), spacing


def write_nifti(path, label, like):
    """Write label [V, H, W] on the grid, and with the affine, of the NIfTI file `like`, so that it lies over the image."""
    native = nib.load(like)
    to_lps, order, _ = _turn(native, like)
    back = ornt_transform(axcodes2ornt("LPS"), io_orientation(native.affine))
    array = apply_orientation(label.transpose(np.argsort(order)), back).astype(np.uint8)   # [V,H,W] -> [X,Y,Z] -> file order
    image = nib.Nifti1Image(array, native.affine)
    image.set_sform(native.affine, int(native.header["sform_code"]) or 2)
    image.set_qform(native.affine, int(native.header["qform_code"]), strip_shears=True)
    path = Path(path)
    partial = path.with_name("partial-" + path.name)
    nib.save(image, partial)
    os.replace(partial, path)


def read_label(case, cases):
    """The truth of a case as classes: uint8 [V, H, W]. Raises DataError where it is missing or holds an unknown value."""
    if cases.layout == "TransUNet npz":
        raw, path = _read_npz(case)[1], case.image
    elif case.label is None:
        raise DataError(f"{case.image}: has no label, and one is needed here; add the label or leave the case out")
    else:
        raw, path = read_nifti(case.label)[0], case.label
        raw = raw[..., 0] if raw.ndim == 4 and raw.shape[-1] == 1 else raw
    raw, label = _whole(raw, path), np.full(raw.shape, 255, np.uint8)
    for k, (lo, hi) in enumerate(cases.ranges):
        label[(raw >= lo) & (raw <= hi)] = k
    if (label == 255).any():
        raise DataError(f"{path}: unknown label {int(raw[label == 255].min())}; known are "
                        f"{', '.join(f'{lo} {name}' for name, (lo, _) in zip(cases.classes, cases.ranges))}")
    return label


def _read_npz(case):
    slices = []
    for file in case.files:
        try:
            with np.load(file) as content:
                slices.append((content["image"].astype(np.float32), content["label"]))
        except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: not an npz slice with image and label ({type(error).__name__}); remove it") from None
        if slices[-1][0].shape != slices[0][0].shape or slices[-1][1].shape != slices[0][1].shape:
            raise DataError(f"{file}: shape differs from {case.image.name}; remove the case or mend it")
    return np.stack([s[0] for s in slices]), np.stack([s[1] for s in slices])


def read_image(files, cases):
    """The image of one scan as (float32 [C, V, H, W] in the file's own units, spacing in mm), checked. Raises DataError."""
    if cases.layout == "TransUNet npz":
        image, spacing = _read_npz(Case("", "", files))[0][None], (1., 1., 1.)
    else:
        parts = [read_nifti(f) for f in files]
        spacing = parts[0][1]
        if any(p[0].shape != parts[0][0].shape for p in parts):
            raise DataError(f"{files[0]}: its channel files differ in shape; mend them or remove the case")
        image = np.concatenate([p[0] if p[0].ndim == 4 else p[0][..., None] for p in parts], -1)  # [V, H, W, C]
        image = np.moveaxis(image, -1, 0).astype(np.float32)                                      # [C, V, H, W]
    if len(image) != cases.channels:
        raise DataError(f"{files[0]}: {len(image)} channels, the dataset has {cases.channels}; remove it or split it")
    if not np.isfinite(image).all():
        raise DataError(f"{files[0]}: {int((~np.isfinite(image)).sum())} voxels are NaN or infinite; replace them")
    if (image.min((1, 2, 3)) == image.max((1, 2, 3))).any():
        raise DataError(f"{files[0]}: constant volume (every voxel {image.min():g}); remove the case")
    return image, spacing


def channel_files(file, channels):
    """The files of one image: itself, or for several channels NAME_0000, NAME_0001, ... beside it (nnU-Net)."""
    file = Path(file)
    if channels == 1 or "_0000." not in file.name:
        return (file,)
    return tuple(file.with_name(file.name.replace("_0000.", f"_{c:04d}.")) for c in range(channels))


def read_case(case, cases):
    """A case as a `Volume`, checked: shapes agree, at least two slices, known labels. Raises DataError."""
    image, spacing = read_image(case.files, cases)
    if image.shape[1] < 2:
        raise DataError(f"{case.image}: one slice only, so no neighbour and no position; remove the case")
    label = read_label(case, cases) if case.label or cases.layout == "TransUNet npz" else None
    if label is not None and label.shape != image.shape[1:]:
        raise DataError(f"{case.label or case.image}: label shape {label.shape} differs from image shape {image.shape[1:]}; "
                        "use the label that belongs to this image")
    return Volume(image, label, spacing)


def default_grid(cases):
    """(mm a pixel in plane, S pixels) that suit the data; reads headers only.

    ACDC: 2 mm and 96, the heart in the middle of a far larger field of view. Otherwise a crop of 96 pixels (64 where slices are
    smaller than that) that holds the median field of view, but no finer than the median pixel.
    """
    if cases.layout == "ACDC":
        return 2.0, 96
    spans, pixels = [], []
    for case in cases[:: max(1, len(cases) // 50)]:
        if cases.layout == "TransUNet npz":
            shape, spacing = read_image(case.files[:1], cases)[0].shape[1:], (1., 1., 1.)
        else:
            image = _load(case.image, header_only=True)[1]
            to_lps, order, spacing = _turn(image, case.image)
            shape = [image.shape[list(to_lps[:, 0].astype(int)).index(a)] for a in order]    # V, H, W
        spans.append(max(shape[1] * spacing[1], shape[2] * spacing[2]))
        pixels.append(min(spacing[1:]))
    span, pixel = float(np.median(spans)), float(np.median(pixels))
    size = 96 if span / pixel > 64 else 64
    return round(max(pixel, span / size), 2), size


def normalise(image, modality):
    """Intensities of a volume to [0, 1], channel by channel: CT by the window [-125, 275] HU, else 1 % - 99 % percentiles."""
    out = np.empty_like(image)                                             # [C, V, H, W]
    for c, x in enumerate(image):
        lo, hi = {"CT": (-125, 275), "[0, 1]": (0, 1)}.get(modality) or np.percentile(x, (1, 99))
        out[c] = np.clip((x - lo) / max(hi - lo, 1e-6 * abs(hi), 1e-30), 0, 1)
    return out


# ------------------------------------------------------------------------------------------------ splits

SSL4MIS_LABELLED = [99, 38, 50, 100, 58, 21, 49, 20, 72, 40]               # in this order
SSL4MIS_VAL = [2, 19, 28, 30, 39, 45, 78, 82, 85, 87]
SSL4MIS_TEST = [1, 7, 8, 11, 13, 22, 24, 33, 52, 59, 64, 65, 66, 68, 75, 80, 81, 83, 84, 93]
SYNAPSE_TEST = ["case0001", "case0002", "case0003", "case0004", "case0008", "case0022", "case0025", "case0029",
                "case0032", "case0035", "case0036", "case0038"]


def split_patients(cases, seed=0):
    """Patients into {"train", "val", "test", "labelled", "rule"}; `labelled` is `train` with labels, in the order of use.

    ACDC: SSL4MIS, 70 / 10 / 20, where its 100 patients are there. TransUNet npz: the published 12 test cases, where they
    are there. Otherwise 70 / 10 / 20 % of the labelled patients, shuffled with `seed`; unlabelled ones go to train.
    """
    patients = sorted({c.patient for c in cases})
    has_label = {c.patient for c in cases if c.label or cases.layout == "TransUNet npz"}
    acdc = lambda numbers: [f"patient{n:03d}" for n in numbers]
    if cases.layout == "ACDC" and set(acdc(range(1, 101))) <= set(patients):
        val, test, first = acdc(SSL4MIS_VAL), acdc(SSL4MIS_TEST), acdc(SSL4MIS_LABELLED)
        train = [p for p in acdc(range(1, 101)) if p not in val + test]
        labelled = first + [p for p in train if p not in first]
        rule = "SSL4MIS, 70 / 10 / 20 patients"
    else:
        known = [p for p in patients if p in has_label]
        if len(known) < 3:
            raise DataError(f"{cases.root}: {len(known)} patients with labels; 3 or more are needed to train, validate and test")
        known = [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
        if set(SYNAPSE_TEST) <= set(patients):
            test, rule = SYNAPSE_TEST, "Synapse, 18 / 12 cases of TransUNet, 2 of the 18 for validation"
            val = [p for p in known if p not in test][:2]
        else:
            n_test, n_val = max(1, round(.2 * len(known))), max(1, round(.1 * len(known)))
            test, val, rule = known[:n_test], known[n_test:n_test + n_val], f"70 / 10 / 20 % of the patients, seed {seed}"
        labelled = [p for p in known if p not in test + val]
        train = sorted(labelled + [p for p in patients if p not in has_label])
    if missing := [p for p in val + test if p not in has_label]:
        raise DataError(f"{cases.root}: {missing[0]} is a validation or test patient and has no label; add its label")
    return {"train": train, "val": sorted(val), "test": sorted(test), "rule": rule,
            "labelled": [p for p in labelled if p in has_label]}


# ------------------------------------------------------------------------------------------------ the phantom

PHANTOM_VERSION = 1             # part of the cache's key: raise it when the pictures change


def _smooth(rng, shape, cells):
    """A smooth random field of the shape [H, W] in about [-1, 1]: random values on a cells x cells lattice, interpolated."""
    weights = []
    for n in shape:
        at = np.linspace(0, cells - 1, n)
        weights.append(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))))       # [n, cells] linear interpolation
    return weights[0] @ rng.uniform(-1, 1, (cells, cells)) @ weights[1].T


def _anatomy(rng):
    """The numbers that make one patient: sizes in mm, angles in radians, intensities in [0, 1]."""
    u, n = rng.uniform, rng.normal
    blood, myo = u(.6, .9), u(.25, .42)
    return dict(
        length=u(70, 95), endo=u(19, 29), wall=u(7, 12), centre=(n(0, 7), n(0, 7)), tilt=(n(0, 5), n(0, 5)),
        shape=[(u(0, .10), u(0, 2 * np.pi)), (u(0, .05), u(0, 2 * np.pi))], rv_angle=np.pi + .35 + n(0, .25),
        rv_size=u(.85, 1.25), rv_end=u(.72, .93), squeeze=u(.6, .8), papillary=n(0, .3), blood=blood, myo=myo,
        lung=u(.05, .15), fat=u(.6, .95), liver=myo + n(0, .06), rv_blood=blood + n(0, .05), chest=u(70, 85), bias=u(.1, .4),
        noise=u(.02, .06), gamma=u(.75, 1.35), scale=10 ** u(1.8, 3.6), turn=n(0, .35),
        blobs=[(u(-60, 60), u(-60, 60), u(5, 16), u(5, 16), rng.choice([blood, myo])) for _ in range(6)])


def _phantom_plane(a, yx, s, es):
    """One infinitely thin plane at height s (0 base, 1 apex; below 0 the atria): (intensity [H, W], label [H, W])."""
    squeeze, wall = (a["squeeze"], a["wall"] * 1.35) if es else (1., a["wall"])
    y, x = yx[0] - a["centre"][0] - a["tilt"][0] * s, yx[1] - a["centre"][1] - a["tilt"][1] * s
    rho, theta = np.hypot(y, x), np.arctan2(y, x)
    lobes = 1 + sum(c * np.cos((k + 2) * (theta - phase)) for k, (c, phase) in enumerate(a["shape"]))
    profile = lambda end: np.sqrt(max(0., 1 - (max(s, 0.) / end) ** 2.2)) if s < end else 0.
    endo = a["endo"] * squeeze * profile(.93) * lobes
    epi = (a["endo"] * squeeze + wall) * profile(1.) * lobes
    # the right ventricle: an ellipse beside the left one, less what the left one covers
    along = np.cos(a["rv_angle"]) * x + np.sin(a["rv_angle"]) * y - .95 * a["endo"]
    across = -np.sin(a["rv_angle"]) * x + np.cos(a["rv_angle"]) * y
    size = (a["endo"] + 5) * a["rv_size"] * (1 if not es else .5 + .5 * squeeze) * profile(a["rv_end"])
    ellipse = np.hypot(along / .95, across / 1.15)
    image = np.full(x.shape, a["lung"])
    body_y, body_x = yx
    out = np.hypot(body_x / 1.15, body_y)
    image[out > a["chest"] - 16] = a["myo"] + .05                                       # chest wall
    image[out > a["chest"]] = a["fat"]
    image[np.hypot((body_x + 35) / 55, (body_y - 75) / 42) < 1] = a["liver"]
    image[np.hypot((body_x - 45) / 24, (body_y - 62) / 20) < 1] = a["rv_blood"] - .15   # stomach
    image[np.hypot(body_x - 42, body_y - 28) < 10] = a["blood"]                          # descending aorta
    for cy, cx, ry, rx, value in a["blobs"]:                                             # vessels, bowel, muscle
        image[np.hypot((body_y - cy) / ry, (body_x - cx) / rx) < 1] = value
    image[(rho < epi + 4) & (np.sin(theta * 2 + a["papillary"]) > .2) & (s < 1)] = a["fat"]   # epicardial fat
    label = np.zeros(x.shape, np.uint8)
    image[ellipse < size + 2.5 * (size > 0)] = a["myo"]                                 # its thin wall bears no label
    image[ellipse < size], label[ellipse < size] = a["rv_blood"], 1
    image[rho < epi], label[rho < epi] = a["myo"], 2
    image[rho < endo], label[rho < endo] = a["blood"], 3
    if .15 < s < .75:                                                                   # papillary muscles belong to LV
        for angle in (.6, 2.3):
            p = angle + a["papillary"]
            image[np.hypot(x - .55 * np.cos(p) * a["endo"] * squeeze, y - .55 * np.sin(p) * a["endo"] * squeeze) < 4] = a["myo"]
    if s < 0:
        label[:] = 0                                                                    # above the valves: not labelled
    return image, label


def phantom_volume(rng, a, es, spacing=(9., 1.6, 1.6), size=112):
    """A short-axis stack of patient `a` (from `_anatomy`): (image int16 [V, H, W], label uint8 [V, H, W])."""
    n = int(np.ceil(a["length"] * (.88 if es else 1) / spacing[0])) + 1
    start = rng.uniform(-.12, .02)
    axis = (np.arange(size) - (size - 1) / 2)
    images, labels = [], []
    for v in range(n):
        shift = rng.normal(0, 1.5, 2)                                      # breath-holds differ: slices are misaligned
        y, x = np.meshgrid(axis * spacing[1] + shift[0], axis * spacing[2] + shift[1], indexing="ij")   # mm, [H, W]
        yx = np.cos(a["turn"]) * y - np.sin(a["turn"]) * x, np.sin(a["turn"]) * y + np.cos(a["turn"]) * x
        planes = [_phantom_plane(a, yx, start + (v + o) * spacing[0] / a["length"], es) for o in (-.35, 0, .35)]
        image = np.mean([p[0] for p in planes], 0)                         # a thick slice is a mean over its planes
        image += .05 * _smooth(rng, image.shape, 24) * (image > .2)         # texture of the tissue
        image = sum(w * np.roll(image, k, 0) for k, w in ((-1, .25), (0, .5), (1, .25)))
        image = sum(w * np.roll(image, k, 1) for k, w in ((-1, .25), (0, .5), (1, .25)))
        images.append(image), labels.append(planes[1][1])
    field = np.exp(a["bias"] * _smooth(rng, (size, size), 3))              # [H, W]
    image = np.clip(np.stack(images), 0, None) ** a["gamma"] * field       # [V, H, W]
    image = np.hypot(image + rng.normal(0, a["noise"], image.shape), rng.normal(0, a["noise"], image.shape))   # Rician
    return np.round(image * a["scale"]).astype(np.int16), np.stack(labels)


def make_phantom(out, patients=40, seed=0):
    """Write the phantom to the folder `out` in the MSD layout, ED and ES of each patient; returns `out`. Raises DataError.

    Geometry only, nothing learned: no constant was chosen by the result of a method. Axes of the files: LPS, as ACDC's.
    """
    out = Path(out)
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    if out.exists():
        raise DataError(f"{out}: exists already; give a new folder or remove it")
    try:
        for folder in ("imagesTr", "labelsTr"):
            (partial / folder).mkdir(parents=True)
        names = []
        for p in range(patients):
            rng = np.random.default_rng([seed, p])
            anatomy, spacing = _anatomy(rng), (rng.choice([8., 9., 10.]), *[rng.uniform(1.45, 1.75)] * 2)
            for phase in ("ED", "ES"):
                arrays = phantom_volume(rng, anatomy, phase == "ES", spacing)
                names.append(f"phantom{p + 1:03d}_{phase}")
                affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.])            # LPS: x and y of RAS run backwards
                for folder, array in zip(("imagesTr", "labelsTr"), arrays):
                    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), partial / folder / f"{names[-1]}.nii.gz")
        (partial / "dataset.json").write_text(json.dumps({
            "name": "phantom", "description": "short-axis cardiac MRI made by data.py", "modality": {"0": "MRI"},
            "labels": {str(k): n for k, n in enumerate(ACDC)}, "numTraining": len(names),
            "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]}, indent=1))
        os.replace(partial, out)
    except OSError as error:
        raise DataError(f"{out}: cannot write the phantom ({error.strerror}); free space or give another folder") from None
    return out


# ------------------------------------------------------------------------------------------------ command

def audit(cases):
    """Read every case; returns (rows of text, problems, Counter of voxels per class, volumes for a montage)."""
    rows, problems, voxels, some = [], list(cases.warnings), Counter(), []
    for case in cases:
        try:
            volume = read_case(case, cases)
        except DataError as error:
            problems.append(str(error))
            continue
        counts = {} if volume.label is None else dict(zip(*np.unique(volume.label, return_counts=True)))
        voxels.update({int(k): int(n) for k, n in counts.items()})
        rows.append(f"{case.name:28} {case.patient:20} {'x'.join(map(str, volume.image.shape[1:])):>13}  "
                    f"{' x '.join(f'{s:.2f}' for s in volume.spacing):>20} mm  {sorted(map(int, counts)) or 'no label'}")
        if len(some) < 24:
            mid = volume.image.shape[1] // 2
            some.append((case.name, normalise(volume.image[:1], cases.modality)[0, mid],
                         None if volume.label is None else volume.label[mid]))
    return rows, problems, voxels, some


def draw_montage(some, path, n_classes):
    """One slice of each case with its labels, to `path`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(6, len(some))
    figure, axes = plt.subplots(-(-len(some) // columns), columns, figsize=(2 * columns, 2.2 * -(-len(some) // columns)),
                                squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image, label) in zip(axes.flat, some):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=6)
        if label is not None:
            axis.imshow(np.ma.masked_equal(label, 0), cmap="viridis", alpha=.45, vmin=1, vmax=max(2, n_classes - 1),
                        interpolation="nearest")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "phantom":
        return print(f"phantom written to {make_phantom(sys.argv[2])}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of a dataset; or: phantom OUT")
    parser.add_argument("--montage", metavar="PNG", help="draw one slice of up to 24 cases")
    options = parser.parse_args()
    cases = find_cases(options.path)
    rows, problems, voxels, some = audit(cases)
    print(f"{cases.root}: {cases.layout} layout, {len(cases)} cases of {len({c.patient for c in cases})} patients, "
          f"{cases.channels} channel(s), modality {cases.modality}")
    print("\n".join(rows))
    total = sum(voxels.values())
    for k, name in enumerate(cases.classes):
        print(f"class {k} {name:26} raw {cases.ranges[k][0]}-{cases.ranges[k][1]:<4} "
              f"{voxels[k]:>12} voxels {100 * voxels[k] / max(total, 1):6.2f} %")
    if groups := Counter(c.group for c in cases if c.group):
        print("groups (cases): " + ", ".join(f"{g} {n}" for g, n in sorted(groups.items())))
    print(f"{len(problems)} problems" + "".join(f"\n  {p}" for p in problems))
    if options.montage and some:
        draw_montage(some, options.montage, len(cases.classes))
        print(f"montage drawn to {options.montage}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
