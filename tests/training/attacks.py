"""Training commands as processes of their own, and what may happen to them; used by the tests of reliability."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import get_start_method, set_start_method
from pathlib import Path

import torch

from hyspark.cli.main import main
from hyspark.config.recipes import write_yaml
from tests.fork_server import SERVER

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "PretrainConfig": [str(ROOT / "train.py")],
    "SegmentationConfig": [str(ROOT / "finetune_btcv.py")],
    "ClassificationConfig": ["-m", "hyspark", "finetune-classifier"],
}

VERBS = {"PretrainConfig": "pretrain", "SegmentationConfig": "finetune"}


def command(config, *flags, processes=1, restarts=0, by_torchrun=False):
    """The command line of a run. by_torchrun: also for one process."""
    recipe = config.run_folder.with_suffix(".yaml")
    write_yaml(config, recipe)
    script = [*COMMANDS[type(config).__name__], "--config", str(recipe), *flags]
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    by_torchrun = by_torchrun or processes > 1
    return [sys.executable, *([*run, f"--max-restarts={restarts}"] if by_torchrun else []), *script]


def start(config, *flags, limit=None, **kwargs):
    """A run in a session of its own, with its output in a file beside its folder.

    limit: bytes that a file of it may have, in place of a full disk.
    """
    with log_file(config).open("ab") as log:
        return subprocess.Popen(
            command(config, *flags, **kwargs),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=None if limit is None else partial(limit_files, limit),
        )


def fork(config, *flags):
    """The same as `start` by a process of the fork server, which has no seconds of imports before its first step."""
    recipe = config.run_folder.with_suffix(".yaml")
    write_yaml(config, recipe)
    return ForkedRun([VERBS[type(config).__name__], "--config", str(recipe), *flags], log_file(config))


class ForkedRun:
    """A verb of the command line in a session of its own; what the tests use of subprocess.Popen."""

    def __init__(self, words, log):
        self.process = SERVER.Process(target=run_in_session, args=(words, str(log), get_start_method()))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode


def run_in_session(words, log, start_method):
    """In the new process: become the leader of a session, write to a file, and run a verb.

    start_method: how processes start others where none is asked for; the fork server would else start a second one.
    """
    set_start_method(start_method, force=True)
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    torch.set_num_threads(1)
    main(words)


def limit_files(size):
    """In the new process: writing beyond the limit is an error, not the end."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def log_file(config):
    """The file of what all attempts of a run print."""
    return config.run_folder.with_suffix(".log")


def output(config):
    """What all attempts of a run have written."""
    return log_file(config).read_text(errors="replace")


def end(process, number=signal.SIGKILL):
    """Send a signal to all processes of a run, as a scheduler does; the run's exit code."""
    os.killpg(process.pid, number)
    return process.wait(timeout=120)


def wait_for_step(config, process, step, timeout=240.0):
    """Wait until a run has logged a step, or has ended."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        if last_step(config) >= step:
            return
        time.sleep(0.02)
    assert process.poll() is not None or last_step(config) >= step, output(config)[-3000:]


def last_step(config):
    """The last step that a run has logged, -1 before the first."""
    return max((line["step"] for line in lines(config)), default=-1)


def lines(config):
    """Whole lines of a run's metrics."""
    path = config.run_folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def results(config):
    """What must not depend on what happened to a run: all measured values but its speed."""
    speed = ("samples_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in speed} for line in lines(config)]


def same_weights(one, two):
    """Whether two files hold the same tensors, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (one, two))
    a, b = (x.get("model", x) for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
