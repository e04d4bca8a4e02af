from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

import hyspark
from hyspark.models.contrastive import build_siamese
from hyspark.models.spark import build_spark
from hyspark.training.optim import (
    LR_RATIO,
    learning_rate,
    make_adamw,
    match_saved_groups,
    parameter_groups,
    set_lr_and_decay,
    weight_decay,
)


def test_learning_rate_starts_peaks_and_ends_where_the_recipe_says():
    rates = [
        learning_rate(t, peak=1e-4, warmup=40, total=100, start_factor=0.005, end_factor=0.001) for t in range(100)
    ]
    assert rates[0] == pytest.approx(5e-7)
    assert rates[20] == pytest.approx(1e-4 * (0.005 + 0.995 / 2))
    assert max(rates) == rates[40] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-7)
    assert all(a > b for a, b in pairwise(rates[40:]))


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=1.0, warmup=0, total=1) == 1.0
    assert learning_rate(0, peak=1.0, warmup=0, total=10) == 1.0
    assert learning_rate(9, peak=1.0, warmup=0, total=10) == pytest.approx(0.0)


def test_weight_decay_goes_from_start_to_end_by_half_a_cosine():
    values = [weight_decay(t, start=0.04, end=0.2, total=101) for t in range(101)]
    assert values[0] == pytest.approx(0.04)
    assert values[50] == pytest.approx(0.12)
    assert values[100] == pytest.approx(0.2)


def test_norms_biases_and_tokens_are_spared_weight_decay():
    model = hyspark.build_hyspark(32, widths=(6, 6, 12, 12, 24), decoder_width=16)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    set_lr_and_decay(optimizer, lr=0.5, wd=0.25)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(g["lr"] == 0.5 for g in optimizer.param_groups)
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = name.endswith(("bias", "mask_token")) or ".norm" in name or parameter.ndim == 1
        assert decay[id(parameter)] == (0.0 if spared else 0.25), name


def test_rates_fall_from_layer_to_layer_and_the_decoder_has_the_full_one():
    model = hyspark.build_hybird(1, 3, 32, widths=(6, 6, 12, 12, 24), vit_depth=2)
    groups = parameter_groups(model, layer_decay=0.5)
    ratio = {id(p): g[LR_RATIO] for g in groups for p in g["params"]}
    by_name = {name: ratio[id(p)] for name, p in model.named_parameters()}
    assert len(ratio) == len(by_name)
    assert by_name["decoder.decoder4.layer.conv1.weight"] == by_name["mae.norm.weight"] == 1
    assert [by_name[f"mae.blocks.{i}.mlp.fc1.bias"] for i in (1, 0)] == [1 / 2, 1 / 4]
    assert [by_name[f"embeddings.layer{s}.0.conv2.weight"] for s in (5, 4, 1)] == [1 / 8, 1 / 16, 1 / 128]
    assert by_name["embeddings.stem.weight"] == by_name["embeddings.expend1.bias"] == 1 / 128


@pytest.mark.parametrize("build", [hyspark.build_hyspark, hyspark.build_hybird])
def test_the_encoder_has_a_rate_of_its_own(build):
    model = build(img_size=32, widths=(6, 6, 12, 12, 24))
    groups = parameter_groups(model, layer_decay=0.5, encoder_lr_ratio=0.1)
    ratio = {id(p): g[LR_RATIO] for g in groups for p in g["params"]}
    by_name = {name.removeprefix("encoder."): ratio[id(p)] for name, p in model.named_parameters()}
    assert by_name["mae.norm.weight"] == pytest.approx(0.1)
    assert by_name["mae.blocks.2.mlp.fc1.weight"] == pytest.approx(0.05)
    assert by_name["embeddings.stem.weight"] == pytest.approx(0.1 / 256)
    rest = {name: value for name, value in by_name.items() if not name.startswith(("mae.", "embeddings."))}
    assert rest
    assert set(rest.values()) == {1.0}


def test_a_third_party_network_has_the_encoders_rate():
    model = build_spark(timm.create_model("resnet10t", num_classes=0), 64, decoder_width=32)
    groups = parameter_groups(model, encoder_lr_ratio=0.1)
    ratio = {id(p): g[LR_RATIO] for g in groups for p in g["params"]}
    assert {ratio[id(p)] for p in model.encoder.parameters()} == {0.1}
    assert {ratio[id(p)] for part in (model.densify, model.decoder) for p in part.parameters()} == {1.0}


def test_the_network_says_which_weights_are_the_encoders():
    small = {"img_size": 32, "widths": (6, 6, 12, 12, 24)}
    layers = hyspark.build_hyspark(**small).encoder_layers()
    assert layers["encoder.embeddings.expend3.weight"] == 2
    assert layers["encoder.mae.blocks.2.norm1.weight"] == 7
    assert layers["encoder.mae.norm.weight"] is None
    assert not any(name.startswith(("decoder.", "densify.")) for name in layers)
    assert hyspark.build_hybird(**small).encoder_layers()["embeddings.stem.weight"] == 0
    siamese = build_siamese("moco", timm.create_model("resnet10t", num_classes=0), 64, head_width=8, queue_size=8)
    encoders = {name.split(".conv1")[0] for name in siamese.encoder_layers() if ".conv1.0.weight" in name}
    assert {name.split(".backbone")[0] for name in encoders} == {"encoder", "teacher.module.0"}


def test_a_renamed_encoder_is_no_silent_change():
    model = nn.ModuleDict({"features": nn.Linear(2, 2)})
    assert len(parameter_groups(model)) == 2
    for rates in ({"layer_decay": 0.5}, {"encoder_lr_ratio": 0.5}):
        with pytest.raises(ValueError, match="ModuleDict does not say which of its weights are the encoder's"):
            parameter_groups(model, **rates)


def decaying(model, **options):
    decays = {id(p) for g in parameter_groups(model, **options) if g["decays"] for p in g["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decays}


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("test_vit", {"cls_token", "pos_embed"}),
        ("swin_s3_tiny_224", {f"layers.0.blocks.{i}.attn.relative_position_bias_table" for i in range(2)}),
        ("beit_base_patch16_224", {"cls_token", "blocks.3.attn.relative_position_bias_table"}),
    ],
)
def test_position_embeddings_and_tokens_do_not_decay(name, spared):
    with torch.device("meta"):
        model = timm.create_model(name)
        inner = nn.ModuleDict({"backbone": model})
    assert spared <= dict(model.named_parameters()).keys()
    assert not spared & decaying(model)
    assert spared <= decaying(model, spare_tokens=False)
    assert not {f"backbone.{key}" for key in spared} & decaying(inner)
    assert any(key.endswith("mlp.fc1.weight") for key in decaying(model))


def test_those_of_torchvision_do_not_decay_either():
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    assert not {"class_token", "encoder.pos_embedding"} & decaying(model)


def test_what_a_network_declares_does_not_decay():
    class Declares(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.weight = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))

        def no_weight_decay(self):
            return {"scale"}

    assert decaying(nn.ModuleDict({"part": Declares()})) == {"part.weight"}


def test_a_run_that_decayed_them_continues(caplog):
    model = timm.create_model("test_vit", num_classes=0)
    old, new = (make_adamw(model, spare_tokens=spares) for spares in (False, True))
    for saved, says in ((old, "weight decay of position embeddings and tokens continues"), (new, "")):
        caplog.clear()
        with caplog.at_level("INFO", logger="hyspark"):
            optimizer = match_saved_groups(make_adamw, model, saved.state_dict())
        assert says in caplog.text
        optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="the optimizer's state has groups of"):
        match_saved_groups(make_adamw, nn.Linear(2, 2), old.state_dict())
