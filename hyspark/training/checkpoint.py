"""Saving and resuming training state.

A file appears whole or not at all. Older checkpoints are kept beside the newest. Every checkpoint carries a checksum of
its content, and reading one never executes anything in it.
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

CHECKPOINT_FORMAT = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the system in writing to a full disk."""
READ_ERRORS = (errno.EIO, errno.ESTALE, errno.ENOMEM)
"""Errors of the system in reading a file that say nothing about the file."""
MB = 10**6


def save(content: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to the disk, then renamed.

    Args:
        content: What torch saves.
        path: File to write. An existing one becomes `older_checkpoint(path, 1)`, that one (path, 2), and so on.
        keep: Number of files to keep in all.

    Raises:
        OSError: The disk is full; the older files are unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            for age in range(keep - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(older_checkpoint(path, age - 1), older_checkpoint(path, age))
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Explain a full disk in the block, which writes to a file or folder of a run.

    Raises:
        OSError: The disk is full; the message says what to do.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch's own error hides the system's
        if not isinstance(reason, OSError) or reason.errno not in DISK_FULL:
            raise
        raise OSError(
            f"cannot write {path}: {reason.strerror}; what was saved before is unchanged. "
            "Free some space, and the same command continues from there"
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; a renamed file may otherwise be lost in a power failure."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def older_checkpoint(path: Path, age: int) -> Path:
    """Return the file of the checkpoint that was saved `age` saves before the one at `path`."""
    return path.with_suffix(f".{age}{path.suffix}") if age else path


def list_checkpoints(path: Path) -> list[Path]:
    """List the checkpoints that exist at `path` and beside it, the newest first."""
    ages = [int(f.suffixes[-2][1:]) for f in path.parent.glob(f"{path.stem}.*{path.suffix}") if has_age(f)]
    return [file for age in sorted([0, *ages]) if (file := older_checkpoint(path, age)).is_file()]


def has_age(file: Path) -> bool:
    """Return whether a file is named as `older_checkpoint` names it."""
    return len(file.suffixes) > 1 and file.suffixes[-2][1:].isdigit()


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files that killed processes have left in a folder."""
    for pattern in (".*.pth-*", ".*.tmp"):
        for file in folder.rglob(pattern):
            file.unlink(missing_ok=True)


def make_state(step: int, config: dict[str, Any], data: str, **modules: Any) -> dict[str, Any]:
    """Make a resumable state.

    Args:
        step: Number of steps done.
        config: Plain settings.
        data: Data in a few words, with a digest of the names of its cases.
        **modules: What has a state dict: model, optimizer, scaler.
    """
    state = {"format": CHECKPOINT_FORMAT, "step": step, "config": config, "data": data}
    return state | {name: module.state_dict() for name, module in modules.items()}


def add_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the checksum of its content."""
    return state | {"checksum": checksum(state)}


def checksum(state: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of names, numbers and tensors, whatever the order of the names."""
    digest = hashlib.sha256()
    update_digest(state, digest)
    return digest.hexdigest()


def update_digest(value: Any, digest: Any) -> None:
    """Feed a nested value to a hash."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(f"{key!r}:".encode())
            update_digest(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            update_digest(item, digest)
    else:
        digest.update(repr(value).encode())


class DamagedError(ValueError):
    """A checkpoint that was cut short or altered."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state with its checksum, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It is cut short or altered.
        ValueError: It is of another format, or holds weights only.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch.load has no class of error for a damaged file
            if isinstance(error, OSError) and error.errno in READ_ERRORS:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedError(
                f"{path} cannot be read as a checkpoint; is it damaged or cut short? ({reason})"
            ) from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ValueError(f"{path} holds weights only, no state to continue from; start from it with --weights")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}")
    if state.pop("checksum", "") != checksum(state):
        raise DamagedError(f"{path} is damaged: its checksum is not that of its content")
    return state


def read_newest_checkpoint(path: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """Read the newest intact checkpoint at `path` and beside it.

    Returns:
        The state, None if there is no checkpoint; and the reason for each damaged checkpoint that is newer.

    Raises:
        DamagedError: There are checkpoints, but all are damaged.
        ValueError: As `read_checkpoint`.
    """
    damaged: dict[Path, str] = {}
    for file in list_checkpoints(path):
        try:
            return read_checkpoint(file), damaged
        except DamagedError as error:
            damaged[file] = str(error)
    if damaged:
        listed = "\n  ".join(damaged.values())
        raise DamagedError(
            f"no checkpoint of this run is intact; delete them to start anew, or name another run folder:\n  {listed}"
        )
    return None, damaged


def rename_damaged(path: Path) -> None:
    """Rename damaged checkpoints that are newer than the newest intact one, so that they never push that one out.

    Raises:
        ValueError: As `read_newest_checkpoint`; then nothing is renamed.
    """
    for file, reason in read_newest_checkpoint(path)[1].items():
        LOG.warning("%s; it is renamed to .damaged, and the checkpoint before it is used", reason)
        os.replace(file, file.with_name(f"{file.name}.damaged"))


def check_disk_space(path: Path, parameters: Iterable[nn.Parameter], keep: int) -> None:
    """Check that the disk has room for a run's checkpoints, for the one being written, and for the weights alone.

    Raises:
        OSError: It has not.
    """
    state = 3 * sum(p.numel() * p.element_size() for p in parameters)  # weights, and AdamW's two moments
    existing = sum(file.stat().st_size for file in list_checkpoints(path))
    needed = (keep + 1) * state + 2 * state // 3 - existing
    folder = next(p for p in (path.parent.absolute(), *path.parent.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"checkpoints of this run take {needed / MB:.0f} MB, but the disk of {folder} has {free / MB:.0f} MB free; "
            f"free some space, name another run folder, or keep fewer checkpoints (--keep_last, now {keep})"
        )
