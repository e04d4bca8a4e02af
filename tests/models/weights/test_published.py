"""Files in the layouts of their authors, with random weights of tiny networks: what loads, and what else is said."""

import re

import pytest
import timm
import torch
import torchvision
from monai.networks import nets

from hyspark import build_spark, load_pretrained
from hyspark.models.backbones import build_backbone

TINY = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}),
    "scaled": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "init_values": 1.0},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    "reg4": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}),
    "sam": ("samvit_base_patch16", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "neck_chans": 8}),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (2, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1)}),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}),
    "resnet": ("resnet10t", {}),
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": (2, 1)}),
}
"""A small network of timm by the name of its family: architecture and options."""


def tiny(family, **options):
    """A small network without classifier."""
    name, given = TINY[family]
    return timm.create_model(name, num_classes=0, **(given | options))


def below(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def renamed(weights, *pairs):
    """The weights by other names: patterns and replacements in their order."""
    names = {}
    for key in weights:
        names[key] = key
        for old, new in pairs:
            names[key] = re.sub(old, new, names[key])
    return {names[key]: value for key, value in weights.items()}


def zeros(*names):
    return dict.fromkeys(names, torch.zeros(2, 2))


HEAD = zeros("head.mlp.0.weight", "head.last_layer.weight_g")


def dino(w):
    return {"student": below("module.backbone.", w) | below("module.", HEAD), "teacher": below("backbone.", w) | HEAD}


def mae(w):
    more = zeros("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    return {"model": w | more | zeros("decoder_norm.weight", "decoder_pred.bias"), "epoch": 3, "scaler": {}}


def moco_v3(w):
    other = {key: value + 1 for key, value in w.items()}
    both = below("module.base_encoder.", w | zeros("head.0.weight")) | below("module.momentum_encoder.", other)
    return {"arch": "vit_small", "state_dict": both | zeros("module.predictor.0.weight")}


def solo(w):
    other = {key: value + 1 for key, value in w.items()}
    heads = zeros("classifier.weight", "projector.0.weight", "momentum_projector.0.weight", "predictor.0.weight")
    return {"state_dict": below("backbone.", w) | below("momentum_backbone.", other) | heads}


def dinov2_training(w):
    chunks = renamed(w, (r"^blocks\.([01])\.", r"blocks.0.\1."), (r"^blocks\.2\.", "blocks.1.2."))
    return {"teacher": below("backbone.", chunks | zeros("mask_token")) | zeros("dino_head.a", "ibot_head.a")}


def registers(w):
    """As published, the class token has a position."""
    w = renamed(w, ("^reg_token", "register_tokens")) | zeros("mask_token")
    position = torch.rand_like(w["cls_token"])
    return w | {"cls_token": w["cls_token"] - position, "pos_embed": torch.cat([position, w["pos_embed"]], 1)}


def dinov3(w):
    w = renamed(w, ("reg_token", "storage_tokens"), (r"gamma_([12])", r"ls\1.gamma"))
    return w | zeros("mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias_mask")


def clip(w):
    w = renamed(
        w,
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    w |= {"class_embedding": w.pop("cls_token")[0, 0], "positional_embedding": w.pop("pos_embed")[0], **zeros("proj")}
    return below("visual.", w) | zeros("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale")


def beit(w):
    """Before fine-tuning, all blocks share a table."""
    table = {"rel_pos_bias.relative_position_bias_table": w["blocks.0.attn.relative_position_bias_table"]}
    w = {key: value for key, value in w.items() if "bias_table" not in key and "fc_norm" not in key}
    return {"model": w | table | zeros("rel_pos_bias.relative_position_index", "lm_head.weight", "mask_token")}


def sam(w):
    return below("image_encoder.", renamed(w, (r"mlp\.fc", "mlp.lin"))) | zeros("mask_decoder.iou_token.weight")


def swin(w):
    w = renamed(w, (r"layers\.1\.downs", "layers.0.downs"), (r"layers\.2\.downs", "layers.1.downs"))
    w = renamed(w, (r"layers\.3\.downs", "layers.2.downs"))
    more = zeros("layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask", "mask_token")
    return {"model": below("encoder.", w | more) | zeros("decoder.0.weight")}


def convnext(w):
    w = renamed(w, (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."))
    w = renamed(w, (r"^stages\.(\d)\.blocks\.", r"stages.\1."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"))
    return {"model": renamed(w, (r"^head\.norm\.", "norm."))}


def chexnet(w):
    w = renamed(w, (r"(norm|conv)([12])\.", r"\1.\2."))
    return {"state_dict": below("module.densenet121.", w | zeros("classifier.0.weight"))}


LAYOUTS = {
    "vit": [dict, dino, mae, moco_v3, dinov2_training],
    "distilled": [lambda w: {"model": w | zeros("head.weight", "head_dist.weight")}],
    "deit3": [lambda w: {"model": renamed(w, (r"ls([12])\.gamma", r"gamma_\1"))}],
    "reg4": [registers],
    "dinov3": [dinov3],
    "clip": [clip],
    "beit": [beit],
    "sam": [sam],
    "swin": [swin],
    "convnext": [convnext],
    "resnet": [solo, lambda w: w | zeros("op_threshs", "pixel_mean", "criterion.weight")],
    "densenet": [chexnet],
}


def tensor_names(contents):
    """All names of tensors in the contents of a file, those of the student aside."""
    for key, value in contents.items():
        if isinstance(value, dict) and key != "student":
            yield from tensor_names(value)
        elif torch.is_tensor(value):
            yield key


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]
)
def test_a_published_layout_is_loaded_and_all_its_keys_are_named(family, layout, capsys):
    torch.manual_seed(0)
    source = tiny(family)
    weights = {key: torch.rand_like(value) for key, value in source.state_dict().items() if value.is_floating_point()}
    if layout is beit:  # all blocks of the file have one table
        weights["blocks.1.attn.relative_position_bias_table"] = weights["blocks.0.attn.relative_position_bias_table"]
    model, given = tiny(family), layout(dict(weights))
    report = load_pretrained(model, given)
    state = model.state_dict()
    expected = {key: value for key, value in weights.items() if key not in report.missing}
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value)
    assert set(report.missing) <= {"fc_norm.weight", "fc_norm.bias"} | {k for k in state if "num_batches" in k}
    assert report.unexpected.keys() <= set(tensor_names(given))
    used = set(tensor_names(given)) - report.unexpected.keys()
    assert len(used) <= len(report.matched) + len(report.adapted)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("edge", "new"), [(64, 32), (32, 48), (32, (32, 64))])
def test_positions_of_another_size_are_resampled_as_timm_does(edge, new):
    source, model = tiny("vit", img_size=edge), tiny("vit", img_size=new)
    report = load_pretrained(model, source.state_dict())
    assert set(report.adapted) == {"pos_embed"}
    old = edge // 16
    size = model.patch_embed.grid_size
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, list(size), [old, old])
    torch.testing.assert_close(model.pos_embed, expected)
    assert "1, 1 " not in report.adapted["pos_embed"]


def test_positions_of_a_transformer_of_torchvision_are_resampled():
    source, model = (torchvision.models.VisionTransformer(size, 16, 1, 2, 16, 8) for size in (64, 32))
    report = load_pretrained(model, source.state_dict())
    assert report.adapted == {"encoder.pos_embedding": "positions resampled, (1, 17, 16) -> (1, 5, 16)"}


def test_tables_of_another_window_are_resampled():
    source, model = tiny("beit", img_size=64), tiny("beit")
    report = load_pretrained(model, source.state_dict())
    assert set(report.adapted) == {f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)}


def test_one_shared_encoder_under_two_names_is_loaded():
    """BYOL of byol-pytorch stores the network and the online encoder's reference to it."""
    weights = tiny("resnet").state_dict()
    given = below("net.", weights) | below("online_encoder.net.", weights)
    report = load_pretrained(tiny("resnet"), given)
    assert report.coverage == 1
    assert set(report.unexpected.values()) == {"another name of a tensor that is loaded"}


def test_two_encoders_under_two_names_are_the_users_choice():
    weights = tiny("resnet").state_dict()
    given = below("net.", weights) | below("online_encoder.net.", {key: x + 1 for key, x in weights.items()})
    with pytest.raises(ValueError, match=r"2 ways .*--weights_key net") as error:
        load_pretrained(tiny("resnet"), given)
    key = re.search(r"--weights_key (\S+)", str(error.value))[1]
    assert load_pretrained(tiny("resnet"), given, key).coverage == 1


@pytest.mark.parametrize(
    ("family", "network", "layout", "message"),
    [
        ("reg4", "vit_small_patch14_dinov2", registers, "register_tokens: the file's network has register tokens"),
        ("distilled", "deit_tiny_patch16_224", dict, "dist_token: the file's network has a distillation token"),
        ("scaled", "vit_tiny_patch16_224", dict, "got 6 further keys in its stages (blocks.0.ls1.gamma, blocks.0.ls2"),
    ],
)
def test_a_network_without_what_the_file_computes_with_is_refused(family, network, layout, message):
    source = tiny(family)
    options = {key: value for key, value in TINY[family][1].items() if key != "init_values"}
    model = timm.create_model(network, num_classes=0, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(model, layout(source.state_dict()))


# --- networks of volumes


def swin_unetr(in_channels, axes):
    return nets.SwinUNETR(in_channels=in_channels, out_channels=2, feature_size=12, spatial_dims=axes)


def resnet_without_shortcut_weights(in_channels, axes):
    options = {"shortcut_type": "A", "conv1_t_stride": 2, "feed_forward": False}
    return nets.ResNet("basic", [1] * 4, [4, 4, 8, 8], axes, in_channels, **options)


def test_swin_unetr_of_self_supervision_into_a_function_that_builds_it():
    model = build_backbone(f"{__name__}:swin_unetr", 1, 3).network
    weights = {key: value + 1 for key, value in model.swinViT.state_dict().items()}
    given = renamed(weights, (r"mlp\.linear", "mlp.fc")) | zeros("rotation_head.weight", "contrastive_head.bias")
    report = load_pretrained(model, {"state_dict": below("module.", given)})
    assert all(torch.equal(model.swinViT.state_dict()[key], value) for key, value in weights.items())
    assert len(report.unexpected) == 2
    with pytest.raises(ValueError, match=r"those of Swin UNETR; give a function .*FACTORY"):
        load_pretrained(build_backbone("monai/segresnet", 1, 3).network, {"state_dict": below("module.", given)})


def small_swin(classes=2, use_v2=False):
    return nets.SwinUNETR(1, classes, feature_size=12, depths=(1, 1, 1, 1), spatial_dims=3, use_v2=use_v2)


def of_student(classes):
    """VoCo's network in pre-training: no decoder, a projection head."""
    kept = ("swinViT.", "encoder")
    weights = {
        key: value for key, value in small_swin(classes, use_v2=True).state_dict().items() if key.startswith(kept)
    }
    return weights | zeros("proj_head.layer1.0.weight", "proj_head.layer3.0.bias")


def suprem(w):
    """Its universal model: the network as a backbone, heads driven by text."""
    heads = zeros("organ_embedding", "precls_conv.0.weight", "GAP.3.bias", "controller.weight", "text_to_vision.bias")
    return {"net": below("module.backbone.", w) | below("module.", heads), "scheduler": {"last_epoch": 3}, "epoch": 3}


def simmim(w):
    """Self-supervision of 50,000 CTs: the transformer below `encoder.`, in a list of a list."""
    w = renamed(w, (r"^swinViT\.layers(\d)\.0\.", r"encoder.layers\1.0.0."), (r"^swinViT\.", "encoder."))
    return {"model": w | zeros("encoder.mask_token", "encoder.norm.weight", "encoder.norm.bias")}


@pytest.mark.parametrize(
    ("layout", "use_v2"),
    [
        (suprem, False),
        (simmim, False),
        (lambda w: {"state_dict": renamed(below("module.", w), ("swinViT", "swin_vit"))}, False),
        (lambda w: {"state_dict": below("module.", w)}, True),
    ],
    ids=["SuPreM", "SimMIM", "early MONAI", "VoComni"],
)
def test_all_of_swin_unetr_but_its_head(layout, use_v2):
    torch.manual_seed(0)
    source, model = small_swin(25, use_v2), small_swin(2, use_v2)
    weights = {key: value + 1 for key, value in source.state_dict().items()}
    report = load_pretrained(model, layout(weights))
    assert report.missing == ("out.conv.conv.weight", "out.conv.conv.bias")
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items() if key not in report.missing)
    assert report.coverage > 0.99


def test_voco_of_self_supervision_by_its_teacher():
    teacher = {key: value + 1 for key, value in of_student(2).items()}
    given = {"state_dict": below("student.", of_student(2)) | below("teacher.", teacher), "global_step": 3}
    model = small_swin(use_v2=True)
    report = load_pretrained(model, given)
    assert torch.equal(
        model.state_dict()["encoder10.layer.conv1.conv.weight"], teacher["encoder10.layer.conv1.conv.weight"]
    )
    assert {key.partition(".")[0] for key in report.missing} == {"out", *(f"decoder{level}" for level in range(1, 6))}
    with pytest.raises(ValueError, match=r"further keys in its stages \(swinViT\.layers1c"):
        load_pretrained(small_swin(), of_student(2))


def test_suprems_segresnet_continues_in_pre_training():
    """Its keys are those of the whole model, without `backbone.`."""
    source = nets.SegResNet(3, 16, 1, 25, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    backbone = build_backbone("monai/segresnet", 1, 3)
    model = build_spark(backbone.network, (32, 32, 32), run=backbone.run, in_channels=1, decoder_width=32)
    report = load_pretrained(model, {"net": below("module.", source.state_dict()), "epoch": 3})
    key = "down_layers.3.4.conv2.conv.weight"
    assert torch.equal(model.encoder.backbone.state_dict()[key], source.state_dict()[key])
    assert not any(key.startswith("encoder.backbone.down_layers") for key in report.missing)


def test_medicalnets_shortcuts_without_bias():
    """MONAI's own have one by default; without it, it is 0."""
    options = {"conv1_t_stride": 2, "feed_forward": False}
    source = nets.ResNet("basic", [1] * 4, [4, 4, 8, 8], 3, 1, bias_downsample=False, **options)
    model = nets.ResNet("basic", [1] * 4, [4, 4, 8, 8], 3, 1, **options)
    report = load_pretrained(model, {"state_dict": below("module.", source.state_dict())})
    zeroed = {key for key in model.state_dict() if key.endswith("downsample.0.bias")}
    assert report.adapted == dict.fromkeys(zeroed, "0, since the file's shortcuts have no bias")
    assert zeroed
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), source.eval()(x))


def test_medicalnets_shortcuts_without_weights():
    given = below("module.", build_backbone(f"{__name__}:resnet_without_shortcut_weights", 1, 3).network.state_dict())
    with_weights = nets.ResNet("basic", [1] * 4, [4, 4, 8, 8], 3, 1, conv1_t_stride=2, feed_forward=False)
    with pytest.raises(ValueError, match=r"shortcut_type='A', --model PACKAGE\.MODULE:FACTORY"):
        load_pretrained(with_weights, {"state_dict": given})
    model = build_backbone(f"{__name__}:resnet_without_shortcut_weights", 1, 3).network
    assert load_pretrained(model, {"state_dict": given}).coverage == 1


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("encoder.stages.0.0.convs.0.conv.weight", "nnU-Net"),
        ("encoder.stages.0.blocks.0.conv1.conv.weight", "nnU-Net"),
        ("conv_blocks_context.0.blocks.0.conv.weight", "nnU-Net"),
        ("conv_blocks_context.0.0.conv1.weight", "STU-Net"),
        ("offset1", "of no network that is known here; load it into its own network"),
        ("module.backbone.down_tr64.ops.0.conv1.weight", "Models Genesis and SuPreM"),
        ("image_encoder.encoder.layers.0.blocks.0.conv1.weight", "VISTA3D"),
        ("model.1.submodule.0.conv.unit0.conv.weight", "MONAI's UNet"),
        ("image_encoder.blocks.0.attn.qkv.weight", "timm/samvit_base_patch16"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "timm/vit_base_patch16_clip_224"),
        ("backbone.layer1.0.conv1.weight", "timm/resnet50"),
        ("backbone.4.0.conv1.weight", "timm/resnet50"),
        ("features.denseblock1.denselayer1.conv1.weight", "torchvision/densenet121"),
        ("layers.0.blocks.0.attn.qkv.weight", "timm/swin_tiny_patch4_window7_224"),
        ("features.1.0.block.0.weight", "torchvision/convnext_tiny"),
        ("stages.0.0.dwconv.weight", "timm/convnext_tiny"),
        ("blocks.0.attn.qkv.weight", "timm/vit_base_patch16_224"),
        ("embeddings.layer1.0.conv1.weight", "drop --model"),
    ],
)
def test_the_family_of_a_file_is_named_and_a_network_that_is_there(key, what):
    given = {key: torch.zeros(3)} | zeros("a.x", "b.y")
    with pytest.raises(ValueError, match=re.escape(what)) as error:
        load_pretrained(build_backbone("monai/dynunet", 1, 3).network, given)
    for library, name in re.findall(r"(timm|torchvision)/(\w+)", str(error.value)):
        known = timm.list_models() if library == "timm" else torchvision.models.list_models()
        assert name in known
    assert all(hasattr(nets, name) for name in re.findall(r"monai\.networks\.nets\.(\w+)", str(error.value)))
