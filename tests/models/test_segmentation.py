"""The segmentation network: shapes, gradients, and the encoder it shares with pre-training."""

import pytest
import torch
from torch import nn

from hyspark import build_hybird, load_pretrained
from hyspark.models.light_decoder import up_convolution

LIGHT = {"decoder": "light", "decoder_width": 32}
LAST = ("decoder.levels.3.", "decoder.fuse.", "decoder.out.")
both_decoders = pytest.mark.parametrize("decoder", [{}, LIGHT], ids=["released", "light"])


@both_decoders
@pytest.mark.parametrize(("in_channel", "n_classes"), [(1, 14), (2, 3), (1, 1)])
@pytest.mark.parametrize("size", [(32, 32, 32), (16, 48, 32), (16, 16, 16)])
def test_scores_have_the_size_of_the_volume(make_hybird, in_channel, n_classes, size, decoder):
    net = make_hybird(in_channel, n_classes, size, **decoder)
    scores = net(torch.rand(2, in_channel, *size))
    assert scores.shape == (2, n_classes, *size)
    assert scores.dtype == torch.float32


@both_decoders
def test_two_axes(make_hybird, decoder):
    assert make_hybird(1, 5, (48, 32), axes=2, **decoder)(torch.rand(2, 1, 48, 32)).shape == (2, 5, 48, 32)


@both_decoders
def test_every_parameter_gets_a_gradient(make_hybird, decoder):
    net = make_hybird(2, 5, **decoder)
    scores = net(torch.rand(2, 2, 32, 32, 32))
    (scores * torch.randn_like(scores)).sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert unused == []
    # A bias in front of an instance norm cannot have one; the released key names hold such biases.
    idle = {f"decoder.decoder{level}.fusion.conv{i}.bias" for level in range(1, 5) for i in range(1, 4)}
    still = [name for name, p in net.named_parameters() if not p.grad.any()]
    assert set(still) <= (set() if decoder else idle)


def test_the_same_volumes_give_the_same_scores_in_training_and_evaluation(make_hybird):
    net, volumes = make_hybird(), torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net.train()(volumes), net.eval()(volumes))


@both_decoders
def test_a_batch_equals_its_samples_one_by_one(make_hybird, decoder):
    net, volumes = make_hybird(**decoder).eval(), torch.rand(3, 1, 32, 48, 16)
    with torch.no_grad():
        together = net(volumes)
        alone = torch.cat([net(volumes[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4 * together.std().item())


@both_decoders
def test_the_encoder_is_that_of_pre_training(make_hybird, make_encoder, monkeypatch, decoder):
    """Same names and, with the same weights, the same maps going into the decoder."""
    net, encoder = make_hybird(**decoder), make_encoder(32)
    net.load_state_dict(encoder.state_dict(), strict=False)
    seen = {}
    monkeypatch.setattr(net, "decode", lambda maps: seen.update(maps=maps))
    volumes = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        net(volumes)
        expected = encoder(volumes)
    assert len(seen["maps"]) == 5
    assert all(torch.equal(x, y) for x, y in zip(seen["maps"], expected, strict=True))


def test_with_the_light_decoder_it_is_the_network_of_pre_training(make_hybird, make_hyspark):
    """All its weights are taken over but those of the last level and what stands for hidden patches; with nothing
    hidden both compute the same up to there.
    """
    pretraining, net = make_hyspark().eval(), make_hybird(1, 5, **LIGHT).eval()
    fresh = {key: value.clone() for key, value in net.state_dict().items() if key.startswith(LAST)}
    report = load_pretrained(net, pretraining.state_dict())
    assert not report.adapted
    assert set(report.missing) == set(fresh)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in fresh.items())
    tokens = {f"densify.{level}.mask_token" for level in range(4)}
    last = {key for key in pretraining.state_dict() if key.startswith("decoder.levels.3.")}
    assert set(report.unexpected) == {*tokens, *last, "decoder.out.weight", "decoder.out.bias"}
    assert report.unexpected["decoder.out.weight"] == "head of pre-training, the model has 5"
    seen = []
    for model in (pretraining, net):
        model.decoder.levels[2].register_forward_hook(lambda _module, _args, out: seen.append(out[1](out[0])))
    volumes = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        pretraining(volumes, torch.ones(2, 1, 2, 2, 2, dtype=torch.bool))
        net(volumes)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_light_decoder_is_taken_over_whole(make_hybird):
    tuned, net = make_hybird(1, 5, **LIGHT), make_hybird(1, 5, **LIGHT)
    report = load_pretrained(net, {f"module.{key}": value for key, value in tuned.state_dict().items()})
    assert not report.missing
    assert not report.unexpected
    assert all(torch.equal(value, tuned.state_dict()[key]) for key, value in net.state_dict().items())


def test_levels_that_are_too_narrow_for_classes_are_widened_and_start_fresh(make_hybird, make_hyspark):
    pretraining, net = make_hyspark(), make_hybird(1, 5, **LIGHT, decoder_min_width=8)
    assert [level.up.weight.shape[0] for level in net.decoder.levels] == [32, 16, 8, 8]
    assert net.decoder.fuse[0].weight.shape[0] == 8
    report = load_pretrained(net, pretraining.state_dict())
    assert {key[:17] for key in report.missing if ".levels." in key} == {"decoder.levels.2.", "decoder.levels.3."}
    torch.testing.assert_close(net.decoder.levels[1].up.weight, pretraining.decoder.levels[1].up.weight)
    assert net(torch.rand(1, 1, 32, 16, 32)).shape == (1, 5, 32, 16, 32)
    with pytest.raises(ValueError, match=r"decoder_min_width: expected at most decoder_width=32, .* got 64"):
        make_hybird(1, 5, **LIGHT, decoder_min_width=64)
    with pytest.raises(ValueError, match="--decoder_width 32 --decoder_min_width 8"):
        load_pretrained(make_hybird(1, 5, **LIGHT), net.state_dict())


def test_a_light_decoder_of_another_width_is_refused(make_hybird, make_hyspark):
    with pytest.raises(ValueError, match="--decoder_width 32"):
        load_pretrained(make_hybird(1, 5, decoder="light", decoder_width=16), make_hyspark().state_dict())


def test_every_skip_and_the_deepest_map_reach_the_scores(make_hybird, make_encoder):
    decoder, encoder = make_hybird().decoder, make_encoder(32)
    maps = [x.detach().requires_grad_() for x in encoder(torch.rand(1, 1, 32, 32, 32))]
    scores = decoder(maps)
    (scores * torch.randn_like(scores)).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in maps)


def test_each_level_doubles_and_halves(make_hybird):
    """Widths of the levels, deepest first; expansion 4, 4, 4, 2 of the skip's block."""
    decoder = make_hybird().decoder
    levels = [decoder.decoder4, decoder.decoder3, decoder.decoder2, decoder.decoder1]
    ups = [tuple(level.up_block.res_conv.weight.shape[:2]) for level in levels]
    assert ups == [(48, 24), (24, 12), (12, 12), (12, 6)]
    skips = [tuple(level.layer.conv2.weight.shape[:2]) for level in levels]
    assert skips == [(192, 48), (96, 24), (48, 12), (24, 12)]
    fusions = [tuple(level.fusion.conv1.weight.shape[:2]) for level in levels]
    assert fusions == [(24, 72), (12, 36), (12, 24), (6, 18)]
    assert isinstance(decoder.out.conv, nn.Conv3d)
    assert decoder.out.conv.weight.shape == (3, 6, 1, 1, 1)


def test_a_network_may_see_other_sizes_than_its_own(make_hybird):
    """Positions are those of the volume's grid, as in a network built for that size."""
    volumes = torch.rand(1, 1, 32, 48, 16)
    with torch.no_grad():
        torch.testing.assert_close(make_hybird(size=64)(volumes), make_hybird(size=(32, 48, 16))(volumes))


def test_sizes_that_do_not_fit_are_refused(make_hybird):
    with pytest.raises(ValueError, match=r"multiple of 16.*\(90, 90, 90\).*nearest that fits is \(96, 96, 96\)"):
        build_hybird(img_size=90)
    with pytest.raises(ValueError, match="multiple of 16"):
        make_hybird()(torch.rand(1, 1, 32, 32, 24))


def test_decoders_that_there_are_not_are_refused(make_hybird):
    with pytest.raises(ValueError, match='"released" or "light", got \'heavy\''):
        make_hybird(decoder="heavy")
    with pytest.raises(ValueError, match="decoder_width: expected a multiple of 16"):
        make_hybird(decoder="light", decoder_width=24)


def test_an_export_does_not_fix_the_batch():
    """By torch.export, on which torch.onnx.export builds: both ways to compute an up-convolution serve any batch."""

    class Up(torch.nn.Module):
        def forward(self, x, up, conv):
            return up_convolution(x, up, conv)

    weights = torch.randn(4, 4, 2, 2), torch.randn(2, 4, 3, 3)
    for size in (4, 16):  # 16 and 256 positions of a sample, with 4 channels
        example = (torch.randn(3, 4, size, size), *weights)
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)}, None, None)
        program = torch.export.export(Up(), example, dynamic_shapes=shapes).module()
        for batch in (1, 5, 64):
            x = torch.randn(batch, 4, size, size)
            torch.testing.assert_close(program(x, *weights), up_convolution(x, *weights), rtol=1e-4, atol=1e-4)


def test_an_export_does_not_fix_the_size():
    """Sizes on both sides of the choice between the two ways."""

    class Up(torch.nn.Module):
        def forward(self, x, up, conv):
            return up_convolution(x, up, conv)

    weights = torch.randn(4, 4, 2, 2), torch.randn(2, 4, 3, 3)
    sizes = {2 + i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate("xy")}
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), **sizes}, None, None)
    program = torch.export.export(Up(), (torch.randn(3, 4, 5, 6), *weights), dynamic_shapes=shapes).module()
    for shape in ((1, 4, 2, 3), (2, 4, 16, 12), (1, 4, 64, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x, *weights), up_convolution(x, *weights), rtol=1e-4, atol=1e-4)
