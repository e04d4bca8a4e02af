"""Export weights: one small .safetensors file with the settings that made it, which cannot execute anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hyspark.models.nnunet_plans import PLANS_KEY
from hyspark.models.weights.files import made_with, read_contents
from hyspark.models.weights.load import ENCODER, LIGHT_DECODER, MASK_TOKEN, RELEASED_DECODER, strip_holder
from hyspark.models.weights.search import choose_state_dict
from hyspark.utils.atomic import write_whole

MADE_WITH = (
    *("encoder_widths", "encoder_depths", "expansions", "vit_depth", "num_heads"),
    *("decoder_width", "decoder_min_width"),
    *("spacing", "intensity", "image_channels", "hu_min", "hu_max", "input_mean", "input_std", "axis_order"),
    *("crop_size", "input_size", "mask_ratio", "mask", "hide"),
)
"""Settings stored as the file's metadata if the source has them: shapes that a network needs for the weights, and the
settings of pre-training.
"""


def export_weights(
    source: str | Path, out: Path, dtype: torch.dtype = torch.float16, *, decoder: bool = False, key: str = ""
) -> dict[str, Tensor]:
    """Write the encoder of a checkpoint by its released key names.

    Args:
        source: a pre-training checkpoint or encoder file, or a fine-tuned network.
        out: path of the .safetensors file.
        dtype: precision of the file.
        decoder: whether to write the light decoder too.
        key: key of the state dict in the source, see `load_pretrained`.

    Returns:
        The tensors written.

    Raises:
        FileNotFoundError: there is no source.
        ValueError: `out` does not end in .safetensors; the source has no encoder or light decoder; values exceed the
            range of `dtype`.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a path that ends in .safetensors, the format of the file")
    contents = read_contents(source)
    chosen, _ = choose_state_dict(contents, str(source), count_encoder, key=key)
    weights = select_weights(chosen.tensors, str(source), dtype, decoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, save(weights, metadata=export_metadata(made_with(contents))))
    return weights


def count_encoder(given: Mapping[str, Tensor]) -> int:
    """Count the tensors of the encoder in a state dict."""
    return sum(strip_holder(key).removeprefix("encoder.").startswith(ENCODER) for key in given)


def select_weights(
    given: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, decoder: bool
) -> dict[str, Tensor]:
    """Select the encoder's tensors by their released names, and those of the light decoder if `decoder`.

    Args:
        given: the state dict.
        name: name of the file, for messages.
        dtype: precision of the result; None keeps that of each tensor.
        decoder: whether to select the light decoder too.

    Raises:
        ValueError: there is no encoder or light decoder; values exceed the range of `dtype`.
    """
    wanted = ENCODER + (LIGHT_DECODER if decoder else ())
    weights = {}
    for key, value in given.items():
        own = strip_holder(key).removeprefix("encoder.")
        if own.startswith(wanted) and not own.startswith((MASK_TOKEN, *RELEASED_DECODER)):
            weights[own] = value if dtype is None else cast_tensor(value, dtype, f"{name}: {key}")
    needed = {"encoder": ENCODER} | ({"light decoder": ("decoder.levels.",)} if decoder else {})
    for part, prefixes in needed.items():
        if not any(own.startswith(prefixes) for own in weights):
            which = " or ".join(f"{prefix}*" for prefix in prefixes)
            other = (
                "; weights of another network need no export (a ResNet for detectron2: --detectron2; the network of an "
                "nnU-Net plan: --nnunet)"
            )
            advice = other if part == "encoder" else ""
            raise ValueError(f"{name}: no {part}; none of its {len(given)} keys is {which}{advice}")
    return weights


def cast_tensor(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert a tensor to another precision, contiguous; raise ValueError if values exceed its range."""
    value = value.to(dtype) if value.is_floating_point() else value  # BatchNorm counts its batches
    if not value.isfinite().all():
        raise ValueError(f"{name}: values exceed the range of {dtype}; use --precision fp32")
    return value.contiguous()


def export_metadata(known: Mapping[str, Any]) -> dict[str, str]:
    """Convert settings, and a plan of nnU-Net, to the metadata of safetensors, text by name; each value is JSON."""
    names = [name for name in (*MADE_WITH, PLANS_KEY) if name in known]
    return {"format": "pt"} | {name: json.dumps(known[name]) for name in names}
