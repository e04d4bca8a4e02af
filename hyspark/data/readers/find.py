"""SourceFiles and folders -> volumes: NIfTI, nnU-Net folders, DICOM series, other formats, folders of pictures."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hyspark.data.datasets.file_names import OTHER_FORMATS
from hyspark.data.datasets.subjects import subjects_of
from hyspark.data.readers.dicom import ReadHeader, read_headers
from hyspark.data.readers.elements import Header
from hyspark.data.readers.series import assemble_series
from hyspark.data.readers.source_files import SourceFiles, sort_sources, take_pictures
from hyspark.data.readers.volumes import Found, NotUsed, Volume, pseudonym_of
from hyspark.utils.file_content import ARCHIVE, HEAD, content_of
from hyspark.utils.paths import NIFTI, nifti_stem
from hyspark.utils.private_text import private
from hyspark.utils.processes import available_cores
from hyspark.utils.text import first_line, listing

MAX_TITLE_LENGTH = 80
"""Characters of a patient or case in a file name."""
EMPTY_SLICE = "unreadable as DICOM (an empty file among those of a series)"


def find_volumes(
    sources: Sequence[Path],
    *,
    min_slices: int,
    skip: Path,
    modalities: Collection[str] = ("CT",),
    other_formats: bool = False,
    slice_spacing: tuple[float, float, float] | None = None,
    keep_patient_id: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> Found:
    """Find the volumes in files and in folders, sorted by name.

    NIfTI images of folders are those that `read_data_folder` finds, so label maps are none of them. In folders without
    imagesTr, every scan of a DICOM series is used too.

    Args:
        sources: files and folders.
        min_slices: DICOM scans and folders of pictures with fewer slices are skipped.
        skip: folder that is not searched.
        modalities: modalities of DICOM series that are volumes; other files are counted.
        other_formats: whether NRRD, MetaImage and the like, and folders of pictures, are volumes.
        slice_spacing: mm between columns, rows and slices of pictures; None if unknown.
        keep_patient_id: whether names show the PatientID of DICOM files, instead of a pseudonym.
        num_workers: processes that read DICOM headers; 0 takes one per core.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: if a source does not exist, or there is no volume.
        ModuleNotFoundError: if a library that reads a file's format is not installed.
        ValueError: if two volumes have one name.
    """
    found = Found()
    files = sort_sources(sources, skip, other_formats, found)
    if other_formats:
        take_pictures(files, min_slices, slice_spacing, found)
    add_files_of_volumes(files, found)
    headers = read_headers(list(files.rest), num_workers or available_cores(), progress and bool(files.rest))
    add_series(zip(files.rest, headers, strict=True), files.rest, modalities, min_slices, keep_patient_id, found)
    note_shared_ids(found)
    found.volumes.sort(key=lambda volume: volume.name)
    if not found.volumes and not found.damaged:
        kind = "CT volume" if tuple(modalities) == ("CT",) else "volume"
        raise FileNotFoundError(f"no {kind}, NIfTI or DICOM, in {listing(map(str, sources))}{found.why_none()}")
    names = Counter(volume.name for volume in found.volumes)
    if twice := [str(volume.source) for volume in found.volumes if names[volume.name] > 1]:
        raise ValueError(
            f"sources: volumes with the same name and relative path: {listing(twice)}; give the folder above them"
        )
    return found


def add_files_of_volumes(files: SourceFiles, found: Found) -> None:
    """Add NIfTI images, files of other formats and folders of pictures as volumes."""
    paths = list(files.images)
    titles = [title_of(path) for path in paths]
    subjects = subjects_of(titles, paths)
    for (path, below), title, subject in zip(files.images.items(), titles, subjects, strict=True):
        unique = below.as_posix()
        name = volume_name(title, unique)
        found.volumes.append(Volume(subject, name, path, identity=unique, pictures=files.stacks.get(path)))


def title_of(path: Path) -> str:
    """Return the name of an image's file without ending and channel, or of a folder of pictures."""
    if path.is_dir() or NIFTI.fullmatch(path.name):
        return nifti_stem(path).removesuffix("_0000") or path.name
    return path.stem.removesuffix("_0000") or path.name


def volume_name(title: str, unique: str) -> str:
    """Make a file name of a title in letters, digits, ".", "_" and "-", and of a digest of a unique text."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", title)[:MAX_TITLE_LENGTH].strip(".-") or "unnamed"
    return f"{safe}_{hashlib.sha256(unique.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def add_series(
    headers: Iterator[tuple[Path, ReadHeader]],
    below: dict[Path, Path],
    modalities: Collection[str],
    min_slices: int,
    keep_patient_id: bool,
    found: Found,
) -> None:
    """Add the scans of DICOM files to the result, and list the other files."""
    series: dict[tuple[str, str], list[Header]] = {}
    damaged: dict[Path, list[Path]] = {}
    others: list[Path] = []
    for path, read in headers:
        if isinstance(read, str):
            found.damaged.append(NotUsed(str(path), read, str(path)))
            damaged.setdefault(path.parent, []).append(path)
        elif read is None:
            others.append(path)
        elif read[0].modality not in modalities:
            found.add_other(read[0].modality, path)
        else:
            # SourceFiles without SeriesInstanceUID are a series of their folder.
            uid = read[0].series or f"folder {path.parent.name}"
            patient = read[0].patient or (below[path].parts[0] if below[path].parts[1:] else path.parent.name)
            series.setdefault((patient, uid), []).extend(read)
    named = {(header.path.parent, ending_of(header.path)) for slices in series.values() for header in slices}
    for path in others:
        if (path.parent, ending_of(path)) in named and not path.stat().st_size:
            found.damaged.append(NotUsed(str(path), EMPTY_SLICE, str(path)))
            damaged.setdefault(path.parent, []).append(path)
        else:
            found.add_other(kind_of_other(path), path)
    for (patient, uid), slices in series.items():
        paths = {header.path for header in slices}
        near = [file for folder in sorted({path.parent for path in paths}) for file in damaged.get(folder, ())]
        add_scans_of_series(patient, uid, slices, near, min_slices, keep_patient_id, found)


def ending_of(path: Path) -> str:
    """Return the ending of a name in small letters; empty if it is a number, as the last part of a UID."""
    return path.suffix.lower() if path.suffix[1:].isalpha() else ""


def kind_of_other(path: Path) -> str:
    """Return the kind of a file that is no DICOM, for the counts of other files."""
    if (ending := path.suffix.lower()) in OTHER_FORMATS:
        return f"{ending} (convert to NIfTI)"
    with path.open("rb") as file:
        return ARCHIVE if content_of(file.read(HEAD))[0] == "archive" else "no image"


def note_shared_ids(found: Found) -> None:
    """Add a note to DICOM volumes whose PatientID stands for several people."""
    people: dict[str, set[str]] = {}
    for volume in found.volumes:
        if volume.series and volume.series.header.person:
            people.setdefault(volume.patient, set()).add(volume.series.header.person)
    for index, volume in enumerate(found.volumes):
        if volume.series and volume.series.header.patient and (num := len(people.get(volume.patient, ()))) > 1:
            note = f"its PatientID is that of {num} names or birth dates, and all are taken as one patient"
            series = replace(volume.series, marked_notes=(*volume.series.marked_notes, note))
            found.volumes[index] = replace(volume, series=series)


def add_scans_of_series(
    patient: str,
    uid: str,
    slices: Sequence[Header],
    damaged: Sequence[Path],
    min_slices: int,
    keep_patient_id: bool,
    found: Found,
) -> None:
    """Add the scans of one DICOM series to the result, or why it has none."""
    folder = slices[0].path.parent
    pseudonym = "" if keep_patient_id or not slices[0].patient else pseudonym_of(patient)

    def not_used(reason: str) -> NotUsed:
        files = len({header.path for header in slices})
        return NotUsed(f"{folder}, series {uid}", reason, f"{patient}, {uid}", slices[0], files)

    try:
        assembled = assemble_series(slices, min_slices, damaged)
    except Exception as error:  # values of a damaged header may raise anything
        found.damaged.append(not_used(f"unreadable as a series ({private(first_line(error))})"))
        return
    found.skipped += map(not_used, assembled.skipped)
    found.damaged += map(not_used, assembled.faults)
    for scan in assembled.volumes:
        identity = f"{uid}, {scan.label}" if scan.label else uid
        name = volume_name(pseudonym or patient, identity)
        found.volumes.append(Volume(patient, name, folder, scan, pseudonym, identity))
