"""Scores of cubes, worked out by hand."""

import math

import numpy as np
import pytest

from hyspark.evaluation.segmentation.metrics import dice, score_case


def cube(shape, start, stop, value=1):
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return labels


TRUTH = cube((16, 16, 16), (4, 4, 4), (10, 10, 10))


def test_dice_is_twice_the_overlap_over_the_sum():
    truth, prediction = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    truth[:2], prediction[1:3], prediction[3] = 1, 1, 2
    first, *others = dice(prediction, truth, 4)
    assert first == pytest.approx(2 * 16 / (32 + 32))
    assert all(math.isnan(value) for value in others)


def test_equal_label_maps_score_best():
    (scores,) = score_case(TRUTH, TRUTH.copy(), 2, (1, 1, 1), 1)
    assert (scores.dice, scores.hd95_mm, scores.nsd) == (1, 0, 1)
    assert scores.truth_voxels == scores.predicted_voxels == 6**3


@pytest.mark.parametrize(("axis", "spacing"), [(0, (3.0, 1.0, 1.0)), (1, (3.0, 1.0, 1.0)), (2, (0.5, 0.5, 2.0))])
def test_distances_are_in_mm_of_the_axis(axis, spacing):
    """A cube moved by two voxels: whole faces, over 5 % of the border, are two voxels apart and none is further."""
    moved = np.roll(TRUTH, 2, axis)
    (scores,) = score_case(moved, TRUTH, 2, spacing, 2 * spacing[axis] + 0.1)
    assert scores.hd95_mm == pytest.approx(2 * spacing[axis])
    assert scores.nsd == pytest.approx(1)
    assert scores.dice == pytest.approx(2 / 3)


def test_the_95th_percentile_forgives_a_few_voxels():
    stray = TRUTH.copy()
    stray[15, 15, 15] = 1
    (scores,) = score_case(stray, TRUTH, 2, (1, 1, 1), 1)
    assert scores.hd95_mm == 0
    assert 0.97 < scores.nsd < 1


def test_surface_dice_weighs_by_area():
    """Flat slabs with thick voxels, one of the two faces moved beyond the tolerance: half of each surface is lost, and
    neither the thickness of the voxels nor the few at the rim count for more than their area.
    """
    truth, prediction = cube((40, 40, 9), (1, 1, 2), (39, 39, 4)), cube((40, 40, 9), (1, 1, 2), (39, 39, 7))
    (near,) = score_case(prediction, truth, 2, (1, 1, 4), 12.1)
    (far,) = score_case(prediction, truth, 2, (1, 1, 4), 3.9)
    assert near.nsd == pytest.approx(1)
    assert far.nsd == pytest.approx(0.5, abs=0.15)


def test_an_organ_at_the_edge_of_the_volume_ends_there():
    truth, prediction = cube((8, 8, 8), (0, 0, 0), (4, 8, 8)), cube((8, 8, 8), (0, 0, 0), (6, 8, 8))
    (scores,) = score_case(prediction, truth, 2, (1, 1, 1), 0.5)
    assert scores.hd95_mm == pytest.approx(2)
    assert 0 < scores.nsd < 1


def test_absent_and_missed_organs_are_told_apart():
    prediction = cube((16, 16, 16), (0, 0, 0), (3, 3, 3), 3)
    truth = TRUTH * 2
    never, missed, invented = score_case(prediction, truth, 4, (1, 1, 1), 1)
    assert [math.isnan(value) for value in (never.dice, never.hd95_mm, never.nsd)] == [True] * 3
    assert (never.truth_voxels, never.predicted_voxels) == (0, 0)
    assert (missed.dice, missed.nsd, missed.predicted_voxels) == (0, 0, 0)
    assert math.isnan(missed.hd95_mm)
    assert [math.isnan(value) for value in (invented.dice, invented.hd95_mm, invented.nsd)] == [True] * 3
    assert (invented.truth_voxels, invented.predicted_voxels) == (0, 27)


def test_other_organs_do_not_matter():
    rest = cube((16, 16, 16), (11, 11, 11), (15, 15, 15), 2)
    prediction = np.roll(TRUTH, 1, 0) + rest
    first, second = score_case(prediction, TRUTH + rest, 3, (1, 1, 1), 1)
    (alone,) = score_case(np.roll(TRUTH, 1, 0), TRUTH, 2, (1, 1, 1), 1)
    assert first == alone
    assert second.dice == 1


def test_label_maps_of_two_shapes_are_an_error():
    with pytest.raises(ValueError, match="differ in shape"):
        score_case(TRUTH, TRUTH[1:], 2, (1, 1, 1), 1)
