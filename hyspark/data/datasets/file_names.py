"""What file names say: the case, the channel, and whether a file is a label map. No file is opened."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from hyspark.utils.paths import nifti_stem

FIRST_CHANNEL = "0000"
CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)
"""A case and its channel, as nnU-Net writes them."""
MAX_CHANNELS, MAX_CHANNELS_OF_ONE = 10, 4
"""Consecutive numbers behind each of several names, and behind one name alone, from 0000, that count as channels. More
are numbers of cases.
"""
BTCV_IMAGE = re.compile(r"img\d+")
LABEL_WORDS = frozenset(
    (
        "seg",
        "segs",
        "segm",
        "segmentation",
        "segmentations",
        "label",
        "labels",
        "labelmap",
        "labelmaps",
        "mask",
        "masks",
    )
    + ("gt", "groundtruth", "dseg", "probseg", "roi", "rois", "annotation", "annotations", "contour", "contours")
    + ("pred", "preds", "prediction", "predictions", "labelstr", "labelsts", "labelsva", "instances")
)
"""Words that name label maps, or folders of them."""
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "imgs", "imaging", "volume", "volumes", "vol", "vols", "ct", "cts", "scan", "scans")
    + ("orig", "original", "raw", "rawdata", "anat", "nifti", "imagestr", "imagests", "imagesva")
)
"""Words that name images, or folders of them, and no case."""
OTHER_FORMATS = frozenset(
    (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".gipl", ".dcm", ".ima", ".minc", ".mnc")
)
"""Endings of volumes of other formats, which are not read."""
BIDS_LABEL_ENTITY = re.compile(r"(space|label|desc|res|den|seg|atlas)-.*", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Split a name at everything that is no letter or digit, and before the number of label0001; in lower case."""
    words = [word for word in re.split(r"[\W_]+", text.lower()) if word]
    split = (re.fullmatch(r"([a-z]+)(\d+)", word) for word in words)
    known = LABEL_WORDS | IMAGE_WORDS
    return [w for word, m in zip(words, split, strict=True) for w in (m.groups() if m and m[1] in known else (word,))]


def is_label_name(stem: str) -> bool:
    """Return whether a file name without ending is that of a label map: seg, x_mask, label0001, segmentation-3."""
    named = [word for word in words_of(CHANNEL.sub(r"\g<case>", stem)) if not word.isdecimal()]
    return bool(named) and (named[-1] in LABEL_WORDS or named[0] in LABEL_WORDS)


def is_label_folder(name: str) -> bool:
    """Return whether a folder name is that of a folder of label maps: labels, segmentations, manual_masks."""
    return any(word in LABEL_WORDS for word in words_of(name))


def pair_key(below: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the paths of an image and of its label map, below a common folder, have in common.

    Words for images and label maps, the first channel, and BIDS entities of label maps are no part of it.
    """
    folders = list(below.parts[:-1])
    folders = folders[2:] if folders[:1] == ["derivatives"] else folders
    neutral = LABEL_WORDS | IMAGE_WORDS
    kept = tuple(folder for folder in folders if not set(words_of(folder)) & neutral)
    parts = nifti_stem(below).removesuffix("_0000").split("_")
    entities = [part for part in parts if not BIDS_LABEL_ENTITY.fullmatch(part)]
    return kept, tuple(word for word in words_of("_".join(entities)) if word not in neutral)


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
