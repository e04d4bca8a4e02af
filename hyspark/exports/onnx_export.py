"""A segmentation network as an ONNX file, for any batch and any size of 16 voxels times a number per axis."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyspark.evaluation.segmentation.deployed import INPUT, OUTPUT, import_for_onnx
from hyspark.evaluation.segmentation.description import KEY
from hyspark.models.defaults import PATCH
from hyspark.utils.install import extra_error
from hyspark.utils.log import silence

LARGEST_BYTES = 2 * 10**9
"""Bytes of weights that an ONNX file holds, below the 2 GiB of protobuf."""
EXAMPLE = (2, 3, 4)
"""Patches per axis of the traced example; unequal, so that no axis is taken for another, and small for any memory."""
MAX_PATCHES, MAX_BATCH = 64, 1024
"""Largest patches per axis, and batch, that the graph is checked for."""


def import_onnx_packages() -> None:
    """Import the packages that an ONNX export needs.

    Raises:
        ModuleNotFoundError: One is not installed.
    """
    import_for_onnx("onnxruntime")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise extra_error(error, "--onnx needs onnx and onnxscript", "onnx", "onnx", "onnxscript") from error


def write_onnx(network: nn.Module, in_channels: int, description: str, path: Path) -> None:
    """Write a network as an ONNX file of fp32: image (b, c, *size) -> scores (b, n, *size).

    Args:
        network: In evaluation mode, on the CPU.
        in_channels: Its input channels.
        description: What the file says of the network, see `describe_network`.
        path: The file.

    Raises:
        ValueError: The weights are larger than such a file may be.
    """
    num_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    if num_bytes > LARGEST_BYTES:
        raise ValueError(
            f"{path.name}: {num_bytes / 1e9:.1f} GB of weights, and an ONNX file holds 2; use --torchscript or --bundle"
        )
    example = torch.zeros(2, in_channels, *(PATCH * num for num in EXAMPLE))
    sizes = {2 + i: PATCH * torch.export.Dim(name, min=1, max=MAX_PATCHES) for i, name in enumerate("xyz")}
    shapes: Any = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH), **sizes},)
    with silence(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[KEY] = description
        program.save(path, external_data=False)
