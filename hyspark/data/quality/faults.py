"""Faults of the files of a case: a kind of finding each, with its text."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from hyspark.data.datasets.cases import DEFAULT_CLASSES, advise_ignore
from hyspark.data.readers.header import NiftiHeader, header_extensions
from hyspark.data.readers.label_values import label_value_fault
from hyspark.utils.text import list_of

DICOM = 2
"""NIfTI's code of a header extension that holds a DICOM header."""
TEXT_EXTENSIONS = (0, 6, 44)
"""Codes of header extensions that hold free text: unknown, comment, JSON."""
PERSONAL = re.compile(r"\^|\b[A-Z][a-z]+, ?[A-Z][a-z]+|\b(19|20)\d\d(0\d|1[0-2])([0-2]\d|3[01])\b")
"""A DICOM name (Doe^Jane), "Doe, Jane", a date of birth as 19510203."""
PLAUSIBLE_SPACING = (0.2, 10.0)
"""Range of a CT's mm between voxels."""
LOCALISER, THIN_VOXELS, THIN_MM = 4, 16, 32.0
"""Shortest edges, in voxels and mm, below which an image counts as a localiser, or as thin."""
SHEAR = 0.01
"""Cosine between two axes above which they count as sheared."""


def file_fault(path: Path) -> tuple[str, str] | None:
    """Return why a file cannot be opened, as a kind of finding and its text; None if it can."""
    if path.is_symlink() and not path.exists():
        return "dangling link", f"a link to {os.readlink(path)}, which does not exist"
    if not path.is_file():
        return "missing", "no such file"
    try:
        with path.open("rb") as file:
            first = file.read(2)
    except PermissionError:
        return "no permission", "a file without permission to read"
    except OSError as error:
        return "damaged", f"a read error ({error.strerror})"
    if not first:
        return "empty file", "no bytes"
    return None


def header_faults(header: NiftiHeader) -> Iterator[tuple[str, str]]:
    """Yield the faults of a readable header, each as a kind of finding and its text."""
    yield from header.faults
    if text := personal_text(header):
        yield "text that may name a patient", text
    if not header.has_position:
        return
    spacing, shape = voxel_sizes(header.affine), np.array(header.shape)
    if min(spacing) < PLAUSIBLE_SPACING[0] or max(spacing) > PLAUSIBLE_SPACING[1]:
        yield "odd spacing", f"{list_of(spacing)} mm"
    axes = header.affine[:3, :3] / spacing
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine > SHEAR:
        yield "sheared affine", f"axes {np.degrees(np.arccos(min(cosine, 1.0))):.1f} degrees apart"
    if min(shape) < LOCALISER:
        yield "localiser", f"shape {header.shape}"
    elif min(shape) < THIN_VOXELS or (shape * spacing).min() < THIN_MM:
        yield "thin", f"{list_of(shape)} voxels, {list_of(shape * spacing)} mm"


def personal_text(header: NiftiHeader) -> str:
    """Return the field or extension of a header that may name a patient, without its text; empty if none does."""
    for name in header.text_fields:
        if is_personal(header.raw[name].tobytes()):
            return f"field {name}"
    for code, content in header_extensions(header):
        if code == DICOM:
            return "an extension with a DICOM header"
        if code in TEXT_EXTENSIONS and is_personal(content):
            return f"an extension of code {code}"
    return ""


def is_personal(text: bytes) -> bool:
    """Return whether a text may name a patient; NUL bytes, which pad a field, count as spaces."""
    return PERSONAL.search(text.replace(b"\0", b" ").decode("latin-1")) is not None


def label_faults(
    voxels: dict[float, int], declared: frozenset[int] | None, ignore: int | None
) -> Iterator[tuple[str, str]]:
    """Yield the faults of a label's values.

    Args:
        voxels: number of voxels by value.
        declared: values of the classes that a file names; None if no file names any.
        ignore: value of voxels that are not annotated.
    """
    if fault := label_value_fault(voxels):
        yield fault
        return
    num_classes = max(declared) + 1 if declared else DEFAULT_CLASSES
    strange = [value for value in voxels if int(value) not in {0, ignore, *(declared or range(num_classes))}]
    beyond = [value for value in strange if value >= num_classes]
    if declared and beyond:
        text = f"values {list_of(beyond)}, declared {list_of(sorted(declared))}"
        yield "undeclared class", text + advise_ignore(beyond)
    elif strange:
        yield "unnamed class", f"values {list_of(strange)}, of {num_classes} classes"
    if set(voxels) <= {0}:
        yield "empty label", "background alone"
