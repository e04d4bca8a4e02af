"""Hybrid encoder: five convolutional stages, then a transformer on the deepest map.

Attribute names (`embeddings`, `expend1`, `mae`, ...) are those of the released weights: `state_dict()` IS the
released format. The release spells the convolution that widens a stage `expend`, and so does this module.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / 16 patches per axis.
Source: Tang et al., "HySparK", MICCAI 2024 (arXiv 2408.05815), section 2, and its public release.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.blocks import CONV, MedNeXtBlock
from hyspark.models.defaults import DEPTHS, EXPANSIONS, PATCH, WIDTHS, check_compute, edges_per_axis, grid_of
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.packed import packed
from hyspark.models.masking.patches import Patches, build_patches
from hyspark.models.vit import TokenTransformer

NUM_STAGES = 5
MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def layer_indices_of(network: nn.Module) -> dict[str, int | None]:
    """Compute the layer of each parameter of `embeddings` and `mae` in a network, counted from the input.

    Layers are the five stages, each with its widening convolution, then the transformer's blocks.

    Returns:
        Index by name of the parameter; None for the encoder's last norm. Parameters outside of the encoder are absent.
    """
    found: dict[str, int | None] = {}
    for name, _ in network.named_parameters():
        part, _, rest = name.partition(".")
        if part == "embeddings":
            stage = re.match(r"(?:layer|expend)(\d)\.", rest)
            found[name] = int(stage[1]) - 1 if stage else 0
        elif part == "mae":
            block = re.match(r"blocks\.(\d+)\.", rest)
            found[name] = NUM_STAGES + int(block[1]) if block else None
    return found


def max_pool_2x(x: Tensor) -> Tensor:
    """Halve the resolution by a max pool of kernel and stride 2: (b, c, *size) -> (b, c, *(size / 2)).

    torch 2.11 (but not 2.14) has no deterministic backward pass of max_pool3d on CUDA.
    """
    if x.device.type != "cpu" and x.ndim == 5 and torch.are_deterministic_algorithms_enabled():
        return max_pool_by_axis(x)
    out: Tensor = MAX_POOL[x.ndim - 2](x, 2)
    return out


def max_pool_by_axis(x: Tensor) -> Tensor:
    """Halve the resolution by maxima along one axis after the other; of equal values each gets half the gradient."""
    for axis in range(2, x.ndim):
        even, odd = ((slice(None),) * axis + (slice(start, None, 2),) for start in (0, 1))
        x = torch.maximum(x[even], x[odd])
    return x


class ConvStages(nn.Module):
    """Stem and five stages of MedNeXt blocks; a widening convolution and a 2^n max pool between stages.

    (b, in_channels, *size) -> five maps, finest first: the skip features x_1..x_4 at full, 1/2, 1/4 and 1/8 resolution
    (each with the width of the next stage), and x_5 at 1/16. `recompute` is that of the blocks.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        expansions: Sequence[int],
        axes: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.stem = conv(in_channels, widths[0], 3, padding=1)
        for s, (width, depth, expansion) in enumerate(zip(widths, depths, expansions, strict=True), start=1):
            blocks = [MedNeXtBlock(width, expansion, axes, recompute) for _ in range(depth)]
            self.add_module(f"layer{s}", nn.Sequential(*blocks))
            if s < NUM_STAGES:
                self.add_module(f"expend{s}", conv(width, widths[s], 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        x = self.stem(x)
        for s in range(1, NUM_STAGES + 1):
            x = self.get_submodule(f"layer{s}")(x)
            if s < NUM_STAGES:
                x = self.get_submodule(f"expend{s}")(x)
                features.append(x)
                x = max_pool_2x(x)
        return [*features, x]


class HybridEncoder(nn.Module):
    """Encoder that computes five feature maps of a crop, with the mask as an argument.

    Args:
        in_channels: channels of the input, 1 for CT.
        img_size: voxels per axis for which the positions are stored; one number, or one per axis. Inputs of other
            sizes work too.
        widths: channels of the five stages.
        depths: blocks of the five stages.
        expansions: expansion ratios of the five stages.
        vit_depth: blocks of the transformer.
        num_heads: attention heads of the transformer, independent of the crop size.
        axes: number of spatial axes.
        compute: how hidden voxels are excluded; both agree to rounding. "packed" computes visible patches only.
            "masked" is the readable reference: it computes every voxel and zeroes the hidden ones.
        hide: where hidden patches are excluded. "everywhere" is the method; the others are for ablations.
            "convolutions": the transformer processes all tokens, hidden ones being zero plus their position (as the
            release does in batches of 4 and more, once it runs).
            "input": hidden voxels are zero in the input only (a plain masked autoencoder).

    Raises:
        ValueError: a size is not a multiple of 16; there are not five stages; the heads or the position embedding do
            not divide the last width; `compute` or `hide` is unknown.
    """

    def __init__(
        self,
        in_channels: int = 1,
        img_size: int | Sequence[int] = 96,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        expansions: Sequence[int] = EXPANSIONS,
        vit_depth: int = 3,
        num_heads: int = 12,
        axes: int = 3,
        compute: str = "packed",
        hide: str = "everywhere",
    ) -> None:
        super().__init__()
        check_compute(compute)
        self.compute = compute
        if hide not in ("everywhere", "convolutions", "input"):
            raise ValueError(f'hide: expected "everywhere", "convolutions" or "input", got {hide!r}')
        self.hide = hide
        self.in_channels = in_channels
        for name, values in (("widths", widths), ("depths", depths), ("expansions", expansions)):
            if len(values) != NUM_STAGES:
                raise ValueError(f"{name}: expected {NUM_STAGES} numbers, one per stage, got {tuple(values)}")
        self.img_size = edges_per_axis(img_size, axes, "img_size")
        self.widths = tuple(widths)
        self.embeddings = ConvStages(in_channels, widths, depths, expansions, axes, recompute=True)
        self.mae = TokenTransformer(widths[-1], vit_depth, num_heads, grid_of(self.img_size))

    @property
    def patch(self) -> tuple[int, ...]:
        """Edge of a mask unit in voxels on each axis."""
        return (PATCH,) * len(self.img_size)

    @property
    def maps(self) -> list[tuple[int, tuple[int, ...]]]:
        """Channels and stride of the light decoder's input maps, deepest first: all but the finest map."""
        channels = (self.widths[-1], *self.widths[:1:-1])
        return [(c, (stride,) * len(self.img_size)) for c, stride in zip(channels, (16, 8, 4, 2), strict=True)]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to export, by their released key names."""
        return self.state_dict()

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter, see `layer_indices_of`."""
        return layer_indices_of(self)

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Compute the features of a crop.

        With a mask the maps are exactly zero at hidden positions. No value at a visible position depends on any hidden
        voxel.

        Args:
            volumes: (b, in_channels, *size).
            visible: bool (b, 1, *grid), True where the encoder sees; None: all is visible.

        Returns:
            Five dense maps, finest first: x_1..x_4 (skips) and x_5 (tokens back on the grid).
        """
        if visible is None:
            grid_of(volumes.shape[2:])
            *skips, deepest = self.embeddings(volumes)
            return [*skips, self.mae(deepest)]
        patches = self.patches(volumes, visible)
        return [patches.unpack(x) for x in self.encode(volumes, patches)]

    def patches(self, volumes: Tensor, visible: Tensor) -> Patches:
        """Compute the geometry of a mask for these volumes; raise ValueError if the mask has another shape."""
        patches = build_patches(volumes, visible, self.patch)
        ones = (1,) * patches.axes
        for stage in range(NUM_STAGES):  # now: torch.compile cannot trace the computation of indices
            patches.border_indices((PATCH >> stage,) * patches.axes, (ones, ones))
        return patches

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """Compute the five maps at visible patches only, (p, c, *edges), finest first; `forward` unpacks them."""
        if self.hide == "input":
            return [patches.pack(x) for x in self(volumes.where(visible_at(patches.visible, volumes.shape[2:]), 0))]
        if self.compute == "packed":
            with packed(patches, self.patch):
                maps = self.embeddings(patches.pack(volumes))
        else:
            with hidden(patches.visible):
                dense = self.embeddings(volumes.where(visible_at(patches.visible, volumes.shape[2:]), 0))
            maps = [patches.pack(x) for x in dense]
        *skips, deepest = maps
        if self.hide == "convolutions":
            return [*skips, patches.pack(self.mae(patches.unpack(deepest)))]
        return [*skips, self.mae(deepest, patches)]
