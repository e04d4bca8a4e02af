"""Which of the volumes that were found are imported: modality, filters, one scan of each study."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from hyspark.data.importing.choice import Choice, Rule
from hyspark.data.readers.elements import Header
from hyspark.data.readers.volumes import Volume
from hyspark.utils.text import count_of

SEQUENCES = {
    "ADC": r"e?adc",
    "DWI": r"e?p?2?d?_?dwi\w*|diff\w*|dti\w*|trace\w*",
    "FLAIR": r"\w*flair\w*|darkfluid",
    "SWI": r"swi\w*|swan",
    "T1": r"t1\w*|\w*mprage|\w*bravo|\w*spgr|\w*vibe\w*|\w*lava\w*|\w*thrive\w*",
    "T2": r"t2\w*|\w*haste\w*|\w*blade\w*",
    "PD": r"pdw?|pd_?fs",
}
"""Names of MR sequences for nnU-Net's channel_names, with the words that name them in a description."""


def modality_of(volumes: Sequence[Volume], given: str) -> str:
    """Return the modality to import; empty if no file states any.

    Raises:
        ValueError: if the volumes are of several modalities, and none is given.
    """
    counts = Counter(volume.modality for volume in volumes if volume.modality)
    if given or len(counts) < 2:
        return given or next(iter(counts), "")
    found = ", ".join(f"{modality} ({count_of(num, 'scan')})" for modality, num in counts.most_common())
    flags = " or ".join(f"--modality {modality}" for modality, _ in counts.most_common())
    raise ValueError(f"sources: expected scans of one modality, found {found}; add {flags}, with an --out for each")


def choose_volumes(volumes: Sequence[Volume], choice: Choice) -> tuple[list[Volume], list[tuple[Volume, str]]]:
    """Return the volumes to import, and the others with the reason.

    Filters come first. Then `most_slices` or `thinnest` takes one scan of each study of a patient. Files that state no
    study are all taken.
    """
    kept, excluded = [], []
    studies: dict[tuple[str, str], list[Volume]] = defaultdict(list)
    for volume in volumes:
        if why := why_filtered(volume, choice):
            excluded.append((volume, why))
        elif choice.choose == "all" or volume.series is None:
            kept.append(volume)
        else:
            studies[(volume.patient, volume.series.study)].append(volume)
    for scans in studies.values():
        first, *others = sorted(scans, key=lambda volume: rank_of(volume, choice.choose))
        kept.append(first)
        excluded += [(volume, why_behind(volume, first, choice.choose)) for volume in others]
    return sorted(kept, key=lambda volume: volume.name), excluded


def why_filtered(volume: Volume, choice: Choice) -> str:
    """Explain why a volume does not pass the filters; empty if it does."""
    header = volume.series.header if volume.series else None
    if header and choice.modality and header.modality != choice.modality:
        return f"{header.modality}, and --modality is {choice.modality}"
    if header and header.burned_in:
        return "its pixels hold text, perhaps a name (BurnedInAnnotation is YES)"
    for flag, element in (("kernel", "ConvolutionKernel"), ("series_description", "SeriesDescription")):
        pattern, value = getattr(choice, flag), header.mark(element) if header else ""
        if pattern and not value:
            return f"no {element}, which --{flag} asks for"
        if pattern and not re.search(pattern, value, re.IGNORECASE):
            return f"{element} does not match --{flag}"
    return why_thick(thickness_of(volume), choice) if volume.series else ""


def why_thick(thickness: float, choice: Choice) -> str:
    """Explain that slices are too thick; empty if they are not."""
    is_thick = choice.max_thickness and thickness > choice.max_thickness
    return f"slices of {thickness:g} mm, above --max_thickness {choice.max_thickness:g}" if is_thick else ""


def thickness_of(volume: Volume) -> float:
    """Return the larger of SliceThickness and the distance between slices of a DICOM series, in mm."""
    assert volume.series is not None
    distance = round(float(np.linalg.norm(volume.series.affine[:3, 2])), 4)
    try:
        return max(distance, float(volume.series.header.mark("SliceThickness")))
    except ValueError:  # missing, or no number
        return distance


def rank_of(volume: Volume, rule: Rule) -> tuple[float | str, ...]:
    """Return a key by which the scan to take comes first.

    Scans come before those that were made from others. Then the rule decides, then the other one, then the UID.
    """
    assert volume.series is not None
    slices, thickness = -len(volume.series.slices), thickness_of(volume)
    ranked = (slices, thickness) if rule == "most_slices" else (thickness, slices)
    return (volume.series.header.is_derived, *ranked, volume.identity)


def why_behind(volume: Volume, first: Volume, rule: Rule) -> str:
    """Explain why another scan of the study is taken."""
    assert volume.series is not None
    assert first.series is not None
    if volume.series.header.is_derived and not first.series.header.is_derived:
        return f"--choose {rule}: made from other images (ImageType DERIVED, SECONDARY); another scan is original"
    num, num_first = len(volume.series.slices), len(first.series.slices)
    return (
        f"--choose {rule}: {num} slices of {thickness_of(volume):g} mm; another scan of the study has {num_first} of "
        f"{thickness_of(first):g} mm"
    )


def channel_name(headers: Sequence[Header], modality: str) -> str:
    """Return the name of the channel for dataset.json: the modality, or the MR sequence if all series are of one."""
    if modality != "MR":
        return modality
    names = {sequence_of(header) for header in headers}
    return names.pop() or "MR" if len(names) == 1 else "MR"


def sequence_of(header: Header) -> str:
    """Return the name of the MR sequence of a series by its description; empty if unknown."""
    if "ADC" in header.mark("ImageType").upper().split("\\"):
        return "ADC"
    if header.mark("DiffusionBValue") not in ("", "0", "0.0"):
        return "DWI"
    words = re.split(r"[\W_]+", " ".join(header.mark(name) for name in ("SeriesDescription", "ProtocolName")).lower())
    found = (name for name, pattern in SEQUENCES.items() if any(re.fullmatch(pattern, word) for word in words))
    return next(found, "")
