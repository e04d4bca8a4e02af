"""HySparK's pre-training network: mask -> encode -> densify -> decode -> loss on the hidden patches.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / 16 patches per axis, n = prod(grid).
Source: Tang et al., "HySparK", MICCAI 2024, sections 2.2-2.3, and its public release, whose unused full-resolution
densify branch is not built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hyspark.models.blocks import BATCH_NORM, CONV, CONV_TRANSPOSE
from hyspark.models.encoder import DEPTHS, EXPANSIONS, WIDTHS, HybridEncoder
from hyspark.models.masking import draw_visible, grid_of, num_visible, patchify, unpatchify, visible_at

NUM_LEVELS = 4


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
    """Fills the hidden positions of one feature map with a learned token and convolves to the decoder's width.

    (b, c_in, *size), visible (b, 1, *grid) -> (b, c_out, *size).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, in_channels, *(1,) * axes))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.project = CONV[axes](in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        filled = torch.where(visible_at(visible, x.shape[2:]), x, self.mask_token.to(x.dtype))
        out: Tensor = self.project(filled)
        return out


def double_conv(widths: Sequence[int], axes: int) -> nn.Sequential:
    """Two times (3^n convolution, BatchNorm, ReLU) through three widths: (b, w0, *size) -> (b, w2, *size)."""
    layers: list[nn.Module] = []
    for w_in, w_out in pairwise(widths):
        layers += [
            CONV[axes](w_in, w_out, 3, padding=1, bias=False),
            BATCH_NORM[axes](w_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class DecoderLevel(nn.Module):
    """Doubles the resolution and halves the width, after fusing a skip where there is one: (b, c, *size) -> (b, c /
    2, *(2 * size)).
    """

    def __init__(self, width: int, fuses: bool, axes: int) -> None:
        super().__init__()
        self.fuse = double_conv((2 * width, width, width), axes) if fuses else None
        self.up = CONV_TRANSPOSE[axes](width, width, 2, stride=2)
        self.refine = double_conv((width, width // 2, width // 2), axes)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.fuse is not None and skip is not None:
            x = self.fuse(torch.cat([x, skip], dim=1))
        out: Tensor = self.refine(self.up(x))
        return out


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
        x = maps[0]
        for level, skip in zip(self.levels, [None, *maps[1:]], strict=True):
            x = level(x, skip)
        out: Tensor = self.out(x)
        return out


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
        visible = visible.to(volumes.device)
        features = self.encoder(volumes, visible)
        maps = [fill(x, visible) for fill, x in zip(self.densify, features[:0:-1], strict=True)]
        prediction = self.decoder(maps)
        return PretrainingOutput(reconstruction_loss(volumes, prediction, visible), visible, prediction)

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
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    expansions: Sequence[int] = EXPANSIONS,
    vit_depth: int = 3,
    num_heads: int = 12,
    decoder_width: int = 768,
    axes: int = 3,
) -> HySparK:
    """The pre-training network; the defaults are HySparK-B of the paper.

    compute: "masked", the readable reference (every voxel computed, hidden ones zeroed), or "packed", which today is
    the same code. Raises ValueError for sizes, widths or a mask ratio that do not fit together.
    """
    if compute not in ("masked", "packed"):
        raise ValueError(f'compute must be "masked" or "packed", not {compute!r}')
    encoder = HybridEncoder(1, img_size, widths, depths, expansions, vit_depth, num_heads, axes)
    return HySparK(encoder, mask_ratio, decoder_width)
