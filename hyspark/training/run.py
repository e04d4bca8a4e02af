"""A run in progress: its model, optimizer and position, new or restored from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hyspark.config.recipes import Config, as_plain
from hyspark.training import checkpoint, distributed, optim
from hyspark.training.distributed import Processes
from hyspark.training.precision import configure_kernels, make_loss_scaler
from hyspark.utils.log import LOG


@dataclass
class Run:
    """A run in progress: settings, model, optimizer and position.

    Attributes:
        data: Data in a few words, with a digest of the names of its cases; kept in checkpoints.
        model: Network as trained, wrapped if there are several processes.
        total_steps: Steps of the whole schedule.
        first_step: First step of this call.
        val_every: Epochs between validations.
        is_validated: Whether the validation due after the step before the first, if any, has been done.
        saved_step: Number of steps done in the newest checkpoint.
        excluded: Names of unreadable cases that the run does without.
        trained: Whether each weight is trained, as the wrapper of several processes knows it.
    """

    config: Config
    data: str
    processes: Processes
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int
    first_step: int
    val_every: int
    is_validated: bool
    saved_step: int
    excluded: list[str]
    trained: list[bool]

    @property
    def last_step(self) -> int:
        """Number of steps done when this call ends."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)

    @property
    def network(self) -> Any:
        """The network without its wrapper."""
        return distributed.unwrap(self.model)

    def follow_trainable(self) -> None:
        """Exchange gradients of the weights that are trained now; called after weights were frozen or released."""
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        if trained != self.trained:
            self.model, self.trained = distributed.wrap_again(self.model, self.processes), trained

    def is_due(self, done: int) -> bool:
        """Return whether validation and a checkpoint are due after `done` steps."""
        return done == self.last_step or done % (self.steps_per_epoch * self.val_every) == 0

    def state(self, done: int, is_validated: bool, **extra: Any) -> dict[str, Any]:
        """Return the resumable state after `done` steps.

        Args:
            done: Number of steps done.
            is_validated: Whether the validation that is due then has been done.
            **extra: What the task adds.
        """
        modules = {"model": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        state = checkpoint.make_state(done, as_plain(self.config), self.data, **modules)
        # Checkpoints keep the keys that they have had from the first version on.
        return checkpoint.add_checksum(state | {"is_reviewed": is_validated, "left_out": self.excluded} | extra)


def make_run(
    config: Config,
    data: str,
    processes: Processes,
    model: nn.Module,
    steps_per_epoch: int,
    state: dict[str, Any] | None,
    *,
    excluded: Sequence[str] = (),
    val_every: int = 1,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Run:
    """Move the model to its device, make its optimizer, and restore a state.

    Args:
        config: Settings.
        data: See `Run`.
        processes: This process among the others.
        model: Network on the CPU.
        steps_per_epoch: Steps in an epoch.
        state: Checkpoint to continue from, if any.
        excluded: Names of unreadable cases that the run does without.
        val_every: Epochs between validations.
        make_optimizer: Makes the optimizer of the wrapped model, with groups of `optim.parameter_groups`, and takes
            its `spare_tokens`; by default AdamW.

    Raises:
        ValueError: The processes found different checkpoints, or other cases are excluded than in the state.
    """
    if state and state["left_out"] != list(excluded):
        raise ValueError(
            f"{config.run_folder}: the run excluded the cases {state['left_out']}, but now {list(excluded)} are "
            "unreadable, so that batches would differ; restore the files as they were, or name another run folder"
        )
    configure_kernels(config)
    if state:
        model.load_state_dict(state["model"])
    model = distributed.wrap_model(model, processes)
    make = make_optimizer or partial(optim.make_adamw, encoder_lr_ratio=config.encoder_lr_ratio)
    optimizer = optim.match_saved_groups(make, model, state["optimizer"]) if state else make(model)
    scaler = make_loss_scaler(processes, config.precision)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        LOG.info("continuing at step %d", state["step"])
    first_step = state["step"] if state else 0
    first_steps = set(distributed.gather_lists([first_step], processes))
    if len(first_steps) > 1:
        raise ValueError(
            f"{config.run_folder}: expected one checkpoint for all processes, but they would continue at steps "
            f"{sorted(first_steps)}; do all machines see this folder?"
        )
    return Run(
        config=config,
        data=data,
        processes=processes,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        first_step=first_step,
        val_every=val_every,
        is_validated=state["is_reviewed"] if state else True,
        saved_step=first_step,
        excluded=list(excluded),
        trained=[parameter.requires_grad for parameter in model.parameters()],
    )
