"""Arrays of the store: chunked, compressed files of blosc2."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from hyspark.utils.install import require_version
from hyspark.utils.text import first_line

LEAST_BLOSC2 = "3.8"
"""Earlier ones write arrays wrong that are one chunk of several blocks, such as (64, 64, 1) and (32, 64, 32)."""
CHUNK_EDGE = 64
BLOCK_SHAPE = (16, 32, 32)
MAX_OPEN = 16
"""Arrays that a process keeps open; the crops of one volume are read one after the other."""

CODE_MARKERS = (b"LazyArray", b"b2o", b"proxy-source")
"""Markers of files from which blosc2 computes an array by running their code; before 4.14 it does so unasked."""


def check_blosc2() -> None:
    """Raise ImportError if blosc2 is too old to be trusted."""
    require_version(blosc2, LEAST_BLOSC2, "writes wrong voxels")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one chunked, compressed array."""
    chunks = tuple(min(CHUNK_EDGE, s) for s in array.shape)
    blocks = tuple(min(b, s) for b, s in zip(BLOCK_SHAPE, array.shape, strict=True))
    cparams = {
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 5,
        "filters": [blosc2.Filter.SHUFFLE],
        "typesize": array.itemsize,
        "nthreads": 1,
    }
    blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=str(path), cparams=cparams)


def damaged_entry(folder: Path, error: Exception) -> ValueError:
    """Make the error of an entry that was damaged after it was checked."""
    return ValueError(
        f"{folder}: a prepared volume is damaged ({type(error).__name__}: {first_line(error)}); delete this folder, "
        "and the same command prepares it again"
    )


def holds_code(path: Path) -> bool:
    """Return whether blosc2 would compute the array of a file by running code that the file holds."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(15)[11:], "big"))
    return any(name in header for name in CODE_MARKERS)


@lru_cache(MAX_OPEN)
def open_array(path: Path) -> Any:
    """Open a stored array, mapped into memory; entries never change once they exist.

    Raises:
        ValueError: if the file holds code.
    """
    check_blosc2()
    if holds_code(path):
        raise ValueError(f"{path}: expected an array, got a program; delete its folder")
    try:
        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    except Exception as error:  # of blosc2: of several types
        raise damaged_entry(path.parent, error) from error
