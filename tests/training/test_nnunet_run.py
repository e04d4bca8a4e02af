"""What nnU-Net's training of HySparK's network takes from plans, recipe and environment."""

import copy
import json
import re

import pytest
import torch
import yaml

from hyspark import build_hybird
from hyspark.training import nnunet_run, optim
from hyspark.training.nnunet_run import RECIPE, WEIGHTS, plan_run
from tests.conftest import SMALL

NETWORK = {name: list(x) if isinstance(x, tuple) else x for name, x in SMALL.items() if name.startswith(("enc", "exp"))}
NETWORK |= {"vit_depth": 1}
CT = {"mean": 80.0, "std": 60.0, "percentile_00_5": -150.0, "percentile_99_5": 300.0}


def make_plans(**options):
    """Plans whose arrays z, y, x are turned to z, x, y, as nnUNetv2_train reads them."""
    full = {"patch_size": [20, 56, 40], "spacing": [2.5, 0.9, 0.8], "normalization_schemes": ["CTNormalization"]}
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    flat = full | {"patch_size": [60, 33], "spacing": [0.9, 0.8]}
    return {
        "transpose_forward": [0, 2, 1],
        "configurations": {"3d_fullres": full | options, "3d_cascade_fullres": cascade, "2d": flat},
        "foreground_intensity_properties_per_channel": {"0": CT},
        "continue_training": False,
    }


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    values = NETWORK | {"epochs": 4, "steps_per_epoch": 10, "warmup_epochs": 1, "lr": 0.01, "encoder_lr_ratio": 0.5}
    path.write_text(yaml.safe_dump(values | {"spacing": [9, 9, 9], "crop_size": [96]}))
    return str(path)


def test_the_plan_gives_the_input_and_the_recipe_the_network(recipe):
    plans = make_plans()
    run = plan_run(plans, "3d_fullres", {RECIPE: recipe})
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [16, 64, 32]
    kept = json.loads(json.dumps(plans))["hyspark"]
    expected = NETWORK | {"spacing": [0.9, 0.8, 2.5], "crop_size": [64, 32, 16], "intensity": ["ct-zscore"]}
    expected |= {"hu_min": -150.0, "hu_max": 300.0, "input_mean": [80.0], "input_std": [60.0], "lr": 0.01}
    assert {name: kept[name] for name in expected} == expected
    assert (run.config.epochs, run.config.steps_per_epoch, run.config.weights) == (4, 10, "none")
    assert run.notes[:2] == [
        f"{recipe}: not read here, since nnU-Net and its plan decide: crop_size, spacing",
        "patch_size 20 56 40 of the plan: trained with 16 64 32, multiples of 16",
    ]


def test_without_a_recipe_it_is_the_published_network_in_nnunets_time():
    plans = make_plans(patch_size=[96, 160, 160])
    run = plan_run(plans, "3d_fullres", {WEIGHTS: "encoder.pth"})
    assert (run.config.epochs, run.config.steps_per_epoch, run.config.encoder_widths[-1]) == (1000, 250, 384)
    assert (run.config.weights, nnunet_run.validation_steps(run.config)) == ("encoder.pth", 50)
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [96, 160, 160]
    assert len(run.notes) == 1


def test_an_epoch_of_all_cases_is_one_of_nnunets(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("steps_per_epoch: 0\n")
    assert plan_run(make_plans(), "3d_fullres", {RECIPE: str(path)}).config.steps_per_epoch == 250


@pytest.mark.parametrize(("configuration", "shape"), [("3d_fullres", (16, 64, 32)), ("2d", (64, 32))])
def test_predictions_build_the_network_that_was_trained(recipe, configuration, shape):
    """From plans.json alone, whatever the environment says then."""
    plans = make_plans()
    plan_run(plans, configuration, {RECIPE: recipe})
    patch = plans["configurations"][configuration]["patch_size"]
    trained, again = (nnunet_run.build_trained_network(p, patch, 1, 3) for p in (plans, json.loads(json.dumps(plans))))
    again.load_state_dict(trained.state_dict())
    x = torch.rand(1, 1, *shape)
    with torch.no_grad():
        scores = trained.eval()(x)
        assert scores.shape == (1, 3, *shape)
        torch.testing.assert_close(again.eval()(x), scores)
        turned = {3: (0, 1, 3, 4, 2), 2: (0, 1, 2, 3)}[len(shape)]  # arrays z, x, y, or slices x, y, to x, y, z
        torch.testing.assert_close(trained.network(x.permute(turned)), scores.permute(turned))


def test_plans_of_another_trainer_have_no_network():
    with pytest.raises(ValueError, match="under 'hyspark', got none"):
        nnunet_run.build_trained_network(make_plans(), [16, 64, 32], 1, 3)


def test_a_cascade_is_refused(recipe):
    with pytest.raises(ValueError, match=r"3d_cascade_fullres: .* takes labels of 3d_lowres"):
        plan_run(make_plans(), "3d_cascade_fullres", {RECIPE: recipe})


def test_weights_are_held_against_the_plan(recipe, tmp_path):
    plans = make_plans()
    options = nnunet_run.network_options(plan_run(plans, "3d_fullres", {RECIPE: recipe}).config)
    source = build_hybird(1, 5, 32, **options)
    made = {"spacing": [1.5, 1.5, 1.5], "intensity": ["ct"], "hu_min": -175.0, "hu_max": 250.0}
    same = {name: plans["hyspark"][name] for name in nnunet_run.INPUT_SETTINGS}
    found = {}
    for name, settings in (("other", made), ("same", same)):
        file = tmp_path / f"{name}.pth"
        torch.save({"model": source.state_dict(), "config": settings}, file)
        config = plan_run(plans, "3d_fullres", {RECIPE: recipe, WEIGHTS: str(file)}).config
        network = nnunet_run.build_trained_network(plans, [16, 64, 32], 1, 3).network
        found[name] = nnunet_run.load_initial_weights(network, config, plans)
        assert torch.equal(network.embeddings.stem.weight, source.embeddings.stem.weight)
    warnings = [line for line in found["other"] if line.startswith("WARNING")]
    assert [re.sub(".*made with ", "", line) for line in warnings] == [
        "spacing 1.5 1.5 1.5, this run has 0.9 0.8 2.5",
        "intensity ct, this run has ct-zscore",
    ]
    assert found["other"][-1] == (
        "pre-train for this plan with: --spacing 0.9 0.8 2.5 --hu_min -150.0 --hu_max 300.0 --intensity ct-zscore "
        "--image_channels 0 --input_mean 80.0 --input_std 60.0 --crop_size 64 32 16"
    )
    assert not any(word in line for line in found["same"] for word in ("WARNING", "pre-train for"))


@pytest.mark.parametrize(
    ("configuration", "changes", "lines"),
    [
        (
            "2d",
            {},
            [
                "own.pth was made with intensity ct, this run has ct-zscore",
                "pre-train for this plan with: --hu_min 0.0 --hu_max 300.0 --intensity ct-zscore --image_channels 0 "
                "--input_mean 80.0 --input_std 60.0",
            ],
        ),
        (
            "3d_fullres",
            {"normalization_schemes": ["RescaleTo01Normalization"]},
            [
                "own.pth was made with spacing 1.5 1.5 1.5, this run has 0.9 0.8 2.5",
                "own.pth was made with intensity ct, this run has RescaleTo01Normalization",
                "no pre-training here fits this plan: RescaleTo01Normalization has no counterpart among --intensity",
            ],
        ),
    ],
)
def test_what_the_plan_does_not_say_is_not_compared_and_advice_can_be_typed(
    recipe, tmp_path, monkeypatch, configuration, changes, lines
):
    monkeypatch.chdir(tmp_path)
    plans = make_plans(**changes)
    plans["foreground_intensity_properties_per_channel"] = {"0": CT | {"percentile_00_5": 0.0}}
    config = plan_run(plans, configuration, {RECIPE: recipe, WEIGHTS: "own.pth"}).config
    network = nnunet_run.build_trained_network(
        plans, plans["configurations"][configuration]["patch_size"], 1, 3
    ).network
    made = {"spacing": [1.5, 1.5, 1.5], "intensity": ["ct"], "hu_min": -175.0, "hu_max": 250.0}
    torch.save({"model": network.state_dict(), "config": made}, "own.pth")
    found = nnunet_run.load_initial_weights(network, config, plans)
    assert [line.removeprefix("WARNING: ") for line in found if line.startswith(("WARN", "pre-", "no pre-"))] == lines


def test_windows_of_channels_are_held_against_those_of_the_weights(recipe, tmp_path):
    """nnU-Net clips each channel of CT by its own percentiles; weights of this package have one window."""
    plans = make_plans(normalization_schemes=["CTNormalization", "ZScoreNormalization", "CTNormalization"])
    plans["foreground_intensity_properties_per_channel"] = {"0": CT, "1": {}, "2": CT | {"percentile_99_5": 80.0}}
    config = plan_run(plans, "3d_fullres", {RECIPE: recipe, WEIGHTS: str(tmp_path / "own.pth")}).config
    plans = json.loads(json.dumps(plans))
    network = nnunet_run.build_trained_network(plans, plans["configurations"]["3d_fullres"]["patch_size"], 3, 3).network
    made = {"intensity": ["ct-zscore"], "image_channels": [0, 1, 2], "hu_min": -150.0, "hu_max": 300.0}
    torch.save({"model": network.state_dict(), "config": made}, tmp_path / "own.pth")
    found = [line for line in nnunet_run.load_initial_weights(network, config, plans) if "HU" in line]
    assert found == [
        f"WARNING: {tmp_path}/own.pth was made with HU -150.0 300.0 in channel 2, this run has -150.0 80.0"
    ]


def test_folds_of_one_model_have_one_recipe(recipe, tmp_path):
    """The plans.json of the folder describes the network of all of them."""
    plans = make_plans()
    plan_run(plans, "3d_fullres", {RECIPE: recipe})
    nnunet_run.check_same_settings(str(tmp_path), plans)
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    nnunet_run.check_same_settings(str(tmp_path), copy.deepcopy(plans))
    other = make_plans()
    plan_run(other, "3d_fullres", {RECIPE: recipe, WEIGHTS: "encoder.pth"})
    with pytest.raises(ValueError, match=r"weights: was none, is encoder\.pth.*HYSPARK_WEIGHTS as before"):
        nnunet_run.check_same_settings(str(tmp_path), other)


def test_learning_rates_follow_the_recipe_step_by_step(recipe):
    plans = make_plans()
    config = plan_run(plans, "3d_fullres", {RECIPE: recipe}).config
    network = nnunet_run.build_trained_network(plans, [16, 64, 32], 1, 3)
    optimizer = optim.make_adamw(network, config.layer_decay, optim.finetuning_encoder_lr_ratio(config))
    schedule = nnunet_run.EpochSchedule(optimizer, config, num_epochs=4)

    def rates():
        stem, head = network.network.embeddings.stem.weight, network.network.decoder.out.conv.weight
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return of[id(head)], of[id(stem)]

    assert rates() == (0.0, 0.0)  # the warm-up begins
    schedule.set_step(5)
    assert rates() == pytest.approx((0.005, 0.0025))
    schedule.step(1)
    assert rates() == pytest.approx((0.01, 0.005))
    schedule.set_step(39)
    assert rates() == pytest.approx((0.0, 0.0), abs=1e-9)


def test_a_second_file_of_initial_weights_is_refused(tmp_path):
    """nnU-Net loads that of -pretrained_weights between initialisation and training."""
    network = build_hybird(1, 3, 32, widths=SMALL["encoder_widths"], vit_depth=1, num_heads=4)
    before = nnunet_run.weight_sums(network)
    nnunet_run.check_nothing_loaded(before, network, "own.pth")
    state = network.state_dict()
    state["decoder.out.conv.bias"] = state["decoder.out.conv.bias"] + 1e-3  # one tensor of all
    network.load_state_dict(state)
    with pytest.raises(ValueError, match=r"-pretrained_weights and HYSPARK_WEIGHTS .* got two; own\.pth would replace"):
        nnunet_run.check_nothing_loaded(before, network, "own.pth")
