"""From a prepared volume to its label maps, within a bounded memory."""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hyspark.config.shared import Precision
from hyspark.data.intensity import LinearMap, to_input
from hyspark.data.readers.nifti import file_grid
from hyspark.evaluation.segmentation.label_grids import Grid, LabelMaps, label_maps, largest_components
from hyspark.evaluation.segmentation.slab_storage import ITEM, SlabStorage
from hyspark.evaluation.segmentation.windows import Windows, class_score_slabs
from hyspark.training.distributed import Processes
from hyspark.training.precision import autocast
from hyspark.training.run_volumes import GB
from hyspark.utils.free_memory import free_main_memory


@dataclass(frozen=True)
class VolumeSegmenter:
    """A network with all that segmenting volumes depends on.

    Attributes:
        network: In evaluation mode, on the device of `processes`.
        num_classes: Number of classes, background included.
        windows: The windows of the network.
        processes: The processes of the run.
        precision: Precision of the forward pass.
        scratch: Folder of the temporary file of class scores, if one is needed.
        largest_component: Whether only the largest component of each class is kept.
        memory: GB of class scores in memory; 0 is half of the free memory.
    """

    network: nn.Module
    num_classes: int
    windows: Windows
    processes: Processes
    precision: Precision
    scratch: Path
    largest_component: bool = False
    memory: float = 0

    def segment(
        self, image: np.ndarray, maps: Sequence[LinearMap | None], affine: np.ndarray, source: Path
    ) -> LabelMaps:
        """Segment a prepared volume.

        Args:
            image: float32 (c, h, w, d), fractions in [0, 1].
            maps: Of each channel, from fractions to the network's input; None where fractions are the input.
            affine: Affine of its grid.
            source: The NIfTI file that it was prepared from.
        """
        with closing(self.slabs(image, maps)) as slabs:
            _, h, w, d = image.shape
            return self.label(slabs, (h, w, d), affine, source)

    def slabs(self, image: np.ndarray, maps: Sequence[LinearMap | None]) -> Generator[tuple[int, Tensor], None, None]:
        """Yield the class scores of a prepared volume as `class_score_slabs` does; arguments are those of `segment`."""
        per_window = ITEM * self.num_classes * math.prod(self.windows.size)
        free = free_main_memory()
        windows = replace(self.windows, per_pass=max(1, min(self.windows.per_pass, free // per_window)))
        budget = (int(self.memory * GB) or free // 2) - windows.per_pass * per_window

        def forward(crops: Tensor) -> Tensor:
            seen = to_input(crops.clone(), maps, axis=1) if any(maps) else crops  # a pass out of memory is repeated
            with autocast(self.processes, self.precision):
                scores: Tensor = self.network(seen)
            return scores

        with SlabStorage(max(0, budget), self.scratch) as storage:
            yield from class_score_slabs(forward, torch.from_numpy(image), windows, self.processes.device, storage)

    def label(
        self, slabs: Iterable[tuple[int, Tensor]], shape: tuple[int, int, int], affine: np.ndarray, source: Path
    ) -> LabelMaps:
        """Compute the label maps of class scores.

        Args:
            slabs: The scores, as `slabs` yields them.
            shape: (h, w, d) of the prepared volume.
            affine: Affine of its grid.
            source: The NIfTI file that it was prepared from.
        """
        maps = label_maps(slabs, Grid(shape, affine), Grid(*file_grid(source)))
        if self.largest_component:
            return LabelMaps(*(largest_components(labels, self.num_classes) for labels in maps))
        return maps
