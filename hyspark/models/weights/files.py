"""Files of weights: `.pth`, `.pt`, `.ckpt` (read with weights_only) and `.safetensors`, and the state dict in them."""

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
"""Keys under which checkpoints keep their weights."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes left by DistributedDataParallel and torch.compile."""


def read_weights(path: str | Path, settings: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict in a file, without executing anything stored in it; settings as in `unwrap_state_dict`.

    Raises FileNotFoundError; ValueError, naming the file, where it is damaged, holds other objects than plain data,
    or no weights.
    """
    return unwrap_state_dict(read_contents(path), str(path), settings)


def read_contents(path: str | Path) -> object:
    """All that a file of weights holds, on the CPU; raises as `read_weights`, but for what it is.

    Of a .safetensors file, its tensors as "model", its metadata as "config".
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give the path of a .pth, .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            return {"model": load_file(path), "config": {name: parse_json(text) for name, text in about.items()}}
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not opened: it is damaged, or holds Python objects other than tensors, which could run code. "
            f"Ask its author for a plain state dict or a .safetensors file{unpickling_advice(path)}"
        ) from error
    except Exception as error:  # torch raises many kinds for a torn file, and safetensors its own
        raise ValueError(f"{path} cannot be read as weights; is it damaged or cut short? ({error})") from error


def parse_json(text: str) -> Any:
    """What a text says as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def made_with(contents: object) -> Mapping[str, Any]:
    """The settings that a file of weights was made with, from all that it holds; empty where it does not say."""
    while isinstance(contents, Mapping):
        if isinstance(config := contents.get("config"), Mapping):
            return config
        contents = next((contents[c] for c in CONTAINERS if c in contents), None)
    return {}


def unpickling_advice(path: Path) -> str:
    """What to type for a file that holds Python objects, naming them, where one trusts them; nothing for a damaged
    one.
    """
    try:
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no file of torch.save, or an old one
        return ""
    if not objects:
        return ""
    return (
        f". They are {', '.join(objects)}. If these only hold data, import them and load inside "
        f"`with torch.serialization.safe_globals([{', '.join(objects)}]):`; or, if you trust the author with your "
        f'machine, `torch.save(torch.load("{path}", weights_only=False)["state_dict"], "plain.pth")` writes the '
        "weights alone"
    )


def unwrap_state_dict(loaded: object, name: str, settings: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict inside a checkpoint; raises ValueError where there is none.

    settings: names of plain data that may lie among its tensors and are left out.
    """
    while isinstance(loaded, Mapping):
        inner = next((loaded[c] for c in CONTAINERS if isinstance(loaded.get(c), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{name} holds no weights: expected a state dict, or one under {' / '.join(CONTAINERS)}")
    weights = {key: value for key, value in loaded.items() if key not in settings}
    if unnamed := [key for key in weights if not isinstance(key, str)]:
        raise ValueError(f"{name} is no state dict: its key {unnamed[0]!r} is no name")
    odd = [k for k, v in weights.items() if not isinstance(v, Tensor)]
    if odd:
        raise ValueError(f"{name} is no state dict: {', '.join(odd[:3])} {'is' if len(odd) == 1 else 'are'} no tensor")
    return weights


def strip_wrappers(key: str) -> str:
    """A key as the network itself names it."""
    while key.startswith(WRAPPERS):
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
    return key
