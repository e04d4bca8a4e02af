"""Class probabilities of images without known classes, as a table."""

from pathlib import Path
from typing import Any

import numpy as np

from hyspark.data.readers.images import FoundImages, class_folders, image_files, log_other_files
from hyspark.evaluation.classification.evaluate import evaluate_classification
from hyspark.evaluation.classification.inference import class_probabilities, decode_readable, load_classifier
from hyspark.evaluation.classification.scores import Classified, write_probabilities
from hyspark.evaluation.protocol import FAILED
from hyspark.evaluation.score_table import read_score_table
from hyspark.training import distributed
from hyspark.training.labelled_images import unreadable_images_message

PREDICTIONS = "predictions.csv"


def predict_classification(weights: Path, folder: Path, out: Path, device: str = "auto") -> tuple[Path, dict[str, str]]:
    """Write predictions.csv: each image's predicted class and the probability of each class.

    Args:
        weights: best.pth of a classification run, or the run folder.
        folder: Folder with images, at any depth.
        out: Folder to write to.
        device: "auto", or a device of torch.

    Returns:
        The path of predictions.csv, and the reasons of the images without a prediction, by name.

    Raises:
        FileNotFoundError: There is no such folder, and what `load_classifier` raises.
        ValueError: There are no images, all are unreadable, and what `load_classifier` raises.
    """
    network, config, classes, _ = load_classifier(weights)
    processes = distributed.find_processes(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that holds images")
    files = image_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no images (.png, .jpg, .tif, ...)")
    log_other_files(folder, files)
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    images, unreadable = decode_readable(FoundImages(names, (0,) * len(files), files), config)
    with distributed.join_process_group(processes):
        images, values, failed = class_probabilities(network.to(processes.device), images, config, processes)
    if not len(images):
        raise ValueError(unreadable_images_message(failed | unreadable, len(files)))
    if processes.is_main:
        write_predictions(out, Classified(images.names, np.array(images.labels), values, classes))
    return out / PREDICTIONS, unreadable | failed


def write_predictions(out: Path, images: Classified) -> None:
    """Write predictions.csv into a folder."""
    write_probabilities(out / PREDICTIONS, images, "predicted", images.probabilities.argmax(1))


def predict_and_score(
    weights: Path, folder: Path, out: Path, device: str = "auto"
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Write predictions.csv, and the scores if the folder's own folders are named as the classes.

    The arguments and errors are those of `predict_classification`.

    Returns:
        The summary of the scores, None without scores; and the reasons of the images without a prediction, by name.
    """
    classes = load_classifier(weights).classes
    folders = class_folders(folder) if folder.is_dir() else []
    if not folders or not set(folders) <= set(classes):
        return None, predict_classification(weights, folder, out, device)[1]
    summary = evaluate_classification(weights, folder, out, device)
    if distributed.find_processes(device).is_main:
        write_predictions(out, Classified.from_table(read_score_table(out / "cases.csv")))
    return summary, summary.get(FAILED, {})
