"""Weights to hand on: one small .safetensors file, which says how it was made and cannot execute anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hyspark.models.weights.files import made_with, read_contents, strip_wrappers, unwrap_state_dict
from hyspark.models.weights.load import ENCODER, LIGHT_DECODER, MASK_TOKEN, RELEASED_DECODER
from hyspark.utils.atomic import write_whole

MADE_WITH = (
    *("encoder_widths", "encoder_depths", "expansions", "vit_depth", "num_heads"),
    *("decoder_width", "decoder_min_width"),
    *("spacing", "hu_min", "hu_max", "input_size", "mask", "hide"),
)
"""Settings that the file carries as its metadata, where the source knows them: those that a network must share to take
the weights, and those of the pre-training.
"""


def export_weights(
    source: str | Path, out: Path, dtype: torch.dtype = torch.float16, *, decoder: bool = False
) -> dict[str, Tensor]:
    """Write the encoder of a checkpoint in the released key names, and the light decoder where asked for; returns what
    was written.

    source: a pre-training checkpoint or encoder file, or a fine-tuned network. Raises FileNotFoundError; ValueError
    for another ending than .safetensors, for a source without an encoder or light decoder, for weights that `dtype`
    cannot hold.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the file is written as .safetensors; give it that ending")
    contents = read_contents(source)
    weights = select_weights(unwrap_state_dict(contents, str(source)), str(source), dtype, decoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, save(weights, metadata=export_metadata(made_with(contents))))
    return weights


def select_weights(given: Mapping[str, Tensor], name: str, dtype: torch.dtype, decoder: bool) -> dict[str, Tensor]:
    """The encoder's tensors by their released names, and those of the light decoder where asked for, contiguous."""
    wanted = ENCODER + (LIGHT_DECODER if decoder else ())
    weights = {}
    for key, value in given.items():
        own = strip_wrappers(key).removeprefix("encoder.")
        if own.startswith(wanted) and not own.startswith((MASK_TOKEN, *RELEASED_DECODER)):
            weights[own] = cast_tensor(value, dtype, f"{name}: {key}")
    needed = {"encoder": ENCODER} | ({"light decoder": ("decoder.levels.",)} if decoder else {})
    for part, prefixes in needed.items():
        if not any(own.startswith(prefixes) for own in weights):
            which = " or ".join(f"{prefix}*" for prefix in prefixes)
            raise ValueError(f"{name} holds no {part}: none of its {len(given)} keys is of {which}")
    return weights


def cast_tensor(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another number format, contiguous; raises ValueError, naming it, for values that this cannot hold."""
    value = value.to(dtype) if value.is_floating_point() else value  # BatchNorm counts its batches
    if not value.isfinite().all():
        raise ValueError(f"{name} has values that {dtype} cannot hold")
    return value.contiguous()


def export_metadata(known: Mapping[str, Any]) -> dict[str, str]:
    """Settings as safetensors keeps them, text by name; each value is JSON."""
    return {"format": "pt"} | {name: json.dumps(known[name]) for name in MADE_WITH if name in known}
