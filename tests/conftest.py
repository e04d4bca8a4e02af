"""Small data and small settings that several tests share."""

from pathlib import Path

import pytest
import torch

from hyspark import report
from hyspark.config_finetune import FinetuneConfig
from hyspark.config_pretrain import PretrainConfig
from hyspark.data import datalist
from hyspark.data.phantom import write_phantoms

SMALL = {
    "encoder_widths": (6, 6, 12, 12, 24),
    "encoder_depths": (1, 1, 1, 1, 1),
    "expansions": (2, 2, 2, 2, 2),
    "vit_depth": 1,
    "spacing": (8.0, 8.0, 8.0),
    "device": "cpu",
    "dataloader_workers": 0,
    "prepare_workers": 1,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Several threads on tiny tensors only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's page without its curves, which take longer to draw than a small run; with them where `curves` says so."""
    if "curves" not in request.keywords:
        monkeypatch.setattr(report, "curves_figure", lambda curves, dark: None)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 labelled and 4 unlabelled phantom CTs in nnU-Net layout, and a dataset.json of all images."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(
        folder, num_labelled=3, num_unlabelled=4, spacings=((6.0, 6.0, 6.0), (5.0, 5.0, 8.0)), progress=False
    )
    datalist.write(datalist.build(folder), folder / "dataset.json")
    return folder


@pytest.fixture
def pretraining(phantoms: Path, tmp_path: Path) -> PretrainConfig:
    """Settings of a pre-training that takes seconds: 6 volumes, 3 steps an epoch, 2 epochs."""
    return PretrainConfig(
        **SMALL,
        data_path=str(phantoms),
        exp_dir=str(tmp_path / "run"),
        input_size=(32,),
        decoder_width=16,
        bs=2,
        crops_per_volume=2,
        ep=2,
        wp_ep=1,
        base_lr=1e-3,
        picture_every=0,
    )


@pytest.fixture
def finetuning(phantoms: Path, tmp_path: Path) -> FinetuneConfig:
    """Settings of a fine-tuning that takes seconds: 2 training cases and 1 validation case, 1 step an epoch, 4
    epochs.
    """
    return FinetuneConfig(
        **SMALL,
        data_dir=str(phantoms / "Dataset900_PhantomLabelled"),
        logdir=str(tmp_path / "finetune"),
        store_dir=str(phantoms / "prepared"),
        roi_x=32,
        roi_y=32,
        roi_z=32,
        batch_size=2,
        crops_per_volume=1,
        max_epochs=4,
        val_every=2,
        warmup_epochs=1,
        optim_lr=1e-3,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need CUDA are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
