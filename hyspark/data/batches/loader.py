"""The loader: batches in the order of the steps, whatever the number of workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hyspark.utils.processes import available_cores, ignore_signals

Batch = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch of `bs` volumes."""

    bs: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.bs % self.world_size:
            low = self.bs // self.world_size * self.world_size
            raise ValueError(
                f"the batch counts volumes over all processes, so it must be a multiple of their number: "
                f"{self.bs} volumes, {self.world_size} processes; {low or self.world_size} would do"
            )

    @property
    def slots(self) -> range:
        """Places of this process in the global batch."""
        num = self.bs // self.world_size
        return range(self.rank * num, (self.rank + 1) * num)


def make_loader(dataset: Dataset[Batch], items: Sequence[int], num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """A loader that yields the named items in order. num_workers: -1 takes one per core, at most 8."""
    if num_workers < 0:
        num_workers = min(8, available_cores())
    num_workers = min(num_workers, len(items))
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


@contextmanager
def loading(loader: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """The batches of a loader, whose processes end with the block, also by an error: they leave signals alone, so that
    nothing else would end them.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        if shut_down := getattr(batches, "_shutdown_workers", None):  # there is none where the main process loads
            shut_down()
