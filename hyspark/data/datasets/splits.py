"""Splits into training and validation: by subject, so that no patient is on both sides, or by a splits file."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.found import FoundData
from hyspark.data.datasets.subjects import check_pattern, subjects_of
from hyspark.utils.paths import load_json
from hyspark.utils.text import listing

NNUNET_SPLITS = "splits_final.json"
"""Name of nnU-Net's splits file."""
SPLITS_FILES = ("splits.json", NNUNET_SPLITS)
"""Names of splits files in a data set folder; the first that exists is used."""
PICKLED_SPLITS = "splits_final.pkl"
"""The splits file of nnU-Net v1, which is not read, since a pickle may run code."""
CONVERT_SPLITS = shlex.join(
    [
        "python",
        "-c",
        'import json, pickle; folds = pickle.load(open("splits_final.pkl", "rb")); '
        "folds = [{key: list(map(str, fold[key])) for key in fold} for fold in folds]; "
        'json.dump(folds, open("splits_final.json", "w"))',
    ]
)
"""What to type in the folder of such a file."""
TRAIN_KEYS, VALIDATION_KEYS = ("train", "training"), ("val", "validation", "valid")
SPLIT_SEED = 0
"""Seed of splits that no setting gives another seed: every task splits one data set alike."""


def split_by_subject(
    cases: Sequence[Case], *, seed: int, val_fraction: float, subject_regex: str = ""
) -> tuple[list[Case], list[Case]]:
    """Split cases into training and validation, with a fraction of the subjects, rounded, in validation.

    The cases keep their order. Two or more subjects give at least one to each side, unless `val_fraction` is 0.
    Subjects are ranked by a hash of seed and name, so the split depends on neither order, folder nor library version.

    Args:
        cases: the cases.
        seed: seed of the draw.
        val_fraction: fraction of the subjects.
        subject_regex: see `subjects_of`.

    Raises:
        ValueError: if `val_fraction` is not in [0, 1), or the pattern does not match every name.
    """
    check_pattern(subject_regex, (case.name for case in cases))
    subjects = subjects_of([case.name for case in cases], [case.image for case in cases], subject_regex)
    held_out = held_out_subjects(subjects, seed=seed, val_fraction=val_fraction)
    pairs = list(zip(cases, subjects, strict=True))
    return [c for c, subject in pairs if subject not in held_out], [c for c, subject in pairs if subject in held_out]


def held_out_subjects(subjects: Iterable[str], *, seed: int, val_fraction: float) -> set[str]:
    """Choose the subjects for validation, see `split_by_subject`; raise ValueError unless the fraction is in [0, 1)."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction: expected at least 0 and below 1, got {val_fraction}")

    def rank(subject: str) -> str:
        return hashlib.sha256(f"{seed}:{subject}".encode("utf-8", "surrogatepass")).hexdigest()

    ranked = sorted(set(subjects), key=rank)
    num_validation = max(1, round(val_fraction * len(ranked))) if val_fraction else 0
    return set(ranked[: max(0, min(num_validation, len(ranked) - 1))])


def splits_file(folder: Path) -> Path | None:
    """Return the splits.json of a data set folder, or else nnU-Net's splits_final.json; None without either."""
    return next((file for name in SPLITS_FILES if (file := folder / name).is_file()), None)


def pickled_splits(folder: Path) -> list[Path]:
    """List the splits file of nnU-Net v1 in a data set folder, where there is none that is read."""
    file = folder / PICKLED_SPLITS
    return [file] if file.is_file() and splits_file(folder) is None else []


def pass_over_rest_of_split(
    cases: Sequence[Case], used: Collection[Case], path: Path, found: FoundData, *, labels: bool, fold: int
) -> None:
    """Pass over the cases that a splits file has for neither side, except those without a required label.

    Args:
        cases: all cases of the split.
        used: those in training and validation.
        path: the splits file.
        found: where the others are added.
        labels: whether cases need a label.
        fold: the fold.
    """
    content = load_json(path)
    parts, where = (content[fold], f"fold {fold} of ") if isinstance(content, list) else (content, "")
    used = set(used)
    for case in cases:
        if case not in used and (case.label or not labels):
            part = next((key for key, names in parts.items() if case.name in names), "")
            reason = f'listed as "{part}" in {path.name}' if part else f"in no part of {where}{path.name}"
            found.pass_over("unused file", reason, case.image)


def num_folds(path: Path) -> int:
    """Return the number of folds of a splits file; 1 for a file of another form than a list."""
    content = load_json(path)
    return len(content) if isinstance(content, list) and content else 1


def check_fold(fold: int, number: int, source: Path, unread: Sequence[str] = ()) -> None:
    """Check that a list or splits file has a fold; without folds, 0 stands for its only split.

    Args:
        fold: the fold.
        number: number of folds.
        source: the list, splits file or folder.
        unread: lines on splits files that are not read.

    Raises:
        ValueError: It has not.
    """
    if not 0 <= fold < max(1, number):
        known = f"folds 0 to {number - 1}" if number else "\n  ".join(["no folds; drop --fold", *unread])
        raise ValueError(f"fold: expected a fold of {source}, got {fold}; it has {known}")


def split_by_file(cases: Sequence[Case], path: Path, *, labels: bool, fold: int = 0) -> tuple[list[Case], list[Case]]:
    """Split cases into training and validation by the names in a splits file; the cases keep their order.

    Forms of the file:
    - {"train": [...], "validation" or "val": [...]}, optionally with "unlabelled" and "test";
    - nnU-Net's splits_final.json: a list of folds.

    "test" is not used. "unlabelled" joins training, unless `labels` is True.

    Args:
        cases: all images, labelled or not.
        path: the splits file.
        labels: whether the cases on both sides need a label.
        fold: which of the folds.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if there is no such fold, or a name is on both sides, unknown, in two data sets, or of a case
            without a required label.
    """
    content = load_json(path)
    check_fold(fold, len(content) if isinstance(content, list) else 0, path)
    sides = content[fold] if isinstance(content, list) and content else content
    keys = set(sides) if isinstance(sides, dict) else set()
    train_key, validation_key = (
        next((key for key in known if key in keys), known[0]) for known in (TRAIN_KEYS, VALIDATION_KEYS)
    )
    if not {train_key, validation_key} <= keys <= {train_key, validation_key, "unlabelled", "test"}:
        raise ValueError(
            f'{path}: expected {{"train": [...], "validation" or "val": [...]}}, optionally '
            f'with "unlabelled" and "test", or a list of these; '
            f"got {sorted(keys) or type(sides).__name__}"
        )
    for key, value in sides.items():
        if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise ValueError(f'{path}: "{key}": expected a list of case names, got {value!r}')

    train, validation, unlabelled = (set(sides.get(key, [])) for key in (train_key, validation_key, "unlabelled"))
    if both := (train | unlabelled) & validation:
        raise ValueError(f"{path}: in training and in validation: {listing(both)}; name each case once")
    num_images = Counter(case.name for case in cases)
    if unknown := (train | validation | unlabelled) - set(num_images):
        raise ValueError(f"{path}: no image has these names: {listing(unknown)}")
    if several := {name for name in train | validation | unlabelled if num_images[name] > 1}:
        raise ValueError(
            f"{path}: names found in more than one data set: {listing(several)}; give each data set its own "
            'splits.json and use splits "auto"'
        )
    if labels and (bare := {case.name for case in cases if case.label is None} & (train | validation)):
        raise ValueError(
            f"{path}: training or validation cases without a label file: {listing(bare)}; add the labels, or "
            'name the cases under "unlabelled"'
        )
    train = train if labels else train | unlabelled
    training = [case for case in cases if case.name in train]
    return training, [case for case in cases if case.name in validation]
