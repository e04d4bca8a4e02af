"""The file for nnU-Net's own training: its keys as nnU-Net asserts them, what it computes, and what is refused."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hyspark.cli import main
from hyspark.config.nnunet import plan_in_file
from hyspark.evaluation.embedding.networks import NetworkChoice, load_embedding_network
from hyspark.exports import nnunet
from hyspark.exports.hub_folder import export_to_hub
from hyspark.exports.model_card import CardFacts
from hyspark.exports.nnunet import stem_of, write_nnunet
from hyspark.models.backbones import build_backbone
from hyspark.models.nnunet_network import build_network
from hyspark.models.weights.files import made_with, read_contents
from tests.nnunet_stand_in import ARCHITECTURE, PLANS, made_in_volume_axes, stand_in, with_strides, write_plans

__all__ = ["stand_in"]
pytestmark = pytest.mark.usefixtures("stand_in")
CT = PLANS["foreground_intensity_properties_per_channel"]["0"]
SETTINGS = {
    "spacing": [7.0, 8.0, 9.0],
    "intensity": ["ct-zscore"],
    "image_channels": [0],
    "hu_min": -120.0,
    "hu_max": 380.0,
    "input_mean": [60.0],
    "input_std": [90.0],
    "axis_order": [1, 2, 0],
    "crop_size": [20, 16, 24],
    "method": "spark",
}


@pytest.fixture
def plans(tmp_path):
    return write_plans(tmp_path / "plan")


@pytest.fixture
def pretrained(plans):
    """A network of the plan with weights that differ from its initialisation."""
    torch.manual_seed(3)
    network = build_backbone(f"nnunet/{plans}", 1, 3).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


KEPT = PLANS | {"configurations": {"3d_fullres": PLANS["configurations"]["3d_fullres"]}}


def save(path, network, plan=KEPT, **changes):
    about = {"nnunet_plans": plan} if plan else {}
    torch.save({"model": network.state_dict(), "config": SETTINGS | changes} | about, path)
    return path


def load_as_nnunet(network, file):
    """The loading of `nnUNetv2_train -pretrained_weights`, by its documented behaviour."""
    given, own = torch.load(file, weights_only=True)["network_weights"], network.state_dict()
    for key, value in own.items():
        if ".seg_layers." not in key:
            assert key in given, key
            assert given[key].shape == value.shape, key
    own.update({key: value for key, value in given.items() if key in own and ".seg_layers." not in key})
    network.load_state_dict(own)


def test_nnunet_loads_the_features_of_the_pre_training(plans, pretrained, tmp_path):
    lines = write_nnunet(save(tmp_path / "e.pth", pretrained), str(plans), tmp_path / "nn.pth").splitlines()
    network = build_backbone(f"nnunet/{plans}", 1, 3).network
    load_as_nnunet(network, tmp_path / "nn.pth")
    crop = torch.randn(1, 1, 16, 24, 20)
    assert all(map(torch.equal, network.encoder(crop), pretrained.encoder(crop)))
    assert not any(torch.equal(a, b) for a, b in zip(network.decoder.transpconvs[0].parameters(),
                   pretrained.decoder.transpconvs[0].parameters(), strict=True))  # fmt: skip
    assert lines[1].startswith("checked: features of a random crop differ by 0e+00 of the largest")
    assert lines[2:] == [
        "next, with nnU-Net 2 as released:",
        f"  nnUNetv2_train 42 3d_fullres 0 -p smallPlans -pretrained_weights {tmp_path}/nn.pth",
        "or, with an nnU-Net that has nnUNetv2_train_pretrained:",
        f"  nnUNetv2_plan_like_dynamic -d 42 -n nn -pc {tmp_path}/nn.pth -pl smallPlans",
        "  nnUNetv2_train_pretrained 42 3d_fullres 0 -p ptPlans_dynamic__nn -tr DynamicPretrainedTrainer",
    ]
    assert sorted(path.name for path in tmp_path.glob("*nn.pth*")) == ["nn.pth"]
    assert (tmp_path / "nn.pth").stat().st_size < 2 * sum(4 * p.numel() for p in network.parameters()) + 100_000


def test_the_adaptation_plan_is_what_nnssl_writes(plans, pretrained, tmp_path):
    write_nnunet(save(tmp_path / "e.pth", pretrained), str(plans), tmp_path / "nn.pth")
    content = torch.load(tmp_path / "nn.pth", weights_only=True)
    found = content["nnssl_adaptation_plan"]
    assert found["architecture_plans"] == {
        "arch_class_name": "ResidualEncoderUNet",
        "arch_kwargs": ARCHITECTURE["arch_kwargs"],
        "arch_kwargs_requiring_import": ARCHITECTURE["_kw_requires_import"],
    }
    assert found["architecture_kwargs"]["n_stages"] == 3
    configurations = {"3d_fullres": {"spacing": [8.0, 9.0, 7.0], "patch_size": [16, 24, 20]}}
    assert found["pretrain_plan"] == {"configurations": configurations}
    assert found["recommended_downstream_patchsize"] == [16, 24, 20]
    assert (found["pretrain_num_input_channels"], found["key_to_lpe"]) == (1, None)
    weights = content["network_weights"]
    assert (found["key_to_encoder"], found["key_to_stem"]) == ("encoder.stages", "encoder.stem")
    assert sorted(found["keys_to_in_proj"]) == ["encoder.stem.convs.0.all_modules.0", "encoder.stem.convs.0.conv"]
    assert all(f"{key}.weight" in weights for key in found["keys_to_in_proj"])
    assert not any(".seg_layers." in key for key in weights)
    assert [one["name"] for one in content["citations"]] == ["spark", "HySparK"]
    assert json.loads(json.dumps({key: content[key] for key in ("nnssl_adaptation_plan", "citations", "hyspark")}))


def test_kernels_of_a_network_in_other_axes_are_turned(plans, tmp_path):
    torch.manual_seed(5)
    own = made_in_volume_axes(1, 3)
    source = save(tmp_path / "e.pth", own, None, axis_order=[], model="spark/mine.networks:planned")
    text = write_nnunet(source, str(plans), tmp_path / "nn.pth")
    assert "turned: kernels from the axes x y z to the plan's y z x" in text
    assert "not checked: strides and activations, which the file does not name" in text
    network = build_backbone(f"nnunet/{plans}", 1, 3).network
    load_as_nnunet(network, tmp_path / "nn.pth")
    crop = torch.randn(1, 1, 20, 16, 24)
    for found, expected in zip(network.encoder(crop.permute(0, 1, 3, 4, 2)), own.encoder(crop), strict=True):
        torch.testing.assert_close(found, expected.permute(0, 1, 3, 4, 2), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_a_source_too(plans, pretrained, tmp_path):
    state = {f"encoder.backbone.{name}": x for name, x in pretrained.state_dict().items()}
    content = {"model": state | {"decoder.out.weight": torch.ones(1, 4)}, "config": SETTINGS, "nnunet_plans": KEPT}
    torch.save(content, tmp_path / "run.pth")
    write_nnunet(tmp_path / "run.pth", f"{plans}:3d_fullres", tmp_path / "nn.pth")
    network = build_backbone(f"nnunet/{plans}", 1, 3).network
    load_as_nnunet(network, tmp_path / "nn.pth")
    assert torch.equal(network.encoder.stem.convs[0].conv.weight, pretrained.encoder.stem.convs[0].conv.weight)


def test_harmless_differences_are_said(plans, pretrained, tmp_path):
    source = save(tmp_path / "e.pth", pretrained, spacing=[2.0, 2.0, 2.0], input_mean=[62.0])
    text = write_nnunet(source, str(plans), tmp_path / "nn.pth")
    assert "differs: spacing 2, 2, 2 mm (x, y, z) in pre-training, 7, 8, 9 in the plan" in text
    assert "differs: channel 0: its values differ by up to 0.022 deviations from those under CTNormalization" in text
    masked = {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}
    other = write_plans(tmp_path / "mr", **masked)
    text = write_nnunet(save(tmp_path / "m.pth", pretrained, intensity=["mr"]), str(other), tmp_path / "nn.pth")
    assert "ZScoreNormalization is by nonzero voxels and background is 0, mr is by the foreground" in text


def test_commands_can_be_typed_whatever_the_names(pretrained, tmp_path):
    plans = write_plans(tmp_path / "plan", plans_name="small $(touch owned)")
    out = tmp_path / "my files" / "nn.pth"
    out.parent.mkdir()
    lines = write_nnunet(save(tmp_path / "e.pth", pretrained), str(plans), out).splitlines()
    words = shlex.split(next(line for line in lines if "-pretrained_weights" in line))
    assert words[3:] == ["0", "-p", "small $(touch owned)", "-pretrained_weights", str(out)]
    words = shlex.split(next(line for line in lines if "-pc" in line))
    assert words[-4:] == ["-pc", str(out), "-pl", "small $(touch owned)"]


def test_a_normalisation_without_a_counterpart_is_said(plans, pretrained, tmp_path):
    """The intensity is the user's choice, of which the pre-training warned."""
    other = write_plans(tmp_path / "b", normalization_schemes=["RescaleTo01Normalization"])
    text = write_nnunet(save(tmp_path / "e.pth", pretrained, intensity=["none"]), str(other), tmp_path / "nn.pth")
    assert "differs: channel 0: RescaleTo01Normalization has no counterpart, the weights were made with inten" in text


def test_features_that_are_no_numbers_are_no_rounding(plans, pretrained, tmp_path, monkeypatch):
    """NaN in a deeper map alone."""
    monkeypatch.setattr(
        nnunet, "run_encoder", lambda network, crop: [torch.ones(1, 1, 2, 2, 2), torch.full((1, 1, 1, 1, 1), torch.nan)]
    )
    with pytest.raises(RuntimeError, match="differ from those of the weights by 0, nan of the largest"):
        write_nnunet(save(tmp_path / "e.pth", pretrained), str(plans), tmp_path / "nn.pth")
    assert not (tmp_path / "nn.pth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intensity": ["ct"]}, r"differ by up to 2\.6 deviations .* zero padding then stands for another HU"),
        ({"input_mean": [90.0]}, r"its values differ by up to 0\.33 deviations from those under CTNormalization"),
        ({"hu_max": 300.0}, r"its values differ by up to 0\.89 deviations"),
        ({"intensity": ["mr"]}, "channel 0: expected weights for CTNormalization, got intensity mr; pre-train with"),
        ({"image_channels": [0, 1]}, "expected weights for the plan's 1 channels, got 2"),
    ],
)
def test_other_inputs_are_refused(plans, pretrained, tmp_path, changes, message):
    source = save(tmp_path / "e.pth", pretrained, **changes)
    with pytest.raises(ValueError, match=message):
        write_nnunet(source, str(plans), tmp_path / "nn.pth")
    assert not (tmp_path / "nn.pth").exists()


def test_another_network_is_refused_though_its_shapes_fit(plans, pretrained, tmp_path):
    other = write_plans(tmp_path / "b", architecture=with_strides([[1, 1, 1], [2, 2, 2], [1, 2, 2]]))
    with pytest.raises(
        ValueError, match=r"expected the network of the plan smallPlans, got another \(strides: \[\[1, 1"
    ):
        write_nnunet(save(tmp_path / "e.pth", pretrained), str(other), tmp_path / "nn.pth")


def test_files_that_do_not_say_what_they_are_are_refused(plans, pretrained, tmp_path):
    torch.save(pretrained.state_dict(), tmp_path / "e.pth")
    with pytest.raises(ValueError, match="expected a file that says for which spacing and intensity it was made"):
        write_nnunet(tmp_path / "e.pth", str(plans), tmp_path / "nn.pth")
    with pytest.raises(ValueError, match=r"nn\.bin: expected a path that ends in \.pth"):
        write_nnunet(tmp_path / "e.pth", str(plans), tmp_path / "nn.bin")
    state = {name: x for name, x in pretrained.state_dict().items() if ".stages.2." not in name}
    torch.save({"model": state, "config": SETTINGS}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth: "):
        write_nnunet(tmp_path / "part.pth", str(plans), tmp_path / "nn.pth")
    assert not (tmp_path / "nn.pth").exists()


def test_the_command_line(plans, pretrained, tmp_path, capsys):
    source = str(save(tmp_path / "e.pth", pretrained))
    words = ["export", "--nnunet", source, str(tmp_path / "nn.pth")]
    with pytest.raises(SystemExit):
        main.main(words)
    assert "--nnunet: expected --plans PLANS.json, the plan to train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main([*words, "--plans", str(plans), "--decoder"])
    assert "--decoder: not read with --nnunet; drop it" in capsys.readouterr().err
    main.main([*words, "--plans", f"{plans}:3d_fullres"])
    assert "nnUNetv2_train 42 3d_fullres 0" in capsys.readouterr().out
    main.main(["weights", source, "--model", f"nnunet/{plans}"])
    assert "covering 100.0% of the model's parameters" in capsys.readouterr().out


def test_names_of_stem_and_encoder_are_those_of_nnunet_itself(monkeypatch):
    """Where dynamic_network_architectures is installed: as its networks describe themselves."""
    for name in [name for name in sys.modules if name.startswith("dynamic_network_architectures")]:
        monkeypatch.delitem(sys.modules, name)
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    options = ARCHITECTURE["arch_kwargs"]
    plain = {name: value for name, value in options.items() if name != "n_blocks_per_stage"} | {"n_conv_per_stage": 2}
    for kind, kwargs in (("ResidualEncoderUNet", options), ("PlainConvUNet", plain)):
        named = f"{unet.__name__}.{kind}"
        network = build_network(ARCHITECTURE | {"network_class_name": named, "arch_kwargs": kwargs}, 1)
        stem, projections = stem_of(network)
        assert stem == network.key_to_stem
        assert sorted(projections) == sorted(network.keys_to_in_proj)
        assert network.key_to_encoder == "encoder.stages"


def test_a_file_with_its_plan_needs_no_other(plans, pretrained, tmp_path, capsys):
    """Each file that holds the plan gives the maps that the network has, outside of any run folder."""
    held = {"embed": save(tmp_path / "e.pth", pretrained)}
    write_nnunet(held["embed"], str(plans), tmp_path / "nn.pth")
    held["export --nnunet"] = tmp_path / "nn.pth"
    export_to_hub(held["embed"], tmp_path / "net", CardFacts("net"))
    held["export --hf"] = tmp_path / "net"
    held["its file alone"] = Path(shutil.copy(tmp_path / "net/model.safetensors", tmp_path / "alone.safetensors"))
    arguments = {"plans": json.loads(plans.read_text()), "configuration": "3d_fullres"}
    held["nnU-Net"] = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": pretrained.state_dict(), "init_args": arguments}, held["nnU-Net"])
    plans.unlink()
    crop = torch.rand(1, 1, 20, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pretrained.encoder(crop.permute(0, 1, 3, 4, 2))[-1].permute(0, 1, 4, 2, 3)
        for path in held.values():
            network = load_embedding_network(NetworkChoice(path))
            assert network.settings.spacing == (7, 8, 9)
            assert network.settings.input_mean == (60,)
            torch.testing.assert_close(network.encoder(crop)[-1], expected)
            main.main(["weights", str(path)])
            text = capsys.readouterr().out
            assert "initialised: encoder" not in text
            assert "crop_size 20 16 24, axis_order 1 2 0" in text
    assert "Dataset042" not in (tmp_path / "net/config.json").read_text()
    with pytest.raises(SystemExit):
        main.main(["weights", str(held["embed"]), "--decoder", "light"])
    assert "decoder: not read for the network of the plan smallPlans" in capsys.readouterr().err


def test_the_settings_of_an_exported_file_are_those_of_its_kernels(plans, tmp_path):
    """Kernels are turned to the plan's axes, and the settings say so."""
    own = made_in_volume_axes(1, 3)
    write_nnunet(save(tmp_path / "e.pth", own, None, axis_order=[]), str(plans), tmp_path / "nn.pth")
    made = made_with(read_contents(tmp_path / "nn.pth"))
    assert (made["axis_order"], made["spacing"], made["crop_size"]) == ([1, 2, 0], [7, 8, 9], [20, 16, 24])


@pytest.mark.parametrize(
    "damaged", ["text of no JSON", [], {}, {"configurations": 5}, {"configurations": ["3d_fullres"]}]
)
@pytest.mark.parametrize("held", [lambda x: {"nnunet_plans": x}, lambda x: {"hyspark": {"plan": x}}])
def test_a_damaged_plan_in_a_file_is_named(held, damaged):
    with pytest.raises(ValueError, match=r"e\.pth: expected a plans.json of nnU-Net v2 .configurations., got another"):
        plan_in_file(held(damaged), "e.pth")
