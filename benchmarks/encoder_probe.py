"""Linear probe of several encoders on held-out cases, with intervals: the quality columns of docs/results/decoder.md.

    python benchmarks/encoder_probe.py --data data/Dataset501_OpenKBP --store ckpt/probe_store \
        --weights paper=ckpt/a/hyspark_1kpretrained_timm_style.pth cheap=ckpt/b/hyspark_1kpretrained_timm_style.pth

The head is fitted on crops of labelled training cases, and scored on crops of all validation cases. "deep" takes the
maps of strides 8 and 16 alone, which random weights do not make useful.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tap import Tap
from torch import Tensor

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.datasets.build import read_folder
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.evaluation.linear_probe import ProbeCrop, empty_label_fault, features_at, labelled_box, probe_crop
from hyspark.evaluation.probe_head import count_voxels_by_class, fit_head, probe_scores
from hyspark.models.encoder import HybridEncoder
from hyspark.models.weights.load import load_pretrained
from hyspark.training.distributed import Processes
from hyspark.training.run_volumes import prepare_readable

MAPS = {"deep": (3, 4), "all": (0, 1, 2, 3, 4)}
"""Maps of the encoder, finest first, that the head sees."""
FIT_CROPS, SCORE_CROPS = 3, 5
"""Crops of a case."""
Encoded = list[tuple[ProbeCrop, list[Tensor]]]


class Arguments(Tap):
    """Probe encoders, and compare each with the first."""

    data: str  # nnU-Net data set folder with labels
    weights: list[str]  # NAME=FILE of each encoder; NAME alone for random weights
    store: str  # Folder of the prepared volumes
    widths: tuple[int, ...] = (8, 16, 32, 64, 96)  # Channels of the encoders' stages
    spacing: tuple[float, float, float] = (4.0, 4.0, 3.0)  # mm
    edge: int = 48  # Voxels per axis of a crop
    num_fit: int = 24  # Labelled training cases


def cut_crops(volumes: Sequence[StoredVolume], edge: int, number: int) -> list[list[ProbeCrop]]:
    """Cut crops around organs, in turn; those of a case together."""
    boxes = [[labelled_box(v, (edge,) * 3, i, n) for n in range(number)] for i, v in enumerate(volumes)]
    return [[probe_crop(image, label.astype(np.int64)) for image, label in own] for own in boxes]


def encode(encoder: HybridEncoder, cases: Sequence[Sequence[ProbeCrop]]) -> Encoded:
    """Compute the dense maps of all crops."""
    found = []
    for crops in cases:
        maps = encoder(torch.stack([crop.image for crop in crops]))
        found += [(crop, [x[n : n + 1] for x in maps]) for n, crop in enumerate(crops)]
    return found


def choose(crops: Encoded, maps: Sequence[int]) -> Encoded:
    """Select maps; a finest map of zeros gives the size of the scores."""
    return [(crop, [x[0][:, :1] * 0, *(x[index] for index in maps)]) for crop, x in crops]


def score(fit: Encoded, held_out: Encoded, num_classes: int) -> np.ndarray:
    """Fit a head, and compute the mean Dice of the organs of each held-out case."""
    features = torch.cat([features_at(maps, crop) for crop, maps in fit])
    labels = torch.cat([crop.label.flatten()[crop.voxels] for crop, _ in fit])
    counts = count_voxels_by_class(torch.cat([crop.label.flatten() for crop, _ in fit]), num_classes)
    weight, bias = fit_head(features, labels, counts / counts.sum())
    dice = []
    for first in range(0, len(held_out), SCORE_CROPS):
        totals = torch.zeros(3, num_classes)  # correct, found, true
        for crop, maps in held_out[first : first + SCORE_CROPS]:
            found = probe_scores(maps, weight, bias).argmax(1)[0]
            parts = (crop.label[found == crop.label], found, crop.label)
            totals += torch.stack([count_voxels_by_class(x, num_classes) for x in parts])
        dice.append((2 * totals[0] / (totals[1] + totals[2]))[1:].nanmean().item())
    return np.array(dice)


def difference(dice: np.ndarray, reference: np.ndarray) -> str:
    """Format the mean difference with its 95 % bootstrap interval over cases."""
    rng = np.random.default_rng(0)
    apart = dice - reference
    means = apart[rng.integers(0, len(apart), (4000, len(apart)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{apart.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


@torch.no_grad()
def main(args: Arguments) -> None:
    """Print the Dice of each encoder, and its difference to the first one."""
    options = {"data": args.data, "out": args.store, "store_dir": args.store, "spacing": args.spacing, "device": "cpu"}
    config = PretrainConfig(crop_size=(args.edge,), encoder_widths=args.widths, **options)
    listed = read_folder(Path(args.data), seed=0, val_fraction=0.2)
    training, held_out = (sorted(cases, key=lambda case: case.name) for cases in (listed.training, listed.validation))
    chosen = [training[i * len(training) // args.num_fit] for i in range(args.num_fit)]
    processes = Processes(torch.device("cpu"), 0, 0, 1)
    fit, scored = (
        cut_crops(prepare_readable(config, processes, Path(args.data), cases, empty_label_fault).volumes, args.edge, n)
        for cases, n in ((chosen, FIT_CROPS), (held_out, SCORE_CROPS))
    )
    reference: dict[str, np.ndarray] = {}
    for arm in args.weights:
        name, _, path = arm.partition("=")
        torch.manual_seed(0)
        encoder = HybridEncoder(config.in_channels, config.crop_shape, args.widths).eval()
        if path:
            load_pretrained(encoder, path)
        fitting, scoring = encode(encoder, fit), encode(encoder, scored)
        for kind, maps in MAPS.items():
            dice = score(choose(fitting, maps), choose(scoring, maps), 1 + max((listed.labels or {}).values()))
            print(f"{name:16s} {kind:5s} {dice.mean():.3f}  {difference(dice, reference.setdefault(kind, dice))}")


if __name__ == "__main__":
    main(Arguments().parse_args())
