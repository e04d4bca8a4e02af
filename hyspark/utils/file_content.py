"""What a file holds by its first bytes, where its name says something else."""

import re

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
