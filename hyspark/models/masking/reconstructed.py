"""Reconstructed patches: a random fraction of the hidden ones, which the finest levels of the decoder compute alone.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, p reconstructed patches of the whole batch,
*edges voxels per axis of a patch at a resolution.
Source of the idea, for transformers: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", 2024.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.models.blocks import CONV_FUNCTION


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


def unpadded(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of a convolution without its padding, for patches with a border."""

    def convolve(x: Tensor) -> Tensor:
        function: Any = CONV_FUNCTION[x.ndim - 2]
        out: Tensor = function(x, conv.weight, conv.bias)
        return out

    return convolve
