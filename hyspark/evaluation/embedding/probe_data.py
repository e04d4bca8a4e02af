"""Labels of a probe: rows of a CSV file matched to vectors, grouped by patient, and split into folds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.subjects import subjects_of_cases
from hyspark.evaluation.embedding.vectors import VectorTable
from hyspark.utils.log import LOG
from hyspark.utils.tables import read_csv
from hyspark.utils.text import count_of, listing

TRAINING_WORDS = ("train", "training")
SCORED_WORDS = ("val", "valid", "validation", "test", "testing")
MAX_CLASSES = 20
OWN_COLUMNS = ("case", "region", "patient", "split")
"""Columns of a file of labels that are read by their names."""
Picture = Literal["pca", "umap"]
Fold = tuple[np.ndarray, np.ndarray]
"""Rows to fit on, and rows to score."""


@dataclass(frozen=True)
class ProbeOptions:
    """What vectors are probed for.

    Attributes:
        labels: CSV file with a row per case: case, the target, and optionally region, patient, split, features.
        target: Column of the class.
        features: Columns of numbers that are probed alone and beside the vectors.
        folds: Folds of a cross-validation, where the file has no column split.
        picture: How vectors are drawn in two dimensions.
    """

    labels: Path
    target: str
    features: tuple[str, ...] = ()
    folds: int = 5
    picture: Picture = "pca"

    def __post_init__(self) -> None:
        if not self.labels.is_file():
            raise FileNotFoundError(f"--probe {self.labels}: no such file")
        if not self.target:
            raise ValueError("--probe: expected --target too, the column of the class")
        if self.folds < 2:
            raise ValueError(f"--folds: expected 2 or more, got {self.folds}")
        if self.picture not in ("pca", "umap"):
            raise ValueError(f"--picture: expected pca or umap, got {self.picture!r}")


class ProbeData(NamedTuple):
    """Labelled vectors.

    Attributes:
        positions: Row of each in the table of vectors.
        truth: Class numbers (n,).
        classes: Names of the classes in order.
        patients: Patient of each.
        features: float64 (n, f).
        folds: Rows to fit on and rows to score, of each fold.
        protocol: How they were split, in words.
    """

    positions: np.ndarray
    truth: np.ndarray
    classes: list[str]
    patients: np.ndarray
    features: np.ndarray
    folds: list[Fold]
    protocol: str

    @property
    def scored(self) -> np.ndarray:
        """Rows that are scored, in the order of the folds."""
        return np.concatenate([score for _, score in self.folds])


def read_probe_data(options: ProbeOptions, table: VectorTable, cases: Mapping[str, Case]) -> ProbeData:
    """Match the rows of a file of labels to vectors, and split them.

    Rows without a value of the target are not used.

    Args:
        options: The probe.
        table: The vectors.
        cases: The volumes by name, whose names and folders say which are of one patient if no column does.

    Raises:
        ValueError: A column is missing, a row is double or fits no single vector, classes or patients are too few, or a
            patient is on both sides of the split.
    """
    labels = read_labels(options)
    places = list(zip(table.cases, table.regions, strict=True))
    labelled = keyed_rows(labels, places)
    lost = [case for case, region in labelled if (case, region) not in set(places)]
    if lost:
        count = count_of(len(lost), "labelled row")
        LOG.warning("%s: no vector for %s, such as %s", options.labels, count, listing(lost, 3))
    return match_rows(options, labels, labelled, places, cases)


def check_labels(options: ProbeOptions, cases: Mapping[str, Case], regions: Mapping[str, Sequence[str]] | None) -> None:
    """Check a file of labels before vectors are computed, as `read_probe_data` does if none of them fails.

    Args:
        options: The probe.
        cases: The volumes by name.
        regions: Names of their regions; None if they are unknown, and those in the file are taken.

    Raises:
        ValueError: As `read_probe_data` and `check_training_parts`.
    """
    labels = read_labels(options)
    if others := [row["case"] for row in labels.rows.values() if row["case"] not in cases]:
        rows = count_of(len(others), "row")
        LOG.warning("%s: no volume is named as the case of %s, such as %s", options.labels, rows, listing(others, 3))
    if regions is None:
        named = [(row["case"], row.get("region") or "") for row in labels.rows.values() if row["case"] in cases]
        places = list(dict.fromkeys(named))
    else:
        places = [(case, region) for case in cases for region in regions[case]]
    check_training_parts(match_rows(options, labels, keyed_rows(labels, places), places, cases))


class Labels(NamedTuple):
    """Content of a file of labels.

    Attributes:
        path: The file.
        target: Column of the class.
        columns: Names of all columns.
        rows: Its rows by line.
    """

    path: Path
    target: str
    columns: list[str]
    rows: dict[int, dict[str, str]]


def read_labels(options: ProbeOptions) -> Labels:
    """Read a file of labels; raise ValueError if a column is missing, or is none of numbers by its name."""
    path = options.labels
    columns, rows = read_csv(path, OWN_COLUMNS)
    if missing := [name for name in ("case", options.target, *options.features) if name not in columns]:
        raise ValueError(f"{path}: expected the columns {', '.join(missing)}; it has {', '.join(columns)}")
    if bad := [name for name in options.features if name in (*OWN_COLUMNS, options.target)]:
        raise ValueError(f"--features {' '.join(bad)}: expected columns of numbers other than the target")
    return Labels(path, options.target, columns, rows)


def match_rows(
    options: ProbeOptions,
    labels: Labels,
    labelled: Mapping[tuple[str, str], dict[str, str]],
    places: Sequence[tuple[str, str]],
    cases: Mapping[str, Case],
) -> ProbeData:
    """Match labelled rows to the cases and regions of vectors, and split them; errors as for `read_probe_data`."""
    path = labels.path
    positions_of = {place: i for i, place in enumerate(places)}
    found = {positions_of[key]: row for key, row in labelled.items() if key in positions_of}
    positions = np.array(sorted(found), int)
    used = [found[i] for i in positions]
    names = [row[options.target].strip() for row in used]
    classes = sorted_classes(set(names))
    check_num_classes(path, options.target, classes)
    truth = np.array([classes.index(name) for name in names])
    patients = np.array(patients_of(path, [places[i][0] for i in positions], used, labels.columns, cases))
    features = np.array([numbers_of(path, row, options.features) for row in used]).reshape(len(used), -1)
    if "split" in labels.columns:
        folds = [official_split(path, [row["split"] or "" for row in used], patients)]
        protocol = f"the split of {path.name}"
    else:
        folds = grouped_folds(truth, patients, classes, options.folds)
        protocol = f"{options.folds}-fold cross-validation"
    return ProbeData(positions, truth, classes, patients, features, folds, protocol)


def check_training_parts(data: ProbeData) -> None:
    """Raise ValueError if a training part has a class of fewer than two patients, which no inner fold splits."""
    for fit, _ in data.folds:
        patients, truth = data.patients[fit], data.truth[fit]
        counts = {name: len(set(patients[truth == number])) for number, name in enumerate(data.classes)}
        if few := [f"{name} has {num}" for name, num in counts.items() if num < 2]:
            raise ValueError(
                f"--probe: expected two patients of each class or more in each training part, but {', '.join(few)}; "
                "label more"
            )


def keyed_rows(labels: Labels, places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows with a class by case and region.

    Raises:
        ValueError: A row is double, or does not say which of several regions it means.
    """
    regions: dict[str, list[str]] = {}
    for case, region in places:
        regions.setdefault(case, []).append(region)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for number, row in labels.rows.items():
        case = row["case"]
        of_case = regions.get(case, [""])
        if not row.get("region") and len(of_case) > 1:
            raise ValueError(
                f"{labels.path}, line {number}: {case} has {len(of_case)} regions; expected a column region with one "
                f"of {listing(of_case, 5)}"
            )
        key = (case, row.get("region") or of_case[0])
        if key in found:
            raise ValueError(f"{labels.path}, line {number}: {' '.join(key)} comes twice; keep one of the rows")
        found[key] = row
    return {key: row for key, row in found.items() if is_value(row[labels.target])}


def is_value(text: str | None) -> bool:
    """Return whether a field holds a value: it is neither empty nor NaN, as programs write a missing number."""
    return (text or "").strip().lower() not in ("", "nan")


def sorted_classes(names: set[str]) -> list[str]:
    """Sort names of classes, as numbers if all are."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def check_num_classes(path: Path, target: str, classes: Sequence[str]) -> None:
    """Raise ValueError if a column does not hold a few classes."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(
            f"{path}: column {target}: expected 2 to {MAX_CLASSES} classes among rows of the volumes, got "
            f"{len(classes)}{': ' if classes else ''}{listing(classes, 5)}"
        )


def patients_of(
    path: Path,
    names: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    columns: Sequence[str],
    cases: Mapping[str, Case],
) -> list[str]:
    """Return the patient of each row: that of the column patient, else by names and folders of the volumes.

    Raises:
        ValueError: The column has no value in a row.
    """
    if "patient" in columns:
        if unknown := [row["case"] for row in rows if not is_value(row["patient"])]:
            raise ValueError(
                f"{path}: column patient: expected one in each row with a class, got none of {listing(unknown, 5)}"
            )
        return [row["patient"].strip() for row in rows]
    unique = list(dict.fromkeys(names))
    subjects = dict(zip(unique, subjects_of_cases([cases[name] for name in unique]), strict=True))
    return [subjects[name] for name in names]


def numbers_of(path: Path, row: Mapping[str, str], columns: Sequence[str]) -> list[float]:
    """Return the numbers of a row; raise ValueError if one is none."""
    numbers = []
    for name in columns:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise ValueError(f"{path}: {row['case']}: column {name}: expected a number, got {row[name]!r}")
        numbers.append(value)
    return numbers


def official_split(path: Path, words: Sequence[str], patients: np.ndarray) -> Fold:
    """Return the rows of training and the scored ones of a column `split`.

    Raises:
        ValueError: A word is unknown, a side is empty, or a patient is on both sides.
    """
    lower = [word.strip().lower() for word in words]
    if unknown := {word for word in lower if word not in (*TRAINING_WORDS, *SCORED_WORDS)}:
        raise ValueError(f"{path}: column split: expected train, and validation or test, got {listing(unknown, 5)}")
    is_training = np.array([word in TRAINING_WORDS for word in lower])
    scored = {word for word in lower if word not in TRAINING_WORDS}
    if len({word.startswith("test") for word in scored}) > 1:
        raise ValueError(f"{path}: column split: expected one scored part, got {listing(scored)}; drop one of them")
    if not scored or not is_training.any():
        raise ValueError(f"{path}: column split: expected training and scored rows, got {listing(set(lower))} alone")
    if both := set(patients[is_training]) & set(patients[~is_training]):
        raise ValueError(f"{path}: column split: patients on both sides: {listing(both, 5)}")
    return np.flatnonzero(is_training), np.flatnonzero(~is_training)


def grouped_folds(truth: np.ndarray, patients: np.ndarray, classes: Sequence[str], num_folds: int) -> list[Fold]:
    """Split rows into folds with like classes and no patient in two of them.

    Raises:
        ValueError: A class has fewer patients than there are folds.
    """
    few = {name: num for name, num in zip(classes, patients_per_class(truth, patients), strict=True) if num < num_folds}
    if few:
        shown = ", ".join(f"{name} has {num}" for name, num in few.items())
        raise ValueError(f"--folds {num_folds}: expected as many patients of each class, but {shown}; lower --folds")
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    return list(splitter.split(np.zeros(len(truth)), truth, patients))


def patients_per_class(truth: np.ndarray, patients: np.ndarray) -> list[int]:
    """Count the patients of each class that occurs, in order."""
    return [len(set(patients[truth == number])) for number in np.unique(truth)]
