"""Every layout built in a temporary folder and read back; orientation and spacing; splits; the phantom; bad files."""
import json

import nibabel as nib
import numpy as np
import pytest
from conftest import run, save, volume

import data
from data import DataError, find_cases, read_case, split_patients


def acdc(root, patients=(1, 90), frames=(1, 9)):
    for p in patients:
        folder = root / "training" / f"patient{p:03d}"
        for f in frames:
            image, label = volume(p + f)
            save(folder / f"patient{p:03d}_frame{f:02d}.nii.gz", image, (1.5, 1.5, 10))
            save(folder / f"patient{p:03d}_frame{f:02d}_gt.nii.gz", label, (1.5, 1.5, 10))
        (folder / "Info.cfg").write_text(f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nNbFrame: 30\n")
    return root


def test_acdc(tmp_path):
    acdc(tmp_path)
    folder = tmp_path / "training/patient090"                                     # its frames are 04 and 11, plus a cine
    acdc(tmp_path, [90], (4, 11))
    save(folder / "patient090_4d.nii.gz", np.zeros((4, 4, 3, 5), np.float32))
    for path in (tmp_path, tmp_path / "training"):
        cases = find_cases(path)
        assert [c.name for c in cases] == ["patient001_frame01", "patient001_frame09", "patient090_frame04", "patient090_frame11"]
    assert cases.layout == "ACDC" and cases.classes == ["background", "RV", "Myo", "LV"]
    assert {c.patient for c in cases} == {"patient001", "patient090"} and cases[0].group == "DCM"
    assert sum("4D cine" in w for w in cases.warnings) == 1 and sum("frame01" in w for w in cases.warnings) == 2
    v = read_case(cases[0], cases)
    assert v.image.shape == (1, 4, 18, 20) and v.label.shape == (4, 18, 20) and v.spacing == pytest.approx((10, 1.5, 1.5))


def test_spacing_is_that_of_the_header_where_the_affine_lies(tmp_path):
    acdc(tmp_path, [1])
    for file in (tmp_path / "training/patient001").glob("*.nii.gz"):              # as in the real ACDC: sform says 1 mm
        image = nib.load(file)
        fake = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([-1, -1, 1, 1.]))
        fake.header.set_zooms((1.5, 1.5, 10))
        nib.save(fake, file)
    assert read_case(find_cases(tmp_path)[0], find_cases(tmp_path)).spacing == pytest.approx((10, 1.5, 1.5))


def msd(root, labels={"0": "background", "1": "A", "2": "B", "3": "C"}, modality={"0": "MRI"}, n=3, channels=None):
    for k in range(n):
        image, label = volume(k)
        image = np.stack([image] * channels, -1) if channels else image
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
    assert cases.layout == "MSD" and len(cases) == 4 and cases.classes == ["background", "A", "B", "C"]
    assert [c.name for c in cases if c.label is None] == ["alone"] and read_case(cases[0], cases).label is None
    assert any("orphan" in w and "skipped" in w for w in cases.warnings) and any("imagesTs" in w for w in cases.warnings)


def test_msd_with_channels_last(tmp_path):
    cases = find_cases(msd(tmp_path, modality={"0": "T2", "1": "ADC"}, channels=2))
    assert cases.channels == 2 and read_case(cases[0], cases).image.shape == (2, 4, 18, 20)


def test_nnunet(tmp_path):
    for k in range(2):
        image, label = volume(k)
        save(tmp_path / "imagesTr" / f"BR_{k}_0000.nii.gz", image, (1, 1, 5))
        save(tmp_path / "imagesTr" / f"BR_{k}_0001.nii.gz", -image, (1, 1, 5))
        save(tmp_path / "labelsTr" / f"BR_{k}.nii.gz", label, (1, 1, 5))
    (tmp_path / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1, "y": 2, "z": 3}, "file_ending": ".nii.gz"}))
    cases = find_cases(tmp_path)
    assert cases.layout == "nnU-Net v2" and [c.name for c in cases] == ["BR_0", "BR_1"] and cases.classes[2] == "y"
    v = read_case(cases[0], cases)
    assert v.image.shape == (2, 4, 18, 20) and np.array_equal(v.image[0], -v.image[1])
    (tmp_path / "imagesTr/BR_1_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="BR_1: 1 channel files, dataset.json names 2"):
        find_cases(tmp_path)


def test_plain(tmp_path):
    for k in range(3):
        save(tmp_path / "images" / f"p{k}_ED.nii", volume(k)[0], (1, 1, 5))
    save(tmp_path / "labels/p0_ED.nii", volume(0)[1], (1, 1, 5))
    cases = find_cases(tmp_path)
    assert cases.layout == "plain" and len(cases.classes) == 4 and [c.label is None for c in cases] == [False, True, True]
    assert cases[0].patient == "p0"


def relabel(values):
    image, label = volume(0, classes=len(values))
    return image, np.asarray(values, np.int16)[label]


def test_mmwhs(tmp_path):
    raw = [0, 205, 420, 500, 550, 600, 820, 850, 421]
    image, label = relabel(raw)
    for k in (1001, 1002):
        save(tmp_path / "ct_train" / f"ct_train_{k}_image.nii.gz", image)
        save(tmp_path / "ct_train" / f"ct_train_{k}_label.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "MMWHS" and len(cases) == 2 and cases.modality == "CT"
    v = read_case(cases[0], cases)
    turned = data.read_nifti(cases[0].label)[0]
    for k, value in enumerate(raw[:8]):
        assert (v.label[turned == value] == k).all()
    assert (v.label[turned == 421] == cases.classes.index("LA")).all()


def test_hvsmr(tmp_path):
    image, label = relabel([0, 1, 2])
    save(tmp_path / "Training dataset/training_axial_crop_pat0.nii.gz", image)
    save(tmp_path / "Ground truth/training_axial_crop_pat0-label.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "HVSMR 2016" and cases.classes[1:] == ["myocardium", "blood pool"] and cases[0].label


def test_chaos(tmp_path):
    image, label = relabel([0, 63, 126, 189, 252])
    save(tmp_path / "images/1.nii.gz", image)
    save(tmp_path / "labels/1.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "CHAOS-NIfTI" and cases.classes[1] == "liver"
    assert np.array_equal(np.unique(read_case(cases[0], cases).label), range(5))


def test_transunet(tmp_path):
    (tmp_path / "train_npz").mkdir()
    for case in ("case0005", "case0006"):
        for k in (2, 0, 1, 10):
            np.savez(tmp_path / "train_npz" / f"{case}_slice{k:03d}.npz", image=np.random.rand(16, 16).astype(np.float32) + k,
                     label=np.full((16, 16), float(k % 9)))
    cases = find_cases(tmp_path)
    v = read_case(cases[0], cases)
    assert cases.layout == "TransUNet npz" and len(cases) == 2 and v.image.shape == (1, 4, 16, 16)
    assert v.label[:, 0, 0].tolist() == [0, 1, 2, 1] and cases.classes[8] == "stomach"
    assert any("the map of TransUNet" in w for w in cases.warnings)


def test_btcv(tmp_path):
    image, label = relabel(range(14))
    save(tmp_path / "img/img0001.nii.gz", image)
    save(tmp_path / "label/label0001.nii.gz", label)
    cases = find_cases(tmp_path)
    assert cases.layout == "BTCV" and len(cases.classes) == 14 and cases[0].label and cases.modality == "CT"


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSL", "IRA"])
def test_orientation_and_back(tmp_path, codes):
    # one bright voxel: 2 slices up, 3 rows back, 5 columns to the patient's left, whatever the order of the file's axes
    lps = np.zeros((8, 7, 4), np.int16)
    lps[5, 3, 2] = 1
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(codes))
    spacing = np.array([1., 1., 6.])[[("LR", "PA", "SI").index(next(p for p in ("LR", "PA", "SI") if c in p)) for c in codes]]
    file = save(tmp_path / "a.nii.gz", nib.orientations.apply_orientation(lps, ornt), spacing, codes)
    array, mm = data.read_nifti(file)
    assert array.shape == (4, 7, 8) and np.argwhere(array).tolist() == [[2, 3, 5]] and mm == pytest.approx((6, 1, 1))
    data.write_nifti(tmp_path / "b.nii.gz", array.astype(np.uint8), file)
    one, two = nib.load(file), nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(one.dataobj, two.dataobj) and np.allclose(one.affine, two.affine)
    assert two.header.get_zooms() == pytest.approx(one.header.get_zooms())


def test_slices_lie_along_the_thick_axis(tmp_path):
    array, mm = data.read_nifti(save(tmp_path / "sagittal.nii", np.zeros((5, 30, 20), np.int16), (7, 1, 1.2)))
    assert array.shape == (5, 20, 30) and mm == pytest.approx((7, 1.2, 1))


def test_normalise():
    x = np.random.default_rng(0).normal(1e4, 500, (2, 3, 20, 20)).astype(np.float32)
    y = data.normalise(x, "MR")
    assert y.min() == 0 and y.max() == 1 and np.allclose(data.normalise(x * 1e-4, "MR"), y, atol=1e-4)
    assert np.allclose(data.normalise(np.array([[[[-1000., 75., 3000.]]]], np.float32), "CT"), [[[[0, .5, 1]]]])


# ------------------------------------------------------------------------------------------------ splits and phantom

def test_ssl4mis_split():
    names = [f"patient{n:03d}" for n in range(1, 101)]
    cases = data.Cases([data.Case(f"{n}_{f}", n, ("x",), "y") for n in names for f in ("ED", "ES")], ".", "ACDC", data.ACDC)
    s = split_patients(cases)
    assert [len(s[k]) for k in ("train", "val", "test")] == [70, 10, 20] and sorted(s["train"] + s["val"] + s["test"]) == names
    assert s["labelled"][:7] == [f"patient{n:03d}" for n in (99, 38, 50, 100, 58, 21, 49)] and set(s["labelled"]) == set(s["train"])


def test_other_splits_are_by_patient_and_seeded(phantom):
    cases = find_cases(phantom)
    s = split_patients(cases)
    assert not set(s["train"]) & set(s["test"]) and not set(s["val"]) & set(s["test"]) and s == split_patients(cases)
    assert sorted(s["train"] + s["val"] + s["test"]) == sorted({c.patient for c in cases})
    assert any(split_patients(cases, seed) != s for seed in (1, 2, 3))
    few = data.Cases([c for c in cases if c.patient <= "phantom002"], ".", "MSD", cases.classes)
    with pytest.raises(DataError, match="2 patients with labels; 3 or more"):
        split_patients(few)


def test_phantom(phantom, tmp_path):
    cases = find_cases(phantom)
    assert cases.layout == "MSD" and cases.classes == data.ACDC and len(cases) == 12 and len({c.patient for c in cases}) == 6
    for ed, es in zip(cases[::2], cases[1::2]):
        one, two = read_case(ed, cases), read_case(es, cases)
        assert one.spacing[0] >= 8 and one.spacing[1] < 2 and set(np.unique(one.label)) == {0, 1, 2, 3}
        assert (two.label == 3).sum() < (one.label == 3).sum()                    # systole: a smaller cavity
    again = data.make_phantom(tmp_path / "again", patients=1)
    assert np.array_equal(nib.load(again / "imagesTr/phantom001_ED.nii.gz").dataobj, nib.load(cases[0].image).dataobj)
    with pytest.raises(DataError, match="exists already"):
        data.make_phantom(phantom)


def test_data_as_a_command(phantom, tmp_path):
    done = run("data.py", phantom, "--montage", tmp_path / "m.png")
    assert done.returncode == 0 and "MSD layout, 12 cases of 6 patients" in done.stdout and "class 3 LV" in done.stdout
    assert "phantom001_ED" in done.stdout and (tmp_path / "m.png").stat().st_size > 10_000
    assert run("data.py", "phantom", tmp_path / "p").returncode == 0 and len(find_cases(tmp_path / "p")) == 80


# ------------------------------------------------------------------------------------------------ bad files

def edit(path, change):
    image = nib.load(path)
    save(path, change(np.asarray(image.dataobj).copy()), image.header.get_zooms()[:3])


def with_nan(a):
    a[3, 3, 1] = np.nan
    return a


IMAGE, LABEL = "imagesTr/case_1.nii.gz", "labelsTr/case_1.nii.gz"
BAD = {
    "truncated": (lambda r: (r / IMAGE).write_bytes((r / IMAGE).read_bytes()[:900]), "case_1.nii.gz: not a readable NIfTI"),
    "not NIfTI": (lambda r: (r / IMAGE).write_text("hello"), "case_1.nii.gz: not a readable NIfTI"),
    "shapes": (lambda r: edit(r / LABEL, lambda a: a[:-1]), "label shape .* differs from image shape"),
    "NaN": (lambda r: edit(r / IMAGE, with_nan), "1 voxels are NaN or infinite"),
    "infinite": (lambda r: edit(r / IMAGE, lambda a: np.where(a > a.min(), a, np.inf).astype(np.float32)), "NaN or infinite"),
    "constant": (lambda r: edit(r / IMAGE, lambda a: a * 0 + 7), r"constant volume \(every voxel 7\)"),
    "one slice": (lambda r: [edit(r / f, lambda a: a[..., :1]) for f in (IMAGE, LABEL)], "one slice only"),
    "fractions": (lambda r: edit(r / LABEL, lambda a: a.astype(np.float32) * .5), "not all whole numbers"),
    "unknown label": (lambda r: edit(r / LABEL, lambda a: a + 2), "unknown label [45]; known are 0 background"),
    "2D": (lambda r: edit(r / IMAGE, lambda a: np.stack([a] * 3, -1)), "3 channels, the dataset has 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, tmp_path):
    msd(tmp_path)
    change, message = BAD[kind]
    change(tmp_path)
    cases = find_cases(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        read_case(cases[1], cases)
    assert "case_1" in str(error.value) and "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_cases(tmp_path / "no")
    with pytest.raises(DataError, match="no known layout .found nothing"):
        find_cases(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        find_cases(tmp_path / "file")
    (tmp_path / "a/imagesTr").mkdir(parents=True)
    (tmp_path / "a/dataset.json").write_text('{"labels": {"0": "b", "1": "x"}, "modality": {"0": "MR"}}')
    with pytest.raises(DataError, match="holds no images"):
        find_cases(tmp_path / "a")
    (tmp_path / "a/dataset.json").write_text("{")
    with pytest.raises(DataError, match="not a dataset.json"):
        find_cases(tmp_path / "a")
    with pytest.raises(DataError, match=r"label values \[0, 1, 3\] are not 0, 1, 2"):
        find_cases(msd(tmp_path / "b", {"0": "background", "1": "x", "3": "y"}))


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
