"""CT volumes in NIfTI files, nnU-Net folders and DICOM trees. Each has a patient, and is read as RAS."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.data.datasets.file_names import OTHER_FORMATS
from hyspark.data.datasets.subjects import subjects_of
from hyspark.data.readers.dicom import Header, read_headers
from hyspark.data.readers.geometry import why_singular
from hyspark.data.readers.hounsfield import check_units, read_series
from hyspark.data.readers.nifti import read_nifti
from hyspark.data.readers.series import Series, assemble_series
from hyspark.utils.paths import NIFTI, nifti_stem, walk_folders
from hyspark.utils.processes import available_cores
from hyspark.utils.text import first_line, listing

MAX_TITLE_LENGTH = 80
"""Characters of a patient or case in a file name."""


@dataclass(frozen=True)
class Volume:
    """One CT volume.

    Attributes:
        patient: the patient's ID or name, which volumes are split by.
        name: unique file name, the same on every machine.
        source: the NIfTI file, or the folder of the DICOM series.
        series: the DICOM series.
        pseudonym: what names and records show instead of a DICOM file's PatientID; empty if the patient is shown.
    """

    patient: str
    name: str
    source: Path
    series: Series | None = None
    pseudonym: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the voxels are read from."""
        return self.series.files if self.series else (self.source,)


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
    skipped: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    other_files: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def others(self) -> Counter[str]:
        """Number of files of other kinds, by modality."""
        return Counter({kind: len(files) for kind, files in self.other_files.items()})

    def add_other(self, kind: str, file: Path) -> None:
        """Add a file of another kind."""
        self.other_files.setdefault(kind, []).append(file)


def find_ct_volumes(
    sources: Sequence[Path],
    *,
    min_slices: int,
    skip: Path,
    keep_patient_id: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> Found:
    """Find the volumes in NIfTI files and in folders, sorted by name.

    NIfTI images of folders are those that `read_data_folder` finds, so label maps are none of them. In folders without
    imagesTr, every scan of a DICOM series is used too.

    Args:
        sources: files and folders.
        min_slices: DICOM scans with fewer slices are skipped.
        skip: folder that is not searched.
        keep_patient_id: whether names show the PatientID of DICOM files, instead of a pseudonym.
        num_workers: processes that read DICOM headers; 0 takes one per core.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: if a source does not exist, or there is no volume.
        ValueError: if two volumes have one name.
    """
    found = Found()
    dicom: dict[Path, str] = {}  # with the folder that stands for a patient without ID
    nifti: dict[Path, Path] = {}  # with the path below its source
    seen: set[str] = set()
    for source in sources:
        images = dict.fromkeys(find_images_of(source, skip, found))
        for file in [*images, *files_of(source, skip)]:
            if (real := os.path.realpath(file)) in seen:
                continue
            below = file.relative_to(source) if file != source else Path(file.name)
            if file in images:
                nifti[file] = below
            elif not NIFTI.fullmatch(file.name):
                dicom[file] = below.parts[0] if len(below.parts) > 1 else file.parent.name
            else:
                continue
            seen.add(real)
    titles = [nifti_stem(file).removesuffix("_0000") or file.name for file in nifti]
    for (file, below), title, subject in zip(nifti.items(), titles, subjects_of(titles, list(nifti)), strict=True):
        found.volumes.append(Volume(subject, volume_name(title, below.as_posix()), file))
    headers = read_headers(list(dicom), num_workers or available_cores(), progress and bool(dicom))
    add_series(zip(dicom, headers, strict=True), dicom, min_slices, keep_patient_id, found)
    found.volumes.sort(key=lambda volume: volume.name)
    if not found.volumes and not found.damaged:
        kinds = [f"{len(files)} {kind}, e.g. {files[0]}" for kind, files in found.other_files.items()]
        why = "".join(f"\n  {line}" for line in [*(f"{source}: {reason}" for source, reason in found.skipped), *kinds])
        raise FileNotFoundError(f"no CT volume, NIfTI or DICOM, in {listing(map(str, sources))}{why}")
    names = Counter(volume.name for volume in found.volumes)
    if twice := [str(volume.source) for volume in found.volumes if names[volume.name] > 1]:
        raise ValueError(
            f"sources: volumes with the same name and relative path: {listing(twice)}; give the folder above them"
        )
    return found


def find_images_of(source: Path, skip: Path, found: Found) -> list[Path]:
    """Find the NIfTI images at or below a path; label maps and other channels are counted, doubtful files listed."""
    if not source.is_dir():
        return [source] if NIFTI.fullmatch(source.name) else []
    data = read_data_folder(source, with_loose=True, skip=skip)
    found.skipped += [(f.file, f.found) for f in data.findings if f.kind == "two files for a case"]
    for (kind, reason), files in data.unused.items():
        nifti = [file for file in files if NIFTI.fullmatch(file.name)]
        if kind == "another channel":
            for file in nifti:
                found.add_other(kind, file)
        else:
            found.skipped += [(str(file), reason) for file in nifti]
    return [case.image for case in data.cases]


def files_of(source: Path, skip: Path) -> Iterator[Path]:
    """Yield the files at or below a path, without hidden ones; of an nnU-Net data set those of imagesTr."""
    if source.is_file():
        yield source
    elif not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    else:
        for folder, below in walk_folders(source, skip=skip):
            if (folder / "imagesTr").is_dir():
                below[:] = ["imagesTr"]
                continue
            files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
            yield from (file for file in files if file.is_file() or (file.is_symlink() and not file.exists()))


def volume_name(title: str, unique: str) -> str:
    """Make a file name of a title in letters, digits, ".", "_" and "-", and of a digest of a unique text."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", title)[:MAX_TITLE_LENGTH].strip(".-") or "unnamed"
    return f"{safe}_{hashlib.sha256(unique.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def add_series(
    headers: Iterator[tuple[Path, tuple[Header, ...] | str | None]],
    folders: dict[Path, str],
    min_slices: int,
    keep_patient_id: bool,
    found: Found,
) -> None:
    """Add the CT scans of DICOM files to the result, and list the other files."""
    series: dict[tuple[str, str], list[Header]] = {}
    damaged: dict[Path, list[Path]] = {}
    for path, read in headers:
        if isinstance(read, str):
            found.damaged.append((str(path), read))
            damaged.setdefault(path.parent, []).append(path)
        elif read is None:
            ending = path.suffix.lower()
            found.add_other(f"{ending} (convert to NIfTI)" if ending in OTHER_FORMATS else "no image", path)
        elif read[0].modality != "CT":
            found.add_other(read[0].modality, path)
        else:
            # Files without SeriesInstanceUID are a series of their folder.
            uid = read[0].series or f"folder {path.parent.name}"
            series.setdefault((read[0].patient or folders[path], uid), []).extend(read)
    for (patient, uid), slices in series.items():
        source = f"{slices[0].path.parent}, series {uid}"
        pseudonym = "" if keep_patient_id or not slices[0].patient else pseudonym_of(patient)
        near = [
            file for folder in sorted({header.path.parent for header in slices}) for file in damaged.get(folder, ())
        ]
        try:
            assembled = assemble_series(slices, min_slices, near)
        except Exception as error:  # values of a damaged header may raise anything
            found.damaged.append((source, f"unreadable as a series ({first_line(error)})"))
            continue
        found.skipped += [(source, reason) for reason in assembled.skipped]
        found.damaged += [(source, reason) for reason in assembled.faults]
        for scan in assembled.volumes:
            name = volume_name(pseudonym or patient, f"{uid}, {scan.label}" if scan.label else uid)
            found.volumes.append(Volume(patient, name, slices[0].path.parent, scan, pseudonym))


def pseudonym_of(patient: str) -> str:
    """Return a name for a patient that does not show the ID, and is the same on every machine."""
    return f"patient-{hashlib.sha256(patient.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def read_volume(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels `(h, w, d)` of a volume, axes closest to RAS, and their affine `(4, 4)`.

    The values are those of the file, which should be Hounsfield units.

    Raises:
        ValueError: if the file is damaged or no volume.
    """
    if volume.series:
        voxels, affine = read_series(volume.series.slices), volume.series.affine
        if all(part.rescale is None for part in volume.series.slices):
            check_units(voxels)
    else:
        image = read_nifti(volume.source)
        voxels, affine = np.asanyarray(image.dataobj), image.affine
        if voxels.dtype.kind == "f":
            voxels = voxels.astype(np.float32, copy=False)
    if voxels.dtype.kind not in "iuf":
        raise ValueError(f"expected one number per voxel, got {voxels.dtype}")
    if not np.isfinite(voxels).all():
        raise ValueError("holds NaN or infinite values")
    if reason := why_singular(affine):
        raise ValueError(f"no valid geometry in its header ({reason})")
    turn = io_orientation(affine)
    return apply_orientation(voxels, turn), affine @ inv_ornt_aff(turn, voxels.shape)
