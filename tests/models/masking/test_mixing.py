"""Functions that mix positions are computed for visible positions, or refused, under `hidden` and `packed` alike."""

import pytest
import torch
import torch.nn.functional as F

from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.packed import packed

DOUBLE = torch.float64
KERNEL = torch.randn(4, 4, 3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def folded(x):
    """Groups of channels as samples."""
    return x.reshape(2 * len(x), 2, *x.shape[2:])


def pooled(x):
    return F.adaptive_avg_pool2d(x, 1)


def moved(x):
    """A map moved by one position through assignments."""
    out = torch.zeros_like(x)
    out[:, :, 1:] = x[:, :, :-1]
    return out


def coordinates(x, expand=False):
    values = torch.linspace(-1, 1, x.shape[3], dtype=DOUBLE)
    return values.expand(len(x), 1, *x.shape[2:]) if expand else values


EQUAL = {
    "raw_mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=1),
    "expanded": lambda x: F.conv2d(pooled(x).expand(-1, -1, *x.shape[2:]), KERNEL, padding=1),
    "expanded_single": lambda x: F.conv2d(pooled(x).expand(-1, -1, *F.max_pool2d(x, 8).shape[2:]), KERNEL, padding=1),
    "chunks": lambda x: x[:, :2] * F.batch_norm(pooled(x).chunk(2, 1)[0], None, None, training=True),
    "pooled_mean_of_samples": lambda x: x * pooled(x).mean(0),
    "pooled_sum": lambda x: x * pooled(x).sum(),
    "two_maps": lambda x: torch.max(x, F.max_pool2d(x, 3, 1, 1)),
    "axis": lambda x: x * x.mean(axis=(2, 3), keepdim=True),
    "strided": lambda x: (lambda y: y * y.mean((2, 3), keepdim=True))(F.max_pool2d(x, 2)[:, :, 1::2, ::2]),
    "repeated": lambda x: (lambda y: y * y.mean((2, 3), keepdim=True))(F.max_pool2d(x, 4).repeat_interleave(2, 2)),
    "instance_norm_of_one": lambda x: F.instance_norm(F.max_pool2d(x, 8)),
    "shuffle": lambda x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "product": lambda x: (KERNEL[:, :, 0, 0] @ x.flatten(2)).view(x.shape),
    "space_to_depth": lambda x: F.conv2d(
        x.view(len(x), 4, x.shape[2] // 2, 2, x.shape[3] // 2, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3),
        KERNEL.repeat(1, 4, 1, 1),
        padding=1,
    ),
    "padded_and_strided": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), KERNEL, stride=2),
}
REFUSED = {
    "folded": lambda x: F.conv2d(folded(x), KERNEL[:2, :2], padding=1).reshape(x.shape),
    "more_axes": lambda x: F.conv3d(x[:, None], torch.ones(1, 1, 1, 3, 3, dtype=DOUBLE), padding=(0, 1, 1)),
    "mean_of_samples": lambda x: x - x.mean(0),
    "groups_by_hand": lambda x: x.view(len(x), 2, -1).mean(-1),
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "prod": lambda x: x.prod(3),
    "quantile": lambda x: torch.quantile(x.flatten(2), 0.5, dim=-1),
    "unbiased": lambda x: x.std(True),
    "moved": moved,
    "narrow": lambda x: x.narrow(2, 1, 7),
    "index": lambda x: x[:, :, torch.arange(x.shape[2] - 1, -1, -1)],
    "cropped": lambda x: x[:, :, : x.shape[2] // 2],
    "tile": lambda x: x.repeat(1, 1, 2, 2),
    "transpose": lambda x: x.transpose(2, 3),
    "instance_norm": lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "padded_mean": lambda x: F.pad(x, (1, 1, 1, 1)).mean((2, 3)),
    "rows": lambda x: torch.ones(x.shape[2], x.shape[2], dtype=DOUBLE) @ x,
}
REFUSED_PACKED = {
    "coordinates": lambda x: x + coordinates(x),
    "coordinate_maps": lambda x: torch.cat([x, coordinates(x, expand=True)], 1),
    "pooled_softmax_of_samples": lambda x: pooled(x).softmax(0),
}


@pytest.fixture
def visible():
    """Masks of samples with different numbers of patches."""
    return torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool).view(2, 1, 3, 2)


@pytest.fixture
def images():
    return torch.randn(2, 4, 24, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", EQUAL)
def test_values_are_of_visible_positions(name, visible, images):
    def zeroed(x):
        return x.where(visible_at(visible, x.shape[2:]), 0)

    with hidden(visible):
        expected = EQUAL[name](images)
    with hidden(visible):
        other = EQUAL[name](images.where(visible_at(visible, (24, 16)), 7))
    context = packed(visible, 8)
    with context:
        out = context.unpack(EQUAL[name](context.pack(images)))
    torch.testing.assert_close(zeroed(other), zeroed(expected))
    torch.testing.assert_close(out, zeroed(expected))


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_are_refused(name, visible, images):
    context = packed(visible, 8)
    with hidden(visible), pytest.raises(NotImplementedError, match="mixes positions"):
        REFUSED[name](images)
    with context, pytest.raises(NotImplementedError, match="mixes positions"):
        REFUSED[name](context.pack(images))


@pytest.mark.parametrize("name", REFUSED_PACKED)
def test_values_by_position_or_along_samples_are_refused_for_patches(name, visible, images):
    context = packed(visible, 8)
    with context, pytest.raises(NotImplementedError, match="mixes positions"):
        REFUSED_PACKED[name](context.pack(images))


def test_padding_that_moves_the_patches_is_refused(visible, images):
    with packed(visible, 8) as context, pytest.raises(ValueError, match="expected padding that gives size / stride"):
        F.conv2d(F.pad(context.pack(images), (4, 4, 4, 4)), KERNEL[:, :, :1, :1])


def test_batch_norm_of_one_position_is_refused():
    """The variance of one value is unknown; running statistics stay finite."""
    visible, images = torch.tensor([[[[True, False]]]]), torch.ones(1, 2, 1, 2)
    with hidden(visible), pytest.raises(ValueError, match="more than one visible position"):
        torch.nn.BatchNorm2d(2)(images)


def test_a_pad_before_the_first_convolution_is_no_resolution(visible, images):
    """The size with a border is not that of a map, even where the grid divides it."""
    net = torch.nn.Sequential(torch.nn.ZeroPad2d(1), torch.nn.Conv2d(4, 4, 3), torch.nn.MaxPool2d(2)).double()
    grid = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    with hidden(grid):
        out = net(images)
    torch.testing.assert_close(out, net(images))


def test_channel_attention_in_one_dimension():
    """A vector of channels has the shape of a 1D map, here with as many channels as positions."""
    visible = torch.tensor([[[True, False]], [[False, True]]])
    images, kernel = torch.randn(2, 4, 8, dtype=DOUBLE), torch.nn.Parameter(torch.ones(1, 1, 3, dtype=DOUBLE))

    def attend(x):
        return x * F.conv1d(x.mean(2).unsqueeze(1), kernel, padding=1).view(len(x), 4, 1)

    with hidden(visible):
        expected = attend(images).where(visible_at(visible, (8,)), 0)
    kept = torch.stack([images[0, :, :4], images[1, :, 4:]])
    with packed(visible, 4) as context:
        out = context.unpack(attend(context.pack(images)))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.stack([out[0, :, :4], out[1, :, 4:]]), attend(kept))
