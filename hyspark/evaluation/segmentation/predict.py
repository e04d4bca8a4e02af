"""Label maps for volumes without labels: NIfTI in, NIfTI out, each in the geometry and with the header of its input.

Three things go on at once: worker processes prepare the next volumes, the network looks at one, a thread brings the
one before to its own grid and writes it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from isal import igzip
from torch import Tensor
from tqdm import tqdm

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import PREPARE_ERRORS, failure_reason, prepare_case
from hyspark.data.readers.nifti import file_grid
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.evaluate import Scoring
from hyspark.evaluation.segmentation.inference import class_scores, largest_components, load_network, to_grid
from hyspark.training import distributed
from hyspark.training.precision import autocast, inference_precision
from hyspark.utils.atomic import write_whole
from hyspark.utils.log import LOG
from hyspark.utils.paths import NIFTI, nifti_files, nifti_stem
from hyspark.utils.processes import available_cores, worker_pool
from hyspark.utils.text import listing

MOST_WORKERS = 4
"""Prepared volumes that wait take memory; so many workers keep ahead of any network."""


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
    """Write out/CASE.nii.gz for each volume; returns why for each case that could not be read, which does not stop the
    others.

    weights: best.pth or its run folder. inputs: NIfTI files and folders of such. scoring: how volumes are segmented.
    num_workers: processes that prepare volumes; 0 takes one per core, at most 4; 1 prepares in this process. Raises
    ValueError, FileNotFoundError for what does not fit; ValueError where an output exists, unless `overwrite` says so.
    """
    if num_workers < 0:
        raise ValueError(f"prepare_workers must not be negative, but it is {num_workers}")
    network, config, names, _ = load_network(weights)
    scoring = scoring or Scoring()
    windows = scoring.windows(config, names)
    cases = find_volumes(inputs)
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
        for case, prepared in prepare_ahead(cases, config, num_workers or min(available_cores(), MOST_WORKERS)):
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


def find_volumes(inputs: Sequence[Path]) -> list[Case]:
    """The volumes of NIfTI files and folders, named as their files without ending and "_0000".

    Raises FileNotFoundError where there is none; ValueError for other files, and for two volumes of one name.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = nifti_files(path)
            if not found:
                raise FileNotFoundError(f"{path} holds no NIfTI file (.nii, .nii.gz)")
            files += found
        elif not path.is_file():
            raise FileNotFoundError(f"no file or folder {path}")
        elif not NIFTI.fullmatch(path.name):
            raise ValueError(f"{path} is no NIfTI file (.nii, .nii.gz)")
        else:
            files.append(path)
    cases: dict[str, Case] = {}
    for file in files:
        name = nifti_stem(file).removesuffix("_0000")
        if name in cases:
            raise ValueError(
                f"two volumes are named {name}: {cases[name].image} and {file}; predict them into two folders"
            )
        cases[name] = Case(name, file.parent.name, file)
    return list(cases.values())


def check_targets(cases: Sequence[Case], targets: dict[str, Path], overwrite: bool) -> None:
    """Raises ValueError where an output would replace an input, or a file that may not be replaced."""
    inputs = {case.image.resolve() for case in cases}
    if same := [str(path) for path in targets.values() if path.resolve() in inputs]:
        raise ValueError(f"label maps would replace the volumes themselves: {listing(same)}; name another folder")
    if not overwrite and (known := [str(path) for path in targets.values() if path.exists()]):
        raise ValueError(f"there already: {listing(known)}; name another folder, or replace them with --overwrite")


def prepare_ahead(
    cases: Sequence[Case], settings: PrepareSettings, num_workers: int
) -> Iterator[tuple[Case, dict[str, Any] | str]]:
    """Each case with what `prepare_case` gives, or the reason why it cannot be prepared; in their order.

    One worker, or one case, is prepared in this process.
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
    """What `prepare_case` gives, or in one line why it does not."""
    try:
        return prepare_case(case, settings)
    except PREPARE_ERRORS as error:
        return failure_reason(error)


def write_label_map(scores: Tensor, affine: np.ndarray, source: Path, target: Path, largest_component: bool) -> None:
    """Class scores (n, h, w, d) on a grid -> a NIfTI label map on the grid of the file `source`, all at once."""
    labels = to_grid(scores, affine, *file_grid(source))
    if largest_component:
        labels = largest_components(labels, len(scores))
    write_whole(target, igzip.compress(label_image(labels, source).to_bytes(), mtime=0))


def label_image(labels: np.ndarray, source: Path) -> Any:
    """A label map, uint8 (h, w, d), with the geometry, units and codes of a NIfTI file.

    What the header says of intensities is reset, and free text and extensions, which may name a patient, are left out.
    """
    image: Any = nibabel.load(source)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    for field in ("cal_min", "cal_max", "descrip", "aux_file", "db_name", "data_type", "intent_name"):
        if field in header:
            header[field] = np.zeros_like(header[field])
    header.extensions.clear()
    return type(image)(labels, image.affine, header)
