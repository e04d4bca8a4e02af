"""Masked autoencoder, the network of HySparK and SparK: mask, encode, densify, decode, loss on hidden patches.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / patch patches per axis, n = prod(grid).
Source: Tang et al., "HySparK", MICCAI 2024, sections 2.2-2.3, and its public release, whose unused full-resolution
densify branch is not built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hyspark.models.defaults import DEPTHS, EXPANSIONS, WIDTHS, grid_of
from hyspark.models.densify import Densify
from hyspark.models.encoder import HybridEncoder
from hyspark.models.feature_maps import Stride
from hyspark.models.light_decoder import LightDecoder, build_projections
from hyspark.models.masking.mask import draw_visible, num_visible, patchify, unpatchify
from hyspark.models.masking.patches import Patches


@dataclass
class PretrainingOutput:
    """Output of one forward pass.

    Attributes:
        loss: scalar.
        visible: bool (b, 1, *grid), the mask used.
        prediction: (b, c, *size), normalised by the mean and standard deviation of each target patch; `reconstruct`
            converts it to intensities.
    """

    loss: Tensor
    visible: Tensor
    prediction: Tensor


class MaskedEncoder(Protocol):
    """Interface of the encoder of a masked autoencoder.

    Attributes:
        img_size: voxels per axis of a crop.
        in_channels: channels of a crop.
        patch: edge of a mask unit in voxels on each axis.
        maps: channels and stride of the decoder's input maps, deepest first.
        compute: how hidden voxels are excluded, "packed" or "masked".
    """

    img_size: tuple[int, ...]
    in_channels: int
    compute: str

    @property
    def patch(self) -> tuple[int, ...]: ...

    @property
    def maps(self) -> list[tuple[int, Stride]]: ...

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to export."""

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter, None for one of no layer."""

    def patches(self, volumes: Tensor, visible: Tensor) -> Patches:
        """Compute the geometry of a mask (b, 1, *grid) for volumes (b, c, *size)."""

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """Compute maps at visible patches only, (p, c, *edges), finest first; the last are those of `maps`."""


class MaskedAutoencoder(nn.Module):
    """Encoder and light decoder with the masked reconstruction loss.

    Build it with `build_hyspark`, or around another network with `build_spark`.

    Args:
        encoder: the encoder.
        mask_ratio: fraction of hidden patches.
        decoder_width: channels of the decoder's deepest level.

    Raises:
        ValueError: the mask ratio hides no patch, or the decoder width does not fit the encoder's strides.
    """

    def __init__(self, encoder: MaskedEncoder, mask_ratio: float, decoder_width: int) -> None:
        super().__init__()
        grid = grid_of(encoder.img_size, encoder.patch)
        if num_visible(grid, mask_ratio) == math.prod(grid):
            raise ValueError(
                f"mask ratio: {mask_ratio} hides no patch of the {math.prod(grid)} in a crop of "
                f"{encoder.img_size} voxels, so there is nothing to learn; increase the ratio or the crop size"
            )
        axes = len(encoder.img_size)
        self.mask_ratio = mask_ratio
        self.encoder = encoder
        self.densify = build_projections(Densify, encoder.maps, decoder_width, axes)
        self.decoder = LightDecoder(encoder.maps, decoder_width, axes, encoder.in_channels)

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter of the encoder, None for one of no layer."""
        return {f"encoder.{name}": layer for name, layer in self.encoder.encoder_layers().items()}

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> PretrainingOutput:
        """Reconstruct masked volumes.

        Args:
            volumes: (b, c, *size) in [0, 1].
            visible: bool (b, 1, *grid); None: drawn from torch's global generator.
        """
        if visible is None:
            visible = self.draw_visible(len(volumes), volumes.shape[2:])
        patches = self.encoder.patches(volumes, visible)
        features = self.encoder.encode(volumes, patches)[: -len(self.densify) - 1 : -1]
        prediction = self.decoder([fill(x, patches) for fill, x in zip(self.densify, features, strict=True)])
        return PretrainingOutput(reconstruction_loss(volumes, prediction, patches.visible), patches.visible, prediction)

    def draw_visible(self, num_samples: int, size: Sequence[int]) -> Tensor:
        """Draw a mask (num_samples, 1, *grid) seeded from torch's global generator."""
        seeds = torch.randint(2**62, (num_samples,)).tolist()
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return draw_visible(grid_of(size, self.encoder.patch), self.mask_ratio, generators)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each patch, (b, n, p) -> two (b, n, 1).

    The deviation is sqrt(unbiased variance + 1e-6).
    """
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def patch_of(volumes: Tensor, visible: Tensor) -> tuple[int, ...]:
    """Compute the voxels per axis of a patch, from volumes (b, c, *size) and their mask (b, 1, *grid)."""
    return tuple(s // g for s, g in zip(volumes.shape[2:], visible.shape[2:], strict=True))


def reconstruction_loss(volumes: Tensor, prediction: Tensor, visible: Tensor) -> Tensor:
    """Compute the mean squared error of hidden patches, each normalised by its own mean and deviation.

    Args:
        volumes: targets (b, c, *size).
        prediction: (b, c, *size).
        visible: bool (b, 1, *grid); without a hidden patch in the batch the loss is not finite.

    Returns:
        float32 scalar.
    """
    patch = patch_of(volumes, visible)
    target = patchify(volumes.float(), patch)
    mean, deviation = patch_statistics(target)
    error = (patchify(prediction.float(), patch) - (target - mean) / deviation).square().mean(-1)  # (b, n)
    is_hidden = (~visible).flatten(1)
    return (error * is_hidden).sum() / is_hidden.sum()


def reconstruct(volumes: Tensor, output: PretrainingOutput) -> Tensor:
    """Convert a prediction to intensities, (b, c, *size), by the mean and deviation of each target patch.

    These two numbers per patch come from the target, as is usual in figures of models trained on normalised patches.
    """
    patch = patch_of(volumes, output.visible)
    mean, deviation = patch_statistics(patchify(volumes.float(), patch))
    values = patchify(output.prediction.float(), patch) * deviation + mean
    return unpatchify(values, output.visible.shape[2:], patch)


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
    in_channels: int = 1,
) -> MaskedAutoencoder:
    """Build HySparK's pre-training network; the defaults are HySparK-B of the paper.

    Args:
        img_size: voxels per axis of a crop, one number or one per axis, each a multiple of 16.
        mask_ratio: fraction of hidden patches.
        compute: "packed" computes visible patches only; "masked" is the readable reference, see `HybridEncoder`.
        hide: where hidden patches are excluded, see `HybridEncoder`.
        widths: channels of the encoder's five stages, by default 32, 64, 128, 256, 384.
        depths: blocks of the stages, by default 1, 1, 3, 3, 1.
        expansions: expansion ratios of the stages, by default 2, 4, 4, 4, 2.
        vit_depth: blocks of the transformer.
        num_heads: attention heads of the transformer.
        decoder_width: channels of the decoder's deepest level.
        axes: number of spatial axes.
        in_channels: input channels.

    Returns:
        The network: volumes (b, in_channels, *size) -> `PretrainingOutput`. Its `encoder` gives the features.

    Raises:
        ValueError: sizes, widths or the mask ratio do not fit together.
    """
    encoder = HybridEncoder(
        in_channels, img_size, widths, depths, expansions, vit_depth, num_heads, axes, compute, hide
    )
    return MaskedAutoencoder(encoder, mask_ratio, decoder_width)
