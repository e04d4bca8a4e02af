"""Label maps of volumes without labels, with the geometry of the input: NIfTI, or DICOM that refers to its series.

Three things run at once: worker processes prepare the next volumes, the network segments one, and a thread makes label
maps of its scores as they come, and writes them.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.found import log_unused
from hyspark.data.datasets.scan_inputs import ScanCase, find_inputs, scan_folder
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.each_case import warn_of_failures
from hyspark.evaluation.failures import NO_OUTPUT, OutputError, case_failure
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.evaluation.segmentation.label_output import LABEL_ENDINGS, LabelFormat, LabelOutput, label_output
from hyspark.evaluation.segmentation.prepare_ahead import MAX_PREPARE_WORKERS, prepare_ahead
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.evaluation.segmentation.segmenter import VolumeSegmenter
from hyspark.evaluation.segmentation.slab_stream import NumberedSlab, SlabStream
from hyspark.training import distributed
from hyspark.training.precision import inference_precision
from hyspark.training.run_volumes import GB
from hyspark.utils.atomic import write_whole
from hyspark.utils.free_memory import free_main_memory
from hyspark.utils.log import LOG
from hyspark.utils.processes import available_cores
from hyspark.utils.text import listing


class Predicted(NamedTuple):
    """Label maps that were written.

    Attributes:
        files: The files, in the order of the volumes.
        failures: Reason for each volume without a label map, by case, and for each unreadable DICOM series.
    """

    files: list[Path]
    failures: dict[str, str]


def predict_segmentation(
    weights: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    scoring: Scoring | None = None,
    device: str = "auto",
    num_workers: int = 0,
    overwrite: bool = False,
    file_format: LabelFormat = "nifti",
    min_slices: int = 8,
) -> Predicted:
    """Write the label map of each volume, CASE.nii.gz. A volume that fails, for whatever reason, stops no other.

    The processes that torchrun started divide the volumes among themselves.

    Args:
        weights: The network's file or folder, see `load_network`.
        inputs: NIfTI files, and folders of such files or of DICOM series.
        out: Folder to write to.
        scoring: How to segment.
        device: "auto", or a device of torch.
        num_workers: Processes that prepare volumes. 0 takes one per core, at most 4; 1 prepares in this process.
        overwrite: Whether existing label maps are replaced.
        file_format: Format of the label maps. Those of DICOM need DICOM inputs.
        min_slices: DICOM scans of fewer slices are not predicted.

    Returns:
        The label maps, and what was not predicted, on all processes.

    Raises:
        FileNotFoundError: Weights or inputs are missing.
        ModuleNotFoundError: The format needs a package that is not installed.
        ValueError: Weights, inputs and settings do not fit each other, or a label map exists.
        OutputError: The folder takes no file, since the disk is full or for lack of permission.
    """
    if num_workers < 0:
        raise ValueError(f"--prepare_workers: expected 0 or more, got {num_workers}")
    network, config, names, _ = load_network(weights)
    scoring = scoring or Scoring()
    windows = scoring.windows(config, names)
    output = label_output(file_format, weights, names)
    processes = distributed.find_processes(device)
    found = find_inputs(
        inputs,
        out,
        settings=config,
        only_dicom=file_format != "nifti",
        min_slices=min_slices,
        progress=processes.is_main,
    )
    log_unused(found.lines)
    cases = found.cases
    targets = {case.name: out / f"{case.name}{LABEL_ENDINGS[file_format]}" for case in cases}
    check_targets(cases, targets, overwrite)
    precision = inference_precision(processes, config)
    LOG.info("%d volumes, %d classes, on %s", len(cases), len(names) - 1, processes.describe(precision))
    segmenter = VolumeSegmenter(
        network.to(processes.device),
        len(names),
        windows,
        processes,
        precision,
        out,
        scoring.largest_component,
        scoring.memory,
    )
    num_workers = num_workers or min(available_cores(), MAX_PREPARE_WORKERS)
    with distributed.join_process_group(processes):
        distributed.barrier(processes)  # no process writes before all have checked the targets
        mine = cases[processes.rank :: processes.world_size]
        try:
            failed = distributed.run_and_gather(
                lambda: [*predict_cases(mine, config, segmenter, targets, output, num_workers).items()], processes
            )
        finally:
            if processes.is_main:
                shutil.rmtree(scan_folder(out), ignore_errors=True)
    failures = dict(failed)
    files = [targets[case.name] for case in cases if case.name not in failures]
    return Predicted(files, found.failures | {name: failures[name] for name in targets if name in failures})


def predict_cases(
    cases: Sequence[Case],
    settings: PrepareSettings,
    segmenter: VolumeSegmenter,
    targets: Mapping[str, Path],
    output: LabelOutput,
    num_workers: int,
) -> dict[str, str]:
    """Write the label maps of this process's cases.

    Args:
        cases: The cases.
        settings: Settings of preparation.
        segmenter: The network, and how to segment.
        targets: Files to write, by case.
        output: How label maps are written.
        num_workers: Processes that prepare volumes.

    Returns:
        The reason for each case without a label map.
    """
    failures: dict[str, str] = {}
    writing: tuple[Case, Future[None]] | None = None
    memory = int(segmenter.memory * GB) or free_main_memory() // 4
    bar = tqdm(total=len(cases), desc="predict", unit="volume", disable=not segmenter.processes.is_main)
    try:
        ahead = closing(prepare_ahead(cases, settings, num_workers, memory))
        with bar, ahead as all_prepared, ThreadPoolExecutor(1) as writer:
            for case, prepared in all_prepared:
                if isinstance(prepared, str):
                    failures[case.name] = f"{case.origin}: {prepared}"
                    bar.update()
                    continue
                written = start_writing(writer, segmenter, case, prepared, targets[case.name], output, failures)
                if writing:
                    settle(*writing, failures)
                    bar.update()
                writing = case, written
            if writing:
                settle(*writing, failures)
                bar.update()
    except OutputError:
        warn_of_failures(failures, len(cases), "predicted")
        raise
    return failures


def start_writing(
    writer: Executor,
    segmenter: VolumeSegmenter,
    case: Case,
    prepared: dict[str, Any],
    target: Path,
    output: LabelOutput,
    failures: dict[str, str],
) -> Future[None]:
    """Compute the class scores of a case, of which the writer's thread makes the label map; notes a failure.

    Returns:
        The end of the writing, which may be a failure too.
    """
    stream, image = SlabStream(), prepared["image"]
    given = (segmenter, stream, image.shape[1:], prepared["affine"], case, target, output)
    written = writer.submit(write_label_map, *given)
    written.add_done_callback(lambda _: stream.close())
    try:
        with closing(segmenter.slabs(image, prepared["maps"])) as slabs:
            stream.send(slabs)
    except Exception as error:
        failures[case.name] = f"{case.origin}: {case_failure(error)}"
    return written


def settle(case: Case, written: Future[None], failures: dict[str, str]) -> None:
    """Wait until a label map is written, and note why it was not, unless a reason is known."""
    try:
        written.result()
    except Exception as error:
        failures.setdefault(case.name, f"{case.origin}: {case_failure(error)}")
    finally:
        if isinstance(case, ScanCase):
            case.image.unlink(missing_ok=True)


def check_targets(cases: Sequence[Case], targets: dict[str, Path], overwrite: bool) -> None:
    """Check that no output replaces an input, or, without `overwrite`, a file.

    Raises:
        ValueError: An output does.
    """
    inputs = {file.resolve() for case in cases for file in case.images}
    if same := [str(path) for path in targets.values() if path.resolve() in inputs]:
        raise ValueError(f"label maps would replace the volumes themselves: {listing(same)}; name another folder")
    if not overwrite and (known := [str(path) for path in targets.values() if path.exists()]):
        raise ValueError(
            f"existing label maps: {listing(known)}; name another folder, or replace them with --overwrite"
        )


def write_label_map(
    segmenter: VolumeSegmenter,
    slabs: Iterable[NumberedSlab],
    shape: tuple[int, int, int],
    affine: np.ndarray,
    case: Case,
    target: Path,
    output: LabelOutput,
) -> None:
    """Write the label map of class scores on the grid of a case's image, the whole file at once.

    Args:
        segmenter: How to segment.
        slabs: The scores.
        shape: (h, w, d) of the prepared volume.
        affine: Affine of its grid.
        case: The case.
        target: The file to write.
        output: How label maps are written.

    Raises:
        OutputError: The folder takes no file.
    """
    content = output.encode(segmenter.label(slabs, shape, affine, case.image).on_file, case)
    try:
        write_whole(target, content)
    except OSError as error:
        if error.errno not in NO_OUTPUT:
            raise
        raise OutputError(
            f"{target}: label maps are not writable ({error.strerror}); make room, or choose another folder with --out",
        ) from error
