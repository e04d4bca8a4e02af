"""Segmentation networks: the hybrid encoder without a mask, and a decoder.

The decoder is the release's, of MedNeXt up-blocks, or the light one, which can load its weights from pre-training.
Attribute names, and the spelling `build_hybird`, are those of the public release: its encoder weights load by name.

Shapes: b batch, c channels, *size voxels per axis.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from hyspark.models.blocks import CONV, FusionBlock, MedNeXtBlock, MedNeXtUpBlock
from hyspark.models.defaults import DEPTHS, EXPANSIONS, WIDTHS, grid_of
from hyspark.models.encoder import NUM_STAGES, HybridEncoder, layer_indices_of
from hyspark.models.light_decoder import LightDecoder, Projection, build_projections

UP_EXPANSION = 4


class SegmentationLevel(nn.Module):
    """Level that doubles the resolution of `deep` and fuses it with a skip of the same width.

    deep (b, c, *size), skip (b, c, *(2 * size)) -> (b, c_out, *(2 * size)).
    """

    def __init__(self, channels: int, out_channels: int, expansion: int, axes: int) -> None:
        super().__init__()
        self.layer = MedNeXtBlock(channels, expansion, axes)
        self.up_block = MedNeXtUpBlock(channels, out_channels, UP_EXPANSION, axes)
        self.fusion = FusionBlock(channels + out_channels, out_channels, axes)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.fusion(self.layer(skip), self.up_block(deep))
        return out


class ClassScores(nn.Module):
    """Pointwise convolution to class scores, (b, c, *size) -> (b, n_classes, *size)."""

    def __init__(self, in_channels: int, n_classes: int, axes: int) -> None:
        super().__init__()
        self.conv = CONV[axes](in_channels, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class SegmentationDecoder(nn.Module):
    """Decoder of the release: five maps, finest first -> class scores (b, n_classes, *size)."""

    def __init__(self, n_classes: int, widths: Sequence[int], expansions: Sequence[int], axes: int) -> None:
        super().__init__()
        for level in range(NUM_STAGES - 1, 0, -1):
            block = SegmentationLevel(widths[level], widths[level - 1], expansions[level - 1], axes)
            self.add_module(f"decoder{level}", block)
        self.out = ClassScores(widths[0], n_classes, axes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *skips, x = features
        for level in range(NUM_STAGES - 1, 0, -1):
            x = self.get_submodule(f"decoder{level}")(x, skips[level - 1])
        out: Tensor = self.out(x)
        return out


class Hybird(nn.Module):
    """Segmentation network; a subclass has the decoder.

    Args:
        encoder: the encoder, or another network with one, whose modules become this one's.

    Attributes:
        reinitialised: prefixes of keys that stay randomly initialised even if pre-trained weights have them.
    """

    reinitialised: tuple[str, ...] = ()
    img_size: tuple[int, ...]
    embeddings: nn.Module
    mae: nn.Module

    def __init__(self, encoder: "HybridEncoder | Hybird") -> None:
        super().__init__()
        # The released names put the encoder's two parts at the top level.
        self.img_size = encoder.img_size
        self.embeddings = encoder.embeddings
        self.mae = encoder.mae

    def set_encoder_trainable(self, is_trainable: bool) -> None:
        """Set whether the encoder's weights get gradients."""
        for part in (self.embeddings, self.mae):
            part.requires_grad_(is_trainable)

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter of the encoder, see `layer_indices_of`."""
        return layer_indices_of(self)

    def forward(self, volumes: Tensor) -> Tensor:
        """Compute class scores: (b, in_channel, *size) -> (b, n_classes, *size).

        Raises:
            ValueError: an axis is not a multiple of 16.
        """
        grid_of(volumes.shape[2:])
        *skips, deepest = self.embeddings(volumes)
        return self.decode([*skips, self.mae(deepest)])

    def decode(self, features: list[Tensor]) -> Tensor:
        """Decode five maps, finest first, to class scores (b, n_classes, *size)."""
        raise NotImplementedError


class ReleasedHybird(Hybird):
    """Segmentation network of the release. Build it with `build_hybird`."""

    def __init__(self, encoder: HybridEncoder, decoder: SegmentationDecoder) -> None:
        super().__init__(encoder)
        self.decoder = decoder

    def decode(self, features: list[Tensor]) -> Tensor:
        out: Tensor = self.decoder(features)
        return out


class LightHybird(Hybird):
    """Segmentation network with the light decoder of pre-training. Build it with `build_hybird`.

    The last level is randomly initialised. Its output is fused with the encoder's map of full resolution, which
    pre-training does not use, and class scores follow. In pre-training the few channels of the last level learn to
    reconstruct grey values, and organs are learned sooner without them (docs/results/openkbp.md). Levels that are
    narrower in pre-training than `decoder_min_width` are randomly initialised too.
    """

    def __init__(self, encoder: HybridEncoder, n_classes: int, decoder_width: int, decoder_min_width: int = 0) -> None:
        super().__init__(encoder)
        axes = len(encoder.img_size)
        self.densify = build_projections(Projection, encoder.maps, decoder_width, axes)
        finest = encoder.widths[1]
        self.decoder = LightDecoder(encoder.maps, decoder_width, axes, n_classes, finest, decoder_min_width)
        last = len(self.decoder.levels) - 1
        narrow = (level for level in range(last) if decoder_width >> level + 1 < decoder_min_width)
        self.reinitialised = tuple(f"decoder.levels.{level}." for level in (*narrow, last))

    def decode(self, features: list[Tensor]) -> Tensor:
        return decode_light(self.densify, self.decoder, features)


def decode_light(projections: Iterable[nn.Module], decoder: nn.Module, features: list[Tensor]) -> Tensor:
    """Decode five maps, finest first, by a light decoder; `projections` convert the others to its widths."""
    finest, *deeper = features
    maps = [project(x) for project, x in zip(projections, reversed(deeper), strict=True)]
    out: Tensor = decoder([*maps, finest])
    return out


def build_hybird(
    in_channel: int = 1,
    n_classes: int = 14,
    img_size: int | Sequence[int] = 96,
    *,
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    expansions: Sequence[int] = EXPANSIONS,
    vit_depth: int = 3,
    num_heads: int = 12,
    axes: int = 3,
    decoder: str = "released",
    decoder_width: int = 768,
    decoder_min_width: int = 0,
) -> Hybird:
    """Build a segmentation network; the defaults are those of the release.

    Args:
        in_channel: input channels.
        n_classes: number of classes, background included.
        img_size: voxels per axis, one number or one per axis, each a multiple of 16.
        widths: channels of the encoder's five stages, by default 32, 64, 128, 256, 384.
        depths: blocks of the stages, by default 1, 1, 3, 3, 1.
        expansions: expansion ratios of the stages, by default 2, 4, 4, 4, 2.
        vit_depth: blocks of the transformer.
        num_heads: attention heads of the transformer.
        axes: number of spatial axes.
        decoder: "released", or "light" for the decoder of pre-training.
        decoder_width: channels of the light decoder's deepest level.
        decoder_min_width: minimum input channels of the light decoder's levels, for small networks.

    Returns:
        The network: volumes (b, in_channel, *size) -> class scores (b, n_classes, *size).

    Raises:
        ValueError: sizes or widths do not fit together, or `decoder` is unknown.
    """
    encoder = HybridEncoder(in_channel, img_size, widths, depths, expansions, vit_depth, num_heads, axes)
    if decoder == "light":
        return LightHybird(encoder, n_classes, decoder_width, decoder_min_width)
    if decoder != "released":
        raise ValueError(f'decoder: expected "released" or "light", got {decoder!r}')
    return ReleasedHybird(encoder, SegmentationDecoder(n_classes, widths, expansions, axes))
