"""Data lists in MONAI's decathlon format (dataset.json)."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyspark.data.datasets.cases import IGNORED_NAME, Case, Datalist, class_values, ignored_value
from hyspark.utils.paths import load_json, nifti_stem
from hyspark.utils.text import listing


def write_datalist(datalist: Datalist, path: Path) -> None:
    """Write a decathlon JSON with POSIX paths relative to its own folder, atomically.

    Raises:
        ValueError: if another kind of file exists at `path`, or the file cannot be written.
    """
    path = Path(os.path.abspath(path))

    def relative(file: Path) -> str:
        parts = Path(os.path.relpath(file, path.parent))
        return parts.as_posix() if parts.parts[0] == ".." else f"./{parts.as_posix()}"

    def entry(case: Case) -> dict[str, str]:
        image = {"image": relative(case.image)}
        return image if case.label is None else image | {"label": relative(case.label)}

    content: dict[str, Any] = {"training": [entry(case) for case in datalist.training]}
    if datalist.validation:
        content["validation"] = [entry(case) for case in datalist.validation]
    ignored = {case.ignore for case in (*datalist.training, *datalist.validation) if case.ignore is not None}
    if len(ignored) > 1:
        raise ValueError(f"{path}: the data sets ignore different label values: {sorted(ignored)}; make one list each")
    if datalist.labels is not None:
        content["labels"] = {**datalist.labels, **({IGNORED_NAME: ignored.pop()} if ignored else {})}
    if os.path.lexists(path):
        check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path}: not writable ({error.strerror}); choose another output file") from error


def is_datalist(path: Path) -> bool:
    """Return whether a JSON file is a data list (has a list "training"), unlike nnU-Net's own dataset.json."""
    loaded = load_json(path)
    return isinstance(loaded, dict) and isinstance(loaded.get("training"), list)


def read_datalist(path: Path, *, require_labels: bool = False, require_files: bool = True) -> Datalist:
    """Read a decathlon JSON, whose paths are relative to its folder; other keys ("test", ...) are ignored.

    An entry is {"image": ..., "label": ...} or the image's path alone.

    Args:
        path: the JSON file.
        require_labels: whether every entry needs a label.
        require_files: whether every file has to exist.

    Raises:
        FileNotFoundError: if a required file is missing.
        ValueError: if the structure is wrong, an image is listed twice, or a required label is missing.
    """
    path = Path(os.path.abspath(path))
    content = load_json(path)
    if not (isinstance(content, dict) and isinstance(content.get("training"), list) and content["training"]):
        raise ValueError(f'{path}: expected {{"training": [{{"image": "./..."}}, ...]}} with at least one image')
    validation = content.get("validation", [])
    if not isinstance(validation, list):
        raise ValueError(f'{path}: "validation": expected a list, got {type(validation).__name__}')

    pairs: list[tuple[Path, Path | None]] = []
    for key, entries in (("training", content["training"]), ("validation", validation)):
        for index, value in enumerate(entries):
            pairs.append(entry_paths(value, path, f"{key}[{index}]", require_labels))
    images = [image for image, _ in pairs]
    if twice := {str(image) for image, times in Counter(images).items() if times > 1}:
        raise ValueError(f"{path}: images listed more than once: {listing(twice)}")
    files = [file for pair in pairs for file in pair if file is not None]
    missing = [str(file) for file in files if not file.is_file()]
    if missing and require_files:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} files are missing: {listing(missing)}")

    names = case_names(images)
    labels = class_values(content["labels"], path) if content.get("labels") else None
    ignore = ignored_value(content.get("labels"), path)
    cases = tuple(Case(names[image], dataset_of(image), image, label, ignore) for image, label in pairs)
    num_training = len(content["training"])
    return Datalist(cases[:num_training], cases[num_training:], labels)


def entry_paths(value: Any, path: Path, key: str, require_label: bool) -> tuple[Path, Path | None]:
    """Return the absolute paths of image and label of one entry; `key` names the entry, as in training[3]."""
    entry = value if isinstance(value, dict) else {"image": value}
    image, label = entry.get("image"), entry.get("label")
    if not isinstance(image, str) or not isinstance(label, str | None) or "" in (image, label):
        raise ValueError(
            f'{path}: {key}: expected {{"image": "./..."}}, optionally with "label": "./...", each the '
            f"path of one file, got {value!r}"
        )
    if require_label and label is None:
        raise ValueError(f'{path}: {key}: expected a "label", got the image {image} alone')
    absolute = with_channel(Path(os.path.abspath(path.parent / image)))
    return absolute, None if label is None else Path(os.path.abspath(path.parent / label))


def with_channel(image: Path) -> Path:
    """Return the file of an image that a list of nnU-Net v1 names: case.nii.gz stands for case_0000.nii.gz."""
    stem = nifti_stem(image)
    first = image.with_name(f"{stem}_0000{image.name[len(stem) :]}")
    return first if not image.exists() and first.exists() else image


def case_names(images: Sequence[Path]) -> dict[Path, str]:
    """Return unique case names: file names without ending and channel.

    A channel is "_0000", or four digits that all images of a data set have in common. A name that several files have
    (case_1/imaging.nii.gz, case_2/imaging.nii.gz) is prefixed by its folder's name. The names of folders above are
    added as far as they are needed to distinguish the files.
    """
    endings: dict[str, set[str]] = {}
    for image in images:
        endings.setdefault(dataset_of(image), set()).add(nifti_stem(image)[-5:])
    names = {}
    for image in images:
        stem = nifti_stem(image)
        shared = len(endings[dataset_of(image)]) == 1
        has_channel = re.fullmatch(r".+_\d{4}", stem, re.DOTALL) and (shared or stem.endswith("_0000"))
        names[image] = stem[:-5] if has_channel else stem
    folders = {image: image.parent.relative_to(image.anchor).parts for image in names}
    stems = dict(names)
    for depth in range(1, max(map(len, folders.values()), default=0) + 1):
        if not (repeated := {name for name, num in Counter(names.values()).items() if num > 1}):
            break
        for image in [image for image, name in names.items() if name in repeated]:
            names[image] = "-".join([*folders[image][-depth:], stems[image]])
    return names


def dataset_of(image: Path) -> str:
    """Return the name of the folder above imagesTr or imagesTs, or else of the image's own folder."""
    return (image.parent.parent if image.parent.name in ("imagesTr", "imagesTs") else image.parent).name


def check_replaceable(path: Path) -> None:
    """Raise ValueError unless `path` holds a data list without anything that `write_datalist` would lose."""
    content: Any = None
    if path.is_file():
        with suppress(ValueError):
            content = load_json(path)
    entries = content.get("training") if isinstance(content, dict) else None
    ours = isinstance(entries, list) and all(isinstance(entry, dict) and "image" in entry for entry in entries)
    if not ours or set(content) - {"training", "validation", "labels"}:
        raise ValueError(
            f"{path}: expected a data list to replace, got another file, which is kept; choose another output name"
        )
