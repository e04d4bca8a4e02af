"""Networks for image classification: by name, with their classification layer and the order of their layers."""

from collections.abc import Iterator
from typing import Any

import torchvision
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyspark.models.backbones import check_name, create_timm, torchvision_names
from hyspark.models.network_faults import UnsupportedNetworkError
from hyspark.models.weights.timm_names import quiet_timm

AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
"""Networks of torchvision with auxiliary classifiers, which would need a loss of their own."""


def build_classifier(
    name: str, channels: int, num_classes: int, drop_path: float = 0.0, img_size: int = 0
) -> nn.Module:
    """Build a randomly initialised network: images (b, channels, h, w) -> class scores (b, num_classes).

    Args:
        name: timm/NAME or torchvision/NAME.
        channels: channels of an image.
        num_classes: number of classes.
        drop_path: largest probability of skipping a block.
        img_size: edge of an image, for transformers of timm that take one size alone; 0 leaves them at their own.

    Raises:
        ValueError: the name is unknown, or the network does not support the channels or `drop_path`.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            network = create_timm(rest, in_chans=channels, num_classes=num_classes, **options)
        except UnsupportedNetworkError as error:
            if isinstance(error.__cause__, TypeError) and drop_path:
                raise ValueError(
                    f"{name} cannot be built with drop_path={drop_path}: {error.__cause__}; set it to 0"
                ) from error
            raise
        fit_to_size(network, img_size)
        return network
    check_name(rest, torchvision_names(), library)
    if channels != 3 or drop_path:
        raise ValueError(
            f"{name}: expected channels=3 and drop_path=0 for a network of torchvision, got channels={channels} and "
            f"drop_path={drop_path}; networks of timm support both"
        )
    if rest in AUXILIARY_OUTPUTS:
        raise ValueError(f"{name}: has auxiliary classifiers in training, which are not supported; use another network")
    of_torchvision: nn.Module = torchvision.models.get_model(rest, weights=None, num_classes=num_classes)
    return of_torchvision


def fit_to_size(network: nn.Module, img_size: int) -> None:
    """Set the size of images in a transformer of timm that refuses any but its own."""
    patches: Any = getattr(network, "patch_embed", None)
    resize = getattr(network, "set_input_size", None)
    own = tuple(patches.img_size or ()) if getattr(patches, "strict_img_size", False) else ()
    if img_size and resize and own and own != (img_size, img_size):
        with quiet_timm():
            resize(img_size=(img_size, img_size))


def get_head(network: nn.Module) -> nn.Module:
    """Return the layer that gives the class scores, or both such layers of a distilled network."""
    head = getattr(network, "get_classifier", lambda: None)()
    if isinstance(head, tuple):
        return nn.ModuleList(head)
    if isinstance(head, nn.Module):
        return head
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def layer_indices(network: nn.Module) -> dict[str, int | None]:
    """Compute the layer index of each parameter, counted from the input.

    Networks of timm define their layers. In others a layer is a module with weights, nested `nn.Sequential` being
    flattened; a norm belongs to the layer before it.

    Returns:
        Index by name of the parameter; None for those of the head.
    """
    head = {id(parameter) for parameter in get_head(network).parameters()}
    indices: dict[str, int] = {}
    if matcher := getattr(network, "group_matcher", None):
        indices = group_parameters(network, matcher(coarse=False), reverse=True)
    else:
        index = -1
        for prefix, part in iterate_layers(network):
            index += any(parameter.ndim > 1 for parameter in part.parameters())
            indices |= {f"{prefix}.{name}": max(index, 0) for name, _ in part.named_parameters()}
    return {name: None if id(p) in head else int(indices.get(name, 0)) for name, p in network.named_parameters()}


def iterate_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the children of a network with their names; nested `nn.Sequential` are flattened."""
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential):
            yield from iterate_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def set_backbone_trainable(network: nn.Module, is_trainable: bool) -> None:
    """Train all weights, or only those of the head and of BatchNorm."""
    network.requires_grad_(is_trainable)
    get_head(network).requires_grad_(True)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(True)
