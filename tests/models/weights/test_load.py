"""Loading weights says what happened, loads from every kind of file, and refuses what it cannot explain."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyspark import build_hybird, build_hyspark, load_pretrained
from hyspark.models.vit import sincos_position

RELEASED = json.loads((Path(__file__).parents[2] / "fixtures" / "official_parity_96.json").read_text(encoding="utf-8"))


def noise_like(model, seed=7):
    """A state dict of the model's keys with other values; positions, being fixed, are kept."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value.clone() if key.endswith("pos_embed") else torch.randn(value.shape, generator=generator) * 0.1
        for key, value in model.state_dict().items()
    }


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def assert_loaded(model, weights, prefix=""):
    after = model.state_dict()
    assert all(torch.equal(after[prefix + key], value) for key, value in weights.items())


def training_checkpoint(weights):
    """What a checkpoint of pre-training holds beside the weights."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {"format": 1, "step": 7, "config": {"img_size": [32, 32, 32]}, "model": weights, "optimizer": optimizer}


@pytest.fixture
def weights(make_encoder):
    """An encoder's state dict, crop size 32."""
    return noise_like(make_encoder(32))


@pytest.fixture
def model(make_hybird):
    return make_hybird(1, 3, 32)


# --- kinds of sources


@pytest.fixture(params=["memory", "pth", "pt", "safetensors", "str"])
def source(request, weights, tmp_path):
    if request.param == "memory":
        return weights
    if request.param == "safetensors":
        save_file(weights, tmp_path / "encoder.safetensors")
        return tmp_path / "encoder.safetensors"
    path = tmp_path / f"encoder.{'pt' if request.param == 'pt' else 'pth'}"
    torch.save(weights, path)
    return str(path) if request.param == "str" else path


def test_an_encoder_into_a_segmentation_network(source, weights, model):
    fresh = {key: value for key, value in snapshot(model).items() if key.startswith("decoder.")}
    report = load_pretrained(model, source)
    assert_loaded(model, weights)
    assert_loaded(model, fresh)
    assert set(report.matched) == set(weights)
    assert set(report.missing) == set(fresh)
    assert report.adapted == {}
    assert report.unexpected == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "encoder."])
def test_prefixes_of_wrappers_are_taken_off(weights, model, prefix):
    report = load_pretrained(model, {prefix + key: value for key, value in weights.items()})
    assert_loaded(model, weights)
    assert set(report.matched) == set(weights)
    assert report.unexpected == {}


@pytest.mark.parametrize("nesting", [("state_dict",), ("model",), ("module",), ("model", "state_dict")])
def test_weights_may_lie_inside_a_checkpoint(weights, model, tmp_path, nesting):
    checkpoint = weights
    for key in reversed(nesting):
        checkpoint = {"epoch": 3, key: checkpoint}
    torch.save(checkpoint, tmp_path / "nested.pth")
    for source in (checkpoint, tmp_path / "nested.pth"):
        load_pretrained(model, source)
        assert_loaded(model, weights)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_whole_pre_training_checkpoint(make_hyspark, model, tmp_path, wrapper):
    pretraining = make_hyspark()
    weights = {key: torch.randn_like(value.float()) for key, value in pretraining.state_dict().items()}
    weights["encoder.mae.pos_embed"] = pretraining.encoder.mae.pos_embed
    torch.save(training_checkpoint({wrapper + k: v for k, v in weights.items()}), tmp_path / "all.pth")
    report = load_pretrained(model, tmp_path / "all.pth")
    own = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    assert_loaded(model, own)
    assert set(report.matched) == set(own)
    assert {key.removeprefix(wrapper) for key in report.unexpected} == {k for k in weights if k[:8] != "encoder."}
    assert set(report.unexpected.values()) == {
        "decoder of pre-training, not part of this model",
        "token of hidden patches, which this model does not have",
    }


def test_a_pre_training_network_continues_from_its_own_checkpoint(make_hyspark):
    weights = noise_like(make_hyspark())
    net = make_hyspark()
    report = load_pretrained(net, training_checkpoint(weights))
    assert report.missing == ()
    assert report.unexpected == {}
    assert report.coverage == 1
    assert all(
        torch.equal(value.float(), weights[key].float()) for key, value in net.state_dict().items() if "num_" not in key
    )


def test_an_encoder_into_a_pre_training_network(weights, make_hyspark):
    net = make_hyspark()
    report = load_pretrained(net, weights)
    assert_loaded(net, weights, prefix="encoder.")
    assert {key.split(".")[0] for key in report.missing} == {"densify", "decoder"}


def test_a_segmentation_network_into_an_encoder(make_hybird, make_encoder):
    encoder, weights = make_encoder(32), noise_like(make_hybird())
    report = load_pretrained(encoder, weights)
    assert_loaded(encoder, {key: value for key, value in weights.items() if not key.startswith("decoder.")})
    assert report.missing == ()
    assert report.coverage == 1
    assert set(report.unexpected) == {key for key in weights if key.startswith("decoder.")}
    assert set(report.unexpected.values()) == {"decoder of segmentation, not part of this model"}


# --- the released file


@pytest.fixture(scope="module")
def released():
    """A stand-in for the published encoder: its names and shapes."""
    weights = {key: torch.zeros(shape) for key, shape in RELEASED["encoder_state"].items()}
    return weights | {"mae.pos_embed": sincos_position((6, 6, 6), 384)}


def test_the_released_encoder_into_the_default_segmentation_network(released):
    model = build_hybird()
    num_encoder = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("decoder."))
    num_all = sum(p.numel() for p in model.parameters())
    report = load_pretrained(model, released)
    assert len(report.matched) == 121
    assert len(report.missing) == 98
    assert all(key.startswith("decoder.") for key in report.missing)
    assert report.unexpected == {"mae.mask_token": "stored by the release, never trained, not used"}
    assert report.adapted == {}
    assert report.coverage == pytest.approx(num_encoder / num_all)
    assert report.coverage == pytest.approx(11.79 / 24.09, abs=1e-3)


def test_the_released_encoder_into_the_default_pre_training_network(released):
    net = build_hyspark()
    report = load_pretrained(net, released)
    assert len(report.matched) == 121
    assert report.unexpected == {"mae.mask_token": "stored by the release, never trained, not used"}
    assert net.encoder.embeddings.stem.weight.abs().max() == 0


# --- what is adapted


@pytest.mark.parametrize(
    ("source_size", "size"), [(32, (32, 48, 16)), ((32, 48, 16), 64), ((16, 32, 48), (48, 32, 16))]
)
def test_positions_are_recomputed_for_another_crop_size(make_encoder, source_size, size):
    """The features are those of a network that was built at this size with the same weights."""
    model, twin, weights = make_encoder(size), make_encoder(size), noise_like(make_encoder(source_size))
    report = load_pretrained(model, weights)
    assert set(report.adapted) == {"mae.pos_embed"}
    assert "recomputed" in report.adapted["mae.pos_embed"]
    assert "mae.pos_embed" not in report.matched
    grid = tuple(s // 16 for s in model.img_size)
    assert torch.equal(model.mae.pos_embed, sincos_position(grid, 48))
    assert report.missing == ()
    assert report.coverage == 1
    twin.load_state_dict({key: value for key, value in weights.items() if "pos_embed" not in key}, strict=False)
    volumes = torch.rand(1, 1, *model.img_size)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(model(volumes), twin(volumes), strict=True))


def test_positions_may_be_absent(weights, model):
    del weights["mae.pos_embed"]
    report = load_pretrained(model, weights)
    assert "mae.pos_embed" in report.missing
    assert torch.equal(model.mae.pos_embed, sincos_position((2, 2, 2), 48))


@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 3), (3, 1), (2, 4)])
def test_the_stem_is_adapted_to_other_input_channels(make_encoder, make_hybird, old, new):
    """A volume repeated over the channels gives the same response."""
    encoder, model = make_encoder(32, in_channels=old), make_hybird(new)
    report = load_pretrained(model, encoder.state_dict())
    assert report.adapted == {"embeddings.stem.weight": f"{old} -> {new} input channels"}
    num_encoder = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("decoder."))
    assert report.coverage == pytest.approx(num_encoder / sum(p.numel() for p in model.parameters()))
    volumes = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        expected = encoder.embeddings.stem(volumes.expand(-1, old, -1, -1, -1))
        response = model.embeddings.stem(volumes.expand(-1, new, -1, -1, -1))
    torch.testing.assert_close(response, expected)


def test_a_head_for_other_classes_stays_fresh(make_hybird, model):
    before = snapshot(model)
    weights = noise_like(make_hybird(1, 5))
    report = load_pretrained(model, weights)
    head = {"decoder.out.conv.weight", "decoder.out.conv.bias"}
    assert set(report.missing) == set(report.unexpected) == head
    assert all("5 classes" in why and "3" in why for why in report.unexpected.values())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in head)
    assert_loaded(model, {key: value for key, value in weights.items() if key not in head})
    num_head = 3 * 6 + 3
    num_all = sum(p.numel() for p in model.parameters())
    assert report.coverage == pytest.approx((num_all - num_head) / num_all)


def test_a_head_for_the_same_classes_is_loaded(make_hybird, model):
    weights = noise_like(make_hybird())
    report = load_pretrained(model, weights)
    assert_loaded(model, weights)
    assert (report.missing, report.unexpected, report.coverage) == ((), {}, 1)


# --- the report


def test_the_report_reads_as_four_lines(weights, make_hybird):
    model = make_hybird(2, 3, 64)
    weights["mae.mask_token"] = torch.zeros(1, 1, 48)
    report = load_pretrained(model, weights)
    matched, adapted, missing, unexpected = str(report).splitlines()
    num_encoder = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("decoder."))
    share = num_encoder / sum(p.numel() for p in model.parameters())
    assert matched.split()[:2] == ["matched", "119"]
    assert f"{share:.1%}" in matched
    assert adapted.split()[:2] == ["adapted", "2"]
    assert "embeddings.stem.weight: 1 -> 2 input channels" in adapted
    assert "positions recomputed for 64 tokens" in adapted
    assert missing.split()[:2] == ["missing", "98"]
    assert "decoder.* 98" in missing
    assert unexpected.split()[:2] == ["unexpected", "1"]
    assert "mae.mask_token: stored by the release, never trained, not used" in unexpected


# --- what is refused


def damaged(weights, kind):
    """A state dict that must not be loaded, and what the message says of it."""
    first = "embeddings.layer1.0.conv2.weight"
    if kind == "nothing matches":
        return {f"backbone.{key}": value for key, value in weights.items()}, "backbone"
    if kind == "unexplained key":
        return weights | {"head.weight": torch.zeros(3)}, "head.weight"
    if kind == "part of the encoder missing":
        return {
            key: value for key, value in weights.items() if not key.startswith("embeddings.layer3")
        }, "24 keys of the encoder are missing"
    if kind == "one bias missing":
        return {key: value for key, value in weights.items() if key != "mae.norm.bias"}, "mae.norm.bias"
    if kind == "another shape":
        return weights | {first: torch.zeros(18, 6, 1, 1, 1)}, first
    if kind == "another kernel":
        return weights | {"embeddings.stem.weight": torch.zeros(6, 1, 5, 5, 5)}, "embeddings.stem.weight"
    if kind == "two networks":
        return weights | {f"encoder.{first}": weights[first]}, first
    if kind == "not tensors":
        return weights | {"epoch": 3}, "epoch"
    return {}, "no weights; expected a state dict"


KINDS = [
    "nothing matches",
    "unexplained key",
    "part of the encoder missing",
    "one bias missing",
    "another shape",
    "another kernel",
    "two networks",
    "not tensors",
    "empty",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_file", [False, True])
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(weights, model, tmp_path, kind, as_file):
    source, says = damaged(weights, kind)
    name = "the state dict"
    if as_file:
        name = str(tmp_path / "encoder.pth")
        torch.save(source, name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\w") as error:
        load_pretrained(model, name if as_file else source)
    assert says in str(error.value)
    assert name in str(error.value)
    assert_unchanged(model, before)


def test_weights_of_other_widths_are_refused_with_advice(make_encoder, model):
    weights = make_encoder(32, widths=(12, 12, 24, 24, 24)).state_dict()
    with pytest.raises(ValueError, match="build the model like the weights"):
        load_pretrained(model, weights)


def test_the_advice_names_the_shape_that_the_weights_show(model, make_hyspark):
    shape = {"widths": (4, 6, 6, 12, 24), "depths": (1, 2, 1, 1, 3), "expansions": (2, 3, 4, 2, 1), "vit_depth": 2}
    flags = "--encoder_widths 4 6 6 12 24 --encoder_depths 1 2 1 1 3 --expansions 2 3 4 2 1 --vit_depth 2"
    pretraining = make_hyspark(**shape)
    for source, more in ((pretraining.state_dict(), " --decoder_width 32"), (pretraining.encoder.state_dict(), "")):
        with pytest.raises(ValueError, match=f"like the weights: {flags}{more}$"):
            load_pretrained(model, source)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused_by_name(weights, model, tmp_path, suffix, share):
    path = tmp_path / f"encoder.{suffix}"
    if suffix == "pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"damaged|truncated") as error:
        load_pretrained(model, path)
    assert str(path) in str(error.value)
    assert_unchanged(model, before)


def test_an_empty_safetensors_file_is_refused_by_name(model, tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    with pytest.raises(ValueError, match="no weights; expected a state dict") as error:
        load_pretrained(model, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "weights", {"a": 1}, {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(model, tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"no weights|no state dict") as error:
        load_pretrained(model, tmp_path / "odd.pth")
    assert "odd.pth" in str(error.value)


def test_a_missing_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load_pretrained(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_pretrained(model, tmp_path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_not_opened(weights, model, tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "malicious.pth"
    torch.save({"model": weights, "extra": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Python objects other than tensors") as error:
        load_pretrained(model, path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    assert_unchanged(model, before)
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file would have done it
