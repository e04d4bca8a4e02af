"""DICOM headers of one series -> volumes: order, geometry, what is excluded and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hyspark.data.readers.elements import Header
from hyspark.data.readers.hounsfield import Slice, pixels_digest
from hyspark.data.readers.scans import SeriesPart, separate
from hyspark.data.readers.stacks import (
    affine_of,
    by_plane,
    describe_planes,
    has_plane,
    num_repeats,
    ordered,
    position_indices,
    why_tilted,
    why_uneven,
)
from hyspark.utils.private_text import private, shown
from hyspark.utils.text import listing

PET_UNITS = {
    "BQML": "Bq/ml",
    "CNTS": "counts",
    "CPS": "counts per second",
    "GML": "SUV (g/ml)",
    "PROPCPS": "a number proportional to counts per second",
    "PROPCNTS": "a number proportional to counts",
}
"""Values of Units, in words."""


@dataclass(frozen=True)
class Series:
    """Slices that make one volume.

    Attributes:
        label: what distinguishes this scan from others of the series; empty if there is no other.
        slices: the slices, in order.
        affine: `(4, 4)`, from (column, row, slice) to mm in RAS.
        uneven: why the slices are no even stack; empty if they are one.
        marked_notes: irregularities, for the summary, with private parts marked.
        header: the header of the first slice.
    """

    label: str
    slices: tuple[Slice, ...]
    affine: np.ndarray
    uneven: str
    marked_notes: tuple[str, ...]
    header: Header

    @property
    def notes(self) -> tuple[str, ...]:
        """The irregularities as the terminal shows them."""
        return tuple(map(shown, self.marked_notes))

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return self.header.series

    @property
    def modality(self) -> str:
        """Modality: CT, MR, PT."""
        return self.header.modality

    @property
    def study(self) -> str:
        """StudyInstanceUID."""
        return self.header.mark("StudyInstanceUID")

    @property
    def frame_of_reference(self) -> str:
        """FrameOfReferenceUID."""
        return self.header.mark("FrameOfReferenceUID")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, each once."""
        return tuple(dict.fromkeys(part.path for part in self.slices))


@dataclass
class Assembled:
    """What the files of a series make. Private parts of the reasons are marked.

    Attributes:
        volumes: the scans.
        skipped: why images are no volume, though no fault is found.
        faults: why images that should be a volume are none.
    """

    volumes: list[Series] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def assemble_series(headers: Sequence[Header], min_slices: int, damaged: Sequence[Path] = ()) -> Assembled:
    """Separate the scans of one series, and put the slices of each in order.

    Copies of a file and localizers are excluded, with a note.

    Args:
        headers: headers of the series' files.
        min_slices: least number of slices of a volume.
        damaged: unreadable files in the same folders, which may belong to the series.
    """
    found = Assembled()
    notes = []
    slices = [header for header in headers if not header.localizer]
    if not slices:
        found.skipped.append(f"localizer ({len(headers)} images)")
        return found
    if len(slices) < len(headers):
        notes.append(f"{len(headers) - len(slices)} localizers are excluded")
    for fault, odd in grouped_faults(slices).items():
        found.skipped.append(f"{fault} ({len(odd)} of {len(slices)}, e.g. {odd[0].name})")
    slices = [header for header in slices if not header.fault]
    if lost := [header for header in slices if not header.is_placed]:
        reason = f"{len(lost)} of {len(slices)} images have no position in the patient, e.g. {lost[0].name}"
        found.skipped.append(reason)
        notes.append(reason)
    slices = [header for header in slices if header.is_placed]
    if bent := [header for header in slices if not has_plane(header)]:
        found.faults.append(
            f"no valid PixelSpacing or ImageOrientationPatient in {len(bent)} of {len(slices)} images, "
            f"e.g. {bent[0].name}; export them again"
        )
    slices = [header for header in slices if has_plane(header)]
    once = {
        (
            header.uid or str(header.path),
            header.position,
            header.plane,
            header.number,
            header.marks,
            header.acquired,
            header.frame,
        ): header
        for header in reversed(slices)
    }
    if len(once) < len(slices):
        notes.append(f"{len(slices) - len(once)} files are copies of other files and are excluded")
    slices = sorted(once.values(), key=lambda header: (header.number or 0, header.path, header.frame or 0))
    if damaged:
        notes.append(
            f"unreadable files in its folder may be slices of it: {private(listing([f.name for f in damaged], 3))}"
        )
    if slices:
        add_scans(slices, min_slices, notes, found)
    return found


def grouped_faults(headers: Sequence[Header]) -> dict[str, list[Header]]:
    """Group the headers of images that are no grey slices by their fault."""
    groups: dict[str, list[Header]] = {}
    for header in headers:
        if header.fault:
            groups.setdefault(header.fault, []).append(header)
    return groups


def add_scans(slices: Sequence[Header], min_slices: int, notes: Sequence[str], found: Assembled) -> None:
    """Add the volumes that slices make, or why they make none."""
    planes = by_plane(slices)
    apart = [describe_planes(planes)] if len(planes) > 1 else []
    scans = [scan for plane in planes for scan in separate_with_copies(plane)]
    long = [scan for scan in scans if len(scan.slices) >= min_slices]
    for number, scan in enumerate(scans, 1):
        label = scan.label
        if apart and len(scans) > 1:
            label = ", ".join(filter(None, [f"stack {number} of {len(scans)}", label]))
        prefix = "; ".join([*apart, *([label] if label else [])])
        if scan.repeats > 1:
            found.faults.append(
                f"{prefix + ': ' if prefix else ''}up to {scan.repeats} slices at one position, and no element of "
                f"their headers separates the scans ({len(scan.slices)} slices, e.g. {scan.slices[0].name}); export "
                "each scan as a series of its own"
            )
        elif len(scan.slices) < min_slices:
            short = f"{len(scan.slices)} slices, fewer than --min_slices {min_slices}"
            found.skipped.append(f"{prefix}: {short}" if prefix else short)
        elif why := why_uncalibrated(scan.slices):
            found.faults.append(f"{prefix}: {why}" if prefix else why)
        else:
            several = [f"{label}: one of {len(scans)} scans in the series"] if label else []
            # The only volume of a series keeps the name of a series without other stacks.
            named = label if len(long) > 1 else ""
            found.volumes.append(as_series(scan, named, [*notes, *apart, *several]))


def separate_with_copies(plane: Sequence[Header]) -> list[SeriesPart]:
    """Separate slices into scans; of slices that nothing but their file separates, exclude those with equal pixels."""
    scans = []
    for scan in separate(plane):
        if scan.repeats > 1:
            kept = without_equal_pixels(scan.slices)
            scan = SeriesPart(scan.label, kept, num_repeats(kept), len(scan.slices) - len(kept))
        scans.append(scan)
    return scans


def without_equal_pixels(slices: Sequence[Header]) -> list[Header]:
    """Keep the first of slices that have one position and the same stored pixels."""
    indices = position_indices(slices).tolist()
    counts = Counter(indices)
    kept: dict[tuple[int, str], Header] = {}
    for index, header in zip(indices, slices, strict=True):
        digest = pixels_digest(header) if counts[index] > 1 else ""
        kept.setdefault((index, digest), header)
    return ordered(list(kept.values()))


def why_uncalibrated(slices: Sequence[Header]) -> str:
    """Explain why not all slices have Hounsfield units; empty if all or none state how their values are scaled."""
    if flat := [header for header in slices if header.rescale and header.rescale[0] == 0]:
        return f"RescaleSlope is 0 in {len(flat)} of {len(slices)} slices, e.g. {flat[0].name}; export the series again"
    bare = [header for header in slices if header.rescale is None and not header.has_table]
    if not 0 < len(bare) < len(slices):
        return ""
    return (
        f"RescaleSlope and RescaleIntercept are missing in {len(bare)} of {len(slices)} slices, e.g. {bare[0].name}; "
        "export the series again"
    )


def as_series(scan: SeriesPart, label: str, notes: Sequence[str]) -> Series:
    """Make a volume of a scan."""
    slices = scan.slices
    uneven, affine = why_uneven(slices), affine_of(slices)
    found = [*notes]
    if scan.num_copies:
        found.append(f"{scan.num_copies} slices repeat the pixels of another at their position and are excluded")
    found += notes_on_units(slices)
    parts = tuple(
        Slice(header.path, header.frame, (1.0, 0.0) if header.has_table else header.rescale, header.uid)
        for header in slices
    )
    return Series(
        shown(label), parts, affine, uneven, tuple(filter(None, [*found, uneven, why_tilted(affine)])), slices[0]
    )


def notes_on_units(slices: Sequence[Header]) -> list[str]:
    """List what is odd about the scaling and the unit of the values of slices."""
    found = []
    is_ct = slices[0].modality == "CT"
    if is_ct and not any(header.rescale or header.has_table for header in slices):
        found.append("RescaleSlope and RescaleIntercept are missing; stored values are taken as Hounsfield units")
    for name, value in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        if lone := [header for header in slices if header.lacks == name and not header.has_table]:
            found.append(f"{name} is missing in {len(lone)} of {len(slices)} slices and taken as {value}")
    if any(header.inverted for header in slices):
        found.append("MONOCHROME1: values are taken as they are stored, though displays invert them")
    units = {header.unit for header in slices} - {"", "US"}
    if is_ct and (odd := units - {"HU"}):
        found.append(f"RescaleType is {private(listing(odd))}; expected HU")
    elif slices[0].modality == "PT":
        known = units & PET_UNITS.keys()
        found.append("PET in " + (listing(PET_UNITS[unit] for unit in known) if known else "an unknown unit (Units)"))
    return found
