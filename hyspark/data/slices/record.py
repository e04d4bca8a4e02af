"""The record of written slices, slices.json: what it allows to continue, and what it says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark.utils.paths import load_json
from hyspark.utils.text import MAX_LISTED, listing

RECORD = "slices.json"
SLICE_SPLITS = ("train", "val")
KEEP_PATIENT_ID = "keep_patient_id"


def read_record(out: Path, chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the volumes that slices.json lists; raise ValueError if it was written with other settings."""
    path = out / RECORD
    if not path.exists():
        if any((out / split).exists() for split in SLICE_SPLITS):
            raise ValueError(
                f"{out} holds {' or '.join(SLICE_SPLITS)} and no {RECORD}; choose another folder with --out"
            )
        return {}
    record = load_json(path)
    if not isinstance(record, dict) or not {"settings", "volumes"} <= record.keys():
        raise ValueError(f"{path}: expected a record of slices, got another JSON; choose another folder with --out")
    before = record["settings"]
    different = [
        f"{name} {before.get(name)}, now {chosen.get(name)}"
        for name in [*chosen, *(before.keys() - chosen.keys())]
        if name != KEEP_PATIENT_ID or name in before  # records of earlier versions have none
        if before.get(name) != chosen.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} was written with other settings: {'; '.join(different)}; choose another folder with --out"
        )
    volumes: dict[str, dict[str, Any]] = record["volumes"]
    return volumes


def check_unmoved(out: Path, known: dict[str, dict[str, Any]], splits: Mapping[str, str]) -> None:
    """Raise ValueError if written volumes are no longer found, or belong to the other split."""
    advice = "delete it, or choose another folder with --out"
    if gone := [entry["source"] for name, entry in known.items() if name not in splits]:
        raise ValueError(
            f"{out} holds slices of volumes that are not found any more: {listing(gone)}; {advice}; if it was written "
            f"from DICOM by a version that showed patients in names, add --{KEEP_PATIENT_ID} to continue it"
        )
    if moved := {entry["patient"] for name, entry in known.items() if entry["part"] != splits[name]}:
        raise ValueError(
            f"{out} was written from other volumes; with the present ones, patients change between train and val: "
            f"{listing(moved)}; {advice}"
        )


def summarise_slices(record: dict[str, Any]) -> str:
    """Summarise a record for the terminal in a few lines."""
    volumes = record["volumes"].values()
    lines = []
    for split in SLICE_SPLITS:
        entries = [entry for entry in volumes if entry["part"] == split]
        patients = {entry["patient"] for entry in entries}
        num_slices = sum(entry["slices"] for entry in entries)
        lines.append(f"{split}: {num_slices} slices of {len(entries)} volumes, {len(patients)} patients")
    if record["settings"]["val_fraction"] and volumes and all(entry["part"] == "train" for entry in volumes):
        lines[-1] += "; no patient is held out"
    if num_blank := sum(entry["blank"] for entry in volumes):
        lines.append(f"excluded: {num_blank} blank slices")
    chosen = record["settings"]
    if (
        chosen["scaling"] == "minmax"
        and chosen["hu_min"] is None
        and (padded := [e for e in volumes if e.get("padded")])
    ):
        lines.append(
            f"{len(padded)} volumes reach far below air (padding), as slices do; --hu_min -1024 clips them first"
        )
    if others := record["files_of_other_kinds"]:
        examples = {other["kind"]: other["file"] for other in reversed(record["other_files"])}
        kinds = [f"{number} {kind} (e.g. {examples[kind]})" for kind, number in others.items()]
        lines.append("files of other kinds: " + ", ".join(kinds))
    notes = [f"{entry['source']}: {note}" for entry in volumes for note in entry["notes"]]
    skipped = [f"{entry['source']}: {entry['why']}" for entry in record["skipped"]]
    for title, items in (("skipped", skipped), ("warnings", notes)):
        if items:
            more = [f"and {len(items) - MAX_LISTED} more, in {RECORD}"] if len(items) > MAX_LISTED else []
            lines.append("\n  ".join([f"{title}:", *items[:MAX_LISTED], *more]))
    return "\n".join(lines)
