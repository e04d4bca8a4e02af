"""Batches of volumes, for pre-training and fine-tuning: item t is this process's shard of the global batch t.

A loader worker makes whole batches, and the loader returns them in order, so the batches do not depend on the number
of workers. A global batch has `bs` volumes with `crops_per_volume` crops each; process r of w takes the r-th of w
equal shards of volumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from hyspark.data.batches.augmentation import NO_AFFINE, AffineRange, augmentation
from hyspark.data.batches.crops import SliceSampling, crop_maps, image_crop, labelled_crop
from hyspark.data.batches.loader import Batch, Shard
from hyspark.data.intensity import to_input
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.seeds import rng_at, seed_at, volume_at

NO_FLIPS = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class PretrainBatches(Dataset[Batch]):
    """Item t: volumes float32 `(b, c, *size)`, mask_seeds (one per crop), cases (names)."""

    volumes: Sequence[StoredVolume]
    shard: Shard
    crop_size: tuple[int, ...]
    crops_per_volume: int
    flip_prob: tuple[float, ...]
    seed: int
    slices: SliceSampling | None = None

    def __getitem__(self, step: int) -> Batch:
        num = len(self.shard.slots) * self.crops_per_volume
        crops = np.empty((num, self.volumes[0].num_channels, *self.crop_size), np.float32)
        mask_seeds: list[int] = []
        cases: list[str] = []
        for slot in self.shard.slots:
            volume = self.volumes[volume_at(step * self.shard.bs + slot, len(self.volumes), self.seed)]
            for number in range(self.crops_per_volume):
                rng = rng_at(self.seed, "crop", step, slot, number)
                crop = image_crop(volume, self.crop_size, self.flip_prob, rng, crops[len(cases)], self.slices)
                to_input(crop, crop_maps(volume, self.slices))
                mask_seeds.append(seed_at(self.seed, "mask", step, slot, number))
                cases.append(volume.name)
        return {"volumes": torch.from_numpy(crops), "mask_seeds": mask_seeds, "cases": cases}


@dataclass(frozen=True)
class ValidationCrops(Dataset[Batch]):
    """Item i: the crops of the i-th validation volume, with their masks.

    Crops and masks are the same in every epoch and in every run of a seed.
    """

    volumes: Sequence[StoredVolume]
    crop_size: tuple[int, ...]
    crops_per_volume: int
    seed: int
    slices: SliceSampling | None = None

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Batch:
        volume = self.volumes[index]
        numbers = range(self.crops_per_volume)
        rngs = [rng_at(self.seed, "validation-crop", index, n) for n in numbers]
        crops = [image_crop(volume, self.crop_size, NO_FLIPS, rng, slices=self.slices) for rng in rngs]
        maps = crop_maps(volume, self.slices)
        return {
            "volumes": torch.from_numpy(np.stack([to_input(crop, maps) for crop in crops])),
            "mask_seeds": [seed_at(self.seed, "validation-mask", index, n) for n in numbers],
            "cases": [volume.name] * len(crops),
        }


@dataclass(frozen=True)
class FinetuneBatches(Dataset[Batch]):
    """Item t: image float32 `(b, c, *size)`, label int64 `(b, 1, *size)`, cases (names)."""

    volumes: Sequence[StoredVolume]
    shard: Shard
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
        for slot in self.shard.slots:
            volume = self.volumes[volume_at(step * self.shard.bs + slot, len(self.volumes), self.seed)]
            for number in range(self.crops_per_volume):
                rng = rng_at(self.seed, "crop", step, slot, number)
                sample = labelled_crop(volume, self.crop_size, self.labelled_prob, rng)
                augmented = augment.set_random_state(int(rng.integers(2**32)))(sample)
                # MONAI returns its MetaTensor, whose records are not needed from here on and slow every operation.
                sample = {key: augmented[key].as_subclass(torch.Tensor) for key in ("image", "label")}
                samples.append(sample | {"image": to_input(sample["image"], volume.maps)})
                cases.append(volume.name)
        stacked = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "label")}
        return {**stacked, "cases": cases}
