"""Every layout built in a temporary folder and read back; orientation and spacing; headers that say
nothing; CT that is not in HU; splits; the phantom; bad files."""
import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED, refused, run, save, volume

import data
from data import DataError, find_cases, read_case, split_patients


def acdc(root, patients=(1, 90), frames=(1, 9)):
    for p in patients:
        folder = root / "training" / f"patient{p:03d}"
        for f in frames:
            name = f"patient{p:03d}_frame{f:02d}"
            image, label = volume(p + f)
            save(folder / f"{name}.nii.gz", image, (1.5, 1.5, 10))
            save(folder / f"{name}_gt.nii.gz", label, (1.5, 1.5, 10))
        info = f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nNbFrame: 30\n"
        (folder / "Info.cfg").write_text(info)
    return root


def test_acdc(tmp_path):
    root = acdc(tmp_path / "database")
    # the frames of patient090 are 04 and 11, and a cine lies beside them
    acdc(root, [90], (4, 11))
    cine = np.zeros((4, 4, 3, 5), np.float32)
    save(root / "training/patient090/patient090_4d.nii.gz", cine)
    for path in (tmp_path, root, root / "training"):
        cases = find_cases(path)
        assert [c.name for c in cases] == ["patient001_frame01", "patient001_frame09",
                                           "patient090_frame04", "patient090_frame11"]
    assert cases.layout == "ACDC"
    assert cases.classes == ["background", "RV", "Myo", "LV"]
    assert {c.patient for c in cases} == {"patient001", "patient090"}
    assert cases[0].group == "DCM"
    assert sum("4D cine" in w for w in cases.warnings) == 1
    assert sum("frame01" in w for w in cases.warnings) == 2
    v = read_case(cases[0], cases)
    assert v.image.shape == (1, 4, 18, 20)
    assert v.label.shape == (4, 18, 20)
    assert v.spacing == pytest.approx((10, 1.5, 1.5))


@pytest.mark.parametrize("text", ["", "ED:\nES: 9\n", "ED: 1.5\nES: 9\n", "ED: x\nES: 9"])
def test_acdc_without_frames(text, tmp_path):
    acdc(tmp_path, [1])
    (tmp_path / "training/patient001/Info.cfg").write_text(text)
    with pytest.raises(DataError, match="Info.cfg: no whole number for ED and ES"):
        find_cases(tmp_path)


def unlike(path, zooms):
    """Make the affine of a file say 1 mm, as ACDC's does, and keep its spacing apart."""
    array = np.asarray(nib.load(path).dataobj)
    image = nib.Nifti1Image(array, np.diag([-1, -1, 1, 1.]))
    image.header.set_zooms(zooms)
    nib.save(image, path)


def test_spacing_is_that_of_the_header_where_the_affine_lies(tmp_path):
    acdc(tmp_path, [1])
    for file in (tmp_path / "training/patient001").glob("*.nii.gz"):
        unlike(file, (1.5, 1.5, 10))
    cases = find_cases(tmp_path)
    v = read_case(cases[0], cases)
    assert v.spacing == pytest.approx((10, 1.5, 1.5))
    data.write_nifti(tmp_path / "out.nii.gz", v.label, cases[0].image)
    array, spacing = data.read_nifti(tmp_path / "out.nii.gz")
    assert np.array_equal(array, v.label)
    assert spacing == v.spacing
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").affine, nib.load(cases[0].image).affine)


NAMES = {"0": "background", "1": "A", "2": "B", "3": "C"}


def msd(root, labels=NAMES, modality={"0": "MRI"}, channels=None):
    for k in range(3):
        image, label = volume(k)
        if channels:
            image = np.stack([image] * channels, -1)
        save(root / "imagesTr" / f"case_{k}.nii.gz", image, (1, 1, 5))
        save(root / "labelsTr" / f"case_{k}.nii.gz", label, (1, 1, 5))
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "modality": modality}))
    return root


def test_msd(tmp_path):
    msd(tmp_path)
    save(tmp_path / "imagesTs/case_9.nii.gz", volume()[0])
    save(tmp_path / "labelsTr/orphan.nii.gz", volume()[1])
    save(tmp_path / "imagesTr/alone.nii.gz", volume()[0], (1, 1, 5))
    (tmp_path / "imagesTr/._case_0.nii.gz").write_bytes(b"what macOS leaves")
    cases = find_cases(tmp_path)
    assert cases.layout == "MSD"
    assert len(cases) == 4
    assert cases.classes == ["background", "A", "B", "C"]
    assert [c.name for c in cases if c.label is None] == ["alone"]
    assert read_case(cases[0], cases).label is None
    assert any("orphan" in w and "skipped" in w for w in cases.warnings)
    assert any("imagesTs" in w for w in cases.warnings)


def test_msd_with_channels_last(tmp_path):
    cases = find_cases(msd(tmp_path, modality={"0": "T2", "1": "ADC"}, channels=2))
    assert cases.channels == 2
    assert read_case(cases[0], cases).image.shape == (2, 4, 18, 20)


def test_nnunet(tmp_path):
    for k in range(2):
        image, label = volume(k)
        save(tmp_path / "imagesTr" / f"BR_{k}_0000.nii.gz", image, (1, 1, 5))
        save(tmp_path / "imagesTr" / f"BR_{k}_0001.nii.gz", -image, (1, 1, 5))
        save(tmp_path / "labelsTr" / f"BR_{k}.nii.gz", label, (1, 1, 5))
    info = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "x": 1, "y": 2, "z": 3},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    cases = find_cases(tmp_path)
    assert cases.layout == "nnU-Net v2"
    assert [c.name for c in cases] == ["BR_0", "BR_1"]
    assert cases.classes[2] == "y"
    v = read_case(cases[0], cases)
    assert v.image.shape == (2, 4, 18, 20)
    assert np.array_equal(v.image[0], -v.image[1])
    (tmp_path / "imagesTr/BR_1_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="BR_1: 1 channel files, dataset.json names 2"):
        find_cases(tmp_path)


def test_plain(tmp_path):
    for k in range(3):
        save(tmp_path / "images" / f"p{k}_ED.nii", volume(k)[0], (1, 1, 5))
    save(tmp_path / "labels/p0_ED.nii", volume(0)[1], (1, 1, 5))
    cases = find_cases(tmp_path)
    assert cases.layout == "plain"
    assert cases.classes == ["background", "class 1", "class 2", "class 3"]
    assert [c.label is None for c in cases] == [False, True, True]
    assert cases[0].patient == "p0"


def relabel(values):
    """An image, and a label with these values, each somewhere."""
    image, label = volume(0, classes=len(values))
    return image, np.asarray(values, np.int16)[label]


def test_mmwhs(tmp_path):
    raw = [0, 205, 420, 500, 550, 600, 820, 850, 421]
    image, label = relabel(raw)
    for k in (1001, 1002):
        save(tmp_path / "ct_train" / f"ct_train_{k}_image.nii.gz", image)
        save(tmp_path / "ct_train" / f"ct_train_{k}_label.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "MMWHS"
    assert [c.name for c in cases] == ["ct_train_1001", "ct_train_1002"]
    assert cases.modality == "CT"
    v = read_case(cases[0], cases)
    turned = data.read_nifti(cases[0].label)[0]
    for k, value in enumerate(raw[:8]):
        assert (v.label[turned == value] == k).all()
    assert (v.label[turned == 421] == cases.classes.index("LA")).all()
    save(tmp_path / "mr_train_1001_image.nii.gz", image)
    assert find_cases(tmp_path).modality == "MR"


def test_hvsmr(tmp_path):
    image, label = relabel([0, 1, 2])
    save(tmp_path / "Training dataset/training_axial_crop_pat0.nii.gz", image)
    save(tmp_path / "Ground truth/training_axial_crop_pat0-label.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "HVSMR 2016"
    assert cases.classes[1:] == ["myocardium", "blood pool"]
    assert len(cases) == 1
    assert cases[0].label


def test_chaos(tmp_path):
    image, label = relabel([0, 63, 126, 189, 252])
    save(tmp_path / "images/1.nii.gz", image)
    save(tmp_path / "labels/1.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "CHAOS-NIfTI"
    assert cases.classes[1] == "liver"
    assert np.array_equal(np.unique(read_case(cases[0], cases).label), range(5))


def transunet(root):
    (root / "train_npz").mkdir()
    for case in ("case0005", "case0006", "case0007"):
        for k in (2, 0, 1, 10):
            image = np.random.default_rng(k).random((16, 16), np.float32) + k
            label = np.full((16, 16), float(k % 9))
            np.savez(root / "train_npz" / f"{case}_slice{k:03d}.npz", image=image, label=label)
    return root


def test_transunet(tmp_path):
    cases = find_cases(transunet(tmp_path))
    assert cases.layout == "TransUNet npz"
    assert len(cases) == 3
    assert cases.classes[8] == "stomach"
    assert any("the map of TransUNet" in w for w in cases.warnings)
    v = read_case(cases[0], cases)
    assert v.image.shape == (1, 4, 16, 16)
    assert v.spacing == (1, 1, 1)
    assert v.label[:, 0, 0].tolist() == [0, 1, 2, 1]
    assert len(split_patients(cases)["labelled"]) == 1
    assert data.default_grid(cases) == (1, 64)
    assert data.header_warnings([c.image for c in cases]) == []


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"hello"])
def test_bad_npz(content, tmp_path):
    cases = find_cases(transunet(tmp_path))
    cases[0].files[1].write_bytes(content)
    with pytest.raises(DataError, match="slice001.npz: not a readable npz slice"):
        read_case(cases[0], cases)
    np.savez(cases[1].files[2], image=np.zeros((16, 15)), label=np.zeros((16, 15)))
    with pytest.raises(DataError, match="slice002.npz: shape differs from case0006_slice000.npz"):
        read_case(cases[1], cases)


def test_btcv(tmp_path):
    image, label = relabel(range(14))
    save(tmp_path / "img/img0001.nii.gz", image)
    save(tmp_path / "label/label0001.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "BTCV"
    assert len(cases.classes) == 14
    assert cases[0].name == "case0001"
    assert cases[0].label
    assert cases.modality == "CT"


# ------------------------------------------------------------------------- orientation, intensities

@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSL", "IRA"])
def test_orientation_and_back(tmp_path, codes):
    # one bright voxel: 2 slices up, 3 rows back, 5 columns to the patient's left, whatever the
    # order of the file's axes
    lps = np.zeros((8, 7, 4), np.int16)
    lps[5, 3, 2] = 1
    axcodes2ornt = nib.orientations.axcodes2ornt
    turn = nib.orientations.ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    spacing = [6. if code in "SI" else 1. for code in codes]
    array = nib.orientations.apply_orientation(lps, turn)
    file = save(tmp_path / "a.nii.gz", array, spacing, codes)
    array, mm = data.read_nifti(file)
    assert array.shape == (4, 7, 8)
    assert np.argwhere(array).tolist() == [[2, 3, 5]]
    assert mm == pytest.approx((6, 1, 1))
    data.write_nifti(tmp_path / "b.nii.gz", array.astype(np.uint8), file)
    one = nib.load(file)
    two = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(one.dataobj, two.dataobj)
    assert np.allclose(one.affine, two.affine)
    assert two.header.get_zooms() == pytest.approx(one.header.get_zooms())


def test_slices_lie_along_the_thick_axis(tmp_path):
    file = save(tmp_path / "sagittal.nii", np.zeros((5, 30, 20), np.int16), (7, 1, 1.2))
    array, mm = data.read_nifti(file)
    assert array.shape == (5, 20, 30)
    assert mm == pytest.approx((7, 1.2, 1))


def with_header(path, affine, shape=(60, 50, 40), codes=None, zooms=None):
    """A file with this affine, and these (sform, qform) codes and spacing where given."""
    image = nib.Nifti1Image(np.ones(shape, np.uint8), affine)
    if codes:
        image.set_sform(affine, codes[0])
        image.set_qform(affine, codes[1])
    if zooms:
        image.header.set_zooms(zooms)
    nib.save(image, path)
    return path


UNIT = np.eye(4)
ITK = np.diag([-1, -1, 1, 1])                   # what SimpleITK writes for a bare array
MOVED = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
THICK = np.diag([-1.5, -1.5, 8, 1])
SAYS_NOTHING = {
    "nibabel's": dict(affine=UNIT),
    "qform alone": dict(affine=UNIT, codes=(0, 1)),
    "SimpleITK's": dict(affine=ITK, codes=(1, 1)),
    "a stack of 1 mm": dict(affine=MOVED, shape=(96, 80, 12)),
    "a sagittal stack of 1 mm": dict(affine=MOVED, shape=(20, 60, 96), codes=(1, 1)),
    "no orientation": dict(affine=THICK, codes=(0, 0)),
}
SAYS_ENOUGH = {
    "MSD's": dict(affine=MOVED, codes=(1, 1), shape=(35, 50, 36)),
    "MSD's at the origin": dict(affine=UNIT, codes=(1, 1), shape=(35, 50, 36)),
    "thick slices": dict(affine=THICK, shape=(96, 80, 12)),
    "ACDC's": dict(affine=ITK, shape=(96, 80, 12), zooms=(1.5, 1.5, 10)),
    "short, 1 mm": dict(affine=MOVED, shape=(96, 59, 20)),
    "moved": dict(affine=MOVED),
}


@pytest.mark.parametrize("kind", SAYS_NOTHING)
def test_a_header_that_says_nothing_is_named(kind, tmp_path):
    file = with_header(tmp_path / "a.nii.gz", **SAYS_NOTHING[kind])
    [warning] = data.header_warnings([file])
    assert warning.startswith("1 headers that do not say orientation or spacing")
    assert warning.endswith(": a.nii.gz")


@pytest.mark.parametrize("kind", SAYS_ENOUGH)
def test_a_header_that_says_enough_is_not_named(kind, tmp_path):
    assert data.header_warnings([with_header(tmp_path / "a.nii.gz", **SAYS_ENOUGH[kind])]) == []


def test_one_line_names_all_such_headers(tmp_path):
    for k in range(4):
        image, label = volume(k)
        for folder, array in (("images", image), ("labels", label)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, UNIT), tmp_path / folder / f"c{k}.nii.gz")
    (tmp_path / "images/c3.nii.gz").write_bytes(b"damaged: refused elsewhere, named there")
    done = run("data", tmp_path)
    assert done.returncode == 0
    assert "2 problems" in done.stdout
    assert "3 headers that do not say orientation or spacing" in done.stdout
    assert ": c0.nii.gz, c1.nii.gz, c2.nii.gz\n" in done.stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="real scans are not on this machine")
@pytest.mark.parametrize("name", ["acdc", "Task04_Hippocampus", "Task_CHAOS_T2", "Task_Synapse8"])
def test_real_headers_say_enough(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not on this machine")
    assert data.header_warnings([c.image for c in find_cases(SHARED / name)]) == []


def test_normalise():
    x = np.random.default_rng(0).normal(1e4, 500, (2, 3, 20, 20)).astype(np.float32)
    y = data.normalise(x, "MR")
    assert y.min() == 0
    assert y.max() == 1
    assert np.allclose(data.normalise(x * 1e-4, "MR"), y, atol=1e-4)
    hu = np.array([[[[-1000., 75., 3000.]]]], np.float32)
    assert np.allclose(data.normalise(hu, "CT"), [[[[0, .5, 1]]]])


def test_ct_that_is_not_in_hounsfield_units():
    hu = np.random.default_rng(0).uniform(-125, 275, (1, 4, 20, 20)).astype(np.float32)
    assert data.in_hounsfield(hu)
    want = data.normalise(hu, "MR")
    # 8 bit, shifted as scanners store it, in [0, 1], and with mean 0
    for other in ((hu + 125) * 255 / 400, hu + 1024, (hu + 125) / 400, (hu - 75) / 115):
        assert not data.in_hounsfield(other)
        assert np.allclose(data.normalise(other, "CT"), want, atol=1e-4)
    # one channel of two: the other keeps its window
    both = data.normalise(np.concatenate([hu, hu + 1024]), "CT")
    assert np.array_equal(both[:1], data.normalise(hu, "CT"))
    assert np.allclose(both[1:], want, atol=1e-4)


def test_ct_that_is_not_in_hounsfield_units_is_named(tmp_path):
    msd(tmp_path, modality={"0": "CT"})
    image = volume(0)[0]
    save(tmp_path / "imagesTr/case_0.nii.gz", image - image.min(), (1, 1, 5))
    save(tmp_path / "imagesTr/case_1.nii.gz", image - image.min() - 50, (1, 1, 5))
    save(tmp_path / "imagesTr/case_2.nii.gz", image - image.min() + 50, (1, 1, 5))
    done = run("data", tmp_path)
    assert "1 problems" in done.stdout
    assert "2 CT volumes not in HU" in done.stdout
    assert ": case_0, case_2\n" in done.stdout


# ------------------------------------------------------------------------------- splits and phantom

def test_ssl4mis_split():
    names = [f"patient{n:03d}" for n in range(1, 101)]
    heart = [data.Case(f"{n}_{f}", n, ("x",), "y") for n in names for f in ("ED", "ES")]
    s = split_patients(data.Cases(heart, ".", "ACDC", data.ACDC))
    assert [len(s[k]) for k in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(s["train"] + s["val"] + s["test"]) == names
    first = [f"patient{n:03d}" for n in (99, 38, 50, 100, 58, 21, 49)]
    assert s["labelled"][:7] == first
    assert len(s["labelled"]) == 70
    assert set(s["labelled"]) == set(s["train"])


def test_synapse_split():
    names = [f"case{n:04d}" for n in [*range(1, 11), *range(21, 41)]]
    scans = [data.Case(n, n, ("x",), "y") for n in names]
    s = split_patients(data.Cases(scans, ".", "MSD", data.SYNAPSE))
    assert s["test"] == data.SYNAPSE_TEST
    assert len(s["val"]) == 2
    assert len(s["labelled"]) == 16
    assert sorted(s["train"] + s["val"] + s["test"]) == names
    assert "18 / 12" in s["rule"]
    scans[0] = data.Case(names[0], names[0], ("x",))
    with pytest.raises(DataError, match="case0001 is a .* test patient and has no label"):
        split_patients(data.Cases(scans, ".", "MSD", data.SYNAPSE))


def test_other_splits_are_by_patient_and_seeded(phantom):
    cases = find_cases(phantom)
    s = split_patients(cases)
    assert not set(s["train"]) & set(s["test"])
    assert not set(s["val"]) & set(s["test"])
    assert s == split_patients(cases)
    assert sorted(s["train"] + s["val"] + s["test"]) == sorted({c.patient for c in cases})
    assert any(split_patients(cases, seed) != s for seed in (1, 2, 3))
    forty = [data.Case(f"p{n}_0", f"p{n}", ("x",), "y", "") for n in range(40)]
    forty += [data.Case(f"u{n}_0", f"u{n}", ("x",), None, "") for n in range(3)]
    s = split_patients(data.Cases(forty, ".", "MSD", cases.classes))
    sizes = [len(s[side]) for side in ("train", "val", "test", "labelled")]
    assert sizes == [28 + 3, 4, 8, 28]                             # unlabelled ones train
    few = [c for c in cases if c.patient <= "phantom002"]
    with pytest.raises(DataError, match="2 patients with labels; 3 or more"):
        split_patients(data.Cases(few, ".", "MSD", cases.classes))


def test_phantom(phantom, tmp_path):
    cases = find_cases(phantom)
    assert cases.layout == "MSD"
    assert cases.classes == data.ACDC
    assert len(cases) == 12
    assert len({c.patient for c in cases}) == 6
    assert data.header_warnings([c.image for c in cases]) == []
    for ed, es in zip(cases[::2], cases[1::2]):
        one = read_case(ed, cases)
        two = read_case(es, cases)
        assert one.spacing[0] >= 8
        assert one.spacing[1] < 2
        assert set(np.unique(one.label)) == {0, 1, 2, 3}
        assert (two.label == 3).sum() < (one.label == 3).sum()       # systole: a smaller cavity
    again = data.make_phantom(tmp_path / "again", patients=1)
    file = "imagesTr/phantom001_ED.nii.gz"
    assert np.array_equal(nib.load(again / file).dataobj, nib.load(phantom / file).dataobj)
    with pytest.raises(DataError, match="exists already"):
        data.make_phantom(phantom)


def test_two_runs_make_the_phantom_at_once(tmp_path, monkeypatch):
    """One finishes while the other writes; and what a killed one of the same number has left."""
    write = data._write_phantom
    left = tmp_path / f"p.partial-{os.getpid()}/imagesTr"
    left.mkdir(parents=True)

    def slow(folder, patients, seed):
        write(folder, patients, seed)
        write(tmp_path / "p", patients, seed)

    monkeypatch.setattr(data, "_write_phantom", slow)
    assert len(find_cases(data.make_phantom(tmp_path / "p", patients=1))) == 2
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_data_as_a_command(phantom, tmp_path):
    done = run("data", phantom, "--montage", tmp_path / "m.png")
    assert done.returncode == 0
    assert "MSD layout, 12 cases of 6 patients" in done.stdout
    assert "class 3 LV" in done.stdout
    assert "phantom001_ED" in done.stdout
    assert (tmp_path / "m.png").stat().st_size > 10_000
    refused(run("data", phantom, "--montage", tmp_path / "no/m.png"), "no/m.png: cannot be drawn")
    assert run("data", "phantom", tmp_path / "p").returncode == 0
    assert len(find_cases(tmp_path / "p")) == 80


# ---------------------------------------------------------------------------------------- bad files

IMAGE = "imagesTr/case_1.nii.gz"
LABEL = "labelsTr/case_1.nii.gz"


def edit(path, change):
    """Save a file again with its array changed."""
    image = nib.load(path)
    save(path, change(np.asarray(image.dataobj).copy()), image.header.get_zooms()[:3])


def truncated(root):
    (root / IMAGE).write_bytes((root / IMAGE).read_bytes()[:900])


def not_nifti(root):
    (root / IMAGE).write_text("hello")


def other_shape(root):
    edit(root / LABEL, lambda a: a[:-1])


def mirrored(root):
    label = nib.load(root / LABEL)
    save(root / LABEL, np.asarray(label.dataobj), (1, 1, 5), codes="RPS")


def with_nan(root):
    edit(root / IMAGE, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, np.nan, a))


def infinite(root):
    edit(root / IMAGE, lambda a: np.where(a > a.min(), a, np.inf).astype(np.float32))


def constant(root):
    edit(root / IMAGE, lambda a: a * 0 + 7)


def one_slice(root):
    edit(root / IMAGE, lambda a: a[..., :1])
    edit(root / LABEL, lambda a: a[..., :1])


def fractions(root):
    edit(root / LABEL, lambda a: a.astype(np.float32) * .5)


def unknown_label(root):
    edit(root / LABEL, lambda a: a + 2)


def more_channels(root):
    edit(root / IMAGE, lambda a: np.stack([a] * 3, -1))


def channels_in_label(root):
    edit(root / LABEL, lambda a: np.stack([a] * 3, -1))


def complex_numbers(root):
    edit(root / IMAGE, lambda a: a.astype(np.complex64))


def header(path, at, *values):
    """Overwrite bytes of a header: values of a numpy type from byte `at` on."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    new = np.array(values).tobytes()
    raw[at:at + len(new)] = new
    path.write_bytes(gzip.compress(bytes(raw)))


SROW = 280                                      # the affine, 3 rows of 4, in a NIfTI header


def zero_column(root):
    for row in range(3):
        header(root / IMAGE, SROW + 16 * row + 8, np.float32(0))


def parallel_columns(root):
    # the determinant is not 0, but two axes point the same way
    header(root / IMAGE, SROW, *np.float32([1, 0, 0, 0, 0, 1, 1e30, 0, 0, 0, 1, 0]))


def nan_in_affine(root):
    header(root / IMAGE, SROW, np.float32(np.nan))


def infinite_spacing(root):
    header(root / IMAGE, 80, np.float32(np.inf))


def no_voxels(root):
    header(root / IMAGE, 42, np.int16(0))


def infinite_offset(root):
    header(root / IMAGE, 108, np.float32(np.inf))


BAD = {
    truncated: "case_1.nii.gz: not a readable NIfTI",
    not_nifti: "case_1.nii.gz: not a readable NIfTI",
    other_shape: "label shape .* differs from image shape",
    mirrored: "its axes lie RPS, those of case_1.nii.gz LPS",
    with_nan: "1 voxels are NaN or infinite",
    infinite: "NaN or infinite",
    constant: r"constant volume \(every voxel 7\)",
    one_slice: "one slice only",
    fractions: "not all whole numbers",
    unknown_label: "unknown label [45]; known are 0 background",
    more_channels: "3 channels, the dataset has 1",
    channels_in_label: "label shape .* differs from image shape",
    complex_numbers: "voxels of type complex64",
    zero_column: "affine without volume",
    parallel_columns: "affine without volume",
    nan_in_affine: "affine without volume",
    infinite_spacing: "spacing .*inf.* mm is no scan's",
    no_voxels: "shape .* is not a 3D volume",
    infinite_offset: "not a readable NIfTI",
}


def test_a_label_turned_with_a_true_header_is_read(tmp_path):
    msd(tmp_path)
    cases = find_cases(tmp_path)
    want = read_case(cases[1], cases).label
    label = nib.load(tmp_path / LABEL)
    wanted = nib.orientations.axcodes2ornt("PRI")
    now = nib.orientations.io_orientation(label.affine)
    turned = label.as_reoriented(nib.orientations.ornt_transform(now, wanted))
    assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(label.affine)
    nib.save(turned, tmp_path / LABEL)
    assert np.array_equal(read_case(cases[1], cases).label, want)


@pytest.mark.parametrize("change", BAD, ids=lambda change: change.__name__)
def test_bad_files(change, tmp_path):
    msd(tmp_path)
    change(tmp_path)
    cases = find_cases(tmp_path)
    with pytest.raises(DataError, match=BAD[change]) as error:
        read_case(cases[1], cases)
    assert "case_1" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_messages_are_one_line():
    assert str(DataError("a file: it says\r\nmuch\nat length")) == "a file: it says much at length"


def damaged(rng, raw):
    """The bytes of a NIfTI file with something random wrong in them, gzipped."""
    raw = bytearray(raw)
    kind = rng.choice(["bytes", "cut", "affine", "dims", "spacing", "gzip"])
    if kind == "bytes":
        for at in rng.integers(0, 352, rng.integers(1, 30)):
            raw[at] = rng.integers(256)
    if kind == "cut":
        raw = raw[:rng.integers(len(raw))]
    wild = np.float32(rng.choice([0, np.nan, np.inf, 1e30, 3e38, 1e-30, -1], 12))
    if kind == "affine":
        raw[SROW:SROW + 48] = wild.tobytes()
    if kind == "spacing":
        raw[80:92] = wild[:3].tobytes()
    if kind == "dims":
        raw[40:50] = rng.choice([-1, 0, 1, 2, 3, 4, 5, 20, 32767], 5).astype(np.int16).tobytes()
    zipped = bytearray(gzip.compress(bytes(raw)))
    if kind == "gzip":
        zipped[rng.integers(len(zipped))] ^= 255
    return zipped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_read_or_refused_in_one_line(seed, tmp_path):
    rng = np.random.default_rng(seed)
    image, label = volume(seed)
    save(tmp_path / "images/a.nii.gz", image, (1, 1, 5))
    save(tmp_path / "labels/a.nii.gz", label, (1, 1, 5))
    file = tmp_path / rng.choice(["images", "labels"]) / "a.nii.gz"
    file.write_bytes(damaged(rng, gzip.decompress(file.read_bytes())))
    try:
        cases = find_cases(tmp_path)
        data.header_warnings([c.image for c in cases])
        read_case(cases[0], cases)
        data.default_grid(cases)
    except DataError as error:
        assert len(str(error).splitlines()) == 1
        assert "a.nii.gz" in str(error) or "label values" in str(error)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_cases(tmp_path / "no")
    with pytest.raises(DataError, match="no known layout .found nothing"):
        find_cases(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        find_cases(tmp_path / "file")
    (tmp_path / "plain/images").mkdir(parents=True)
    with pytest.raises(DataError, match="plain layout, but it holds no images"):
        find_cases(tmp_path / "plain")


def test_bad_dataset_json(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    path = tmp_path / "dataset.json"
    path.write_text('{"labels": {"0": "b", "1": "x"}, "modality": {"0": "MR"}}')
    with pytest.raises(DataError, match="holds no images"):
        find_cases(tmp_path)
    for text in ("{", "[]", '{"labels": {"0": "b"}, "modality": {}}', '{"labels": {"b": "0"}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not a dataset.json"):
            find_cases(tmp_path)
    with pytest.raises(DataError, match=r"label values \[0, 1, 3\] are not 0, 1, 2"):
        find_cases(msd(tmp_path, {"0": "background", "1": "x", "3": "y"}))


def test_labels_that_are_not_consecutive(tmp_path):
    image, label = relabel([0, 1, 5])
    save(tmp_path / "images/1.nii.gz", image)
    save(tmp_path / "labels/1.nii.gz", label)
    with pytest.raises(DataError, match=r"label values \[0, 1, 5\] are not consecutive"):
        find_cases(tmp_path)


def test_a_label_is_missing_where_one_is_needed(tmp_path):
    msd(tmp_path)
    (tmp_path / LABEL).unlink()
    cases = find_cases(tmp_path)
    with pytest.raises(DataError, match="case_1.nii.gz: has no label, and one is needed"):
        data.read_label(cases[1], cases)
