"""Find under which prefixes a file and a network have the same tensors, and whether enough of them match.

`encoder_q.` in a file of MoCo, `backbone.body.` in a detector: the two prefixes under which most names agree are
chosen. Of copies that agree equally well, such as a student and its teacher, `source_rank` decides.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from hyspark.models.weights.files import strip_wrappers
from hyspark.models.weights.search import AVERAGED, TEACHER

FILE_PREFIXES = (
    "",
    "model.",  # SwAV of Lightning Bolts
    "encoder_q.",  # MoCo
    "online_network.encoder.",  # BYOL
    "encoder.",  # segmentation networks, SimCLR
    "backbone.",
    "encoder.backbone.",  # the pre-training of this project
    "sparse_encoder.sp_cnn.",  # SparK's own
)
"""Usual prefixes of a backbone in a file, preferred to others."""
COUNTER = ".num_batches_tracked"
MAX_PREFIX_DEPTH = 5


class Fit(NamedTuple):
    """How well a file matches a network, the names under a pair of prefixes.

    Attributes:
        names: number of names that agree.
        shapes: number of these whose shapes agree.
        pairs: prefixes in the file and in the network; several if they match equally well.
    """

    names: int
    shapes: int
    pairs: tuple[tuple[str, str], ...]


def find_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Fit:
    """Find the prefixes of the backbone, in the file and in the network.

    They are the pair under which most names agree, and then most shapes.
    """
    shapes = {strip_wrappers(key): value.shape for key, value in given.items()}
    sources = keys_by_prefix(shapes, MAX_PREFIX_DEPTH)
    below = keys_by_prefix(wanted)
    best = (0, 0)
    found: dict[frozenset[tuple[str, int]], tuple[str, str]] = {}
    for source in sorted(sources, key=lambda source: -len(sources[source])):
        rests = sources[source]
        for own, own_rests in below.items():
            if min(len(rests), len(own_rests)) < best[0] or (source not in FILE_PREFIXES and own.endswith(source)):
                continue
            shared = rests & own_rests
            if len(shared) < best[0] or not shared:
                continue
            fits = (len(shared), sum(shapes[source + rest] == wanted[own + rest].shape for rest in shared))
            if fits > best:
                best, found = fits, {}
            if fits == best:
                # One assignment may be written in several ways (encoder.backbone.* is backbone.* of encoder.*), and a
                # module may have two names: what counts is which value is loaded into which tensor.
                meaning = frozenset((source + rest, wanted[own + rest].data_ptr()) for rest in shared)
                found[meaning] = max(found.get(meaning, (source, own)), (source, own), key=lambda pair: len(pair[1]))
    rank = min((source_rank(source) for source, _ in found.values()), default=0)
    return Fit(*best, tuple(pair for pair in found.values() if source_rank(pair[0]) == rank))


def source_rank(source: str) -> int:
    """Rank a prefix in a file among others that match equally well: the lowest is used."""
    if source in FILE_PREFIXES:
        return 0
    return 1 if TEACHER.search(source) else 3 if AVERAGED.search(source) else 2


def keys_by_prefix(keys: Iterable[str], max_depth: int = 99) -> dict[str, set[str]]:
    """Collect the rests of keys below each of their prefixes."""
    below: dict[str, set[str]] = {}
    for key in keys:
        parts = key.split(".")
        for depth in range(min(len(parts), max_depth + 1)):
            below.setdefault("".join(f"{part}." for part in parts[:depth]), set()).add(".".join(parts[depth:]))
    return below
