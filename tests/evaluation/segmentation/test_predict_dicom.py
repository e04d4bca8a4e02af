"""DICOM in, label maps out: NIfTI, DICOM-SEG and RTSTRUCT, read back by other programs' code."""

import copy
import hashlib
import io
import re
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from pydicom.dataset import Dataset

from hyspark.cli.main import main
from hyspark.data.datasets.scan_inputs import find_inputs, write_scan
from hyspark.data.readers.find import find_volumes
from hyspark.data.writers.dicom_seg import dicom_seg_file, property_of
from hyspark.data.writers.rtstruct import rtstruct_file
from hyspark.data.writers.source_images import Segments
from hyspark.evaluation.segmentation import predict
from hyspark.evaluation.segmentation.inference import TrainedNetwork
from hyspark.evaluation.segmentation.label_output import LABEL_ENDINGS
from hyspark.tasks import api
from hyspark.utils.install import install_command
from tests.data.readers.known_series import KNOWN, made_series, save
from tests.evaluation.segmentation.test_predict import CONFIG, NAMES, Levels

highdicom = pytest.importorskip("highdicom", reason="highdicom is not installed: pip install 'hyspark[dicom]'")
SEGMENTS = Segments(("liver", "left kidney", "tumour", "never there"), [(9, 99, 199)] * 4, "0.1.0", "abc")
TURNED = {
    "axial, as it is": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "axial, reversed": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (1, 0, 0)),
    "oblique": ((0.8, 0.6, 0), (-0.6, 0.8, 0), (0, 0, 1)),
}
"""Directions of rows, of columns, and from slice to slice."""


@pytest.fixture(autouse=True)
def knowing(monkeypatch, tmp_path):
    """A network that labels by Hounsfield units, in place of a trained one."""
    (tmp_path / "best.pth").write_bytes(b"weights")
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), CONFIG, NAMES, []))
    monkeypatch.setattr(api, "kind_of_network", lambda path: "segmentation")


def body():
    """Hounsfield units (column, row, slice), and the labels that they mean to the network."""
    labels = np.zeros((22, 24, 12), np.uint8)
    labels[5:14, 6:15, 2:9] = 1
    labels[8:11, 9:12, 4:6] = 0  # a hole
    labels[16:19, 8:12, 3:11] = 2
    hu = np.full(labels.shape, -1000, np.int16)
    hu[2:20, 2:22, 1:11] = -50
    hu[labels == 1], hu[labels == 2] = 80, 200
    return hu, labels


def turn(slices, name):
    """Lays the slices in another orientation."""
    row, column, across = (np.array(direction, float) for direction in TURNED[name])
    for k, data in enumerate(slices):
        data.ImageOrientationPatient = [*row, *column]
        data.ImagePositionPatient = [*(np.array([10.0, -20, 30]) + 3.0 * k * across)]
        data.PixelSpacing = [2.0, 2.0]


def series_of(folder):
    (volume,) = find_volumes([folder], min_slices=2, skip=folder / "x", num_workers=1, progress=False).volumes
    return volume.series


def random_labels(shape):
    labels = np.random.default_rng(1).integers(0, 4, shape).astype(np.uint8)
    labels[:, :, 3] = 0
    return labels


def read_seg(content, slices):
    """Labels (column, row, slice) of a DICOM-SEG by its functional groups, in the order of its source's files."""
    seg = highdicom.seg.segread(io.BytesIO(content))
    uids = [str(data.SOPInstanceUID) for data in slices]
    found = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    return seg, found.transpose(2, 1, 0)


def read_rtstruct(content, slices):
    """Labels (column, row, slice) of an RTSTRUCT: voxels whose centres matplotlib finds in a contour."""
    data = pydicom.dcmread(io.BytesIO(content))
    at = {str(part.SOPInstanceUID): k for k, part in enumerate(slices)}
    columns, rows = slices[0].Columns, slices[0].Rows
    centres = np.stack(np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij"), -1).reshape(-1, 2)
    labels = np.zeros((columns, rows, len(slices)), np.uint8)
    for region in data.ROIContourSequence:
        for contour in region.get("ContourSequence", []):
            k = at[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
            part = slices[k]
            points = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(part.ImagePositionPatient, float)
            directions = np.array(part.ImageOrientationPatient, float).reshape(2, 3)
            flat = points @ directions.T / np.array(part.PixelSpacing, float)[::-1]
            assert np.abs(points @ np.cross(*directions)).max() < 0.01
            inside = Polygon(np.concatenate([flat, flat[:1]])).contains_points(centres, radius=1e-9)
            shown = inside.reshape(columns, rows)
            assert not (labels[:, :, k][shown]).any()
            labels[:, :, k][shown] = int(region.ReferencedROINumber)
    return data, labels


@pytest.mark.parametrize(
    "name", [*TURNED, "gantry tilt", "one slice missing", "distances change", "3 positions repeated"]
)
def test_objects_hold_the_labels_in_the_geometry_of_their_series(tmp_path, name):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    if name in TURNED:
        turn(slices, name)
        save(tmp_path / "in", slices)
    else:
        KNOWN[name](tmp_path / "in", slices)
    series = series_of(tmp_path / "in")
    in_order = [pydicom.dcmread(part.path) for part in series.slices]
    labels = random_labels((13, 11, len(in_order)))

    seg, found = read_seg(dicom_seg_file(labels, series, SEGMENTS), in_order)
    assert np.array_equal(found, labels)
    assert [str(one.SegmentLabel) for one in seg.SegmentSequence] == list(SEGMENTS.names)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        uid = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        (source,) = [data for data in in_order if data.SOPInstanceUID == uid]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    shared = seg.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert np.allclose(orientation, np.array(in_order[0].ImageOrientationPatient, float), atol=1e-9)
    measures = shared.PixelMeasuresSequence[0]
    assert ("SpacingBetweenSlices" in measures) == (not series.uneven)

    structures, found = read_rtstruct(rtstruct_file(labels, series, SEGMENTS), in_order)
    assert np.array_equal(found, labels)
    assert [str(one.ROIName) for one in structures.StructureSetROISequence] == list(SEGMENTS.names[:3])
    for made in (seg, structures):
        for element in ("PatientName", "PatientID", "PatientSex", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
            assert made[element] == in_order[0][element]
        assert made.FrameOfReferenceUID == in_order[0].FrameOfReferenceUID
        assert made.SeriesInstanceUID != in_order[0].SeriesInstanceUID


def test_objects_of_a_multi_frame_series_refer_to_its_frames(tmp_path):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    KNOWN["enhanced multi-frame"](tmp_path / "in", copy.deepcopy(slices))
    series = series_of(tmp_path / "in")
    labels = random_labels((13, 11, 9))
    seg = highdicom.seg.segread(io.BytesIO(dicom_seg_file(labels, series, SEGMENTS)))
    volume = seg.get_volume(combine_segments=True)
    heights = [data.ImagePositionPatient[2] for data in slices]
    for index, shown in enumerate(volume.array):
        k = heights.index((volume.affine @ [index, 0, 0, 1])[2])
        assert np.array_equal(shown.T, labels[:, :, k])
    structures = pydicom.dcmread(io.BytesIO(rtstruct_file(labels, series, SEGMENTS)))
    frames = {part.frame + 1: heights[k] for k, part in enumerate(series.slices)}
    for region in structures.ROIContourSequence:
        for contour in region.ContourSequence:
            assert contour.ContourData[2] == frames[contour.ContourImageSequence[0].ReferencedFrameNumber]


def rounded(slices):
    """Directions and spacings that differ in the last digits from slice to slice."""
    for k, data in enumerate(slices):
        data.ImageOrientationPatient = [1, 1e-6 * k, 0, 0, 1, 0]
        data.PixelSpacing = [1, f"{1 + 1e-6 * k:.7f}"]


def without_thickness(slices):
    for data in slices:
        del data.SliceThickness


def downwards(slices):
    """As GE writes it."""
    for data in slices:
        data.SpacingBetweenSlices = -2


@pytest.mark.parametrize("change", [rounded, without_thickness, downwards])
def test_series_that_break_rules_have_an_object_in_order(tmp_path, change):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    change(slices)
    save(tmp_path / "in", slices)
    labels = random_labels((13, 11, 9))
    seg, found = read_seg(dicom_seg_file(labels, series_of(tmp_path / "in"), SEGMENTS), slices)
    assert np.array_equal(found, labels)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == 2


def test_a_multi_frame_series_may_describe_each_frame_whole(tmp_path):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    KNOWN["enhanced multi-frame"](tmp_path / "in", slices)
    path = tmp_path / "in" / "IM0000.dcm"
    data = pydicom.dcmread(path)
    (shared,) = data.SharedFunctionalGroupsSequence
    for group in data.PerFrameFunctionalGroupsSequence:
        group.update(shared)
    data.SharedFunctionalGroupsSequence = [Dataset()]
    data.save_as(path)
    labels = random_labels((13, 11, 9))
    seg = highdicom.seg.segread(io.BytesIO(dicom_seg_file(labels, series_of(tmp_path / "in"), SEGMENTS)))
    found = seg.get_volume(combine_segments=True).array
    assert np.array_equal(
        np.bincount(found.ravel()), np.bincount(labels[:, :, [0, 1, 2, *range(4, 9)]].ravel()) + [143, 0, 0, 0]
    )


@pytest.mark.parametrize("kind", ["plain", "enhanced multi-frame"])
def test_maps_without_any_label_are_valid_objects(tmp_path, kind):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    KNOWN[kind](tmp_path / "in", slices)
    series, empty = series_of(tmp_path / "in"), np.zeros((13, 11, 9), np.uint8)
    seg = highdicom.seg.segread(io.BytesIO(dicom_seg_file(empty, series, SEGMENTS)))
    assert (len(seg.SegmentSequence), seg.NumberOfFrames, seg.pixel_array.max()) == (4, 4, 0)
    structures = pydicom.dcmread(io.BytesIO(rtstruct_file(empty, series, SEGMENTS)))
    assert len(structures.StructureSetROISequence) == 4
    assert all("ContourSequence" not in region for region in structures.ROIContourSequence)


def test_more_classes_than_a_byte_holds(tmp_path):
    save(tmp_path / "in", slices := made_series(tmp_path / "made", np.zeros((20, 20, 2), np.int16)))
    labels = (np.arange(800).reshape(20, 20, 2) % 300).astype(np.uint16)
    segments = Segments([f"class {number}" for number in range(1, 300)], [(1, 2, 3)] * 299, "0", "a")
    assert np.array_equal(read_seg(dicom_seg_file(labels, series_of(tmp_path / "in"), segments), slices)[1], labels)


def test_classes_have_codes_of_the_dictionary():
    expected = {"Spleen": "Spleen", "right_kidney": "Kidney", "gall bladder": "Gallbladder", "Lungs": "Lung"}
    expected |= {"liver tumour": "Neoplasm", "inferior vena cava": "Inferior vena cava", "organ 7": "Tissue"}
    assert {name: property_of(name)[1].meaning.removesuffix(" structure") for name in expected} == expected


def run(tmp_path, *flags):
    main(
        [
            "predict",
            str(tmp_path),
            *map(str, flags),
            "--out",
            str(tmp_path / "out"),
            "--device=cpu",
            "--prepare_workers=1",
        ]
    )
    return sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", TURNED)
def test_predicted_labels_are_those_of_the_nifti_file_to_the_voxel(tmp_path, name):
    hu, truth = body()
    slices = made_series(tmp_path / "made", hu)
    turn(slices, name)
    save(tmp_path / "in", slices)
    found = find_inputs(
        [tmp_path / "in"], tmp_path / "out", settings=CONFIG, only_dicom=False, min_slices=8, progress=False
    )
    (case,) = found.cases
    write_scan(case)
    nifti = tmp_path / f"{case.name}.nii.gz"
    case.image.rename(nifti)
    options = {"device": "cpu", "prepare_workers": 1}
    (expected,) = api.predict(tmp_path, nifti, tmp_path / "nifti", **options).files
    (written,) = api.predict(tmp_path, tmp_path / "in", tmp_path / "out", **options).files
    assert np.array_equal(nibabel.load(written).get_fdata(), nibabel.load(expected).get_fdata())
    assert np.array_equal(nibabel.load(written).affine, nibabel.load(expected).affine)
    assert b"4711" not in written.read_bytes() + nifti.read_bytes()
    made = api.predict(tmp_path, tmp_path / "in", tmp_path / "out", format="dicom-seg", **options)
    labels = read_seg(made.files[0].read_bytes(), slices)[1]
    made = api.predict(tmp_path, tmp_path / "in", tmp_path / "out", format="rtstruct", **options)
    assert np.array_equal(read_rtstruct(made.files[0].read_bytes(), slices)[1], labels)
    if name != "oblique":
        assert np.array_equal(labels, truth)
    assert (labels != truth).mean() < 0.02
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{case.name}{ending}" for ending in (".nii.gz", ".seg.dcm", ".rtstruct.dcm")
    )


def test_an_imported_scan_has_the_same_labels(tmp_path):
    slices = made_series(tmp_path / "made", body()[0])
    KNOWN["gantry tilt"](tmp_path / "in", slices)
    out = tmp_path / "Dataset1_A"
    main(["import", str(tmp_path / "in"), "--out", str(out), "--salt_file", str(tmp_path / "salt")])
    options = {"device": "cpu", "prepare_workers": 1}
    (expected,) = api.predict(tmp_path, out / "imagesTr", tmp_path / "nifti", **options).files
    (written,) = api.predict(tmp_path, tmp_path / "in", tmp_path / "out", **options).files
    assert nibabel.load(written).get_fdata().any()
    assert np.array_equal(nibabel.load(written).get_fdata(), nibabel.load(expected).get_fdata())
    assert np.array_equal(nibabel.load(written).affine, nibabel.load(expected).affine)


def test_a_tree_of_series_with_faulty_ones(tmp_path, capsys, caplog):
    hu, _ = body()
    first = made_series(tmp_path / "made", hu)
    save(tmp_path / "in" / "a", copy.deepcopy(first))
    second = copy.deepcopy(first)
    for number, data in enumerate(second):
        data.SeriesInstanceUID = "1.2.9"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.9.{number}"
        data.RescaleIntercept = None
        data.RescaleSlope = None if number else 1
    save(tmp_path / "in" / "b", second)
    cut = copy.deepcopy(first)
    for number, data in enumerate(cut):
        data.SeriesInstanceUID = "1.2.8"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.8.{number}"
    cut[3].PixelData = cut[3].PixelData[:-20]
    save(tmp_path / "in" / "c", cut)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "in", "--format", "dicom-seg")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "b, series 1.2.9: RescaleSlope and RescaleIntercept are missing in" in error
    assert "c, series 1.2.8: IM0003.dcm: unreadable pixels" in error
    (written,) = (tmp_path / "out").iterdir()
    assert read_seg(written.read_bytes(), first)[1].any()
    assert "files hold the patient's name and ID" in caplog.text


def test_values_of_the_wrong_sign_or_scale_are_named(tmp_path, capsys):
    hu, _ = body()
    slices = made_series(tmp_path / "made", hu)
    for number, data in enumerate(slices):
        data.PixelRepresentation = 0
        data.PixelData = (data.pixel_array.astype(int) - 1024).astype(np.int16).tobytes()
        data.RescaleIntercept = 0
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.9.{number}"
    save(tmp_path / "in" / "sign", copy.deepcopy(slices))
    for number, data in enumerate(slices):
        data.SeriesInstanceUID = "1.2.8"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.8.{number}"
        data.PixelData = (hu[:, :, number].T + 1024).astype(np.uint16).tobytes()
        del data.RescaleSlope, data.RescaleIntercept
    save(tmp_path / "in" / "scale", slices)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "in")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert re.search("sign, series .*: negative values are read as unsigned; store it as signed", error)
    assert "scale, series 1.2.8: RescaleSlope and RescaleIntercept are missing, and stored values" in error


def test_the_modality_is_that_of_the_network(tmp_path):
    for name, modality in [("ct", "CT"), ("mr", "MR"), ("pt", "PT")]:
        slices = made_series(tmp_path / "made" / name, body()[0])
        for number, data in enumerate(slices):
            data.Modality, data.SeriesInstanceUID = modality, f"1.2.{len(name)}.{ord(name[0])}"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.{ord(name[0])}.{number}"
        save(tmp_path / "in" / name, slices)
    for intensity, expected in [("ct", {"ct"}), ("ct-zscore", {"ct"}), ("mr", {"mr"}), ("none", {"ct", "mr", "pt"})]:
        of_values = {"input_mean": (0.0,), "input_std": (1.0,)} if intensity == "ct-zscore" else {}
        settings = replace(CONFIG, intensity=(intensity,), **of_values)
        given = {"settings": settings, "only_dicom": False, "min_slices": 8, "progress": False}
        found = find_inputs([tmp_path / "in"], tmp_path / "out", **given)
        assert {case.volume.source.name for case in found.cases} == expected
        assert len(found.lines) >= 3 - len(expected)
    twice = [tmp_path / "in", tmp_path / "in" / "ct", tmp_path / "in", next((tmp_path / "in" / "pt").iterdir())]
    again = find_inputs(twice, tmp_path / "out", **given)
    assert [case.name for case in again.cases] == [case.name for case in found.cases]
    with pytest.raises(ValueError, match=r"in: a network of 2 image channels reads NIfTI.* convert it by"):
        find_inputs(
            [tmp_path / "in"], tmp_path / "out", **given | {"settings": replace(settings, image_channels=(0, 1))}
        )


@pytest.mark.parametrize("fmt", ["nifti", "dicom-seg", "rtstruct"])
def test_an_empty_prediction_says_so(tmp_path, caplog, fmt):
    hu, _ = body()
    save(tmp_path / "in", made_series(tmp_path / "made", hu.clip(max=-50)))
    assert run(tmp_path, tmp_path / "in", "--format", fmt)[0].endswith(LABEL_ENDINGS[fmt])
    assert ("no voxel of any class" in caplog.text) == (fmt != "nifti")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"StudyInstanceUID": None}, "expected StudyInstanceUID, to which a DICOM object refers, found none"),
        ({"FrameOfReferenceUID": None}, "expected FrameOfReferenceUID"),
        ({"SOPInstanceUID": "1.2.3.4"}, "expected a SOPInstanceUID of its own, found that of IM"),
    ],
)
def test_series_that_nothing_can_refer_to_are_named(tmp_path, capsys, change, why):
    slices = made_series(tmp_path / "made", body()[0])
    for data in slices:
        for name, value in change.items():
            setattr(data, name, value) if value else delattr(data, name)
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    save(tmp_path / "in", slices)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "in", "--format", "rtstruct")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert why in error
    assert "use --format nifti" in error
    assert run(tmp_path, tmp_path / "in", "--format", "nifti")


@pytest.mark.parametrize(
    ("charset", "name"), [(None, "Doe^J"), ("ISO_IR 100", "Müller^J"), (["", "ISO 2022 IR 87"], "Yamada^T=山田^太郎")]
)
def test_letters_of_patients_and_classes_are_kept(tmp_path, charset, name):
    slices = made_series(tmp_path / "made", np.zeros((4, 3, 3), np.int16))
    for data in slices:
        if charset:
            data.SpecificCharacterSet = charset
        data.PatientName = name
    save(tmp_path / "in", slices)
    segments = replace(SEGMENTS, names=("肝臓", "Läsion"), colours=SEGMENTS.colours[:2])
    series = series_of(tmp_path / "in")
    labels = np.full((4, 3, 3), 2, np.uint8)
    labels[0] = 1
    seg, structures = (
        pydicom.dcmread(io.BytesIO(write(labels, series, segments))) for write in (dicom_seg_file, rtstruct_file)
    )
    assert str(seg.PatientName) == str(structures.PatientName) == name
    assert [str(one.SegmentLabel) for one in seg.SegmentSequence] == list(segments.names)
    assert [str(one.ROIName) for one in structures.StructureSetROISequence] == list(segments.names)


@pytest.mark.filterwarnings("ignore:.*VR")
@pytest.mark.parametrize(
    ("element", "value"),
    [
        ("PatientBirthDate", "00000000"),
        ("PatientBirthDate", "1950"),
        ("StudyTime", "10:15:00"),
        ("StudyDate", "2024.05.06"),
        ("PatientSex", "FEMALE"),
        ("AccessionNumber", "A" * 20),
    ],
)
def test_values_that_break_the_standard_are_copied_as_they_are(tmp_path, element, value):
    slices = made_series(tmp_path / "made", np.zeros((4, 3, 3), np.int16))
    for data in slices:
        tag = pydicom.datadict.tag_for_keyword(element)
        raw = pydicom.dataelem.DataElement(tag, data[element].VR, value, validation_mode=pydicom.config.IGNORE)
        data[element] = raw
    save(tmp_path / "in", slices)
    series = series_of(tmp_path / "in")
    for write in (dicom_seg_file, rtstruct_file):
        made = pydicom.dcmread(io.BytesIO(write(np.ones((4, 3, 3), np.uint8), series, SEGMENTS)))
        assert made[element].value == value


def test_files_of_patients_without_any_type_2_element_and_with_other_letters(tmp_path):
    slices = made_series(tmp_path / "made", np.zeros((13, 11, 9), np.int16))
    for data in slices:
        for name in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
            delattr(data, name)
        data.SpecificCharacterSet = "ISO_IR 100"
        data.PatientName = "Müller^Jürgen"
    save(tmp_path / "in", slices)
    series = series_of(tmp_path / "in")
    for write in (dicom_seg_file, rtstruct_file):
        made = pydicom.dcmread(io.BytesIO(write(random_labels((13, 11, 9)), series, SEGMENTS)))
        assert str(made.PatientName) == "Müller^Jürgen"
        assert made.StudyID == ""


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            ("scan.nii.gz", "--format", "dicom-seg"),
            "scan.nii.gz: expected DICOM, which a DICOM object refers to, found",
        ),
        (("in", "--format", "rtstruct", "--min_slices", "99"), "fewer than --min_slices 99"),
        (("in", "--min_slices", "0"), "--min_slices: expected 1 or more, got 0"),
        (("none",), "none: no such file or folder"),
        (
            ("niftis", "--format", "rtstruct"),
            "niftis: expected DICOM series, which a DICOM object refers to",
        ),
        (("empty",), "empty holds no NIfTI file (.nii, .nii.gz) that is an image, and no DICOM"),
        (("best.pth",), "best.pth is no NIfTI file (.nii, .nii.gz), and no DICOM"),
    ],
)
def test_wrong_use_is_one_message(tmp_path, capsys, monkeypatch, flags, why):
    save(tmp_path / "in", made_series(tmp_path / "made", body()[0]))
    (tmp_path / "niftis").mkdir()
    (tmp_path / "empty").mkdir()
    for file in ("scan.nii.gz", "niftis/scan.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *flags)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    save(tmp_path / "in", made_series(tmp_path / "made", body()[0]))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "in", "--format", "dicom-seg")
    assert caught.value.code == 2
    assert f"DICOM-SEG needs highdicom: {install_command('dicom')}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_label_maps_are_not_undone_by_a_list_of_patients(tmp_path):
    for number, patient in enumerate(("4711", "4711", "")):
        slices = made_series(tmp_path / "made" / str(number), body()[0])
        for data in slices:
            data.PatientID, data.StudyInstanceUID = patient, f"1.9.{number}"
            data.SeriesInstanceUID = f"1.8.{number}"
        save(tmp_path / "in" / "Doe_Jane" / str(number), slices)
    names = run(tmp_path, tmp_path / "in")
    assert len({re.fullmatch(r"study-([0-9a-f]{10})_[0-9a-f]{8}\.nii\.gz", name)[1] for name in names}) == 3
    digest = hashlib.sha256(b"4711").hexdigest()
    assert not any(digest[:10] in name or digest[:8] in name for name in names)


def test_a_single_file_and_nifti_beside_it(tmp_path):
    hu, _ = body()
    slices = made_series(tmp_path / "made", hu)
    KNOWN["enhanced multi-frame"](tmp_path / "in", slices)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 2, 3, 1])), tmp_path / "scan.nii.gz")
    names = run(tmp_path, tmp_path / "in" / "IM0000.dcm", tmp_path / "scan.nii.gz")
    assert len(names) == 2
    assert "scan.nii.gz" in names
