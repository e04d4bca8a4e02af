"""Runs of tiny untrained networks, and CTs in odd positions, to export and compare on."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import from_matvec

from hyspark.config.recipes import as_plain
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.synthetic.phantom import make_phantom
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.training import checkpoint

NAMES = ["background", "liver", "aorta"]
SETTINGS = {
    "encoder_widths": (6, 6, 12, 12, 24),
    "encoder_depths": (1,) * 5,
    "expansions": (2,) * 5,
    "vit_depth": 1,
    "spacing": (8.0, 7.0, 10.0),
    "crop_size": (32, 16, 16),
    "rot90_prob": 0.0,
    "data": "moved away",
}


def write_run(folder: Path, **changes: Any) -> Path:
    """Write a run folder with a random network, whose classes all appear in a CT."""
    config = SegmentationConfig(**{**SETTINGS, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = hybird_from_config(config, len(NAMES))
    with torch.no_grad():
        head = network.decoder.out
        (head.conv if config.decoder == "released" else head).weight.mul_(20)
    contents = {"model": network.state_dict(), "config": as_plain(config), "classes": NAMES, "trained_on": ["0" * 12]}
    checkpoint.save(contents, folder / "best.pth")
    return folder


def write_ct(folder: Path, channels: tuple[int, ...] = (0,), orientation: str = "PIR", degrees: float = 20.0) -> Path:
    """Write a CT of unequal spacing whose axes are permuted, flipped and oblique; the path of its first channel."""
    phantom = make_phantom(3, spacing=(6.0, 5.0, 9.0), orientation=orientation, extent_scale=0.8)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = from_matvec(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])) @ phantom.affine
    folder.mkdir(parents=True, exist_ok=True)
    for index, channel in enumerate(channels):
        voxels = phantom.image + np.int16(40 * index) * (phantom.image > -500)
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), folder / f"ct_{channel:04d}.nii.gz")
    return folder / f"ct_{channels[0]:04d}.nii.gz"


def write_labelled(folder: Path) -> Path:
    """Write a data set of two CTs with the classes of the runs, in nnU-Net layout."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number, orientation in enumerate(("LPS", "SAR")):
        phantom = make_phantom(number, spacing=(7.0, 7.0, 9.0), orientation=orientation, extent_scale=0.6)
        nib.save(nib.Nifti1Image(phantom.image, phantom.affine), folder / f"imagesTr/case{number}_0000.nii.gz")
        labels = np.minimum(phantom.label, 2).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, phantom.affine), folder / f"labelsTr/case{number}.nii.gz")
    labels = {name: value for value, name in enumerate(NAMES)}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def least_dice(one: Path, other: Path) -> float:
    """The least Dice of a class between two label maps in one position; every class is in the first."""
    first, second = nib.load(one), nib.load(other)
    assert np.allclose(first.affine, second.affine, atol=1e-4)
    a, b = (np.asanyarray(image.dataobj).squeeze() for image in (first, second))
    assert a.shape == b.shape
    found = []
    for value in range(len(NAMES)):
        assert (a == value).any()
        found.append(2 * ((a == value) & (b == value)).sum() / ((a == value).sum() + (b == value).sum()))
    return float(min(found))
