"""Settings of pre-training as a frozen dataclass, with all their validation."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import EncoderSettings, VolumeSettings, check_encoder, check_run, check_volumes
from hyspark.models.contrastive import CONTRASTIVE_METHODS
from hyspark.models.masking.mask import grid_of
from hyspark.utils.text import nearest

METHODS = ("hyspark", "spark", *CONTRASTIVE_METHODS)
"""Of pre-training."""
READ_BY = {
    **dict.fromkeys((field.name for field in fields(EncoderSettings)), METHODS[:1]),
    **dict.fromkeys(("compute", "hide"), METHODS[:1]),
    **dict.fromkeys(("mask", "decoder_width", "compile"), METHODS[:2]),
    **dict.fromkeys(("view_scale", "head_width"), CONTRASTIVE_METHODS),
    **{"local_views": ("swav",), "prototypes": ("swav",), "queue_size": ("moco",), "momentum": ("moco", "byol")},
}
"""Settings that not all methods read, with those that do."""


def list_methods() -> list[str]:
    """List the methods of pre-training, as in `--model METHOD/BACKBONE`."""
    return list(METHODS)


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
        if self.compile != "none" and self.compute == "masked":
            raise ValueError("compile is for compute packed; with the reference, compute masked, leave it out")
        between(self, "momentum", 0, 1)
        if not 0 < self.view_scale <= 1:
            raise ValueError(f"view_scale must be above 0 and at most 1, but it is {self.view_scale}")
        if self.method in CONTRASTIVE_METHODS and self.bs * self.crops_per_volume < 2:
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
