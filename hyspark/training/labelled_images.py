"""The images of a classification run: which it trains, is validated and is tested on, in memory."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyspark.config.classification import ClassificationConfig
from hyspark.data.batches.images import short_side
from hyspark.data.datasets.subsets import draw_stratified, subset_size
from hyspark.data.readers.images import FoundImages, ImageSet, decode, find_classes, find_images
from hyspark.training.run_volumes import SKIP
from hyspark.utils.digests import text_digest
from hyspark.utils.log import LOG


@dataclass(frozen=True)
class Images:
    """The images of a run, by part (train, val, test), its class names, and the names of those left out."""

    parts: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    left_out: list[str]

    @property
    def text(self) -> str:
        """Training and validation images in a few words, with a digest of names and classes: the order of batches is a
        function of them.
        """
        lines = ["\n".join(self.classes)]
        for part in ("train", "val"):
            images = self.parts[part]
            lines += [f"{name}\t{label}" for name, label in zip(images.names, images.labels, strict=True)]
        digest = text_digest(lines)
        return f"{len(self.parts['train'])} training and {len(self.parts['val'])} validation images ({digest})"


def read_images(config: ClassificationConfig) -> Images:
    """The images of the settings' parts, in memory; of the training part those that the settings ask for.

    Raises ValueError or FileNotFoundError for data that do not fit, and, unless on_bad_case says skip, where images
    cannot be used.
    """
    found, classes = find_parts(config)
    sets: dict[str, ImageSet] = {}
    wrong: dict[str, str] = {}
    for part, listed in found.items():
        sets[part], faults = decode(listed, short_side(config.crop_size))
        wrong |= {f"{part}/{name}": why for name, why in faults.items()}
    num = sum(len(listed.names) for listed in found.values())
    if wrong and config.on_bad_case == "stop":
        raise ValueError(unusable(wrong, num, f", {SKIP}"))
    if wrong:
        LOG.warning("%s", unusable(wrong, num))
    if empty := [part for part, images in sets.items() if not len(images)]:
        raise ValueError(f"{config.data}: no image that can be used is left in {', '.join(empty)}")
    if twins := in_two_parts(sets):
        (name, twin), *_ = twins
        LOG.warning(
            "%s: %d times an image is in two parts, pixel for pixel, such as %s and %s; scores on these say nothing of "
            "new images, remove them from one part",
            *(config.data, len(twins), name, twin),
        )
    return Images(sets, classes, list(wrong))


def in_two_parts(sets: Mapping[str, ImageSet]) -> list[tuple[str, str]]:
    """Images whose pixels are those of an image of an earlier part: its name and the image's own, with their parts."""
    seen: dict[bytes, tuple[str, str]] = {}
    twins = []
    for part, images in sets.items():
        for image, name in zip(images.images, images.names, strict=True):
            shown = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()
            first, first_name = seen.setdefault(shown, (part, name))
            if first != part:
                twins.append((f"{first}/{first_name}", f"{part}/{name}"))
    return twins


def find_parts(config: ClassificationConfig) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """The images of each part, not decoded yet, and the classes. Raises as `read_images`."""
    found, classes = find_images(Path(config.data))
    training = found["train"]
    num = subset_size(
        len(training.names),
        num_labelled=config.num_labelled,
        label_fraction=config.label_fraction,
        least=len(set(training.labels)),
    )
    found["train"] = training.take(draw_stratified(training.names, training.labels, num, config.seed))
    if config.test_dir:
        found["test"] = find_classes(Path(config.test_dir), classes)
    return found, classes


def unusable(wrong: Mapping[str, str], num: int, advice: str = "") -> str:
    """The message on images that cannot be used."""
    lines = "\n  ".join(wrong.values())
    return f"{len(wrong)} of {num} images cannot be used; repair or remove them{advice}:\n  {lines}"
