"""Class scores by sliding window, a slab at a time: what MONAI's sliding_window_inference gives, in less memory.

MONAI holds the scores of the whole volume, which for a hundred classes are many gigabytes. Here a slab is passed on as
soon as no further window touches it. Windows, their order, their batches and the arithmetic are MONAI's, so that every
score is the same to the bit, however little memory there is.

Shapes: n classes, background included; c channels; (h, w, d) voxels of the prepared grid, in RAS. Slabs lie across axis
0. Voxels beyond the volume are 0, its lowest value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

from hyspark.evaluation.segmentation.slab_storage import ITEM, Slab, SlabStorage
from hyspark.training.memory import release_cached_memory
from hyspark.utils.free_memory import is_out_of_memory

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """How class scores are assembled from windows.

    Attributes:
        size: Voxels per axis.
        overlap: Fraction of a window that its neighbour covers.
        per_pass: Windows in one forward pass.
        flips: Axes (0 left-right, 1 back-front, 2 foot-head). Scores are averaged over all combinations of their flips.
        swaps: Pairs of classes that a flip of axis 0 swaps.
    """

    size: tuple[int, ...]
    overlap: float = 0.5
    per_pass: int = 4
    flips: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()


def class_score_slabs(
    model: Model, image: Tensor, windows: Windows, device: torch.device, storage: SlabStorage
) -> Iterator[tuple[int, Tensor]]:
    """Compute the class scores of a prepared volume from windows that are blended with Gaussian weights.

    Only windows are ever on the device: the scores of a large volume need many times its memory.

    Args:
        model: In evaluation mode, on `device`.
        image: (c, h, w, d), fractions in [0, 1], on the CPU.
        windows: How to assemble the scores.
        device: Device of the forward passes.
        storage: Room for unfinished slabs.

    Yields:
        First index of a slab on axis 0, and its scores, float32 (n, rows, w, d), on the CPU. Slabs come in order, and
        cover the volume once.

    Raises:
        ValueError: Scores are not finite.
        OSError: The storage's disk is full.
    """
    subsets = [axes for num in range(len(windows.flips) + 1) for axes in combinations(windows.flips, num)]
    if len(subsets) == 1:
        yield from blended_slabs(model, image, windows, device, storage)
        return
    totals: list[tuple[int, Slab]] = []
    for axes in subsets:
        flipped = image.flip([1 + axis for axis in axes])
        for start, scores in blended_slabs(model, flipped, windows, device, storage):
            back = scores.flip([1 + axis for axis in axes]) if axes else scores
            first = image.shape[1] - start - back.shape[1] if 0 in axes else start
            back = back[swap_classes(len(back), windows.swaps)] if 0 in axes else back
            totals = totals or empty_slabs(storage, [len(back), *image.shape[1:]])
            for at, slab in totals:
                low, high = max(at, first), min(at + slab.shape[1], first + back.shape[1])
                if low < high:
                    slab.open()[:, low - at : high - at].add_(back[:, low - first : high - first])
    for at, slab in totals:
        yield at, finished(slab, len(subsets))


def swap_classes(num_classes: int, swaps: Sequence[tuple[int, int]]) -> list[int]:
    """List the class numbers in order, those of each pair swapped."""
    order = list(range(num_classes))
    for a, b in swaps:
        order[a], order[b] = b, a
    return order


def rows_per_slab(storage: SlabStorage, shape: Sequence[int]) -> int:
    """Compute the rows of a slab of scores (n, h, w, d) that the storage suggests, one at least."""
    num, _, w, d = shape
    return max(1, storage.largest // (ITEM * num * w * d))


def empty_slabs(storage: SlabStorage, shape: Sequence[int]) -> list[tuple[int, Slab]]:
    """Cover scores (n, h, w, d) with slabs of zeros; returns each with its first index on axis 0."""
    num, h, w, d = shape
    rows = rows_per_slab(storage, shape)
    return [(at, storage.zeros((num, min(rows, h - at), w, d))) for at in range(0, h, rows)]


def finished(slab: Slab, divisor: Tensor | int) -> Tensor:
    """Divide a slab, and release it; returns a tensor in memory."""
    scores = slab.open()
    scores = scores.div(divisor) if slab.in_memory is None else scores.div_(divisor)
    slab.release()
    return scores


@dataclass
class OpenSlab:
    """Rows of a blended volume that windows still touch.

    Attributes:
        start: First index on axis 0.
        stop: One past the last.
        scores: Sum of weighted scores, (n, rows, w, d); None before the first window.
        weights: Sum of weights, (rows, w, d).
    """

    start: int
    stop: int
    scores: Slab | None
    weights: Tensor


def blended_slabs(
    model: Model, image: Tensor, windows: Windows, device: torch.device, storage: SlabStorage
) -> Iterator[tuple[int, Tensor]]:
    """Compute class scores without flips; arguments and results are those of `class_score_slabs`."""
    size = windows.size
    lacking = [max(0, edge - length) for edge, length in zip(size, image.shape[1:], strict=True)]
    before = [missing // 2 for missing in lacking]
    padding = [n for b, missing in zip(before, lacking, strict=True) for n in (missing - b, b)][::-1]
    padded = F.pad(image[None], padding)
    shape = padded.shape[2:]
    inner = [slice(b, b + length) for b, length in zip(before, image.shape[1:], strict=True)]
    steps = [e if e == n else max(1, int(e * (1 - windows.overlap))) for e, n in zip(size, shape, strict=True)]
    boxes = dense_patch_slices(shape, size, steps)
    weight = compute_importance_map(size, mode="gaussian", device=device)
    weight_here = weight.to("cpu")
    pending: list[OpenSlab] = []
    for first in range(0, len(boxes), windows.per_pass):
        crops = torch.cat([padded[:, :, box[0], box[1], box[2]] for box in boxes[first : first + windows.per_pass]])
        todo = iter(boxes[first : first + windows.per_pass])
        for scores in passes(model, crops, device):
            weighted = scores.mul_(weight).to("cpu")
            pending = pending or open_slabs(storage, [weighted.shape[1], *shape], boxes)
            for part in weighted:
                add_window(pending, part, weight_here, next(todo), storage)
        remaining = boxes[first + windows.per_pass :]
        while pending and (not remaining or pending[0].stop <= remaining[0][0].start):
            slab = pending.pop(0)
            assert slab.scores is not None
            scores = finished(slab.scores, slab.weights)[:, :, inner[1], inner[2]]
            check_scores(scores)
            low, high = max(slab.start, inner[0].start), min(slab.stop, inner[0].stop)
            if low < high:
                yield low - inner[0].start, scores[:, low - slab.start : high - slab.start]


def check_scores(scores: Tensor) -> None:
    """Check that the network computes numbers.

    Raises:
        ValueError: It does not.
    """
    if not torch.stack(scores.aminmax()).isfinite().all():
        raise ValueError("the network's class scores hold NaN or infinity; check its weights and precision")


def passes(model: Model, crops: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Compute the scores of crops in one forward pass, or in several of fewer crops where memory does not suffice.

    Args:
        model: In evaluation mode, on `device`.
        crops: (m, c, *size), on the CPU.
        device: Device of the forward passes.

    Yields:
        Scores of the next crops, float32 (k, n, *size), on the device.
    """
    scores = None
    try:
        with torch.no_grad():
            scores = model(crops.to(device)).float()
    except Exception as error:
        if len(crops) == 1 or not is_out_of_memory(error):
            raise
    if scores is None:
        release_cached_memory(device)
        for half in crops.split(-(-len(crops) // 2)):
            yield from passes(model, half, device)
        return
    yield scores


def open_slabs(storage: SlabStorage, shape: Sequence[int], boxes: Sequence[tuple[slice, ...]]) -> list[OpenSlab]:
    """Divide axis 0 where windows begin or end, and further where slabs would be large.

    Args:
        storage: Room for unfinished slabs.
        shape: Of the scores, (n, h, w, d).
        boxes: The windows.
    """
    rows = rows_per_slab(storage, shape)
    ends = sorted({edge for box in boxes for edge in (box[0].start, box[0].stop)})
    spans = [(at, min(at + rows, stop)) for start, stop in pairwise(ends) for at in range(start, stop, rows)]
    return [OpenSlab(start, stop, None, torch.zeros(stop - start, *shape[2:])) for start, stop in spans]


def add_window(
    pending: Sequence[OpenSlab], scores: Tensor, weight: Tensor, box: tuple[slice, ...], storage: SlabStorage
) -> None:
    """Add the weighted scores (n, *size) of a window to the slabs that it touches."""
    along, *across = box
    for slab in pending:
        if slab.start >= along.stop:
            break
        if slab.stop > along.start:
            rows = slice(slab.start - along.start, slab.stop - along.start)
            if slab.scores is None:
                slab.scores = storage.zeros((len(scores), *slab.weights.shape))
            slab.scores.open()[:, :, across[0], across[1]].add_(scores[:, rows])
            slab.weights[:, across[0], across[1]].add_(weight[rows])
