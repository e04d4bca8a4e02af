"""ResNet weights for detectors.

torchvision's Faster and Mask R-CNN take them by `load_pretrained(model, path)`: the body of their pyramid is the ResNet
itself. detectron2 has names of its own, into which `write_detectron2` turns them.

Both feed the network images scaled in their own way, and the weights expect those of their pre-training. In torchvision
set `image_mean` and `image_std` of the detector. detectron2 reads images as BGR, takes PIXEL_MEAN off them and divides
by PIXEL_STD, and by default strides in the first convolution of a block, where the ResNets of torchvision and timm
stride in the second: its config needs MODEL.RESNETS.STRIDE_IN_1X1 False and the DEPTH (and RES2_OUT_CHANNELS 64 for 18
and 34), INPUT.FORMAT RGB, and PIXEL_MEAN and PIXEL_STD as in pre-training (for weights of this project, which has seen
[0, 1]: mean 0, and as deviation the largest value of an image; as many numbers as the stem has channels).
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
from hyspark.models.weights.files import read_weights, strip_wrappers
from hyspark.models.weights.third_party import COUNTER, FILE_PREFIXES, SPARK_SETTINGS, reason_to_ignore
from hyspark.utils.atomic import write_whole

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
RESNET_STEM = re.compile(r"(conv1)\.(weight)|(bn1)\.(weight|bias|running_mean|running_var)")
RESNET_BLOCK = re.compile(
    r"layer([1-4])\.(\d+)\.(?:(conv[123]|downsample\.0)\.(weight)|"
    r"(bn[123]|downsample\.1)\.(weight|bias|running_mean|running_var))"
)
"""Keys of a ResNet of basic or bottleneck blocks, in torchvision and timm."""


def write_detectron2(source: str | Path, out: Path, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Write the ResNet in a file as a .pkl that detectron2's MODEL.WEIGHTS takes; returns what was written.

    Raises FileNotFoundError; ValueError for another ending, for weights of another network than a 2D ResNet of basic
    or bottleneck blocks, whole, and for weights that `dtype` cannot hold.
    """
    if out.suffix != ".pkl":
        raise ValueError(f"{out}: detectron2 knows its own format by the ending .pkl; give it that")
    weights = detectron2_weights(read_weights(source, SPARK_SETTINGS), str(source))
    weights = {key: cast_tensor(value, dtype, f"{source}: {key}") for key, value in weights.items()}
    # detectron2 puts the network below names of its own (backbone.bottom_up.), which its heuristics find.
    contents = {
        "model": {key: value.numpy() for key, value in weights.items()},
        "__author__": "HySparK",
        "matching_heuristics": True,
    }
    write_whole(out, portable_pickle(contents))
    return weights


def detectron2_weights(given: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A state dict that holds a ResNet -> its tensors by detectron2's names (`res2.0.conv1.norm.weight`).

    Raises ValueError, naming `name`, for anything but a whole 2D ResNet of basic or bottleneck blocks.
    """
    plain = {strip_wrappers(key): value for key, value in given.items()}
    source = next((s for s in FILE_PREFIXES if {f"{s}conv1.weight", f"{s}layer1.0.conv1.weight"} <= plain.keys()), None)
    if source is None:
        raise ValueError(f"{name} holds no ResNet of basic or bottleneck blocks, which alone detectron2 has names for")
    weights = {}
    for key, value in plain.items():
        rest = key.removeprefix(source)
        own = detectron2_name(rest)
        if key.startswith(source) and own:
            if value.ndim not in (1, 4):
                raise ValueError(f"{name}: {key} has {value.ndim - 2} axes; detectron2 takes images, of two")
            weights[own] = value
        elif not rest.endswith(COUNTER) and not reason_to_ignore(rest, rest, {}):
            raise ValueError(
                f"{name}: {key} is of no ResNet of basic or bottleneck blocks, which alone detectron2 has names for"
            )
    check_resnet_complete(weights, name)
    return weights


def detectron2_name(key: str) -> str | None:
    """A ResNet's key in detectron2's terms; None where it is none of a ResNet's body."""
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
    """Raises ValueError where a stage, a block or part of one is not there."""
    depth = 3 if "res2.0.conv3.weight" in weights else 2  # convolutions of a block: bottleneck or basic
    needed = ["stem.conv1"]
    for stage in range(2, 6):
        blocks = {int(key.split(".")[1]) for key in weights if key.startswith(f"res{stage}.")}
        needed += [f"res{stage}.{b}.conv{n + 1}" for b in range(max(blocks, default=0) + 1) for n in range(depth)]
        if stage > 2 or depth == 3:
            needed.append(f"res{stage}.0.shortcut")
    parts = ("weight", *(f"norm.{part}" for part in NORM_TENSORS))
    if lacking := [f"{layer}.{part}" for layer in needed for part in parts if f"{layer}.{part}" not in weights]:
        raise ValueError(f"{name} lacks {len(lacking)} tensors of the ResNet ({', '.join(lacking[:3])}, ...)")


def portable_pickle(contents: Any) -> bytes:
    """A pickle whose arrays any numpy reads: by default it names modules that numpy 1 and 2 keep at different places,
    and detectron2 is often installed beside an old one.
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=4)
    pickler.dispatch_table = {np.ndarray: lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))}
    pickler.dump(contents)
    return file.getvalue()
