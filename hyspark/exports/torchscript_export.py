"""A segmentation network as TorchScript, by tracing: any batch, the crop size of its training alone."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hyspark.evaluation.segmentation.description import KEY


def write_torchscript(network: nn.Module, in_channels: int, crop: Sequence[int], description: str, path: Path) -> None:
    """Write a network as TorchScript of fp32: (b, c, *crop) -> class scores (b, n, *crop).

    Args:
        network: In evaluation mode, on the CPU.
        in_channels: Its input channels.
        crop: Voxels per axis, which are fixed, as the positions of tokens are traced.
        description: What the file says of the network, see `describe_network`; an extra file of the archive.
        path: The file.
    """
    example = torch.zeros(1, in_channels, *crop)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, on sizes that are fixed by intention
        traced = torch.jit.trace(network, example, check_trace=False)
        torch.jit.save(traced, path, _extra_files={KEY: description})
