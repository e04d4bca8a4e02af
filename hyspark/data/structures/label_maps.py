"""Structures of all files that belong to a series -> one label map on its grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hyspark.data.readers.series import Series
from hyspark.data.structures.class_names import ClassNames
from hyspark.data.structures.contours import contour_masks
from hyspark.data.structures.objects import LabelObject
from hyspark.data.structures.planes import SlicePlanes, slice_planes
from hyspark.data.structures.segments import segment_masks
from hyspark.utils.private_text import private
from hyspark.utils.text import count_of, first_line

MASK_READERS = {"RTSTRUCT": contour_masks, "SEG": segment_masks}


@dataclass
class SeriesLabels:
    """The label map of a series. Private parts of the texts are marked.

    Attributes:
        labels: label map `(columns, rows, slices)`, uint8.
        voxels: number of voxels of each class that a structure exists for, which may be 0.
        overlaps: number of voxels that a class lost to a later one.
        notes: irregularities.
        faults: structures and files that are unreadable, each with the reason.
    """

    labels: np.ndarray
    voxels: dict[str, int] = field(default_factory=dict)
    overlaps: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def label_series(series: Series, objects: Sequence[LabelObject], classes: ClassNames) -> SeriesLabels:
    """Make the label map of a series.

    Structures of one class in a file are united. Where several files hold a class, the newest file counts. Where
    classes overlap, the later class of the list of classes counts.

    Args:
        series: the series.
        objects: the files of structures that belong to it.
        classes: the classes, and the names of their structures.
    """
    grid = slice_planes(series)
    made = SeriesLabels(np.zeros(grid.shape, np.uint8))
    masks: dict[str, np.ndarray] = {}
    for one in sorted(objects, key=lambda one: (one.made, one.path)):
        found = masks_of_object(one, grid, classes, made)
        for title in found.keys() & masks.keys():
            made.notes.append(f"{title} in several files; the newest counts")
        masks |= found
    titles = {value: title for title, value in classes.values.items()}
    flat = made.labels.reshape(-1)
    for title in [title for title in classes.values if title in masks]:
        lost = np.bincount(flat[masks[title]], minlength=1)
        for value in np.flatnonzero(lost[1:]) + 1:
            other = titles[int(value)]
            made.overlaps[other] = made.overlaps.get(other, 0) + int(lost[value])
        flat[masks[title]] = classes.values[title]
    counts = np.bincount(flat, minlength=max(titles) + 1)
    made.voxels = {title: int(counts[value]) for title, value in classes.values.items() if title in masks}
    return made


def masks_of_object(
    one: LabelObject, grid: SlicePlanes, classes: ClassNames, made: SeriesLabels
) -> dict[str, np.ndarray]:
    """Return the voxels of a file's structures by class, as ascending flat indices; adds notes and faults."""
    names: Mapping[int, str] = dict(one.structures)
    masks: dict[str, np.ndarray] = {}
    file = private(one.path.name)
    try:
        for number, mask, notes in MASK_READERS[one.kind](one.path, grid):
            name = names.get(number, "")
            title = classes.class_of(name) if name else ""
            if not title:
                continue
            if isinstance(mask, str):
                made.faults.append(f"{file}: {title} ({private(name)}): {mask}")
                continue
            made.notes += [f"{title}: {note}" for note in notes]
            voxels = np.flatnonzero(mask)  # masks of a hundred classes would take gigabytes
            masks[title] = np.union1d(masks[title], voxels) if title in masks else voxels
    except Exception as error:  # a damaged file may raise anything
        made.faults.append(f"{file}: unreadable as {one.kind} ({private(first_line(error))})")
    return masks


def overlap_note(overlaps: Mapping[str, int]) -> str:
    """Describe the voxels that classes lost to later ones; empty without any."""
    lost = ", ".join(f"{title} {count_of(num, 'voxel')}" for title, num in overlaps.items())
    return f"classes overlap, and the later one counts: {lost} lost" if lost else ""
