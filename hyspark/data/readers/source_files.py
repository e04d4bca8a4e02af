"""Files and folders that are named on a command line -> their files, by how they are read."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.data.datasets.file_names import BY_NIBABEL, BY_SIMPLEITK, SETTINGS_FILE, cases_of_stems
from hyspark.data.datasets.words import is_label_folder, is_label_name
from hyspark.data.readers.other_formats import (
    DATA_ENDINGS,
    PICTURES,
    PictureStack,
    natural_order,
    num_pages,
    require_simpleitk,
)
from hyspark.data.readers.volumes import Found, NotUsed
from hyspark.utils.paths import NIFTI, walk_folders
from hyspark.utils.private_text import private

NEEDS_SPACING = (
    "{num} pictures, which state no distances; give mm between columns, rows and slices by --slice_spacing X Y Z"
)


@dataclass
class SourceFiles:
    """Files of the sources by how they are read.

    Attributes:
        images: NIfTI images, files of other formats, and folders of pictures, with their paths below the source.
        stacks: the pictures of each folder of `images`.
        rest: other files, which may be DICOM, with their paths below the source.
    """

    images: dict[Path, Path] = field(default_factory=dict)
    stacks: dict[Path, PictureStack] = field(default_factory=dict)
    rest: dict[Path, Path] = field(default_factory=dict)


def sort_sources(sources: Sequence[Path], skip: Path, other_formats: bool, found: Found) -> SourceFiles:
    """Sort the files of the sources, each once, by how they are read."""
    files = SourceFiles()
    others: dict[Path, Path] = {}
    seen: set[str] = set()
    for source in sources:
        images = dict.fromkeys(find_images_of(source, skip, found, for_import=other_formats))
        for file in [*images, *files_of(source, skip)]:
            if (real := os.path.realpath(file)) in seen:
                continue
            below = file.relative_to(source) if file != source else Path(file.name)
            ending = file.suffix.lower()
            if file in images:
                files.images[file] = below
            elif NIFTI.fullmatch(file.name) or (other_formats and is_detached(file)):
                continue
            elif other_formats and ending in (*BY_SIMPLEITK, *BY_NIBABEL):
                others[file] = below
            else:
                files.rest[file] = below
            seen.add(real)
    files.images |= images_among(others, found)
    if any(file.suffix.lower() in BY_SIMPLEITK for file in files.images):
        require_simpleitk()
    return files


def images_among(others: dict[Path, Path], found: Found) -> dict[Path, Path]:
    """Return the images among files of other formats than NIfTI; label maps and other channels are named.

    Args:
        others: files, with their paths below the source.
        found: where files that are no images are added.
    """
    images: dict[Path, list[Path]] = defaultdict(list)
    for file, below in others.items():
        if is_label_name(file.stem) or any(is_label_folder(name, surely=True) for name in below.parts[:-1]):
            found.skipped.append(NotUsed(str(file), "a label map by its name or folder", below.as_posix()))
        else:
            images[file.parent].append(file)
    kept = {}
    for folder, files in images.items():
        labels = folder.parent / "labelsTr"
        if folder.name == "imagesTr" and labels.is_dir():
            num = sum(not path.name.startswith(".") for path in labels.iterdir())
            found.skipped.append(NotUsed(str(labels), f"{num} label maps", str(labels), num_files=num))
        cases = cases_of_stems([file.stem for file in files])
        for file in files:
            if cases[file.stem] is None:
                found.add_other("another channel", file)
            else:
                kept[file] = others[file]
    return kept


def is_detached(file: Path) -> bool:
    """Return whether a file holds the voxels of a header beside it, as .img of .hdr."""
    return any(
        file.name.lower().endswith(data) and file.with_name(file.name[: -len(data)] + ending).is_file()
        for ending, endings in DATA_ENDINGS.items()
        for data in endings
    )


def take_pictures(
    files: SourceFiles, min_slices: int, spacing: tuple[float, float, float] | None, found: Found
) -> None:
    """Move folders of pictures, and pictures of several pages, from the rest of the files to the images."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for file in files.rest:
        if file.suffix.lower() in PICTURES:
            folders[file.parent].append(file)
    for folder, pictures in folders.items():
        paged = [file for file in pictures if file.suffix.lower() in PICTURES[3:] and num_pages(file) >= min_slices]
        single = [file for file in pictures if file not in paged]
        stacks: dict[Path, tuple[Path, ...]] = {file: (file,) for file in paged}
        if len(single) >= min_slices:
            stacks[folder] = tuple(natural_order(single))
        for source, of_stack in stacks.items():
            if spacing is None:
                reason = NEEDS_SPACING.format(num=len(of_stack))
                found.damaged.append(NotUsed(str(source), reason, str(source), num_files=len(of_stack)))
            else:
                below = files.rest[of_stack[0]]
                above = below.parent if below.parent.name else Path(source.name)
                files.images[source] = below if source in of_stack else above
                files.stacks[source] = PictureStack(of_stack, spacing)
        used = {file for of_stack in stacks.values() for file in of_stack}
        for file in pictures:
            del files.rest[file]
            if file not in used:
                found.add_other(f"pictures, of fewer than {min_slices} slices", file)


def find_images_of(source: Path, skip: Path, found: Found, *, for_import: bool) -> list[Path]:
    """Find the NIfTI images at or below a path; label maps and other channels are counted, doubtful files listed.

    Args:
        source: the path.
        skip: folder that is not searched.
        found: where files that are no images are added.
        for_import: whether label maps of images are listed, too, and data sets of an earlier import are no sources.
    """
    if not source.is_dir():
        return [source] if NIFTI.fullmatch(source.name) else []
    data = read_data_folder(source, with_loose=True, skip=skip)
    found.skipped += [
        NotUsed(f.file, private(f.found), f.file) for f in data.findings if f.kind == "two files for a case"
    ]
    for (kind, reason), files in data.unused.items():
        nifti = [file for file in files if NIFTI.fullmatch(file.name)]
        if kind == "another channel":
            for file in nifti:
                found.add_other(kind, file)
        else:
            found.skipped += [NotUsed(str(file), reason, str(file)) for file in nifti]
    for label in sorted({case.label for case in data.cases if case.label and for_import}):
        found.skipped.append(NotUsed(str(label), "a label map", str(label)))
    images = [case.image for case in data.cases]
    made = {folder for image in images if for_import and ((folder := image.parent.parent) / SETTINGS_FILE).is_file()}
    found.skipped += [NotUsed(str(folder), "a data set of an earlier import", str(folder)) for folder in sorted(made)]
    return [image for image in images if image.parent.parent not in made]


def files_of(source: Path, skip: Path) -> Iterator[Path]:
    """Yield the files at or below a path, without hidden ones; of an nnU-Net data set those of imagesTr."""
    if source.is_file():
        yield source
    elif not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    else:
        for folder, below in walk_folders(source, skip=skip):
            if (folder / "imagesTr").is_dir():
                below[:] = ["imagesTr"]
                continue
            files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
            yield from (file for file in files if file.is_file() or (file.is_symlink() and not file.exists()))
