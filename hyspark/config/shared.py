"""What the settings of all runs share: groups of fields as frozen dataclasses, with their checks.

A field's name is its YAML key (see recipes.py) and its flag. Names and defaults that users know from the published
command lines (`bs`, `ep`, `wd`, `max_epochs`, `optim_lr`, ...) are kept. The docstring below a field is its help text.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hyspark.config.checks import not_negative, one_of, positive
from hyspark.data.settings import PrepareSettings
from hyspark.models.encoder import DEPTHS, EXPANSIONS, WIDTHS

Precision = Literal["fp32", "bf16", "fp16", "auto"]


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Shape of the hybrid encoder; the defaults are HySparK-B of the paper."""

    encoder_widths: tuple[int, ...] = WIDTHS
    """Channels of the five stages; the last must be a multiple of num_heads and of 6."""
    encoder_depths: tuple[int, ...] = DEPTHS
    """MedNeXt blocks in each of the five stages."""
    expansions: tuple[int, ...] = EXPANSIONS
    """Expansion inside the blocks of the five stages."""
    vit_depth: int = 3
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads; they do not depend on the crop size."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training run has."""

    seed: int = 0
    """Batches, crops, masks and initial weights are functions of it."""
    precision: Precision = "fp32"
    """Number format of the forward pass (autocast); weights stay fp32. auto takes bf16 where the GPU has it, or the CPU
    has AVX-512 BF16 or AMX, else fp32; a run that is continued keeps its own.
    """
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    """What CUDA may compute in TF32 instead of fp32, faster and with 10 bits of mantissa: nothing, convolutions (as
    torch does by default), or matrix products too.
    """
    cudnn_benchmark: bool = False
    """Have cuDNN try its algorithms for every new shape and keep the fastest; on CUDA only, not with deterministic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    encoder_lr_share: float = 1.0
    """Learning rate of the encoder, as a share of that of the rest. Nothing normalises the encoder's features on their
    way down, so that large steps of its wide convolutions make a few directions grow until they drown all others;
    decoders bear much larger steps.
    """
    max_steps: int = 0
    """Stop after this many steps, without changing the schedule; 0 runs to the end."""
    save_every: int = 0
    """Also save a checkpoint every so many steps; 0 saves at the end of epochs only."""
    keep_last: int = 2
    """Resumable states that are kept: the newest, and older ones for the case that it gets damaged."""
    on_bad_case: Literal["stop", "skip"] = "stop"
    """What a case that cannot be used does before the first step: stop the run with a list of all such, or be left out
    of it and counted in the report. It is never replaced by another.
    """
    deterministic: bool = False
    """Only kernels on CUDA whose results do not change from run to run, so that a resumed run repeats an uninterrupted
    one bit for bit there, too. Slower; on the CPU it changes nothing.
    """
    replay: str = ""
    """Repeat one step, that a run of this kind stopped at for a loss or gradient that is not finite, on the CPU in
    fp32, from the file that it left (nonfinite_step_N.pth); all other settings come from there.
    """
    dataloader_workers: int = -1
    """Loader processes per rank; -1 takes one per available core, at most 8; 0 loads in the main process."""
    dry_run: bool = False
    """Print the resolved settings, the data found and the size of the model, for pre-training also what the run will
    take in time, memory and disk (by short trial steps), then stop; nothing is written.
    """


@dataclass(frozen=True, kw_only=True)
class VolumeSettings(RunSettings, PrepareSettings):
    """What every training run on volumes has."""

    prepare_workers: int = 0
    """Processes that prepare volumes; 0 takes one per available core."""
    store_dir: str = ""
    """Folder of prepared volumes, shared by all runs on the same data; by default `prepared` inside the data folder."""
    crops_per_volume: int = 4
    """Crops taken from each drawn volume."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: let torch.compile fuse the operations of each block, which takes minutes before the first step. Layers of
    third-party networks are not compiled. Not with deterministic.
    """


def check_run(config: Any) -> None:
    """Checks of RunSettings; raises ValueError."""
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
    if not 0 < config.encoder_lr_share <= 1:
        raise ValueError(f"encoder_lr_share must be above 0 and at most 1, but it is {config.encoder_lr_share}")
    if config.dataloader_workers < -1:
        raise ValueError(f"dataloader_workers is a count, or -1 for automatic; it is {config.dataloader_workers}")


def check_volumes(config: VolumeSettings) -> None:
    """Checks of VolumeSettings; raises ValueError."""
    not_negative(config, "prepare_workers")
    positive(config, "crops_per_volume")
    if config.deterministic and config.compile != "none":
        raise ValueError("compile makes no promise that kernels repeat, which deterministic does; drop one of the two")
    if min(config.spacing) <= 0:
        raise ValueError(f"spacing must be above 0 mm on each axis, but it is {config.spacing}")
    if config.hu_min >= config.hu_max:
        raise ValueError(f"hu_min must lie below hu_max, but they are {config.hu_min} and {config.hu_max}")


def check_shares(config: Any) -> None:
    """Checks of how much a fine-tuning learns from and how fast its layers do; raises ValueError."""
    if max(config.label_fraction, config.layer_decay) > 1:
        raise ValueError(
            f"label_fraction and layer_decay are at most 1, but they are {config.label_fraction} and "
            f"{config.layer_decay}"
        )
    if not 0 < config.pretrained_lr_share <= 1:
        raise ValueError(f"pretrained_lr_share must be above 0 and at most 1, but it is {config.pretrained_lr_share}")
    if config.num_labelled and config.label_fraction != 1:
        raise ValueError("num_labelled and label_fraction say the same in two ways; name one of them")


def check_encoder(config: EncoderSettings) -> None:
    """Checks of EncoderSettings that need no model; raises ValueError."""
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
