"""`hyspark benefit --engine nnunet`: nnU-Net trains and predicts, and its report agrees with ours; three minutes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyspark
from hyspark.cli import main
from hyspark.comparison.nnunet import load_as_trainer
from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.training.nnunet_data import find_prepared

pytestmark = pytest.mark.interop
PLAN = (
    "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as run; run()",
    *("-d", "900", "-c", "3d_fullres", "-npfp", "1", "-np", "1", "-overwrite_plans_name", "smallPlans"),
)
TRAINER = '''
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

class nnUNetTrainer_twoSteps(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

class nnUNetTrainer_earlier(nnUNetTrainer):
    """Of nnU-Net before 2.8, by the parameters of its network."""

    @staticmethod
    def build_network_architecture(name, kwargs, imported, num_channels, num_classes, enable_deep_supervision=True):
        return get_network_from_plans(name, kwargs, imported, num_channels, num_classes, True, enable_deep_supervision)
'''
SMALL = {"encoder_widths": (4, 8, 12, 16, 24), "vit_depth": 1, "num_heads": 4, "decoder": "light", "decoder_width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantoms):
    """Three labelled phantoms, planned and prepared by nnU-Net with a small network."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path_factory.mktemp("nnunet")
    shutil.copytree(phantoms / "Dataset900_PhantomLabelled", folder / "raw" / "Dataset900_PhantomLabelled")
    for name in ("preprocessed", "results", "trainers"):
        (folder / name).mkdir()
    (folder / "trainers" / "two_steps.py").write_text(TRAINER)
    variables = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    subprocess.run([sys.executable, "-c", *PLAN], env=os.environ | variables, check=True, capture_output=True)
    file = plans_file(folder)
    content = json.loads(file.read_text())
    content["configurations"]["3d_fullres"] |= {"patch_size": [40, 32, 48], "batch_size": 1}
    kernels = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kernels["features_per_stage"] = [4] * kernels["n_stages"]
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def environment(monkeypatch):
    """One thread and no further processes, for nnU-Net on a CPU."""
    root = str(Path(hyspark.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    for name, value in (("compile", "0"), ("def_n_proc", "1"), ("n_proc_DA", "0")):
        monkeypatch.setenv(f"nnUNet_{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", paths)


def plans_file(folder):
    return folder / "preprocessed" / "Dataset900_PhantomLabelled" / "smallPlans.json"


def words(folder, out, *initial_weights, **settings):
    """The command line of a comparison with one labelled case."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", *map(str, as_tuple(value)))]
    data = folder / "raw" / "Dataset900_PhantomLabelled"
    given = ["--engine", "nnunet", "--plans", plans_file(folder), "--data", data, "--out", out, "--num_labelled", 1]
    given += ["--seeds", 0, "--device", "cpu", "--dataloader_workers", 0, "--initial_weights", *initial_weights]
    return ["benefit", *map(str, given), *flags]


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.usefixtures("environment")
def test_a_comparison_of_weights_of_hyspark(folder, capsys):
    """An interrupted run continues, a finished one stays, and scores are those that nnU-Net reports."""
    shape = {name.removeprefix("encoder_"): value for name, value in SMALL.items()}
    torch.save({"model": hyspark.build_hybird(1, 9, 32, **shape).state_dict()}, folder / "own.pth")
    out = folder / "benefit"
    given = words(
        folder, out, "scratch=none", f"own={folder / 'own.pth'}", **SMALL, epochs=2, steps_per_epoch=2, lr=1e-3
    )
    main.main(given)
    numbers = json.loads((out / "benefit.json").read_text())
    assert (numbers["planned"], numbers["finished"]) == (2, 2)
    assert [cell["steps"] for cell in numbers["cells"]] == [[4], [4]]
    assert numbers["cells"][1]["pairs"] == [0]
    assert "covering" in (out / "runs" / "own_1_seed0" / "log.txt").read_text()  # the report on the initial weights
    for run in sorted((out / "runs").iterdir()):
        check_scores(run)
    text = (out / "benefit.md").read_text()
    assert "nnU-Net trains, augments and predicts" in text
    assert "engine: nnU-Net" in text
    capsys.readouterr()
    shutil.rmtree(out / "runs" / "own_1_seed0" / "scores")  # as if interrupted before
    main.main([*given, "--plan"])
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "finished",
        "begun, at step 4",
    ]
    main.main(given)
    log = (out / "runs" / "own_1_seed0" / "log.txt").read_text()
    assert log.count("Epoch 1") == 1  # it has predicted again, not trained
    assert json.loads((out / "benefit.json").read_text())["cells"] == numbers["cells"]


def check_scores(run):
    """Hold the Dice of a run against those in nnU-Net's own summary.json."""
    (summary,) = run.glob("nnunet/results/*/*/fold_0/validation/summary.json")
    (case,) = json.loads(summary.read_text())["metric_per_case"]
    rows = list(csv.DictReader((run / "scores" / "cases.csv").read_text().splitlines()))
    assert len(rows) == len(case["metrics"]) == 8
    for label, row in enumerate(rows, start=1):
        theirs = case["metrics"][str(label)]
        assert float(row["dice"]) == pytest.approx(theirs["Dice"], abs=1e-9)
        assert int(row["truth_voxels"]) == theirs["n_ref"]
        assert int(row["predicted_voxels"]) == theirs["n_pred"]


@pytest.mark.usefixtures("environment")
def test_a_comparison_of_weights_of_the_plans_network(folder, phantoms, monkeypatch, capsys):
    """Pre-trained for the plan, exported for nnU-Net, and trained by a trainer of nnU-Net's."""
    monkeypatch.setenv("nnUNet_extTrainer", str(folder / "trainers"))
    run = hyspark.pretrain(
        data=phantoms / "Dataset901_PhantomUnlabelled",
        out=folder / "run",
        model=f"spark/nnunet/{plans_file(folder)}",
        batch_size=2,
        crops_per_volume=1,
        decoder_width=32,
        epochs=1,
        max_steps=1,
        warmup_epochs=1,
        device="cpu",
        dataloader_workers=0,
        prepare_workers=1,
        picture_every=0,
    )
    file = folder / "for_nnunet.pth"
    main.main(["export", "--nnunet", "--plans", str(plans_file(folder)), str(run.weights), str(file)])
    out = folder / "plan_benefit"
    main.main(words(folder, out, "scratch=none", f"own={file}", trainer="nnUNetTrainer_twoSteps"))
    assert json.loads((out / "benefit.json").read_text())["finished"] == 2
    assert "Loading pretrained weights from file" in (out / "runs" / "own_1_seed0" / "log.txt").read_text()
    config = NnunetTrainingConfig(plans=str(plans_file(folder)), trainer="nnUNetTrainer_twoSteps")
    prepared = find_prepared(config)
    for trainer in ("nnUNetTrainer_twoSteps", "nnUNetTrainer_earlier"):
        load_as_trainer(replace(config, trainer=trainer, weights=str(file)), prepared, 9)
    for weights, expected in (
        (run.weights, r"expected a file for nnU-Net \(network_weights\).*hyspark export --nnunet --plans"),
        (damaged(file), "missing or of another shape; make a file for this plan"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_as_trainer(replace(config, weights=str(weights)), prepared, 9)
    with pytest.raises(ValueError, match="trainer: nnU-Net finds no nnUNetTrainer_None"):
        load_as_trainer(
            NnunetTrainingConfig(**vars(config) | {"trainer": "nnUNetTrainer_None"}), find_prepared(config), 9
        )


def damaged(file):
    """Another file, without a weight."""
    contents = torch.load(file, weights_only=True)
    del contents["network_weights"][next(iter(contents["network_weights"]))]
    torch.save(contents, file.with_name("damaged.pth"))
    return file.with_name("damaged.pth")
