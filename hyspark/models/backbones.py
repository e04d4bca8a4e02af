"""Backbones by name: `timm/resnet50`, `torchvision/resnet50`, `monai/segresnet`, `mypackage.module:factory`."""

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import timm
import torchvision
from monai.networks import nets
from torch import Tensor, nn


class Backbone(NamedTuple):
    """A network and, where it needs it, how to compute its encoder's maps: run(network, x)."""

    network: nn.Module
    run: Callable[[Any, Tensor], Any] | None = None


def build_backbone(name: str, in_channels: int, axes: int) -> Backbone:
    """A fresh backbone by name, for images of so many channels and axes.

    timm/NAME: any of timm's networks (2D), without its classifier. torchvision/NAME: any of its classification
    networks (2D, three channels). monai/NAME: resnet10 to resnet200 as MONAI's FlexibleUNet has them, segresnet or
    dynunet, in 2D or 3D. PACKAGE.MODULE:FACTORY: what FACTORY(in_channels=..., axes=...) returns, a module.

    Raises ValueError for a name that there is not, naming the nearest, and where it does not fit the axes or channels.
    """
    library, slash, rest = name.partition("/")
    if ":" in name:
        return Backbone(build_from_factory(name, in_channels, axes))
    makers = {"timm": build_timm, "torchvision": build_torchvision, "monai": build_monai}
    if not slash or library not in makers:
        raise ValueError(
            f"no backbone {name!r}: expected timm/NAME, torchvision/NAME, monai/NAME or PACKAGE.MODULE:FACTORY"
        )
    return makers[library](rest, in_channels, axes)


def build_timm(name: str, in_channels: int, axes: int) -> Backbone:
    """Without a classifier."""
    check_name(name, timm.list_models(), "timm")
    check_2d(name, axes)
    return Backbone(timm.create_model(name, in_chans=in_channels, num_classes=0))


def build_torchvision(name: str, in_channels: int, axes: int) -> Backbone:
    """As it is, classifier included."""
    check_name(name, torchvision.models.list_models(module=torchvision.models), "torchvision")
    check_2d(name, axes)
    if in_channels != 3:
        raise ValueError(f"torchvision's {name} takes three channels, but the data have {in_channels}")
    return Backbone(torchvision.models.get_model(name, weights=None))


def build_monai(name: str, in_channels: int, axes: int) -> Backbone:
    """A ResNet, or the encoder's half of a segmentation network, of which the rest stays as it is."""
    sizes = [f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200)]
    check_name(name, [*sizes, "segresnet", "dynunet"], "monai")
    if name == "segresnet":
        return Backbone(nets.SegResNet(axes, 16, in_channels), lambda net, x: net.encode(x))
    if name == "dynunet":
        levels = 5
        kernels, strides = [3] * levels, [1, *[2] * (levels - 1)]
        return Backbone(nets.DynUNet(axes, in_channels, 2, kernels, strides, strides[1:]), run_dynunet)
    build = getattr(nets, name)
    options = {"conv1_t_stride": 2, "bias_downsample": False, "feed_forward": False}
    return Backbone(build(spatial_dims=axes, n_input_channels=in_channels, **options))


def build_from_factory(name: str, in_channels: int, axes: int) -> nn.Module:
    """What the user's own function gives."""
    module, _, factory = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no backbone {name!r}: {error}; is {module} installed, or in PYTHONPATH?") from error
    network = make(in_channels=in_channels, axes=axes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} gave {type(network).__name__}, not a torch module")
    return network


def run_dynunet(net: nets.DynUNet, x: Tensor) -> Tensor:
    """The way down."""
    x = net.input_block(x)
    for layer in net.downsamples:
        x = layer(x)
    out: Tensor = net.bottleneck(x)
    return out


def check_name(name: str, names: Iterable[str], library: str) -> None:
    """Raises ValueError, naming the nearest, for a name that is not among these."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise ValueError(f"{library} has no {name!r} here" + (f"; did you mean {', '.join(near)}?" if near else ""))


def check_2d(name: str, axes: int) -> None:
    """Raises ValueError where volumes are asked of a network for images."""
    if axes != 2:
        raise ValueError(f"{name} takes images of two axes, but the data have {axes}; MONAI's networks take three")
