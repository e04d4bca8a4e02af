"""Geometry of visible patches: pack, unpack, and the border of each patch, copied from its neighbours.

A feature map is stored as its p visible patches, (p, c, *edges), like a batch. Pointwise layers then need nothing new.
A convolution first gives each patch a border from its neighbours, zero where a neighbour is hidden or outside, and
then convolves without padding. That equals computing every voxel and zeroing the hidden ones after each layer, to
rounding.

`Patches` computes the positions and neighbours of the patches once per batch, and each kind of border at its first use.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, n = prod(grid), p visible patches of the
whole batch (samples one after another, patches in row-major order), *edges voxels per axis of a patch at a resolution.
Source of the equivalence: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023; the border
is the halo of domain decomposition.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from hyspark.models.defaults import Edges, grid_of
from hyspark.models.masking.borders import Border, Widths, index_border
from hyspark.models.masking.mask import visible_at


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
        self.device = visible.device if device is None else device
        self.visible = visible.to(self.device, non_blocking=True)
        if grid is not None:
            visible = visible_at(visible, grid)
        counts = visible.flatten(1).sum(1)
        self.counts: list[int] = counts.tolist()
        if min(self.counts) == 0:
            raise ValueError(f"mask: expected at least one visible patch in every sample, got {self.counts}")
        self.num_samples, _, *self.grid = visible.shape
        self.axes = len(self.grid)
        position = visible[:, 0].nonzero()  # (p, 1 + axes): sample, then position in the grid
        self.neighbours = index_neighbours(visible, position)
        self.position = [column.to(self.device, non_blocking=True) for column in position.unbind(1)]
        self.token = visible.flatten(1).nonzero()[:, 1].to(self.device, non_blocking=True)
        self.borders: dict[tuple[tuple[int, ...], Widths], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.token)

    @property
    def are_equal_in_number(self) -> bool:
        """Whether all samples have the same number of visible patches."""
        return min(self.counts) == max(self.counts)

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

    def with_border(self, patches: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
        """Add voxels of the neighbours on both sides of each axis: (p, c, *edges) -> (p, c, *(edges + before + after)).

        Args:
            patches: the visible patches.
            before: number of voxels before each axis, at most the edge of a patch.
            after: number of voxels after each axis, at most the edge of a patch.
            value: value of voxels that are hidden or outside.
        """
        widths = (tuple(before), tuple(after))
        target, source = self.border_indices(tuple(patches.shape[2:]), widths)
        out: Tensor = Border.apply(patches, target, source, widths, value)
        return out

    def border_indices(self, edges: tuple[int, ...], widths: Widths) -> tuple[Tensor, Tensor]:
        """Return the target and source rows of a border, see `index_border`; computed once for each kind."""
        key = (edges, widths)
        if key not in self.borders:
            indices = [index.to(self.device, non_blocking=True) for index in index_border(self.neighbours, *key)]
            for index in indices:  # its length is the number of neighbours: torch.compile shall not recompile
                maybe_mark_dynamic(index, 0)
            self.borders[key] = (indices[0], indices[1])
        return self.borders[key]

    def tokens(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Arrange the patches of each sample as a sequence.

        Args:
            rows: one vector per patch, (p, c).

        Returns:
            Sequences (b, v, c), v the largest number of patches of a sample, and a mask for attention, bool
            (b, 1, 1, v), False at the padding of shorter sequences; None if all have the same length.
        """
        if self.are_equal_in_number:
            return rows.view(self.num_samples, self.counts[0], -1), None
        is_token = self.is_token(rows.device)
        padded = rows.new_zeros(*is_token.shape, rows.shape[-1])
        return padded.masked_scatter(is_token[..., None], rows), is_token[:, None, None]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Select one vector per patch from sequences, the inverse of `tokens`: (b, v, c) -> (p, c)."""
        if self.are_equal_in_number:
            return tokens.flatten(0, 1)
        return tokens[self.is_token(tokens.device)]

    def is_token(self, device: torch.device) -> Tensor:
        """Whether each entry of the padded sequences is a token: bool (b, v)."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(max(self.counts), device=device) < counts[:, None]


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
    check_mask_shape(volumes, visible, patch)
    return Patches(visible, volumes.device, None if packed is None else grid_of(volumes.shape[2:], packed))


def check_mask_shape(volumes: Tensor, visible: Tensor, patch: Edges) -> None:
    """Raise ValueError if a mask does not fit volumes, see `build_patches`."""
    expected = (len(volumes), 1, *grid_of(volumes.shape[2:], patch))
    if tuple(visible.shape) != expected:
        raise ValueError(
            f"visible: expected bool {expected} for volumes of shape {tuple(volumes.shape)}, "
            f"got shape {tuple(visible.shape)}"
        )


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
    inside = index[(slice(None),) + (slice(1, -1),) * axes]
    inside[visible[:, 0]] = torch.arange(len(position), device=visible.device)
    sample, *columns = position.unbind(1)
    directions = itertools.product((0, 1, 2), repeat=axes)
    near = [(sample, *(p + d for p, d in zip(columns, step, strict=True))) for step in directions]
    return torch.stack([index[neighbour] for neighbour in near], 1)
