"""Scans of any format -> imagesTr of a data set in nnU-Net layout, without the names of patients.

The same command continues: a series whose files are unchanged, and whose image is whole, is not read again.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from hyspark.data.importing.choice import Choice
from hyspark.data.importing.choose import channel_name, choose_volumes, modality_of
from hyspark.data.importing.convert import IMAGES, convert_volume, image_file, killed_conversion, naming_folder
from hyspark.data.importing.imported import Imported, Record, state_of
from hyspark.data.importing.lines import EXCLUDED, FAILED, IMPORTED, SeriesEntry, case_name, header_of
from hyspark.data.importing.pseudonyms import read_pseudonyms
from hyspark.data.importing.record import (
    SERIES_FILE,
    append_line,
    check_found,
    check_outside,
    check_private_table,
    count_others,
    known_labels,
    read_import,
    write_dataset_json,
    write_lines,
    write_private_table,
    write_settings,
)
from hyspark.data.readers.dicom import MODALITIES
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import Volume
from hyspark.utils.processes import available_cores, map_unordered

MAX_REASONS = 20
"""Number of series that an error names."""
UNKNOWN = "unknown"
"""Name of the channel of images whose modality nothing states."""


def import_volumes(
    sources: Sequence[Path],
    out: Path,
    choice: Choice,
    *,
    salt_file: Path,
    slice_spacing: tuple[float, float, float] | None = None,
    keep_descriptions: bool = False,
    private_table: Path | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Imported:
    """Write imagesTr, dataset.json, import.json and import.jsonl.

    An unreadable series is listed and does not stop the others.

    Args:
        sources: files and folders.
        out: folder of the data set, new or of an earlier import.
        choice: which scans are imported.
        salt_file: file of the salt of pseudonyms, made if missing.
        slice_spacing: mm between columns, rows and slices of pictures; None if unknown.
        keep_descriptions: whether the record has SeriesDescription, which may hold a name.
        private_table: table of pseudonyms with ids to write; None writes none.
        num_workers: volumes at a time; 0 takes one per core.
        progress: whether to show progress bars.

    Raises:
        FileNotFoundError: if a source does not exist, or there is no volume.
        OSError: if `out` is not writable.
        ValueError: if sources hold several modalities, or `out` was written with other settings or from other sources.
    """
    sources, out = [Path(os.path.abspath(source)) for source in sources], Path(os.path.abspath(out))
    if os.path.realpath(out) in map(os.path.realpath, sources):
        raise ValueError(f"--out {out}: expected a folder of its own, got a source")
    check_outside(out, salt_file, "--salt_file")
    if private_table is not None:
        check_private_table(out, private_table)
    num_workers = num_workers or available_cores()
    found = find_volumes(
        sources,
        min_slices=choice.min_slices,
        skip=out,
        modalities=MODALITIES,
        other_formats=True,
        slice_spacing=slice_spacing,
        num_workers=num_workers,
        progress=progress,
    )
    choice = replace(choice, modality=modality_of(found.volumes, choice.modality))
    chosen = asdict(choice) | {"slice_spacing": slice_spacing and list(slice_spacing)}
    chosen["keep_descriptions"] = keep_descriptions
    pseudonyms = read_pseudonyms(salt_file)
    known = read_import(out, chosen, pseudonyms.fingerprint)
    volumes, excluded = choose_volumes(found.volumes, choice)
    check_found(out, known, [case_name(volume, pseudonyms) for volume in volumes])

    result = Imported(out, found, choice.modality)
    record = Record(result, pseudonyms, keep_descriptions)
    record.add_unused(excluded, choice)
    if not volumes:
        raise FileNotFoundError(why_nothing(sources, result))
    with naming_folder(out):
        write_settings(out, chosen, pseudonyms.fingerprint)
        remove_unfinished(out)
    convert_missing(volumes, known, record, choice, num_workers, progress)
    headers = [header for case in result.cases if (header := header_of(case.volume))]
    result.channel = channel_name(headers, choice.modality) or channel_by_values(result.entries)
    with naming_folder(out):
        write_lines(out / SERIES_FILE, result.entries)
        if result.cases:
            write_dataset_json(out, result.channel, len(result.cases), known_labels(out))
        counts = {status: sum(e["status"] == status for e in result.entries) for status in (IMPORTED, EXCLUDED, FAILED)}
        others = count_others(found.others)
        write_settings(out, chosen, pseudonyms.fingerprint, series=counts, files_of_other_kinds=others)
    if private_table is not None:
        write_private_table(private_table, result.rows)
    return result


def why_nothing(sources: Sequence[Path], result: Imported) -> str:
    """Explain, a line for each series, why no volume is imported."""
    why = [f"{source}: {reason}" for source, reason in [*result.failed, *result.excluded]]
    more = [f"and {len(why) - MAX_REASONS} more"] if len(why) > MAX_REASONS else []
    return "\n  ".join([f"{', '.join(map(str, sources))}: no volume to import", *why[:MAX_REASONS], *more])


def convert_missing(
    volumes: Sequence[Volume],
    known: Mapping[str, SeriesEntry],
    record: Record,
    choice: Choice,
    num_workers: int,
    progress: bool,
) -> None:
    """Convert the volumes that are not imported yet, and add all to the record, line by line."""
    out, todo = record.result.out, []
    for volume in volumes:
        name = case_name(volume, record.pseudonyms)
        if is_imported(out, known.get(name), state_of(volume, record.pseudonyms)):
            record.take(volume, known[name])
        else:
            todo.append((volume, name, out, choice))
    with naming_folder(out):
        write_lines(out / SERIES_FILE, record.result.entries)
    by_name = {name: volume for volume, name, *_ in todo}
    with tqdm(total=len(todo), desc="import", unit="scan", disable=not progress) as bar:
        for converted in map_unordered(convert_volume, todo, num_workers, killed_conversion):
            entry = record.add_converted(by_name[converted.name], converted, known.get(converted.name))
            with naming_folder(out):
                append_line(out / SERIES_FILE, entry)
            bar.update()
    record.result.cases.sort(key=lambda case: case.name)


def is_imported(out: Path, entry: SeriesEntry | None, state: str) -> bool:
    """Return whether a case is imported from the present files, and its image is whole."""
    if entry is None or entry["state"] != state:
        return False
    file = out / image_file(entry["case"])
    return file.is_file() and file.stat().st_size == entry["bytes"]


def remove_unfinished(out: Path) -> None:
    """Remove images that a killed import left unfinished."""
    for file in (out / IMAGES).glob(".*.tmp"):
        if re.fullmatch(r"\.sub-[0-9a-f]+_[0-9a-f]+_0000\.nii\.gz\.\d+\.tmp", file.name):
            file.unlink()


def channel_by_values(entries: Sequence[SeriesEntry]) -> str:
    """Return the name of a channel whose files state no modality: CT if most hold HU."""
    imported = [entry for entry in entries if entry["status"] == IMPORTED]
    return "CT" if 2 * sum(entry["is_hu"] for entry in imported) > len(imported) else UNKNOWN
