"""RTSTRUCT and DICOM-SEG of the sources of an import -> labelsTr of its data set."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from tqdm import tqdm

from hyspark.data.importing.convert import naming_folder
from hyspark.data.importing.imported import Imported, ImportedCase
from hyspark.data.importing.nifti_content import nifti_content
from hyspark.data.importing.record import LABEL_FOLDER, SERIES_FILE, write_dataset_json, write_lines
from hyspark.data.readers.header import read_nifti_header
from hyspark.data.structures.class_names import ClassNames, class_names_found
from hyspark.data.structures.label_maps import label_series, overlap_note
from hyspark.data.structures.objects import KINDS, LabelObject, read_label_object, volumes_of_object
from hyspark.utils.atomic import write_whole
from hyspark.utils.private_text import private, shown, without_private
from hyspark.utils.processes import KILLED, available_cores, map_unordered
from hyspark.utils.text import count_of, first_line, listing

TABLE = "labels.csv"
MAX_ROWS = 20
"""Cases that the table on the terminal shows."""


@dataclass
class CaseLabels:
    """The labels of a case. Private parts of the texts are marked.

    Attributes:
        name: the case.
        voxels: number of voxels by class that a structure exists for.
        notes: irregularities.
        faults: structures and files that are unreadable.
        is_written: whether it has a label map.
    """

    name: str
    voxels: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_written: bool = False


@dataclass
class ImportedLabels:
    """The labels of a data set. Texts are for the terminal.

    Attributes:
        classes: the classes.
        cases: labels of each case, in the order of the imported cases.
        unmapped: names of structures without class, with their number of files.
        faults: files and structures that are unreadable, each with the reason.
        unmatched: files that belong to no imported series.
        are_chosen: whether the user named the classes.
    """

    classes: ClassNames
    cases: list[CaseLabels]
    unmapped: dict[str, int]
    faults: list[str]
    unmatched: list[str]
    are_chosen: bool


def import_labels(imported: Imported, classes: ClassNames | None, *, num_workers: int = 0) -> ImportedLabels:
    """Write labelsTr, labels.csv and the classes of dataset.json for the cases of an import.

    Args:
        imported: the import.
        classes: classes with synonyms; None makes a class of each name.
        num_workers: cases at a time; 0 takes one per core.

    Raises:
        FileNotFoundError: the sources hold no structures.
        OSError: the data set is not writable.
        ValueError: there are more names than values of a label map.
    """
    files = [path for kind in KINDS for path in imported.found.other_files.get(kind, ())]
    faults, objects = [], []
    for path in files:
        try:
            objects.append(read_label_object(path))
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if not files:
        raise FileNotFoundError(
            f"--labels: expected RTSTRUCT or SEG files in the sources, found none; {imported.out} holds images alone"
        )
    all_names = [name for one in objects for name in dict.fromkeys(name for _, name in one.structures)]
    are_chosen = classes is not None
    classes = classes or class_names_found(all_names)
    unmapped = {name: all_names.count(name) for name in sorted(set(all_names)) if not classes.class_of(name)}
    by_case, notes, unmatched = match_cases(imported.cases, objects)
    jobs = [(case, by_case[case.name], classes, imported.out) for case in imported.cases if by_case.get(case.name)]
    done = {case.name: CaseLabels(case.name) for case in imported.cases}
    for made in map_unordered_with_bar(jobs, num_workers or available_cores()):
        made.notes = [*notes.get(made.name, ()), *made.notes]
        done[made.name] = made
    with naming_folder(imported.out):
        remove_others(imported.out, done)
        add_to_record(imported, done, classes)
    found = [done[case.name] for case in imported.cases]
    faults += [f"{made.name}: {shown(fault)}" for made in found for fault in made.faults]
    return ImportedLabels(classes, found, unmapped, faults, unmatched, are_chosen)


def match_cases(
    cases: Sequence[ImportedCase], objects: Sequence[LabelObject]
) -> tuple[dict[str, list[LabelObject]], dict[str, list[str]], list[str]]:
    """Match files of structures and cases.

    Returns:
        The files of each case, notes on them by case, and the files that belong to no case.
    """
    by_volume = {id(case.volume): case.name for case in cases}
    by_case: dict[str, list[LabelObject]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    unmatched = []
    for one in objects:
        volumes, note = volumes_of_object(one, [case.volume for case in cases])
        for volume in volumes:
            name = by_volume[id(volume)]
            by_case[name].append(one)
            if note:
                notes[name].append(f"{private(one.path.name)}: {note}")
        if not volumes:
            unmatched.append(str(one.path))
    return by_case, notes, unmatched


def map_unordered_with_bar(jobs: Sequence[tuple[Any, ...]], num_workers: int) -> Sequence[CaseLabels]:
    """Label cases in processes, with a progress bar."""
    with tqdm(total=len(jobs), desc="labels", unit="case") as bar:
        made = []
        for one in map_unordered(label_case, jobs, num_workers, killed_labels):
            made.append(one)
            bar.update()
    return made


def label_case(case: ImportedCase, objects: Sequence[LabelObject], classes: ClassNames, out: Path) -> CaseLabels:
    """Write the label map of a case; raise OSError if the disk fails, which is no fault of the case."""
    made = CaseLabels(case.name)
    try:
        assert case.volume.series is not None
        found = label_series(case.volume.series, objects, classes)
        made.voxels, made.faults = found.voxels, found.faults
        made.notes = [*found.notes, *filter(None, [overlap_note(found.overlaps)])]
        labels = apply_orientation(found.labels, io_orientation(case.volume.series.affine))
        image = read_nifti_header(case.file)
        if labels.shape != image.shape:
            raise ValueError(f"labels of {labels.shape} voxels, but an image of {image.shape}")
    except Exception as error:  # a damaged file may raise anything
        made.faults.append(f"unreadable ({private(first_line(error))})")
        return made
    if made.voxels:
        with naming_folder(out):
            write_whole(out / LABEL_FOLDER / f"{case.name}.nii.gz", nifti_content(labels, image.affine, np.uint8))
        made.is_written = True
    return made


def killed_labels(case: ImportedCase, objects: Sequence[LabelObject], classes: ClassNames, out: Path) -> CaseLabels:
    """Return the result for a case whose process was killed."""
    return CaseLabels(case.name, faults=[KILLED])


def remove_others(out: Path, done: dict[str, CaseLabels]) -> None:
    """Remove label maps of an earlier import that no structures stand for any more."""
    for name, made in done.items():
        if not made.is_written:
            (out / LABEL_FOLDER / f"{name}.nii.gz").unlink(missing_ok=True)


def add_to_record(imported: Imported, done: dict[str, CaseLabels], classes: ClassNames) -> None:
    """Write the labels into import.jsonl, labels.csv and dataset.json."""
    for case in imported.cases:
        made = done[case.name]
        case.entry["labels"] = {
            "file": f"{LABEL_FOLDER}/{case.name}.nii.gz" if made.is_written else "",
            "voxels": made.voxels,
            "missing": [title for title in classes.values if title not in made.voxels],
            "notes": [without_private(note) for note in made.notes],
            "faults": [without_private(fault) for fault in made.faults],
        }
    write_lines(imported.out / SERIES_FILE, imported.entries)
    write_dataset_json(imported.out, imported.channel, len(imported.cases), {"background": 0, **classes.values})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *classes.values])
    for name, made in done.items():
        writer.writerow([name, *(made.voxels.get(title, "") for title in classes.values)])
    write_whole(imported.out / TABLE, text.getvalue().encode())


def summarise_labels(labels: ImportedLabels, out: Path) -> str:
    """Summarise the labels of an import: what is missing in which case, and what was not used."""
    written = [made for made in labels.cases if made.is_written]
    lines = [
        f"labels: {len(written)} of {count_of(len(labels.cases), 'scan')}; classes: "
        + ", ".join(f"{value} {title}" for title, value in labels.classes.values.items())
    ]
    rows = [made for made in labels.cases if set(made.voxels) < set(labels.classes.values)]
    for made in rows[:MAX_ROWS]:
        missing = [title for title in labels.classes.values if title not in made.voxels]
        lines.append(f"  {made.name}: " + (f"without {', '.join(missing)}" if made.is_written else "no label map"))
    if len(rows) > MAX_ROWS:
        lines.append(f"  and {len(rows) - MAX_ROWS} more, see {os.fspath(out / TABLE)}")
    for made in labels.cases:
        lines += [f"  {made.name}: {shown(note)}" for note in dict.fromkeys(made.notes)]
    if labels.unmapped:
        names = [f"{name!r} ({num})" for name, num in labels.unmapped.items()]
        lines.append(f"structures without class, add their names to --label_names: {listing(names, MAX_ROWS)}")
    if labels.unmatched:
        num = count_of(len(labels.unmatched), "file")
        lines.append(f"{num} of structures of no imported series: {listing(labels.unmatched, 5)}")
    if not labels.are_chosen:
        lines.append(
            "classes are the names of structures, in which people write: look at them before you pass the data set on"
        )
    lines.append(f"voxels by case and class: {os.fspath(out / TABLE)}")
    return "\n".join(lines)
