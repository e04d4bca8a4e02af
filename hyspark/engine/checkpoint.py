"""Saving and resuming training state. A file appears whole or not at all, and reading one never executes anything in
it.
"""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def training_state(step: int, config: dict[str, Any], data: str, **parts: Any) -> dict[str, Any]:
    """A resumable state: the number of steps done, the settings, the data in words, each part's state dict."""
    return {"format": FORMAT, "step": step, "config": config, "data": data} | {
        k: v.state_dict() for k, v in parts.items()
    }


def read_training_state(path: Path) -> dict[str, Any]:
    """A state written by `training_state`, on the CPU.

    Raises FileNotFoundError; ValueError where the file is damaged, of another format, or holds weights only.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; is it damaged or cut short? ({error})") from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ValueError(f"{path} holds weights only and cannot be continued from; start from it with --init_weight")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    return state
