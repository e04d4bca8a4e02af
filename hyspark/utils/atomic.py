"""Files and folders that appear whole or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, so that no reader meets half of it; make its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write nested plain values as a JSON file, atomically."""
    write_whole(path, (json.dumps(to_json(value), indent=1, allow_nan=False) + "\n").encode())


def to_json(value: Any) -> Any:
    """Replace NaN and infinity by None in nested plain values, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: to_json(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to, which then appears whole, or not at all after an error.

    Args:
        path: The file or folder to make; an existing file is replaced.

    Yields:
        A path of the same name in a temporary folder beside it, whose folder takes other temporary files too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        os.replace(unfinished, path)
