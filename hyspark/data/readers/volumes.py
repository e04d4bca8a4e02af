"""Volumes in NIfTI files, DICOM series, files of other formats and folders of pictures. Each has a patient."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from hyspark.data.quality.case_files import sample_voxels
from hyspark.data.quality.image_kind import IN_HU, ImageKind, image_kind
from hyspark.data.readers.elements import Header
from hyspark.data.readers.geometry import why_singular
from hyspark.data.readers.header import NiftiError
from hyspark.data.readers.hounsfield import check_units, read_series
from hyspark.data.readers.nifti import read_nifti
from hyspark.data.readers.other_formats import PictureStack, detached_files, read_other_format, read_pictures
from hyspark.data.readers.series import Series
from hyspark.utils.paths import NIFTI
from hyspark.utils.private_text import PrivateError, private, shown
from hyspark.utils.text import first_line


@dataclass(frozen=True)
class Volume:
    """One volume.

    Attributes:
        patient: the patient's ID or name, which volumes are split by.
        name: unique file name, the same on every machine.
        source: the file, or the folder of the DICOM series or of the pictures.
        series: the DICOM series.
        pseudonym: what names and records show instead of a DICOM file's PatientID; empty if the patient is shown.
        identity: text that no other volume of the sources has: UID and scan of a series, or path below the source.
        pictures: the pictures of 2D slices.
    """

    patient: str
    name: str
    source: Path
    series: Series | None = None
    pseudonym: str = ""
    identity: str = ""
    pictures: PictureStack | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the voxels are read from."""
        if self.series:
            return self.series.files
        return self.pictures.files if self.pictures else (self.source, *detached_files(self.source))

    @property
    def modality(self) -> str:
        """Modality of a DICOM series; empty for other files, which do not state it."""
        return self.series.modality if self.series else ""

    @property
    def file_format(self) -> str:
        """Format of its files: dicom, pictures, nifti, or the ending of another one."""
        if self.series or self.pictures:
            return "dicom" if self.series else "pictures"
        return "nifti" if NIFTI.fullmatch(self.source.name) else self.source.suffix.lower().lstrip(".")


@dataclass(frozen=True)
class NotUsed:
    """Files that are no volume.

    Attributes:
        source: the file, or folder and series.
        marked_reason: why, with private parts marked.
        identity: text that nothing else in the sources has.
        header: header of an image of a DICOM series; None otherwise.
        num_files: number of files.
    """

    source: str
    marked_reason: str
    identity: str
    header: Header | None = None
    num_files: int = 1

    @property
    def reason(self) -> str:
        """The reason as the terminal shows it."""
        return shown(self.marked_reason)

    def __iter__(self) -> Iterator[str]:
        """Yield source and reason, so that a pair of names takes both."""
        yield from (self.source, self.reason)


@dataclass
class Found:
    """The result of a search for volumes.

    Attributes:
        volumes: the volumes.
        skipped: images that are no volume, each with the reason.
        damaged: unreadable files, and series with a fault, each with the reason.
        other_files: files of other kinds, by modality.
    """

    volumes: list[Volume] = field(default_factory=list)
    skipped: list[NotUsed] = field(default_factory=list)
    damaged: list[NotUsed] = field(default_factory=list)
    other_files: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def others(self) -> Counter[str]:
        """Number of files of other kinds, by modality."""
        return Counter({kind: len(files) for kind, files in self.other_files.items()})

    def add_other(self, kind: str, file: Path) -> None:
        """Add a file of another kind."""
        self.other_files.setdefault(kind, []).append(file)

    def why_none(self) -> str:
        """List, a line each, what was found instead of volumes."""
        kinds = [f"{len(files)} {kind}, e.g. {files[0]}" for kind, files in self.other_files.items()]
        return "".join(f"\n  {line}" for line in [*(f"{one.source}: {one.reason}" for one in self.skipped), *kinds])


def volume_state(volume: Volume) -> list[int]:
    """Return number, bytes and newest modification time of a volume's files; empty if one is missing."""
    try:
        states = [file.stat() for file in volume.files]
    except OSError:
        return []
    return [len(states), sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)]


def pseudonym_of(patient: str) -> str:
    """Return a name for a patient that does not show the ID, and is the same on every machine."""
    return f"patient-{hashlib.sha256(patient.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def read_volume(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels `(h, w, d)` of a volume, axes closest to RAS, and their affine `(4, 4)`.

    The values are those of the file, which should be Hounsfield units in CT.

    Raises:
        ValueError: if the file is damaged or no volume.
    """
    if volume.series:
        voxels, affine = read_series(volume.series.slices), volume.series.affine
        if volume.modality == "CT" and all(part.rescale is None for part in volume.series.slices):
            check_units(voxels)
    elif volume.pictures:
        voxels, affine = read_pictures(volume.pictures)
    elif NIFTI.fullmatch(volume.source.name):
        image = read_nifti(volume.source)
        voxels, affine = np.asanyarray(image.dataobj), image.affine
        if voxels.dtype.kind == "f":
            voxels = voxels.astype(np.float32, copy=False)
    else:
        voxels, affine = read_other_format(volume.source)
    if voxels.dtype.kind not in "iuf":
        raise PrivateError(f"expected one number per voxel, got {voxels.dtype}")
    if not np.isfinite(voxels).all():
        raise PrivateError("holds NaN or infinite values")
    if reason := why_singular(affine):
        raise PrivateError(f"no valid geometry in its header ({reason})")
    turn = io_orientation(affine)
    return apply_orientation(voxels, turn), affine @ inv_ornt_aff(turn, voxels.shape)


def kind_of_values(voxels: np.ndarray) -> ImageKind | None:
    """Decide what voxels `(h, w, d)` hold; None if all are equal.

    Raises:
        PrivateError: if they are HU that wrapped around.
    """
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        return None
    kind = image_kind(low, high, sample_voxels(voxels))
    if kind.name == "wrapped around":
        raise PrivateError(
            f"{kind.range_text}: negative HU that were read as unsigned, as by PixelRepresentation 0 for signed "
            "pixels; export it again with PixelRepresentation 1"
        )
    return kind


def notes_on_kind(kind: ImageKind | None, voxels: np.ndarray) -> list[str]:
    """List what is odd about the values of a CT `(h, w, d)`, as `check` does.

    Args:
        kind: what they hold, by `kind_of_values`.
        voxels: the values.
    """
    if kind is None:
        return [f"constant: the value {float(voxels.min()):g} everywhere"]
    return [] if kind.name in IN_HU else [f"no Hounsfield units? {kind.name}: {kind.range_text}"]


def reading_error(error: BaseException) -> str:
    """Return why a volume is unreadable, in one line with private parts."""
    if isinstance(error, PrivateError):
        return error.text.splitlines()[0]
    if isinstance(error, NiftiError):
        return f"{error.kind}: {private(first_line(error))}"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is; lower --prepare_workers"
    return f"unreadable ({type(error).__name__}: {private(first_line(error))})"
