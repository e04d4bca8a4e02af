"""Settings and sources of segmentation scores, which the protocol beside the scores describes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import Case, cases_digest
from hyspark.data.intensity import reads_window
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.protocol import DATA_DIGEST, TRAINED_ON
from hyspark.evaluation.segmentation.inference import windows_from_config
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.utils.digests import content_digest

NSD_TOLERANCE = 2.0
"""Tolerance of the normalised surface Dice, in mm."""


@dataclass(frozen=True)
class Scoring:
    """Settings of segmenting and scoring cases.

    Attributes:
        overlap: Fraction by which windows overlap; None takes that of the network's settings.
        flips: Axes of the flips to average over (see `Windows`).
        largest_component: Whether only the largest component of each class is kept.
        tolerance: Tolerance of the normalised surface Dice, in mm.
        memory: GB of class scores in memory, beyond which a temporary file holds them; 0 is half of the free memory.
    """

    overlap: float | None = None
    flips: tuple[int, ...] = ()
    largest_component: bool = False
    tolerance: float = NSD_TOLERANCE
    memory: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be above 0 mm, but it is {self.tolerance}")
        if not 0 <= self.memory < np.inf:
            raise ValueError(f"memory: expected 0 GB or more, got {self.memory}")

    def windows(self, config: SegmentationConfig, names: Sequence[str]) -> Windows:
        """Return the windows of a network with these settings and classes; raises as `windows_from_config`."""
        overlap = config.infer_overlap if self.overlap is None else self.overlap
        return windows_from_config(config, names, overlap, self.flips)

    def protocol(self, config: SegmentationConfig, names: Sequence[str], precision: str) -> dict[str, Any]:
        """Describe in plain values how cases are scored, network's settings included."""
        windows = self.windows(config, names)
        return {
            "spacing_mm": list(config.spacing),
            **intensity_protocol(config),
            "window_size": list(windows.size),
            "overlap": windows.overlap,
            "blending": "Gaussian",
            "flips": list(windows.flips) or "none",
            "post_processing": "largest component of each class" if self.largest_component else "none",
            "precision": precision,
            "scored_on": "the label's own grid",
            "resampling": "class scores linearly, then the likeliest class",
            "nsd_tolerance_mm": self.tolerance,
        }


def intensity_protocol(config: SegmentationConfig) -> dict[str, Any]:
    """Describe intensities and channels in plain values; of one channel of CT, the window alone."""
    found: dict[str, Any] = {"hu_window": [config.hu_min, config.hu_max]} if reads_window(config) else {}
    for name in ("intensity", "image_channels", "input_mean", "input_std"):
        value = getattr(config, name)
        if value != getattr(PrepareSettings, name):
            found[name] = list(value)
    return found


def digest_or_none(file: Path) -> str | None:
    """Return the `content_digest` of a file; None of an unreadable one, which fails when it is scored."""
    try:
        return content_digest(file)
    except OSError:
        return None


@dataclass(frozen=True)
class Source:
    """Weights and data that scores are of.

    Attributes:
        weights: The weights, in words.
        data: The cases, in words.
        trained_on: Digests (`content_digest`) of the images that the weights were trained on; empty if unknown.
    """

    weights: str
    data: str
    trained_on: Sequence[str]

    def seen(self, cases: Sequence[Case]) -> list[str]:
        """Return the names of the cases that are known to have been trained on."""
        known = set(self.trained_on)
        return [case.name for case in cases if digest_or_none(case.image) in known] if known else []

    def protocol(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Describe the source in plain values, with a digest of the cases' names and files."""
        return {
            "weights": self.weights,
            TRAINED_ON: len(self.trained_on) or "unknown",
            "data": self.data,
            DATA_DIGEST: cases_digest(cases),
            "scored_cases_trained_on": len(self.seen(cases)) if self.trained_on else "unknown",
        }
