"""Filled polygons against matplotlib's test of points, and exact rules at edges."""

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from hyspark.data.structures.polygons import fill_polygons
from hyspark.data.writers.outlines import mask_contours

SHAPE = (23, 17)
CENTRES = np.stack(np.meshgrid(np.arange(SHAPE[0]), np.arange(SHAPE[1]), indexing="ij"), -1).reshape(-1, 2)


@pytest.mark.parametrize("seed", range(8))
def test_centres_inside_are_filled(seed):
    """Star-shaped polygons with up to 40 corners, partly beyond the slice."""
    draw = np.random.default_rng(seed)
    angles = np.sort(draw.uniform(0, 2 * np.pi, draw.integers(3, 40)))
    radii = draw.uniform(2, 14, len(angles))
    corners = draw.uniform(2, 18, 2) + np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)
    closed = Polygon(np.concatenate([corners, corners[:1]]))
    assert np.array_equal(fill_polygons([corners], SHAPE), closed.contains_points(CENTRES).reshape(SHAPE))
    assert np.array_equal(fill_polygons([corners[::-1]], SHAPE), fill_polygons([corners], SHAPE))


def test_nested_polygons_are_holes_and_islands():
    def square(a, b):
        return np.array([[a, a], [b, a], [b, b], [a, b]], float)

    filled = fill_polygons([square(0.5, 14.5), square(3.5, 11.5), square(5.5, 8.5)], SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[1:15, 1:15] = True
    expected[4:12, 4:12] = False
    expected[6:9, 6:9] = True
    assert np.array_equal(filled, expected)


def test_neighbours_with_a_common_edge_share_no_voxel_and_leave_none():
    """Edges run through the centres of voxels."""
    middle = np.array([[7, 2], [11, 6], [5, 12]], float)
    left = np.concatenate([[[2.0, 2.0]], middle, [[2.0, 12.0]]])
    right = np.concatenate([middle, [[16.0, 12.0], [16.0, 2.0]]])
    whole = np.array([[2, 2], [16, 2], [16, 12], [2, 12]], float)
    a, b = fill_polygons([left], SHAPE), fill_polygons([right], SHAPE)
    assert not (a & b).any()
    assert np.array_equal(a | b, fill_polygons([whole], SHAPE))


@pytest.mark.parametrize("seed", range(4))
def test_traced_masks_come_back(seed):
    """Random masks have every kind of corner, holes and islands."""
    mask = np.random.default_rng(seed).random(SHAPE) < 0.3 + 0.15 * seed
    assert np.array_equal(fill_polygons(mask_contours(mask.T), SHAPE), mask)


def test_odd_polygons_fill_nothing():
    for polygon in (
        [[3, 3], [9, 3], [5, 3]],
        [[4, 4]] * 3,
        [[-9, -9], [-4, -9], [-4, -2]],
        [[99, 2], [120, 2], [99, 9]],
    ):
        assert not fill_polygons([np.array(polygon, float)], SHAPE).any()
