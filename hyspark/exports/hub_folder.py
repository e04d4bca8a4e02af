"""Folder for the Hugging Face Hub: config.json, model.safetensors and a model card, without paths and names of cases.

Settings come from lists: those of the network, of preparation and of prediction. All others stay with the run.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyspark.config.nnunet import plan_in_file
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import present_spelling, typed_values
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.shared import EncoderSettings
from hyspark.config.yaml_files import load_mapping
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.network_kind import fine_tuned_file, kind_of_contents, prediction_settings
from hyspark.evaluation.segmentation.inference import load_fine_tuned
from hyspark.exports.measured_scores import read_scores, run_scores
from hyspark.exports.model_card import OF_THE_AUTHOR, CardFacts, check_facts, model_card
from hyspark.models.defaults import edges_per_axis
from hyspark.models.encoder import HybridEncoder
from hyspark.models.hub_networks import Encoder, Segmenter, to_plain
from hyspark.models.nnunet_plans import PLANS_KEY, PREFIX, NnunetPlan
from hyspark.models.weights.export import count_encoder, export_metadata, select_weights
from hyspark.models.weights.files import made_with, read_contents
from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.load import load_pretrained
from hyspark.models.weights.model_folder import (
    CONFIG,
    LIBRARY,
    WEIGHTS,
    read_model_config,
    settings_of,
    write_model,
)
from hyspark.models.weights.search import choose_state_dict
from hyspark.training.initial_weights import settings_beside
from hyspark.training.run_folder import checkpoint_file, encoder_file
from hyspark.utils.settings import field_info
from hyspark.utils.text import listing

CARD_FILE = "README.md"
MAY_LIE_BESIDE = (
    CONFIG,
    WEIGHTS,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "adaptation_plan.json",
    "checkpoint_final.pth",
)
"""Files that a folder for the Hub may hold already, the last two for nnU-Net.

Those of a run name paths and cases, and would be uploaded.
"""
NAMED_LIBRARIES = ("timm/", "torchvision/", "monai/")
"""Networks that are named; the name of another one, PACKAGE.MODULE:FACTORY, is the author's business."""
OWN_PREFIX = "encoder.backbone."
"""Where a checkpoint of pre-training holds a third-party network."""
SHAPE = tuple(field_info(EncoderSettings))
DECODER = ("decoder", "decoder_width", "decoder_min_width")


class ModelFolder(NamedTuple):
    """Content of a folder.

    Attributes:
        config: Content of config.json.
        weights: The state dict.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]


def export_to_hub(
    source: str | Path,
    out: Path,
    facts: CardFacts,
    *,
    scores: Sequence[Path] = (),
    decoder: bool = False,
    key: str = "",
) -> ModelFolder:
    """Write a folder for the Hub, and compare what is read from it with the source.

    Args:
        source: A run folder or best.pth of a fine-tuning for segmentation; a run folder, checkpoint or file of weights
            of a pre-training; exported weights.
        out: Folder to write to.
        facts: What the author states on the model card.
        scores: Folders of `hyspark evaluate` for the source, for the card.
        decoder: Whether to write the light decoder of pre-training beside the encoder.
        key: Key of the state dict in the source, see `load_pretrained`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: There is no source.
        ValueError: The source is of another kind, or its settings are unknown; the folder holds a model card, or files
            that are not for the Hub; scores are of another network.
        RuntimeError: The folder computes something else than the source.
    """
    check_facts(facts)
    if (out / CARD_FILE).exists():
        raise ValueError(f"{out / CARD_FILE}: exists, and may have been edited; remove it, or name another folder")
    if others := [path.name for path in files_in(out) if path.name not in MAY_LIE_BESIDE and path.name[0] != "."]:
        raise ValueError(
            f"{out}: expected a new or empty folder, got one with {listing(others, 3)}, which would be uploaded too; "
            "name another folder"
        )
    path = find_source(source)
    if is_segmentation(path):
        if decoder or key:
            raise ValueError(f"{source}: --decoder and --weights_key are of pre-trained weights; drop them")
        folder, measured = segmentation_folder(path), read_scores(scores, path)
        if own := run_scores(fine_tuned_file(path).parent):
            measured.insert(0, own)
        facts = replace(facts, scores=measured)
    else:
        if scores:
            raise ValueError(f"{source}: --scores are of fine-tuned networks, and this one is pre-trained; drop them")
        folder = pretrained_folder(path, decoder, key)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished.") as name:
        made = Path(name)
        write_model(made, folder.weights, folder.config, export_metadata(settings_of(folder.config)))
        compare_written(made, folder, path, str(out))
        (made / CARD_FILE).write_text(model_card(folder.config, facts), encoding="utf-8")
        for file in (WEIGHTS, CONFIG, CARD_FILE):
            os.replace(made / file, out / file)
    return folder


def files_in(folder: Path) -> list[Path]:
    """Return what a folder holds, in order; raise ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to write, got a file")
    return sorted(folder.iterdir()) if folder.exists() else []


def find_source(source: str | Path) -> Path:
    """Return the file that a source means; of a pre-training's run folder, its weights."""
    path = local_path(source)
    if not path.is_dir() or (path / "best.pth").is_file() or not (path / "config.yaml").is_file():
        return path
    settings = load_mapping(path / "config.yaml")
    if "mask_ratio" not in present_spelling(settings, PretrainConfig):
        return path
    config = replace(PretrainConfig(**typed_values(settings, PretrainConfig, str(path / "config.yaml"))), out=str(path))
    return checkpoint_file(config) if config.model == "hyspark" else encoder_file(config)


def is_segmentation(path: Path) -> bool:
    """Check whether a source is a network fine-tuned for segmentation.

    Raises:
        FileNotFoundError: There is no source.
        ValueError: It is a fine-tuned classifier, or damaged.
    """
    if path.is_dir() and not (path / "best.pth").is_file():
        return read_model_config(path).get("network") == "Segmenter"
    file = fine_tuned_file(path)
    kind = kind_of_contents(read_contents(file))
    if kind == "classification":
        raise ValueError(f"{file}: expected a segmentation network or pre-trained weights, got a fine-tuned classifier")
    return kind == "segmentation"


def segmentation_folder(path: Path) -> ModelFolder:
    """Describe a fine-tuned segmentation network."""
    network, config, names, _ = load_fine_tuned(path)
    made = Segmenter(names, config.in_channels, config.crop_shape, **segmenter_options(config))
    assert isinstance(made._hub_mixin_config, dict)
    return ModelFolder(made._hub_mixin_config, dict(network.state_dict()))


def segmenter_options(config: SegmentationConfig) -> dict[str, Any]:
    """Return the options of `Segmenter` that the settings describe."""
    return {name: getattr(config, name) for name in (*SHAPE, *DECODER)} | prediction_settings(config)


def pretrained_folder(path: Path, decoder: bool, key: str) -> ModelFolder:
    """Describe the weights of a pre-training: an encoder of this package, or a third-party network.

    Raises:
        ValueError: The settings of the network are unknown.
    """
    contents = read_contents(path)
    known = present_spelling(made_with(contents) or settings_beside(path), PretrainConfig)
    chosen, _ = choose_state_dict(contents, str(path), count_encoder, key=key)
    if not count_encoder(chosen.tensors):
        return third_party_folder(path, chosen.tensors, known, decoder, plan_in_file(contents, str(path)))
    weights = select_weights(chosen.tensors, str(path), None, decoder)
    needed = (*SHAPE, "crop_size", *(("decoder_width",) if decoder else ()))
    if missing := [name for name in needed if name not in known]:
        raise ValueError(
            f"{path}: its network is unknown, since the file names no {', '.join(missing)}; give the run folder, its "
            "file with the decoder, or weights that `hyspark export` wrote from that"
        )
    stem = weights["embeddings.stem.weight"]
    options = {name: known[name] for name in SHAPE} | {"axes": stem.ndim - 2}
    options["decoder_width"] = known["decoder_width"] if decoder else 0
    made = Encoder(stem.shape[1], edges(known, stem.ndim - 2), **options, preprocessing=preprocessing_of(known))
    assert isinstance(made._hub_mixin_config, dict)
    return ModelFolder(made._hub_mixin_config, weights)


def third_party_folder(
    path: Path, tensors: Mapping[str, Tensor], known: Mapping[str, Any], decoder: bool, plan: NnunetPlan | None
) -> ModelFolder:
    """Describe a third-party network that was pre-trained, by its own key names; with a plan of nnU-Net if it has one.

    Raises:
        ValueError: Its name is unknown.
    """
    method, _, name = str(known.get("model", "")).partition("/")
    if plan:
        method, name = str(known.get("method", method)), f"{PREFIX}{plan.configuration}"
        known = {"in_channels": len(known.get("image_channels", plan.schemes)), **known}
    if not (name and {"in_channels", "crop_size"} <= known.keys()):
        raise ValueError(f"{path}: its network is unknown; give the run folder of the pre-training, or the file in it")
    if decoder:
        raise ValueError(f"{path}: --decoder is of HySparK's own encoder, and this is {name}; drop it")
    own = {key.removeprefix(OWN_PREFIX): value for key, value in tensors.items() if key.startswith(OWN_PREFIX)}
    weights = own or dict(tensors)
    axes = 2 if known.get("slices", "none") != "none" else 3
    config = {
        "network": name if plan or name.startswith(NAMED_LIBRARIES) else OF_THE_AUTHOR,
        "method": method,
        "in_channels": known["in_channels"],
        "crop_size": edges(known, axes),
        "preprocessing": preprocessing_of(known),
    } | ({PLANS_KEY: plan.content | {"dataset_name": "not named"}} if plan else {})
    return ModelFolder({**LIBRARY, **to_plain(config, CONFIG)}, weights)


def edges(known: Mapping[str, Any], axes: int) -> list[int]:
    """Return the edges of a crop, one per axis."""
    given = known["crop_size"]
    sizes = [given] if isinstance(given, int) else list(given)
    return list(edges_per_axis(sizes[0] if len(sizes) == 1 else sizes, axes, "crop_size"))


def preprocessing_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of preparation that weights were made with; weights of before intensities are of CT."""
    found = {name: known[name] for name in field_info(PrepareSettings) if name in known}
    if not found:
        return {}
    found = {"intensity": ["ct"], "image_channels": [0], **found}
    if known.get("slices", "none") != "none":
        found |= {name: known[name] for name in ("slices", "slice_scaling") if name in known}
    if known.get("axis_order"):
        found["axis_order"] = known["axis_order"]
    unread = () if "ct" in str(found["intensity"]) else ("hu_min", "hu_max")
    return {name: value for name, value in found.items() if name not in unread}


def compare_written(out: Path, folder: ModelFolder, source: Path, name: str) -> None:
    """Compare weights and outputs of a folder with those of its source.

    Args:
        out: The folder.
        folder: What was written to it.
        source: The source.
        name: What messages call the folder.

    Raises:
        RuntimeError: They differ.
    """
    contents = read_contents(out / WEIGHTS)
    assert isinstance(contents, dict)
    written = contents["model"]
    same = written.keys() == folder.weights.keys() and all(
        torch.equal(written[name], value) for name, value in folder.weights.items()
    )
    config = folder.config
    if same and config["network"] in ("Encoder", "Segmenter"):
        axes = len(config["crop_size"])
        crop = torch.rand(1, config["in_channels"], *(32,) * axes, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if config["network"] == "Segmenter":
                maps = [Segmenter.from_pretrained(out)(crop)], [load_fine_tuned(source).network(crop)]
            else:
                maps = Encoder.from_pretrained(out)(crop), source_encoder(config, folder.weights)(crop)
        same = all(torch.equal(one, other) for one, other in zip(*maps, strict=True))
    if not same:
        raise RuntimeError(f"{name}: what is read from it differs from {source}; nothing is written")


def source_encoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HybridEncoder:
    """Build an encoder with weights as fine-tuning loads them."""
    sizes = {"widths": config["encoder_widths"], "depths": config["encoder_depths"], "expansions": config["expansions"]}
    shape = {name: config[name] for name in ("vit_depth", "num_heads")}
    axes = len(config["crop_size"])
    encoder = HybridEncoder(config["in_channels"], config["crop_size"], **sizes, **shape, axes=axes)
    load_pretrained(encoder, weights)
    return encoder.eval()
