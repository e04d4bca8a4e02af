"""The encoder that vectors are pooled from: of any file of weights, with the preparation that it was made with."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from hyspark.config.nnunet import find_plan, plan_in_file, settings_of_plan
from hyspark.config.pretrain import METHODS, PretrainConfig
from hyspark.config.recipes import present_spelling, typed_values
from hyspark.config.shared import EncoderSettings, check_preparation, encoder_options
from hyspark.data.settings import Axis, PrepareSettings
from hyspark.evaluation.embedding.slice_encoder import SLICES_PER_WINDOW, SliceEncoder, drop_axis, insert_axis
from hyspark.evaluation.embedding.turned_encoder import TurnedEncoder
from hyspark.evaluation.network_kind import kind_of_contents
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.models.backbones import build_backbone
from hyspark.models.defaults import grid_of
from hyspark.models.encoder import HybridEncoder
from hyspark.models.nnunet_network import build_from_plan
from hyspark.models.nnunet_plans import PREFIX, NnunetPlan, is_plan, read_plan, split_plan_name, to_network_axes
from hyspark.models.spark import PyramidEncoder
from hyspark.models.weights.export import count_encoder
from hyspark.models.weights.files import made_with, read_contents
from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.load import encoder_shape, load_pretrained
from hyspark.models.weights.model_folder import find_weights, is_own_config, read_model_config
from hyspark.models.weights.nnunet_settings import HU_WINDOWS
from hyspark.models.weights.search import choose_state_dict
from hyspark.training.initial_weights import (
    INPUT_SETTINGS,
    as_values,
    axis_order_of,
    differing_inputs,
    expanded,
    initialise,
    settings_beside,
)
from hyspark.utils.log import LOG
from hyspark.utils.settings import field_info

DEFAULT_WINDOW = (96, 96, 96)
RELEASED_ENDING = "_1kpretrained_timm_style.pth"
IN_NO_SHAPE = ("num_heads", "slices", "slice_scaling", "axis_order")
"""Settings that an encoder computes by, and that no shape of its weights shows."""


@dataclass(frozen=True)
class NetworkChoice:
    """Which network a file of weights is of, and what replaces the settings that it was made with.

    Attributes:
        weights: File of weights, a run folder, a folder of `hyspark export --hf`, or an address hf://OWNER/NAME.
        model: Third-party network, "monai/resnet18"; empty for what the file names, or HySparK's own.
        weights_key: Key of the state dict in the file, if it holds several.
        window: Voxels per axis of a window, one number or three; empty for the crop size of the weights.
        inputs: Values of `PrepareSettings` by name.
    """

    weights: Path
    model: str = ""
    weights_key: str = ""
    window: tuple[int, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingNetwork:
    """An encoder on the CPU, in evaluation mode.

    Attributes:
        encoder: (b, c, *size) -> maps, finest first.
        build: Builds the same network, randomly initialised by torch's generator.
        settings: How volumes are prepared for it.
        window: Voxels per axis of a window.
        unit: Edges that windows are multiples of, the total stride.
        stages: Channels and stride of each map, finest first.
        name: Name of the network.
        digest: Digest of the encoder's weights, and of what it computes by besides them.
    """

    encoder: nn.Module
    build: Callable[[], nn.Module]
    settings: PrepareSettings
    window: tuple[int, ...]
    unit: tuple[int, ...]
    stages: list[tuple[int, tuple[int, ...]]]
    name: str
    digest: str

    def random(self, seed: int) -> nn.Module:
        """Build the same network with random weights of a seed."""
        return initialise(self.build, seed).eval()


def load_embedding_network(choice: NetworkChoice) -> EmbeddingNetwork:
    """Load the encoder of a file of weights. Nothing stored in it is executed.

    Raises:
        FileNotFoundError: There is no such file or repository.
        OSError: A download failed.
        ValueError: The file holds no encoder of volumes; settings do not fit it.
    """
    path = weights_path(choice.weights)
    if path.is_dir() and read_model_config(path).get("network") == "Segmenter":
        return of_segmentation(path, choice)
    contents = read_contents(path)
    kind = kind_of_contents(contents)
    if kind == "classification":
        raise ValueError(f"{path}: expected weights of a network of volumes, got a classifier of images")
    if kind == "segmentation":
        return of_segmentation(path, choice)
    plan = None if choice.model else plan_in_file(contents, str(path))
    made = present_spelling(made_with(contents) or settings_beside(path), PretrainConfig, str(path))
    described = str(read_model_config(path).get("network", "")) if path.is_dir() else ""
    model = choice.model or str(made.get("model", described if "/" in described else "hyspark"))
    method, _, rest = model.partition("/")
    model = rest if method in METHODS and rest else model
    if plan or is_plan(model):
        return of_third_party(path, choice, made, model, plan or plan_of(path, choice, model))
    if model != "hyspark":
        return of_third_party(path, choice, made, model)
    weights = choose_state_dict(contents, str(path), count_encoder, key=choice.weights_key)[0].tensors
    if not count_encoder(weights):
        raise ValueError(
            f"{path}: no key is one of HySparK's encoder, and the file does not name its network; name it, as in "
            "--model monai/resnet18"
        )
    settings = settings_for(path, made, choice.inputs)
    shape = encoder_shape(weights) | {name: made[name] for name in field_info(EncoderSettings) if name in made}
    options = encoder_options(EncoderSettings(**typed_values(shape, EncoderSettings, str(path))))
    window = window_of(choice.window, made)
    build = partial(HybridEncoder, settings.num_image_channels, checked_window(window, (16, 16, 16)), **options)
    encoder = build()
    LOG.info("%s\n%s", path, load_pretrained(encoder, path, choice.weights_key))
    return finished_network(encoder, build, settings, window, "hyspark", shape)


def weights_path(source: Path) -> Path:
    """Return the file of weights of a run folder, the folder of an address; any other path unchanged.

    Raises:
        FileNotFoundError: A folder holds no weights, or several; there is no such repository.
    """
    path = local_path(source)
    if not path.is_dir():
        return path
    if (path / "best.pth").is_file():
        return path / "best.pth"
    if is_own_config(read_model_config(path)):
        return path
    found = sorted(path.glob(f"*{RELEASED_ENDING}"))
    if len(found) == 1:
        return found[0]
    if not found and find_weights(path):
        return path
    raise FileNotFoundError(
        f"{path}: expected a run folder with best.pth or one *{RELEASED_ENDING}, or a folder of `hyspark export --hf`, "
        f"found {len(found)} such files"
    )


def of_segmentation(path: Path, choice: NetworkChoice) -> EmbeddingNetwork:
    """Load the encoder of a network that was fine-tuned for segmentation."""
    if choice.model or choice.weights_key:
        raise ValueError(f"{path}: a fine-tuned network names its own; drop --model and --weights_key")
    network, config, _, _ = load_network(path)
    made = {name: getattr(config, name) for name in (*INPUT_SETTINGS, "crop_size")}
    settings = settings_for(path, made, choice.inputs)
    window = window_of(choice.window, made)
    build = partial(HybridEncoder, config.in_channels, checked_window(window, (16, 16, 16)), **encoder_options(config))
    encoder = build()
    own = {key: value for key, value in network.state_dict().items() if key in encoder.state_dict()}
    encoder.load_state_dict(own | {"mae.pos_embed": encoder.state_dict()["mae.pos_embed"]})
    return finished_network(encoder, build, settings, window, "hyspark", vars(config))


def of_third_party(
    path: Path, choice: NetworkChoice, made: Mapping[str, Any], model: str, plan: NnunetPlan | None = None
) -> EmbeddingNetwork:
    """Load a third-party network of volumes, or of their 2D slices; with a plan of nnU-Net, the network of the plan."""
    of_images = model.startswith(("timm/", "torchvision/"))
    if plan:
        model = f"{PREFIX}{plan.configuration}"
        known = {name: value for name, value in {**made, **choice.inputs}.items() if name in INPUT_SETTINGS}
        made = {**settings_of_plan(plan, known), **made}
    slices = made.get("slices", "axial" if of_images else "none")
    axis = None if slices == "none" else get_args(Axis).index(slices)
    settings = settings_for(path, made, choice.inputs)
    window = window_of(choice.window, made, axis)
    channels = made.get("in_channels", 3 if of_images else settings.num_image_channels)
    order = axis_order_of(made)

    def build() -> TurnedEncoder | SliceEncoder:
        backbone = (
            build_from_plan(plan, channels) if plan else build_backbone(model, channels, 3 if axis is None else 2)
        )
        crop = to_network_axes(window, order) if axis is None else drop_axis(window, axis)
        encoder = PyramidEncoder(backbone.network, crop, channels, run=backbone.run)
        if axis is None:
            return TurnedEncoder(encoder, order)
        return SliceEncoder(encoder, axis, made.get("slice_scaling") == "minmax")

    try:
        encoder = build()
    except ValueError as error:
        raise ValueError(f"--window: {error}" if str(error).startswith("crop size") else str(error)) from error
    LOG.info("%s\n%s", path, load_pretrained(encoder.backbone, path, choice.weights_key))
    return finished_network(encoder, build, settings, window, model, made)


def plan_of(path: Path, choice: NetworkChoice, model: str) -> NnunetPlan:
    """Read the plan of a network nnunet/PLANS.json: the copy in the run folder, unless the flag names another."""
    if choice.model:
        return read_plan(*split_plan_name(model))
    return find_plan(f"spark/{model}", path.parent)


def finished_network(
    encoder: Any,
    build: Callable[[], nn.Module],
    settings: PrepareSettings,
    window: tuple[int, ...],
    name: str,
    made: Mapping[str, Any],
) -> EmbeddingNetwork:
    """Put an encoder into evaluation mode, and find its stages by a pass over one window of zeros.

    Args:
        encoder: The encoder.
        build: Builds it with random weights.
        settings: How volumes are prepared for it.
        window: Voxels per axis of a window.
        name: Name of the network.
        made: Settings that it was built by.
    """
    encoder = encoder.eval()
    unit = encoder.patch
    checked_window(window, unit)
    with torch.no_grad():
        maps = encoder(torch.zeros(1, settings.num_image_channels, *window))
    stages = [(x.shape[1], tuple(w // n for w, n in zip(window, x.shape[2:], strict=True))) for x in maps]
    return EmbeddingNetwork(encoder, build, settings, window, unit, stages, name, encoder_digest(encoder, made))


def encoder_digest(encoder: nn.Module, made: Mapping[str, Any]) -> str:
    """Compute the digest of an encoder's weights, by whichever file and key they came, and of settings beside them."""
    digest = hashlib.sha256(repr([as_plain_value(made.get(name)) for name in IN_NO_SHAPE]).encode())
    for key, value in encoder.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def as_plain_value(value: object) -> object:
    """Return a list as a tuple, which a file may hold either way."""
    return tuple(value) if isinstance(value, list) else value


def settings_for(path: Path, made: Mapping[str, Any], given: Mapping[str, Any]) -> PrepareSettings:
    """Return how volumes are prepared: as for the weights, with what is given instead; warn of differences.

    Args:
        path: File of the weights, for messages.
        made: Settings that the weights were made with; empty if unknown.
        given: Settings that replace them.

    Raises:
        ValueError: A value does not fit.
    """
    known = {name: made[name] for name in INPUT_SETTINGS if name in made}
    of_weights = PrepareSettings(**typed_values(known, PrepareSettings, str(path)))
    settings = replace(of_weights, **given)
    check_preparation(settings)
    if not known:
        missing = [name for name in ("spacing", "intensity") if name not in given]
        taken = "; ".join(f"{name} {' '.join(map(str, getattr(settings, name)))}" for name in missing)
        if missing:
            LOG.warning(
                "%s does not say how its volumes were prepared; taken: %s; --spacing, --intensity, --hu_min and "
                "--hu_max set it",
                *(path, taken),
            )
        return settings
    if HU_WINDOWS in made:
        for name, values, others in differing_inputs(settings, made):
            if name in ("hu_min", "hu_max") and name not in given:
                shown = (" ".join(map(str, one)) for one in (others, values))
                LOG.warning(
                    "%s was made with %s %s by channel, volumes are embedded with %s for all", path, name, *shown
                )
    for name in given:
        own, other = (as_values(getattr(one, name), name == "intensity") for one in (settings, of_weights))
        longest = max(len(own), len(other))
        if expanded(own, longest) != expanded(other, longest):
            shown = (" ".join(map(str, values)) for values in (other, own))
            LOG.warning("%s was made with %s %s, volumes are embedded with %s", path, name, *shown)
    return settings


def window_of(given: tuple[int, ...], made: Mapping[str, Any], axis: int | None = None) -> tuple[int, ...]:
    """Return the voxels per axis of a window: what is given, else the crop size of the weights, else 96.

    Args:
        given: One number, or three.
        made: Settings that the weights were made with.
        axis: Axis that slices are perpendicular to; a window that is given by the size of a slice has several.
    """
    edges = given or tuple(made.get("crop_size", DEFAULT_WINDOW))
    if len(edges) not in (1, 3, *(() if given or axis is None else (2,))) or min(edges) < 1:
        raise ValueError(f"--window: expected one number of voxels or three, got {' '.join(map(str, edges))}")
    if axis is not None and len(edges) < 3:
        return insert_axis(edges * 2 if len(edges) == 1 else edges, axis, SLICES_PER_WINDOW)
    return edges * 3 if len(edges) == 1 else edges


def checked_window(window: tuple[int, ...], unit: tuple[int, ...]) -> tuple[int, ...]:
    """Return a window; raise ValueError unless it is a multiple of the network's total stride."""
    try:
        grid_of(window, unit)
    except ValueError as error:
        raise ValueError(f"--window: {str(error).removeprefix('crop size: ')}") from None
    return window
