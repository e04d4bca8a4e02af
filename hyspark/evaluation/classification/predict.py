"""Class probabilities of images by a trained network: the network from its file, folders scored, and predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hyspark.config.classification import ClassifyConfig
from hyspark.config.recipes import typed_values
from hyspark.data.batches.images import Normalisation, centre_crop, short_side
from hyspark.data.readers.images import FoundImages, ImageSet, class_folders, decode, find_classes, image_files
from hyspark.evaluation.classification import scores
from hyspark.evaluation.classification.scores import Classified
from hyspark.evaluation.protocol import SCORE_FILES, TRAINED_ON
from hyspark.figures.mistakes import mistakes_figure
from hyspark.figures.panels import save_figure
from hyspark.models.classifier import build_classifier
from hyspark.models.weights.files import read_contents
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.training.labelled_images import Images, unusable
from hyspark.training.precision import autocast
from hyspark.utils.log import LOG

SCORES = {"val": "scores", "test": "scores_test"}
"""Folders of scores in a run, by the part that is scored."""
HEADINGS = {"val": "Validation images, best weights", "test": "Test images, best weights"}
SELECTION = {
    "val": "weights chosen by the accuracy on these same images, which is optimistic",
    "test": "weights chosen by the accuracy on the validation images",
}


def load_classifier(path: Path) -> tuple[nn.Module, ClassifyConfig, tuple[str, ...], str]:
    """A fine-tuned network on the CPU, in evaluation mode, its settings, its class names, and what its weights are.

    path: best.pth of a run of `finetune_classify`, or the run's folder. Nothing stored in it is executed. Raises
    FileNotFoundError; ValueError where the file is damaged or is no such network.
    """
    if path.is_dir() and not (path / "best.pth").is_file():
        raise FileNotFoundError(f"{path} holds no best.pth; is it a fine-tuning run that was validated?")
    path = path / "best.pth" if path.is_dir() else path
    contents = read_contents(path)
    if not isinstance(contents, Mapping) or not {"model", "config", "classes", "weights"} <= set(contents):
        raise ValueError(f"{path} is no fine-tuned classifier; give the best.pth of such a run, or its folder")
    config = ClassifyConfig(**typed_values(contents["config"], ClassifyConfig, str(path)))
    classes = tuple(str(name) for name in contents["classes"])
    network = network_of(config, len(classes))
    try:
        network.load_state_dict(contents["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights are not those of the network that its settings say ({error})") from error
    return network.eval(), config, classes, str(contents["weights"])


def network_of(config: ClassifyConfig, num_classes: int) -> nn.Module:
    """The network that the settings say, with fresh weights from torch's generator."""
    return build_classifier(config.model, config.channels, num_classes, config.drop_path)


def scaling_of(config: ClassifyConfig) -> Normalisation:
    """From pixels to what the network sees."""
    return Normalisation(config.channels, config.mean, config.std)


def probabilities(network: nn.Module, images: ImageSet, config: ClassifyConfig, processes: Processes) -> np.ndarray:
    """Probabilities float64 (n, classes) of images, each process doing its share; the network in evaluation mode."""
    mine = range(processes.rank, len(images), processes.world_size)
    rows: list[tuple[int, list[float]]] = []
    with torch.no_grad():
        for start in range(0, len(mine), config.batch_size):
            indices = mine[start : start + config.batch_size]
            crops = [centre_crop(images.images[i], config.input_size, scaling_of(config)) for i in indices]
            with autocast(processes, config.precision):
                scores = network(torch.stack(crops).to(processes.device))
            rows += zip(indices, scores.double().softmax(1).tolist(), strict=True)
    return np.array([row for _, row in sorted(distributed.gather(rows, processes))])


def protocol_of(config: ClassifyConfig, weights: str, images: str, selection: str) -> dict[str, Any]:
    """How images are scored, in plain values. selection: what the weights were chosen by."""
    edge = config.input_size
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


def score_best(config: ClassifyConfig, images: Images, processes: Processes) -> None:
    """Write the scores of the best weights, unless those of these images are there: of the validation images, then of
    the test images, which are looked at here alone.
    """
    network, _, classes, weights = load_classifier(config.run_folder)
    network.to(processes.device)
    for part in scored_parts(images.parts):
        out = config.run_folder / SCORES[part]
        where = config.test_dir if part == "test" and config.test_dir else f"{part} of {config.data_dir}"
        protocol = protocol_of(config, weights, where, SELECTION[part]) | {TRAINED_ON: len(images.parts["train"])}
        if is_scored(out, images.parts[part], classes, protocol):
            continue
        values = probabilities(network, images.parts[part], config, processes)
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


def decoded(found: FoundImages, config: ClassifyConfig) -> ImageSet:
    """Images in memory; raises ValueError that lists all that cannot be used."""
    images, wrong = decode(found, short_side(config.input_size))
    if wrong:
        raise ValueError(unusable(wrong, len(found.names)))
    return images


def classify(weights: Path, folder: Path, out: Path, device: str = "auto") -> dict[str, Any] | None:
    """Write predictions.csv for the images below a folder; where its folders are named as the classes are, scores, too,
    whose summary is returned.

    weights: of `load_classifier`, whose errors are raised. Raises FileNotFoundError and ValueError where there are no
    images, or some cannot be used.
    """
    network, config, classes, what = load_classifier(weights)
    processes = distributed.find_processes(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one that holds images")
    is_labelled = bool(class_folders(folder)) and set(class_folders(folder)) <= set(classes)
    if is_labelled:
        found = find_classes(folder, classes)
    else:
        files = image_files(folder)
        found = FoundImages(tuple(f.relative_to(folder).as_posix() for f in files), (0,) * len(files), files)
    if not found.names:
        raise ValueError(f"{folder} holds no images (.png, .jpg, .tif, ...)")
    images = decoded(found, config)
    values = probabilities(network.to(processes.device), images, config, processes)
    predicted = {"predicted": [classes[i] for i in values.argmax(1)]}
    scores.write_table(out / "predictions.csv", images.names, predicted, classes, values)
    if not is_labelled:
        return None
    scored = Classified(images.names, np.array(images.labels), values, classes)
    return write_scores(out, images, scored, protocol_of(config, what, str(folder), "not on these images"))
