"""Main memory that a process may still take: of the machine, of its cgroups, below its own limits; and its errors."""

import os
import re
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container, or of a scheduler's job."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""The file that lists the cgroups of this process."""
UNLIMITED = 2**60
"""Bytes from which a limit is none."""
NO_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|can ?not|could not|unable to|failed to) allocate|bad_alloc|alloc_failed|"
    r"could not create a primitive$",
    re.IGNORECASE,
)
"""Messages of torch, its libraries and NumPy; the last is oneDNN's, without memory for a kernel's code or tables."""


def free_main_memory() -> int:
    """Measure the bytes of main memory that this process may still take.

    The processes that torchrun started on a machine share its memory in equal parts.
    """
    num = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    common = min([psutil.virtual_memory().available, *free_in_cgroups()])
    return max(0, min([common // num, *free_below_limits()]))


def free_in_cgroups(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[int]:
    """Measure the bytes that are left in each cgroup with a limit, of version 1 or 2.

    Args:
        root: Folder of the cgroups.
        membership: The file that lists those of the process.
    """
    free = []
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folders = [top, *(top.joinpath(*Path(path).parts[1:end]) for end in range(2, len(Path(path).parts) + 1))]
        for folder in folders:
            most, used = read_number(folder / limit), read_number(folder / usage)
            if most is not None and used is not None and most < UNLIMITED:
                free.append(most - used + reclaimable(folder))
    return free


def read_number(path: Path) -> int | None:
    """Read a file that holds a number; None without one, as in `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def reclaimable(cgroup: Path) -> int:
    """Read the bytes of cached files that a cgroup gives up when memory is short."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_below_limits() -> list[int]:
    """Measure the bytes below the limits of this process itself (ulimit -v, ulimit -d)."""
    if resource is None:
        return []
    used = psutil.Process().memory_info()
    free = []
    for name, field in (("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")):
        most, _ = (
            resource.getrlimit(getattr(resource, name)) if hasattr(resource, name) else (resource.RLIM_INFINITY, 0)
        )
        if most != resource.RLIM_INFINITY and hasattr(used, field):
            free.append(most - getattr(used, field))
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error means that memory ran out; on the CPU torch has no class for it."""
    is_text = isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_text
