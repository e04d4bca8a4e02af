"""Classification of images as a kind of comparison (see benefit.py)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.class_benefit_page import write_class_benefit
from hyspark.class_comparison import compare_classified, read_classified
from hyspark.comparison import Place
from hyspark.config_classify import ClassifyConfig
from hyspark.data.files import content_digest, text_digest
from hyspark.data.images import has_test_part
from hyspark.engine.classified import SCORES
from hyspark.engine.classify import build
from hyspark.engine.compared import Kind
from hyspark.engine.labelled_images import find_parts, read_images
from hyspark.models.weights import load_pretrained


def scores_folder(config: ClassifyConfig) -> Path:
    """Of the test part, or test_dir, where there is one, else of the validation images."""
    return config.run_folder / SCORES["test" if config.test_dir or has_test_part(Path(config.data_dir)) else "val"]


def num_training(config: ClassifyConfig) -> int:
    """Training images."""
    return len(find_parts(config)[0]["train"].names)


def digest(config: ClassifyConfig) -> str:
    """Of the names, classes and files of all images, in 12 digits."""
    found, classes = find_parts(replace(config, num_labelled=0, label_fraction=1.0))
    lines = ["\n".join(classes)]
    for part, images in found.items():
        rows = zip(map(mark, images.sources), images.names, images.labels, strict=True)
        lines += [part, *(f"{source} {name} {label}" for source, name, label in rows)]
    return text_digest(lines)


def mark(source: Path | np.ndarray) -> str:
    """Digest of an image's file or pixels."""
    if isinstance(source, Path):
        return content_digest(source)
    return hashlib.sha256(f"{source.shape}".encode() + source.tobytes()).hexdigest()


def check_data(configs: Sequence[ClassifyConfig], starts: Mapping[str, str]) -> None:
    """Look at all images that the runs need, and load each start once.

    Raises ValueError or FileNotFoundError for data or weights that do not fit.
    """
    find_parts(min(configs, key=lambda config: config.num_labelled))  # not fewer images than classes
    largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
    for config in largest.values():
        images = read_images(config)
    for name, weights in starts.items():
        if weights != "none":
            print(f"start {name}: {weights}\n{load_pretrained(build(config, len(images.classes)), weights)}")


def report(
    out: Path,
    finished: Mapping[Place, ClassifyConfig],
    planned: Sequence[Place],
    starts: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    """AUC, accuracy and F1 against the number of training images."""
    scored = {
        place: read_classified(scores_folder(c), c.run_folder / "metrics.jsonl", c.batch_size)
        for place, c in finished.items()
    }
    write_class_benefit(out, compare_classified(scored, planned, starts) | dict(more))


KIND = Kind("finetune_classify", scores_folder, num_training, digest, check_data, report)
