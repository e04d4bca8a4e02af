"""What a file holds by its first bytes, where its name says something else."""

import re
from typing import Literal

NIFTI_MAGIC = rb"n[+i][12]\x00"
CONTENTS = (
    ("download", 0, rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (
        "download",
        0,
        rb"\s*(?:\xef\xbb\xbf)?\s*<(?i:!doctype|html|head|\?xml)",
        "a web page or an error message of a server",
    ),
    ("archive", 0, rb"PK\x03\x04|PK\x05\x06", "a zip archive"),
    ("archive", 0, rb"7z\xbc\xaf\x27\x1c|Rar!", "an archive"),
    ("archive", 257, rb"ustar", "a tar archive"),
    ("archive", 0, rb"BZh", "a file compressed by bzip2"),
    ("archive", 0, rb"\xfd7zXZ", "a file compressed by xz"),
    ("archive", 0, rb"\x28\xb5\x2f\xfd", "a file compressed by zstd"),
    ("archive", 0, rb"\x1f\x8b", "a file compressed by gzip"),
    ("other", 128, rb"DICM", "a DICOM file"),
    ("other", 0, rb"\x93NUMPY", "a numpy array"),
    ("other", 0, rb"NRRD000", "a file of NRRD"),
    ("other", 0, rb"ObjectType|NDims", "a file of MetaImage"),
    ("other", 0, rb"\x89HDF\r\n", "a file of HDF5"),
    ("other", 0, rb"MATLAB", "a file of MATLAB"),
    ("other", 0, rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture"),
    ("other", 0, rb"%PDF", "a PDF"),
)
"""Group, offset, pattern and description of contents that files are mistaken for."""
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
"""Endings of names that promise DICOM."""
DICOM_HEAD = 132
"""Number of first bytes by which DICOM is recognised."""
FIRST_GROUPS, MAX_FIRST_LENGTH = (2, 8), 128
"""Groups and largest length in bytes of the first element of a DICOM file without preamble."""
VALUE_KINDS = frozenset(
    ("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "OB", "OD", "OF", "OL", "OV")
    + ("OW", "PN", "SH", "SL", "SQ", "SS", "ST", "SV", "TM", "UC", "UI", "UL", "UN", "UR", "US", "UT", "UV")
)
"""DICOM's names of the kinds of values (PS3.5, 6.2)."""
ARCHIVE = "archive, to unpack"
"""Kind of a file that may hold scans which nothing reads there."""
HEAD = 600
"""Number of first bytes by which a content is recognised."""


def is_nifti(head: bytes) -> bool:
    """Return whether the first bytes of a file are a header of NIfTI-1 or NIfTI-2."""
    return any(re.match(NIFTI_MAGIC, head[at:]) for at in (344, 4))


def content_of(head: bytes) -> tuple[str, str]:
    """Return group and description of a file's content by its first bytes; both empty if it is unknown.

    The groups are "download", which failed, "archive", and "other".
    """
    for group, offset, pattern, what in CONTENTS:
        if re.match(pattern, head[offset:]):
            return group, what
    return "", ""


def begins_as_dicom(head: bytes) -> bool:
    """Return whether the first bytes of a file are DICOM: the prefix behind its preamble, or a plausible element."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16:
        return False
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    for order in orders:
        group = int.from_bytes(head[:2], order)
        is_explicit = head[4:6].decode("latin-1") in VALUE_KINDS
        length = int.from_bytes(head[6:8] if is_explicit else head[4:8], order)
        # Without preamble and kind of value, files are little-endian and hold no file meta group.
        can_begin = group in FIRST_GROUPS if is_explicit else order == "little" and group == FIRST_GROUPS[1]
        if can_begin and length <= MAX_FIRST_LENGTH:
            return True
    return False
