"""What preparing a data set will take, measured on one of its cases in a process of its own."""

import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyspark.data.preprocessing.prepare import prepare_into
from hyspark.data.quality.examine import Examined
from hyspark.data.settings import PrepareSettings
from hyspark.utils.processes import pool

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which the system counts memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of the store, seconds of one process for all cases, and the memory in bytes of a process, with the
    libraries it loads, at the largest case. case: the one that was measured.
    """

    store_bytes: float
    seconds: float
    memory: int
    case: str


def estimate(examined: Sequence[Examined], settings: PrepareSettings) -> Estimate | None:
    """From the largest case that can be prepared, by volume; None where none can be."""
    usable = [seen for seen in examined if not seen.is_broken and seen.shape and seen.spacing]
    if not usable:
        return None
    largest = max(usable, key=volume)
    with pool(1) as process:
        seconds, stored, memory = process.submit(measure, largest, settings).result()
    share = sum(map(volume, usable)) / volume(largest)
    return Estimate(stored * share, seconds * share, memory, largest.case.name)


def volume(seen: Examined) -> float:
    """mm^3 of a case that was read."""
    assert seen.shape
    assert seen.spacing
    return math.prod(seen.shape) * math.prod(seen.spacing)


def measure(seen: Examined, settings: PrepareSettings) -> tuple[float, int, int]:
    """Prepare a case and throw it away: seconds, bytes it took in the store, bytes of memory at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        outcome = prepare_into(seen.case, settings, Path(folder) / "entry")
        seconds = time.perf_counter() - clock
        if outcome.errors:
            raise ValueError("; ".join(outcome.errors))
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return seconds, stored, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
