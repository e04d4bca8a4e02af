"""Linear probe: how well a linear head on frozen features separates labelled organs, while pre-training runs.

The loss says how well patches are reconstructed, not what the features are good for. So a few labelled volumes are cut
into fixed crops; half of the volumes fit a linear classifier of voxels, the other half score it. A voxel's features are
the five maps of the dense encoder at its position (trilinear, channels side by side, each divided by its deviation).

What the Dice means. The head is fitted on voxels drawn evenly over the classes, since organs are small, and ALL voxels
of the scoring crops are classified. The likeliest class of such a head has many false positives, as the head takes
organs to be as common as the background. With intercepts for the true fractions it finds hardly any organ. (In a
logistic head fractions only shift the intercepts: King and Zeng, "Logistic regression in rare events data", 2001.) Dice
weighs both errors alike, so the intercepts go half the way, with fractions counted in the fitting crops: this gave the
highest Dice for random and for pre-trained encoders. Per class, the Dice is that of all scoring crops together, so a
crop without the organ counts by its false positives. It is the Dice within crops around organs at the prepared spacing:
good for comparing encoders by one probe, not with other tables.

It draws nothing at random while training runs, changes no weights and no statistics, and always computes in fp32. So a
run with and without it is the same.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.batches.crops import crop_start
from hyspark.data.datasets import build, datalist_json
from hyspark.data.datasets.cases import UNANNOTATED, Case
from hyspark.data.datasets.splits import SPLIT_SEED, split_by_subject
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.data.intensity import to_input
from hyspark.data.preprocessing.prepare import failure_message
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.each_case import warn_of_failures
from hyspark.evaluation.failures import case_failure
from hyspark.evaluation.probe_head import IGNORED, count_voxels_by_class, fit_head, probe_scores
from hyspark.models.encoder import HybridEncoder
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import RunLog
from hyspark.training.run_volumes import SKIP_ADVICE, prepare_readable
from hyspark.utils.log import LOG

CROPS_PER_VOLUME = 2
VOXELS_PER_CLASS = 200
"""Voxels of one class that one crop gives to the fit, at most."""


@dataclass(frozen=True)
class ProbeCases:
    """Labelled cases to fit the head on and to score it on, and class names by label value."""

    fit: list[Case]
    score: list[Case]
    names: dict[int, str]


@dataclass(frozen=True)
class ProbeCrop:
    """A labelled crop of the probe.

    Attributes:
        image: float32 (c, *size).
        label: int64 (*size), the index of the class in `Probe.names`, or IGNORED.
        voxels: int64 (n,), flat positions that the head is fitted on.
    """

    image: Tensor
    label: Tensor
    voxels: Tensor


@dataclass(frozen=True)
class Probe:
    """Fixed crops of both halves. names: the classes that both hold, background first."""

    fit: list[ProbeCrop]
    score: list[ProbeCrop]
    names: list[str]


def find_probe_cases(path: Path, num_cases: int, channels: Sequence[int] = FIRST_CHANNELS) -> ProbeCases:
    """Choose labelled training cases for the probe, in two halves without a common subject.

    The choice depends on the names of the cases alone. Validation cases of the list or of a splits.json are not used.

    Args:
        path: A data list, or an nnU-Net data set folder.
        num_cases: Number of cases.
        channels: Channels that are read.

    Raises:
        ValueError: There are fewer cases, or what reading the list raises.
    """
    default = path if path.suffix == ".json" else path / "dataset.json"
    if path.suffix == ".json" or (default.is_file() and datalist_json.is_datalist(default)):
        listed = datalist_json.read_datalist(default, require_labels=True, channels=channels)
    else:
        listed = build.read_folder(path, seed=SPLIT_SEED, val_fraction=0.2, channels=channels)
    if len(listed.training) < num_cases:
        raise ValueError(
            f"probe_cases is {num_cases}, but {path} has {len(listed.training)} labelled training cases; "
            "lower probe_cases"
        )
    in_order = sorted(listed.training, key=lambda case: (case.dataset, case.name))
    chosen = [in_order[i * len(in_order) // num_cases] for i in range(num_cases)]
    fit, score = split_by_subject(chosen, seed=SPLIT_SEED, val_fraction=0.5)
    if not score:
        raise ValueError(f"{path}: the {num_cases} cases of the probe are all of one subject; raise probe_cases")
    return ProbeCases(fit, score, {value: name for name, value in (listed.labels or {}).items()})


def make_probe(config: PretrainConfig, processes: Processes, cases: ProbeCases) -> Probe | None:
    """Prepare the probe of a run by the run's settings; None on other processes than the main one.

    Unreadable cases stop the run or are excluded, as on_bad_case says.

    Raises:
        ValueError, OSError: What preparation and `cut_probe` raise.
    """
    both = [*cases.fit, *cases.score]
    readable = prepare_readable(config, processes, Path(config.probe_data), both, empty_label_fault)
    volumes = dict(zip(readable.cases, readable.volumes, strict=True))
    fit, score = ([volumes[case] for case in half if case in volumes] for half in (cases.fit, cases.score))
    if readable.failed and (config.on_bad_case == "stop" or not (fit and score)):
        raise ValueError(failure_message(readable.failed, len(both), SKIP_ADVICE if fit and score else ""))
    if not processes.is_main:
        return None
    warn_of_failures(readable.reasons, len(both), "used by the linear probe")
    return cut_probe(fit, score, cases.names, config.crop_shape)


def empty_label_fault(volume: StoredVolume) -> str:
    """Return what is wrong with a label without any organ; empty if nothing."""
    return "" if volume.entry.max_label else "its label is empty, so that the probe has no use for it"


def cut_probe(
    fit: Sequence[StoredVolume], score: Sequence[StoredVolume], names: dict[int, str], crop_size: Sequence[int]
) -> Probe:
    """Cut the fixed crops of prepared, labelled volumes.

    Args:
        fit: Volumes whose crops fit the head.
        score: Volumes whose crops score it.
        names: Class names by label value; a class without a name is called by its value.
        crop_size: Voxels of a crop on each axis.

    Raises:
        ValueError: The crops of the two halves have no class in common.
    """
    halves = [
        [
            labelled_box(volume, crop_size, index, n)
            for index, volume in enumerate(half)
            for n in range(CROPS_PER_VOLUME)
        ]
        for half in (fit, score)
    ]
    held = [set(np.unique(np.stack([label for _, label in boxes]))) for boxes in halves]
    values = [0, *sorted((held[0] & held[1]) - {0, UNANNOTATED})]
    if len(values) == 1:
        raise ValueError(
            f"no class is labelled in both halves of the probe ({', '.join(v.name for v in fit)} and "
            f"{', '.join(v.name for v in score)}); raise probe_cases"
        )
    table = np.full(256, IGNORED)
    table[values] = range(len(values))
    fitting, scoring = ([probe_crop(image, table[label]) for image, label in boxes] for boxes in halves)
    return Probe(fitting, scoring, [names.get(int(v), f"class_{v}") for v in values])


def labelled_box(volume: StoredVolume, size: Sequence[int], *position: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a crop around a labelled voxel: image float32 (c, *size), as a network sees it, and label uint8 (*size).

    The volume's classes take turns, so that small ones are in as many crops as large ones.
    """
    rng = np.random.default_rng(position)  # of its own: the probe is the same in runs of every seed
    shape = volume.entry.shape
    label = volume.read("label", (0,) * len(shape), shape)
    values = np.setdiff1d(label, (0, UNANNOTATED))
    if not len(values):
        raise ValueError(
            f"{volume.name}: its label is empty, so that the probe has no use for it; remove it from the list"
        )
    found = np.flatnonzero(label == values[sum(position) % len(values)])
    start = crop_start(np.unravel_index(rng.choice(found), shape), shape, size)
    image = to_input(volume.read_channels(start, size), volume.maps)
    return image, volume.read("label", start, size)


def probe_crop(image: np.ndarray, label: np.ndarray) -> ProbeCrop:
    """Choose the voxels of a crop: image float32 (c, *size) and label int64 (*size)."""
    rng = np.random.default_rng(0)
    voxels = []
    for number in np.unique(label[label != IGNORED]):
        found = np.flatnonzero(label == number)
        voxels.append(rng.choice(found, min(VOXELS_PER_CLASS, len(found)), replace=False))
    return ProbeCrop(torch.from_numpy(image), torch.from_numpy(label), torch.from_numpy(np.concatenate(voxels)))


def take_probe(encoder: HybridEncoder, probe: Probe, log: RunLog, step: int, epoch: int) -> None:
    """Probe the encoder after a step, and log the Dice; a failure, as of memory, is a warning, and training goes on."""
    clock = time.perf_counter()
    try:
        dice = probe_encoder(encoder, probe)
    except Exception as error:
        LOG.warning("epoch %d: no probe Dice after %d steps: %s", epoch, step + 1, case_failure(error))
        return
    log.write(step, epoch, probe_dice=mean(dice), probe=dice)
    seconds = time.perf_counter() - clock
    LOG.info("epoch %d: probe Dice %.4f after %d steps (%.1f s)", epoch, mean(dice), step + 1, seconds)


@torch.no_grad()
def probe_encoder(encoder: HybridEncoder, probe: Probe) -> dict[str, float]:
    """Compute the Dice of each class except the background, by name, on the encoder's device.

    The encoder's mode, weights and statistics do not change.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        return probe_in_evaluation_mode(encoder, probe)
    finally:
        encoder.train(was_training)


def probe_in_evaluation_mode(encoder: HybridEncoder, probe: Probe) -> dict[str, float]:
    """Compute what `probe_encoder` returns."""
    features = torch.cat([features_at(maps, crop) for crop, maps in encoded(encoder, probe.fit)])
    labels = torch.cat([crop.label.flatten()[crop.voxels] for crop in probe.fit]).to(features.device)
    fractions = count_voxels_by_class(torch.cat([crop.label.flatten() for crop in probe.fit]), len(probe.names)).to(
        features
    )
    weight, bias = fit_head(features, labels, fractions / fractions.sum())
    totals = torch.zeros(3, len(probe.names), dtype=torch.long)  # correct, found, true
    for crop, maps in encoded(encoder, probe.score):
        known = crop.label != IGNORED
        found, truth = probe_scores(maps, weight, bias).argmax(1)[0].cpu()[known], crop.label[known]
        totals += torch.stack(
            [count_voxels_by_class(x, len(probe.names)) for x in (truth[found == truth], found, truth)]
        )
    correct, num_found, num_true = totals
    dice = (2 * correct / (num_found + num_true)).tolist()
    return dict(zip(probe.names[1:], dice[1:], strict=True))


def mean(dice: dict[str, float]) -> float:
    """Average over the classes."""
    return math.fsum(dice.values()) / len(dice)


def encoded(encoder: HybridEncoder, crops: Sequence[ProbeCrop]) -> Iterator[tuple[ProbeCrop, list[Tensor]]]:
    """Encode crops: yield each with its five dense maps, (1, c, *size), finest first.

    Those of a volume are encoded together: with weights that lie channels last, torch's convolutions took four times
    as long on CPU for a crop alone.
    """
    device = next(encoder.parameters()).device
    for first in range(0, len(crops), CROPS_PER_VOLUME):
        together = crops[first : first + CROPS_PER_VOLUME]
        maps = encoder(torch.stack([crop.image for crop in together]).to(device))
        for i, crop in enumerate(together):
            yield crop, [x[i : i + 1] for x in maps]


def features_at(maps: Sequence[Tensor], crop: ProbeCrop) -> Tensor:
    """Interpolate the features of the chosen voxels, (n, sum of c), as `probe_scores` interpolates maps."""
    size = crop.label.shape
    at = torch.stack(torch.unravel_index(crop.voxels, size), dim=-1)
    grid = (2 * at + 1) / torch.tensor(size) - 1  # -1..1 between the outer faces of the crop
    grid = grid.flip(-1)[None, None, None].to(maps[0])  # grid_sample takes the last axis first
    sampled = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) for x in maps]
    return torch.cat(sampled, dim=1)[0, :, 0, 0].T
