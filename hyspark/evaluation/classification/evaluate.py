"""Score a fine-tuned classifier on images of known classes; writes a folder of scores (see scores.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.config.classification import ClassificationConfig
from hyspark.data.batches.images import short_side
from hyspark.data.readers.images import ImageSet, find_classes, log_other_files
from hyspark.evaluation.classification.inference import class_probabilities, decode_readable, load_classifier
from hyspark.evaluation.classification.scores import (
    Classified,
    classification_summary,
    metrics_text,
    write_classification_scores,
)
from hyspark.evaluation.each_case import warn_of_failures
from hyspark.evaluation.protocol import TRAINED_ON, has_scores
from hyspark.evaluation.score_table import read_score_table
from hyspark.figures.mistakes import mistakes_figure
from hyspark.figures.panels import save_figure
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.training.labelled_images import LabelledImages, unreadable_images_message
from hyspark.utils.log import LOG

SCORE_FOLDERS = {"val": "scores", "test": "scores_test"}
"""Folders of scores in a run, by the subset of images that is scored."""
HEADINGS = {"val": "Validation images, best weights", "test": "Test images, best weights"}
SELECTION = {
    "val": "weights chosen by the accuracy on these same images, which is optimistic",
    "test": "weights chosen by the accuracy on the validation images",
}


def evaluate_classification(weights: Path, data: Path, out: Path, device: str = "auto") -> dict[str, Any]:
    """Score a fine-tuned classifier on images in folders of their classes; writes the folder of scores.

    Args:
        weights: best.pth of a classification run, or the run folder.
        data: Folder with CLASS/IMAGE; a class may be missing.
        out: Folder to write to.
        device: "auto", or a device of torch.

    Returns:
        The summary of the scores, with the images that were not scored.

    Raises:
        FileNotFoundError: There is no such folder, and what `load_classifier` raises.
        ValueError: A folder is no class, images are missing or all unreadable, and what `load_classifier` raises.
    """
    network, config, classes, what = load_classifier(weights)
    processes = distributed.find_processes(device)
    found = find_classes(data, classes)
    log_other_files(data, found.sources)
    images, unreadable = decode_readable(found, config)
    with distributed.join_process_group(processes):
        images, values, failed = class_probabilities(network.to(processes.device), images, config, processes)
    failures = unreadable | failed
    if not len(images):
        raise ValueError(unreadable_images_message(failures, len(failures)))
    scored = Classified(images.names, np.array(images.labels), values, classes)
    protocol = image_protocol(config, what, str(data), "not on these images")
    if not processes.is_main:
        return classification_summary(scored, protocol, failures)
    return write_scored_images(out, images, scored, protocol, failures)


def image_protocol(config: ClassificationConfig, weights: str, images: str, selection: str) -> dict[str, Any]:
    """Describe in plain values how images are scored.

    Args:
        config: Settings of the network.
        weights: Which weights of the run are scored.
        images: Which images are scored.
        selection: What the weights were chosen by.
    """
    edge = config.crop_size
    return {
        "weights": weights,
        "images": images,
        "selection": selection,
        "input": f"shorter side {short_side(edge)}, {edge} x {edge} from the centre",
        "auc": "of the second class in sorted order; with more than two, mean over each against the rest",
    }


def write_scored_images(
    folder: Path,
    images: ImageSet,
    scored: Classified,
    protocol: Mapping[str, Any],
    failures: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a folder of scores, its picture first; returns the summary."""
    figure = mistakes_figure(scored, images.images)
    (folder / "mistakes.png").unlink(missing_ok=True)
    if figure:
        save_figure(figure, folder / "mistakes.png")
    return write_classification_scores(folder, scored, protocol, failures)


def scored_subsets(subsets: Mapping[str, Any]) -> list[str]:
    """List the subsets of images that a run scores at its end."""
    return [name for name in SCORE_FOLDERS if name in subsets]


def score_best(config: ClassificationConfig, images: LabelledImages, processes: Processes) -> None:
    """Score the best weights of a run on the validation images, then on the test images.

    Subsets whose scores exist are skipped. The test images are used here alone.
    """
    network, _, classes, weights = load_classifier(config.run_folder)
    network.to(processes.device)
    for subset in scored_subsets(images.parts):
        out, found = config.run_folder / SCORE_FOLDERS[subset], images.parts[subset]
        where = config.test_dir if subset == "test" and config.test_dir else f"{subset} of {config.data}"
        protocol = image_protocol(config, weights, where, SELECTION[subset]) | {TRAINED_ON: len(images.parts["train"])}
        if are_images_scored(out, found, classes, protocol):
            continue
        kept, values, failures = class_probabilities(network, found, config, processes)
        if processes.is_main:
            warn_of_failures(failures, len(found), "scored")
        if processes.is_main and len(kept):
            scored = Classified(kept.names, np.array(kept.labels), values, classes)
            summary = write_scored_images(out, kept, scored, protocol, failures)
            LOG.info("%s: %s", HEADINGS[subset], metrics_text(summary["metrics"]))


def are_images_scored(out: Path, images: ImageSet, classes: Sequence[str], protocol: Mapping[str, Any]) -> bool:
    """Check that a folder holds the scores of these images, with these classes, by this protocol."""
    if not has_scores(out, {**protocol, "num_images": len(images)}):
        return False
    scored = Classified.from_table(read_score_table(out / "cases.csv"))
    truth = [scored.classes[label] for label in scored.truth]
    return scored.names == images.names and truth == [classes[label] for label in images.labels]
