"""Settings of fine-tuning for segmentation as a frozen dataclass, with all their validation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import EncoderSettings, VolumeSettings, check_encoder, check_run, check_shares, check_volumes
from hyspark.models.light_decoder import check_min_width
from hyspark.models.masking.mask import grid_of


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
    its weights too, but for the last level, where the file has them (hyspark export --decoder), and needs half the
    time a step.
    """
    decoder_width: int = 768
    """Channels of the light decoder at its deepest level, as in pre-training; a multiple of 16. Each level halves them.
    """
    decoder_min_width: int = 0
    """Channels that each level of the light decoder takes at least, up to decoder_width. Levels that pre-training has
    narrower start fresh. With much less than 32, networks find small organs late or not at all.
    """
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
    the same. (But for the BatchNorm of the light decoder, which sees the crops of one pass at a time.)
    """
    optim_lr: float = 1e-4
    """Peak learning rate."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the encoder, as a share of that of the layer above it; 1 for the same everywhere.
    """
    pretrained_lr_share: float = 1.0
    """Learning rate of an encoder that starts from pre-trained weights, as a share of what one from scratch has, so
    that a comparison can give each start the rate that suits it.
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
        not_negative(self, "num_labelled", "steps_per_epoch", "freeze_epochs", "decoder_min_width")
        check_min_width(self.decoder_width, self.decoder_min_width)
        check_shares(self)
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


def check_decoder(config: FinetuneConfig) -> None:
    """Raises ValueError for settings of the light decoder where a new run has the released one."""
    for name in ("decoder_width", "decoder_min_width"):
        if config.decoder == "released" and (value := getattr(config, name)) != getattr(FinetuneConfig, name):
            raise ValueError(f"{name}={value} is of the light decoder, but decoder is released; set decoder to light")
