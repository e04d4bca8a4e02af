"""Planes of a volume as 8-bit pictures: the right way up, with square pixels, scaled by their own range or a window."""

from collections.abc import Iterator
from typing import get_args

import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image

from hyspark.data.settings import Axis, PictureSettings

SQUARE = 0.02
"""Cosine between axes up to which they count as perpendicular; a tilted gantry leans by more."""


def pictures(
    voxels: np.ndarray, affine: np.ndarray, settings: PictureSettings
) -> Iterator[tuple[int, np.ndarray | None]]:
    """The pictures of a volume, with the number of their plane, counted from the left, the back or the foot.

    voxels: Hounsfield units (h, w, d), axes closest to RAS; affine: theirs (4, 4). A picture is uint8 (rows, columns),
    as radiologists look at it: head or front up; the patient's right, in sagittal planes the front, on the left. None
    for a blank one.
    """
    across, first, second = axes_of(settings.axis)
    spacing = voxel_sizes(affine)
    for number in range(0, voxels.shape[across], settings.stride):
        plane = np.moveaxis(voxels, across, 0)[number, ::-1, ::-1].T
        yield number, picture(plane, (spacing[second], spacing[first]), settings)


def axes_of(name: Axis) -> tuple[int, int, int]:
    """The axis that planes of a name lie across, and the two that they hold."""
    across = get_args(Axis).index(name)
    first, second = (axis for axis in range(3) if axis != across)
    return across, first, second


def why_skewed(affine: np.ndarray, axis: Axis) -> str:
    """Why planes of a volume would be skewed, as of slices from a tilted gantry; nothing if they are not.

    affine: (4, 4), axes closest to RAS.
    """
    _, first, second = axes_of(axis)
    directions = affine[:3, :3] / voxel_sizes(affine)
    lean = abs(float(directions[:, first] @ directions[:, second]))
    if lean <= SQUARE:
        return ""
    degrees = np.rad2deg(np.arcsin(min(lean, 1.0)))
    return f"its axes are not square in {axis} planes, by {degrees:.1f} degrees (a tilted gantry?)"


def picture(plane: np.ndarray, spacing: tuple[float, float], settings: PictureSettings) -> np.ndarray | None:
    """A plane (rows, columns), of a spacing in mm, as uint8 (rows, columns); None where all of it is one grey.

    It is clipped, then resampled, linearly and without aliasing, then scaled: with minmax every picture reaches from 0
    to 255.
    """
    values = np.ascontiguousarray(plane, dtype=np.float32).clip(*settings.bounds)
    values = resize(values, picture_shape(plane.shape, spacing, settings.size))
    low, high = settings.bounds if settings.scaling == "window" else (float(values.min()), float(values.max()))
    if low == high:
        return None
    grey = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    return grey if grey.min() < grey.max() else None


def picture_shape(shape: tuple[int, ...], spacing: tuple[float, float], size: int) -> tuple[int, int]:
    """Rows and columns of square pixels for a plane of a shape and a spacing in mm."""
    rows, columns = (n * mm for n, mm in zip(shape, spacing, strict=True))
    pixel = min(rows, columns) / size if size else min(spacing)
    return max(1, round(rows / pixel)), max(1, round(columns / pixel))


def resize(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A plane, float32 (rows, columns), at another size: linear between pixels, averaged where it shrinks."""
    if plane.shape == shape:
        return plane
    return np.asarray(Image.fromarray(plane).resize(shape[::-1], Image.Resampling.BILINEAR))
