"""The frame that all kinds of training share, from the settings to a finished run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hyspark.config.recipes import ConfigT
from hyspark.models.weights.load import LoadReport
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.training.loop import Task, train
from hyspark.training.precision import resolve_precision
from hyspark.training.replay import read_replay, repeat_step
from hyspark.training.run import Run
from hyspark.training.run_folder import check_same_data, describe_settings, open_run_folder, read_state
from hyspark.utils.log import LOG

TaskT = TypeVar("TaskT", bound=Task)


class Experiment(Protocol[TaskT]):
    """A kind of training outside of its steps: data, network, scores. Its steps are a `loop.Task`.

    Attributes:
        model: Network on the CPU, randomly initialised from the seed.
        data: Data in a few words, with a digest of the names of its cases.
    """

    model: Any
    data: str

    def describe(self) -> dict[str, str]:
        """Describe data, network and steps for the terminal, one line by title."""

    def load_weights(self) -> LoadReport | None:
        """Load the weights that the settings name; None for random initialisation."""

    def estimate_cost(self, first_step: int) -> str:
        """Estimate what the remaining steps cost, for --dry_run; called on the main process."""
        return ""

    def set_up(self, state: dict[str, Any] | None) -> tuple[Run, TaskT]:
        """Prepare the data, and make run and task; a state is continued from."""

    def finish(self, run: Run, task: TaskT, has_trained: bool) -> None:
        """Score the final weights and write the report; called on all processes."""


def launch(config: ConfigT, make_experiment: Callable[[ConfigT, Processes], Experiment[TaskT]]) -> Path:
    """Train as the settings say, or continue.

    Args:
        config: Settings of the run.
        make_experiment: Reads the data lists and builds the network.

    Returns:
        The run folder.

    Raises:
        ValueError, FileNotFoundError: Settings, weights and data do not fit.
        OSError: The disk is full.
        FloatingPointError: The loss or the gradient is not finite.
        StopRequested: SIGTERM or SIGUSR1 came; a SystemExit.
    """
    processes = distributed.find_processes("cpu" if config.replay else config.device)
    replayed = None
    if config.replay:
        config, replayed = read_replay(config, processes)
    config = resolve_precision(config, processes)
    experiment = make_experiment(config, processes)
    LOG.info("%s", describe_settings(config, processes, experiment.describe()))
    if config.dry_run:
        state = load_state(config, experiment)
        if processes.is_main and (cost := experiment.estimate_cost(state["step"] if state else 0)):
            LOG.info("%s", cost)
        return config.run_folder
    with open_run_folder(config, processes, experiment.model) as requests:
        state = load_state(config, experiment, replayed)
        run, task = experiment.set_up(state)
        if replayed:
            LOG.info("%s", repeat_step(run, task, replayed["stopped_by"]))
            return config.run_folder
        if has_steps := run.first_step < run.last_step or not run.is_validated:
            train(run, task, requests)
        else:
            LOG.info("nothing to train: %s has done %d steps", config.run_folder, run.first_step)
        experiment.finish(run, task, has_steps)
    return config.run_folder


def load_state(
    config: ConfigT, experiment: Experiment[TaskT], replayed: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the state that a run continues from, or that it replays; for a new run, load its initial weights.

    Raises:
        ValueError: The state is of other settings or data.
    """
    state = replayed or read_state(config)
    if state:
        check_same_data(state, experiment.data)
    elif report := experiment.load_weights():
        LOG.info("weights of %s\n%s", config.weights, report)
    return state
