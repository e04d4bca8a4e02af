"""DICOM files that standards or scanners make unusual: they are read, or named with what is wrong."""

import multiprocessing
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from hyspark.data.readers import dicom
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from hyspark.utils import processes
from tests.data.readers.dicom_files import write_dicom, write_series, write_slice

HU = np.random.default_rng(1).integers(-1024, 3000, (4, 5, 6)).astype(np.int16)
RAS = HU[::-1, ::-1]


def found_in(folder, min_slices=2):
    return find_volumes([folder], min_slices=min_slices, skip=folder / "out", num_workers=1, progress=False)


def only(folder):
    found = found_in(folder)
    assert (found.damaged, found.skipped) == ([], [])
    (volume,) = found.volumes
    return volume


# Files without their beginning


@pytest.mark.parametrize("ending", ["", ".dcm", ".1"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("has_meta", [False, True])
def test_files_without_preamble_are_read(tmp_path, syntax, has_meta, ending):
    write_series(tmp_path, HU)
    for path in list(tmp_path.iterdir()):
        data = pydicom.dcmread(path)
        if syntax == ExplicitVRBigEndian:
            data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        data.file_meta.TransferSyntaxUID = syntax
        data.preamble = None
        if not has_meta:
            data.file_meta = FileMetaDataset()
        path.unlink()
        encoding = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        pydicom.dcmwrite(path.with_name(path.name + ending), data, force_encoding=True, **encoding)
    assert np.array_equal(read_volume(only(tmp_path))[0], RAS)


@pytest.mark.parametrize(
    "content", [b"", b"\x08\x00", b"plain text, long enough for a header", b"\x02\0\0\0" * 9, b"\x08\0\x05\0" * 40]
)
def test_files_that_only_look_like_dicom_are_named(tmp_path, content):
    write_series(tmp_path, HU)
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "named.dcm").write_bytes(content)
    found = found_in(tmp_path)
    assert len(found.volumes) == 1
    named = [path for path, _ in found.damaged] + [str(path) for path in found.other_files.get("no image", ())]
    assert sorted(named) == [str(tmp_path / "named.dcm"), str(tmp_path / "other")]
    assert all("unreadable as DICOM" in why for _, why in found.damaged)
    assert any("named.dcm" in note for note in found.volumes[0].series.notes)


def test_no_length_of_a_file_passes_unnamed(tmp_path):
    """A file cut short is another slice, unreadable, or no image; its series says so."""
    write_series(tmp_path, HU)
    path = tmp_path / "IM0003"
    whole = path.read_bytes()
    for size in range(0, len(whole), 23):
        path.write_bytes(whole[:size])
        found = found_in(tmp_path)
        volume = found.volumes[0] if found.volumes else None
        if volume and path in volume.files:
            with pytest.raises(ValueError, match="IM0003: "):
                read_volume(volume)
            continue
        named = [source for source, _ in found.damaged] + [str(p) for p in found.other_files.get("no image", ())]
        is_named = any("IM0003" in why for _, why in found.damaged + found.skipped)
        assert str(path) in named or is_named, size
        assert volume is None or volume.series.notes


# Objects that are no CT slices


def test_objects_of_other_kinds_are_counted_and_named(tmp_path):
    write_series(tmp_path / "ct", HU)
    for modality in ("MR", "PT", "NM", "RTSTRUCT", "RTDOSE", "SEG", "SR", "PR"):
        write_dicom(tmp_path / modality, Modality=modality, SeriesInstanceUID="1.9")
    write_dicom(tmp_path / "DICOMDIR", SOPClassUID=MediaStorageDirectoryStorage)
    write_dicom(tmp_path / "report", Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1")
    (tmp_path / "other.nrrd").write_bytes(b"NRRD")
    found = found_in(tmp_path)
    assert len(found.volumes) == 1
    kinds = {kind: [path.name for path in paths] for kind, paths in found.other_files.items()}
    assert kinds.pop("CT without image (Encapsulated PDF Storage)") == ["report"]
    assert kinds.pop(".nrrd (convert to NIfTI)") == ["other.nrrd"]
    assert all(names == [kind] for kind, names in kinds.items())
    assert len(kinds) == 9


def test_a_folder_without_ct_names_what_it_holds(tmp_path):
    write_dicom(tmp_path / "a", Modality="MR", SeriesInstanceUID="1.9")
    with pytest.raises(FileNotFoundError, match=r"no CT volume.*\n  1 MR, e\.g\. .*a$"):
        found_in(tmp_path)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"colour images \(6 of 6, e.g. IM"),
        ({"PixelSpacing": None}, "no valid PixelSpacing or ImageOrientationPatient in 6 of 6 images, e.g. IM"),
        ({"PixelSpacing": [0, 1]}, "no valid PixelSpacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no valid PixelSpacing or ImageOrientationPatient"),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 0.5, 0]}, "no valid PixelSpacing or ImageOrientationPatient"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0 in 6 of 6 slices"),
    ],
)
def test_series_that_are_no_volume_say_why(tmp_path, values, why):
    write_series(tmp_path / "other", HU, SeriesInstanceUID="1.8")
    write_series(tmp_path / "in", HU, **values)
    found = found_in(tmp_path)
    assert len(found.volumes) == 1
    ((source, reason),) = found.damaged + found.skipped
    assert source.startswith(str(tmp_path / "in"))
    assert re.search(why, reason), reason


def test_a_slice_of_another_size_leaves_the_others(tmp_path):
    write_series(tmp_path, HU)
    write_slice(tmp_path / "odd", np.zeros((7, 7)), (0, 0, 12.0))
    found = found_in(tmp_path)
    (volume,) = found.volumes
    assert np.array_equal(read_volume(volume)[0], RAS)
    assert any("different sizes: 6 of 5 x 4, 1 of 7 x 7" in note for note in volume.series.notes)
    ((_, why),) = found.skipped
    assert "fewer than --min_slices" in why


def test_one_uid_for_all_slices_loses_none(tmp_path):
    """As careless anonymisation leaves it."""
    write_series(tmp_path, HU, SOPInstanceUID="1.2.3.4")
    assert np.array_equal(read_volume(only(tmp_path))[0], RAS)


def test_a_tilted_gantry_is_noted(tmp_path):
    for k in range(6):
        write_slice(tmp_path / f"{k}", HU[:, :, k].T, (0, k * np.tan(np.deg2rad(15)), k))
    (note,) = only(tmp_path).series.notes
    assert note == "its slices lean by 15.0 degrees (gantry tilt)"


# Values


def write_plain(folder, stored, **values):
    """Writes slices (x, y, z) of stored values without RescaleSlope and RescaleIntercept."""
    for k in range(stored.shape[2]):
        path = folder / f"{k}"
        write_slice(path, stored[:, :, k].T, (0, 0, k), **values)
        data = pydicom.dcmread(path)
        del data.RescaleSlope, data.RescaleIntercept
        data.save_as(path)


def test_values_that_no_header_scales_are_hu_or_refused(tmp_path):
    write_plain(tmp_path / "hu", HU, SeriesInstanceUID="1.1")
    write_plain(tmp_path / "stored", HU.astype(int) + 1024, SeriesInstanceUID="1.2")
    volumes = {volume.source.name: volume for volume in found_in(tmp_path).volumes}
    assert np.array_equal(read_volume(volumes["hu"])[0], RAS)
    assert "stored values are taken as Hounsfield units" in volumes["hu"].series.notes[0]
    with pytest.raises(ValueError, match=r"^RescaleSlope and RescaleIntercept are missing, and stored values from \d+"):
        read_volume(volumes["stored"])


def test_an_intercept_alone_counts_and_a_part_without_is_refused(tmp_path):
    write_series(tmp_path / "a", HU, RescaleSlope=None, SeriesInstanceUID="1.1")
    write_plain(tmp_path / "b", HU[:, :, :2], SeriesInstanceUID="1.2")
    for k in range(2, 6):
        write_slice(tmp_path / "b" / f"{k}", HU[:, :, k].T, (0, 0, k), SeriesInstanceUID="1.2")
    found = found_in(tmp_path)
    (volume,) = found.volumes
    assert np.array_equal(read_volume(volume)[0], RAS)
    ((_, why),) = found.damaged
    assert why.startswith("RescaleSlope and RescaleIntercept are missing in 2 of 6 slices, e.g. 0")


def test_a_high_bit_in_another_position_is_refused(tmp_path):
    write_series(tmp_path, HU, BitsStored=12)
    with pytest.raises(ValueError, match="HighBit is 15, expected 11 for BitsStored 12"):
        read_volume(only(tmp_path))


def test_inverted_display_and_other_units_are_noted(tmp_path):
    write_series(tmp_path, HU, PhotometricInterpretation="MONOCHROME1", RescaleType="Z_EFF")
    volume = only(tmp_path)
    assert np.array_equal(read_volume(volume)[0], RAS)
    assert [note.split(":")[0] for note in volume.series.notes] == ["MONOCHROME1", "RescaleType is Z_EFF; expected HU"]


# Multi-frame CT


def item(**values):
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def write_enhanced(path, frames, positions, stacks=None, shared_scaling=True):
    """An enhanced CT of stored frames (frame, row, column)."""
    scaling = {"PixelValueTransformationSequence": [item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]}
    groups = []
    for k, at in enumerate(positions):
        content = item(FrameAcquisitionNumber=1, StackID=str(stacks[k]) if stacks else "1")
        own = {} if shared_scaling else scaling
        groups.append(
            item(FrameContentSequence=[content], PlanePositionSequence=[item(ImagePositionPatient=list(at))], **own)
        )
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2)],
        **(scaling if shared_scaling else {}),
    )
    write_dicom(
        path,
        **{"Modality": "CT", "PatientID": "P1", "SeriesInstanceUID": "1.2.3", "NumberOfFrames": len(frames)},
        **{"SOPClassUID": EnhancedCTImageStorage, "Rows": frames.shape[1], "Columns": frames.shape[2]},
        **{"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16},
        **{"HighBit": 15, "PixelRepresentation": 1, "PixelData": frames.astype("<i2").tobytes()},
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
    )


@pytest.mark.parametrize("shared_scaling", [True, False])
def test_multi_frame_ct_is_what_single_slices_are(tmp_path, shared_scaling):
    write_series(tmp_path / "single", HU, PixelSpacing=[0.5, 0.75])
    order = np.array([3, 0, 5, 1, 4, 2])
    frames = HU.transpose(2, 1, 0)[order].astype(int) + 1024
    write_enhanced(tmp_path / "multi" / "a.dcm", frames, [(0, 0, 2.0 * k) for k in order], None, shared_scaling)
    voxels, affine = read_volume(only(tmp_path / "multi"))
    expected, placed = read_volume(only(tmp_path / "single"))
    assert np.array_equal(voxels, expected)
    assert np.array_equal(affine, placed)


def test_stacks_of_a_multi_frame_ct_are_separated(tmp_path):
    frames = np.concatenate([HU.transpose(2, 1, 0), HU.transpose(2, 1, 0) + 7]).astype(int) + 1024
    positions = [(0, 0, 2.0 * k) for k in range(6)] * 2
    write_enhanced(tmp_path / "a", frames, positions, [1] * 6 + [2] * 6)
    found = found_in(tmp_path)
    assert {int((read_volume(volume)[0] - RAS).max()) for volume in found.volumes} == {0, 7}
    write_enhanced(tmp_path / "a", frames, positions)
    ((_, why),) = found_in(tmp_path).damaged
    assert "up to 2 slices at one position" in why
    assert "e.g. a, frame 1" in why


def test_frames_that_are_not_described_are_refused(tmp_path):
    write_enhanced(tmp_path / "a", np.zeros((6, 4, 5)), [(0, 0, k) for k in range(5)])
    ((_, why),) = found_in(tmp_path).damaged
    assert "NumberOfFrames is 6, but 5 frames are described" in why


def kill_at_bad(path: Path) -> str:
    """Stands for `read_header` in a worker process: one file kills it."""
    if path.name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_killed_process_costs_its_file_alone(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a", "b", "bad", "c", "d")]
    forked = multiprocessing.get_context("fork")  # in place of processes that import torch anew
    monkeypatch.setattr(dicom, "read_header", kill_at_bad)
    monkeypatch.setattr(dicom, "PARALLEL_FROM", 1)
    monkeypatch.setattr(dicom, "CHUNK", 3)
    monkeypatch.setattr(processes, "worker_pool", lambda num: ProcessPoolExecutor(num, forked))
    found = dicom.read_headers(files, 2, progress=False)
    assert found == ["a", "b", processes.KILLED, "c", "d"]


def test_a_table_gives_the_values_of_single_slices_and_of_frames(tmp_path):
    table = item(LUTDescriptor=[3000, 0, 16], LUTData=np.arange(5, 3005, dtype="<u2").tobytes(), ModalityLUTType="HU")
    stored = np.random.default_rng(5).integers(0, 3000, (6, 5, 4))
    for k, pixels in enumerate(stored):
        lut = {"RescaleSlope": None, "RescaleIntercept": None, "ModalityLUTSequence": [table]}
        write_slice(tmp_path / "single" / str(k), pixels, (0, 0, 2.0 * k), PixelRepresentation=0, **lut)
    write_enhanced(tmp_path / "multi" / "a", stored, [(0, 0, 2.0 * k) for k in range(6)])
    data = pydicom.dcmread(tmp_path / "multi" / "a")
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    data.ModalityLUTSequence = [table]
    data.PixelRepresentation = 0
    data.save_as(tmp_path / "multi" / "a")
    for folder in ("single", "multi"):
        voxels, _ = read_volume(only(tmp_path / folder))
        assert np.array_equal(voxels, stored.transpose(2, 1, 0)[::-1, ::-1] + 5)


@pytest.mark.parametrize(("lacking", "taken"), [("RescaleSlope", 1), ("RescaleIntercept", 0)])
def test_a_lone_missing_slope_or_intercept_is_noted(tmp_path, lacking, taken):
    write_series(tmp_path, HU, **{lacking: None})
    volume = only(tmp_path)
    assert volume.series.notes == (f"{lacking} is missing in 6 of 6 slices and taken as {taken}",)
    expected = RAS if lacking == "RescaleSlope" else RAS + 1024
    assert np.array_equal(read_volume(volume)[0], expected)


def test_enhanced_mr_is_separated_by_what_its_frames_say(tmp_path):
    frames = np.concatenate([HU.transpose(2, 1, 0), HU.transpose(2, 1, 0) + 7]).astype(int) + 1024
    write_enhanced(tmp_path / "a", frames, [(0, 0, 2.0 * k) for k in range(6)] * 2)
    data = pydicom.dcmread(tmp_path / "a")
    data.Modality, data.SOPClassUID = "MR", EnhancedMRImageStorage
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for number, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.MREchoSequence = [item(EffectiveEchoTime=10.0 if number < 6 else 90.0)]
    data.save_as(tmp_path / "a")
    skip = tmp_path / "out"
    found = find_volumes([tmp_path], min_slices=2, skip=skip, modalities=("MR",), num_workers=1, progress=False)
    assert sorted(volume.series.label for volume in found.volumes) == [
        "EffectiveEchoTime 10.0",
        "EffectiveEchoTime 90.0",
    ]
    assert {int((read_volume(volume)[0] - RAS - 1024).max()) for volume in found.volumes} == {0, 7}
