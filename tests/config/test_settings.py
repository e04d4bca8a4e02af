"""Settings: every recipe loads, every field is read, and what does not fit is refused with a usable message."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hyspark
from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain, differences, field_help, read_yaml, write_yaml
from hyspark.config.segmentation import SegmentationConfig, network_options
from hyspark.config.shared import encoder_options
from hyspark.utils.settings import GROUPS, field_info
from hyspark.utils.text import nearest

PACKAGE = Path(hyspark.__file__).parent
RECIPES = sorted((PACKAGE.parent / "configs").rglob("*.yaml"))
VOLUMES = {"pretrain": PretrainConfig, "finetune": SegmentationConfig}
CLASSES = VOLUMES | {"finetune-classifier": ClassificationConfig}
CLASSIFYING = (
    "tasks/classification.py",
    "tasks/classification_task.py",
    "evaluation/classification/predict.py",
    "training/labelled_images.py",
)
PRETRAINING = (
    "tasks/pretrain.py",
    "tasks/masked_task.py",
    "tasks/contrastive_task.py",
    "tasks/pretrain_common.py",
    "planning/plan.py",
)
SEGMENTING = ("tasks/segmentation.py", "tasks/segmentation_task.py", "evaluation/segmentation/evaluate.py")
OTHER_TASKS = {
    PretrainConfig: (*SEGMENTING, "training/optim.py", *CLASSIFYING),
    SegmentationConfig: (*PRETRAINING, *CLASSIFYING),
    ClassificationConfig: (
        *(*PRETRAINING, *SEGMENTING, "evaluation/segmentation/inference.py"),
        *("training/labelled_cases.py", "training/run_volumes.py"),
    ),
}
CONFIG_NAMES = ("config", "settings")

every = pytest.mark.parametrize("config_class", CLASSES.values(), ids=CLASSES)
both = pytest.mark.parametrize("config_class", VOLUMES.values(), ids=VOLUMES)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def names_of(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def is_config(node: ast.expr, names: tuple[str, ...]) -> bool:
    return (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names)


def attributes_read(tree: ast.AST, names: tuple[str, ...]) -> set[str]:
    """X of every `config.X` and `something.config.X`, and of `c.X` after `c = something.config`."""
    assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and is_config(n.value, names)]
    names += tuple(target.id for n in assigned for target in n.targets if isinstance(target, ast.Name))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_config(node.value, names)}


def properties_of(config_class: type) -> list[ast.FunctionDef]:
    (tree,) = (
        n
        for n in ast.parse(inspect.getsource(inspect.getmodule(config_class))).body
        if getattr(n, "name", "") == config_class.__name__
    )
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list]


def names_called(tree: ast.AST) -> set[str]:
    """Functions that are called by their bare names."""
    return {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


# Recipes and fields


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path):
    is_classification = "finetune-classifier --config" in path.read_text()
    config_class = ClassificationConfig if is_classification else VOLUMES[path.stem.split("_")[0]]
    values = read_yaml(path, config_class)
    assert values
    config_class(**values)
    assert path.read_text().startswith("#")  # the header says command, hardware, time and expected result


def test_there_are_recipes():
    assert RECIPES


@every
def test_every_field_is_read(config_class):
    """A field that nothing outside validation reads would be accepted and ignored."""
    read: set[str] = set()
    called: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(("config/", "cli/")) and name not in OTHER_TASKS[config_class]:
            tree = ast.parse(path.read_text())
            read |= attributes_read(tree, CONFIG_NAMES)
            called |= names_called(tree)
    for function in (network_options, encoder_options):  # the first calls the second
        if function.__name__ in called:
            tree = ast.parse(inspect.getsource(function))
            read |= attributes_read(tree, CONFIG_NAMES)
            called |= names_called(tree)
    for _ in range(2):  # properties that others read
        for function in properties_of(config_class):
            if function.name in read:
                read |= attributes_read(function, ("self",))
    assert names_of(config_class) - read == set()


@every
def test_every_field_has_a_help_text(config_class):
    texts = field_help(config_class)
    assert set(texts) == names_of(config_class)
    assert [name for name, text in texts.items() if len(text.strip()) < 10] == []


@every
def test_defaults_are_valid_frozen_and_plain(config_class):
    config = config_class()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    for value in as_plain(config).values():
        assert isinstance(value, bool | int | float | str | list)


@every
def test_every_field_says_what_is_known_of_it(config_class):
    infos = field_info(config_class)
    assert set(infos) == names_of(config_class)
    assert {info.group for info in infos.values()} == set(GROUPS)
    assert sum(info.first for info in infos.values()) == 9
    old = [spelling for info in infos.values() for spelling in (*info.old, *info.old_axes)]
    assert len(set(old)) == len(old)
    assert not set(old) & names_of(config_class)


def test_published_defaults():
    config = PretrainConfig()
    assert (config.mask_ratio, config.lr, config.epochs, config.warmup_epochs) == (0.75, 1e-4, 100, 40)
    assert (config.weight_decay, config.weight_decay_end, config.clip, config.precision) == (0.04, 0.2, 5, "fp32")
    assert config.crop_shape == (96, 96, 96)
    assert (config.spacing, config.hu_min, config.hu_max) == ((1.5, 1.5, 1.5), -175, 250)
    assert (config.flip_prob, config.crops_per_volume) == ((0.2, 0.2, 0.1), 4)
    fine = SegmentationConfig()
    study = ClassificationConfig()
    assert (study.optimizer, study.lr, study.weight_decay, study.batch_size) == ("adam", 1e-4, 5e-4, 64)
    assert (study.epochs, study.freeze_epochs, study.lrschedule) == (70, 10, "constant")
    assert (fine.lr, fine.weight_decay, fine.warmup_epochs, fine.infer_overlap) == (1e-4, 1e-5, 50, 0.5)
    assert fine.crop_shape == (96, 96, 96)


def test_properties():
    assert PretrainConfig(crop_size=(32,)).crop_shape == (32, 32, 32)
    assert PretrainConfig(crop_size=(32, 48, 64)).crop_shape == (32, 48, 64)
    assert SegmentationConfig(crop_size=(32, 32, 48)).crop_shape == (32, 32, 48)
    assert PretrainConfig(exp_name="a").run_folder == Path("ckpt/a")
    assert PretrainConfig(exp_name="a", out="b/c").run_folder == Path("b/c")
    assert SegmentationConfig(out="d").run_folder == Path("d")


# YAML


def test_values_come_in_the_type_of_their_field(tmp_path):
    text = "base_lr: 1e-4\nwd: 1\nclip: '2.5'\nspacing: [1, 2, 3]\ninput_size: 48\nep: 7\ndry_run: true\nmodel: hyspark"
    values = read_yaml(recipe(tmp_path, text), PretrainConfig)
    expected = {
        "lr": 1e-4,
        "weight_decay": 1.0,
        "clip": 2.5,
        "spacing": (1.0, 2.0, 3.0),
        "crop_size": (48,),
        "epochs": 7,
    }
    assert values == {**expected, "dry_run": True, "model": "hyspark"}
    assert [type(values[name]) for name in ("lr", "weight_decay", "clip", "epochs")] == [float, float, float, int]
    assert {type(x) for x in values["spacing"]} == {float}


def test_empty_recipe_is_no_change(tmp_path):
    assert read_yaml(recipe(tmp_path, "# nothing\n"), PretrainConfig) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base_lrr: 1", "unknown key 'base_lrr'; did you mean lr\\?"),
        ("max_epoch: 1", "unknown key 'max_epoch'"),
        ("ep: ten", "ep should be int, but it is 'ten'"),
        ("ep: 1.5", "ep should be int, but it is 1.5"),
        ("ep: true", "ep should be int, but it is True"),
        ("ep:", "ep should be int, but it is None"),
        ("base_lr: fast", "base_lr should be float, but it is 'fast'"),
        ("base_lr: true", "base_lr should be float, but it is True"),
        ("base_lr: [1]", "base_lr should be float"),
        ("dry_run: 1", "dry_run should be bool, but it is 1"),
        ("exp_name: 5", "exp_name should be str, but it is 5"),
        ("spacing: [1, 2]", r"spacing should be tuple\[float, float, float\], but it is \[1, 2\]"),
        ("spacing: 1.5", "spacing should be"),
        ("input_size: [a]", r"input_size should be tuple\[int, ...\], but it is \['a'\]"),
        ("- ep", "expected lines of `name: value`, got list"),
        ("slices: axia", "slices must be one of none, sagittal, coronal, axial, not 'axia'; did you mean axial"),
        ("slices: off", "slices must be one of none, .*, not False; in YAML, quote yes, no, on and off"),
        ("just words", "expected lines of `name: value`, got str"),
        ("ep: [1", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(recipe(tmp_path, line), PretrainConfig)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_yaml(tmp_path / "none.yaml", PretrainConfig)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        read_yaml(tmp_path, PretrainConfig)


@both
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_written_reads_back(tmp_path_factory, config_class, data):
    small = st.floats(1e-12, 1e12)
    config = config_class(
        seed=data.draw(st.integers(0, 2**62)),
        spacing=tuple(data.draw(small) for _ in range(3)),
        hu_min=data.draw(st.floats(-1e9, 0)),
        hu_max=data.draw(small),
        store_dir=data.draw(st.text(st.characters(exclude_characters="\0"))),
        encoder_widths=tuple(data.draw(st.integers(1, 99)) for _ in range(4)) + (12,),
        precision=data.draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        clip=data.draw(st.sampled_from([0.0, 1e-5, 5.0])),
        dry_run=data.draw(st.booleans()),
    )
    path = tmp_path_factory.getbasetemp() / "new" / f"{config_class.__name__}.yaml"
    write_yaml(config, path)
    assert config_class(**read_yaml(path, config_class)) == config
    assert differences(yaml.safe_load(path.read_text()), config) == []


# Validation

WRONG_RUN = [
    ({"precision": "fp61"}, "precision must be one of fp32, bf16, fp16, auto, not 'fp61'; did you mean fp16"),
    ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
    ({"seed": -1}, "seed must not be negative"),
    ({"max_steps": -1}, "max_steps must not be negative"),
    ({"encoder_lr_ratio": 0.0}, "encoder_lr_ratio must be above 0 and at most 1"),
    ({"encoder_lr_ratio": 2.0}, "encoder_lr_ratio must be above 0 and at most 1"),
    ({"save_every": -1}, "save_every must not be negative"),
    ({"dataloader_workers": -2}, "dataloader_workers is a count, or -1"),
    ({"clip": -1.0}, "clip must not be negative"),
]
WRONG_VOLUMES = [
    ({"prepare_workers": -1}, "prepare_workers must not be negative"),
    ({"crops_per_volume": 0}, "crops_per_volume must be above 0"),
    ({"spacing": (1.5, 0.0, 1.5)}, "spacing must be above 0 mm"),
    ({"hu_min": 250.0}, "hu_min must lie below hu_max"),
    ({"hu_max": float("inf")}, "hu_max must be finite"),
    ({"spacing": (1.5, float("nan"), 1.5)}, "spacing must be finite"),
    ({"encoder_widths": (32, 64, 128, 384)}, "encoder_widths takes 5 positive numbers"),
    ({"encoder_depths": (1, 1, 0, 3, 1)}, "encoder_depths takes 5 positive numbers"),
    ({"expansions": ()}, "expansions takes 5 positive numbers"),
    ({"encoder_widths": (32, 64, 128, 256, 380)}, "last of encoder_widths must be a multiple of 6 and of num_heads=12"),
    ({"encoder_widths": (32, 64, 128, 256, 64), "num_heads": 8}, "multiple of 6"),
    ({"vit_depth": 0}, "vit_depth must be above 0"),
    ({"num_heads": 0}, "num_heads must be above 0"),
    ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1"),
    ({"val_fraction": -0.1}, "val_fraction must be at least 0 and below 1"),
    ({"flip_prob": (0.0, 0.5, 1.1)}, "flip_prob must be probabilities"),
    ({"flip_prob": (-0.1, 0.5, 1.0)}, "flip_prob must be probabilities"),
]
WRONG_PRETRAIN = [
    ({"batch_size": 0}, "batch_size must be above 0"),
    ({"epochs": 0}, "epochs must be above 0"),
    ({"decoder_width": 0}, "decoder_width must be above 0"),
    ({"reconstruct_fraction": 0.0}, "reconstruct_fraction: expected a number above 0 and at most 1, got 0.0"),
    ({"reconstruct_fraction": 1.1}, "reconstruct_fraction: expected a number above 0 and at most 1, got 1.1"),
    ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
    ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ({"weight_decay_end": -0.1}, "weight_decay_end must not be negative"),
    ({"picture_every": -1}, "picture_every must not be negative"),
    ({"crop_size": (96, 96)}, "crop_size takes one number or three"),
    ({"crop_size": ()}, "crop_size takes one number or three"),
    ({"crop_size": (100,)}, r"multiple of 16.*nearest that fits is \(96, 96, 96\)"),
    ({"crop_size": (96, 0, 96)}, "multiple of 16"),
    ({"model": "moco"}, "model must be hyspark, or a method and a backbone"),
    ({"model": "simclr/timm/resnet50"}, "methods are spark, moco, byol, swav"),
    ({"model": "byol/timm/resnet50", "mask_ratio": 0.6}, "mask_ratio: not read by byol; drop for byol/timm/resnet50"),
    ({"model": "spark/timm/resnet50", "queue_size": 64}, "queue_size: not read by spark"),
    ({"prototypes": 10}, "prototypes: not read by hyspark"),
    ({"model": "moco/timm/resnet50", "queue_size": 100}, "queue_size must be a multiple of a step's 16 crops"),
    ({"model": "moco/timm/resnet50", "momentum": 1.0}, "momentum must be at least 0 and below 1"),
    ({"model": "swav/timm/resnet50", "view_scale": 0.0}, "view_scale must be above 0 and at most 1"),
    ({"model": "swav/timm/resnet50", "local_views": -1}, "local_views must not be negative"),
    ({"model": "byol/timm/resnet50", "batch_size": 1, "crops_per_volume": 1}, "byol needs two crops a step or more"),
    ({"mask_ratio": 0.0}, "mask_ratio must lie between 0 and 1"),
    ({"mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1"),
    ({"lr": 0.0}, "lr must be above 0"),
    ({"lr": float("nan")}, "lr must be finite"),
    (
        {"model": "hyspark2"},
        "model must be hyspark, or a method and a backbone .* not 'hyspark2'; methods .*; did you mean hyspark",
    ),
    (
        {"model": "spark/timm/resnet50", "hide": "input", "vit_depth": 2},
        "vit_depth, hide: not read by spark; drop for spark/timm/resnet50",
    ),
    ({"in_channels": 3}, "in_channels must be 1 for hyspark.*but it is 3.*image_channels"),
    ({"slice_stride": 2}, "slice_stride and slice_scaling need slices"),
    ({"slices": "axial", "crop_size": (96, 96, 96)}, "crop_size takes one number or two"),
    ({"slices": "axial", "probe_data": "data"}, "probe_data needs model=hyspark"),
    ({"compute": "sparse"}, "compute must be one of packed, masked"),
]
WRONG_FINETUNE = [
    ({"epochs": 0}, "epochs must be above 0"),
    ({"val_every": 0}, "val_every must be above 0"),
    ({"batch_size": 0}, "batch_size must be above 0"),
    ({"sw_batch_size": 0}, "sw_batch_size must be above 0"),
    ({"in_channels": 0}, "in_channels must be above 0"),
    ({"in_channels": 2}, "in_channels must be 1.*image_channels"),
    ({"out_channels": -1}, "out_channels must not be negative"),
    ({"out_channels": 1}, "out_channels includes the background"),
    ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
    ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ({"lr": 0.0}, "lr must be above 0"),
    ({"infer_overlap": 1.0}, "infer_overlap must be at least 0 and below 1"),
    ({"lrschedule": "warmup"}, "lrschedule must be one of.*did you mean warmup_cosine"),
    ({"crop_size": (96, 96, 90)}, "multiple of 16"),
    ({"rot90_prob": 2.0}, "must be probabilities"),
    ({"intensity_prob": -1.0}, "must be probabilities"),
    ({"labelled_prob": 1.1}, "must be probabilities"),
    ({"background_weight": 0.0}, "background_weight must be above 0"),
    ({"decoder_width": 16, "decoder_min_width": 32}, "decoder_min_width: expected at most decoder_width=16"),
    ({"accumulate": 0}, "accumulate must be above 0"),
    ({"accumulate": 3}, "accumulate=3 does not divide a step's 4 crops"),
    ({"num_labelled": -1}, "num_labelled must not be negative"),
    ({"label_fraction": 0.0}, "label_fraction must be above 0"),
    ({"label_fraction": 1.5}, "label_fraction and layer_decay are at most 1"),
    ({"num_labelled": 5, "label_fraction": 0.5}, "both set the number of labelled cases"),
    ({"layer_decay": 1.1}, "label_fraction and layer_decay are at most 1"),
    ({"pretrained_lr_ratio": 0.0}, "pretrained_lr_ratio must be above 0 and at most 1"),
    ({"freeze_epochs": -1}, "freeze_epochs must not be negative"),
    ({"steps_per_epoch": -1}, "steps_per_epoch must not be negative"),
    ({"left_right": ("left kidney",)}, "left_right takes pairs such as"),
    ({"left_right": ("a=",)}, "left_right takes pairs such as"),
    (
        {"crop_size": (64, 96, 96)},
        r"equal crop edges on the first two axes, but crop_size is \[64, 96, 96\].*rot90_prob to 0",
    ),
]
WRONG_CLASSIFY = [
    ({"model": "resnet50"}, "model must be timm/NAME or torchvision/NAME"),
    ({"model": "tim/resnet50"}, "not 'tim/resnet50'; did you mean timm"),
    ({"in_channels": 2}, "in_channels must be 1 or 3"),
    ({"mean": (0.5, 0.5)}, "mean takes one number, or one per channel"),
    ({"in_channels": 1, "std": (1.0, 1.0, 1.0)}, "std takes one number, or one per channel"),
    ({"std": (0.0,)}, "std must be above 0"),
    ({"num_labelled": 5, "label_fraction": 0.5}, "both set the number of labelled cases"),
    ({"label_fraction": 1.5}, "label_fraction and layer_decay are at most 1"),
    ({"pretrained_lr_ratio": 1.5}, "pretrained_lr_ratio must be above 0 and at most 1"),
    ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw"),
    ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
    ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
    ({"crop_scale": (0.9, 0.5)}, "crop_scale takes two rising fractions"),
    ({"crop_scale": (0.0, 0.5)}, "crop_scale takes two rising fractions"),
    ({"flip_prob": 1.5}, "flip_prob must be probabilities"),
    ({"batch_size": 5, "mixup": 0.1}, "batch_size must be even"),
    ({"mixup": -0.1}, "mixup must not be negative"),
    ({"crop_size": 0}, "crop_size must be above 0"),
]
WRONG = [(c, *case) for c in CLASSES.values() for case in WRONG_RUN]
WRONG += [(c, *case) for c in VOLUMES.values() for case in WRONG_VOLUMES]
WRONG += [(ClassificationConfig, *case) for case in WRONG_CLASSIFY]
WRONG += [(PretrainConfig, *case) for case in WRONG_PRETRAIN] + [(SegmentationConfig, *case) for case in WRONG_FINETUNE]


@pytest.mark.parametrize(("config_class", "values", "message"), WRONG, ids=[f"{c.__name__}-{v}" for c, v, _ in WRONG])
def test_wrong_settings_are_refused(config_class, values, message):
    with pytest.raises(ValueError, match=message):
        config_class(**values)


def test_settings_at_the_edge_are_accepted():
    PretrainConfig(
        clip=0.0,
        warmup_epochs=0,
        weight_decay=0.0,
        weight_decay_end=0.0,
        val_fraction=0.0,
        flip_prob=(0.0, 1.0, 0.5),
        dataloader_workers=-1,
    )
    SegmentationConfig(infer_overlap=0.0, out_channels=2, warmup_epochs=0, rot90_prob=1.0, intensity_prob=0.0)
    SegmentationConfig(crop_size=(64, 96, 96), rot90_prob=0.0)
    ClassificationConfig(
        mean=(0.5, 0.5, 0.5), crop_scale=(1.0, 1.0), freeze_epochs=0, weight_decay=0.0, rotate_degrees=0.0
    )


def test_nearest():
    assert nearest("base_lrr", ["wd", "base_lr"]) == "; did you mean base_lr?"
    assert nearest("--exp", ["--epochs", "--exp_name"]) == "; did you mean --exp_name?"
    assert nearest("zzz", ["wd", "base_lr"]) == ""
    assert nearest("--bss", ["--batch_size", "--lr"], {"--bs": "--batch_size"}) == "; did you mean --batch_size?"


# Earlier spellings


def test_earlier_spellings_in_a_recipe(tmp_path):
    text = "data_dir: d\nlogdir: o\npretrained: none\nroi_x: 64\nroi_y: 64\nroi_z: 32\nmax_epochs: 3\noptim_lr: 1e-3\n"
    expected = {"data": "d", "out": "o", "weights": "none", "crop_size": (64, 64, 32), "epochs": 3, "lr": 1e-3}
    assert read_yaml(recipe(tmp_path, text), SegmentationConfig) == expected
    assert read_yaml(recipe(tmp_path, "roi_z: 48"), SegmentationConfig) == {"crop_size": (96, 96, 48)}
    assert read_yaml(recipe(tmp_path, "init_weight: ''"), PretrainConfig) == {"weights": "none"}
    assert read_yaml(recipe(tmp_path, "channels: 1\ninput_size: 64"), ClassificationConfig) == {
        "in_channels": 1,
        "crop_size": 64,
    }


@pytest.mark.parametrize("text", ["bs: 2\nbatch_size: 2", "batch_size: 2\nbs: 2"])
def test_two_spellings_of_one_setting_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"recipe\.yaml: (bs and batch_size|batch_size and bs) are one setting"):
        read_yaml(recipe(tmp_path, text), PretrainConfig)
    for text in ("roi_x: 32\ncrop_size: 32", "crop_size: 32\nroi_x: 32"):
        with pytest.raises(ValueError, match=r"(roi_x and crop_size|crop_size and roi_x) are one setting"):
            read_yaml(recipe(tmp_path, text), SegmentationConfig)


def test_a_run_with_earlier_spellings_continues():
    old = as_plain(PretrainConfig())
    for name, before in (("batch_size", "bs"), ("crop_size", "input_size"), ("lr", "base_lr"), ("out", "exp_dir")):
        old[before] = old.pop(name)
    old["init_weight"] = ""
    del old["weights"]
    assert differences(old, PretrainConfig()) == []
    assert differences(old | {"bs": 2}, PretrainConfig()) == ["batch_size: was 2, is 4"]
    fine = as_plain(SegmentationConfig())
    del fine["crop_size"]
    fine |= {"roi_x": 96, "roi_y": 96, "roi_z": 64}
    assert differences(fine, SegmentationConfig(crop_size=(96, 96, 64))) == []
    assert differences(fine, SegmentationConfig()) == ["crop_size: was [96, 96, 64], is [96, 96, 96]"]


def test_an_empty_path_of_weights_is_none():
    assert PretrainConfig(weights="").weights == "none"


# Continuing a run


def test_differences_name_what_forbids_continuing():
    old = as_plain(PretrainConfig())
    changed = PretrainConfig(lr=2e-4, crop_size=(48,), max_steps=5, out="elsewhere", dataloader_workers=0)
    assert differences(old, PretrainConfig()) == []
    assert differences(old, changed) == ["crop_size: was [96], is [48]", "lr: was 0.0001, is 0.0002"]


@every
def test_only_named_fields_may_change(config_class):
    old, infos = as_plain(config_class()), field_info(config_class)
    for name in names_of(config_class):
        lines = differences({**old, name: "something else"}, config_class())
        assert bool(lines) == (not infos[name].may_change)
    assert all(infos[name].may_change for name in ("max_steps", "device", "dataloader_workers", "data", "out"))
    assert not any(infos[name].may_change for name in ("seed", "batch_size", "lr", "epochs", "crop_size", "weights"))


def test_a_setting_the_old_run_did_not_have_had_its_default():
    old = as_plain(SegmentationConfig())
    del old["rot90_prob"]
    assert differences(old, SegmentationConfig()) == []
    assert differences(old, SegmentationConfig(rot90_prob=0.5)) == ["rot90_prob: was 0.2, is 0.5"]
