"""The files of a case, each read once, with the findings about them: the one decision of what is usable.

`check` and preparation both begin here, so they agree on every file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.nnunet_prepared import NnunetPreparation
from hyspark.data.datasets.words import CHANNEL, FIRST_CHANNELS
from hyspark.data.intensity import OF_CT, VolumeScale, intensity_of, volume_scale, whole_scale, window_scale
from hyspark.data.quality.faults import file_fault, header_faults, label_faults
from hyspark.data.quality.findings import Finding, missing_channel
from hyspark.data.quality.modality import declared_modality, num_declared
from hyspark.data.quality.value_faults import value_faults
from hyspark.data.readers.geometry import Grid, pair_fault, put_in_order
from hyspark.data.readers.header import NiftiError, NiftiHeader, read_nifti_header
from hyspark.data.readers.label_values import whole_values
from hyspark.data.readers.nifti import read_voxels
from hyspark.data.readers.nnunet_arrays import ArrayError, prepared_grid, read_prepared
from hyspark.data.settings import PrepareSettings
from hyspark.utils.paths import nifti_stem
from hyspark.utils.text import first_line, format_bytes

LARGEST = float(np.finfo(np.float32).max)
"""Largest value of float32, in which values are prepared."""
OF_AIR = 0.5
"""HU above the window's lower end that arrays of nnU-Net have in clipped air, by rounding and by waves of splines."""
SAMPLED = 1_000_000
"""Number of evenly spaced voxels by which an image's values are judged."""


@dataclass
class CaseFiles:
    """The files of a case in memory.

    Attributes:
        case: the case.
        findings: findings about its files.
        shape: voxels per axis of the image; None if unreadable.
        spacing: mm per voxel of the image; None if unreadable.
        images: each channel with its voxels `(h, w, d)`, on the grid of the first; without unreadable ones.
        scales: how each readable channel is prepared.
        label: the label map in the order of its image's voxels; None if unreadable or elsewhere, or there is none.
        low: least value of the first channel.
        high: largest value of the first channel.
        sample: evenly spaced voxels of the first channel; None if a value is no number.
        label_voxels: number of voxels by label value.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    images: list[SpatialImage] = field(default_factory=list)
    scales: list[VolumeScale] = field(default_factory=list)
    label: SpatialImage | None = None
    low: float | None = None
    high: float | None = None
    sample: np.ndarray | None = None
    label_voxels: dict[float, int] = field(default_factory=dict)

    def add(self, path: Path, faults: Iterator[tuple[str, str]]) -> None:
        """Add the faults of a file to the findings."""
        self.findings += [Finding(kind, str(path), found) for kind, found in faults]

    @property
    def max_label(self) -> int:
        """Largest value of the label map in its file, 0 without one; the ignored value does not count."""
        return int(max((value for value in self.label_voxels if value != self.case.ignore), default=0))

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.severity == "error"]


def read_case(case: Case, settings: PrepareSettings, declared: frozenset[int] | None = None) -> CaseFiles:
    """Read the files of a case; whatever is wrong with them is a finding, and nothing raises.

    Args:
        case: the case.
        settings: settings of preparation, whose HU window the values are held against.
        declared: values of the classes that a file names; None if no file names any.
    """
    files = CaseFiles(case)
    try:
        if case.prepared is not None:
            add_prepared(case.image, case.prepared, settings, files)
            return files
        if len(case.images) < settings.num_image_channels:
            found = f"{len(case.images)} file, for {settings.num_image_channels} channels"
            files.add(case.image, iter([("missing channel", found)]))
        image = open_volume(case.image, files, channel_in_file(case, settings, 0))
        if image is not None and (not image.has_position or fits_memory(image.path, image.grid, settings, files)):
            add_image(image, settings, files)
            for channel, path in enumerate(case.others, 1):
                add_channel(path, channel, image, settings, files)
        if case.label is not None:
            add_label_map(case.label, image, declared, files)
    except Exception as error:  # of any library, on files that nobody foresaw
        files.findings.append(failure(case, error))
    return files


def failure(case: Case, error: Exception) -> Finding:
    """Make the finding for an exception that the files of a case cause."""
    kind = "too large" if isinstance(error, MemoryError) else "not examined"
    return Finding(kind, str(case.image), f"{type(error).__name__}: {first_line(error)}")


def channel_in_file(case: Case, settings: PrepareSettings, channel: int) -> int | None:
    """Return which volume of a file of several is meant, by its index among the channels that are read.

    None where a file is one channel, or where neither the settings nor dataset.json say that volumes of one file are
    channels: they may be times.
    """
    stem = nifti_stem(case.image)
    is_one = len(set(case.images)) > 1 or (CHANNEL.fullmatch(stem) and not case.name.endswith(stem))
    is_said = settings.image_channels != FIRST_CHANNELS or num_declared(case.image) > 1
    return settings.image_channels[channel] if is_said and not is_one else None


def open_volume(path: Path, files: CaseFiles, channel: int | None = None) -> NiftiHeader | None:
    """Read the header of a NIfTI file; return None and add a finding if it is no readable volume."""
    fault = file_fault(path)
    if fault is None:
        try:
            return read_nifti_header(path, channel)
        except NiftiError as error:
            fault = (error.kind, error.found)
    files.add(path, iter([fault]))
    return None


def fits_memory(path: Path, grid: Grid, settings: PrepareSettings, files: CaseFiles) -> bool:
    """Return whether an image fits the memory of this machine once resampled; add a finding if it does not."""
    voxels = np.prod(np.array(grid.shape) * voxel_sizes(grid.affine) / settings.spacing)
    needed = voxels * settings.num_image_channels * np.dtype(np.float32).itemsize
    memory = psutil.virtual_memory().total
    if needed <= memory:
        return True
    spacing = " x ".join(f"{edge:g}" for edge in settings.spacing)
    found = f"{format_bytes(needed)} at {spacing} mm, of {format_bytes(memory)} of memory"
    files.add(path, iter([("too large", found)]))
    return False


def add_image(header: NiftiHeader, settings: PrepareSettings, files: CaseFiles) -> None:
    """Read the first channel of a case, with the findings about its header and its values."""
    files.shape = header.shape
    if header.num_volumes > settings.num_image_channels:
        files.add(header.path, iter([("another channel", f"{header.num_volumes} channels in one file")]))
    if header.has_position:
        files.spacing = tuple(float(edge) for edge in voxel_sizes(header.affine))
    files.add(header.path, header_faults(header))
    voxels = load_voxels(header, files)
    if voxels is None:
        return
    files.images.append(SpatialImage(voxels, header.affine if header.has_position else np.eye(4)))
    files.low, files.high = float(voxels.min()), float(voxels.max())  # NaN if any voxel is NaN
    files.sample = judge_values(header.path, voxels, 0, settings, files)


def add_prepared(path: Path, preparation: NnunetPreparation, settings: PrepareSettings, files: CaseFiles) -> None:
    """Read the channels of an array that nnU-Net has prepared, with the findings about it and its values.

    They are not judged by the intensities of scans: CT was clipped, and other values are z-scores.
    """
    if (fault := file_fault(path)) and fault[0] != "empty file":
        files.add(path, iter([fault]))
        return
    try:
        grid = prepared_grid(path, preparation)
        if not fits_memory(path, grid, settings, files):
            return
        channels = read_prepared(path, preparation, settings.image_channels)
    except ArrayError as error:
        files.add(path, iter([("not as nnU-Net", str(error))]))
        return
    files.shape, files.spacing = grid.shape, preparation.spacing
    for number, voxels in enumerate(channels):
        if fault := number_fault(voxels):
            files.add(path, iter([fault]))
            continue
        is_ct = intensity_of(settings, number) in OF_CT
        scale = window_scale(voxels, settings) if is_ct else whole_scale(voxels, settings)
        if is_ct:
            voxels[voxels < settings.hu_min + OF_AIR] = settings.hu_min
        low, high = float(voxels.min()), float(voxels.max())
        if low == high:
            files.add(path, iter([("constant", f"the value {low:g} everywhere")]))
        files.images.append(SpatialImage(voxels, grid.affine))
        files.scales.append(scale)


def add_channel(path: Path, channel: int, first: NiftiHeader, settings: PrepareSettings, files: CaseFiles) -> None:
    """Read a further channel of a case, with the findings about its header, its grid and its values."""
    if not path.exists() and not path.is_symlink():
        files.findings.append(missing_channel(path))
        return
    header = open_volume(path, files, channel_in_file(files.case, settings, channel))
    if header is None:
        return
    if path != first.path:
        files.add(path, header_faults(header))
    if (voxels := load_voxels(header, files)) is None:
        return
    judge_values(path, voxels, channel, settings, files)
    if not (first.has_position and header.has_position):
        return
    if fault := pair_fault(first.grid, header.grid):
        found = fault[1].replace("the image", str(first.path))
        files.add(path, iter([(fault[0].replace("label", "channel"), found)]))
    else:
        turned = put_in_order(voxels, header.grid, first.grid)
        files.images.append(SpatialImage(turned.voxels, first.affine))


def judge_values(
    path: Path, voxels: np.ndarray, channel: int, settings: PrepareSettings, files: CaseFiles
) -> np.ndarray | None:
    """Add the findings about a channel's values, and how it is prepared.

    Returns:
        Evenly spaced voxels; None if a value is no number.
    """
    if fault := number_fault(voxels):
        files.add(path, iter([fault]))
        return None
    low, high = float(voxels.min()), float(voxels.max())
    sample, scale = sample_voxels(voxels), volume_scale(voxels, settings, channel)
    files.scales.append(scale)
    modality = declared_modality(path, settings.image_channels[channel])
    faults = list(value_faults(low, high, sample, settings, modality, channel))
    if low < high and not scale.low < scale.high:
        faults.append(("no foreground", f"values from {low:g} to {high:g}, one of them in the foreground"))
    files.add(path, iter(faults))
    return sample


def number_fault(voxels: np.ndarray) -> tuple[str, str] | None:
    """Return the fault of voxels that are no number, or beyond float32; None if there is none."""
    low, high = float(voxels.min()), float(voxels.max())  # NaN if any voxel is NaN
    if max(abs(low), abs(high)) <= LARGEST:
        return None
    num = int(voxels.size - (np.abs(voxels) <= LARGEST).sum())
    return "NaN or infinite", f"{num} voxels that are no number"


def add_label_map(path: Path, image: NiftiHeader | None, declared: frozenset[int] | None, files: CaseFiles) -> None:
    """Read the label map of a case, with the findings about its grid and its values."""
    label = open_volume(path, files)
    if label is None:
        return
    files.add(path, iter(label.faults))
    voxels = load_voxels(label, files)
    if voxels is not None:
        voxels = whole_values(voxels)
        files.label_voxels = values_of(voxels)
        files.add(path, label_faults(files.label_voxels, declared, files.case.ignore))
    if image is None or not (image.has_position and label.has_position):
        return
    if fault := pair_fault(image.grid, label.grid):
        files.add(path, iter([fault]))
    elif voxels is not None:
        turned = put_in_order(voxels, label.grid, image.grid)
        files.label = SpatialImage(turned.voxels, turned.affine)


def load_voxels(header: NiftiHeader, files: CaseFiles) -> np.ndarray | None:
    """Read all voxels, `(h, w, d)`; return None and add a finding if the file is damaged."""
    try:
        return read_voxels(header)  # compares the checksum
    except MemoryError:
        raise
    except NiftiError as error:
        files.add(header.path, iter([(error.kind, error.found)]))
    except Exception as error:  # of nibabel, the system
        files.add(header.path, iter([("damaged", first_line(error))]))
    return None


def values_of(voxels: np.ndarray) -> dict[float, int]:
    """Count the voxels of each value, at most 300 values."""
    values, counts = np.unique(voxels, return_counts=True)
    return dict(zip(values[:300].tolist(), counts[:300].tolist(), strict=True))


def sample_voxels(voxels: np.ndarray) -> np.ndarray:
    """Take about SAMPLED of the voxels at most, evenly spaced, as they are stored."""
    step = max(1, round((voxels.size / SAMPLED) ** (1 / 3)))
    return voxels[::step, ::step, ::step]
