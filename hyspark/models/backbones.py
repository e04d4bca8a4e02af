"""Backbones by name: `timm/resnet50`, `monai/segresnet`, `nnunet/plans.json:3d_fullres`, `mypackage.module:factory`."""

import difflib
import importlib
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import timm
import torchvision
from torch import Tensor, nn

from hyspark.models.network_faults import UnsupportedNetworkError
from hyspark.models.nnunet_plans import is_plan, read_plan, split_plan_name
from hyspark.utils.log import LOG
from hyspark.utils.text import first_line

MONAI_BACKBONES = (*(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200)), "segresnet", "dynunet")
TIMM_FAMILIES = (
    *("byobnet", "convnext", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientnet", "fasternet", "focalnet"),
    *("ghostnet", "hardcorenas", "hgnet", "inception_next", "lcnetv2", "metaformer", "mobilenetv3", "nfnet", "rdnet"),
    *("regnet", "repghost", "repvit", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet"),
    *("sknet", "starnet", "vgg", "vovnet", "xception_aligned"),
)
"""Modules of timm whose networks run under a mask, but for those of `UNSUPPORTED`."""
UNSUPPORTED = (
    *("timm/bat_*", "timm/caformer_*", "timm/gc*", "timm/mobilenetv4_hybrid_*", "timm/ghostnetv[23]_*"),  # attention
    *("timm/*_evos", "timm/*blur*"),  # norms and pools without a rule
    *("timm/hgnetv2_*", "torchvision/inception_v3"),  # convolutions without padding
    *("torchvision/maxvit_t", "torchvision/swin_*", "torchvision/vit_*"),  # attention
    *("torchvision/alexnet", "torchvision/squeezenet*"),  # no strides 2, 4, 8, ...
    *("torchvision/googlenet", "torchvision/vgg*"),  # classifiers of all positions
)
"""Patterns of networks in the listed families and in torchvision that do not run under a mask, see `hidden`."""


LISTS = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models(torchvision.models)"}
"""Calls that list the networks of a library."""
MOST_LISTED = 20
"""Most names that a message lists."""


class Backbone(NamedTuple):
    """Network, and optionally how to compute its encoder's maps: run(network, x)."""

    network: nn.Module
    run: Callable[[Any, Tensor], Any] | None = None


def list_backbones(pattern: str = "*") -> list[str]:
    """List the names for `build_backbone` of convolutional networks that can be pre-trained with SparK.

    Most were run under a mask; of timm's above 60 million parameters not all were. They are the networks of timm in
    `TIMM_FAMILIES` and those of torchvision, both without `UNSUPPORTED`, and `MONAI_BACKBONES`. `build_backbone` also
    accepts the rest of timm and torchvision.

    Args:
        pattern: shell pattern of the name, with the library ("timm/resnet*") or without it ("resnet*").

    Returns:
        Names such as "timm/resnet50", by library.
    """
    names = [
        *(f"timm/{name}" for name in timm.list_models(module=list(TIMM_FAMILIES))),
        *(f"torchvision/{name}" for name in torchvision_names()),
        *(f"monai/{name}" for name in MONAI_BACKBONES),
    ]
    return [
        name
        for name in names
        if (fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[2], pattern))
        and not any(fnmatchcase(name, unsupported) for unsupported in UNSUPPORTED)
    ]


def build_backbone(name: str, in_channels: int, axes: int, img_size: Sequence[int] = ()) -> Backbone:
    """Build a randomly initialised backbone by name.

    Args:
        name: one of the following; `list_backbones` lists names that SparK supports.
            timm/NAME: any network of timm (2D), without its classifier.
            torchvision/NAME: any classification network of torchvision (2D, three channels).
            monai/NAME: resnet10 to resnet200 as in MONAI's FlexibleUNet, segresnet or dynunet, in 2D or 3D.
            nnunet/PLANS.json:CONFIGURATION: the network that nnU-Net planned, in the plan's axis order (3D).
            PACKAGE.MODULE:FACTORY: what FACTORY(in_channels=..., axes=...) returns, a module or a Backbone.
        in_channels: channels of an image.
        axes: number of spatial axes.
        img_size: edges of an image, for transformers that have one position per patch; by default their own.

    Raises:
        ValueError: the name is unknown, or the network does not support the axes, channels or size.
        FileNotFoundError: there is no such plan.
        ModuleNotFoundError: the library of the network is not installed.
    """
    library, slash, rest = name.partition("/")
    if is_plan(name):
        return build_planned(name, in_channels, axes)
    if ":" in name:
        return build_from_factory(name, in_channels, axes)
    builders: dict[str, Callable[[str, int, int], Backbone]]
    builders = {"timm": partial(build_timm, img_size=img_size), "torchvision": build_torchvision, "monai": build_monai}
    if not slash or library not in builders:
        raise ValueError(
            "backbone: expected timm/NAME, torchvision/NAME, monai/NAME, nnunet/PLANS.json or PACKAGE.MODULE:FACTORY, "
            f"got {name!r}"
        )
    return builders[library](rest, in_channels, axes)


def build_timm(name: str, in_channels: int, axes: int, img_size: Sequence[int] = ()) -> Backbone:
    """Build a network of timm without its classifier, for images of a size if it is built for one."""
    check_2d(name, axes)
    options: dict[str, Any] = {"in_chans": in_channels, "num_classes": 0}
    if img_size:
        try:
            return Backbone(create_timm(name, **options, img_size=tuple(img_size)))
        except UnsupportedNetworkError as error:
            if not isinstance(error.__cause__, TypeError):  # most networks take images of any size, and no such option
                raise
    return Backbone(create_timm(name, **options))


def create_timm(name: str, **options: Any) -> nn.Module:
    """Build a randomly initialised network of timm; a tag of pre-trained weights in its name is cut.

    Raises:
        ValueError: the name is unknown.
        UnsupportedNetworkError: the network cannot be built.
    """
    architecture, dot, tag = name.partition(".")
    check_name(architecture, timm.list_models(), "timm")
    if dot:
        LOG.warning("timm/%s: the tag .%s names weights, which are not loaded; built timm/%s", name, tag, architecture)
    try:
        created: nn.Module = timm.create_model(architecture, **options)
    except Exception as error:  # third-party networks raise any type
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UnsupportedNetworkError(
            f"timm/{architecture}: cannot be built with {given} ({type(error).__name__}: {first_line(error)}); use "
            "another network"
        ) from error
    return created


def build_torchvision(name: str, in_channels: int, axes: int) -> Backbone:
    """Build a network of torchvision, classifier included."""
    check_name(name, torchvision_names(), "torchvision")
    check_2d(name, axes)
    if in_channels != 3:
        raise ValueError(f"torchvision/{name}: expected data with 3 channels, got {in_channels}; use a network of timm")
    return Backbone(torchvision.models.get_model(name, weights=None))


def build_monai(name: str, in_channels: int, axes: int) -> Backbone:
    """Build a ResNet, or a segmentation network whose encoder is run; its decoder is unused."""
    check_name(name, MONAI_BACKBONES, "monai")
    from monai.networks import nets  # takes seconds, and other libraries' networks need none

    if name == "segresnet":
        return Backbone(nets.SegResNet(axes, 16, in_channels), lambda net, x: net.encode(x))
    if name == "dynunet":
        levels = 5
        kernels, strides = [3] * levels, [1, *[2] * (levels - 1)]
        return Backbone(nets.DynUNet(axes, in_channels, 2, kernels, strides, strides[1:]), run_dynunet)
    build = getattr(nets, name)
    options = {"conv1_t_stride": 2, "bias_downsample": False, "feed_forward": False}
    return Backbone(build(spatial_dims=axes, n_input_channels=in_channels, **options))


def build_planned(name: str, in_channels: int, axes: int) -> Backbone:
    """Build the network of an nnU-Net plan."""
    from hyspark.models.nnunet_network import build_from_plan  # imports Backbone from here

    if axes != 3:
        raise ValueError(f"{name}: expected volumes with 3 axes, got data with {axes}")
    return build_from_plan(read_plan(*split_plan_name(name)), in_channels)


def build_from_factory(name: str, in_channels: int, axes: int) -> Backbone:
    """Call the user's own function PACKAGE.MODULE:FACTORY."""
    module, _, factory = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone {name!r}: {error}; is {module} installed, or in PYTHONPATH?") from error
    try:
        made = make(in_channels=in_channels, axes=axes)
    except Exception as error:  # the user's own code raises any type
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UnsupportedNetworkError(
            f"backbone {name!r}: {type(error).__name__} in {frame.filename}, line {frame.lineno}: {first_line(error)}; "
            f"expected a module or a Backbone from {factory}(in_channels={in_channels}, axes={axes})"
        ) from error
    backbone = made if isinstance(made, Backbone) else Backbone(made)
    if not isinstance(backbone.network, nn.Module) or not (backbone.run is None or callable(backbone.run)):
        got = f"Backbone({', '.join(type(x).__name__ for x in made)})" if backbone is made else type(made).__name__
        raise ValueError(
            f"backbone {name!r}: expected a torch module from it, or hyspark.Backbone(module, run) with a function "
            f"run(module, x), got {got}"
        )
    return backbone


def run_dynunet(net: Any, x: Tensor) -> Tensor:
    """Run the encoder of a DynUNet."""
    x = net.input_block(x)
    for layer in net.downsamples:
        x = layer(x)
    out: Tensor = net.bottleneck(x)
    return out


def suggest_backbones(name: str) -> str:
    """Suggest networks that run under a mask, with names similar to one that does not."""
    if is_plan(name):
        return "name the plan of a ResidualEncoderUNet or PlainConvUNet"
    if ":" in name:  # the user's own function
        return (
            "use layers that run under a mask (hyspark.list_backbones() lists networks of such layers), or return "
            "hyspark.Backbone(network, run) with a run(network, x) that computes the encoder alone"
        )
    library, _, rest = name.partition("/")
    known = [known.partition("/")[2] for known in list_backbones(f"{library}/*")]
    near = [f"{library}/{found}" for found in difflib.get_close_matches(rest, known, n=2, cutoff=0.6)]
    shown = ", ".join([*near, "timm/resnet50"] if library == "timm" else [*near, f"{library}/resnet50"])
    return f"use a network that runs under a mask, such as {shown} (hyspark.list_backbones() lists all)"


def torchvision_names() -> list[str]:
    """List the classification networks of torchvision."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def check_name(name: str, names: Iterable[str], library: str) -> None:
    """Raise ValueError with the nearest names if a name is not among these, or with all if they are few."""
    names = list(names)
    if name in names:
        return
    if len(names) <= MOST_LISTED:
        raise ValueError(
            f"{library}/{name}: expected one of {', '.join(names)}; for another network give a function that builds "
            "it, PACKAGE.MODULE:FACTORY"
        )
    near = ", ".join(f"{library}/{found}" for found in near_names(name, names))
    raise ValueError(
        f"{library}/{name}: {library} has no such network"
        + (f"; did you mean {near}?" if near else "")
        + f"; `{LISTS[library]}` lists all"
    )


def near_names(name: str, names: Sequence[str]) -> list[str]:
    """List up to three names near to one, whatever its capitals, hyphens and underscores."""
    plain = {known: re.sub(r"[\W_]", "", known.lower()) for known in names}
    wanted = re.sub(r"[\W_]", "", name.lower())
    if same := [known for known, text in plain.items() if text == wanted]:
        return same
    longer = sorted((known for known, text in plain.items() if wanted and text.startswith(wanted)), key=len)
    return longer[:3] or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)


def check_2d(name: str, axes: int) -> None:
    """Raise ValueError if a network for images is to process volumes."""
    if axes != 2:
        raise ValueError(f"{name}: expected images with 2 axes, got data with {axes}; networks of MONAI take 3")
