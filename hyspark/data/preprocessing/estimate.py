"""Cost of preparing a data set, measured on its largest case in a separate process."""

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
from hyspark.utils.processes import worker_pool

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which the system counts memory."""


@dataclass(frozen=True)
class PreparationEstimate:
    """Estimated cost of preparing all cases.

    Attributes:
        store_bytes: bytes of the store.
        seconds: time of one process for all cases.
        memory: bytes of a process at the largest case, with the libraries it loads.
        case: name of the case that was measured.
    """

    store_bytes: float
    seconds: float
    memory: int
    case: str


def estimate_preparation(examined: Sequence[Examined], settings: PrepareSettings) -> PreparationEstimate | None:
    """Extrapolate from the largest case, by physical volume; return None if no case can be prepared."""
    usable = [seen for seen in examined if not seen.is_broken and seen.shape and seen.spacing]
    if not usable:
        return None
    largest = max(usable, key=cubic_mm)
    with worker_pool(1) as process:
        seconds, stored, memory = process.submit(measure_preparation, largest, settings).result()
    scale = sum(map(cubic_mm, usable)) / cubic_mm(largest)
    return PreparationEstimate(stored * scale, seconds * scale, memory, largest.case.name)


def cubic_mm(seen: Examined) -> float:
    """Compute the physical volume of a readable case in mm^3."""
    assert seen.shape
    assert seen.spacing
    return math.prod(seen.shape) * math.prod(seen.spacing)


def measure_preparation(seen: Examined, settings: PrepareSettings) -> tuple[float, int, int]:
    """Prepare a case in a temporary folder; return seconds, bytes in the store, and peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        outcome = prepare_into(seen.case, settings, Path(folder) / "entry")
        seconds = time.perf_counter() - clock
        if outcome.errors:
            raise ValueError("; ".join(outcome.errors))
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return seconds, stored, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
