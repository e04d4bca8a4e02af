"""Arrays of nnU-Net's prepared volumes: (channels, *axes of the plan), read in the axes x, y, z.

A file that blosc2 would compute by running code in it is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from hyspark.data.datasets.nnunet_prepared import NnunetPreparation
from hyspark.data.preprocessing.arrays import check_blosc2, holds_code
from hyspark.data.readers.geometry import Grid
from hyspark.utils.text import failure_reason


class ArrayError(ValueError):
    """A file that is no array as nnU-Net writes it; the text says what it is."""


def open_prepared(path: Path, preparation: NnunetPreparation) -> Any:
    """Open the array of a volume without reading its voxels.

    Raises:
        ArrayError: the file is damaged, or its shape or type is not that of the plan.
    """
    check_blosc2()
    try:
        if holds_code(path):
            raise ArrayError("a program")
        array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    except ArrayError:
        raise
    except Exception as error:  # of the system, and of blosc2: of several types
        raise ArrayError(f"a damaged file ({failure_reason(error)})") from error
    if not isinstance(array, blosc2.NDArray):
        raise ArrayError(f"a {type(array).__name__} of blosc2")
    num = len(preparation.hu)
    if array.ndim != 4 or 0 in array.shape:
        raise ArrayError(f"shape {array.shape}")
    if array.dtype.kind != "f":
        raise ArrayError(f"values of type {array.dtype}")
    if array.shape[0] != num:
        raise ArrayError(f"{array.shape[0]} channels, where the plan has {num}")
    return array


def prepared_grid(path: Path, preparation: NnunetPreparation) -> Grid:
    """Return the grid of a volume, whose position is unknown: the first voxel is at 0; errors as `open_prepared`."""
    shape = open_prepared(path, preparation).shape[1:]
    height, width, depth = (int(shape[axis]) for axis in to_xyz(preparation))
    return Grid((height, width, depth), np.diag([*preparation.spacing, 1.0]))


def read_prepared(path: Path, preparation: NnunetPreparation, channels: Sequence[int]) -> list[np.ndarray]:
    """Read channels of a volume, float32 `(h, w, d)`: HU of CT, else the values of the file.

    Raises:
        ArrayError: as `open_prepared`, or a part of the file is damaged.
    """
    array = open_prepared(path, preparation)
    found = []
    for channel in channels:
        try:
            values = np.asarray(array[channel], dtype=np.float32)
        except MemoryError:
            raise
        except Exception as error:  # of blosc2: of several types
            raise ArrayError(f"a damaged file ({failure_reason(error)})") from error
        if of_ct := preparation.hu[channel]:
            mean, deviation = of_ct
            values = values * np.float32(deviation) + np.float32(mean)
        found.append(values.transpose(to_xyz(preparation)))
    return found


def to_xyz(preparation: NnunetPreparation) -> list[int]:
    """Return the axis of an array that is each of x, y, z."""
    return [preparation.axis_order.index(axis) for axis in range(len(preparation.axis_order))]
