"""Further labelled cases (`test_dir`) that a fine-tuning run is scored on once, with its last weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.segmentation.evaluate import Source, check_classes, find_labelled, is_scored, score_cases
from hyspark.training.distributed import Processes
from hyspark.training.labelled_cases import check_labels
from hyspark.training.run_volumes import prepare_volumes


@dataclass(frozen=True)
class HeldOut:
    """Prepared cases; none where the settings name no folder. text: what they are, in words."""

    volumes: Sequence[StoredVolume]
    cases: Sequence[Case]
    text: str


def prepare_held_out(config: SegmentationConfig, processes: Processes, names: Sequence[str]) -> HeldOut:
    """The cases of test_dir.

    Raises ValueError or FileNotFoundError where there are none, or their classes are others than the run's.
    """
    if not config.test_dir:
        return HeldOut([], [], "")
    folder = Path(config.test_dir)
    found = find_labelled(folder, "all")
    check_classes(names, found.labels, folder)
    volumes = prepare_volumes(config, processes, folder, found.cases)
    check_labels(volumes, names)
    return HeldOut(volumes, found.cases, found.text)


def score_held_out(
    network: nn.Module,
    config: SegmentationConfig,
    names: Sequence[str],
    held_out: HeldOut,
    processes: Processes,
    weights: str,
    trained_on: Sequence[str],
) -> None:
    """Write scores_test in the run's folder, unless it holds the scores of these weights and cases already.

    weights, trained_on: as in `Source`; the rest as in `score_cases`.
    """
    source = Source(weights, held_out.text, trained_on)
    out = config.run_folder / "scores_test"
    if held_out.cases and not is_scored(out, config, names, held_out.cases, processes, source):
        score_cases(network, config, names, held_out.volumes, held_out.cases, out, processes, source)
