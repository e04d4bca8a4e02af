"""Score a fine-tuned network on labelled cases: segment them, bring the label maps to the labels' own grid, write a
folder of scores (see scores.py). In training, Dice alone.
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
from hyspark.evaluation.protocol import DATA_DIGEST, SCORE_FILES, TRAINED_ON
from hyspark.evaluation.segmentation import inference, scores
from hyspark.evaluation.segmentation import scores as segmentation_scores
from hyspark.evaluation.segmentation.inference import Windows, class_scores, largest_components
from hyspark.evaluation.segmentation.metrics import OrganScores, score_case
from hyspark.evaluation.segmentation.scores import read_cases
from hyspark.figures.panels import save_figure, segmentation_panel
from hyspark.training import distributed
from hyspark.training import precision as training_precision
from hyspark.training.distributed import Processes
from hyspark.training.labelled_cases import check_labels
from hyspark.training.precision import autocast
from hyspark.training.run_volumes import prepare_volumes
from hyspark.utils.atomic import to_json
from hyspark.utils.digests import content_digest
from hyspark.utils.log import LOG
from hyspark.utils.text import listing

TOLERANCE = 2.0
"""Of the normalised surface Dice, in mm."""


@dataclass(frozen=True)
class Scoring:
    """How cases are segmented and scored. overlap: of windows; that of the network's settings where it is None. flips:
    see `Windows`. tolerance: of the normalised surface Dice, in mm.
    """

    overlap: float | None = None
    flips: tuple[int, ...] = ()
    largest_component: bool = False
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be above 0 mm, but it is {self.tolerance}")

    def windows(self, config: SegmentationConfig, names: Sequence[str]) -> Windows:
        """The windows for a network with these settings and classes; raises ValueError for what does not fit it."""
        overlap = config.infer_overlap if self.overlap is None else self.overlap
        return inference.windows_of(config, names, overlap, self.flips)

    def protocol(self, config: SegmentationConfig, names: Sequence[str], precision: str) -> dict[str, Any]:
        """All of it in plain values, with what the network's settings decide."""
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


SPELLING = ("data", "precision")
"""Of a protocol: where the same data lies, and what the machine computes in, for which nothing is scored again."""


class Segmented(NamedTuple):
    """Label maps of a case, uint8: on the prepared grid, and on the grid of its file."""

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
    """Segment a prepared volume. network: on the processes' device, in evaluation mode."""
    shape = volume.entry.shape
    image = torch.from_numpy(volume.read("image", (0,) * len(shape), shape))
    with autocast(processes, precision):
        scores = class_scores(network, image, windows, processes.device)
    labels = scores.max(0).indices.to(torch.uint8).numpy()
    on_file = inference.to_grid(scores, np.asarray(volume.entry.affine), *file_grid(case.image))
    if largest_component:
        return Segmented(*(largest_components(part, len(scores)) for part in (labels, on_file)))
    return Segmented(labels, on_file)


@dataclass(frozen=True)
class Source:
    """What scores are of. weights, data: what the protocol calls them. trained_on: digests (`content_digest`) of the
    images that the weights were trained on; none where that is not known.
    """

    weights: str
    data: str
    trained_on: Sequence[str]

    def seen(self, cases: Sequence[Case]) -> list[str]:
        """Names of the cases that are known to have been trained on."""
        known = set(self.trained_on)
        return [case.name for case in cases if content_digest(case.image) in known] if known else []

    def protocol(self, cases: Sequence[Case]) -> dict[str, Any]:
        """All of it in plain values, with a digest of the cases' names and files."""
        return {
            "weights": self.weights,
            TRAINED_ON: len(self.trained_on) or "unknown",
            "data": self.data,
            DATA_DIGEST: cases_digest(cases),
            "scored_cases_trained_on": len(self.seen(cases)) if self.trained_on else "unknown",
        }


@dataclass(frozen=True)
class Scored:
    """What is kept of a case: its place in the list, its scores, its label map on the prepared grid, compressed."""

    index: int
    organs: list[OrganScores]
    packed: bytes


def is_scored(
    out: Path,
    config: SegmentationConfig,
    names: Sequence[str],
    cases: Sequence[Case],
    processes: Processes,
    source: Source,
) -> bool:
    """Whether the folder `out` holds what `score_cases` would write with these arguments; on all processes what the
    main one finds.
    """
    missing = False
    if processes.is_main:
        wanted = source.protocol(cases) | Scoring().protocol(config, names, "")
        has_files = all((out / name).is_file() for name in SCORE_FILES)
        known = scores.read_summary(out)["protocol"] if has_files else {}
        missing = any(known.get(name) != to_json(value) for name, value in wanted.items() if name not in SPELLING)
    return not distributed.any_process(missing, processes)


def have_same_cases(folders: Sequence[Path]) -> bool:
    """Whether fine-tuning runs were validated on cases of the same names, and of the same content as far as their
    scores say.
    """
    scores = [folder / "scores" for folder in folders if (folder / "scores" / "summary.json").is_file()]
    digests = {segmentation_scores.read_summary(one)["protocol"].get(DATA_DIGEST) for one in scores}
    return len({tuple(read_cases(folder)) for folder in folders}) == 1 and len(digests - {None}) <= 1


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
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Score labelled cases, each process its share; the main one writes the folder `out`. Returns the summary, and the
    Dice of each case in the organs' order.

    network: on the processes' device, in evaluation mode; config, names: its settings and classes. volumes: the cases,
    prepared. Raises ValueError where a label holds a value that is no class.
    """
    scoring = scoring or Scoring()
    if processes.is_main and (seen := source.seen(cases)):
        LOG.warning(
            "%s: %d of %d were trained on (%s); scores on these say nothing of new cases",
            *(source.data, len(seen), len(cases), listing(seen)),
        )
    windows, precision = scoring.windows(config, names), training_precision.inference_precision(processes, config)
    mine = range(processes.rank, len(cases), processes.world_size)
    done: list[Scored] = []
    for i in tqdm(mine, desc="score", unit="case", disable=not processes.is_main):
        label = cases[i].label
        assert label is not None
        truth = read_label(label, len(names))
        found = segment_case(network, volumes[i], cases[i], windows, processes, precision, scoring.largest_component)
        organs = score_case(found.on_file, truth, len(names), voxel_sizes(file_grid(label)[1]), scoring.tolerance)
        done.append(Scored(i, organs, zlib.compress(found.prepared.tobytes(), 1)))
    done = sorted(distributed.gather_lists(done, processes), key=lambda one: one.index)
    rows = {cases[one.index].name: one.organs for one in done}
    protocol = source.protocol(cases) | scoring.protocol(config, names, precision)
    dice_of = {name: [organ.dice for organ in organs] for name, organs in rows.items()}
    if not processes.is_main:
        return scores.summarise(rows, names[1:], protocol), dice_of
    for earlier in (path for title in scores.PICTURED for path in out.glob(f"{title}_*.png")):
        earlier.unlink()
    for title, name in scores.best_median_worst(rows).items():
        one = next(one for one in done if cases[one.index].name == name)
        draw(volumes[one.index], one, names, config.spacing, out / f"{title}_{name}.png", title)
    return scores.write_folder(out, rows, names[1:], protocol), dice_of


def draw(
    volume: StoredVolume, one: Scored, names: Sequence[str], spacing: tuple[float, float, float], path: Path, title: str
) -> None:
    """Picture of a scored case."""
    prediction = np.frombuffer(zlib.decompress(one.packed), np.uint8).reshape(volume.entry.shape)
    mean = scores.mean_of([row.dice for row in one.organs])
    heading = f"{volume.name}, {title} case: mean Dice {mean:.3f}"
    save_figure(case_panel(volume, prediction, names, spacing, heading), path)


def case_panel(
    volume: StoredVolume, prediction: np.ndarray, names: Sequence[str], spacing: tuple[float, float, float], title: str
) -> Figure:
    """Image, truth and prediction, uint8 (h, w, d), of a labelled volume on its prepared grid."""
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
    """Score a fine-tuned network on labelled cases that lie on the disk; writes the folder `out`, returns the summary.

    weights: best.pth or its run folder. data, part: see `find_labelled`. store_dir: of prepared volumes, by default
    `prepared` in the data's folder. Raises ValueError, FileNotFoundError, PermissionError for what does not fit.
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


class Labelled(NamedTuple):
    """Labelled cases, class names with their values where the data names them, and what the cases are, in words."""

    cases: list[Case]
    labels: dict[str, int] | None
    text: str


def find_labelled(data: Path, part: str = "") -> Labelled:
    """Labelled cases on the disk.

    data: an nnU-Net data set (imagesTr, labelsTr) or a folder of such, of which all labelled cases are taken; or a
    decathlon JSON. part: of a JSON, "training", "validation" or "all"; by default validation where it lists such cases,
    else all. Raises ValueError, FileNotFoundError.
    """
    if data.is_file():
        listed = datalist_json.read_datalist(data, require_labels=True)
        part = part or ("validation" if listed.validation else "all")
        parts = {"training": listed.training, "validation": listed.validation}
        cases = [case for name, found in parts.items() if part in (name, "all") for case in found]
        if not cases:
            raise ValueError(f"{data} lists no {part} cases")
        return Labelled(cases, listed.labels, f"{part} cases of {data}")
    if data.suffix == ".json":
        raise FileNotFoundError(f"no data list at {data}; expected a decathlon JSON")
    if part not in ("", "all"):
        raise ValueError(f"{data} is a folder, whose labelled cases are all scored; a {part} part is what a JSON has")
    if (data / "imagesTr").is_dir():
        found = nnunet.dataset_cases(data.absolute(), labels=True, channel="0000")
        cases = nnunet.only_labelled(found, data)
    else:
        cases = nnunet.scan_cases(data, labels=True)
    if len({case.name for case in cases}) < len(cases):
        raise ValueError(f"{data} holds data sets with cases of one name; score one data set at a time")
    labels = common_labels(sorted({case.image.parent.parent for case in cases}))
    return Labelled(cases, labels, f"all labelled cases of {data}")


def check_classes(names: Sequence[str], labels: dict[str, int] | None, data: Path) -> None:
    """Raises ValueError where the data gives another name to a value than the network; class_N is no name."""
    for name, value in (labels or {}).items():
        own = names[value] if value < len(names) else "none"
        if plain(own) != plain(name) and f"class_{value}" not in (own, name):
            raise ValueError(
                f"{data}: the value {value} is {name!r} there, but {own!r} for the network, whose classes are "
                f"{', '.join(names)}"
            )


def plain(name: str) -> str:
    """A class name in lower case, with spaces for - and _."""
    return name.lower().replace("_", " ").replace("-", " ")


def mean_dice(rows: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean over cases of each class, leaving out the cases that do not hold it; NaN where none does.

    rows: one list per case, one value per class. names: of the classes, background excluded.
    """
    values = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    held = ~np.isnan(values)
    sums, nums = np.where(held, values, 0).sum(0), held.sum(0)
    return {name: float(s / n) if n else float("nan") for name, s, n in zip(names, sums, nums, strict=True)}
