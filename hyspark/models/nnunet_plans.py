"""nnU-Net's plans.json: one configuration of it, in the axes of this package.

nnU-Net reads an image as an array of axes z, y, x of its file, and permutes them by `transpose_forward`. Here volumes
have the axes x, y, z. `NnunetPlan.axis_order` names the axis of x, y, z that is each axis of the plan.

Only JSON is read here, without torch and nnU-Net.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

from hyspark.utils.text import first_line, nearest

PREFIX = "nnunet/"
"""Start of the names of backbones that a plan describes."""
PLANS_KEY = "nnunet_plans"
"""Key of the plan in checkpoints and files of weights."""
OWN_SETTINGS = "hyspark"
"""Key of what this package adds to files of nnU-Net.

In plans: settings of `nnUNetTrainer_HySparK`, whose network turns arrays to x y z. In the file of
`hyspark export --nnunet`: what the weights were made with, and their plan.
"""
DEFAULT_CONFIGURATION = "3d_fullres"
CT_SCHEME = "CTNormalization"
IMAGE_SCHEME = "ZScoreNormalization"
SCHEMES = {CT_SCHEME: "ct-zscore", IMAGE_SCHEME: "zscore", "NoNormalization": "none"}
"""Intensities by nnU-Net's normalisation, without a mask."""
READ_KEYS = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm", "architecture")
"""Keys of a configuration that are read here, and kept."""
UNETS = "dynamic_network_architectures.architectures.unet"
"""Module of U-Nets."""
EARLIER_CLASSES = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
"""Networks of plans before nnU-Net 2.3, with the argument for their number of convolutions or blocks."""
EARLIER_KEYS = (
    *("conv_kernel_sizes", "pool_op_kernel_sizes", "n_conv_per_stage_encoder", "n_conv_per_stage_decoder"),
    *("UNet_base_num_features", "unet_max_num_features"),
)
"""Keys of a network in plans before nnU-Net 2.3, beside UNet_class_name."""


@dataclass(frozen=True)
class NnunetPlan:
    """One configuration of a plan; numbers per axis are in the order x, y, z.

    Attributes:
        content: what was read, itself in the form of a plans.json with this configuration alone.
        configuration: its name.
        axis_order: axis of x, y, z (0, 1, 2) that is each axis of the plan, and of its network.
        spacing: mm.
        patch_size: voxels of a crop.
        stride: voxels per position of the deepest map.
        schemes: names of the normalisation, one per channel.
        are_masked: whether mean and deviation are those of nonzero voxels alone, one per channel.
        architecture: network_class_name, arch_kwargs, _kw_requires_import.
    """

    content: dict[str, Any]
    configuration: str
    axis_order: tuple[int, ...]
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    stride: tuple[int, ...]
    schemes: tuple[str, ...]
    are_masked: tuple[bool, ...]
    architecture: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the plan, as nnU-Net's flag -p takes it."""
        return str(self.content["plans_name"])

    @property
    def dataset(self) -> str:
        """Name of the data set, such as Dataset501_OpenKBP."""
        return str(self.content["dataset_name"])

    def intensities(self, channel: int) -> dict[str, float]:
        """Return mean, std and percentiles of the foreground of a channel; empty if the plan has none."""
        found = self.content["foreground_intensity_properties_per_channel"].get(str(channel), {})
        return {name: float(value) for name, value in found.items()}

    def text(self) -> str:
        """Write what was read as JSON, which `read_plan` reads."""
        return json.dumps(self.content, indent=1, sort_keys=True)


def intensity_of_scheme(scheme: str, is_masked: bool) -> str:
    """Return the intensity that stands for a normalisation of nnU-Net; empty if there is none.

    Args:
        scheme: name of the normalisation.
        is_masked: whether it is by nonzero voxels alone (`use_mask_for_norm`).
    """
    return "mr" if scheme == IMAGE_SCHEME and is_masked else SCHEMES.get(scheme, "")


def ct_settings(of_channels: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return hu_min, hu_max, input_mean and input_std for channels, of which one or more are CT.

    Args:
        of_channels: mean, std, percentile_00_5 and percentile_99_5 of each channel; empty where it is not CT, which
            gives mean 0 and deviation 1.

    Returns:
        The widest window of all; one mean and deviation if they are equal in all channels, else one per channel.
    """
    of_ct = [one for one in of_channels if one]
    return {
        "hu_min": min(one["percentile_00_5"] for one in of_ct),
        "hu_max": max(one["percentile_99_5"] for one in of_ct),
        "input_mean": shorten([one.get("mean", 0.0) for one in of_channels]),
        "input_std": shorten([max(one.get("std", 1.0), 1e-8) for one in of_channels]),
    }


def shorten(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return one value if all are equal, else all of them."""
    return tuple(values[:1] if len(set(values)) == 1 else values)


def is_plan(backbone: str) -> bool:
    """Return whether the name of a backbone is that of a plan."""
    return backbone.startswith(PREFIX)


def split_plan_name(backbone: str) -> tuple[Path, str]:
    """Split nnunet/PLANS.json:CONFIGURATION, with or without the prefix, into file and configuration."""
    rest = backbone.removeprefix(PREFIX)
    file, colon, configuration = rest.rpartition(":")
    if not colon or "/" in configuration or configuration.endswith(".json"):
        file, configuration = rest, DEFAULT_CONFIGURATION
    return Path(file), configuration or DEFAULT_CONFIGURATION


def without_plan_folder(model: str) -> str:
    """Return METHOD/nnunet/CONFIGURATION for a model of a plan, wherever the plan lies; other models as they are."""
    method, _, backbone = model.partition("/")
    return f"{method}/{PREFIX}{split_plan_name(backbone)[1]}" if is_plan(backbone) else model


def read_plan(file: str | Path, configuration: str = DEFAULT_CONFIGURATION) -> NnunetPlan:
    """Read one configuration of a plans.json.

    Args:
        file: nnU-Net's plans.json, by whatever name.
        configuration: such as 3d_fullres or 3d_lowres.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plans.json of nnU-Net v2, has no such configuration, or one that no network here fits.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected nnU-Net's plans.json, got {'a folder' if path.is_dir() else 'no file'}"
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected nnU-Net's plans.json, got no JSON ({error})") from error
    return parse_plan(content, configuration, str(path))


def parse_plan(content: Any, configuration: str, source: str) -> NnunetPlan:
    """Make a plan of the contents of a plans.json; errors as for `read_plan`, which name the source."""
    try:
        return checked_plan(content, configuration, source)
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{source}: expected a plans.json as nnU-Net v2 writes, got a value of another form "
            f"({type(error).__name__}: {first_line(error)}); plan the data set again"
        ) from error


def checked_plan(content: Any, configuration: str, source: str) -> NnunetPlan:
    """Make a plan, see `parse_plan`; raise any error of Python for a value of another type or length."""
    if not isinstance(content, Mapping) or not isinstance(content.get("configurations"), Mapping):
        version = (
            "plans of nnU-Net v1" if isinstance(content, Mapping) and "plans_per_stage" in content else "another JSON"
        )
        raise ValueError(f"{source}: expected a plans.json of nnU-Net v2 (configurations), got {version}; plan with v2")
    check_keys(content, ("plans_name", "dataset_name", "transpose_forward"), source)
    found = resolve_configuration(content["configurations"], configuration, source)
    where = f"{source}: {configuration}"
    if found.get("previous_stage"):
        raise ValueError(f"{where}: its network also takes labels of an earlier stage; name 3d_fullres or 3d_lowres")
    if "architecture" not in found:
        found["architecture"] = earlier_architecture(found, where)
    check_keys(found, READ_KEYS, where)
    if len(found["patch_size"]) != 3:
        raise ValueError(f"{where}: expected 3 axes, got {len(found['patch_size'])}; name a configuration of volumes")
    for name in ("spacing", "patch_size"):
        if len(found[name]) != 3 or not all(0 < number < inf for number in found[name]):
            raise ValueError(f"{where}: {name}: expected 3 numbers above 0, got {found[name]}")
    schemes, are_masked = found["normalization_schemes"], found["use_mask_for_norm"]
    if not isinstance(schemes, list) or len(schemes) != len(are_masked):
        raise ValueError(f"{where}: expected a use_mask_for_norm for each of normalization_schemes, got {are_masked}")
    order = tuple(2 - axis for axis in content["transpose_forward"])
    if sorted(order) != [0, 1, 2]:
        raise ValueError(
            f"{source}: transpose_forward: expected the axes 0, 1, 2 in any order, got {content['transpose_forward']}"
        )
    architecture = found["architecture"]
    check_keys(architecture, ("network_class_name", "arch_kwargs", "_kw_requires_import"), f"{where}: architecture")
    strides = architecture["arch_kwargs"].get("strides") or [[1, 1, 1]]
    total = [prod(stride[i] if isinstance(stride, list) else stride for stride in strides) for i in range(3)]
    kept = {
        "plans_name": content["plans_name"],
        "dataset_name": content["dataset_name"],
        "transpose_forward": list(content["transpose_forward"]),
        "foreground_intensity_properties_per_channel": content.get("foreground_intensity_properties_per_channel") or {},
        "configurations": {configuration: {name: found[name] for name in READ_KEYS}},
    }
    return NnunetPlan(
        content=kept,
        configuration=configuration,
        axis_order=order,
        spacing=to_volume_axes([float(x) for x in found["spacing"]], order),
        patch_size=to_volume_axes([int(x) for x in found["patch_size"]], order),
        stride=to_volume_axes(total, order),
        schemes=tuple(map(str, schemes)),
        are_masked=tuple(map(bool, are_masked)),
        architecture=architecture,
    )


def to_volume_axes(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    """Arrange values per axis of a network by the axes x, y, z; `order` names the axis of each, empty for these."""
    return tuple(values[list(order).index(axis)] for axis in range(len(values))) if order else tuple(values)


def to_network_axes(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    """Arrange values per axis x, y, z by the axes of a network, the inverse of `to_volume_axes`."""
    return tuple(values[axis] for axis in order) if order else tuple(values)


def check_keys(content: Mapping[str, Any], keys: Sequence[str], source: str) -> None:
    """Raise ValueError if a key is missing."""
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{source}: expected {', '.join(missing)}, as nnU-Net v2 writes; is it complete?")


def resolve_configuration(configurations: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return a configuration with what it inherits from others; raise ValueError if there is no such one."""
    chain: list[str] = []
    while name:
        if name not in configurations or name in chain:
            known = ", ".join(configurations)
            raise ValueError(f"{source}: no configuration {name!r}; it has {known}{nearest(name, configurations)}")
        chain.append(name)
        name = configurations[name].get("inherits_from", "")
    return {key: value for one in reversed(chain) for key, value in configurations[one].items()}


def earlier_architecture(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Describe the network of a configuration from before nnU-Net 2.3, which named its sizes alone.

    Raises:
        ValueError: the class is another than the two of that time, or a key is missing.
    """
    name = found.get("UNet_class_name")
    if name not in EARLIER_CLASSES:
        raise ValueError(
            f"{source}: expected architecture, or UNet_class_name {' or '.join(EARLIER_CLASSES)} of earlier plans, got "
            f"{name!r}; run nnUNetv2_plan_experiment again"
        )
    check_keys(found, EARLIER_KEYS, source)
    base, most = found["UNet_base_num_features"], found["unet_max_num_features"]
    num = len(found["n_conv_per_stage_encoder"])
    axes = len(found["patch_size"])
    return {
        "network_class_name": f"{UNETS}.{name}",
        "arch_kwargs": {
            "n_stages": num,
            "features_per_stage": [min(base * 2**i, most) for i in range(num)],
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": found["conv_kernel_sizes"],
            "strides": found["pool_op_kernel_sizes"],
            EARLIER_CLASSES[name]: found["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": found["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
