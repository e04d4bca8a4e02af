"""Commands as processes side by side, which divide the machine among themselves and are stopped together."""

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

POLL_SECONDS = 0.2
"""Between two checks of the jobs."""
GRACE_SECONDS = 10.0
"""In which a stopped process has to end."""
GRACE_POLL_SECONDS = 0.02
"""Between two checks whether it has."""
TAIL = 15
"""Lines of a failed job's log that are printed."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Job:
    """A command whose output goes to log.txt in a folder.

    Attributes:
        name: Name of the job.
        command: The command.
        folder: Folder of the log.
        is_done: Checks whether the results of the command exist.
    """

    name: str
    command: Sequence[str]
    folder: Path
    is_done: Callable[[], bool]


@dataclass
class Running:
    """A job that is running.

    Attributes:
        job: The job.
        process: Its process.
        log: Its log.
        log_offset: Bytes of earlier attempts in the log.
    """

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_offset: int


def run_jobs(jobs: Sequence[Job], num_at_once: int, after_each: Callable[[], None]) -> list[str]:
    """Run jobs in order; prints the last lines of failed ones. Ctrl-C, SIGTERM and errors stop the running jobs.

    Args:
        jobs: The jobs.
        num_at_once: Number of jobs side by side.
        after_each: Called when a job is done.

    Returns:
        The names of the failed jobs.
    """
    waiting, slots, failed = list(jobs), list(range(num_at_once)), []
    running: dict[int, Running] = {}
    gpus, now = visible_gpus(), ""
    with end_on_signals(), tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        try:
            while waiting or running:
                while waiting and slots:
                    slot = slots.pop(0)
                    running[slot] = start_job(waiting.pop(0), job_variables(slot, num_at_once, gpus))
                for slot in [slot for slot, r in running.items() if r.process.poll() is not None]:
                    ended = running.pop(slot)
                    slots.append(slot)
                    ended.log.close()
                    bar.update()
                    if ended.process.returncode == 0 and ended.job.is_done():
                        after_each()
                    else:
                        failed.append(ended.job.name)
                        bar.write(failure_text(ended))
                shown, now = now, running_text(running.values(), len(failed))
                bar.set_postfix_str(now, refresh=now != shown)
                time.sleep(POLL_SECONDS if running else 0)
        finally:
            stop_jobs(list(running.values()))
    return failed


def start_job(job: Job, variables: Mapping[str, str]) -> Running:
    """Start a job in a session of its own, which can be stopped with all its loader processes."""
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


def job_variables(slot: int, num_at_once: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return environment variables of the job in a slot.

    They divide the CPU threads (unless the user set a number) and the GPUs, and slow down progress bars in the log.
    """
    variables = {"TQDM_MININTERVAL": "60"}
    if num_at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // num_at_once))
    if num_at_once > 1 and len(gpus) > 1:
        variables[VISIBLE_GPUS] = gpus[slot % len(gpus)]
    return variables


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, as the environment variable names them; initialises none."""
    named = os.environ.get(VISIBLE_GPUS)
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    return [str(index) for index in range(torch.cuda.device_count())]


def running_text(running: Iterable[Running], num_failed: int) -> str:
    """Write the running jobs and their steps, for the progress bar."""
    parts = [f"{r.job.name}{last_step(r.job.folder / 'metrics.jsonl')}" for r in running]
    return ", ".join([*parts, f"{num_failed} failed"] if num_failed else parts)


def last_step(metrics: Path) -> str:
    """Write " step N" of a run's metrics; empty if there is no whole line yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
        return f" step {json.loads(lines[-1])['step'] + 1}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def failure_text(ended: Running) -> str:
    """Write why a job failed: its exit code and the end of its log of this attempt."""
    path = ended.job.folder / "log.txt"
    text = path.read_bytes()[ended.log_offset :].decode(errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()][-TAIL:]
    code = ended.process.returncode
    reason = f"exit code {code}" if code else "it ended without scores"
    return "\n".join([f"failed: {ended.job.name} ({reason}); the end of {path}:", *(f"    {line}" for line in lines)])


def stop_jobs(running: Sequence[Running]) -> None:
    """End the jobs and all their processes, first by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_SECONDS
        for r in running:
            if has_processes(r):
                with suppress(ProcessLookupError):
                    os.killpg(r.process.pid, number)
        while any(has_processes(r) for r in running) and time.monotonic() < deadline:
            time.sleep(GRACE_POLL_SECONDS)
    for r in running:
        r.log.close()


def has_processes(r: Running) -> bool:
    """Check whether any process of a job is left, its own or one that it started."""
    r.process.poll()  # otherwise an ended one would count
    try:
        os.killpg(r.process.pid, 0)
    except OSError:
        return False
    return True


@contextmanager
def end_on_signals() -> Iterator[None]:
    """End this process by an exception at SIGTERM and SIGHUP, as Ctrl-C does, unless they are handled or ignored."""

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
