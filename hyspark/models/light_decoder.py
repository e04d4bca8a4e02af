"""Light decoder (SparK's U-Net), and the projections of the encoder's maps to its widths.

Both serve pre-training, and segmentation networks that reuse their weights. In pre-training the finest levels may
compute reconstructed patches alone, see masking/reconstructed.py.

Shapes: b batch, c channels, *size voxels per axis, p reconstructed patches of the whole batch, *edges voxels per axis
of a patch at a resolution.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.blocks import BATCH_NORM, CONV, CONV_FUNCTION, CONV_TRANSPOSE, ChannelNorm
from hyspark.models.defaults import check_min_width
from hyspark.models.feature_maps import Stride
from hyspark.models.masking.borders import pack_with_border
from hyspark.models.masking.patches import Patches
from hyspark.models.masking.reconstructed import unpadded
from hyspark.models.recompute import recomputed

CONV_TRANSPOSE_FUNCTION = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
Maps = Sequence[tuple[int, Stride]]
"""Channels and stride of each input map of the decoder, deepest first."""
Layer = Callable[[Tensor], Tensor]
COMPOSE_FROM = 16
"""Positions (samples times voxels of the coarse map) per channel from which one composed up-convolution is faster than
two steps. Measured at 384 channels: both take about as long at 9 positions per channel.
"""


class Projection(nn.Module):
    """Channel norm, then a convolution to the decoder's width: (b, c_in, *size) -> (b, c_out, *size)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.project = CONV[axes](in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.norm(x))
        return out


def build_projections(layer: type[nn.Module], maps: Maps, decoder_width: int, axes: int) -> nn.ModuleList:
    """Build a Projection or Densify for each input map of the decoder.

    Args:
        layer: Projection or Densify.
        maps: channels and stride of each map, deepest first.
        decoder_width: channels of the decoder's deepest level.
        axes: number of spatial axes.

    Raises:
        ValueError: the decoder width is not divisible by 2 at every step of the decoder.
    """
    steps, levels = up_steps(maps)
    if decoder_width <= 0 or decoder_width % 2 ** len(steps):
        raise ValueError(
            f"decoder_width: expected a multiple of {2 ** len(steps)}, because it halves {len(steps)} times, at each "
            f"step from stride {maps[0][1]} to the input, got {decoder_width}"
        )
    return nn.ModuleList(
        layer(channels, decoder_width >> level, 3 if level else 1, axes)
        for (channels, _), level in zip(maps, levels, strict=True)
    )


def up_steps(maps: Maps) -> tuple[list[Stride], list[int]]:
    """List the decoder's steps from the deepest map to the input, each of ratio 1 or 2 per axis.

    Between two maps, or the last one and the input, all axes that differ double in each step. So of a ratio of (2, 4)
    both axes double first, and then the second alone. Encoders of thick slices have the same levels: they halve the
    axes of small voxels alone, until all voxels are about cubes.

    Returns:
        The ratio of each step, and the number of steps before each map.

    Raises:
        ValueError: a stride is no power of two, or the strides do not decrease.
    """
    strides = [stride for _, stride in maps]
    steps: list[Stride] = []
    levels = []
    for stride, finer in pairwise([*strides, (1,) * len(strides[0])]):
        decreases = stride != finer and all(s >= f for s, f in zip(stride, finer, strict=True))
        if not decreases or any(s < 1 or s & (s - 1) for s in stride):
            raise ValueError(
                f"strides of the light decoder's maps: expected powers of two that decrease to the input, got {strides}"
            )
        levels.append(len(steps))
        ratio = [s // f for s, f in zip(stride, finer, strict=True)]
        while max(ratio) > 1:
            steps.append(tuple(min(r, 2) for r in ratio))
            ratio = [max(1, r // 2) for r in ratio]
    return steps, levels


def double_conv(widths: Sequence[int], axes: int) -> nn.Sequential:
    """Build two (3^n convolution, BatchNorm, ReLU) with the given three widths: (b, w0, *size) -> (b, w2, *size)."""
    layers: list[nn.Module] = []
    for w_in, w_out in pairwise(widths):
        layers += [
            CONV[axes](w_in, w_out, 3, padding=1, bias=False),
            BATCH_NORM[axes](w_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class LightDecoderLevel(nn.Module):
    """Level that fuses a skip, if any, and increases the resolution: (b, c, *size) -> (b, c_out, *(ratio * size)).

    The last norm (and ReLU) of a level is not applied to its output, but returned with it for the next level. So each
    step ends in a convolution, and the layers before it are recomputed in the backward pass at little cost.

    Args:
        width: channels of the input.
        out_width: channels of the output.
        skip: channels of the skip; 0 for none.
        ratio: 1 or 2 for each spatial axis.
    """

    def __init__(self, width: int, out_width: int, skip: int, ratio: Stride) -> None:
        super().__init__()
        axes = len(ratio)
        transposed: Any = CONV_TRANSPOSE[axes]
        self.fuse = double_conv((width + skip, width, width), axes) if skip else None
        # No bias: the BatchNorm after the next convolution cancels it, except at the border.
        self.up = transposed(width, width, ratio, stride=ratio, bias=False)
        self.refine = double_conv((width, out_width, out_width), axes)

    def forward(
        self,
        x: Tensor,
        norm: nn.Module | None,
        skip: Tensor | None,
        patches: Patches | None = None,
        is_first: bool = False,
    ) -> tuple[Tensor, nn.Module]:
        """Compute a dense map, or reconstructed patches alone.

        The first convolution on patches takes their borders from the dense map, so it is exact. Later ones take borders
        from reconstructed neighbours, and zeros elsewhere.

        Args:
            x: (b, c, *size), or patches of the level before (p, c, *edges).
            norm: norm that is applied to x, with a ReLU; None for none.
            skip: (b, c, *size), or patches with a border of one voxel; None for none.
            patches: reconstructed patches; None for a dense map.
            is_first: whether x is a dense map where the output is patches.

        Returns:
            The output, and the norm to be applied to it.
        """
        conv, upsample, border = as_it_is, self.upsample, None
        if patches is not None:
            one = (1,) * patches.axes
            conv, upsample = unpadded, partial(self.upsample, border=1)
            border = partial(patches.with_border, before=one, after=one)
        first = partial(pack_with_border, patches=patches, widths=1) if patches is not None and is_first else border
        if self.fuse is not None and skip is not None:
            x = apply_norm_relu(conv(self.fuse[0]), x, norm, skip, border=first)
            x = apply_norm_relu(conv(self.fuse[3]), x, self.fuse[1], border=border)
            norm, first = self.fuse[4], border
        x = apply_norm_relu(upsample, x, norm, border=first)
        x = apply_norm_relu(conv(self.refine[3]), x, self.refine[1], border=border)
        return x, self.refine[4]

    def upsample(self, x: Tensor, border: int = 0) -> Tensor:
        """Apply `up`, then the first convolution of `refine`; `border` as in `up_convolution`."""
        conv = self.refine[0].weight
        assert isinstance(conv, Tensor)
        return up_convolution(x, self.up.weight, conv, border)


def as_it_is(conv: nn.Module) -> Layer:
    """Return the convolution, which pads a dense map by itself."""
    return conv


def apply_norm_relu(
    layer: Layer, x: Tensor, norm: nn.Module | None, *skips: Tensor, border: Layer | None = None
) -> Tensor:
    """Compute layer(concatenate(border(ReLU(norm(x))), *skips)), without the norm or border that is None.

    Only x and the skips are kept for the backward pass.
    """

    def run(x: Tensor, *skips: Tensor) -> Tensor:
        if norm is not None:
            x = F.relu(norm(x), inplace=True)
        if border is not None:
            x = border(x)
        return layer(torch.cat([x, *skips], dim=1) if skips else x)

    out: Tensor = recomputed(run, x, *skips, batch_norm=norm)
    return out


def up_convolution(x: Tensor, up: Tensor, conv: Tensor, border: int = 0) -> Tensor:
    """Apply a transposed convolution whose kernel is its stride, then a 3^n convolution that preserves the size.

    Nothing lies between the two, so they equal one transposed convolution, borders included. Its kernel is 4 on axes of
    ratio 2, and 3 on axes of ratio 1. That takes 8 instead of 29 multiplications per output voxel and pair of channels
    (ratio (2, 2, 2), c_out = c / 2), and 12 for ratio (1, 2, 2). Composing the kernel costs as much as COMPOSE_FROM
    positions per channel, so small maps take the two steps. A program that is exported for any batch chooses by one
    sample. One for any size composes the kernel, which its runtime does once.

    Args:
        x: (b, c, *size).
        up: weight of the transposed convolution, (c, c_mid, *ratio), each ratio 1 or 2.
        conv: weight of the convolution, (c_out, c_mid, 3, ...).
        border: 1 for patches with a border of one voxel, to which no output belongs; 0 for a dense map.

    Returns:
        (b, c_out, *(ratio * size)), size without the border.
    """
    axes = x.ndim - 2
    ratio = tuple(up.shape[2:])
    transposed = CONV_TRANSPOSE_FUNCTION[axes]
    num_samples = x.shape[0] if isinstance(x.shape[0], int) else 1  # a symbol in an export for any batch
    has_any_size = any(isinstance(length, torch.SymInt) for length in x.shape[2:])
    if not has_any_size and num_samples * math.prod(x.shape[1:]) < COMPOSE_FROM * x.shape[1] ** 2:
        inner = [(r - 1) * border for r in ratio]
        return CONV_FUNCTION[axes](transposed(x, up, stride=ratio, padding=inner), conv, padding=1 - border)
    with torch.autocast(x.device.type, enabled=False):  # rounds the kernel once, not the terms of its sums
        kernel = transposed(up, conv.transpose(0, 1).flip(list(range(2, conv.ndim))))  # (c, c_out, *(ratio + 2))
    return transposed(x, kernel, stride=ratio, padding=[1 + r * border for r in ratio])


class LightDecoder(nn.Module):
    """Decoder from the deepest map to full resolution: maps, deepest first -> (b, out_channels, *size).

    The width halves from level to level. The output of the last level has half the width of its input.

    Args:
        maps: channels and stride of each map, deepest first.
        width: channels of the deepest level.
        axes: number of spatial axes.
        out_channels: channels of the output.
        finest: channels of a last map, of full resolution, that is fused before the output; 0 for none.
        min_width: minimum input channels of a level.

    Raises:
        ValueError: `min_width` exceeds `width`, a stride is no power of two, or the strides do not decrease.
    """

    def __init__(
        self, maps: Maps, width: int, axes: int, out_channels: int = 1, finest: int = 0, min_width: int = 0
    ) -> None:
        super().__init__()
        check_min_width(width, min_width)
        steps, fused = up_steps(maps)
        widths = [max(width >> level, min_width) for level in range(len(steps))]
        last = max(width >> len(steps), min_width // 2)
        skips = [(width >> level) * (level in fused[1:]) for level in range(len(steps))]
        self.levels = nn.ModuleList(
            LightDecoderLevel(w_in, w_out, skip, ratio)
            for w_in, w_out, skip, ratio in zip(widths, [*widths[1:], last], skips, steps, strict=True)
        )
        self.fuse = double_conv((last + finest, 2 * last, 2 * last), axes) if finest else None
        self.out = CONV[axes](2 * last if finest else last, out_channels, 1)
        for layer in self.modules():
            if isinstance(layer, (CONV[axes], CONV_TRANSPOSE[axes])):
                # Variances near 1 agree with BatchNorm's initial running statistics, for any width.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.out.weight, std=0.02)  # at first the prediction is about 0, the mean of a patch

    def forward(self, maps: Sequence[Tensor], patches: Patches | None = None, first_packed: int = 0) -> Tensor:
        """Decode maps, deepest first.

        Args:
            maps: (b, c, *size); those of packed levels as patches with a border of one voxel.
            patches: reconstructed patches; None for all.
            first_packed: index of the first level that computes reconstructed patches alone.

        Returns:
            (b, out_channels, *size), or reconstructed patches (p, out_channels, *edges).
        """
        deepest, *skips = maps
        finest = [skips.pop()] if self.fuse is not None else []
        x, norm = deepest, None
        for index, level in enumerate(self.levels):
            skip = skips.pop(0) if level.fuse is not None else None
            packed = patches if index >= first_packed else None
            x, norm = level(x, norm, skip, packed, index == first_packed)
        if self.fuse is not None:
            x = apply_norm_relu(self.fuse[0], x, norm, *finest)
            x = apply_norm_relu(self.fuse[3], x, self.fuse[1])
            norm = self.fuse[4]
        return apply_norm_relu(self.out, x, norm)
