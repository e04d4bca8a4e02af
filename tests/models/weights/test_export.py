import json

import pytest
import torch
from safetensors import safe_open

from hyspark import load_pretrained
from hyspark.models.weights.export import export_weights


def test_what_is_written_loads_and_computes_the_same(make_hyspark, make_hybird, tmp_path):
    net = make_hyspark()
    torch.save({"model": net.state_dict(), "config": {"mask": 0.75, "encoder_widths": [6, 12]}}, tmp_path / "run.pth")
    written = export_weights(tmp_path / "run.pth", tmp_path / "deep" / "e.safetensors", torch.float32)
    assert set(written) == set(net.encoder.state_dict())
    model = make_hybird()
    report = load_pretrained(model, tmp_path / "deep" / "e.safetensors")
    assert not report.unexpected
    volumes = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        *_, expected = net.encoder(volumes)
        *_, deepest = model.embeddings(volumes)
        assert torch.equal(model.mae(deepest), expected)
    with safe_open(tmp_path / "deep" / "e.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["mask"]) == 0.75
    assert json.loads(about["encoder_widths"]) == [6, 12]


def test_the_light_decoder_goes_along_where_asked_for(make_hyspark, make_hybird, tmp_path):
    net = make_hyspark()
    torch.save({"model": net.state_dict(), "config": {"decoder_width": 32}}, tmp_path / "run.pth")
    export_weights(tmp_path / "run.pth", tmp_path / "all.safetensors", decoder=True)
    model = make_hybird(1, 4, decoder="light", decoder_width=32)
    missing = load_pretrained(model, tmp_path / "all.safetensors").missing
    assert all(key.startswith(("decoder.levels.3.", "decoder.fuse.", "decoder.out.")) for key in missing)
    torch.testing.assert_close(model.decoder.levels[2].up.weight, net.decoder.levels[2].up.weight, rtol=1e-3, atol=1e-6)
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert "decoder.levels.3.up.weight" in file.keys()  # noqa: SIM118
    torch.save(net.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"no light decoder; none of its \d+ keys is decoder\.levels\.\*"):
        export_weights(tmp_path / "encoder.pth", tmp_path / "x.safetensors", decoder=True)


def test_the_decoder_of_a_network_for_segmentation_stays_behind(make_hybird, tmp_path):
    released = make_hybird()
    torch.save({"model": released.state_dict()}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match="no light decoder"):
        export_weights(tmp_path / "best.pth", tmp_path / "x.safetensors", decoder=True)
    written = export_weights(tmp_path / "best.pth", tmp_path / "x.safetensors")
    assert not any(key.startswith("decoder.") for key in written)


def test_settings_are_read_back_and_handed_on(make_hyspark, make_hybird, tmp_path):
    settings = {"num_heads": 2, "spacing": [4.0, 4.0, 3.0], "decoder_min_width": 16, "out": "private"}
    torch.save({"model": make_hyspark(num_heads=2).state_dict(), "config": settings}, tmp_path / "run.pth")
    export_weights(tmp_path / "run.pth", tmp_path / "a.safetensors")
    export_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    kept = {name: value for name, value in settings.items() if name != "out"}
    model = make_hybird(num_heads=2)
    for path in ("a.safetensors", "b.safetensors"):
        assert load_pretrained(model, tmp_path / path).made_with == kept | {"format": "pt"}
    assert load_pretrained(model, tmp_path / "run.pth").made_with == settings
    assert load_pretrained(model, make_hyspark().encoder.state_dict()).made_with == {}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_another_number_of_heads_is_refused(make_hyspark, make_hybird, tmp_path, ending):
    """Shapes do not show it, and the network would silently compute something else."""
    torch.save({"model": make_hyspark(num_heads=2).state_dict(), "config": {"num_heads": 2}}, tmp_path / "run.pth")
    export_weights(tmp_path / "run.pth", tmp_path / "run.safetensors")
    model = make_hybird(num_heads=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for net in (model, torch.nn.ModuleDict({"body": model})):
        with pytest.raises(ValueError, match=r"run\.\w+: expected 4 attention heads, as in the model, got 2.*_heads 2"):
            load_pretrained(net, tmp_path / f"run.{ending}")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_precision_halves_the_file_and_rounds(make_hyspark, make_hybird, tmp_path):
    net = make_hyspark()
    torch.save(net.encoder.state_dict(), tmp_path / "encoder.pth")
    export_weights(tmp_path / "encoder.pth", tmp_path / "full.safetensors", torch.float32)
    export_weights(tmp_path / "encoder.pth", tmp_path / "half.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    model = make_hybird()
    load_pretrained(model, tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for own, mine in zip(net.encoder.embeddings.parameters(), model.embeddings.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_handed_on_is_refused(make_hyspark, tmp_path):
    net = make_hyspark()
    torch.save(net.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="ends in \\.safetensors"):
        export_weights(tmp_path / "x.pth", tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError):
        export_weights(tmp_path / "y.pth", tmp_path / "x.safetensors")
    torch.save({"decoder.out.conv.weight": torch.ones(1)}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"no encoder; .* need no export \(a ResNet for detectron2: --detectron2; "):
        export_weights(tmp_path / "d.pth", tmp_path / "x.safetensors")
    torch.save({"embeddings.stem.bias": torch.tensor([1e6])}, tmp_path / "large.pth")
    with pytest.raises(ValueError, match="values exceed the range"):
        export_weights(tmp_path / "large.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
