"""torch.compile of blocks: the same loss, gradients and weight names, in every kind of network."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import hyspark
from hyspark.models.backbones import build_backbone
from hyspark.models.blocks import MedNeXtBlock
from hyspark.models.compile import BLOCKS, compile_blocks
from hyspark.models.spark import build_spark
from hyspark.tasks import pretrain

# torch looks at the gradient of tensors that have none, and warns of what it does itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

SMALL = {"widths": (6, 6, 12, 12, 24), "depths": (1, 1, 1, 1, 1), "vit_depth": 1}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def spark():
    backbone = build_backbone("timm/test_resnet", 1, 2)
    return build_spark(backbone.network, 64, 0.5, in_channels=1, axes=2, decoder_width=32, run=backbone.run)


NETWORKS = {
    "hyspark": (lambda: hyspark.build_hyspark(32, decoder_width=16, **SMALL), (2, 1, 32, 32, 32)),
    "hybird": (lambda: hyspark.build_hybird(1, 3, 32, **SMALL), (1, 1, 32, 32, 32)),
    "spark": (spark, (2, 1, 64, 64)),
}


def loss_of(net, images):
    if not hasattr(net, "draw_visible"):
        return net(images).square().mean()
    torch.manual_seed(1)
    visible = net.draw_visible(len(images), images.shape[2:])
    return net(images, visible).loss


def loss_and_gradients(net, images):
    loss = loss_of(net, images)
    return [loss, *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)]


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_blocks_give_the_same(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    plain = make()
    compiled = copy.deepcopy(plain)
    number = compile_blocks(compiled, backend="aot_eager")
    assert number == sum(isinstance(module, BLOCKS) for module in plain.modules()) > 0
    images = torch.rand(shape)
    for one, other in zip(loss_and_gradients(compiled, images), loss_and_gradients(plain, images), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for key, value in plain.state_dict().items():  # BatchNorm's running statistics, too, which moved once
        torch.testing.assert_close(compiled.state_dict()[key], value)


def test_another_mask_is_not_compiled_anew():
    """Masks differ in how many neighbours are visible, with which the lengths of the index maps differ."""
    make, shape = NETWORKS["hyspark"]
    net = make()
    compile_blocks(net, backend="aot_eager")
    counters.clear()
    graphs, lengths = [], set()
    for seed in range(3):
        visible = torch.rand(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(seed)).flatten(2).argsort(-1)
        visible = (visible < 4).view(2, 1, 2, 2, 2)  # four patches of each sample
        patches = net.encoder.patches(torch.rand(shape), visible)
        lengths.add(len(patches.border_indices((16,) * 3, ((1,) * 3, (1,) * 3))[0]))
        net(torch.rand(shape), visible).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(lengths) > 1
    assert graphs == graphs[:1] * 3


@pytest.mark.slow
def test_inductor_compiles_the_pretraining_network():
    """Needs a C++ compiler; a minute on two cores."""
    make, shape = NETWORKS["hyspark"]
    plain = make()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    images = torch.rand(shape)
    for one, other in zip(loss_and_gradients(compiled, images), loss_and_gradients(plain, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_run_compiles_its_steps_and_not_its_validations(pretraining, monkeypatch):
    small = replace(pretraining, batch_size=1, max_steps=2)
    monkeypatch.setattr(pretrain, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    shapes = []
    depthwise = MedNeXtBlock.depthwise
    monkeypatch.setattr(MedNeXtBlock, "depthwise", lambda self, x: watch(shapes, depthwise, self, x))
    plain = pretrain.run_pretraining(replace(small, out=f"{pretraining.out}_plain"))
    shapes.clear()
    folder = pretrain.run_pretraining(replace(small, compile="blocks"))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, plain)]
    for key in ("loss", "val_loss"):
        ours, theirs = ([line[key] for line in run if key in line] for run in lines)
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours
    is_compiled = [compiling for training, compiling in shapes if training]
    assert is_compiled
    assert all(is_compiled)
    assert not any(compiling for training, compiling in shapes if not training)


def watch(calls, depthwise, block, x):
    """Note whether the block trains and whether torch is compiling it; compiled code does not come here again."""
    calls.append((block.training, torch.compiler.is_compiling()))
    return depthwise(block, x)
