"""MONAI bundles: what MONAI computes with one is what predict computes, for every setting and any position."""

import json
import logging
import socket
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai import bundle as monai_bundle
from torch import nn

from hyspark.cli.main import main
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.intensity import SCALES
from hyspark.data.synthetic.phantom import make_phantom
from hyspark.evaluation.segmentation.inference import TrainedNetwork, load_network
from hyspark.evaluation.segmentation.predict import predict_segmentation
from hyspark.exports import deploy
from hyspark.exports.bundle import predict_by_bundle, write_bundle
from hyspark.exports.bundle_texts import bundle_metadata, bundle_readme
from tests.exports.tiny_runs import NAMES, SETTINGS, least_dice, write_ct, write_run

INTENSITIES = {
    "ct": {},
    "ct, light decoder": {"decoder": "light", "decoder_width": 64},
    "ct, larger than the volume": {"crop_size": (64, 64, 48)},
    "ct-zscore of two channels": {
        "intensity": ("ct-zscore",),
        "image_channels": (0, 2),
        "input_mean": (20.0, 50.0),
        "input_std": (90.0, 120.0),
    },
    "ct and mr": {"intensity": ("ct", "mr"), "image_channels": (0, 1)},
    "mr, larger than the volume": {"intensity": ("mr",), "crop_size": (64, 64, 48)},
    "zscore": {"intensity": ("zscore",)},
    "none, of the second channel": {"intensity": ("none",), "image_channels": (1,)},
    "flips of sides": {"left_right": ("liver=aorta",), "infer_overlap": 0.25, "sw_batch_size": 1},
}
FAST = ("ct-zscore of two channels", "ct and mr")
"""Settings that take each kind of step; the others take long."""
REQUIRED = (
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"),
    *("description", "authors", "copyright", "network_data_format"),
)
TENSOR = {
    "type": {"type": "string"},
    "format": {"type": "string"},
    "num_channels": {"type": "integer"},
    "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
    "dtype": {"type": "string"},
    "value_range": {"type": "array", "items": {"type": "number"}},
}
TENSORS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"type": "object", "properties": TENSOR, "required": [*TENSOR]},
}
TEXTS = {name: {"type": "string"} for name in REQUIRED if name not in ("required_packages_version",)}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [*REQUIRED],
    "properties": TEXTS
    | {"changelog": {"type": "object"}, "required_packages_version": {"type": "object"}}
    | {
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        }
    },
}
"""What the specification of metadata.json asks for, without its texts."""

OF_MONAI = "ignore:parsing config_file|NvImgCodecPydicomReader|No hash value"
"""MONAI warns that configs may run code, of a reader that is not used, and that a schema has no checksum."""


@pytest.fixture
def offline(monkeypatch):
    """Any connection is an error."""

    def refuse(*args, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def bundle(tmp_path):
    """A bundle of a run with scores, and the run."""
    run = write_run(tmp_path / "run")
    organs = {name: {"dice": 0.9, "hd95_mm": 2.5, "nsd": None, "num_cases": 2} for name in NAMES[1:]}
    for row in organs.values():
        row.update(num_missed=0, num_absent=0, num_absent_predicted=0)
    protocol = {"weights": "/home/jane/best.pth", "data": "validation cases of /home/jane/data", "overlap": 0.5}
    summary = {"protocol": protocol, "organs": organs, "mean": organs["liver"], "failed": {"jane_doe": "unreadable"}}
    (run / "scores").mkdir()
    (run / "scores" / "summary.json").write_text(json.dumps(summary))
    write_bundle(load_network(run), run, tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize(
    "changes",
    [pytest.param(one, marks=() if name in FAST else pytest.mark.slow) for name, one in INTENSITIES.items()],
    ids=INTENSITIES,
)
def test_monai_computes_the_label_map_of_predict(changes, tmp_path, offline):
    run = write_run(tmp_path / "run", **changes)
    trained = load_network(run)
    write_ct(tmp_path / "images", trained.config.image_channels)
    write_bundle(trained, run, tmp_path / "net")
    by_bundle = predict_by_bundle(tmp_path / "net")(tmp_path / "images", tmp_path / "by_bundle")
    (by_run,) = predict_segmentation(run, [tmp_path / "images"], tmp_path / "out", device="cpu", num_workers=1).files
    assert least_dice(by_run, by_bundle) > 0.9995


def test_voxels_on_the_border_of_the_region_belong_to_it(tmp_path):
    """At half the network's spacing every second voxel of the file is one; the CT fills the file."""
    run = write_run(tmp_path / "run", spacing=(8.0, 8.0, 8.0))
    phantom = make_phantom(0, spacing=(4.0, 4.0, 4.0), orientation="LPI", extent_scale=0.6)
    image = nib.Nifti1Image(np.maximum(phantom.image, -150)[6:-7, 8:-6, 3:-4], phantom.affine)
    (tmp_path / "images").mkdir()
    image.dataobj[:3], image.dataobj[:, -2:] = -1000, -1000
    nib.save(image, tmp_path / "images" / "ct_0000.nii.gz")
    write_bundle(load_network(run), run, tmp_path / "net")
    by_bundle = predict_by_bundle(tmp_path / "net")(tmp_path / "images", tmp_path / "by_bundle")
    (by_run,) = predict_segmentation(run, [tmp_path / "images"], tmp_path / "out", device="cpu", num_workers=1).files
    one, other = (np.asanyarray(nib.load(path).dataobj).squeeze() for path in (by_run, by_bundle))
    assert len(np.unique(one)) > 1
    assert (one != other).sum() <= 1


@pytest.mark.filterwarnings(OF_MONAI)
def test_the_command_line_of_monai_runs_it(bundle, tmp_path, offline, monkeypatch):
    """The functions behind `python -m monai.bundle`, typed in the folder of the bundle."""
    write_ct(bundle / "images", degrees=0)
    monkeypatch.chdir(bundle)
    files = {"config_file": "configs/inference.json", "meta_file": "configs/metadata.json"}
    monai_bundle.run(**files, logging_file=False)
    (made,) = Path("eval").glob("*.nii.gz")
    assert made.name == "ct_0000_seg.nii.gz"
    assert nib.load(made).get_data_dtype() == np.uint8
    monai_bundle.verify_net_in_out("network_def", **files, n=2, device="cpu")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    monai_bundle.verify_metadata(meta_file="configs/metadata.json", filepath=str(tmp_path / "schema.json"))
    workflow = monai_bundle.ConfigWorkflow(*files.values(), logging_file=False, workflow_type="inference")
    workflow.initialize()
    assert not workflow.check_properties()


@pytest.mark.filterwarnings(OF_MONAI)
@pytest.mark.slow
def test_its_evaluation_measures_dice_on_the_file(bundle, tmp_path, offline, monkeypatch):
    write_ct(bundle / "images")
    predicted = nib.load(predict_by_bundle(bundle)(bundle / "images", tmp_path / "out"))
    truth = np.roll(np.asanyarray(predicted.dataobj).squeeze(), 2, axis=0)
    (bundle / "labels").mkdir()
    nib.save(nib.Nifti1Image(truth, predicted.affine), bundle / "labels" / "ct.nii.gz")
    monkeypatch.chdir(bundle)
    monai_bundle.run(
        config_file=["configs/inference.json", "configs/evaluate.json"],
        meta_file="configs/metadata.json",
        logging_file=False,
        device="$torch.device('cpu')",
    )
    labels = np.asanyarray(predicted.dataobj).squeeze()
    dice = [2 * ((labels == v) & (truth == v)).sum() / ((labels == v).sum() + (truth == v).sum()) for v in (1, 2)]
    (row,) = [line for line in Path("eval/metrics.csv").read_text().splitlines() if "mean_dice" in line]
    assert float(row.split(",")[-1]) == pytest.approx(np.mean(dice), abs=1e-4)


def test_its_page_names_classes_and_scores_and_nobody(bundle):
    page = (bundle / "docs" / "README.md").read_text()
    assert "| 1 | liver |" in page
    assert "| liver | 0.900 |" in page
    assert "8 x 7 x 10 mm" in page
    everything = "".join(path.read_text() for path in bundle.rglob("*") if path.suffix in (".json", ".md"))
    assert "jane" not in everything
    assert "moved away" not in everything


@pytest.mark.parametrize("intensity", SCALES)
def test_every_intensity_is_described(intensity):
    values = {"input_mean": (20.0,), "input_std": (90.0,)} if intensity == "ct-zscore" else {}
    config = SegmentationConfig(**SETTINGS, intensity=(intensity,), **values)
    trained = TrainedNetwork(nn.Identity(), config, NAMES, [])
    assert "- intensities: channel 0: " in bundle_readme(trained, Path("none"), "net")
    image = bundle_metadata(trained, "net")["network_data_format"]["inputs"]["image"]
    assert image["format"] == ("hounsfield" if intensity in ("ct", "ct-zscore") else "magnitude")


def test_a_bundle_is_compared_before_it_appears(tmp_path, capsys, caplog):
    run, image = write_run(tmp_path / "run"), write_ct(tmp_path / "images")
    main(["export", "--bundle", str(run), str(tmp_path / "net"), "--check", str(image)])
    assert "Dice liver 1.0000, aorta 1.0000" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"LICENSE", "configs", "docs", "models"}
    with pytest.raises(SystemExit):
        main(["export", "--bundle", str(run), str(tmp_path / "net"), "--check", str(image)])
    assert "expected a new or empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bundle_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    run, image = write_run(tmp_path / "run"), write_ct(tmp_path / "images")

    def write_other(trained, source, folder):
        config = replace(trained.config, hu_max=400.0)
        write_bundle(trained._replace(config=config), source, folder)

    monkeypatch.setattr(deploy, "write_bundle", write_other)
    with pytest.raises(ValueError, match=r"expected the label map of `hyspark predict`.*Dice (liver|aorta) 0"):
        deploy.export_bundle(run, tmp_path / "net", str(image))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]


@pytest.fixture(autouse=True)
def _logs_of_monai():
    """Puts back the level of the root logger, which MONAI's workflows change."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)
