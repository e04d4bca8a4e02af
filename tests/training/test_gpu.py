"""The same contracts of networks on CUDA: packed against masked, windows, whole predictions, memory."""

import nibabel
import numpy as np
import pytest
import torch

import hyspark
from hyspark.config.recipes import as_plain
from hyspark.data.synthetic.phantom import write_phantoms
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.evaluation.segmentation.predict import predict_segmentation
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.training import checkpoint
from tests.evaluation.segmentation.whole import whole_scores

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WIDTHS = (6, 6, 12, 12, 24)


@pytest.fixture
def full_precision(monkeypatch):
    """Convolutions without TF32; matrix products are, unless something asks for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def varied(network):
    """The network with weights away from those it starts with, so that class scores differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def test_windows_go_through_the_gpu_and_scores_lie_in_main_memory(full_precision):
    model = varied(hyspark.build_hybird(1, 3, 32, widths=WIDTHS)).eval()
    image = torch.rand(40, 33, 32, generator=torch.Generator().manual_seed(0))
    windows = Windows((32, 32, 32), per_pass=2, flips=(0, 1), swaps=((1, 2),))
    wanted = whole_scores(model, image, windows, torch.device("cpu"))
    scores = whole_scores(model.to(DEVICE), image, windows, torch.device(DEVICE))
    assert scores.device.type == "cpu"
    assert (scores - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert (scores.argmax(0) == wanted.argmax(0)).float().mean() > 0.999


def test_predicted_label_maps_are_those_of_the_cpu(finetuning, tmp_path, full_precision):
    """From a file of weights and volumes on the disk to label maps on their grids."""
    network = varied(hybird_from_config(finetuning, 3))
    names = ["background", "liver", "aorta"]
    contents = {"model": network.state_dict(), "config": as_plain(finetuning), "classes": names}
    checkpoint.save(contents, tmp_path / "best.pth")
    write_phantoms(tmp_path, num_labelled=0, num_unlabelled=2, spacings=((6.0, 6.0, 6.0),), progress=False)
    volumes = sorted(tmp_path.rglob("*.nii.gz"))
    assert volumes
    outs = (tmp_path / "one", tmp_path / "two")
    for device, out in zip(("cpu", DEVICE), outs, strict=True):
        assert predict_segmentation(tmp_path / "best.pth", volumes, out, device=device, num_workers=1).failures == {}
    for path in outs[0].iterdir():
        one, two = (np.asarray(nibabel.load(out / path.name).dataobj) for out in outs)
        assert len(np.unique(one)) > 1
        assert (one == two).mean() > 0.999


def test_memory_for_class_scores_does_not_grow_with_the_volume():
    model = hyspark.build_hybird(1, 14, 32, widths=WIDTHS).eval().to(DEVICE)
    windows = Windows((32, 32, 32))

    def peak(*size):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        whole_scores(model, torch.rand(size), windows, torch.device(DEVICE))
        return torch.cuda.max_memory_allocated() - before

    peak(64, 64, 64)  # the first passes choose kernels, which want working memory
    small, large = peak(64, 64, 64), peak(64, 64, 512)
    assert large <= 1.1 * small


def test_hidden_voxels_never_change_features_under_autocast():
    net = hyspark.build_hyspark(32, widths=WIDTHS, decoder_width=16).to(DEVICE)
    volumes = torch.rand(2, 1, 32, 32, 32, device=DEVICE)
    visible = net.draw_visible(2, (32, 32, 32)).to(DEVICE)
    seen = visible.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    other = torch.where(seen, volumes, torch.rand_like(volumes))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for a, b in zip(net.encoder(volumes, visible), net.encoder(other, visible), strict=True):
            assert torch.equal(a, b)


def loss_and_gradients(compute, hide, precision):
    """Of samples that keep different numbers of patches: the loss, and the gradients of all parameters by name."""
    torch.manual_seed(0)
    net = varied(hyspark.build_hyspark(32, compute=compute, hide=hide, widths=WIDTHS, decoder_width=16))
    net = net.to(DEVICE, memory_format=torch.channels_last_3d)
    volumes = torch.rand(2, 1, 32, 32, 32).to(DEVICE)
    visible = torch.ones(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0] = visible[1, 0, :, 0, 1] = visible[1, 0, 1] = False
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        loss = net(volumes, visible).loss
    names, parameters = zip(*net.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("hide", ["everywhere", "convolutions"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_equals_masked(full_precision, hide, precision):
    """In bf16 roundings differ, and a gradient that is a small difference of large numbers is lost in them: there the
    gradient is compared as a whole.
    """
    (loss, gradients), (other, others) = (loss_and_gradients(c, hide, precision) for c in ("masked", "packed"))
    assert other.item() == pytest.approx(loss.item(), rel=1e-5 if precision == "fp32" else 1e-2)
    if precision == "fp32":
        for name, one in gradients.items():
            assert (one - others[name]).abs().max() <= 1e-4 * max(one.abs().max().item(), 1e-3), name
    apart = torch.stack([(one - others[name]).norm() for name, one in gradients.items()]).norm()
    whole = torch.stack([one.norm() for one in gradients.values()]).norm()
    assert apart <= (1e-4 if precision == "fp32" else 0.05) * whole


def test_the_convolutional_part_compiles():
    net = hyspark.build_hyspark(32, widths=WIDTHS, decoder_width=16).encoder.to(DEVICE)
    volumes = torch.rand(2, 1, 32, 32, 32, device=DEVICE)
    patches = net.patches(volumes, torch.ones(2, 1, 2, 2, 2, dtype=torch.bool))
    packed = patches.pack(volumes)
    compiled = torch.compile(net.embeddings, fullgraph=True)
    for one, other in zip(compiled(packed, patches), net.embeddings(packed, patches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_packed_needs_less_memory_than_masked():
    peaks = []
    for compute in ("packed", "masked"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        net = hyspark.build_hyspark(96, compute=compute, widths=(12, 24, 24, 24, 24), decoder_width=16).to(DEVICE)
        net(torch.rand(2, 1, 96, 96, 96, device=DEVICE)).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del net
    assert peaks[0] < peaks[1]
