"""nnU-Net trains and predicts with HySparK's network, and its own checkpoints load; about two minutes on one core."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import hyspark
from hyspark import load_pretrained
from hyspark.evaluation.embedding.networks import NetworkChoice, load_embedding_network
from hyspark.nnunet_trainers import FOLDER

pytestmark = pytest.mark.interop
ENTRY = {
    "plan": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry",
    "train": "nnunetv2.run.run_training import run_training_entry",
    "predict": "nnunetv2.inference.predict_from_raw_data import predict_entry_point",
}
SHORT = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
nnUNetTrainer.perform_actual_validation = lambda self, save_probabilities=False: None  # minutes a case on a CPU
"""
TINY = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainer_Tiny(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1, 1
"""
WIDTHS = [4, 8, 12, 16, 24]
OPTIONS = {"widths": WIDTHS, "vit_depth": 1, "num_heads": 4}
TRAIN = ("900", "3d_fullres", "all", "-p", "smallPlans", "-device", "cpu")


def run(folder, verb, *words, prelude="", fails=False, **environment):
    """Run a command of nnU-Net, as its own program does; return what it prints."""
    call = f"{prelude}\nfrom {ENTRY[verb]} as run\nrun()"
    names = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    names |= {"nnUNet_compile": "0", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1" if verb == "plan" else "0"}
    root = str(Path(hyspark.__file__).parents[1])
    names |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", call, *words],
        env=os.environ | names | environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantoms):
    """Two labelled phantoms, planned and prepared by nnU-Net; the patch is no multiple of 16."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    folder = tmp_path_factory.mktemp("nnunet")
    source = next(phantoms.glob("Dataset900*")) if not (phantoms / "imagesTr").is_dir() else phantoms
    shutil.copytree(source, folder / "raw" / source.name)
    (folder / "preprocessed").mkdir()
    (folder / "results").mkdir()
    run(
        folder, "plan", "-d", "900", "-c", "3d_fullres", "-npfp", "1", "-np", "1", "-overwrite_plans_name", "smallPlans"
    )
    plans = folder / "preprocessed" / source.name / "smallPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"] |= {"patch_size": [40, 32, 56], "batch_size": 1}
    kernels = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kernels["features_per_stage"] = [4] * kernels["n_stages"]
    plans.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """A training of one epoch of two steps, from weights of this package; what it printed."""
    source = hyspark.build_hybird(1, 5, 32, **OPTIONS)
    torch.save({"model": source.state_dict(), "config": {"spacing": [9.0] * 3, "num_heads": 4}}, folder / "own.pth")
    recipe = {"encoder_widths": WIDTHS, "vit_depth": 1, "num_heads": 4, "epochs": 1, "steps_per_epoch": 2, "lr": 0.001}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {"nnUNet_extTrainer": FOLDER, "HYSPARK_RECIPE": "recipe.yaml", "HYSPARK_WEIGHTS": "own.pth"}
    log = run(folder, "train", *TRAIN, "-tr", "nnUNetTrainer_HySparK", prelude=SHORT, **environment)
    return next(folder.glob("results/*/nnUNetTrainer_HySparK__smallPlans__3d_fullres")), source, log


def test_nnunet_trains_from_weights_of_this_package(trained):
    results, source, log = trained
    assert "Training done." in log
    assert "trained with 32 32 64, multiples of 16" in log
    assert "WARNING: own.pth was made with spacing 9.0 9.0 9.0" in log
    assert (results / "fold_all" / "checkpoint_final.pth").is_file()
    network = hyspark.build_hybird(1, 9, 32, **OPTIONS)
    report = load_pretrained(network, results / "fold_all" / "checkpoint_final.pth")
    assert report.missing == ()
    assert report.made_with["intensity"] == ["ct-zscore"]
    moved = [
        (value - source.state_dict()[key]).abs().max()
        for key, value in network.state_dict().items()
        if value.shape == source.state_dict()[key].shape and value.is_floating_point() and "pos_embed" not in key
    ]
    assert 0 < max(moved) < 0.05  # it began at these weights, and two steps moved them


def test_two_files_of_initial_weights_are_refused(folder, trained):
    """nnU-Net's own flag would be overridden silently."""
    checkpoint = str(trained[0] / "fold_all" / "checkpoint_final.pth")
    environment = {"nnUNet_extTrainer": FOLDER, "HYSPARK_RECIPE": "recipe.yaml", "nnUNet_results": str(folder / "two")}
    words = (*TRAIN, "-tr", "nnUNetTrainer_HySparK", "-pretrained_weights", checkpoint)
    log = run(folder, "train", *words, prelude=SHORT, fails=True, **environment, HYSPARK_WEIGHTS="own.pth")
    assert "-pretrained_weights and HYSPARK_WEIGHTS (or weights of HYSPARK_RECIPE): expected one file" in log
    assert "Training done." in run(folder, "train", *words, prelude=SHORT, **environment)


def test_nnunet_predicts_with_its_checkpoint_by_the_name_of_the_trainer(folder, trained):
    """Without the recipe: the plans hold the network."""
    images = next((folder / "raw").glob("*/imagesTr"))
    (folder / "in").mkdir(exist_ok=True)
    first = sorted(images.iterdir())[0]
    shutil.copy(first, folder / "in")
    words = (
        "-i",
        "in",
        "-o",
        "out",
        "-d",
        "900",
        "-c",
        "3d_fullres",
        "-f",
        "all",
        "-p",
        "smallPlans",
        "-device",
        "cpu",
    )
    words += ("-tr", "nnUNetTrainer_HySparK", "--disable_tta", "-step_size", "1", "-npp", "1", "-nps", "1")
    run(folder, "predict", *words, nnUNet_extTrainer=FOLDER)
    image, labels = nib.load(first), nib.load(folder / "out" / first.name.replace("_0000", ""))
    assert labels.shape == image.shape
    np.testing.assert_allclose(labels.affine, image.affine, atol=1e-4)


def test_checkpoints_of_nnunets_own_networks_load(folder):
    """Written by its own trainer, with its numpy scalars and its log."""
    (folder / "trainers").mkdir(exist_ok=True)
    (folder / "trainers" / "tiny_trainer.py").write_text(TINY)
    environment = {"nnUNet_extTrainer": str(folder / "trainers")}
    run(folder, "train", *TRAIN, "-tr", "nnUNetTrainer_Tiny", prelude=SHORT, **environment)
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans = json.loads(next((folder / "preprocessed").glob("*/smallPlans.json")).read_text())
    found = plans["configurations"]["3d_fullres"]
    given = found["architecture"]
    network = get_network_from_plans(
        *(given["network_class_name"], given["arch_kwargs"], given["_kw_requires_import"], 1, 4)
    )
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        report = load_pretrained(network, next(folder.glob(f"results/*/nnUNetTrainer_Tiny__*/fold_all/{name}")))
        assert {key.rpartition("seg_layers")[0] for key in report.missing} == {"decoder."}
        assert report.num_tensors == len(list(network.parameters()))
        assert report.made_with["spacing"] == pytest.approx(tuple(reversed(found["spacing"])))
        assert report.made_with["crop_size"] == (56, 32, 40)
        assert report.made_with["axis_order"] == (2, 1, 0)
    checkpoint = next(folder.glob("results/*/nnUNetTrainer_Tiny__*/fold_all/checkpoint_final.pth"))
    embedding = load_embedding_network(NetworkChoice(checkpoint))  # the plan is the checkpoint's
    assert embedding.window == (56, 32, 40)
    network.eval()
    crop = torch.rand(1, 1, 56, 32, 40, generator=torch.Generator().manual_seed(0))
    load_pretrained(network, checkpoint)
    with torch.no_grad():
        expected = network.encoder(crop.permute(0, 1, 4, 3, 2))[-1].permute(0, 1, 4, 3, 2)
        torch.testing.assert_close(embedding.encoder(crop)[-1], expected)
