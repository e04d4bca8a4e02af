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
"""Prefixes under which files have a backbone."""
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
    r"(imn_m|imn_s|norm_black)$": "stored by SparK, not used",
    rf"({'|'.join(HEAD_MODULES)})\.": "head of the file's network, not part of this model",
    rf"({'|'.join(DECODER_MODULES)})\.": "decoder, not part of this model",
}
"""Patterns of keys that a file may have beside those of the network, with the reasons."""
COUNTER = ".num_batches_tracked"


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
    source, own = find_prefixes(given, wanted, name)
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
        else:
            unexplained.append(key)
    if unexplained:
        raise ValueError(
            f"{name}: {len(unexplained)} keys are unexplained ({', '.join(unexplained[:3])}, ...), and {len(pairs)} "
            f"match the model's {own}*; is it from another network?"
        )
    return pairs, unexpected


def find_prefixes(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> tuple[str, str]:
    """Find the prefixes of the backbone, in the file and in the network.

    They are the pair under which most names agree, and then most shapes.

    Raises:
        ValueError: no key matches, or the weights match two parts of the network equally well.
    """
    shapes = {strip_wrappers(key): value.shape for key, value in given.items()}
    first = {f"{key.split('.')[0]}." for key in shapes}
    sources = (*FILE_PREFIXES, *(first.difference(FILE_PREFIXES) if len(first) == 1 else ()))
    below = keys_by_prefix(wanted)
    best = (0, 0)
    found: dict[frozenset[tuple[str, int]], tuple[str, str]] = {}
    for source in sources:
        rests = {key.removeprefix(source) for key in shapes if key.startswith(source)}
        for own, own_rests in below.items():
            shared = rests & own_rests
            if len(shared) < best[0] or not shared or (source not in FILE_PREFIXES and own.endswith(source)):
                continue
            fits = (len(shared), sum(shapes[source + rest] == wanted[own + rest].shape for rest in shared))
            if fits > best:
                best, found = fits, {}
            if fits == best:
                # One assignment may be written in several ways (encoder.backbone.* is backbone.* of encoder.*), and a
                # module may have two names: what counts is which value is loaded into which tensor.
                meaning = frozenset((source + rest, wanted[own + rest].data_ptr()) for rest in shared)
                found[meaning] = max(found.get(meaning, (source, own)), (source, own), key=lambda pair: len(pair[1]))
    if not found:
        raise no_match_error(given, wanted, name)
    if len(found) > 1:
        ways = ", ".join(f"{source}* as {own}*" for source, own in found.values())
        raise ValueError(
            f"{name}: matches the model in {len(found)} ways ({ways}); load it into one module: "
            "load_pretrained(model.part, ...)"
        )
    return next(iter(found.values()))


def keys_by_prefix(wanted: Iterable[str]) -> dict[str, set[str]]:
    """Collect the rests of a network's keys below each of their prefixes."""
    below: dict[str, set[str]] = {}
    for key in wanted:
        parts = key.split(".")
        for depth in range(len(parts)):
            below.setdefault("".join(f"{part}." for part in parts[:depth]), set()).add(".".join(parts[depth:]))
    return below


def no_match_error(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> ValueError:
    """Create the error for a state dict without a key of the model."""
    return ValueError(
        f"{name}: none of its {len(given)} keys is one of the model's (its first is {next(iter(given))!r}, "
        f"the model's {next(iter(wanted))!r})"
    )


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
