"""Pooled vectors against plain torch: the mean over a region's voxels, by windows, padded, in batches."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyspark.data.intensity import LinearMap
from hyspark.evaluation.embedding.pooling import axis_tiles, counted_voxels, plan_windows, pool_regions
from hyspark.evaluation.embedding.regions import Region, all_of, grid_regions
from tests.evaluation.embedding.small import small_encoder

CPU = torch.device("cpu")
UNIT = (16, 16, 16)


class Local(nn.Module):
    """An encoder without context: block means of the input and of its square, at strides 1, 2 and 4."""

    def forward(self, x):
        both = torch.cat([x, x.square()], 1)
        return [both, F.avg_pool3d(both, 2), F.avg_pool3d(both, 4)]


def noise(*shape):
    return np.random.default_rng(5).random(shape, np.float32)


def pooled(encoder, image, regions, *, window=(32, 32, 32), unit=UNIT, is_shared=False, **options):
    options = {"stages": (1, 2, 3), "pooling": "mean", "batch_size": 3} | options
    windows = plan_windows(regions, image.shape[1:], window, unit, is_shared=is_shared)
    return pool_regions(encoder, image, options.pop("maps", [None]), regions, windows, device=CPU, **options)


def repeated_mean(maps, mask):
    """The mean over the voxels of a mask of each map, enlarged to voxels by repetition."""
    means = []
    for features in maps:
        for axis in (1, 2, 3):
            features = features.repeat_interleave(mask.shape[axis - 1] // features.shape[axis], axis)
        means.append(features[:, torch.from_numpy(mask)].mean(1))
    return torch.cat(means).numpy()


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_region_in_one_window_is_pooled_as_in_plain_torch(pooling):
    image, encoder = noise(1, 40, 36, 50), small_encoder()
    rng = np.random.default_rng(0)
    region = Region("r", (11, 7, 20), rng.random((9, 14, 5)) < 0.4)
    found = pooled(encoder, image, [region], stages=(1, 2, 3, 4, 5), pooling=pooling)
    start = [11 - (32 - 9) // 2, 0, 20 - (32 - 5) // 2]  # its middle in that of the window, as far as the volume goes
    start[0], start[2] = max(start[0], 0), min(start[2], 50 - 32)
    window = tuple(slice(a, a + 32) for a in start)
    mask = np.zeros(image.shape[1:], bool)
    mask[11:20, 7:21, 20:25] = region.mask
    with torch.no_grad():
        maps = [x[0] for x in encoder(torch.from_numpy(image[(slice(None), *window)].copy())[None])]
    if pooling == "mean":
        expected = repeated_mean(maps, mask[window])
    else:
        at = np.argwhere(mask[window])
        expected = np.concatenate([x[(slice(None), *(at // (32 // x.shape[1])).T)].amax(1).numpy() for x in maps])
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_enter_the_mean():
    image = noise(1, 11, 9, 5) + 1  # far from the padding's 0
    region = Region("volume", (0, 0, 0), all_of((11, 9, 5)))
    (found,) = pooled(Local(), image, [region], stages=(1,))
    np.testing.assert_allclose(found, [image.mean(), np.square(image).mean()], rtol=1e-5)
    (window,) = plan_windows([region], (11, 9, 5), (32, 32, 32), UNIT)
    assert window.size == (16, 16, 16)  # no larger than needed
    assert window.start == (-2, -3, -5)
    encoder = small_encoder()
    padded = np.zeros((1, 16, 16, 16), np.float32)
    padded[:, 2:13, 3:12, 5:10] = image
    mask = np.zeros((16, 16, 16), bool)
    mask[2:13, 3:12, 5:10] = True
    with torch.no_grad():
        maps = [x[0] for x in encoder(torch.from_numpy(padded)[None])]
    (found,) = pooled(encoder, image, [region], stages=(1, 2, 3, 4, 5))
    np.testing.assert_allclose(found, repeated_mean(maps, mask), rtol=1e-4, atol=1e-5)


def test_padding_is_the_lowest_value_that_the_network_sees():
    image = noise(1, 4, 4, 4)
    region = Region("volume", (0, 0, 0), all_of((4, 4, 4)))
    seen = []

    class Seeing(Local):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    pooled(Seeing(), image, [region], maps=[LinearMap(2.0, -5.0)])
    assert seen[0].min() == seen[0][0, 0, 0, 0, 0] == -5
    np.testing.assert_allclose(seen[0][0, 0, 6:10, 6:10, 6:10], 2 * image[0] - 5, rtol=1e-6)


@pytest.mark.parametrize("shape", [(70, 33, 20), (32, 64, 96), (7, 100, 31)])
def test_windows_do_not_change_what_has_no_context(shape):
    image = noise(1, *shape)
    regions = [Region("volume", (0, 0, 0), all_of(shape)), Region("part", (1, 2, 3), all_of((5, 30, 9)))]
    for pooling, whole in (("mean", np.mean), ("max", np.max)):
        found = pooled(Local(), image, regions, stages=(1,), pooling=pooling)
        for vector, box in zip(found, (image[0], image[0, 1:6, 2:32, 3:12]), strict=True):
            np.testing.assert_allclose(vector, [whole(box), whole(np.square(box))], rtol=1e-5)
    aligned = [Region("volume", (0, 0, 0), all_of((32, 64, 96)))]
    image = noise(1, 32, 64, 96)
    by_window = [pooled(Local(), image, aligned, window=w) for w in ((16, 16, 16), (32, 32, 48), (32, 64, 96))]
    np.testing.assert_allclose(by_window[0], by_window[1], rtol=1e-5)
    np.testing.assert_allclose(by_window[0], by_window[2], rtol=1e-5)


def test_the_batch_size_does_not_matter():
    image, encoder = noise(1, 40, 38, 30), small_encoder()
    regions = [Region("volume", (0, 0, 0), all_of((40, 38, 30))), Region("part", (30, 3, 3), all_of((4, 30, 9)))]
    one, three, many = (pooled(encoder, image, regions, stages=(1, 5), batch_size=n) for n in (1, 3, 50))
    np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-6)


def test_cells_of_a_grid_are_pooled_from_shared_windows():
    image = noise(1, 45, 40, 21) + 0.1
    regions = list(grid_regions(image, np.diag([2.0, 2, 3, 1]), 18.0))
    assert [region.mask.shape for region in regions[:2]] == [(9, 9, 6), (9, 9, 6)]
    windows = plan_windows(regions, image.shape[1:], (32, 32, 32), UNIT, is_shared=True)
    assert len(windows) == 4
    found = pooled(Local(), image, regions, stages=(1,), is_shared=True)
    cells = [
        image[0, a : a + 9, b : b + 9, c : c + 6]
        for a, b, c in itertools.product(range(0, 45, 9), range(0, 40, 9), range(0, 21, 6))
    ]
    assert [region.name for region in regions] == [
        f"cell_{a}_{b}_{c}" for a, b, c in itertools.product(range(5), range(5), range(4))
    ]
    np.testing.assert_allclose(found, [[cell.mean(), np.square(cell).mean()] for cell in cells], rtol=1e-5)
    total = np.sum([counted_voxels(region, one).sum() for one in windows for region in regions])
    assert total == image[0].size


@pytest.mark.parametrize(
    ("start", "stop", "length"), [(0, 100, 100), (3, 40, 50), (90, 100, 100), (0, 5, 5), (2, 99, 99)]
)
def test_each_voxel_of_an_axis_counts_once_and_lies_in_its_window(start, stop, length):
    found = axis_tiles(start, stop, length, 32, 16)
    counted = [voxel for _, _, first, last in found for voxel in range(first, last)]
    assert counted == list(range(start, stop))
    for first, size, own_start, own_stop in found:
        assert first <= own_start < own_stop <= first + size
        assert size % 16 == 0
        assert length < size or 0 <= first <= length - size  # no padding where the volume is large enough


def test_features_that_are_no_numbers_are_refused():
    class Broken(Local):
        def forward(self, x):
            return [x * np.nan]

    with pytest.raises(ValueError, match="NaN or infinity; check its weights"):
        pooled(Broken(), noise(1, 16, 16, 16), [Region("r", (0, 0, 0), all_of((4, 4, 4)))], stages=(1,))
