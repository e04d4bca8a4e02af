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
from hyspark.data.datasets import datalist_json, nnunet
from hyspark.data.datasets.cases import Case, cases_digest, common_labels
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.readers.nifti import file_grid, read_label
from hyspark.evaluation.protocol import DATA_DIGEST, TRAINED_ON, has_scores
from hyspark.evaluation.score_table import ScoreTable
from hyspark.evaluation.segmentation import inference
from hyspark.evaluation.segmentation.inference import Windows, class_scores, largest_components
from hyspark.evaluation.segmentation.metrics import OrganScores, score_case
from hyspark.evaluation.segmentation.scores import (
    PICTURED,
    best_median_worst,
    mean_of,
    organ_score_table,
    summarise_organs,
    write_segmentation_scores,
)
from hyspark.figures.panels import save_figure, segmentation_panel
from hyspark.training import distributed
from hyspark.training import precision as training_precision
from hyspark.training.distributed import Processes
from hyspark.training.labelled_cases import check_labels
from hyspark.training.precision import autocast
from hyspark.training.run_volumes import prepare_volumes
from hyspark.utils.digests import content_digest
from hyspark.utils.log import LOG
from hyspark.utils.text import listing

NSD_TOLERANCE = 2.0
"""Tolerance of the normalised surface Dice, in mm."""


@dataclass(frozen=True)
class Scoring:
    """Settings of segmenting and scoring cases.

    Attributes:
        overlap: Fraction by which windows overlap; None takes that of the network's settings.
        flips: Axes of the flips to average over (see `Windows`).
        largest_component: Whether only the largest component of each class is kept.
        tolerance: Tolerance of the normalised surface Dice, in mm.
    """

    overlap: float | None = None
    flips: tuple[int, ...] = ()
    largest_component: bool = False
    tolerance: float = NSD_TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be above 0 mm, but it is {self.tolerance}")

    def windows(self, config: SegmentationConfig, names: Sequence[str]) -> Windows:
        """Return the windows of a network with these settings and classes; raises as `windows_from_config`."""
        overlap = config.infer_overlap if self.overlap is None else self.overlap
        return inference.windows_from_config(config, names, overlap, self.flips)

    def protocol(self, config: SegmentationConfig, names: Sequence[str], precision: str) -> dict[str, Any]:
        """Describe in plain values how cases are scored, network's settings included."""
        windows = self.windows(config, names)
        return {
            "spacing_mm": list(config.spacing),
            "hu_window": [config.hu_min, config.hu_max],
            "window_size": list(windows.size),
            "overlap": windows.overlap,
            "blending": "Gaussian",
            "flips": list(windows.flips) or "none",
            "post_processing": "largest component of each class" if self.largest_component else "none",
            "precision": precision,
            "scored_on": "the label's own grid",
            "resampling": "class scores linearly, then the likeliest class",
            "nsd_tolerance_mm": self.tolerance,
        }


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
class Source:
    """Weights and data that scores are of.

    Attributes:
        weights: The weights, in words.
        data: The cases, in words.
        trained_on: Digests (`content_digest`) of the images that the weights were trained on; empty if unknown.
    """

    weights: str
    data: str
    trained_on: Sequence[str]

    def seen(self, cases: Sequence[Case]) -> list[str]:
        """Return the names of the cases that are known to have been trained on."""
        known = set(self.trained_on)
        return [case.name for case in cases if content_digest(case.image) in known] if known else []

    def protocol(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Describe the source in plain values, with a digest of the cases' names and files."""
        return {
            "weights": self.weights,
            TRAINED_ON: len(self.trained_on) or "unknown",
            "data": self.data,
            DATA_DIGEST: cases_digest(cases),
            "scored_cases_trained_on": len(self.seen(cases)) if self.trained_on else "unknown",
        }


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
        truth = read_label(label, len(names))
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


class LabelledCases(NamedTuple):
    """Labelled cases.

    Attributes:
        cases: The cases.
        labels: Values by class name; None if the data does not name its classes.
        text: The cases, in words.
    """

    cases: list[Case]
    labels: dict[str, int] | None
    text: str


def find_labelled(data: Path, part: str = "") -> LabelledCases:
    """Find labelled cases on the disk.

    Args:
        data: A decathlon JSON, an nnU-Net data set (imagesTr, labelsTr), or a folder of such data sets. All labelled
            cases of folders are taken.
        part: Part of a JSON: "training", "validation" or "all". By default "validation", or "all" if it lists none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no such cases, or two of one name.
    """
    if data.is_file():
        listed = datalist_json.read_datalist(data, require_labels=True)
        part = part or ("validation" if listed.validation else "all")
        parts = {"training": listed.training, "validation": listed.validation}
        cases = [case for name, found in parts.items() if part in (name, "all") for case in found]
        if not cases:
            raise ValueError(f"{data} lists no {part} cases")
        return LabelledCases(cases, listed.labels, f"{part} cases of {data}")
    if data.suffix == ".json":
        raise FileNotFoundError(f"{data}: no such file; expected a decathlon JSON")
    if part not in ("", "all"):
        raise ValueError(f"--part {part}: expected a decathlon JSON, got the folder {data}; drop --part")
    if (data / "imagesTr").is_dir():
        found = nnunet.dataset_cases(data.absolute(), labels=True, channel="0000")
        cases = nnunet.only_labelled(found, data)
    else:
        cases = nnunet.scan_cases(data, labels=True)
    if len({case.name for case in cases}) < len(cases):
        raise ValueError(f"{data} holds data sets with cases of one name; score one data set at a time")
    labels = common_labels(sorted({case.image.parent.parent for case in cases}))
    return LabelledCases(cases, labels, f"all labelled cases of {data}")


def check_classes(names: Sequence[str], labels: dict[str, int] | None, data: Path) -> None:
    """Compare the classes of the data with those of the network; class_N is no name.

    Raises:
        ValueError: They give different names to one value.
    """
    for name, value in (labels or {}).items():
        own = names[value] if value < len(names) else "none"
        if normalised_name(own) != normalised_name(name) and f"class_{value}" not in (own, name):
            raise ValueError(
                f"{data}: the value {value} is {name!r} there, but {own!r} for the network, whose classes are "
                f"{', '.join(names)}"
            )


def normalised_name(name: str) -> str:
    """Write a class name in lower case, with spaces for - and _."""
    return name.lower().replace("_", " ").replace("-", " ")
