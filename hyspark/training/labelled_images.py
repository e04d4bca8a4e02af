"""The images of a classification run in memory: training, validation, test."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyspark.config.classification import ClassificationConfig
from hyspark.data.batches.images import short_side
from hyspark.data.datasets.subsets import draw_stratified, subset_size
from hyspark.data.readers.images import FoundImages, ImageSet, decode, find_classes, find_images, log_other_files
from hyspark.training.run_volumes import SKIP_ADVICE
from hyspark.utils.digests import text_digest
from hyspark.utils.log import LOG


@dataclass(frozen=True)
class LabelledImages:
    """The images of a run.

    Attributes:
        parts: Images by part: train, val, and test if there is one.
        classes: Class names by label.
        excluded: Names of the unreadable images.
    """

    parts: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    excluded: list[str]

    def describe(self) -> str:
        """Describe training and validation images in a few words, with a digest of names and classes.

        The order of batches is a function of these.
        """
        lines = ["\n".join(self.classes)]
        for part in ("train", "val"):
            images = self.parts[part]
            lines += [f"{name}\t{label}" for name, label in zip(images.names, images.labels, strict=True)]
        digest = text_digest(lines)
        return f"{len(self.parts['train'])} training and {len(self.parts['val'])} validation images ({digest})"


def read_images(config: ClassificationConfig) -> LabelledImages:
    """Read the images of all parts into memory; of the training part the subset that the settings ask for.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: The folders do not fit, or images are unreadable and on_bad_case is stop.
    """
    found, classes = find_image_parts(config)
    log_unused_images(config)
    sets: dict[str, ImageSet] = {}
    unreadable: dict[str, str] = {}
    for part, listed in found.items():
        sets[part], faults = decode(listed, short_side(config.crop_size))
        unreadable |= {f"{part}/{name}": why for name, why in faults.items()}
    num = sum(len(listed.names) for listed in found.values())
    if unreadable and config.on_bad_case == "stop":
        raise ValueError(unreadable_images_message(unreadable, num, f", {SKIP_ADVICE}"))
    if unreadable:
        LOG.warning("%s", unreadable_images_message(unreadable, num))
    if empty := [part for part, images in sets.items() if not len(images)]:
        raise ValueError(f"{config.data}: no readable image in {', '.join(empty)}")
    if twins := find_duplicates(sets):
        (name, twin), *_ = twins
        LOG.warning(
            "%s: %d times an image is in two parts, pixel for pixel, such as %s and %s; scores on these say nothing of "
            "new images, remove them from one part",
            *(config.data, len(twins), name, twin),
        )
    return LabelledImages(sets, classes, list(unreadable))


def find_duplicates(sets: Mapping[str, ImageSet]) -> list[tuple[str, str]]:
    """Find images with the pixels of an image of an earlier part; return pairs PART/NAME, the earlier first."""
    seen: dict[bytes, tuple[str, str]] = {}
    twins = []
    for part, images in sets.items():
        for image, name in zip(images.images, images.names, strict=True):
            shown = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()
            first, first_name = seen.setdefault(shown, (part, name))
            if first != part:
                twins.append((f"{first}/{first_name}", f"{part}/{name}"))
    return twins


def find_image_parts(config: ClassificationConfig) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """Find the image files of each part, and the classes.

    Raises:
        FileNotFoundError, ValueError: As `read_images`.
    """
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


def log_unused_images(config: ClassificationConfig) -> None:
    """Log the files of all parts that are no images of a class."""
    found, classes = find_images(Path(config.data))
    folders = {part: Path(config.data) / part for part in found}
    if config.test_dir:
        folders["test"] = Path(config.test_dir)
        found["test"] = find_classes(folders["test"], classes)
    for part, listed in found.items():
        log_other_files(folders[part], listed.sources)


def unreadable_images_message(faults: Mapping[str, str], num: int, advice: str = "") -> str:
    """Write one message on all unreadable images.

    Args:
        faults: Reasons by image.
        num: Number of all images.
        advice: What else to do, after a comma.
    """
    lines = "\n  ".join(faults.values())
    return f"{len(faults)} of {num} images are unreadable; repair or remove them{advice}:\n  {lines}"
