"""The channels of images: CASE_0000, CASE_0001, ... in file names, the files of one entry of a list, or one 4D file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hyspark.data.datasets.file_names import cases_of_stems
from hyspark.data.datasets.words import CHANNEL
from hyspark.data.readers.header import num_volumes
from hyspark.utils.paths import nifti_stem

NIFTI_ENDINGS = (".nii.gz", ".nii")


def channel_text(channel: int) -> str:
    """Write a channel as in file names."""
    return f"{channel:04d}"


def first_cases(
    files: Collection[Path], labels: Collection[str], channels: Sequence[int], num_channels: int | None = None
) -> dict[str, str | None]:
    """Return the case of each image of one folder by the name of its file; None for a channel other than the first.

    Arguments are those of `further_cases`, and the first channel is that which is read first. A file of several
    volumes holds all channels of a case.
    """
    stems = [nifti_stem(file) for file in files]
    cases = cases_of_stems(stems, labels, channel_text(channels[0]), num_channels)
    for file, stem in zip(files, stems, strict=True):
        if cases[stem] is None and not CHANNEL.fullmatch(stem) and num_volumes(file) > 1:
            cases[stem] = stem
    return cases


def further_cases(
    stems: Collection[str], labels: Collection[str], channels: Sequence[int], num_channels: int | None = None
) -> dict[str, tuple[int, str]]:
    """Return channel and case of the images of one folder that are of the second or a later channel that is read.

    Args:
        stems: file names of the images, without ending.
        labels: file names of the label maps, without ending.
        channels: the channels that are read.
        num_channels: number of channels that the data set declares; None if it declares none.
    """
    found: dict[str, tuple[int, str]] = {}
    for channel in channels[1:]:
        cases = cases_of_stems(stems, labels, channel_text(channel), num_channels)
        found |= {stem: (channel, case) for stem, case in cases.items() if case is not None}
    return found


def complete_cases(
    first: Mapping[str, Path], further: Mapping[str, Mapping[int, Path]], channels: Sequence[int]
) -> dict[str, tuple[Path, ...]]:
    """Return the file of each channel by case; a file that is missing has the name that it should have.

    Args:
        first: file of the first channel by case.
        further: files of further channels, by case and channel.
        channels: the channels that are read.
    """
    found = {}
    for case in sorted({*first, *further}):
        known = dict(further.get(case, {})) | ({channels[0]: first[case]} if case in first else {})
        near = next(iter(known.values()))
        is_whole = len(known) < len(channels) and nifti_stem(near) == case and num_volumes(near) > 1
        found[case] = tuple(known.get(channel) or (near if is_whole else beside(near, channel)) for channel in channels)
    return found


def beside(image: Path, channel: int) -> Path:
    """Return the file of another channel: beside an image, or the image itself if it is a file of several volumes.

    A file that does not exist has the image's ending.
    """
    stem = nifti_stem(image)
    match = CHANNEL.fullmatch(stem)
    name = f"{match['case'] if match else stem}_{channel_text(channel)}"
    own = image.name[len(stem) :]
    candidates = [image.with_name(name + ending) for ending in (own, *NIFTI_ENDINGS)]
    if found := next((path for path in candidates if path.exists()), None):
        return found
    return image if match is None and num_volumes(image) > 1 else candidates[0]


def channels_of_list(files: Sequence[Path], channels: Sequence[int]) -> list[Path] | None:
    """Choose the files of channels among those of one entry of a list: by their names if all have one, else by index.

    None if a channel is not among them.
    """
    stems = [CHANNEL.fullmatch(nifti_stem(file)) for file in files]
    numbers = [int(match["channel"]) for match in stems if match]
    if len(numbers) < len(files) or len({match["case"] for match in stems if match}) > 1:
        numbers = list(range(len(files)))
    known = dict(zip(numbers, files, strict=True))
    return [known[channel] for channel in channels] if set(channels) <= set(known) else None
