"""Scans of any format -> imagesTr of a data set in nnU-Net layout, without the names of patients.

The same command continues: a series whose files are unchanged, and whose image is whole, is not read again.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from hyspark.data.importing.choice import Choice
from hyspark.data.importing.choose import channel_name, choose_volumes, modality_of
from hyspark.data.importing.convert import (
    IMAGES,
    Converted,
    convert_volume,
    image_file,
    killed_conversion,
    naming_folder,
)
from hyspark.data.importing.lines import (
    EXCLUDED,
    FAILED,
    IMPORTED,
    SeriesEntry,
    case_name,
    entry_of,
    header_of,
    private_row,
)
from hyspark.data.importing.pseudonyms import Pseudonyms, read_pseudonyms
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
from hyspark.data.readers.volumes import Found, NotUsed, Volume, volume_state
from hyspark.utils.private_text import shown, without_private
from hyspark.utils.processes import available_cores, map_unordered

MAX_REASONS = 20
"""Number of series that an error names."""
UNKNOWN = "unknown"
"""Name of the channel of images whose modality nothing states."""


@dataclass(frozen=True)
class ImportedCase:
    """A case of the data set.

    Attributes:
        name: name of the case.
        volume: its scan, with the DICOM series.
        file: its image.
        entry: its line of the record.
    """

    name: str
    volume: Volume
    file: Path
    entry: SeriesEntry


@dataclass
class Imported:
    """The result of an import. Texts are for the terminal.

    Attributes:
        out: folder of the data set.
        found: what the search found.
        modality: its modality; empty if no file states any.
        channel: name of its channel.
        cases: the imported cases, by name.
        entries: lines of the record.
        rows: lines of the private table.
        failed: unreadable files and series, each with the reason.
        excluded: excluded series, each with the reason.
        notes: irregularities of imported series, each with its source.
    """

    out: Path
    found: Found
    modality: str = ""
    channel: str = ""
    cases: list[ImportedCase] = field(default_factory=list)
    entries: list[SeriesEntry] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


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
    for volume, why in excluded:
        record.add(volume, EXCLUDED, why)
    for one in found.skipped:
        record.add(one, EXCLUDED, one.marked_reason)
    for one in found.damaged:
        header = header_of(one)
        is_other = header and choice.modality and header.modality != choice.modality
        record.add(one, EXCLUDED if is_other else FAILED, one.marked_reason)
    if not volumes:
        why_none = [f"{source}: {why}" for source, why in [*result.failed, *result.excluded]]
        more = [f"and {len(why_none) - MAX_REASONS} more"] if len(why_none) > MAX_REASONS else []
        title = f"{', '.join(map(str, sources))}: no volume to import"
        raise FileNotFoundError("\n  ".join([title, *why_none[:MAX_REASONS], *more]))
    with naming_folder(out):
        write_settings(out, chosen, pseudonyms.fingerprint)
        remove_unfinished(out)
    todo = []
    for volume in volumes:
        name, state = case_name(volume, pseudonyms), state_of(volume, pseudonyms)
        if is_imported(out, known.get(name), state):
            record.take(volume, known[name])
        else:
            todo.append((volume, name, out, choice))
    with naming_folder(out):
        write_lines(out / SERIES_FILE, result.entries)
    with tqdm(total=len(todo), desc="import", unit="scan", disable=not progress) as bar:
        by_name = {name: volume for volume, name, *_ in todo}
        for converted in map_unordered(convert_volume, todo, num_workers, killed_conversion):
            entry = record.add_converted(by_name[converted.name], converted, known.get(converted.name))
            with naming_folder(out):
                append_line(out / SERIES_FILE, entry)
            bar.update()
    result.cases.sort(key=lambda case: case.name)
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


class Record:
    """Adds what was found to the result of an import, in its three forms: record, private table, terminal."""

    def __init__(self, result: Imported, pseudonyms: Pseudonyms, keep_descriptions: bool) -> None:
        self.result = result
        self.pseudonyms = pseudonyms
        self.keep_descriptions = keep_descriptions

    def add(self, one: Volume | NotUsed, status: str, why: str = "") -> SeriesEntry:
        """Add a series, and why it is not imported, with private parts marked; return its line of the record."""
        entry = entry_of(one, status, self.pseudonyms, why=why, keep_descriptions=self.keep_descriptions)
        self.result.entries.append(entry)
        self.result.rows.append(private_row(one, entry))
        if status != IMPORTED:
            listed = self.result.failed if status == FAILED else self.result.excluded
            listed.append((str(one.source), shown(why)))
        return entry

    def add_converted(self, volume: Volume, converted: Converted, before: SeriesEntry | None) -> SeriesEntry:
        """Add the result of a conversion; return its line of the record.

        Of a series that was imported before and is unreadable now, the image of before is kept.
        """
        why = converted.error or converted.unfit
        if converted.error and before and (self.result.out / before["file"]).is_file():
            self.result.failed.append((str(volume.source), f"{shown(why)}; its image of before is kept"))
            self.take(volume, before)
            return before
        if why:
            return self.add(volume, FAILED if converted.error else EXCLUDED, why)
        entry = self.add(volume, IMPORTED)
        entry |= converted.known | {"state": state_of(volume, self.pseudonyms)}
        entry["notes"] = [without_private(note) for note in converted.notes]
        self.result.cases.append(ImportedCase(converted.name, volume, self.result.out / entry["file"], entry))
        self.result.notes += [(str(volume.source), shown(note)) for note in converted.notes]
        return entry

    def take(self, volume: Volume, entry: SeriesEntry) -> None:
        """Take over the line of a case that is imported already."""
        self.result.entries.append(entry)
        self.result.rows.append(private_row(volume, entry))
        self.result.cases.append(ImportedCase(entry["case"], volume, self.result.out / entry["file"], entry))
        self.result.notes += [(str(volume.source), note) for note in entry["notes"]]


def state_of(volume: Volume, pseudonyms: Pseudonyms) -> str:
    """Return digits that change with the files of a volume; times of files are no part of the record."""
    return pseudonyms.of("state", str(volume_state(volume)))


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
