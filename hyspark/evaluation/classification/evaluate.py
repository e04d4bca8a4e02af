"""Score a fine-tuned classifier on images of known classes; writes a folder of scores (see scores.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.config.classification import ClassificationConfig
from hyspark.data.batches.images import short_side
from hyspark.data.readers.images import ImageSet, find_classes
from hyspark.evaluation.classification import scores
from hyspark.evaluation.classification.inference import class_probabilities, decode_all, load_classifier
from hyspark.evaluation.classification.scores import Classified
from hyspark.evaluation.protocol import SCORE_FILES, TRAINED_ON
from hyspark.figures.mistakes import mistakes_figure
from hyspark.figures.panels import save_figure
from hyspark.training import distributed
from hyspark.training.distributed import LOG, Processes
from hyspark.training.labelled_images import LabelledImages

SCORES = {"val": "scores", "test": "scores_test"}
"""Folders of scores in a run, by the part that is scored."""
HEADINGS = {"val": "Validation images, best weights", "test": "Test images, best weights"}
SELECTION = {
    "val": "weights chosen by the accuracy on these same images, which is optimistic",
    "test": "weights chosen by the accuracy on the validation images",
}


def protocol_of(config: ClassificationConfig, weights: str, images: str, selection: str) -> dict[str, Any]:
    """How images are scored, in plain values. selection: what the weights were chosen by."""
    edge = config.crop_size
    return {
        "weights": weights,
        "images": images,
        "selection": selection,
        "input": f"shorter side {short_side(edge)}, {edge} x {edge} from the centre",
        "auc": "of the second class in sorted order; with more than two, mean over each against the rest",
    }


def write_scores(folder: Path, images: ImageSet, scored: Classified, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Write the folder of scores, its picture first; returns its summary."""
    figure = mistakes_figure(scored, images.images)
    (folder / "mistakes.png").unlink(missing_ok=True)
    if figure:
        save_figure(figure, folder / "mistakes.png")
    return scores.write_folder(folder, scored, protocol)


def scored_parts(parts: Mapping[str, Any]) -> list[str]:
    """The parts that a run ends with the scores of."""
    return [part for part in SCORES if part in parts]


def score_best(config: ClassificationConfig, images: LabelledImages, processes: Processes) -> None:
    """Write the scores of the best weights, unless those of these images are there: of the validation images, then of
    the test images, which are looked at here alone.
    """
    network, _, classes, weights = load_classifier(config.run_folder)
    network.to(processes.device)
    for part in scored_parts(images.parts):
        out = config.run_folder / SCORES[part]
        where = config.test_dir if part == "test" and config.test_dir else f"{part} of {config.data}"
        protocol = protocol_of(config, weights, where, SELECTION[part]) | {TRAINED_ON: len(images.parts["train"])}
        if is_scored(out, images.parts[part], classes, protocol):
            continue
        values = class_probabilities(network, images.parts[part], config, processes)
        if processes.is_main:
            scored = Classified(images.parts[part].names, np.array(images.parts[part].labels), values, classes)
            summary = write_scores(out, images.parts[part], scored, protocol)
            LOG.info("%s: %s", HEADINGS[part], scores.metrics_text(summary["metrics"]))


def is_scored(out: Path, images: ImageSet, classes: Sequence[str], protocol: Mapping[str, Any]) -> bool:
    """Whether a folder holds the scores of these images, with the same classes, by the same protocol."""
    if not all((out / name).is_file() for name in SCORE_FILES):
        return False
    if scores.read_summary(out)["protocol"] != {**protocol, "num_images": len(images)}:
        return False
    scored = scores.read_cases(out / "cases.csv")
    truth = [scored.classes[label] for label in scored.truth]
    return scored.names == images.names and truth == [classes[label] for label in images.labels]


def evaluate_classification(weights: Path, data: Path, out: Path, device: str = "auto") -> dict[str, Any]:
    """Score a fine-tuned classifier on images in folders of their classes; writes the folder of scores.

    Args:
        weights: best.pth of a classification run, or the run folder.
        data: Folder with CLASS/IMAGE; a class may be missing.
        out: Folder to write to.
        device: "auto", or a device of torch.

    Returns:
        The summary of the scores.

    Raises:
        FileNotFoundError: There is no such folder, and what `load_classifier` raises.
        ValueError: A folder is no class, images are missing or unreadable, and what `load_classifier` raises.
    """
    network, config, classes, what = load_classifier(weights)
    processes = distributed.find_processes(device)
    images = decode_all(find_classes(data, classes), config)
    values = class_probabilities(network.to(processes.device), images, config, processes)
    scored = Classified(images.names, np.array(images.labels), values, classes)
    return write_scores(out, images, scored, protocol_of(config, what, str(data), "not on these images"))
