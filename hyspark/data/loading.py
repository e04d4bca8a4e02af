"""Batches for both engines. A data set is indexed by the step: item t is this process's share of the global batch t.

A loader worker makes whole batches, and the loader returns them in order, so the batches do not depend on the number
of workers. A global batch has `bs` volumes with `crops_per_volume` crops each; process r of w takes the r-th of w
equal runs of volumes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hyspark.data.crops import (
    NO_AFFINE,
    AffineRange,
    Planes,
    augmentation,
    image_crop,
    labelled_crop,
    rng_at,
    seed_at,
    volume_at,
)
from hyspark.data.prepare import available_cores
from hyspark.data.store import StoredVolume
from hyspark.data.workers import ignore_signals

Batch = dict[str, Any]
NO_FLIPS = (0.0, 0.0, 0.0)


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


@dataclass(frozen=True)
class PretrainBatches(Dataset[Batch]):
    """Item t: volumes float32 (b, 1, *size), mask_seeds (one per crop), cases (names)."""

    volumes: Sequence[StoredVolume]
    share: Share
    crop_size: tuple[int, ...]
    crops_per_volume: int
    flip_prob: tuple[float, ...]
    seed: int
    planes: Planes | None = None

    def __getitem__(self, step: int) -> Batch:
        crops = np.empty((len(self.share.slots) * self.crops_per_volume, 1, *self.crop_size), np.float32)
        mask_seeds: list[int] = []
        cases: list[str] = []
        for slot in self.share.slots:
            volume = self.volumes[volume_at(step * self.share.bs + slot, len(self.volumes), self.seed)]
            for number in range(self.crops_per_volume):
                rng = rng_at(self.seed, "crop", step, slot, number)
                image_crop(volume, self.crop_size, self.flip_prob, rng, crops[len(cases)], self.planes)
                mask_seeds.append(seed_at(self.seed, "mask", step, slot, number))
                cases.append(volume.name)
        return {"volumes": torch.from_numpy(crops), "mask_seeds": mask_seeds, "cases": cases}


@dataclass(frozen=True)
class ValidationCrops(Dataset[Batch]):
    """Item i: the fixed crops of the i-th held-out volume, with fixed masks, the same in every epoch and every run
    of a seed.
    """

    volumes: Sequence[StoredVolume]
    crop_size: tuple[int, ...]
    crops_per_volume: int
    seed: int
    planes: Planes | None = None

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Batch:
        volume = self.volumes[index]
        numbers = range(self.crops_per_volume)
        rngs = [rng_at(self.seed, "validation-crop", index, n) for n in numbers]
        crops = [image_crop(volume, self.crop_size, NO_FLIPS, rng, planes=self.planes) for rng in rngs]
        return {
            "volumes": torch.from_numpy(np.stack(crops)),
            "mask_seeds": [seed_at(self.seed, "validation-mask", index, n) for n in numbers],
            "cases": [volume.name] * len(crops),
        }


@dataclass(frozen=True)
class FinetuneBatches(Dataset[Batch]):
    """Item t: image float32 (b, 1, *size), label int64 (b, 1, *size), cases (names)."""

    volumes: Sequence[StoredVolume]
    share: Share
    crop_size: tuple[int, ...]
    crops_per_volume: int
    flip_prob: tuple[float, ...]
    rot90_prob: float
    intensity_prob: float
    labelled_prob: float
    seed: int
    swaps: tuple[tuple[int, int], ...] = ()
    affine: AffineRange = NO_AFFINE

    def __getitem__(self, step: int) -> Batch:
        augment = augmentation(self.flip_prob, self.rot90_prob, self.intensity_prob, self.swaps, self.affine)
        samples, cases = [], []
        for slot in self.share.slots:
            volume = self.volumes[volume_at(step * self.share.bs + slot, len(self.volumes), self.seed)]
            for number in range(self.crops_per_volume):
                rng = rng_at(self.seed, "crop", step, slot, number)
                sample = labelled_crop(volume, self.crop_size, self.labelled_prob, rng)
                samples.append(augment.set_random_state(int(rng.integers(2**32)))(sample))
                cases.append(volume.name)
        # MONAI hands out its MetaTensor; what it records is not needed from here on and slows every operation.
        stacked = {k: torch.stack([s[k].as_subclass(torch.Tensor) for s in samples]) for k in ("image", "label")}
        return {**stacked, "cases": cases}


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
