"""DICOM series that are named on a command line -> the volumes to predict, each a NIfTI file while it is needed."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.found import MAX_NAMED
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.importing.nifti_content import nifti_content
from hyspark.data.readers.dicom import MODALITIES, is_dicom, read_header
from hyspark.data.readers.find import find_volumes, volume_name
from hyspark.data.readers.series import Series
from hyspark.data.readers.volumes import Found, Volume, read_volume
from hyspark.data.settings import PrepareSettings
from hyspark.utils.atomic import write_whole
from hyspark.utils.paths import NIFTI, walk_folders
from hyspark.utils.text import listing

MODALITIES_OF = {"ct": ("CT",), "ct-zscore": ("CT",), "mr": ("MR",)} | {
    name: tuple(MODALITIES) for name in ("zscore", "none")
}
"""Modalities of the DICOM series that a network reads, by its intensity."""


@dataclass(frozen=True, kw_only=True)
class ScanCase(Case):
    """A scan of a DICOM series; its image is a file that `write_scan` makes when the case's turn comes.

    Attributes:
        volume: the scan.
    """

    volume: Volume

    @property
    def series(self) -> Series:
        """The slices of the scan."""
        assert self.volume.series is not None
        return self.volume.series

    @property
    def origin(self) -> str:
        """The folder and the series, for messages."""
        label = f", {self.series.label}" if self.series.label else ""
        return f"{self.volume.source}, series {self.series.uid}{label}"

    def grid(self) -> tuple[tuple[int, int, int], np.ndarray]:
        """Return voxels per axis and the affine of the scan, from the header of its first slice."""
        header = read_header(self.volume.files[0])
        assert isinstance(header, tuple)
        assert header[0].plane is not None
        rows, columns = header[0].plane[:2]
        return (int(columns), int(rows), len(self.series.slices)), self.series.affine


@dataclass
class PredictInputs:
    """The volumes to predict.

    Attributes:
        cases: the volumes.
        failures: reasons of DICOM files and series that are unreadable, by file or series.
        lines: lines for the terminal: files that are not used, and what is odd about a series.
    """

    cases: list[Case] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def find_inputs(
    inputs: Sequence[Path],
    out: Path,
    *,
    settings: PrepareSettings,
    only_dicom: bool,
    min_slices: int,
    progress: bool = True,
) -> PredictInputs:
    """Find the volumes of files and folders, NIfTI or DICOM.

    A folder is one of DICOM if `read_inputs` finds no NIfTI image in it, and a file at any depth is DICOM.

    Args:
        inputs: files and folders.
        out: folder of the label maps, which is not searched; the scans are written below it.
        settings: settings of preparation: their intensities decide on the modality of DICOM series.
        only_dicom: whether folders are searched for DICOM alone, and NIfTI files are errors.
        min_slices: DICOM scans with fewer slices are not used.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: a path does not exist, or there is no volume.
        ValueError: a file is neither NIfTI nor DICOM, two volumes have one name, or the network reads several channels
            of DICOM.
    """
    if min_slices < 1:
        raise ValueError(f"--min_slices: expected 1 or more, got {min_slices}")
    if only_dicom and (nifti := [str(path) for path in inputs if NIFTI.fullmatch(path.name) and path.is_file()]):
        raise ValueError(
            f"{listing(nifti)}: expected DICOM, which a DICOM object refers to, found NIfTI; use --format nifti"
        )
    dicom = [path for path in inputs if only_dicom or is_dicom_source(path)]
    found = PredictInputs()
    if others := [path for path in inputs if path not in dicom]:
        given = read_inputs(others, settings.image_channels)
        found.cases += given.cases
        found.lines += given.unused_lines()
    if dicom:
        if len(settings.image_channels) > 1:
            raise ValueError(
                f"{dicom[0]}: a network of {len(settings.image_channels)} image channels reads NIfTI, whose names say "
                "which files are one case; found DICOM; convert it by `hyspark import`, and name the files of a case "
                "CASE_0000.nii.gz, CASE_0001.nii.gz, ..."
            )
        modalities = MODALITIES_OF[settings.intensity[0]]
        sources = outermost([Path(os.path.abspath(path)) for path in dicom])
        searched = find_volumes(sources, min_slices=min_slices, skip=out, modalities=modalities, progress=progress)
        add_dicom_scans(searched, out, found)
        if not found.cases and not found.failures:
            why = "expected DICOM series, which a DICOM object refers to, found none; use --format nifti for NIfTI"
            raise FileNotFoundError("\n  ".join([f"{listing(map(str, dicom))}: {why}", *found.lines]))
    names = [case.name for case in found.cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several volumes are named {listing(twice)}; predict them into two folders")
    return found


def outermost(paths: Sequence[Path]) -> list[Path]:
    """Return different paths without those that lie in another one."""
    return [path for path in dict.fromkeys(paths) if not set(path.parents) & set(paths)]


def is_dicom_source(path: Path) -> bool:
    """Return whether a file is DICOM, or a folder holds some and no NIfTI image that is predicted."""
    if path.is_file():
        return not NIFTI.fullmatch(path.name) and is_dicom(path)
    if not path.is_dir():
        return False
    try:
        read_inputs([path])
    except FileNotFoundError:
        files = (file for folder, _ in walk_folders(path) for file in sorted(folder.iterdir()))
        return any(file.is_file() and not NIFTI.fullmatch(file.name) and is_dicom(file) for file in files)
    except ValueError:  # a faulty set of NIfTI files, which the caller's own search names
        pass
    return False


def add_dicom_scans(searched: Found, out: Path, found: PredictInputs) -> None:
    """Add the scans of DICOM series to the volumes to predict, and what is not used to the lines."""
    for volume in searched.volumes:
        if volume.series is None:
            searched.add_other("NIfTI files among DICOM; name them to use them", volume.source)
            continue
        name = scan_name(volume, volume.series)
        case = ScanCase(name, volume.source.name, scan_folder(out) / f"{name}.nii.gz", volume=volume)
        found.cases.append(case)
        found.lines += [f"{case.origin} ({case.name}): {note}" for note in volume.series.notes]
    found.failures |= {source: f"{source}: {why}" for source, why in searched.damaged}
    found.lines += [f"{source}: not used, {why}" for source, why in searched.skipped]
    for kind, files in searched.other_files.items():
        found.lines.append(f"not used, {kind}: {len(files)} files: {listing(map(str, files), MAX_NAMED)}")


def scan_name(volume: Volume, series: Series) -> str:
    """Name a scan by hashes of its study and its series.

    The UIDs, which nobody guesses, are part of them: a hash of a PatientID alone is undone by hashing all numbers.
    """
    study = f"{series.study or series.uid}\0{volume.patient}"
    digest = hashlib.sha256(study.encode("utf-8", "surrogatepass")).hexdigest()
    return volume_name(f"study-{digest[:10]}", volume.identity)


def scan_folder(out: Path) -> Path:
    """Return the folder of the scans that are being predicted."""
    return out / ".scans"


def write_scan(case: ScanCase) -> None:
    """Write the NIfTI file of a scan, the one that `hyspark import` writes.

    Raises:
        ValueError: a file of the scan is damaged, or its values are no Hounsfield units.
    """
    voxels, affine = read_volume(case.volume)
    write_whole(case.image, nifti_content(voxels, affine))
