"""The settings that decide what a prepared volume is, and what a picture of one."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from hyspark.utils.settings import setting

Axis = Literal["sagittal", "coronal", "axial"]
Scaling = Literal["minmax", "window"]


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The deterministic part of the data path, done once per volume; together with the file it keys the store."""

    spacing: tuple[float, float, float] = setting((1.5, 1.5, 1.5), "data")
    """Voxel spacing in mm to which volumes are resampled, in RAS order."""
    hu_min: float = setting(-175.0, "data")
    """Hounsfield units that become 0; lower values are clipped."""
    hu_max: float = setting(250.0, "data")
    """Hounsfield units that become 1; higher values are clipped."""


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """What decides the pictures of a volume."""

    axis: Axis = "axial"
    """The planes that become pictures."""
    stride: int = 1
    """Every so many-th plane."""
    scaling: Scaling = "minmax"
    """What becomes black and white: the least and the largest value of the picture itself, or hu_min and hu_max."""
    hu_min: float | None = None
    """Hounsfield units that lower values are set to first, e.g. those that some scanners put outside their field."""
    hu_max: float | None = None
    """Hounsfield units that higher values are set to first."""
    size: int = 0
    """Pixels of the short side; 0 keeps the finer of a plane's two spacings."""

    def __post_init__(self) -> None:
        for name, value, choices in (("axis", self.axis, get_args(Axis)), ("scaling", self.scaling, get_args(Scaling))):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.stride < 1 or self.size < 0:
            raise ValueError(f"stride must be at least 1 and size at least 0, got {self.stride} and {self.size}")
        if self.scaling == "window" and None in (self.hu_min, self.hu_max):
            raise ValueError(f"a window needs hu_min and hu_max, got {self.hu_min} and {self.hu_max}")
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"hu_min must lie below hu_max, but they are {self.hu_min} and {self.hu_max}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Hounsfield units that lower and higher ones are set to."""
        return (
            -inf if self.hu_min is None else self.hu_min,
            inf if self.hu_max is None else self.hu_max,
        )
