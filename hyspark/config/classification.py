"""Settings of fine-tuning for the classification of images as a frozen dataclass, with their checks.

The defaults are the recipe of Wolf et al., Self-supervised pre-training with contrastive and masked autoencoder methods
for dealing with small datasets in deep learning for medical imaging, Scientific Reports 13, 20260 (2023).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyspark.config.checks import between, check_probabilities, not_negative, positive
from hyspark.config.shared import RunSettings, check_finetuning, check_run
from hyspark.utils.settings import setting
from hyspark.utils.text import nearest

LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RunSettings):
    r"""Fine-tune a classifier on labelled images.

    Example:
        hyspark finetune-classifier --config finetune_covidct --data data/COVID-CT --out ckpt/covidct \
            --weights ckpt/resnet50.pth
    """

    data: str = setting("data", "data", first=True, old=("data_dir",), may_change=True)
    """Folder with train/CLASS and val/CLASS, and optionally test/CLASS; or a MedMNIST .npz file."""
    out: str = setting("ckpt/classify", "run", first=True, old=("logdir",), may_change=True, affects_results=False)
    """Run folder. The same command on it continues the run."""
    model: str = setting("timm/resnet50", "network", first=True)
    """Network: timm/NAME or torchvision/NAME."""
    weights: str = setting("none", "network", first=True, old=("pretrained",))
    """Initial weights: the path of a checkpoint or of exported weights. none: random initialisation."""
    num_labelled: int = setting(0, "data", first=True)
    """Number of training images, drawn by the seed; 0 uses all. Each class keeps its fraction, and at least one image.
    The images of 50 are among those of 100.
    """
    crop_size: int = setting(224, "data", first=True, old=("input_size",))
    """Edge of the network's input in pixels. Validation and test images are resized to a shorter side of 8/7 of it,
    then cropped at the centre.
    """
    batch_size: int = setting(64, "optimisation", first=True)
    """Images per step, over all processes."""
    epochs: int = setting(70, "optimisation", first=True, old=("max_epochs",))
    """Epochs of steps_per_epoch steps."""
    lr: float = setting(1e-4, "optimisation", first=True, old=("optim_lr",))
    """Peak learning rate."""
    label_fraction: float = setting(1.0, "data")
    """Fraction of the training images, drawn like num_labelled."""
    test_dir: str = setting("", "data", may_change=True)
    """Folder of test images, CLASS/..., scored once, after training, instead of the data's own test part."""
    mean: tuple[float, ...] = setting((0.0,), "data")
    """Subtracted from pixels in 0..1: one number, or one per channel. As in pre-training."""
    std: tuple[float, ...] = setting((1.0,), "data")
    """Divisor after the subtraction of mean: one number, or one per channel."""
    crop_scale: tuple[float, float] = setting((0.7, 1.0), "data")
    """Smallest and largest fraction of the image's area that a training crop covers."""
    flip_prob: float = setting(0.5, "data")
    """Probability of a left-right flip."""
    rotate_degrees: float = setting(10.0, "data")
    """Largest rotation of a training crop, in degrees."""
    jitter: float = setting(0.2, "data")
    """Largest change of brightness and of contrast of a training crop, as a fraction."""
    in_channels: int = setting(3, "network", old=("channels",))
    """Input channels. 3: grey images are repeated. 1: colour images become grey."""
    drop_path: float = setting(0.0, "network")
    """Largest probability of skipping a block (stochastic depth), for networks of timm that support it."""
    steps_per_epoch: int = setting(0, "optimisation")
    """Steps in an epoch; 0: every training image once. A fixed number gives runs on few and on many images the same
    budget.
    """
    optimizer: Literal["adam", "adamw"] = setting("adam", "optimisation")
    """adam: weight decay is part of the gradient and applies to all weights, as in the study. adamw: it is decoupled,
    and norms and biases are exempt.
    """
    warmup_epochs: int = setting(0, "optimisation")
    """Epochs of linear warm-up."""
    lrschedule: Literal["constant", "warmup_cosine"] = setting("constant", "optimisation")
    """Learning rate after the warm-up: constant, or a cosine to 0."""
    weight_decay: float = setting(5e-4, "optimisation", old=("reg_weight",))
    """Weight decay."""
    clip: float = setting(0.0, "optimisation")
    """Largest norm of the gradient; 0 does not clip."""
    layer_decay: float = setting(1.0, "optimisation")
    """Learning rate of a backbone layer divided by that of the layer above it; 1: the same for all."""
    pretrained_lr_ratio: float = setting(1.0, "optimisation", old=("pretrained_lr_share",))
    """Learning rate of a backbone with initial weights divided by that of a randomly initialised one."""
    freeze_epochs: int = setting(10, "optimisation")
    """Epochs at the beginning in which the backbone is frozen, except its BatchNorm layers, as in the study."""
    label_smoothing: float = setting(0.0, "optimisation")
    """Probability that is spread evenly over all classes in the target."""
    mixup: float = setting(0.0, "optimisation")
    """Alpha of mixup; 0: none. With cutmix too, each step uses one of the two."""
    cutmix: float = setting(0.0, "optimisation")
    """Alpha of cutmix; 0: none."""
    ema_decay: float = setting(0.0, "optimisation")
    """Decay of an exponential moving average of the weights, which is validated and kept instead of the weights. It
    rises from 0 in the first steps. 0: none.
    """
    val_every: int = setting(1, "run", may_change=True)
    """Epochs between validations. The weights of the best validation accuracy are kept and scored after training."""

    def __post_init__(self) -> None:
        check_run(self)
        positive(self, "batch_size", "epochs", "val_every", "crop_size", "lr", "label_fraction")
        positive(self, "layer_decay")
        not_negative(self, "num_labelled", "steps_per_epoch", "freeze_epochs", "warmup_epochs", "weight_decay", "clip")
        not_negative(self, "mixup", "cutmix")
        check_finetuning(self)
        library, slash, _ = self.model.partition("/")
        if not slash or library not in LIBRARIES:
            raise ValueError(
                f"model must be timm/NAME or torchvision/NAME (timm/resnet50), not {self.model!r}"
                + nearest(library, LIBRARIES)
            )
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, but it is {self.in_channels}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.in_channels):
                raise ValueError(f"{name} takes one number, or one per channel, but got {list(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, but it is {list(self.std)}")
        for name in ("label_smoothing", "drop_path", "ema_decay", "jitter"):
            between(self, name, 0, 1)
        between(self, "rotate_degrees", 0, 180)
        check_probabilities("flip_prob", [self.flip_prob])
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale takes two rising fractions above 0, at most 1, but it is {low} and {high}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs; batch_size must be even, but it is {self.batch_size}")

    @property
    def run_folder(self) -> Path:
        """Folder that the run writes to."""
        return Path(self.out)
