"""Faults of MR in two channels, as a table; the second channel is edited."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.data.quality.faults_of_files import Expected, Fault
from tests.data.quality.small_data import AFFINE, SHAPE, SmallData, ct, mr, organs, save


def second(data: SmallData, case: str) -> Path:
    """The file of the second channel."""
    return data.folder / "imagesTr" / f"{case}_0001.nii.gz"


def channel(name: str, expected: Expected, change: Callable[[Path], object]) -> Fault:
    """A fault of the file of the second channel."""
    return Fault(f"channel {name}", "image", expected, lambda data, case: change(second(data, case)))


def shifted(voxels: float) -> np.ndarray:
    moved = AFFINE.copy()
    moved[:3, 3] += 3 * voxels
    return moved


def from_right() -> np.ndarray:
    """The affine of voxels that are stored in the other direction of the first axis."""
    turned: np.ndarray = AFFINE @ np.diag([-1.0, 1, 1, 1])
    turned[:3, 3] += AFFINE[:3, 0] * (SHAPE[0] - 1)
    return turned


CHANNELS = [
    channel("sound", "fine", lambda path: None),
    channel("missing", "refused", lambda path: path.unlink()),
    channel("empty", "refused", lambda path: path.write_bytes(b"")),
    channel("cut", "refused", lambda path: path.write_bytes(path.read_bytes()[:-200])),
    channel("of another shape", "refused", lambda path: save(path, mr(0, 1)[1:])),
    channel("elsewhere", "refused", lambda path: save(path, mr(0, 1), shifted(1))),
    channel("a quarter of a voxel off", "fine", lambda path: save(path, mr(0, 1), shifted(0.25))),
    channel("stored from right to left", "fine", lambda path: save(path, mr(0, 1)[::-1], from_right())),
    channel("NaN", "refused", lambda path: save(path, np.where(mr(0, 1) > 600, np.nan, mr(0, 1)).astype(np.float32))),
    channel("constant", "refused", lambda path: save(path, np.full(SHAPE, 7, np.int16))),
    channel("a label map", "refused", lambda path: save(path, organs(0))),
    channel("a mask of 0 and 1000", "refused", lambda path: save(path, (1000 * (organs(0) > 0)).astype(np.int16))),
    channel("CT", "agree", lambda path: save(path, ct(0))),
    channel("two axes", "refused", lambda path: save(path, mr(0, 1)[0])),
    channel("four axes", "refused", lambda path: save(path, np.stack([mr(0, 1), mr(1, 1)], -1))),
    Fault(
        "first channel missing",
        "set",
        "refused",
        lambda data, case: (data.folder / "imagesTr/p01_0000.nii.gz").unlink(),
    ),
]
OF_MR = ("channel a label map", "channel a mask of 0 and 1000")
"""Faults of MR alone, which other values may have."""
