"""Damaged DICOM: elements and bytes changed at random end in a volume with the right geometry, or in a finding.

HYSPARK_FUZZ is the number of damaged series; each is written, found and read.
"""

import os
import tracemalloc
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from tests.data.readers.dicom_files import write_slice

FEW = 200
NUM = int(os.environ.get("HYSPARK_FUZZ", str(FEW)))
BATCH = 50
HU = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
MAX_BYTES = 200e6
NUMBERS = ("0", "-1", "1e300", "nan", "inf", "65535", "1\\2", "", "x", "0.004", "999999999999")
TEXTS = ("", "x", "\\", "1.2.3.4", "CT", "MR", "LOCALIZER", "é" * 3)
GEOMETRY = ("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of a series of four slices, plain and compressed."""
    folder = tmp_path_factory.mktemp("plain")
    plain, packed = [], []
    for k in range(HU.shape[2]):
        path = folder / f"{k}"
        write_slice(path, HU[:, :, k].T + 1024, (0, 0, 2.0 * k), AcquisitionNumber=1, InstanceNumber=k + 1)
        plain.append(path.read_bytes())
        data = pydicom.dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
        packed.append(path.read_bytes())
    return plain, packed


def damaged_bytes(content, rng):
    """Some bytes changed, removed, repeated, or the end cut off."""
    data = bytearray(content)
    kind = rng.integers(4)
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 9))
    if kind == 0:
        data[start : start + length] = rng.bytes(min(length, len(data) - start))
    elif kind == 1:
        del data[start : start + length]
    elif kind == 2:
        data[start:start] = data[start : start + length]
    else:
        del data[start:]
    return bytes(data)


def damaged_elements(path, rng):
    """One element changed or removed, without the checks of pydicom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path)
        elements = [element for element in data if element.tag.group < 0x7FE0]
        element = elements[rng.integers(len(elements))]
        if rng.random() < 0.2:
            del data[element.tag]
        elif element.VR in ("DS", "IS"):
            element._value = str(rng.choice(NUMBERS))
        elif element.VR == "US":
            element._value = int(rng.choice([0, 1, 2, 7, 16, 255, 65535]))
        else:
            element._value = str(rng.choice(TEXTS))
        try:
            data.save_as(path)
        except Exception:  # values that pydicom does not write at all
            path.write_bytes(damaged_bytes(path.read_bytes(), rng))


def check_series(folder, changed):
    """Find and read; what is a volume without a note has the geometry that was written."""
    try:
        found = find_volumes([folder], min_slices=2, skip=folder / "out", num_workers=1, progress=False)
    except FileNotFoundError:
        return "nothing found"
    findings = [*found.damaged, *found.skipped, *found.other_files.items()]
    assert all(isinstance(why, list) or (why and "\n" not in why) for _, why in findings)
    outcome = "findings" if findings else "read"
    seen = set()
    for volume in found.volumes:
        seen.update(volume.files)
        assert volume.series is not None
        try:
            voxels, affine = read_volume(volume)
        except ValueError:
            outcome = "findings"
            continue
        if findings or volume.series.notes:
            outcome = "findings"
            continue
        assert len(found.volumes) == 1
        header = pydicom.dcmread(changed, stop_before_pixels=True, force=True)
        assert voxels.shape == (header.Columns, header.Rows, HU.shape[2])
        written = [np.array(header.get(name), dtype=float) for name in GEOMETRY[2:]]
        assert np.abs(np.diag(affine)[:2]) == pytest.approx(written[0][::-1], rel=0.011)
        at = np.linalg.inv(affine) @ np.append(written[1] * [-1, -1, 1], 1)
        assert np.abs(at[:3] - np.rint(at[:3])).max() < 1.1  # on the grid, as far as a straight stack may be shifted
    named = {source for source, _ in found.damaged} | {str(p) for paths in found.other_files.values() for p in paths}
    for path in folder.iterdir():
        is_named = any(path.name in why for _, why in [*found.damaged, *found.skipped])
        of_series = any(str(folder) in source for source, _ in [*found.damaged, *found.skipped])
        assert path in seen or str(path) in named or is_named or of_series or any(v.series.notes for v in found.volumes)
    return outcome


@pytest.mark.parametrize("batch", range(-(-NUM // BATCH)))
def test_no_damage_is_read_as_another_volume(tmp_path, originals, batch):
    outcomes = {"read": 0, "findings": 0, "nothing found": 0}
    if NUM > FEW:  # it takes half of the time
        tracemalloc.start()
    try:
        for index in range(batch * BATCH, min(NUM, (batch + 1) * BATCH)):
            rng = np.random.default_rng(index)
            folder = tmp_path / "in"
            folder.mkdir(exist_ok=True)
            for k, content in enumerate(originals[index % 2]):
                (folder / f"{k}").write_bytes(content)
            changed = folder / f"{rng.integers(HU.shape[2])}"
            if rng.random() < 0.5:
                changed.write_bytes(damaged_bytes(changed.read_bytes(), rng))
            else:
                damaged_elements(changed, rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcomes[check_series(folder, changed)] += 1
                except BaseException as error:
                    raise AssertionError(f"series {index}: {type(error).__name__}: {error}") from error
        assert not tracemalloc.is_tracing() or tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    print(outcomes)
