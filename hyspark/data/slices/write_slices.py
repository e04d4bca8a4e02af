"""CT volumes -> folders of PNG slices, train/1 and val/1, no patient in both: the layout of torchvision's ImageFolder.

Such slices, each scaled to its own range, are what Wolf et al. pre-trained on ("Self-supervised pre-training with
contrastive and masked autoencoder methods for dealing with small datasets in deep learning for medical imaging", Sci
Rep 2023). What was done is written to slices.json, from which the same command continues.
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
from hyspark.data.preprocessing.prepare import MAX_LISTED, UNPREPARABLE, reason
from hyspark.data.readers.volumes import Volume, find_volumes, read_volume
from hyspark.data.settings import Axis, PictureSettings
from hyspark.data.slices.pictures import axes_of, pictures, why_skewed
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.paths import load_json
from hyspark.utils.processes import as_done, available_cores
from hyspark.utils.text import listing

RECORD = "slices.json"
PARTS = ("train", "val")
CLASS = "1"
"""ImageFolder wants a folder per class; there is one."""
PNG_LEVEL = 3
"""A third of the time that Pillow's own level, 6, takes, for an eighth more bytes."""
WRITE_EVERY = 5.0
"""Seconds between two writings of the record while volumes are being done."""


@dataclass(frozen=True)
class Sliced:
    """What became of a volume: its entry in the record; or why it could not be read, or has no such planes."""

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
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write out/train/1/NAME_PLANE.png and out/val/1/NAME_PLANE.png, and out/slices.json, whose content is returned.

    sources, min_slices: of `find_volumes`. val_fraction, seed: of `split_by_subject`, here by patient. num_workers:
    volumes done at a time; 0 takes one per core. Volumes that are there already are not done again; one that cannot be
    read is listed under "failed" and does not stop the others. Raises ValueError where `out` was written with other
    settings or from other volumes; FileNotFoundError where there is nothing to slice; OSError where `out` cannot be
    written.
    """
    if num_workers < 0 or min_slices < 1:
        raise ValueError(
            f"prepare_workers must not be negative and min_slices at least 1, got {num_workers} and {min_slices}"
        )
    sources, out = [Path(os.path.abspath(source)) for source in sources], Path(os.path.abspath(out))
    chosen = {
        "source": [str(source) for source in sources],
        **asdict(settings),
        "min_slices": min_slices,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    known = read_record(out, chosen)
    num_workers = num_workers or available_cores()
    found = find_volumes(sources, min_slices=min_slices, skip=out, num_workers=num_workers, progress=progress)
    parts = split(found.volumes, seed=seed, val_fraction=val_fraction)
    check_unmoved(out, known, parts)

    there = files_there(out)
    volumes = {volume.name: volume for volume in found.volumes}
    done = {name: entry for name, entry in known.items() if is_done(entry, volumes[name], there[name])}
    todo = [volume for volume in found.volumes if volume.name not in done]
    record: dict[str, Any] = {
        "settings": chosen,
        "volumes": done,
        "failed": [{"source": source, "why": why} for source, why in found.damaged],
        "skipped": [{"source": source, "why": why} for source, why in found.skipped],
        "files_of_other_kinds": dict(sorted(found.others.items())),
    }
    with writing(out):
        write_json(out / RECORD, record)
        for file in [file for volume in todo for file in there[volume.name]]:
            file.unlink()
    jobs = [(volume, out, parts[volume.name], settings) for volume in todo]
    try:
        do_all(jobs, record, out, num_workers, progress)
    finally:
        record["volumes"] = dict(sorted(record["volumes"].items()))
        for kind in ("failed", "skipped"):
            record[kind].sort(key=lambda item: item["source"])
        with writing(out):
            write_json(out / RECORD, record)
    return record


def read_record(out: Path, chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The volumes that slices.json lists; raises ValueError where it was written with other settings."""
    path = out / RECORD
    if not path.exists():
        if any((out / part).exists() for part in PARTS):
            raise ValueError(f"{out} holds {' or '.join(PARTS)} and no {RECORD}; name another folder with --out")
        return {}
    record = load_json(path)
    if not isinstance(record, dict) or not {"settings", "volumes"} <= record.keys():
        raise ValueError(f"{path} is no record of slices; name another folder with --out")
    before = record["settings"]
    different = [
        f"{name} {before.get(name)}, now {chosen.get(name)}"
        for name in [*chosen, *(before.keys() - chosen.keys())]
        if before.get(name) != chosen.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} was written with other settings: {'; '.join(different)}; name another folder with --out"
        )
    volumes: dict[str, dict[str, Any]] = record["volumes"]
    return volumes


def split(volumes: Sequence[Volume], *, seed: int, val_fraction: float) -> dict[str, str]:
    """By name of the volume, "train" or "val", as its patient is."""
    held_out = held_out_subjects((volume.patient for volume in volumes), seed=seed, val_fraction=val_fraction)
    return {volume.name: "val" if volume.patient in held_out else "train" for volume in volumes}


def check_unmoved(out: Path, known: dict[str, dict[str, Any]], parts: dict[str, str]) -> None:
    """Raises ValueError where slices in `out` are of volumes that are no longer there, or belong to the other part."""
    advice = "delete it, or name another folder with --out"
    if gone := [entry["source"] for name, entry in known.items() if name not in parts]:
        raise ValueError(f"{out} holds slices of volumes that are not found any more: {listing(gone)}; {advice}")
    if moved := {entry["patient"] for name, entry in known.items() if entry["part"] != parts[name]}:
        raise ValueError(
            f"with the volumes there are now, patients change between train and val: {listing(moved)}; {out} was "
            f"written with others: {advice}"
        )


def files_there(out: Path) -> dict[str, list[Path]]:
    """By name of the volume, its pictures in `out`, unfinished ones too."""
    there = defaultdict(list)
    for folder in [out / part / CLASS for part in PARTS]:
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if found := re.fullmatch(r"\.?(.+)_\d+\.png(\.\d+\.tmp)?", entry.name):
                there[found[1]].append(Path(entry.path))
    return there


def is_done(entry: dict[str, Any], volume: Volume, there: Sequence[Path]) -> bool:
    """Whether the pictures of an entry are all there, and its files those they were made from."""
    num_whole = sum(path.suffix == ".png" for path in there)
    return num_whole == len(there) == entry["slices"] and entry["state"] == state_of(volume)


def state_of(volume: Volume) -> list[int]:
    """Number, bytes and newest time of a volume's files; nothing where one is gone."""
    try:
        states = [file.stat() for file in volume.files]
    except OSError:
        return []
    return [len(states), sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)]


def do_all(
    jobs: Sequence[tuple[Volume, Path, str, PictureSettings]],
    record: dict[str, Any],
    out: Path,
    num_workers: int,
    progress: bool,
) -> None:
    """Slice volumes and enter each into the record, which is written every few seconds."""
    written = time.monotonic()
    with tqdm(total=len(jobs), desc="slices", unit="volume", disable=not progress) as bar:
        for sliced in as_done(slice_volume, jobs, num_workers):
            if sliced.entry:
                record["volumes"][sliced.volume.name] = sliced.entry
            else:
                where = record["failed" if sliced.error else "skipped"]
                where.append({"source": str(sliced.volume.source), "why": sliced.error or sliced.unfit})
            bar.update()
            if time.monotonic() > written + WRITE_EVERY:
                with writing(out):
                    write_json(out / RECORD, record)
                written = time.monotonic()


def slice_volume(volume: Volume, out: Path, part: str, settings: PictureSettings) -> Sliced:
    """Write the pictures of one volume; raises OSError where they cannot be written, which is no fault of its own."""
    state = state_of(volume)
    try:
        voxels, affine = read_volume(volume)
    except UNPREPARABLE as error:
        return Sliced(volume, error=reason(error))
    if why := why_skewed(affine, settings.axis) or why_uneven_planes(volume, settings.axis):
        return Sliced(volume, unfit=f"{why}; --axis axial may do")
    num_slices = num_blank = 0
    for number, picture in pictures(voxels, affine, settings):
        if picture is None:
            num_blank += 1
            continue
        with writing(out):
            write_whole(out / part / CLASS / f"{volume.name}_{number:04d}.png", png(picture))
        num_slices += 1
    entry = {
        "source": str(volume.source),
        "patient": volume.patient,
        "part": part,
        "slices": num_slices,
        "blank": num_blank,
        "notes": list(volume.series.notes) if volume.series else [],
        "state": state,
    }
    return Sliced(volume, entry)


def why_uneven_planes(volume: Volume, axis: Axis) -> str:
    """Why planes across the slices of a series would be distorted; nothing if they are not, or are those slices."""
    if volume.series is None or io_orientation(volume.series.affine)[2, 0] == axes_of(axis)[0]:
        return ""
    return volume.series.uneven


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (rows, columns), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Says of an OSError within that it is about `out`."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write slices to {out} ({error.strerror or error}); make room, or name another folder with --out"
        ) from error


def summary(record: dict[str, Any]) -> str:
    """The record for the terminal, in a few lines."""
    volumes = record["volumes"].values()
    lines = []
    for part in PARTS:
        here = [entry for entry in volumes if entry["part"] == part]
        patients = {entry["patient"] for entry in here}
        num_slices = sum(entry["slices"] for entry in here)
        lines.append(f"{part}: {num_slices} slices of {len(here)} volumes, {len(patients)} patients")
    if record["settings"]["val_fraction"] and volumes and all(entry["part"] == "train" for entry in volumes):
        lines[-1] += "; nothing is held out"
    if num_blank := sum(entry["blank"] for entry in volumes):
        lines.append(f"left out: {num_blank} blank slices")
    if others := record["files_of_other_kinds"]:
        lines.append("files of other kinds: " + ", ".join(f"{number} {kind}" for kind, number in others.items()))
    notes = [f"{entry['source']}: {note}" for entry in volumes for note in entry["notes"]]
    skipped = [f"{entry['source']}: {entry['why']}" for entry in record["skipped"]]
    for title, items in (("skipped", skipped), ("to look at", notes)):
        if items:
            more = [f"and {len(items) - MAX_LISTED} more, in {RECORD}"] if len(items) > MAX_LISTED else []
            lines.append("\n  ".join([f"{title}:", *items[:MAX_LISTED], *more]))
    return "\n".join(lines)
