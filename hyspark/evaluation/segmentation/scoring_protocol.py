"""Settings and sources of segmentation scores, which the protocol beside the scores describes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import Case, cases_digest
from hyspark.evaluation.protocol import DATA_DIGEST, TRAINED_ON
from hyspark.evaluation.segmentation.inference import Windows, windows_from_config
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
    """

    overlap: float | None = None
    flips: tuple[int, ...] = ()
    largest_component: bool = False
    tolerance: float = NSD_TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be above 0 mm, but it is {self.tolerance}")

    def windows(self, config: SegmentationConfig, names: Sequence[str]) -> Windows:
        """Return the windows of a network with these settings and classes; raises as `windows_from_config`."""
        overlap = config.infer_overlap if self.overlap is None else self.overlap
        return windows_from_config(config, names, overlap, self.flips)

    def protocol(self, config: SegmentationConfig, names: Sequence[str], precision: str) -> dict[str, Any]:
        """Describe in plain values how cases are scored, network's settings included."""
        windows = self.windows(config, names)
        return {
            "spacing_mm": list(config.spacing),
            "hu_window": [config.hu_min, config.hu_max],
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
        return [case.name for case in cases if content_digest(case.image) in known] if known else []

    def protocol(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Describe the source in plain values, with a digest of the cases' names and files."""
        return {
            "weights": self.weights,
            TRAINED_ON: len(self.trained_on) or "unknown",
            "data": self.data,
            DATA_DIGEST: cases_digest(cases),
            "scored_cases_trained_on": len(self.seen(cases)) if self.trained_on else "unknown",
        }
