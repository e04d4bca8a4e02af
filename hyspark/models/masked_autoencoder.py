"""Masked autoencoder, the network of HySparK and SparK: mask, encode, densify, decode, loss on hidden patches.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / patch patches per axis, n = prod(grid).
Source: Tang et al., "HySparK", MICCAI 2024, sections 2.2-2.3, and its public release, whose unused full-resolution
densify branch is not built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from hyspark.models.defaults import DEPTHS, EXPANSIONS, WIDTHS, check_reconstruct_fraction, grid_of
from hyspark.models.densify import Densify
from hyspark.models.encoder import HybridEncoder
from hyspark.models.feature_maps import Stride
from hyspark.models.light_decoder import LightDecoder, Maps, build_projections, up_steps
from hyspark.models.masking.mask import draw_visible, num_visible, patchify, unpatchify
from hyspark.models.masking.patches import Patches
from hyspark.models.masking.reconstructed import draw_reconstructed

PACKED_LEVELS = 2
"""Finest levels of a decoder that compute reconstructed patches alone: four fifths of its operations."""


@dataclass
class PretrainingOutput:
    """Output of one forward pass.

    Attributes:
        loss: scalar.
        visible: bool (b, 1, *grid), the mask used.
        prediction: (b, c, *size), normalised by the mean and standard deviation of each target patch; `reconstruct`
            converts it to intensities. Zero at patches that are not reconstructed.
        reconstructed: bool (b, 1, *grid), the hidden patches that are scored if they are not all; else None.
    """

    loss: Tensor
    visible: Tensor
    prediction: Tensor
    reconstructed: Tensor | None = None


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
        reconstruct_fraction: fraction of the hidden patches that are reconstructed and scored in training.

    Raises:
        ValueError: the mask ratio hides no patch, the decoder width does not fit the encoder's strides, or the fraction
            is not above 0 and at most 1.
    """

    def __init__(
        self, encoder: MaskedEncoder, mask_ratio: float, decoder_width: int, reconstruct_fraction: float = 1.0
    ) -> None:
        super().__init__()
        check_reconstruct_fraction(reconstruct_fraction)
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
        self.reconstruct_fraction = reconstruct_fraction
        if reconstruct_fraction < 1:
            first_packed_level(encoder.maps, encoder.patch)  # raises where patches have no whole positions

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter of the encoder, None for one of no layer."""
        return {f"encoder.{name}": layer for name, layer in self.encoder.encoder_layers().items()}

    def forward(
        self, volumes: Tensor, visible: Tensor | None = None, reconstructed: Tensor | None = None
    ) -> PretrainingOutput:
        """Reconstruct masked volumes.

        Args:
            volumes: (b, c, *size) in [0, 1].
            visible: bool (b, 1, *grid); None: drawn from torch's global generator.
            reconstructed: bool (b, 1, *grid), the hidden patches to reconstruct and score; None: all in evaluation
                mode, and in training mode those of `reconstruct_fraction`, drawn from torch's global generator.
        """
        if visible is None:
            visible = self.draw_visible(len(volumes), volumes.shape[2:])
        if reconstructed is None and self.training and self.reconstruct_fraction < 1:
            reconstructed = draw_reconstructed(visible, self.reconstruct_fraction, draw_generators(len(visible)))
        patches = self.encoder.patches(volumes, visible)
        features = self.encoder.encode(volumes, patches)[: -len(self.densify) - 1 : -1]
        if reconstructed is not None:
            if reconstructed.shape != visible.shape:
                raise ValueError(
                    f"reconstructed: expected bool {tuple(visible.shape)}, got shape {tuple(reconstructed.shape)}"
                )
            return self.reconstruct_some(volumes, features, patches, Patches(reconstructed, volumes.device))
        prediction = self.decoder([fill(x, patches) for fill, x in zip(self.densify, features, strict=True)])
        return PretrainingOutput(reconstruction_loss(volumes, prediction, patches.visible), patches.visible, prediction)

    def reconstruct_some(
        self, volumes: Tensor, features: Sequence[Tensor], visible: Patches, reconstructed: Patches
    ) -> PretrainingOutput:
        """Compute the output for some of the hidden patches, from the encoder's maps, deepest first."""
        _, levels = up_steps(self.encoder.maps)
        first = first_packed_level(self.encoder.maps, self.encoder.patch)
        maps = [
            fill(x, visible, reconstructed if level and level >= first else None)
            for fill, x, level in zip(self.densify, features, levels, strict=True)
        ]
        prediction = reconstructed.unpack(self.decoder(maps, reconstructed, first))
        loss = reconstruction_loss(volumes, prediction, ~reconstructed.visible)
        return PretrainingOutput(loss, visible.visible, prediction, reconstructed.visible)

    def draw_visible(self, num_samples: int, size: Sequence[int]) -> Tensor:
        """Draw a mask (num_samples, 1, *grid) seeded from torch's global generator."""
        return draw_visible(grid_of(size, self.encoder.patch), self.mask_ratio, draw_generators(num_samples))


def first_packed_level(maps: Maps, patch: Stride) -> int:
    """Find the first of the PACKED_LEVELS finest levels whose input has whole positions in each patch.

    Args:
        maps: channels and stride of each map, deepest first.
        patch: edge of a mask unit in voxels on each axis.

    Raises:
        ValueError: there is none.
    """
    steps, _ = up_steps(maps)

    def finer(stride: Stride, ratio: Stride) -> Stride:
        return tuple(s // r for s, r in zip(stride, ratio, strict=True))

    strides = list(accumulate(steps[:-1], finer, initial=maps[0][1]))
    for level in range(max(0, len(steps) - PACKED_LEVELS), len(steps)):
        if all(p % s == 0 for p, s in zip(patch, strides[level], strict=True)):
            return level
    raise ValueError(
        f"reconstruct_fraction: expected mask units of a multiple of {strides[-1]} voxels, the stride of the decoder's "
        f"last level, got {patch}; set 1, or larger mask units"
    )


def draw_generators(num_samples: int) -> list[torch.Generator]:
    """Make a generator for each sample, seeded from torch's global generator."""
    seeds = torch.randint(2**62, (num_samples,)).tolist()
    return [torch.Generator().manual_seed(s) for s in seeds]


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
    reconstruct_fraction: float = 1.0,
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
        reconstruct_fraction: fraction of the hidden patches that are reconstructed and scored in training.

    Returns:
        The network: volumes (b, in_channels, *size) -> `PretrainingOutput`. Its `encoder` gives the features.

    Raises:
        ValueError: sizes, widths or the mask ratio do not fit together.
    """
    encoder = HybridEncoder(
        in_channels, img_size, widths, depths, expansions, vit_depth, num_heads, axes, compute, hide
    )
    return MaskedAutoencoder(encoder, mask_ratio, decoder_width, reconstruct_fraction)
