"""Visible patches only: the fast path of masking, in which a hidden voxel costs nothing.

A feature map of e voxels per patch and axis is held as its p visible patches, (p, c, e, e, e), as if they were a
batch: pointwise layers, norms over channels and 2^n pooling then need nothing new. A 3^n convolution first gives each
patch a halo of one voxel from its neighbours, zero where a neighbour is hidden or outside, and then convolves without
padding. That equals computing every voxel and zeroing the hidden ones after each layer, to rounding.

Where the patches lie and who their neighbours are is worked out once per batch, by `Patches`.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, n = prod(grid), p visible patches of the
whole batch (samples one after another, patches in row-major order), e edge of a patch at a resolution (16 voxels at
full resolution, then 8, 4, 2, 1).
Source of the equivalence: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023; the halo
is that of domain decomposition.
"""

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from hyspark.models.masking.mask import PATCH, grid_of
from hyspark.models.recompute import recomputed

PATCH_EDGES = (16, 8, 4, 2, 1)
"""Voxels per axis of a patch at the five resolutions of the encoder."""
DENSE_EDGES = (1,)
"""Edges at which a convolution of the dense map, hidden positions included, is faster than one of patches with halo: a
halo is 27 times a patch of one voxel. Measured by benchmarks/networks.py (`stages`), see docs/performance.md.
"""
CONV_FUNCTION = {2: F.conv2d, 3: F.conv3d}


class Patches:
    """Geometry of the visible patches of a batch.

    Args:
        visible: bool (b, 1, *grid), True where the network sees; samples may keep different numbers of patches.
        device: where the index tensors go; by default where `visible` is. They are worked out where `visible` is: a
            mask on the CPU spares CUDA a synchronisation.

    Raises ValueError where a sample keeps no patch.
    """

    def __init__(self, visible: Tensor, device: torch.device | None = None) -> None:
        device = visible.device if device is None else device
        counts = visible.flatten(1).sum(1)
        self.counts: list[int] = counts.tolist()
        if min(self.counts) == 0:
            raise ValueError(f"every sample must keep at least one patch, but they keep {self.counts}")
        self.num_samples, _, *self.grid = visible.shape
        self.axes = len(self.grid)
        place = visible[:, 0].nonzero()  # (p, 1 + axes): sample, then position in the grid
        neighbours = index_neighbours(visible, place)
        self.visible = visible.to(device, non_blocking=True)
        self.place = [column.to(device, non_blocking=True) for column in place.unbind(1)]
        self.token = visible.flatten(1).nonzero()[:, 1].to(device, non_blocking=True)
        self.halos = {
            edge: tuple(index.to(device, non_blocking=True) for index in halo_indices(neighbours, edge))
            for edge in PATCH_EDGES
        }
        for index in itertools.chain(*self.halos.values()):
            maybe_mark_dynamic(index, 0)  # as long as there are neighbours: torch.compile is not to start anew for it

    def pack(self, x: Tensor) -> Tensor:
        """The visible patches of a dense map: (b, c, *size) -> (p, c, *edges)."""
        return self.patch_view(x)[tuple(self.place)].movedim(-1, 1)

    def unpack(self, patches: Tensor, fill: Tensor | None = None) -> Tensor:
        """A dense map of the patches, with `fill` (1, c, 1, ...) at hidden positions, or zero: (p, c, *edges) -> (b, c,
        *size).
        """
        edge = patches.shape[-1]
        size = [g * edge for g in self.grid]
        shape = (self.num_samples, *size, patches.shape[1])
        if fill is None:
            dense = patches.new_zeros(shape).movedim(-1, 1)
        else:
            dense = fill.to(patches.dtype).movedim(1, -1).expand(shape).contiguous().movedim(-1, 1)
        self.patch_view(dense).index_put_(tuple(self.place), patches.movedim(1, -1))
        return dense

    def patch_view(self, x: Tensor) -> Tensor:
        """(b, c, *size) -> (b, *grid, *edges, c), without a copy."""
        x = x.movedim(1, -1)
        for axis, g in enumerate(self.grid):
            x = x.unflatten(1 + 2 * axis, (g, -1))
        outer, inner = range(1, 2 * self.axes, 2), range(2, 2 * self.axes + 1, 2)
        return x.permute(0, *outer, *inner, 2 * self.axes + 1)

    def with_halo(self, patches: Tensor) -> Tensor:
        """(p, c, *edges) -> (p, c, *(edges + 2)): one more voxel on each side, from the neighbours, or zero."""
        out: Tensor = Halo.apply(patches, *self.halos[patches.shape[-1]])
        return out

    def tokens(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The patches of each sample as a sequence: (p, c) -> (b, v, c), v the largest count, and where samples keep
        different numbers a mask for attention, bool (b, 1, 1, v), False at the padding behind the shorter ones.
        """
        longest = max(self.counts)
        if min(self.counts) == longest:
            return rows.view(self.num_samples, longest, -1), None
        is_token = self.token_slots(rows.device)
        padded = rows.new_zeros(*is_token.shape, rows.shape[-1])
        return padded.masked_scatter(is_token[..., None], rows), is_token[:, None, None]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`: (b, v, c) -> (p, c)."""
        if min(self.counts) == max(self.counts):
            return tokens.flatten(0, 1)
        return tokens[self.token_slots(tokens.device)]

    def token_slots(self, device: torch.device) -> Tensor:
        """Which places of the padded sequences hold a token: bool (b, v)."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(max(self.counts), device=device) < counts[:, None]


class Halo(torch.autograd.Function):
    """`Patches.with_halo`; its gradient adds what each neighbour got back to the voxel it came from."""

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
    """Index of what a border of one voxel surrounds, behind the batch axis."""
    return (slice(None),) + (slice(1, -1),) * axes


def build_patches(volumes: Tensor, visible: Tensor, patch: int) -> Patches:
    """Geometry of a mask for volumes (b, c, *size) and patches of this edge; raises ValueError for a mask of another
    shape.
    """
    expected = (len(volumes), 1, *grid_of(volumes.shape[2:], patch))
    if tuple(visible.shape) != expected:
        raise ValueError(
            f"visible must be bool {expected} for volumes of shape {tuple(volumes.shape)}, "
            f"but its shape is {tuple(visible.shape)}"
        )
    return Patches(visible, volumes.device)


def index_neighbours(visible: Tensor, place: Tensor) -> Tensor:
    """Which patch lies in each direction: int64 (p, 3^axes), -1 where it is hidden or outside; directions in
    row-major order from (-1, ..., -1) to (1, ..., 1).

    place: (p, 1 + axes), sample and position of each patch.
    """
    axes = place.shape[1] - 1
    b, _, *grid = visible.shape
    numbers = torch.full((b, *(g + 2 for g in grid)), -1, device=visible.device)
    numbers[interior(axes)][visible[:, 0]] = torch.arange(len(place), device=visible.device)
    sample, *position = place.unbind(1)
    directions = itertools.product((0, 1, 2), repeat=axes)
    near = [(sample, *(p + d for p, d in zip(position, step, strict=True))) for step in directions]
    return torch.stack([numbers[place] for place in near], 1)


@lru_cache
def halo_shell(edge: int, axes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The voxels around a patch: three int64 (s,), for each the row within the patch with halo, the direction of the
    neighbour it lies in, and the row within that neighbour; s = (edge + 2)^axes - edge^axes.
    """
    place = torch.cartesian_prod(*[torch.arange(-1, edge + 1)] * axes).view(-1, axes)
    step, voxel = place.div(edge, rounding_mode="floor"), place % edge

    def flat(position: Tensor, base: int) -> Tensor:
        return (position * torch.tensor([base ** (axes - 1 - a) for a in range(axes)])).sum(1)

    outside = (step != 0).any(1).nonzero()[:, 0]
    return outside, flat(step + 1, 3)[outside], flat(voxel, edge)[outside]


def halo_indices(neighbours: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """Which voxel goes where in the halos of all patches: int64 (k,) twice, the row among the p * (edge + 2)^axes with
    halo and the row among the p * edge^axes it comes from. What is not named stays zero.
    """
    axes = round(math.log(neighbours.shape[1], 3))
    row, direction, voxel = (index.to(neighbours.device) for index in halo_shell(edge, axes))
    owner = neighbours[:, direction]  # (p, s)
    exists = owner >= 0
    target = torch.arange(len(owner), device=owner.device)[:, None] * (edge + 2) ** axes + row
    return target[exists], (owner * edge**axes + voxel)[exists]


def same_conv(layer: nn.Module, x: Tensor, patches: Patches | None) -> Tensor:
    """A 3^n convolution that keeps the size: of a dense map (b, c, *size), or, given their geometry, of packed patches
    (p, c, *edges). Of the latter only x is kept for the backward pass, not the larger patches with halo.
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
