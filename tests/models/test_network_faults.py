"""Any fault of a third-party network is one line: network, module, reason, and what to do."""

import re
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from hyspark.models.backbones import build_backbone, list_backbones, suggest_backbones
from hyspark.models.defaults import grid_of
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at
from hyspark.models.network_faults import UnsupportedNetworkError, check_runs
from hyspark.models.spark import PyramidEncoder, build_spark
from hyspark.models.spark_checks import check_masked, packed_fault
from hyspark.tasks.classification import initialise_classifier
from hyspark.tasks.pretrain import initialise_pretraining
from tests.tasks.kinds import PRETRAININGS

REFUSED = {
    "timm/gcresnext26ts": r"module stages\.0\.0\.attn \(GlobalContext\): .*softmax mixes positions",
    "timm/test_vit": r"expected feature maps at strides 2, 4, 8.* got none; it computes tokens \(blocks\.0\.attn",
    "timm/swin_tiny_patch4_window7_224": r"Input height \(64\) doesn't match model \(224\); it has attention",
    "timm/maxvit_rmlp_pico_rw_256": r"it has attention \(stages\.0\.blocks\.0\.attn_block, ",
    "timm/legacy_xception": r"module conv1 \(Conv2d\): the mask .* is there a convolution or pool without padding",
    "timm/mobilevit_xxs": r"module stages\.2\.1 \(MobileVitBlock\): .*reshape mixes positions",
    "torchvision/googlenet": r"does not run under a mask: .*aux1 .*flatten mixes positions",
    "torchvision/swin_t": r"features\.1\.0\.attn \(ShiftedWindowAttention\)",
}


def build(name, size=64):
    backbone = build_backbone(name, 3, 2)
    return build_spark(backbone.network, size, 0.5, decoder_width=64, run=backbone.run)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused_by_module(name):
    with pytest.raises(UnsupportedNetworkError, match=REFUSED[name]) as error:
        build(name)
    assert "\n" not in str(error.value)


def assert_hidden_pixels_change_nothing(encoder, size):
    visible = torch.zeros(2, 1, *grid_of((size, size), encoder.patch), dtype=torch.bool)
    visible.view(2, -1)[:, ::2] = True
    images = torch.randn(2, 3, size, size)
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 1e3))
    with torch.no_grad():
        ones, others = encoder.eval()(images, visible), encoder(changed, visible)
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    assert all(a.abs().max() > 0 for a in ones)


@pytest.mark.parametrize("name", ["timm/hrnet_w18_small", "timm/ecaresnet26t"])
def test_networks_by_their_modules_not_by_shapes(name):
    """At 128 pixels a map has as many positions as channels, where ECA convolves over channels."""
    net = build(name, 128)
    assert [stride for _, stride in net.encoder.maps] == [(s, s) for s in (32, 16, 8, 4, 2)]
    assert_hidden_pixels_change_nothing(net.encoder, 128)
    net.train()(torch.randn(2, 3, 128, 128)).loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_a_convolution_over_channels_is_no_convolution_over_positions():
    visible = torch.tensor([[[[True, False], [False, True]]]])
    conv = nn.Conv1d(1, 1, 3, padding=1)
    maps = torch.randn(1, 64, 8, 8)  # 64 channels, 64 positions
    with hidden(visible) as context:
        context.mask((8, 8))
        pooled = maps.mean((2, 3))
        assert torch.equal(conv(pooled.view(1, 1, 64)), conv(pooled[:, None]))
        with pytest.raises(NotImplementedError, match="conv1d mixes positions"):
            conv(maps[:, :1].flatten(2))
        with pytest.raises(NotImplementedError, match="conv1d mixes positions"):
            conv((maps.flatten(2) * pooled[:, :, None])[:, :1])


class Leaks(nn.Module):
    """Mixes positions by a function that no rule knows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)

    def forward(self, x):
        return self.conv(x + torch.matrix_exp(0.1 * x))


class FailsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.head = nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        return F.interpolate(x, scale_factor=2) if self.training else x


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Leaks(), "output of its module conv depends on hidden voxels"),
        (FailsInTraining(), "interpolate mixes positions"),
    ],
)
def test_a_trial_finds_what_no_rule_knows(network, says):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(UnsupportedNetworkError, match=says):
        build_spark(network, 16, 0.5, decoder_width=8)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_trial_changes_nothing():
    network = torchvision.models.resnet18()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    encoder = PyramidEncoder(network, (64, 64), 3)
    check_masked(encoder)
    assert not packed_fault(encoder)
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_tag_of_weights_is_cut_and_reported(caplog):
    built = build_backbone("timm/resnet18.a1_in1k", 1, 2).network
    assert "the tag .a1_in1k names weights, which are not loaded; built timm/resnet18" in caplog.text
    assert built.state_dict().keys() == timm.create_model("resnet18", num_classes=0).state_dict().keys()
    with pytest.raises(ValueError, match=r"timm has no such network; did you mean timm/resnet18"):
        build_backbone("timm/resnet_18.a1_in1k", 1, 2)


def test_networks_that_cannot_be_built_are_named(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: 1 / 0)
    with pytest.raises(UnsupportedNetworkError, match=r"timm/resnet18: cannot be built with in_chans=3, .*division"):
        build_backbone("timm/resnet18", 3, 2)


def test_a_users_own_function_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_networks.py").write_text("def make(in_channels, axes):\n    return {}['stem']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedNetworkError, match=r"KeyError in .*broken_networks\.py, line 2: 'stem'"):
        build_backbone("broken_networks:make", 3, 2)


def test_the_suggested_networks_are_listed():
    for name in ("timm/gcresnet33ts", "timm/vit_tiny_patch16_224", "torchvision/swin_t", "monai/none"):
        suggested = re.findall(r"\w+/\w+", suggest_backbones(name))
        assert suggested
        assert set(suggested) <= set(list_backbones())


def test_a_classifier_of_another_size_is_named(classifying):
    """A transformer of timm is built for the crop size; a network that timm cannot change is refused by name."""
    initialise_classifier(replace(classifying, model="timm/test_vit", crop_size=32), 2)
    with pytest.raises(UnsupportedNetworkError, match=r"timm/mixer_s32_224: .*Input height.*set --crop_size"):
        initialise_classifier(replace(classifying, model="timm/mixer_s32_224", crop_size=32), 2)


def test_the_error_of_a_run_names_the_setting_and_other_networks(pretraining):
    config = replace(pretraining, **PRETRAININGS["spark timm"] | {"model": "spark/timm/gcresnext26ts"})
    with pytest.raises(UnsupportedNetworkError, match=r"^spark/timm/gcresnext26ts: ByobNet .*such as timm/") as error:
        initialise_pretraining(config)
    assert "\n" not in str(error.value)


def test_memory_is_no_fault_of_the_network():
    class Large(nn.Module):
        def forward(self, x):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError, match="out of memory") as error:
        check_runs(Large(), torch.zeros(1))
    assert not isinstance(error.value, UnsupportedNetworkError)


def test_for_a_function_of_the_user_no_network_of_its_module_is_suggested():
    assert "my_nets" not in suggest_backbones("my_nets:small")
