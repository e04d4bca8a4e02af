"""Classification runs from several starts compared, as segmentation.py does it for segmentation.

AUC, accuracy and F1 come with intervals over images and seeds, for which each is computed anew in every resample, and
differences are between pairs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.comparison.bootstrap import NUM_RESAMPLES, estimate
from hyspark.comparison.report import write_class_benefit
from hyspark.comparison.table import Kind, Place, budget, by_name, steps_and_seconds, tabulate
from hyspark.config.classification import ClassificationConfig
from hyspark.data.readers.images import has_test_split
from hyspark.evaluation.classification.evaluate import SCORES
from hyspark.evaluation.classification.metrics import METRICS, resampled
from hyspark.evaluation.classification.scores import Classified, read_cases, read_summary
from hyspark.models.weights.load import load_pretrained
from hyspark.tasks.classification import initialise_classifier
from hyspark.training.labelled_images import find_image_parts, read_images
from hyspark.utils.digests import content_digest, text_digest

MOST_DRAWS = 10_000_000
"""Images in all resamples together."""
LEAST_RESAMPLES = 1000


@dataclass(frozen=True)
class ClassifiedRun:
    """A finished run: its scored images, how they were scored, steps and seconds of training."""

    scored: Classified
    protocol: Mapping[str, Any]
    steps: int
    seconds: float


def read_classified(scores: Path, metrics: Path, images_per_step: int) -> ClassifiedRun:
    """A run from its scores' folder (cases.csv, summary.json) and its metrics.jsonl.

    Raises FileNotFoundError where a file is missing; ValueError, naming the file, where it is of another kind.
    """
    protocol = read_summary(scores)["protocol"]
    return ClassifiedRun(read_cases(scores / "cases.csv"), protocol, *steps_and_seconds(metrics, images_per_step))


def compare_classified(
    runs: Mapping[Place, ClassifiedRun], planned: Sequence[Place], starts: Mapping[str, str]
) -> dict[str, Any]:
    """All numbers of a comparison, as `comparison.compare` has them.

    Raises ValueError where runs were not scored on the same images.
    """
    names: tuple[str, ...] = ()
    for place, run in runs.items():
        names = names or run.scored.names
        if run.scored.names != names:
            raise ValueError(f"{place.start}, seed {place.seed}: scored on other images than the runs before it")
    return tabulate(runs, planned, starts, describe, differ, images=list(names))


def describe(runs: Mapping[int, ClassifiedRun]) -> dict[str, Any]:
    """Of one start and number of labels: each metric's mean with interval, and by seed; steps and minutes of a run."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        num = num_images(runs.values())
        whole = measures(runs.values(), metric, np.ones((1, num)))[0]
        mean = estimate(partial(measures, list(runs.values()), metric), len(runs), num, num_resamples=resamples(num))
        found[metric] = asdict(mean) | {"by_seed": by_name(map(str, runs), whole)}
    return found | budget(runs)


def differ(own: Mapping[int, ClassifiedRun], other: Mapping[int, ClassifiedRun]) -> dict[str, Any]:
    """One start minus another, by seed, on the same images: each metric with its interval."""
    both = [seed for seed in own if seed in other]
    sides = [[side[seed] for seed in both] for side in (own, other)]

    def difference(metric: str, weights: np.ndarray) -> np.ndarray:
        a, b = (measures(side, metric, weights) for side in sides)
        return a - b

    num = num_images(sides[0])
    options = {"num_resamples": resamples(num)}
    return {metric: asdict(estimate(partial(difference, metric), len(both), num, **options)) for metric in METRICS}


def measures(runs: Iterable[ClassifiedRun], metric: str, weights: np.ndarray) -> np.ndarray:
    """A metric of each run in each resample of the images, (resamples, runs)."""
    columns = [resampled(metric, run.scored.truth, run.scored.probabilities, weights) for run in runs]
    return np.stack(columns, 1) if columns else np.empty((len(weights), 0))


def resamples(num: int) -> int:
    """How many resamples: fewer of many images, which take memory and time."""
    return min(NUM_RESAMPLES, max(LEAST_RESAMPLES, MOST_DRAWS // max(1, num)))


def num_images(runs: Iterable[ClassifiedRun]) -> int:
    """Images that each run was scored on."""
    return next((len(run.scored.names) for run in runs), 0)


def scores_folder(config: ClassificationConfig) -> Path:
    """Of the test part, or test_dir, where there is one, else of the validation images."""
    return config.run_folder / SCORES["test" if config.test_dir or has_test_split(Path(config.data)) else "val"]


def num_training(config: ClassificationConfig) -> int:
    """Training images."""
    return len(find_image_parts(config)[0]["train"].names)


def digest(config: ClassificationConfig) -> str:
    """Of the names, classes and files of all images, in 12 digits."""
    found, classes = find_image_parts(replace(config, num_labelled=0, label_fraction=1.0))
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


def check_data(configs: Sequence[ClassificationConfig], starts: Mapping[str, str]) -> None:
    """Look at all images that the runs need, and load each start once.

    Raises ValueError or FileNotFoundError for data or weights that do not fit.
    """
    find_image_parts(min(configs, key=lambda config: config.num_labelled))  # not fewer images than classes
    largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
    for config in largest.values():
        images = read_images(config)
    for name, weights in starts.items():
        if weights != "none":
            network = initialise_classifier(config, len(images.classes))
            print(f"start {name}: {weights}\n{load_pretrained(network, weights)}")


def report(
    out: Path,
    finished: Mapping[Place, ClassificationConfig],
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
