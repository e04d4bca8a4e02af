"""Errors of several ranks: each is printed once, with the ranks that have it, and nobody waits for a failed rank."""

import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hyspark.cli import run_verb
from hyspark.training import rank_errors
from hyspark.training.distributed import check_devices, find_processes
from hyspark.training.signals import StopRequested
from hyspark.utils.digests import text_digest
from hyspark.utils.exit_codes import FOUND, STOPPED

ROOT = Path(__file__).parents[2]
ENDED = 2**22 + 1
"""A process number above the largest of Linux."""


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A store as torchrun keeps it, seen by rank 0 of 3."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False)
    env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in (env | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_errors, "GRACE", 0.1)
    yield rank_errors.shared_store()
    del server  # which lived until here


def printed(error, capsys):
    """What a rank prints, and its exit code."""

    def failing(argv):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_verb, "raised_here", lambda error: True)
        with pytest.raises(SystemExit) as exit_:
            run_verb.run_verb(failing, [])
    return capsys.readouterr().err, exit_.value.code


def post(store, rank, message):
    """What another rank does with its error."""
    store.set(f"{text_digest([message])} {rank}", "")
    store.add("errors", 1)


@pytest.mark.parametrize(
    ("others", "ranks"), [((), "rank 0"), ((2,), "ranks 0, 2"), ((1, 2), "all ranks")], ids=lambda x: str(x)
)
def test_an_error_is_printed_with_all_ranks_that_have_it(store, tmp_path, capsys, others, ranks):
    for rank in others:
        post(store, rank, "lr is too high")
    assert printed(ValueError("lr is too high"), capsys) == (f"error ({ranks}): lr is too high\n", 2)
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "lr is too high"
    assert printed(ValueError("lr is too high"), capsys) == ("", 2)  # of the next rank with the same error


def test_different_errors_are_all_printed(store, capsys):
    post(store, 1, "a.nii.gz is damaged")
    assert printed(OSError("b.nii.gz is damaged"), capsys) == ("error (rank 0): b.nii.gz is damaged\n", 2)


def test_a_lost_connection_is_silent_where_another_rank_has_an_error(store, capsys):
    post(store, 1, "a.nii.gz is damaged")
    for error in (RuntimeError("[gloo/pair.cc:561] Connection closed by peer"), rank_errors.OtherRankError()):
        assert printed(error, capsys) == ("", 1)


def test_a_rank_that_was_killed_is_named_by_the_others(store, capsys):
    for rank, pid in ((0, os.getpid()), (1, os.getpid()), (2, ENDED)):
        store.set(f"process {rank}", f"{pid} {rank_errors.socket.gethostname()}")
    text, code = printed(RuntimeError("Connection reset by peer"), capsys)
    assert text.startswith("error (rank 0): rank 2 ended without a message, perhaps killed by the system for memory")
    assert (text.count("\n"), code) == (1, 1)


def stopped(argv):
    raise StopRequested("stopped by SIGTERM; the same command continues")


@pytest.mark.parametrize("left", [False, True], ids=["killed", "left"])
def test_a_stop_because_of_a_killed_rank_names_it(store, capsys, left):
    """torchrun stops the other ranks, too; where all were asked to stop, nobody was killed."""
    for rank, pid in ((0, os.getpid()), (1, os.getpid()), (2, ENDED)):
        store.set(f"process {rank}", f"{pid} {rank_errors.socket.gethostname()}")
    if left:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "2")
            rank_errors.check_out()
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(stopped, [])
    text = "" if left else f"error (rank 0): {rank_errors.killed_ranks_text([2])}\n"
    printed = capsys.readouterr().err.replace("stopped by SIGTERM; the same command continues\n", "")
    assert (printed, exit_.value.code) == (text, STOPPED if left else FOUND)


def test_a_lost_connection_without_a_known_reason(store, monkeypatch, capsys):
    text, code = printed(dist.DistBackendError("NCCL error: remote process exited"), capsys)
    assert "the connection to another rank is lost (NCCL error" in text
    assert code == 1
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # not started by torchrun
    assert "the connection to another rank is lost" in printed(RuntimeError("Broken pipe"), capsys)[0]


def test_a_bug_of_all_ranks_has_one_traceback(store, capsys):
    for rank in (1, 2):
        post(store, rank, "KeyError: 'a'")
    with pytest.raises(KeyError) as error:
        run_verb.run_verb(lambda argv: {}["a"], [])
    if sys.version_info >= (3, 11):
        assert error.value.__notes__ == [f"error (all ranks): {run_verb.REPORT}"]
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(lambda argv: {}["a"], [])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == ""


def test_ranks_check_in_before_they_join(store, monkeypatch):
    others = [threading.Timer(0.05, store.add, ("ready", 1)) for _ in range(2)]
    for other in others:
        other.start()
    rank_errors.check_in()
    for other in others:
        other.join()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # with keys of its own
    post(rank_errors.shared_store(), 2, "a.nii.gz is damaged")
    with pytest.raises(rank_errors.OtherRankError):
        rank_errors.check_in()


def test_no_store_is_used_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_errors.shared_store() is None
    rank_errors.check_in()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("early", r"error \(rank 1\): \[Errno 2\] No such file or directory: 'missing.nii.gz'"),
        ("killed", r"error \(rank 0\): rank 1 ended without a message, perhaps killed by the system for memory; .*"),
        ("stopped", r"error \(rank 0\): rank 1 ended without a message, perhaps killed by the system for memory; .*"),
    ],
)
def test_under_torchrun_one_line_is_printed(how, expected):
    """Without a traceback, except torchrun's own at the end; and nobody waits until a timeout."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*run, "-m", "tests.training.failing", how],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(expected, lines[0])
    assert done.stderr.count("Traceback") == 1, done.stderr  # ChildFailedError of torchrun
    assert "Unable to shutdown" not in done.stderr


@pytest.mark.parametrize(
    ("devices", "rank", "processes", "advice"),
    [
        (2, 0, 4, "the 4 process(es) of this machine, but torch finds 2; use torchrun --nproc_per_node=2, or --device"),
        (2, 3, 4, "the 4 process(es) of this machine, but torch finds 2; use torchrun --nproc_per_node=2, or --device"),
        (1, 1, 2, "finds 1; use torchrun --nproc_per_node=1, or --device cpu"),
        (0, 0, 1, "finds 0; use --device cpu"),
    ],
)
def test_more_processes_than_devices(monkeypatch, devices, rank, processes, advice):
    for name, value in (("LOCAL_RANK", rank), ("RANK", rank), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError, match="--device cuda: expected a GPU for each") as error:
        find_processes("cuda")
    assert advice in str(error.value)


def test_torchrun_may_show_each_process_one_device(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_devices(1, 0)
    check_devices(4, 3)
