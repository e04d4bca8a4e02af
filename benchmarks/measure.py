"""Helpers of the benchmarks: time, memory, and the machine they are measured on.

torch is imported only where it is needed, so that a process that only reads chunks is measured without it.
"""

import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which getrusage counts memory."""


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def wall_and_processor_seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time of one call, and the processor's time in it, which other work on the machine hardly changes."""
    start, own = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - own


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of a call."""
    return statistics.median(seconds(function) for _ in range(repeats))


def peak_memory() -> int:
    """Largest resident memory that this process has had, in bytes."""
    # On Linux ru_maxrss begins with the memory of the process that started this one, and VmHWM lags behind VmRSS.
    return (
        max(memory_now("VmHWM"), memory_now("VmRSS"))
        or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT
    )


def resident_memory() -> int:
    """Resident memory of this process in bytes; its peak where the system does not tell."""
    return memory_now("VmRSS") or peak_memory()


def memory_now(field: str) -> int:
    """A field of Linux's report on this process in bytes; 0 on other systems."""
    status = Path("/proc/self/status")
    return 1024 * int(re.findall(rf"{field}:\s*(\d+) kB", status.read_text())[0]) if status.is_file() else 0


def in_fresh_process(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Result of a module's function in a new process with one thread, and the peak memory of that process in bytes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(with_peak_memory, function, *args).result()


def with_peak_memory(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Result of a function in this process, told to use one thread, and the peak memory of the process in bytes."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    result = function(*args)
    return result, peak_memory()


def machine() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory in GB, GPU, versions."""
    import monai
    import torch

    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }


def processor() -> str:
    """Model of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return models[0] if models else platform.processor() or platform.machine()
