"""SparK: any network with a feature pyramid as the encoder of masked pre-training, without changes to the network.

The network is the user's own object and runs under `hidden`. Its feature maps are recorded at the outputs of its
modules. Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
ICLR 2023.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / patch patches per axis.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.defaults import grid_of
from hyspark.models.masked_autoencoder import MaskedAutoencoder
from hyspark.models.masking.context import hidden, identity
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.patches import Patches, build_patches
from hyspark.models.network_faults import UnsupportedNetworkError, explain_faults, find_attention


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

    Raises:
        ValueError: the maps have no strides 2, 4, 8, ...
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: Sequence[int],
        in_channels: int,
        taps: Sequence[str] | None = None,
        run: Callable[[nn.Module, Tensor], Any] | None = None,
        safe: Collection[Callable[..., Any]] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.img_size = tuple(img_size)
        self.in_channels = in_channels
        self.run = run or run_features
        self.safe = (*safe, F.interpolate) if upsamples_inside_patches(backbone) else tuple(safe)
        self.all_reduce: Callable[[Tensor], Tensor] = identity
        found = self.find_taps(taps if taps is not None else timm_taps(backbone))
        self.taps = list(found)
        self.maps = [(channels, stride) for channels, stride in reversed(found.values())]
        self.patch = self.maps[0][1]
        grid_of(self.img_size, self.patch)

    def find_taps(self, taps: Sequence[str] | None) -> dict[str, tuple[int, int]]:
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
        with (
            explain_faults(self.backbone, f"run on crops of {size} with {self.in_channels} channels"),
            torch.enable_grad(),
            record_outputs(self.backbone, names) as seen,
        ):
            like = next(self.backbone.parameters())
            self.run(self.backbone, like.new_zeros(1, self.in_channels, *self.img_size))
        self.backbone.train(was_training)
        by_stride: dict[int, tuple[str, int]] = {}
        for name, x in seen.items():
            if stride := stride_of(x, self.img_size):
                by_stride[stride] = (name, x.shape[1])
        if not by_stride:
            attention = find_attention(self.backbone)
            raise UnsupportedNetworkError(
                f"{type(self.backbone).__name__}: expected feature maps at strides 2, 4, 8, ... of a crop of "
                f"{self.img_size}, got none; "
                + (f"it computes tokens ({attention}); " if attention else "")
                + "name the modules that have them (taps), or enlarge the crop"
            )
        freeze_unused(self.backbone, [seen[name] for name, _ in by_stride.values()])
        return {name: (channels, stride) for stride, (name, channels) in sorted(by_stride.items())}

    def check_masked(self) -> None:
        """Compute the maps of a crop under a mask twice, with other values at hidden voxels, and once as in training.

        Weights, statistics and random numbers are unchanged.

        Raises:
            UnsupportedNetworkError: the network mixes positions in a way that has no rule under a mask, or its maps
                depend on hidden voxels.
        """
        grid = grid_of(self.img_size, self.patch)
        like = next(self.backbone.parameters())
        cells = torch.arange(math.prod(grid), device=like.device).view(1, 1, *grid)
        visible = cells % 2 == 0
        crop = torch.arange(math.prod(self.img_size) * self.in_channels, device=like.device).to(like)
        crop = crop.mul(0.7).sin().view(1, self.in_channels, *self.img_size)
        other = crop.where(visible_at(visible, self.img_size), crop + 3)
        was_training = self.training
        before = [buffer.clone() for buffer in self.backbone.buffers()]
        with explain_faults(self.backbone, "run under a mask"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.eval()
            maps, others = self(crop, visible), self(other, visible)
            self.train()  # auxiliary heads
            self(torch.cat([crop, other]), torch.cat([visible, visible]))
            for buffer, value in zip(self.backbone.buffers(), before, strict=True):
                buffer.copy_(value)
        self.train(was_training)
        if leaking := [
            name
            for name, a, b in zip(self.taps, maps, others, strict=True)
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        ]:
            raise UnsupportedNetworkError(
                f"{type(self.backbone).__name__} does not run under a mask: the output of its module {leaking[0]} "
                "depends on hidden voxels, by a function whose form for visible positions only is not known here"
            )

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
        return build_patches(volumes, visible, self.patch)

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """Compute the maps at visible patches only, (p, c, *edges), finest first."""
        with hidden(patches.visible, self.safe, self.all_reduce):
            return [patches.pack(x) for x in self.features(volumes)]

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


def freeze_unused(network: nn.Module, maps: Sequence[Tensor]) -> None:
    """Freeze the weights of a network that do not contribute to its maps, such as those of a classifier.

    DistributedDataParallel waits for a gradient of every trainable weight.
    """
    nodes: list[Any] = [x.grad_fn for x in maps]
    seen = set(nodes)
    used = set()
    while nodes:
        node = nodes.pop()
        used.add(id(getattr(node, "variable", None)))
        following = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= following
        nodes += following
    for parameter in network.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def run_features(backbone: nn.Module, x: Tensor) -> Any:
    """Run a network without its head if it has `forward_features`, else as a whole."""
    features = getattr(backbone, "forward_features", backbone)
    return features(x)


def timm_taps(backbone: nn.Module) -> list[str] | None:
    """Return the modules whose outputs are the feature maps of a timm network; None for other networks."""
    info = getattr(backbone, "feature_info", None)
    names = [entry.get("module", "") for entry in info] if isinstance(info, list) else []
    modules = {name for name, _ in backbone.named_modules()}
    return names if names and all(names) and modules.issuperset(names) else None  # HRNet names stages it does not have


@contextmanager
def record_outputs(network: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Record the last output of each named module while the network runs inside the block.

    Returns:
        Outputs by name, in the order in which the modules end.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen.pop(name, None)
                seen[name] = out

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def stride_of(x: Tensor, size: Sequence[int]) -> int | None:
    """Compute the stride of a map (b, c, *size / stride) with more than one position.

    Returns:
        A power of two above one; None if the tensor is no such map.

    Raises:
        ValueError: the size of the map was rounded, so its positions fit no grid of patches.
    """
    own = tuple(x.shape[2:])
    if x.ndim != len(size) + 2 or max(own) == 1:
        return None
    for stride in (2**k for k in range(1, max(size).bit_length())):
        if own == tuple(s / stride for s in size):
            return stride
        if all(o in (s // stride, -(-s // stride)) for o, s in zip(own, size, strict=True)):
            raise ValueError(
                f"crop size {tuple(size)}: this network computes a map of {own} from it, which is no integer stride; "
                "set axes that are multiples of its total stride, usually 32"
            )
    return None


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
) -> MaskedAutoencoder:
    """Build SparK's pre-training network around any backbone; the defaults are the paper's for ResNet-50.

    Args:
        backbone: the network.
        img_size: voxels per axis, one number or one per axis, a multiple of the backbone's total stride.
        mask_ratio: fraction of hidden patches.
        in_channels: channels of a crop.
        axes: number of spatial axes.
        decoder_width: channels of the decoder's deepest level.
        taps: names of the modules whose outputs are the maps, see `PyramidEncoder`.
        run: run(backbone, x) computes the maps, see `PyramidEncoder`.
        safe: torch functions that the network does not apply along positions, see `hidden`.

    Returns:
        The network: images (b, in_channels, *size) -> `PretrainingOutput`. The backbone in it stays the same object.

    Raises:
        ValueError: sizes, strides, widths and mask ratio do not fit together; the network does not run under a mask.
    """
    size = (img_size,) * axes if isinstance(img_size, int) else tuple(img_size)
    encoder = PyramidEncoder(backbone, size, in_channels, taps, run, safe)
    encoder.check_masked()
    return MaskedAutoencoder(encoder, mask_ratio, decoder_width)
