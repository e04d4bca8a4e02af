"""Loose NIfTI files -> nnU-Net's folder layout."""

import os
import re
import shutil
from collections.abc import Sequence
from filecmp import cmp as same_content
from pathlib import Path

from tqdm import tqdm

from hyspark.data.datasets.channels import channel_text
from hyspark.data.datasets.found import FoundData, log_unused
from hyspark.data.datasets.loose import read_loose
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.utils.paths import nifti_stem
from hyspark.utils.text import listing


def organize_by_names(
    source: Path, target: Path, *, copy: bool = False, channels: Sequence[int] = FIRST_CHANNELS
) -> int:
    """Link or copy the NIfTI images in and below `source` to `target/imagesTr/CASE_0000.nii.gz`.

    Further channels become CASE_0001 and so on. Label maps and other channels are not used; see `read_loose`. CASE is
    the file name without ending and channel. Its characters other than letters, digits, ".", "_" and "-" become "-". An
    uncompressed file keeps its ending .nii. A second call changes nothing.

    Args:
        source: folder of loose files.
        target: data set folder to make, named DatasetXXX_Name.
        copy: whether to copy the files; they are linked otherwise.
        channels: the channels that are used.

    Returns:
        The number of images.

    Raises:
        FileNotFoundError: if there is no NIfTI file; raised before the first change.
        ValueError: if two files have one name, or another file is in the way; raised before the first change.
    """
    source, target = Path(os.path.abspath(source)), Path(os.path.abspath(target))
    if not re.fullmatch(r"Dataset\d{3}_\w+", target.name, re.ASCII):
        raise ValueError(f"target folder: expected a name like Dataset501_Name, got {target.name!r}")
    files: dict[str, list[tuple[Path, ...]]] = {}
    found = FoundData(source)
    if source.is_dir():
        read_loose(source, found, channels, skip=[target])
    for case in found.cases:
        stem = re.sub(rf"(?<=.)_{channel_text(channels[0])}$", "", nifti_stem(case.image))
        files.setdefault(re.sub(r"[^A-Za-z0-9._-]", "-", stem), []).append(case.images)
    for label in [case.label for case in found.cases if case.label]:
        found.pass_over("unused label map", "a label map", label)
    log_unused(found.unused_lines())
    if not files:
        raise FileNotFoundError(f"{source}: expected .nii.gz or .nii files in it or any folder below, found none")
    if broken := [str(file) for (of_case, *_) in files.values() for file in of_case if not file.exists()]:
        raise FileNotFoundError(f"links to files that do not exist: {listing(broken)}")
    if whole := [str(of_case[0]) for (of_case, *_) in files.values() if len(set(of_case)) < len(of_case)]:
        raise ValueError(
            f"{whole[0]}: expected a file for each channel, got {len(whole)} files that hold several; they are read as "
            f"they are: --data {source} --image_channels {' '.join(map(str, channels))}"
        )
    twice = [f"{case} ({listing(str(of[0]) for of in same)})" for case, same in files.items() if len(same) > 1]
    if twice := [*twice, *(f"{f.file}, {f.found}" for f in found.findings if f.kind == "two files for a case")]:
        raise ValueError(f"files that would get the same name; rename them: {listing(twice)}")

    images = target / "imagesTr"
    plan: dict[Path, Path] = {}
    for title, (of_case,) in sorted(files.items()):
        for channel, file in zip(channels, of_case, strict=True):
            ending = ".nii.gz" if file.suffix.lower() == ".gz" else ".nii"
            plan[images / f"{title}_{channel_text(channel)}{ending}"] = file
    for new, old in plan.items():
        # The same case with the other ending would make two files for one case.
        other = new.with_suffix("") if new.suffix == ".gz" else new.with_suffix(".nii.gz")
        changed = os.path.lexists(new) and not (new.is_file() and same_content(new, old, shallow=False))
        if changed or os.path.lexists(other):
            raise ValueError(f"{new if changed else other} is in the way of {old}; move it, or choose another target")
    images.mkdir(parents=True, exist_ok=True)
    for new, old in tqdm(plan.items(), desc="copying", disable=not copy, leave=False):
        if copy and (new.is_symlink() or not new.exists()):
            temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
            shutil.copyfile(old, temporary)
            os.replace(temporary, new)
        elif not copy and not new.exists():
            new.symlink_to(old.resolve())
    return len(files)
