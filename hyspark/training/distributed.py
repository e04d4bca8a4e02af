"""Processes and devices: one process or many under torchrun, CPU or CUDA.

A process that torchrun started joins a process group and trains by DistributedDataParallel, also where it is the only
one. So one GPU is enough to run what several run by, NCCL included, and the numbers are those of a plain start.

On CUDA batch statistics are shared by torch's SyncBatchNorm, or timm's, which keeps the activation that timm's networks
hold in their BatchNorms. Both refuse CPU tensors, so on the CPU `GlobalBatchNorm` below does the same with
differentiable all-reduces: there, too, several processes compute what one would with the same global batch.
"""

import atexit
import gc
import inspect
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hyspark.training.batch_norm import global_batch_norm, synchronise_batch_norms
from hyspark.utils.log import LOG

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among the others. by_torchrun: whether torchrun started it."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    by_torchrun: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes and talks: rank 0 of the world."""
        return self.rank == 0

    @property
    def are_joined(self) -> bool:
        """Whether they form a process group: several always do, one does inside `connected` if torchrun started it."""
        return self.world_size > 1 or (self.by_torchrun and dist.is_initialized())

    def text(self, precision: str) -> str:
        """Device, processes and number format, for logs and reports, with a warning where the processor has no
        arithmetic for it: an AMD EPYC 7003 took 22 s for a step in bf16 and 2.4 s in fp32.
        """
        lacks = self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        emulated = precision != "fp32" and lacks and platform.machine() in ("x86_64", "AMD64")
        warning = " (WARNING: this processor emulates it; --precision fp32 is many times faster)" if emulated else ""
        return f"{self.device}, {self.world_size} process(es), {precision}{warning}"


def find_processes(device: str) -> Processes:
    """Read torchrun's environment and choose the device ("auto", "cpu", "cuda").

    Raises ValueError where CUDA is asked for and absent, or has fewer devices than local processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if torch.cuda.device_count() <= local_rank:
            raise ValueError(
                f"process {local_rank} of this machine has no CUDA device: torch finds {torch.cuda.device_count()}; "
                "start fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    logging.basicConfig(format="%(message)s")
    rank = int(os.environ.get("RANK", 0))
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return Processes(torch.device(device), rank, local_rank, world_size, dist.is_torchelastic_launched())


@contextmanager
def connected(processes: Processes) -> Iterator[None]:
    """Join the process group: of several processes, or of one that torchrun started."""
    if processes.world_size == 1 and not processes.by_torchrun:
        yield
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # What processes wrote there before torchrun started them again would be taken for what they write now, see
        # https://github.com/pytorch/pytorch/issues/135712. On several machines their counts may differ.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    on_cuda = processes.device.type == "cuda"
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=processes.device if on_cuda else None,  # else barriers would have to guess it
    )
    atexit.register(end_threads, [dist.group.WORLD])
    try:
        yield
    finally:
        dist.destroy_process_group()


def end_threads(groups: list[Any]) -> None:
    """End the threads of groups that were destroyed, before Python ends.

    They live as long as anything refers to the group, such as a model in a circle of references, and one that gives
    back a tensor while Python ends aborts the process, see https://github.com/pytorch/pytorch/pull/179291. The list
    has to hold the last reference: torch waits for the threads without holding the interpreter's lock then.
    """
    for name in ("last_exc", "last_value", "last_traceback"):  # the frames of what ended the program hold the model
        vars(sys).pop(name, None)
    gc.collect()
    groups.clear()


def share_gradients(model: nn.Module, processes: Processes, some_unused: bool = False) -> nn.Module:
    """The model on its device, with gradients averaged and batch statistics shared over all processes.

    some_unused: whether there are steps in which some weights get no gradient. Weights lie channels last, so that
    pointwise layers and LayerNorm read contiguous rows.
    """
    is_volumetric = any(p.ndim == 5 for p in model.parameters())
    channels_last = torch.channels_last_3d if is_volumetric else torch.channels_last
    model = model.to(processes.device).to(memory_format=channels_last)
    if not processes.are_joined:
        return model
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it
    sync_buffers = "forward_sync_buffers" if is_new else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "find_unused_parameters": some_unused}
    on_cuda = processes.device.type == "cuda"
    if on_cuda or processes.world_size > 1:  # of one process, torch's SyncBatchNorm is a plain one
        synchronise_batch_norms(model, convert_sync_batchnorm if on_cuda else global_batch_norm)
    return DistributedDataParallel(model, device_ids=[processes.local_rank] if on_cuda else None, **options)


def gradients_shared(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Whether the backward pass inside averages gradients over the processes; if not, a later one does it for both."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def bare(model: nn.Module) -> Any:
    """The network inside the wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def mean_over(value: Tensor, processes: Processes) -> float:
    """Mean of a scalar over the processes, as a number."""
    value = value.detach().clone()
    if processes.are_joined:
        dist.all_reduce(value)
        value /= processes.world_size
    return float(value)


def gather(values: Sequence[Any], processes: Processes) -> list[Any]:
    """The lists of all processes in one, on every process."""
    if not processes.are_joined:
        return list(values)
    parts: list[Any] = [None] * processes.world_size
    dist.all_gather_object(parts, list(values))
    return [v for part in parts for v in part]


def once_per_machine(work: Callable[[], T], processes: Processes) -> list[T]:
    """What `work` gives on one process of each machine, on every process; the others wait as long as it takes."""
    if processes.world_size == 1:
        return [work()]
    # A group of its own, made before the work, since others give up on a process that lets them wait half an hour.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    parts: list[Any] = [None] * processes.world_size
    dist.all_gather_object(parts, [work()] if processes.local_rank == 0 else [], group=group)
    dist.destroy_process_group(group)
    return [result for part in parts for result in part]


def any_of(flag: bool, processes: Processes) -> bool:
    """Whether a flag is set on any process."""
    if not processes.are_joined:
        return flag
    found = torch.tensor(float(flag), device=processes.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def barrier(processes: Processes) -> None:
    """Wait for all processes."""
    if processes.are_joined:
        dist.barrier()
