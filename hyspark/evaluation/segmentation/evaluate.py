"""Score a fine-tuned network on labelled cases; writes a folder of scores (see scores.py).

Cases are segmented, and their label maps are brought to the labels' own grid.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from torch import nn

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.preprocessing.prepare import failure_message
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.readers.nifti import read_label
from hyspark.evaluation.each_case import work_on_each
from hyspark.evaluation.failures import case_failure
from hyspark.evaluation.protocol import has_scores
from hyspark.evaluation.score_table import ScoreTable
from hyspark.evaluation.segmentation import inference
from hyspark.evaluation.segmentation.label_grids import LabelMaps, label_dtype
from hyspark.evaluation.segmentation.labelled_data import check_classes, find_labelled
from hyspark.evaluation.segmentation.metrics import OrganScores, score_case
from hyspark.evaluation.segmentation.scores import (
    PICTURED,
    best_median_worst,
    mean_of,
    organ_score_table,
    summarise_organs,
    write_segmentation_scores,
)
from hyspark.evaluation.segmentation.scoring_protocol import Scoring, Source
from hyspark.evaluation.segmentation.segmenter import VolumeSegmenter
from hyspark.figures.panels import save_figure, segmentation_panel
from hyspark.training import distributed
from hyspark.training import precision as training_precision
from hyspark.training.distributed import Processes, gather_lists
from hyspark.training.labelled_cases import label_fault
from hyspark.training.run_volumes import prepare_readable
from hyspark.utils.log import LOG
from hyspark.utils.text import listing


class ScoredCases(NamedTuple):
    """Scores of labelled cases.

    Attributes:
        summary: The content of summary.json, see `summarise_organs`.
        table: The scores of the cases that were scored.
        failures: Reasons of the others, by name.
    """

    summary: dict[str, Any]
    table: ScoreTable
    failures: dict[str, str]


class CaseScore(NamedTuple):
    """The scores of a case, with its prediction for a picture.

    Attributes:
        organs: Scores of its organs.
        prepared: Its label map on the prepared grid.
    """

    organs: list[OrganScores]
    prepared: np.ndarray


def score_volume(
    segmenter: VolumeSegmenter, volume: StoredVolume, case: Case, num_classes: int, tolerance: float
) -> CaseScore:
    """Segment a prepared volume, and score it on the grid of its label.

    Args:
        segmenter: The network, and how to segment.
        volume: The case, prepared.
        case: The case, labelled.
        num_classes: Number of classes, background included.
        tolerance: Tolerance of the normalised surface Dice, in mm.
    """
    assert case.label is not None
    truth = read_label(case.label, case.image, num_classes, case.ignore)
    found = segment_stored(segmenter, volume, case)
    organs = score_case(found.on_file, truth.voxels, num_classes, voxel_sizes(truth.affine), tolerance)
    return CaseScore(organs, found.prepared)


def segment_stored(segmenter: VolumeSegmenter, volume: StoredVolume, case: Case) -> LabelMaps:
    """Segment a case whose volume is prepared."""
    return segmenter.segment(volume.read_whole(), volume.maps, np.asarray(volume.entry.affine), case.image)


def are_cases_scored(
    out: Path,
    config: SegmentationConfig,
    names: Sequence[str],
    cases: Sequence[Case],
    processes: Processes,
    source: Source,
) -> bool:
    """Check that a folder holds what `score_cases` would write with these arguments.

    All processes get the answer of the main one.
    """
    missing = False
    if processes.is_main:
        missing = not has_scores(out, source.protocol(cases) | Scoring().protocol(config, names, ""))
    return not distributed.any_process(missing, processes)


def score_cases(
    network: nn.Module,
    config: SegmentationConfig,
    names: Sequence[str],
    volumes: Sequence[StoredVolume],
    cases: Sequence[Case],
    out: Path,
    processes: Processes,
    source: Source,
    scoring: Scoring | None = None,
    failures: Mapping[str, str] | None = None,
) -> ScoredCases:
    """Score labelled cases, which the processes divide among themselves; the main one writes the folder of scores.

    A case that fails, for whatever reason, stops no other; it is named in the summary.

    Args:
        network: In evaluation mode, on the device of `processes`.
        config: Settings of the network.
        names: Its classes, background first.
        volumes: The cases, prepared.
        cases: The cases.
        out: The folder of scores.
        processes: The processes of the run.
        source: The weights and the data.
        scoring: How to score; by default as training does.
        failures: Reasons of further cases, which were not prepared.

    Returns:
        The scores, on all processes.
    """
    scoring = scoring or Scoring()
    if processes.is_main and (seen := source.seen(cases)):
        LOG.warning(
            "%s: %d of %d were trained on (%s); scores on these say nothing of new cases",
            *(source.data, len(seen), len(cases), listing(seen)),
        )
    windows, precision = scoring.windows(config, names), training_precision.inference_precision(processes, config)
    options = (scoring.largest_component, scoring.memory)
    segmenter = VolumeSegmenter(network, len(names), windows, processes, precision, out, *options)
    packed: dict[int, bytes] = {}

    def score(index: int) -> list[OrganScores]:
        scored = score_volume(segmenter, volumes[index], cases[index], len(names), scoring.tolerance)
        packed[index] = zlib.compress(scored.prepared.tobytes(), 1)
        return scored.organs

    done, failed = work_on_each([case.name for case in cases], score, processes, "score")
    failed = {**(failures or {}), **failed}
    table = organ_score_table({cases[i].name: organs for i, organs in done.items()}, names[1:])
    protocol = source.protocol([cases[i] for i in done]) | scoring.protocol(config, names, precision)
    indices = {cases[i].name: i for i in done}
    pictured = {title: indices[name] for title, name in best_median_worst(table).items()}
    # Label maps stay with the process that made them, except the few to be drawn.
    maps = dict(gather_lists([(i, packed[i]) for i in set(pictured.values()) if i in packed], processes))
    if not processes.is_main:
        return ScoredCases(summarise_organs(table, protocol, failed), table, failed)
    for earlier in (path for title in PICTURED for path in out.glob(f"{title}_*.png")):
        earlier.unlink()
    for title, i in pictured.items():
        path = out / f"{title}_{cases[i].name}.png"
        prediction = np.frombuffer(zlib.decompress(maps[i]), label_dtype(len(names)))
        draw_scored(volumes[i], done[i], prediction, names, config.spacing, path, title)
    return ScoredCases(write_segmentation_scores(out, table, protocol, failed), table, failed)


def draw_scored(
    volume: StoredVolume,
    organs: Sequence[OrganScores],
    prediction: np.ndarray,
    names: Sequence[str],
    spacing: tuple[float, float, float],
    path: Path,
    title: str,
) -> None:
    """Save the picture of a scored case; a failure is a warning, since the scores do not depend on it."""
    heading = f"{volume.name}, {title} case: mean Dice {mean_of([row.dice for row in organs]):.3f}"
    try:
        panel = case_panel(volume, prediction.reshape(volume.entry.shape), names, spacing, heading)
        save_figure(panel, path)
    except Exception as error:
        LOG.warning("%s: no picture (%s)", path, case_failure(error))


def case_panel(
    volume: StoredVolume, prediction: np.ndarray, names: Sequence[str], spacing: tuple[float, float, float], title: str
) -> Figure:
    """Draw image, truth and prediction of a labelled volume.

    Args:
        volume: The volume.
        prediction: uint8 (h, w, d), on its prepared grid.
        names: The classes, background first.
        spacing: Edges of a voxel in mm.
        title: Title of the picture.
    """
    shape = volume.entry.shape
    image, truth = (volume.read(array, (0,) * len(shape), shape) for array in ("image", "label"))
    truth[truth == UNANNOTATED] = 0
    return segmentation_panel(image, truth, prediction, names, title=title, spacing=spacing)


def evaluate_segmentation(
    weights: Path,
    data: Path,
    out: Path,
    *,
    part: str = "",
    scoring: Scoring | None = None,
    device: str = "auto",
    store_dir: str = "",
    prepare_workers: int = 0,
) -> dict[str, Any]:
    """Score a fine-tuned network on labelled cases; writes the folder of scores.

    Args:
        weights: The network's file or folder, see `load_network`.
        data: Labelled data (see `find_labelled`).
        out: Folder to write to.
        part: Part of a data list (see `find_labelled`).
        scoring: How to score.
        device: "auto", or a device of torch.
        store_dir: Folder of prepared volumes; by default `prepared` in the data's folder.
        prepare_workers: Processes that prepare volumes; 0 takes one per core.

    Returns:
        The summary of the scores, with the cases that were not scored.

    Raises:
        FileNotFoundError: Weights or data are missing.
        PermissionError: The store cannot be written to.
        ValueError: Weights, data and settings do not fit each other, or no case was scored.
    """
    network, config, names, trained_on = inference.load_network(weights)
    scoring = scoring or Scoring()
    scoring.windows(config, names)
    fold = None if part == "all" else config.fold
    cases, labels, where = find_labelled(data, part, fold, config.image_channels)
    check_classes(names, labels, data)
    processes = distributed.find_processes(device)
    LOG.info("%d cases, %s, %d organs, on %s", len(cases), where, len(names) - 1, processes.device)
    settings = replace(config, store_dir=store_dir, prepare_workers=prepare_workers)
    with distributed.join_process_group(processes):
        readable = prepare_readable(settings, processes, data, cases, partial(label_fault, names=names))
        if not readable.volumes:
            raise ValueError(failure_message(readable.failed, len(cases)))
        network = network.to(processes.device)
        given = (network, config, names, readable.volumes, readable.cases, out, processes)
        found = score_cases(*given, Source(str(weights), where, trained_on), scoring, readable.reasons)
    if not found.table.cases:
        raise ValueError("no case was scored:" + "".join(f"\n  {name}: {why}" for name, why in found.failures.items()))
    return found.summary
