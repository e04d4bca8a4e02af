"""Words of file and folder names: whether they are of images, label maps, predictions, parts of the body."""

import re
from pathlib import Path

from hyspark.utils.paths import nifti_stem

FIRST_CHANNEL = "0000"
FIRST_CHANNELS = (0,)
"""The channels that are read by default."""
CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)
"""A case and its channel, as nnU-Net writes them."""
PREDICTION_WORDS = frozenset(("pred", "preds", "prediction", "predictions", "predicted"))
"""Words that name a network's label maps, which are no labels to train on."""
LABEL_WORDS = PREDICTION_WORDS | frozenset(
    ("seg", "segs", "segm", "segmentation", "segmentations", "dseg", "probseg", "label", "labels", "lbl", "lbls")
    + ("labelmap", "labelmaps", "labelstr", "labelsts", "labelsva", "labelsval", "mask", "masks", "msk", "msks")
    + ("gt", "gts", "truth", "truths", "groundtruth", "anno", "annos", "annot", "annots", "annotation", "annotations")
    + ("contour", "contours", "delineation", "delineations", "roi", "rois", "instances")
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
PART_WORDS = frozenset(("tr", "ts", "va", "val", "train", "test"))
"""Parts of a data set behind a word for images or label maps: MasksTrain."""
CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Where a word begins in TrainingMask, p1Seg, CTMask."""


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
