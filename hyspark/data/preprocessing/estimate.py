"""Cost of preparing a data set, measured on its largest case in a separate process."""

import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import prepare_into
from hyspark.data.quality.examine import Examined
from hyspark.data.quality.findings import Finding
from hyspark.data.settings import PrepareSettings
from hyspark.utils.processes import KILLED, peak_resident, worker_pool
from hyspark.utils.text import first_line


@dataclass(frozen=True)
class PreparationEstimate:
    """Estimated cost of preparing all cases.

    Attributes:
        store_bytes: bytes of the store.
        seconds: time of one process for all cases.
        memory: bytes of a process at the largest case, with the libraries it loads; None where it is not reported.
        case: name of the case that was measured.
    """

    store_bytes: float
    seconds: float
    memory: int | None
    case: str


def estimate_preparation(examined: Sequence[Examined], settings: PrepareSettings) -> PreparationEstimate | None:
    """Extrapolate from the largest case, by physical volume; return None if no case can be prepared.

    A case that cannot be prepared gets a finding, and the next one is measured.
    """
    usable = sorted((seen for seen in examined if not seen.is_broken and seen.shape and seen.spacing), key=cubic_mm)
    while usable:
        largest = usable[-1]
        measured = measure_in_process(largest, settings)
        if isinstance(measured, Measured):
            scale = sum(map(cubic_mm, usable)) / cubic_mm(largest)
            stored, seconds = measured.stored_bytes * scale, measured.seconds * scale
            return PreparationEstimate(stored, seconds, measured.memory, largest.case.name)
        largest.findings.append(Finding("not prepared", str(largest.case.image), measured))
        usable.pop()
    return None


def measure_in_process(seen: Examined, settings: PrepareSettings) -> "Measured | str":
    """Measure the preparation of a case in a new process; return the reason in one line if it fails."""
    with worker_pool(1) as process:
        try:
            return process.submit(measure_preparation, seen.case, settings).result()
        except BrokenProcessPool:
            return KILLED
        except Exception as error:  # whatever its files cause
            return first_line(error)


def cubic_mm(seen: Examined) -> float:
    """Compute the physical volume of a readable case in mm^3."""
    assert seen.shape
    assert seen.spacing
    return math.prod(seen.shape) * math.prod(seen.spacing)


@dataclass(frozen=True)
class Measured:
    """The cost of preparing one case.

    Attributes:
        seconds: time.
        stored_bytes: bytes in the store.
        memory: peak memory in bytes; None where the system does not report it.
    """

    seconds: float
    stored_bytes: int
    memory: int | None


def measure_preparation(case: Case, settings: PrepareSettings) -> Measured:
    """Prepare a case in a temporary folder, and measure it; raise ValueError if it cannot be prepared."""
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        outcome = prepare_into(case, settings, Path(folder) / "entry")
        seconds = time.perf_counter() - clock
        if outcome.errors:
            raise ValueError("; ".join(error.removeprefix(f"{case.image}: ") for error in outcome.errors))
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return Measured(seconds, stored, peak_resident())
