"""Examination of one case: findings about its files, and statistics of them.

A case is read once, and only `Examined` is kept of it. So a pool of processes examines any number of cases in the
memory of a few.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel import as_closest_canonical
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from hyspark.data.datasets.cases import Case
from hyspark.data.intensity import viewing_greys
from hyspark.data.quality.faults import file_fault, header_faults, label_faults, value_fault
from hyspark.data.quality.findings import Finding
from hyspark.data.readers.geometry import Grid, pair_fault
from hyspark.data.readers.header import NiftiError, NiftiHeader, read_nifti_header
from hyspark.data.readers.label_values import whole_values
from hyspark.data.readers.nifti import read_voxels
from hyspark.utils.text import first_line

HISTOGRAM = np.arange(-1100, 3101, 50)
"""Edges in HU of the histogram's bins; values beyond count in the outermost bins."""
SAMPLED = 1_000_000
"""Number of evenly spaced voxels for the histogram and for guessing the unit."""
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
        thumbnail: uint8 `(height, width)`, head up.
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


def examine(case: Case, hu_min: float, declared: frozenset[int] | None) -> Examined:
    """Examine the files of a case; unreadable files are findings, and nothing raises.

    Args:
        case: the case.
        hu_min: HU at and below which all is air to training.
        declared: label values that are classes; None if no file declares them.
    """
    seen = Examined(case)
    image = open_volume(case.image, seen.findings)
    label = open_volume(case.label, seen.findings) if case.label else None
    if image is not None:
        seen.shape = image.shape
        if image.has_position:
            seen.spacing = tuple(float(edge) for edge in voxel_sizes(image.affine))
        seen.findings += [Finding(kind, str(case.image), found) for kind, found in header_faults(image)]
        voxels = load_voxels(image, seen.findings)
        if voxels is not None:
            examine_voxels(voxels, hu_min, seen)
            seen.thumbnail = thumbnail_of(voxels, image.affine if image.has_position else np.eye(4))
    if label is not None and case.label:
        path = str(case.label)
        seen.findings += [Finding(kind, path, found) for kind, found in label.faults]
        if image is not None and image.has_position and label.has_position:
            fault = pair_fault(Grid(image.shape, image.affine), Grid(label.shape, label.affine))
            seen.findings += [Finding(fault[0], path, fault[1])] if fault else []
        voxels = load_voxels(label, seen.findings)
        if voxels is not None:
            seen.label_voxels = values_of(whole_values(voxels))
            seen.findings += [Finding(k, path, found) for k, found in label_faults(seen.label_voxels, declared)]
    return seen


def open_volume(path: Path, findings: list[Finding]) -> NiftiHeader | None:
    """Read the header of a NIfTI file; return None and add a finding if it is no readable volume."""
    fault = file_fault(path)
    if fault is None:
        try:
            return read_nifti_header(path)
        except NiftiError as error:
            fault = (error.kind, error.found)
    findings.append(Finding(fault[0], str(path), fault[1]))
    return None


def load_voxels(header: NiftiHeader, findings: list[Finding]) -> np.ndarray | None:
    """Read all voxels, `(h, w, d)`; return None and add a finding if the file is damaged."""
    try:
        return read_voxels(header)  # compares the checksum
    except NiftiError as error:
        findings.append(Finding(error.kind, str(header.path), error.found))
    except Exception as error:  # of nibabel, the system
        findings.append(Finding("damaged", str(header.path), first_line(error)))
    return None


def examine_voxels(voxels: np.ndarray, hu_min: float, seen: Examined) -> None:
    """Add statistics of an image's voxels `(h, w, d)`, and findings about them."""
    path = str(seen.case.image)
    seen.digest = digest_of(voxels)
    seen.low, seen.high = float(voxels.min()), float(voxels.max())  # NaN if any voxel is NaN
    if not np.isfinite([seen.low, seen.high]).all():
        num = int(voxels.size - np.isfinite(voxels).sum())
        seen.findings.append(Finding("NaN or infinite", path, f"{num} voxels that are no number"))
        return
    sample = sample_voxels(voxels)
    seen.counts = np.histogram(sample.clip(HISTOGRAM[0], HISTOGRAM[-1]), HISTOGRAM)[0]
    fault = value_fault(seen.low, seen.high, sample, hu_min)
    if fault is not None:
        seen.findings.append(Finding(fault[0], path, fault[1]))


def values_of(voxels: np.ndarray) -> dict[float, int]:
    """Count the voxels of each value, at most 300 values."""
    values, counts = np.unique(voxels, return_counts=True)
    return dict(zip(values[:300].tolist(), counts[:300].tolist(), strict=True))


def digest_of(voxels: np.ndarray) -> str:
    """Digest shape and values slice by slice, independent of the type they are stored in."""
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
    for row in voxels:
        digest.update(np.ascontiguousarray(row, dtype="<f4").tobytes())
    return digest.hexdigest()


def sample_voxels(voxels: np.ndarray) -> np.ndarray:
    """Take about SAMPLED of the voxels at most, evenly spaced, float32 `(n,)`."""
    step = max(1, round((voxels.size / SAMPLED) ** (1 / 3)))
    return voxels[::step, ::step, ::step].astype(np.float32).ravel()


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
