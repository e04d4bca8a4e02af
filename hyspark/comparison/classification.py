"""Classification runs compared: AUC, accuracy and F1, each computed anew in every resample of images and seeds."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.comparison.kind import RunKind
from hyspark.config.classification import ClassificationConfig
from hyspark.data.readers.images import has_test_split
from hyspark.evaluation.bootstrap import bootstrap_mean, num_resamples
from hyspark.evaluation.classification.evaluate import SCORE_FOLDERS
from hyspark.evaluation.classification.metrics import CLASSIFICATION_METRICS, resampled_metric
from hyspark.evaluation.classification.scores import Classified
from hyspark.evaluation.score_table import ScoreTable
from hyspark.models.weights.load import load_pretrained
from hyspark.tasks.classification import initialise_classifier
from hyspark.training.labelled_images import find_image_parts, read_images
from hyspark.utils.digests import content_digest, text_digest


class ClassificationRuns(RunKind):
    """Runs of `hyspark finetune-classifier`."""

    verb = "finetune-classifier"
    samples = "images"
    metrics = tuple(CLASSIFICATION_METRICS)
    shown = CLASSIFICATION_METRICS
    reading = """\
With two classes the AUC is that of the second in sorted order, with more the mean over each against the rest; F1 is the
mean over classes. Means are over seeds; in parentheses their range. A difference is over pairs: the same seed (so the
same training images, batches and random initialisation) and the same scored images on both sides. In brackets is its
95 % bootstrap interval: seeds and images are drawn anew with pairs kept, and the metric is computed anew on the drawn
ones; bold where it excludes 0. With few seeds it is too narrow where seeds differ more than images do, and with one
seed it holds for that seed alone. Images are taken to be independent: where several are of one patient, it is too
narrow."""
    scored_weights = {  # noqa: RUF012
        "test": "Scored are the best weights of each run, chosen by the accuracy on its validation images.",
        "validation": "Scored are the best weights of each run. These images chose the weights of each run, too, so "
        "that all values are optimistic.",
    }

    def scores_folder(self, config: ClassificationConfig) -> Path:
        has_test = bool(config.test_dir) or has_test_split(Path(config.data))
        return config.run_folder / SCORE_FOLDERS["test" if has_test else "val"]

    def samples_per_step(self, config: ClassificationConfig) -> int:
        return config.batch_size

    def num_training(self, config: ClassificationConfig) -> int:
        return len(find_image_parts(config)[0]["train"].names)

    def data_digest(self, config: ClassificationConfig) -> str:
        found, classes = find_image_parts(replace(config, num_labelled=0, label_fraction=1.0))
        lines = ["\n".join(classes)]
        for subset, images in found.items():
            rows = zip(map(image_digest, images.sources), images.names, images.labels, strict=True)
            lines += [subset, *(f"{digest} {name} {label}" for digest, name, label in rows)]
        return text_digest(lines)

    def check_data(self, configs: Sequence[ClassificationConfig], initial_weights: Mapping[str, str]) -> None:
        find_image_parts(min(configs, key=lambda config: config.num_labelled))  # not fewer images than classes
        largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
        for config in largest.values():
            images = read_images(config)
        for name, weights in initial_weights.items():
            if weights != "none":
                network = initialise_classifier(config, len(images.classes))
                print(f"initial weights {name}: {weights}\n{load_pretrained(network, weights, config.weights_key)}")

    def comparable(self, table: ScoreTable) -> ScoreTable:
        return table

    def names(self, cases: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        return {"images": cases}

    def mean(self, tables: Sequence[ScoreTable], metric: str, targets: Sequence[str]) -> dict[str, Any]:
        num = num_images(tables)
        by_seed = metric_by_run(tables, metric, np.ones((1, num)))[0]
        measure = partial(metric_by_run, tables, metric)
        found = bootstrap_mean(measure, len(tables), num, num_resamples=num_resamples(num))
        return asdict(found) | {"by_seed": by_seed}

    def difference(
        self, own: Sequence[ScoreTable], baseline: Sequence[ScoreTable], metric: str, targets: Sequence[str]
    ) -> dict[str, Any]:
        def measure(weights: np.ndarray) -> np.ndarray:
            return metric_by_run(own, metric, weights) - metric_by_run(baseline, metric, weights)

        num = num_images(own)
        return asdict(bootstrap_mean(measure, len(own), num, num_resamples=num_resamples(num)))


def metric_by_run(tables: Sequence[ScoreTable], metric: str, weights: np.ndarray) -> np.ndarray:
    """Compute a metric of each run in each resample of the images, (resamples, runs)."""
    runs = [Classified.from_table(table) for table in tables]
    columns = [resampled_metric(metric, run.truth, run.probabilities, weights) for run in runs]
    return np.stack(columns, 1) if columns else np.empty((len(weights), 0))


def num_images(tables: Sequence[ScoreTable]) -> int:
    """Return the number of images that each run was scored on."""
    return len(tables[0].cases) if tables else 0


def image_digest(source: Path | np.ndarray) -> str:
    """Compute a digest of an image's file or pixels."""
    if isinstance(source, Path):
        return content_digest(source)
    return hashlib.sha256(f"{source.shape}".encode() + source.tobytes()).hexdigest()
