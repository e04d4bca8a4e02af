"""Intervals: exact where the answer is known, paired, over seeds and over cases, and honest on simulated data."""

import math

import numpy as np
import pytest

from hyspark.evaluation.bootstrap import interval, num_resamples, organ_means, paired_difference, seed_means
from hyspark.evaluation.segmentation.scores import mean_dice

FEW = {"num_resamples": 400}


def simulated(seed, num_seeds=3, num_cases=20, num_organs=1, seeds=0.0, cases=0.0, noise=0.0):
    """Scores (seeds, cases, organs) around .5 with normal effects of the given standard deviations."""
    random = np.random.default_rng(seed)
    values = random.normal(0.5, noise, (num_seeds, num_cases, num_organs))
    values += random.normal(0, seeds, (num_seeds, 1, 1))
    return values + random.normal(0, cases, (1, num_cases, 1))


def width(estimate):
    return estimate.high - estimate.low


def test_the_mean_is_that_of_a_run():
    scores = simulated(0, num_seeds=1, num_cases=5, num_organs=3, noise=0.1)
    scores[0, :4, 0] = np.nan
    scores[0, 2, 1] = np.nan
    organs = mean_dice(scores[0].tolist(), ["a", "b", "c"])
    np.testing.assert_allclose(organ_means(scores)[0], list(organs.values()))
    np.testing.assert_allclose(seed_means(scores), [np.mean(list(organs.values()))])
    assert interval(scores, **FEW).mean == pytest.approx(np.mean(list(organs.values())))


def test_an_organ_that_few_cases_hold_counts_as_much_as_the_others():
    scores = np.full((1, 10, 2), 0.25)
    scores[0, :, 1] = np.nan
    scores[0, 0, 1] = 0.75
    assert seed_means(scores)[0] == 0.5


def test_a_constant_difference_has_an_interval_of_no_width():
    baseline = simulated(1, num_organs=4, seeds=0.1, cases=0.1, noise=0.1)
    baseline[:, 3, 2] = np.nan
    estimate = paired_difference(baseline + 0.125, baseline)
    np.testing.assert_allclose([estimate.mean, estimate.low, estimate.high], 0.125, rtol=0, atol=1e-12)


def test_what_both_sides_share_does_not_widen_the_difference():
    """Hard cases are hard and lucky seeds lucky for both; resampled apart, the width would be about .25."""
    baseline = simulated(2, seeds=0.1, cases=0.2)
    random = np.random.default_rng(3)
    better = baseline + random.normal(0.02, 0.01, baseline.shape)
    estimate = paired_difference(better, baseline)
    assert width(estimate) < 0.02
    assert estimate.low > 0
    assert width(interval(better)) > 0.1


def test_pairs_are_by_place():
    baseline = simulated(4, cases=0.2)
    shuffled = baseline[:, ::-1]
    assert width(paired_difference(shuffled, baseline)) > 0.05


@pytest.mark.parametrize("effect", ["seeds", "cases"])
def test_both_levels_are_resampled(effect):
    spread = simulated(5, **{effect: 0.1})
    means = spread.mean(axis=(1, 2)) if effect == "seeds" else spread.mean(axis=(0, 2))
    expected = 2 * 1.96 * means.std() / math.sqrt(len(means))
    assert 0.6 * expected < width(interval(spread)) < 1.2 * expected


def test_cases_of_their_own_for_each_seed():
    """Another validation part per seed: what a seed did not score is NaN there."""
    scores = np.full((2, 6, 1), np.nan)
    scores[0, :3], scores[1, 3:] = 0.25, 0.75
    estimate = interval(scores)
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.25, 0.75)


def test_organs_that_are_missing():
    scores = simulated(6, num_organs=3, noise=0.1)
    scores[:, :, 1] = np.nan  # held by no case
    scores[:, 1:, 2] = np.nan  # held by one case: resamples without it have no such organ
    estimate = interval(scores)
    assert estimate.low < estimate.mean < estimate.high
    assert estimate.mean == pytest.approx(seed_means(scores[:, :, [0, 2]]).mean())
    nothing = interval(np.full((2, 3, 4), np.nan))
    assert all(math.isnan(v) for v in (nothing.mean, nothing.low, nothing.high))


def test_one_side_without_a_score_leaves_the_pair_out():
    baseline, better = np.zeros((1, 2, 1)), np.ones((1, 2, 1)) / 2
    better[0, 1] = np.nan
    estimate = paired_difference(better, baseline)
    assert estimate.mean == 0.5
    assert math.isnan(estimate.low)  # one case says nothing of others
    assert math.isnan(estimate.high)


@pytest.mark.parametrize(("effects", "least"), [({"cases": 0.1, "noise": 0.03}, 0.88), ({"seeds": 0.1}, 0.55)])
def test_simulated_true_values_are_covered(effects, least):
    """As the module says: well where cases differ, less where three seeds alone do."""
    estimates = [interval(simulated(i, **effects), num_resamples=300, seed=i) for i in range(150)]
    covered = np.mean([e.low <= 0.5 <= e.high for e in estimates])
    assert least <= covered < 1


def test_the_same_numbers_every_time():
    scores = simulated(7, noise=0.1)
    assert interval(scores, **FEW) == interval(scores, **FEW)
    assert interval(scores, **FEW) != interval(scores, seed=1, **FEW)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(seeds, cases, organs\), got shape \(2, 3\)"):
        interval(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="same seeds, cases and organs"):
        paired_difference(np.zeros((1, 3, 2)), np.zeros((1, 1, 2)))


def test_many_cases_are_resampled_less_often():
    assert num_resamples(100) == 10_000
    assert num_resamples(4000) == 2500
    assert num_resamples(10**9) == 1000
    assert num_resamples(0) == 10_000
