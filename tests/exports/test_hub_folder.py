"""Folders for the Hub: the same network, a card that the Hub reads, nothing of the run beyond a list of settings."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from monai.networks.nets import SegResNet
from safetensors.torch import load_file
from torch import nn

import hyspark
from hyspark.cli import main, parsing
from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain, write_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.embedding.networks import NetworkChoice, load_embedding_network
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.exports.hub_folder import export_to_hub
from hyspark.exports.measured_scores import read_scores
from hyspark.exports.model_card import CardFacts
from hyspark.models.masked_autoencoder import build_hyspark
from hyspark.models.spark import build_spark
from hyspark.models.weights.files import made_with, read_contents
from hyspark.utils.atomic import write_json
from tests.models.conftest import randomise

ROOT = Path(__file__).parents[2]
SMALL = {
    "encoder_widths": (6, 6, 12, 12, 24),
    "encoder_depths": (1,) * 5,
    "expansions": (2,) * 5,
    "vit_depth": 1,
    "spacing": (4.0, 4.0, 5.0),
}
SECRET = "DOE_JANE"
NAMES = ["background", "liver", "left kidney", "right kidney"]
RUN = SegmentationConfig(
    **SMALL,
    crop_size=(32, 32, 16),
    decoder="light",
    decoder_width=32,
    decoder_min_width=8,
    infer_overlap=0.25,
    left_right=("left kidney=right kidney",),
    data=f"/data/{SECRET}",
    out=f"/runs/{SECRET}",
    weights=f"/weights/{SECRET}.pth",
    test_dir=f"/data/{SECRET}",
    json_list=f"{SECRET}.json",
    store_dir=f"/store/{SECRET}",
    subject_regex=f"({SECRET})",
)


def small_network():
    torch.manual_seed(0)
    return randomise(hybird_from_config(RUN, len(NAMES))).eval()


def write_run(folder: Path) -> None:
    """What a fine-tuning leaves: its best weights, a validation, and scores with names of cases."""
    folder.mkdir()
    contents = {
        "model": small_network().state_dict(),
        "config": as_plain(RUN),
        "classes": NAMES,
        "trained_on": [SECRET],
    }
    torch.save(contents, folder / "best.pth")
    lines = [
        {"step": 1, "dice_mean": 0.75, "dice": {"liver": 0.5, "left kidney": 1.0}},
        {"step": 2, "dice_mean": 0.5, "dice": {"liver": 0.5, "left kidney": 0.5}},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_json(folder / "scores/summary.json", {"protocol": {"num_cases": 16, "data": f"/data/{SECRET}"}})


def write_evaluation(folder: Path, weights: Path) -> None:
    organ = {"dice": 0.625, "hd95_mm": 12.0, "nsd": None, "num_cases": 3, "num_missed": 0, "num_absent": 0}
    organ["num_absent_predicted"] = 0
    protocol = {"weights": str(weights), "data": f"/data/{SECRET}", "num_cases": 3, "scored_cases_trained_on": 0}
    summary = {"protocol": protocol, "organs": {"liver": organ}, "mean": organ, "failed": {SECRET: "unreadable"}}
    write_json(folder / "summary.json", summary)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder, and the working folder it lies in."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    return Path("run")


def test_a_run_becomes_a_segmenter(run, tmp_path):
    export_to_hub(run, tmp_path / "net", CardFacts("net"))
    network = hyspark.Segmenter.from_pretrained(tmp_path / "net")
    crop = torch.randn(1, 1, 48, 32, 32)
    assert torch.equal(network(crop), small_network()(crop))
    assert network.classes == NAMES
    assert network.preprocessing["spacing"] == [4.0, 4.0, 5.0]
    assert network.preprocessing["intensity"] == ["ct"]
    assert network.img_size == (32, 32, 16)


def test_predictions_are_those_of_the_run(run, tmp_path):
    """Flips of left and right, windows and label maps, of a volume in another orientation and spacing."""
    export_to_hub(run, tmp_path / "net", CardFacts("net"))
    values = np.random.default_rng(0).normal(0, 200, (30, 40, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([-3.0, 5.0, 6.0, 1.0])), tmp_path / "scan.nii.gz")
    found = []
    for weights in ("run", "net", "run/best.pth"):
        made = hyspark.predict(weights, "scan.nii.gz", f"of_{Path(weights).stem}", flips=(0,), prepare_workers=1)
        assert not made.failures
        found.append(np.asarray(nib.load(made.files[0]).dataobj))
    assert len(np.unique(found[0])) > 1
    assert all(np.array_equal(one, found[0]) for one in found)


def test_the_card_has_the_scores_and_what_they_are_of(run, tmp_path):
    write_evaluation(tmp_path / "ev", run)
    words = "--license cc-by-4.0 --datasets me/cts --repo me/net --scores ev --about about.md"
    Path("about.md").write_text("# Title\n\n## Data\n\nSee [the paper](paper.md), [here](https://x.org).\n")
    main.main(["export", "--hf", *words.split(), "run", "net"])
    card = ModelCard.load(tmp_path / "net/README.md")
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("cc-by-4.0", "hyspark", ["me/cts"])
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.model_name == "net"
    found = [(one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results]
    assert found == [
        ("16 validation cases of the fine-tuning", "dice", 0.75),
        ("3 labelled cases", "dice", 0.625),
        ("3 labelled cases", "hd95_mm", 12.0),
    ]
    assert "These cases chose the weights" in card.text
    assert "The network was trained on none of them." in card.text
    assert "### Data\n\nSee the paper, [here](https://x.org)." in card.text
    assert "# Title" not in card.text
    assert 'from_pretrained("hf://me/net")' in card.text


def test_nothing_of_the_run_leaks(run, tmp_path):
    write_evaluation(tmp_path / "ev", run)
    assert SECRET.encode() in (tmp_path / "run/best.pth").read_bytes()
    export_to_hub(run, tmp_path / "net", CardFacts("net"), scores=[Path("ev")])
    files = sorted((tmp_path / "net").iterdir())
    assert [file.name for file in files] == ["README.md", "config.json", "model.safetensors"]
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
        assert str(tmp_path).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("kind", ["segmenter", pytest.param("encoder", marks=pytest.mark.slow)])
def test_the_example_of_the_card_works(run, tmp_path, kind):
    if kind == "encoder":
        export_to_hub(ROOT / "ckpt/hyspark_openkbp.safetensors", tmp_path / "net", CardFacts("net"), decoder=True)
    else:
        export_to_hub(run, tmp_path / "net", CardFacts("net"))
    text = (tmp_path / "net/README.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", text, flags=re.DOTALL)
    values: dict[str, object] = {}
    exec(code, values)
    assert len(values["features"]) == 5 if kind == "encoder" else values["scores"].shape == (1, 4, 32, 32, 16)
    ((verb, flags),) = re.findall(r"```sh\nhyspark (\w+) (.+?)\n```", text)
    if kind == "segmenter":
        assert (verb, flags) == ("predict", "net scans --out labels")
        return
    config = parsing.read_config(SegmentationConfig, f"hyspark {verb}", flags.split())
    assert (config.decoder, config.spacing, config.crop_shape) == ("light", (4.0, 4.0, 3.0), (48, 48, 48))
    report = hyspark.load_pretrained(hybird_from_config(config, 9), config.weights)
    assert report.coverage > 0.9


def test_the_weights_of_the_repository_load_as_from_their_file(tmp_path):
    source = ROOT / "ckpt/hyspark_openkbp.safetensors"
    export_to_hub(source, tmp_path / "net", CardFacts("net", license="apache-2.0"), decoder=True)
    same = load_file(source)
    written = load_file(tmp_path / "net/model.safetensors")
    assert written.keys() == same.keys()
    assert all(torch.equal(written[name], same[name]) for name in same)
    networks = []
    for path in (source, tmp_path / "net"):
        torch.manual_seed(0)
        shape = {"widths": (8, 16, 64, 128, 192), "decoder": "light", "decoder_width": 128}
        networks.append(hyspark.build_hybird(1, 9, 48, **shape))
        report = hyspark.load_pretrained(networks[-1], path)
        assert report.made_with["spacing"] == [4.0, 4.0, 3.0]
    ours, theirs = (network.state_dict() for network in networks)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    encoder = hyspark.Encoder.from_pretrained(tmp_path / "net")
    assert encoder.preprocessing == {
        "spacing": [4.0, 4.0, 3.0],
        "hu_min": -175.0,
        "hu_max": 250.0,
        "intensity": ["ct"],
        "image_channels": [0],
    }


def small_pretraining(model: str):
    """Settings and network of a pre-training."""
    if model == "hyspark":
        shape = {"widths": SMALL["encoder_widths"], "depths": (1,) * 5, "expansions": (2,) * 5, "vit_depth": 1}
        config = PretrainConfig(**SMALL, crop_size=(32,), decoder_width=16, mask_ratio=0.5, out=f"/{SECRET}")
        return config, randomise(build_hyspark(32, 0.5, **shape, decoder_width=16))
    options = {"slices": "axial", "in_channels": 3, "crop_size": (64,), "decoder_width": 32, "mask_ratio": 0.5}
    network = build_spark(timm.create_model("resnet10t", in_chans=3, num_classes=0), img_size=64, decoder_width=32)
    return PretrainConfig(**options, model=model, out=f"/{SECRET}"), randomise(network)


FILES = ("run", "{}_withdecoder_1kpretrained_hyspark_style.pth", "{}_1kpretrained_timm_style.pth")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hyspark", FILES[0]),
        ("spark/timm/resnet10t", FILES[0]),
        *(pytest.param("hyspark", name, marks=pytest.mark.slow) for name in FILES[1:]),
        *(pytest.param("spark/timm/resnet10t", name, marks=pytest.mark.slow) for name in FILES[1:]),
    ],
)
def test_a_pre_training_is_exported_from_any_of_its_files(tmp_path, model, name):
    folder = tmp_path / "run"
    config, network = small_pretraining(model)
    folder.mkdir()
    write_yaml(config, folder / "config.yaml")
    stem = re.sub(r"\W+", "_", model)
    contents = {"model": network.state_dict(), "config": as_plain(config), "optimizer": {}}
    torch.save(contents, folder / f"{stem}_withdecoder_1kpretrained_hyspark_style.pth")
    torch.save(network.encoder.weights(), folder / f"{stem}_1kpretrained_timm_style.pth")
    source = folder if name == "run" else folder / name.format(stem)
    export_to_hub(source, tmp_path / "net", CardFacts("net"))
    written, own = load_file(tmp_path / "net/model.safetensors"), network.encoder.weights()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[key], own[key]) for key in own)
    assert all(SECRET.encode() not in file.read_bytes() for file in (tmp_path / "net").iterdir())
    card = ModelCard.load(tmp_path / "net/README.md")
    assert (card.data.pipeline_tag, card.data.license) == ("image-feature-extraction", None)
    if model != "hyspark":
        code = re.findall(r"```python\n(.+?)```", card.text, flags=re.DOTALL)[0].replace('"net"', f'"{tmp_path}/net"')
        values: dict[str, object] = {}
        exec(code, values)
        assert torch.equal(values["network"].conv1[0].weight, own["conv1.0.weight"])


class Twice(nn.Module):
    """A network that holds its encoder under two names, as those of nnU-Net do."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Conv3d(2, 2, 3) for _ in range(5)))
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder


def test_tensors_under_two_names_are_written_once(tmp_path):
    network = Twice()
    torch.save(
        {
            "model": network.state_dict(),
            "config": {"model": f"spark/{SECRET}.nets:make", "in_channels": 2, "crop_size": [32], "spacing": [1, 1, 1]},
        },
        tmp_path / "own.pth",
    )
    export_to_hub(tmp_path / "own.pth", tmp_path / "net", CardFacts("net"))
    assert len(load_file(tmp_path / "net/model.safetensors")) == 10
    assert "--model PACKAGE.MODULE:FACTORY --in_channels 2" in (tmp_path / "net/README.md").read_text()
    assert all(SECRET.encode() not in file.read_bytes() for file in (tmp_path / "net").iterdir())
    other = Twice()
    report = hyspark.load_pretrained(other, tmp_path / "net")
    assert (len(report.matched), report.missing, report.unexpected) == (20, (), {})
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in other.state_dict().items())


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    def refusal(source, **options):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            export_to_hub(source, tmp_path / "net", options.pop("facts", CardFacts("net")), **options)
        return str(caught.value)

    assert "--license: expected an identifier of the Hub" in refusal(run, facts=CardFacts("net", license="My own"))
    assert "--repo: expected OWNER/NAME, got 'net'" in refusal(run, facts=CardFacts("net", repo="net"))
    assert "run: --decoder and --weights_key are of pre-trained weights" in refusal(run, decoder=True)
    torch.save(small_network().state_dict() | {"extra": torch.ones(1)}, "bare.pth")
    assert "bare.pth: its network is unknown, since the file names no encoder_widths" in refusal("bare.pth")
    torch.save({"fc.weight": torch.ones(2, 2)}, "other.pth")
    assert "other.pth: its network is unknown; give the run folder" in refusal("other.pth")
    contents = {"model": {}, "config": as_plain(ClassificationConfig()), "classes": ["a", "b"], "weights": "best"}
    torch.save(contents, "classifier.pth")
    assert "got a fine-tuned classifier" in refusal("classifier.pth")
    assert "nowhere.pth: no such file" in refusal("nowhere.pth")
    kbp = ROOT / "ckpt/hyspark_openkbp.safetensors"
    assert "--scores are of fine-tuned networks" in refusal(kbp, scores=[Path("ev")])
    assert not (tmp_path / "net").exists()
    export_to_hub(run, tmp_path / "net", CardFacts("net"))
    assert "README.md: exists, and may have been edited" in refusal(run)


def test_scores_of_another_network_are_refused(run, tmp_path):
    write_evaluation(tmp_path / "ev", Path("other/best.pth"))
    with pytest.raises(ValueError, match=r"ev: expected scores of run, got those of other/best\.pth"):
        read_scores([Path("ev")], run)
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        read_scores([Path("nowhere")], run)
    for same in (run, run / "best.pth", (tmp_path / "run").resolve()):
        write_evaluation(tmp_path / "ev", same)
        assert read_scores([Path("ev")], run)[0].mean == {"dice": 0.625, "hd95_mm": 12.0}


def test_the_command_says_what_it_wrote(run, capsys):
    main.main(["export", "--hf", "run", "net"])
    out = capsys.readouterr().out
    assert "net/model.safetensors: 183 tensors" in out
    assert "hf upload OWNER/NAME net" in out
    assert "states no licence" in out
    with pytest.raises(SystemExit):
        main.main(["export", "--license", "mit", "run", "net.safetensors"])
    assert "--license: not read without a flag of the form" in capsys.readouterr().err


def test_a_folder_without_preprocessing_predicts_nothing(tmp_path):
    network = hyspark.Segmenter(NAMES, crop_size=32, **{k: v for k, v in SMALL.items() if k != "spacing"})
    network.save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=r"config\.json: expected spacing, .* in preprocessing"):
        hyspark.predict(tmp_path / "net", "scan.nii.gz", tmp_path / "out")


def test_files_of_a_run_do_not_lie_in_the_folder(run, tmp_path):
    """They hold paths and names of cases, and `hf upload` would send them."""
    with pytest.raises(ValueError, match=r"run: expected a new or empty folder, got one with best\.pth, m"):
        export_to_hub(run, run, CardFacts("net"))
    assert not (run / "config.json").exists()


def test_nothing_is_left_of_a_folder_that_computes_something_else(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hyspark.Segmenter, "forward", lambda self, x: x.new_zeros(1, len(NAMES), *x.shape[2:]))
    with pytest.raises(RuntimeError, match="net: what is read from it differs from run; nothing is written"):
        export_to_hub(run, tmp_path / "net", CardFacts("net"))
    assert not list((tmp_path / "net").iterdir())


def test_the_order_of_a_network_s_axes_is_kept(tmp_path):
    """Without it, its kernels would be run on other axes, and nothing would say so."""
    torch.manual_seed(0)
    network = SegResNet(3, 16, 1)
    torch.save(network.state_dict(), tmp_path / "spark_monai_segresnet_1kpretrained_timm_style.pth")
    (tmp_path / "config.yaml").write_text(
        "model: spark/monai/segresnet\naxis_order: [2, 1, 0]\n"
        "crop_size: [32]\nin_channels: 1\nspacing: [3.0, 3.0, 5.0]\n"
    )
    export_to_hub(tmp_path / "spark_monai_segresnet_1kpretrained_timm_style.pth", tmp_path / "net", CardFacts("net"))
    assert made_with(read_contents(tmp_path / "net"))["axis_order"] == [2, 1, 0]
    found = load_embedding_network(NetworkChoice(tmp_path / "net"))
    crop = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        (*_, coarsest) = found.encoder(crop)
        expected = network.eval().encode(crop.permute(0, 1, 4, 3, 2))[0]
    torch.testing.assert_close(coarsest.permute(0, 1, 4, 3, 2), expected)
