"""Settings of pre-training as a frozen dataclass, with their checks."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import EncoderSettings, VolumeSettings, check_encoder, check_run, check_volumes
from hyspark.models.defaults import CONTRASTIVE_METHODS, check_reconstruct_fraction, grid_of
from hyspark.models.nnunet_plans import to_network_axes
from hyspark.utils.settings import field_info, setting
from hyspark.utils.text import nearest

METHODS = ("hyspark", "spark", *CONTRASTIVE_METHODS)
"""Methods of pre-training."""
MASKED = METHODS[:2]
REPORTED: dict[str, Any] = {"may_change": True, "affects_results": False}


def list_methods() -> list[str]:
    """List the methods of pre-training, as in `--model METHOD/BACKBONE`."""
    return list(METHODS)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(VolumeSettings, EncoderSettings):
    """Pre-train a network on unlabelled CT or MR.

    Example:
        hyspark pretrain --config pretrain --data data --out ckpt/pretrain --batch_size 4
    """

    data: str = setting("data", "data", first=True, old=("data_path",), may_change=True)
    """Folder with a list dataset.json, the path of such a JSON, or a folder of data without a list. With an
    nnU-Net plan, also a data set in nnUNet_preprocessed, or a folder of its arrays.
    """
    out: str = setting("", "run", first=True, old=("exp_dir",), **REPORTED)
    """Run folder; by default ckpt/EXP_NAME. The same command on it continues the run."""
    exp_name: str = setting("debug", "run", **REPORTED)
    """Name of the run in its report."""
    model: str = setting("hyspark", "network", first=True)
    """Method and network. hyspark: the hybrid network of the paper. METHOD/BACKBONE: spark, moco, byol or swav with
    timm/NAME, torchvision/NAME, monai/NAME (in 3D too), nnunet/PLANS.json:CONFIGURATION, or PACKAGE.MODULE:FACTORY;
    for example spark/timm/resnet50. spark masks patches; moco, byol and swav compare two views of a crop. A plan of
    nnU-Net sets spacing, crop_size, axis_order, intensity and image_channels too, where these are not given.
    """
    weights: str = setting("none", "network", first=True, old=("init_weight",))
    """Initial weights: an encoder, a pre-training checkpoint, or published weights of a third-party network; a file, or
    hf://OWNER/NAME of the Hugging Face Hub. none: random initialisation. The optimizer and the projection heads of
    moco, byol and swav are always initialised anew.
    """
    crop_size: tuple[int, ...] = setting((96,), "data", first=True, old=("input_size",))
    """Edge of a crop in voxels, one number or one per axis; multiples of 16, or of the total stride of another network
    on each axis.
    """
    axis_order: tuple[int, ...] = setting((), "data", methods=METHODS[1:])
    """Axes of a crop in the order in which a third-party network takes them: 0 x, 1 y, 2 z. 2 1 0 is that of arrays
    read by SimpleITK. By default x, y, z. Other settings per axis stay in the order x, y, z.
    """
    mask_ratio: float = setting(0.75, "optimisation", first=True, old=("mask",), methods=MASKED)
    """Fraction of patches that are hidden."""
    mask_unit: tuple[int, ...] = setting((), "optimisation", methods=("spark",))
    """spark: edge of a patch that is hidden or visible, in voxels, one number or one per axis; on each axis a multiple
    or a divisor of the network's strides. By default the network's total stride.
    """
    batch_size: int = setting(4, "optimisation", first=True, old=("bs",))
    """Volumes per step, over all processes; each gives crops_per_volume crops."""
    epochs: int = setting(100, "optimisation", first=True, old=("ep",))
    """Passes over the training volumes."""
    lr: float = setting(1e-4, "optimisation", first=True, old=("base_lr",))
    """Peak learning rate; it is not scaled by the batch size."""
    warmup_epochs: int = setting(40, "optimisation", old=("wp_ep",))
    """Epochs of linear warm-up."""
    weight_decay: float = setting(0.04, "optimisation", old=("wd",))
    """Weight decay at the first step."""
    weight_decay_end: float = setting(0.2, "optimisation", old=("wde",))
    """Weight decay at the last step, reached by a cosine."""
    clip: float = setting(5.0, "optimisation")
    """Largest norm of the gradient; 0 does not clip."""
    val_fraction: float = setting(0.02, "data")
    """Fraction of volumes for validation if the data list has no validation part; at least one volume."""
    subject_regex: str = setting("", "data")
    """Regular expression of the subject in a case name, for splits: its first group, or all of its match. By default
    the part before markers such as _visit, _ses-, _scan2, __.
    """
    flip_prob: tuple[float, float, float] = setting((0.2, 0.2, 0.1), "data")
    """Probability of a flip on each axis."""
    slices: Literal["none", "sagittal", "coronal", "axial"] = setting("none", "data")
    """Use 2D slices of the prepared volumes instead of crops, for 2D networks."""
    slice_stride: int = setting(1, "data")
    """Use slices whose index is a multiple of this."""
    slice_scaling: Literal["window", "minmax"] = setting("window", "data")
    """Intensities of slices. window: as intensity says; for ct, hu_min to hu_max become 0 to 1. minmax: the smallest to
    the largest value of each slice become 0 to 1.
    """
    in_channels: int = setting(1, "network", old=("channels",))
    """Input channels. An image of one channel is repeated; networks made for photographs take 3. With several
    image_channels, the default stands for their number.
    """
    decoder_width: int = setting(768, "network", methods=MASKED)
    """Channels of the reconstruction decoder at its deepest level. They halve at each of its steps, 4 for hyspark, so
    there a multiple of 16.
    """
    reconstruct_fraction: float = setting(1.0, "optimisation", methods=MASKED)
    """Fraction of the hidden patches that a step reconstructs and scores, drawn anew for each crop. The two finest
    levels of the decoder, most of its cost, compute these alone. 1: all, as in the paper. Validation and pictures
    always take all.
    """
    compute: Literal["packed", "masked"] = setting("packed", "machine", methods=("hyspark", "spark"))
    """How hidden voxels are excluded. packed: fast, visible patches alone. masked: the readable reference."""
    hide: Literal["everywhere", "convolutions", "input"] = setting("everywhere", "network", methods=("hyspark",))
    """Modules that do not see hidden patches. everywhere: the method. For ablations: convolutions, so that the
    transformer sees all tokens; or input, which sets hidden voxels to zero once.
    """
    view_scale: float = setting(0.6, "optimisation", methods=CONTRASTIVE_METHODS)
    """moco, byol, swav: shortest edge of a view before it is resized, as a fraction of the crop's edge."""
    local_views: int = setting(0, "optimisation", methods=("swav",))
    """swav: further views, of small regions and half the size."""
    head_width: int = setting(2048, "network", methods=CONTRASTIVE_METHODS)
    """moco, byol, swav: hidden features of the projection head."""
    momentum: float = setting(0.99, "optimisation", methods=("moco", "byol"))
    """moco, byol: momentum of the momentum encoder; it rises to 1 by a cosine."""
    queue_size: int = setting(4096, "optimisation", methods=("moco",))
    """moco: negatives, which are earlier crops."""
    prototypes: int = setting(300, "network", methods=("swav",))
    """swav: clusters."""
    resume_from: str = setting("", "run", **REPORTED)
    """Checkpoint (with decoder) of another run folder to continue from. A run's own folder continues without it."""
    picture_every: int = setting(5, "run", **REPORTED)
    """Epochs between pictures; 0 draws them after the last epoch only."""
    probe_data: str = setting("", "run", **REPORTED)
    """Labelled data for a linear probe of the features during pre-training: an nnU-Net data set folder, or a decathlon
    JSON. Its training cases are used, and no others. Empty: no probe.
    """
    probe_every: int = setting(1, "run", **REPORTED)
    """Epochs between linear probes; one is always taken before the first step and after the last."""
    probe_cases: int = setting(8, "run", **REPORTED)
    """Labelled volumes of the linear probe: half of them fit the classifier, the others score it."""

    def __post_init__(self) -> None:
        check_run(self)
        check_volumes(self)
        check_encoder(self)
        positive(self, "batch_size", "epochs", "decoder_width", "probe_every", "slice_stride", "in_channels", "lr")
        positive(self, "head_width", "queue_size", "prototypes")
        not_negative(self, "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "picture_every", "local_views")
        between(self, "val_fraction", 0, 1)
        between(self, "momentum", 0, 1)
        check_probabilities("flip_prob", self.flip_prob)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, but it is {self.mask_ratio}")
        check_reconstruct_fraction(self.reconstruct_fraction)
        if not 0 < self.view_scale <= 1:
            raise ValueError(f"view_scale must be above 0 and at most 1, but it is {self.view_scale}")
        if self.probe_cases < 2:
            raise ValueError(f"probe_cases must be at least 2 (one to fit, one to score), but it is {self.probe_cases}")
        for name, numbers in (("crop_size", self.crop_size), ("mask_unit", self.mask_unit or (1,))):
            if len(numbers) not in (1, self.axes):
                several = "three" if self.axes == 3 else "two"
                raise ValueError(f"{name} takes one number or {several}, but got {list(numbers)}")
        if self.axis_order and (self.axes != 3 or sorted(self.axis_order) != [0, 1, 2]):
            raise ValueError(
                f"axis_order: expected 0, 1, 2 in any order, for crops of volumes (slices none), got "
                f"{' '.join(map(str, self.axis_order))}" + ("" if self.axes == 3 else f" with slices {self.slices}")
            )
        if self.mask_unit and min(self.mask_unit) < 1:
            raise ValueError(f"mask_unit must be at least 1 on every axis, but it is {list(self.mask_unit)}")
        self.check_model()
        self.check_unread()
        if self.compile != "none" and self.compute == "masked":
            raise ValueError("compile needs compute=packed, but compute is masked; drop one of the two")
        if self.slices == "none" and (self.slice_stride != 1 or self.slice_scaling != "window"):
            raise ValueError("slice_stride and slice_scaling need slices; set slices, or drop the two")
        if self.probe_data and (self.slices != "none" or self.model != "hyspark"):
            raise ValueError("probe_data needs model=hyspark and slices=none; drop probe_data, or change these")

    def check_model(self) -> None:
        """Raise ValueError for a method or network that does not exist, or does not fit the batch."""
        if self.model == "hyspark":
            grid_of(self.crop_shape)
            if self.in_channels != self.num_image_channels:
                raise ValueError(
                    f"in_channels must be 1 for hyspark, the number of image_channels, but it is {self.in_channels}; "
                    "to read several, name them by image_channels"
                )
        elif self.method not in METHODS or not self.model.partition("/")[2]:
            raise ValueError(
                f"model must be hyspark, or a method and a backbone (spark/timm/resnet50), not {self.model!r}; methods "
                f"are {', '.join(METHODS[1:])}" + nearest(self.method, METHODS)
            )
        crops = self.batch_size * self.crops_per_volume
        if self.method in CONTRASTIVE_METHODS and crops < 2:
            raise ValueError(f"{self.method} needs two crops a step or more; raise batch_size or crops_per_volume")
        if self.method == "moco" and self.queue_size % crops:
            raise ValueError(f"queue_size must be a multiple of a step's {crops} crops, but it is {self.queue_size}")

    def check_unread(self) -> None:
        """Raise ValueError for settings that the method does not read."""
        default = {field.name: field.default for field in fields(self)}
        unread = [name for name, info in field_info(type(self)).items() if self.method not in (info.methods or METHODS)]
        if given := [name for name in unread if getattr(self, name) != default[name]]:
            raise ValueError(f"{', '.join(given)}: not read by {self.method}; drop for {self.model}")

    @property
    def method(self) -> str:
        """Method of pre-training, one of METHODS."""
        return self.model.partition("/")[0]

    @property
    def axes(self) -> int:
        """Axes of an image: 3, or 2 for slices."""
        return 3 if self.slices == "none" else 2

    @property
    def crop_shape(self) -> tuple[int, ...]:
        """Voxels of a crop on each axis: three, or two for slices."""
        return self.crop_size * self.axes if len(self.crop_size) == 1 else self.crop_size

    @property
    def unit_shape(self) -> tuple[int, ...] | None:
        """Voxels of a mask unit on each axis; None for the network's total stride."""
        return (self.mask_unit * self.axes if len(self.mask_unit) == 1 else self.mask_unit) or None

    @property
    def network_crop(self) -> tuple[int, ...]:
        """Voxels of a crop on each axis of the network."""
        return to_network_axes(self.crop_shape, self.axis_order)

    @property
    def network_unit(self) -> tuple[int, ...] | None:
        """Voxels of a mask unit on each axis of the network; None for its total stride."""
        return to_network_axes(self.unit_shape, self.axis_order) if self.unit_shape else None

    @property
    def run_folder(self) -> Path:
        """Folder that the run writes to."""
        return Path(self.out or f"ckpt/{self.exp_name}")
