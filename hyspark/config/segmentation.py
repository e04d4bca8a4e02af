"""Settings of fine-tuning for segmentation as a frozen dataclass, with their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import (
    EncoderSettings,
    VolumeSettings,
    check_encoder,
    check_finetuning,
    check_run,
    check_volumes,
    encoder_options,
)
from hyspark.models.defaults import check_min_width, grid_of
from hyspark.utils.settings import setting

PREDICTION_SETTINGS = ("precision", "infer_overlap", "sw_batch_size", "left_right", "flip_prob")
"""Settings that predictions depend on, beside those of network and preparation; the last two say which flips they may
average over.
"""
UNREAD_BY_PREDICTIONS = {"rot90_prob": 0.0}
"""Settings of training whose default needs equal edges of the crop, with a value for predictions."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(VolumeSettings, EncoderSettings):
    r"""Fine-tune the segmentation network on labelled CT or MR.

    Example:
        hyspark finetune --config finetune_btcv --data data/Dataset015_BTCV --weights ckpt/encoder.pth \
            --out ckpt/btcv
    """

    data: str = setting("data", "data", first=True, old=("data_dir",), may_change=True)
    """Folder of labelled data: an nnU-Net data set (imagesTr, labelsTr), loose files, or a decathlon JSON.
    """
    json_list: str = setting("", "data")
    """Decathlon JSON inside the data folder, or its path. By default dataset.json if it is a data list, else the
    folder's images and label maps.
    """
    out: str = setting("ckpt/finetune", "run", first=True, old=("logdir",), may_change=True, affects_results=False)
    """Run folder. The same command on it continues the run."""
    weights: str = setting("none", "network", first=True, old=("pretrained",))
    """Initial weights: the path of a checkpoint or of exported weights, or hf://OWNER/NAME of the Hugging Face Hub.
    none: random initialisation.
    """
    decoder: Literal["released", "light"] = setting("released", "network", first=True)
    """Decoder. released: that of the published network, always randomly initialised. light: that of pre-training, twice
    as fast a step. It is initialised from the weights file too, if that holds it (hyspark export --decoder); its last
    level is always randomly initialised.
    """
    num_labelled: int = setting(0, "data", first=True)
    """Number of training cases, drawn by the seed; 0 uses all. The cases of 5 are among those of 10."""
    crop_size: tuple[int, ...] = setting((96,), "data", first=True, old_axes=("roi_x", "roi_y", "roi_z"))
    """Edge of a crop in voxels, one number or one per axis; multiples of 16."""
    batch_size: int = setting(1, "optimisation", first=True)
    """Cases per step, over all processes; each gives crops_per_volume crops."""
    epochs: int = setting(5000, "optimisation", first=True, old=("max_epochs",))
    """Epochs of steps_per_epoch steps."""
    lr: float = setting(1e-4, "optimisation", first=True, old=("optim_lr",))
    """Peak learning rate."""
    label_fraction: float = setting(1.0, "data")
    """Fraction of the training cases, drawn like num_labelled; at least one case."""
    test_dir: str = setting("", "data", may_change=True)
    """Test cases (an nnU-Net data set, or a decathlon JSON), scored once, after training."""
    val_fraction: float = setting(0.2, "data")
    """Fraction of cases for validation if neither the data list nor a splits.json names any."""
    subject_regex: str = setting("", "data")
    """Regular expression of the subject in a case name, for splits: its first group, or all of its match. By default
    the part before markers such as _visit, _ses-, _scan2, __.
    """
    labelled_prob: float = setting(0.5, "data")
    """Probability that a crop is centred on a labelled voxel. Otherwise it is centred on any foreground voxel."""
    flip_prob: tuple[float, float, float] = setting((0.2, 0.2, 0.2), "data")
    """Probability of a flip on each axis. If left and right organs are separate classes, list the pairs in left_right,
    or set the first value to 0.
    """
    left_right: tuple[str, ...] = setting((), "data")
    """Pairs of classes that a left-right flip exchanges, by name or value: "left kidney=right kidney"."""
    rot90_prob: float = setting(0.2, "data")
    """Probability of one to three quarter turns in the axial plane; needs equal crop edges on the first two axes."""
    affine_prob: float = setting(0.0, "data")
    """Probability of a random rotation and scaling. It reduces overfitting to few labelled cases."""
    affine_degrees: float = setting(15.0, "data")
    """Largest rotation about each axis, in degrees."""
    affine_scale: float = setting(0.2, "data")
    """Largest change of size along each axis, as a fraction; below 1."""
    intensity_prob: float = setting(0.1, "data")
    """Probability of scaling intensities by up to 10 %, and of shifting them by up to 0.1 of their range."""
    in_channels: int = setting(1, "network")
    """Input channels, one for each of image_channels; the default stands for their number."""
    out_channels: int = setting(0, "network")
    """Classes, background included. 0: the number in the data set's labels, or 14 if it names none."""
    decoder_width: int = setting(768, "network")
    """Channels of the light decoder at its deepest level, as in pre-training; a multiple of 16. Each level halves them.
    """
    decoder_min_width: int = setting(0, "network")
    """Least channels of a level of the light decoder, up to decoder_width. Levels that are narrower in pre-training are
    randomly initialised. Far below 32, small organs are learned late or not at all.
    """
    steps_per_epoch: int = setting(0, "optimisation")
    """Steps in an epoch; 0: every training case once. A fixed number gives runs on few and on many cases the same
    budget.
    """
    warmup_epochs: int = setting(50, "optimisation")
    """Epochs of linear warm-up."""
    lrschedule: Literal["warmup_cosine", "constant"] = setting("warmup_cosine", "optimisation")
    """Learning rate after the warm-up: a cosine to 0, or constant."""
    weight_decay: float = setting(1e-5, "optimisation", old=("reg_weight",))
    """Weight decay."""
    clip: float = setting(0.0, "optimisation")
    """Largest norm of the gradient; 0 does not clip."""
    layer_decay: float = setting(1.0, "optimisation")
    """Learning rate of an encoder layer divided by that of the layer above it; 1: the same for all."""
    pretrained_lr_ratio: float = setting(1.0, "optimisation", old=("pretrained_lr_share",))
    """Learning rate of an encoder with initial weights divided by that of a randomly initialised one. A comparison can
    give each its best rate.
    """
    freeze_epochs: int = setting(0, "optimisation")
    """Epochs at the beginning in which the encoder is frozen and the decoder alone learns."""
    background_weight: float = setting(1.0, "optimisation")
    """Weight of the background in the loss; each organ has weight 1. Below 1, randomly initialised networks learn small
    organs much earlier.
    """
    accumulate: int = setting(1, "optimisation")
    """Micro-batches per step, to save memory. Gradients are summed, so the step is the same. Exception: BatchNorm in
    the light decoder normalises over one micro-batch.
    """
    val_every: int = setting(100, "run", may_change=True, affects_results=False)
    """Epochs between validations."""
    infer_overlap: float = setting(0.5, "run")
    """Overlap of neighbouring windows in validation, as a fraction."""
    sw_batch_size: int = setting(4, "machine", may_change=True, affects_results=False)
    """Windows per forward pass in validation."""

    def __post_init__(self) -> None:
        check_run(self)
        check_volumes(self)
        check_encoder(self)
        positive(self, "epochs", "val_every", "batch_size", "sw_batch_size", "in_channels", "lr")
        positive(self, "accumulate", "label_fraction", "layer_decay", "background_weight", "decoder_width")
        not_negative(self, "warmup_epochs", "weight_decay", "clip", "out_channels")
        not_negative(self, "num_labelled", "steps_per_epoch", "freeze_epochs", "decoder_min_width")
        check_min_width(self.decoder_width, self.decoder_min_width)
        check_finetuning(self)
        if self.batch_size * self.crops_per_volume % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide a step's "
                f"{self.batch_size * self.crops_per_volume} crops into equal micro-batches"
            )
        for pair in self.left_right:
            if pair.count("=") != 1 or "" in pair.split("="):
                raise ValueError(f'left_right takes pairs such as "left kidney=right kidney", but got {pair!r}')
        between(self, "infer_overlap", 0, 1)
        between(self, "val_fraction", 0, 1)
        if len(self.crop_size) not in (1, 3):
            raise ValueError(f"crop_size takes one number or three, but got {list(self.crop_size)}")
        grid_of(self.crop_shape)
        if self.in_channels != self.num_image_channels:
            raise ValueError(
                f"in_channels must be 1, the number of image_channels, but it is {self.in_channels}; to read several, "
                "name them by image_channels"
            )
        if self.out_channels == 1:
            raise ValueError("out_channels includes the background, so it is at least 2, or 0 to take it from the data")
        check_probabilities("flip_prob", self.flip_prob)
        others = (self.rot90_prob, self.affine_prob, self.intensity_prob, self.labelled_prob)
        check_probabilities("rot90_prob, affine_prob, intensity_prob, labelled_prob", others)
        between(self, "affine_degrees", 0, 180)
        between(self, "affine_scale", 0, 1)
        if self.rot90_prob and self.crop_shape[0] != self.crop_shape[1]:
            raise ValueError(
                f"rot90_prob needs equal crop edges on the first two axes, but crop_size is {list(self.crop_size)}; "
                "make them equal, or set rot90_prob to 0"
            )

    @property
    def crop_shape(self) -> tuple[int, ...]:
        """Voxels of a crop on each of the three axes."""
        return self.crop_size * 3 if len(self.crop_size) == 1 else self.crop_size

    @property
    def run_folder(self) -> Path:
        """Folder that the run writes to."""
        return Path(self.out)


def check_decoder(config: SegmentationConfig) -> None:
    """Check, for a new run, that no setting of the light decoder is given with the released one.

    Raises:
        ValueError: One is given.
    """
    for name in ("decoder_width", "decoder_min_width"):
        if config.decoder == "released" and (value := getattr(config, name)) != getattr(SegmentationConfig, name):
            raise ValueError(f"{name}={value} needs decoder=light, but decoder is released; set decoder to light")


def network_options(settings: Any) -> dict[str, Any]:
    """Return the options of `build_hybird` that SegmentationConfig, or flags of the same names, describe."""
    return encoder_options(settings) | {
        "decoder": settings.decoder,
        "decoder_width": settings.decoder_width,
        "decoder_min_width": settings.decoder_min_width,
    }
