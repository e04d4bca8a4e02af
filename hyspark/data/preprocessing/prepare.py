"""The deterministic part of the data path, done once per volume: from files into the store, in parallel.

The steps, equal to MONAI's transforms of these names:

- RAS orientation;
- spacing, by linear interpolation; labels by nearest neighbour;
- fractions of a range of values, 0..1, with clipping (see `intensity.py`);
- crop to foreground, in any channel.

A crop is padded when it is read (see `store.py`), so that one prepared volume serves every crop size.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForegroundd
from nibabel.spatialimages import SpatialImage
from tqdm import tqdm

from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.intensity import fractions_of, hu_maps, reads_window, stored_steps
from hyspark.data.preprocessing.arrays import LEAST_BLOSC2, check_blosc2
from hyspark.data.preprocessing.entry_files import is_sound, remove_abandoned, remove_entry
from hyspark.data.preprocessing.resample import region_above, whole_grid
from hyspark.data.preprocessing.store import (
    EARLIER_FORMAT,
    StoredVolume,
    case_folder,
    write_entry,
)
from hyspark.data.quality.case_files import CaseFiles, read_case
from hyspark.data.quality.findings import missing_channel
from hyspark.data.settings import PrepareSettings
from hyspark.utils.log import LOG
from hyspark.utils.processes import KILLED, available_cores, map_unordered
from hyspark.utils.text import MAX_LISTED, failure_reason

MAX_FAILURES = 50
"""Number of reasons that an error lists."""


def prepare_case(case: Case, settings: PrepareSettings, *, is_whole: bool = False) -> dict[str, Any]:
    """Prepare one case: orientation, spacing, fractions of a range of values, crop to foreground.

    Args:
        case: the case.
        settings: settings of preparation.
        is_whole: whether the whole grid is kept, without the crop, and may have no foreground.

    Returns:
        image: float32 `(c, h, w, d)`, fractions in [0, 1]; maps: of each channel, from fractions to a network's input,
        or None; label: uint8 `(h, w, d)` or None; affine: `(4, 4)` of the prepared grid in RAS mm.

    Raises:
        ValueError: if `read_case` finds an error, or the image has no foreground and is cropped to it.
    """
    files = read_case(case, settings)
    if files.errors:
        raise ValueError("; ".join(f.reason if f.file == str(case.image) else str(f) for f in files.errors))
    prepared = prepare_files(files, settings, is_whole=is_whole)
    given = zip(prepared.pop("scales"), hu_maps(settings), strict=True)
    return prepared | {"maps": [scale.map or of_settings for scale, of_settings in given]}


def prepare_files(files: CaseFiles, settings: PrepareSettings, *, is_whole: bool = False) -> dict[str, Any]:
    """Prepare a case from its files, which hold no error; see `prepare_case`, with the scales of the channels."""
    case = files.case
    scales = files.scales
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns its own callers; results are checked below
        thresholds = [-np.inf if is_whole else scale.threshold for scale in scales]
        values, shape, start = region_above(files.images, settings.spacing, thresholds)
        if not np.isfinite(values.numpy()).all():
            raise ValueError("holds NaN or infinite values")
        parts = [fractions_of(channel, scale) for channel, scale in zip(values.numpy(), scales, strict=True)]
        stacked = parts[0][0][None] if len(parts) == 1 else np.stack([fractions for fractions, _ in parts])
        image = MetaTensor(torch.from_numpy(stacked), affine=values.affine)
        data: dict[str, Any] = {"image": image}
        data["foreground"] = torch.from_numpy(np.any([foreground for _, foreground in parts], axis=0)[None])
        if files.label is not None:
            whole = whole_grid(files.label, settings.spacing, "nearest")
            if whole.shape[1:] != shape:  # as of edges that differ slightly
                whole = whole_grid(
                    SpatialImage(files.label.dataobj, files.images[0].affine), settings.spacing, "nearest"
                )
            box = [slice(a, a + n) for a, n in zip(start, image.shape[1:], strict=True)]
            data["label"] = whole[:, box[0], box[1], box[2]]
        crop: Any = CropForegroundd([key for key in data if key != "foreground"], "foreground", allow_smaller=True)
        data = data if is_whole else crop(data)
    array = np.ascontiguousarray(data["image"].numpy())
    steps = [scale.steps for scale in scales]
    is_empty = array.size == 0 or all(np.rint(part.max() * n) == 0 for part, n in zip(array, steps, strict=True))
    if is_empty and not is_whole:
        lowest = f"{settings.hu_min} HU; is it CT in Hounsfield units?" if reads_window(settings) else "the background"
        raise ValueError(f"no voxel lies above {lowest}")  # as the store counts foreground
    label = None
    if files.label is not None:
        label = np.ascontiguousarray(data["label"].numpy()[0].astype(np.uint8))
        if case.ignore is not None:
            label[label == case.ignore] = UNANNOTATED
    affine = np.asarray(data["image"].affine, dtype=np.float64)
    return {"image": array, "label": label, "affine": affine, "scales": scales}


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
    """Read one case and write its entry of the store; whatever its files cause is an error of the case.

    Raises:
        OSError: if the store is not writable.
    """
    files = read_case(case, settings)
    errors = [str(finding) for finding in files.errors]
    warned = tuple(str(finding) for finding in files.findings if finding.severity == "warning")
    if not errors:
        try:
            prepared, max_label = prepare_files(files, settings), files.max_label
            del files  # as large as what is written next
            store_case(folder, prepared, case, settings, max_label)
        except NotWritableError:
            raise
        except Exception as error:  # of any library, on files that nobody foresaw
            errors.append(f"{case.image}: {failure_reason(error)}")
    return Outcome(case, tuple(errors), warned)


def killed_preparation(case: Case, settings: PrepareSettings, folder: Path) -> Outcome:
    """Return the outcome of a case whose process was killed."""
    return Outcome(case, (f"{case.image}: {KILLED}",))


class NotWritableError(OSError):
    """The store is not writable, which is no fault of a case."""


def store_case(folder: Path, prepared: dict[str, Any], case: Case, settings: PrepareSettings, max_label: int) -> None:
    """Write a prepared case to the store; raise NotWritableError if the disk fails."""
    try:
        steps = stored_steps(settings)
        write_entry(folder, source=str(case.image), steps=steps, max_label=max_label, **prepared)
    except (OSError, RuntimeError) as error:  # blosc2 raises RuntimeError for a full disk, too
        if isinstance(error, RuntimeError) and has_room(folder.parent, prepared["image"].nbytes):
            raise
        raise NotWritableError(
            f"{folder.parent}: prepared volumes are not writable ({failure_reason(error)}); make room, or choose "
            "another folder with --store_dir"
        ) from error


def has_room(folder: Path, num_bytes: int) -> bool:
    """Return whether a file of this size can be written to a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(num_bytes))
    except OSError:
        return False
    return True


def failure_message(failed: Mapping[str, Sequence[str]], num: int, alternative: str = "") -> str:
    """Write one message for all broken cases, of which the first are listed.

    Args:
        failed: reasons by image.
        num: number of all cases.
        alternative: further advice.
    """
    lines = [line for lines in failed.values() for line in lines]
    if len(lines) > MAX_FAILURES:
        lines[MAX_FAILURES:] = [f"and {len(lines) - MAX_FAILURES} more, which `hyspark check` lists"]
    advice = ", ".join(filter(None, ["fix them or remove them from the data list", alternative]))
    return f"{len(failed)} of {num} volumes are unusable; {advice}:\n  " + "\n  ".join(lines)


def stored_volumes(cases: Sequence[Case], settings: PrepareSettings, store_dir: Path) -> list[StoredVolume]:
    """Return the cases' prepared volumes, which may not exist yet."""
    maps = hu_maps(settings)
    of_settings = maps if any(maps) else ()
    return [StoredVolume(case_folder(store_dir, settings, c), c.name, of_settings) for c in cases]


def prepare_missing(
    cases: Sequence[Case],
    settings: PrepareSettings,
    store_dir: Path,
    num_workers: int = 0,
    progress: bool = True,
    before: Callable[[], None] = lambda: None,
) -> dict[str, tuple[str, ...]]:
    """Prepare the cases that the store lacks.

    Existing entries are checked first (`is_sound`), and damaged ones are made again.

    Args:
        cases: cases of the data set.
        settings: settings of preparation.
        store_dir: folder of the store.
        num_workers: processes; 0 takes one per core.
        progress: whether to show progress bars.
        before: is called once if the store lacks any.

    Returns:
        By image, the reasons why cases cannot be prepared.

    Raises:
        ImportError: if blosc2 is too old.
        PermissionError: if the store is not writable.
    """
    check_blosc2()
    folders = {c: case_folder(store_dir, settings, c) for c in cases if files_exist(c)}
    failed: dict[str, tuple[str, ...]] = {str(c.image): (missing_text(c),) for c in cases if c not in folders}
    existing = [folder for folder in folders.values() if folder.exists()]
    damaged = find_damaged(existing, num_workers or available_cores(), progress)
    todo = [(c, settings, folder) for c, folder in folders.items() if folder in damaged or not folder.exists()]
    if todo:
        before()
        make_writable(store_dir)
        for folder in damaged:
            LOG.warning("%s: does not match its checksum; it is prepared again", folder)
            remove_entry(folder)
        log_earlier([c for c, _, _ in todo], settings, store_dir)
        outcomes = prepare_in_parallel(todo, num_workers or available_cores(), progress)
        failed |= {str(o.case.image): o.errors for o in outcomes if o.errors}
        log_warnings(list(dict.fromkeys(line for o in outcomes for line in o.warnings)))
    return dict(sorted(failed.items()))


def files_exist(case: Case) -> bool:
    """Return whether all files of a case exist."""
    return all(path.exists() for path in case.files)


def missing_text(case: Case) -> str:
    """Say which files of a case are missing."""
    if all(path.exists() for path in (case.image, case.label) if path is not None):
        return "; ".join(str(missing_channel(path)) for path in case.others if not path.exists())
    return f"{case.image}: it or its label is missing"


def log_earlier(cases: Sequence[Case], settings: PrepareSettings, store_dir: Path) -> None:
    """Log the number of cases whose volumes an earlier version prepared, in a format that is not read any more."""
    earlier = [case_folder(store_dir, settings, c, EARLIER_FORMAT) for c in cases]
    if found := [folder for folder in earlier if folder.exists()]:
        LOG.warning(
            "%s: %d volumes are of store format %d, in which a blosc2 before %s could lose voxels; they are prepared "
            "again, and the earlier folders, such as %s, can be deleted",
            *(store_dir, len(found), EARLIER_FORMAT, LEAST_BLOSC2, found[0].name),
        )


def find_damaged(folders: Sequence[Path], num_workers: int, progress: bool) -> list[Path]:
    """List the entries whose files differ from their sizes or checksums."""
    with ThreadPoolExecutor(num_workers) as threads:
        checked = zip(folders, threads.map(is_sound, folders), strict=True)
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
        for outcome in map_unordered(prepare_into, todo, num_workers, killed_preparation):
            found.append(outcome)
            bar.update()
    return sorted(found, key=lambda outcome: str(outcome.case.image))
