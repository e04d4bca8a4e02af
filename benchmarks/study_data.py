"""The data folder of the GPU study: all that pre-training, fine-tuning and scoring read, small enough to copy.

    FOLDER/study_data.json      spacing, number of cases
    FOLDER/dataset.json         list of the pre-training volumes
    FOLDER/DatasetXXX_Name/     nnU-Net layout: images, labels as they are, splits.json

Images hold what a network can see of them: HU clipped to the window of preparation, in steps of 2 HU, 8 bits a voxel.
Unlabelled ones that are finer than the study's spacing are resampled to it; all others keep their grid, for a store at
2.5 mm holds several times as many voxels. The store itself is made where the study runs.
"""

import gzip
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from hyspark.data.datasets import build, data_folder, datalist_json
from hyspark.data.datasets.cases import Case, Datalist
from hyspark.data.datasets.splits import SPLIT_SEED, split_by_file
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.preprocessing.resample import target_grid
from hyspark.data.readers.nifti import read_nifti
from hyspark.data.settings import PrepareSettings
from hyspark.utils.atomic import write_json

MANIFEST = "study_data.json"
STEP = 2.0
"""HU between two grey values of a written image."""
VAL_FRACTION = 0.2
"""Of a labelled data set without splits.json."""
MB = 10**6


@dataclass(frozen=True)
class Found:
    """Cases of a study. spare: cases without a label, in the order in which they are taken."""

    training: list[Case]
    validation: list[Case]
    spare: list[Case]


def find(data: Path, labelled: str, unlabelled: Sequence[str], seed: int) -> Found:
    """Find the cases, on the sides of training and validation that fine-tuning will put them on."""
    folder = (data / labelled).absolute()
    listed = build.read_folder(folder, seed=SPLIT_SEED, val_fraction=VAL_FRACTION)
    cases = data_folder.find_cases(folder, labels=True).cases
    splits = folder / "splits.json"
    usable = split_by_file(cases, splits, labels=False)[0] if splits.is_file() else cases
    spare = [case for case in usable if case.label is None]
    for name in unlabelled:
        spare += data_folder.find_cases(data / name).cases
    order = np.random.default_rng(seed).permutation(len(spare))
    return Found(list(listed.training), list(listed.validation), [spare[i] for i in order])


def prepare(
    data: Path,
    out: Path,
    labelled: str,
    unlabelled: Sequence[str],
    *,
    spacing: tuple[float, float, float],
    max_mb: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Make the folder `out` anew; returns what its manifest holds.

    All labelled cases are taken, then unlabelled ones until the next would make the folder larger than `max_mb` MB.
    Raises OSError where the labelled ones alone are larger, and where `out` holds something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise FileExistsError(f"--out {out}: expected a new folder or one of an earlier call, got one of other files")
    found = find(data, labelled, unlabelled, seed)
    shutil.rmtree(out, ignore_errors=True)
    write_json(out / MANIFEST, {})  # not complete yet
    taken: list[Case] = []
    num_bytes = 0
    for case in (*found.training, *found.validation, *found.spare):
        own = copy_case(case, PrepareSettings(spacing=spacing), out)
        num_bytes += sum(path.stat().st_size for path in (own.image, own.label) if path)
        if num_bytes > max_mb * MB:
            if case.label:
                raise OSError(
                    f"--max_mb {max_mb:g}: expected room for {len(found.training) + len(found.validation)} labelled "
                    f"cases, but it ends after {len(taken)}; raise it"
                )
            own.image.unlink()
            break
        taken.append(own)
    write_lists(data / labelled, out, found, taken)
    return write_manifest(out, labelled, spacing, found, taken)


def copy_case(case: Case, settings: PrepareSettings, out: Path) -> Case:
    """Write an image, as far as a network sees it, and its label into `out`; returns the case with their paths."""
    image = out / case.dataset / "imagesTr" / f"{case.name}_0000.nii.gz"
    source = read_nifti(case.image)
    _, shape = target_grid(source.shape[:3], source.affine, settings.spacing)
    if case.label is None and math.prod(shape) < math.prod(source.shape[:3]):
        prepared = prepare_case(case, settings)
        values = settings.hu_min + prepared["image"][0] * (settings.hu_max - settings.hu_min)
        write_image(image, values, prepared["affine"], settings)
    else:
        write_image(image, np.asanyarray(source.dataobj).reshape(source.shape[:3]), source.affine, settings)
    if case.label is None:
        return replace(case, image=image)
    label = out / case.dataset / "labelsTr" / f"{case.name}{''.join(case.label.suffixes[-2:])}"
    label.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(case.label, label)
    return replace(case, image=image, label=label)


def write_image(path: Path, values: np.ndarray, affine: np.ndarray, settings: PrepareSettings) -> None:
    """Write HU (h, w, d) as 8-bit NIfTI with a scale factor; what is air to preparation stays below its window."""
    lowest = settings.hu_min - STEP
    clipped = np.clip(values.astype(np.float32), lowest, settings.hu_max)
    stored = np.rint((clipped - lowest) / STEP).astype(np.uint8)
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(STEP, lowest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=9, mtime=0))


def write_lists(source: Path, out: Path, found: Found, taken: Sequence[Case]) -> None:
    """Write the list of pre-training volumes, and class names and splits of the labelled data set."""
    held_out = {case.name for case in found.validation}
    sides: dict[bool, list[Case]] = {True: [], False: []}
    for case in taken:
        sides[case.label is not None and case.name in held_out].append(case)
    datalist_json.write_datalist(Datalist(tuple(sides[False]), tuple(sides[True])), out / "dataset.json")
    if (source / "dataset.json").is_file():
        shutil.copyfile(source / "dataset.json", out / source.name / "dataset.json")
    bare = [case.name for case in sides[False] if case.label is None and case.dataset == source.name]
    splits = {
        "train": [case.name for case in found.training],
        "validation": [case.name for case in found.validation],
        "unlabelled": bare,
    }
    write_json(out / source.name / "splits.json", splits)


def write_manifest(
    out: Path, labelled: str, spacing: tuple[float, float, float], found: Found, taken: Sequence[Case]
) -> dict[str, Any]:
    """Write what the folder holds; returns it."""
    num_labelled = len(found.training) + len(found.validation)
    content = {
        "labelled": labelled,
        "spacing_mm": list(spacing),
        "num_volumes": len(taken),
        "num_training_labelled": len(found.training),
        "num_validation": len(found.validation),
        "num_unlabelled": len(taken) - num_labelled,
        "num_unlabelled_excluded": len(found.spare) + num_labelled - len(taken),
    }
    write_json(out / MANIFEST, content)
    return content


def read_manifest(data: Path) -> dict[str, Any]:
    """Read what a folder of `prepare` holds; raises FileNotFoundError where it is none, or not complete."""
    path = data / MANIFEST
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if not content:
        raise FileNotFoundError(
            f"--data {data}: expected a folder made by benchmarks/gpu_study.py prepare, got none that is complete; "
            f"run: python benchmarks/gpu_study.py prepare --data DATA --out {data}"
        )
    return content
