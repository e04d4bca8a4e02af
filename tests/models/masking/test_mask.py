"""Masks have the promised count and polarity, and mean the same at every resolution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyspark.models.defaults import PATCH, grid_of
from hyspark.models.masking.mask import draw_visible, num_visible, patchify, unpatchify, visible_at

GRIDS = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
SMALL_GRIDS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
RATIOS = st.floats(0, 1, exclude_max=True)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@settings(deadline=None)
@given(grid=GRIDS, ratio=RATIOS, num_samples=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_every_sample_has_the_exact_number_of_visible_patches(grid, ratio, num_samples, seed):
    visible = draw_visible(grid, ratio, generators(*range(seed, seed + num_samples)))
    assert visible.dtype == torch.bool
    assert visible.shape == (num_samples, 1, *grid)
    expected = max(1, round(math.prod(grid) * (1 - ratio)))
    assert visible.flatten(1).sum(1).tolist() == [expected] * num_samples
    assert num_visible(grid, ratio) == expected


def test_the_ratio_is_the_hidden_share():
    assert num_visible((6, 6, 6), 0.75) == 54
    assert num_visible((6, 6, 6), 0.25) == 162
    assert num_visible((6, 6, 6), 0) == 216
    assert num_visible((2, 3), 0.5) == 3


@settings(deadline=None)
@given(grid=GRIDS, ratio=RATIOS, seed=st.integers(0, 2**40))
def test_a_mask_depends_on_its_generator_alone(grid, ratio, seed):
    alone = draw_visible(grid, ratio, generators(seed))
    in_a_batch = draw_visible(grid, ratio, generators(seed + 1, seed, seed + 2))
    assert torch.equal(in_a_batch[1:2], alone)


def test_generators_differ_and_continue():
    masks = draw_visible((6, 6, 6), 0.75, generators(*range(20)))
    assert len({mask.numpy().tobytes() for mask in masks}) == 20
    one = torch.Generator().manual_seed(0)
    first, second = (draw_visible((6, 6, 6), 0.75, [one]) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw_visible((6, 6, 6), 0.75, generators(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_patches_are_visible_equally_often_and_in_all_combinations():
    num_draws = 4000
    masks = draw_visible((2, 3), 0.5, generators(*range(num_draws))).flatten(1)
    share = masks.double().mean(0)
    deviation = math.sqrt(0.25 / num_draws)
    assert (share - 0.5).abs().max() < 5 * deviation
    subsets = torch.unique(masks, dim=0, return_counts=True)[1]
    expected = num_draws / math.comb(6, 3)
    assert len(subsets) == math.comb(6, 3)
    assert (subsets - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio: expected at least 0 and below 1"):
        draw_visible((2, 2), ratio, generators(0))


def test_grid_of():
    assert grid_of((96, 96, 96)) == (6, 6, 6)
    assert grid_of((32, 16)) == (2, 1)


@pytest.mark.parametrize(
    ("size", "nearest"), [((96, 100, 96), "(96, 96, 96)"), ((0, 16), "(16, 16)"), ((8,), "(16,)"), ((31,), "(32,)")]
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(size, nearest):
    with pytest.raises(ValueError, match="multiple of 16") as error:
        grid_of(size)
    assert str(size) in str(error.value)
    assert nearest in str(error.value)


@settings(deadline=None)
@given(grid=SMALL_GRIDS, scale=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_visible_at_repeats_each_patch_over_its_voxels(grid, scale, seed):
    visible = draw_visible(grid, 0.5, generators(seed, seed + 1))
    fine = visible_at(visible, tuple(g * scale for g in grid))
    assert fine.dtype == torch.bool
    assert fine.shape == (2, 1, *(g * scale for g in grid))
    patch_of = tuple(axis // scale for axis in np.indices(fine.shape[2:]))
    np.testing.assert_array_equal(fine[:, 0].numpy(), visible[:, 0].numpy()[(slice(None), *patch_of)])


def test_visible_at_may_scale_axes_differently():
    visible = torch.tensor([[True, False]]).view(1, 1, 1, 2)
    assert visible_at(visible, (3, 4)).long().tolist() == [[[[1, 1, 0, 0]] * 3]]


def test_a_position_of_several_patches_is_visible_where_any_is():
    visible = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool).view(1, 1, 4, 4)
    assert visible_at(visible, (2, 2)).long().tolist() == [[[[0, 1], [1, 0]]]]
    assert visible_at(visible, (2, 8)).long().tolist() == [[[[0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]]]
    assert visible_at(visible, (1, 1)).all()


@pytest.mark.parametrize("size", [(4, 5), (4,), (4, 4, 4), (3, 4)])
def test_visible_at_refuses_a_map_that_the_grid_does_not_divide(size):
    with pytest.raises(ValueError, match="does not divide") as error:
        visible_at(torch.ones(1, 1, 2, 2, dtype=torch.bool), size)
    assert str(size) in str(error.value)


@settings(deadline=None)
@given(grid=SMALL_GRIDS, num_samples=st.integers(1, 2))
def test_patches_go_back_where_they_came_from(grid, num_samples):
    volumes = torch.randn(num_samples, 1, *(g * PATCH for g in grid))
    patches = patchify(volumes)
    assert patches.shape == (num_samples, math.prod(grid), PATCH ** len(grid))
    assert torch.equal(unpatchify(patches, grid), volumes)


@pytest.mark.parametrize("grid", [(3,), (2, 3), (2, 1, 3)])
def test_patches_are_in_row_major_order(grid):
    """The order of `visible.flatten()`, and of the voxels within each patch."""
    size = tuple(g * PATCH for g in grid)
    volume = torch.arange(math.prod(size)).view(1, 1, *size)
    patches = patchify(volume)
    for number, corner in enumerate(np.ndindex(*grid)):
        where = tuple(slice(c * PATCH, (c + 1) * PATCH) for c in corner)
        assert torch.equal(patches[0, number], volume[(0, 0, *where)].flatten())


def test_patchify_keeps_the_channels_of_a_patch_together():
    volumes = torch.randn(1, 2, 32, 16)
    patches = patchify(volumes)
    assert patches.shape == (1, 2, 512)
    assert torch.equal(patches[0, 1].sort().values, volumes[0, :, 16:].flatten().sort().values)


@pytest.mark.parametrize(("patch", "grid"), [((2, 4), (3, 1)), ((1, 2, 3), (2, 1, 2))])
def test_patches_may_have_an_edge_per_axis(patch, grid):
    size = tuple(p * g for p, g in zip(patch, grid, strict=True))
    volume = torch.randn(2, 3, *size)
    patches = patchify(volume, patch)
    assert grid_of(size, patch) == grid
    assert patches.shape == (2, math.prod(grid), 3 * math.prod(patch))
    for number, corner in enumerate(np.ndindex(*grid)):
        where = tuple(slice(c * p, (c + 1) * p) for c, p in zip(corner, patch, strict=True))
        assert torch.equal(patches[0, number].sort().values, volume[(0, slice(None), *where)].flatten().sort().values)
    assert torch.equal(unpatchify(patches, grid, patch), volume)


def test_a_size_that_does_not_fit_a_patch_of_unequal_edges_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"multiple of \(4, 16\) voxels, axis by axis, got \(6, 40\); .* is \(8, 32\)"):
        grid_of((6, 40), (4, 16))
    with pytest.raises(ValueError, match=r"patch: expected one number, or 3, one per axis, got \(4, 16\)"):
        grid_of((8, 16, 16), (4, 16))


def test_patchify_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match="multiple of 16"):
        patchify(torch.zeros(1, 1, 16, 24))
    with pytest.raises(ValueError, match="three spatial axes"):
        patchify(torch.zeros(1, 1, 16, 16, 16, 16))
