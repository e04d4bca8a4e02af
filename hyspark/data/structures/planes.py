"""Where the slices of a series lie, for the structures that are brought onto them."""

from dataclasses import dataclass

import numpy as np

from hyspark.data.readers.series import Series
from hyspark.data.readers.source_slices import read_slices

ALONG = 0.1
"""Largest distance from a slice along its normal, as a fraction of the distance between slices, within the slice."""
WITHIN = 0.05
"""Largest shift within a slice, in voxels, of grids that count as one."""
SAME_DIRECTION = 1e-3
"""Largest difference of direction cosines of parallel axes."""


@dataclass(frozen=True)
class SlicePlanes:
    """The grid of a series, slice by slice.

    Attributes:
        columns: number of columns.
        rows: number of rows.
        positions: centre of the first voxel of each slice `(n, 3)`, in mm (LPS).
        directions: from column to column, and from row to row `(2, 3)`.
        spacing: mm between columns and between rows.
        heights: position of each slice along the normal, in mm, ascending.
        distance: mm between slices.
        image_uids: SOPInstanceUID of each slice.
    """

    columns: int
    rows: int
    positions: np.ndarray
    directions: np.ndarray
    spacing: np.ndarray
    heights: np.ndarray
    distance: float
    image_uids: tuple[str, ...]

    @property
    def normal(self) -> np.ndarray:
        """Direction from slice to slice."""
        return np.cross(*self.directions)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices."""
        return self.columns, self.rows, len(self.positions)

    def in_voxels(self, points: np.ndarray, index: int) -> np.ndarray:
        """Convert points `(n, 3)` in mm to column and row of a slice `(n, 2)`."""
        voxels: np.ndarray = (points - self.positions[index]) @ self.directions.T / self.spacing
        return voxels


def slice_planes(series: Series) -> SlicePlanes:
    """Read where the slices of a series lie."""
    headers = [part.header for part in read_slices(series)]
    assert headers[0].plane is not None
    rows, columns, between_rows, between_columns = headers[0].plane[:4]
    directions = np.array(headers[0].plane[4:]).reshape(2, 3)
    positions = np.array([header.position for header in headers], float)
    heights = positions @ np.cross(*directions)
    distance = float(np.median(np.diff(heights))) if len(heights) > 1 else headers[0].thickness
    uids = tuple(header.uid for header in headers)
    spacing = np.array([between_columns, between_rows])
    return SlicePlanes(int(columns), int(rows), positions, directions, spacing, heights, distance, uids)
