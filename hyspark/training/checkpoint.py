"""Saving and resuming training state.

A file appears whole or not at all, older states are kept beside the newest, every state carries a checksum of what it
holds, and reading one never executes anything in it.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.utils.log import LOG

FORMAT = 2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREADABLE = (errno.EIO, errno.ESTALE, errno.ENOMEM)
"""Errors of the system in reading a file that says nothing about the file."""
MB = 10**6


def save(state: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename.

    keep: files in all; the one that stood there becomes `older(path, 1)`, that one `older(path, 2)`, and so on.
    Raises OSError, with the older files as they were, where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            for number in range(keep - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(older(path, number - 1), older(path, number))
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Say what a full disk means for a run that writes to a file or folder, and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch's own error hides the system's
        if not isinstance(reason, OSError) or reason.errno not in FULL:
            raise
        raise OSError(
            f"cannot write {path}: {reason.strerror}; what was saved before is as it was. "
            "Make room, and the same command continues from there"
        ) from error


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder too; a renamed file may otherwise be lost with the power."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def older(path: Path, number: int) -> Path:
    """Where the state lies that was saved so many saves before the one at `path`."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes have left of files that they were writing to a folder."""
    for pattern in (".*.pth-*", ".*.tmp"):
        for file in folder.rglob(pattern):
            file.unlink(missing_ok=True)


def training_state(step: int, config: dict[str, Any], data: str, **parts: Any) -> dict[str, Any]:
    """A resumable state: the number of steps done, the settings, the data in words, each part's state dict."""
    return {"format": FORMAT, "step": step, "config": config, "data": data} | {
        k: v.state_dict() for k, v in parts.items()
    }


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the checksum of all that it holds."""
    return state | {"checksum": checksum(state)}


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of names, numbers and tensors, whatever the order of the names."""
    digest = hashlib.sha256()
    add(state, digest)
    return digest.hexdigest()


def add(value: Any, digest: Any) -> None:
    """Feed a nested value to a hash."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(f"{key!r}:".encode())
            add(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            add(item, digest)
    else:
        digest.update(repr(value).encode())


def read_training_state(path: Path) -> dict[str, Any]:
    """A state as `sealed` made it, on the CPU.

    Raises FileNotFoundError; DamagedError where the file is cut short or altered; ValueError where it is of another
    format, or holds weights only.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, as many as there are ways to damage a file
            if isinstance(error, OSError) and error.errno in UNREADABLE:
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedError(
                f"{path} cannot be read as a checkpoint; is it damaged or cut short? ({first})"
            ) from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ValueError(f"{path} holds weights only and cannot be continued from; start from it with --weights")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    if state.pop("checksum", "") != checksum(state):
        raise DamagedError(f"{path} is damaged: its checksum is not that of what it holds")
    return state


class DamagedError(ValueError):
    """A file that was whole once."""


def read_newest(path: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The newest state that is whole, of `path` and the older ones beside it; None where there is none. And the damaged
    ones newer than it, with what is wrong with them.

    Raises DamagedError where there are states, but all of them are damaged; what `read_training_state` raises.
    """
    wrong: dict[Path, str] = {}
    for file in states(path):
        try:
            return read_training_state(file), wrong
        except DamagedError as error:
            wrong[file] = str(error)
    if wrong:
        listed = "\n  ".join(wrong.values())
        raise DamagedError(
            f"no state of this run is whole; delete them to start anew, or name another run folder:\n  {listed}"
        )
    return None, wrong


def set_damaged_aside(path: Path) -> None:
    """Rename damaged states that are newer than the newest whole one, so that they never push that one out, and say so.

    Raises what `read_newest` raises; then nothing is renamed.
    """
    for file, reason in read_newest(path)[1].items():
        LOG.warning("%s; it is set aside as .damaged, and the state before it is used", reason)
        os.replace(file, file.with_name(f"{file.name}.damaged"))


def states(path: Path) -> list[Path]:
    """The states that exist at `path` and beside it, the newest first."""
    numbers = [int(f.suffixes[-2][1:]) for f in path.parent.glob(f"{path.stem}.*{path.suffix}") if is_number(f)]
    return [file for number in sorted([0, *numbers]) if (file := older(path, number)).is_file()]


def is_number(file: Path) -> bool:
    """Whether a file's name ends as `older` has it."""
    return len(file.suffixes) > 1 and file.suffixes[-2][1:].isdigit()


def check_space(path: Path, parameters: Iterable[nn.Parameter], keep: int) -> None:
    """Raises OSError where the disk has no room for a run's checkpoints: so many states, the one being written, and
    the weights alone.
    """
    state = 3 * sum(p.numel() * p.element_size() for p in parameters)  # weights, and AdamW's two moments
    there = sum(file.stat().st_size for file in states(path))
    needed = (keep + 1) * state + 2 * state // 3 - there
    folder = next(p for p in (path.parent.absolute(), *path.parent.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"checkpoints of this run take {needed / MB:.0f} MB, but the disk of {folder} has {free / MB:.0f} MB free; "
            f"make room, name another run folder, or keep fewer states (--keep_last, now {keep})"
        )
