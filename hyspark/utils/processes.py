"""Worker processes of a run: they leave signals to the run, and end with it, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals that ask a run to stop. Schedulers send them to all processes of a job; only the run itself heeds them."""


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes with one thread each; on leaving the block, cancel jobs that have not begun."""
    # spawn: a forked child of a process with OpenMP threads may hang in its first parallel region.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_workers, context, set_up_worker)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def map_unordered(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[T]:
    """Call a function on each job's arguments and yield the results as they are completed.

    One worker, or one job, runs in this process itself.

    Raises:
        OSError: if a process was killed.
    """
    if min(num_workers, len(jobs)) <= 1:
        yield from (function(*job) for job in jobs)
        return
    with worker_pool(min(num_workers, len(jobs))) as processes:
        for future in as_completed([processes.submit(function, *job) for job in jobs]):
            try:
                yield future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a process that prepared volumes was killed, perhaps for its memory; lower --prepare_workers"
                ) from error


def set_up_worker() -> None:
    """Prepare a process of the pool: one thread, no signals, an end with its parent."""
    torch.set_num_threads(1)
    ignore_signals()
    threading.Thread(target=exit_with_parent, daemon=True).start()


def ignore_signals(worker: int = 0) -> None:
    """Leave the stop signals to the run; `worker` is the number that a DataLoader passes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_with_parent() -> None:
    """Wait for the parent's end, then exit; the processes of a killed parent would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
