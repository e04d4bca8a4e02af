"""Class probabilities of images without known classes, as a table."""

from pathlib import Path
from typing import Any

import numpy as np

from hyspark.data.readers.images import FoundImages, class_folders, image_files
from hyspark.evaluation.classification.evaluate import evaluate_classification
from hyspark.evaluation.classification.inference import class_probabilities, decode_all, load_classifier
from hyspark.evaluation.classification.scores import Classified, write_probabilities
from hyspark.evaluation.score_table import read_score_table
from hyspark.training import distributed


def predict_classification(weights: Path, folder: Path, out: Path, device: str = "auto") -> Path:
    """Write predictions.csv: each image's predicted class and the probability of each class.

    Args:
        weights: best.pth of a classification run, or the run folder.
        folder: Folder with images, at any depth.
        out: Folder to write to.
        device: "auto", or a device of torch.

    Returns:
        The path of predictions.csv.

    Raises:
        FileNotFoundError: There is no such folder, and what `load_classifier` raises.
        ValueError: There are no images, some are unreadable, and what `load_classifier` raises.
    """
    network, config, classes, _ = load_classifier(weights)
    processes = distributed.find_processes(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that holds images")
    files = image_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no images (.png, .jpg, .tif, ...)")
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    images = decode_all(FoundImages(names, (0,) * len(files), files), config)
    values = class_probabilities(network.to(processes.device), images, config, processes)
    return write_predictions(out, Classified(images.names, np.array(images.labels), values, classes))


def write_predictions(out: Path, images: Classified) -> Path:
    """Write predictions.csv into a folder; returns its path."""
    write_probabilities(out / "predictions.csv", images, "predicted", images.probabilities.argmax(1))
    return out / "predictions.csv"


def predict_and_score(weights: Path, folder: Path, out: Path, device: str = "auto") -> dict[str, Any] | None:
    """Write predictions.csv, and the scores if the folder's own folders are named as the classes.

    The arguments and errors are those of `predict_classification`.

    Returns:
        The summary of the scores; None without scores.
    """
    classes = load_classifier(weights).classes
    folders = class_folders(folder) if folder.is_dir() else []
    if not folders or not set(folders) <= set(classes):
        predict_classification(weights, folder, out, device)
        return None
    summary = evaluate_classification(weights, folder, out, device)
    write_predictions(out, Classified.from_table(read_score_table(out / "cases.csv")))
    return summary
