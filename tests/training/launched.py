"""What a process under torchrun is part of: pre-trains by a recipe and writes what it saw at its first step as JSON.

torchrun --standalone --nproc_per_node=1 -m tests.training.launched RECIPE OUT
"""

import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import torch
import yaml
from torch import nn

from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import typed_values, write_yaml
from hyspark.tasks import launch as tasks_launch
from hyspark.tasks.pretrain import run_pretraining
from hyspark.training import loop

ROOT = Path(__file__).parents[2]


def launch(config, processes=1):
    """The command that runs this module for some settings, the folder to run it in, and the file it writes."""
    recipe, out = config.run_folder.with_suffix(".yaml"), config.run_folder.with_suffix(".json")
    write_yaml(config, recipe)
    run = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "-m",
        "tests.training.launched",
    ]
    return {"args": [sys.executable, *run, str(recipe), str(out)], "cwd": ROOT}, out


def seen(run):
    """The group, the wrapper of the model and the kinds of norm in it."""
    distributed = torch.distributed
    group = {"backend": distributed.get_backend(), "size": distributed.get_world_size()}
    norms = {type(m).__name__ for m in run.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return group | {"model": type(run.model).__name__, "norms": sorted(norms), "device": str(run.processes.device)}


def main():
    """Pre-train as the recipe says."""
    recipe, out = map(Path, sys.argv[1:])
    values = yaml.safe_load(recipe.read_text())
    names = {field.name for field in fields(PretrainConfig)}
    config = PretrainConfig(
        **typed_values({k: v for k, v in values.items() if k in names}, PretrainConfig, str(recipe))
    )

    def observed(run, *args, **kwargs):
        if os.environ["RANK"] == "0":
            out.write_text(json.dumps(seen(run)))
        return loop.train(run, *args, **kwargs)

    with mock.patch.object(tasks_launch, "train", observed):
        run_pretraining(config)


if __name__ == "__main__":
    main()
