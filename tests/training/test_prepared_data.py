"""Which folders of nnU-Net's prepared volumes a run takes, and what it says of those that it refuses."""

import json
import re
import shlex
from copy import deepcopy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hyspark.cli.main import main
from hyspark.cli.parsing import read_config
from hyspark.config.pretrain import PretrainConfig
from hyspark.data.datasets.datalist_json import read_datalist
from hyspark.training.prepared_data import list_prepared
from tests.nnunet_prepared_files import FOLDER, write_plan, write_prepared
from tests.nnunet_stand_in import PLANS


@pytest.fixture
def data_set(tmp_path) -> Path:
    """Five prepared volumes of the stand-in's plan, in its axes y, z, x."""
    file = tmp_path / "scan.nii.gz"
    voxels = np.random.default_rng(0).normal(0, 300, (8, 9, 10)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([7.0, 8.0, 9.0, 1.0])), file)
    folder = tmp_path / "pre" / "Dataset042_Small"
    write_prepared(folder, PLANS, {f"case_{number}": [file] for number in range(5)})
    return folder


def config_of(data: Path, *flags: str, plan: Path | None = None) -> PretrainConfig:
    file = plan or (data if data.name != FOLDER else data.parent) / "smallPlans.json"
    words = ["--model", f"spark/nnunet/{file}", "--data", str(data), "--out", str(data / "run"), *flags]
    return read_config(PretrainConfig, "hyspark pretrain", words)


def changed(**changes) -> dict:
    plan = deepcopy(PLANS)
    for name, value in changes.items():
        (plan if name in plan else plan["configurations"]["3d_fullres"])[name] = value
    return plan


def test_a_data_set_or_the_folder_of_a_configuration(data_set):
    for path in (data_set, data_set / FOLDER):
        listed = list_prepared(config_of(path))
        cases = [*listed.training, *listed.validation]
        assert sorted(case.name for case in cases) == [f"case_{number}" for number in range(5)]
        assert len(listed.validation) == 1
        assert {case.prepared.hu for case in cases} == {((60.0, 90.0),)}
        assert all(case.label is None and case.dataset == "Dataset042_Small" for case in cases)


def test_folds_of_nnunet_decide(data_set):
    folds = [{"train": [f"case_{i}" for i in range(5) if i != n], "val": [f"case_{n}"]} for n in (3, 4)]
    (data_set / "splits_final.json").write_text(json.dumps(folds))
    assert [case.name for case in list_prepared(config_of(data_set, "--fold", "1")).validation] == ["case_4"]


CT = PLANS["foreground_intensity_properties_per_channel"]["0"]
OTHERS = {
    "spacing": (changed(spacing=[8.0, 9.0, 7.5]), "spacing 7.5 8 9, not 7 8 9"),
    "axes": (changed(transpose_forward=[0, 1, 2], spacing=[9.0, 8.0, 7.0]), "axis_order 2 1 0, not 1 2 0"),
    "mean": (changed(foreground_intensity_properties_per_channel={"0": CT | {"mean": 61.0}}), "input_mean 61, not 60"),
    "window": (
        changed(foreground_intensity_properties_per_channel={"0": CT | {"percentile_00_5": -90.0}}),
        "hu_min -90, not -120",
    ),
    "scheme": (changed(normalization_schemes=["ZScoreNormalization"]), "intensity zscore, not ct-zscore"),
}


@pytest.mark.parametrize(("plan", "difference"), OTHERS.values(), ids=list(OTHERS))
def test_volumes_of_another_plan_are_refused_and_the_advice_works(data_set, tmp_path, plan, difference):
    own = tmp_path / "own" / "smallPlans.json"
    own.parent.mkdir()
    own.write_text((data_set / "smallPlans.json").read_text())
    write_plan(data_set, plan)
    with pytest.raises(ValueError, match="expected volumes as this run's settings say") as error:
        list_prepared(config_of(data_set, plan=own))
    assert f"smallPlans.json, 3d_fullres, prepared them with {difference}" in str(error.value)
    advised = re.search(r"as --model spark/nnunet/(\S+) without", str(error.value))[1]
    assert len(list_prepared(config_of(data_set, plan=Path(advised))).training) == 4


def test_a_flag_that_overrides_the_plan_is_refused(data_set):
    with pytest.raises(ValueError, match=r"spacing 7 8 9, not 2 2 2; .* without flags that override it"):
        list_prepared(config_of(data_set, "--spacing", "2", "2", "2"))
    with pytest.raises(ValueError, match="intensity ct-zscore, not ct"):
        list_prepared(config_of(data_set, "--intensity", "ct"))


def test_of_several_plans_of_a_folder_one_that_agrees_is_taken(data_set):
    write_plan(data_set, changed(spacing=[1.0, 1.0, 1.0], plans_name="aPlans"))
    assert list_prepared(config_of(data_set)).training


def test_a_network_that_is_not_of_a_plan_is_refused(data_set, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--data", str(data_set), "--out", str(data_set / "run"), "--device", "cpu"])
    assert "--model hyspark: " in (text := capsys.readouterr().err)
    assert "expected spark/nnunet/PLANS.json (moco, byol, swav too); for other networks, name scans by --data" in text


def test_other_verbs_name_the_one_that_reads_it(data_set, capsys):
    folder = data_set / FOLDER
    for verb in (["check"], ["datalist", "--data"], ["finetune", "--device=cpu", f"--out={data_set / 'r'}", "--data"]):
        for path in (data_set, folder, data_set.parent, folder / "case_0.b2nd"):
            with pytest.raises(SystemExit):
                main([*verb, str(path)])
            text = capsys.readouterr().err
            assert f"{path}: expected scans, found what nnU-Net has prepared" in text
            command = re.search(r"hyspark (pretrain .*)$", text, re.MULTILINE)[1]
            named = shlex.split(command)[-1]
            assert list_prepared(config_of(Path(named))).training


def test_a_list_of_such_arrays_is_refused(data_set, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": str(data_set / FOLDER / "case_0.b2nd")}]}))
    with pytest.raises(ValueError, match=r"training\[0\]: expected a NIfTI file; .* its folder is named by --data"):
        read_datalist(path)


def test_what_is_missing_is_named(data_set, tmp_path):
    config = config_of(data_set)
    for file in (data_set / FOLDER).iterdir():
        file.rename(file.with_suffix(".npz") if file.suffix == ".b2nd" else file)
    with pytest.raises(ValueError, match=r"expected CASE\.b2nd, found case_0\.npz, .* of nnU-Net before 2\.6; prepare"):
        list_prepared(config)
    (data_set / FOLDER).rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"type nnUNetv2_preprocess -d 42 -plans_name smallPlans -c 3d_fullres$"
    ):
        list_prepared(config)
    own = (data_set / "smallPlans.json").rename(tmp_path / "smallPlans.json")
    write_plan(data_set, changed(plans_name="otherPlans"))
    with pytest.raises(FileNotFoundError, match=r"expected smallPlans\.json, the plan of --model, found otherPlans\.j"):
        list_prepared(config_of(data_set, plan=own))


def test_a_folder_without_its_plan_is_refused(data_set, tmp_path):
    own = (data_set / "smallPlans.json").rename(tmp_path / "smallPlans.json")
    with pytest.raises(FileNotFoundError, match='"data_identifier": "nnUNetPlans_3d_fullres", found none; copy it the'):
        list_prepared(config_of(data_set / FOLDER, plan=own))
    own.rename(data_set / "smallPlans.json")
    assert list_prepared(config_of(data_set / FOLDER)).training


def test_volumes_of_2d_are_refused(data_set, tmp_path):
    own = tmp_path / "smallPlans.json"
    own.write_text((data_set / "smallPlans.json").read_text())
    content = json.loads(own.read_text())
    content["configurations"]["2d"] = content["configurations"].pop("3d_fullres") | {"patch_size": [8, 8]}
    content["configurations"]["2d"]["spacing"] = [9.0, 7.0]
    content["configurations"] = {"2d": content["configurations"]["2d"]}
    (data_set / "smallPlans.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"not built here: .*: 2d: expected 3 axes, got 2; name a configuration of volumes"
    ):
        list_prepared(config_of(data_set / FOLDER, plan=own))
