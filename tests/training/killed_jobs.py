"""Work that kills its process. Not in tests/utils, which MONAI 1.5 installs too, as a package of that name."""

import os
import signal
import time
from pathlib import Path


def work(number: int, folder: Path) -> str:
    """Kill this process for some numbers: 3 always, 5 the first time, as where memory is short for a while."""
    seen = folder / str(number)
    is_first = not seen.exists()
    seen.touch()
    if number == 3 or (number == 5 and is_first):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise ValueError("7")
    return f"{number} done"


def finish_late(folder: Path) -> None:
    """Write a file at the beginning, and one after a time that no test waits for."""
    (folder / "begun").touch()
    time.sleep(20)
    (folder / "late").touch()


def be_killed(folder: Path) -> None:
    """Kill this process when `finish_late` has begun in another."""
    while not (folder / "begun").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
