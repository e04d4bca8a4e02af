"""Networks for the classification of images: by name, with the classifier's part and the order of the layers."""

from collections.abc import Iterator
from typing import Any

import timm
import torchvision
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyspark.models.backbones import check_name

SEVERAL_OUTPUTS = ("googlenet", "inception_v3")
"""Networks of torchvision with further classifiers on the way, which a loss of their own would be needed for."""


def build_classifier(name: str, channels: int, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """A fresh network: images (b, channels, h, w) -> class scores (b, num_classes).

    name: timm/NAME or torchvision/NAME. drop_path: largest probability of leaving out a block.

    Raises ValueError for a name that there is not, naming the nearest, and for what the network does not have.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        check_name(rest, timm.list_models(), library)
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            created: nn.Module = timm.create_model(rest, in_chans=channels, num_classes=num_classes, **options)
        except TypeError as error:
            raise ValueError(f"{name} cannot be built with drop_path={drop_path}: {error}; set it to 0") from error
        return created
    check_name(rest, torchvision.models.list_models(module=torchvision.models), library)
    if channels != 3 or drop_path:
        raise ValueError(
            f"torchvision's {rest} takes three channels and has no drop_path to set, but channels is {channels} and "
            f"drop_path is {drop_path}; networks of timm have both"
        )
    if rest in SEVERAL_OUTPUTS:
        raise ValueError(f"{name} gives several outputs in training, which is not supported; take another network")
    network: nn.Module = torchvision.models.get_model(rest, weights=None, num_classes=num_classes)
    return network


def get_head(network: nn.Module) -> nn.Module:
    """The last layer, which gives the class scores and starts fresh; the two of networks that were distilled."""
    head = getattr(network, "get_classifier", lambda: None)()
    if isinstance(head, tuple):
        return nn.ModuleList(head)
    if isinstance(head, nn.Module):
        return head
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def layer_indices(network: nn.Module) -> dict[str, int | None]:
    """Place of each parameter, counted from the input; None for those of the last layer.

    timm's networks know their layers. For others, a layer is a part with weights of the network, or of a chain in it
    (`nn.Sequential`); a norm is of the layer before it.
    """
    head = {id(parameter) for parameter in get_head(network).parameters()}
    places: dict[str, int] = {}
    if matcher := getattr(network, "group_matcher", None):
        places = group_parameters(network, matcher(coarse=False), reverse=True)
    else:
        place = -1
        for prefix, part in iterate_layers(network):
            place += any(parameter.ndim > 1 for parameter in part.parameters())
            places |= {f"{prefix}.{name}": max(place, 0) for name, _ in part.named_parameters()}
    return {name: None if id(p) in head else int(places.get(name, 0)) for name, p in network.named_parameters()}


def iterate_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Parts of a network with their names, chains taken apart."""
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential):
            yield from iterate_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def set_backbone_trainable(network: nn.Module, learns: bool) -> None:
    """Whether all weights learn, or those of the last layer and of BatchNorm alone."""
    network.requires_grad_(learns)
    get_head(network).requires_grad_(True)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(True)
