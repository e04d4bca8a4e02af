"""CT volumes -> folders of PNG slices, train/1 and val/1, no patient in both: the layout of torchvision's ImageFolder.

Wolf et al. pre-trained on such slices, each scaled to its own range ("Self-supervised pre-training with contrastive
and masked autoencoder methods for dealing with small datasets in deep learning for medical imaging", Sci Rep 2023).
slices.json records the written volumes; the same command continues from it.
"""

import io
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from PIL import Image
from tqdm import tqdm

from hyspark.data.datasets.splits import held_out_subjects
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import Volume, kind_of_values, notes_on_kind, read_volume, volume_state
from hyspark.data.settings import Axis, PictureSettings
from hyspark.data.slices.pictures import slice_axes, slice_pictures, why_skewed
from hyspark.data.slices.record import KEEP_PATIENT_ID, RECORD, SLICE_SPLITS, check_unmoved, read_record
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.processes import KILLED, available_cores, map_unordered
from hyspark.utils.text import failure_reason

CLASS = "1"
"""ImageFolder expects a folder per class; there is one class."""
PNG_LEVEL = 3
"""Takes a third of the time of Pillow's own level, 6, for an eighth more bytes."""
WRITE_EVERY, WRITE_FRACTION = 5.0, 0.02
"""Least seconds between two writes of the record during slicing, and largest fraction of the time that they take."""
PADDING_HU = -1100.0
"""HU below which values are padding, which widens the range of slices that are scaled by it."""


@dataclass(frozen=True)
class Sliced:
    """The result of slicing a volume.

    Attributes:
        volume: the volume.
        entry: its entry in the record.
        error: why it is unreadable.
        unfit: why its slices would be distorted.
    """

    volume: Volume
    entry: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    unfit: str = ""


def write_slices(
    sources: Sequence[Path],
    out: Path,
    settings: PictureSettings,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    min_slices: int = 8,
    keep_patient_id: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write out/train/1/NAME_INDEX.png, out/val/1/NAME_INDEX.png and the record out/slices.json.

    Volumes that are already written are skipped. An unreadable one is listed under "failed" and does not stop the
    others.

    Args:
        sources: files and folders of CTs, see `find_volumes`.
        out: folder to write.
        settings: orientation, grey values and size of the slices.
        val_fraction: fraction of patients for validation, see `held_out_subjects`.
        seed: seed of the split.
        min_slices: DICOM scans with fewer slices are skipped.
        keep_patient_id: whether names and record show the PatientID of DICOM files, instead of a pseudonym.
        num_workers: volumes sliced at a time; 0 takes one per core.
        progress: whether to show progress bars.

    Returns:
        The content of the record.

    Raises:
        FileNotFoundError: if there is no volume.
        OSError: if `out` is not writable.
        ValueError: if `out` was written with other settings or from other volumes.
    """
    if num_workers < 0 or min_slices < 1:
        raise ValueError(
            f"prepare_workers and min_slices: expected at least 0 and at least 1, got {num_workers} and {min_slices}"
        )
    sources, out = [Path(os.path.abspath(source)) for source in sources], Path(os.path.abspath(out))
    chosen = {
        "source": [str(source) for source in sources],
        **asdict(settings),
        "min_slices": min_slices,
        "val_fraction": val_fraction,
        "seed": seed,
        KEEP_PATIENT_ID: keep_patient_id,
    }
    known = read_record(out, chosen)
    num_workers = num_workers or available_cores()
    found = find_volumes(
        sources,
        min_slices=min_slices,
        skip=out,
        keep_patient_id=keep_patient_id,
        num_workers=num_workers,
        progress=progress,
    )
    splits = split_volumes(found.volumes, seed=seed, val_fraction=val_fraction)
    check_unmoved(out, known, splits)

    existing = existing_files(out)
    volumes = {volume.name: volume for volume in found.volumes}
    done = {name: entry for name, entry in known.items() if is_done(entry, volumes[name], existing[name])}
    todo = [volume for volume in found.volumes if volume.name not in done]
    record: dict[str, Any] = {
        "settings": chosen,
        "volumes": done,
        "failed": [{"source": one.source, "why": one.reason} for one in found.damaged],
        "skipped": [{"source": one.source, "why": one.reason} for one in found.skipped],
        "files_of_other_kinds": dict(sorted(found.others.items())),
        "other_files": [
            {"kind": kind, "file": str(file)} for kind, files in sorted(found.other_files.items()) for file in files
        ],
    }
    with writing(out):
        write_json(out / RECORD, record)
        for file in [file for volume in todo for file in existing[volume.name]]:
            file.unlink()
    jobs = [(volume, out, splits[volume.name], settings) for volume in todo]
    try:
        slice_all(jobs, record, out, num_workers, progress)
    finally:
        record["volumes"] = dict(sorted(record["volumes"].items()))
        for kind in ("failed", "skipped"):
            record[kind].sort(key=lambda item: item["source"])
        with writing(out):
            write_json(out / RECORD, record)
    return record


def split_volumes(volumes: Sequence[Volume], *, seed: int, val_fraction: float) -> dict[str, str]:
    """Assign each volume's name to "train" or "val" by its patient."""
    held_out = held_out_subjects((volume.patient for volume in volumes), seed=seed, val_fraction=val_fraction)
    return {volume.name: "val" if volume.patient in held_out else "train" for volume in volumes}


def existing_files(out: Path) -> dict[str, list[Path]]:
    """List the written images of each volume's name, unfinished files included."""
    existing = defaultdict(list)
    for folder in [out / split / CLASS for split in SLICE_SPLITS]:
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if found := re.fullmatch(r"\.?(.+)_\d+\.png(\.\d+\.tmp)?", entry.name):
                existing[found[1]].append(Path(entry.path))
    return existing


def is_done(entry: dict[str, Any], volume: Volume, existing: Sequence[Path]) -> bool:
    """Return whether all images of an entry exist, and the volume's files are unchanged."""
    num_whole = sum(path.suffix == ".png" for path in existing)
    return num_whole == len(existing) == entry["slices"] and entry["state"] == volume_state(volume)


def slice_all(
    jobs: Sequence[tuple[Volume, Path, str, PictureSettings]],
    record: dict[str, Any],
    out: Path,
    num_workers: int,
    progress: bool,
) -> None:
    """Slice volumes and add each to the record, which is written now and then: the longer it is, the less often."""
    next_write = time.monotonic() + WRITE_EVERY
    with tqdm(total=len(jobs), desc="slices", unit="volume", disable=not progress) as bar:
        for sliced in map_unordered(slice_volume, jobs, num_workers, killed_slicing):
            if sliced.entry:
                record["volumes"][sliced.volume.name] = sliced.entry
            else:
                record["failed" if sliced.error else "skipped"].append(
                    {"source": str(sliced.volume.source), "why": sliced.error or sliced.unfit}
                )
            bar.update()
            if (started := time.monotonic()) > next_write:
                with writing(out):
                    write_json(out / RECORD, record)
                finished = time.monotonic()
                next_write = finished + max(WRITE_EVERY, (finished - started) / WRITE_FRACTION)


def killed_slicing(volume: Volume, out: Path, split: str, settings: PictureSettings) -> Sliced:
    """Return the result for a volume whose process was killed."""
    return Sliced(volume, error=KILLED)


def slice_volume(volume: Volume, out: Path, split: str, settings: PictureSettings) -> Sliced:
    """Write the slices of one volume; raise OSError if the disk fails, which is no fault of the volume."""
    state = volume_state(volume)
    try:
        voxels, affine = read_volume(volume)
        value_notes = notes_on_kind(kind_of_values(voxels), voxels)
    except Exception as error:  # a damaged file may raise anything, and must not end the others
        return Sliced(volume, error=failure_reason(error))
    if why := why_skewed(affine, settings.axis) or why_distorted(volume, settings.axis):
        return Sliced(volume, unfit=f"{why}; try --axis axial")
    num_slices = num_blank = 0
    for index, picture in slice_pictures(voxels, affine, settings):
        if picture is None:
            num_blank += 1
            continue
        with writing(out):
            write_whole(out / split / CLASS / f"{volume.name}_{index:04d}.png", encode_png(picture))
        num_slices += 1
    entry = {
        "source": str(volume.source),
        "patient": volume.pseudonym or volume.patient,
        "part": split,
        "slices": num_slices,
        "blank": num_blank,
        "padded": bool(voxels.min() < PADDING_HU),
        "notes": [*(volume.series.notes if volume.series else ()), *value_notes],
        "state": state,
    }
    return Sliced(volume, entry)


def why_distorted(volume: Volume, axis: Axis) -> str:
    """Explain why slices across the acquired ones would be distorted; empty if they are not, or are those."""
    if volume.series is None or io_orientation(volume.series.affine)[2, 0] == slice_axes(axis)[0]:
        return ""
    return volume.series.uneven


def encode_png(picture: np.ndarray) -> bytes:
    """Encode an image, uint8 `(rows, columns)`, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Name `out` in an OSError that is raised in the block."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{out}: slices are not writable ({error.strerror or error}); make room, or choose another "
            "folder with --out"
        ) from error
