"""Size of the store before the volumes are prepared, estimated from the headers of their files."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.entry_files import is_complete
from hyspark.data.preprocessing.prepare import files_exist
from hyspark.data.preprocessing.store import case_folder
from hyspark.data.readers.nifti import file_grid
from hyspark.data.readers.nnunet_arrays import prepared_grid
from hyspark.data.settings import PrepareSettings

MAX_HEADERS = 200
"""Number of headers that are read; of more cases, evenly spaced ones are sampled."""
BYTES_PER_VOXEL = 1.0
"""Assumed bytes in the store per voxel of the whole resampled volume, if no volume is prepared yet."""
T = TypeVar("T")


@dataclass(frozen=True)
class StoreSize:
    """Size of a store.

    Attributes:
        folder: folder of the store.
        prepared: number of prepared volumes.
        prepared_bytes: their bytes.
        missing: number of volumes to prepare.
        missing_bytes: their estimated bytes.
        bytes_per_voxel: bytes per voxel of the whole resampled volume.
        is_assumed: whether bytes_per_voxel is assumed, not measured.
        unreadable: number of files without a readable header, among those sampled.
        free: free bytes on the disk.
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

    @property
    def exceeds_disk(self) -> bool:
        """Whether the missing volumes will probably not fit the disk."""
        return self.missing_bytes > self.free


def estimate_store_size(settings: PrepareSettings, cases: Sequence[Case], folder: Path) -> StoreSize:
    """Measure the prepared volumes of the cases in a store, and estimate the missing ones."""
    entries = [(c, case_folder(folder, settings, c)) for c in cases if files_exist(c)]
    prepared = [(c, entry) for c, entry in entries if is_complete(entry)]
    missing = [c for c, entry in entries if not is_complete(entry)]
    sampled = sample_evenly(prepared)
    stored = sum(bytes_in(entry) for _, entry in sampled)
    source, _ = count_voxels([c for c, _ in sampled], settings.spacing)
    sampled_missing = sample_evenly(missing)
    voxels, unreadable = count_voxels(sampled_missing, settings.spacing)
    per_voxel = stored / source if source else BYTES_PER_VOXEL
    return StoreSize(
        folder=folder,
        prepared=len(prepared),
        prepared_bytes=sum(bytes_in(entry) for _, entry in prepared),
        missing=len(missing),
        missing_bytes=round(voxels * per_voxel * len(missing) / max(1, len(sampled_missing))),
        bytes_per_voxel=per_voxel,
        is_assumed=not source,
        unreadable=unreadable + len(cases) - len(entries),
        free=shutil.disk_usage(next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())).free,
    )


def sample_evenly(values: Sequence[T]) -> Sequence[T]:
    """Take at most MAX_HEADERS of the values, evenly spaced."""
    return values[:: math.ceil(len(values) / MAX_HEADERS) or 1]


def bytes_in(folder: Path) -> int:
    """Add up the sizes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def count_voxels(cases: Sequence[Case], spacing: Sequence[float]) -> tuple[float, int]:
    """Add up the voxels of all channels at a spacing in mm, by the images' headers; also count unreadable headers."""
    voxels, unreadable = 0.0, 0
    for case in cases:
        try:
            shape, affine = prepared_grid(case.image, case.prepared) if case.prepared else file_grid(case.image)
        except ValueError:
            unreadable += 1
        else:
            voxels += (
                len(case.images) * math.prod(shape) * abs(float(np.linalg.det(affine[:3, :3]))) / math.prod(spacing)
            )
    return voxels, unreadable
