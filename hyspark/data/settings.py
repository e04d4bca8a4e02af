"""The settings of a prepared volume and of the 2D slices of a volume."""

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
    """Hounsfield units that become 0; lower values are clipped. Read by intensities of CT."""
    hu_max: float = setting(250.0, "data")
    """Hounsfield units that become 1; higher values are clipped. Read by intensities of CT."""
    intensity: tuple[str, ...] = setting(("ct",), "data")
    """Values that a network sees, one name for all channels or one per channel. ct: hu_min to hu_max become 0 to 1.
    ct-zscore: the same window, less input_mean, divided by input_std. mr: z-scores by the foreground of each volume.
    zscore: z-scores by all voxels of each volume, its border of zeros excluded. none: the values of the files.
    """
    image_channels: tuple[int, ...] = setting((0,), "data")
    """Channels of the images that are read, numbered as in nnU-Net: 0 1 reads CASE_0000 and CASE_0001."""
    input_mean: tuple[float, ...] = setting((), "data")
    """ct-zscore: Hounsfield units that become 0, one number or one per channel."""
    input_std: tuple[float, ...] = setting((), "data")
    """ct-zscore: Hounsfield units that become a step of 1, one number or one per channel."""

    @property
    def num_image_channels(self) -> int:
        """Number of channels of a volume."""
        return len(self.image_channels)


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Orientation, grey values and size of the slices that are written as images."""

    axis: Axis = "axial"
    """Orientation of the slices."""
    stride: int = 1
    """Distance between slices, in voxels; 1 takes every slice."""
    scaling: Scaling = "minmax"
    """Values that become black and white: the least and the largest of the slice itself, or hu_min and hu_max."""
    hu_min: float | None = None
    """Hounsfield units that lower values are set to first, e.g. those that some scanners put outside their field."""
    hu_max: float | None = None
    """Hounsfield units that higher values are set to first."""
    size: int = 0
    """Pixels of the short side; 0 keeps the finer of a slice's two spacings."""

    def __post_init__(self) -> None:
        for name, value, choices in (("axis", self.axis, get_args(Axis)), ("scaling", self.scaling, get_args(Scaling))):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if self.stride < 1 or self.size < 0:
            raise ValueError(f"stride and size: expected at least 1 and at least 0, got {self.stride} and {self.size}")
        if self.scaling == "window" and None in (self.hu_min, self.hu_max):
            raise ValueError(
                f"scaling window: expected hu_min and hu_max, got {self.hu_min} and {self.hu_max}; give both"
            )
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"hu_min and hu_max: expected hu_min below hu_max, got {self.hu_min} and {self.hu_max}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Hounsfield units that lower and higher values are set to."""
        return (
            -inf if self.hu_min is None else self.hu_min,
            inf if self.hu_max is None else self.hu_max,
        )
