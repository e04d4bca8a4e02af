"""The settings that decide what a prepared volume is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The deterministic part of the data path, done once per volume; together with the file it keys the store."""

    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    """Voxel spacing in mm that volumes are resampled to, in RAS order."""
    hu_min: float = -175.0
    """Hounsfield units that become 0; lower values are clipped."""
    hu_max: float = 250.0
    """Hounsfield units that become 1; higher values are clipped."""
