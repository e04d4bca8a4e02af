"""The 18 series by which five readers were compared: each has its verdict, and the values of an independent sum."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest

from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from tests.data.readers.known_series import KNOWN, made_series, real_series, truth

HU = np.random.default_rng(5).integers(-1024, 3000, (33, 40, 12)).astype(np.int16)
REAL = os.environ.get("HYSPARK_REAL_DATA", "")
NOTED = {
    "one slice missing": "1 slices are missing",
    "3 files copied": "3 files are copies of other files",
    "3 positions repeated": "3 slices repeat the pixels of another",
    "localizer in the series": "1 localizers are excluded",
    "gantry tilt": "its slices lean by 15.0 degrees",
    "distances change": "slices lie from",
}
"""What is noted of a series; nothing of the others."""


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Slices of the made-up and of the real series."""
    found = {"made": made_series(tmp_path_factory.mktemp("made"), HU)}
    if REAL:
        found["real"] = real_series(Path(REAL) / "dicom" / "cptac_pda_C3L00189")
    return found


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "origin",
    ["made", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set"))],
)
def test_each_of_the_known_series_has_its_verdict(tmp_path, series, origin, name):
    slices = copy.deepcopy(series[origin])
    expected = copy.deepcopy(slices)
    KNOWN[name](tmp_path / "in", slices)
    if name in ("one slice missing", "gantry tilt", "distances change", "rescale changes"):
        expected = slices  # what the files say
    hu, affine = truth(expected)
    found = find_volumes([tmp_path / "in"], min_slices=2, skip=tmp_path / "out", num_workers=1, progress=False)
    assert (found.damaged, found.skipped) == ([], [])
    assert len(found.volumes) == (2 if name == "two series in a folder" else 1)
    offsets = []
    for volume in found.volumes:
        voxels, placed = read_volume(volume)
        offsets.append(float(voxels.min() - hu.min()))
        assert np.array_equal(voxels - offsets[-1], hu[::-1, ::-1])  # from LPS to RAS
        turned = affine @ np.array(
            [[-1, 0, 0, hu.shape[0] - 1], [0, -1, 0, hu.shape[1] - 1], [0, 0, 1, 0], [0] * 3 + [1]]
        )
        assert np.allclose(placed, turned, atol=1e-4)
        notes = " | ".join(volume.series.notes)
        assert NOTED.get(name, "") in notes
        assert bool(notes) == (name in NOTED), notes
    assert sorted(offsets) == ([0, 100] if len(offsets) == 2 else [0])
