"""DICOM-SEG -> masks on the slices of a series: binary, label maps, and fractions from one half."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import iter_pixels

from hyspark.data.readers.dicom import open_dicom
from hyspark.data.readers.hounsfield import why_undecodable
from hyspark.data.structures.planes import ALONG, SAME_DIRECTION, WITHIN, SlicePlanes

HALF = 0.5
"""Least fraction of a fractional segment that counts."""
LABEL_MAP = "LABELMAP"


@dataclass(frozen=True)
class Frame:
    """A frame of a DICOM-SEG.

    Attributes:
        segment: number of its segment; None in a label map, whose pixels are numbers of segments.
        position: centre of the first pixel in mm (LPS).
        directions: from column to column, and from row to row `(2, 3)`.
        spacing: mm between columns and between rows.
        steps: SpacingBetweenSlices and SliceThickness in mm; 0 where missing.
        shape: columns and rows.
        values: values of the pixels; of a mask eight pixels a byte.
    """

    segment: int | None
    position: np.ndarray
    directions: np.ndarray
    spacing: np.ndarray
    steps: tuple[float, float]
    shape: tuple[int, int]
    values: np.ndarray

    def with_mask(self, mask: np.ndarray) -> "Frame":
        """Return the frame with a mask as its pixels."""
        return replace(self, values=np.packbits(mask))

    @property
    def mask(self) -> np.ndarray:
        """The mask `(columns, rows)`."""
        return np.unpackbits(self.values, count=self.shape[0] * self.shape[1]).reshape(self.shape).astype(bool)


def segment_masks(path: Path, grid: SlicePlanes) -> Iterator[tuple[int, np.ndarray | str, list[str]]]:
    """Yield number, mask `(columns, rows, slices)` and notes of each segment of a DICOM-SEG.

    A mask that cannot be made is replaced by the reason.

    Raises:
        ValueError: the compression of its pixels has no decoder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = open_dicom(path)
        syntax = data.file_meta.TransferSyntaxUID
        if why := why_undecodable(syntax):
            raise ValueError(f"compressed as {syntax.name}, {why}")
        kind = str(data.get("SegmentationType") or "BINARY")
        by_segment: dict[int, list[Frame]] = defaultdict(list)
        largest = float(data.get("MaximumFractionalValue") or 1)
        for frame in frames_of(data):
            if kind == LABEL_MAP:
                for number in np.unique(frame.values[frame.values > 0]).tolist():
                    by_segment[number].append(frame.with_mask(frame.values == number))
            elif frame.segment is not None:
                shown = frame.values >= HALF * largest if kind == "FRACTIONAL" else frame.values > 0
                if shown.any():
                    by_segment[frame.segment].append(frame.with_mask(shown))
    note = [f"fractions from {HALF:g} on count"] if kind == "FRACTIONAL" else []
    for segment in data.SegmentSequence:
        number = int(segment.SegmentNumber)
        yield number, *on_slices(by_segment.get(number, []), grid, note)


def frames_of(data: pydicom.Dataset) -> Iterator[Frame]:
    """Read the frames of a DICOM-SEG one by one.

    Raises:
        ValueError: a frame has no geometry.
    """
    size = data.Rows * data.Columns
    # pydicom reads frames of bits one by one only if they begin with a byte.
    is_aligned = data.BitsAllocated > 1 or size % 8 == 0
    frames = iter_pixels(data) if is_aligned else iter(data.pixel_array.reshape(-1, data.Rows, data.Columns))
    shared = (data.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    groups = data.get("PerFrameFunctionalGroupsSequence") or ()
    for number, (pixels, own) in enumerate(zip(frames, groups, strict=True), 1):

        def element(sequence: str, name: str, own: Any = own) -> Any:
            for group in (own, shared):
                if group.get(sequence):
                    return group[sequence].value[0].get(name)
            return None

        position = element("PlanePositionSequence", "ImagePositionPatient")
        directions = element("PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = element("PixelMeasuresSequence", "PixelSpacing")
        if not (position and directions and spacing):
            raise ValueError(f"expected position, orientation and spacing of each frame, found none in frame {number}")
        steps = [element("PixelMeasuresSequence", name) for name in ("SpacingBetweenSlices", "SliceThickness")]
        segment = element("SegmentIdentificationSequence", "ReferencedSegmentNumber")
        yield Frame(
            None if segment is None else int(segment),
            np.array(position, float),
            np.array(directions, float).reshape(2, 3),
            np.array(spacing, float)[::-1],
            (abs(float(steps[0] or 0)), abs(float(steps[1] or 0))),
            (data.Columns, data.Rows),
            pixels.T,
        )


def on_slices(frames: list[Frame], grid: SlicePlanes, notes: list[str]) -> tuple[np.ndarray | str, list[str]]:
    """Bring the frames of a segment onto the slices of a series, or say why they cannot be."""
    mask = np.zeros(grid.shape, bool)
    indices = [slice_of(frame, grid) for frame in frames]
    if None not in indices:
        for frame, index in zip(frames, indices, strict=True):
            mask[:, :, index] |= frame.mask
        return mask, notes
    found = stacked(frames)
    if isinstance(found, str):
        return found, notes
    pixels, affine = found
    own = np.column_stack([*(grid.directions * grid.spacing[:, None]), grid.normal])
    to_pixels = np.linalg.inv(affine[:3, :3])
    relative = to_pixels @ own
    axes = np.abs(relative).argmax(axis=0)
    aside = relative.copy()
    aside[axes, range(3)] = 0
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    own_lengths = np.linalg.norm(own, axis=0)
    if len(set(axes)) < 3 or np.abs(aside * lengths[:, None] / own_lengths).max() > SAME_DIRECTION:
        return "its grid is not parallel to the slices of the series; resample it", notes
    for index, position in enumerate(grid.positions):
        start = to_pixels @ (position - affine[:3, 3])
        if taken := nearest_pixels(start, relative, axes, grid.shape[:2], pixels.shape):
            (columns, rows), where = taken
            shown = pixels[np.ix_(*where)]
            mask[columns, rows, index] = np.moveaxis(shown, axes[:2], (0, 1)).reshape(len(where[axes[0]]), -1)
    note = "on another grid; slices take the nearest voxels" + ("" if mask.any() else ", but none lies on them")
    return mask, [*notes, note]


def nearest_pixels(
    start: np.ndarray, relative: np.ndarray, axes: np.ndarray, shape: tuple[int, int], size: tuple[int, ...]
) -> tuple[tuple[slice, slice], list[np.ndarray]] | None:
    """Find the nearest pixels of a parallel grid for a slice; None if the slice lies outside of it.

    Returns:
        The columns and rows of the slice inside of the grid, and the indices of pixels by axis of the grid.
    """
    where: list[np.ndarray] = [np.empty(0)] * 3
    third = int(np.rint(start[axes[2]]))
    if not 0 <= third < size[axes[2]]:
        return None
    where[axes[2]] = np.array([third])
    inside = []
    for axis in range(2):
        nearest = np.rint(start[axes[axis]] + relative[axes[axis], axis] * np.arange(shape[axis])).astype(int)
        kept = np.flatnonzero((nearest >= 0) & (nearest < size[axes[axis]]))
        if not kept.size:
            return None
        inside.append(slice(kept[0], kept[-1] + 1))
        where[axes[axis]] = nearest[kept]
    return (inside[0], inside[1]), where


def slice_of(frame: Frame, grid: SlicePlanes) -> int | None:
    """Return the slice on whose voxels the pixels of a frame lie; None if there is none."""
    index = int(np.abs(grid.heights - frame.position @ grid.normal).argmin())
    is_same = (
        frame.shape == grid.shape[:2]
        and np.abs(frame.directions - grid.directions).max() <= SAME_DIRECTION
        and np.abs((frame.spacing / grid.spacing - 1) * grid.shape[:2]).max() <= WITHIN
        and np.abs(grid.in_voxels(frame.position, index)).max() <= WITHIN
        and abs((frame.position - grid.positions[index]) @ grid.normal) <= ALONG * grid.distance
    )
    return index if is_same else None


def stacked(frames: list[Frame]) -> tuple[np.ndarray, np.ndarray] | str:
    """Stack the frames of a segment; returns pixels `(columns, rows, slices)` and their affine (LPS), or why not."""
    first = frames[0]
    normal = np.cross(*first.directions)
    heights = np.array([frame.position @ normal for frame in frames])
    for frame in frames:
        aside = frame.position - first.position
        aside = aside - (aside @ normal) * normal
        if (
            frame.shape != first.shape
            or np.abs(frame.directions - first.directions).max() > SAME_DIRECTION
            or np.abs(frame.spacing / first.spacing - 1).max() > SAME_DIRECTION
            or np.linalg.norm(aside) > WITHIN * first.spacing.min()
        ):
            return "its frames are no straight stack, and do not lie on the slices of the series"
    gaps = np.diff(np.unique(np.round(heights, 3)))
    for step in (*first.steps, float(gaps.min()) if gaps.size else 0.0):
        numbers = (heights - heights.min()) / (step or np.nan)
        indices = np.rint(np.nan_to_num(numbers)).astype(int)
        if step and np.abs(numbers - indices).max() <= ALONG:
            break
    else:
        return "its frames lie at uneven distances, and not on the slices of the series"
    pixels = np.zeros((*first.shape, indices.max() + 1), bool)
    for index, frame in zip(indices, frames, strict=True):
        pixels[:, :, index] |= frame.mask
    affine = np.eye(4)
    affine[:3, :2] = (first.directions * first.spacing[:, None]).T
    affine[:3, 2] = normal * step
    affine[:3, 3] = frames[int(heights.argmin())].position
    return pixels, affine
