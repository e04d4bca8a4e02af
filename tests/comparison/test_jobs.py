"""Jobs side by side: in order, so many at once, logged, counted as failed where they fail, and stopped together."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hyspark.comparison import jobs
from hyspark.comparison.jobs import Job, run_jobs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def job(folder: Path, script: str, name: str = "a", done: bool = True) -> Job:
    """A shell script, run in `folder`/name."""
    return Job(name, ["sh", "-c", f"cd {folder / name}; {script}"], folder / name, lambda: done)


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_all_run_in_order_and_their_output_is_in_their_logs(tmp_path):
    done = []
    todo = [job(tmp_path, f"echo out{i}; echo err{i} >&2; echo {i} >> ../order", str(i)) for i in range(3)]
    assert run_jobs(todo, 1, lambda: done.append(1)) == []
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2"]
    assert (tmp_path / "1" / "log.txt").read_text().split() == ["out1", "err1"]
    assert len(done) == 3


def test_so_many_at_once(tmp_path):
    """Two that each wait for the other end only where both are under way; a third waits for a place."""
    meet = "touch here; while [ ! -e ../{other}/here ]; do sleep 0.01; done"
    third = job(tmp_path, "ls ../a/left ../b/left || true", "c")
    both = [job(tmp_path, meet.format(other=o) + "; touch left", n) for n, o in (("a", "b"), ("b", "a"))]
    assert run_jobs([*both, third], 2, lambda: None) == []
    assert "left" in (tmp_path / "c" / "log.txt").read_text()


def test_a_failed_job_is_shown_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_text("an earlier attempt\n")
    todo = [
        job(tmp_path, "echo what went wrong; exit 3", "a"),
        job(tmp_path, "echo fine", "b", done=False),
        job(tmp_path, "echo fine", "c"),
    ]
    called = []
    assert run_jobs(todo, 1, lambda: called.append(1)) == ["a", "b"]
    shown = capsys.readouterr().out
    assert "failed: a (exit code 3)" in shown
    assert "what went wrong" in shown
    assert "an earlier attempt" not in shown
    assert "failed: b (it ended without scores)" in shown
    assert called == [1]
    assert (tmp_path / "a" / "log.txt").read_text().startswith("an earlier attempt\n")


def test_an_interruption_stops_jobs_and_their_children(tmp_path):
    """As Ctrl-C does: here an exception in the callback after the first job."""

    def interrupt() -> None:
        until((tmp_path / "b" / "pids").exists)
        until(lambda: len((tmp_path / "b" / "pids").read_text().split()) == 2)
        raise KeyboardInterrupt

    todo = [job(tmp_path, "true", "a"), job(tmp_path, "sleep 60 & echo $$ $! > pids; wait", "b")]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(todo, 2, interrupt)
    assert not any(alive(int(pid)) for pid in (tmp_path / "b" / "pids").read_text().split())


def test_a_job_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.3)

    def interrupt() -> None:
        until((tmp_path / "b" / "pid").exists)
        raise KeyboardInterrupt

    deaf = "trap '' TERM; echo $$ > pid.tmp; mv pid.tmp pid; while true; do sleep 0.05; done"
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(tmp_path, "true", "a"), job(tmp_path, deaf, "b")], 2, interrupt)
    assert not alive(int((tmp_path / "b" / "pid").read_text()))


def test_a_child_that_outlives_its_job_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.5)

    def interrupt() -> None:
        until((tmp_path / "b" / "pid").exists)
        raise KeyboardInterrupt

    deaf = "(trap '' TERM; sh -c 'echo $PPID' > pid.tmp; mv pid.tmp pid; while true; do sleep 0.05; done) & wait"
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(tmp_path, "true", "a"), job(tmp_path, deaf, "b")], 2, interrupt)
    assert not alive(int((tmp_path / "b" / "pid").read_text()))


def test_sigterm_stops_the_jobs_and_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    pid = tmp_path / "a" / "pid"

    def send() -> None:
        until(lambda: pid.exists() and pid.read_text().strip())
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as exit_:
        run_jobs([job(tmp_path, "echo $$ > pid; exec sleep 60")], 1, lambda: None)
    sender.join()
    assert exit_.value.code == 128 + signal.SIGTERM
    assert not alive(int(pid.read_text()))
    assert signal.getsignal(signal.SIGTERM) == before


def test_threads_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "available_cores", lambda: 9)
    two = [jobs.job_variables(slot, 2, ["4", "7"]) for slot in range(3)]
    assert [v["CUDA_VISIBLE_DEVICES"] for v in two] == ["4", "7", "4"]
    assert two[0]["OMP_NUM_THREADS"] == "4"
    assert jobs.job_variables(0, 20, [])["OMP_NUM_THREADS"] == "1"
    alone = jobs.job_variables(0, 1, ["4", "7"])
    assert not {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & set(alone)
    assert "CUDA_VISIBLE_DEVICES" not in jobs.job_variables(0, 2, ["4"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in jobs.job_variables(0, 2, [])


def test_gpus_named_by_the_user_are_the_ones_used(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a")
    assert jobs.visible_gpus() == ["5", "GPU-8a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert jobs.visible_gpus() == ["0", "1"]


def test_the_step_shown_is_the_last_whole_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert jobs.last_step(path) == ""
    path.write_text('{"step": 0}\n{"step": 41}\n')
    assert jobs.last_step(path) == " step 42"
    path.write_text('{"step": 0}\n{"st')
    assert jobs.last_step(path) == ""
    path.write_text("")
    assert jobs.last_step(path) == ""


def test_signals_elsewhere_than_in_the_main_thread_are_left_alone(tmp_path):
    """Python allows handlers in the main thread only."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run_jobs([job(tmp_path, "true")], 1, lambda: None)))
    thread.start()
    thread.join()
    assert found == [[]]
