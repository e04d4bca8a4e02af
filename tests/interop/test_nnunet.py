"""From a plan of nnU-Net to nnU-Net's own training, by both of its routes; about three minutes on one core.

`nnUNetv2_train_pretrained` is not in every release: HYSPARK_NNUNET_MASTER names a checkout that has it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

import hyspark
from hyspark.cli import main
from tests.nnunet_prepared_files import prepare_as_nnunet

pytestmark = pytest.mark.interop
TRAINERS = '''
import os
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class Tiny:
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def on_train_start(self):
        super().on_train_start()
        torch.save(self.network.state_dict(), os.environ["INITIAL_WEIGHTS"])

    def perform_actual_validation(self, save_probabilities=False):
        """Mirroring of whole cases takes minutes on a CPU."""

class nnUNetTrainer_tiny(Tiny, nnUNetTrainer):
    """A trainer of two steps."""
'''
PLAN = (
    "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as run; run()",
    *("-d", "900", "-c", "3d_fullres", "-npfp", "1", "-np", "1", "-pl", "nnUNetPlannerResEncM"),
    *("-gpu_memory_target", "0.8", "-overwrite_plans_name", "smallPlans"),
)
TRAIN = ("from nnunetv2.run.run_training import run_training_entry as run; run()", "900", "3d_fullres", "all")
LIKE = (
    "from nnunetv2.experiment_planning.like_nnssl import plan_like_dynamic; plan_like_dynamic(900, 'own', {!r}, {!r})"
)
FROM_PRETRAINED = """
from nnunet_tiny import Tiny
from nnunetv2.run import run_training_from_pretrained as run
from nnunetv2.training.nnUNetTrainer.pretraining.dynamicPretrainedTrainer import DynamicPretrainedTrainer
class TinyDynamic(Tiny, DynamicPretrainedTrainer): pass
run.recursive_find_python_class = lambda *args: TinyDynamic
run.train_pretrained_entrypoint()
"""

SHORT: dict[str, Any] = {
    **{"batch_size": 2, "crops_per_volume": 1, "decoder_width": 32, "epochs": 2, "max_steps": 2, "warmup_epochs": 1},
    **{"lr": 1e-3, "device": "cpu", "dataloader_workers": 0, "prepare_workers": 1, "picture_every": 0},
    "val_fraction": 0.3,
}
"""Settings of a pre-training of two steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantoms) -> Path:
    """Three labelled phantoms as nnU-Net's raw data, planned and prepared."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path_factory.mktemp("nnunet")
    shutil.copytree(phantoms / "Dataset900_PhantomLabelled", folder / "raw" / "Dataset900_PhantomLabelled")
    for name in ("pre", "results", "trainers"):
        (folder / name).mkdir()
    (folder / "trainers" / "nnunet_tiny.py").write_text(TRAINERS)
    call(folder, *PLAN)
    return folder


@pytest.fixture(scope="module")
def exported(folder, phantoms) -> tuple[Path, Path]:
    """The encoder's weights of a short pre-training of the plan, and the file for nnU-Net."""
    plans = folder / "pre" / "Dataset900_PhantomLabelled" / "smallPlans.json"
    unlabelled = phantoms / "Dataset901_PhantomUnlabelled"
    run = hyspark.pretrain(data=unlabelled, out=folder / "run", model=f"spark/nnunet/{plans}", **SHORT)
    main.main(["export", "--nnunet", "--plans", str(plans), str(run.weights), str(folder / "nn.pth")])
    return run.weights, folder / "nn.pth"


def test_volumes_that_nnunet_has_prepared(folder, tmp_path):
    """The arrays are those of the writer of the fast tests, and a run reads them."""
    data_set = folder / "pre" / "Dataset900_PhantomLabelled"
    plans = data_set / "smallPlans.json"
    content = json.loads(plans.read_text())
    arrays = [file for file in sorted(data_set.glob("*/*.b2nd")) if not file.name.endswith("_seg.b2nd")]
    assert len(arrays) == 3
    for file in arrays:
        scan = folder / "raw" / data_set.name / "imagesTr" / f"{file.stem}_0000.nii.gz"
        written = prepare_as_nnunet([scan], content)
        read = blosc2.open(str(file), mode="r")[:]
        assert written.shape == read.shape
        np.testing.assert_allclose(written, read, atol=2e-3 * float(np.ptp(read)))
    run = hyspark.pretrain(data=data_set, out=tmp_path / "run", model=f"spark/nnunet/{plans}", **SHORT)
    assert run.weights.is_file()


def call(folder: Path, code: str, *words: str, first: Path | None = None) -> str:
    """Run Python code with nnU-Net's environment; return what it prints."""
    paths = [*([str(first)] if first else []), str(folder / "trainers"), *filter(None, sys.path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "pre"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_n_proc_DA": "0" if words[1:2] == ("3d_fullres",) else "1",
        "nnUNet_compile": "0",
        "OMP_NUM_THREADS": "1",
        "INITIAL_WEIGHTS": str(folder / "initial.pth"),
    }
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_encoder(folder: Path, weights: Path) -> None:
    """Check that a training began with the pre-trained encoder."""
    began = torch.load(folder / "initial.pth", weights_only=True)
    wanted = torch.load(weights, weights_only=True)["model"]
    names = [name for name in began if name.startswith("encoder.")]
    assert len(names) > 20
    assert all(torch.equal(began[name], wanted[name]) for name in names)


def test_the_released_route(folder, exported):
    weights, file = exported
    flags = ("-p", "smallPlans", "-tr", "nnUNetTrainer_tiny", "-pretrained_weights", str(file), "-device", "cpu")
    text = call(folder, *TRAIN, *flags)
    assert "Loading pretrained weights from file" in text
    assert "Training done." in text
    check_encoder(folder, weights)


def test_the_route_with_an_adaptation_plan(folder, exported):
    if not (master := os.environ.get("HYSPARK_NNUNET_MASTER")):
        pytest.skip("HYSPARK_NNUNET_MASTER names no checkout of nnU-Net with nnUNetv2_train_pretrained")
    weights, file = exported
    call(folder, LIKE.format(str(file), "smallPlans"), first=Path(master))
    flags = ("-p", "ptPlans_dynamic__own", "-tr", "TinyDynamic", "-device", "cpu")
    text = call(folder, FROM_PRETRAINED, *TRAIN[1:], *flags, first=Path(master))
    assert "Loaded Network (with dynamic adaptation)" in text
    assert "Designing BERT for Convolutional Networks" in text
    assert "Training done." in text
    check_encoder(folder, weights)
