"""From weights to class probabilities: the trained classifier, its images, its probabilities."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import typed_values
from hyspark.data.batches.images import Normalisation, centre_crop, short_side
from hyspark.data.readers.images import FoundImages, ImageSet, decode
from hyspark.evaluation.network_kind import read_fine_tuned
from hyspark.models.classifier import build_classifier
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.training.labelled_images import unreadable_images_message
from hyspark.training.precision import autocast


class TrainedClassifier(NamedTuple):
    """A fine-tuned classifier on the CPU, in evaluation mode.

    Attributes:
        network: The network.
        config: Its settings.
        classes: Names of its classes, sorted.
        weights: Which weights of the run these are, in words.
    """

    network: nn.Module
    config: ClassificationConfig
    classes: tuple[str, ...]
    weights: str


def load_classifier(path: Path) -> TrainedClassifier:
    """Load the classifier that fine-tuning left in a file. Nothing stored in it is executed.

    Args:
        path: best.pth of a fine-tuning run, or the run folder.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The file is damaged, or holds no fine-tuned classifier.
    """
    file = read_fine_tuned(path, "classification")
    config = ClassificationConfig(**typed_values(file.contents["config"], ClassificationConfig, str(file.path)))
    classes = tuple(str(name) for name in file.contents["classes"])
    network = classifier_from_config(config, len(classes))
    file.load_weights(network)
    return TrainedClassifier(network.eval(), config, classes, str(file.contents["weights"]))


def classifier_from_config(config: ClassificationConfig, num_classes: int) -> nn.Module:
    """Build the network that the settings describe, randomly initialised by torch's generator."""
    return build_classifier(config.model, config.in_channels, num_classes, config.drop_path)


def scaling_from_config(config: ClassificationConfig) -> Normalisation:
    """Return how the settings scale pixels for the network."""
    return Normalisation(config.in_channels, config.mean, config.std)


def decode_all(found: FoundImages, config: ClassificationConfig) -> ImageSet:
    """Decode images into memory.

    Raises:
        ValueError: Images are unreadable; the message lists them all.
    """
    images, wrong = decode(found, short_side(config.crop_size))
    if wrong:
        raise ValueError(unreadable_images_message(wrong, len(found.names)))
    return images


def class_probabilities(
    network: nn.Module, images: ImageSet, config: ClassificationConfig, processes: Processes
) -> np.ndarray:
    """Compute the class probabilities of images, which the processes divide among themselves.

    Args:
        network: In evaluation mode, on the device of `processes`.
        images: n images.
        config: Settings of the network.
        processes: The processes of the run.

    Returns:
        float64 (n, classes), on all processes.
    """
    mine = range(processes.rank, len(images), processes.world_size)
    rows: list[tuple[int, list[float]]] = []
    with torch.no_grad():
        for start in range(0, len(mine), config.batch_size):
            indices = mine[start : start + config.batch_size]
            crops = [centre_crop(images.images[i], config.crop_size, scaling_from_config(config)) for i in indices]
            with autocast(processes, config.precision):
                scores = network(torch.stack(crops).to(processes.device))
            rows += zip(indices, scores.double().softmax(1).tolist(), strict=True)
    return np.array([row for _, row in sorted(distributed.gather_lists(rows, processes))])
