"""Fine-tuning for segmentation outside of its steps: labelled cases, the network, and the end of a run.

Source of the recipe: UNETR's BTCV example (Project-MONAI/research-contributions), the usual stand-in for the paper's.
"""

from functools import partial
from pathlib import Path
from typing import Any

from hyspark.config.recipes import write_yaml
from hyspark.config.segmentation import SegmentationConfig, check_decoder
from hyspark.data.batches.loader import Shard
from hyspark.evaluation.segmentation.evaluate import are_cases_scored
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.evaluation.segmentation.test_cases import find_held_out, prepare_held_out, score_held_out
from hyspark.models.compile import compile_blocks
from hyspark.models.segmentation import Hybird
from hyspark.models.weights.load import LoadReport
from hyspark.reports import run_page
from hyspark.tasks.launch import Experiment, launch
from hyspark.tasks.segmentation_task import SegmentationTask, best_and_last, describe_last_weights
from hyspark.training import optim
from hyspark.training.distributed import Processes
from hyspark.training.initial_weights import initialise, load_volume_weights
from hyspark.training.labelled_cases import find_run_cases, label_fault, left_right_pairs, unpaired_sides
from hyspark.training.losses import DiceAndCrossEntropy
from hyspark.training.run import Run, make_run
from hyspark.training.run_folder import steps_per_epoch
from hyspark.training.run_volumes import check_files_exist, describe_cases, prepare_run_volumes
from hyspark.utils.digests import content_digest
from hyspark.utils.log import LOG


def run_segmentation(config: SegmentationConfig) -> Path:
    """Fine-tune for segmentation as the settings say, or continue; see `launch`."""
    return launch(config, SegmentationExperiment)


class SegmentationExperiment(Experiment[SegmentationTask]):
    """Fine-tuning for segmentation."""

    def __init__(self, config: SegmentationConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.shard = Shard(config.batch_size, processes.rank, processes.world_size)
        self.training, self.validation, self.names, notes = find_run_cases(config)
        for note in notes:
            LOG.warning("%s", note)
        self.data = describe_cases(self.training, self.validation)
        if config.dry_run:
            check_files_exist(config, [*self.training, *self.validation])
            find_held_out(config, self.names)
        swaps = left_right_pairs(config, self.names)
        self.model = initialise_segmentation(config, len(self.names))
        if config.flip_prob[0] and (unpaired := unpaired_sides(self.names, swaps)):
            LOG.warning(
                "crops are flipped left to right, and these classes say left or right: %s; name the pairs in "
                "left_right, or set the first of flip_prob to 0",
                ", ".join(unpaired),
            )

    def describe(self) -> dict[str, str]:
        """Describe data, classes, network and steps."""
        c = self.config
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return {
            "data": f"{len(self.training)} training and {len(self.validation)} validation cases from {c.data}",
            "classes": ", ".join(self.names),
            "model": f"hybird, {millions:.1f} M parameters, crops of {' x '.join(map(str, c.crop_shape))}",
            "steps": f"{c.epochs} epochs of {steps_per_epoch(c, len(self.training))}, "
            f"{c.batch_size * c.crops_per_volume} crops each",
        }

    def load_weights(self) -> LoadReport | None:
        """Load pre-trained weights; refuse settings of the other decoder."""
        check_decoder(self.config)
        if self.config.weights == "none":
            return None
        return load_volume_weights(self.model, self.config.weights, self.config)

    def set_up(self, state: dict[str, Any] | None) -> tuple[Run, SegmentationTask]:
        """Prepare the volumes, and make run and task."""
        config, processes = self.config, self.processes
        fault = partial(label_fault, names=self.names)
        volumes = prepare_run_volumes(config, processes, Path(config.data), self.training, self.validation, fault)
        self.held_out = prepare_held_out(config, processes, self.names)
        has_ignored = any(case.ignore is not None for case in self.training)
        criterion = DiceAndCrossEntropy(len(self.names), config.background_weight, has_ignored=has_ignored)
        criterion.to(processes.device)
        best = state["best"] if state else -1.0
        trained_on = [content_digest(case.image) for case in volumes.training_cases]
        task = SegmentationTask(config, self.shard, volumes, self.names, criterion, best, trained_on)
        ratio = optim.finetuning_encoder_lr_ratio(config)
        run = make_run(
            config,
            self.data,
            processes,
            self.model,
            steps_per_epoch(config, len(volumes.training)),
            state,
            excluded=volumes.excluded,
            val_every=config.val_every,
            make_optimizer=partial(optim.make_adamw, layer_decay=config.layer_decay, encoder_lr_ratio=ratio),
        )
        return run, task

    def finish(self, run: Run, task: SegmentationTask, has_trained: bool) -> None:
        """Score the last weights on validation and further cases, unless that is done; write the report."""
        config, processes, folder = self.config, self.processes, self.config.run_folder
        if not has_trained and processes.is_main and run.first_step <= run.last_step:  # no fewer steps than it has done
            write_yaml(config, folder / "config.yaml")
        run.model.eval()
        cases = task.volumes.validation_cases
        given = (folder / "scores", config, self.names, cases, processes, task.source(run))
        if not task.has_scored and not are_cases_scored(*given):
            task.write_validation_scores(run)
        weights = describe_last_weights(config, run)
        score_held_out(run.network, config, self.names, self.held_out, processes, weights, task.trained_on)
        if processes.is_main:
            if dice_of := best_and_last(folder):
                LOG.info("%s", run_page.dice_table(dice_of))
            LOG.info("report   %s", task.write_report(run))
            LOG.info("scores   %s", folder / "scores")


def initialise_segmentation(config: SegmentationConfig, num_classes: int) -> Hybird:
    """Build the network with random weights from the seed."""
    network = initialise(partial(hybird_from_config, config, num_classes), config.seed)
    if config.compile == "blocks" and not config.replay:
        compile_blocks(network)
    return network
