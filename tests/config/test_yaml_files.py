"""YAML recipes: a user's files in any state, and the package's by their names."""

from pathlib import Path

import pytest

from hyspark.config import yaml_files
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import SETTINGS_OF, as_plain, read_yaml, typed_values
from hyspark.config.segmentation import SegmentationConfig

ROOT = Path(__file__).parents[2]


def read(folder: Path, content: str | bytes) -> dict:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path, PretrainConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1e-3\nepochs: 3\nlr: 1e-4\n", "'lr' is set in line 1 and in line 3; keep one"),
        ("epochs: 3\n\n\nepochs: 3\n", "'epochs' is set in line 1 and in line 4"),
        ("lr: {a: 1,\n a: 2}\n", "'a' is set in line 1 and in line 2"),
        ("epochs: 3\n\tlr: 1e-4\n", "is not valid YAML in line 2"),
        ("epochs: 3\nlr: [1\n", "is not valid YAML in line 3"),
        ("epochs: @3\n", "is not valid YAML in line 1"),
        (b"epochs: 3\x00\n", "is not valid YAML: unacceptable character"),
        (b"exp_name: \xff\xfe\xfd\n", "is not valid YAML"),
        ("epochs: " + "9" * 5000, "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("lr: 1" + "0" * 400, "lr should be float"),
        ("epochs: !!python/object:os.system x\n", "is not valid YAML in line 1"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("[]", "expected lines of `name: value`, got list"),
        ("0", "expected lines of `name: value`, got int"),
        ("epochs: [3]", "epochs should be int"),
        ("epochs: {a: 3}", "epochs should be int"),
        ("epochs: 2026-01-01", "epochs should be int"),
        ("? [1, 2]\n: 3\n", "is not valid YAML"),
        ("1: 2", "unknown key 1"),
        ("crop_size: &a [*a]", "crop_size should be"),
        ("roi_x: 96", "unknown key 'roi_x'; did you mean crop_size"),
        (
            "queue_size: 8\nval_every: 2",
            "'val_every'; it is a setting of `hyspark finetune` and `hyspark finetune-classifier`",
        ),
        ("mask_ratio: 0.5\nbackground_weight: 2", "'background_weight'; it is a setting of `hyspark finetune`"),
    ],
)
def test_a_faulty_recipe_is_one_line_that_begins_with_the_file(tmp_path, content, message):
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "recipe.yaml"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfepochs: 3\n",
        "epochs: 3\r\n".encode("utf-16"),
        b"epochs: 3\r\n",
        "# Größe\nepochs: 3",
        "epochs: &n 3",
    ],
)
def test_a_recipe_of_any_editor_is_read(tmp_path, content):
    assert read(tmp_path, content) == {"epochs": 3}


def test_anchors_and_merges(tmp_path):
    assert read(tmp_path, "epochs: &n 3\nwarmup_epochs: *n\n") == {"epochs": 3, "warmup_epochs": 3}
    assert read(tmp_path, "<<: {epochs: 3, lr: 1}\nepochs: 4\n") == {"epochs": 4, "lr": 1.0}


def test_settings_of_another_verb_are_named_as_such():
    for verb, config_class in SETTINGS_OF.items():
        for other in SETTINGS_OF.values():
            if other is not config_class:
                with pytest.raises(ValueError, match=f"these are settings of `hyspark {verb}`"):
                    typed_values(as_plain(config_class()), other, "a file")


@pytest.mark.parametrize("name", ["finetune_btcv", "finetune_btcv.yaml", ROOT / "configs" / "finetune_btcv.yaml"])
def test_a_recipe_of_the_package_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_yaml(name, SegmentationConfig)["epochs"] > 0


@pytest.mark.parametrize(
    ("verb", "name"),
    [("pretrain", "demo"), ("finetune", "openkbp"), ("finetune", "demo.yaml"), ("finetune-classifier", "covidct")],
)
def test_a_recipe_without_the_word_of_its_verb(verb, name):
    whole = f"{verb.partition('-')[0]}_{name}"
    assert read_yaml(name, SETTINGS_OF[verb]) == read_yaml(whole, SETTINGS_OF[verb])


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pretrain").mkdir()
    assert "mask_ratio" in read_yaml("pretrain", PretrainConfig)
    Path("pretrain.yaml").write_text("epochs: 3\n")
    assert read_yaml("pretrain.yaml", PretrainConfig) == {"epochs": 3}


def test_a_missing_recipe_comes_with_advice_that_works(tmp_path, monkeypatch):
    """From a wheel, whose users have no folder configs/."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--config pretrain is the package's own"):
        read_yaml("configs/pretrain.yaml", PretrainConfig)
    assert read_yaml("pretrain", PretrainConfig)
    with pytest.raises(FileNotFoundError, match="did you mean finetune_btcv"):
        read_yaml("finetune_btvc", SegmentationConfig)
    with pytest.raises(FileNotFoundError, match="expected a YAML recipe, got a folder"):
        read_yaml(tmp_path, PretrainConfig)
    for name in ("", "pretrain/", "none/pretrain"):
        with pytest.raises(FileNotFoundError):
            read_yaml(name, PretrainConfig)


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("epochs: 3\n")
    monkeypatch.setattr(yaml_files, "FOLDERS", (tmp_path / "recipes", tmp_path / "configs"))
    assert read_yaml("mine", PretrainConfig) == {"epochs": 3}
