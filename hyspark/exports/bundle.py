"""A fine-tuned segmentation network as a MONAI bundle, and predicting with one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hyspark.evaluation.segmentation.inference import TrainedNetwork
from hyspark.exports.agreement import Predict
from hyspark.exports.bundle_configs import evaluation_config, inference_config
from hyspark.exports.bundle_texts import LICENSE_TEXT, bundle_metadata, bundle_readme
from hyspark.utils.install import extra_error
from hyspark.utils.log import silence


def import_bundle_packages() -> None:
    """Import the packages that run a MONAI bundle.

    Raises:
        ModuleNotFoundError: One is not installed.
    """
    try:
        import fire  # noqa: F401
        import ignite  # noqa: F401
    except ImportError as error:
        raise extra_error(error, "--bundle needs pytorch-ignite and fire", "bundle", "fire", "ignite") from error


def write_bundle(trained: TrainedNetwork, source: Path, folder: Path) -> None:
    """Write a MONAI bundle.

    Args:
        trained: The network.
        source: Its best.pth or run folder, whose scores docs/README.md shows.
        folder: The folder to make; its name is that of the bundle.
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    torch.save(trained.network.state_dict(), folder / "models" / "model.pt")
    write_config(folder / "configs" / "metadata.json", bundle_metadata(trained, folder.name))
    write_config(folder / "configs" / "inference.json", inference_config(trained))
    write_config(folder / "configs" / "evaluate.json", evaluation_config(trained))
    (folder / "docs" / "README.md").write_text(bundle_readme(trained, source, folder.name), encoding="utf-8")
    (folder / "LICENSE").write_text(LICENSE_TEXT)


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a bundle."""
    path.write_text(json.dumps(content, indent=4) + "\n")


def predict_by_bundle(folder: Path) -> Predict:
    """Return a function that predicts with a bundle, on the CPU."""

    def predict(images: Path, out: Path) -> Path:
        from monai.bundle import ConfigWorkflow

        with silence():
            workflow = ConfigWorkflow(
                str(folder / "configs" / "inference.json"),
                str(folder / "configs" / "metadata.json"),
                logging_file=False,
                workflow_type="inference",
                bundle_root=str(folder),
                dataset_dir=str(images),
                output_dir=str(out),
                device="$torch.device('cpu')",
            )
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        made = sorted(out.glob("*.nii.gz"))
        if not made:
            raise ValueError(f"{folder.name}: the bundle wrote no label map")
        return made[0]

    return predict
