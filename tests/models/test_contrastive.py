"""MoCo v2, BYOL and SwAV around networks of others: losses, slow copies, the queue, and what is handed on."""

import math
import re
import sys

import pytest
import timm
import torch
import torchvision
from monai.networks.nets import resnet10
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from hyspark.models.backbones import build_backbone
from hyspark.models.contrastive import MOCO_TEMPERATURE, build_siamese
from hyspark.models.defaults import CONTRASTIVE_METHODS
from hyspark.utils.install import install_command


def siamese_of(method, name="timm/resnet10t", **options):
    """A small network with 16 keys or 5 clusters."""
    torch.manual_seed(0)
    channels, axes = (1, 3) if name.startswith("monai/") else (3, 2)
    backbone = build_backbone(name, channels, axes)
    sizes = {"head_width": 16, "queue_size": 16, "num_prototypes": 5}
    return build_siamese(method, backbone.network, 64, in_channels=channels, axes=axes, run=backbone.run, **sizes)


@pytest.fixture(params=CONTRASTIVE_METHODS)
def net(request):
    return siamese_of(request.param)


def views(number=2, batch=4):
    return [torch.rand(batch, 3, 64, 64) for _ in range(number)]


def test_all_but_the_slow_copy_is_trained(net):
    net.train()
    with torch.no_grad():  # residual branches begin with a factor of zero
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    net(views()).loss.backward()
    for name, parameter in net.named_parameters():
        is_copy = name.startswith("teacher.")
        assert parameter.requires_grad == (not is_copy), name
        assert (parameter.grad is None) == is_copy, name
        assert is_copy or bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("method", CONTRASTIVE_METHODS)
@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("timm/resnet10t", lambda: timm.create_model("resnet10t", num_classes=0)),
        ("torchvision/resnet18", torchvision.models.resnet18),
        (
            "monai/resnet10",
            lambda: resnet10(spatial_dims=3, n_input_channels=1, bias_downsample=False, feed_forward=False),
        ),
    ],
)
def test_what_is_handed_on_loads_strictly_into_the_original(method, name, original):
    original().load_state_dict(siamese_of(method, name).encoder.weights(), strict=True)


def test_a_classifier_is_left_out_of_training():
    net = siamese_of("moco", "torchvision/resnet18")
    frozen = [name for name, p in net.encoder.backbone.named_parameters() if not p.requires_grad]
    assert frozen == ["fc.weight", "fc.bias"]


def test_the_loss_of_moco_is_that_of_the_paper_and_keys_queue_up():
    """One key of its own image against all keys of earlier ones."""
    net = siamese_of("moco").train()
    queue = net.criterion.memory_bank.bank.clone()
    pair = views()
    net.teacher.encode_keys(pair[0])
    keys = normalize(net.teacher.eval()(pair[1]), dim=1)
    net.train()
    output = net(pair)
    own = (output.projections * keys).sum(1, keepdim=True)
    logits = torch.cat([own, output.projections @ queue.T], 1) / MOCO_TEMPERATURE
    torch.testing.assert_close(output.loss, cross_entropy(logits, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(net.criterion.memory_bank.bank[:4], keys)
    assert torch.equal(net.criterion.memory_bank.bank[4:], queue[4:])
    with torch.no_grad():
        net(pair)
    torch.testing.assert_close(net.criterion.memory_bank.bank[4:], queue[4:])


def test_images_that_are_much_alike_are_still_told_apart():
    """Or keys would be told from each other by their age alone, and the network would give all images the same."""
    for seed in range(3):
        net = siamese_of("moco")
        torch.manual_seed(seed)
        images = torch.rand(1, 3, 64, 64) + 0.01 * torch.rand(16, 3, 64, 64)
        projections = net([images, images]).projections
        assert projections.std(0).mean() * projections.shape[1] ** 0.5 > 0.5


def test_the_queue_is_part_of_the_state():
    net, other = siamese_of("moco").train(), siamese_of("moco")
    net(views()).loss.backward()
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other.criterion.memory_bank.bank, net.criterion.memory_bank.bank)
    assert int(other.criterion.memory_bank.bank_ptr) == 4


def test_the_loss_of_byol_is_that_of_the_paper():
    net = siamese_of("byol").eval()
    pair = views()
    found = [net.predict(net.project(net.encoder(view))) for view in pair]
    wanted = [net.teacher(view) for view in pair]
    expected = -(cosine_similarity(found[0], wanted[1]) + cosine_similarity(found[1], wanted[0])).mean() / 2
    torch.testing.assert_close(net(pair).loss, expected)


def test_small_views_take_part_in_swav():
    net = siamese_of("swav").eval()
    large, small = views(), [torch.rand(4, 3, 32, 32)]
    alone, together = net(large).loss, net(large + small).loss
    assert together.shape == ()
    assert together.item() != pytest.approx(alone.item())
    assert alone.item() == pytest.approx(math.log(5), abs=1.5)


def test_prototypes_have_unit_length_before_a_step():
    net = siamese_of("swav")
    torch.nn.init.normal_(net.prototypes.heads[0].weight)
    net.prepare_step(0.9)
    torch.testing.assert_close(net.prototypes.heads[0].weight.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_slow_copy_moves_towards_the_network(method):
    net = siamese_of(method).train()
    old = net.teacher.module[0].backbone.conv1[0].weight.clone()
    with torch.no_grad():
        net.encoder.backbone.conv1[0].weight.add_(1.0)
    net(views())
    assert torch.equal(net.teacher.module[0].backbone.conv1[0].weight, old)
    net.prepare_step(0.75)
    torch.testing.assert_close(net.teacher.module[0].backbone.conv1[0].weight, old + 0.25)
    net.prepare_step(1.0)
    torch.testing.assert_close(net.teacher.module[0].backbone.conv1[0].weight, old + 0.25)
    net.prepare_step(0.0)
    for key, value in net.encoder.state_dict().items():
        assert torch.equal(net.teacher.module[0].state_dict()[key], value), key


def test_the_slow_copy_has_the_statistics_of_its_own_weights():
    """With those of the network, whose weights are others, it gives all images the same until both have settled."""
    net = siamese_of("moco").train()
    images = torch.rand(32, 3, 64, 64) * torch.rand(32, 1, 1, 1)
    for _ in range(2):  # from the first batch on
        net([images, images])
        expected = net.teacher.train()(images)
        assert cosine_similarity(net.teacher.eval()(images), expected).min() > 0.98
        net.train()
    assert {norm.momentum for norm in net.teacher.modules() if hasattr(norm, "momentum")} == {0.1}


def test_keys_carry_no_trace_of_their_batch():
    """Else the right key could be told by the batch it came in."""
    images, others = views()
    keys = []
    for batch in (images, images[:3]):
        teacher = siamese_of("moco").train().teacher
        teacher.encode_keys(others)
        keys.append((teacher.encode_keys(batch)[0], teacher.encode_keys(others)[0]))
    torch.testing.assert_close(keys[0][0], keys[1][0])
    assert not torch.allclose(keys[0][1], keys[1][1])  # later ones do


def test_views_of_another_order_have_another_loss(net):
    """The i-th samples of the views belong together."""
    net.eval()
    pair = views()
    pair[1] = pair[0] + 0.01 * pair[1]
    apart = [pair[0], pair[1].roll(1, 0)]
    assert net(pair).loss.item() < net(apart).loss.item()


def test_without_lightly_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"byol needs lightly: {install_command('views')}")):
        siamese_of("byol")


def test_unknown_methods_are_errors():
    with pytest.raises(ValueError, match=r"method: expected one of moco, byol, swav, got 'simclr'"):
        siamese_of("simclr")


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_momentum_encoder_keeps_the_key_names_of_earlier_checkpoints(method):
    """Run folders written before its class was renamed are continued."""
    keys = set(siamese_of(method).state_dict())
    assert {key.split(".")[0] for key in keys} >= {"encoder", "project", "teacher"}
    assert {"teacher.module.0.backbone.conv1.0.weight", "teacher.module.1.layers.0.weight"} <= keys
