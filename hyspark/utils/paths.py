"""Paths: folders walked in order, NIfTI file names, JSON files."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NIFTI = re.compile(r"(?P<stem>.+?)\.nii(\.gz)?", re.DOTALL | re.IGNORECASE)


def walk_folders(top: Path, *, skip: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder from `top` down once, with the names of its subfolders.

    The caller may shorten the list of names; the others are walked. Hidden folders are omitted. Links are followed
    last, so that a folder which also has a path of its own is met there.

    Args:
        top: folder where the walk begins.
        skip: folder that is not entered.
    """
    seen = {os.path.realpath(skip)} if skip else set()
    pending = [os.fspath(top)]
    while pending:
        for folder, below, _ in os.walk(pending.pop(0)):
            if (real := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield Path(folder), below
            paths = [os.path.join(folder, name) for name in below]
            pending += [path for path in paths if os.path.islink(path)]


def nifti_stem(file: Path) -> str:
    """Return a file name without .nii.gz or .nii; any other name unchanged."""
    found = NIFTI.fullmatch(file.name)
    return found["stem"] if found else file.name


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or with a byte order mark, as PowerShell writes it, UTF-8 or UTF-16.

    Raises:
        ValueError: if it is none of these.
    """
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON file; raise ValueError if it gives a key two values."""
    content = dict(pairs)
    if len(content) < len(pairs) and (twice := [key for key, value in pairs if content[key] != value]):
        raise ValueError(f'the key "{twice[0]}" is set twice; keep one of them')
    return content


def load_json(path: Path) -> Any:
    """Read the content of a JSON file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not JSON, or a key is set twice; the message begins with `path`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(read_text(path), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
