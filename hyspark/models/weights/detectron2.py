"""Export ResNet weights for detectors.

torchvision's Faster and Mask R-CNN load them by `load_pretrained(model, path)`: their backbone's body is the ResNet
itself. detectron2 has its own key names, to which `write_detectron2` converts.

The weights expect images scaled as in pre-training, but detectors scale them in their own way. In torchvision set the
detector's `image_mean` and `image_std`. detectron2 reads images as BGR, subtracts PIXEL_MEAN and divides by PIXEL_STD.
By default it strides in the first convolution of a block; the ResNets of torchvision and timm stride in the second.
So its config needs:

- MODEL.RESNETS.STRIDE_IN_1X1 False, and the DEPTH (and RES2_OUT_CHANNELS 64 for 18 and 34).
- INPUT.FORMAT RGB.
- PIXEL_MEAN and PIXEL_STD as in pre-training, one number per channel of the stem. Weights of this project saw images
  in [0, 1]: mean 0, and as deviation the largest value of an image.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyspark.models.weights.export import cast_tensor
from hyspark.models.weights.files import read_contents, strip_wrappers
from hyspark.models.weights.leftovers import reason_to_ignore
from hyspark.models.weights.prefixes import COUNTER, FILE_PREFIXES
from hyspark.models.weights.search import choose_state_dict
from hyspark.models.weights.third_party import SPARK_SETTINGS
from hyspark.utils.atomic import write_whole

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
RESNET_STEM = re.compile(r"(conv1)\.(weight)|(bn1)\.(weight|bias|running_mean|running_var)")
RESNET_BLOCK = re.compile(
    r"layer([1-4])\.(\d+)\.(?:(conv[123]|downsample\.0)\.(weight)|"
    r"(bn[123]|downsample\.1)\.(weight|bias|running_mean|running_var))"
)
"""Keys of a ResNet of basic or bottleneck blocks, in torchvision and timm."""


def write_detectron2(
    source: str | Path, out: Path, dtype: torch.dtype = torch.float16, *, key: str = ""
) -> dict[str, Tensor]:
    """Write the ResNet in a file as a .pkl for detectron2's MODEL.WEIGHTS.

    Args:
        source: a file with a complete 2D ResNet of basic or bottleneck blocks.
        out: path of the .pkl file.
        dtype: precision of the file.
        key: key of the state dict in the source, see `load_pretrained`.

    Returns:
        The tensors written.

    Raises:
        FileNotFoundError: there is no source.
        ValueError: `out` does not end in .pkl; the source is another or an incomplete network; values exceed the range
            of `dtype`.
    """
    if out.suffix != ".pkl":
        raise ValueError(f"{out}: expected a path that ends in .pkl, by which detectron2 recognises its own format")
    contents = read_contents(source)
    chosen, _ = choose_state_dict(contents, str(source), count_resnet, settings=SPARK_SETTINGS, key=key)
    weights = detectron2_weights(chosen.tensors, str(source))
    weights = {key: cast_tensor(value, dtype, f"{source}: {key}") for key, value in weights.items()}
    # detectron2 has the network below a prefix (backbone.bottom_up.), which its heuristics find.
    contents = {
        "model": {key: value.numpy() for key, value in weights.items()},
        "__author__": "HySparK",
        "matching_heuristics": True,
    }
    write_whole(out, portable_pickle(contents))
    return weights


def detectron2_weights(given: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename the tensors of a ResNet to detectron2's names (`res2.0.conv1.norm.weight`).

    Raises:
        ValueError: the state dict is not a complete 2D ResNet of basic or bottleneck blocks.
    """
    plain = {strip_wrappers(key): value for key, value in given.items()}
    source = next((s for s in FILE_PREFIXES if {f"{s}conv1.weight", f"{s}layer1.0.conv1.weight"} <= plain.keys()), None)
    if source is None:
        raise ValueError(f"{name}: expected a ResNet of basic or bottleneck blocks, the only one detectron2 has")
    weights = {}
    for key, value in plain.items():
        rest = key.removeprefix(source)
        own = detectron2_name(rest)
        if key.startswith(source) and own:
            if value.ndim not in (1, 4):
                raise ValueError(f"{name}: {key}: expected 2 spatial axes for detectron2, got {value.ndim - 2}")
            weights[own] = value
        elif not rest.endswith(COUNTER) and not reason_to_ignore(rest, rest, {}):
            raise ValueError(
                f"{name}: {key} belongs to no ResNet of basic or bottleneck blocks, the only one detectron2 has"
            )
    check_resnet_complete(weights, name)
    return weights


def count_resnet(given: Mapping[str, Tensor]) -> int:
    """Count the tensors of a ResNet in a state dict."""
    plain = [strip_wrappers(key) for key in given]
    return max(
        sum(key.startswith(source) and detectron2_name(key.removeprefix(source)) is not None for key in plain)
        for source in FILE_PREFIXES
    )


def detectron2_name(key: str) -> str | None:
    """Convert a key of a ResNet's body to detectron2's name; None for other keys."""
    if found := RESNET_STEM.fullmatch(key):
        conv, _, norm, part = found.groups()
        return "stem.conv1.weight" if conv else f"stem.conv1.norm.{part}" if norm else None
    if found := RESNET_BLOCK.fullmatch(key):
        stage, block, conv, _, norm, part = found.groups()
        layer = (conv or norm).replace("bn", "conv").replace("downsample.0", "shortcut")
        layer = layer.replace("downsample.1", "shortcut")
        return f"res{int(stage) + 1}.{block}.{layer}.{'weight' if conv else f'norm.{part}'}"
    return None


def check_resnet_complete(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError if a stage, a block or a tensor of a block is missing."""
    depth = 3 if "res2.0.conv3.weight" in weights else 2  # convolutions of a block: bottleneck or basic
    needed = ["stem.conv1"]
    for stage in range(2, 6):
        blocks = {int(key.split(".")[1]) for key in weights if key.startswith(f"res{stage}.")}
        needed += [f"res{stage}.{b}.conv{n + 1}" for b in range(max(blocks, default=0) + 1) for n in range(depth)]
        if stage > 2 or depth == 3:
            needed.append(f"res{stage}.0.shortcut")
    parts = ("weight", *(f"norm.{part}" for part in NORM_TENSORS))
    if lacking := [f"{layer}.{part}" for layer in needed for part in parts if f"{layer}.{part}" not in weights]:
        raise ValueError(f"{name}: {len(lacking)} tensors of the ResNet are missing ({', '.join(lacking[:3])}, ...)")


def portable_pickle(contents: Any) -> bytes:
    """Pickle contents so that any numpy reads the arrays.

    A default pickle names modules that numpy 1 and 2 have at different paths, and detectron2 often comes with numpy 1.
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    pickler.dispatch_table = {np.ndarray: lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))}
    pickler.dump(contents)
    return file.getvalue()
