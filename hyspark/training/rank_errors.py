"""Errors of several processes: one line for each error, with the ranks that have it.

Ranks that fail alike would print the same line many times, and those that wait for a failed one a consequence of its
error. They therefore agree by the store that torchrun keeps, which outlives all of them.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from hyspark.utils.digests import text_digest
from hyspark.utils.processes import STOP_SIGNALS
from hyspark.utils.text import first_line

GRACE = 2.0
"""Seconds that a failing rank waits for others."""
LOST_CONNECTION = ("connection closed", "connection reset", "broken pipe", "connection refused", "gloo/transport")
"""Parts of messages, in lower case, of an operation that another rank did not take part in."""


class OtherRankError(Exception):
    """Another rank has failed, and reports why."""


def several_ranks() -> bool:
    """Return whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def shared_store() -> Any:
    """Connect to torchrun's store; None without one, or if restarts of several machines could mix up their keys."""
    env = os.environ
    one_machine = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    restarts = "0" if one_machine else env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if not several_ranks() or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or restarts != "0":
        return None
    try:
        address = (env["MASTER_ADDR"], int(env["MASTER_PORT"]))
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
    except (RuntimeError, KeyError, ValueError):
        return None
    return dist.PrefixStore(f"hyspark attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def check_in() -> None:
    """Wait until all ranks are ready to join; a failed one would otherwise be waited for until a timeout.

    Raises:
        OtherRankError: A rank has failed before.
    """
    store = shared_store()
    if store is None:
        return
    store.set(f"process {os.environ['RANK']}", f"{os.getpid()} {socket.gethostname()}")
    store.add("ready", 1)
    while store.add("ready", 0) < int(os.environ["WORLD_SIZE"]):
        if store.add("errors", 0):
            raise OtherRankError
        time.sleep(0.02)


def check_out() -> None:
    """Record that this rank leaves by itself; one that ends without it was killed."""
    with suppress(RuntimeError):  # torchrun itself has ended
        if store := shared_store():
            store.set(f"left {os.environ['RANK']}", "")


def post_error(error: BaseException, message: str) -> tuple[str, str]:
    """Post this rank's error to the others; one rank prints it for all that have it.

    Args:
        error: The error.
        message: What it says to the user; empty for a bug.

    Returns:
        The message, and the ranks that have it for whoever prints it, such as "rank 2"; empty for all others.
    """
    ignore_stop_signals()
    if is_lost_connection(error):
        message = reason_for_lost_connection(error)
        if not message:
            wait_for("printed", 1, 2 * GRACE)
            write_error_file("stopped by the error of another rank")
            return "", ""
    text = message or f"{type(error).__name__}: {first_line(error)}"
    write_error_file(text)
    return message, ranks_to_print(text)


def ignore_stop_signals() -> None:
    """Let this rank post its error: torchrun stops all ranks when the first has ended."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def post_killed_ranks() -> tuple[str, str]:
    """Post that ranks were killed, if that is why torchrun stops this one.

    Returns:
        As `post_error`; nothing if no rank was killed.
    """
    try:
        store = shared_store()
        killed = ended_ranks(store) if store else []
    except RuntimeError:  # torchrun itself has ended
        return "", ""
    if not killed:
        return "", ""
    ignore_stop_signals()
    message = killed_ranks_text(killed)
    write_error_file(message)
    return message, ranks_to_print(message)


def ranks_to_print(message: str) -> str:
    """Post a message; return the ranks that have it, such as "rank 2", on the one that prints it, else nothing."""
    rank, world_size = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1))
    try:
        store = shared_store()
        if store is None:
            return f"rank {rank}"
        digest = text_digest([message])
        store.set(f"{digest} {rank}", "")
        store.add("errors", 1)
        wait_for("errors", world_size)
        if store.add(f"{digest} printed", 1) > 1:
            return ""
        ranks = [str(one) for one in range(world_size) if store.check([f"{digest} {one}"])]
        if store.add("printed", 1) == 1 and store.add("ready", 0) == world_size:
            print(file=sys.stderr)  # ends the line of a progress bar
    except RuntimeError:  # torchrun itself has ended
        return f"rank {rank}"
    if len(ranks) == world_size:
        return "all ranks"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"


def wait_for(counter: str, number: int, seconds: float = GRACE) -> None:
    """Wait until a counter of the store has reached a number, or the time is over."""
    store, deadline = shared_store(), time.monotonic() + seconds
    while store and store.add(counter, 0) < number and time.monotonic() < deadline:
        time.sleep(0.02)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says only that another rank did not take part in an operation."""
    if isinstance(error, OtherRankError | dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in LOST_CONNECTION)


def reason_for_lost_connection(error: BaseException) -> str:
    """Return what this rank reports of a lost connection; empty if another rank reports its own error."""
    try:
        store = shared_store()
        if store is None:
            return f"the connection to another rank is lost ({first_line(error)}); the same command continues the run"
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if isinstance(error, OtherRankError) or store.add("errors", 0):
                return ""
            if killed := ended_ranks(store):
                return killed_ranks_text(killed)
            time.sleep(0.05)
    except RuntimeError:
        pass
    return f"the connection to another rank is lost ({first_line(error)}); the same command continues the run"


def killed_ranks_text(killed: Sequence[int]) -> str:
    """Write what to do about ranks that were killed."""
    return (
        f"{'rank' if len(killed) == 1 else 'ranks'} {', '.join(map(str, killed))} ended without a message, perhaps "
        "killed by the system for memory; use a smaller --batch_size or fewer --dataloader_workers; the same command "
        "continues the run from its last checkpoint"
    )


def ended_ranks(store: Any) -> Sequence[int]:
    """List the ranks on this machine whose processes have ended without `check_out`."""
    ended = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if store.check([f"process {rank}"]) and not store.check([f"left {rank}"]):
            pid, _, host = store.get(f"process {rank}").decode().partition(" ")
            if host == socket.gethostname() and not is_alive(int(pid)):
                ended.append(rank)
    return ended


def is_alive(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def write_error_file(message: str) -> None:
    """Write an error to the file that torchrun's own summary quotes."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
