"""Forward passes of all tasks on fake CUDA tensors: errors of device and type show without a GPU.

Each test calls the task's own `loss`, on a run as training makes it. Not covered, since fake tensors have no numbers:
the backward pass, the norm of the gradient, what `validate` reads from a loss, and samples that keep different numbers
of patches, whose tokens are taken by a boolean index.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from hyspark.data.batches.loader import Shard
from hyspark.evaluation.segmentation import windows as sliding
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.models import encoder
from hyspark.tasks.classification import ClassificationTask
from hyspark.tasks.classification import initialise_classifier as build_classification
from hyspark.tasks.classification import make_optimizer as classification_optimizer
from hyspark.tasks.pretrain import initialise_pretraining as build_pretraining
from hyspark.tasks.pretrain import task_class
from hyspark.tasks.segmentation import initialise_segmentation as build_finetuning
from hyspark.tasks.segmentation_task import SegmentationTask
from hyspark.training import optim
from hyspark.training.distributed import Processes
from hyspark.training.losses import DiceAndCrossEntropy
from hyspark.training.precision import autocast
from hyspark.training.run import make_run
from hyspark.training.run_volumes import RunVolumes
from tests.evaluation.segmentation.whole import whole_scores
from tests.tasks.kinds import PRETRAININGS
from tests.training.fake_cuda import DEVICE, check_fake, fake_cuda

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="torch before 2.14 asks for a driver where fake tensors are put on CUDA"
)

PROCESSES = Processes(DEVICE)
PRECISIONS = ("fp32", "bf16")


@pytest.fixture(autouse=True)
def _fake_cuda():
    with fake_cuda():
        yield


def begin(config, network, **options):
    """A run as training makes it."""
    run = make_run(config, "", PROCESSES, network, 1, None, **options)
    run.model.train()
    return run


def check_run(run, task, batch):
    """The loss in training, and a step of the optimizer."""
    task.before_step(run, 0)
    for precision in PRECISIONS:
        with autocast(run.processes, precision):
            check_fake(task.loss(run, batch))
    before = {p: p.dtype for p in run.model.parameters()}
    for parameter in run.model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optim.set_lr_and_decay(run.optimizer, **task.schedule(run, 0))
    run.optimizer.step()
    states = [x for state in run.optimizer.state.values() for x in state.values()]
    assert states
    assert all(isinstance(x, FakeTensor) and x.device == DEVICE for x in states)
    assert all(p.device == DEVICE and p.dtype == dtype for p, dtype in before.items())


@pytest.mark.parametrize("kind", PRETRAININGS)
def test_pretraining(pretraining, kind):
    config = replace(pretraining, **PRETRAININGS[kind], device="cuda")
    task = task_class(config)(config, Shard(config.batch_size), [], [])
    run = begin(config, build_pretraining(config))
    batch = task.random_batch(2)
    check_run(run, task, batch)
    run.model.eval()
    with torch.no_grad(), autocast(PROCESSES, "bf16"):  # as validation does
        check_fake(run.network(*task.inputs(run, batch)).loss)


def test_pooling_where_kernels_have_to_be_deterministic(pretraining, monkeypatch):
    """Not by max_pool3d, of which torch 2.11 has no such backward pass on CUDA."""
    monkeypatch.setattr(encoder, "MAX_POOL", {})
    config = replace(pretraining, device="cuda")
    task = task_class(config)(config, Shard(config.batch_size), [], [])
    run = begin(config, build_pretraining(config))
    torch.use_deterministic_algorithms(True)
    try:
        check_fake(task.loss(run, task.random_batch(2)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("decoder", "has_ignored"), [("released", False), ("light", False), ("light", True)])
def test_segmentation(finetuning, decoder, has_ignored):
    config = replace(finetuning, decoder=decoder, decoder_width=16 if decoder == "light" else 768)
    names = ["background", "liver", "spleen"]
    criterion = DiceAndCrossEntropy(len(names), 0.2, has_ignored=has_ignored).to(DEVICE)
    task = SegmentationTask(config, Shard(2), RunVolumes([], [], [], [], []), names, criterion, -1.0, [])
    run = begin(config, build_finetuning(config, len(names)))
    labels = torch.randint(3, (2, 1, 32, 32, 32))
    batch = {"image": torch.rand(2, 1, 32, 32, 32), "label": labels, "weight_sum": float(criterion.weight_sum(labels))}
    check_run(run, task, batch)


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_classification(classifying, mixed):
    config = replace(classifying, **mixed, label_smoothing=0.1)
    run = begin(config, build_classification(config, 2), make_optimizer=lambda m: classification_optimizer(config, m))
    images = type("Images", (), {"classes": ("dark", "light")})
    task = ClassificationTask(config, Shard(4), images, -1.0, 0, None)
    batch = {"image": torch.rand(4, 1, 32, 32), "label": torch.tensor([0, 1, 1, 0])}
    check_run(run, task, batch)


def test_windows(finetuning, monkeypatch):
    """Windows go to the device and their scores come back. MONAI reads a number of the weights in a window, so that
    these are worked out on the CPU first.
    """
    weights = sliding.compute_importance_map

    def real(*args, device, **kwargs):
        return weights(*args, device="cpu", **kwargs).to(device)

    monkeypatch.setattr(sliding, "check_scores", lambda scores: None)
    monkeypatch.setattr(sliding, "compute_importance_map", real)
    network = build_finetuning(finetuning, 3).to(DEVICE).eval()
    windows = Windows((32, 32, 32), per_pass=2, flips=(0, 1), swaps=((1, 2),))
    with autocast(PROCESSES, "bf16"):
        scores = whole_scores(network, torch.rand(40, 33, 30), windows, DEVICE)
    assert (scores.device.type, scores.dtype, tuple(scores.shape)) == ("cpu", torch.float32, (3, 40, 33, 30))
