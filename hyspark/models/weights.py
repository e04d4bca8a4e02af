"""Loading weights is a report: what matched, what was adapted, what is missing, what was left aside, and why.

Understands the released encoder file (a plain state dict), this project's pre-training and fine-tuning checkpoints,
state dicts in memory, key prefixes of DistributedDataParallel and torch.compile, `.pth`/`.pt` (read with
weights_only) and `.safetensors`.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hyspark.models.encoder import NUM_STAGES

CONTAINERS = ("model", "state_dict", "module")
"""Keys under which checkpoints keep their weights."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes left by DistributedDataParallel and torch.compile."""
MASK_TOKEN = "mae.mask_token"
ENCODER = ("embeddings.", "mae.")
LIGHT_DECODER = ("densify.", "decoder.levels.", "decoder.fuse.", "decoder.out.")


@dataclass(frozen=True)
class LoadReport:
    """What happened to each key; prints as a few readable lines.

    matched: keys loaded as they are. adapted, unexpected: key -> how, why. missing: the model's keys that keep their
    fresh values. coverage: share of the model's parameters (by count of numbers) that were loaded or adapted, 0..1.
    """

    matched: tuple[str, ...]
    adapted: dict[str, str]
    missing: tuple[str, ...]
    unexpected: dict[str, str]
    coverage: float

    def __str__(self) -> str:
        lines = [
            f"matched    {len(self.matched):4d} keys, covering {self.coverage:.1%} of the model's parameters",
            f"adapted    {len(self.adapted):4d}" + summary(self.adapted),
            f"missing    {len(self.missing):4d}" + (f" (fresh: {groups(self.missing)})" if self.missing else ""),
            f"unexpected {len(self.unexpected):4d}" + summary(self.unexpected),
        ]
        return "\n".join(lines)


def summary(reasons: Mapping[str, str]) -> str:
    """Keys joined by their reason, at most three of each named."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(key)
    parts = [
        f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}: {reason}"
        for reason, keys in by_reason.items()
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def groups(keys: tuple[str, ...]) -> str:
    """First parts of key names with their counts, e.g. 'decoder.* 98'."""
    counts: dict[str, int] = {}
    for key in keys:
        head = key.split(".")[0]
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head}.* {num}" for head, num in counts.items())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, without executing anything stored in it.

    Raises FileNotFoundError; ValueError, naming the file, where it is damaged, holds other objects than plain data,
    or no weights.
    """
    return unwrap(read_contents(path), str(path))


def read_contents(path: str | Path) -> object:
    """All that a file of weights holds, on the CPU; raises as `read_weights`, but for what it is."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give the path of a .pth, .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not opened: it is damaged, or holds Python objects other than tensors, which could run code. "
            "Ask its author for a plain state dict or a .safetensors file"
        ) from error
    except Exception as error:  # torch raises many kinds for a torn file, and safetensors its own
        raise ValueError(f"{path} cannot be read as weights; is it damaged or cut short? ({error})") from error


def unwrap(loaded: object, name: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint; raises ValueError where there is none."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[c] for c in CONTAINERS if isinstance(loaded.get(c), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{name} holds no weights: expected a state dict, or one under {' / '.join(CONTAINERS)}")
    odd = [str(k) for k, v in loaded.items() if not isinstance(v, Tensor)]
    if odd:
        raise ValueError(f"{name} is no state dict: {', '.join(odd[:3])} {'is' if len(odd) == 1 else 'are'} no tensor")
    return dict(loaded)


def plain_key(key: str, wanted: Mapping[str, Tensor]) -> str:
    """A source key in the model's terms: wrappers' prefixes off, `encoder.` off or on as the model has it."""
    while key.startswith(WRAPPERS):
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
    for candidate in (key, key.removeprefix("encoder."), f"encoder.{key}"):
        if candidate in wanted:
            return candidate
    return key


def load_pretrained(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load weights into a network of this package (pre-training, encoder or segmentation) and say what happened.

    source: a file's path or a state dict. Positions are recomputed where the crop size differs; the stem is adapted
    where the number of input channels differs; a segmentation head with another number of classes stays fresh.

    Raises FileNotFoundError for a missing file; ValueError where nothing matches, where a key is unexplained, where
    shapes do not fit or where part of the encoder is missing. The model is unchanged then.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    given = unwrap(source, name) if isinstance(source, Mapping) else read_weights(source)
    wanted = model.state_dict()
    matched, adapted, unexpected, loaded = [], {}, {}, {}
    for key, value in given.items():
        own = plain_key(key, wanted)
        if own not in wanted:
            unexpected[key] = why_unexpected(own, name, as_built(given))
        elif own in loaded:
            raise ValueError(f"{name}: two keys stand for {own}; it mixes more than one network")
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
                f"{name}: {key} has shape {tuple(value.shape)}, the model wants {tuple(wanted[own].shape)}; "
                f"{as_built(given)}"
            )
    if not matched:
        raise ValueError(
            f"{name}: none of its {len(given)} keys is one of the model's (it begins with {next(iter(given))!r}, "
            f"the model with {next(iter(wanted))!r})"
        )
    missing = tuple(key for key in wanted if key not in loaded)
    check_missing(missing, name, as_built(given))
    model.load_state_dict({**wanted, **loaded})
    numbers = {key: p.numel() for key, p in model.named_parameters()}
    coverage = sum(n for key, n in numbers.items() if key in loaded) / sum(numbers.values())
    return LoadReport(tuple(matched), adapted, missing, unexpected, coverage)


def as_built(weights: Mapping[str, Tensor]) -> str:
    """What to do where a model has another shape than these weights, with the flags for the shape that they show."""
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
        return "build the model as the weights were (--encoder_widths, --encoder_depths, --expansions, --vit_depth)"
    numbers = {
        "encoder_widths": [sizes["conv1"] for sizes in first],
        "encoder_depths": [sum(s == stage for s, _ in layers) for stage in range(1, NUM_STAGES + 1)],
        "expansions": [sizes["conv3"] // sizes["conv1"] for sizes in first],
        "vit_depth": [len(blocks)],
    }
    deepest = next((v for k, v in weights.items() if k.endswith("densify.0.project.weight")), None)
    if deepest is not None:
        numbers["decoder_width"] = [len(deepest)]
    flags = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in numbers.items())
    return f"build the model as the weights were: {flags}"


def same_positions(value: Tensor, own: Tensor) -> bool:
    """Whether stored positions are those of the model's grid, up to 16-bit rounding. Other grids may have as many
    tokens.
    """
    return value.shape == own.shape and torch.allclose(value.to(own), own, atol=1e-2)


def why_unexpected(key: str, name: str, advice: str) -> str:
    """Why a key may be left aside; raises ValueError where there is no reason."""
    if key.removeprefix("encoder.") == MASK_TOKEN:
        return "stored by the release, never trained, not used"
    if key.startswith(("decoder.decoder", "decoder.out.conv.")):
        return "decoder of segmentation, not part of this model"
    if re.match(r"densify\.\d\.mask_token$", key):
        return "stands for hidden patches, of which this model has none"
    if key.startswith(LIGHT_DECODER):
        return "decoder of pre-training, not part of this model"
    if re.match(r"(encoder\.)?(mae\.blocks|embeddings\.layer\d)\.\d+\.", key):
        raise ValueError(f"{name}: {key} is beyond the depth of the model; {advice}")
    raise ValueError(f"{name}: key {key!r} is not explained: no network of this package has it")


def check_missing(missing: tuple[str, ...], name: str, advice: str) -> None:
    """Raises ValueError where part of the encoder has no weights; fixed positions need none."""
    part = [k for k in missing if k.removeprefix("encoder.").startswith(ENCODER) and not k.endswith("pos_embed")]
    if part:
        raise ValueError(
            f"{name} lacks {len(part)} keys of the encoder ({', '.join(part[:3])}, ...); "
            f"it is cut short, or from another network; {advice}"
        )


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """Stem weight (c, n_in, *k) for another number of input channels: the mean over the old ones, scaled to keep the
    response's size.
    """
    mean = weight.sum(dim=1, keepdim=True) / num_channels
    return mean.expand(-1, num_channels, *mean.shape[2:]).clone()
