"""The data path against MONAI's own, both sides alternately in one run, on one thread.

Every function takes CTs, or makes a phantom where none is given, and returns plain numbers: seconds, bytes, ratios
above 1 where this package is better.
"""

import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from measure import in_fresh_process, peak_memory, resident_memory, seconds
from monai.data import CacheNTransDataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
    ToTensord,
)
from torch.utils.data import Dataset

from hyspark.data.batches.loader import Batch, Shard, make_loader
from hyspark.data.batches.volumes import PretrainBatches
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import failure_message, prepare_case, prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.settings import PrepareSettings
from hyspark.data.synthetic.phantom import make_phantom

NATIVE = (0.7, 0.7, 2.5)
"""Spacing in mm of a common CT as it comes from the scanner."""
FLIPS = (0.2, 0.2, 0.1)
CROPS = 4
SETTINGS = PrepareSettings()


def crops(image: Path | None = None, *, edge: int = 96, batches: int = 10, repeats: int = 5) -> dict[str, float]:
    """Random crops of one prepared volume that lies in the page cache, and its size on disk.

    This side: `PretrainBatches` on the store. The other: MONAI's CacheNTransDataset with the transforms of the
    published code. A batch is four crops; the time is the median over `repeats` of `batches` of them.
    """
    with working_folder() as folder:
        image = image or phantom_file(folder)
        volume = prepared([image], folder / "store")[0]
        ours = PretrainBatches([volume], Shard(1), (edge,) * 3, CROPS, FLIPS, 0)
        steps = [*deterministic_transforms(), SpatialPadd("image", (edge,) * 3)]
        published = Compose([*steps, *random_transforms(edge)])
        monai = CacheNTransDataset([{"image": str(image)}], published, len(steps), folder / "cache")

        def read_ours() -> None:
            for number in range(batches):
                ours[number]

        def read_monai() -> None:
            for _ in range(batches):
                monai[0]

        read_ours()
        read_monai()  # writes the cache
        times = alternately(read_ours, read_monai, repeats)
        rates = [batches * CROPS / t for t in times]
        sizes = [bytes_below(volume.folder), bytes_below(folder / "cache")]
    return {
        "crops_per_second": rates[0],
        "monai_crops_per_second": rates[1],
        "speed_ratio": rates[0] / rates[1],
        "bytes": sizes[0],
        "monai_bytes": sizes[1],
        "bytes_ratio": sizes[1] / sizes[0],
    }


def preparing(image: Path | None = None, *, repeats: int = 3) -> dict[str, float]:
    """Preparing one CT: `prepare_case` against the same MONAI transforms called one after the other.

    `difference`: largest between the two images, in units of 0..1. Peaks are of fresh processes that prepare once; they
    hold the libraries too, which is what they have at the start.
    """
    with working_folder() as folder:
        image = image or phantom_file(folder)
        times = alternately(lambda: prepare_ours(image), lambda: prepare_plainly(image), repeats)
        difference = np.abs(prepare_ours(image) - prepare_plainly(image)).max()
        start, peak = in_fresh_process(memory_before, prepare_ours, image)
        monai_start, monai_peak = in_fresh_process(memory_before, prepare_plainly, image)
        peak, monai_peak = max(start, peak), max(monai_start, monai_peak)  # Linux counts its peak late
    return {
        "seconds": times[0],
        "monai_seconds": times[1],
        "speed_ratio": times[1] / times[0],
        "difference": float(difference),
        "start_bytes": start,
        "peak_bytes": peak,
        "monai_start_bytes": monai_start,
        "monai_peak_bytes": monai_peak,
        "peak_ratio": monai_peak / peak,
    }


def worker_memory(images: Sequence[Path] = (), *, edge: int = 96, batches: int = 300) -> dict[str, float]:
    """Resident memory of a loader worker that draws batches of two volumes out of several, three phantoms by default.

    early, late: medians over the second and the last tenth of the batches. The libraries are in all of these; `start`
    is what the worker holds before its first batch.
    """
    with working_folder() as folder:
        images = images or [phantom_file(folder, seed, (2.0, 2.0, 2.0)) for seed in range(3)]
        volumes = prepared(images, folder / "store")
        memory, _ = in_fresh_process(memory_of_worker, volumes, edge, batches)
    tenth = max(1, batches // 10)
    early, late = (statistics.median(m) for m in (memory["after"][tenth : 2 * tenth], memory["after"][-tenth:]))
    return {
        "start_bytes": memory["start"],
        "early_bytes": early,
        "late_bytes": late,
        "growth_bytes": late - early,
        "peak_bytes": memory["peak"],
        "late_to_early_ratio": late / early,
    }


@dataclass(frozen=True)
class WithMemory(Dataset[Batch]):
    """The batches of another data set, with what the process that makes them holds before and after."""

    batches: Dataset[Batch]

    def __getitem__(self, step: int) -> Batch:
        before = resident_memory()
        return self.batches[step] | {"before": before, "after": resident_memory(), "peak": peak_memory()}


def memory_of_worker(volumes: Sequence[StoredVolume], edge: int, batches: int) -> dict[str, Any]:
    """Bytes that the one worker of a loader holds: at its start, after each batch, at most."""
    multiprocessing.set_start_method(None, force=True)  # workers start as in a program, not as this process did
    dataset = WithMemory(PretrainBatches(volumes, Shard(2), (edge,) * 3, CROPS, FLIPS, 0))
    seen = [
        {key: batch[key] for key in ("before", "after", "peak")}
        for batch in make_loader(dataset, range(batches), 1, pin_memory=False)
    ]
    return {"start": seen[0]["before"], "after": [s["after"] for s in seen], "peak": max(s["peak"] for s in seen)}


def deterministic_transforms() -> list[Any]:
    """The first part of the published transforms, as a user of MONAI writes them."""
    return [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS"),
        Spacingd("image", pixdim=SETTINGS.spacing, mode="bilinear"),
        ScaleIntensityRanged("image", SETTINGS.hu_min, SETTINGS.hu_max, 0.0, 1.0, clip=True),
        CropForegroundd("image", source_key="image"),
    ]


def random_transforms(edge: int) -> list[Any]:
    """The second part: four crops around foreground, and flips."""
    return [
        RandCropByPosNegLabeld("image", "image", (edge,) * 3, pos=1, neg=0, num_samples=CROPS),
        *(RandFlipd("image", prob=p, spatial_axis=axis) for axis, p in enumerate(FLIPS)),
        ToTensord("image"),
    ]


def prepare_ours(image: Path) -> np.ndarray:
    """float32 (h, w, d)."""
    array: np.ndarray = prepare_case(Case("case", "", image), SETTINGS)["image"][0]
    return array


def prepare_plainly(image: Path) -> np.ndarray:
    """float32 (h, w, d)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array: np.ndarray = Compose(deterministic_transforms())({"image": str(image)})["image"].numpy()[0]
    return array


def memory_before(prepare: Callable[[Path], np.ndarray], image: Path) -> int:
    """Bytes that this process holds before it prepares an image."""
    before = resident_memory()
    prepare(image)
    return before


def alternately(ours: Callable[[], object], monai: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two functions that take turns, so that both see the same machine."""
    times = [(seconds(ours), seconds(monai)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


@contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary folder, one thread and no warnings while it exists."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Path(folder)
    finally:
        torch.set_num_threads(threads)


def phantom_file(folder: Path, seed: int = 0, spacing: tuple[float, float, float] = NATIVE) -> Path:
    """A phantom on disk, compressed as CTs are."""
    phantom = make_phantom(seed, spacing=spacing, orientation="LPS")
    path = folder / f"phantom{seed}_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(phantom.image, phantom.affine), path)
    return path


def prepared(images: Sequence[Path], store: Path) -> list[StoredVolume]:
    """Prepare the images in a store."""
    cases = [Case(image.name, "", image) for image in images]
    if failed := prepare_missing(cases, SETTINGS, store, 1, progress=False):
        raise ValueError(failure_message(failed, len(cases)))
    return stored_volumes(cases, SETTINGS, store)


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
