"""Checks of a third-party network before it is pre-trained: it runs under a mask, and packed as masked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyspark.models.defaults import grid_of
from hyspark.models.feature_maps import check_positions
from hyspark.models.masking.mask import visible_at
from hyspark.models.network_faults import UnsupportedNetworkError, describe_fault, explain_faults
from hyspark.utils.free_memory import is_out_of_memory

if TYPE_CHECKING:
    from hyspark.models.spark import PyramidEncoder

TOLERANCE = 1e-3
"""Largest difference of packed and masked maps, as a fraction of the largest value, that counts as rounding."""


def check_masked(encoder: PyramidEncoder) -> None:
    """Compute the maps of a crop under a mask twice, with other values at hidden voxels, and once as in training.

    Weights, statistics and random numbers are unchanged.

    Raises:
        UnsupportedNetworkError: the network mixes positions in a way that has no rule under a mask, or its maps
            depend on hidden voxels.
        ValueError: a map of the network has one position.
    """
    names = [name for name, _ in encoder.backbone.named_modules() if name]
    with unchanged(encoder, encoder.compute):
        check_positions(encoder.backbone, encoder.outputs(names, encoder.img_size), encoder.img_size)
    crop, visible = trial_crop(encoder)
    other = crop.where(visible_at(visible, encoder.img_size), crop + 3)
    with explain_faults(encoder.backbone, "run under a mask"), unchanged(encoder, "masked"):
        maps, others = encoder(crop, visible), encoder(other, visible)
        encoder.train()  # auxiliary heads
        encoder(torch.cat([crop, other]), torch.cat([visible, visible]))
    if leaking := [
        name
        for name, a, b in zip(encoder.taps, maps, others, strict=True)
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    ]:
        raise UnsupportedNetworkError(
            f"{type(encoder.backbone).__name__} does not run under a mask: the output of its module {leaking[0]} "
            "depends on hidden voxels, by a function whose form for visible positions only is not known here"
        )


def packed_fault(encoder: PyramidEncoder) -> str:
    """Say in one line why a network that runs masked does not run packed; empty if it does, with the same maps.

    Weights, statistics and random numbers are unchanged.
    """
    if encoder.packed_patch != encoder.patch:
        return f"the mask unit {encoder.patch} is smaller than the total stride {encoder.packed_patch}"
    crop, visible = trial_crop(encoder)
    with unchanged(encoder, "masked"):
        expected = encoder(crop, visible)
    try:
        with unchanged(encoder, "packed"):
            maps = encoder(crop, visible)
            encoder.train()
            encoder(torch.cat([crop, crop]), torch.cat([visible, visible]))
    except Exception as error:  # third-party networks raise any type
        if is_out_of_memory(error):
            raise
        return describe_fault(encoder.backbone, error, "run on packed patches")
    for name, one, other in zip(encoder.taps, maps, expected, strict=True):
        if one.shape != other.shape or float((one - other).abs().max()) > TOLERANCE * float(other.abs().max()):
            return f"the output of its module {name} is another than that under a mask"
    return ""


def trial_crop(encoder: PyramidEncoder) -> tuple[Tensor, Tensor]:
    """Make a crop (1, in_channels, *size) of smooth values, and a mask that hides every other unit and patch."""
    like = next(encoder.backbone.parameters())
    visible = torch.ones(1, 1, *grid_of(encoder.img_size, encoder.patch), dtype=torch.bool, device=like.device)
    for edges in {encoder.patch, encoder.packed_patch}:  # units, and packed patches with no visible unit
        grid = grid_of(encoder.img_size, edges)
        cells = torch.arange(math.prod(grid), device=like.device).view(1, 1, *grid)
        visible &= visible_at(cells % 2 == 0, visible.shape[2:])
    crop = torch.arange(math.prod(encoder.img_size) * encoder.in_channels, device=like.device).to(like)
    return crop.mul(0.7).sin().view(1, encoder.in_channels, *encoder.img_size), visible


@contextmanager
def unchanged(encoder: PyramidEncoder, compute: str) -> Iterator[None]:
    """Run an encoder in evaluation mode inside the block, in one way to compute, and leave it as it was."""
    was_training, chosen = encoder.training, encoder.compute
    before = [buffer.clone() for buffer in encoder.backbone.buffers()]
    encoder.compute = compute
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            encoder.eval()
            yield
    finally:
        for buffer, value in zip(encoder.backbone.buffers(), before, strict=True):
            buffer.copy_(value)
        encoder.compute = chosen
        encoder.train(was_training)
