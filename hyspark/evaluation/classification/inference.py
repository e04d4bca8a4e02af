"""From weights to class probabilities: the trained classifier, its images, its probabilities."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import typed_values
from hyspark.data.batches.images import Normalisation, centre_crop, short_side
from hyspark.data.readers.images import FoundImages, ImageSet, decode
from hyspark.evaluation.each_case import Failed
from hyspark.evaluation.failures import case_failure
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
    return build_classifier(config.model, config.in_channels, num_classes, config.drop_path, config.crop_size)


def scaling_from_config(config: ClassificationConfig) -> Normalisation:
    """Return how the settings scale pixels for the network."""
    return Normalisation(config.in_channels, config.mean, config.std)


def decode_readable(found: FoundImages, config: ClassificationConfig) -> tuple[ImageSet, dict[str, str]]:
    """Decode images into memory.

    Returns:
        The readable images, and the reasons of the others, by name.

    Raises:
        ValueError: None is readable; the message lists them all.
    """
    images, wrong = decode(found, short_side(config.crop_size))
    if not len(images):
        raise ValueError(unreadable_images_message(wrong, len(found.names)))
    return images, wrong


def class_probabilities(
    network: nn.Module, images: ImageSet, config: ClassificationConfig, processes: Processes
) -> tuple[ImageSet, np.ndarray, dict[str, str]]:
    """Compute the class probabilities of images, which the processes divide among themselves.

    An image that fails, for whatever reason, stops no other.

    Args:
        network: In evaluation mode, on the device of `processes`.
        images: n images.
        config: Settings of the network.
        processes: The processes of the run.

    Returns:
        On all processes: the images that did not fail, their probabilities, float64 (n, classes), and the reasons of
        the others, by name.
    """
    mine = range(processes.rank, len(images), processes.world_size)
    batches = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]

    def classify_mine() -> list[tuple[int, list[float] | Failed]]:
        return [pair for indices in batches for pair in classify_batch(network, images, indices, config, processes)]

    found = dict(sorted(distributed.run_and_gather(classify_mine, processes), key=lambda pair: pair[0]))
    rows = {i: row for i, row in found.items() if not isinstance(row, Failed)}
    failures = {images.names[i]: row.reason for i, row in found.items() if isinstance(row, Failed)}
    values = np.array(list(rows.values())).reshape(len(rows), -1 if rows else 0)
    return (images.take(list(rows)) if failures else images), values, failures


@torch.no_grad()
def classify_batch(
    network: nn.Module, images: ImageSet, indices: Sequence[int], config: ClassificationConfig, processes: Processes
) -> list[tuple[int, list[float] | Failed]]:
    """Classify images in one batch; if that fails, one by one, so that the others are done.

    Args:
        network: In evaluation mode, on the device of `processes`.
        images: All images.
        indices: Which of them to classify.
        config: Settings of the network.
        processes: The processes of the run.

    Returns:
        For each index, the class probabilities, or why there are none.
    """
    try:
        crops = [centre_crop(images.images[i], config.crop_size, scaling_from_config(config)) for i in indices]
        with autocast(processes, config.precision):
            scores = network(torch.stack(crops).to(processes.device))
        return list(zip(indices, scores.double().softmax(1).tolist(), strict=True))
    except Exception as error:
        if len(indices) == 1:
            return [(indices[0], Failed(case_failure(error)))]
    return [pair for i in indices for pair in classify_batch(network, images, [i], config, processes)]
