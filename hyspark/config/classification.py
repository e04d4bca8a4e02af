"""Settings of fine-tuning for the classification of images, as in shared.py.

The defaults are the recipe of Wolf et al., Self-supervised pre-training with contrastive and masked autoencoder methods
for dealing with small datasets in deep learning for medical imaging, Scientific Reports 13, 20260 (2023).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import RunSettings, check_run, check_shares
from hyspark.utils.text import nearest

LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunSettings):
    """Fine-tuning for the classification of images (`finetune_classify.py`, `hyspark finetune_classify`)."""

    data_dir: str = "data"
    """Folder with train/CLASS and val/CLASS, and test/CLASS where there is a test part; or a MedMNIST .npz file."""
    logdir: str = "ckpt/classify"
    """Run folder. The same command on it continues the run."""
    model: str = "timm/resnet50"
    """Network: timm/NAME or torchvision/NAME."""
    pretrained: str = "none"
    """Weights to start from: a checkpoint's path, or none to train from scratch."""
    num_labelled: int = 0
    """Train on so many of the training images, drawn by the seed, each class with its share and at least one: those of
    50 are among those of 100. 0 takes all.
    """
    label_fraction: float = 1.0
    """Train on this share of the training images, drawn in the same way."""
    test_dir: str = ""
    """Folder of further images, CLASS/..., scored once at the end in place of the data's own test part."""
    channels: int = 3
    """Channels of the network: 3, for which grey images are repeated, or 1, for which colours become grey."""
    input_size: int = 224
    """Edge of what the network sees, in pixels; outside of training, of the centre of an image whose shorter side is
    8/7 as long.
    """
    mean: tuple[float, ...] = (0.0,)
    """Taken off pixels in 0..1; one number, or one per channel. As in pre-training."""
    std: tuple[float, ...] = (1.0,)
    """What they are divided by then."""
    batch_size: int = 64
    """Images per step, over all processes."""
    max_epochs: int = 70
    """Epochs; what one is, steps_per_epoch says."""
    steps_per_epoch: int = 0
    """Steps in an epoch; 0 takes as many as let every training image come once. With a number, runs on few and on many
    images have the same budget.
    """
    val_every: int = 1
    """Epochs between validations; the weights of the best validation accuracy are kept and scored at the end."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adam: weight decay is part of the gradient, of all weights, as in the study. adamw: it is apart from it, and
    norms and biases are spared.
    """
    optim_lr: float = 1e-4
    """Peak learning rate."""
    reg_weight: float = 5e-4
    """Weight decay."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the backbone, as a share of that of the layer above it; 1 for the same everywhere.
    """
    pretrained_lr_share: float = 1.0
    """Learning rate of a backbone that starts from pre-trained weights, as a share of what one from scratch has."""
    freeze_epochs: int = 10
    """Epochs at the start in which the classifier alone learns, and with it the weights and statistics of the
    backbone's BatchNorm layers, as in the study.
    """
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    lrschedule: Literal["constant", "warmup_cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine to 0."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of the truth that is spread over all classes."""
    drop_path: float = 0.0
    """Largest probability of leaving out a block (stochastic depth), for networks of timm that have it."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none. Where both are on, each step takes one of mixup and cutmix."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is what is validated and kept then; less in the first steps,
    from 0 up. 0 for none.
    """
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""
    flip_prob: float = 0.5
    """Probability of a left-right flip."""
    rotate_degrees: float = 10.0
    """Largest turn of a training crop."""
    jitter: float = 0.2
    """Largest change of brightness and of contrast of a training crop, as a share."""

    def __post_init__(self) -> None:
        check_run(self)
        positive(self, "batch_size", "max_epochs", "val_every", "input_size", "optim_lr", "label_fraction")
        positive(self, "layer_decay")
        not_negative(self, "num_labelled", "steps_per_epoch", "freeze_epochs", "warmup_epochs", "reg_weight", "clip")
        not_negative(self, "mixup", "cutmix")
        check_shares(self)
        library, slash, _ = self.model.partition("/")
        if not slash or library not in LIBRARIES:
            raise ValueError(
                f"model must be timm/NAME or torchvision/NAME (timm/resnet50), not {self.model!r}"
                + nearest(library, LIBRARIES)
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, but it is {self.channels}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} takes one number, or one per channel, but got {list(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, but it is {list(self.std)}")
        for name in ("label_smoothing", "drop_path", "ema_decay", "jitter"):
            between(self, name, 0, 1)
        between(self, "rotate_degrees", 0, 180)
        check_probabilities("flip_prob", [self.flip_prob])
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be two rising shares above 0 and at most 1, but it is {low} and {high}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs; batch_size must be even, but it is {self.batch_size}")

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(self.logdir)
