"""RTSTRUCT -> masks on the slices of a series.

Contours of one plane are combined by exclusive or: a contour inside another one is a hole. Keyholes need nothing.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom

from hyspark.data.readers.dicom import open_dicom
from hyspark.data.structures.planes import ALONG, SlicePlanes
from hyspark.data.structures.polygons import fill_polygons
from hyspark.utils.text import count_of

AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""Types of contours that enclose an area."""
FEWEST_CORNERS = 3
MAX_GAP = 3.1
"""Distance of contours, as a multiple of that of slices, up to which slices between them take the nearest contour."""
EDGE = 1e-3
"""mm by which a slice may lie beyond the middle between contours."""
LEAST_FLATNESS = 0.2
"""mm along the normal by which the corners of a contour may differ."""


def contour_masks(path: Path, grid: SlicePlanes) -> Iterator[tuple[int, np.ndarray | str, list[str]]]:
    """Yield number, mask `(columns, rows, slices)` and notes of each structure of an RTSTRUCT.

    A mask that cannot be made is replaced by the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = open_dicom(path)
        for region in data.get("ROIContourSequence") or ():
            yield int(region.ReferencedROINumber), *structure_mask(region, grid)


def structure_mask(region: pydicom.Dataset, grid: SlicePlanes) -> tuple[np.ndarray | str, list[str]]:
    """Make the mask of a structure from its contours, or say why it has none."""
    drawn: list[tuple[float, np.ndarray]] = []
    others, copies = 0, 0
    seen: set[bytes] = set()
    tolerance = max(LEAST_FLATNESS, ALONG * grid.distance)
    for contour in region.get("ContourSequence") or ():
        values = np.array(contour.get("ContourData") or (), dtype=float)
        if str(contour.get("ContourGeometricType")) not in AREAS or len(values) < 3 * FEWEST_CORNERS:
            others += 1
            continue
        if len(values) % 3 or not np.isfinite(values).all():
            return f"ContourData: expected three coordinates a point, found {count_of(len(values), 'number')}", []
        points = values.reshape(-1, 3)
        if points.tobytes() in seen:
            copies += 1
            continue
        seen.add(points.tobytes())
        heights = points @ grid.normal
        if np.ptp(heights) > tolerance:
            return f"its contours lie across the slices, by up to {np.ptp(heights):.3g} mm", []
        drawn.append((float(heights.mean()), points))
    notes = [f"{count_of(others, 'contour')} of points or lines not used"] if others else []
    notes += [f"{count_of(copies, 'contour')} repeat another and are not used"] if copies else []
    mask = np.zeros(grid.shape, bool)
    heights, contours = by_plane_drawn(drawn, ALONG * grid.distance)
    for index, nearest in nearest_contours(heights, grid, notes) if contours else ():
        polygons = [grid.in_voxels(points, index) for points in contours[nearest]]
        mask[:, :, index] = fill_polygons(polygons, (grid.columns, grid.rows))
    return mask, notes


def by_plane_drawn(
    drawn: list[tuple[float, np.ndarray]], tolerance: float
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Group contours by the plane in which they are drawn; returns its position in mm, ascending, and its contours."""
    heights: list[float] = []
    contours: list[list[np.ndarray]] = []
    for height, points in sorted(drawn, key=lambda pair: pair[0]):
        if heights and height - heights[-1] <= tolerance:
            contours[-1].append(points)
        else:
            heights.append(height)
            contours.append([points])
    return np.array(heights), contours


def nearest_contours(drawn: np.ndarray, grid: SlicePlanes, notes: list[str]) -> list[tuple[int, int]]:
    """Find the contours that each slice takes.

    A slice takes the nearest contours, up to half their distance from it. Where contours lie further apart than
    `MAX_GAP` slices, they are parts of their own.

    Args:
        drawn: positions of contours along the normal, ascending, in mm.
        grid: the slices.
        notes: a note is added if contours do not lie on slices.

    Returns:
        Indices of slices, each with the index of its contours.
    """
    least = float(np.diff(drawn).min()) if len(drawn) > 1 else grid.distance
    gap = least if least <= MAX_GAP * grid.distance else grid.distance
    above = grid.heights[:, None] - drawn
    nearest = np.abs(above).argmin(axis=1)
    above = above[np.arange(len(above)), nearest]
    taken = np.flatnonzero((above > EDGE - gap / 2) & (above <= gap / 2 + EDGE))
    away = np.abs(drawn[:, None] - grid.heights).min(axis=1) > gap
    if away.any():
        notes.append(f"contours at {away.sum()} of {len(drawn)} positions lie on no slice, and are not used")
    if len(taken) and np.abs(above[taken]).max() > ALONG * grid.distance:
        notes.append(
            f"contours lie {gap:.3g} mm apart, between slices of {grid.distance:.3g} mm; slices take the nearest"
        )
    return [(int(index), int(nearest[index])) for index in taken]
