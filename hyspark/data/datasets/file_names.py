"""What file names say: the case, the channel, and which label map belongs to which image. No file is opened."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from hyspark.data.datasets.words import CHANNEL, FIRST_CHANNEL, IMAGE_WORDS, LABEL_WORDS, words_of
from hyspark.utils.paths import nifti_stem

MAX_CHANNELS, MAX_CHANNELS_OF_ONE = 10, 4
"""Consecutive numbers behind each of several names, and behind one name alone, from 0000, that count as channels. More
are numbers of cases.
"""
BTCV_IMAGE = re.compile(r"img\d+")
SETTINGS_FILE = "import.json"
"""Record in the data sets that `hyspark import` writes."""
BY_SIMPLEITK = (".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
"""Endings of volumes that SimpleITK reads for `hyspark import`."""
BY_NIBABEL = (".hdr", ".mgz", ".mgh")
"""Endings of volumes that nibabel reads for it: a pair of .hdr and .img, and FreeSurfer's formats."""
OTHER_FORMATS = frozenset(
    (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".gipl", ".dcm", ".ima", ".minc", ".mnc")
)
"""Endings of volumes of other formats, which are not read."""
BIDS_LABEL_ENTITY = re.compile(r"(space|label|desc|res|den|seg|atlas)-.*", re.IGNORECASE)


def pair_key(below: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the paths of an image and of its label map, below a common folder, have in common.

    Words for images and label maps, the first channel, and BIDS entities of label maps are no part of it.
    """
    folders = list(below.parts[:-1])
    if "derivatives" in folders:
        start = folders.index("derivatives")
        pipeline = folders[start + 1 : start + 2]
        del folders[start : start + 1 + bool(pipeline and not pipeline[0].startswith("sub-"))]
    neutral = LABEL_WORDS | IMAGE_WORDS
    kept = tuple(folder for folder in folders if not set(words_of(folder)) & neutral)
    entities = [part for part in nifti_stem(below).split("_") if not BIDS_LABEL_ENTITY.fullmatch(part)]
    words = [word for word in words_of("_".join(entities)) if word not in neutral]
    return kept, tuple(words[:-1] if words[1:] and words[-1] == FIRST_CHANNEL else words)


def cases_of_stems(
    stems: Collection[str],
    labels: Collection[str] = (),
    channel: str = FIRST_CHANNEL,
    num_channels: int | None = None,
) -> dict[str, str | None]:
    """Return the case of each image of one folder, by file name without ending; None for another channel.

    Four digits at the end are a channel, as in nnU-Net, or the number of a case (amos_0001). The labels decide. Without
    a label, they are channels if the numbers behind a name run from 0000, or if other images of the folder have the
    channel 0000.

    Args:
        stems: file names of the images, without ending.
        labels: file names of the label maps, without ending.
        channel: channel of the images that are used.
        num_channels: number of channels that the data set declares; None if it declares none.
    """
    found = {stem: match for stem in stems if (match := CHANNEL.fullmatch(stem))}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        numbers.setdefault(match["case"], set()).add(int(match["channel"]))
    names, whole = set(labels), set(stems)
    most = max(num_channels or 0, MAX_CHANNELS if len(numbers) > 1 else MAX_CHANNELS_OF_ONE)

    def runs_from_0(case: str) -> bool:
        return case in whole or max(numbers[case]) < len(numbers[case]) <= most

    has_channels = any(case in names or runs_from_0(case) for case in numbers)

    def is_channel(stem: str, match: re.Match[str]) -> bool:
        case, number = match["case"], match["channel"]
        if case in names or stem in names:
            return case in names
        if len(numbers[case]) > most:
            return False
        return has_channels or (number == channel != FIRST_CHANNEL)

    cases: dict[str, str | None] = {}
    for stem in stems:
        if (match := found.get(stem)) and is_channel(stem, match):
            cases[stem] = match["case"] if match["channel"] == channel else None
        else:
            cases[stem] = stem if channel == FIRST_CHANNEL else None
    return cases


def labelled_stems(stems: Collection[str], labels: Collection[str]) -> set[str]:
    """Return the images of one folder whose four digits at the end number cases, since label maps have them too.

    Args:
        stems: file names of the images, without ending.
        labels: file names of the label maps, without ending, which may have words for label maps (case_0001_seg).
    """

    def key(stem: str) -> tuple[str, ...]:
        return tuple(word for word in words_of(stem) if word not in LABEL_WORDS | IMAGE_WORDS)

    known = {key(stem) for stem in labels}
    found = [match for stem in stems if (match := CHANNEL.fullmatch(stem)) and key(stem) in known]
    numbered = {match["case"] for match in found if match["channel"] != FIRST_CHANNEL}
    return {match.string for match in found if match["case"] in numbered}


def unique_names(stems: Mapping[Path, str]) -> dict[Path, str]:
    """Return unique case names of images, from their names without folders.

    A name that several files have (case_1/imaging.nii.gz, case_2/imaging.nii.gz) is prefixed by its folder's name. The
    names of folders above are added as far as they are needed to distinguish the files.
    """
    names = dict(stems)
    folders = {image: image.parent.relative_to(image.anchor).parts for image in names}
    for depth in range(1, max(map(len, folders.values()), default=0) + 1):
        if not (repeated := {name for name, num in Counter(names.values()).items() if num > 1}):
            break
        for image in [image for image, name in names.items() if name in repeated]:
            names[image] = "-".join([*folders[image][-depth:], stems[image]])
    return names


def case_names(images: Iterable[Path]) -> dict[Path, str]:
    """Return unique case names of listed images: file names without ending and channel.

    A channel is "_0000", or four digits that all images of a data set have in common.
    """
    images = list(images)
    endings: dict[str, set[str]] = {}
    for image in images:
        endings.setdefault(dataset_of(image), set()).add(nifti_stem(image)[-5:])
    stems = {}
    for image in images:
        stem = nifti_stem(image)
        shared = len(endings[dataset_of(image)]) == 1
        has_channel = re.fullmatch(r".+_\d{4}", stem, re.DOTALL) and (shared or stem.endswith("_0000"))
        stems[image] = stem[:-5] if has_channel else stem
    return unique_names(stems)


def dataset_of(image: Path) -> str:
    """Return the name of the folder above imagesTr or imagesTs, or else of the image's own folder."""
    return (image.parent.parent if image.parent.name in ("imagesTr", "imagesTs") else image.parent).name
