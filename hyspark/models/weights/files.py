"""Read files of weights: `.pth`, `.pt`, `.ckpt` (with weights_only) and `.safetensors`, and the state dict in them."""

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

CONTAINERS = ("model", "state_dict", "module")
"""Keys under which checkpoints store their weights."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes left by DistributedDataParallel and torch.compile."""


def read_weights(path: str | Path, settings: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the state dict in a file, without executing anything stored in it.

    Args:
        path: the file.
        settings: keys of plain data among its tensors, see `unwrap_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, contains objects other than plain data, or has no weights.
    """
    return unwrap_state_dict(read_contents(path), str(path), settings)


def read_contents(path: str | Path) -> object:
    """Read all contents of a file of weights, on the CPU.

    Returns:
        What torch.load returns; for .safetensors a dict of its tensors ("model") and metadata ("config").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or contains objects other than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a .pth, .pt or .safetensors file of weights")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            return {"model": load_file(path), "config": {name: parse_json(text) for name, text in about.items()}}
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not opened, because it is damaged or contains Python objects other than tensors, which could run "
            f"code. Ask its author for a plain state dict or a .safetensors file{unpickling_advice(path)}"
        ) from error
    except Exception as error:  # torch raises many types for a truncated file, and safetensors its own
        raise ValueError(f"{path}: unreadable as weights ({error}); is it damaged or truncated?") from error


def parse_json(text: str) -> Any:
    """Parse a text as JSON; return the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def made_with(contents: object) -> Mapping[str, Any]:
    """Find the settings of the run that made the weights, in the contents of their file; empty if it has none."""
    while isinstance(contents, Mapping):
        if isinstance(config := contents.get("config"), Mapping):
            return config
        contents = next((contents[c] for c in CONTAINERS if c in contents), None)
    return {}


def unpickling_advice(path: Path) -> str:
    """Describe how to load a file with Python objects if one trusts them, naming the objects.

    Returns:
        Text to append to an error; empty for a damaged file.
    """
    try:
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not written by torch.save, or by an old version
        return ""
    if not objects:
        return ""
    return (
        f". Its objects are {', '.join(objects)}. If these only contain data, import them and load inside "
        f"`with torch.serialization.safe_globals([{', '.join(objects)}]):`; or, if you trust the author with your "
        f'machine, `torch.save(torch.load("{path}", weights_only=False)["state_dict"], "plain.pth")` writes only the '
        "weights"
    )


def unwrap_state_dict(loaded: object, name: str, settings: Collection[str] = ()) -> dict[str, Tensor]:
    """Find the state dict inside a checkpoint.

    Args:
        loaded: contents of the checkpoint.
        name: name of the checkpoint, for messages.
        settings: keys of plain data that may lie among its tensors; they are excluded.

    Raises:
        ValueError: there is no state dict.
    """
    while isinstance(loaded, Mapping):
        inner = next((loaded[c] for c in CONTAINERS if isinstance(loaded.get(c), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{name}: no weights; expected a state dict, or one under {' / '.join(CONTAINERS)}")
    weights = {key: value for key, value in loaded.items() if key not in settings}
    if unnamed := [key for key in weights if not isinstance(key, str)]:
        raise ValueError(f"{name}: no state dict; expected text as keys, got {unnamed[0]!r}")
    if others := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{name}: no state dict; expected tensors as values, got others at {', '.join(others[:3])}")
    return weights


def strip_wrappers(key: str) -> str:
    """Remove the prefixes of DistributedDataParallel and torch.compile from a key."""
    while key.startswith(WRAPPERS):
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
    return key
