"""HySparK's pre-training network: mask -> encode -> densify -> decode -> loss on the hidden patches.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / 16 patches per axis, n = prod(grid).
Source: Tang et al., "HySparK", MICCAI 2024, sections 2.2-2.3, and its public release, whose unused full-resolution
densify branch is not built.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.blocks import BATCH_NORM, CONV, CONV_TRANSPOSE, ChannelNorm
from hyspark.models.encoder import DEPTHS, EXPANSIONS, WIDTHS, HybridEncoder
from hyspark.models.masking import draw_visible, grid_of, num_visible, patchify, unpatchify
from hyspark.models.packed import CONV_FUNCTION, Patches
from hyspark.models.recompute import recomputed

CONV_TRANSPOSE_FUNCTION = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
NUM_LEVELS = 4
COMPOSE_FROM = 16
"""Positions (samples times voxels of the coarse map) per channel from which one composed up-convolution is faster than
two steps; measured at 384 channels, where both take about as long at 9 positions per channel.
"""


@dataclass
class PretrainingOutput:
    """What one pass gives.

    loss: scalar. visible: bool (b, 1, *grid), the mask used. prediction: (b, 1, *size), in units of each target
    patch's own mean and standard deviation; `reconstruct` turns it into intensities.
    """

    loss: Tensor
    visible: Tensor
    prediction: Tensor


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


class DecoderLevel(nn.Module):
    """Doubles the resolution and halves the width, after fusing a skip where there is one: (b, c, *size) -> (b, c /
    2, *(2 * size)).

    It takes a map whose `norm` (and ReLU) is still to be done, None for none, and gives its own so. Each step thus
    ends in a convolution, and what stands before it can be made again in the backward pass at little cost.
    """

    def __init__(self, width: int, fuses: bool, axes: int) -> None:
        super().__init__()
        self.fuse = double_conv((2 * width, width, width), axes) if fuses else None
        # No bias: but for the border, the convolution and the BatchNorm that follow would take it out again.
        self.up = CONV_TRANSPOSE[axes](width, width, 2, stride=2, bias=False)
        self.refine = double_conv((width, width // 2, width // 2), axes)

    def forward(self, x: Tensor, norm: nn.Module | None, skip: Tensor | None) -> tuple[Tensor, nn.Module]:
        if self.fuse is not None and skip is not None:
            x = normed(self.fuse[0], x, norm, skip)
            x = normed(self.fuse[3], x, self.fuse[1])
            norm = self.fuse[4]
        x = normed(self.upsample, x, norm)
        x = normed(self.refine[3], x, self.refine[1])
        return x, self.refine[4]

    def upsample(self, x: Tensor) -> Tensor:
        """`up`, then the first convolution of `refine`."""
        conv = self.refine[0].weight
        assert isinstance(conv, Tensor)
        return up_convolution(x, self.up.weight, conv)


def normed(layer: Callable[[Tensor], Tensor], x: Tensor, norm: nn.Module | None, *skips: Tensor) -> Tensor:
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
        kernel = transposed(up, conv.transpose(0, 1).flip(*range(2, conv.ndim)))  # (c, c_out, 4, ...)
    return transposed(x, kernel, stride=2, padding=1)


class LightDecoder(nn.Module):
    """Four levels from 1/16 of the resolution back to all of it, then one channel. Maps deepest first -> (b, 1,
    *size).
    """

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            DecoderLevel(width >> level, fuses=level > 0, axes=axes) for level in range(NUM_LEVELS)
        )
        self.out = CONV[axes](width >> NUM_LEVELS, 1, 1)
        for layer in self.modules():
            if isinstance(layer, (CONV[axes], CONV_TRANSPOSE[axes])):
                # Variances near 1 agree with BatchNorm's fresh running statistics, whatever the width.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.out.weight, std=0.02)  # a fresh network predicts about 0, the mean of a patch

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x, norm = maps[0], None
        for level, skip in zip(self.levels, [None, *maps[1:]], strict=True):
            x, norm = level(x, norm, skip)
        return normed(self.out, x, norm)


class HySparK(nn.Module):
    """Encoder and light decoder with the masked reconstruction loss. Build it with `build_hyspark`."""

    def __init__(self, encoder: HybridEncoder, mask_ratio: float, decoder_width: int) -> None:
        super().__init__()
        if decoder_width < 1 << NUM_LEVELS or decoder_width % (1 << NUM_LEVELS):
            raise ValueError(
                f"the decoder width must be a multiple of {1 << NUM_LEVELS}, since it halves {NUM_LEVELS} times; "
                f"it is {decoder_width}"
            )
        grid = grid_of(encoder.img_size)
        if num_visible(grid, mask_ratio) == math.prod(grid):
            raise ValueError(
                f"a mask ratio of {mask_ratio} hides no patch of the {math.prod(grid)} in a crop of "
                f"{encoder.img_size} voxels, so that there is nothing to learn; raise the ratio or the crop size"
            )
        axes = len(encoder.img_size)
        self.mask_ratio = mask_ratio
        self.encoder = encoder
        deepest_first = encoder.widths[:0:-1]
        self.densify = nn.ModuleList()
        for level, channels in enumerate((encoder.widths[-1], *deepest_first[:-1])):
            kernel = 1 if level == 0 else 3
            self.densify.append(Densify(channels, decoder_width >> level, kernel, axes))
        self.decoder = LightDecoder(decoder_width, axes)

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> PretrainingOutput:
        """volumes: (b, 1, *size) in [0, 1]. visible: bool (b, 1, *grid), or None to draw one from torch's global
        generator.
        """
        if visible is None:
            visible = self.draw_visible(len(volumes), volumes.shape[2:])
        patches = self.encoder.patches(volumes, visible)
        features = self.encoder.encode(volumes, patches)[:0:-1]
        prediction = self.decoder([fill(x, patches) for fill, x in zip(self.densify, features, strict=True)])
        return PretrainingOutput(reconstruction_loss(volumes, prediction, patches.visible), patches.visible, prediction)

    def draw_visible(self, num_samples: int, size: Sequence[int]) -> Tensor:
        """A mask (num_samples, 1, *grid) seeded from torch's global generator."""
        seeds = torch.randint(2**62, (num_samples,)).tolist()
        return draw_visible(grid_of(size), self.mask_ratio, [torch.Generator().manual_seed(s) for s in seeds])


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (b, n, p) -> two of (b, n, 1); sd = sqrt(unbiased variance + 1e-6)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(volumes: Tensor, prediction: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error against patches normalised by their own mean and deviation, averaged over hidden patches;
    scalar, float32.

    volumes, prediction: (b, 1, *size). visible: bool (b, 1, *grid), at least one hidden patch in the batch for a
    finite result.
    """
    target = patchify(volumes.float())
    mean, deviation = patch_statistics(target)
    error = (patchify(prediction.float()) - (target - mean) / deviation).square().mean(-1)  # (b, n)
    is_hidden = (~visible).flatten(1)
    return (error * is_hidden).sum() / is_hidden.sum()


def reconstruct(volumes: Tensor, output: PretrainingOutput) -> Tensor:
    """The prediction in intensities, (b, 1, *size): each patch scaled back with the mean and deviation of its target.

    Those two numbers per patch come from the target, as is usual when showing models trained on normalised patches.
    """
    mean, deviation = patch_statistics(patchify(volumes.float()))
    grid = grid_of(volumes.shape[2:])
    return unpatchify(patchify(output.prediction.float()) * deviation + mean, grid)


def build_hyspark(
    img_size: int | Sequence[int] = 96,
    mask_ratio: float = 0.75,
    compute: str = "packed",
    *,
    hide: str = "everywhere",
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    expansions: Sequence[int] = EXPANSIONS,
    vit_depth: int = 3,
    num_heads: int = 12,
    decoder_width: int = 768,
    axes: int = 3,
) -> HySparK:
    """The pre-training network; the defaults are HySparK-B of the paper.

    compute: "packed" computes visible patches only; "masked" is the readable reference, which computes every voxel
    and zeroes the hidden ones. hide: where they are left out, see `HybridEncoder`. Raises ValueError for sizes, widths
    or a mask ratio that do not fit together.
    """
    encoder = HybridEncoder(1, img_size, widths, depths, expansions, vit_depth, num_heads, axes, compute, hide)
    return HySparK(encoder, mask_ratio, decoder_width)
