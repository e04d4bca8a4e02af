"""Find under which prefixes a file and a network have the same tensors, and whether enough of them match.

`encoder_q.` in a file of MoCo, `backbone.body.` in a detector: the two prefixes under which most names agree are
chosen. Of copies that agree equally well, such as a student and its teacher, `source_rank` decides.
"""

import re
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
LIKELY_REASONS = {
    r"(^|\.)(embedder\.embedder\.|encoder\.(stages|layer)\.\d+\.(layers|attention)\.|embeddings\.patch_embeddings\.)": (
        "they are those of Hugging Face transformers; use a file of timm or torchvision"
    ),
    r"(^|\.)(stem\.conv1\.norm\.|res[2-5]\.\d+\.(shortcut|conv1)\.norm\.)": (
        "they are those of detectron2, whose ResNets may stride elsewhere; use the file from which it was converted"
    ),
    r"(^|\.)(res\d+_\d+_branch|conv1_w$)": "they are those of Caffe2; use a file of timm or torchvision",
    r"(kernel|scale)$": "they are those of JAX or Keras, whose axes differ; use a file of PyTorch",
    r"(qweight|qzeros|_packed_params|\.scale_weight|\.SCB)$": "they are quantised; use the weights before quantisation",
    r"(lora_[AB]\.|\.adapter)": "they are an adapter (LoRA) of a network; merge it into the network first",
}
"""Reasons why names do not match, by a pattern of names."""


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


def no_match_error(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> ValueError:
    """Create the error for a state dict without a key of the model."""
    return ValueError(
        f"{name}: none of its {len(given)} keys is one of the model's (its first is {next(iter(given))!r}, "
        f"the model's {next(iter(wanted))!r}); {likely_reason(given, wanted)}"
    )


def few_match_error(num: int, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> ValueError:
    """Create the error for a state dict of which few keys are the model's, which may be by chance."""
    return ValueError(
        f"{name}: {num} of the network's {len(wanted)} tensors match by name, and the file has {len(given)} (its first "
        f"is {next(iter(given))!r}, the model's {next(iter(wanted))!r}); expected half of them; "
        f"{likely_reason(given, wanted)}"
    )


def likely_reason(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Find the likeliest reason why the names of a file do not match a network's."""
    for pattern, reason in LIKELY_REASONS.items():
        if sum(bool(re.search(pattern, key)) for key in given) >= 0.05 * len(given):
            return f"its names are not the model's: {reason}"
    rest = [tuple(value.shape) for value in wanted.values()]
    same = 0
    for value in given.values():
        if tuple(value.shape) in rest:
            rest.remove(tuple(value.shape))
            same += 1
    if same >= 0.8 * len(wanted):
        return f"{same} tensors have the shapes of the model's: it may be this network by names of another library"
    return "is it from another network?"
