"""Weights into networks of others (torchvision, timm, MONAI, the user's own): which key of a file is which of theirs.

File and network each keep the backbone under a prefix of their own: `encoder_q.` in a file of MoCo, `backbone.body.` in
a detector. The two find_prefixes under which most names agree are taken. Then every key of the file needs a reason, and
every key of the network under its prefix a value, but for heads and decoders, which may be absent as a whole.
What lies outside the network's prefix stays fresh.
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
"""Prefixes under which files keep a backbone."""
SPARK_SETTINGS = ("config",)
"""What SparK's own files keep among the tensors."""
HEAD_MODULES = (
    *("fc", "_fc", "classifier", "head", "heads", "head_dist", "class_layers", "last_linear", "classification_head"),
    *("aux1", "aux2", "AuxLogits", "segmentation_head", "conv_final", "output_block", "deep_supervision_heads"),
)
"""Modules that give class scores in networks of torchvision and MONAI; those of timm say which it is."""
DECODER_MODULES = ("decoder", "up_layers", "up_samples", "upsamples")
"""Modules behind the encoder in MONAI's FlexibleUNet, SegResNet and DynUNet."""
IGNORED_KEYS = {
    r"encoder_k\.": "momentum encoder of MoCo, encoder_q is taken",
    r"(val_)?queue(_ptr)?$": "queue of MoCo",
    r"target_network\.": "momentum encoder of BYOL, online_network is taken",
    r"online_network\.projector\.": "projection head of BYOL",
    r"online_network\.predictor\.": "predictor of BYOL",
    r"(projection_head|projection|project)\.": "projection head of pre-training",
    r"predict\.": "predictor of BYOL",
    r"teacher\.": "slow copy of pre-training, encoder is taken",
    r"criterion\.memory_bank\.": "queue of MoCo",
    r"prototypes": "prototypes of SwAV",
    r"(dense_decoder|densify_norms|densify_projs|mask_tokens|densify)\.": "decoder of pre-training",
    r"(imn_m|imn_s|norm_black)$": "stored by SparK, not used",
    rf"({'|'.join(HEAD_MODULES)})\.": "head of its own, not part of this model",
    rf"({'|'.join(DECODER_MODULES)})\.": "decoder, not part of this model",
}
"""Keys, by the beginning of their names, that a file may have beside those of the network, and why."""
COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class WeightMatch:
    """A file's weights in a network's terms. loaded: values by the network's keys. The rest as in LoadReport."""

    loaded: dict[str, Tensor]
    matched: tuple[str, ...]
    adapted: dict[str, str]
    missing: tuple[str, ...]
    unexpected: dict[str, str]


def match_third_party(model: nn.Module, given: Mapping[str, Tensor], name: str) -> WeightMatch:
    """Find the network's key and value for each key of a state dict.

    Raises ValueError, naming `name`, where nothing or more than one part of the network matches, where a key is
    unexplained, where shapes do not fit or where part of the backbone is missing.
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
            unexpected[key] = f"head of {len(value)} outputs, the model's has {len(want)}"
        elif channels and is_stem(value, want) and (value.shape[1], want.shape[1]) == channels:
            loaded[target] = adapt_channels(value, channels[1])
            adapted[target] = f"{channels[0]} -> {channels[1]} input channels"
        else:
            width = decoder_width(given)
            flag = "" if width is None else f" (--decoder_width {width})"
            raise ValueError(
                f"{name}: {key} has shape {tuple(value.shape)}, the model wants {tuple(want.shape)}; build the model "
                f"as the weights were{flag}"
            )
    missing = find_missing(wanted, loaded)
    tops = (*heads, *module_prefixes(model, own, DECODER_MODULES))
    check_backbone_complete([key for key in missing if key.startswith(own)], pairs, tops, wanted, name)
    return WeightMatch(loaded, tuple(matched), adapted, missing, unexpected)


def pair_keys(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, own: str, name: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The network's keys with those of the file, and the other keys of the file with the reasons for which they may be
    left aside. Raises ValueError where there is none, or where two keys stand for one.
    """
    pairs, unexpected, unexplained = {}, {}, []
    for key in given:
        rest = strip_wrappers(key)
        target = own + rest.removeprefix(source)
        if rest.startswith(source) and target in wanted:
            if target in pairs:
                raise ValueError(f"{name}: two keys stand for {target}; it mixes more than one network")
            pairs[target] = key
        elif why := reason_to_ignore(rest.removeprefix(source), target, wanted):
            unexpected[key] = why
        else:
            unexplained.append(key)
    if unexplained:
        raise ValueError(
            f"{name}: {len(unexplained)} keys are not explained ({', '.join(unexplained[:3])}, ...); {len(pairs)} are "
            f"the model's {own}*. Is it of another network?"
        )
    return pairs, unexpected


def find_prefixes(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> tuple[str, str]:
    """The prefix of the backbone in the file, and in the network: those under which most names agree, and of several
    such those under which most shapes do.

    Raises ValueError where no key matches, or where the weights fit two parts of the network equally well.
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
                # One meaning may be written in several ways (encoder.backbone.* is backbone.* of encoder.*), and a
                # module may stand at two places: what counts is which value goes into which tensor.
                meaning = frozenset((source + rest, wanted[own + rest].data_ptr()) for rest in shared)
                found[meaning] = max(found.get(meaning, (source, own)), (source, own), key=lambda pair: len(pair[1]))
    if not found:
        raise no_match_error(given, wanted, name)
    if len(found) > 1:
        places = ", ".join(f"{source}* as {own}*" for source, own in found.values())
        raise ValueError(
            f"{name} fits in {len(found)} ways ({places}); load it into the part that you mean: "
            "load_pretrained(model.part, ...)"
        )
    return next(iter(found.values()))


def keys_by_prefix(wanted: Iterable[str]) -> dict[str, set[str]]:
    """The find_prefixes of a network's keys, and the rest of the keys below each."""
    below: dict[str, set[str]] = {}
    for key in wanted:
        parts = key.split(".")
        for depth in range(len(parts)):
            below.setdefault("".join(f"{part}." for part in parts[:depth]), set()).add(".".join(parts[depth:]))
    return below


def no_match_error(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> ValueError:
    """The error where no key is one of the model's."""
    return ValueError(
        f"{name}: none of its {len(given)} keys is one of the model's (it begins with {next(iter(given))!r}, "
        f"the model with {next(iter(wanted))!r})"
    )


def module_prefixes(model: nn.Module, own: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of what may lie on top of a backbone at `own`, or at a usual place below it. Of networks of timm, heads
    are what they say.
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
    """Why a key of the file, which the model does not have, may be left aside; None where there is no reason."""
    if target.endswith(COUNTER) and target.removesuffix(COUNTER) + ".running_mean" in wanted:
        return "count of batches, which the model's norms do not keep"
    return next((why for pattern, why in IGNORED_KEYS.items() if re.match(pattern, rest)), None)


def is_stem(value: Tensor, want: Tensor) -> bool:
    """Whether two weights (c, n_in, *kernel) of a convolution of images differ in their input channels alone."""
    return value.ndim == want.ndim >= 4 and len(value) == len(want) and value.shape[2:] == want.shape[2:]


def stem_channels(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int] | None:
    """Input channels of a network's first convolution, in the file and in the network; None where they agree, or more
    differs than these. pairs: the two's values, in the network's order.
    """
    value, want = next(((v, w) for v, w in pairs if v.ndim >= 4), (None, None))
    if value is None or want is None or not is_stem(value, want) or value.shape == want.shape:
        return None
    return value.shape[1], want.shape[1]


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """Stem weight (c, n_in, *k) for another number of input channels: the mean over the old ones, scaled to keep the
    response's size.
    """
    mean = weight.sum(dim=1, keepdim=True) / num_channels
    return mean.expand(-1, num_channels, *mean.shape[2:]).clone()


def find_missing(wanted: Mapping[str, Tensor], loaded: Iterable[str]) -> tuple[str, ...]:
    """Keys of the network whose tensors got no value, under this name or another one."""
    done = {wanted[key].data_ptr() for key in loaded}
    return tuple(key for key, value in wanted.items() if value.data_ptr() not in done)


def check_backbone_complete(
    missing: list[str], given: Iterable[str], tops: tuple[str, ...], wanted: Mapping[str, Tensor], name: str
) -> None:
    """Raises ValueError where something is missing but counters and whole heads or decoders.

    given: the network's keys that the file has, loaded or left aside.
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
            f"{name} lacks {len(part)} keys of the network, its head aside ({', '.join(part[:3])}, ...); it is cut "
            "short, or from another network. If these are to stay fresh, load into the part of the model without them: "
            "load_pretrained(model.part, ...)"
        )


def decoder_width(given: Mapping[str, Tensor]) -> int | None:
    """The width of the decoder of pre-training that weights show; None where they have none."""
    return next((len(value) for key, value in given.items() if key.endswith("densify.0.project.weight")), None)
