"""Work in several processes: a killed one costs its own job alone, and is named."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from hyspark.utils import processes
from hyspark.utils.exit_codes import INTERRUPTED
from hyspark.utils.processes import map_unordered, peak_resident, worker_pool
from tests.training.killed_jobs import be_killed, finish_late, work

pytestmark = pytest.mark.spawn


def named(number: int, folder: Path) -> str:
    return f"{number} killed"


def test_a_killed_process_costs_its_job_alone(tmp_path, caplog):
    order = (5, 0, 1, 2, 3, 4, 6)  # so that 5 is killed beside others
    results = list(map_unordered(work, [(n, tmp_path) for n in order], 2, named))
    assert sorted(results) == [f"{n} {'killed' if n == 3 else 'done'}" for n in (0, 1, 2, 3, 4, 5, 6)]


def test_of_a_broken_pool_no_process_is_waited_for(tmp_path):
    """The processes that are left heed no SIGTERM; the pool ends them, whatever they do."""
    with worker_pool(3) as pool:
        pool.submit(os.getpid).result()  # a pool notices the end of a process that it knew when it last waited
        killed = pool.submit(be_killed, tmp_path)
        pool.submit(finish_late, tmp_path)
        assert isinstance(killed.exception(), BrokenProcessPool)
    assert not (tmp_path / "late").exists()


def test_one_process_is_this_one(tmp_path):
    assert list(map_unordered(os.getpid, [(), ()], 1, os.getpid)) == [os.getpid()] * 2
    with pytest.raises(ValueError, match="7"):
        list(map_unordered(work, [(7, tmp_path), (0, tmp_path)], 1, named))


def test_processes_that_cannot_be_started_are_one_message(monkeypatch, tmp_path):
    """As in a script without the line `if __name__ == "__main__":`."""
    monkeypatch.setattr(processes, "set_up_worker", exit_at_once)
    with pytest.raises(OSError, match="no worker process can be started; set prepare_workers to 1"):
        list(map_unordered(work, [(0, tmp_path), (1, tmp_path)], 2, named))


def exit_at_once() -> None:
    os._exit(1)


def test_peak_memory_counts_what_was_held():
    ballast = bytearray(os.urandom(1000) * 30000)
    held = peak_resident()
    assert held is None or held > len(ballast)


def test_a_worker_waits_for_no_library_and_has_one_thread():
    with worker_pool(1) as pool:
        assert pool.submit(eval, "'torch' in __import__('sys').modules").result() is False
        assert pool.submit(eval, "__import__('torch').get_num_threads()").result() == 1


@pytest.mark.parametrize("is_busy", [False, True], ids=["importing", "working"])
def test_control_c_ends_a_worker_without_a_traceback(is_busy, capfd):
    with worker_pool(1) as pool:
        if is_busy:
            pool.submit(os.getpid).result()
        future = pool.submit(time.sleep, 60)
        (process,) = pool._processes.values()
        os.kill(process.pid, signal.SIGINT)
        with pytest.raises(BrokenProcessPool):
            future.result()
    assert process.exitcode == INTERRUPTED
    assert capfd.readouterr().err == ""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
