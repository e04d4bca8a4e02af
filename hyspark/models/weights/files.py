"""Read files of weights, executing nothing of them: those of torch.save, `.safetensors`, `.npz`, `.pkl`, and parts."""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hyspark.models.weights.formats import describe_folder, describe_foreign, describe_zip, format_of
from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.model_folder import (
    find_weights,
    is_own_config,
    read_model_config,
    settings_of,
    with_copies,
)
from hyspark.models.weights.nnunet_settings import nnunet_settings
from hyspark.models.weights.objects import load_pickle, load_torch
from hyspark.models.weights.search import CONTAINERS, choose_state_dict, find_candidates

REFUSED = re.compile(
    r"it calls |GLOBAL .* (was not|whose module)|reduce for unrecognized|^\s*Only persistent_load|Can only "
)
"""Lines of an error that name what a pickle was refused for."""
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.")
"""Prefixes left by DistributedDataParallel, torch.compile, Lightning and FSDP."""


def read_contents(path: str | Path) -> object:
    """Read all contents of a file of weights, on the CPU.

    Args:
        path: the file, a folder as on the Hugging Face Hub, or an address there (see `local_path`).

    Returns:
        What torch.load returns, with dicts for unknown objects. For .safetensors, a dict of its tensors ("model") and
        metadata ("config"); for the index of several files, the tensors of all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, calls functions, or is of another format.
        OSError: a download failed.
    """
    shown, path = str(path), local_path(path)
    if path.is_dir() and (file := find_weights(path)):
        return with_config(read_contents(file), read_model_config(path))
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected a file of weights, got {describe_folder(path)}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{shown}: no such file; "
            + ("download it first, and " if "://" in shown else "")
            + "give the path of a .pth, .pt or .safetensors file of weights"
        )
    check_is_whole(path)
    return read_file(path)


def with_config(contents: object, config: Mapping[str, Any]) -> object:
    """Add the settings in a config.json of this package to the contents of the file of weights beside it."""
    if not is_own_config(config) or not (isinstance(contents, Mapping) and isinstance(contents.get("model"), Mapping)):
        return contents
    return {**contents, "config": {**made_with(contents), **settings_of(config)}}


def read_file(path: Path) -> object:
    """Read a file by the reader of its format; errors as for `read_contents`."""
    found = format_of(path)
    if found not in READERS:
        what = describe_foreign(path) or "it is of no format of weights known here; is it damaged or truncated?"
        raise ValueError(f"{path}: unreadable as weights; {what}")
    try:
        return READERS[found](path)
    except pickle.UnpicklingError as error:
        raise ValueError(explain_refusal(path, error)) from error
    except (FileNotFoundError, FormatError):
        raise
    except Exception as error:  # torch raises many types for a truncated file, and safetensors its own
        what = describe_zip(path) if found == "torch" else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ValueError(
            f"{path}: unreadable as weights" + (f"; {what}" if what else f" ({reason}); is it damaged or truncated?")
        ) from error


class FormatError(ValueError):
    """A file that is intact, but of a format that is not read."""


def read_safetensors(path: Path) -> object:
    """Read a .safetensors file with its metadata."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    return {
        "model": with_copies(load_file(path), about),
        "config": {name: parse_json(text) for name, text in about.items()},
    }


def read_parts(path: Path) -> object:
    """Read all files that an index names: one state dict in parts."""
    about = parse_json(path.read_text(encoding="utf-8-sig"))
    by_name = about.get("weight_map") if isinstance(about, Mapping) else None
    if not isinstance(by_name, Mapping) or not all(isinstance(part, str) for part in by_name.values()):
        raise FormatError(f"{path}: expected the index of a state dict in several files (weight_map), got another JSON")
    parts = sorted(set(by_name.values()))
    if outside := [part for part in parts if Path(part).name != part]:
        raise FormatError(f"{path}: expected names of files in its folder, got {outside[0]!r}")
    if absent := [part for part in parts if not path.with_name(part).is_file()]:
        raise FormatError(
            f"{path}: {len(absent)} of its {len(parts)} files are missing ({', '.join(absent[:3])}); put them beside it"
        )
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= choose_state_dict(read_file(path.with_name(part)), str(path.with_name(part)))[0].tensors
    if lost := [name for name in by_name if name not in tensors]:
        raise FormatError(f"{path}: {len(lost)} tensors are in none of its files ({', '.join(lost[:3])}, ...)")
    return {"model": tensors}


def read_arrays(path: Path) -> object:
    """Read the arrays of a .npz or .npy file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else loaded
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise FormatError(
            f"{path}: not opened, because it contains Python objects, which could run code; if you trust its author, "
            f'write a plain file: `torch.save(numpy.load({str(path)!r}, allow_pickle=True).item(), "plain.pth")`'
        ) from error


READERS: dict[str, Callable[[Path], object]] = {
    "torch": load_torch,
    "pickle": load_pickle,
    "safetensors": read_safetensors,
    "index": read_parts,
    "numpy": read_arrays,
}
"""Reader of each format."""


def check_is_whole(path: Path) -> None:
    """Raise ValueError if a file is one of several that an index beside it lists."""
    stem, dash, total = path.stem.rpartition("-of-")
    base, _, number = stem.rpartition("-")
    index = path.with_name(f"{base}{path.suffix}.index.json")
    if dash and number.isdigit() and total.isdigit() and index.is_file() and int(total) > 1:
        raise ValueError(f"{path}: it is one of {int(total)} files of one state dict; give their index, {index}")


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
        if found := nnunet_settings(contents):
            return found
        contents = next((contents[c] for c in CONTAINERS if c in contents), None)
    return {}


def explain_refusal(path: Path, error: Exception) -> str:
    """Explain that a pickle was not opened, and how to get its weights if one trusts its author."""
    reasons = [line.strip(" \t.") for line in str(error).splitlines() if REFUSED.search(line)]
    found = f" ({reasons[-1].rpartition('WeightsUnpickler error: ')[2][:160]})" if reasons else ""
    return (
        f"{path}: not opened, because it is damaged or contains Python objects other than tensors, which could run "
        f"code{found}. Ask its author for a plain state dict or a .safetensors file{plain_file_advice(path)}"
    )


def plain_file_advice(path: Path) -> str:
    """Describe how to write the weights of a refused file alone, with every object in it.

    Returns:
        Text to append to an error; empty if the file is damaged, or would run a program of the system.
    """
    try:
        found = find_candidates(load_torch(path, is_strict=False))
        chosen = max(found, key=lambda candidate: (not candidate.is_joined, len(candidate.tensors)))
    except Exception as error:  # whatever is wrong with the file is reported already
        if "persistent_load" not in str(error):
            return ""
        return (
            "; or, if you trust the author with your machine, write it anew where its packages are installed, since it "
            f"holds a whole module as before torch 1.6: `torch.save(torch.load({str(path)!r}, weights_only=False), "
            '"plain.pth")`'
        )
    loaded = f"torch.load({str(path)!r}, weights_only=False)" + "".join(f"[{step!r}]" for step in chosen.path)
    items = f"{loaded}.state_dict()" if chosen.is_module else loaded
    return (
        "; or, if you trust the author with your machine, write the weights alone where its packages are installed: "
        f'`torch.save({{k: v for k, v in {items}.items() if torch.is_tensor(v)}}, "plain.pth")`'
    )


def strip_wrappers(key: str) -> str:
    """Remove the prefixes of DistributedDataParallel, torch.compile, Lightning and FSDP from a key."""
    while found := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(found)
    return key.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")
