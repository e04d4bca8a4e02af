"""Borders of packed patches: voxels of the neighbours around each, copied from their patches or from a dense map.

Shapes: b batch, c channels, *size voxels per axis, p visible patches of the whole batch, *edges voxels per axis of a
patch at a resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hyspark.models.masking.patches import Patches

Widths = tuple[tuple[int, ...], tuple[int, ...]]
"""Widths of a border: voxels before and after each axis."""


class Border(torch.autograd.Function):
    """`Patches.with_border`; its gradient adds the gradient of each border voxel to the voxel that was copied."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, target: Tensor, source: Tensor, widths: Widths, value: float) -> Tensor:
        ctx.save_for_backward(target, source)
        ctx.widths = widths
        return add_border(patches, target, source, widths, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        target, source = ctx.saved_tensors
        return add_border_gradient(gradient, target, source, ctx.widths), None, None, None, None


def add_border(patches: Tensor, target: Tensor, source: Tensor, widths: Widths, value: float = 0.0) -> Tensor:
    """Add a border to patches, see `Patches.with_border`; target and source as of `index_border`."""
    inside = patches.movedim(1, -1)
    p, *edges, c = inside.shape
    size = [b + edge + a for b, edge, a in zip(widths[0], edges, widths[1], strict=True)]
    out = patches.new_full((p, *size, c), value)
    out[interior(edges, widths)] = inside
    out.view(-1, c).index_copy_(0, target, inside.reshape(-1, c).index_select(0, source))
    return out.movedim(-1, 1)


def add_border_gradient(gradient: Tensor, target: Tensor, source: Tensor, widths: Widths) -> Tensor:
    """Compute the gradient of the patches from that of patches with border, the adjoint of `add_border`."""
    padded = gradient.movedim(1, -1)
    c = padded.shape[-1]
    edges = [size - b - a for size, b, a in zip(padded.shape[1:-1], *widths, strict=True)]
    out = padded[interior(edges, widths)].contiguous()
    out.view(-1, c).index_add_(0, source, padded.reshape(-1, c).index_select(0, target))
    return out.movedim(-1, 1)


def interior(edges: Sequence[int], widths: Widths) -> tuple[slice, ...]:
    """Return the index of patches (p, *edges, ...) within patches with border."""
    return (slice(None), *(slice(b, b + edge) for b, edge in zip(widths[0], edges, strict=True)))


def pack_with_border(x: Tensor, patches: Patches, widths: int | Widths, value: float = 0.0) -> Tensor:
    """Select patches of a dense map with the voxels around them: (b, c, *size) -> (p, c, *(edges + before + after)).

    Args:
        x: the dense map.
        patches: geometry of the patches.
        widths: of the border, of any size; one number for all sides.
        value: value of voxels outside of the map.
    """
    if isinstance(widths, int):
        widths = ((widths,) * patches.axes,) * 2
    edges = [s // g for s, g in zip(x.shape[2:], patches.grid, strict=True)]
    pairs = [width for pair in zip(*map(reversed, widths), strict=True) for width in pair]  # last axis first
    padded = F.pad(x, pairs, value=value).movedim(1, -1)
    size = padded.shape[1:-1]
    outer = [b + edge + a for b, edge, a in zip(widths[0], edges, widths[1], strict=True)]
    steps = [math.prod(size[axis + 1 :]) for axis in range(patches.axes)]
    sample, *corner = patches.position
    rows = sample * math.prod(size)
    for at, edge, step in zip(corner, edges, steps, strict=True):
        rows = rows + at * (edge * step)
    for count, step in zip(outer, steps, strict=True):
        rows = rows[..., None] + torch.arange(count, device=rows.device) * step
    picked = padded.reshape(-1, x.shape[1]).index_select(0, rows.flatten())
    return picked.view(len(sample), *outer, x.shape[1]).movedim(-1, 1)


@lru_cache
def border_shell(edges: tuple[int, ...], widths: Widths) -> tuple[Tensor, Tensor, Tensor]:
    """List the voxels of the border of a patch.

    Returns:
        Three int64 (s,), one entry per voxel: the row within the patch with border, the direction of the neighbour,
        and the row within that neighbour.
    """
    axes = [torch.arange(-b, edge + a) for edge, b, a in zip(edges, *widths, strict=True)]
    position = torch.cartesian_prod(*axes).view(-1, len(edges))
    size = torch.tensor(edges)
    step, voxel = position.div(size, rounding_mode="floor"), position % size
    outside = (step != 0).any(1).nonzero()[:, 0]
    return outside, flat_index(step + 1, (3,) * len(edges))[outside], flat_index(voxel, edges)[outside]


def flat_index(position: Tensor, shape: Sequence[int]) -> Tensor:
    """Compute the row-major index of positions (k, axes) in an array of a shape: (k,)."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return (position * torch.tensor(strides)).sum(1)


def index_border(neighbours: Tensor, edges: tuple[int, ...], widths: Widths) -> tuple[Tensor, Tensor]:
    """List the source voxel of each border voxel of all patches; border voxels without a source are absent.

    Args:
        neighbours: int64 (p, 3^axes), see `index_neighbours`.
        edges: voxels per axis of a patch.
        widths: of the border, each at most the edge.

    Returns:
        Two int64 (k,): target rows among the voxels of the p patches with border, and source rows among those of the
        patches without.
    """
    row, direction, voxel = (index.to(neighbours.device) for index in border_shell(edges, widths))
    owner = neighbours[:, direction]  # (p, s)
    exists = owner >= 0
    with_border = math.prod(edge + b + a for edge, b, a in zip(edges, *widths, strict=True))
    target = torch.arange(len(owner), device=owner.device)[:, None] * with_border + row
    return target[exists], (owner * math.prod(edges) + voxel)[exists]
