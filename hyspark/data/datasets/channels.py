"""The channels of images: CASE_0000, CASE_0001, ... in file names, or the files of one entry of a list."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hyspark.data.datasets.file_names import cases_of_stems
from hyspark.data.datasets.words import CHANNEL
from hyspark.utils.paths import nifti_stem

NIFTI_ENDINGS = (".nii.gz", ".nii")


def channel_text(channel: int) -> str:
    """Write a channel as in file names."""
    return f"{channel:04d}"


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
        found[case] = tuple(known.get(channel) or beside(near, channel) for channel in channels)
    return found


def beside(image: Path, channel: int) -> Path:
    """Return the file of another channel beside an image; one that does not exist has the image's ending."""
    stem = nifti_stem(image)
    match = CHANNEL.fullmatch(stem)
    name = f"{match['case'] if match else stem}_{channel_text(channel)}"
    own = image.name[len(stem) :]
    candidates = [image.with_name(name + ending) for ending in (own, *NIFTI_ENDINGS)]
    return next((path for path in candidates if path.exists()), candidates[0])


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
