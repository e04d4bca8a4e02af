"""What an import takes: the settings of the choice."""

import re
from dataclasses import dataclass
from typing import Literal

Rule = Literal["all", "most_slices", "thinnest"]


@dataclass(frozen=True)
class Choice:
    """What is imported.

    Attributes:
        modality: modality; empty takes the only one there is.
        choose: which scans of a study.
        kernel: pattern of ConvolutionKernel; empty takes all.
        series_description: pattern of SeriesDescription; empty takes all.
        min_slices: least number of slices.
        max_thickness: largest thickness of slices in mm; 0 takes all.
    """

    modality: str = ""
    choose: Rule = "all"
    kernel: str = ""
    series_description: str = ""
    min_slices: int = 8
    max_thickness: float = 0.0

    def __post_init__(self) -> None:
        if self.min_slices < 1:
            raise ValueError(f"--min_slices: expected at least 1, got {self.min_slices}")
        if self.max_thickness < 0:
            raise ValueError(f"--max_thickness: expected mm above 0, or 0 for any, got {self.max_thickness:g}")
        for name in ("kernel", "series_description"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"--{name}: expected a regular expression, got {getattr(self, name)!r} ({error})"
                ) from None
