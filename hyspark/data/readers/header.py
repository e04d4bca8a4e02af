"""NIfTI headers, NIfTI-1 and NIfTI-2, exactly as they are in the file; no field is corrected.

Every reader of a NIfTI file begins here: `check`, preparation, `predict`, `evaluate` and `slices` see one header.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from isal import igzip, igzip_lib
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from hyspark.data.quality.findings import FINDING_KINDS
from hyspark.data.readers.geometry import Grid, read_geometry
from hyspark.utils.file_content import HEAD, content_of, is_nifti
from hyspark.utils.text import first_line

GZIP = b"\x1f\x8b"
"""First bytes of a compressed file."""
MAX_COMPRESSION = 1032
"""Bytes that one byte of a gzip file holds at most."""
FORMATS = ((Nifti1Header, 344), (Nifti2Header, 4))
"""NIfTI-1 and NIfTI-2, each with the offset of its magic."""
LINE_ENDS = (b"\r\n\x1a\n", bytes(4))
"""Bytes behind the magic of NIfTI-2; a transfer as text changes them."""
MAX_EXTENSION = 1 << 20
"""Bytes of a header extension that are read."""
ISAL_ERROR: Any = igzip_lib.IsalError  # its stubs do not say that it is a type
GZIP_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, ISAL_ERROR)
"""Exceptions of reading a file that is damaged or not accessible."""
OF_CONTENT = {"download": "failed download", "archive": "archive", "other": "not NIfTI", "": "not NIfTI"}
"""Kinds of finding by the group of a file's content."""
FATAL = ("impossible spacing", "singular affine")
"""Kinds of fault that leave a file without a position in space."""


class NiftiError(ValueError):
    """A file that holds no readable volume.

    Attributes:
        kind: kind of finding.
        found: the state of the file.
    """

    def __init__(self, kind: str, found: str):
        advice = (
            FINDING_KINDS[kind].advice
            if kind in ("misnamed", "failed download", "archive")
            else "copy or convert it again"
        )
        super().__init__(
            f"expected one 3D volume, got {found}"
            if kind in ("not 3D", "missing channel")
            else f"unreadable as NIfTI ({found}); {advice}"
        )
        self.kind, self.found = kind, found


@dataclass(frozen=True)
class NiftiHeader:
    """The header of one volume of a file.

    Attributes:
        path: the file.
        raw: nibabel's header with the fields of the file, unchanged.
        is_compressed: whether the file is compressed by gzip.
        shape: voxels per axis `(h, w, d)`.
        dtype: type of the stored voxels.
        offset: position of the volume's first voxel in the unpacked file, in bytes.
        affine: `(4, 4)`, RAS mm.
        faults: faults of the fields, each as a kind of finding and its text.
        num_volumes: volumes along the fourth axis of the file, such as the channels of MR.
    """

    path: Path
    raw: Any
    is_compressed: bool
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    affine: np.ndarray
    faults: tuple[tuple[str, str], ...]
    num_volumes: int = 1

    @property
    def end(self) -> int:
        """End of the voxels in the unpacked file, in bytes."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    @property
    def grid(self) -> Grid:
        """Shape and affine."""
        return Grid(self.shape, self.affine)

    @property
    def has_position(self) -> bool:
        """Whether the affine is usable."""
        return not any(kind in FATAL for kind, _ in self.faults)

    @property
    def text_fields(self) -> list[str]:
        """Names of the fields that hold free text."""
        types = self.raw.template_dtype
        return [name for name in types.names if types[name].kind == "S" and name not in ("magic", "regular")]


def read_nifti_header(path: Path, channel: int | None = None) -> NiftiHeader:
    """Read the header of a NIfTI file without its voxels.

    Args:
        path: the file.
        channel: which volume of a file of several is meant; None to refuse such files.

    Raises:
        NiftiError: the file is damaged, or holds no volume of numbers. A volume without a valid position is a fault of
            the header.
    """
    try:
        with path.open("rb") as file:
            is_compressed = file.read(2) == GZIP
        check_ending(path, is_compressed)
        with open_unpacked(path, is_compressed) as unpacked:
            start = unpacked.read(HEAD)
        stored = path.stat().st_size
    except GZIP_ERRORS as error:
        raise NiftiError("damaged", first_line(error)) from error
    raw, faults = parse_fields(start)
    dtype = voxel_type(raw)
    shape, num_volumes = volume_shape(raw, channel)
    offset, odd = voxel_offset(raw)
    faults += odd
    affine, geometry_faults = read_geometry(raw, shape)
    if channel and num_volumes > 1:
        offset += channel * math.prod(shape) * dtype.itemsize
    found = (*geometry_faults, *faults)
    header = NiftiHeader(path, raw, is_compressed, shape, dtype, offset, affine, found, num_volumes)
    if header.end > stored * (MAX_COMPRESSION if is_compressed else 1):
        size = " x ".join(str(n) for n in shape)
        raise NiftiError("damaged", f"a file of {stored:,} bytes, too short for {size} voxels of type {dtype}")
    return header


def check_ending(path: Path, is_compressed: bool) -> None:
    """Check that the name of a file says whether it is compressed; raise NiftiError if it does not."""
    named = path.suffix.lower() == ".gz"
    if named == is_compressed:
        return
    with open_unpacked(path, is_compressed) as file:
        head = file.read(HEAD)
    group, what = content_of(head)
    if not head:
        raise NiftiError("empty file", "no bytes")
    if is_nifti(head):
        how, name = ("compressed", f"{path.name}.gz") if is_compressed else ("not compressed", path.stem)
        raise NiftiError("misnamed", f"a NIfTI file that is {how}; its name should be {name}")
    if named:
        raise NiftiError(OF_CONTENT[group], what or "a file that is not compressed, though its name ends in .gz")
    raise NiftiError("not NIfTI", "a compressed file, though its name does not end in .gz")


def open_unpacked(path: Path, is_compressed: bool) -> IO[bytes]:
    """Open a file for reading; of a compressed one the unpacked bytes are read."""
    opened: IO[bytes] = igzip.open(path, "rb") if is_compressed else path.open("rb")
    return opened


def parse_fields(start: bytes) -> tuple[Any, list[tuple[str, str]]]:
    """Parse the first bytes of an unpacked file.

    Returns:
        The header of nibabel, unchanged, and the faults of its fields.
    """
    for kind, at in FORMATS:
        magic = start[at : at + 4]
        if magic not in (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0") or (magic[2:3] == b"2") != (kind is Nifti2Header):
            continue
        if len(start) < kind.sizeof_hdr:
            break
        if kind is Nifti2Header and start[8:12] not in LINE_ENDS:
            raise NiftiError("damaged", "line ends that were changed, as by a transfer as text")
        sizes = {"little": int.from_bytes(start[:4], "little"), "big": int.from_bytes(start[:4], "big")}
        order = next((order for order, size in sizes.items() if size == kind.sizeof_hdr), None)
        raw = kind(start[: kind.sizeof_hdr], order, check=False)
        faults = []
        if order is None:
            faults.append(("odd field", f"sizeof_hdr is {int(raw['sizeof_hdr'])}"))
        if magic[1:2] == b"i":
            if not raw["vox_offset"] >= kind.single_vox_offset:
                raise NiftiError("not NIfTI", "the header of a pair of files (.hdr and .img)")
            faults.append(("odd field", f"magic is {magic.decode().rstrip(chr(0))}, of a pair of files"))
        return raw, faults
    if not start:
        raise NiftiError("empty file", "no bytes")
    group, what = content_of(start)
    raise NiftiError(OF_CONTENT[group], what or "no header of NIfTI (its magic n+1 or n+2 is missing)")


def voxel_type(raw: Any) -> np.dtype:
    """Return the type of the stored voxels; raise NiftiError unless they are real numbers that can be scaled."""
    try:
        dtype: np.dtype = raw.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise NiftiError("not NIfTI", f"voxels of unknown type (datatype is {int(raw['datatype'])})") from error
    if dtype.fields:
        raise NiftiError("colours", f"{len(dtype.fields)} colours a voxel")
    if dtype.kind == "c":
        raise NiftiError("complex numbers", f"voxels of type {dtype}")
    if dtype.kind not in "iuf":
        raise NiftiError("not NIfTI", f"voxels that are no numbers (datatype is {int(raw['datatype'])})")
    try:
        raw.get_slope_inter()
    except HeaderDataError as error:
        raise NiftiError("NaN or infinite", f"scl_inter is {float(raw['scl_inter'])}") from error
    return dtype


def volume_shape(raw: Any, channel: int | None = None) -> tuple[tuple[int, int, int], int]:
    """Return voxels per axis and the number of volumes; raise NiftiError unless the file holds the one meant."""
    num = int(raw["dim"][0])
    if not 1 <= num <= 7:
        raise NiftiError("not 3D", f"dim[0] is {num}")
    shape = tuple(int(n) for n in raw["dim"][1 : num + 1])
    if num < 3 or min(shape) < 1:
        raise NiftiError("not 3D", f"shape {shape}")
    num_volumes = math.prod(shape[3:])
    if num_volumes > 1 and (channel is None or num_volumes != max(shape[3:])):
        raise NiftiError("not 3D", f"shape {shape}")
    if num_volumes > 1 and channel is not None and channel >= num_volumes:
        raise NiftiError("missing channel", f"{num_volumes} channels in one file, without channel {channel}")
    return (shape[0], shape[1], shape[2]), num_volumes


def voxel_offset(raw: Any) -> tuple[int, list[tuple[str, str]]]:
    """Return the position of the first voxel in bytes, which is behind the header, and the faults of the field."""
    offset = float(raw["vox_offset"])
    least = raw.single_vox_offset
    if not math.isfinite(offset) or offset < least:
        return least, [("odd field", f"vox_offset is {offset:g}, within the header; voxels are read from {least}")]
    return int(offset), []


def num_volumes(path: Path) -> int:
    """Return the number of volumes along the fourth axis of a NIfTI file; 1 of an unreadable one."""
    try:
        return read_nifti_header(path, 0).num_volumes
    except (NiftiError, OSError):
        return 1


def header_extensions(header: NiftiHeader) -> Iterator[tuple[int, bytes]]:
    """Yield the code and the content of each header extension; the first that does not fit ends them."""
    order: Literal["little", "big"] = "little" if header.raw.endianness == "<" else "big"
    position = header.raw.single_vox_offset
    with open_unpacked(header.path, header.is_compressed) as file:
        file.seek(position - 4)
        if file.read(4)[:1] in (b"", b"\0"):
            return
        while position + 16 <= header.offset:
            definition = file.read(8)
            size = int.from_bytes(definition[:4], order, signed=True)
            if len(definition) < 8 or size < 16 or position + size > header.offset:
                return
            content = file.read(min(size - 8, MAX_EXTENSION))
            yield int.from_bytes(definition[4:], order, signed=True), content
            position += size
            file.seek(position)
