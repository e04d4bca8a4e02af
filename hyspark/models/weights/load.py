"""Load weights and report what matched, what was adapted, what is missing, what was ignored, and why.

Supports the released encoder file (a plain state dict), this project's pre-training and fine-tuning checkpoints, state
dicts in memory, and key prefixes of DistributedDataParallel and torch.compile. The rules for third-party networks are
in third_party.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.models.encoder import NUM_STAGES, HybridEncoder
from hyspark.models.segmentation import Hybird
from hyspark.models.vit import TokenTransformer
from hyspark.models.weights.adapt import adapt_channels
from hyspark.models.weights.files import made_with, read_contents, strip_wrappers
from hyspark.models.weights.mismatch import OWN_ALONE, no_match_error
from hyspark.models.weights.nnunet_settings import check_no_plans, settings_beside_model, split_decoder
from hyspark.models.weights.prefixes import find_fit
from hyspark.models.weights.search import choose_state_dict
from hyspark.models.weights.third_party import (
    SPARK_SETTINGS,
    WeightMatch,
    best_names,
    find_decoder_width,
    match_third_party,
)
from hyspark.models.weights.values import check_loaded

MASK_TOKEN = "mae.mask_token"
ENCODER = ("embeddings.", "mae.")
RELEASED_DECODER = ("decoder.decoder", "decoder.out.conv.")
HOLDERS = ("model.", "net.", "network.")
"""Prefixes of a network that is an attribute of a training program's module."""
LIGHT_DECODER = ("densify.", "decoder.levels.", "decoder.fuse.", "decoder.out.")


@dataclass(frozen=True)
class LoadReport:
    """Report of the fate of each key; prints as a few readable lines.

    Attributes:
        matched: keys loaded unchanged.
        adapted: how a value was changed, by key.
        missing: the model's keys that keep their random initialisation.
        unexpected: why a key of the file was ignored, by key.
        coverage: fraction of the model's parameters that were loaded or adapted, 0..1.
        made_with: settings of the run that made the weights, as far as the file has them.
        source: key of the state dict in the file; empty if the file is one.
        alternatives: keys of further state dicts in the file that match equally well.
        num_tensors: number of the model's tensors, those of several names counted once.
        num_missing: number of these that keep their random initialisation.
    """

    matched: tuple[str, ...]
    adapted: dict[str, str]
    missing: tuple[str, ...]
    unexpected: dict[str, str]
    coverage: float
    made_with: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    alternatives: tuple[str, ...] = ()
    num_tensors: int = 0
    num_missing: int = 0

    def __str__(self) -> str:
        total = self.num_tensors
        lines = [
            f"matched    {len(self.matched):4d} {'key' if len(self.matched) == 1 else 'keys'}, covering "
            f"{self.coverage:.1%} of the model's parameters"
            + f" ({(total - self.num_missing) / max(1, total):.0%} of its {total} tensors)",
            f"adapted    {len(self.adapted):4d}" + join_reasons(self.adapted),
            f"missing    {len(self.missing):4d}"
            + (f" (randomly initialised: {count_by_module(self.missing)})" if self.missing else ""),
            f"unexpected {len(self.unexpected):4d}" + join_reasons(self.unexpected),
        ]
        if self.alternatives:
            lines.append(f"source     {self.source}; --weights_key chooses another ({', '.join(self.alternatives)})")
        return "\n".join(lines)


def join_reasons(reasons: Mapping[str, str]) -> str:
    """Join keys by their reason, naming at most three of each."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(key)
    parts = [
        f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}: {reason}"
        for reason, keys in by_reason.items()
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def count_by_module(keys: tuple[str, ...]) -> str:
    """Count keys by the first part of their names, e.g. 'decoder.* 98'."""
    counts: dict[str, int] = {}
    for key in keys:
        head = key.split(".")[0]
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head}.* {num}" for head, num in counts.items())


def model_key(key: str, wanted: Mapping[str, Tensor]) -> str:
    """Convert a source key to the model's: without wrappers and holders, and with `encoder.` if the model has it."""
    key = strip_holder(key)
    for candidate in (key, key.removeprefix("encoder."), f"encoder.{key}"):
        if candidate in wanted:
            return candidate
    return key


def strip_holder(key: str) -> str:
    """Remove wrappers from a key, and the name by which a training program's module holds the network."""
    key = strip_wrappers(key)
    return strip_wrappers(key.removeprefix(next((p for p in HOLDERS if key.startswith(p)), "")))


def load_pretrained(model: nn.Module, source: str | Path | Mapping[str, Any] | list[Any], key: str = "") -> LoadReport:
    """Load weights into a network and report the fate of each key.

    In a network of this package (pre-training, encoder or segmentation):

    - Positions are recomputed for another crop size.
    - The stem is adapted to another number of input channels.
    - A segmentation head for another number of classes stays randomly initialised.
    - So do the last level of a light decoder from pre-training, and levels that are wider in the network.

    Any other network takes published files of self-supervision (SparK, MoCo, DINO, MAE, ...), this project's, and those
    of its own library.

    Args:
        model: the network; it is unchanged if an error is raised.
        source: path of a file, or of a folder as on the Hugging Face Hub, or an address there, hf://OWNER/NAME[@REVISION];
            or a state dict, or what torch.load returns.
        key: key of the state dict in the file, joined by dots, prefixes of names included; by default the one that
            matches best.

    Returns:
        The report, to be printed.

    Raises:
        FileNotFoundError: there is no such file or repository.
        OSError: the download failed.
        ValueError: nothing matches; a key is unexplained; shapes differ; part of the encoder is missing; a value is not
            finite; the file was made with another number of attention heads, which no shape shows.
    """
    name = str(source) if isinstance(source, str | Path) else "the state dict"
    own = is_own_network(model)
    settings = () if own else SPARK_SETTINGS
    contents = read_contents(source) if isinstance(source, str | Path) else source
    check_no_plans(contents, name)
    score = partial(count_own if own else count_third_party, model)
    chosen, alternatives = choose_state_dict(contents, name, score, settings=settings, key=key)
    given, aside = split_decoder(contents, chosen.tensors)
    settings_of_file = made_with(contents) or settings_beside_model(Path(name))
    check_num_heads(model, settings_of_file, name)
    found = match_own(model, given, name) if own else match_third_party(model, given, name)
    check_loaded(found.loaded, model.state_dict(), name)
    state = model.state_dict()  # its own, for the versions that some networks keep beside the values
    state.update(found.loaded)
    model.load_state_dict(state)
    numbers = {key: p.numel() for key, p in model.named_parameters()}
    addresses = {key: (value.data_ptr() if value.numel() else key) for key, value in model.state_dict().items()}
    coverage = 1 - sum(n for key, n in numbers.items() if key in found.missing) / sum(numbers.values())
    return LoadReport(
        found.matched,
        found.adapted,
        found.missing,
        found.unexpected | aside,
        coverage,
        settings_of_file,
        chosen.key,
        alternatives,
        len(set(addresses.values())),
        len({addresses[key] for key in found.missing}),
    )


def count_own(model: nn.Module, given: Mapping[str, Tensor]) -> int:
    """Count the tensors of a state dict that a network of this package has."""
    wanted = model.state_dict()
    return sum(model_key(key, wanted) in wanted for key in given)


def count_third_party(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count the names and shapes of a state dict that a third-party network has."""
    return find_fit(best_names(given, model).tensors, model.state_dict())[:2]


def is_own_network(model: nn.Module) -> bool:
    """Whether a network is one of this package, with its own encoder."""
    encoder = getattr(model, "encoder", model)
    return isinstance(encoder, HybridEncoder) or isinstance(model, Hybird)


def check_num_heads(model: nn.Module, settings: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if weights were made with another number of attention heads than the model's."""
    given = settings.get("num_heads")
    found = {part.num_heads for part in model.modules() if isinstance(part, TokenTransformer)}
    if found and given is not None and found != {given}:
        own = max(found - {given})
        raise ValueError(
            f"{name}: expected {own} attention heads, as in the model, got {given}; the shapes are the same, but the "
            f"outputs would differ. Build the model like the weights (--num_heads {given})"
        )


def match_own(model: nn.Module, given: Mapping[str, Tensor], name: str) -> WeightMatch:
    """Match a state dict to a network of this package; raise as `load_pretrained`."""
    wanted = model.state_dict()
    is_segmentation = any(strip_wrappers(key).startswith("decoder.fuse.") for key in given)
    fresh = model.reinitialised if isinstance(model, Hybird) and not is_segmentation else ()
    if not any(model_key(key, wanted) in wanted for key in given):
        raise no_match_error(given, wanted, name, OWN_ALONE)
    matched, adapted, unexpected, loaded = [], {}, {}, {}
    for key, value in given.items():
        own = model_key(key, wanted)
        if own not in wanted:
            unexpected[key] = reason_unexpected(own, name, build_advice(given))
        elif own.startswith(fresh):
            unexpected[key] = "reconstructs grey values; classes are learned sooner from random initialisation"
        elif own in loaded:
            raise ValueError(f"{name}: two keys match {own}; it mixes more than one network")
        elif own.endswith("mae.pos_embed") and not same_positions(value, wanted[own]):
            loaded[own] = wanted[own]
            adapted[own] = f"positions recomputed for {wanted[own].shape[1]} tokens, was {value.shape[1]}"
        elif value.shape == wanted[own].shape:
            loaded[own] = value
            matched.append(own)
        elif own.endswith("embeddings.stem.weight") and value.shape[2:] == wanted[own].shape[2:]:
            loaded[own] = adapt_channels(value, wanted[own].shape[1])
            adapted[own] = f"{value.shape[1]} -> {wanted[own].shape[1]} input channels"
        elif own.startswith("decoder.out."):
            head = "head of pre-training" if len(value) == 1 else f"head for {len(value)} classes"
            unexpected[key] = f"{head}, the model has {len(wanted[own])}"
        else:
            raise ValueError(
                f"{name}: {key}: the model expects shape {tuple(wanted[own].shape)}, got {tuple(value.shape)}; "
                f"{build_advice(given)}"
            )
    if not matched:
        raise no_match_error(given, wanted, name)
    missing = tuple(key for key in wanted if key not in loaded)
    check_encoder_complete(missing, name, build_advice(given))
    return WeightMatch(loaded, tuple(matched), adapted, missing, unexpected)


def encoder_shape(weights: Mapping[str, Tensor]) -> dict[str, int | list[int]]:
    """Find the settings of the encoder in the shapes of its weights, by name; empty if the weights hold no whole one.

    The number of attention heads is in no shape.
    """
    layers: dict[tuple[int, int], dict[str, int]] = {}
    blocks = set()
    for key, value in weights.items():
        if (found := re.search(r"\bembeddings\.layer(\d)\.(\d+)\.(conv[13])\.weight$", key)) and value.ndim > 1:
            width = value.shape[0 if found[3] == "conv1" else 1]  # of the block, and of its expansion
            layers.setdefault((int(found[1]), int(found[2])), {})[found[3]] = width
        elif found := re.search(r"\bmae\.blocks\.(\d+)\.", key):
            blocks.add(found[1])
    first = [layers.get((stage, 0), {}) for stage in range(1, NUM_STAGES + 1)]
    if not blocks or any(len(sizes) != 2 for sizes in first):
        return {}
    return {
        "encoder_widths": [sizes["conv1"] for sizes in first],
        "encoder_depths": [sum(s == stage for s, _ in layers) for stage in range(1, NUM_STAGES + 1)],
        "expansions": [sizes["conv3"] // sizes["conv1"] for sizes in first],
        "vit_depth": len(blocks),
    }


def build_advice(weights: Mapping[str, Tensor]) -> str:
    """Describe how to build a model for these weights, with the flags for their shapes."""
    shape = encoder_shape(weights)
    numbers = {name: value if isinstance(value, list) else [value] for name, value in shape.items()}
    if not numbers:
        return "build the model like the weights (--encoder_widths, --encoder_depths, --expansions, --vit_depth)"
    if (deepest := find_decoder_width(weights)) is not None:
        numbers["decoder_width"] = [deepest]
        levels = [len(value) for key, value in weights.items() if re.search(r"\bdecoder\.levels\.\d\.up\.weight$", key)]
        if levels and min(levels) > deepest >> len(levels) - 1:
            numbers["decoder_min_width"] = [min(levels)]
    flags = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in numbers.items())
    return f"build the model like the weights: {flags}"


def same_positions(value: Tensor, own: Tensor) -> bool:
    """Whether stored positions equal those of the model's grid, up to 16-bit rounding.

    The shape does not decide: another grid may have as many tokens.
    """
    return value.shape == own.shape and torch.allclose(value.to(own), own, atol=1e-2)


def reason_unexpected(key: str, name: str, advice: str) -> str:
    """Find the reason to ignore a key that the model does not have; raise ValueError if there is none."""
    if key.removeprefix("encoder.") == MASK_TOKEN:
        return "stored by the release, never trained, not used"
    if key == "n_averaged":
        return "number of averaged steps"
    if key.startswith(RELEASED_DECODER):
        return "decoder of segmentation, not part of this model"
    if re.match(r"densify\.\d\.mask_token$", key):
        return "token of hidden patches, which this model does not have"
    if key.startswith(LIGHT_DECODER):
        return "decoder of pre-training, not part of this model"
    if re.match(r"(encoder\.)?(mae\.blocks|embeddings\.layer\d)\.\d+\.", key):
        raise ValueError(f"{name}: {key} is beyond the depth of the model; {advice}")
    raise ValueError(f"{name}: {key}: unexplained key, which no network of this package has")


def check_encoder_complete(missing: tuple[str, ...], name: str, advice: str) -> None:
    """Raise ValueError if part of the encoder has no weights; fixed positions need none."""
    part = [k for k in missing if k.removeprefix("encoder.").startswith(ENCODER) and not k.endswith("pos_embed")]
    if part:
        raise ValueError(
            f"{name}: {len(part)} keys of the encoder are missing ({', '.join(part[:3])}, ...); "
            f"it is truncated, or from another network; {advice}"
        )
