"""Small data and small settings that several tests share: volumes, images."""

import multiprocessing.context
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets import build, datalist_json
from hyspark.data.synthetic.phantom import write_phantoms
from hyspark.evaluation.classification import evaluate
from hyspark.evaluation.embedding import report as embedding_report
from hyspark.evaluation.segmentation import evaluate as segmentation_evaluate
from hyspark.reports import data_check_page, run_page
from hyspark.tasks import contrastive_task, masked_task
from hyspark.utils.log import LOG
from hyspark.utils.processes import STOP_SIGNALS
from tests.fork_server import SERVER

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start; threads of two would wait for each other

Writer = Callable[[Path, Mapping[str, int], int], None]

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
def _handlers_of_signals():
    """Puts back the handlers that a verb under torchrun's variables replaces."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _worker_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes come from the fork server, which spares each its imports; `spawn` starts them as users do."""
    if "spawn" not in request.keywords:
        monkeypatch.setitem(multiprocessing.context._concrete_contexts, "spawn", SERVER)


@pytest.fixture(autouse=True)
def _level_of_log():
    """Puts back the level of the logger, which a verb sets."""
    before = LOG.level
    yield
    LOG.setLevel(before)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Several threads on tiny tensors only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without curves and empty pictures in a run, since drawing takes longer than a run; `curves` draws."""
    if "curves" not in request.keywords:
        monkeypatch.setattr(run_page, "curves_figure", lambda curves, dark: None)
        monkeypatch.setattr(data_check_page, "drawn_histograms", lambda examined: None)
        for module, name in (
            (masked_task, "reconstruction_panel"),
            (contrastive_task, "views_panel"),
            (segmentation_evaluate, "segmentation_panel"),
            (embedding_report, "projection_figure"),
        ):
            monkeypatch.setattr(module, name, lambda *args, **options: Figure(figsize=(0.1, 0.1)))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 labelled and 4 unlabelled phantom CTs in nnU-Net layout, and a dataset.json of all images."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(
        folder, num_labelled=3, num_unlabelled=4, spacings=((6.0, 6.0, 6.0), (5.0, 5.0, 8.0)), progress=False
    )
    datalist_json.write_datalist(build.build_datalist(folder), folder / "dataset.json")
    return folder


@pytest.fixture
def pretraining(phantoms: Path, tmp_path: Path) -> PretrainConfig:
    """Settings of a pre-training that takes seconds: 6 volumes, 3 steps an epoch, 2 epochs."""
    return small_pretraining(phantoms, tmp_path / "run")


def small_pretraining(phantoms: Path, out: Path) -> PretrainConfig:
    """The settings of `pretraining`."""
    return PretrainConfig(
        **SMALL,
        data=str(phantoms),
        out=str(out),
        crop_size=(32,),
        decoder_width=16,
        batch_size=2,
        crops_per_volume=2,
        epochs=2,
        warmup_epochs=1,
        lr=1e-3,
        picture_every=0,
    )


@pytest.fixture
def finetuning(phantoms: Path, tmp_path: Path) -> SegmentationConfig:
    """Settings of a fine-tuning that takes seconds: 2 training cases and 1 validation case, 1 step an epoch, 4
    epochs.
    """
    return SegmentationConfig(
        **SMALL,
        data=str(phantoms / "Dataset900_PhantomLabelled"),
        out=str(tmp_path / "finetune"),
        store_dir=str(phantoms / "prepared"),
        crop_size=(32,),
        batch_size=2,
        crops_per_volume=1,
        epochs=4,
        val_every=2,
        warmup_epochs=1,
        lr=1e-3,
    )


@pytest.fixture(scope="session")
def write_images() -> Writer:
    """Writes noise to a folder for each class, with a bright corner in those of the second."""

    def write(folder: Path, counts: Mapping[str, int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        for label, (name, num) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 120, (36, 40), dtype=np.uint8)
                pixels[:20, :20] += 130 * label
                Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")

    return write


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory, write_images: Writer) -> Path:
    """16 training images of two classes, 8 to validate on, 6 to test on."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", {"dark": 10, "light": 6}, 0)
    write_images(folder / "val", {"dark": 4, "light": 4}, 1)
    write_images(folder / "test", {"dark": 3, "light": 3}, 2)
    return folder


@pytest.fixture
def classifying_drawn(image_data: Path, tmp_path: Path) -> ClassificationConfig:
    """A run that takes seconds: 2 steps an epoch, 2 epochs; with its pictures, which take longer than the rest."""
    return ClassificationConfig(
        data=str(image_data),
        out=str(tmp_path / "run"),
        model="timm/test_resnet",
        in_channels=1,
        crop_size=32,
        batch_size=8,
        epochs=2,
        freeze_epochs=0,
        lr=1e-3,
        device="cpu",
        dataloader_workers=0,
    )


@pytest.fixture
def classifying(classifying_drawn: ClassificationConfig, monkeypatch: pytest.MonkeyPatch) -> ClassificationConfig:
    """The same without pictures."""
    monkeypatch.setattr(evaluate, "mistakes_figure", lambda scored, images: None)
    return classifying_drawn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need CUDA are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
