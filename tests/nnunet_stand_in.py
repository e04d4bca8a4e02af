"""A plans.json, and a small U-Net with the names of nnU-Net's own, for tests without nnU-Net.

Its layers have the aliases of dynamic_network_architectures: `conv` is also `all_modules.0`, and the decoder holds the
encoder.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

NAME = "dynamic_network_architectures.architectures.unet"
ARCHITECTURE = {
    "network_class_name": f"{NAME}.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
"""Axes of the first stride: the third of x, y, z under transpose_forward [1, 0, 2] is y."""
PLANS: dict[str, Any] = {
    "plans_name": "smallPlans",
    "dataset_name": "Dataset042_Small",
    "transpose_forward": [1, 0, 2],
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 60.0, "std": 90.0, "percentile_00_5": -120.0, "percentile_99_5": 380.0, "max": 900.0}
    },
    "configurations": {
        "2d": {"patch_size": [64, 64]},
        "3d_fullres": {
            "spacing": [8.0, 9.0, 7.0],
            "patch_size": [16, 24, 20],
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "architecture": ARCHITECTURE,
        },
        "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [16.0, 18.0, 14.0]},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}
"""Axes of the plan: y, z, x."""


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: list[int], stride: list[int], options: dict[str, Any]):
        super().__init__()
        padding = [k // 2 for k in kernel]
        self.conv = options["conv_op"](inputs, outputs, kernel, stride, padding, bias=options["conv_bias"])
        self.norm = options["norm_op"](outputs, **options["norm_op_kwargs"])
        self.nonlin = options["nonlin"](**options["nonlin_kwargs"])
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x):
        return self.all_modules(x)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.convs = nn.Sequential(*blocks)

    def forward(self, x):
        return self.convs(x)


class Encoder(nn.Module):
    def __init__(self, inputs: int, options: dict[str, Any]):
        super().__init__()
        widths, kernels = options["features_per_stage"], options["kernel_sizes"]
        self.stem = Stack(ConvBlock(inputs, widths[0], kernels[0], [1, 1, 1], options))
        before = [widths[0], *widths]
        self.stages = nn.Sequential(
            *(
                Stack(ConvBlock(before[i], widths[i], kernels[i], options["strides"][i], options))
                for i in range(options["n_stages"])
            )
        )

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    def __init__(self, encoder: Encoder, num_classes: int, options: dict[str, Any]):
        super().__init__()
        widths = options["features_per_stage"]
        self.encoder = encoder
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(widths[i], widths[i - 1], options["strides"][i], options["strides"][i])
            for i in range(len(widths) - 1, 0, -1)
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, num_classes, 1) for width in widths[-2::-1])


class ResidualEncoderUNet(nn.Module):
    def __init__(self, input_channels: int, num_classes: int, **options: Any):
        super().__init__()
        self.encoder = Encoder(input_channels, options)
        self.decoder = Decoder(self.encoder, num_classes, options)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, a=0.01)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the network as that of dynamic_network_architectures."""
    package, middle, _ = NAME.split(".")
    for name in (package, f"{package}.{middle}", NAME):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[NAME].ResidualEncoderUNet = ResidualEncoderUNet  # type: ignore[attr-defined]


def write_plans(folder: Path, **changes: Any) -> Path:
    """Write the plans with other values of 3d_fullres or, where it has none of the name, of the plan."""
    content = deepcopy(PLANS)
    for name, value in changes.items():
        (content["configurations"]["3d_fullres"] if name in ("spacing", "patch_size", *KEYS) else content)[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plans.json"
    path.write_text(json.dumps(content))
    return path


KEYS = ("normalization_schemes", "use_mask_for_norm", "architecture")


def with_strides(strides: list[list[int]]) -> dict[str, Any]:
    """The architecture with other strides."""
    found = deepcopy(ARCHITECTURE)
    found["arch_kwargs"]["strides"] = strides  # type: ignore[index]
    return found


def made_in_volume_axes(in_channels: int, axes: int) -> nn.Module:
    """The network for crops in the axes x, y, z, as a factory of a user makes it; the plan's axes are y, z, x."""
    options = dict(ARCHITECTURE["arch_kwargs"])  # type: ignore[call-overload]
    for name in ("kernel_sizes", "strides"):
        options[name] = [[one[2], one[0], one[1]] for one in options[name]]
    options |= {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    network = ResidualEncoderUNet(in_channels, 2, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network
