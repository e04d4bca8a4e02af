"""Reconstructed patches: a random fraction of the hidden ones, which the finest levels of the decoder compute alone.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, p reconstructed patches of the whole batch,
*edges voxels per axis of a patch at a resolution.
Source of the idea, for transformers: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", 2024.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.blocks import CONV_FUNCTION
from hyspark.models.masking.patches import Patches


def draw_reconstructed(visible: Tensor, fraction: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw the reconstructed patches of each sample, all subsets of the hidden ones being equally likely.

    Args:
        visible: bool (b, 1, *grid) on the CPU.
        fraction: fraction of the hidden patches; at least one is drawn.
        generators: a CPU generator for each sample, so that its draw does not depend on the rest of the batch.

    Returns:
        bool (b, 1, *grid).

    Raises:
        ValueError: a sample has no hidden patch.
    """
    reconstructed = torch.zeros_like(visible)
    for row, own, generator in zip(reconstructed.flatten(1), visible.flatten(1), generators, strict=True):
        hidden = (~own).nonzero()[:, 0]
        if not len(hidden):
            raise ValueError("visible: expected at least one hidden patch in every sample, got a sample with none")
        num = max(1, round(fraction * len(hidden)))
        row[hidden[torch.randperm(len(hidden), generator=generator)[:num]]] = True
    return reconstructed


def pack_with_border(x: Tensor, patches: Patches, width: int) -> Tensor:
    """Select patches of a dense map with the voxels around them: (b, c, *size) -> (p, c, *(edges + 2 * width)).

    Voxels outside of the map are zero.
    """
    edges = [s // g for s, g in zip(x.shape[2:], patches.grid, strict=True)]
    padded = F.pad(x, (width, width) * patches.axes).movedim(1, -1)
    size, outer = padded.shape[1:-1], [edge + 2 * width for edge in edges]
    steps = [math.prod(size[axis + 1 :]) for axis in range(patches.axes)]
    sample, *corner = patches.position
    rows = sample * math.prod(size)
    for at, edge, step in zip(corner, edges, steps, strict=True):
        rows = rows + at * (edge * step)
    for count, step in zip(outer, steps, strict=True):
        rows = rows[..., None] + torch.arange(count, device=rows.device) * step
    picked = padded.reshape(-1, x.shape[1]).index_select(0, rows.flatten())
    return picked.view(len(sample), *outer, x.shape[1]).movedim(-1, 1)


def unpadded(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of a convolution without its padding, for patches with a border."""

    def convolve(x: Tensor) -> Tensor:
        function: Any = CONV_FUNCTION[x.ndim - 2]
        out: Tensor = function(x, conv.weight, conv.bias)
        return out

    return convolve
