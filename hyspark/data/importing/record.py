"""The record of an import: import.json with settings and counts, import.jsonl with a line for each series.

Neither names a patient: ids are pseudonyms, and texts lack their private parts. The table that names them is another
file, which is written on request alone.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from hyspark.data.datasets.file_names import SETTINGS_FILE
from hyspark.data.importing.convert import naming_folder
from hyspark.data.importing.lines import EXCLUDED, FAILED, IMPORTED, PRIVATE_COLUMNS, SeriesEntry
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.file_content import ARCHIVE
from hyspark.utils.locks import LOCK_FILE, lock_folder
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing

SERIES_FILE = "import.jsonl"
LABEL_FOLDER = "labelsTr"
ANOTHER_FOLDER = "choose another folder with --out, or delete it"
KNOWN_KINDS = frozenset(
    ("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "SEG", "RTSTRUCT", "RTPLAN", "RTDOSE")
    + ("RTIMAGE", "REG", "SR", "PR", "KO", "DOC", "DICOMDIR", "no image", "no modality", "another channel", ARCHIVE)
)
"""Kinds of files that the record names; others may be any text of a header."""


def read_import(out: Path, chosen: Mapping[str, Any], salt: str) -> dict[str, SeriesEntry]:
    """Read the imported cases of a folder, by name.

    Args:
        out: folder of the data set.
        chosen: settings of this import.
        salt: fingerprint of the salt.

    Raises:
        ValueError: if the folder holds anything else, or was imported with other settings or another salt.
    """
    file = out / SETTINGS_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, got a file; choose another folder with --out")
    if not file.exists():
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(f"{out}: expected a new folder or one of an earlier import, found files; {ANOTHER_FOLDER}")
        return {}
    record = load_json(file)
    if not isinstance(record, dict) or not {"settings", "salt"} <= record.keys():
        raise ValueError(f"{file}: expected the record of an import, got another JSON; {ANOTHER_FOLDER}")
    before = record["settings"]
    different = [
        f"{name} {before.get(name)!r}, now {chosen.get(name)!r}"
        for name in [*chosen, *(before.keys() - chosen.keys())]
        if before.get(name) != chosen.get(name)
        and not (name == "slice_spacing" and before.get(name) is None)  # no picture was imported without it
    ]
    if different:
        raise ValueError(f"{out} was imported with other settings: {'; '.join(different)}; {ANOTHER_FOLDER}")
    if record["salt"] != salt:
        raise ValueError(
            f"{out} was imported with another salt, so that its names would change; give its file by --salt_file, or "
            f"{ANOTHER_FOLDER}"
        )
    return {entry["case"]: entry for entry in read_lines(out / SERIES_FILE) if entry.get("status") == IMPORTED}


@contextmanager
def hold_data_set(out: Path) -> Iterator[None]:
    """Keep other imports from writing to a data set; a folder in which nothing was written is removed again.

    Raises:
        OSError: if the folder is not writable.
        ValueError: if another import writes to it.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: expected a folder, got a file; {ANOTHER_FOLDER}")
    is_new = not out.exists()
    with ExitStack() as held:
        with naming_folder(out):
            held.enter_context(lock_folder(out, "data set"))
        try:
            yield
        finally:
            with suppress(OSError):
                (out / LOCK_FILE).unlink()
                if is_new:
                    out.rmdir()


def read_lines(path: Path) -> list[SeriesEntry]:
    """Read the lines of import.jsonl; a last line that a kill cut short is none."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def check_found(out: Path, known: Mapping[str, SeriesEntry], names: Sequence[str]) -> None:
    """Raise ValueError if cases that were imported before are not chosen from the present sources."""
    if gone := known.keys() - set(names):
        raise ValueError(
            f"{out} holds {len(gone)} cases whose series are not found any more, or for which another scan of the "
            f"study is chosen now: {listing(gone, 3)}; give all sources of before, {ANOTHER_FOLDER}"
        )


def append_line(path: Path, entry: SeriesEntry) -> None:
    """Add a line to import.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_lines(path: Path, entries: Sequence[SeriesEntry]) -> None:
    """Write import.jsonl, imported series first, atomically."""
    order = (IMPORTED, FAILED, EXCLUDED)
    ranked = sorted(entries, key=lambda entry: (order.index(entry["status"]), json.dumps(entry)))
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in ranked).encode())


def write_settings(out: Path, chosen: Mapping[str, Any], salt: str, **known: Any) -> None:
    """Write import.json."""
    write_json(out / SETTINGS_FILE, {"settings": dict(chosen), "salt": salt, **known})


def write_dataset_json(out: Path, channel: str, num: int, labels: Mapping[str, int] | None = None) -> None:
    """Write nnU-Net's dataset.json.

    Args:
        out: folder of the data set.
        channel: name of the channel.
        num: number of cases.
        labels: label values by class name; the background alone without any.
    """
    content = {
        "channel_names": {"0": channel},
        "labels": dict(labels or {"background": 0}),
        "numTraining": num,
        "file_ending": ".nii.gz",
    }
    write_json(out / "dataset.json", content)


def known_labels(out: Path) -> dict[str, int] | None:
    """Return the classes of the label maps that an import of before wrote; None if it wrote none."""
    file = out / "dataset.json"
    content = load_json(file) if file.is_file() and (out / LABEL_FOLDER).is_dir() else {}
    return content.get("labels") if isinstance(content, dict) else None


def count_others(others: Mapping[str, int]) -> dict[str, int]:
    """Count files of other kinds; kinds that the record must not name are one."""
    counts: Counter[str] = Counter()
    for kind, num in others.items():
        counts[kind if kind in KNOWN_KINDS or kind.startswith((".", "pictures")) else "other"] += num
    return dict(sorted(counts.items()))


def write_private_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the table of pseudonyms with whom they stand for, readable by its owner alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, PRIVATE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(unfinished, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"--private_table {path}: not writable ({error.strerror or error}); name another file") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def check_private_table(out: Path, path: Path) -> None:
    """Raise ValueError unless the private table may be written: outside of the data set, over no other file."""
    check_outside(out, path, "--private_table")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--private_table {path}: not writable ({error.strerror or error}); name another file") from error
    first = path.read_bytes()[:200].split(b"\n")[0] if path.exists() else b""
    if first and first != ",".join(PRIVATE_COLUMNS).encode():
        raise ValueError(f"--private_table {path}: expected a new file or a table of before, got another file")


def check_outside(out: Path, file: Path, flag: str) -> None:
    """Raise ValueError if a private file would lie in the data set."""
    real = Path(os.path.realpath(file))
    if Path(os.path.realpath(out)) in (real, *real.parents):
        raise ValueError(f"{flag} {file}: expected a file outside of the data set {out}, which may be passed on")
    if file.is_dir():
        raise ValueError(f"{flag} {file}: expected a file, got a folder")
