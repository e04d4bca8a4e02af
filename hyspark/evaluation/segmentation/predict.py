"""Label maps of volumes without labels: NIfTI in, NIfTI out, with the geometry and the header of the input.

Three things run at once: worker processes prepare the next volumes, the network segments one, and a thread writes the
label map of the previous one on its own grid.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import igzip
from torch import Tensor
from tqdm import tqdm

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.found import log_unused
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.preprocessing.prepare import PREPARE_ERRORS, failure_reason, prepare_case
from hyspark.data.readers.nifti import file_grid, label_file
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.inference import class_scores, largest_components, load_network, to_grid
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.training import distributed
from hyspark.training.precision import autocast, inference_precision
from hyspark.utils.atomic import write_whole
from hyspark.utils.log import LOG
from hyspark.utils.processes import available_cores, worker_pool
from hyspark.utils.text import listing

MAX_PREPARE_WORKERS = 4
"""Waiting volumes take memory; this number of workers keeps ahead of any network."""


def predict_segmentation(
    weights: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    scoring: Scoring | None = None,
    device: str = "auto",
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the label map of each volume, CASE.nii.gz. An unreadable volume does not stop the others.

    Args:
        weights: best.pth of a fine-tuning run, or the run folder.
        inputs: NIfTI files, and folders of such files.
        out: Folder to write to.
        scoring: How to segment.
        device: "auto", or a device of torch.
        num_workers: Processes that prepare volumes. 0 takes one per core, at most 4; 1 prepares in this process.
        overwrite: Whether existing label maps are replaced.

    Returns:
        The reason for each unreadable case, by its name.

    Raises:
        FileNotFoundError: Weights or inputs are missing.
        ValueError: Weights, inputs and settings do not fit each other, or a label map exists.
    """
    if num_workers < 0:
        raise ValueError(f"--prepare_workers: expected 0 or more, got {num_workers}")
    network, config, names, _ = load_network(weights)
    scoring = scoring or Scoring()
    windows = scoring.windows(config, names)
    found = read_inputs(inputs)
    log_unused(found.unused_lines())
    cases = found.cases
    targets = {case.name: out / f"{case.name}.nii.gz" for case in cases}
    check_targets(cases, targets, overwrite)
    processes = distributed.find_processes(device)
    precision = inference_precision(processes, config)
    LOG.info("%d volumes, %d classes, on %s", len(cases), len(names) - 1, processes.describe(precision))
    network = network.to(processes.device)
    failures: dict[str, str] = {}
    writing: Future[None] | None = None
    bar = tqdm(total=len(cases), desc="predict", unit="volume")
    with bar, ThreadPoolExecutor(1) as writer:
        for case, prepared in prepare_ahead(cases, config, num_workers or min(available_cores(), MAX_PREPARE_WORKERS)):
            if isinstance(prepared, str):
                failures[case.name] = f"{case.image}: {prepared}"
            else:
                with autocast(processes, precision):
                    scores = class_scores(network, torch.from_numpy(prepared["image"]), windows, processes.device)
                if writing:
                    writing.result()  # one at a time: scores are large
                arguments = (scores, prepared["affine"], case.image, targets[case.name], scoring.largest_component)
                writing = writer.submit(write_label_map, *arguments)
            bar.update()
        if writing:
            writing.result()
    return failures


def find_inputs(inputs: Sequence[Path]) -> list[Case]:
    """Find the volumes of NIfTI files and folders; see `read_inputs`."""
    return read_inputs(inputs).cases


def check_targets(cases: Sequence[Case], targets: dict[str, Path], overwrite: bool) -> None:
    """Check that no output replaces an input, or, without `overwrite`, a file.

    Raises:
        ValueError: An output does.
    """
    inputs = {case.image.resolve() for case in cases}
    if same := [str(path) for path in targets.values() if path.resolve() in inputs]:
        raise ValueError(f"label maps would replace the volumes themselves: {listing(same)}; name another folder")
    if not overwrite and (known := [str(path) for path in targets.values() if path.exists()]):
        raise ValueError(
            f"existing label maps: {listing(known)}; name another folder, or replace them with --overwrite"
        )


def prepare_ahead(
    cases: Sequence[Case], settings: PrepareSettings, num_workers: int
) -> Iterator[tuple[Case, dict[str, Any] | str]]:
    """Prepare cases in worker processes, ahead of their use; one worker, or one case, is this process itself.

    Yields:
        Each case in order, with the result of `prepare_case`, or the reason why it is unreadable.
    """
    num_workers = min(num_workers, len(cases))
    if num_workers == 1:
        yield from ((case, prepared_or_reason(case, settings)) for case in cases)
        return
    with worker_pool(num_workers) as processes:
        todo = iter(cases)
        waiting = deque(
            (case, processes.submit(prepared_or_reason, case, settings)) for case in islice(todo, num_workers)
        )
        while waiting:
            case, future = waiting.popleft()
            prepared = future.result()
            waiting.extend((case, processes.submit(prepared_or_reason, case, settings)) for case in islice(todo, 1))
            yield case, prepared


def prepared_or_reason(case: Case, settings: PrepareSettings) -> dict[str, Any] | str:
    """Prepare a case; returns the reason in one line if that fails."""
    try:
        return prepare_case(case, settings)
    except PREPARE_ERRORS as error:
        return failure_reason(error)


def write_label_map(scores: Tensor, affine: np.ndarray, source: Path, target: Path, largest_component: bool) -> None:
    """Write the label map of class scores on the grid of a NIfTI file, the whole file at once.

    Args:
        scores: (n, h, w, d).
        affine: Affine of their grid.
        source: The NIfTI file.
        target: The file to write.
        largest_component: Whether only the largest component of each class is kept.
    """
    labels = to_grid(scores, affine, *file_grid(source))
    if largest_component:
        labels = largest_components(labels, len(scores))
    write_whole(target, igzip.compress(label_file(labels, source), mtime=0))
