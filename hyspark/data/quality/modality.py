"""The modality of an image that the dataset.json of its folder declares."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hyspark.utils.paths import load_json, nifti_stem

CT_NAME = re.compile(r"\b(ct|cta|ctp|cect|ncct|nect|cbct|ldct|hu|hounsfield|computed tomography)\b")
MR_WORDS = r"t1\w*|t2\w*|mri?|mra|mprage|flair|dwi|adc|pdw?|swi|dce|bold|fmri|magnetic resonance"
MR_NAME = re.compile(rf"\b({MR_WORDS})\b")
OTHER_NAME = re.compile(
    rf"\b({MR_WORDS}|pet|suv|fdg|spect|nm|us|ultrasound|x ?rays?|oct"
    r"|rgb\w*|red|green|blue|grayscale|greyscale|microscopy|zscore|z score|nonorm|no ?norm|rescale\w*|rescale to 0 1)\b"
)
"""Modalities other than CT, and nnU-Net's names of normalisations that are not CT's."""


@dataclass(frozen=True)
class Modality:
    """What a data set's file says of an image's channel.

    Attributes:
        name: the name of the channel; empty if none is given.
        file: the file.
    """

    name: str = ""
    file: str = ""

    @property
    def is_ct(self) -> bool:
        """Whether the name is that of CT."""
        return bool(CT_NAME.search(self.words))

    @property
    def is_other(self) -> bool:
        """Whether the name is that of something else than CT; unknown names are not."""
        return not self.is_ct and bool(OTHER_NAME.search(self.words))

    @property
    def is_mr(self) -> bool:
        """Whether the name is that of MR, or of one of its sequences."""
        return not self.is_ct and bool(MR_NAME.search(self.words))

    @property
    def words(self) -> str:
        """The name in lower case, words apart."""
        return re.sub(r"[\W_]+", " ", self.name.lower())


def declared_modality(image: Path, channel: int = 0) -> Modality:
    """Return what dataset.json says of an image.

    Args:
        image: the image's file.
        channel: its channel, unless the file's name says it.
    """
    found = re.search(r"_(\d{4})$", nifti_stem(image))
    number = int(found[1]) if found else channel
    declared = ((file, names[number]) for file, names in declarations(image) if names.get(number))
    return next((Modality(name, str(file)) for file, name in declared), Modality())


def num_declared(image: Path) -> int:
    """Return the number of channels that dataset.json names for an image; 0 without any."""
    return max((len(names) for _, names in declarations(image)), default=0)


def declarations(image: Path) -> Iterator[tuple[Path, dict[int, str]]]:
    """Yield the dataset.json above an image's folder (nnU-Net, decathlon) and in it, with the names of channels."""
    for file in (image.parent.parent / "dataset.json", image.parent / "dataset.json"):
        try:
            yield file, channel_names(file, file.stat().st_mtime_ns)
        except (OSError, ValueError):
            continue


@lru_cache(64)
def channel_names(file: Path, mtime_ns: int) -> dict[int, str]:
    """Read the names of channels by number; raise ValueError if the file is no JSON."""
    content = load_json(file)
    if not isinstance(content, dict):
        return {}
    found: Any = content.get("channel_names") or content.get("modality") or {}
    if isinstance(found, str):
        found = {0: found}
    elif isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict):
        return {}
    return {int(key): str(name) for key, name in found.items() if str(key).isdecimal()}
