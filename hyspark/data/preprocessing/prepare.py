"""The deterministic part of the data path, done once per volume: from files into the store, in parallel.

The steps, equal to MONAI's transforms of these names:

- RAS orientation;
- spacing, by linear interpolation; labels by nearest neighbour;
- HU window to 0..1, with clipping;
- crop to foreground (> 0).

A crop is padded when it is read (see `store.py`), so that one prepared volume serves every crop size.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose, CropForegroundd
from nibabel.affines import apply_affine, voxel_sizes
from tqdm import tqdm

from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.intensity import stored_steps, window_transform
from hyspark.data.preprocessing.resample import region_above, whole_grid
from hyspark.data.preprocessing.store import (
    StoredVolume,
    entry_folder,
    is_intact,
    remove_abandoned,
    remove_entry,
    write_entry,
)
from hyspark.data.quality.examine import examine
from hyspark.data.readers.nifti import check_header
from hyspark.data.settings import PrepareSettings
from hyspark.utils.log import LOG
from hyspark.utils.processes import available_cores, map_unordered
from hyspark.utils.text import first_line

PREPARE_ERRORS = (ValueError, RuntimeError, OSError, EOFError)
"""Exceptions that preparing a broken file raises."""
MAX_LISTED = 5
"""Number of warnings that are shown in full."""


def to_unit_range_and_foreground(settings: PrepareSettings, keys: Sequence[str]) -> Compose:
    """Compose the HU window and the crop to the image's foreground, of a dict of arrays `(1, h, w, d)`."""
    return Compose([window_transform(settings), CropForegroundd(keys, source_key="image", allow_smaller=True)])


def check_pair(case: Case) -> None:
    """Check the headers of a case; raise ValueError unless its label lies on its image, to within one voxel."""
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
    """Prepare one case: orientation, spacing, HU window, crop to foreground.

    Returns:
        image: float32 `(h, w, d)` in [0, 1]; label: uint8 `(h, w, d)` or None; affine: `(4, 4)` of the prepared grid
        in RAS mm.

    Raises:
        ValueError: if a file is no 3D volume, the image has no foreground, or the label does not match the image.
    """
    check_pair(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns its own callers; results are checked below
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
    if array.size == 0 or np.rint(array.max() * stored_steps(settings)) == 0:  # as the store counts foreground
        raise ValueError(f"no voxel lies above {settings.hu_min} HU; is it CT in Hounsfield units?")
    label = None
    if case.label is not None:
        values = data["label"].numpy()[0]
        if values.min() < 0 or values.max() > 255 or (values != np.round(values)).any():
            raise ValueError(f"label values must be whole numbers from 0 to 255 ({case.label})")
        label = np.ascontiguousarray(values.astype(np.uint8))
        if case.ignore is not None:
            label[label == case.ignore] = UNANNOTATED
    return {"image": array, "label": label, "affine": np.asarray(data["image"].affine, dtype=np.float64)}


@dataclass(frozen=True)
class Outcome:
    """The result of preparing a case.

    Attributes:
        case: the case.
        errors: reasons why it cannot be prepared, one line each.
        warnings: warnings about it, one line each.
    """

    case: Case
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def prepare_into(case: Case, settings: PrepareSettings, folder: Path) -> Outcome:
    """Examine one case and write its entry of the store."""
    findings = examine(case, settings.hu_min, declared=None).findings
    errors = [str(f) for f in findings if f.severity == "error"]
    warned = tuple(str(f) for f in findings if f.severity == "warning")
    if not errors:
        try:
            prepared = prepare_case(case, settings)
        except PREPARE_ERRORS as error:
            errors.append(f"{case.image}: {failure_reason(error)}")
        else:
            store_case(folder, prepared, case, settings)
    return Outcome(case, tuple(errors), warned)


def store_case(folder: Path, prepared: dict[str, Any], case: Case, settings: PrepareSettings) -> None:
    """Write a prepared case to the store; raise OSError if the disk fails, which is no fault of the case."""
    try:
        has_ignored, steps = case.ignore is not None, stored_steps(settings)
        write_entry(folder, source=str(case.image), steps=steps, has_ignored=has_ignored, **prepared)
    except (OSError, RuntimeError) as error:  # RuntimeError: blosc2's
        raise OSError(
            f"{folder.parent}: prepared volumes are not writable ({failure_reason(error)}); make room, or choose "
            "another folder with --store_dir"
        ) from error


def failure_reason(error: BaseException) -> str:
    """Return the reason of a failed preparation in one line."""
    while isinstance(error, RuntimeError) and error.__cause__:  # MONAI's own message does not hold the reason
        error = error.__cause__
    return first_line(error)


def failure_message(failed: Mapping[str, Sequence[str]], num: int, alternative: str = "") -> str:
    """Write one message for all broken cases.

    Args:
        failed: reasons by image.
        num: number of all cases.
        alternative: further advice.
    """
    lines = "\n  ".join(line for lines in failed.values() for line in lines)
    advice = ", ".join(filter(None, ["fix them or remove them from the data list", alternative]))
    return f"{len(failed)} of {num} volumes are unusable; {advice}:\n  {lines}"


def stored_volumes(cases: Sequence[Case], settings: PrepareSettings, store_dir: Path) -> list[StoredVolume]:
    """Return the cases' prepared volumes, which may not exist yet."""
    return [StoredVolume(entry_folder(store_dir, settings, c.image, c.label, c.ignore), c.name) for c in cases]


def prepare_missing(
    cases: Sequence[Case],
    settings: PrepareSettings,
    store_dir: Path,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Prepare the cases that the store lacks.

    Existing entries are compared with their checksums first, and damaged ones are made again.

    Args:
        cases: cases of the data set.
        settings: settings of preparation.
        store_dir: folder of the store.
        num_workers: processes; 0 takes one per core.
        progress: whether to show progress bars.

    Returns:
        By image, the reasons why cases cannot be prepared.

    Raises:
        PermissionError: if the store is not writable.
    """
    folders = {c: entry_folder(store_dir, settings, c.image, c.label, c.ignore) for c in cases if files_exist(c)}
    missing = [str(c.image) for c in cases if c not in folders]
    failed: dict[str, tuple[str, ...]] = {image: (f"{image}: it or its label is missing",) for image in missing}
    existing = [folder for folder in folders.values() if folder.exists()]
    damaged = find_damaged(existing, num_workers or available_cores(), progress)
    todo = [(c, settings, folder) for c, folder in folders.items() if folder in damaged or not folder.exists()]
    if todo:
        make_writable(store_dir)
        for folder in damaged:
            LOG.warning("%s: does not match its checksum; it is prepared again", folder)
            remove_entry(folder)
        outcomes = prepare_in_parallel(todo, num_workers or available_cores(), progress)
        failed |= {str(o.case.image): o.errors for o in outcomes if o.errors}
        log_warnings([line for o in outcomes for line in o.warnings])
    return dict(sorted(failed.items()))


def files_exist(case: Case) -> bool:
    """Return whether a case's image and, if it has one, its label exist."""
    return all(path.exists() for path in (case.image, case.label) if path is not None)


def find_damaged(folders: Sequence[Path], num_workers: int, progress: bool) -> list[Path]:
    """List the entries whose files differ from their checksums."""
    with ThreadPoolExecutor(num_workers) as threads:
        checked = zip(folders, threads.map(is_intact, folders), strict=True)
        hide = not (progress and folders)
        bar = tqdm(checked, total=len(folders), desc="check store", unit="volume", disable=hide)
        return [folder for folder, intact in bar if not intact]


def log_warnings(lines: Sequence[str]) -> None:
    """Log warnings in a few lines."""
    if lines:
        more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        shown = "\n  ".join([*lines[:MAX_LISTED], *more])
        LOG.warning("%d warnings about the data; `hyspark check` shows all of them:\n  %s", len(lines), shown)


def make_writable(store_dir: Path) -> None:
    """Create the store's folder and remove abandoned entries; raise PermissionError if it is not writable."""
    try:
        store_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(store_dir, os.W_OK):
            raise PermissionError
        remove_abandoned(store_dir)
    except OSError:
        raise PermissionError(
            f"{store_dir}: prepared volumes are not writable; choose another folder with --store_dir"
        ) from None


def prepare_in_parallel(
    todo: Sequence[tuple[Case, PrepareSettings, Path]], num_workers: int, progress: bool
) -> list[Outcome]:
    """Prepare cases in several processes; return the outcomes sorted by image."""
    with tqdm(total=len(todo), desc="prepare", unit="volume", disable=not progress) as bar:
        found = []
        for outcome in map_unordered(prepare_into, todo, num_workers):
            found.append(outcome)
            bar.update()
    return sorted(found, key=lambda outcome: str(outcome.case.image))
