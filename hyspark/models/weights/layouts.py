"""Rename the tensors of a file to a network's: by index, by layouts of their authors, by timm's own readers."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from hyspark.models.weights.files import strip_wrappers
from hyspark.models.weights.prefixes import find_fit
from hyspark.models.weights.timm_names import Renamed, rename_by_timm

LAYOUTS = (
    (r"(\bblocks\.)\d+\.(\d+\.)", r"\1\2"),  # DINOv2 in training: blocks in chunks
    (r"(\bdenselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),  # DenseNet of early torchvision, as in CheXNet
    (r"\bmlp\.fc([12]\.)", r"mlp.linear\1"),  # Swin UNETR in pre-training
    (r"(\blayers\d\.0\.)0\.", r"\1"),  # the same, of later authors
    (r"\bencoder\.(patch_embed\.|layers\d\.0\.)(?:0\.)?", r"swinViT.\1"),  # the same, with its decoder
    (r"\bswin_vit\.", "swinViT."),  # the same, of early MONAI
)
"""Patterns of names and what they are in the network's file, each tried on its own."""
SHARED_POSITIONS = "rel_pos_bias.relative_position_bias_table"
"""Table of positions that all blocks share, in BEiT before fine-tuning."""


def best_names(given: Mapping[str, Tensor], model: nn.Module) -> Renamed:
    """Rename the tensors of a file in the way by which most names, and then most shapes, are the network's."""
    wanted = model.state_dict()
    best, fit = Renamed(given, {}, {}), find_fit(given, wanted)
    if fit[:2] == (len(wanted), len(wanted)):
        return best
    ways = [rename(given, {key: re.sub(old, new, key) for key in given}) for old, new in LAYOUTS]
    ways += [rename(given, name_indices(given, model)), share_positions(given, wanted)]
    ways += rename_by_timm(given, model, [*(source for source, _ in fit.pairs), ""])
    counts = fit[:2]
    for way in ways:
        if way is not None and (found := find_fit(way.tensors, wanted)[:2]) > counts:
            best, counts = way, found
    return best


def rename(given: Mapping[str, Tensor], new: Mapping[str, str]) -> Renamed | None:
    """Rename tensors by a mapping of names; None if it changes none or makes two equal."""
    names = {new.get(key, key): key for key in given}
    if len(names) < len(given) or names.keys() == given.keys():
        return None
    return Renamed({name: given[key] for name, key in names.items()}, {}, names)


def share_positions(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Renamed | None:
    """Give each block of a network the table of positions that all blocks share in a file; None if it has none."""
    shared = next((key for key in given if key.endswith(SHARED_POSITIONS)), None)
    if shared is None:
        return None
    prefix = shared.removesuffix(SHARED_POSITIONS)
    last = SHARED_POSITIONS.rpartition(".")[2]
    copies = {f"{prefix}{key}": given[shared] for key in wanted if key.startswith("blocks.") and key.endswith(last)}
    others = {key: value for key, value in given.items() if key != shared}
    return Renamed(others | copies, dict.fromkeys(copies, f"copy of {shared}"), dict.fromkeys(copies, shared))


def name_indices(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Rename keys that begin with an index, of `nn.Sequential(*list(model.children()))`, by the model's modules.

    Returns:
        The new name of each key, all under the same prefix; empty if the keys are others.
    """
    modules = [name for name, _ in model.named_children()]
    renamed = {}
    for key in given:
        if found := re.match(r"(\D*?)(\d+)\.(.*)$", strip_wrappers(key)):
            prefix, index, rest = found.groups()
            if int(index) < len(modules) and (not prefix or prefix.endswith(".")):
                renamed[key] = f"{prefix}{modules[int(index)]}.{rest}"
    return renamed if len(renamed) >= 0.5 * len(given) and len(set(renamed.values())) == len(renamed) else {}
