"""Masks of a slice -> closed contours, with which readers fill exactly the mask's voxels."""

from itertools import pairwise

import numpy as np
from contourpy import FillType, contour_generator
from scipy.spatial import cKDTree


def mask_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the regions of a mask `(rows, columns)`, halfway between voxels inside and outside.

    A hole is joined to its region's outline by a line there and back (a keyhole). Readers that combine contours by
    union and readers that use exclusive or therefore agree.

    Returns:
        The corners of each region `(n, 2)`: column and row, in voxels.
    """
    rows, columns = np.nonzero(mask)
    if not rows.size:
        return []
    top, left = rows.min() - 1, columns.min() - 1
    inside = np.zeros((rows.max() - top + 2, columns.max() - left + 2), np.float64)
    inside[rows - top, columns - left] = 1
    traced = contour_generator(z=inside, fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    regions = []
    for points, offsets in zip(*traced, strict=True):
        rings = [without_middle_points(points[a : b - 1]) for a, b in pairwise(offsets.astype(int))]
        regions.append(with_keyholes(rings[0], rings[1:]) + (left, top))
    return regions


def without_middle_points(ring: np.ndarray) -> np.ndarray:
    """Remove the points of a closed ring that lie on the line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def with_keyholes(outline: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Join rings inside of an outline to it, each by a line there and back at the nearest pair of corners."""
    for hole in holes:
        distances, nearest = cKDTree(outline).query(hole)
        start = int(distances.argmin())
        at = int(nearest[start])
        there = np.roll(hole, -start, axis=0)
        outline = np.concatenate([outline[: at + 1], there, there[:1], outline[at:]])
    return outline
