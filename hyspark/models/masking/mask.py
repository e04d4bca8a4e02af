"""Masks: which patches the encoder sees, and the mask at each resolution.

A mask unit is one patch. Its edge is 16 voxels (`PATCH`) for HySparK, where it is also one transformer token. For other
networks the edge is their total stride, which may differ by axis, or another one of the user's. One polarity
everywhere: `visible` is True where the encoder sees. All functions work for any number of spatial axes.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis (grid = size / patch), n = prod(grid)
patches.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from hyspark.models.defaults import PATCH, Edges, edges_per_axis, grid_of


def num_visible(grid: Sequence[int], mask_ratio: float) -> int:
    """Compute the number of visible patches per sample: round(n * (1 - ratio)), at least 1."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask ratio: expected at least 0 and below 1, got {mask_ratio}")
    return max(1, round(math.prod(grid) * (1 - mask_ratio)))


def draw_visible(grid: Sequence[int], mask_ratio: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw the visible patches of each sample, all subsets of one size being equally likely.

    Args:
        grid: patches per axis.
        mask_ratio: fraction of hidden patches.
        generators: a CPU generator for each sample, so that its mask does not depend on the rest of the batch.

    Returns:
        bool (b, 1, *grid) on the CPU, b = len(generators), with `num_visible` True values in each sample.
    """
    num = num_visible(grid, mask_ratio)
    visible = torch.zeros(len(generators), math.prod(grid), dtype=torch.bool)
    for row, generator in zip(visible, generators, strict=True):
        row[torch.randperm(len(row), generator=generator)[:num]] = True
    return visible.view(len(generators), 1, *grid)


def visible_at(visible: Tensor, size: Sequence[int]) -> Tensor:
    """Compute a mask at a resolution: each patch is repeated over its positions.

    A position that covers several patches is visible where any of them is.

    Args:
        visible: bool (b, 1, *grid).
        size: positions per axis of the feature map.

    Returns:
        bool (b, 1, *size).

    Raises:
        ValueError: an axis of `size` is neither a multiple nor a divisor of the grid's.
    """
    grid = visible.shape[2:]
    if len(grid) != len(size) or any(max(s, g) % min(s, g) for s, g in zip(size, grid, strict=True)):
        raise ValueError(f"a mask over {tuple(grid)} patches does not divide a feature map of {tuple(size)}")
    for axis, (s, g) in enumerate(zip(size, grid, strict=True), start=2):
        if s < g:
            visible = visible.unflatten(axis, (s, g // s)).any(axis + 1)
        else:
            visible = visible.repeat_interleave(s // g, dim=axis)
    return visible


def patchify(volumes: Tensor, patch: Edges = PATCH) -> Tensor:
    """Cut volumes into patches: (b, c, *size) -> (b, n, c * prod(patch)), patches in row-major order of the grid."""
    axes = "hwd"[: volumes.ndim - 2] if volumes.ndim <= 5 else None
    if axes is None:
        raise ValueError(f"expected up to three spatial axes, got a tensor of shape {tuple(volumes.shape)}")
    edges = edges_per_axis(patch, len(axes), "patch")
    grid_of(volumes.shape[2:], edges)
    outer = " ".join(f"({a} p{a})" for a in axes)
    inner = " ".join(f"p{a}" for a in axes)
    pattern = f"b c {outer} -> b ({' '.join(axes)}) ({inner} c)"
    return rearrange(volumes, pattern, **{f"p{a}": edge for a, edge in zip(axes, edges, strict=True)})


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Edges = PATCH) -> Tensor:
    """Join patches into volumes, the inverse of `patchify`: (b, n, c * prod(patch)) -> (b, c, *size)."""
    axes = "hwd"[: len(grid)]
    outer = " ".join(f"({a} p{a})" for a in axes)
    inner = " ".join(f"p{a}" for a in axes)
    pattern = f"b ({' '.join(axes)}) ({inner} c) -> b c {outer}"
    edges = edges_per_axis(patch, len(grid), "patch")
    sizes = dict(zip(axes, grid, strict=True)) | {f"p{a}": edge for a, edge in zip(axes, edges, strict=True)}
    return rearrange(patches, pattern, **sizes)
