"""Volumes prepared by the steps of nnU-Net's DefaultPreprocessor, written with SimpleITK, SciPy and blosc2 alone.

`tests/interop/test_nnunet.py` holds these arrays against nnU-Net's own.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK
from scipy.ndimage import binary_fill_holes, zoom

FOLDER = "nnUNetPlans_3d_fullres"


def prepare_as_nnunet(images: Sequence[Path], plan: Mapping[str, Any], name: str = "3d_fullres") -> np.ndarray:
    """Prepare the channels of a case: transpose, crop to nonzero, normalise, resample; float32 (c, *axes)."""
    configuration, order = plan["configurations"][name], plan["transpose_forward"]
    read = [SimpleITK.ReadImage(str(path)) for path in images]
    data = np.stack([SimpleITK.GetArrayFromImage(image).astype(np.float32).transpose(order) for image in read])
    spacing = [read[0].GetSpacing()[::-1][axis] for axis in order]
    inside = binary_fill_holes((data != 0).any(axis=0))
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(inside))
    data, inside = data[(slice(None), *box)], inside[box]
    for number, channel in enumerate(data):
        known = plan["foreground_intensity_properties_per_channel"].get(str(number), {})
        match configuration["normalization_schemes"][number]:
            case "CTNormalization":
                clipped = channel.clip(known["percentile_00_5"], known["percentile_99_5"])
                channel[:] = (clipped - known["mean"]) / known["std"]
            case "ZScoreNormalization":
                where = inside if configuration["use_mask_for_norm"][number] else np.ones_like(inside)
                channel[where] = (channel[where] - channel[where].mean()) / channel[where].std()
    shape = [round(n * old / new) for n, old, new in zip(inside.shape, spacing, configuration["spacing"], strict=True)]
    if tuple(shape) == inside.shape:
        return data
    factors = [new / old for new, old in zip(shape, inside.shape, strict=True)]
    resampled = [zoom(one.astype(float), factors, order=3, mode="nearest", grid_mode=True) for one in data]
    kept = [new.clip(old.min(), old.max()) for new, old in zip(resampled, data, strict=True)]
    return np.stack(kept).astype(np.float32)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array in chunks of one channel, as nnU-Net does."""
    path.unlink(missing_ok=True)
    chunks = (1, *(min(32, n) for n in array.shape[1:])) if array.ndim == 4 else None
    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), chunks=chunks)


def write_prepared(
    data_set: Path, plan: Mapping[str, Any], cases: Mapping[str, Sequence[Path]], properties: Any = None
) -> Path:
    """Write the folder of a data set in nnUNet_preprocessed; return that of its volumes.

    Args:
        data_set: the folder.
        plan: content of its plan.
        cases: files of the channels of each case.
        properties: what is pickled beside each array.
    """
    folder = data_set / FOLDER
    folder.mkdir(parents=True)
    (data_set / "gt_segmentations").mkdir()
    (data_set / "dataset_fingerprint.json").write_text("{}")
    (data_set / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0}}))
    write_plan(data_set, plan)
    for name, files in cases.items():
        array = prepare_as_nnunet(files, plan)
        write_array(folder / f"{name}.b2nd", array)
        write_array(folder / f"{name}_seg.b2nd", np.zeros(array.shape, np.int16))
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(properties))
    return folder


def write_plan(data_set: Path, plan: Mapping[str, Any]) -> Path:
    """Write a plan as PLANS_NAME.json, whose 3d_fullres has `FOLDER` as data_identifier."""
    content = json.loads(json.dumps(plan))
    content["configurations"]["3d_fullres"]["data_identifier"] = FOLDER
    file = data_set / f"{plan['plans_name']}.json"
    file.write_text(json.dumps(content))
    return file
