"""CT volumes in NIfTI files, nnU-Net folders and DICOM trees. Each has a patient, and is read as RAS."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from hyspark.data.datasets.nnunet import name_of_image
from hyspark.data.datasets.subjects import subject_of
from hyspark.data.readers.dicom import Header, Series, assemble_series, read_headers, read_series
from hyspark.data.readers.nifti import check_header, read_nifti
from hyspark.utils.paths import NIFTI, nifti_stem, walk_folders
from hyspark.utils.processes import available_cores
from hyspark.utils.text import listing

MAX_TITLE_LENGTH = 80
"""Characters of a patient or case in a file name."""


@dataclass(frozen=True)
class Volume:
    """One CT volume.

    Attributes:
        patient: the patient's ID or name.
        name: unique file name, the same on every machine.
        source: the NIfTI file, or the folder of the DICOM series.
        series: the DICOM series.
    """

    patient: str
    name: str
    source: Path
    series: Series | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the voxels are read from."""
        return self.series.files if self.series else (self.source,)


@dataclass
class Found:
    """The result of a search for volumes.

    Attributes:
        volumes: the volumes.
        skipped: series that are no volume, each with the reason.
        damaged: unreadable files, each with the reason.
        others: number of other files, by modality.
    """

    volumes: list[Volume] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def find_ct_volumes(
    sources: Sequence[Path], *, min_slices: int, skip: Path, num_workers: int = 0, progress: bool = True
) -> Found:
    """Find the volumes in NIfTI files and in folders, sorted by name.

    A folder with imagesTr is an nnU-Net data set; only the first channel of its images is used. In other folders,
    every NIfTI file and every DICOM series is used.

    Args:
        sources: files and folders.
        min_slices: DICOM series with fewer slices are skipped.
        skip: folder that is not searched.
        num_workers: processes that read DICOM headers; 0 takes one per core.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: if a source does not exist, or there is no volume.
        ValueError: if two volumes have one name.
    """
    found = Found()
    dicom: dict[Path, str] = {}  # with the folder that stands for a patient without ID
    seen: set[str] = set()
    for source in sources:
        for file in files_of(source, skip):
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            below = file.relative_to(source) if file != source else Path(file.name)
            if not NIFTI.fullmatch(file.name):
                dicom[file] = below.parts[0] if len(below.parts) > 1 else file.parent.name
            elif case := case_of(file):
                found.volumes.append(Volume(subject_of(case), volume_name(case, below.as_posix()), file))
            else:
                found.others["another channel"] += 1
    headers = read_headers(list(dicom), num_workers or available_cores(), progress and bool(dicom))
    add_series(zip(dicom, headers, strict=True), dicom, min_slices, found)
    found.volumes.sort(key=lambda volume: volume.name)
    if not found.volumes and not found.damaged:
        why = "".join(f"\n  {source}: {reason}" for source, reason in found.skipped)
        raise FileNotFoundError(f"no CT volume, NIfTI or DICOM, in {listing(map(str, sources))}{why}")
    names = Counter(volume.name for volume in found.volumes)
    if twice := [str(volume.source) for volume in found.volumes if names[volume.name] > 1]:
        raise ValueError(
            f"sources: volumes with the same name and relative path: {listing(twice)}; give the folder above them"
        )
    return found


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


def case_of(file: Path) -> str | None:
    """Return the case of a NIfTI file, or None for another channel of an nnU-Net case."""
    if file.parent.name == "imagesTr":
        return name_of_image(file, "0000")
    return nifti_stem(file).removesuffix("_0000") or file.name


def volume_name(title: str, unique: str) -> str:
    """Make a file name of a title in letters, digits, ".", "_" and "-", and of a digest of a unique text."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", title)[:MAX_TITLE_LENGTH].strip(".-") or "unnamed"
    return f"{safe}_{hashlib.sha256(unique.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def add_series(
    headers: Iterator[tuple[Path, Header | str | None]], folders: dict[Path, str], min_slices: int, found: Found
) -> None:
    """Add the CT series of DICOM files to the result, and count or list the other files."""
    series: dict[tuple[str, str], list[Header]] = {}
    for path, header in headers:
        if isinstance(header, str):
            found.damaged.append((str(path), header))
        elif header is None:
            found.others["no image"] += 1
        elif header.modality != "CT":
            found.others[header.modality] += 1
        else:
            series.setdefault((header.patient or folders[path], header.series), []).append(header)
    for (patient, uid), slices in series.items():
        folder = slices[0].path.parent
        try:
            found.volumes.append(
                Volume(patient, volume_name(patient, uid), folder, assemble_series(slices, min_slices))
            )
        except ValueError as error:
            found.skipped.append((f"{folder}, series {uid}", str(error)))


def read_volume(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels `(h, w, d)` of a volume, axes closest to RAS, and their affine `(4, 4)`.

    The values are those of the file, which should be Hounsfield units.

    Raises:
        ValueError: if the file is damaged or no volume.
    """
    if volume.series:
        voxels, affine = read_series(volume.series), volume.series.affine
    else:
        shape, _ = check_header(volume.source)
        image = read_nifti(volume.source)
        voxels, affine = np.asanyarray(image.dataobj).reshape(shape), np.asarray(image.affine, dtype=np.float64)
        if voxels.dtype.kind == "f":
            voxels = voxels.astype(np.float32, copy=False)
    if voxels.dtype.kind not in "iuf":
        raise ValueError(f"expected one number per voxel, got {voxels.dtype}")
    if not np.isfinite(voxels).all():
        raise ValueError("holds NaN or infinite values")
    sizes = voxel_sizes(affine)
    if not (np.isfinite(affine).all() and (sizes > 0).all() and abs(np.linalg.det(affine[:3, :3] / sizes)) > 0.01):
        raise ValueError("no valid geometry in its header")
    turn = io_orientation(affine)
    return apply_orientation(voxels, turn), affine @ inv_ornt_aff(turn, voxels.shape)
