"""The loader: batches in the order of the steps, whatever the number of workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from hyspark.utils.processes import available_cores, ignore_signals
from hyspark.utils.text import first_line
from hyspark.utils.tracebacks import raised_here

Batch = dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """The slots of a global batch that one process fills.

    Attributes:
        bs: volumes in the global batch.
        rank: rank of this process.
        world_size: number of processes.
    """

    bs: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.bs % self.world_size:
            low = self.bs // self.world_size * self.world_size
            raise ValueError(
                f"batch size: expected a multiple of the {self.world_size} processes, since it counts volumes over all "
                f"processes, got {self.bs}; use {low or self.world_size}"
            )

    @property
    def slots(self) -> range:
        """Slots of this process in the global batch."""
        num = self.bs // self.world_size
        return range(self.rank * num, (self.rank + 1) * num)


class ErrorsAsItems(Dataset[Any]):
    """A data set in a worker process that returns errors of files; torch would add a traceback to their messages."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Batch | OSError | ValueError:
        try:
            return self.dataset[index]
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or raised_here(error):
                return error
            raise


def make_loader(dataset: Dataset[Batch], items: Sequence[int], num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Make a loader that yields the given items of a data set in order.

    Args:
        dataset: data set whose items are whole batches.
        items: indices of the items.
        num_workers: worker processes; -1 takes one per core, at most 8.
        pin_memory: whether to copy batches to page-locked memory.
    """
    if num_workers < 0:
        num_workers = min(8, available_cores())
    num_workers = min(num_workers, len(items))
    return DataLoader(
        ErrorsAsItems(dataset) if num_workers else dataset,
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


@contextmanager
def loading(loader: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """Iterate over a loader in a block; end its worker processes with the block, also after an error.

    The workers ignore signals, so nothing else would end them.
    """
    batches = iter(loader)
    try:
        yield batches_or_error(batches)
    except RuntimeError as error:  # torch may raise it at any line, when a process of the loader ends
        if "DataLoader worker" in str(error) and ("killed" in str(error) or "exited" in str(error)):
            raise OSError(
                f"--dataloader_workers: a loader process ended ({first_line(error)}), perhaps killed for its memory; "
                "use fewer, or 0; the same command continues"
            ) from error
        raise
    finally:
        if shut_down := getattr(batches, "_shutdown_workers", None):  # absent if the main process loads
            shut_down()


def batches_or_error(items: Iterator[Any]) -> Iterator[Batch]:
    """Yield batches; raise an item that is an error of a worker process."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield cast(Batch, item)
