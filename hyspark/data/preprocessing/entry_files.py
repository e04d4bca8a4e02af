"""Entries of the store as files: complete, undamaged, removed."""

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

UNFINISHED_PREFIX, ABANDONED_SECONDS = ".writing-", 86400.0
"""Prefix of folders that are being written; age from which they count as abandoned."""


def is_complete(folder: Path) -> bool:
    """Return whether an entry exists."""
    return (folder / "entry.json").is_file()


def is_sound(folder: Path) -> bool:
    """Return whether an entry matches its checksums, which are computed only if a file is newer than the last check.

    The modification time of entry.json is the time of the last check.
    """
    try:
        content = (folder / "entry.json").read_bytes()
        loaded = json.loads(content)
        known, sizes = loaded["checksums"], loaded["sizes"]
        checked = (folder / "entry.json").stat().st_mtime_ns
        states = [(folder / name).stat() for name in sizes]
        if [state.st_size for state in states] != list(sizes.values()):
            return False
        if max(max(state.st_mtime_ns, state.st_ctime_ns) for state in states) <= checked:
            del loaded["checksums"]
            return bool(known["entry.json"] == zlib.crc32(json.dumps(loaded).encode()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    if not is_intact(folder):
        return False
    with suppress(OSError):  # the store of another user is checked at every start
        os.utime(folder / "entry.json")
    return True


def is_intact(folder: Path) -> bool:
    """Return whether the files of an entry match their checksums (CRC-32)."""
    try:
        loaded = json.loads((folder / "entry.json").read_bytes())
        known = loaded.pop("checksums")
        return bool(known == checksums(folder, known, loaded))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def remove_entry(folder: Path) -> None:
    """Delete an entry; it is moved first, since another run may be making it again."""
    doomed = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=folder.parent))
    with suppress(FileNotFoundError):
        os.replace(folder, doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_abandoned(store_dir: Path) -> None:
    """Delete the unfinished entries of killed processes, which are too old to be still written."""
    for folder in store_dir.glob(f"{UNFINISHED_PREFIX}*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def checksums(folder: Path, names: Iterable[str], entry: Mapping[str, Any]) -> dict[str, int]:
    """Compute the CRC-32 of files of an entry; that of entry.json is of `entry`, its content without checksums."""
    return {
        name: zlib.crc32(json.dumps(entry).encode() if name == "entry.json" else (folder / name).read_bytes())
        for name in names
    }
