"""Resampling of an image to the prepared grid: the result of MONAI's LoadImage, Orientation and Spacing, in less time.

MONAI computes the grid. An image whose axes stay perpendicular is then interpolated by SciPy, in double precision like
MONAI. SciPy works axis by axis, on the file's own integers, and only where the result can lie above a threshold.

MONAI itself resamples:

- sheared images;
- labels, since the last bit would decide the label of a voxel halfway between two.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from nibabel import as_closest_canonical
from nibabel.spatialimages import SpatialImage
from scipy.ndimage import affine_transform

UNCHANGED = 1e-3
"""MONAI takes affines that differ by less for equal (its AFFINE_TOL), and does not interpolate."""
MAX_AXIS_DRIFT = 1e-5
"""Voxels by which a straight row of voxels may leave its axis over its whole length."""


def whole_grid(image: SpatialImage, spacing: Sequence[float], mode: str) -> MetaTensor:
    """Resample a whole image by MONAI's own transforms.

    Args:
        image: the image, as `read_nifti` returns it.
        spacing: mm per voxel, in RAS order.
        mode: "bilinear" or "nearest".

    Returns:
        float32 `(1, h, w, d)` in RAS orientation.
    """
    voxels = np.asanyarray(image.dataobj).reshape(1, *image.shape[:3]).astype(np.float32)
    volume = MetaTensor(torch.from_numpy(voxels), affine=torch.from_numpy(image.affine))
    ras = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    resampled: MetaTensor = Compose([ras, Spacing(spacing, mode=mode)])(volume)
    return resampled


def region_above(
    images: Sequence[SpatialImage], spacing: Sequence[float], thresholds: Sequence[float]
) -> tuple[MetaTensor, tuple[int, ...], list[int]]:
    """Resample the region of `whole_grid(image, spacing, "bilinear")` that holds every voxel above a threshold.

    Args:
        images: channels of a volume, on one grid.
        spacing: mm per voxel, in RAS order.
        thresholds: value to exceed, of each channel; the region holds the voxels of all.

    Returns:
        region: float32 `(c, h, w, d)`; one voxel if none lies above its threshold.
        shape: `(h, w, d)` of the whole grid.
        start: first voxel of the region in the whole grid.
    """
    turned = as_closest_canonical(images[0])
    affine, shape = target_grid(turned.shape[:3], turned.affine, spacing)
    to_voxel = np.linalg.solve(turned.affine, affine)
    if shape == turned.shape[:3] and np.allclose(to_voxel, np.eye(4), atol=UNCHANGED):
        affine, to_voxel = turned.affine, np.eye(4)
    scale, offset = np.diag(to_voxel)[:3], to_voxel[:3, 3]
    if np.abs(to_voxel[:3, :3] - np.diag(scale)).max() * max(shape) > MAX_AXIS_DRIFT:
        whole: Any = [whole_grid(image, spacing, "bilinear") for image in images]
        together: Any = whole[0] if len(whole) == 1 else torch.cat(whole)
        return together, shape, [0, 0, 0]

    channels = [canonical_voxels(image) for image in images]
    starts, stops = zip(
        *(box_above(voxels, above, shape, scale, offset) for voxels, above in zip(channels, thresholds, strict=True)),
        strict=True,
    )
    start, stop = np.min(starts, axis=0), np.max(stops, axis=0)
    if np.array_equal(to_voxel, np.eye(4)):
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        parts = [voxels[box].astype(np.float32) for voxels in channels]
    else:
        parts = [interpolate(voxels, scale, offset + scale * start, stop - start) for voxels in channels]
    part = parts[0][None] if len(parts) == 1 else np.stack(parts)
    affine = affine @ translation(start)
    return MetaTensor(torch.from_numpy(part), affine=torch.from_numpy(affine)), shape, start.tolist()


def canonical_voxels(image: SpatialImage) -> np.ndarray:
    """Return the voxels `(h, w, d)` of an image in the order of RAS, in the type they are stored in."""
    turned = as_closest_canonical(image)
    voxels = np.asanyarray(turned.dataobj).reshape(turned.shape[:3])
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32, copy=False)  # as MONAI does after reading
    return voxels


def target_grid(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Compute affine `(4, 4)` and shape of the grid of MONAI's Spacing at a spacing in mm, without resampling."""
    volume = MetaTensor(torch.empty(1).expand(1, *shape), affine=torch.from_numpy(affine))
    planned: Any = Spacing(spacing)(volume, lazy=True)
    return planned.peek_pending_affine().numpy(), tuple(int(n) for n in planned.peek_pending_shape())


def box_above(
    voxels: np.ndarray, threshold: float, shape: Sequence[int], scale: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bound the voxels of a grid that can lie above a threshold; if none can, the box is the first voxel.

    A voxel can lie above the threshold only if one of its two neighbours in `voxels` does.

    Args:
        voxels: `(h, w, d)` of the file.
        threshold: value to exceed.
        shape: voxels per axis of the grid.
        scale: per axis; voxel i of the grid is at `scale * i + offset` in `voxels`, clipped to the border.
        offset: per axis.

    Returns:
        First voxel on each axis, and one past the last.
    """
    above = voxels > threshold
    start, stop = np.zeros(3, int), np.ones(3, int)
    for axis in range(3):
        filled = np.flatnonzero(above.any(axis=tuple({0, 1, 2} - {axis})))
        if filled.size == 0:
            break
        where = np.clip(scale[axis] * np.arange(shape[axis]) + offset[axis], 0, voxels.shape[axis] - 1)
        near = np.flatnonzero((where > filled[0] - 1) & (where < filled[-1] + 1))
        start[axis], stop[axis] = (near[0], near[-1] + 1) if near.size else (0, 1)
    return start, stop


def interpolate(voxels: np.ndarray, scale: np.ndarray, offset: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Interpolate `voxels` `(h, w, d)` at `scale * i + offset` for voxel i of a shape, clipped to the border."""
    order = np.argsort(np.abs(voxels.strides))[::-1]  # SciPy is fastest with the axes in the order of the memory
    with warnings.catch_warnings():
        # Older SciPy warns that the meaning of the offset changed in 0.18, which is older than any it may be here.
        warnings.filterwarnings("ignore", "The behavior of affine_transform with a 1-D array", UserWarning)
        found: np.ndarray = affine_transform(
            voxels.transpose(order),
            scale[order],
            offset[order],
            output_shape=tuple(shape[order]),
            output=np.float32,
            order=1,
            mode="nearest",
        )
    return found.transpose(np.argsort(order))


def translation(shift: np.ndarray) -> np.ndarray:
    """Make the affine `(4, 4)` of a shift in voxels."""
    moved = np.eye(4)
    moved[:3, 3] = shift
    return moved
