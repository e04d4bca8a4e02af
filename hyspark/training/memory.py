"""Memory of a process: free, peak."""

import os
from pathlib import Path

import torch

from hyspark.training.distributed import Processes


def free_memory(processes: Processes) -> int | None:
    """Bytes that this process may still take: what is free on its GPU, or its share of what the machine has
    available; None where the system does not tell (it does on Linux).
    """
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    available = proc_bytes("meminfo", "MemAvailable")
    return None if available is None else available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(processes: Processes) -> int | None:
    """Most bytes that this process has had so far: of tensors on its GPU, or resident; None where the system does not
    tell.
    """
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(processes.device)
    peaks = [proc_bytes("self/status", field) for field in ("VmHWM", "VmRSS")]  # the first lags behind the second
    return max((peak for peak in peaks if peak is not None), default=None)


def proc_bytes(file: str, field: str) -> int | None:
    """A field of a file in Linux's /proc that counts kB, in bytes; None where there is none."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def synchronise(processes: Processes) -> None:
    """Wait until the device has done what it was given."""
    if processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
