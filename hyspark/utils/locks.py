"""Locks of folders, which the system releases when their process ends, however it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hyspark.utils.log import LOG

LOCK_FILE = ".lock"
LOCK_TIMEOUT = 10.0
"""Seconds that a stopped process of the same folder, or the worker processes of a killed one, have to end."""


@contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for this process; make it if it does not exist.

    Args:
        folder: the folder.
        what: what it is, for the message.

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another process is writing to %s; waiting up to %.0f s for its end", folder, LOCK_TIMEOUT)
            lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise ValueError(f"another process is writing to {folder}; wait for it, or name another {what}") from None
    try:
        yield
    finally:
        lock.release()
