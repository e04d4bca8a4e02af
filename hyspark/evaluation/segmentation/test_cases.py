"""The test cases (`test_dir`), which a fine-tuning run is scored on once, with its last weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import failure_message
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.each_case import warn_of_failures
from hyspark.evaluation.segmentation.evaluate import are_cases_scored, score_cases
from hyspark.evaluation.segmentation.labelled_data import LabelledCases, check_classes, find_labelled
from hyspark.evaluation.segmentation.scoring_protocol import Source
from hyspark.training.distributed import Processes
from hyspark.training.labelled_cases import label_fault
from hyspark.training.run_volumes import SKIP_ADVICE, prepare_readable


@dataclass(frozen=True)
class HeldOut:
    """The test cases of a run; none if the settings name no folder.

    Attributes:
        volumes: The cases, prepared.
        cases: The cases.
        text: The cases, in words.
        failures: Reasons of the unreadable cases, by name.
    """

    volumes: Sequence[StoredVolume]
    cases: Sequence[Case]
    text: str
    failures: Mapping[str, str]


def find_held_out(config: SegmentationConfig, names: Sequence[str]) -> LabelledCases:
    """Find the cases of test_dir; none if the settings name no folder.

    Raises:
        FileNotFoundError: There are none in the folder.
        ValueError: Their classes are not those of the run.
    """
    if not config.test_dir:
        return LabelledCases([], None, "")
    folder = Path(config.test_dir)
    found = find_labelled(folder, "all", channels=config.image_channels)
    check_classes(names, found.labels, folder)
    return found


def prepare_held_out(config: SegmentationConfig, processes: Processes, names: Sequence[str]) -> HeldOut:
    """Find and prepare the cases of test_dir; unreadable ones stop the run or are excluded, as on_bad_case says.

    Raises:
        FileNotFoundError, ValueError: As `find_held_out`; or cases are unreadable.
    """
    found = find_held_out(config, names)
    if not found.cases:
        return HeldOut([], [], "", {})
    folder = Path(config.test_dir)
    readable = prepare_readable(config, processes, folder, found.cases, partial(label_fault, names=names))
    if readable.failed and (config.on_bad_case == "stop" or not readable.cases):
        advice = SKIP_ADVICE if readable.cases else ""
        raise ValueError(failure_message(readable.failed, len(found.cases), advice))
    return HeldOut(readable.volumes, readable.cases, found.text, readable.reasons)


def score_held_out(
    network: nn.Module,
    config: SegmentationConfig,
    names: Sequence[str],
    held_out: HeldOut,
    processes: Processes,
    weights: str,
    trained_on: Sequence[str],
) -> None:
    """Write scores_test in the run folder, unless it holds the scores of these weights and cases.

    Args:
        network: In evaluation mode, on the device of `processes`.
        config: Settings of the network.
        names: Its classes, background first.
        held_out: The test cases.
        processes: The processes of the run.
        weights: The weights, in words.
        trained_on: Digests of the images that the weights were trained on.
    """
    source = Source(weights, held_out.text, trained_on)
    out = config.run_folder / "scores_test"
    if held_out.cases and not are_cases_scored(out, config, names, held_out.cases, processes, source):
        given = (network, config, names, held_out.volumes, held_out.cases, out, processes, source)
        scored = score_cases(*given, failures=held_out.failures)
        if processes.is_main:
            warn_of_failures(scored.failures, len(held_out.cases) + len(held_out.failures), "scored")
