"""Networks of nnU-Net as its planner makes them, for `--networks planned:resenc_m`.

pip install --no-deps --target FOLDER dynamic_network_architectures    # then FOLDER on PYTHONPATH
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

PACKAGE = "dynamic_network_architectures"


def missing(network: str) -> str:
    """Return what to install for a network of this module, "" where it is installed, and for all others."""
    if network.partition(":")[0] != "planned" or find_spec(PACKAGE) is not None:
        return ""
    return f"{PACKAGE} is not installed: pip install --no-deps --target FOLDER {PACKAGE}, then PYTHONPATH=FOLDER"


def resenc_m(in_channels: int, axes: int) -> nn.Module:
    """Build the encoder of ResidualEncoderUNet with the stages, blocks and norms of the preset ResEncM for CT."""
    return resenc((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), in_channels, axes)


def resenc_toy(in_channels: int, axes: int) -> nn.Module:
    """Build the same encoder with two small stages."""
    return resenc((4, 8), (1, 1), in_channels, axes)


def resenc(features: Sequence[int], blocks: Sequence[int], in_channels: int, axes: int) -> nn.Module:
    """Build the encoder of ResidualEncoderUNet with channels and blocks per stage, of stride 2 from the second on."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    stages = len(features)
    norm: Any = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes]
    network = ResidualEncoderUNet(
        input_channels=in_channels,
        n_stages=stages,
        features_per_stage=list(features),
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[axes],
        kernel_sizes=[[3] * axes] * stages,
        strides=[[1] * axes, *[[2] * axes] * (stages - 1)],
        n_blocks_per_stage=list(blocks),
        num_classes=2,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    encoder: nn.Module = network.encoder
    return encoder
