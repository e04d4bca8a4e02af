"""Class scores and label maps in one piece, put together from their slabs."""

import tempfile
from pathlib import Path

import torch

from hyspark.evaluation.segmentation.label_grids import Grid, label_maps
from hyspark.evaluation.segmentation.slab_storage import SlabStorage
from hyspark.evaluation.segmentation.windows import class_score_slabs

CPU = torch.device("cpu")


def whole_scores(model, image, windows, device=CPU, budget=10**12):
    """Class scores (n, h, w, d), with a number of bytes of slabs in memory."""
    with tempfile.TemporaryDirectory() as folder, SlabStorage(budget, Path(folder)) as storage:
        slabs = list(class_score_slabs(model, image[None], windows, device, storage))
        assert storage.used == 0
        assert not list(Path(folder).iterdir())
    starts = [start for start, _ in slabs]
    assert starts == [sum(slab.shape[1] for _, slab in slabs[:i]) for i in range(len(slabs))]
    return torch.cat([slab for _, slab in slabs], dim=1)


def to_grid(scores, affine, shape, reference, rows=3):
    """Label map of class scores on a reference grid, from slabs of a number of rows."""
    slabs = ((at, scores[:, at : at + rows]) for at in range(0, scores.shape[1], rows))
    return label_maps(slabs, Grid(scores.shape[1:], affine), Grid(shape, reference)).on_file
