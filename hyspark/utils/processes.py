"""Worker processes of a run: they leave signals to the run, and end with it, however it ends."""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from hyspark.utils.exit_codes import INTERRUPTED
from hyspark.utils.log import LOG

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals that ask a run to stop. Schedulers send them to all processes of a job; only the run itself heeds them."""

KILLED = "the process that read it was killed, perhaps for its memory; lower prepare_workers, or exclude the case"
"""Reason of a case whose worker process was killed."""


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Hold back Control-C until the end of the block, and in processes that are started in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class QuietPool(ProcessPoolExecutor):
    """Processes that Control-C ends without a traceback, also while they import."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Submit a call, and start a process for it if none is idle."""
        with interrupts_held_back():
            return super().submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down; where a process was killed, kill the others, which leave SIGTERM to the run."""
        if self._broken:  # Python 3.13 sends SIGTERM alone, and would wait for them forever
            for process in list((self._processes or {}).values()):
                process.kill()
        super().shutdown(wait, cancel_futures=cancel_futures)


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes with one thread each; on leaving the block, cancel jobs that have not begun."""
    # spawn: a forked child of a process with OpenMP threads may hang in its first parallel region.
    context = multiprocessing.get_context("spawn")
    executor = QuietPool(num_workers, context, set_up_worker)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def map_unordered(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], num_workers: int, killed: Callable[..., T]
) -> Iterator[T]:
    """Call a function on each job's arguments and yield the results as they are completed.

    A process may be killed, mostly for its memory. The jobs in hand are then done again one at a time, which shows
    whose process is killed again, and the others go on with half of the processes unless one job alone is to blame.

    Args:
        function: the work, importable by other processes.
        jobs: arguments of each call.
        num_workers: processes. With one, or with one job, this process itself does the work.
        killed: makes the result of a job whose process is killed, from the job's arguments.

    Raises:
        OSError: if no process can be started.
    """
    if min(num_workers, len(jobs)) <= 1:
        yield from (function(*job) for job in jobs)
        return
    waiting = deque(jobs)
    while waiting:
        in_hand: list[tuple[Any, ...]] = []
        yield from work_off(function, waiting, min(num_workers, len(waiting)), in_hand)
        num_killed = 0
        for result, was_killed in work_singly(function, in_hand, killed):
            num_killed += was_killed
            yield result
        if in_hand and not num_killed:
            num_workers = max(1, num_workers // 2)
            LOG.warning("a worker process was killed, perhaps for its memory; going on with %d of them", num_workers)


def work_off(
    function: Callable[..., T], waiting: deque[tuple[Any, ...]], num_workers: int, in_hand: list[tuple[Any, ...]]
) -> Iterator[T]:
    """Yield the results of waiting jobs until none is left, or a process is killed; `in_hand` is what it leaves."""
    running: dict[Future[T], tuple[Any, ...]] = {}
    with worker_pool(num_workers) as processes:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * num_workers:
                    future = processes.submit(function, *waiting[0])
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del running[future]
                    yield result
        except BrokenProcessPool:
            for future, job in running.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    yield future.result()
                else:
                    in_hand.append(job)


def work_singly(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], killed: Callable[..., T]
) -> Iterator[tuple[T, bool]]:
    """Do jobs one at a time in a process of their own; yield each result, and whether the process was killed."""
    waiting = deque(jobs)
    while waiting:
        with worker_pool(1) as process:
            try:
                process.submit(os.getpid).result()
            except BrokenProcessPool as error:
                raise OSError("no worker process can be started; set prepare_workers to 1") from error
            try:
                while waiting:
                    result = process.submit(function, *waiting[0]).result()
                    waiting.popleft()
                    yield result, False
            except BrokenProcessPool:
                yield killed(*waiting.popleft()), True


def peak_resident() -> int | None:
    """Measure the most bytes of memory that this process has held; None on systems that do not report them."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    # psutil has no peak on Linux. That of getrusage begins with the memory of the process that started this one.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return max(1024 * int(found[1]), memory.rss) if found else None  # VmHWM lags behind


def set_up_worker() -> None:
    """Prepare a process of the pool: one thread, no signals, an end with its parent."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # heeded by libraries that are imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    ignore_signals()
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # the run itself says that it was stopped
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
