"""What a plan of nnU-Net gives a pre-training, and what flags, recipes and an earlier run change of it."""

import pytest

from hyspark.cli.parsing import read_config
from hyspark.config.nnunet import (
    describe_plan,
    find_plan,
    keep_plan,
    plan_defaults,
    settings_of_plan,
    warnings_of_plan,
)
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain, differences
from hyspark.models.nnunet_plans import read_plan
from tests.nnunet_stand_in import PLANS, write_plans

CT = PLANS["foreground_intensity_properties_per_channel"]["0"]
FROM_PLAN = {
    "spacing": (7.0, 8.0, 9.0),
    "crop_size": (20, 16, 24),
    "axis_order": (1, 2, 0),
    "intensity": ("ct-zscore",),
    "hu_min": -120.0,
    "hu_max": 380.0,
    "input_mean": (60.0,),
    "input_std": (90.0,),
    "image_channels": (0,),
}


def config_of(path, *flags, method="spark"):
    return read_config(PretrainConfig, "hyspark pretrain", ["--model", f"{method}/nnunet/{path}", *flags])


def warned(config):
    return warnings_of_plan(find_plan(config.model, config.run_folder), config)


@pytest.mark.parametrize("method", ["spark", "byol"])
def test_the_plan_gives_defaults(tmp_path, method):
    config = config_of(write_plans(tmp_path), "--out", str(tmp_path / "run"), method=method)
    assert {name: getattr(config, name) for name in FROM_PLAN} == FROM_PLAN
    assert config.network_crop == (16, 24, 20)
    assert warned(config) == []
    text = describe_plan(find_plan(config.model, config.run_folder), config)
    assert text.startswith("smallPlans, 3d_fullres of Dataset042_Small; from it: spacing 7 8 9, crop_size 20 16 24,")


def test_flags_and_a_recipe_come_first_and_are_said(tmp_path):
    path = write_plans(tmp_path)
    (tmp_path / "r.yaml").write_text("hu_max: 300\ncrop_size: 32\n")
    flags = ("--out", str(tmp_path / "run"), "--config", str(tmp_path / "r.yaml"), "--spacing", "1.5", "1.5", "1.5")
    config = config_of(path, *flags)
    assert (config.spacing, config.hu_max, config.crop_size) == ((1.5, 1.5, 1.5), 300, (32,))  # the first: the default
    assert (config.hu_min, config.axis_order) == (-120, (1, 2, 0))
    assert warned(config) == [
        "--spacing 1.5 1.5 1.5: overrides 7 8 9 of the plan smallPlans",
        "--crop_size 32: overrides 20 16 24 of the plan smallPlans",
        "--hu_max 300: overrides 380 of the plan smallPlans",
    ]


def test_crops_are_rounded_to_the_total_stride(tmp_path):
    config = config_of(write_plans(tmp_path, patch_size=[15, 25, 20]), "--out", str(tmp_path / "run"))
    assert config.crop_size == (20, 16, 24)
    assert warned(config) == [
        "patch_size 20 15 25 of the plan: no multiple of the total stride 4 2 4; crop_size is 20 16 24 by default"
    ]


def test_other_intensities_take_nothing_of_the_window(tmp_path):
    config = config_of(write_plans(tmp_path), "--out", str(tmp_path / "run"), "--intensity", "mr")
    assert (config.intensity, config.hu_max, config.input_mean) == (("mr",), 250, ())
    assert warned(config) == ["--intensity mr: overrides ct-zscore of the plan smallPlans"]


def test_normalisations(tmp_path):
    def found(*schemes, masked=False, **known):
        properties = {"0": CT, "1": CT | {"mean": 10.0, "percentile_00_5": -300.0}, "2": {}}
        plan = read_plan(
            write_plans(
                tmp_path,
                normalization_schemes=list(schemes),
                use_mask_for_norm=[masked] * len(schemes),
                foreground_intensity_properties_per_channel=properties,
            )
        )
        return settings_of_plan(plan, known)

    assert found("NoNormalization")["intensity"] == ("none",)
    assert found("ZScoreNormalization", masked=True)["intensity"] == ("mr",)
    mixed = found("CTNormalization", "CTNormalization", "ZScoreNormalization")
    assert mixed["intensity"] == ("ct-zscore", "ct-zscore", "zscore")
    assert (mixed["image_channels"], mixed["hu_min"]) == ((0, 1, 2), -300)
    assert (mixed["input_mean"], mixed["input_std"]) == ((60.0, 10.0, 0.0), (90.0, 90.0, 1.0))
    second = found("CTNormalization", "ZScoreNormalization", image_channels=(1,))
    assert (second["image_channels"], second["intensity"]) == ((1,), ("zscore",))
    with pytest.raises(
        ValueError, match=r"normalization_schemes: expected .*, got RescaleTo01Normalization, which has no"
    ):
        found("RescaleTo01Normalization")
    assert "intensity" not in found("RGBTo01Normalization", intensity=("none",))
    with pytest.raises(ValueError, match="image_channels: expected some of the plan's 1 channels, from 0, got \\[1\\]"):
        found("NoNormalization", image_channels=(0, 1))
    with pytest.raises(ValueError, match="foreground_intensity_properties_per_channel: expected mean, percentile_00_5"):
        found("ZScoreNormalization", "ZScoreNormalization", "CTNormalization")


def test_what_differs_from_nnunets_own_normalisation_is_said(tmp_path):
    path = write_plans(tmp_path, normalization_schemes=["ZScoreNormalization"])
    assert warned(config_of(path, "--out", str(tmp_path / "run"))) == []
    path = write_plans(tmp_path, normalization_schemes=["ZScoreNormalization"], use_mask_for_norm=[True])
    (line,) = warned(config_of(path, "--out", str(tmp_path / "run")))
    assert line.startswith(
        "intensity mr: z-scores by the clipped foreground, and background is the lowest value; nnU-N"
    )
    two = {"0": CT, "1": CT | {"percentile_99_5": 90.0}}
    changes = {"foreground_intensity_properties_per_channel": two}
    path = write_plans(
        tmp_path, normalization_schemes=["CTNormalization"] * 2, use_mask_for_norm=[False] * 2, **changes
    )
    config = config_of(path, "--out", str(tmp_path / "run"))
    assert config.in_channels == 2
    assert warned(config)[0].startswith("--hu_min -120 --hu_max 380: one window for all channels of CT")


def test_a_begun_run_keeps_its_plan(tmp_path):
    path, run = write_plans(tmp_path / "a"), tmp_path / "run"
    before = config_of(path, "--out", str(run))
    keep_plan(find_plan(before.model, run), run)
    write_plans(tmp_path / "a", spacing=[1.0, 2.0, 3.0])
    assert config_of(path, "--out", str(run)).spacing == (3.0, 1.0, 2.0)  # no checkpoint, so nothing has begun
    (run / "last.pth").touch()
    changed = config_of(path, "--out", str(run))
    assert changed == before
    assert "changed since the run began, which continues with its own copy" in warned(changed)[0]
    path.unlink()
    assert config_of(path, "--out", str(run)) == before
    assert "got no file; the run continues with its own copy" in warned(before)[0]
    moved = config_of(write_plans(tmp_path / "b"), "--out", str(run))
    assert differences(as_plain(before), moved) == []
    other = config_of(
        tmp_path / "elsewhere.json", "--out", str(tmp_path / "next"), "--resume_from", str(run / "last.pth")
    )
    assert other.spacing == before.spacing


def test_a_plan_belongs_to_volumes_and_to_methods_with_a_backbone(tmp_path):
    path = write_plans(tmp_path)
    with pytest.raises(ValueError, match=r"axis_order: expected 0, 1, 2 in any order, for crops of volumes"):
        config_of(path, "--slices", "axial", "--crop_size", "32")
    with pytest.raises(ValueError, match="axis_order: not read by hyspark"):
        PretrainConfig(axis_order=(2, 1, 0))
    with pytest.raises(ValueError, match="axis_order: expected 0, 1, 2 in any order"):
        PretrainConfig(model="spark/monai/segresnet", axis_order=(2, 1))
    with pytest.raises(FileNotFoundError, match=r"expected nnU-Net's plans\.json, got no file"):
        config_of(tmp_path / "none.json")
    assert plan_defaults({"model": "spark/timm/resnet18"}, ()) == {}
