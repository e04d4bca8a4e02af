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
PREDICTION_WORDS = frozenset(("pred", "preds", "prediction", "predictions", "predicted"))
"""Words that name a network's label maps, which are no labels to train on."""
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
        "msk",
        "msks",
        "lbl",
        "lbls",
        "truth",
        "truths",
    )
    + (
        "gt",
        "gts",
        "anno",
        "annos",
        "annot",
        "annots",
        "groundtruth",
        "dseg",
        "probseg",
        "roi",
        "rois",
        "annotation",
        "annotations",
        "contour",
        "contours",
    )
    + ("labelstr", "labelsts", "labelsva", "labelsval", "instances", "delineation", "delineations")
    + tuple(PREDICTION_WORDS)
)
"""Words that name label maps, or folders of them."""
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "imgs", "imaging", "volume", "volumes", "vol", "vols", "ct", "cts", "scan", "scans")
    + ("orig", "original", "raw", "rawdata", "anat", "nifti", "imagestr", "imagests", "imagesva", "imagesval")
)
"""Words that name images, or folders of them, and no case."""
ANATOMY_WORDS = frozenset(
    ("liver", "spleen", "kidney", "kidneys", "pancreas", "stomach", "gallbladder", "esophagus", "oesophagus", "aorta")
    + ("duodenum", "colon", "bowel", "bladder", "prostate", "uterus", "rectum", "adrenal", "gland", "glands", "heart")
    + (
        "lung",
        "lungs",
        "lobe",
        "trachea",
        "airway",
        "airways",
        "vessel",
        "vessels",
        "vein",
        "veins",
        "artery",
        "arteries",
    )
    + (
        "brain",
        "bone",
        "bones",
        "rib",
        "ribs",
        "vertebra",
        "vertebrae",
        "spine",
        "femur",
        "hip",
        "muscle",
        "body",
        "skin",
    )
    + (
        "tumor",
        "tumors",
        "tumour",
        "tumours",
        "lesion",
        "lesions",
        "cyst",
        "cysts",
        "nodule",
        "nodules",
        "organ",
        "organs",
    )
    + (
        "left",
        "right",
        "upper",
        "lower",
        "middle",
        "small",
        "large",
        "l",
        "r",
        "portal",
        "hepatic",
        "vena",
        "cava",
        "and",
    )
    + (
        "inferior",
        "superior",
        "postcava",
        "ventricle",
        "atrium",
        "gtv",
        "ctv",
        "ptv",
        "thyroid",
        "parotid",
        "intestine",
    )
)
"""Words that name parts of the body, or lesions: beside an image, label maps of theirs."""
OTHER_FORMATS = frozenset(
    (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".gipl", ".dcm", ".ima", ".minc", ".mnc")
)
"""Endings of volumes of other formats, which are not read."""
PART_WORDS = frozenset(("tr", "ts", "va", "val", "train", "test"))
"""Parts of a data set behind a word for images or label maps: MasksTrain."""
CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Where a word begins in TrainingMask, p1Seg, CTMask."""
BIDS_LABEL_ENTITY = re.compile(r"(space|label|desc|res|den|seg|atlas)-.*", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Split a name at everything that is no letter or digit; in lower case.

    It is also split before the number of label0001, and at the capitals of TrainingMask, where a known word ends it.
    """
    known = LABEL_WORDS | IMAGE_WORDS
    words: list[str] = []
    for text_part in re.split(r"[\W_]+", text):
        word = text_part.lower()
        pieces = CAPITALS.split(text_part) if word not in known else [word]
        ends = [piece for piece in map(str.lower, pieces) if piece not in PART_WORDS]
        numbered = re.fullmatch(r"([a-z]+)(\d+)", word)
        if numbered and numbered[1] in known:
            words += numbered.groups()
        elif ends and ends[-1] in known:
            words += map(str.lower, pieces)
        elif word:
            words.append(word)
    return words


def is_label_name(stem: str) -> bool:
    """Return whether a file name without ending is that of a label map: seg, x_mask, label0001, segmentation-3."""
    named = [word for word in words_of(CHANNEL.sub(r"\g<case>", stem)) if not word.isdecimal()]
    return bool(named) and (named[-1] in LABEL_WORDS or named[0] in LABEL_WORDS)


def is_label_folder(name: str, *, surely: bool = False) -> bool:
    """Return whether a folder name is that of a folder of label maps: labels, segmentations, manual_masks.

    Args:
        name: name of the folder.
        surely: whether the word has to come first or last, unlike in COVID-19-CT-Seg_20cases.
    """
    words = [word for word in words_of(name) if not (surely and (word.isdecimal() or word in PART_WORDS))]
    return any(word in LABEL_WORDS for word in ([*words[:1], *words[-1:]] if surely else words))


def is_image_name(stem: str) -> bool:
    """Return whether a file name without ending says no more than that it is an image: image, ct_1."""
    return all(word in IMAGE_WORDS for word in words_of(CHANNEL.sub(r"\g<case>", stem)) if not word.isdecimal())


def is_anatomy_name(stem: str) -> bool:
    """Return whether a file name without ending names a part of the body alone: liver, kidney_left."""
    words = [word for word in words_of(stem) if not word.isdecimal()]
    return bool(words) and all(word in ANATOMY_WORDS for word in words)


def is_prediction(below: Path) -> bool:
    """Return whether a label map's path says that a network made it; in a folder of label maps it is one to use."""
    folders = [word for folder in below.parts[:-1] for word in words_of(folder) if word in LABEL_WORDS]
    if any(word in PREDICTION_WORDS for word in folders):
        return True
    return not folders and any(word in PREDICTION_WORDS for word in words_of(nifti_stem(below)))


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
