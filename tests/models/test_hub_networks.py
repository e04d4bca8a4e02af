"""Encoder and segmentation network for the Hub: a folder gives the same network back, bit for bit."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import hyspark
from tests.models.conftest import WIDTHS, randomise

SHAPE = {"encoder_widths": WIDTHS, "encoder_depths": [1] * 5, "vit_depth": 1}
PREPARED = {"spacing": (1.0, 2.0, 3.0), "intensity": ["mr"], "image_channels": [0, 1]}


def small_segmenter(decoder="released", **options):
    options = {"classes": ["background", "liver", "spleen"], "in_channels": 2, "crop_size": (32, 48, 16)} | options
    return randomise(hyspark.Segmenter(**SHAPE, decoder=decoder, decoder_width=32, **options)).eval()


@pytest.mark.parametrize("decoder", ["released", "light"])
def test_a_segmentation_network_comes_back_bit_for_bit(tmp_path, decoder):
    network = small_segmenter(decoder, preprocessing=PREPARED, prediction={"infer_overlap": np.float64(0.25)})
    network.save_pretrained(tmp_path)
    back = hyspark.Segmenter.from_pretrained(tmp_path)
    crop = torch.randn(2, 2, 32, 48, 32)
    assert torch.equal(back(crop), network(crop))
    assert torch.equal(copy.deepcopy(network)(crop), network(crop))
    assert not back.training
    assert back.classes == ["background", "liver", "spleen"]
    assert back.preprocessing == PREPARED | {"spacing": [1.0, 2.0, 3.0]}
    assert back.prediction == {"infer_overlap": 0.25}


@pytest.mark.parametrize("decoder", ["released", "light"])
def test_the_keys_are_the_released_ones(tmp_path, decoder):
    """The plain network takes the file of safetensors' own reader, and computes the same."""
    network = small_segmenter(decoder)
    network.save_pretrained(tmp_path)
    widths = {"widths": WIDTHS, "depths": [1] * 5, "vit_depth": 1}
    plain = hyspark.build_hybird(2, 3, (32, 48, 16), **widths, decoder=decoder, decoder_width=32).eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    crop = torch.randn(1, 2, 32, 48, 16)
    assert torch.equal(plain(crop), network(crop))
    assert {key.split(".")[0] for key in plain.state_dict()} <= {"embeddings", "mae", "decoder", "densify"}


@pytest.mark.parametrize(("axes", "size"), [(3, (32, 16, 48)), (2, (32, 48))])
def test_an_encoder_comes_back_bit_for_bit(tmp_path, axes, size):
    options = SHAPE | {"axes": axes, "preprocessing": PREPARED}
    network = randomise(hyspark.Encoder(2, size, **options)).eval()
    network.save_pretrained(tmp_path)
    back = hyspark.Encoder.from_pretrained(str(tmp_path))
    crop = torch.randn(1, 2, *size)
    assert all(torch.equal(one, other) for one, other in zip(back(crop), network(crop), strict=True))
    assert back.preprocessing["intensity"] == ["mr"]
    report = hyspark.load_pretrained(back, tmp_path)
    assert (report.missing, report.unexpected) == ((), {})
    assert report.made_with["spacing"] == [1.0, 2.0, 3.0]


def test_a_card_is_written_that_the_hub_reads(tmp_path):
    small_segmenter().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("hyspark", "image-segmentation")
    assert card.data.license is None
    assert 'hyspark.Segmenter.from_pretrained("OWNER/NAME")' in card.text


def test_arguments_may_be_changed(tmp_path):
    small_segmenter().save_pretrained(tmp_path)
    assert hyspark.Segmenter.from_pretrained(tmp_path, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 tensors differ or are missing"):
        hyspark.Segmenter.from_pretrained(tmp_path, classes=["a", "b"])
    with pytest.raises(TypeError, match="organs"):
        hyspark.Segmenter.from_pretrained(tmp_path, organs=["a", "b"])


def test_a_damaged_folder_is_refused(tmp_path):
    network = small_segmenter()
    network.save_pretrained(tmp_path)
    config, whole = tmp_path / "config.json", (tmp_path / "config.json").read_text()

    def refusal(kind=hyspark.Segmenter, error=ValueError):
        with pytest.raises(error) as caught:
            kind.from_pretrained(tmp_path)
        return str(caught.value)

    config.write_text(whole[:-10])
    assert f"{config}: damaged; expected JSON" in refusal()
    config.write_text("[1]")
    assert f"{config}: expected a JSON object of settings, got list" in refusal()
    config.write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "expected the settings of a hyspark.Segmenter, got those of a model of transformers (bert)" in refusal()
    config.write_text('{"architecture": "resnet50"}')
    assert "got those of a model of timm (resnet50)" in refusal()
    config.write_text(json.dumps(json.loads(whole) | {"encoder_widths": "wide"}))
    assert f"{config}: does not describe a hyspark.Segmenter" in refusal()
    config.write_text(json.dumps(json.loads(whole) | {"num_heads": 5}))
    assert f"{config}: does not describe a hyspark.Segmenter" in refusal()
    config.write_text(whole)
    assert "expected the settings of a hyspark.Encoder, got those of a hyspark.Segmenter" in refusal(hyspark.Encoder)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("decoder.out.conv.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    assert "1 tensors differ or are missing (decoder.out.conv.bias" in refusal()
    config.unlink()
    assert "holds no config.json" in refusal(error=FileNotFoundError)


def test_arguments_are_plain(tmp_path):
    with pytest.raises(TypeError, match=r"preprocessing: spacing: expected plain numbers, .* got Tensor"):
        small_segmenter(preprocessing={"spacing": torch.ones(3)})
    with pytest.raises(TypeError, match="classes: expected a list of names"):
        small_segmenter(classes=3)
    network = hyspark.Encoder(1, 32, **SHAPE | {"encoder_widths": np.array(WIDTHS), "num_heads": np.int64(12)})
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["encoder_widths"] == list(WIDTHS)


def test_import_waits_for_no_hub():
    code = "import sys, hyspark; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
