"""The network that an nnU-Net plan describes, built from dynamic_network_architectures.

A plan names classes. Only modules of torch.nn and networks of dynamic_network_architectures are looked up, so that a
plan cannot call anything else.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from hyspark.models.axis_order import permute_axes
from hyspark.models.backbones import Backbone
from hyspark.models.network_faults import UnsupportedNetworkError
from hyspark.models.nnunet_plans import UNETS, NnunetPlan
from hyspark.utils.install import extra_error
from hyspark.utils.text import first_line

NUM_CLASSES = 2
"""Outputs of a network that is not trained to segment here."""
OF_TORCH = re.compile(r"torch\.nn(?:\.modules\.\w+)?\.([A-Z]\w*)")
OF_NETWORKS = re.compile(r"(dynamic_network_architectures\.architectures(?:\.[a-z]\w*)+)\.([A-Z]\w*)")
PER_AXIS = ("kernel_sizes", "strides")
"""Arguments of a network with one number per axis for each stage."""


def build_from_plan(plan: NnunetPlan, in_channels: int) -> Backbone:
    """Build the randomly initialised network of a plan, with nnU-Net's own initialisation.

    Args:
        plan: the plan; the network takes crops in its axis order.
        in_channels: channels of a crop.

    Returns:
        The network, decoder included, with a function that computes its encoder's maps.

    Raises:
        ModuleNotFoundError: dynamic_network_architectures is not installed.
        UnsupportedNetworkError: a class is none that plans may name, or the network cannot be built.
    """
    return Backbone(build_network(plan.architecture, in_channels), run_encoder)


def build_network(architecture: dict[str, Any], in_channels: int) -> nn.Module:
    """Build a network as an architecture of a plan says; errors as for `build_from_plan`."""
    name = architecture["network_class_name"]
    network_class = find_network_class(name)
    options = dict(architecture["arch_kwargs"])
    for argument in architecture["_kw_requires_import"]:
        if options.get(argument) is not None:
            options[argument] = find_layer_class(argument, options[argument])
    try:
        network: nn.Module = network_class(input_channels=in_channels, num_classes=NUM_CLASSES, **options)
        if initialise := getattr(network, "initialize", None):
            network.apply(initialise)
    except Exception as error:  # third-party networks raise any type
        raise UnsupportedNetworkError(
            f"{name}: cannot be built as the plan says ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(getattr(network, "encoder", None), nn.Module):
        raise UnsupportedNetworkError(
            f"{name}: expected a U-Net with an encoder; plan a ResidualEncoderUNet or PlainConvUNet"
        )
    return network


def find_network_class(name: Any) -> Any:
    """Import the class of a network of dynamic_network_architectures; errors as for `build_from_plan`."""
    found = OF_NETWORKS.fullmatch(str(name))
    if found is None:
        raise UnsupportedNetworkError(
            f"network_class_name: expected a class of dynamic_network_architectures.architectures, got {name!r}; "
            "build another network by PACKAGE.MODULE:FACTORY"
        )
    network_class = None
    for module in (found[1], UNETS):  # U-Nets of earlier modules lie in the second
        try:
            network_class = network_class or getattr(import_module(module), found[2], None)
        except ImportError as error:
            library = UNETS.partition(".")[0]
            if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(f"{library}."):
                continue
            need = "networks of nnU-Net's plans need dynamic_network_architectures"
            raise extra_error(error, need, "nnunet", library) from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise UnsupportedNetworkError(
            f"network_class_name: the installed dynamic_network_architectures has no network {name}; update it"
        )
    return network_class


def find_layer_class(argument: str, name: Any) -> type[nn.Module]:
    """Return the class of torch.nn that a plan names; raise UnsupportedNetworkError for any other name."""
    found = OF_TORCH.fullmatch(str(name))
    layer = getattr(nn, found[1], None) if found else None
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise UnsupportedNetworkError(f"{argument}: expected a layer of torch.nn, got {name!r}; change it in the plan")
    return layer


def run_encoder(network: Any, crops: Tensor) -> Any:
    """Compute the maps of a U-Net's encoder for crops (b, c, *size) in the axes of the plan."""
    return network.encoder(crops)


def turned_architecture(architecture: dict[str, Any], axes: Sequence[int]) -> dict[str, Any]:
    """Return the architecture of the same network for crops with other axes.

    Args:
        architecture: of a plan.
        axes: for each axis of the other crops, the axis of the plan that it is.
    """
    options = dict(architecture["arch_kwargs"])
    for name in PER_AXIS:
        if isinstance(options.get(name), list):
            options[name] = [[one[i] for i in axes] if isinstance(one, list) else one for one in options[name]]
    return architecture | {"arch_kwargs": options}


def turn_kernels(weight: Tensor, axes: Sequence[int]) -> Tensor:
    """Permute the kernel of a 3D convolution (out, in, *edges) to other axes; other tensors are unchanged."""
    return permute_axes(weight, axes).contiguous() if weight.ndim == 5 else weight
