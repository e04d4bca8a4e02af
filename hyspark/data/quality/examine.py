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
from hyspark.data.intensity import OF_CT, VIEWING_WINDOW, fractions_of, intensity_of, viewing_greys
from hyspark.data.quality.case_files import CaseFiles, failure, read_case
from hyspark.data.quality.findings import Finding
from hyspark.data.settings import PrepareSettings

HISTOGRAM = np.arange(-1100, 3101, 50)
"""Edges in HU of the histogram's bins; values beyond count in the outermost bins."""
FRACTIONS = np.linspace(0, 1, 51)
"""The same for values other than HU, as fractions of the range of each volume."""
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
        is_ct: whether the first channel is shown in HU.
        counts: sampled voxels of the first channel in the bins of HISTOGRAM, of FRACTIONS if it is no CT.
        low: least value of the first channel.
        high: largest value of the first channel.
        digest: digest of the image's values.
        thumbnail: uint8 `(height, width)`, head up; None if unreadable, or not kept.
        label_voxels: number of voxels by label value.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    is_ct: bool = True
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
        intensity_of(settings, 0) in OF_CT,
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
    if not files.images:
        return
    seen.digest = digest_of(*(np.asanyarray(image.dataobj) for image in files.images))
    first = files.images[0]
    scale = files.scales[0] if files.sample is not None else None
    bounds = VIEWING_WINDOW if seen.is_ct or scale is None else (scale.low, scale.high)
    seen.thumbnail = thumbnail_of(np.asanyarray(first.dataobj), first.affine, bounds)
    if files.sample is None or scale is None:
        return
    values = files.sample.astype(np.float32)
    if seen.is_ct:
        seen.counts = np.histogram(values.clip(HISTOGRAM[0], HISTOGRAM[-1]), HISTOGRAM)[0]
    elif scale.low < scale.high:
        seen.counts = np.histogram(fractions_of(values, scale)[0], FRACTIONS)[0]


def digest_of(*channels: np.ndarray) -> str:
    """Digest shape and values of channels slice by slice, independent of the type they are stored in."""
    digest = hashlib.blake2b(repr(channels[0].shape).encode(), digest_size=16)
    with np.errstate(over="ignore"):  # of values beyond float32, which are findings
        for row in (row for voxels in channels for row in voxels):
            digest.update(np.ascontiguousarray(row, dtype="<f4").tobytes())
    return digest.hexdigest()


def thumbnail_of(voxels: np.ndarray, affine: np.ndarray, bounds: tuple[float, float] = VIEWING_WINDOW) -> np.ndarray:
    """Draw the middle coronal slice, uint8 `(height, width)`, between two values and with square pixels.

    The head is up, the patient's right on the left.
    """
    turned = as_closest_canonical(SpatialImage(voxels, affine))
    middle = np.asanyarray(turned.dataobj)[:, turned.shape[1] // 2]
    across, _, up = voxel_sizes(turned.affine)
    extent = np.array([middle.shape[1] * up, middle.shape[0] * across])
    height, width = np.maximum(1, np.round(THUMBNAIL * extent / extent.max())).astype(int)
    rows = np.arange(height) * middle.shape[1] // height
    columns = np.arange(width) * middle.shape[0] // width
    return viewing_greys(middle[columns][:, rows].T[::-1, ::-1].astype(np.float32), bounds)
