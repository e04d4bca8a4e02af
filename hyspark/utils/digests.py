"""Digests of files and text."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

READ_BYTES = 2**20


def text_digest(lines: Iterable[str]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of lines.

    Lines may hold any file's name, also one that is not valid UTF-8.
    """
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def content_digest(path: Path) -> str:
    """Return CRC-32 and length, in hexadecimal, of a file's uncompressed content.

    A .gz file stores both in its last eight bytes; other files are read.
    """
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz" and file.seek(0, os.SEEK_END) >= 8:
            file.seek(-8, os.SEEK_END)
            crc, size = (int.from_bytes(file.read(4), "little") for _ in range(2))
            if size:  # block-wise compression ends in an empty block
                return f"{crc:08x}{size:08x}"
        crc = size = file.seek(0)
        while piece := file.read(READ_BYTES):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return f"{crc:08x}{size % 2**32:08x}"
