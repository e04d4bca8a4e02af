"""The deterministic part of the data path, done once per volume: from files into the store, in parallel.

RAS orientation, spacing (linear; labels nearest), HU window to 0..1 with clipping, crop to foreground (> 0): what
MONAI's transforms of these names give. Padding to the crop size happens when a crop is read (see `store.py`), so that
one prepared volume serves every crop size.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose, CropForegroundd, ScaleIntensityRanged
from nibabel.affines import apply_affine, voxel_sizes
from tqdm import tqdm

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.resample import region_above, whole_grid
from hyspark.data.preprocessing.store import (
    StoredVolume,
    entry_folder,
    is_whole,
    remove_entry,
    remove_unfinished,
    steps_of,
    write_entry,
)
from hyspark.data.quality.examine import examine
from hyspark.data.readers.nifti import check_header
from hyspark.data.settings import PrepareSettings
from hyspark.utils.log import LOG
from hyspark.utils.processes import as_done, available_cores

UNPREPARABLE = (ValueError, RuntimeError, OSError, EOFError)
"""What preparing a broken file raises."""
MAX_LISTED = 5
"""Warnings that are shown in full."""


def to_unit_range_and_foreground(settings: PrepareSettings, keys: Sequence[str]) -> Compose:
    """On a dict of arrays (1, h, w, d): HU window of the image to 0..1, all cropped to where it is above 0."""
    return Compose(
        [
            ScaleIntensityRanged("image", settings.hu_min, settings.hu_max, 0.0, 1.0, clip=True),
            CropForegroundd(keys, source_key="image", allow_smaller=True),
        ]
    )


def check_pair(case: Case) -> None:
    """Check the headers of a case; raises ValueError where its label does not lie on its image, to one voxel."""
    shape, affine = check_header(case.image)
    if case.label is None:
        return
    label_shape, label_affine = check_header(case.label)
    if label_shape != shape:
        raise ValueError(f"image and label differ in shape: {shape} and {label_shape} ({case.label})")
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)
    shift = np.abs(apply_affine(affine, corners) - apply_affine(label_affine, corners)).max()
    if not shift <= voxel_sizes(affine).max():
        raise ValueError(f"image and label lie {shift:.3g} mm apart by their headers ({case.label})")


def prepare_case(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    """Run the transforms on one case.

    Returns image float32 (h, w, d) in [0, 1], label uint8 (h, w, d) or None, affine (4, 4) of the prepared grid in
    RAS mm. Raises ValueError for a file that is no 3D volume, for an image without foreground, for a label that does
    not fit its image.
    """
    check_pair(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's advice to its own callers; results are checked below
        image, shape, start = region_above(case.image, settings.spacing, settings.hu_min)
        data: dict[str, Any] = {"image": image}
        if case.label is not None:
            whole = whole_grid(case.label, settings.spacing, "nearest")
            if whole.shape[1:] != shape:
                raise ValueError(
                    f"image and label differ in shape once resampled: {shape} and {tuple(whole.shape[1:])}"
                )
            box = [slice(a, a + n) for a, n in zip(start, image.shape[1:], strict=True)]
            data["label"] = whole[:, box[0], box[1], box[2]]
        data = to_unit_range_and_foreground(settings, list(data))(data)
    array = np.ascontiguousarray(data["image"].numpy()[0])
    if not np.isfinite(array).all():
        raise ValueError("holds NaN or infinite values")
    if array.size == 0 or np.rint(array.max() * steps_of(settings)) == 0:  # as the store counts foreground
        raise ValueError(f"no voxel lies above {settings.hu_min} HU; is it CT in Hounsfield units?")
    label = None
    if case.label is not None:
        values = data["label"].numpy()[0]
        if values.min() < 0 or values.max() > 255 or (values != np.round(values)).any():
            raise ValueError(f"label values must be whole numbers from 0 to 255 ({case.label})")
        label = np.ascontiguousarray(values.astype(np.uint8))
    return {"image": array, "label": label, "affine": np.asarray(data["image"].affine, dtype=np.float64)}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: why it cannot be prepared, one line per reason, and what someone should look at."""

    case: Case
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def prepare_into(case: Case, settings: PrepareSettings, folder: Path) -> Outcome:
    """Look at one case and prepare it into its store entry."""
    findings = examine(case, settings.hu_min, declared=None).findings
    errors = [str(f) for f in findings if f.severity == "error"]
    warned = tuple(str(f) for f in findings if f.severity == "warning")
    if not errors:
        try:
            prepared = prepare_case(case, settings)
        except UNPREPARABLE as error:
            errors.append(f"{case.image}: {reason(error)}")
        else:
            write(folder, prepared, case, settings)
    return Outcome(case, tuple(errors), warned)


def write(folder: Path, prepared: dict[str, Any], case: Case, settings: PrepareSettings) -> None:
    """Write an entry; OSError where that fails, which is no fault of the case."""
    try:
        write_entry(folder, source=str(case.image), steps=steps_of(settings), **prepared)
    except (OSError, RuntimeError) as error:  # RuntimeError: blosc2's
        raise OSError(
            f"cannot write prepared volumes to {folder.parent} ({reason(error)}); make room, or name another folder "
            "with --store_dir"
        ) from error


def reason(error: BaseException) -> str:
    """Why a case cannot be prepared, in one line."""
    while isinstance(error, RuntimeError) and error.__cause__:  # MONAI's own message does not hold the reason
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def prepare_all(
    cases: Sequence[Case],
    settings: PrepareSettings,
    store_dir: Path,
    num_workers: int = 0,
    progress: bool = True,
) -> list[StoredVolume]:
    """Prepared volumes of the cases, in their order; what the store lacks is made first.

    Raises ValueError that lists the cases that cannot be prepared and why; what `prepare_missing` raises.
    """
    failed = prepare_missing(cases, settings, store_dir, num_workers, progress)
    if failed:
        raise ValueError(unusable(failed, len(cases)))
    return stored(cases, settings, store_dir)


def unusable(failed: Mapping[str, Sequence[str]], num: int, or_else: str = "") -> str:
    """One message for all broken cases, of `num`. or_else: what else can be done about them."""
    lines = "\n  ".join(line for lines in failed.values() for line in lines)
    advice = ", ".join(filter(None, ["mend them or take them out of the data list", or_else]))
    return f"{len(failed)} of {num} volumes cannot be used; {advice}:\n  {lines}"


def stored(cases: Sequence[Case], settings: PrepareSettings, store_dir: Path) -> list[StoredVolume]:
    """Where the prepared volumes of the cases lie."""
    return [StoredVolume(entry_folder(store_dir, settings, c.image, c.label), c.name) for c in cases]


def prepare_missing(
    cases: Sequence[Case],
    settings: PrepareSettings,
    store_dir: Path,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Make what the store lacks, in `num_workers` processes (0: one per core); entries that are there are compared with
    their checksums first, and damaged ones made again.

    Returns, by image, why cases cannot be prepared. Raises PermissionError where the store cannot be written.
    """
    folders = {c: entry_folder(store_dir, settings, c.image, c.label) for c in cases if is_there(c)}
    missing = [str(c.image) for c in cases if c not in folders]
    failed: dict[str, tuple[str, ...]] = {image: (f"{image}: it or its label is missing",) for image in missing}
    there = [folder for folder in folders.values() if folder.exists()]
    bad = damaged(there, num_workers or available_cores(), progress)
    todo = [(c, settings, folder) for c, folder in folders.items() if folder in bad or not folder.exists()]
    if todo:
        make_writable(store_dir)
        for folder in bad:
            LOG.warning("%s does not fit its checksum and is prepared again", folder)
            remove_entry(folder)
        outcomes = run_pool(todo, num_workers or available_cores(), progress)
        failed |= {str(o.case.image): o.errors for o in outcomes if o.errors}
        log_warnings([line for o in outcomes for line in o.warnings])
    return dict(sorted(failed.items()))


def is_there(case: Case) -> bool:
    """Whether a case's files exist."""
    return all(path.exists() for path in (case.image, case.label) if path is not None)


def damaged(folders: Sequence[Path], num_workers: int, progress: bool) -> list[Path]:
    """Entries whose files are not what was written."""
    with ThreadPoolExecutor(num_workers) as threads:
        looked_at = zip(folders, threads.map(is_whole, folders), strict=True)
        hide = not (progress and folders)
        bar = tqdm(looked_at, total=len(folders), desc="check store", unit="volume", disable=hide)
        return [folder for folder, whole in bar if not whole]


def log_warnings(lines: Sequence[str]) -> None:
    """Say what the user should look at, in a few lines."""
    if lines:
        more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        shown = "\n  ".join([*lines[:MAX_LISTED], *more])
        LOG.warning("%d things to look at in the data; `hyspark check` shows all of them:\n  %s", len(lines), shown)


def make_writable(store_dir: Path) -> None:
    """Create the store's folder; raises PermissionError with the flag that moves it."""
    try:
        store_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(store_dir, os.W_OK):
            raise PermissionError
        remove_unfinished(store_dir)
    except OSError:
        raise PermissionError(
            f"cannot write prepared volumes to {store_dir}; name another folder with --store_dir"
        ) from None


def run_pool(todo: Sequence[tuple[Case, PrepareSettings, Path]], num_workers: int, progress: bool) -> list[Outcome]:
    """What became of each case, by image."""
    with tqdm(total=len(todo), desc="prepare", unit="volume", disable=not progress) as bar:
        found = []
        for outcome in as_done(prepare_into, todo, num_workers):
            found.append(outcome)
            bar.update()
    return sorted(found, key=lambda outcome: str(outcome.case.image))
