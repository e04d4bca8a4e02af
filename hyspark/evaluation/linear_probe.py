"""A voxel probe: how well a linear head on frozen features tells labelled organs apart, while pre-training runs.

The loss says how well patches are reconstructed, not what the features are good for. So a few labelled volumes are cut
into fixed crops; half of the volumes fit a linear classifier of voxels, the other half score it. A voxel's features are
the five maps of the dense encoder at its place (trilinear, channels side by side, each divided by its deviation).

What the Dice means. The head is fitted on voxels drawn evenly over the classes, since organs are small, and ALL voxels
of the scoring crops are classified. The likeliest class of such a head finds organs everywhere, as it takes them for as
common as the background; set back to the true shares (in a logistic head they only shift the intercepts: King and Zeng,
"Logistic regression in rare events data", 2001) it hardly finds any. Dice asks for as much of the one as of the other,
so the intercepts go half the way, with shares counted in the fitting crops: this gave the highest Dice for random and
for pre-trained encoders. Per class, the Dice is that of all scoring crops together, so that a crop without the organ
counts by what is wrongly found there. It is the Dice within crops around organs at the prepared spacing: good for
comparing encoders by one probe, not with other tables.

It draws nothing at random while training runs, changes no weights and no statistics, and computes in fp32 whatever the
run does, so a run with and without it is the same.
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
from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.splits import SPLIT_SEED, split_by_subject
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.models.encoder import HybridEncoder
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import RunLog
from hyspark.training.run_volumes import prepared
from hyspark.utils.log import LOG

CROPS_PER_VOLUME = 2
VOXELS_PER_CLASS = 200
"""Voxels of one class that one crop gives to the fit, at most."""
PENALTY = 3e-3
"""Weight of the squared coefficients (of features with deviation 1) beside the mean cross entropy."""
MAX_ITERATIONS = 30
"""Of L-BFGS; twice as many changed the Dice by .01."""
IGNORED = -1
"""Label of voxels whose class is not in both halves."""


@dataclass(frozen=True)
class ProbeCases:
    """Labelled cases to fit the head on and to score it on, and class names by label value."""

    fit: list[Case]
    score: list[Case]
    names: dict[int, str]


@dataclass(frozen=True)
class ProbeCrop:
    """image float32 (1, *size) in [0, 1]; label int64 (*size), the class's place in `Probe.names` or IGNORED; voxels
    int64 (n,), flat positions the head is fitted on.
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


def find_probe_cases(path: Path, num_cases: int) -> ProbeCases:
    """`num_cases` labelled training cases of a data list or of an nnU-Net data set folder, in two halves without a
    common subject. The choice depends on their names alone.

    Cases that the list or a splits.json keeps for validation are not used. Raises ValueError where there are fewer
    cases, and what reading the list raises.
    """
    default = path if path.suffix == ".json" else path / "dataset.json"
    if path.suffix == ".json" or (default.is_file() and datalist_json.is_datalist(default)):
        listed = datalist_json.read_datalist(default, require_labels=True)
    else:
        listed = build.read_folder(path, seed=SPLIT_SEED, val_fraction=0.2)
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
    """The probe of a run, prepared by the run's settings; None on other processes than the main one, which do not
    probe. Raises what preparation and `cut_probe` raise.
    """
    volumes = prepared(config, processes, Path(config.probe_data), [*cases.fit, *cases.score])
    if not processes.is_main:
        return None
    num = len(cases.fit)
    return cut_probe(volumes[:num], volumes[num:], cases.names, config.crop_shape)


def cut_probe(
    fit: Sequence[StoredVolume], score: Sequence[StoredVolume], names: dict[int, str], crop_size: Sequence[int]
) -> Probe:
    """The fixed crops of prepared, labelled volumes.

    names: by label value; classes without one are called by their value. Raises ValueError where the crops of the two
    halves have no class in common.
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
    values = [0, *sorted((held[0] & held[1]) - {0})]
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
    """A crop around a labelled voxel: image float32 and label uint8, (*size). The volume's classes take turns, so
    that small ones are in as many crops as large ones.
    """
    rng = np.random.default_rng(position)  # of its own: the probe is the same in runs of every seed
    shape = volume.entry.shape
    label = volume.read("label", (0,) * len(shape), shape)
    values = np.unique(label)[np.unique(label) > 0]
    if not len(values):
        raise ValueError(f"{volume.name}: its label is empty, so that the probe cannot use it; take it off the list")
    found = np.flatnonzero(label == values[sum(position) % len(values)])
    start = crop_start(np.unravel_index(rng.choice(found), shape), shape, size)
    return volume.read("image", start, size), volume.read("label", start, size)


def probe_crop(image: np.ndarray, label: np.ndarray) -> ProbeCrop:
    """Choose the voxels of a crop: image float32 and label int64, (*size)."""
    rng = np.random.default_rng(0)
    voxels = []
    for number in np.unique(label[label != IGNORED]):
        found = np.flatnonzero(label == number)
        voxels.append(rng.choice(found, min(VOXELS_PER_CLASS, len(found)), replace=False))
    return ProbeCrop(torch.from_numpy(image)[None], torch.from_numpy(label), torch.from_numpy(np.concatenate(voxels)))


def take_probe(encoder: HybridEncoder, probe: Probe, log: RunLog, step: int, epoch: int) -> None:
    """Probe the encoder as step `step` left it, and write what came out."""
    clock = time.perf_counter()
    dice = probe_encoder(encoder, probe)
    log.write(step, epoch, probe_dice=mean(dice), probe=dice)
    seconds = time.perf_counter() - clock
    LOG.info("epoch %d: probe Dice %.4f after %d steps (%.1f s)", epoch, mean(dice), step + 1, seconds)


@torch.no_grad()
def probe_encoder(encoder: HybridEncoder, probe: Probe) -> dict[str, float]:
    """Dice of each class but the background, by name; the encoder is left as it was.

    Computed on the encoder's device.
    """
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([features_at(maps, crop) for crop, maps in encoded(encoder, probe.fit)])
    labels = torch.cat([crop.label.flatten()[crop.voxels] for crop in probe.fit]).to(features.device)
    shares = counts(torch.cat([crop.label.flatten() for crop in probe.fit]), len(probe.names)).to(features)
    weight, bias = fit_head(features, labels, shares / shares.sum())
    totals = torch.zeros(3, len(probe.names), dtype=torch.long)  # correct, found, true
    for crop, maps in encoded(encoder, probe.score):
        known = crop.label != IGNORED
        found, truth = class_scores(maps, weight, bias).argmax(1)[0].cpu()[known], crop.label[known]
        totals += torch.stack([counts(x, len(probe.names)) for x in (truth[found == truth], found, truth)])
    encoder.train(was_training)
    correct, num_found, num_true = totals
    dice = (2 * correct / (num_found + num_true)).tolist()
    return dict(zip(probe.names[1:], dice[1:], strict=True))


def mean(dice: dict[str, float]) -> float:
    """Over the classes."""
    return math.fsum(dice.values()) / len(dice)


def counts(labels: Tensor, num_classes: int) -> Tensor:
    """Voxels of each class, int64 (num_classes,), without the ignored ones."""
    return torch.bincount(labels[labels != IGNORED].flatten(), minlength=num_classes)


def encoded(encoder: HybridEncoder, crops: Sequence[ProbeCrop]) -> Iterator[tuple[ProbeCrop, list[Tensor]]]:
    """Each crop with its five dense maps, (1, c, *size), finest first.

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
    """Features of the chosen voxels, (n, sum of c): every map is interpolated as `class_scores` does."""
    size = crop.label.shape
    at = torch.stack(torch.unravel_index(crop.voxels, size), dim=-1)
    grid = (2 * at + 1) / torch.tensor(size) - 1  # -1..1 between the outer faces of the crop
    grid = grid.flip(-1)[None, None, None].to(maps[0])  # grid_sample takes the last axis first
    sampled = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) for x in maps]
    return torch.cat(sampled, dim=1)[0, :, 0, 0].T


def fit_head(features: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on features (n, c): weight (classes, c) and bias (classes,) for features as
    they come. shares: of the classes among all voxels, (classes,); the intercepts go half the way to them.
    """
    num_classes = len(shares)
    centre, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - centre) / scale
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    drawn = counts(labels, num_classes) / len(labels)
    return weight, bias - weight @ centre + (shares / drawn).log() / 2


def class_scores(maps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The head at every voxel, (1, classes, *size). It is applied to each map before this is interpolated, which gives
    the same, as both are linear, with less work.
    """
    size = maps[0].shape[2:]
    scores = bias[:, None, None, None]
    for x, w in zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True):
        part = F.conv3d(x, w[:, :, None, None, None])
        scores = scores + F.interpolate(part, size, mode="trilinear", align_corners=False)
    return scores
