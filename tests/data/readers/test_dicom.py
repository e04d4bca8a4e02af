"""DICOM folders as archives hold them: shuffled, mixed, with slices missing or twice."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    MPEG2MPML,
    HTJ2KLossless,
    JPEGLosslessSV1,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from hyspark.data.readers import dicom, hounsfield
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from hyspark.utils.install import install_command
from tests.data.readers.dicom_files import write_dicom, write_series, write_slice

HU = np.random.default_rng(1).integers(-1024, 3000, (4, 5, 6)).astype(np.int16)
"""Axes to the patient's left, back and head."""
RAS = HU[::-1, ::-1]


def find(folder, min_slices=2, **options):
    skip = folder / "out"
    return find_volumes([folder], min_slices=min_slices, skip=skip, num_workers=1, progress=False, **options)


def only(folder):
    (volume,) = find(folder).volumes
    return volume


def test_slices_are_ordered_by_where_they_lie(tmp_path):
    write_series(tmp_path / "ct", HU)
    voxels, affine = read_volume(only(tmp_path))
    assert voxels.dtype == np.int16
    assert np.array_equal(voxels, RAS)
    assert np.array_equal(affine, np.diag([1, 1, 2, 1]) + np.array([[0, 0, 0, -3], [0, 0, 0, -4]] + [[0] * 4] * 2))


@pytest.mark.parametrize(
    ("directions", "stored"),
    [
        ((1, 0, 0, 0, 0, -1), np.flip(HU, 2).transpose(1, 2, 0)),  # coronal: rows to the left, columns to the feet
        ((0, 1, 0, 0, 0, -1), np.flip(HU, 2).transpose(0, 2, 1)),  # sagittal: rows to the back, columns to the feet
        ((-1, 0, 0, 0, -1, 0), np.flip(HU, (0, 1)).transpose(2, 1, 0)),  # axial, turned by half
    ],
)
def test_any_orientation_gives_the_same_body(tmp_path, directions, stored):
    """stored: (slice, row, column)."""
    row, column = np.array(directions[:3]), np.array(directions[3:])
    across = 1 - np.abs(row + column)
    first = ((row + column) < 0) * (np.array(HU.shape) - 1)
    for k, plane in enumerate(stored):
        place = (first + across * k).astype(float)
        write_slice(tmp_path / f"{k}", plane + 1024, tuple(place), ImageOrientationPatient=list(directions))
    voxels, affine = read_volume(only(tmp_path))
    assert np.array_equal(voxels, RAS)
    assert np.allclose(affine[:3, :3], np.eye(3))


def test_spacing_is_between_rows_first(tmp_path):
    write_series(tmp_path, HU, PixelSpacing=[0.5, 0.75])
    assert np.allclose(np.diag(only(tmp_path).series.affine)[:3], [-0.75, -0.5, 2])


def test_one_slice_is_as_thick_as_it_says(tmp_path):
    write_series(tmp_path, HU[:, :, :1], SliceThickness=3)
    (volume,) = find(tmp_path, min_slices=1).volumes
    voxels, affine = read_volume(volume)
    assert np.array_equal(voxels, RAS[:, :, :1])
    assert np.allclose(affine[:, 2], [0, 0, 3, 0])


def test_rescaling_that_gives_no_whole_numbers(tmp_path):
    write_series(tmp_path, HU, RescaleSlope=0.25, RescaleIntercept=-1000)
    voxels, _ = read_volume(only(tmp_path))
    assert voxels.dtype == np.float32
    assert np.allclose(voxels, (RAS + 1024.0) * 0.25 - 1000)


def test_a_folder_of_everything(tmp_path):
    write_series(tmp_path / "a", HU, prefix="x", SeriesInstanceUID="1.1")
    write_series(tmp_path / "a", HU + 1, prefix="y", SeriesInstanceUID="1.2")
    write_series(tmp_path / "a", HU[:, :, :3], prefix="z", SeriesInstanceUID="1.3", ImageType=["ORIGINAL", "LOCALIZER"])
    for name, modality in (("s1.dcm", "SEG"), ("s2.dcm", "SR"), ("s3.dcm", "DX"), ("s4.dcm", "DX")):
        write_dicom(tmp_path / "a" / name, Modality=modality, PatientID="P1", SeriesInstanceUID="1.9")
    (tmp_path / "a" / "nodules.xml").write_text("<xml/>")
    (tmp_path / "a" / "torn.dcm").write_bytes(b"torn")
    found = find(tmp_path)
    assert found.others == Counter(DX=2, SEG=1, SR=1, **{"no image": 1})
    assert [why for _, why in found.skipped] == ["localizer (3 images)"]
    assert [(path, "DICM" in why) for path, why in found.damaged] == [(str(tmp_path / "a" / "torn.dcm"), True)]
    first = {int(read_volume(volume)[0][0, 0, 0] - RAS[0, 0, 0]) for volume in found.volumes}
    assert first == {0, 1}
    assert len({volume.name for volume in found.volumes}) == 2


def test_patients_have_their_id_or_else_their_top_folder(tmp_path):
    write_series(tmp_path / "top" / "study" / "ct", HU, PatientID=" ")
    write_series(tmp_path / "named" / "ct", HU, PatientID="A/1", SeriesInstanceUID="1.5")
    volumes = {volume.patient: volume.name for volume in find(tmp_path).volumes}
    assert set(volumes) == {"top", "A/1"}
    assert volumes["A/1"].startswith("patient-")
    assert volumes["top"].startswith("top_")
    shown = find(tmp_path, keep_patient_id=True).volumes
    assert sorted(volume.name[:4] for volume in shown) == ["A-1_", "top_"]
    assert all(volume.patient != volume.pseudonym for volume in shown)


def test_copies_are_excluded_and_noted(tmp_path):
    """Of a file, and of its pixels under another UID."""
    write_series(tmp_path, HU)
    (tmp_path / "copy").write_bytes((tmp_path / "IM0003").read_bytes())
    again = pydicom.dcmread(tmp_path / "IM0002")
    again.SOPInstanceUID = "1.99"
    again.save_as(tmp_path / "again")
    volume = only(tmp_path)
    assert np.array_equal(read_volume(volume)[0], RAS)
    assert volume.series.notes == (
        "1 files are copies of other files and are excluded",
        "1 slices repeat the pixels of another at their position and are excluded",
    )


def test_missing_slices_are_noted(tmp_path):
    write_series(tmp_path, np.concatenate([HU, HU], axis=2))
    for path in sorted(tmp_path.iterdir())[:2]:
        (header,) = dicom.read_header(path)
        position = header.position
        assert 0 < position[2] < 22
        path.unlink()
    volume = only(tmp_path)
    assert volume.series.uneven.startswith("2 slices are missing: gaps are 2 mm, but up to ")
    assert volume.series.notes == (volume.series.uneven,)


def test_distances_and_shifts_that_make_no_even_stack(tmp_path):
    plane = HU[:, :, 0].T + 1024
    for name, places in {
        "steps": [(0, 0, z) for z in (0, 1, 2, 4.5, 7)],
        "shift": [(x, 0, z) for x, z in ((0, 0), (0, 1), (8, 2), (0, 3))],
        "tilt": [(0, z / 4, z) for z in range(4)],
    }.items():
        for number, place in enumerate(places):
            write_slice(
                tmp_path / name / f"{number}", plane, place, SeriesInstanceUID=f"1.{name.encode().hex(' ')[:2]}"
            )
    assert only(tmp_path / "steps").series.uneven == "slices lie from 1 to 2.5 mm apart"
    assert "shifted against each other by up to 8 mm" in only(tmp_path / "shift").series.uneven
    tilt = only(tmp_path / "tilt")
    assert tilt.series.uneven == ""
    assert np.allclose(read_volume(tilt)[1][:3, 2], [0, -0.25, 1])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"Rows": 4, "Columns": 5}, "different sizes: 6 of 5 x 4, 1 of 4 x 5"),
        ({"PixelSpacing": [1, 1.5]}, "different pixel spacing"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "different orientation"),
        ({"ImageOrientationPatient": None}, "1 of 7 images have no position in the patient, e.g. odd"),
        ({"NumberOfFrames": 6}, "several frames"),
        ({"ImageType": ["DERIVED", "LOCALIZER"]}, "6 slices, fewer than --min_slices 9"),
    ],
)
def test_series_that_are_no_volume_are_skipped_with_the_reason(tmp_path, values, why):
    write_series(tmp_path, HU)
    write_slice(tmp_path / "odd", HU[:, :, 0].T, (0, 0, 20.0), **values)
    with pytest.raises(FileNotFoundError, match="no CT volume") as caught:
        find(tmp_path, min_slices=9)
    assert why in str(caught.value)
    assert "series 1.2.3" in str(caught.value)


def test_compression_that_needs_nothing_installed(tmp_path):
    write_series(tmp_path, HU)
    for path in tmp_path.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
    assert np.array_equal(read_volume(only(tmp_path))[0], RAS)


@pytest.mark.parametrize(
    ("syntax", "advice"),
    [
        (JPEGLosslessSV1, f"for which no decoder is installed: {re.escape(install_command('dicom'))}$"),
        (MPEG2MPML, "which is a video or an unknown compression; export the series without compression$"),
    ],
)
def test_compression_without_decoder_says_what_to_do(tmp_path, monkeypatch, syntax, advice):
    """One that pydicom knows a decoder for, here not installed, and one that it does not."""
    if syntax == JPEGLosslessSV1:
        monkeypatch.setattr(hounsfield, "get_decoder", lambda uid: SimpleNamespace(is_available=False))
    write_series(tmp_path, HU, syntax=syntax, PixelData=encapsulate([b"\0\0"]))
    with pytest.raises(ValueError, match=rf"IM\d+: compressed as .*, {advice}"):
        read_volume(only(tmp_path))


@pytest.mark.parametrize("syntax", [*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, HTJ2KLossless, HTJ2K, RLELossless])
def test_the_extra_of_decoders_reads_every_compression_of_still_images(syntax):
    pytest.importorskip("gdcm", reason="python-gdcm is not installed: pip install 'hyspark[dicom]'")
    pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed: pip install 'hyspark[dicom]'")
    assert hounsfield.why_undecodable(syntax) == ""


def test_the_extra_of_decoders_names_no_gpl_code():
    """pylibjpeg-libjpeg, which pylibjpeg[all] brings, is under the GPL."""
    project = Path(__file__).parents[3] / "pyproject.toml"
    lines = re.search(r"^dicom = \[(.*?)^\]", project.read_text(), re.MULTILINE | re.DOTALL)[1]
    assert "gdcm" in lines
    assert "pylibjpeg[" not in lines
    assert "pylibjpeg-libjpeg" not in lines


def test_pixels_that_are_cut_short(tmp_path):
    write_series(tmp_path, HU)
    file = tmp_path / "IM0004"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="IM0004: unreadable pixels"):
        read_volume(only(tmp_path))
