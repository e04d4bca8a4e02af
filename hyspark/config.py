"""Settings of a run as frozen dataclasses, with all their validation.

A field's name is its YAML key (see recipes.py) and its flag. Names and defaults that users know from the published
command lines (`bs`, `ep`, `wd`, `max_epochs`, `optim_lr`, ...) are kept. The docstring below a field is its help text.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hyspark.data.settings import PrepareSettings
from hyspark.models.encoder import DEPTHS, EXPANSIONS, WIDTHS
from hyspark.models.masking import grid_of


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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass (autocast); weights stay fp32."""
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


METHODS = ("hyspark", "spark", "moco", "byol", "swav")
"""Of pre-training."""
VIEW_METHODS = METHODS[2:]
READ_BY = {
    **dict.fromkeys((field.name for field in fields(EncoderSettings)), METHODS[:1]),
    **dict.fromkeys(("compute", "hide"), METHODS[:1]),
    **dict.fromkeys(("mask", "decoder_width"), METHODS[:2]),
    **dict.fromkeys(("view_scale", "head_width"), VIEW_METHODS),
    **{"local_views": ("swav",), "prototypes": ("swav",), "queue_size": ("moco",), "momentum": ("moco", "byol")},
}
"""Settings that not all methods read, with those that do."""


@dataclass(frozen=True, kw_only=True)
class VolumeSettings(RunSettings, PrepareSettings):
    """What every training run on volumes has."""

    prepare_workers: int = 0
    """Processes that prepare volumes; 0 takes one per available core."""
    store_dir: str = ""
    """Folder of prepared volumes, shared by all runs on the same data; by default `prepared` inside the data folder."""
    crops_per_volume: int = 4
    """Crops taken from each drawn volume."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(VolumeSettings, EncoderSettings):
    """Masked pre-training (`train.py`, `hyspark pretrain`)."""

    exp_name: str = "debug"
    """Name of the run, used in its report and for the default of exp_dir."""
    exp_dir: str = ""
    """Run folder; by default ckpt/<exp_name>. The same command on it continues the run."""
    data_path: str = "data"
    """Folder with dataset.json, or the path of such a JSON."""
    model: str = "hyspark"
    """Network to pre-train: hyspark; or a method and a backbone, as spark/timm/resnet50, spark/torchvision/resnet50,
    spark/monai/segresnet (in 3D too), or spark/mypackage.module:factory for one of your own. Methods: spark masks;
    moco, byol and swav compare views of the same crop.
    """
    slices: Literal["none", "sagittal", "coronal", "axial"] = "none"
    """Take planes of the prepared volumes instead of crops, for networks of two axes."""
    slice_stride: int = 1
    """Planes whose number is a multiple of this."""
    slice_scaling: Literal["window", "minmax"] = "window"
    """Intensities of planes: the window of preparation to 0..1, or each plane's own smallest to largest value."""
    channels: int = 1
    """Times that the image is given to the network, one beside the other; networks made for photographs take 3."""
    compute: Literal["packed", "masked"] = "packed"
    """How hidden voxels are left out: packed, or the readable reference."""
    hide: Literal["everywhere", "convolutions", "input"] = "everywhere"
    """Where hidden patches are left out: everywhere is the method. For ablations: in the convolutions alone, so that
    the transformer works on all tokens; or in the input alone, as zeros.
    """
    bs: int = 4
    """Volumes per step, over all processes; each gives crops_per_volume crops."""
    mask: float = 0.75
    """Share of patches that are hidden."""
    view_scale: float = 0.6
    """Of moco, byol and swav: shortest edge of the part of a crop that becomes a view, as a share of the crop's."""
    local_views: int = 0
    """Of swav: further views, of small parts and half the size."""
    head_width: int = 2048
    """Of moco, byol and swav: hidden features of the projection that the loss sees."""
    momentum: float = 0.99
    """Of moco and byol: how slowly the copy that gives the targets follows; it rises to 1 by a cosine."""
    queue_size: int = 4096
    """Of moco: earlier crops that a crop is told from."""
    prototypes: int = 300
    """Of swav: clusters."""
    input_size: tuple[int, ...] = (96,)
    """Edge of a crop in voxels, one number or one per axis; multiples of 16."""
    decoder_width: int = 768
    """Channels of the reconstruction decoder at its deepest level; a multiple of 16."""
    base_lr: float = 1e-4
    """Peak learning rate, not scaled by the batch."""
    ep: int = 100
    """Epochs: passes over the training volumes."""
    wp_ep: int = 40
    """Warm-up epochs."""
    wd: float = 0.04
    """Weight decay at the start."""
    wde: float = 0.2
    """Weight decay at the end, reached by a cosine."""
    clip: float = 5.0
    """Largest norm of the gradient; 0 does not clip."""
    init_weight: str = ""
    """Weights to start from: an encoder or pre-training checkpoint, or a published file for a network of others. The
    optimizer starts fresh, and so do the heads of moco, byol and swav.
    """
    resume_from: str = ""
    """Checkpoint (with decoder) of another run folder to continue from; a run's own folder is continued without it."""
    val_fraction: float = 0.02
    """Share of volumes held out for the validation loss where the data list has no validation part; at least one."""
    flip_prob: tuple[float, float, float] = (0.2, 0.2, 0.1)
    """Probability of a flip on each axis."""
    picture_every: int = 5
    """Epochs between reconstruction pictures; 0 makes them after the last epoch only."""
    probe_data: str = ""
    """Labelled data (an nnU-Net data set folder, or a decathlon JSON) that the features are tried on while they are
    learned: Dice of a linear classifier of voxels. Only training cases of it are used; empty for none.
    """
    probe_every: int = 1
    """Epochs between such probes; one is always taken before the first step and after the last."""
    probe_cases: int = 8
    """Labelled volumes of the probe: half of them fit the classifier, the others score it."""

    def __post_init__(self) -> None:
        check_run(self)
        check_volumes(self)
        check_encoder(self)
        positive(self, "bs", "ep", "decoder_width", "probe_every", "slice_stride", "channels")
        positive(self, "head_width", "queue_size", "prototypes")
        not_negative(self, "wp_ep", "wd", "wde", "clip", "picture_every", "local_views")
        if self.probe_cases < 2:
            raise ValueError(f"probe_cases is at least 2, to fit on one and score on another; it is {self.probe_cases}")
        between(self, "val_fraction", 0, 1)
        axes = 3 if self.slices == "none" else 2
        if len(self.input_size) not in (1, axes):
            several = "three" if axes == 3 else "two"
            raise ValueError(f"input_size takes one number or {several}, but got {list(self.input_size)}")
        if self.model == "hyspark":
            grid_of(self.crop_size)
            if self.channels != 1:
                raise ValueError(f"hyspark takes one channel, but channels is {self.channels}")
        elif self.method not in METHODS or not self.model.partition("/")[2]:
            raise ValueError(
                f"model must be hyspark, or a method and a backbone (spark/timm/resnet50), not {self.model!r}; methods "
                f"are {', '.join(METHODS[1:])}" + nearest(self.method, METHODS)
            )
        default = {field.name: field.default for field in fields(self)}
        unread = [name for name, methods in READ_BY.items() if self.method not in methods]
        if given := [name for name in unread if getattr(self, name) != default[name]]:
            raise ValueError(f"{', '.join(given)}: not read by {self.method}; leave out for {self.model}")
        between(self, "momentum", 0, 1)
        if not 0 < self.view_scale <= 1:
            raise ValueError(f"view_scale must be above 0 and at most 1, but it is {self.view_scale}")
        if self.method in VIEW_METHODS and self.bs * self.crops_per_volume < 2:
            raise ValueError(f"{self.method} compares images: a step takes two crops or more (bs, crops_per_volume)")
        if self.method == "moco" and self.queue_size % (self.bs * self.crops_per_volume):
            raise ValueError(
                f"queue_size must be a multiple of the {self.bs * self.crops_per_volume} crops of a step, but it is "
                f"{self.queue_size}"
            )
        if self.slices == "none" and (self.slice_stride != 1 or self.slice_scaling != "window"):
            raise ValueError("slice_stride and slice_scaling are for planes; name them by slices, or leave these out")
        if self.probe_data and (self.slices != "none" or self.model != "hyspark"):
            raise ValueError("the probe is of hyspark's crops; leave out probe_data for planes and other networks")
        if not 0 < self.mask < 1:
            raise ValueError(f"mask must lie between 0 and 1 (the share of hidden patches), but it is {self.mask}")
        if self.base_lr <= 0:
            raise ValueError(f"base_lr must be above 0, but it is {self.base_lr}")
        check_probabilities("flip_prob", self.flip_prob)

    @property
    def method(self) -> str:
        """The first part of the model's name."""
        return self.model.partition("/")[0]

    @property
    def crop_size(self) -> tuple[int, ...]:
        """Voxels per axis of what the network sees: three, or two of a plane."""
        axes = 3 if self.slices == "none" else 2
        return self.input_size * axes if len(self.input_size) == 1 else self.input_size

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(self.exp_dir or f"ckpt/{self.exp_name}")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(VolumeSettings, EncoderSettings):
    """Fine-tuning for segmentation (`finetune_btcv.py`, `hyspark finetune`)."""

    data_dir: str = "data"
    """Folder of labelled data: with a decathlon JSON (json_list), or an nnU-Net data set (imagesTr, labelsTr)."""
    json_list: str = ""
    """Decathlon JSON inside data_dir, or its path. By default dataset.json where it is a data list, else the nnU-Net
    folders.
    """
    logdir: str = "ckpt/finetune"
    """Run folder. The same command on it continues the run."""
    pretrained: str = "none"
    """Weights to start from: a checkpoint's path, or none to train from scratch."""
    decoder: Literal["released", "light"] = "released"
    """The released network's decoder, which always starts fresh, or the light one of pre-training, which takes over
    its weights too where the file has them (hyspark export --decoder) and needs half the time a step.
    """
    decoder_width: int = 768
    """Channels of the light decoder at its deepest level, as in pre-training; a multiple of 16."""
    num_labelled: int = 0
    """Train on so many of the training cases, drawn by the seed: those of 5 are among those of 10. 0 takes all."""
    label_fraction: float = 1.0
    """Train on this share of the training cases, drawn in the same way, at least one."""
    test_dir: str = ""
    """Further labelled cases (an nnU-Net data set, or a decathlon JSON), all of them scored once at the end."""
    max_epochs: int = 5000
    """Epochs; what one is, steps_per_epoch says."""
    steps_per_epoch: int = 0
    """Steps in an epoch; 0 takes as many as let every training case come once. With a number, runs on few and on many
    cases have the same budget.
    """
    val_every: int = 100
    """Epochs between validations."""
    batch_size: int = 1
    """Cases per step, over all processes; each gives crops_per_volume crops."""
    accumulate: int = 1
    """Passes in which the crops of a step go through the network, to save memory: gradients are summed, the step stays
    the same.
    """
    optim_lr: float = 1e-4
    """Peak learning rate."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the encoder, as a share of that of the layer above it; 1 for the same everywhere.
    """
    freeze_epochs: int = 0
    """Epochs at the start in which the encoder is left as it is and the decoder alone learns."""
    reg_weight: float = 1e-5
    """Weight decay."""
    warmup_epochs: int = 50
    """Epochs of linear warm-up."""
    lrschedule: Literal["warmup_cosine", "constant"] = "warmup_cosine"
    """Learning rate after the warm-up: a cosine to 0, or constant."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    infer_overlap: float = 0.5
    """Overlap of neighbouring windows in validation."""
    sw_batch_size: int = 4
    """Windows per forward pass in validation."""
    roi_x: int = 96
    """Crop edge on the first axis; a multiple of 16."""
    roi_y: int = 96
    """Crop edge on the second axis."""
    roi_z: int = 96
    """Crop edge on the third axis."""
    in_channels: int = 1
    """Image channels."""
    out_channels: int = 0
    """Classes with background; 0 takes the number from the data set's labels, or 14 where it names none."""
    labelled_prob: float = 0.5
    """Probability that a crop is centred on a voxel of an organ; otherwise on another voxel of the foreground."""
    background_weight: float = 1.0
    """Weight of the background in the loss, beside 1 for each organ. Below 1, networks that start from nothing find
    small organs much sooner: with equal weights they first learn to call everything background.
    """
    val_fraction: float = 0.2
    """Share of cases held out where neither the data list nor a splits.json names validation cases."""
    flip_prob: tuple[float, float, float] = (0.2, 0.2, 0.2)
    """Probability of a flip on each axis. Where left and right organs are classes of their own, name them in left_right
    or set the first to 0.
    """
    left_right: tuple[str, ...] = ()
    """Pairs of classes that a flip of the first axis (left-right) swaps, by name or value: "left kidney=right kidney".
    """
    rot90_prob: float = 0.2
    """Probability of one to three quarter turns in the axial plane; 0 where roi_x and roi_y differ."""
    affine_prob: float = 0.0
    """Probability of a random turn and stretch. With few labelled cases it keeps a network from learning them by heart.
    """
    affine_degrees: float = 15.0
    """Largest such turn about each axis, in degrees."""
    affine_scale: float = 0.2
    """Largest such stretch along each axis, as a share of its size; below 1."""
    intensity_prob: float = 0.1
    """Probability of scaling intensities by up to 10 %, and of shifting them by up to .1."""

    def __post_init__(self) -> None:
        check_run(self)
        check_volumes(self)
        check_encoder(self)
        positive(self, "max_epochs", "val_every", "batch_size", "sw_batch_size", "in_channels")
        positive(self, "accumulate", "label_fraction", "layer_decay", "background_weight", "decoder_width")
        not_negative(self, "warmup_epochs", "reg_weight", "clip", "out_channels")
        not_negative(self, "num_labelled", "steps_per_epoch", "freeze_epochs")
        if max(self.label_fraction, self.layer_decay) > 1:
            raise ValueError(
                f"label_fraction and layer_decay are at most 1, but they are {self.label_fraction} and "
                f"{self.layer_decay}"
            )
        if self.num_labelled and self.label_fraction != 1:
            raise ValueError("num_labelled and label_fraction say the same in two ways; name one of them")
        if self.batch_size * self.crops_per_volume % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide a step's "
                f"{self.batch_size * self.crops_per_volume} crops into equal parts"
            )
        for pair in self.left_right:
            if pair.count("=") != 1 or "" in pair.split("="):
                raise ValueError(f'left_right takes pairs such as "left kidney=right kidney", but got {pair!r}')
        between(self, "infer_overlap", 0, 1)
        between(self, "val_fraction", 0, 1)
        grid_of(self.crop_size)
        if self.in_channels != 1:
            raise ValueError(f"CT has one channel; in_channels={self.in_channels} is not supported by the data path")
        if self.out_channels == 1:
            raise ValueError("out_channels counts the background too, so it is at least 2 (0 takes it from the data)")
        if self.optim_lr <= 0:
            raise ValueError(f"optim_lr must be above 0, but it is {self.optim_lr}")
        check_probabilities("flip_prob", self.flip_prob)
        others = (self.rot90_prob, self.affine_prob, self.intensity_prob, self.labelled_prob)
        check_probabilities("rot90_prob, affine_prob, intensity_prob, labelled_prob", others)
        between(self, "affine_degrees", 0, 180)
        between(self, "affine_scale", 0, 1)
        if self.rot90_prob and self.roi_x != self.roi_y:
            raise ValueError(
                f"quarter turns need roi_x equal to roi_y, but they are {self.roi_x} and {self.roi_y}; "
                "make them equal, or set rot90_prob to 0"
            )

    @property
    def crop_size(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return (self.roi_x, self.roi_y, self.roi_z)

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(self.logdir)


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
    if not 0 < config.encoder_lr_share <= 1:
        raise ValueError(f"encoder_lr_share must be above 0 and at most 1, but it is {config.encoder_lr_share}")
    if config.dataloader_workers < -1:
        raise ValueError(f"dataloader_workers is a count, or -1 for automatic; it is {config.dataloader_workers}")


def check_volumes(config: VolumeSettings) -> None:
    """Checks of VolumeSettings; raises ValueError."""
    not_negative(config, "prepare_workers")
    positive(config, "crops_per_volume")
    if min(config.spacing) <= 0:
        raise ValueError(f"spacing must be above 0 mm on each axis, but it is {config.spacing}")
    if config.hu_min >= config.hu_max:
        raise ValueError(f"hu_min must lie below hu_max, but they are {config.hu_min} and {config.hu_max}")


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


def positive(config: Any, *names: str) -> None:
    """Raises ValueError where a field is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be above 0, but it is {getattr(config, name)}")


def not_negative(config: Any, *names: str) -> None:
    """Raises ValueError where a field is below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, but it is {getattr(config, name)}")


def between(config: Any, name: str, low: float, high: float) -> None:
    """Raises ValueError where a field is outside low <= x < high."""
    if not low <= getattr(config, name) < high:
        raise ValueError(f"{name} must be at least {low} and below {high}, but it is {getattr(config, name)}")


def check_probabilities(name: str, values: Iterable[float]) -> None:
    """Raises ValueError where a value is not a probability."""
    if any(not 0 <= p <= 1 for p in values):
        raise ValueError(f"{name} must be probabilities between 0 and 1, but got {tuple(values)}")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError, naming the nearest choice, where the value is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}{nearest(str(value), choices)}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """'; did you mean X?' for a near miss, else nothing."""
    choices = list(choices)
    matches = [c for c in choices if c.startswith(word)] or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
