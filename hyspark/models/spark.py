"""SparK: any network with a feature pyramid as the encoder of masked pre-training, without changes to the network.

The network is the user's own object and runs under `packed` or `hidden`. Its feature maps are recorded at the outputs
of its modules.

Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / patch patches per axis.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.defaults import Edges, check_compute
from hyspark.models.feature_maps import (
    Stride,
    check_unit,
    choose_pyramid,
    find_strides,
    freeze_unused,
    record_outputs,
    run_features,
    timm_taps,
    uses_only_itself,
)
from hyspark.models.masked_autoencoder import MaskedAutoencoder
from hyspark.models.masking.context import hidden
from hyspark.models.masking.masked_functions import identity
from hyspark.models.masking.packed import packed
from hyspark.models.masking.patches import Patches, build_patches
from hyspark.models.network_faults import UnsupportedNetworkError, explain_faults, find_attention
from hyspark.models.spark_checks import check_masked, packed_fault
from hyspark.utils.log import LOG


class PyramidEncoder(nn.Module):
    """Encoder around a network, whose maps at several strides are recorded.

    Args:
        backbone: the network. Modules that do not contribute to the maps, such as a head, are frozen.
        img_size: voxels per axis of a crop.
        in_channels: channels of a crop.
        taps: names of the modules whose outputs are the maps; by default those in timm's feature_info, else the last
            module with an output of each size.
        run: run(backbone, x) computes the maps; by default `forward_features`, else the whole forward pass.
        safe: torch functions that the network does not apply along positions, see `hidden`.
        mask_unit: edge of a mask unit in voxels, one number or one per axis; by default the total stride.
        compute: how hidden voxels are excluded; both agree to rounding. "packed" computes visible patches only, unless
            the mask unit is smaller than the total stride. "masked" computes every voxel and zeroes the hidden ones.

    Raises:
        ValueError: the maps have no strides 2, 4, 8, ..., the same on all axes or not, or the mask unit does not fit
            them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: Sequence[int],
        in_channels: int,
        taps: Sequence[str] | None = None,
        run: Callable[[nn.Module, Tensor], Any] | None = None,
        safe: Collection[Callable[..., Any]] = (),
        mask_unit: Edges | None = None,
        compute: str = "packed",
    ) -> None:
        super().__init__()
        check_compute(compute)
        self.compute = compute
        self.backbone = backbone
        self.img_size = tuple(img_size)
        self.in_channels = in_channels
        self.run = run or run_features
        self.safe = (*safe, F.interpolate) if upsamples_inside_patches(backbone) else tuple(safe)
        self.all_reduce: Callable[[Tensor], Tensor] = identity
        found = self.find_taps(taps if taps is not None else timm_taps(backbone))
        self.taps = list(found)
        self.maps = [(channels, stride) for channels, stride in reversed(found.values())]
        self.patch = (
            self.maps[0][1]
            if mask_unit is None
            else check_unit(mask_unit, self.img_size, [stride for _, stride in self.maps])
        )

    def find_taps(self, taps: Sequence[str] | None) -> dict[str, tuple[int, Stride]]:
        """Find the last map of each stride by a forward pass, and freeze the weights without influence on these maps.

        Args:
            taps: names of the modules to consider; None for all.

        Returns:
            Channels and stride by name of the module, finest first.
        """
        names = {name for name, _ in self.backbone.named_modules() if name} if taps is None else set(taps)
        was_training = self.backbone.training
        self.backbone.eval()
        size = " x ".join(map(str, self.img_size))
        with explain_faults(self.backbone, f"run on crops of {size} with {self.in_channels} channels"):
            seen = self.outputs(names, self.img_size)
        strides = find_strides(seen, self.img_size, partial(self.outputs_of_longer, names) if taps is None else None)
        self.backbone.train(was_training)
        if not strides:
            attention = find_attention(self.backbone)
            raise UnsupportedNetworkError(
                f"{type(self.backbone).__name__}: expected feature maps at strides 2, 4, 8, ... of a crop of "
                f"{self.img_size}, got none; "
                + (f"it computes tokens ({attention}); " if attention else "")
                + "name the modules that have them (taps), or enlarge the crop"
            )
        try:
            pyramid = choose_pyramid(strides, taps is not None)
        except ValueError as error:
            raise UnsupportedNetworkError(f"{type(self.backbone).__name__}: {error}") from error
        freeze_unused(self.backbone, [seen[name] for name in pyramid])
        return {name: (seen[name].shape[1], strides[name]) for name in pyramid}

    def outputs(self, names: Collection[str], size: Sequence[int]) -> dict[str, Tensor]:
        """Record the outputs of modules for a crop of zeros, with their graph."""
        like = next(self.backbone.parameters())
        with torch.enable_grad(), record_outputs(self.backbone, names) as seen:
            self.run(self.backbone, like.new_zeros(1, self.in_channels, *size))
        return seen

    def outputs_of_longer(self, names: Collection[str]) -> dict[str, Tensor]:
        """Record the outputs of modules for a crop of twice the length on the first axis.

        Random numbers are unchanged.

        Returns:
            Outputs by name; none if the network takes no such crop.
        """
        first, *others = self.img_size
        with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):  # third-party: any type
            return self.outputs(names, (2 * first, *others))
        return {}

    def can_be_copied(self) -> bool:
        """Whether a copy of the network computes by its own weights alone."""
        crop = next(self.backbone.parameters()).new_zeros(1, self.in_channels, *self.img_size)
        return uses_only_itself(self.backbone, self.run, self.taps[-1], crop)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to export: the network's own, by its own key names."""
        return self.backbone.state_dict()

    def encoder_layers(self) -> dict[str, int | None]:
        """Return None for each parameter: layers of a third-party network are unknown."""
        return {name: None for name, _ in self.named_parameters()}

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Compute the feature maps of a crop.

        With a mask they are exactly zero at hidden positions. No value at a visible position depends on any hidden
        voxel.

        Args:
            volumes: (b, in_channels, *size).
            visible: bool (b, 1, *grid), True where the network sees; None: all is visible.

        Returns:
            Dense maps, finest first.
        """
        if visible is None:
            return self.features(volumes)
        patches = self.patches(volumes, visible)
        return [patches.unpack(x) for x in self.encode(volumes, patches)]

    def patches(self, volumes: Tensor, visible: Tensor) -> Patches:
        """Compute the geometry of a mask for these volumes; raise ValueError if the mask has another shape."""
        return build_patches(volumes, visible, self.patch, self.packed_patch)

    @property
    def packed_patch(self) -> Stride:
        """Edge of a packed patch in voxels on each axis: the mask unit, or the total stride if the unit is smaller."""
        return tuple(max(edges) for edges in zip(self.patch, self.maps[0][1], strict=True))

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """Compute the maps at visible patches only, (p, c, *edges), finest first."""
        if self.compute == "packed" and not patches.are_divided:
            with packed(patches, self.patch, self.safe, self.all_reduce) as packing:
                return self.features(packing.pack(volumes))
        with hidden(patches.visible, self.safe, self.all_reduce) as context:
            maps = self.features(volumes)
        return [patches.pack(context.fill(x) if patches.are_divided else x) for x in maps]

    def features(self, volumes: Tensor) -> list[Tensor]:
        """Compute the maps of the network without a mask, finest first."""
        with record_outputs(self.backbone, self.taps) as seen:
            self.run(self.backbone, volumes)
        return [seen[name] for name in self.taps]


def upsamples_inside_patches(network: nn.Module) -> bool:
    """Whether a network has upsampling, and all of it copies each position to a block, which never mixes patches."""
    found = [module for module in network.modules() if isinstance(module, nn.Upsample)]
    return bool(found) and all(
        module.mode == "nearest" and module.size is None and all(float(s).is_integer() for s in scales(module))
        for module in found
    )


def scales(upsample: nn.Upsample) -> Sequence[float]:
    """Return the scale factors of an upsampling layer."""
    factor = upsample.scale_factor
    return factor if isinstance(factor, tuple) else (float(factor or 0.5),)


def build_spark(
    backbone: nn.Module,
    img_size: int | Sequence[int] = 224,
    mask_ratio: float = 0.6,
    *,
    in_channels: int = 3,
    axes: int = 2,
    decoder_width: int = 512,
    taps: Sequence[str] | None = None,
    run: Callable[[nn.Module, Tensor], Any] | None = None,
    safe: Collection[Callable[..., Any]] = (),
    mask_unit: Edges | None = None,
    reconstruct_fraction: float = 1.0,
    compute: str = "packed",
) -> MaskedAutoencoder:
    """Build SparK's pre-training network around any backbone; the defaults are the paper's for ResNet-50.

    Args:
        backbone: the network.
        img_size: voxels per axis, one number or one per axis, a multiple of the backbone's total stride.
        mask_ratio: fraction of hidden patches.
        in_channels: channels of a crop.
        axes: number of spatial axes, if `img_size` is one number.
        decoder_width: channels of the decoder's deepest level.
        taps: names of the modules whose outputs are the maps, see `PyramidEncoder`.
        run: run(backbone, x) computes the maps, see `PyramidEncoder`.
        safe: torch functions that the network does not apply along positions, see `hidden`.
        mask_unit: edge of a mask unit in voxels, one number or one per axis; by default the backbone's total stride. A
            position of a map that covers several units is visible where any of them is.
        reconstruct_fraction: fraction of the hidden patches that are reconstructed and scored in training.
        compute: "packed" computes visible patches only; "masked" is the reference, see `PyramidEncoder`. A network that
            does not run packed, or not as the reference, computes masked; a warning says so.

    Returns:
        The network: images (b, in_channels, *size) -> `PretrainingOutput`. The backbone in it stays the same object.

    Raises:
        ValueError: sizes, strides, widths and mask ratio do not fit together; the network does not run under a mask.
    """
    size = (img_size,) * axes if isinstance(img_size, int) else tuple(img_size)
    encoder = PyramidEncoder(backbone, size, in_channels, taps, run, safe, mask_unit, compute)
    check_masked(encoder)
    if compute == "packed" and (fault := packed_fault(encoder)):
        LOG.warning("%s: computes masked, not packed: %s", type(backbone).__name__, fault)
        encoder.compute = "masked"
    return MaskedAutoencoder(encoder, mask_ratio, decoder_width, reconstruct_fraction)
