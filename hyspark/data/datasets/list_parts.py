"""Parts of a data list: for training, validation, tests and others; folds, and parts that entries name themselves."""

from pathlib import Path
from typing import Any, NamedTuple

from hyspark.data.datasets.found import FoundData
from hyspark.data.datasets.nnunet import absolute
from hyspark.utils.paths import NIFTI
from hyspark.utils.text import listing

PARTS = {"training": ("training", "train"), "validation": ("validation", "val", "valid", "validating")}
"""Names of the parts of a list that are used."""
SIDES = {"training": {*PARTS["training"], "tr"}, "validation": {*PARTS["validation"], "dev"}}
"""Values of an entry's own part."""
TEST = {"test", "testing", "ts", "holdout"}
PART_KEYS = ("split", "set", "subset", "partition", "fold")
"""Keys of an entry that may name its part."""


class ListEntry(NamedTuple):
    """One entry of a list: image, label map and fold, if it has them, keys that may name its part, further channels."""

    image: Path
    label: Path | None
    fold: Any
    keys: dict[str, Any]
    others: tuple[Path, ...] = ()


def pass_over_parts(content: dict[str, Any], listed: FoundData) -> None:
    """Pass over the entries of the parts of a list that are not used."""
    for key in [key for key in content if not any(key in names for names in PARTS.values())]:
        for value in content[key] if isinstance(content[key], list) else ():
            text = value.get("image") if isinstance(value, dict) else value
            for image in text if isinstance(text, list) else [text]:
                if isinstance(image, str) and image and (isinstance(value, dict) or NIFTI.search(image)):
                    listed.pass_over("unused file", f'listed as "{key}"', absolute(listed.source.parent, image))


def is_for_tests(entry: dict[str, Any]) -> bool:
    """Return whether an entry names itself as one for tests."""
    return any(isinstance(entry.get(key), str) and entry[key].lower() in TEST for key in PART_KEYS)


def move_to_own_parts(parts: dict[str, list[ListEntry]], listed: FoundData) -> dict[str, list[ListEntry]]:
    """Return the entries by the parts that they name themselves; those for tests are passed over.

    A key counts where all its values name parts, so that other uses of it change nothing.
    """
    known = TEST.union(*SIDES.values())
    entries = [entry for part in parts.values() for entry in part]
    used = [
        key
        for key in PART_KEYS
        if (values := [entry.keys[key] for entry in entries if key in entry.keys])
        and all(isinstance(value, str) and value.lower() in known for value in values)
    ]
    moved: dict[str, list[ListEntry]] = {part: [] for part in parts}
    for part, members in parts.items():
        for entry in members:
            own = next((entry.keys[key].lower() for key in used if key in entry.keys), part)
            if own in TEST:
                listed.pass_over("unused file", f'listed as "{own}"', entry.image)
            else:
                moved[next(side for side, names in SIDES.items() if own in names)].append(entry)
    if "fold" in used:
        moved = {part: [entry._replace(fold=None) for entry in members] for part, members in moved.items()}
    return moved


def split_by_fold(entries: list[ListEntry], fold: int | None, listed: FoundData) -> dict[str, list[ListEntry]]:
    """Split the entries of a list by its folds; a fold that no entry has is a finding."""
    folds = {entry.fold for entry in entries if entry.fold is not None}
    if any(type(value) is not int for value in folds):
        odd = [str(value) for value in folds if type(value) is not int]
        listed.add_unreadable(listed.source, f'"fold": expected whole numbers, got {listing(odd)}')
        return {"training": entries, "validation": []}
    if fold is None:
        fold = min(folds, default=0)
    if fold not in folds and (folds or fold):
        has = f"its folds are {listing(map(str, folds))}" if folds else "it has no folds"
        listed.add_unreadable(listed.source, f"fold: expected a fold of this list, got {fold}; {has}")
    else:
        validation = [entry for entry in entries if folds and entry.fold == fold]
        return {"training": [e for e in entries if not folds or e.fold != fold], "validation": validation}
    return {"training": entries, "validation": []}
