"""Match weights to third-party networks (torchvision, timm, MONAI, the user's own), key by key.

File and network each have the backbone under a prefix: `encoder_q.` in a file of MoCo, `backbone.body.` in a detector.
The two prefixes under which most names agree are chosen. Then every other key of the file needs a reason. Every key of
the network under its prefix needs a value, except heads and decoders, which may be absent as a whole. Everything
outside the network's prefix stays randomly initialised.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hyspark.models.weights.files import strip_wrappers
from hyspark.models.weights.prefixes import (
    COUNTER,
    FILE_PREFIXES,
    few_match_error,
    find_fit,
    name_indices,
    no_match_error,
)

SPARK_SETTINGS = ("config",)
"""Keys of plain data among the tensors in SparK's own files."""
HEAD_MODULES = (
    *("fc", "_fc", "classifier", "head", "heads", "head_dist", "class_layers", "last_linear", "classification_head"),
    *("aux1", "aux2", "AuxLogits", "segmentation_head", "conv_final", "output_block", "deep_supervision_heads"),
)
"""Modules that give class scores in networks of torchvision and MONAI; networks of timm declare theirs."""
DECODER_MODULES = ("decoder", "up_layers", "up_samples", "upsamples")
"""Modules behind the encoder in MONAI's FlexibleUNet, SegResNet and DynUNet."""
IGNORED_KEYS = {
    r"encoder_k\.": "momentum encoder of MoCo, encoder_q is used",
    r"(val_)?queue(_ptr)?$": "queue of MoCo",
    r"target_network\.": "momentum encoder of BYOL, online_network is used",
    r"online_network\.projector\.": "projection head of BYOL",
    r"online_network\.predictor\.": "predictor of BYOL",
    r"(projection_head|projection|project)\.": "projection head of pre-training",
    r"predict\.": "predictor of BYOL",
    r"teacher\.": "momentum encoder of pre-training, encoder is used",
    r"criterion\.memory_bank\.": "queue of MoCo",
    r"prototypes": "prototypes of SwAV",
    r"(dense_decoder|densify_norms|densify_projs|mask_tokens|densify)\.": "decoder of pre-training",
    r"n_averaged$": "number of averaged steps",
    r"(imn_m|imn_s|norm_black)$": "stored by SparK, not used",
    rf"({'|'.join(HEAD_MODULES)})\.": "head of the file's network, not part of this model",
    rf"({'|'.join(DECODER_MODULES)})\.": "decoder, not part of this model",
}
"""Patterns of keys that a file may have beside those of the network, with the reasons."""


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
        ValueError: no or more than one part of the network matches; a key is unexplained; shapes differ; part of the
            backbone is missing.
    """
    wanted = model.state_dict()
    given = best_names(given, model)
    source, own = find_prefixes(model, given, wanted, name)
    pairs, unexpected = pair_keys(given, wanted, source, own, name)
    heads = module_prefixes(model, own, HEAD_MODULES)
    channels = stem_channels((given[pairs[key]], want) for key, want in wanted.items() if key in pairs)
    loaded, matched, adapted = {}, [], {}
    for target, key in pairs.items():
        value, want = given[key], wanted[target]
        if value.shape == want.shape:
            loaded[target] = value
            matched.append(target)
        elif target.startswith(heads):
            unexpected[key] = f"head with {len(value)} outputs, the model's has {len(want)}"
        elif channels and is_stem(value, want) and (value.shape[1], want.shape[1]) == channels:
            loaded[target] = adapt_channels(value, channels[1])
            adapted[target] = f"{channels[0]} -> {channels[1]} input channels"
        else:
            width = find_decoder_width(given)
            flag = "" if width is None else f" (--decoder_width {width})"
            raise ValueError(
                f"{name}: {key}: the model expects shape {tuple(want.shape)}, got {tuple(value.shape)}; build the "
                f"model with the shapes of the weights{flag}"
            )
    missing = find_missing(wanted, loaded)
    tops = (*heads, *module_prefixes(model, own, DECODER_MODULES))
    check_backbone_complete([key for key in missing if key.startswith(own)], pairs, tops, wanted, name)
    return WeightMatch(loaded, tuple(matched), adapted, missing, unexpected)


def best_names(given: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Rename index keys by the network's modules, if more names agree then."""
    renamed = name_indices(given, model)
    by_module = {renamed.get(key, key): value for key, value in given.items()}
    wanted = model.state_dict()
    return by_module if renamed and find_fit(by_module, wanted)[:2] > find_fit(given, wanted)[:2] else given


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
    if len(fit.pairs) > 1:
        ways = ", ".join(f"{source}* as {own}*" for source, own in fit.pairs)
        sources = [source for source, _ in fit.pairs]
        advice = "load it into one module: load_pretrained(model.part, ...)"
        if len(set(sources)) > 1:
            key = sources[0].removesuffix(".")
            advice = f"choose one of the file's: --weights_key {key} (in Python key={key!r})"
        raise ValueError(f"{name}: matches the model in {len(fit.pairs)} ways ({ways}); {advice}")
    return source, own


def pair_keys(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, own: str, name: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Pair keys of a network with keys of a file under the given prefixes.

    Args:
        given: state dict of the file.
        wanted: state dict of the network.
        source: prefix of the backbone in the file.
        own: prefix of the backbone in the network.
        name: name of the file, for messages.

    Returns:
        The file's key by the network's, and the reason by the file's key for those that are ignored.

    Raises:
        ValueError: a key has no reason to be ignored, or two keys of the file match one of the network.
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
    if unexplained:
        raise ValueError(
            f"{name}: {len(unexplained)} keys are unexplained ({', '.join(unexplained[:3])}, ...), and {len(pairs)} "
            f"match the model's {own}*; is it from another network?"
        )
    return pairs, unexpected


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
        found += [f"{root}{top}." for top in tops]
    return tuple(found)


def reason_to_ignore(rest: str, target: str, wanted: Mapping[str, Tensor]) -> str | None:
    """Find the reason to ignore a key that the model does not have; None if there is none."""
    if target.endswith(COUNTER) and target.removesuffix(COUNTER) + ".running_mean" in wanted:
        return "number of batches, which the model's norms do not count"
    return next((why for pattern, why in IGNORED_KEYS.items() if re.match(pattern, rest)), None)


def is_stem(value: Tensor, want: Tensor) -> bool:
    """Whether two weights (c, n_in, *kernel) of a convolution of images differ in their input channels only."""
    return value.ndim == want.ndim >= 4 and len(value) == len(want) and value.shape[2:] == want.shape[2:]


def stem_channels(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int] | None:
    """Find the input channels of a network's first convolution, in the file and in the network.

    Args:
        pairs: values of the file and of the network, in the network's order.

    Returns:
        Two numbers of channels; None if they agree, or if the convolutions differ otherwise too.
    """
    value, want = next(((v, w) for v, w in pairs if v.ndim >= 4), (None, None))
    if value is None or want is None or not is_stem(value, want) or value.shape == want.shape:
        return None
    return value.shape[1], want.shape[1]


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """Adapt a stem weight (c, n_in, *k) to another number of input channels.

    Each new channel gets the mean over the old ones, scaled to preserve the size of the response.
    """
    mean = weight.sum(dim=1, keepdim=True) / num_channels
    return mean.expand(-1, num_channels, *mean.shape[2:]).clone()


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
        raise ValueError(
            f"{name}: {len(part)} keys of the network, its head aside, are missing ({', '.join(part[:3])}, ...); it is "
            "truncated, or from another network. If these are to stay randomly initialised, load into the module "
            "without them: load_pretrained(model.part, ...)"
        )


def find_decoder_width(given: Mapping[str, Tensor]) -> int | None:
    """Find the width of the decoder of pre-training in a state dict; None if it has none."""
    return next((len(value) for key, value in given.items() if key.endswith("densify.0.project.weight")), None)
