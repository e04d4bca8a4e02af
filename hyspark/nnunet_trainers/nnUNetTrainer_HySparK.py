"""nnU-Net's training of HySparK's segmentation network.

nnU-Net finds this class in the folders of the environment variable nnUNet_extTrainer. Its data, augmentation, loss,
folds and predictions are unchanged; network, initial weights, optimizer and learning rates are of this package. nnU-Net
imports this file as a module of its own, so the rest is in `hyspark.training.nnunet_run`.
"""

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from hyspark.models.axis_order import PermutedAxes
from hyspark.training import nnunet_run, optim
from hyspark.training.distributed import unwrap


class nnUNetTrainer_HySparK(nnUNetTrainer):
    """Train HySparK's segmentation network on a plan of nnU-Net.

    Environment variables: HYSPARK_RECIPE names a recipe of `hyspark finetune`, HYSPARK_WEIGHTS the initial weights.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature of the base class
    ) -> None:
        run = nnunet_run.plan_run(plans, configuration, os.environ)
        super().__init__(plans, configuration, fold, dataset_json, device)
        for line in run.notes:
            self.print_to_log_file(line)
        self.hyspark = run.config
        self.enable_deep_supervision = False
        self.num_epochs = run.config.epochs
        self.num_iterations_per_epoch = run.config.steps_per_epoch
        self.num_val_iterations_per_epoch = nnunet_run.validation_steps(run.config)
        self.initial_lr, self.weight_decay = run.config.lr, run.config.weight_decay
        self.step_of_epoch = 0

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network that the plans describe; those of a trained model hold its settings."""
        return nnunet_run.build_trained_network(
            plans_manager.plans, configuration_manager.patch_size, num_input_channels, num_output_channels
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Make AdamW with the learning rates of the settings."""
        ratio = optim.finetuning_encoder_lr_ratio(self.hyspark)
        optimizer = optim.make_adamw(self.plain_network(), self.hyspark.layer_decay, ratio)
        return optimizer, nnunet_run.EpochSchedule(optimizer, self.hyspark, self.num_epochs)

    def plain_network(self) -> PermutedAxes:
        """Return the network without the wrappers of DistributedDataParallel and torch.compile."""
        network = unwrap(self.network)
        found: PermutedAxes = getattr(network, "_orig_mod", network)
        return found

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the network has one output."""

    def plot_network_architecture(self) -> None:
        """Do nothing: nnU-Net draws its own networks."""

    def _do_i_compile(self) -> bool:
        """Compile the network only where nnUNet_compile asks for it."""
        return "nnUNet_compile" in os.environ and bool(super()._do_i_compile())

    def initialize(self) -> None:
        """Build the network, and keep sums of its weights, to see whether others are loaded before the training."""
        super().initialize()
        self.initial_sums = nnunet_run.weight_sums(self.plain_network())

    def on_train_start(self) -> None:
        """Hold the settings against those of other folds, and load the initial weights of a new training."""
        if not self.was_initialized:
            self.initialize()
        plans = self.plans_manager.plans
        nnunet_run.check_same_settings(self.output_folder_base, plans)
        if self.current_epoch == 0 and self.hyspark.weights != "none":
            nnunet_run.check_nothing_loaded(self.initial_sums, self.plain_network(), self.hyspark.weights)
            for line in nnunet_run.load_initial_weights(self.plain_network().network, self.hyspark, plans):
                self.print_to_log_file(line)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Begin an epoch."""
        self.step_of_epoch = 0
        super().on_train_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Set the learning rate of a step, and do the step."""
        self.lr_scheduler.set_step(self.current_epoch * self.num_iterations_per_epoch + self.step_of_epoch)
        self.step_of_epoch += 1
        result: dict[str, Any] = super().train_step(batch)
        return result
