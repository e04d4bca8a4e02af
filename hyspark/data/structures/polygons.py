"""Polygons -> the voxels whose centres lie inside."""

import numpy as np

CORNER_DIGITS = 6
"""Digits of voxels to which corners are rounded, so that a corner on a voxel's centre stays there."""


def fill_polygons(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill closed polygons by the even-odd rule: a voxel inside of two of them is in a hole.

    A centre on an edge is inside on one side of the polygon, and outside on the other one, so that polygons with a
    common edge neither overlap nor leave a gap.

    Args:
        polygons: corners `(n, 2)`: column and row, in voxels.
        shape: columns and rows.

    Returns:
        Mask `(columns, rows)`.
    """
    columns, rows = shape
    crossings = np.zeros((rows, columns + 1), np.int32)
    for polygon in polygons:
        start = np.round(polygon, CORNER_DIGITS)
        end = np.roll(start, -1, axis=0)
        flip = start[:, 1] > end[:, 1]
        low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
        first = np.ceil(low[:, 1]).clip(0, rows).astype(int)  # a row counts from the lower end, which it includes
        last = np.ceil(high[:, 1]).clip(0, rows).astype(int)
        num = last - first
        edge = np.repeat(np.arange(len(num)), num)
        row = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num) + first[edge]
        slope = (high[edge, 0] - low[edge, 0]) / (high[edge, 1] - low[edge, 1])
        column = np.round(low[edge, 0] + (row - low[edge, 1]) * slope, CORNER_DIGITS)
        np.add.at(crossings, (row, np.ceil(column).clip(0, columns).astype(int)), 1)
    inside: np.ndarray = np.cumsum(crossings, axis=1)[:, :columns] % 2 == 1
    return inside.T
