"""Class probabilities of images without known classes, as a table."""

from pathlib import Path
from typing import Any

from hyspark.data.readers.images import FoundImages, class_folders, image_files
from hyspark.evaluation.classification.evaluate import evaluate_classification
from hyspark.evaluation.classification.inference import class_probabilities, decode_all, load_classifier
from hyspark.evaluation.classification.scores import read_cases, write_table
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
    found = FoundImages(tuple(f.relative_to(folder).as_posix() for f in files), (0,) * len(files), files)
    images = decode_all(found, config)
    values = class_probabilities(network.to(processes.device), images, config, processes)
    predicted = {"predicted": [classes[i] for i in values.argmax(1)]}
    write_table(out / "predictions.csv", images.names, predicted, classes, values)
    return out / "predictions.csv"


def classify(weights: Path, folder: Path, out: Path, device: str = "auto") -> dict[str, Any] | None:
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
    scored = read_cases(out / "cases.csv")
    predicted = {"predicted": [scored.classes[i] for i in scored.probabilities.argmax(1)]}
    write_table(out / "predictions.csv", scored.names, predicted, scored.classes, scored.probabilities)
    return summary
