"""Trainings by nnU-Net compared: initial weights of HySparK's network, or of the network of a plan."""

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hyspark.comparison.segmentation import SegmentationRuns, reading_text
from hyspark.config.nnunet_training import OWN_TRAINER, NnunetTrainingConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.cases import cases_digest
from hyspark.models.weights.files import read_contents
from hyspark.tasks.nnunet_training import import_runner, newest_checkpoint
from hyspark.training import nnunet_run
from hyspark.training.nnunet_data import PreparedData, check_prepared, find_cases_of_fold, find_prepared
from hyspark.utils.digests import content_digest, text_digest
from hyspark.utils.text import listing

OF_CASES = ("data", "json_list", "val_fraction", "subject_regex", "fold", "num_labelled", "label_fraction")
OF_EVERY_TRAINER = (*OF_CASES, "out", "weights", "seed", "device", "dataloader_workers", "plans", "trainer", "dry_run")
"""Settings that are read, or refused, with any trainer; of nnUNetTrainer_HySparK, `nnunet_run.READ` are too."""

PROGRAM = "import sys; from hyspark.tasks.nnunet_training import train_from_recipe; train_from_recipe(sys.argv[-1])"
"""Of a run; its last word is the recipe."""


class NnunetRuns(SegmentationRuns):
    """Trainings by nnU-Net."""

    program = (sys.executable, "-c", PROGRAM)
    reading = f"""\
nnU-Net trains, augments and predicts; its label maps are scored as `hyspark evaluate` scores. nnU-Net draws its batches
without a seed in processes of its own, so pairs do not share them.

{reading_text("so the same labelled cases and random initialisation")}"""
    scored_weights = {  # noqa: RUF012
        "validation": "Scored are the last weights of each run (checkpoint_final.pth), which no scored case has chosen."
    }

    def settings(self, base: Any) -> Any:
        """Return the settings with those at their defaults that this kind does not read, and say which these are."""
        if base.test_dir:
            raise ValueError(
                "test_dir: with --engine nnunet, the validation cases are scored, which nnU-Net predicts; drop test_dir"
            )
        find_prepared(base)
        read = {*OF_EVERY_TRAINER, *(nnunet_run.READ if base.trainer == OWN_TRAINER else ())}
        defaults = type(base)()
        unread = {
            name: getattr(defaults, name)
            for name in vars(base)
            if name not in read and getattr(base, name) != getattr(defaults, name)
        }
        if unread:
            print(f"not read, since nnU-Net, its trainer and its plan decide: {', '.join(sorted(unread))}")
        return replace(base, **unread)

    def scores_folder(self, config: SegmentationConfig) -> Path:
        return config.run_folder / "scores"

    def has_weights(self, config: Any) -> bool:
        return newest_checkpoint(config) is not None

    def num_training(self, config: Any) -> int:
        return len(find_cases_of_fold(config, find_prepared(config)).training)

    def data_digest(self, config: Any) -> str:
        prepared = find_prepared(config)
        cases = find_cases_of_fold(replace(config, num_labelled=0, label_fraction=1.0), prepared)
        files = [prepared.array(case.name) for case in (*cases.training, *cases.validation)]
        arrays = [content_digest(file) for file in files if file]
        parts = [cases_digest(part) for part in (cases.training, cases.validation)]
        return text_digest([*parts, content_digest(prepared.plans_file), *arrays])

    def check_data(self, configs: Sequence[Any], initial_weights: Mapping[str, str]) -> None:
        """Check data and weights."""
        config = configs[0]
        prepared = find_prepared(config)
        for one in {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}.values():
            find_cases_of_fold(one, prepared)  # raises if there are fewer than a run takes
        cases = find_cases_of_fold(replace(config, num_labelled=0), prepared)
        check_prepared(prepared, cases)
        import_runner()
        check_trainer(config, prepared)
        for name, weights in initial_weights.items():
            if weights != "none":
                report = load_as_trainer(replace(config, weights=weights), prepared, len(cases.names))
                print(f"{name}: " + "\n".join(report))


def check_trainer(config: NnunetTrainingConfig, prepared: PreparedData) -> None:
    """Check that there is such a trainer; of nnUNetTrainer_HySparK, that it takes settings and plan.

    Raises:
        ValueError: There is none, or as `nnunet_run.enter_settings`.
    """
    if config.trainer == OWN_TRAINER:
        nnunet_run.enter_settings(copy.deepcopy(prepared.plans), prepared.configuration, vars(config))
    else:
        find_trainer(config.trainer)


def find_trainer(name: str) -> Any:
    """Return the class of a trainer; raise ValueError if nnU-Net finds none."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"trainer: nnU-Net finds no {name}: {error}") from error


def load_as_trainer(config: NnunetTrainingConfig, prepared: PreparedData, num_classes: int) -> list[str]:
    """Load a file of initial weights as the trainer will.

    Returns:
        The report, in lines.

    Raises:
        FileNotFoundError, ValueError: The file does not fit.
    """
    plans = copy.deepcopy(prepared.plans)
    if config.trainer == OWN_TRAINER:
        run = nnunet_run.enter_settings(plans, prepared.configuration, vars(config))
        patch = plans["configurations"][prepared.configuration]["patch_size"]
        network = nnunet_run.build_trained_network(plans, patch, prepared.num_channels, num_classes)
        return nnunet_run.load_initial_weights(network.network, run.config, plans)
    check_whole_network(config, plans, prepared, num_classes)
    return [f"initial weights {config.weights}: of the network of the plan"]


def check_whole_network(
    config: NnunetTrainingConfig, plans: dict[str, Any], prepared: PreparedData, num_classes: int
) -> None:
    """Check that a file holds all weights that `nnUNetv2_train -pretrained_weights` reads; executes nothing of it.

    Raises:
        ValueError: It does not, or as `find_trainer`.
    """
    trainer = find_trainer(config.trainer)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    of_plan = manager.get_configuration(prepared.configuration)
    described: Sequence[Any] = (manager, of_plan)
    if "plans_manager" not in inspect.signature(trainer.build_network_architecture).parameters:  # of earlier trainers
        names = ("class_name", "init_kwargs", "init_kwargs_req_import")
        described = [getattr(of_plan, f"network_arch_{name}") for name in names]
    with torch.device("meta"):
        network = trainer.build_network_architecture(*described, prepared.num_channels, num_classes, True)
    contents = read_contents(config.weights)
    given = contents.get("network_weights") if isinstance(contents, Mapping) else None
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{config.weights}: expected a file for nnU-Net (network_weights), got another; make one: hyspark export "
            f"--nnunet --plans {prepared.plans_file} {config.weights} OUT.pth"
        )
    wanted = {name: value.shape for name, value in network.state_dict().items() if ".seg_layers." not in name}
    differing = [name for name, shape in wanted.items() if getattr(given.get(name), "shape", None) != shape]
    if differing:
        raise ValueError(
            f"{config.weights}: expected the weights of the network of {prepared.plans_file}, got others: "
            f"{listing(differing)} missing or of another shape; make a file for this plan: hyspark export --nnunet"
        )
