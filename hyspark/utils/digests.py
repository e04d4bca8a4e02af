"""Digests of files and text."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

PIECE = 2**20


def text_digest(lines: Iterable[str]) -> str:
    """The first 12 digits of the SHA-256 of lines, which may hold any file's name."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def content_digest(path: Path) -> str:
    """CRC-32 and length, in hexadecimal, of what a file holds, compressed or not: of a .gz file they are its last eight
    bytes, other files are read.
    """
    with path.open("rb") as file:
        if path.suffix == ".gz" and file.seek(0, os.SEEK_END) >= 8:
            file.seek(-8, os.SEEK_END)
            crc, size = (int.from_bytes(file.read(4), "little") for _ in range(2))
            if size:  # block-wise compression ends in an empty block
                return f"{crc:08x}{size:08x}"
        crc = size = file.seek(0)
        while piece := file.read(PIECE):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return f"{crc:08x}{size % 2**32:08x}"
