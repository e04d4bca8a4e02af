"""Geometry of visible patches, and convolutions on them: the fast path, in which a hidden voxel costs nothing.

A feature map with e voxels per patch and axis is stored as its p visible patches, (p, c, e, e, e), like a batch.
Pointwise layers, norms over channels and 2^n pooling then need nothing new. A 3^n convolution first gives each patch a
halo of one voxel from its neighbours, zero if a neighbour is hidden or outside, and then convolves without padding.
That equals computing every voxel and zeroing the hidden ones after each layer, to rounding.

`Patches` computes the positions and neighbours of the patches once per batch.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, n = prod(grid), p visible patches of the
whole batch (samples one after another, patches in row-major order), e edge of a patch at a resolution (16 voxels at
full resolution, then 8, 4, 2, 1).
Source of the equivalence: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023; the halo
is that of domain decomposition.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from hyspark.models.defaults import PATCH, Edges, grid_of
from hyspark.models.masking.mask import visible_at
from hyspark.models.recompute import recomputed

PATCH_EDGES = (16, 8, 4, 2, 1)
"""Voxels per axis of a patch at the five resolutions of the encoder."""
DENSE_EDGES = (1,)
"""Edges at which a convolution of the dense map, hidden positions included, is faster than one of patches with halo: a
halo is 27 times a patch of one voxel. Measured by benchmarks/networks.py (`stages`).
"""
CONV_FUNCTION = {2: F.conv2d, 3: F.conv3d}


class Patches:
    """Geometry of the visible patches of a batch.

    Args:
        visible: bool (b, 1, *units), True where the network sees; samples may have different numbers of patches.
        device: device of the index tensors; by default that of `visible`. They are computed on the device of `visible`:
            a mask on the CPU spares CUDA a synchronisation.
        grid: patches per axis, by default one for each mask unit. Each axis divides that of `visible`; a patch with a
            visible unit is visible.

    Raises:
        ValueError: a sample has no visible patch.
    """

    def __init__(self, visible: Tensor, device: torch.device | None = None, grid: Sequence[int] | None = None) -> None:
        device = visible.device if device is None else device
        self.visible = visible.to(device, non_blocking=True)
        if grid is not None:
            visible = visible_at(visible, grid)
        counts = visible.flatten(1).sum(1)
        self.counts: list[int] = counts.tolist()
        if min(self.counts) == 0:
            raise ValueError(f"mask: expected at least one visible patch in every sample, got {self.counts}")
        self.num_samples, _, *self.grid = visible.shape
        self.axes = len(self.grid)
        position = visible[:, 0].nonzero()  # (p, 1 + axes): sample, then position in the grid
        neighbours = index_neighbours(visible, position)
        self.position = [column.to(device, non_blocking=True) for column in position.unbind(1)]
        self.token = visible.flatten(1).nonzero()[:, 1].to(device, non_blocking=True)
        self.halos = {
            edge: tuple(index.to(device, non_blocking=True) for index in halo_indices(neighbours, edge))
            for edge in PATCH_EDGES
        }
        for index in itertools.chain(*self.halos.values()):
            maybe_mark_dynamic(index, 0)  # its length is the number of neighbours: torch.compile shall not recompile

    @property
    def are_divided(self) -> bool:
        """Whether patches are larger than mask units, so that a visible patch may be hidden in part."""
        return tuple(self.visible.shape[2:]) != tuple(self.grid)

    def pack(self, x: Tensor) -> Tensor:
        """Select the visible patches of a dense map: (b, c, *size) -> (p, c, *edges)."""
        return self.patch_view(x)[tuple(self.position)].movedim(-1, 1)

    def unpack(self, patches: Tensor, fill: Tensor | None = None) -> Tensor:
        """Scatter patches into a dense map: (p, c, *edges) -> (b, c, *size).

        Args:
            patches: the visible patches.
            fill: value (1, c, 1, ...) at hidden positions; None for zero.
        """
        size = [g * edge for g, edge in zip(self.grid, patches.shape[2:], strict=True)]
        shape = (self.num_samples, *size, patches.shape[1])
        if fill is None:
            dense = patches.new_zeros(shape).movedim(-1, 1)
        else:
            dense = fill.to(patches.dtype).movedim(1, -1).expand(shape).contiguous().movedim(-1, 1)
        self.patch_view(dense).index_put_(tuple(self.position), patches.movedim(1, -1))
        return dense

    def patch_view(self, x: Tensor) -> Tensor:
        """View a dense map by patches: (b, c, *size) -> (b, *grid, *edges, c), without a copy."""
        x = x.movedim(1, -1)
        for axis, g in enumerate(self.grid):
            x = x.unflatten(1 + 2 * axis, (g, -1))
        outer, inner = range(1, 2 * self.axes, 2), range(2, 2 * self.axes + 1, 2)
        return x.permute(0, *outer, *inner, 2 * self.axes + 1)

    def with_halo(self, patches: Tensor) -> Tensor:
        """Add a border of one voxel from the neighbours, or zero: (p, c, *edges) -> (p, c, *(edges + 2))."""
        out: Tensor = Halo.apply(patches, *self.halos[patches.shape[-1]])
        return out

    def tokens(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Arrange the patches of each sample as a sequence.

        Args:
            rows: one vector per patch, (p, c).

        Returns:
            Sequences (b, v, c), v the largest number of patches of a sample, and a mask for attention, bool
            (b, 1, 1, v), False at the padding of shorter sequences; None if all have the same length.
        """
        longest = max(self.counts)
        if min(self.counts) == longest:
            return rows.view(self.num_samples, longest, -1), None
        is_token = self.is_token(rows.device)
        padded = rows.new_zeros(*is_token.shape, rows.shape[-1])
        return padded.masked_scatter(is_token[..., None], rows), is_token[:, None, None]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Select one vector per patch from sequences, the inverse of `tokens`: (b, v, c) -> (p, c)."""
        if min(self.counts) == max(self.counts):
            return tokens.flatten(0, 1)
        return tokens[self.is_token(tokens.device)]

    def is_token(self, device: torch.device) -> Tensor:
        """Whether each entry of the padded sequences is a token: bool (b, v)."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(max(self.counts), device=device) < counts[:, None]


class Halo(torch.autograd.Function):
    """`Patches.with_halo`; its gradient adds the gradient of each halo voxel to the voxel that was copied."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, target: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(target, source)
        inside = patches.movedim(1, -1)
        p, *edges, c = inside.shape
        out = patches.new_zeros(p, *(edge + 2 for edge in edges), c)
        out[interior(len(edges))] = inside
        out.view(-1, c).index_copy_(0, target, inside.reshape(-1, c).index_select(0, source))
        return out.movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        target, source = ctx.saved_tensors
        padded = gradient.movedim(1, -1)
        c = padded.shape[-1]
        out = padded[interior(gradient.ndim - 2)].contiguous()
        out.view(-1, c).index_add_(0, source, padded.reshape(-1, c).index_select(0, target))
        return out.movedim(-1, 1), None, None


def interior(axes: int) -> tuple[slice, ...]:
    """Return the index of the interior within a border of one voxel; the batch axis comes first."""
    return (slice(None),) + (slice(1, -1),) * axes


def build_patches(volumes: Tensor, visible: Tensor, patch: Edges, packed: Edges | None = None) -> Patches:
    """Compute the geometry of a mask for volumes.

    Args:
        volumes: (b, c, *size).
        visible: bool (b, 1, *grid).
        patch: edge of a mask unit in voxels, one number or one per axis.
        packed: edge of a patch that is packed, a multiple of `patch`; by default the same.

    Raises:
        ValueError: the mask has another shape.
    """
    size = volumes.shape[2:]
    expected = (len(volumes), 1, *grid_of(size, patch))
    if tuple(visible.shape) != expected:
        raise ValueError(
            f"visible: expected bool {expected} for volumes of shape {tuple(volumes.shape)}, "
            f"got shape {tuple(visible.shape)}"
        )
    return Patches(visible, volumes.device, None if packed is None else grid_of(size, packed))


def index_neighbours(visible: Tensor, position: Tensor) -> Tensor:
    """Find the neighbouring patch in each direction.

    Args:
        visible: bool (b, 1, *grid).
        position: int64 (p, 1 + axes), sample and grid position of each patch.

    Returns:
        int64 (p, 3^axes), index of the neighbour, -1 if it is hidden or outside; directions in row-major order from
        (-1, ..., -1) to (1, ..., 1).
    """
    axes = position.shape[1] - 1
    b, _, *grid = visible.shape
    index = torch.full((b, *(g + 2 for g in grid)), -1, device=visible.device)
    index[interior(axes)][visible[:, 0]] = torch.arange(len(position), device=visible.device)
    sample, *columns = position.unbind(1)
    directions = itertools.product((0, 1, 2), repeat=axes)
    near = [(sample, *(p + d for p, d in zip(columns, step, strict=True))) for step in directions]
    return torch.stack([index[neighbour] for neighbour in near], 1)


@lru_cache
def halo_shell(edge: int, axes: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the voxels of the halo of a patch.

    Returns:
        Three int64 (s,), s = (edge + 2)^axes - edge^axes: the row within the patch with halo, the direction of the
        neighbour, and the row within that neighbour.
    """
    position = torch.cartesian_prod(*[torch.arange(-1, edge + 1)] * axes).view(-1, axes)
    step, voxel = position.div(edge, rounding_mode="floor"), position % edge

    def flat(position: Tensor, base: int) -> Tensor:
        return (position * torch.tensor([base ** (axes - 1 - a) for a in range(axes)])).sum(1)

    outside = (step != 0).any(1).nonzero()[:, 0]
    return outside, flat(step + 1, 3)[outside], flat(voxel, edge)[outside]


def halo_indices(neighbours: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """List the source voxel of each halo voxel of all patches; halo voxels without a source stay zero.

    Args:
        neighbours: int64 (p, 3^axes), see `index_neighbours`.
        edge: voxels per axis of a patch.

    Returns:
        Two int64 (k,): target rows among the p * (edge + 2)^axes voxels with halo, and source rows among the
        p * edge^axes voxels without.
    """
    axes = round(math.log(neighbours.shape[1], 3))
    row, direction, voxel = (index.to(neighbours.device) for index in halo_shell(edge, axes))
    owner = neighbours[:, direction]  # (p, s)
    exists = owner >= 0
    target = torch.arange(len(owner), device=owner.device)[:, None] * (edge + 2) ** axes + row
    return target[exists], (owner * edge**axes + voxel)[exists]


def same_conv(layer: nn.Module, x: Tensor, patches: Patches | None) -> Tensor:
    """Apply a 3^n convolution that preserves the size.

    Of packed patches only x is kept for the backward pass, not the larger patches with halo.

    Args:
        layer: the convolution.
        x: a dense map (b, c, *size), or packed patches (p, c, *edges).
        patches: geometry of packed patches; None for a dense map.
    """
    if patches is None:
        out: Tensor = layer(x)
        return out
    if x.shape[-1] in DENSE_EDGES:
        return patches.pack(layer(patches.unpack(x)))

    def convolve(x: Tensor) -> Tensor:
        conv: Any = CONV_FUNCTION[patches.axes]
        result: Tensor = conv(patches.with_halo(x), layer.weight, layer.bias, groups=layer.groups)
        return result

    out = recomputed(convolve, x)
    return out


assert PATCH_EDGES[0] == PATCH
