"""Memory of a process: free, and used at most."""

import psutil
import torch

from hyspark.training.distributed import Processes
from hyspark.utils.free_memory import free_main_memory
from hyspark.utils.processes import peak_resident


def free_memory(processes: Processes) -> int:
    """Measure the bytes that this process may still take: on its GPU, or its fraction of the machine's memory."""
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    return free_main_memory()


def peak_memory(processes: Processes) -> int | None:
    """Measure the most bytes that this process has used: of tensors on its GPU, or resident.

    Returns:
        Bytes; None on the CPU of systems that do not report them.
    """
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(processes.device)
    return peak_resident()


def data_memory() -> int | None:
    """Measure the bytes of this process that RLIMIT_DATA limits; None on systems that do not report them."""
    return getattr(psutil.Process().memory_info(), "data", None)


def release_cached_memory(device: torch.device) -> None:
    """Return to the system what torch holds on a GPU without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise_device(processes: Processes) -> None:
    """Wait until the device has finished its queue."""
    if processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
