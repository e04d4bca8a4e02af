"""The result of an import: its cases, the lines of the record and of the private table, texts for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hyspark.data.importing.choice import Choice
from hyspark.data.importing.convert import Converted
from hyspark.data.importing.lines import (
    EXCLUDED,
    FAILED,
    IMPORTED,
    SeriesEntry,
    entry_of,
    header_of,
    private_row,
)
from hyspark.data.importing.pseudonyms import Pseudonyms
from hyspark.data.readers.volumes import Found, NotUsed, Volume, volume_state
from hyspark.utils.private_text import shown, without_private


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

    def add_unused(self, excluded: Sequence[tuple[Volume, str]], choice: Choice) -> None:
        """Add the excluded volumes, and what is no volume; faults of another modality are no failures."""
        for volume, why in excluded:
            self.add(volume, EXCLUDED, why)
        for one in self.result.found.skipped:
            self.add(one, EXCLUDED, one.marked_reason)
        for one in self.result.found.damaged:
            header = header_of(one)
            is_other = header and choice.modality and header.modality != choice.modality
            self.add(one, EXCLUDED if is_other else FAILED, one.marked_reason)


def state_of(volume: Volume, pseudonyms: Pseudonyms) -> str:
    """Return digits that change with the files of a volume; times of files are no part of the record."""
    return pseudonyms.of("state", str(volume_state(volume)))
