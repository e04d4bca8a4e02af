"""The light decoder, SparK's U-Net, and the build_projections that lead the encoder's maps to it: of pre-training, and of a
segmentation network that takes them over.

Shapes: b batch, c channels, *size voxels per axis.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.blocks import BATCH_NORM, CONV, CONV_TRANSPOSE, ChannelNorm
from hyspark.models.masking.packed import CONV_FUNCTION, Patches
from hyspark.models.recompute import recomputed

CONV_TRANSPOSE_FUNCTION = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
Maps = Sequence[tuple[int, int]]
"""What the decoder takes: channels and stride of each map, deepest first."""
COMPOSE_FROM = 16
"""Positions (samples times voxels of the coarse map) per channel from which one composed up-convolution is faster than
two steps; measured at 384 channels, where both take about as long at 9 positions per channel.
"""


class Projection(nn.Module):
    """Normalises a feature map over its channels and convolves it to the decoder's width: (b, c_in, *size) -> (b,
    c_out, *size).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.project = CONV[axes](in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.norm(x))
        return out


class Densify(nn.Module):
    """Normalises the visible positions of one feature map over its channels, fills the hidden ones with a learned token
    and convolves to the decoder's width: visible patches (p, c_in, *edges) -> (b, c_out, *size). Only the patches are
    kept for the backward pass.

    Without the norm, which the paper does not name and SparK has, the decoder's BatchNorms reward an encoder that makes
    its features ever larger; beside those, what its later layers add vanishes, and they are not trained.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.mask_token = nn.Parameter(torch.zeros(1, in_channels, *(1,) * axes))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.project = CONV[axes](in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        out: Tensor = recomputed(self.fill, x, self.mask_token, patches)
        return out

    def fill(self, x: Tensor, token: Tensor, patches: Patches) -> Tensor:
        """The whole of `forward`."""
        out: Tensor = self.project(patches.unpack(self.norm(x), token))
        return out


def build_projections(kind: type[nn.Module], maps: Maps, decoder_width: int, axes: int) -> nn.ModuleList:
    """One Projection or Densify for each map that the decoder takes.

    Raises ValueError for a decoder's width that does not halve as often as the resolution doubles.
    """
    deepest = maps[0][1]
    if decoder_width < deepest or decoder_width % deepest:
        raise ValueError(
            f"the decoder width must be a multiple of {deepest}, since it halves {count_levels(maps)} times; "
            f"it is {decoder_width}"
        )
    return nn.ModuleList(
        kind(channels, decoder_width * stride // deepest, 1 if stride == deepest else 3, axes)
        for channels, stride in maps
    )


def check_min_width(decoder_width: int, decoder_min_width: int) -> None:
    """Raises ValueError for a least width that is above the width of the deepest level."""
    if decoder_min_width > decoder_width:
        raise ValueError(
            f"decoder_min_width={decoder_min_width} is above decoder_width={decoder_width}, "
            "the width of the widest level"
        )


def count_levels(maps: Maps) -> int:
    """Doublings of the resolution from the deepest map to the input.

    Raises ValueError where strides are no powers of two.
    """
    strides = [stride for _, stride in maps]
    if any(s < 1 or s & (s - 1) for s in strides):
        raise ValueError(f"the light decoder doubles resolutions, so strides are powers of two, but they are {strides}")
    return strides[0].bit_length() - 1


def double_conv(widths: Sequence[int], axes: int) -> nn.Sequential:
    """Two times (3^n convolution, BatchNorm, ReLU) through three widths: (b, w0, *size) -> (b, w2, *size)."""
    layers: list[nn.Module] = []
    for w_in, w_out in pairwise(widths):
        layers += [
            CONV[axes](w_in, w_out, 3, padding=1, bias=False),
            BATCH_NORM[axes](w_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class LightDecoderLevel(nn.Module):
    """Doubles the resolution, after fusing a skip where there is one: (b, c, *size) -> (b, c_out, *(2 * size)).

    skip: channels of the skip; 0 for none.

    It takes a map whose `norm` (and ReLU) is still to be done, None for none, and gives its own so. Each step thus
    ends in a convolution, and what stands before it can be made again in the backward pass at little cost.
    """

    def __init__(self, width: int, out_width: int, skip: int, axes: int) -> None:
        super().__init__()
        self.fuse = double_conv((width + skip, width, width), axes) if skip else None
        # No bias: but for the border, the convolution and the BatchNorm that follow would take it out again.
        self.up = CONV_TRANSPOSE[axes](width, width, 2, stride=2, bias=False)
        self.refine = double_conv((width, out_width, out_width), axes)

    def forward(self, x: Tensor, norm: nn.Module | None, skip: Tensor | None) -> tuple[Tensor, nn.Module]:
        if self.fuse is not None and skip is not None:
            x = apply_norm_relu(self.fuse[0], x, norm, skip)
            x = apply_norm_relu(self.fuse[3], x, self.fuse[1])
            norm = self.fuse[4]
        x = apply_norm_relu(self.upsample, x, norm)
        x = apply_norm_relu(self.refine[3], x, self.refine[1])
        return x, self.refine[4]

    def upsample(self, x: Tensor) -> Tensor:
        """`up`, then the first convolution of `refine`."""
        conv = self.refine[0].weight
        assert isinstance(conv, Tensor)
        return up_convolution(x, self.up.weight, conv)


def apply_norm_relu(layer: Callable[[Tensor], Tensor], x: Tensor, norm: nn.Module | None, *skips: Tensor) -> Tensor:
    """layer(concatenate(ReLU(norm(x)), *skips)); without a norm x is taken as it is. Only x and the skips are kept for
    the backward pass.
    """

    def run(x: Tensor, *skips: Tensor) -> Tensor:
        if norm is not None:
            x = F.relu(norm(x), inplace=True)
        return layer(torch.cat([x, *skips], dim=1) if skips else x)

    out: Tensor = recomputed(run, x, *skips, batch_norm=norm)
    return out


def up_convolution(x: Tensor, up: Tensor, conv: Tensor) -> Tensor:
    """A transposed convolution of kernel 2 and stride 2, then a 3^n convolution of the same size: (b, c, *size) ->
    (b, c_out, *(2 * size)).

    up: (c, c_mid, 2, ...). conv: (c_out, c_mid, 3, ...). There is nothing between the two, so that they are one
    transposed convolution of kernel 4: exactly the same, borders included, with 8 instead of 29 multiplications per
    output voxel and pair of channels (3D, c_out = c / 2). Making that kernel costs as much as COMPOSE_FROM
    positions per channel, so small maps take the two steps.
    """
    axes = x.ndim - 2
    transposed = CONV_TRANSPOSE_FUNCTION[axes]
    if x.numel() < COMPOSE_FROM * x.shape[1] ** 2:
        return CONV_FUNCTION[axes](transposed(x, up, stride=2), conv, padding=1)
    with torch.autocast(x.device.type, enabled=False):  # the kernel is rounded once, not the parts of its sums
        kernel = transposed(up, conv.transpose(0, 1).flip(list(range(2, conv.ndim))))  # (c, c_out, 4, ...)
    return transposed(x, kernel, stride=2, padding=1)


class LightDecoder(nn.Module):
    """Levels from the deepest map back to all of the resolution, then the channels asked for. Maps deepest first ->
    (b, out_channels, *size). The width halves from level to level; what the last gives is of half the width that it
    takes.

    finest: channels of a last map, of full resolution, that is fused before the output; 0 for none. min_width: a level
    takes at least so many channels; ValueError where that is more than the deepest has.
    """

    def __init__(
        self, maps: Maps, width: int, axes: int, out_channels: int = 1, finest: int = 0, min_width: int = 0
    ) -> None:
        super().__init__()
        check_min_width(width, min_width)
        num_levels = count_levels(maps)
        widths = [max(width >> level, min_width) for level in range(num_levels)]
        last = max(width >> num_levels, min_width // 2)
        fused = {maps[0][1] // stride for _, stride in maps[1:]}
        skips = [(width >> level) * (1 << level in fused) for level in range(num_levels)]
        self.levels = nn.ModuleList(
            LightDecoderLevel(w_in, w_out, skip, axes)
            for w_in, w_out, skip in zip(widths, [*widths[1:], last], skips, strict=True)
        )
        self.fuse = double_conv((last + finest, 2 * last, 2 * last), axes) if finest else None
        self.out = CONV[axes](2 * last if finest else last, out_channels, 1)
        for layer in self.modules():
            if isinstance(layer, (CONV[axes], CONV_TRANSPOSE[axes])):
                # Variances near 1 agree with BatchNorm's fresh running statistics, whatever the width.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.out.weight, std=0.02)  # a fresh network predicts about 0, the mean of a patch

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        deepest, *skips = maps
        finest = [skips.pop()] if self.fuse is not None else []
        x, norm = deepest, None
        for level in self.levels:
            x, norm = level(x, norm, skips.pop(0) if level.fuse is not None else None)
        if self.fuse is not None:
            x = apply_norm_relu(self.fuse[0], x, norm, *finest)
            x = apply_norm_relu(self.fuse[3], x, self.fuse[1])
            norm = self.fuse[4]
        return apply_norm_relu(self.out, x, norm)
