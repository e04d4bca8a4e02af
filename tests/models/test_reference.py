"""Names, shapes and values are those of the released networks (tests/fixtures/README.md says how they were made)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hyspark import build_hybird, build_hyspark

CASE = json.loads((Path(__file__).parents[1] / "fixtures" / "official_parity_96.json").read_text(encoding="utf-8"))
SIZE = CASE["img_size"]
TOLERANCE = 1e-4  # of a map's standard deviation
SCORES_TOLERANCE = 2e-4 if torch.backends.cpu.get_cpu_capability() == "AVX2" else TOLERANCE
"""After the decoder's further layers: 1.4e-4 was seen with the order of summation that torch takes without AVX-512."""


def fill(module):
    """Give a network the weights of the case, in place."""
    state = module.state_dict()
    for name, tensor in state.items():
        if name == "mae.pos_embed":
            continue
        k = np.arange(1, tensor.numel() + 1, dtype=np.float64)
        s = np.sin(CASE["freq"] * k + zlib.crc32(name.encode()) % 1000)
        if tensor.ndim > 1:
            value = s * np.sqrt(2 / np.prod(tensor.shape[1:]))
        else:
            value = 1 + 0.1 * s if name.endswith("weight") else 0.02 * s
        state[name] = torch.from_numpy(value.astype(np.float32)).reshape(tensor.shape)
    module.load_state_dict(state)
    return module.eval()


def keys_and_shapes(module):
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def num_numbers(module):
    """Parameters, and the stored positions, which the paper's counts include."""
    return sum(p.numel() for p in module.parameters()) + module.state_dict()["mae.pos_embed"].numel()


@pytest.fixture(scope="module")
def volume():
    i = np.arange(SIZE**3, dtype=np.float64)
    value = 0.5 + 0.5 * np.sin(0.013 * i + 0.3) * np.cos(0.0007 * i)
    return torch.from_numpy(value.astype(np.float32)).reshape(1, 1, SIZE, SIZE, SIZE)


@pytest.fixture(scope="module")
def visible():
    flat = torch.zeros(1, (SIZE // 16) ** 3, dtype=torch.bool)
    flat[0, CASE["active_indices"]] = True
    assert flat.sum() == CASE["keep"]
    return flat.view(1, 1, *(SIZE // 16,) * 3)


@pytest.fixture(scope="module")
def encoder():
    return fill(build_hyspark(SIZE).encoder)


@pytest.fixture(scope="module")
def segmentation():
    return fill(build_hybird(1, CASE["n_classes"], SIZE))


@pytest.fixture(scope="module")
def masked_features(encoder, volume, visible):
    with torch.no_grad():
        return encoder(volume, visible)


@pytest.fixture(scope="module")
def logits(segmentation, volume):
    with torch.no_grad():
        return segmentation(volume)


def assert_agrees(tensor, expected, tolerance=TOLERANCE):
    assert list(tensor.shape) == expected["shape"]
    values = tensor.flatten()[torch.tensor(expected["pos"])].numpy()
    limit = tolerance * expected["std"]
    np.testing.assert_allclose(values, np.array(expected["val"]), rtol=0, atol=limit)
    assert tensor.double().mean().item() == pytest.approx(expected["mean"], abs=limit)
    assert tensor.double().std().item() == pytest.approx(expected["std"], rel=tolerance)


def test_encoder_has_the_released_keys_and_shapes(encoder):
    released = {key: shape for key, shape in CASE["encoder_state"].items() if key != "mae.mask_token"}
    assert len(released) == len(CASE["encoder_state"]) - 1
    assert keys_and_shapes(encoder) == released


def test_segmentation_network_has_the_released_keys_and_shapes(segmentation):
    assert keys_and_shapes(segmentation) == CASE["segmentation_state"]


def test_parameter_counts_are_those_of_the_paper(encoder, segmentation):
    assert num_numbers(encoder) / 1e6 == pytest.approx(11.87, abs=0.005)
    assert num_numbers(segmentation) / 1e6 == pytest.approx(24.17, abs=0.005)


@pytest.mark.parametrize("level", range(5))
def test_masked_features_have_the_released_values(masked_features, level):
    assert len(masked_features) == 5
    assert_agrees(masked_features[level], CASE["masked_features"][level])


def test_class_scores_have_the_released_values(logits):
    assert_agrees(logits, CASE["segmentation_logits"], SCORES_TOLERANCE)
