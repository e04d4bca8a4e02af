"""Random bytes in NIfTI headers: no exception, no large allocation, no other geometry than ITK's without a finding.

HYSPARK_FUZZ sets the number of files.
"""

import os
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.quality.examine import examine
from hyspark.data.readers.geometry import HALF_VOXEL, drift
from hyspark.data.readers.nifti import file_grid
from hyspark.data.settings import PrepareSettings
from tests.data.readers.nifti_files import SHAPE, nifti_bytes, voxels, write_bytes

REFUSALS = (ValueError, RuntimeError, OSError, EOFError)
NUM = int(os.environ.get("HYSPARK_FUZZ", "200"))
FILES_PER_TEST = 50
MAX_BYTES = 40e6
"""Bytes that examination of a file of 16 kB may take, with a sample, a thumbnail and copies."""
EXPLAINED = {
    *("no orientation", "sform and qform disagree", "pixdim disagrees", "not in mm", "odd field", "sheared affine"),
    *("impossible spacing", "singular affine"),
}
"""Kinds of finding that say why two programs may read another geometry."""
FORMS = {
    "sform_code": 1,
    "srow": np.column_stack([np.diag([2, 2.5, 3]), [-31.5, 12, -204]]),
    "qform_code": 1,
    "quatern": (0, 0, 0),
    "qoffset": (-31.5, 12, -204),
}
SETTINGS = PrepareSettings(spacing=(4.0, 4.0, 4.0))


def itk_affine(path: Path) -> np.ndarray | None:
    """The affine that ITK reads without the voxels; None if it reads none of three axes."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    if reader.GetDimension() < 3 or reader.GetSize()[:3] != SHAPE:
        return None
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(2 * [reader.GetDimension()])
    affine[:3, :3] = direction[:3, :3] * np.array(reader.GetSpacing())[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return np.diag([-1, -1, 1, 1]) @ affine


def changed(rng: np.random.Generator) -> tuple[bytes, str]:
    """A NIfTI file with one to six random bytes in its header, and the ending of its name."""
    version, order = int(rng.choice([1, 2], p=[0.75, 0.25])), str(rng.choice(["<", ">"]))
    content = bytearray(nifti_bytes(voxels(), version, order, **FORMS))
    for at in rng.integers(0, 352 if version == 1 else 544, rng.integers(1, 7)):
        content[at] = int(rng.choice([rng.integers(256), content[at] ^ (1 << int(rng.integers(8))), 0, 255]))
    return bytes(content), str(rng.choice([".nii", ".nii.gz"], p=[0.7, 0.3]))


@pytest.mark.parametrize("part", range(-(-NUM // FILES_PER_TEST)))
def test_random_bytes_in_headers(tmp_path, part):
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    rng = np.random.default_rng(part)
    tracemalloc.start()
    try:
        for number in range(FILES_PER_TEST):
            content, ending = changed(rng)
            check_file(write_bytes(tmp_path / f"{number}{ending}", content))
    finally:
        tracemalloc.stop()


def check_file(path: Path) -> None:
    case = Case("a", "D", path)
    tracemalloc.reset_peak()
    seen = examine(case, SETTINGS, None)
    kinds = {f.kind for f in seen.findings}
    assert tracemalloc.get_traced_memory()[1] < MAX_BYTES, kinds
    assert all("\n" not in str(f) for f in seen.findings)
    if seen.spacing and seen.shape == SHAPE and (expected := itk_affine(path)) is not None and not kinds & EXPLAINED:
        assert drift(file_grid(path).affine, expected, SHAPE).max() <= HALF_VOXEL, kinds
    if seen.shape is None:
        with pytest.raises(REFUSALS):
            prepare_case(case, SETTINGS)
    elif not seen.is_broken and max(np.multiply(seen.spacing, seen.shape)) < 500:
        with suppress(*REFUSALS):  # of values, which this is no test of
            assert np.isfinite(prepare_case(case, SETTINGS)["affine"]).all()
