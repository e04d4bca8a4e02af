"""From the voxels of a file to the prepared grid: what MONAI's LoadImage, Orientation and Spacing give, in less time.

MONAI says where the voxels of the grid lie. An image whose axes stay perpendicular is then interpolated by SciPy, in
double precision like MONAI, but axis by axis, out of the file's own integers, and only where the result can lie above
a threshold. A sheared image, and labels, where a voxel between two would be decided by the last bit, are left to
MONAI.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from nibabel import as_closest_canonical
from scipy.ndimage import affine_transform

from hyspark.data.readers.nifti import read_nifti

UNCHANGED = 1e-3
"""Affines that differ by less than this are one to MONAI (its AFFINE_TOL), and nothing is interpolated."""
STRAIGHT = 1e-5
"""Voxels by which a row of voxels may leave its axis over its whole length and still count as straight."""


def whole_grid(path: Path, spacing: Sequence[float], mode: str) -> MetaTensor:
    """All of a NIfTI file in RAS orientation at a spacing in mm: float32 (1, h, w, d), by MONAI's own transforms.

    mode: "bilinear" or "nearest".
    """
    image = read_nifti(path)
    voxels = np.asanyarray(image.dataobj).reshape(1, *image.shape[:3]).astype(np.float32)
    volume = MetaTensor(torch.from_numpy(voxels), affine=torch.from_numpy(image.affine))
    ras = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    resampled: MetaTensor = Compose([ras, Spacing(spacing, mode=mode)])(volume)
    return resampled


def region_above(
    path: Path, spacing: Sequence[float], threshold: float
) -> tuple[MetaTensor, tuple[int, ...], list[int]]:
    """The part of `whole_grid(path, spacing, "bilinear")` that holds every voxel above a threshold.

    Returns that part, float32 (1, h, w, d), one voxel where there is none; the shape (h, w, d) of the whole grid; the
    first voxel of the part in it.
    """
    image = as_closest_canonical(read_nifti(path))
    affine, shape = target_grid(image.shape[:3], image.affine, spacing)
    to_voxel = np.linalg.solve(image.affine, affine)
    if shape == image.shape[:3] and np.allclose(to_voxel, np.eye(4), atol=UNCHANGED):
        affine, to_voxel = image.affine, np.eye(4)
    scale, offset = np.diag(to_voxel)[:3], to_voxel[:3, 3]
    if np.abs(to_voxel[:3, :3] - np.diag(scale)).max() * max(shape) > STRAIGHT:
        return whole_grid(path, spacing, "bilinear"), shape, [0, 0, 0]

    voxels = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32, copy=False)  # as MONAI does after reading
    start, stop = box_above(voxels, threshold, shape, scale, offset)
    if np.array_equal(to_voxel, np.eye(4)):
        part = voxels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))].astype(np.float32)
    else:
        part = interpolate(voxels, scale, offset + scale * start, stop - start)
    affine = affine @ translation(start)
    return MetaTensor(torch.from_numpy(part)[None], affine=torch.from_numpy(affine)), shape, start.tolist()


def target_grid(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (4, 4) and shape of a volume at a spacing in mm, as MONAI's Spacing lays the grid; nothing is computed."""
    volume = MetaTensor(torch.empty(1).expand(1, *shape), affine=torch.from_numpy(affine))
    planned: Any = Spacing(spacing)(volume, lazy=True)
    return planned.peek_pending_affine().numpy(), tuple(int(n) for n in planned.peek_pending_shape())


def box_above(
    voxels: np.ndarray, threshold: float, shape: Sequence[int], scale: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last voxel on each axis of the grid that can lie above the threshold.

    voxels: (h, w, d). Voxel i of the grid lies at `scale * i + offset` between them, beyond the border on it, and can
    lie above only where one of its two neighbours does. Where none can, the box is the first voxel.
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
    """Float32 of a shape; voxel i lies at `scale * i + offset` between `voxels` (h, w, d), beyond the border on it."""
    order = np.argsort(np.abs(voxels.strides))[::-1]  # SciPy is fastest with the axes in the order of the memory
    return affine_transform(
        voxels.transpose(order),
        scale[order],
        offset[order],
        output_shape=tuple(shape[order]),
        output=np.float32,
        order=1,
        mode="nearest",
    ).transpose(np.argsort(order))


def translation(shift: np.ndarray) -> np.ndarray:
    """Affine (4, 4) that moves by a number of voxels."""
    moved = np.eye(4)
    moved[:3, 3] = shift
    return moved
