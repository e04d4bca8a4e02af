"""Commands side by side, each a process of its own with its share of the machine; stopped together."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import torch
from tqdm import tqdm

from hyspark.utils.processes import available_cores

LOOK_EVERY = 0.2  # seconds
GRACE = 10.0  # seconds that a stopped process has to end
WAIT = 0.02  # seconds between two looks whether it has
TAIL = 15  # lines of a failed job's log that are shown
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Job:
    """A command whose output goes to log.txt in `folder`. is_done: whether it has left what it is run for."""

    name: str
    command: Sequence[str]
    folder: Path
    is_done: Callable[[], bool]


@dataclass
class Running:
    """A job that is under way; `start_of_log`: bytes that earlier attempts have left in its log."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start_of_log: int


def run_jobs(jobs: Sequence[Job], num_at_once: int, after_each: Callable[[], None]) -> list[str]:
    """Run all, so many at once, in order; returns the names of those that failed, whose last lines are printed.

    `after_each` is called when a job is done. Whatever ends this call early (Ctrl-C, SIGTERM, an error) stops the jobs.
    """
    waiting, slots, failed = list(jobs), list(range(num_at_once)), []
    running: dict[int, Running] = {}
    gpus, now = visible_gpus(), ""
    with ends_on_signals(), tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        try:
            while waiting or running:
                while waiting and slots:
                    slot = slots.pop(0)
                    running[slot] = start(waiting.pop(0), environment(slot, num_at_once, gpus))
                for slot in [slot for slot, r in running.items() if r.process.poll() is not None]:
                    ended = running.pop(slot)
                    slots.append(slot)
                    ended.log.close()
                    bar.update()
                    if ended.process.returncode == 0 and ended.job.is_done():
                        after_each()
                    else:
                        failed.append(ended.job.name)
                        bar.write(failure(ended))
                shown, now = now, state(running.values(), len(failed))
                bar.set_postfix_str(now, refresh=now != shown)
                time.sleep(LOOK_EVERY if running else 0)
        finally:
            stop(list(running.values()))
    return failed


def start(job: Job, variables: Mapping[str, str]) -> Running:
    """Start a job in a session of its own, so that it is stopped with all its loader processes."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = (job.folder / "log.txt").open("ab")
    before = log.tell()
    process = subprocess.Popen(
        job.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | variables,
        start_new_session=True,
    )
    return Running(job, process, log, before)


def environment(slot: int, num_at_once: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of the job in a slot: its share of CPU threads where the user set none, its GPU where there are
    several, and a progress bar that does not fill the log.
    """
    variables = {"TQDM_MININTERVAL": "60"}
    if num_at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // num_at_once))
    if num_at_once > 1 and len(gpus) > 1:
        variables[DEVICES] = gpus[slot % len(gpus)]
    return variables


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as the environment variable names them; asks without taking one."""
    named = os.environ.get(DEVICES)
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    return [str(index) for index in range(torch.cuda.device_count())]


def state(running: Iterable[Running], num_failed: int) -> str:
    """What is under way, for the progress bar."""
    parts = [f"{r.job.name}{last_step(r.job.folder / 'metrics.jsonl')}" for r in running]
    return ", ".join([*parts, f"{num_failed} failed"] if num_failed else parts)


def last_step(metrics: Path) -> str:
    """' step N' of a run's metrics; nothing where there is no whole line yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
        return f" step {json.loads(lines[-1])['step'] + 1}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def failure(ended: Running) -> str:
    """Why a job failed: its exit code and the end of what it wrote in this attempt."""
    path = ended.job.folder / "log.txt"
    text = path.read_bytes()[ended.start_of_log :].decode(errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()][-TAIL:]
    code = ended.process.returncode
    reason = f"exit code {code}" if code else "it ended, but did not leave its scores"
    return "\n".join([f"failed: {ended.job.name} ({reason}); the end of {path}:", *(f"    {line}" for line in lines)])


def stop(running: Sequence[Running]) -> None:
    """End the jobs and all their processes: asked first, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        for r in running:
            if has_processes(r):
                with suppress(ProcessLookupError):
                    os.killpg(r.process.pid, number)
        while any(has_processes(r) for r in running) and time.monotonic() < deadline:
            time.sleep(WAIT)
    for r in running:
        r.log.close()


def has_processes(r: Running) -> bool:
    """Whether a job has any process left, its own or one that it started."""
    r.process.poll()  # else an ended one would count
    try:
        os.killpg(r.process.pid, 0)
    except OSError:
        return False
    return True


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process by an exception, as Ctrl-C does, unless they are handled or ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
