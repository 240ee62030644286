"""From files to volumes, with numpy and nibabel alone (no torch): find the scans in a folder,
recognise its layout, read and check images and labels, split by patient, make the built-in phantom.

    python data.py PATH                      what is there: layout, cases, labels, problems
    python data.py PATH --montage OUT.png    the same, and a slice of up to 24 cases with its labels
    python data.py phantom OUT               write the phantom to OUT as an MSD folder

Letters: C channels, V slices of a volume, H rows, W columns. Every volume is turned to [V, H, W]
with V along the thick axis, in axial slices the patient's front up and right on the left, and
turned back before anything is written. It does not resample, crop or batch (common.py does), and it
never looks at a label to decide what part of an image to use.
"""
import argparse, json, math, os, re, shutil, sys, zipfile, zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform


class DataError(Exception):
    """What a user can mend: one line with file, value and fix. Scripts print it and exit with 2."""
    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))     # nested errors' texts have line breaks


@dataclass(frozen=True)
class Case:
    """One scan. `files`: one image file, or one a channel (nnU-Net), or one a slice (npz)."""
    name: str
    patient: str                # a patient's cases (ED and ES) never fall on two sides of a split
    files: tuple
    label: Path | None = None   # an npz holds both: there it is the first of `files`
    group: str = ""             # pathology group, where the layout names one (ACDC)

    @property
    def image(self):
        return self.files[0]


class Cases(list):
    """A list of `Case` and what the folder says about all of them.

    classes: names in order, 0 is the background; or {name: (lowest, highest raw value)}.
    """
    def __init__(self, cases, root, layout, classes, modality="MR", channels=1):
        super().__init__(cases)
        self.root = Path(root)
        self.layout = layout
        self.classes = list(classes)
        self.ranges = [(k, k) for k in range(len(classes))]
        if isinstance(classes, dict):
            self.ranges = list(classes.values())
        self.modality = modality
        self.channels = channels
        self.warnings = []


@dataclass
class Volume:
    """A scan in memory."""
    image: np.ndarray           # float32 [C, V, H, W]
    label: np.ndarray | None    # uint8 [V, H, W]
    spacing: tuple              # (slice, row, column) in mm


# ------------------------------------------------------------------------------------------ layouts

ACDC = ["background", "RV", "Myo", "LV"]
HVSMR = ["background", "myocardium", "blood pool"]
MMWHS = {"background": (0, 0), "Myo": (205, 205), "LA": (420, 421), "LV": (500, 500),
         "RA": (550, 550), "RV": (600, 600), "aorta": (820, 820), "pulmonary artery": (850, 850)}
CHAOS = {"background": (0, 0), "liver": (55, 70), "right kidney": (110, 135),
         "left kidney": (175, 200), "spleen": (240, 255)}
SYNAPSE = ["background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas",
           "spleen", "stomach"]
BTCV = ["background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
        "stomach", "aorta", "inferior vena cava", "portal and splenic vein", "pancreas",
        "right adrenal gland", "left adrenal gland"]

# (layout, images, labels, case name, classes, modality): told by the file names alone.
# The case name is the file's stem with a pattern replaced, and the same for image and label.
# Classes None: by the values in the labels. Modality None: CT if every case name begins with ct.
NAMED = (
    ("BTCV", "img/*", "label/*", (r"^\D*(\d+).*$", r"case\1"), BTCV, "CT"),
    ("MMWHS", "**/*_image.nii*", "**/*_label.nii*", ("_(image|label)$", ""), MMWHS, None),
    ("HVSMR 2016", "**/training_axial_crop_pat*.nii*", "**/training_axial_crop_pat*-label.nii*",
     ("-label$", ""), HVSMR, "MR"),
    ("plain", "images/*", "labels/*", ("", ""), None, "MR"),
)


def stem(path):
    """File name without .nii, .nii.gz or .npz."""
    return re.sub(r"(\.nii(\.gz)?|\.npz)$", "", Path(path).name)


def patient_of(name):
    """The patient of a case name: a time frame at its end (_ED, _ES, _frame07) is cut off."""
    return re.sub(r"[_-](ED|ES|frame\d+)$", "", name, flags=re.IGNORECASE)


def _niftis(folder, pattern="*"):
    """NIfTI files of a folder in name order; dot files, which macOS scatters, are no scans."""
    return sorted(f for f in folder.glob(pattern) if re.search(r"^[^.].*\.nii(\.gz)?$", f.name))


def _count(names, what):
    """[] or one warning: how many, what about them, and the first three of their names."""
    if not names:
        return []
    more = " ..." if len(names) > 3 else ""
    return [f"{len(names)} {what}: {', '.join(names[:3])}{more}"]


def _pairs(images, labels):
    """(cases, warnings) from {name: image files} and {name: label}; either may miss the other."""
    cases = [Case(n, patient_of(n), tuple(images[n]), labels.get(n)) for n in sorted(images)]
    orphans = sorted(labels.keys() - images.keys())
    warnings = [f"{labels[n]}: label without image, skipped" for n in orphans]
    bare = [c.name for c in cases if not c.label]
    return cases, warnings + _count(bare, "images without label, used without one")


def _acdc(root):
    patterns = ("patient*/Info.cfg", "*/patient*/Info.cfg", "*/*/patient*/Info.cfg")
    infos = sorted(info for pattern in patterns for info in root.glob(pattern))
    found = Cases([], root, "ACDC", ACDC)
    for info in infos:
        folder = info.parent
        text = info.read_text(errors="replace")
        entries = dict(re.findall(r"(\w+)[ \t]*:[ \t]*(\S+)", text))
        files = {stem(f): f for f in _niftis(folder)}
        for phase in ("ED", "ES"):
            number = entries.get(phase, "")
            if not number.isdigit():
                raise DataError(f"{info}: no whole number for ED and ES; download the file again")
            name = f"{folder.name}_frame{int(number):02d}"   # never by file order: patient090
            image = files.pop(name, None)
            label = files.pop(name + "_gt", None)
            if image:
                found.append(Case(name, folder.name, (image,), label, entries.get("Group", "")))
            else:
                found.warnings.append(f"{folder}: Info.cfg names {name}, not there, skipped")
            if image and not label:
                found.warnings.append(f"{image}: no {name}_gt beside it, used without label")
        for name, file in files.items():
            why = "4D cine" if name.endswith("_4d") else "neither ED nor ES of Info.cfg"
            found.warnings.append(f"{file}: {why}, skipped")
    return found if infos else None


def _json_layouts(root):
    """MSD and nnU-Net v2: both have dataset.json, with `labels` the other way round."""
    path = root / "dataset.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text())
        nnunet = "channel_names" in info
        modalities = [str(m) for m in info["channel_names" if nnunet else "modality"].values()]
        modality = "CT" if "CT" in [m.upper() for m in modalities] else modalities[0]
        labels = info["labels"]
        if nnunet:
            labels = {value: name for name, value in labels.items()}
        labels = {int(value): name for value, name in labels.items()}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a dataset.json of MSD or nnU-Net v2 "
                        f"({type(error).__name__}: {error}); mend it") from None
    values = sorted(labels)
    if values != list(range(len(values))):
        raise DataError(f"{path}: label values {values} are not 0, 1, 2, ...; renumber them")
    images, skipped = {}, []
    for file in _niftis(root / "imagesTr"):
        match = re.fullmatch(r"(.+)_\d{4}" if nnunet else "(.+)", stem(file))
        if match:
            images.setdefault(match[1], []).append(file)
        else:
            skipped.append(f"{file}: name does not end in a channel number (_0000), skipped")
    for name, files in images.items():
        if nnunet and len(files) != len(modalities):
            raise DataError(f"{files[0].with_name(name)}: {len(files)} channel files, dataset.json "
                            f"names {len(modalities)}; add the missing ones or remove the case")
    cases, warnings = _pairs(images, {stem(f): f for f in _niftis(root / "labelsTr")})
    if _niftis(root / "imagesTs"):
        warnings.append(f"{root / 'imagesTs'}: the challenge's test images are left alone "
                        "(segment them with --predict)")
    layout = "nnU-Net v2" if nnunet else "MSD"
    found = Cases(cases, root, layout, [labels[k] for k in values], modality, len(modalities))
    found.warnings = skipped + warnings
    return found


def _transunet(root):
    slices = {}
    for file in [*root.glob("*.npz"), *root.glob("train_npz/*.npz")]:
        match = re.fullmatch(r"(case\d+)_slice(\d+)", stem(file))
        if match:
            slices.setdefault(match[1], []).append((int(match[2]), file))
    found = Cases([], root, "TransUNet npz", SYNAPSE, "[0, 1]")
    for name in sorted(slices):
        files = tuple(file for _, file in sorted(slices[name]))
        found.append(Case(name, name, files, files[0]))
    found.warnings = ["npz slices carry no organ names and no spacing: the map of TransUNet and "
                      "1 mm are assumed, distances are in voxels"]
    return found or None


def _named(root):
    """The layouts of the table NAMED."""
    for layout, image_glob, label_glob, (pattern, replacement), classes, modality in NAMED:
        labels = _niftis(root, label_glob)
        images = [f for f in _niftis(root, image_glob) if f not in labels]
        if not images and not (root / image_glob).parent.is_dir():
            continue
        images = {re.sub(pattern, replacement, stem(f)): [f] for f in images}
        labels = {re.sub(pattern, replacement, stem(f)): f for f in labels}
        cases, warnings = _pairs(images, labels)
        if classes is None:
            layout, classes = _by_value(root, cases)
        if modality is None:
            modality = "CT" if all(n.lower().startswith("ct") for n in images) else "MR"
        found = Cases(cases, root, layout, classes, modality)
        found.warnings = warnings
        return found
    return None


def _by_value(root, cases):
    """(layout, classes) by the values in the labels: CHAOS's grey ones, or 0, 1, 2, ..."""
    values = {0}
    for label in [c.label for c in cases if c.label]:
        values |= set(np.unique(_whole(_load(label)[0], label)).tolist())
    grey = [v for v in values for low, high in CHAOS.values() if low <= v <= high]
    if max(values) > 8 and len(grey) == len(values):
        return "CHAOS-NIfTI", CHAOS
    if sorted(values) != list(range(len(values))):
        raise DataError(f"{root}/labels: label values {sorted(values)} are not consecutive; "
                        "renumber them 0, 1, 2, ...")
    return "plain", ["background"] + [f"class {k}" for k in range(1, max(2, len(values)))]


def find_cases(path):
    """The scans below a folder, as `Cases` (a list of `Case` with layout, classes and warnings).

    Reads no image; of the plain layout it reads the labels, for their values.
    Layouts: ACDC, MSD, nnU-Net v2, TransUNet npz, raw BTCV, MMWHS, HVSMR 2016, plain, CHAOS-NIfTI
    (see results/data.md). Raises DataError where the path is no folder or of no known layout.
    """
    root = Path(path)
    if not root.is_dir():
        why = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root}: {why}; give the folder of a dataset")
    for layout in (_acdc, _json_layouts, _transunet, _named):
        cases = layout(root)
        if cases:
            return cases
        if cases is not None:
            raise DataError(f"{root}: {cases.layout} layout, but it holds no images; "
                            "check the download")
    names = sorted(f.name for f in root.iterdir())
    raise DataError(f"{root}: no known layout (found {', '.join(names[:5]) or 'nothing'}); "
                    "arrange the scans as images/NAME.nii.gz and labels/NAME.nii.gz")


# ----------------------------------------------------------------------------- reading and checking

# what numpy and nibabel raise at a file that is damaged or something else
UNREADABLE = (EOFError, KeyError, MemoryError, OSError, OverflowError, TypeError, ValueError,
              nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
              zipfile.BadZipFile, zlib.error)


@contextmanager
def _refusing(path, kind="NIfTI file"):
    """Turns what numpy and nibabel raise at a bad file into a DataError."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable {kind} ({type(error).__name__}: "
                        f"{str(error)[:80]}); download it again or remove it") from None


def _open(path):
    """The nibabel image of a NIfTI file; its header is checked, its voxels are not read yet."""
    with _refusing(path):
        image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):
        raise DataError(f"{path}: {type(image).__name__}, not NIfTI; convert it")
    shape = image.shape
    if len(shape) < 3 or min(shape) < 1 or max(shape[4:], default=1) > 1:
        raise DataError(f"{path}: shape {shape} is not a 3D volume; remove it or split it")
    return image


def _load(path):
    """A NIfTI file as (array [X, Y, Z] or [X, Y, Z, C] in file order, nibabel image)."""
    image = _open(path)
    with _refusing(path):
        array = np.ascontiguousarray(image.dataobj)          # nibabel's are Fortran-ordered
    if array.dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {array.dtype} are no grey values; save it again")
    return array.reshape(array.shape[:4]), image


def _whole(label, path):
    """The label array if every value is a whole number in [0, 65535]."""
    low, high = label.min(), label.max()                     # nan fails every comparison
    if not (low >= 0 and high <= 65535 and (label == np.round(label)).all()):
        raise DataError(f"{path}: label values from {low:g} to {high:g} are not all whole "
                        "numbers >= 0; save it again as integers (nearest-neighbour resampling)")
    return label.astype(np.int32)


def _grid(image, path):
    """How the voxels of a nibabel image lie: (to_lps, order, shape, spacing).

    to_lps turns the file's axes to L, P, S; order transposes these to V, H, W; shape and spacing
    (mm) are those of V, H, W.
    """
    affine = image.affine
    if not np.isfinite(affine).all() or np.isnan(io_orientation(affine)).any():
        raise DataError(f"{path}: affine without volume; give it spacing and orientation")
    to_lps = ornt_transform(io_orientation(affine), axcodes2ornt("LPS"))
    zooms = np.array(image.header.get_zooms()[:3], float)    # not the affine's: ACDC's says 1 mm
    if not ((zooms > 0) & (zooms < 1000)).all():
        raise DataError(f"{path}: spacing {zooms} mm is no scan's; write the header again")
    axes = to_lps[:, 0].argsort()                            # the file's axis along L, P and S
    thick = 2                                                # isotropic: axial slices
    if zooms.max() > 1.5 * np.median(zooms):
        thick = int(zooms[axes].argmax())
    order = [thick] + [a for a in (2, 1, 0) if a != thick]
    axes = axes[order]
    return to_lps, order, [image.shape[a] for a in axes], tuple(zooms[axes].tolist())


def read_nifti(path):
    """A NIfTI file as (array [V, H, W] or [V, H, W, C], spacing in mm). Raises DataError."""
    array, image = _load(path)
    to_lps, order, _, spacing = _grid(image, path)
    array = apply_orientation(array, to_lps)
    array = array.transpose(*order, *range(3, array.ndim))
    return np.ascontiguousarray(array), spacing


def write_nifti(path, label, like):
    """Write label [V, H, W] on the grid of the NIfTI file `like`, so that it lies over the image.

    Both its affine and its spacing are taken: they need not agree (ACDC).
    """
    native = _open(like)
    order = _grid(native, like)[1]
    back = ornt_transform(axcodes2ornt("LPS"), io_orientation(native.affine))
    array = apply_orientation(label.transpose(np.argsort(order)), back)
    image = nib.Nifti1Image(array.astype(np.uint8), native.affine)
    image.set_sform(native.affine, int(native.header["sform_code"]) or 2)
    image.set_qform(native.affine, int(native.header["qform_code"]), strip_shears=True)
    image.header.set_zooms(native.header.get_zooms()[:3])
    partial = Path(path).with_name("partial-" + Path(path).name)
    nib.save(image, partial)
    os.replace(partial, path)


def check_lie(files):
    """Refuse NIfTI files of one scan that are turned otherwise than the first. Raises DataError.

    Every file is turned by its own header: right where a header that says other axes also puts the
    volume's middle where the first's is; else it is not true, and a label would lie mirrored.
    """
    lies = []
    for file in files:
        image = _open(file)
        middle = [(n - 1) / 2 for n in image.shape[:3]]
        lies.append(("".join(nib.aff2axcodes(image.affine)), apply_affine(image.affine, middle)))
    axes, place = lies[0]
    for file, (other, there) in zip(files[1:], lies[1:]):
        if other != axes and np.abs(there - place).max() > 1:      # mm
            raise DataError(f"{file}: its axes lie {other}, those of {files[0].name} {axes}, and "
                            "its middle elsewhere; save it on that grid")


def _read_npz(files, key):
    """The "image" or the "label" of npz files, one a slice: [V, H, W]."""
    slices = []
    for file in files:
        with _refusing(file, "npz slice with image and label"), np.load(file) as content:
            slices.append(content[key])
        if slices[-1].shape != slices[0].shape:
            raise DataError(f"{file}: shape differs from {files[0].name}; mend or remove the case")
    return np.stack(slices)


def _read(files, key):
    """The "image" or the "label" of a scan from its files: (array [V, H, W, C], spacing in mm)."""
    if files[0].suffix == ".npz":
        return _read_npz(files, key)[..., None], (1., 1., 1.)
    channels = []
    for file in files:
        array, spacing = read_nifti(file)
        channels.append(array if array.ndim == 4 else array[..., None])
        if channels[-1].shape != channels[0].shape:
            raise DataError(f"{file}: its channel files differ in shape; mend or remove the case")
    return np.concatenate(channels, -1), spacing


def read_label(case, cases):
    """The truth of a case as classes: uint8 [V, H, W]. Raises DataError where there is none."""
    if case.label is None:
        raise DataError(f"{case.image}: has no label, and one is needed; add it or leave it out")
    files = case.files if case.label in case.files else (case.label,)
    raw = _whole(_read(files, "label")[0], case.label)       # [V, H, W, 1]
    label = np.full(raw.shape, 255, np.uint8)
    for k, (low, high) in enumerate(cases.ranges):
        label[(raw >= low) & (raw <= high)] = k
    if (label == 255).any():
        known = [f"{low} {name}" for name, (low, _) in zip(cases.classes, cases.ranges)]
        raise DataError(f"{case.label}: unknown label {raw[label == 255].min()}; "
                        f"known are {', '.join(known)}")
    return label[..., 0] if label.shape[-1] == 1 else label


def read_image(files, cases):
    """The image of one scan as (float32 [C, V, H, W] in the file's own units, spacing in mm).

    Checked: number of channels, finite, not constant. Raises DataError.
    """
    array, spacing = _read(files, "image")
    image = np.moveaxis(array, -1, 0).astype(np.float32)     # [C, V, H, W]
    if len(image) != cases.channels:
        raise DataError(f"{files[0]}: {len(image)} channels, the dataset has {cases.channels}; "
                        "remove it or split it")
    bad = image.size - np.isfinite(image).sum()
    if bad:
        raise DataError(f"{files[0]}: {bad} voxels are NaN or infinite; replace them")
    if (image.min((1, 2, 3)) == image.max((1, 2, 3))).any():
        raise DataError(f"{files[0]}: constant volume (every voxel {image.min():g}); remove it")
    return image, spacing


def channel_files(file, channels):
    """The files of an image: itself, or if it is nnU-Net's NAME_0000, one for each channel."""
    file = Path(file)
    if channels == 1 or "_0000." not in file.name:
        return (file,)
    names = [file.name.replace("_0000.", f"_{c:04d}.") for c in range(channels)]
    return tuple(file.with_name(name) for name in names)


def read_case(case, cases):
    """A case as a `Volume`: at least two slices, shapes that agree, known labels, or DataError."""
    image, spacing = read_image(case.files, cases)
    shape = image.shape[1:]
    if shape[0] < 2:
        raise DataError(f"{case.image}: one slice only, so no neighbour; remove the case")
    label = read_label(case, cases) if case.label else None
    if label is not None and label.shape != shape:
        raise DataError(f"{case.label}: label shape {label.shape} differs from image shape "
                        f"{shape}; use the label that belongs to this image")
    if case.image.suffix != ".npz":
        check_lie([*case.files, case.label] if case.label else case.files)
    return Volume(image, label, spacing)


def _extent(path):
    """(shape, spacing in mm) of V, H, W, of a NIfTI file by its header alone."""
    if path.suffix == ".npz":
        return _read_npz([path], "image").shape, (1., 1., 1.)
    return _grid(_open(path), path)[2:]


def default_grid(cases):
    """(mm a pixel in plane, S pixels) that suit the data; reads headers only.

    ACDC: 2 mm and 96, the heart in the middle of a far larger field of view. Otherwise a crop of 96
    pixels (64 where slices have no more than that) that holds the median field of view, but no
    finer than the median pixel.
    """
    if cases.layout == "ACDC":
        return 2.0, 96
    spans, pixels = [], []
    for case in cases[::max(1, len(cases) // 50)]:
        shape, spacing = _extent(case.image)
        spans.append(max(shape[1] * spacing[1], shape[2] * spacing[2]))
        pixels.append(min(spacing[1:]))
    span = float(np.median(spans))
    pixel = float(np.median(pixels))
    size = 96 if span / pixel > 64 else 64
    return round(max(pixel, span / size), 2), size


def _says_nothing(image):
    """True where a nibabel image's orientation or spacing is what programs write for bare arrays.

    No orientation at all; the identity of nibabel (sform alone) or of SimpleITK; spacing 1 1 1 on
    at most 20 slices beside three times as many rows and columns.
    """
    codes = [int(image.header[key]) for key in ("sform_code", "qform_code")]
    if codes == [0, 0]:
        return True
    if set(image.header.get_zooms()[:3]) != {1}:
        return False
    few, rows, _ = sorted(image.shape[:3])
    if few <= 20 and rows >= 3 * few:
        return True
    if np.array_equal(image.affine, np.eye(4)):
        return 0 in codes                                    # both set: meant so (MSD Hippocampus)
    return np.array_equal(image.affine, np.diag([-1, -1, 1, 1]))


def header_warnings(files):
    """[] or one warning: the NIfTI files whose header says nothing. Reads headers only."""
    names = []
    for file in map(Path, files):
        try:
            if file.suffix != ".npz" and _says_nothing(_open(file)):
                names.append(file.name)
        except DataError:                                    # `read_case` says what is wrong
            continue
    return _count(names, "headers that do not say orientation or spacing (both are a guess, and a "
                  "flipped scan is segmented wrongly without a word: look at them with data.py "
                  "--montage and write the headers again)")


def in_hounsfield(image):
    """False for a CT image that cannot be in HU: nothing negative (8 bit), or a range below 100."""
    low, high = image.min(), image.max()
    return bool(low < 0 and high - low > 100)


def hounsfield_warnings(names):
    """[] or one warning: these CT cases are not `in_hounsfield`."""
    return _count(names, "CT volumes not in HU (nothing negative, or a range below 100), so scaled "
                  "by their 1 % and 99 % percentiles, not by the window [-125, 275]")


def normalise(image, modality):
    """Intensities of a volume [C, V, H, W] to [0, 1], channel by channel.

    CT by the window [-125, 275] HU; all else, and CT not `in_hounsfield`, by the 1 % and 99 %
    percentiles.
    """
    out = np.empty_like(image)
    for c, x in enumerate(image):
        if modality == "[0, 1]":
            low, high = 0, 1
        elif modality == "CT" and in_hounsfield(x):
            low, high = -125, 275
        else:
            low, high = np.percentile(x, (1, 99))
        width = max(high - low, 1e-6 * abs(high), 1e-30)     # nearly constant, or all 0: no noise
        out[c] = np.clip((x - low) / width, 0, 1)
    return out


# ------------------------------------------------------------------------------------------- splits

def _acdc_names(numbers):
    return [f"patient{int(number):03d}" for number in numbers]


ACDC_PATIENTS = _acdc_names(range(1, 101))
SSL4MIS_LABELLED = _acdc_names("99 38 50 100 58 21 49 20 72 40".split())  # in this order
SSL4MIS_VAL = _acdc_names("2 19 28 30 39 45 78 82 85 87".split())
SSL4MIS_TEST = _acdc_names("1 7 8 11 13 22 24 33 52 59 64 65 66 68 75 80 81 83 84 93".split())
SYNAPSE_TEST = ("case0001 case0002 case0003 case0004 case0008 case0022 case0025 case0029 "
                "case0032 case0035 case0036 case0038").split()


def split_patients(cases, seed=0):
    """Patients into {"train", "val", "test", "labelled", "rule"}.

    labelled: `train` with labels, in the order of use. ACDC: SSL4MIS, 70 / 10 / 20, where its 100
    patients are there; any beyond them are on no side. Synapse: the published 12 test cases, where
    they are there. Otherwise 70 / 10 / 20 % of the labelled patients, shuffled with `seed`;
    unlabelled ones go to train.
    """
    patients = sorted({c.patient for c in cases})
    labelled = {c.patient for c in cases if c.label}
    if cases.layout == "ACDC" and set(ACDC_PATIENTS) <= set(patients):
        patients = ACDC_PATIENTS
        order = SSL4MIS_LABELLED + [p for p in patients if p not in SSL4MIS_LABELLED]
        val, test, rule = SSL4MIS_VAL, SSL4MIS_TEST, "SSL4MIS, 70 / 10 / 20 patients"
    else:
        known = sorted(labelled)
        n = len(known)
        if n < 3:
            raise DataError(f"{cases.root}: {n} patients with labels; 3 or more are needed")
        order = [known[i] for i in np.random.default_rng(seed).permutation(n)]
        if set(SYNAPSE_TEST) <= set(patients):
            test = SYNAPSE_TEST
            val = [p for p in order if p not in test][:2]
            rule = "Synapse, 18 / 12 cases of TransUNet, 2 of the 18 for validation"
        else:
            n_test = max(1, round(.2 * n))
            n_val = max(1, round(.1 * n))
            test, val = order[:n_test], order[n_test:n_test + n_val]
            rule = f"70 / 10 / 20 % of the patients, seed {seed}"
    for patient in val + test:
        if patient not in labelled:
            raise DataError(f"{cases.root}: {patient} is a validation or test patient and has no "
                            "label; add it")
    train = [p for p in patients if p not in val + test]
    return {"train": train, "val": sorted(val), "test": sorted(test), "rule": rule,
            "labelled": [p for p in order if p in train and p in labelled]}


# -------------------------------------------------------------------------------------- the phantom

PHANTOM_VERSION = 1             # part of the cache's key: raise it when the pictures change


def _smooth(rng, size, cells):
    """A smooth random field [size, size] in about [-1, 1]: a lattice of cells x cells values."""
    at = np.linspace(0, cells - 1, size)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)))   # [size, cells]
    return weights @ rng.uniform(-1, 1, (cells, cells)) @ weights.T


def _anatomy(rng):
    """The numbers that make one patient: sizes in mm, angles in radians, intensities in [0, 1]."""
    u, n = rng.uniform, rng.normal
    blood = u(.6, .9)
    myo = u(.25, .42)
    a = SimpleNamespace(
        blood=blood, myo=myo,
        # length from base to apex, radius of the left cavity
        length=u(70, 95), endo=u(19, 29), wall=u(7, 12),
        centre=(n(0, 7), n(0, 7)), tilt=(n(0, 5), n(0, 5)),
        # waves of the contours: number in a turn, height, phase
        waves=[(2, u(0, .10), u(0, 2 * np.pi)), (3, u(0, .05), u(0, 2 * np.pi))],
        # the right ventricle: direction, size, height where it ends
        rv_angle=np.pi + .35 + n(0, .25), rv_size=u(.85, 1.25), rv_end=u(.72, .93),
        # radius of a cavity at ES / at ED
        squeeze=u(.6, .8), papillary=n(0, .3),
        lung=u(.05, .15), fat=u(.6, .95), liver=myo + n(0, .06), rv_blood=blood + n(0, .05),
        chest=u(70, 85),
        bias=u(.1, .4), noise=u(.02, .06), gamma=u(.75, 1.35), scale=10 ** u(1.8, 3.6),
        turn=n(0, .35))
    a.blobs = []                                             # vessels, bowel, muscle
    for _ in range(6):
        ellipse = u(-60, 60), u(-60, 60), u(5, 16), u(5, 16)
        a.blobs.append((ellipse, rng.choice([blood, myo])))
    return a


def _chest(a, y, x):
    """Intensity [H, W] of all but the heart, y and x in mm from the middle of the body."""
    image = np.full(x.shape, a.lung)
    radius = np.hypot(x / 1.15, y)
    image[radius > a.chest - 16] = a.myo + .05               # chest wall
    image[radius > a.chest] = a.fat
    liver = (75, -35, 42, 55), a.liver                       # centre y, x and radius y, x in mm
    stomach = (62, 45, 20, 24), a.rv_blood - .15
    aorta = (28, 42, 10, 10), a.blood
    for (cy, cx, ry, rx), value in (liver, stomach, aorta, *a.blobs):
        image[np.hypot((y - cy) / ry, (x - cx) / rx) < 1] = value
    return image


def _profile(s, end):
    """How wide a ventricle is at height s, in [0, 1]: full at the base (0), nothing at `end`."""
    return np.sqrt(max(0., 1 - (max(s, 0.) / end) ** 2.2))


def _phantom_plane(a, yx, s, es):
    """One infinitely thin plane at height s (0 base, 1 apex; below 0 the atria), yx in mm:
    (intensity [H, W], label [H, W])."""
    squeeze = a.squeeze if es else 1.
    wall = a.wall * 1.35 if es else a.wall
    y = yx[0] - a.centre[0] - a.tilt[0] * s
    x = yx[1] - a.centre[1] - a.tilt[1] * s
    rho = np.hypot(y, x)
    theta = np.arctan2(y, x)
    # the left ventricle: radius of its cavity, and with its wall, in every direction
    waves = 1 + sum(height * np.cos(k * (theta - phase)) for k, height, phase in a.waves)
    endo = a.endo * squeeze * _profile(s, .93) * waves
    epi = (a.endo * squeeze + wall) * _profile(s, 1.) * waves
    # the right ventricle: an ellipse beside the left one, less what the left one covers
    cos, sin = np.cos(a.rv_angle), np.sin(a.rv_angle)
    along = cos * x + sin * y - .95 * a.endo
    across = -sin * x + cos * y
    rv = np.hypot(along / .95, across / 1.15)
    size = (a.endo + 5) * a.rv_size * (.5 + .5 * squeeze) * _profile(s, a.rv_end)
    image = _chest(a, *yx)
    if s < 1:
        fat = np.sin(theta * 2 + a.papillary) > .2
        image[fat & (rho < epi + 4)] = a.fat                 # epicardial
    image[rv < size + 2.5 * (size > 0)] = a.myo              # its thin wall bears no label
    label = np.zeros(x.shape, np.uint8)
    parts = (rv < size, a.rv_blood), (rho < epi, a.myo), (rho < endo, a.blood)
    for k, (mask, value) in enumerate(parts, 1):
        image[mask] = value
        label[mask] = k
    if .15 < s < .75:
        for angle in (.6 + a.papillary, 2.3 + a.papillary):  # papillary muscles belong to LV
            py = .55 * np.sin(angle) * a.endo * squeeze
            px = .55 * np.cos(angle) * a.endo * squeeze
            image[np.hypot(x - px, y - py) < 4] = a.myo
    if s < 0:
        label[:] = 0                                         # above the valves: not labelled
    return image, label


def phantom_volume(rng, a, es, spacing=(9., 1.6, 1.6), size=112):
    """A short-axis stack of the patient `a` of `_anatomy`: (image int16, label uint8) [V, H, W]."""
    length = a.length * (.88 if es else 1)
    start = rng.uniform(-.12, .02)
    axis = np.arange(size) - (size - 1) / 2
    cos, sin = np.cos(a.turn), np.sin(a.turn)
    images, labels = [], []
    for v in range(math.ceil(length / spacing[0]) + 1):
        # breath-holds differ, so slices are misaligned
        down, right = rng.normal(0, 1.5, 2)
        y, x = np.meshgrid(axis * spacing[1] + down, axis * spacing[2] + right, indexing="ij")
        yx = cos * y - sin * x, sin * y + cos * x            # mm, each [H, W]
        # a thick slice is the mean of its planes
        heights = [start + (v + o) * spacing[0] / a.length for o in (-.35, 0, .35)]
        planes = [_phantom_plane(a, yx, s, es) for s in heights]
        image = np.mean([p[0] for p in planes], 0)
        # texture of the tissue, and a blur along rows and columns
        image += .05 * _smooth(rng, size, 24) * (image > .2)
        for way in (0, 1):
            beside = np.roll(image, -1, way), np.roll(image, 1, way)
            image = .25 * beside[0] + .5 * image + .25 * beside[1]
        images.append(image)
        labels.append(planes[1][1])
    field = np.exp(a.bias * _smooth(rng, size, 3))           # [H, W]
    image = np.clip(np.stack(images), 0, None) ** a.gamma * field         # [V, H, W]
    real = image + rng.normal(0, a.noise, image.shape)
    imaginary = rng.normal(0, a.noise, image.shape)
    image = np.hypot(real, imaginary)                        # Rician noise
    return np.round(image * a.scale).astype(np.int16), np.stack(labels)


def _write_phantom(folder, patients, seed):
    """Write images, labels and dataset.json into the new folder."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    training = []
    for p in range(patients):
        rng = np.random.default_rng([seed, p])
        anatomy = _anatomy(rng)
        thick = rng.choice([8., 9., 10.])
        pixel = rng.uniform(1.45, 1.75)
        affine = np.diag([-pixel, -pixel, thick, 1.])        # LPS: x and y of RAS run backwards
        for phase in ("ED", "ES"):
            name = f"phantom{p + 1:03d}_{phase}.nii.gz"
            files = {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}
            arrays = phantom_volume(rng, anatomy, phase == "ES", (thick, pixel, pixel))
            for file, array in zip(files.values(), arrays):
                nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), folder / file)
            training.append(files)
    info = {"name": "phantom", "description": "short-axis cardiac MRI made by data.py",
            "modality": {"0": "MRI"}, "labels": {str(k): name for k, name in enumerate(ACDC)},
            "numTraining": len(training), "training": training}
    (folder / "dataset.json").write_text(json.dumps(info, indent=1))


def make_phantom(out, patients=40, seed=0):
    """Write the phantom to the folder `out` in the MSD layout, ED and ES of each patient.

    Geometry only, nothing learned: no constant was chosen by the result of a method. Axes of the
    files: LPS, as ACDC's. Returns `out`. Raises DataError.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: exists already; give a new folder or remove it")
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)               # of a killed process of this number
    try:
        _write_phantom(partial, patients, seed)
        os.replace(partial, out)
    except OSError as error:
        if not out.exists():                                 # else another run was faster
            raise DataError(f"{out}: cannot write the phantom ({error.strerror}); "
                            "free space or give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


# ------------------------------------------------------------------------------------------ command

def audit(cases):
    """Read every case and print a line of it. Returns (problems, voxels of each class, slices).

    slices: (name, image [H, W], label [H, W] or None) of the middle of up to 24 volumes.
    """
    problems = cases.warnings + header_warnings(c.image for c in cases)
    voxels = np.zeros(len(cases.classes), int)
    slices, not_hu = [], []
    for case in cases:
        try:
            volume = read_case(case, cases)
        except DataError as error:
            problems.append(str(error))
            continue
        image, label = volume.image, volume.label
        counts = np.zeros_like(voxels)
        if label is not None:
            counts = np.bincount(label.ravel(), minlength=len(voxels))
        voxels += counts
        mid = image.shape[1] // 2
        print(f"{case.name:28} {case.patient:20} {'%dx%dx%d' % image.shape[1:]:>13}  "
              f"{'%.2f x %.2f x %.2f' % volume.spacing:>20} mm  "
              f"{np.flatnonzero(counts).tolist() or 'no label'}")
        if cases.modality == "CT" and not all(in_hounsfield(x) for x in image):
            not_hu.append(case.name)
        if len(slices) < 24:
            grey = normalise(image[:1], cases.modality)
            slices.append((case.name, grey[0, mid], None if label is None else label[mid]))
    return problems + hounsfield_warnings(not_hu), voxels, slices


def draw_montage(slices, path, n_classes):
    """The slices of `audit`, with their labels over them, to the picture `path`."""
    from matplotlib.figure import Figure                     # here: a second to import
    columns = min(6, len(slices))
    rows = math.ceil(len(slices) / columns)
    figure = Figure(figsize=(2 * columns, 2.2 * rows), layout="tight")
    for n, (name, image, label) in enumerate(slices, 1):
        axis = figure.add_subplot(rows, columns, n)
        axis.axis("off")
        axis.set_title(name, fontsize=6)
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        if label is not None:
            axis.imshow(np.ma.masked_equal(label, 0), cmap="viridis", alpha=.45, vmin=1,
                        vmax=max(2, n_classes - 1), interpolation="nearest")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:                   # no such folder, no such format
        raise DataError(f"{path}: cannot be drawn ({error}); give another --montage") from None


def main():
    if sys.argv[1:2] == ["phantom"] and len(sys.argv) == 3:
        print(f"phantom written to {make_phantom(sys.argv[2])}")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of a dataset; or: phantom OUT")
    parser.add_argument("--montage", metavar="PNG", help="draw one slice of up to 24 cases")
    options = parser.parse_args()
    cases = find_cases(options.path)
    print(f"{cases.root}: {cases.layout} layout, {len(cases)} cases of "
          f"{len({c.patient for c in cases})} patients, {cases.channels} channel(s), "
          f"modality {cases.modality}")
    problems, voxels, slices = audit(cases)
    shares = 100 * voxels / max(1, voxels.sum())
    for k, name in enumerate(cases.classes):
        low, high = cases.ranges[k]
        print(f"class {k} {name:26} raw {low}-{high:<4} {voxels[k]:>12} voxels {shares[k]:6.2f} %")
    groups = [c.group for c in cases if c.group]
    if groups:
        counts = [f"{group} {groups.count(group)}" for group in sorted(set(groups))]
        print(f"groups (cases): {', '.join(counts)}")
    print("\n  ".join([f"{len(problems)} problems", *problems]))
    if options.montage and slices:
        draw_montage(slices, options.montage, len(cases.classes))
        print(f"montage drawn to {options.montage}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
