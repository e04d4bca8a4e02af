"""Metadata of an ONNX file, read without ONNX Runtime: the fields of its message, all but the metadata skipped.

An ONNX file is one message of Protocol Buffers: fields of a tag (number and wire type), then a value or its length and
bytes. Of a network of gigabytes a few bytes are read.
"""

from pathlib import Path
from typing import BinaryIO

from hyspark.utils.file_content import HEAD, content_of

METADATA, KEY_FIELD, VALUE_FIELD = 14, 1, 2
"""Numbers of the fields: a message's metadata properties, and key and value of one."""
LAST_FIELD = 100
"""Numbers of fields of an ONNX message are far below."""
FIXED_SIZES = {1: 8, 5: 4}
"""Bytes of a value by its wire type, where they are fixed."""
VARINT, BYTES = 0, 2
"""Other wire types: a number of a length of its own, and bytes after their length."""
LONGEST_VARINT = 10


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Read the metadata properties of an ONNX file.

    Raises:
        ValueError: The file is no ONNX, damaged or truncated.
    """
    with path.open("rb") as file:
        if what := content_of(file.read(HEAD))[1]:
            raise ValueError(f"{path}: expected ONNX, got {what}")
        size = file.seek(0, 2)
        file.seek(0)
        try:
            if not size:
                raise ValueError("it is empty")
            entries = read_fields(file, size, METADATA)
        except ValueError as error:
            raise ValueError(f"{path}: unreadable ONNX ({error}); is it damaged or truncated?") from None
        found = {}
        for start, end in entries:
            pair = {}
            for field in (KEY_FIELD, VALUE_FIELD):
                file.seek(start)
                spans = read_fields(file, end, field)
                pair[field] = read_span(file, *spans[-1]).decode(errors="replace") if spans else ""
            found[pair[KEY_FIELD]] = pair[VALUE_FIELD]
    return found


def read_fields(file: BinaryIO, end: int, wanted: int) -> list[tuple[int, int]]:
    """Find the fields of bytes with a number, from the position in a file to an end.

    Returns:
        Start and end of each.

    Raises:
        ValueError: A field is none of Protocol Buffers, or reaches beyond the end.
    """
    spans = []
    while (at := file.tell()) < end:
        tag = read_varint(file)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < LAST_FIELD or kind not in (VARINT, BYTES, *FIXED_SIZES):
            raise ValueError(f"byte {at} begins no field")
        if kind == VARINT:
            read_varint(file)
            continue
        length = read_varint(file) if kind == BYTES else FIXED_SIZES[kind]
        start = file.tell()
        if start + length > end:
            raise ValueError(f"{end - start} of {length} bytes of a field are there")
        if number == wanted and kind == BYTES:
            spans.append((start, start + length))
        file.seek(start + length)
    return spans


def read_varint(file: BinaryIO) -> int:
    """Read a number of seven bits a byte, the lowest first; raise ValueError if it does not end."""
    value = 0
    for i in range(LONGEST_VARINT):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 127) << 7 * i
        if byte[0] < 128:
            return value
    raise ValueError("a number does not end")


def read_span(file: BinaryIO, start: int, end: int) -> bytes:
    """Read the bytes from a start to an end."""
    file.seek(start)
    return file.read(end - start)
