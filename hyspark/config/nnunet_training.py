"""Settings of a training by nnU-Net, one run of a comparison: those of `hyspark finetune`, and nnU-Net's plan."""

from dataclasses import dataclass

from hyspark.config.segmentation import SegmentationConfig
from hyspark.utils.settings import setting

OWN_TRAINER = "nnUNetTrainer_HySparK"
"""Trainer of HySparK's segmentation network."""
EPOCHS, STEPS_PER_EPOCH = 1000, 250
"""Length of nnU-Net's own training."""


@dataclass(frozen=True, kw_only=True)
class NnunetTrainingConfig(SegmentationConfig):
    """Train by nnU-Net on labelled CT or MR."""

    plans: str = setting("", "data", first=True)
    """Plan of nnU-Net beside its prepared data: nnUNet_preprocessed/DATASET/PLANS.json, or PLANS.json:CONFIGURATION. By
    default, the configuration is 3d_fullres.
    """
    trainer: str = setting(OWN_TRAINER, "network", first=True)
    """Class of nnU-Net's trainer. nnUNetTrainer_HySparK trains HySparK's network; others train the network of the plan,
    from files of `hyspark export --nnunet`.
    """
    epochs: int = setting(EPOCHS, "optimisation", first=True, old=("max_epochs",))
    """Epochs of steps_per_epoch steps, for nnUNetTrainer_HySparK; the name of another trainer says how many."""
    steps_per_epoch: int = setting(STEPS_PER_EPOCH, "optimisation")
    """Steps in an epoch; 0: 250, as nnU-Net takes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trainer.isidentifier():
            raise ValueError(f"trainer: expected the name of a class, such as {OWN_TRAINER}, got {self.trainer!r}")
