"""Any network with a feature pyramid as the encoder of masked pre-training: SparK, without touching the network.

The network is the user's own object and computes masked under `hidden`; its feature maps are read where they leave its
modules. Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
ICLR 2023.

Shapes: b batch, c channels, *size voxels per axis, *grid = size / patch patches per axis.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.models.masked_autoencoder import MaskedAutoencoder
from hyspark.models.masking.context import hidden, identity
from hyspark.models.masking.mask import grid_of
from hyspark.models.masking.packed import Patches, build_patches


class PyramidEncoder(nn.Module):
    """A network whose maps at several strides are the encoder's.

    Args:
        backbone: the network. Modules without a part in its maps (a head) may be there and are not trained.
        img_size: voxels per axis of a crop.
        in_channels: channels of its input.
        taps: names of the modules whose record_outputs are the maps; by default those that timm names, else the last module
        to give a map of each size.
        run: run(backbone, x) computes the maps; by default `forward_features` where there is one, else all of it.
        safe: torch functions that the network uses on other things than positions, see `hidden`.

    Raises ValueError where the maps found make no pyramid of strides 2, 4, 8, ...
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
        self.safe = safe
        self.total: Callable[[Tensor], Tensor] = identity
        found = self.find_taps(taps if taps is not None else timm_taps(backbone))
        self.taps = list(found)
        self.maps = [(channels, stride) for channels, stride in reversed(found.values())]
        self.patch = self.maps[0][1]
        grid_of(self.img_size, self.patch)

    def find_taps(self, taps: Sequence[str] | None) -> dict[str, tuple[int, int]]:
        """Channels and stride of the last map of each stride, finest first, by the name of the module that gives it."""
        names = {name for name, _ in self.backbone.named_modules() if name} if taps is None else set(taps)
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.enable_grad(), record_outputs(self.backbone, names) as seen:
            like = next(self.backbone.parameters())
            self.run(self.backbone, like.new_zeros(1, self.in_channels, *self.img_size))
        self.backbone.train(was_training)
        by_stride: dict[int, tuple[str, int]] = {}
        for name, x in seen.items():
            if stride := stride_of(x, self.img_size):
                by_stride[stride] = (name, x.shape[1])
        if not by_stride:
            raise ValueError(
                f"{type(self.backbone).__name__} gives no map at stride 2, 4, 8, ... of a crop of {self.img_size}; "
                "name the modules that do (taps), or make the crop larger"
            )
        freeze_unused(self.backbone, [seen[name] for name, _ in by_stride.values()])
        return {name: (channels, stride) for stride, (name, channels) in sorted(by_stride.items())}

    def weights(self) -> dict[str, Tensor]:
        """What is handed on: the network's own, in its own key names."""
        return self.backbone.state_dict()

    def forward(self, volumes: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """(b, in_channels, *size) -> maps, finest first. With a mask (bool (b, 1, *grid), True where the network sees)
        they are exactly zero at hidden positions, and no value at a visible one depends on any hidden voxel.
        """
        if visible is None:
            return self.features(volumes)
        patches = self.patches(volumes, visible)
        return [patches.unpack(x) for x in self.encode(volumes, patches)]

    def patches(self, volumes: Tensor, visible: Tensor) -> Patches:
        """Geometry of a mask for these volumes; raises ValueError for a mask of another shape."""
        return build_patches(volumes, visible, self.patch)

    def encode(self, volumes: Tensor, patches: Patches) -> list[Tensor]:
        """The maps at visible patches alone, (p, c, *edges), finest first."""
        with hidden(patches.visible, self.safe, self.total):
            return [patches.pack(x) for x in self.features(volumes)]

    def features(self, volumes: Tensor) -> list[Tensor]:
        """The maps of the network as it is, finest first."""
        with record_outputs(self.backbone, self.taps) as seen:
            self.run(self.backbone, volumes)
        return [seen[name] for name in self.taps]


def freeze_unused(network: nn.Module, maps: Sequence[Tensor]) -> None:
    """Take the weights of a network that have no part in these record_outputs of it, as those of a classifier, out of
    training: DistributedDataParallel waits for a gradient of all others.
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
    """The network without its head, as far as it says how."""
    features = getattr(backbone, "forward_features", backbone)
    return features(x)


def timm_taps(backbone: nn.Module) -> list[str] | None:
    """The modules that give timm's feature maps, where it is a network of timm."""
    info = getattr(backbone, "feature_info", None)
    names = [entry.get("module", "") for entry in info] if isinstance(info, list) else []
    return names if names and all(names) else None


@contextmanager
def record_outputs(network: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """What modules give while the network runs inside the block, by name, the last of each, in the order in which they
    end.
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
    """Of a map (b, c, *size / stride) of more than one position: a power of two above one, else None.

    Raises ValueError for a map of a size that was rounded: its positions would fit no grid of patches.
    """
    own = tuple(x.shape[2:])
    if x.ndim != len(size) + 2 or max(own) == 1:
        return None
    for stride in (2**k for k in range(1, max(size).bit_length())):
        if own == tuple(s / stride for s in size):
            return stride
        if all(o in (s // stride, -(-s // stride)) for o, s in zip(own, size, strict=True)):
            raise ValueError(
                f"a crop of {tuple(size)} becomes a map of {own} in this network, which is no whole stride; take a "
                "crop whose axes are multiples of its total stride, usually 32"
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
    """SparK's pre-training network around any backbone; the defaults are those of the paper for ResNet-50.

    img_size: voxels per axis, one number or one per axis, a multiple of the backbone's total stride. For the rest see
    PyramidEncoder and HySparK. Raises ValueError where sizes, strides, widths and mask ratio do not fit together.
    """
    size = (img_size,) * axes if isinstance(img_size, int) else tuple(img_size)
    return MaskedAutoencoder(PyramidEncoder(backbone, size, in_channels, taps, run, safe), mask_ratio, decoder_width)
