"""Processes and devices: one process or many under torchrun, CPU or CUDA.

A process that torchrun started joins a process group and trains by DistributedDataParallel, even if it is the only one.
So one GPU is enough to run the code of several, NCCL included, with the numbers of a start without torchrun.

On CUDA, torch's SyncBatchNorm reduces batch statistics over processes. timm's variant keeps the activation that timm's
networks hold in their BatchNorms. Both refuse CPU tensors; on the CPU `GlobalBatchNorm` does the same with
differentiable all-reduces. So several processes compute what one would with the same global batch.
"""

import atexit
import gc
import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hyspark.training import rank_errors
from hyspark.training.batch_norm import global_batch_norm, synchronise_batch_norms
from hyspark.utils.log import set_up_log
from hyspark.utils.text import first_line

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Processes:
    """This process among the others of a run.

    Attributes:
        device: Device of this process.
        rank: Rank among all processes.
        local_rank: Rank among the processes of this machine.
        world_size: Number of processes on all machines.
        by_torchrun: Whether torchrun started the process.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    by_torchrun: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs: rank 0."""
        return self.rank == 0

    @property
    def are_joined(self) -> bool:
        """Whether there is a process group: of several processes always, of one inside `join_process_group`."""
        return self.world_size > 1 or (self.by_torchrun and dist.is_initialized())

    def describe(self, precision: str) -> str:
        """Describe device, processes and precision, with a warning if the processor only emulates the precision.

        An AMD EPYC 7003 took 22 s for a step in emulated bf16, and 2.4 s in fp32.
        """
        lacks = self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        emulated = precision != "fp32" and lacks and platform.machine() in ("x86_64", "AMD64")
        warning = " (WARNING: this processor emulates it; --precision fp32 is many times faster)" if emulated else ""
        return f"{self.device}, {self.world_size} process(es), {precision}{warning}"


def find_processes(device: str) -> Processes:
    """Read torchrun's environment, choose the device, and set up logging.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: There are fewer CUDA devices than processes on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        check_devices(torch.cuda.device_count(), local_rank)
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    set_up_log(keep_level=True)
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return Processes(torch.device(device), rank, local_rank, world_size, dist.is_torchelastic_launched())


def check_devices(num_devices: int, local_rank: int) -> None:
    """Check that each process of this machine has a CUDA device of its own.

    Raises:
        ValueError: It has not; of several devices, all processes raise it, not only those without one.
    """
    num_processes = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # torchrun may show each of its processes one device only (--virtual-local-rank).
    if local_rank >= num_devices or num_processes > num_devices > 1:
        advice = f"torchrun --nproc_per_node={num_devices}, or " if num_devices else ""
        raise ValueError(
            f"--device cuda: expected a GPU for each of the {num_processes} process(es) of this machine, but torch "
            f"finds {num_devices}; use {advice}--device cpu"
        )


def describe_unusable_gpu(error: BaseException) -> str:
    """Return what to do about a GPU or a driver that torch cannot compute with; empty for other errors."""
    causes = (
        "no kernel image",
        "no nvidia driver",
        "driver version is insufficient",
        "driver on your system is too old",
    )
    if not isinstance(error, RuntimeError) or not any(cause in str(error).lower() for cause in causes):
        return ""
    return f"--device cuda: torch cannot compute on this GPU ({first_line(error)}); use --device cpu"


@contextmanager
def join_process_group(processes: Processes) -> Iterator[None]:
    """Join the process group inside the block: of several processes, or of one that torchrun started."""
    if processes.world_size == 1 and not processes.by_torchrun:
        yield
        return
    rank_errors.check_in()
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # Without a prefix, keys that processes wrote before torchrun restarted them would be read as new ones, see
        # https://github.com/pytorch/pytorch/issues/135712. On several machines their restart counts may differ.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    on_cuda = processes.device.type == "cuda"
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=processes.device if on_cuda else None,  # else barriers would have to guess it
    )
    atexit.register(release_process_groups, [dist.group.WORLD])
    try:
        yield
    finally:
        rank_errors.check_out()
        dist.destroy_process_group()


def release_process_groups(groups: list[Any]) -> None:
    """End the threads of destroyed process groups before Python exits.

    A thread lives as long as anything refers to its group, such as a model in a reference cycle. One that releases a
    tensor while Python exits aborts the process, see https://github.com/pytorch/pytorch/pull/179291. The list has to
    hold the last reference: torch then waits for the threads without holding the interpreter's lock.
    """
    for name in ("last_exc", "last_value", "last_traceback"):  # the frames of the last error hold the model
        vars(sys).pop(name, None)
    gc.collect()
    groups.clear()


def wrap_model(model: nn.Module, processes: Processes) -> nn.Module:
    """Move a model to its device, and average gradients and batch statistics over all processes.

    Weights lie channels last, so that pointwise layers and LayerNorm read contiguous rows; except where torch fails on
    it (see `fails_channels_last`).

    Args:
        model: Network.
        processes: This process among the others.
    """
    model = model.to(processes.device)
    if processes.device.type != "cpu" or not any(fails_channels_last(module) for module in model.modules()):
        is_volumetric = any(p.ndim == 5 for p in model.parameters())
        model = model.to(memory_format=torch.channels_last_3d if is_volumetric else torch.channels_last)
    if not processes.are_joined:
        return model
    on_cuda = processes.device.type == "cuda"
    if on_cuda or processes.world_size > 1:  # of one process, torch's SyncBatchNorm is a plain one
        from timm.layers import convert_sync_batchnorm  # takes seconds, and rank errors come before a model

        synchronise_batch_norms(model, convert_sync_batchnorm if on_cuda else global_batch_norm)
    return parallel(model, processes)


def fails_channels_last(module: nn.Module) -> bool:
    """Return whether torch's CPU kernels write beyond the weight gradient of a layer whose weights lie channels last.

    Seen in torch 2.14 (oneDNN): a 2D convolution of one pixel, with a stride, of 2 to 6 channels, as on the images of
    RepVGG and MobileOne. It ends the process or damages other numbers.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and 1 < module.in_channels < 8
    )


def parallel(model: nn.Module, processes: Processes) -> DistributedDataParallel:
    """Average gradients of the weights that are trained now, in each backward pass."""
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it
    options: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    device_ids = [processes.local_rank] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **options)


def wrap_again(model: nn.Module, processes: Processes) -> nn.Module:
    """Wrap a model anew after weights were frozen or released; a model that is not wrapped is unchanged."""
    if not isinstance(model, DistributedDataParallel):
        return model
    model.reducer._remove_autograd_hooks()  # the earlier wrapper may live on in a reference cycle
    return parallel(model.module, processes).train(model.training)


def synchronise_gradients(model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the processes in the backward pass of the last micro-batch only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()


def unwrap(model: nn.Module) -> Any:
    """Return the network inside the wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def mean_over_processes(value: Tensor, processes: Processes) -> float:
    """Average a scalar tensor over the processes."""
    value = value.detach().clone()
    if processes.are_joined:
        dist.all_reduce(value)
        value /= processes.world_size
    return float(value)


def gather_lists(values: Sequence[Any], processes: Processes) -> list[Any]:
    """Concatenate the lists of all processes, on every process."""
    if not processes.are_joined:
        return list(values)
    gathered: list[Any] = [None] * processes.world_size
    dist.all_gather_object(gathered, list(values))
    return [value for own in gathered for value in own]


def run_once_per_machine(work: Callable[[], ResultT], processes: Processes) -> list[ResultT]:
    """Call `work` on one process of each machine, while the others wait as long as it takes.

    Returns:
        The results of all machines, on every process.
    """
    return run_and_gather(lambda: [work()] if processes.local_rank == 0 else [], processes)


def run_and_gather(work: Callable[[], list[ResultT]], processes: Processes) -> list[ResultT]:
    """Call `work` on every process, and wait for the slowest as long as it takes.

    Returns:
        The concatenated lists of all processes, on every process.
    """
    if processes.world_size == 1:
        return work()
    # A group of its own, made before the work, since the default group times out after half an hour.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    # Dropped here, before torch 2.8, its destructor would wait with the interpreter's lock for a thread that wants it.
    release = partial(release_process_groups, [group])
    atexit.register(release)  # for the case that the work fails
    gathered: list[Any] = [None] * processes.world_size
    dist.all_gather_object(gathered, work(), group=group)
    dist.destroy_process_group(group)
    del group
    release()  # now, since its threads and files would stay
    atexit.unregister(release)
    return [result for own in gathered for result in own]


def any_process(flag: bool, processes: Processes) -> bool:
    """Return whether a flag is set on any process."""
    if not processes.are_joined:
        return flag
    found = torch.tensor(float(flag), device=processes.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def barrier(processes: Processes) -> None:
    """Wait for all processes."""
    if processes.are_joined:
        dist.barrier()
