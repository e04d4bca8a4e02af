"""Slices of a volume as 8-bit images: upright, with square pixels, scaled by their own range or a window."""

from collections.abc import Iterator
from typing import get_args

import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image

from hyspark.data.intensity import grey_values
from hyspark.data.settings import Axis, PictureSettings

MAX_SKEW = 0.02
"""Cosine between axes up to which they count as perpendicular; a tilted gantry leans by more."""


def slice_pictures(
    voxels: np.ndarray, affine: np.ndarray, settings: PictureSettings
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield the slices of a volume as images, with their indices, counted from the left, the back or the foot.

    An image is shown as radiologists look at it: head or front up; on the left the patient's right, or in sagittal
    slices the front.

    Args:
        voxels: Hounsfield units `(h, w, d)`, axes closest to RAS.
        affine: `(4, 4)` of the voxels.
        settings: orientation, grey values and size.

    Yields:
        Index, and uint8 `(rows, columns)`, or None for a blank slice.
    """
    across, first, second = slice_axes(settings.axis)
    spacing = voxel_sizes(affine)
    for index in range(0, voxels.shape[across], settings.stride):
        values = np.moveaxis(voxels, across, 0)[index, ::-1, ::-1].T
        yield index, slice_picture(values, (spacing[second], spacing[first]), settings)


def slice_axes(name: Axis) -> tuple[int, int, int]:
    """Return the axis that slices of an orientation are perpendicular to, and the two axes within them."""
    across = get_args(Axis).index(name)
    first, second = (axis for axis in range(3) if axis != across)
    return across, first, second


def why_skewed(affine: np.ndarray, axis: Axis) -> str:
    """Explain why slices of a volume would be skewed, as by a tilted gantry; empty if they are not.

    Args:
        affine: `(4, 4)`, axes closest to RAS.
        axis: orientation of the slices.
    """
    _, first, second = slice_axes(axis)
    directions = affine[:3, :3] / voxel_sizes(affine)
    lean = abs(float(directions[:, first] @ directions[:, second]))
    if lean <= MAX_SKEW:
        return ""
    degrees = np.rad2deg(np.arcsin(min(lean, 1.0)))
    return f"its axes are not perpendicular in {axis} slices, by {degrees:.1f} degrees (a tilted gantry?)"


def slice_picture(values: np.ndarray, spacing: tuple[float, float], settings: PictureSettings) -> np.ndarray | None:
    """Convert a slice to an image: clip, resample linearly without aliasing, scale to grey values.

    With minmax, every image reaches from 0 to 255.

    Args:
        values: Hounsfield units `(rows, columns)`.
        spacing: mm between rows and between columns.
        settings: grey values and size.

    Returns:
        uint8 `(rows, columns)`, or None if all of it is one grey.
    """
    clipped = np.ascontiguousarray(values, dtype=np.float32).clip(*settings.bounds)
    return grey_values(resize(clipped, picture_shape(values.shape, spacing, settings.size)), settings)


def picture_shape(shape: tuple[int, ...], spacing: tuple[float, float], size: int) -> tuple[int, int]:
    """Compute rows and columns of square pixels for a slice of a shape and a spacing in mm."""
    rows, columns = (n * mm for n, mm in zip(shape, spacing, strict=True))
    pixel = min(rows, columns) / size if size else min(spacing)
    return max(1, round(rows / pixel)), max(1, round(columns / pixel))


def resize(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize a slice, float32 `(rows, columns)`: linear between pixels, averaged if it shrinks."""
    if values.shape == shape:
        return values
    return np.asarray(Image.fromarray(values).resize(shape[::-1], Image.Resampling.BILINEAR))
