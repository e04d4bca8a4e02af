"""Volumes prepared in worker processes ahead of their use, as many as memory allows."""

import math
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.scan_inputs import ScanCase, write_scan
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.readers.nifti import file_grid
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.failures import case_failure
from hyspark.utils.processes import KILLED, worker_pool

MAX_PREPARE_WORKERS = 4
"""Waiting volumes take memory; this number of workers keeps ahead of any network."""
BYTES_PER_STORED_VOXEL, BYTES_PER_PREPARED_VOXEL = 12, 24
"""Memory of a preparation at its peak, per voxel of the file and of the prepared grid."""

Prepared = dict[str, Any] | str
"""The result of `prepare_case`, or the reason why there is none."""


class Waiting(NamedTuple):
    """A case that a worker prepares.

    Attributes:
        case: The case.
        num_bytes: Memory that its preparation takes.
        future: What becomes of it.
    """

    case: Case
    num_bytes: int
    future: Future[Prepared]


def prepare_ahead(
    cases: Sequence[Case], settings: PrepareSettings, num_workers: int, memory: int, *, is_whole: bool = False
) -> Generator[tuple[Case, Prepared], None, None]:
    """Prepare cases in worker processes, ahead of their use; one worker, or one case, is this process itself.

    A case whose preparation kills its process fails alone: those that were prepared beside it are repeated one by one.

    Args:
        cases: The cases.
        settings: Settings of preparation.
        num_workers: Number of worker processes.
        memory: Bytes that volumes may take which are prepared or wait; one volume may take more.
        is_whole: Whether whole grids are kept, see `prepare_case`.

    Yields:
        Each case in order, with the result of `prepare_case`, or the reason why it is unreadable.
    """
    num_workers = min(num_workers, len(cases))
    if num_workers <= 1:
        yield from ((case, prepared_or_reason(case, settings, is_whole)) for case in cases)
        return
    todo = deque(cases)
    while todo:
        waiting: deque[Waiting] = deque()
        with worker_pool(num_workers) as pool:
            try:
                while todo or waiting:
                    while todo and len(waiting) < num_workers:
                        num_bytes = estimate_bytes(todo[0], settings)
                        if waiting and num_bytes + sum(other.num_bytes for other in waiting) > memory:
                            break
                        future = pool.submit(prepared_or_reason, todo[0], settings, is_whole)
                        waiting.append(Waiting(todo.popleft(), num_bytes, future))
                    prepared = result_of(waiting[0].future)
                    yield waiting.popleft().case, prepared
            except BrokenProcessPool:
                pass
        yield from ((one.case, result_or_alone(one, settings, is_whole)) for one in waiting)


def result_of(future: Future[Prepared]) -> Prepared:
    """Wait for what a worker sends, or return why it cannot be received.

    Raises:
        BrokenProcessPool: A worker was killed.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        return case_failure(error)


def result_or_alone(waiting: Waiting, settings: PrepareSettings, is_whole: bool = False) -> Prepared:
    """Return what a broken pool has still prepared, or prepare it in a process of its own."""
    with suppress(BrokenProcessPool):
        if waiting.future.done() and not waiting.future.cancelled():
            return result_of(waiting.future)
    with suppress(BrokenProcessPool), worker_pool(1) as pool:
        return result_of(pool.submit(prepared_or_reason, waiting.case, settings, is_whole))
    return KILLED


def prepared_or_reason(case: Case, settings: PrepareSettings, is_whole: bool = False) -> Prepared:
    """Prepare a case, and before it the NIfTI file of a DICOM scan; returns the reason in one line if that fails."""
    try:
        if isinstance(case, ScanCase):
            write_scan(case)
        return prepare_case(case, settings, is_whole=is_whole)
    except Exception as error:
        return case_failure(error)


def estimate_bytes(case: Case, settings: PrepareSettings) -> int:
    """Estimate the memory that preparing a case takes from its header; 0 for an unreadable one."""
    try:
        shape, affine = case.grid() if isinstance(case, ScanCase) else file_grid(case.image)
        prepared = math.prod(shape) * abs(float(np.linalg.det(affine[:3, :3]))) / math.prod(settings.spacing)
        per_channel = BYTES_PER_STORED_VOXEL * math.prod(shape) + BYTES_PER_PREPARED_VOXEL * prepared
        return int(len(case.images) * per_channel)
    except Exception:  # preparation finds the reason
        return 0
