"""Faults of the files of a case: a kind of finding each, with its text."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

GZIP = b"\x1f\x8b"
DICOM = 2
"""NIfTI's code of a header extension that holds a DICOM header."""
TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name")
PERSONAL = re.compile(r"\^|\b[A-Z][a-z]+, ?[A-Z][a-z]+|\b(19|20)\d\d(0\d|1[0-2])([0-2]\d|3[01])\b")
"""A DICOM name (Doe^Jane), "Doe, Jane", a date of birth as 19510203."""
PLAUSIBLE_SPACING = (0.2, 10.0)
"""Range of a CT's mm between voxels."""
SINGULAR = 1e-3
"""Determinant of the axes' directions below which an affine counts as singular."""
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
    if path.suffix == ".gz" and first != GZIP:
        return "not NIfTI", "a file that is not compressed, though its name ends in .gz"
    return None


def format_fault(image: Any) -> tuple[str, str] | None:
    """Return why a NIfTI file is no volume of numbers, as a kind of finding and its text; None if it is one."""
    kind = image.get_data_dtype()
    if kind.fields:
        return "colours", f"{len(kind.fields)} colours a voxel"
    if kind.kind == "c":
        return "complex numbers", f"voxels of type {kind}"
    if len(image.shape) < 3 or image.shape[3:] not in ((), (1,)) or 0 in image.shape:
        return "not 3D", f"shape {image.shape}"
    return None


def header_faults(image: Any, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the faults of a readable header, each as a kind of finding and its text."""
    shape, affine = image.shape[:3], image.affine
    with ImageOpener(str(path)) as file:
        header = type(image.header).from_fileobj(file, check=False)  # unchanged; nibabel.load fixes it
    edges = [float(edge) for edge in header["pixdim"][1:4]]
    if not all(np.isfinite(edge) and edge > 0 for edge in edges):
        yield "impossible spacing", f"{list_of(edges)} mm"
    elif min(edges) < PLAUSIBLE_SPACING[0] or max(edges) > PLAUSIBLE_SPACING[1]:
        yield "odd spacing", f"{list_of(edges)} mm"
    spacing = voxel_sizes(affine)
    if not np.isfinite(affine).all() or not spacing.all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < SINGULAR:
        yield "singular affine", f"{np.round(affine[:3, :3], 3).tolist()}"
        return
    axes = affine[:3, :3] / spacing
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine > SHEAR:
        yield "sheared affine", f"axes {np.degrees(np.arccos(cosine)):.1f} degrees apart"
    yield from position_faults(header, shape)
    if min(shape) < LOCALISER:
        yield "localiser", f"shape {shape}"
    elif min(shape) < THIN_VOXELS or (np.array(shape) * spacing).min() < THIN_MM:
        yield "thin", f"{list_of(shape)} voxels, {list_of(np.array(shape) * spacing)} mm"
    if text := personal_text(header):
        yield "text that may name a patient", text


def position_faults(header: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Yield the faults of sform and qform: both missing, one invalid, or positions that differ."""
    sform, qform = header.get_sform(coded=True)[0], None
    try:
        qform = header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):
        yield "sform and qform disagree", "an invalid qform"
    if sform is None and qform is None:
        yield "no orientation", "neither sform nor qform"
    elif sform is not None and qform is not None:
        apart = distance(sform, qform, shape)
        if apart > voxel_sizes(sform).max():
            yield "sform and qform disagree", f"corners up to {apart:.1f} mm apart"


def personal_text(header: Any) -> str:
    """Return the field or extension of a header that may name a patient, without its text; empty if none does."""
    for name in (name for name in TEXT_FIELDS if name in header):
        text = header[name].tobytes().rstrip(b"\\0").decode("latin-1")
        if PERSONAL.search(text):
            return f"field {name}"
    if any(extension.get_code() == DICOM for extension in header.extensions):
        return "an extension with a DICOM header"
    return ""


def pair_faults(image: Any, label: Any) -> Iterator[tuple[str, str]]:
    """Yield the faults of a label's grid, which should be its image's."""
    shape, other = image.shape[:3], label.shape[:3]
    if shape != other:
        yield "label of another shape", f"{list_of(other)} voxels, the image {list_of(shape)}"
        return
    apart = distance(image.affine, label.affine, shape)
    if not apart <= voxel_sizes(image.affine).max():
        yield "label elsewhere", f"corners up to {apart:.3g} mm from the image's"


def label_faults(voxels: dict[float, int], declared: frozenset[int] | None) -> Iterator[tuple[str, str]]:
    """Yield the faults of a label's values, given with their numbers of voxels."""
    odd = [value for value in voxels if not (value == np.round(value) and 0 <= value <= 255)]
    if odd:
        yield "label not whole", f"values {list_of(odd)}"
        return
    if declared is not None and (strange := [v for v in voxels if int(v) not in declared]):
        yield "undeclared class", f"values {list_of(strange)}, declared {list_of(sorted(declared))}"
    if set(voxels) <= {0}:
        yield "empty label", "background alone"


def distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Compute the largest distance in mm between the corners of a volume under two affines."""
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)
    return float(np.linalg.norm(apply_affine(one, corners) - apply_affine(other, corners), axis=1).max())


def list_of(values: Any) -> str:
    """Join up to eight numbers."""
    shown = ", ".join(f"{value:g}" for value in list(values)[:8])
    return shown + (", ..." if len(list(values)) > 8 else "")
