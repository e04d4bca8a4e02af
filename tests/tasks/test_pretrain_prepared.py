"""Pre-training on volumes that nnU-Net has prepared: the network sees nnU-Net's own values, as it does from scans."""

import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates

from hyspark.config.nnunet import plan_defaults
from hyspark.config.pretrain import PretrainConfig
from hyspark.data.intensity import to_input
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.tasks.pretrain import find_pretraining_cases, run_pretraining
from hyspark.tasks.pretrain_common import to_network_input
from hyspark.training.metrics_log import read_metrics
from tests.nnunet_prepared_files import prepare_as_nnunet, write_array, write_plan, write_prepared
from tests.nnunet_stand_in import PLANS, stand_in

__all__ = ["stand_in"]
SMALL = {"decoder_width": 16, "batch_size": 2, "crops_per_volume": 1, "epochs": 2, "warmup_epochs": 1, "lr": 1e-3}
OF_PROCESS = {"device": "cpu", "dataloader_workers": 0, "prepare_workers": 1, "picture_every": 0}
SCHEMES = {
    "ct": (["CTNormalization"], [False]),
    "zscore": (["ZScoreNormalization"], [False]),
    "masked": (["ZScoreNormalization"], [True]),
    "none": (["NoNormalization"], [False]),
    "ct and zscore": (["CTNormalization", "ZScoreNormalization"], [False, False]),
}
SHIFTS = ((0, 0), *((n, axis) for n in (-1, 1) for axis in range(3)))
"""Voxels and axes; none comes first."""
BETWEEN_STEPS = 1 / 65535
"""Largest error of the store, as a fraction of a volume's range."""


def settings(plan: Path, data: Path, out: Path, **given) -> PretrainConfig:
    given |= {"model": f"spark/nnunet/{plan}", "data": str(data), "out": str(out), **SMALL, **OF_PROCESS}
    return PretrainConfig(**given | plan_defaults(given, set(given)))


def plan_with(names: list[str], are_masked: list[bool]) -> dict:
    plan = deepcopy(PLANS)
    plan["configurations"]["3d_fullres"] |= {"normalization_schemes": names, "use_mask_for_norm": are_masked}
    return plan


def scan(path: Path, seed: int, low: float = -1000) -> Path:
    """Write a body in air, or with a low of 0 a brain in zeros, at the spacing of the plan."""
    rng = np.random.default_rng(seed)
    voxels = np.full((26, 22, 30), low, np.float32)
    voxels[3:-2, 4:-1, 2:-5] = rng.normal(60, 200, (21, 17, 23))
    nib.save(nib.Nifti1Image(voxels.round(), np.diag([7.0, 8.0, 9.0, 1.0])), path)
    return path


def prepared_volumes(config: PretrainConfig, store: Path) -> list[StoredVolume]:
    cases = sorted([case for side in find_pretraining_cases(config) for case in side], key=lambda case: case.name)
    assert prepare_missing(cases, config, store, 1, progress=False) == {}
    return stored_volumes(cases, config, store)


def network_values(volume: StoredVolume, config: PretrainConfig) -> np.ndarray:
    """The whole volume as the network sees it, (c, *axes of the plan)."""
    values = torch.from_numpy(to_input(volume.read_whole(), volume.maps))[None]
    return to_network_input(values, config, torch.device("cpu"))[0].numpy()


def box_of(array: np.ndarray, volume: StoredVolume) -> np.ndarray:
    """The part of an array, (c, y, z, x), that a volume is."""
    start = np.array(volume.entry.affine)[:3, 3] / (7, 8, 9)
    first, size = ([round(of_axes[axis]) for axis in (1, 2, 0)] for of_axes in (start, volume.entry.shape))
    return array[(slice(None), *(slice(a, a + n) for a, n in zip(first, size, strict=True)))]


def assert_same(seen: np.ndarray, array: np.ndarray) -> None:
    """Compare channels to the precision of the store, and of air in CT."""
    assert seen.shape == array.shape
    for ours, theirs in zip(seen, array, strict=True):
        air = theirs < theirs.min() + 0.5 / 90  # half a HU
        np.testing.assert_allclose(ours[~air], theirs[~air], atol=float(np.ptp(theirs)) * BETWEEN_STEPS)
        np.testing.assert_allclose(ours[air], theirs[air], atol=0.5 / 90)


@pytest.mark.parametrize("names", SCHEMES)
def test_the_network_sees_the_values_of_the_arrays(tmp_path, names):
    plan = plan_with(*SCHEMES[names])
    num = len(SCHEMES[names][0])
    low = 0 if names == "masked" else -1000
    files = [scan(tmp_path / f"scan_{number}.nii.gz", number, low) for number in range(num)]
    folder = write_prepared(tmp_path / "Dataset042_Small", plan, {"a": files, "b": files})
    config = settings(folder.parent / "smallPlans.json", folder, tmp_path / "run")
    volume = prepared_volumes(config, tmp_path / "store")[0]
    array = blosc2.open(str(folder / "a.b2nd"), mode="r")[:]
    seen = network_values(volume, config)
    if names == "ct":  # air around the body is cropped, as of scans
        assert [row[3] for row in volume.entry.affine[:3]] == [3 * 7, 4 * 8, 2 * 9]
    if names == "masked":
        assert (array == 0).any()
    assert_same(seen, box_of(array, volume))


def test_one_of_several_channels(tmp_path):
    plan = plan_with(*SCHEMES["ct and zscore"])
    files = [scan(tmp_path / f"scan_{number}.nii.gz", number) for number in range(2)]
    folder = write_prepared(tmp_path / "Dataset042_Small", plan, {"a": files, "b": files})
    config = settings(folder.parent / "smallPlans.json", folder, tmp_path / "run", image_channels=(1,))
    volume = prepared_volumes(config, tmp_path / "store")[0]
    array = blosc2.open(str(folder / "a.b2nd"), mode="r")[:]
    assert_same(network_values(volume, config), box_of(array[1:], volume))


def test_scans_on_the_grid_of_the_plan_give_the_same_volume(tmp_path):
    files = {f"case_{number}": [scan(tmp_path / f"scan_{number}.nii.gz", number)] for number in range(2)}
    raw = tmp_path / "Dataset042_Small" / "imagesTr"
    raw.mkdir(parents=True)
    for name, (file,) in files.items():
        (raw / f"{name}_0000.nii.gz").write_bytes(file.read_bytes())
    folder = write_prepared(tmp_path / "pre" / "Dataset042_Small", PLANS, files)
    plan = folder.parent / "smallPlans.json"
    pairs = zip(
        prepared_volumes(settings(plan, folder, tmp_path / "run"), tmp_path / "store"),
        prepared_volumes(settings(plan, raw.parent, tmp_path / "run"), tmp_path / "raw"),
        strict=True,
    )
    for prepared, scanned in pairs:
        assert prepared.name == scanned.name
        assert prepared.entry.shape == scanned.entry.shape
        assert prepared.maps == scanned.maps
        np.testing.assert_allclose(prepared.read_whole(), scanned.read_whole(), atol=BETWEEN_STEPS)
        rngs = [np.random.default_rng(0), np.random.default_rng(0)]
        assert prepared.draw_voxel("foreground", rngs[0]) == scanned.draw_voxel("foreground", rngs[1])


def test_resampled_volumes_agree_where_both_lie(phantoms, tmp_path):
    """nnU-Net clips first and fits splines to the edges of voxels; here interpolation is linear, and clips last."""
    plan = deepcopy(PLANS)
    plan["configurations"]["3d_fullres"]["spacing"] = [7.0, 7.0, 7.0]
    raw = phantoms / "Dataset901_PhantomUnlabelled" / "imagesTr"
    scans = sorted(raw.glob("*_0000.nii.gz"))[:2]
    files = {file.name.removesuffix("_0000.nii.gz"): [file] for file in scans}
    folder = write_prepared(tmp_path / "Dataset042_Small", plan, files)
    file = folder.parent / "smallPlans.json"
    config = settings(file, folder, tmp_path / "run")
    prepared = prepared_volumes(config, tmp_path / "store")
    scanned = prepared_volumes(settings(file, raw.parent, tmp_path / "run"), tmp_path / "raw")
    for volume, other, scan_file in zip(prepared, scanned[:2], scans, strict=True):
        image = nib.load(scan_file)
        edges = nib.affines.voxel_sizes(image.affine)
        theirs = np.stack(np.meshgrid(*(np.arange(n) for n in volume.entry.shape), indexing="ij"), axis=-1)
        whole = [round(n * edge / 7) for n, edge in zip(image.shape, edges, strict=True)]
        index = theirs + np.array(volume.entry.affine)[:3, 3] / 7
        in_file = (index + 0.5) * (np.array(image.shape) / whole) - 0.5
        where = np.moveaxis(apply_affine(np.linalg.inv(other.entry.affine) @ image.affine, in_file), -1, 0)
        found = volume.read_whole()[0]
        expected = map_coordinates(other.read_whole()[0], where, order=1)
        inside = (found > 0.01) & (expected > 0.01)
        assert inside.sum() > 0.7 * (other.read_whole() > 0.01).sum()
        assert abs(np.median(expected[inside] - found[inside])) < 0.02
        alike = [np.corrcoef(expected.ravel(), np.roll(found, n, axis).ravel())[0, 1] for n, axis in SHIFTS]
        assert alike[0] > 0.9
        assert alike[0] - max(alike[1:]) > 0.03


@pytest.fixture
def data_set(phantoms, tmp_path) -> Path:
    """The unlabelled phantoms, prepared; each with a pickle that would write a file."""
    scans = sorted((phantoms / "Dataset901_PhantomUnlabelled" / "imagesTr").glob("*_0000.nii.gz"))
    files = {file.name.removesuffix("_0000.nii.gz"): [file] for file in scans}
    folder = tmp_path / "Dataset042_Small"
    write_prepared(folder, PLANS, files, Touch(tmp_path / "executed"))
    return folder


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def losses(config):
    return [line["loss"] for line in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in line]


def test_a_run_continues_to_the_bit_and_no_pickle_is_executed(data_set, tmp_path, stand_in):
    plan = write_plan(tmp_path, PLANS)
    config = settings(plan, data_set, tmp_path / "run")
    whole = replace(config, out=str(tmp_path / "whole"))
    run_pretraining(whole)
    run_pretraining(replace(config, max_steps=1))
    plan.unlink()  # the run has its own copy
    run_pretraining(config)
    assert losses(config) == losses(whole)
    assert len(losses(config)) == 4
    assert len([*(data_set / "prepared").glob("*/entry.json")]) == 4
    assert not (tmp_path / "executed").exists()
    pickle.loads(next(data_set.glob("*/*.pkl")).read_bytes())
    assert (tmp_path / "executed").exists()  # the trap works


def damage(file: Path, kind: str) -> None:
    array = blosc2.open(str(file), mode="r")[:]
    match kind:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-400])
        case "empty":
            file.write_bytes(b"")
        case "bytes":
            content = bytearray(file.read_bytes())
            content[len(content) // 2 : len(content) // 2 + 200] = bytes(range(200))
            file.write_bytes(content)
        case "uint16":
            write_array(file, array.astype(np.uint16))
        case "channels":
            write_array(file, np.concatenate([array, array]))
        case "axes":
            write_array(file, array[0])
        case "nan":
            array[0, 2, 3, 4] = np.nan
            write_array(file, array)
        case "constant":
            write_array(file, np.ones_like(array))
        case "program":
            operand = blosc2.asarray(array, urlpath=str(file.with_suffix(".operand")), mode="w")
            file.unlink()
            blosc2.lazyexpr("a + 1", {"a": operand}).save(urlpath=str(file))


DAMAGED = {
    "truncated": "a damaged file (",
    "empty": "a damaged file (",
    "bytes": "a damaged file (",
    "uint16": "values of type uint16",
    "channels": "2 channels, where the plan has 1",
    "axes": "shape (",
    "nan": "1 voxels that are no number",
    "constant": "the value 150 everywhere",
    "program": "a program",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_array_is_named_and_may_be_excluded(data_set, tmp_path, kind):
    config = settings(data_set / "smallPlans.json", data_set, tmp_path / "run")
    training, validation = find_pretraining_cases(config)
    broken = training[0]
    damage(broken.image, kind)
    failed = prepare_missing([*training, *validation], config, tmp_path / "store", 1, progress=False)
    assert list(failed) == [str(broken.image)]
    (reason,) = failed[str(broken.image)]
    assert reason.startswith(f"{broken.image}: {DAMAGED[kind]}")
    if kind not in ("nan", "constant"):
        assert reason.endswith(
            "expected an array of nnU-Net's: float32, channels and the three axes of its plan: "
            "prepare the case again by nnUNetv2_preprocess"
        )


def test_the_store_knows_how_a_volume_was_prepared(data_set, tmp_path):
    """Another plan beside the same arrays, whose size and time are unchanged."""
    first = prepared_volumes(settings(data_set / "smallPlans.json", data_set, tmp_path / "a"), tmp_path / "store")
    plan = deepcopy(PLANS)
    plan["transpose_forward"], plan["configurations"]["3d_fullres"]["spacing"] = [0, 1, 2], [9.0, 8.0, 7.0]
    write_plan(data_set, plan)
    second = prepared_volumes(settings(data_set / "smallPlans.json", data_set, tmp_path / "b"), tmp_path / "store")
    assert first[0].entry.shape != second[0].entry.shape


def test_the_writer_crops_to_what_is_not_zero(tmp_path):
    array = prepare_as_nnunet([scan(tmp_path / "a.nii.gz", 0, low=0)], PLANS)
    assert array.shape == (1, 17, 23, 21)  # y, z, x of the body
