"""Settings of speed on CUDA: each does what it says, and a run with it learns what a plain run learns."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import hyspark
from hyspark.config.pretrain import PretrainConfig
from hyspark.models.compile import compile_blocks
from hyspark.tasks.pretrain import run_pretraining
from hyspark.training.precision import configure_kernels, fastest_precision

pytestmark = [
    pytest.mark.gpu,
    # torch looks at the gradient of tensors that have none, and warns of what it does itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
SMALL = {"widths": (6, 6, 12, 12, 24), "depths": (1, 1, 1, 1, 1), "vit_depth": 1}


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    configure_kernels(PretrainConfig())


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def error_of_convolution_and_product() -> tuple[float, float]:
    """Largest error of a convolution and of a matrix product in fp32 on CUDA, as fractions of the largest value."""
    torch.manual_seed(0)
    x, weight, a = torch.randn(2, 64, 16, 16, 16), torch.randn(64, 64, 3, 3, 3), torch.randn(512, 512)
    pairs = [
        (F.conv3d(x.cuda(), weight.cuda(), padding=1), F.conv3d(x.double(), weight.double(), padding=1)),
        (a.cuda() @ a.cuda(), a.double() @ a.double()),
    ]
    convolution, product = (((found.cpu().double() - exact).abs().max() / exact.abs().max()) for found, exact in pairs)
    return float(convolution), float(product)


@pytest.mark.parametrize(("tf32", "rough"), [("none", (0, 0)), ("convolutions", (1, 0)), ("all", (1, 1))])
def test_tf32_is_where_it_is_allowed(tf32, rough):
    """Ten bits of mantissa show as errors above 1e-5; fp32's are below 1e-6 times a few."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("a GPU without TF32")
    configure_kernels(PretrainConfig(tf32=tf32))
    assert tuple(int(error > 1e-5) for error in error_of_convolution_and_product()) == rough


def test_auto_is_bf16_where_the_gpu_has_it():
    wanted = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    assert fastest_precision(torch.device("cuda", 0)) == wanted


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"cudnn_benchmark": True}, 1e-2),
        ({"compile": "blocks"}, 1e-2),
        ({"tf32": "all"}, 1e-2),
        ({"precision": "auto", "compile": "blocks", "cudnn_benchmark": True, "tf32": "all"}, 5e-2),
    ],
    ids=["cudnn_benchmark", "compile", "tf32", "all"],
)
def test_a_run_learns_the_same(pretraining, settings, bound):
    run = replace(pretraining, device="cuda", decoder_width=64)
    plain = replace(run, tf32="none", out=f"{pretraining.out}_plain")
    assert losses(run_pretraining(replace(run, **settings))) == pytest.approx(losses(run_pretraining(plain)), rel=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_give_the_same(precision):
    configure_kernels(PretrainConfig(tf32="none"))
    torch.manual_seed(0)
    plain = hyspark.build_hyspark(32, decoder_width=64, **SMALL).to("cuda", memory_format=torch.channels_last_3d)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    volumes = torch.rand(2, 1, 32, 32, 32, device="cuda")
    visible = torch.ones(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0] = visible[1, 0, :, 0] = False
    results = []
    for network in (compiled, plain):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(volumes, visible).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))])
    bound = 1e-3 if precision == "fp32" else 0.1
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= bound * max(float(other.abs().max()), 1e-3)
