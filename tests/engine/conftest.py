"""Small images and settings to classify them by, which several tests share."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyspark.config_classify import ClassifyConfig
from hyspark.engine import classified

Writer = Callable[[Path, Mapping[str, int], int], None]


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
def classifying_drawn(image_data: Path, tmp_path: Path) -> ClassifyConfig:
    """A run that takes seconds: 2 steps an epoch, 2 epochs; with its pictures, which take longer than the rest."""
    return ClassifyConfig(
        data_dir=str(image_data),
        logdir=str(tmp_path / "run"),
        model="timm/test_resnet",
        channels=1,
        input_size=32,
        batch_size=8,
        max_epochs=2,
        freeze_epochs=0,
        optim_lr=1e-3,
        device="cpu",
        dataloader_workers=0,
    )


@pytest.fixture
def classifying(classifying_drawn: ClassifyConfig, monkeypatch: pytest.MonkeyPatch) -> ClassifyConfig:
    """The same without pictures."""
    monkeypatch.setattr(classified, "mistakes_figure", lambda scored, images: None)
    return classifying_drawn
