"""Every kind of fault is found where it is, and nowhere else."""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_into
from hyspark.data.quality import case_files, check
from hyspark.data.quality.check import check_dataset
from hyspark.data.quality.examine import examine
from hyspark.data.quality.faults import personal_text
from hyspark.data.quality.findings import FINDING_KINDS, Finding
from hyspark.data.readers.header import read_nifti_header
from hyspark.data.settings import PrepareSettings

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
SHAPE = (24, 24, 20)


def ct(seed: int = 0) -> np.ndarray:
    """A ball of tissue in air, int16 HU."""
    grid = np.indices(SHAPE) - np.array(SHAPE).reshape(3, 1, 1, 1) / 2
    noise = np.random.default_rng(seed).normal(0, 20, SHAPE)
    return np.where((grid**2).sum(0) < 64, 40 + noise, -1000 + noise).astype(np.int16)


def organ() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[10:14, 10:14, 8:12] = 1
    return label


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = AFFINE) -> nib.Nifti1Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    nib.save(image, path)
    return image


@pytest.fixture
def data(tmp_path: Path) -> SimpleNamespace:
    """A data set of two sound, labelled cases; the first is there to be broken."""
    folder = tmp_path / "Dataset001_Test"
    for number in range(2):
        save(folder / "imagesTr" / f"case{number}_0000.nii.gz", ct(number))
        save(folder / "labelsTr" / f"case{number}.nii.gz", organ())
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    return SimpleNamespace(
        folder=folder,
        image=folder / "imagesTr" / "case0_0000.nii.gz",
        label=folder / "labelsTr" / "case0.nii.gz",
        names=folder / "dataset.json",
    )


def faults(folder: Path, num_workers: int = 1, **window: float) -> list[Finding]:
    examined, found = check_dataset(folder, **window, num_workers=num_workers, progress=False)
    return [*(finding for seen in examined for finding in seen.findings), *found.findings]


def test_a_sound_data_set_has_no_faults(data):
    assert faults(data.folder) == faults(data.folder.parent) == faults(data.folder, num_workers=2) == []


# What is done to the data set: (kind that must be found, number of the fault, what breaks it)
BROKEN: list[tuple[str, str, Callable[[SimpleNamespace], object]]] = []


def breaks(kind: str, part: str = "image") -> Callable[[Callable], Callable]:
    """Enter a function that breaks the data set: it must show as a fault of this kind at this file."""

    def enter(function: Callable) -> Callable:
        BROKEN.append((kind, part, function))
        return function

    return enter


@breaks("dangling link")
def a_link_to_nothing(data):
    data.image.unlink()
    data.image.symlink_to("gone.nii.gz")


@breaks("empty file")
def no_bytes(data):
    data.image.write_bytes(b"")


@breaks("empty file", "label")
def no_bytes_in_the_label(data):
    data.label.write_bytes(b"")


@breaks("not NIfTI")
def text_under_a_nifti_name(data):
    data.image.write_bytes(gzip.compress(b"hello" * 1000))


@breaks("failed download")
def a_web_page(data):
    data.image.write_bytes(b"<!DOCTYPE html><html>")


@breaks("archive")
def a_zip_archive(data):
    data.image.write_bytes(b"PK\x03\x04" + bytes(99))


@breaks("misnamed")
def not_compressed(data):
    data.image.write_bytes(gzip.decompress(data.image.read_bytes()))


@breaks("damaged")
def cut_short(data):
    content = data.image.read_bytes()
    data.image.write_bytes(content[: len(content) // 2])


@breaks("damaged")
def a_wrong_checksum(data):
    content = bytearray(data.image.read_bytes())
    content[-6] ^= 255
    data.image.write_bytes(content)


@breaks("damaged")
def a_flipped_byte(data):
    content = bytearray(data.image.read_bytes())
    content[len(content) // 2] ^= 255
    data.image.write_bytes(content)


@breaks("damaged", "label")
def a_label_cut_short(data):
    content = data.label.read_bytes()
    data.label.write_bytes(content[:-12])


@breaks("damaged", "other")
def an_uncompressed_file_cut_short(data):
    content = gzip.decompress(data.image.read_bytes())
    data.image.unlink()
    data.other = data.image.with_suffix("")
    data.other.write_bytes(content[: len(content) // 2])


@breaks("not 3D")
def a_time_series(data):
    save(data.image, np.stack([ct(0), ct(1)], -1))


@breaks("not 3D")
def a_single_slice(data):
    save(data.image, ct()[:, :, 0])


@breaks("colours")
def a_picture_in_colours(data):
    rgb = np.zeros(SHAPE, np.dtype([(c, "u1") for c in "RGB"]))
    save(data.image, rgb)


@breaks("complex numbers")
def complex_voxels(data):
    save(data.image, ct().astype(np.complex64))


def patch_header(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes of a NIfTI header."""
    whole = bytearray(gzip.decompress(path.read_bytes()))
    whole[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(whole)))


PIXDIM, QFORM_CODE, DESCRIP = 76, 252, 148


@breaks("impossible spacing")
def no_spacing(data):
    patch_header(data.image, PIXDIM + 4, np.zeros(3, "<f4").tobytes())


@breaks("impossible spacing")
def spacing_that_is_no_number(data):
    patch_header(data.image, PIXDIM + 8, np.float32(np.nan).tobytes())


@breaks("odd spacing")
def spacing_in_centimetres(data):
    save(data.image, ct(), np.diag([0.1, 0.1, 0.2, 1]))
    save(data.label, organ(), np.diag([0.1, 0.1, 0.2, 1]))


@breaks("impossible spacing")
def spacing_in_metres(data):
    save(data.image, ct(), np.diag([0.002, 0.002, 0.003, 1]))
    save(data.label, organ(), np.diag([0.002, 0.002, 0.003, 1]))


@breaks("singular affine")
def two_axes_in_one_direction(data):
    affine = AFFINE.copy()
    affine[:3, 1] = affine[:3, 0]
    image = nib.Nifti1Image(ct(), None)
    image.header.set_sform(affine, code=1)
    nib.save(image, data.image)


@breaks("sheared affine")
def a_tilted_gantry(data):
    affine = AFFINE.copy()
    affine[1, 2] = 0.8
    for path, voxels in ((data.image, ct()), (data.label, organ())):
        image = nib.Nifti1Image(voxels, affine)
        image.set_qform(None, code=0)
        nib.save(image, path)


@breaks("sform and qform disagree")
def a_mirrored_qform(data):
    image = nib.Nifti1Image(ct(), AFFINE)
    image.set_sform(AFFINE, code=1)
    image.set_qform(np.diag([-2.0, 2.0, 3.0, 1.0]), code=1)
    nib.save(image, data.image)


@breaks("pixdim disagrees")
def edges_that_are_not_those_of_the_sform(data):
    patch_header(data.image, PIXDIM + 4, np.array([2, 2, 5], "<f4").tobytes())


@breaks("not in mm")
def lengths_in_metres(data):
    for path, voxels in ((data.image, ct()), (data.label, organ())):
        image = nib.Nifti1Image(voxels, np.diag([0.002, 0.002, 0.003, 1]))
        image.header.set_xyzt_units("meter")
        nib.save(image, path)


@breaks("odd field")
def an_unknown_code(data):
    patch_header(data.image, QFORM_CODE + 2, np.array(7, "<i2").tobytes())


@breaks("no orientation")
def no_codes(data):
    image = nib.Nifti1Image(ct(), AFFINE)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, data.image)


@breaks("localiser")
def a_scout_view(data):
    save(data.image, ct()[:, :, 9:11])


@breaks("thin")
def a_few_slices(data):
    save(data.image, ct()[:, :, 6:14])


@breaks("text that may name a patient")
def a_name_in_the_header(data):
    patch_header(data.image, DESCRIP, b"DOE^JANE 19510203")


@breaks("text that may name a patient")
def a_dicom_header_inside(data):
    image = nib.Nifti1Image(ct(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(2, b"\0" * 16))
    nib.save(image, data.image)


@breaks("NaN or infinite")
def some_nan(data):
    voxels = ct().astype(np.float32)
    voxels[0, 0, 0] = np.nan
    save(data.image, voxels)


@breaks("NaN or infinite")
def one_infinity(data):
    voxels = ct().astype(np.float32)
    voxels[3, 4, 5] = np.inf
    save(data.image, voxels)


@breaks("constant")
def one_value(data):
    save(data.image, np.full(SHAPE, 7, np.int16))


@breaks("all air")
def nothing_but_air(data):
    save(data.image, (ct() // 10 - 900).astype(np.int16))


@breaks("offset")
def from_0_to_4095(data):
    save(data.image, (ct().clip(-1024, None) + 1024).astype(np.int16))


@breaks("8-bit")
def windowed_to_8_bits(data):
    save(data.image, ((ct().clip(-160, 240) + 160) / 400 * 255).astype(np.uint8))


@breaks("scaled")
def scaled_to_0_and_1(data):
    save(data.image, ((ct().clip(-160, 240) + 160) / 400).astype(np.float32))


def in_air():
    """The volume with bone, in noisy air at its edge."""
    voxels = ct().astype(np.int32)
    voxels[4:6, 4:6] = 700
    air = np.random.default_rng(0).normal(-1000, 20, voxels.shape).astype(np.int32)
    return np.where(np.indices(voxels.shape).min(0) < 3, air, voxels)


@breaks("inverted")
def air_of_1000(data):
    save(data.image, (-in_air()).astype(np.int16))


@breaks("not HU")
def ten_times_hu(data):
    voxels = in_air()
    voxels[8:14, 8:14] -= 150  # fat
    save(data.image, (voxels * 10).astype(np.int16))


@breaks("wrapped around")
def negative_values_as_unsigned(data):
    save(data.image, ct().astype(np.uint16))


@breaks("narrow window")
def clipped_between_fat_and_vessels(data):
    save(data.image, ct().clip(-50, 100))


@breaks("label map")
def a_label_map_as_image(data):
    save(data.image, organ())


@breaks("like PET")
def uptake(data):
    voxels = np.random.default_rng(0).gamma(0.5, 0.3, SHAPE)
    voxels[9:12, 9:12, 9:12] += 12
    save(data.image, voxels.astype(np.float32))


@breaks("no CT")
def magnetic_resonance(data):
    save(data.image, np.random.default_rng(0).integers(0, 1401, SHAPE, np.int16))


@breaks("perhaps no CT")
def values_as_of_vessels_alone(data):
    save(data.image, np.random.default_rng(0).normal(250, 40, SHAPE).astype(np.int16))


@breaks("background of 0")
def a_body_that_was_cut_out(data):
    voxels = ct()
    voxels[..., :4] = -90
    save(data.image, np.where(voxels < -300, 0, voxels))


@breaks("another modality")
def a_ct_that_is_declared_as_mr(data):
    folder = data.folder.parent / "Dataset002_Declared"
    shutil.copytree(data.folder, folder)
    (data.image, data.label), others = (
        (folder / part / f"case0{end}.nii.gz" for part, end in (("imagesTr", "_0000"), ("labelsTr", ""))),
        folder / "imagesTr" / "case1_0000.nii.gz",
    )
    others.unlink()
    (folder / "labelsTr" / "case1.nii.gz").unlink()
    shutil.rmtree(data.folder)
    data.folder = folder
    data.names = folder / "dataset.json"
    data.names.write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "T1"}}))


@breaks("same content", "other")
def one_scan_twice(data):
    data.other = data.image.with_name("case7_0000.nii.gz")
    nib.save(nib.Nifti1Image(ct().astype(np.float32), AFFINE), data.other)  # as another type
    save(data.label.with_name("case7.nii.gz"), organ())


@breaks("label of another shape", "label")
def a_cropped_label(data):
    save(data.label, organ()[:-1])


@breaks("label elsewhere", "label")
def a_shifted_label(data):
    affine = AFFINE.copy()
    affine[:3, 3] = [10, 0, 0]
    save(data.label, organ(), affine)


@breaks("label elsewhere", "label")
def a_mirrored_label(data):
    save(data.label, organ(), np.diag([-2.0, 2.0, 3.0, 1.0]))


@breaks("label not whole", "label")
def an_interpolated_label(data):
    save(data.label, organ() * np.float32(0.5))


@breaks("label outside 0 to 255", "label")
def a_negative_label(data):
    save(data.label, -organ().astype(np.int16))


@breaks("undeclared class", "label")
def a_class_that_is_not_declared(data):
    save(data.label, organ() * 9)


@breaks("empty label", "label")
def a_label_without_organs(data):
    save(data.label, organ() * 0)


@breaks("label without image", "label")
def an_orphan(data):
    data.image.unlink()


@breaks("image without label")
def an_image_alone(data):
    data.label.unlink()


@breaks("two files for a case", "other")
def compressed_and_not(data):
    data.other = data.image.with_suffix("")
    data.other.write_bytes(gzip.decompress(data.image.read_bytes()))
    data.image, data.other = data.other, data.image  # by name, the shorter one comes first


@breaks("odd name", "other")
def a_name_without_a_channel(data):
    data.other = data.image.with_name("scan5.nii.gz")
    save(data.other, ct(5))


@breaks("another format", "other")
def another_format(data):
    data.other = data.image.with_name("scan.dcm")
    data.other.write_bytes(b"DICM")


@breaks("another channel", "other")
def a_second_channel(data):
    data.other = data.image.with_name("case0_0001.nii.gz")
    shutil.copy(data.image, data.other)


@breaks("another format", "names")
def a_declared_ending_that_is_not_read(data):
    data.names.write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "file_ending": ".nrrd"}))


@breaks("unused file", "other")
def a_test_image(data):
    data.other = data.folder / "imagesTs" / "case9_0000.nii.gz"
    save(data.other, ct(9))


@breaks("subject on both sides", "other")
def visits_of_one_patient_on_both_sides(data):
    for number in range(8):
        save(data.image.with_name(f"p{number}_visit1_0000.nii.gz"), ct(20 + number))
        save(data.label.with_name(f"p{number}_visit1.nii.gz"), organ())
    save(data.image.with_name("p1_visit2_0000.nii.gz"), ct(30))
    save(data.label.with_name("p1_visit2.nii.gz"), organ())
    data.other = data.folder / "splits.json"
    data.other.write_text(json.dumps({"train": ["p1_visit1"], "val": ["p1_visit2"]}))


@breaks("unnamed class", "label")
def a_value_between_the_classes(data):
    data.names.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 3}}))
    save(data.label, organ() * 2)


@breaks("empty side", "folder")
def one_case_alone(data):
    for file in data.folder.rglob("case1*"):
        file.unlink()


@breaks("unused class", "folder")
def a_class_that_no_label_holds(data):
    data.names.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))


@breaks("large subject", "folder")
def several_visits(data):
    for i in range(3):
        save(data.image.with_name(f"p1_visit{i}_0000.nii.gz"), ct(10 + i))


@breaks("no class names", "folder")
def no_names(data):
    data.names.unlink()


@breaks("unreadable list", "names")
def names_that_are_no_json(data):
    data.names.write_text("{")


@breaks("unreadable list", "names")
def names_in_an_array(data):
    data.names.write_text("[]")


@breaks("unreadable list", "names")
def a_key_twice(data):
    data.names.write_text('{"labels": {"background": 0, "liver": 1, "liver": 2}}')


def test_an_unreadable_file_of_names_is_named_once(data):
    data.names.write_text('{"labels": {"background": 0, "liver": 1, "liver": 2}}')
    found = faults(data.folder)
    assert [(f.kind, f.file) for f in found] == [("unreadable list", str(data.names))]
    assert found[0].found == 'not valid JSON: the key "liver" is set twice; keep one of them'


def test_data_sets_of_other_classes_are_each_checked_by_their_own(data):
    """The value 2 is a class of the second alone, and 3 of none."""
    other = data.folder.with_name("Dataset002_Other")
    for number in range(2, 5):
        save(other / "imagesTr" / f"case{number}_0000.nii.gz", ct(number))
        save(other / "labelsTr" / f"case{number}.nii.gz", organ() * (number - 1))
    (other / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2, "c": 4}}))
    save(data.label, organ() * 2)
    found = {(f.kind, Path(f.file).relative_to(data.folder.parent).as_posix()) for f in faults(data.folder.parent)}
    assert found == {
        ("different classes", "."),
        ("undeclared class", "Dataset001_Test/labelsTr/case0.nii.gz"),
        ("unnamed class", "Dataset002_Other/labelsTr/case4.nii.gz"),
        ("unused class", "Dataset002_Other"),
    }


@pytest.mark.parametrize(("kind", "part", "function"), BROKEN, ids=[f.__name__ for _, _, f in BROKEN])
def test_a_fault_is_found_at_its_file_and_nowhere_else(data, kind, part, function):
    function(data)
    found = faults(data.folder)
    assert (kind, str(getattr(data, part))) in {(f.kind, f.file) for f in found}
    consequences = {"image without label", "no class names", "unused class", "label of another shape", "thin"}
    if kind in ("singular affine", "no orientation", "impossible spacing"):
        consequences.add("label elsewhere")  # the label's header is still sound
    if kind in ("image without label", "another modality", "subject on both sides", "label without image"):
        consequences |= {"empty side", "unused file"}  # one case of two is not used
    assert {f.kind for f in found} <= {kind, *consequences}
    assert not any("case1" in f.file for f in found)
    for finding in found:
        assert finding.found in str(finding)
        assert FINDING_KINDS[finding.kind].advice in str(finding)


def test_at_least_thirty_kinds_are_tried():
    below = {"missing", "no permission", "another scale", "another window", "too large", "not examined", "not prepared"}
    below |= {"unused label map", "two data sets of one name", "listed twice", "pickled splits", "different classes"}
    below |= {
        "MR as CT",
        "CT as MR",
        "no foreground",
        "missing channel",
        "channel of another shape",
        "channel elsewhere",
        "not as nnU-Net",
    }
    tried = {kind for kind, _, _ in BROKEN} | below  # these in tests of their own
    assert tried == set(FINDING_KINDS)
    assert len(BROKEN) >= 30


CLASSES_ALONE = {"undeclared class", "unnamed class"}
"""Errors that concern the classes of a run, which preparation does not know."""


@pytest.mark.parametrize(("kind", "part", "function"), BROKEN, ids=[f.__name__ for _, _, f in BROKEN])
def test_preparation_refuses_what_check_calls_an_error(data, kind, part, function):
    function(data)
    examined, _ = check_dataset(data.folder, num_workers=1, progress=False)
    for seen in examined:
        is_small = kind == "odd spacing" and seen.case.image == data.image
        edge = 0.4 if is_small else 4.0  # of a grid that such an image fills
        outcome = prepare_into(seen.case, PrepareSettings(spacing=(edge,) * 3), data.folder / seen.case.name)
        errors = [f for f in seen.findings if f.severity == "error" and f.kind not in CLASSES_ALONE]
        assert outcome.errors == tuple(map(str, errors))
        warnings = [f for f in seen.findings if f.severity == "warning" and f.kind not in CLASSES_ALONE]
        assert outcome.warnings == tuple(map(str, warnings))
        assert (data.folder / seen.case.name).exists() == (not errors)


def test_a_window_that_fits_the_values_as_the_message_advises(data):
    save(data.image, np.random.default_rng(0).integers(0, 1401, SHAPE, np.int16))
    save(data.image.with_name("case1_0000.nii.gz"), np.random.default_rng(1).integers(0, 1401, SHAPE, np.int16))
    (finding, _) = faults(data.folder)
    assert "or set hu_min and hu_max to the range of such values" in str(finding)
    low, high = (float(x) for x in re.search(r"values from (\S+) to (\S+),", finding.found).groups())
    assert [f.kind for f in faults(data.folder, hu_min=low, hu_max=high)] == ["another scale"] * 2
    with pytest.raises(ValueError, match="hu_min: expected a number below hu_max"):
        faults(data.folder, hu_min=high, hu_max=low)


def test_a_window_for_other_values(data):
    assert [f.kind for f in faults(data.folder, hu_min=0.0, hu_max=1.0)] == ["another window"] * 2


@pytest.mark.parametrize("where", ["header_faults", "value_faults", "load_voxels", "label_faults", "pair_fault"])
@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("surprise"), "not examined"), (MemoryError("5 GB"), "too large")]
)
def test_an_error_that_nobody_foresaw_is_one_of_its_case(data, monkeypatch, where, error, kind):
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return before(*args)

    before = getattr(case_files, where)
    monkeypatch.setattr(case_files, where, fail)
    (finding,) = [f for f in faults(data.folder) if f.severity == "error"]
    assert (finding.kind, finding.file) == (kind, str(data.image))
    assert type(error).__name__ in finding.found


def test_thumbnails_are_kept_of_cases_with_findings_first(data, monkeypatch):
    monkeypatch.setattr(check, "MAX_THUMBNAILS", 1)
    examined, _ = check_dataset(data.folder, num_workers=1, progress=False)
    assert [seen.thumbnail is None for seen in examined] == [False, True]
    save(data.image.with_name("case1_0000.nii.gz"), ct()[:, :, 6:14])  # thin
    examined, _ = check_dataset(data.folder, num_workers=1, progress=False)
    assert [seen.thumbnail is None for seen in examined] == [True, False]


def test_a_file_that_may_not_be_read(data, monkeypatch):
    opened = Path.open

    def refuse(self, *args, **kwargs):
        if self == data.image:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so permissions cannot be taken away
    assert [f.kind for f in faults(data.folder)] == ["no permission"]


# Lists


def write_list(data, entries) -> Path:
    path = data.folder.parent / "list.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_list_is_checked_by_its_entries(data):
    entry = {"image": "Dataset001_Test/imagesTr/case0_0000.nii.gz", "label": "Dataset001_Test/labelsTr/case0.nii.gz"}
    other = {key: path.replace("case0", "case1") for key, path in entry.items()}
    sound = {"training": [entry, other], "labels": {"background": 0, "liver": 1}}
    assert faults(write_list(data, sound)) == []
    twice = {**sound, "validation": [entry]}
    assert [f.kind for f in faults(write_list(data, twice))] == ["listed twice"]
    missing = {"training": [entry, {"image": "gone.nii.gz"}], "labels": sound["labels"]}
    found = faults(write_list(data, missing))
    assert [(f.kind, Path(f.file).name) for f in found] == [
        ("missing", "gone.nii.gz"),
        ("image without label", "list.json"),
    ]
    for wrong in ([], {"training": "x"}, {"training": [{"label": "x"}]}, {**sound, "labels": {"a": "b"}}):
        assert "unreadable list" in {f.kind for f in faults(write_list(data, wrong))}


def test_class_names_of_a_data_set_without_labels_do_not_matter(data):
    other = data.folder.parent / "Dataset077_Imported"
    shutil.copytree(data.folder / "imagesTr", other / "imagesTr")
    (other / "dataset.json").write_text(json.dumps({"labels": {"background": 0}}))
    assert "unreadable list" not in {f.kind for f in faults(data.folder.parent)}


def test_where_there_is_nothing_to_check(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a JSON, or a folder with DatasetXXX_Name"):
        check_dataset(tmp_path, progress=False)


def test_btcv_names_are_no_fault_and_other_channels_a_note(data):
    for number in (0, 1):
        folder = data.folder
        os.rename(folder / "imagesTr" / f"case{number}_0000.nii.gz", folder / "imagesTr" / f"img000{number}.nii.gz")
        os.rename(folder / "labelsTr" / f"case{number}.nii.gz", folder / "labelsTr" / f"label000{number}.nii.gz")
    shutil.copy(folder / "imagesTr" / "img0000.nii.gz", folder / "imagesTr" / "img0000_0001.nii.gz")
    assert [(f.kind, f.severity) for f in faults(folder)] == [("another channel", "note")]


def test_two_data_sets_of_one_name_and_masks_of_single_organs(data):
    shutil.copytree(data.folder, data.folder.parent / "copy" / data.folder.name)
    assert "two data sets of one name" in {f.kind for f in faults(data.folder.parent)}
    patient = data.folder.parent / "loose" / "s0001"
    save(patient / "ct.nii.gz", ct())
    for name in ("liver", "spleen"):
        save(patient / "segmentations" / f"{name}.nii.gz", organ())
    found = [f.kind for f in faults(patient.parent)]
    assert found == ["image without label", "unused label map", "empty side"]


TEXTS = [
    (b"DOE^JANE", "DOE^JANE"),
    (b"b19510203", ""),
    (b"19510203", "a date of birth"),
    (b"Doe, Jane", "a name"),
    (b"FSL6.0\\0", ""),
]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["descrip", "aux_file", "intent_name"])
@pytest.mark.parametrize(("text", "found"), TEXTS)
def test_texts_of_headers_of_both_formats(tmp_path, kind, name, text, found):
    image = kind(ct(), AFFINE)
    size = image.header[name].dtype.itemsize
    for padded in (text.ljust(size, b"\0"), text.rjust(size), b"x\0" + text):  # the field is full; NUL within it
        image.header[name] = padded
        path = tmp_path / "a_0000.nii.gz"
        nib.save(image, path)
        kinds = [f.kind for f in examine(Case("a", "D", path), PrepareSettings(), None).findings]
        assert kinds == (["text that may name a patient"] if found else [])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
def test_extensions_of_headers(tmp_path, version, order):
    def found(*extensions: tuple[int, bytes]) -> str:
        kind = {1: nib.Nifti1Image, 2: nib.Nifti2Image}[version]
        image = kind(ct(), AFFINE, kind.header_class(endianness=order))
        image.header.extensions.extend(nib.nifti1.Nifti1Extension(code, content) for code, content in extensions)
        nib.save(image, tmp_path / "a.nii.gz")
        return personal_text(read_nifti_header(tmp_path / "a.nii.gz"))

    assert found((4, b"<AFNI/>"), (6, b"resampled")) == ""
    assert found((4, b"<AFNI/>" * 50), (6, b"of DOE^JANE")) == "an extension of code 6"
    assert found((4, b"<AFNI/>"), (2, b"\0" * 40)) == "an extension with a DICOM header"
