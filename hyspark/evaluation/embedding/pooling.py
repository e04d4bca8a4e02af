"""Vectors of regions: maps of windows, pooled over the voxels of a region at the resolution of each stage.

A position of a map stands for the voxels of its stride. In the mean it counts by how many of these are in the region,
in the maximum if any is. So the mean is that over the region's voxels of the map, enlarged to voxels by repetition, and
padding never enters it. Each voxel of a region counts in one window.

Shapes: c channels, (h, w, d) voxels of the prepared volume, *size voxels of a window, *grid positions of a map.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.data.intensity import LinearMap, to_input
from hyspark.evaluation.embedding.regions import Region

Pooling = Literal["mean", "max"]


class PooledWindow(NamedTuple):
    """A window of a volume.

    Attributes:
        start: Its first voxel; below 0 where it is padded.
        size: Its voxels per axis.
        own_start: First voxel that counts in this window.
        own_stop: One past the last.
        regions: Indices of the regions that are pooled from it.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    own_start: tuple[int, ...]
    own_stop: tuple[int, ...]
    regions: tuple[int, ...]


def plan_windows(
    regions: Sequence[Region],
    shape: Sequence[int],
    window: Sequence[int],
    unit: Sequence[int],
    *,
    is_shared: bool = False,
) -> list[PooledWindow]:
    """Plan windows of one size that cover regions: around each region its own, or shared ones over all.

    A region that fits a window lies in its middle, as far as the volume reaches; a larger one is tiled. In a volume
    that is smaller than the window, the window is the least multiple of the unit that holds the volume.

    Args:
        regions: The regions.
        shape: (h, w, d) of the volume.
        window: Voxels per axis of a window.
        unit: Edges that windows are multiples of.
        is_shared: Whether the windows are shared.
    """
    if not is_shared:
        return [
            one
            for index, region in enumerate(regions)
            for one in tiles(region.start, region.stop, shape, window, unit, (index,))
        ]
    start = np.min([region.start for region in regions], axis=0).tolist()
    stop = np.max([region.stop for region in regions], axis=0).tolist()
    planned = []
    for one in tiles(start, stop, shape, window, unit, ()):
        inside = tuple(
            index
            for index, region in enumerate(regions)
            if all(
                a < own_b and b > own_a
                for a, b, own_a, own_b in zip(region.start, region.stop, one.own_start, one.own_stop, strict=True)
            )
        )
        planned.append(one._replace(regions=inside))
    return planned


def tiles(
    start: Sequence[int],
    stop: Sequence[int],
    shape: Sequence[int],
    window: Sequence[int],
    unit: Sequence[int],
    regions: tuple[int, ...],
) -> Iterator[PooledWindow]:
    """Yield the windows that cover a box, each voxel of which counts in one of them."""
    axes = [axis_tiles(*numbers) for numbers in zip(start, stop, shape, window, unit, strict=True)]
    for parts in product(*axes):
        first, size, own_start, own_stop = zip(*parts, strict=True)
        yield PooledWindow(first, size, own_start, own_stop, regions)


def axis_tiles(start: int, stop: int, length: int, edge: int, unit: int) -> list[tuple[int, int, int, int]]:
    """Cover an interval of an axis: first voxel, size, first and last own voxel of each window.

    Args:
        start: First voxel of the interval.
        stop: One past its last.
        length: Voxels of the volume.
        edge: Voxels of a window.
        unit: Number that the size is a multiple of.
    """
    size = min(edge, unit * math.ceil(length / unit))
    if stop - start <= size:
        centred = start - (size - (stop - start)) // 2
        first = min(max(centred, 0), length - size) if length >= size else -((size - length) // 2)
        return [(first, size, start, stop)]
    return [(min(own, stop - size), size, own, min(own + size, stop)) for own in range(start, stop, size)]


def cut_window(image: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Cut a window out of a volume (c, h, w, d), 0 beyond it."""
    cut = np.zeros((len(image), *size), np.float32)
    low = [max(a, 0) for a in start]
    high = [min(a + n, length) for a, n, length in zip(start, size, image.shape[1:], strict=True)]
    to = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    of = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    cut[:, to[0], to[1], to[2]] = image[:, of[0], of[1], of[2]]
    return cut


def counted_voxels(region: Region, window: PooledWindow) -> np.ndarray:
    """Return which voxels of a window count for a region, float32 (*size)."""
    counted = np.zeros(window.size, np.float32)
    low = np.maximum(region.start, window.own_start)
    high = np.minimum(region.stop, window.own_stop)
    if (low < high).all():
        to = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, window.start, strict=True))
        of = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, region.start, strict=True))
        counted[to] = region.mask[of]
    return counted


@torch.no_grad()
def pool_regions(
    encoder: nn.Module,
    image: np.ndarray,
    maps: Sequence[LinearMap | None],
    regions: Sequence[Region],
    windows: Sequence[PooledWindow],
    *,
    stages: Sequence[int],
    pooling: Pooling,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Compute the vectors of regions.

    Args:
        encoder: In evaluation mode, on `device`: (b, c, *size) -> maps, finest first.
        image: (c, h, w, d), fractions in [0, 1].
        maps: Of each channel, from fractions to the encoder's input, or None.
        regions: The regions.
        windows: Windows of one size that cover them, see `plan_windows`.
        stages: Numbers of the maps, from 1, the finest.
        pooling: "mean" or "max".
        batch_size: Windows in one forward pass.
        device: Device of the forward passes.

    Returns:
        float32 (regions, sum of c), the stages side by side.

    Raises:
        ValueError: A vector is not finite.
    """
    pooled: list[list[Tensor | None]] = [[None] * len(stages) for _ in regions]
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        crops = torch.from_numpy(np.stack([cut_window(image, one.start, one.size) for one in batch]))
        found = encoder(to_input(crops, maps, axis=1).to(device))
        for number, window in enumerate(batch):
            chosen = [found[stage - 1][number].float() for stage in stages]
            for index in window.regions:
                add_window_to_region(pooled[index], chosen, counted_voxels(regions[index], window), pooling)
    num_voxels = [int(np.count_nonzero(region.mask)) if pooling == "mean" else 1 for region in regions]
    vectors = []
    for parts, num in zip(pooled, num_voxels, strict=True):
        vectors.append(torch.cat([part for part in parts if part is not None]).div(num).float())
    result: np.ndarray = torch.stack(vectors).numpy()
    if not np.isfinite(result).all():
        raise ValueError("the network's features hold NaN or infinity; check its weights")
    return result


def add_window_to_region(
    pooled: list[Tensor | None], maps: Sequence[Tensor], counted: np.ndarray, pooling: Pooling
) -> None:
    """Add the maps of a window to the sums or maxima of a region, float64 (c,), a map each.

    Args:
        pooled: Sums or maxima of the windows before, in place; None before the first.
        maps: Maps (c, *grid) of the window.
        counted: float32 (*size), the voxels that count.
        pooling: "mean" or "max".
    """
    if not counted.any():
        return
    voxels = torch.from_numpy(counted)[None]
    for number, features in enumerate(maps):
        stride = [n // m for n, m in zip(counted.shape, features.shape[1:], strict=True)]
        weights = F.avg_pool3d(voxels, stride)[0].flatten().to(features.device)
        known = pooled[number]
        if pooling == "mean":
            found = (features.flatten(1).double() @ weights.double()).cpu() * math.prod(stride)
            pooled[number] = found if known is None else known + found
        else:
            found = features.flatten(1)[:, weights > 0].amax(1).double().cpu()
            pooled[number] = found if known is None else torch.maximum(known, found)
