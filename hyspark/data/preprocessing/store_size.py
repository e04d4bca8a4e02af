"""How much disk the prepared volumes take, before they are prepared: by the headers of their files."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import is_there
from hyspark.data.preprocessing.store import entry_folder, is_complete
from hyspark.data.readers.nifti import check_header
from hyspark.data.settings import PrepareSettings

MOST_HEADERS = 200
"""Headers that are read; evenly spaced ones stand for more."""
BYTES_PER_VOXEL = 1.0
"""Bytes in the store per voxel of the whole resampled volume, where nothing is prepared yet to tell."""
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """The store: volumes prepared and their bytes, volumes missing and their estimated bytes, bytes per voxel and
    whether these are assumed, files without a readable header among those looked at, free bytes on its disk.
    """

    folder: Path
    prepared: int
    prepared_bytes: int
    missing: int
    missing_bytes: int
    bytes_per_voxel: float
    is_assumed: bool
    unreadable: int
    free: int


def survey(settings: PrepareSettings, cases: Sequence[Case], folder: Path) -> Storage:
    """What the store in this folder holds of the cases, and an estimate of what is missing."""
    entries = [(c, entry_folder(folder, settings, c.image, c.label)) for c in cases if is_there(c)]
    prepared = [(c, entry) for c, entry in entries if is_complete(entry)]
    missing = [c for c, entry in entries if not is_complete(entry)]
    sampled = evenly(prepared)
    stored = sum(bytes_in(entry) for _, entry in sampled)
    source, _ = voxels_of([c for c, _ in sampled], settings.spacing)
    voxels, unreadable = voxels_of(evenly(missing), settings.spacing)
    per_voxel = stored / source if source else BYTES_PER_VOXEL
    return Storage(
        folder=folder,
        prepared=len(prepared),
        prepared_bytes=sum(bytes_in(entry) for _, entry in prepared),
        missing=len(missing),
        missing_bytes=round(voxels * per_voxel * len(missing) / max(1, len(evenly(missing)))),
        bytes_per_voxel=per_voxel,
        is_assumed=not source,
        unreadable=unreadable + len(cases) - len(entries),
        free=shutil.disk_usage(next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())).free,
    )


def evenly(values: Sequence[T]) -> Sequence[T]:
    """At most MOST_HEADERS of the values, evenly spaced."""
    return values[:: math.ceil(len(values) / MOST_HEADERS) or 1]


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def voxels_of(cases: Sequence[Case], spacing: Sequence[float]) -> tuple[float, int]:
    """Voxels of the images at a spacing in mm, by their headers, and how many headers cannot be read."""
    voxels, unreadable = 0.0, 0
    for case in cases:
        try:
            shape, affine = check_header(case.image)
        except ValueError:
            unreadable += 1
        else:
            voxels += math.prod(shape) * abs(float(np.linalg.det(affine[:3, :3]))) / math.prod(spacing)
    return voxels, unreadable
