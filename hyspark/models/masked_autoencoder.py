"""HySparK's pre-training network: mask -> encode -> densify -> decode -> loss on the hidden patches.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / 16 patches per axis, n = prod(grid).
Source: Tang et al., "HySparK", MICCAI 2024, sections 2.2-2.3, and its public release, whose unused full-resolution
densify branch is not built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hyspark.models.encoder import DEPTHS, EXPANSIONS, WIDTHS, HybridEncoder
from hyspark.models.light_decoder import Densify, LightDecoder, build_projections
from hyspark.models.masking.mask import draw_visible, grid_of, num_visible, patchify, unpatchify
from hyspark.models.masking.packed import Patches


@dataclass
class PretrainingOutput:
    """What one pass gives.

    loss: scalar. visible: bool (b, 1, *grid), the mask used. prediction: (b, c, *size), in units of each target
    patch's own mean and standard deviation; `reconstruct` turns it into intensities.
    """

    loss: Tensor
    visible: Tensor
    prediction: Tensor


class MaskedEncoder(Protocol):
    """What the pre-training network asks of an encoder.

    img_size: voxels per axis of a crop. in_channels: its channels. patch: edge of a mask unit. maps: channels and
    stride of the maps that the decoder takes, deepest first.
    """

    img_size: tuple[int, ...]
    in_channels: int
    patch: int

    @property
    def maps(self) -> list[tuple[int, int]]: ...

    def weights(self) -> dict[str, Tensor]:
        """What is handed on."""

    def patches(self, volumes: Tensor, visible: Tensor) -> Patches:
        """Geometry of a mask (b, 1, *grid) for volumes (b, c, *size)."""

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """Maps at visible patches alone, (p, c, *edges), finest first; the last are those of `maps`."""


class MaskedAutoencoder(nn.Module):
    """Encoder and light decoder with the masked reconstruction loss. Build it with `build_hyspark`, or, around another
    network, with `build_spark`.
    """

    def __init__(self, encoder: MaskedEncoder, mask_ratio: float, decoder_width: int) -> None:
        super().__init__()
        grid = grid_of(encoder.img_size, encoder.patch)
        if num_visible(grid, mask_ratio) == math.prod(grid):
            raise ValueError(
                f"a mask ratio of {mask_ratio} hides no patch of the {math.prod(grid)} in a crop of "
                f"{encoder.img_size} voxels, so that there is nothing to learn; raise the ratio or the crop size"
            )
        axes = len(encoder.img_size)
        self.mask_ratio = mask_ratio
        self.encoder = encoder
        self.densify = build_projections(Densify, encoder.maps, decoder_width, axes)
        self.decoder = LightDecoder(encoder.maps, decoder_width, axes, encoder.in_channels)

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> PretrainingOutput:
        """volumes: (b, c, *size) in [0, 1]. visible: bool (b, 1, *grid), or None to draw one from torch's global
        generator.
        """
        if visible is None:
            visible = self.draw_visible(len(volumes), volumes.shape[2:])
        patches = self.encoder.patches(volumes, visible)
        features = self.encoder.encode(volumes, patches)[: -len(self.densify) - 1 : -1]
        prediction = self.decoder([fill(x, patches) for fill, x in zip(self.densify, features, strict=True)])
        return PretrainingOutput(reconstruction_loss(volumes, prediction, patches.visible), patches.visible, prediction)

    def draw_visible(self, num_samples: int, size: Sequence[int]) -> Tensor:
        """A mask (num_samples, 1, *grid) seeded from torch's global generator."""
        seeds = torch.randint(2**62, (num_samples,)).tolist()
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return draw_visible(grid_of(size, self.encoder.patch), self.mask_ratio, generators)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (b, n, p) -> two of (b, n, 1); sd = sqrt(unbiased variance + 1e-6)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(volumes: Tensor, prediction: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error against patches normalised by their own mean and deviation, averaged over hidden patches;
    scalar, float32.

    volumes, prediction: (b, c, *size). visible: bool (b, 1, *grid), at least one hidden patch in the batch for a
    finite result.
    """
    patch = volumes.shape[2] // visible.shape[2]
    target = patchify(volumes.float(), patch)
    mean, deviation = patch_statistics(target)
    error = (patchify(prediction.float(), patch) - (target - mean) / deviation).square().mean(-1)  # (b, n)
    is_hidden = (~visible).flatten(1)
    return (error * is_hidden).sum() / is_hidden.sum()


def reconstruct(volumes: Tensor, output: PretrainingOutput) -> Tensor:
    """The prediction in intensities, (b, c, *size): each patch scaled back with the mean and deviation of its target.

    Those two numbers per patch come from the target, as is usual when showing models trained on normalised patches.
    """
    grid = tuple(output.visible.shape[2:])
    patch = volumes.shape[2] // grid[0]
    mean, deviation = patch_statistics(patchify(volumes.float(), patch))
    return unpatchify(patchify(output.prediction.float(), patch) * deviation + mean, grid, patch)


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
) -> MaskedAutoencoder:
    """The pre-training network; the defaults are HySparK-B of the paper.

    compute: "packed" computes visible patches only; "masked" is the readable reference, which computes every voxel
    and zeroes the hidden ones. hide: where they are left out, see `HybridEncoder`. Raises ValueError for sizes, widths
    or a mask ratio that do not fit together.
    """
    encoder = HybridEncoder(1, img_size, widths, depths, expansions, vit_depth, num_heads, axes, compute, hide)
    return MaskedAutoencoder(encoder, mask_ratio, decoder_width)
