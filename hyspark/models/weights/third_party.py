"""Match weights to third-party networks (torchvision, timm, MONAI, the user's own), key by key.

File and network each have the backbone under a prefix: `encoder_q.` in a file of MoCo, `backbone.body.` in a detector.
The two prefixes under which most names agree are chosen. Then every other key of the file needs a reason. Every key of
the network under its prefix needs a value, except heads and decoders, which may be absent as a whole. Everything
outside the network's prefix stays randomly initialised.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyspark.models.weights.adapt import POSITIONS, adapt_channels, is_stem, resample_positions, stem_channels
from hyspark.models.weights.files import strip_wrappers
from hyspark.models.weights.layouts import best_names
from hyspark.models.weights.leftovers import (
    DECODER_MODULES,
    HEAD_MODULES,
    check_tokens,
    check_unexplained,
    reason_to_ignore,
)
from hyspark.models.weights.mismatch import few_match_error, no_match_error
from hyspark.models.weights.nnunet_settings import ALIAS
from hyspark.models.weights.prefixes import (
    COUNTER,
    FILE_PREFIXES,
    find_fit,
)
from hyspark.utils.text import count_of

SPARK_SETTINGS = ("config",)
"""Keys of plain data among the tensors in SparK's own files."""


FEW_TENSORS = 6
"""Most tensors that may match by chance: those of a convolution and its norm."""
POOLED_NORM = "fc_norm"
"""Norm of pooled features in transformers of timm, before the classifier; pre-training trains another one, or none."""


@dataclass(frozen=True)
class WeightMatch:
    """Weights of a file, matched to the keys of a network.

    Attributes:
        loaded: values by the network's keys.
        matched: see `LoadReport`, as for the others.
    """

    loaded: dict[str, Tensor]
    matched: tuple[str, ...]
    adapted: dict[str, str]
    missing: tuple[str, ...]
    unexpected: dict[str, str]


def match_third_party(model: nn.Module, given: Mapping[str, Tensor], name: str) -> WeightMatch:
    """Match a state dict to a third-party network.

    Args:
        model: the network.
        given: the state dict.
        name: name of the file, for messages.

    Raises:
        ValueError: no or more than one part of the network matches; shapes differ; part of the backbone is missing; the
            file has further layers of it.
    """
    wanted = model.state_dict()
    given, changed, names, dropped = best_names(given, model)
    source, own = find_prefixes(model, given, wanted, name)
    pairs, unexpected, unexplained = pair_keys(given, wanted, source, own, name)
    unexpected |= {key: "not read by timm for this network" for key in unexplained if key in dropped}
    rests = {strip_wrappers(key).removeprefix(source): names.get(key, key) for key in unexplained if key not in dropped}
    check_tokens(rests, name)
    heads = module_prefixes(model, own, HEAD_MODULES)
    channels = stem_channels((given[pairs[key]], want) for key, want in wanted.items() if key in pairs)
    is_2d = next((value.ndim == 4 for value in wanted.values() if value.ndim >= 4), False)
    loaded, matched, adapted = {}, [], {}
    for target, key in pairs.items():
        value, want = given[key], wanted[target]
        if value.shape == want.shape:
            loaded[target] = value
            if why := changed.get(key):
                adapted[target] = why
            else:
                matched.append(target)
        elif target.startswith(heads):
            unexpected[key] = f"head with {len(value)} outputs, the model's has {len(want)}"
        elif channels and is_stem(value, want) and (value.shape[1], want.shape[1]) == channels:
            loaded[target] = adapt_channels(value, channels[1])
            adapted[target] = f"{channels[0]} -> {channels[1]} input channels"
        elif POSITIONS.search(target) and is_2d and (positions := resample_positions(value, want)) is not None:
            loaded[target] = positions
            adapted[target] = f"positions resampled, {tuple(value.shape)} -> {tuple(want.shape)}"
        else:
            raise shape_error(names.get(key, key), value, want, given, name)
    for target in [key for key in find_missing(wanted, loaded) if is_unused_bias(key, loaded)]:
        loaded[target] = torch.zeros_like(wanted[target])
        adapted[target] = "0, since the file's shortcuts have no bias"
    missing = find_missing(wanted, loaded)
    tops = (*heads, *module_prefixes(model, own, DECODER_MODULES))
    check_backbone_complete([key for key in missing if key.startswith(own)], pairs, tops, wanted, name)
    body = [key.removeprefix(own) for key in wanted if key.startswith(own) and not key.startswith(tops)]
    unexpected |= check_unexplained(rests, body, name)
    unexpected = {names.get(key, key): why for key, why in unexpected.items() if key in names or key not in changed}
    return WeightMatch(loaded, tuple(matched), adapted, missing, unexpected)


def shape_error(key: str, value: Tensor, want: Tensor, given: Mapping[str, Tensor], name: str) -> ValueError:
    """Create the error for a tensor of a shape that cannot be adapted to the network's."""
    width = find_decoder_width(given)
    advice = (
        "it is from another network or size of it: use that one (--model, by PACKAGE.MODULE:FACTORY if it has no name)"
    )
    if width is not None:
        advice = f"build the model with the shapes of the weights (--decoder_width {width})"
    return ValueError(f"{name}: {key}: the model expects shape {tuple(want.shape)}, got {tuple(value.shape)}; {advice}")


def find_prefixes(
    model: nn.Module, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str
) -> tuple[str, str]:
    """Find the prefixes of the backbone, in the file and in the network.

    A match counts from half of the network's tensors, its heads and decoders aside, or a quarter of the file's, which
    may hold a backbone twice.

    Raises:
        ValueError: few keys or none match, or the weights match two parts of the network equally well.
    """
    fit = find_fit(given, wanted)
    if not fit.names:
        raise no_match_error(given, wanted, name)
    tops = module_prefixes(model, "", (*HEAD_MODULES, *DECODER_MODULES))
    body = [key for key in wanted if not key.startswith(tops) and not key.endswith(COUNTER)]
    plain = [strip_wrappers(key) for key in given if not key.endswith(COUNTER)]
    known = [key for key in plain if not reason_to_ignore(key, "", {})]
    source, own = fit.pairs[0]
    num = sum(key.startswith(source) and own + key.removeprefix(source) in wanted for key in plain)
    if 2 * num < len(body) and 4 * num < len(known):
        if not wanted.keys() & set(plain):  # a few match by chance, under some prefix
            raise no_match_error(given, wanted, name)
        raise few_match_error(num, given, wanted, name)
    if len(fit.pairs) > 1 and len(distinct := drop_copies(fit.pairs, given, wanted)) > 1:
        fit = fit._replace(pairs=tuple(distinct))
        if fit.names <= FEW_TENSORS and fit.names < len(
            plain
        ):  # a convolution and its norm are in many places of any network
            raise no_match_error(given, wanted, name)
        ways = ", ".join(f"{source}* as {own}*" for source, own in fit.pairs[:3])
        ways += ", ..." if len(fit.pairs) > 3 else ""
        sources = [source for source, _ in fit.pairs]
        advice = "load it into one module: load_pretrained(model.part, ...)"
        if len(set(sources)) > 1:
            key = sources[0].removesuffix(".")
            advice = f"choose one of the file's: --weights_key {key} (in Python key={key!r})"
        raise ValueError(f"{name}: matches the model in {len(fit.pairs)} ways ({ways}); {advice}")
    return source, own


def pair_keys(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, own: str, name: str
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Pair keys of a network with keys of a file under the given prefixes.

    Args:
        given: state dict of the file.
        wanted: state dict of the network.
        source: prefix of the backbone in the file.
        own: prefix of the backbone in the network.
        name: name of the file, for messages.

    Returns:
        The file's key by the network's; the reason by the file's key for those that are ignored; the other keys.

    Raises:
        ValueError: two keys of the file match one of the network.
    """
    pairs, unexpected, unexplained = {}, {}, []
    for key in given:
        rest = strip_wrappers(key)
        target = own + rest.removeprefix(source)
        if rest.startswith(source) and target in wanted:
            if target in pairs:
                raise ValueError(f"{name}: two keys match {target}; it mixes more than one network")
            pairs[target] = key
        elif why := reason_to_ignore(rest.removeprefix(source), target, wanted):
            unexpected[key] = why
        elif not rest.startswith(source):
            unexpected[key] = f"outside of {source}*, which is used"
        else:
            unexplained.append(key)
    used = {address_of(given[key]) for key in pairs.values()}
    names = set(pairs.values())
    aliases = {key for key in given if key not in names and given[key].numel() and address_of(given[key]) in used}
    unexpected |= dict.fromkeys(aliases, ALIAS)
    return pairs, unexpected, [key for key in unexplained if key not in aliases]


def address_of(value: Tensor) -> tuple[int, torch.Size]:
    """Return what a tensor shares with its other names in a file: the address of its first number, and its shape."""
    return value.data_ptr() if value.layout is torch.strided else id(value), value.shape


def is_unused_bias(key: str, loaded: Iterable[str]) -> bool:
    """Whether a key is the bias of a ResNet's shortcut whose weight is loaded; without it, it is 0."""
    return key.endswith(".downsample.0.bias") and key.removesuffix("bias") + "weight" in loaded


def drop_copies(
    pairs: Iterable[tuple[str, str]], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Drop pairs of prefixes that assign the same numbers as an earlier pair: a file has them under several names."""
    values = {strip_wrappers(key): value for key, value in given.items()}
    kept: list[tuple[str, str]] = []
    assigned: list[dict[int, Tensor]] = []
    for source, own in pairs:
        rests = (key.removeprefix(source) for key in values if key.startswith(source))
        found = {wanted[own + rest].data_ptr(): values[source + rest] for rest in rests if own + rest in wanted}
        if not any(assign_equally(found, other) for other in assigned):
            kept.append((source, own))
            assigned.append(found)
    return kept


def assign_equally(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    """Whether two assignments give the same tensors the same numbers."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def module_prefixes(model: nn.Module, own: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """List the prefixes of modules on top of a backbone.

    Args:
        model: the network.
        own: prefix of the backbone; it may also lie below it, under one of `FILE_PREFIXES`.
        names: names of such modules; networks of timm declare theirs instead.
    """
    found = []
    for root in (own + source for source in FILE_PREFIXES):
        try:
            part = model.get_submodule(root.rstrip("."))
        except AttributeError:
            continue
        about = getattr(part, "default_cfg", None)
        declared = about.get("classifier") if isinstance(about, Mapping) else None
        tops = names if declared is None else (declared,) if isinstance(declared, str) else tuple(declared)
        tops = (*tops, POOLED_NORM)
        found += [f"{root}{top}." for top in tops]
    return tuple(found)


def find_missing(wanted: Mapping[str, Tensor], loaded: Iterable[str]) -> tuple[str, ...]:
    """List the keys of a network whose tensors got no value, under this name or another one."""
    done = {wanted[key].data_ptr() for key in loaded}
    return tuple(key for key, value in wanted.items() if value.data_ptr() not in done)


def check_backbone_complete(
    missing: list[str], given: Iterable[str], tops: tuple[str, ...], wanted: Mapping[str, Tensor], name: str
) -> None:
    """Raise ValueError if a key other than counters and whole heads or decoders is missing.

    Args:
        missing: keys of the network without a value.
        given: keys of the network that the file has, loaded or ignored.
        tops: prefixes of heads and decoders.
        wanted: state dict of the network.
        name: name of the file, for messages.
    """
    begun = {top for key in given for top in tops if key.startswith(top)}
    absent = tuple(top for top in tops if top not in begun)
    fresh = {wanted[key].data_ptr() for key in wanted if key.startswith(absent)} if absent else set()
    present = set(given)
    part = [
        key
        for key in missing
        if key not in present and not key.endswith(COUNTER) and wanted[key].data_ptr() not in fresh
    ]
    if part:
        shown = ", ".join(part[:3]) + (", ..." if len(part) > 3 else "")
        if all(".downsample." in key for key in part):
            advice = (
                "the file's shortcuts have no weights, as those of MedicalNet's ResNet-18 and 34: give a function that "
                "builds it with shortcut_type='A', --model PACKAGE.MODULE:FACTORY"
            )
        else:
            advice = (
                "it is truncated, or from another network. If these are to stay randomly initialised, load into the "
                "module without them: load_pretrained(model.part, ...)"
            )
        num = count_of(len(part), "key")
        raise ValueError(f"{name}: no values for {num} of the network, its head aside ({shown}); {advice}")


def find_decoder_width(given: Mapping[str, Tensor]) -> int | None:
    """Find the width of the decoder of pre-training in a state dict; None if it has none."""
    return next((len(value) for key, value in given.items() if key.endswith("densify.0.project.weight")), None)
