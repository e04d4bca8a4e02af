"""Examination of one case: findings about its files, and statistics of them.

A case is read once, and only `Examined` is kept of it. So a pool of processes examines any number of cases in the
memory of a few.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from nibabel import as_closest_canonical
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from hyspark.data.datasets.cases import Case
from hyspark.data.intensity import viewing_greys
from hyspark.data.quality.case_files import CaseFiles, failure, read_case
from hyspark.data.quality.findings import Finding
from hyspark.data.settings import PrepareSettings

HISTOGRAM = np.arange(-1100, 3101, 50)
"""Edges in HU of the histogram's bins; values beyond count in the outermost bins."""
THUMBNAIL = 128
"""Longest edge of a thumbnail in pixels."""


@dataclass
class Examined:
    """Findings and statistics of a case.

    Attributes:
        case: the case.
        findings: findings about its files.
        shape: voxels per axis of the image; None if unreadable.
        spacing: mm per voxel of the image; None if unreadable.
        counts: sampled voxels in the bins of HISTOGRAM.
        low: least value of the image.
        high: largest value of the image.
        digest: digest of the image's values.
        thumbnail: uint8 `(height, width)`, head up; None if unreadable, or not kept.
        label_voxels: number of voxels by label value.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    counts: np.ndarray | None = None
    low: float | None = None
    high: float | None = None
    digest: str = ""
    thumbnail: np.ndarray | None = None
    label_voxels: dict[float, int] = field(default_factory=dict)

    @property
    def is_broken(self) -> bool:
        """Whether a finding is an error, which stops training."""
        return any(f.severity == "error" for f in self.findings)


def examine(case: Case, settings: PrepareSettings, declared: frozenset[int] | None) -> Examined:
    """Examine the files of a case; unreadable files are findings, and nothing raises.

    Args:
        case: the case.
        settings: settings of preparation, whose HU window the values are held against.
        declared: label values that are classes; None if no file declares them.
    """
    files = read_case(case, settings, declared)
    seen = Examined(
        case,
        files.findings,
        files.shape,
        files.spacing,
        low=files.low,
        high=files.high,
        label_voxels=files.label_voxels,
    )
    try:
        add_statistics(files, seen)
    except Exception as error:  # the voxels are read, but a copy of them may not fit the memory
        seen.findings.append(failure(case, error))
    return seen


def add_statistics(files: CaseFiles, seen: Examined) -> None:
    """Add digest, histogram and thumbnail of the image, if it was read."""
    if files.image is None:
        return
    voxels = np.asanyarray(files.image.dataobj)
    seen.digest = digest_of(voxels)
    seen.thumbnail = thumbnail_of(voxels, files.image.affine)
    if files.sample is not None:
        values = files.sample.astype(np.float32).clip(HISTOGRAM[0], HISTOGRAM[-1])
        seen.counts = np.histogram(values, HISTOGRAM)[0]


def digest_of(voxels: np.ndarray) -> str:
    """Digest shape and values slice by slice, independent of the type they are stored in."""
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
    with np.errstate(over="ignore"):  # of values beyond float32, which are findings
        for row in voxels:
            digest.update(np.ascontiguousarray(row, dtype="<f4").tobytes())
    return digest.hexdigest()


def thumbnail_of(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Draw the middle coronal slice, uint8 `(height, width)`, in the viewing window and with square pixels.

    The head is up, the patient's right on the left.
    """
    turned = as_closest_canonical(SpatialImage(voxels, affine))
    middle = np.asanyarray(turned.dataobj)[:, turned.shape[1] // 2]
    across, _, up = voxel_sizes(turned.affine)
    extent = np.array([middle.shape[1] * up, middle.shape[0] * across])
    height, width = np.maximum(1, np.round(THUMBNAIL * extent / extent.max())).astype(int)
    rows = np.arange(height) * middle.shape[1] // height
    columns = np.arange(width) * middle.shape[0] // width
    return viewing_greys(middle[columns][:, rows].T[::-1, ::-1].astype(np.float32))
