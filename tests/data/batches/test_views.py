"""Views of crops: functions of their place in the run, of the sizes and within the ranges asked for."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hyspark.data.batches.crops import SliceSampling
from hyspark.data.batches.loader import Shard
from hyspark.data.batches.views import ValidationViews, ViewBatches, ViewRecipe, view_transform
from hyspark.data.datasets.datalist_json import read_datalist
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.data.seeds import rng_at
from hyspark.data.settings import PrepareSettings

AXIAL = ViewRecipe((32, 24), 0.6, 3, (0.5, 0.5, 0.0), SliceSampling(2))


@pytest.fixture(scope="module")
def volumes(phantoms):
    cases = read_datalist(phantoms / "dataset.json").training[:3]
    settings, store = PrepareSettings(spacing=(8.0, 8.0, 8.0)), phantoms / "prepared"
    assert not prepare_missing(cases, settings, store, num_workers=1)
    return stored_volumes(cases, settings, store)


def test_two_large_views_and_small_ones_of_half_the_size(volumes):
    views = AXIAL.draw(volumes[0], rng_at(0, "crop", 0))
    assert [tuple(view.shape) for view in views] == [(1, 32, 24)] * 2 + [(1, 16, 12)] * 3
    assert all(view.dtype == torch.float32 and 0 <= float(view.min()) < float(view.max()) <= 1 for view in views)
    assert not torch.equal(views[0], views[1])


def test_volumes_have_views_too(volumes):
    views = ViewRecipe((16, 16, 16), 0.5, 1, (0.5, 0.5, 0.5)).draw(volumes[0], rng_at(0, "crop", 0))
    assert [tuple(view.shape) for view in views] == [(1, 16, 16, 16)] * 2 + [(1, 8, 8, 8)]


def test_views_depend_on_their_place_alone(volumes):
    batches = ViewBatches(volumes, Shard(2), AXIAL, 2, seed=3)
    again = DataLoader(batches, batch_size=None, sampler=range(3), num_workers=2)
    for step, loaded in enumerate(again):
        assert loaded["cases"] == batches[step]["cases"]
        assert all(torch.equal(a, b) for a, b in zip(loaded["views"], batches[step]["views"], strict=True))
    assert not torch.equal(batches[0]["views"][0], batches[1]["views"][0])
    assert not torch.equal(batches[0]["views"][0], ViewBatches(volumes, Shard(2), AXIAL, 2, seed=4)[0]["views"][0])


def test_processes_share_the_global_batch(volumes):
    whole = ViewBatches(volumes, Shard(4), AXIAL, 1, seed=0)[5]
    parts = [ViewBatches(volumes, Shard(4, rank, 2), AXIAL, 1, seed=0)[5] for rank in range(2)]
    assert whole["cases"] == parts[0]["cases"] + parts[1]["cases"]
    for number, view in enumerate(whole["views"]):
        assert torch.equal(view, torch.cat([part["views"][number] for part in parts]))


def test_held_out_views_come_in_groups_and_stay_the_same(volumes):
    held_out = ValidationViews(volumes, AXIAL, 2, seed=0, together=2)
    assert len(held_out) == 2
    first, last = held_out[0], held_out[1]
    assert [len(view) for view in first["views"]] == [4] * 5
    assert last["cases"] == [volumes[2].name] * 2
    assert torch.equal(held_out[0]["views"][1], first["views"][1])


def test_a_flip_is_of_the_axis_of_the_volume_that_it_is_named_for():
    """A coronal slice has the volume's first and last axis."""
    image = torch.zeros(1, 16, 16)
    image[0, :4, :4] = 1
    recipe = ViewRecipe((16, 16), 1.0, 0, (0.0, 0.0, 1.0), SliceSampling(1))
    corner = np.array([recipe_corner(recipe, image, seed) for seed in range(5)])
    assert (corner == [0, 1]).all()


def recipe_corner(recipe, image, seed):
    """Which half of each axis the bright corner is in after the large view's transform."""
    flips = [p for axis, p in enumerate(recipe.flip_prob) if axis != recipe.slices.axis]
    view = view_transform(recipe.size, (1.0, 1.0), flips).set_random_state(seed)(image)[0]
    return [int(view[8:].sum() > view[:8].sum()), int(view[:, 8:].sum() > view[:, :8].sum())]


def test_the_shortest_edge_bounds_the_part_that_is_shown():
    """A ramp across the image: its span in the view is that of the part, give or take the window's width."""
    ramp = torch.linspace(0, 1, 64).repeat(64, 1)[None]
    spans = []
    for seed in range(20):
        view = view_transform((64, 64), (0.5, 0.5), []).set_random_state(seed)(ramp)
        spans.append(float(view.max() - view.min()))
    assert min(spans) > 0.5 * 0.7 - 0.05
    assert max(spans) < 0.5 * 1.3 + 0.05
