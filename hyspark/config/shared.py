"""Settings that all runs share: groups of fields as frozen dataclasses, with their checks.

A field's name is its YAML key (see recipes.py) and its flag; its docstring is the help text. What else is known of it
is metadata of the field (`FieldInfo`): its group in the help, earlier spellings, whether a resumed run may change it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hyspark.config.checks import not_negative, one_of, positive
from hyspark.data.intensity import check_intensity
from hyspark.data.settings import PrepareSettings
from hyspark.models.defaults import DEPTHS, EXPANSIONS, WIDTHS
from hyspark.utils.settings import setting

Precision = Literal["fp32", "bf16", "fp16", "auto"]
ENCODER_FIELD: dict[str, Any] = {"group": "network", "methods": ("hyspark",)}
MACHINE_FIELD: dict[str, Any] = {"group": "machine", "may_change": True, "affects_results": False}


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Shape of the hybrid encoder; the defaults are HySparK-B of the paper."""

    encoder_widths: tuple[int, ...] = setting(WIDTHS, **ENCODER_FIELD)
    """Channels of the five stages; the last is a multiple of num_heads and of 6."""
    encoder_depths: tuple[int, ...] = setting(DEPTHS, **ENCODER_FIELD)
    """MedNeXt blocks in each of the five stages."""
    expansions: tuple[int, ...] = setting(EXPANSIONS, **ENCODER_FIELD)
    """Expansion ratio inside the blocks of each of the five stages."""
    vit_depth: int = setting(3, **ENCODER_FIELD)
    """Transformer blocks."""
    num_heads: int = setting(12, **ENCODER_FIELD)
    """Attention heads."""


def encoder_options(settings: Any) -> dict[str, Any]:
    """Return the options of `HybridEncoder` that EncoderSettings, or flags of the same names, describe."""
    return {
        "widths": settings.encoder_widths,
        "depths": settings.encoder_depths,
        "expansions": settings.expansions,
        "vit_depth": settings.vit_depth,
        "num_heads": settings.num_heads,
    }


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of every training run."""

    seed: int = setting(0, "run")
    """Seed of batches, crops, masks and initial weights."""
    weights_key: str = setting("", "network")
    """Key of the state dict in the weights file, if it holds several that match equally well: model_ema, student."""
    max_steps: int = setting(0, "run", may_change=True)
    """Stop after this many steps, with an unchanged schedule; 0 runs to the end."""
    save_every: int = setting(0, "run", may_change=True, affects_results=False)
    """Steps between checkpoints; 0 saves at the end of epochs only."""
    keep_last: int = setting(2, "run", may_change=True, affects_results=False)
    """Checkpoints that are kept. An older one serves if the newest is damaged."""
    on_bad_case: Literal["stop", "skip"] = setting("stop", "run", may_change=True, affects_results=False)
    """What an unreadable case does. stop: end the run before its first step, with a list of such cases. skip:
    exclude them and count them in the report.
    """
    replay: str = setting("", "run", may_change=True, affects_results=False)
    """Repeat one step on the CPU in fp32, from the file nonfinite_step_N.pth. A run writes it when its loss or gradient
    is not finite. All other settings come from that file.
    """
    dry_run: bool = setting(False, "run", may_change=True, affects_results=False)
    """Print the resolved settings, the data and the size of the network, then stop. Pre-training also estimates time,
    memory and disk space by short trial steps. Nothing is written.
    """
    encoder_lr_ratio: float = setting(1.0, "optimisation", old=("encoder_lr_share",))
    """Learning rate of the encoder divided by that of all other weights. The encoder's wide convolutions need smaller
    steps than decoders do: its features are not normalised, and with large steps a few directions outgrow all others.
    """
    precision: Precision = setting("fp32", "machine")
    """Precision of the forward pass (autocast); weights stay fp32. auto: bf16 if the GPU supports it, or the CPU has
    AVX-512 BF16 or AMX; else fp32. A resumed run keeps its own.
    """
    tf32: Literal["none", "convolutions", "all"] = setting("convolutions", **MACHINE_FIELD)
    """Operations that CUDA may compute in TF32 instead of fp32, faster and with a mantissa of 10 bits. convolutions is
    torch's default; all adds matrix products.
    """
    cudnn_benchmark: bool = setting(False, **MACHINE_FIELD)
    """Let cuDNN time its algorithms for every new shape and keep the fastest. CUDA only; not with deterministic."""
    deterministic: bool = setting(False, **MACHINE_FIELD)
    """On CUDA, use only kernels that repeat bit for bit, so that a resumed run equals an uninterrupted one. Slower. The
    CPU always repeats.
    """
    device: Literal["auto", "cpu", "cuda"] = setting("auto", **MACHINE_FIELD)
    """Device; auto uses CUDA if it is available."""
    dataloader_workers: int = setting(-1, **MACHINE_FIELD)
    """Loader processes per rank. -1: one per available core, at most 8. 0: load in the main process."""


@dataclass(frozen=True, kw_only=True)
class VolumeSettings(RunSettings, PrepareSettings):
    """Settings of every training run on volumes."""

    fold: int = setting(0, "data")
    """Fold whose cases are for validation, if the data list or the data set's splits_final.json has folds."""
    crops_per_volume: int = setting(4, "data")
    """Crops taken from each drawn volume."""
    store_dir: str = setting("", **MACHINE_FIELD)
    """Folder of prepared volumes, shared by all runs on the same data; by default `prepared` in the data folder."""
    prepare_workers: int = setting(0, **MACHINE_FIELD)
    """Processes that prepare volumes; 0 uses one per available core."""
    compile: Literal["none", "blocks"] = setting("none", **{**MACHINE_FIELD, "methods": ("hyspark", "spark")})
    """blocks: torch.compile fuses the operations of each block, which takes minutes before the first step. Layers of
    third-party networks are not compiled. Not with deterministic.
    """


def check_run(config: Any) -> None:
    """Check RunSettings.

    Raises:
        ValueError: A value does not fit.
    """
    if config.weights == "":  # the earlier spelling of none
        object.__setattr__(config, "weights", "none")
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            one_of(name, getattr(config, name), get_args(hint))
    for name, value in asdict(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            raise ValueError(f"{name} must be finite, but it is {value}")
    not_negative(config, "seed", "max_steps", "save_every")
    positive(config, "keep_last")
    if config.deterministic and config.cudnn_benchmark:
        raise ValueError("cudnn_benchmark may choose other kernels in every run, which deterministic forbids; drop one")
    if not 0 < config.encoder_lr_ratio <= 1:
        raise ValueError(f"encoder_lr_ratio must be above 0 and at most 1, but it is {config.encoder_lr_ratio}")
    if config.dataloader_workers < -1:
        raise ValueError(f"dataloader_workers is a count, or -1 for automatic; it is {config.dataloader_workers}")


def check_volumes(config: VolumeSettings) -> None:
    """Check VolumeSettings.

    Raises:
        ValueError: A value does not fit.
    """
    not_negative(config, "prepare_workers", "fold")
    positive(config, "crops_per_volume")
    if config.deterministic and config.compile != "none":
        raise ValueError("compile does not promise that kernels repeat, which deterministic needs; drop one of the two")
    check_preparation(config)
    check_channels(config)


def check_preparation(config: PrepareSettings) -> None:
    """Check PrepareSettings.

    Raises:
        ValueError: A value does not fit.
    """
    if min(config.spacing) <= 0:
        raise ValueError(f"spacing must be above 0 mm on each axis, but it is {config.spacing}")
    if config.hu_min >= config.hu_max:
        raise ValueError(f"hu_min must lie below hu_max, but they are {config.hu_min} and {config.hu_max}")
    check_intensity(config)


def check_channels(config: Any) -> None:
    """Set in_channels to the number of image_channels where there are several and it has its default.

    Raises:
        ValueError: It has another value.
    """
    num = config.num_image_channels
    if num > 1 and config.in_channels == type(config).in_channels:
        object.__setattr__(config, "in_channels", num)
    if num > 1 and config.in_channels != num:
        raise ValueError(
            f"in_channels: expected {num}, the number of image_channels, got {config.in_channels}; drop in_channels"
        )


def check_finetuning(config: Any) -> None:
    """Check the settings that both kinds of fine-tuning share: subsets of labels, and learning rates by layer.

    Raises:
        ValueError: A value does not fit.
    """
    if max(config.label_fraction, config.layer_decay) > 1:
        raise ValueError(
            f"label_fraction and layer_decay are at most 1, but they are {config.label_fraction} and "
            f"{config.layer_decay}"
        )
    if not 0 < config.pretrained_lr_ratio <= 1:
        raise ValueError(f"pretrained_lr_ratio must be above 0 and at most 1, but it is {config.pretrained_lr_ratio}")
    if config.num_labelled and config.label_fraction != 1:
        raise ValueError("num_labelled and label_fraction both set the number of labelled cases; set one of them")


def check_encoder(config: EncoderSettings) -> None:
    """Check EncoderSettings, as far as this needs no network.

    Raises:
        ValueError: A value does not fit.
    """
    for name in ("encoder_widths", "encoder_depths", "expansions"):
        values = getattr(config, name)
        if len(values) != len(WIDTHS) or min(values) < 1:
            raise ValueError(f"{name} takes {len(WIDTHS)} positive numbers, one per stage, but got {list(values)}")
    positive(config, "vit_depth", "num_heads")
    last = config.encoder_widths[-1]
    if last % config.num_heads or last % 6:
        raise ValueError(
            f"the last of encoder_widths must be a multiple of 6 and of num_heads={config.num_heads}; it is {last}"
        )
