"""Score a fine-tuned network on labelled cases; writes a folder of scores (see scores.py).

Cases are segmented, and their label maps are brought to the labels' own grid.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from torch import nn
from tqdm import tqdm

from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.shared import Precision
from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.readers.nifti import file_grid, read_label
from hyspark.evaluation.protocol import has_scores
from hyspark.evaluation.score_table import ScoreTable
from hyspark.evaluation.segmentation import inference
from hyspark.evaluation.segmentation.inference import Windows, class_scores, largest_components
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
from hyspark.figures.panels import save_figure, segmentation_panel
from hyspark.training import distributed
from hyspark.training import precision as training_precision
from hyspark.training.distributed import Processes
from hyspark.training.labelled_cases import check_labels
from hyspark.training.precision import autocast
from hyspark.training.run_volumes import prepare_volumes
from hyspark.utils.log import LOG
from hyspark.utils.text import listing


class Segmented(NamedTuple):
    """Label maps of a case, uint8.

    Attributes:
        prepared: On the prepared grid.
        on_file: On the grid of the case's file.
    """

    prepared: np.ndarray
    on_file: np.ndarray


def segment_case(
    network: nn.Module,
    volume: StoredVolume,
    case: Case,
    windows: Windows,
    processes: Processes,
    precision: Precision,
    largest_component: bool = False,
) -> Segmented:
    """Segment a prepared volume.

    Args:
        network: In evaluation mode, on the device of `processes`.
        volume: The case, prepared.
        case: The case.
        windows: The windows of the network.
        processes: The processes of the run.
        precision: Precision of the forward pass.
        largest_component: Whether only the largest component of each class is kept.
    """
    shape = volume.entry.shape
    image = torch.from_numpy(volume.read("image", (0,) * len(shape), shape))
    with autocast(processes, precision):
        scores = class_scores(network, image, windows, processes.device)
    labels = scores.max(0).indices.to(torch.uint8).numpy()
    on_file = inference.to_grid(scores, np.asarray(volume.entry.affine), *file_grid(case.image))
    if largest_component:
        return Segmented(*(largest_components(found, len(scores)) for found in (labels, on_file)))
    return Segmented(labels, on_file)


@dataclass(frozen=True)
class ScoredCase:
    """The scores of a case, with its prediction for a picture.

    Attributes:
        index: Index of the case in the list.
        organs: Scores of its organs.
        packed: Its label map on the prepared grid, uint8, compressed.
    """

    index: int
    organs: list[OrganScores]
    packed: bytes


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
) -> tuple[dict[str, Any], ScoreTable]:
    """Score labelled cases, which the processes divide among themselves; the main one writes the folder of scores.

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

    Returns:
        The summary (see `summarise_organs`) and the scores, on all processes.

    Raises:
        ValueError: A label holds a value that is no class.
    """
    scoring = scoring or Scoring()
    if processes.is_main and (seen := source.seen(cases)):
        LOG.warning(
            "%s: %d of %d were trained on (%s); scores on these say nothing of new cases",
            *(source.data, len(seen), len(cases), listing(seen)),
        )
    windows, precision = scoring.windows(config, names), training_precision.inference_precision(processes, config)
    mine = range(processes.rank, len(cases), processes.world_size)
    done: list[ScoredCase] = []
    for i in tqdm(mine, desc="score", unit="case", disable=not processes.is_main):
        label = cases[i].label
        assert label is not None
        truth = read_label(label, len(names), cases[i].ignore)
        found = segment_case(network, volumes[i], cases[i], windows, processes, precision, scoring.largest_component)
        organs = score_case(found.on_file, truth, len(names), voxel_sizes(file_grid(label)[1]), scoring.tolerance)
        done.append(ScoredCase(i, organs, zlib.compress(found.prepared.tobytes(), 1)))
    done = sorted(distributed.gather_lists(done, processes), key=lambda scored: scored.index)
    table = organ_score_table({cases[scored.index].name: scored.organs for scored in done}, names[1:])
    protocol = source.protocol(cases) | scoring.protocol(config, names, precision)
    if not processes.is_main:
        return summarise_organs(table, protocol), table
    for earlier in (path for title in PICTURED for path in out.glob(f"{title}_*.png")):
        earlier.unlink()
    for title, name in best_median_worst(table).items():
        scored = next(scored for scored in done if cases[scored.index].name == name)
        draw_scored(volumes[scored.index], scored, names, config.spacing, out / f"{title}_{name}.png", title)
    return write_segmentation_scores(out, table, protocol), table


def draw_scored(
    volume: StoredVolume,
    scored: ScoredCase,
    names: Sequence[str],
    spacing: tuple[float, float, float],
    path: Path,
    title: str,
) -> None:
    """Save the picture of a scored case."""
    prediction = np.frombuffer(zlib.decompress(scored.packed), np.uint8).reshape(volume.entry.shape)
    mean = mean_of([row.dice for row in scored.organs])
    heading = f"{volume.name}, {title} case: mean Dice {mean:.3f}"
    save_figure(case_panel(volume, prediction, names, spacing, heading), path)


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
        weights: best.pth of a fine-tuning run, or the run folder.
        data: Labelled data (see `find_labelled`).
        out: Folder to write to.
        part: Part of a data list (see `find_labelled`).
        scoring: How to score.
        device: "auto", or a device of torch.
        store_dir: Folder of prepared volumes; by default `prepared` in the data's folder.
        prepare_workers: Processes that prepare volumes; 0 takes one per core.

    Returns:
        The summary of the scores.

    Raises:
        FileNotFoundError: Weights or data are missing.
        PermissionError: The store cannot be written to.
        ValueError: Weights, data and settings do not fit each other.
    """
    network, config, names, trained_on = inference.load_network(weights)
    scoring = scoring or Scoring()
    scoring.windows(config, names)
    cases, labels, where = find_labelled(data, part)
    check_classes(names, labels, data)
    processes = distributed.find_processes(device)
    LOG.info("%d cases, %s, %d organs, on %s", len(cases), where, len(names) - 1, processes.device)
    settings = replace(config, store_dir=store_dir, prepare_workers=prepare_workers)
    with distributed.join_process_group(processes):
        volumes = prepare_volumes(settings, processes, data, cases)
        check_labels(volumes, names)
        network = network.to(processes.device)
        given = (network, config, names, volumes, cases, out, processes)
        summary, _ = score_cases(*given, Source(str(weights), where, trained_on), scoring)
    return summary
