"""Command lines: published ones parse unchanged, wrong ones say what is wrong, and verbs do what they say."""

import json
import logging
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from hyspark import __version__
from hyspark.cli import commands, completion, main, parsing, run_verb
from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import field_help, old_spellings
from hyspark.config.segmentation import SegmentationConfig
from hyspark.models.encoder import HybridEncoder
from hyspark.models.segmentation import build_hybird
from hyspark.utils.atomic import write_json
from hyspark.utils.install import install_command
from hyspark.utils.log import LOG, set_up_log

ROOT = Path(__file__).parents[2]
PUBLISHED = "--exp_name=debug --data=./data --model=hyspark --batch_size=12 --out=debug_hyspark_ddp_4"
TINY = {"encoder_widths": (4, 4, 8, 8, 12), "encoder_depths": (1,) * 5, "expansions": (2,) * 5}
TINY_FLAGS = [word for name, values in TINY.items() for word in (f"--{name}", *map(str, values))]
TINY_FLAGS += ["--vit_depth", "1", "--num_heads", "2", "--crop_size", "32", "--out_channels", "3"]


def pretrain_config(line: str) -> PretrainConfig:
    return parsing.read_config(PretrainConfig, "hyspark pretrain", line.split())


def finetune_config(line: str) -> SegmentationConfig:
    return parsing.read_config(SegmentationConfig, "hyspark finetune", line.split())


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What a failing command prints on the error stream."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main.main(argv)
    assert exit_.value.code == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def make_dataset(folder: Path, names: str, labels: str = "", ending: str = ".nii.gz") -> Path:
    """An nnU-Net data set of empty files."""
    for part, cases, suffix in (("imagesTr", names, "_0000"), ("labelsTr", labels, "")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in cases.split():
            (folder / part / f"{name}{suffix}{ending}").write_text("")
    return folder


# Published command lines


def test_the_published_command_line_parses_unchanged():
    config = pretrain_config(PUBLISHED)
    assert (config.exp_name, config.data, config.model, config.batch_size) == ("debug", "./data", "hyspark", 12)
    assert str(config.run_folder) == "debug_hyspark_ddp_4"
    untouched = PretrainConfig(exp_name="debug", data="./data", batch_size=12, out="debug_hyspark_ddp_4")
    assert config == untouched


@pytest.mark.parametrize(
    ("flag", "value", "parsed"),
    [
        ("mask", "0.6", {"mask_ratio": 0.6}),
        ("input_size", "64", {"crop_size": (64,)}),
        ("base_lr", "2e-4", {"lr": 2e-4}),
        ("ep", "10", {"epochs": 10}),
        ("wp_ep", "2", {"warmup_epochs": 2}),
        ("wd", "0.1", {"weight_decay": 0.1}),
        ("wde", "0.3", {"weight_decay_end": 0.3}),
        ("clip", "1", {"clip": 1.0}),
        ("init_weight", "a/b.pth", {"weights": "a/b.pth"}),
        ("resume_from", "c.pth", {"resume_from": "c.pth"}),
        ("dataloader_workers", "8", {"dataloader_workers": 8}),
    ],
)
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_the_other_published_flags_parse(flag, value, parsed, form):
    assert pretrain_config(f"{PUBLISHED} {form.format(flag, value)}") == replace(pretrain_config(PUBLISHED), **parsed)


def test_unetr_flags_parse():
    line = (
        "--data=/data/btcv --json_list=dataset_0.json --out=./test --epochs=10 --val_every=5 --batch_size=2 "
        "--lr=4e-4 --weight_decay=1e-5 --warmup_epochs=5 --lrschedule=warmup_cosine --infer_overlap=0.7 "
        "--roi_x=64 --roi_y=64 --roi_z=96 --in_channels=1 --out_channels=14"
    )
    assert finetune_config(line) == SegmentationConfig(
        data="/data/btcv",
        json_list="dataset_0.json",
        out="./test",
        epochs=10,
        val_every=5,
        batch_size=2,
        lr=4e-4,
        weight_decay=1e-5,
        warmup_epochs=5,
        infer_overlap=0.7,
        crop_size=(64, 64, 96),
        out_channels=14,
    )


def test_flags_of_one_axis_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("roi_x: 64\nroi_y: 64\nroi_z: 32\n")
    assert finetune_config(f"--config {recipe}").crop_size == (64, 64, 32)
    assert finetune_config(f"--config {recipe} --roi_z 48").crop_size == (64, 64, 48)
    recipe.write_text("crop_size: 64\n")
    assert finetune_config(f"--config {recipe} --roi_z=48").crop_size == (64, 64, 48)
    with pytest.raises(ValueError, match="--roi_z and --crop_size are one setting"):
        finetune_config("--roi_z 48 --crop_size 32")


@pytest.mark.parametrize("config_class", [PretrainConfig, SegmentationConfig, ClassificationConfig])
def test_an_earlier_spelling_gives_the_present_setting(config_class):
    for old, name in old_spellings(config_class).items():
        if old.startswith("roi_"):
            continue
        value = "32" if name == "crop_size" else "0.5" if isinstance(getattr(config_class, name), float) else "1"
        read = parsing.read_config(config_class, "hyspark", [f"--{old}", value])
        assert read == parsing.read_config(config_class, "hyspark", [f"--{name}={value}"])
        assert read == parsing.read_config(config_class, "hyspark", [f"--{old}={value}"])
        if old != "channels":
            assert read != config_class()


def test_the_help_shows_present_spellings_only(capsys):
    with pytest.raises(SystemExit):
        main.main(["finetune", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert not {f"--{old}" for old in old_spellings(SegmentationConfig)} & words


def test_defaults_without_flags():
    assert pretrain_config("") == PretrainConfig()
    assert finetune_config("") == SegmentationConfig()


def test_values_of_several_numbers():
    config = pretrain_config("--crop_size 32 48 64 --spacing 1 2 2.5 --flip_prob 0 0 1 --encoder_widths 8 8 8 8 12")
    assert (config.crop_size, config.spacing) == ((32, 48, 64), (1.0, 2.0, 2.5))
    assert (config.flip_prob, config.encoder_widths) == ((0.0, 0.0, 1.0), (8, 8, 8, 8, 12))


def test_negative_numbers_with_an_exponent():
    assert pretrain_config("--hu_min -1e3 --hu_max -.5").hu_min == -1000
    assert pretrain_config("--hu_min -1.5E+2").hu_min == -150


def test_booleans():
    assert pretrain_config("").dry_run is False
    assert pretrain_config("--dry_run").dry_run is True
    assert pretrain_config("--dry_run --no-dry_run").dry_run is False


# Recipes


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bs: 6\nbase_lr: 1e-3\nspacing: [2, 2, 3]\ninput_size: 48\ndry_run: true\n")
    for line in (f"--config {recipe} --batch_size 8", f"--batch_size=8 --config={recipe}"):
        config = pretrain_config(line)
        expected = {"batch_size": 8, "lr": 1e-3, "spacing": (2.0, 2.0, 3.0), "crop_size": (48,), "dry_run": True}
        assert config == PretrainConfig(**expected)
    assert pretrain_config(f"--config {recipe} --no-dry_run --lr 1e-4").dry_run is False


def test_the_last_recipe_counts(tmp_path):
    for name, bs in (("a", 3), ("b", 5)):
        (tmp_path / name).write_text(f"bs: {bs}\n")
    assert pretrain_config(f"--config={tmp_path / 'a'} --config {tmp_path / 'b'}").batch_size == 5


def test_wrong_recipes_are_messages(tmp_path, capsys):
    assert "no recipe at none.yaml" in fails(["pretrain", "--config", "none.yaml"], capsys)
    (tmp_path / "a.yaml").write_text("max_epoch: 3\n")
    assert "unknown key 'max_epoch'; did you mean epochs?" in fails(
        ["finetune", f"--config={tmp_path / 'a.yaml'}"], capsys
    )


# Wrong command lines


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pretrain --bss 3", "unknown argument '--bss'; did you mean --batch_size?"),
        ("pretrain --base_lrr=3", "unknown argument '--base_lrr'; did you mean --lr?"),
        ("finetune --max_epoch 3", "unknown argument '--max_epoch'; did you mean --epochs?"),
        ("pretrain stray", "unknown argument 'stray'"),
        ("datalist --datapath x", "unknown argument '--datapath'; did you mean --data?"),
        ("phantom --num_labeled 1", "unknown argument '--num_labeled'; did you mean --num_labelled?"),
        ("weights a.pth --classes 3", "unknown argument '--classes'"),
        ("compare a --fast", "unknown argument '--fast'"),
        # abbreviations
        ("pretrain --exp_n debug", "unknown argument '--exp_n'; did you mean --exp_name?"),
        ("pretrain --exp_n=debug", "unknown argument '--exp_n'; did you mean --exp_name?"),
        ("finetune --max_e 3", "unknown argument '--max_e'; did you mean --epochs?"),
        ("datalist --lab", "unknown argument '--lab'; did you mean --labels?"),
        ("finetune --bs 2", "unknown argument '--bs'; did you mean --batch_size?"),
        ("finetune-classifier --data_path x", "unknown argument '--data_path'; did you mean --data?"),
        ("pretrain --data x --data_path y", "--data and --data_path are one setting; use --data alone"),
        ("finetune --roi_x", "--roi_x: expected a number of voxels, got ''"),
        ("finetune --roi_x --dry_run", "--roi_x: expected a number of voxels, got '--dry_run'"),
        ("finetune --crop_size abc", "argument --crop_size: invalid whole number value: 'abc'"),
        # values
        ("pretrain --batch_size x", "argument --batch_size: invalid int value: 'x'"),
        ("pretrain --batch_size", "argument --batch_size: expected one argument"),
        ("pretrain --spacing 1 2", "argument --spacing: expected 3 arguments"),
        ("pretrain --precision fp61", "bf16"),
        ("pretrain --crop_size 100", "the nearest that fits is (96, 96, 96)"),
        ("pretrain --mask_ratio 1.5", "mask_ratio must lie between 0 and 1"),
        ("finetune --in_channels 3", "in_channels must be 1, the number of image_channels"),
        ("datalist --organize_from x", "--organize_from and --organize_to go together"),
        ("phantom --num_labelled -1", "at least 0"),
    ],
)
def test_wrong_command_lines_end_with_a_message(words, expected, capsys):
    assert expected in fails(words.split(), capsys)


def test_the_command_without_a_verb(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main([])
    assert exit_.value.code == 2
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in main.VERBS)
    with pytest.raises(SystemExit) as exit_:
        main.main(["--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == listed


def test_every_verb_is_a_command_with_the_help_that_is_shown():
    for verb, text in main.VERBS.items():
        function = main.FUNCTIONS.get(verb, verb).replace("-", "_")
        assert getattr(commands, function).__doc__ == text


def test_help_and_version_import_nothing_heavy():
    """Nobody waits for torch to read a list of verbs."""
    for word in ("--help", "--version"):
        code = f"import sys; from hyspark.cli.main import main\ntry: main([{word!r}])\nexcept SystemExit: pass\n"
        code += "print('heavy:', sorted({'torch', 'monai', 'numpy', 'yaml', 'matplotlib'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "heavy: []" in done.stdout
        assert ("train:" in done.stdout) == (word == "--help")
        assert done.stdout.startswith(("usage: hyspark VERB", "hyspark "))


def test_an_unknown_verb(capsys):
    message = fails(["pretrian"], capsys)
    assert "no verb 'pretrian'" in message
    assert "did you mean pretrain?" in message


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main([verb, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: hyspark {verb}" in text
    for name, config_class in (("pretrain", PretrainConfig), ("finetune", SegmentationConfig)):
        if verb == name:
            assert "--config" in text
            for field, help_text in field_help(config_class).items():
                assert f"--{field}" in text
                assert " ".join(help_text.split())[:25] in text


# datalist


def test_datalist_writes_and_counts(tmp_path, capsys):
    make_dataset(tmp_path / "Dataset001_A", "a b c", "a b")
    make_dataset(tmp_path / "more" / "Dataset002_B", "d e", ending=".nii")
    main.main(["datalist", "--data", str(tmp_path)])
    output = capsys.readouterr().out
    assert "Dataset001_A: 3 training, 0 validation" in output
    assert "Dataset002_B: 2 training, 0 validation" in output
    assert f"written to {tmp_path / 'dataset.json'}" in output
    listed = json.loads((tmp_path / "dataset.json").read_text())
    assert [entry["image"] for entry in listed["training"]] == [
        *(f"./Dataset001_A/imagesTr/{name}_0000.nii.gz" for name in "abc"),
        *(f"./more/Dataset002_B/imagesTr/{name}_0000.nii" for name in "de"),
    ]


def test_datalist_with_labels_and_split(tmp_path, capsys):
    make_dataset(tmp_path / "Dataset001_A", "a b c d e f", "a b c d e")
    output = tmp_path / "labelled.json"
    flags = ["--labels", "--splits", "auto", "--val_fraction", "0.4", "--out", str(output)]
    main.main(["datalist", "--data", str(tmp_path), *flags])
    assert "3 training, 2 validation, 5 labelled, 1 excluded" in capsys.readouterr().out
    listed = json.loads(output.read_text())
    assert [len(listed["training"]), len(listed["validation"])] == [3, 2]
    assert all(set(entry) == {"image", "label"} for entry in listed["training"] + listed["validation"])
    assert not (tmp_path / "dataset.json").exists()


def test_datalist_organizes_first(tmp_path, capsys):
    (tmp_path / "loose").mkdir()
    for name in ("scan1.nii.gz", "scan2.nii.gz"):
        (tmp_path / "loose" / name).write_text(name)
    target = tmp_path / "data" / "Dataset042_Mine"
    flags = ["--organize_from", str(tmp_path / "loose"), "--organize_to", str(target), "--copy"]
    main.main(["datalist", "--data", str(tmp_path / "data"), *flags])
    output = capsys.readouterr().out
    assert f"2 images copied into {target}/imagesTr" in output
    assert "Dataset042_Mine: 2 training" in output
    assert not (target / "imagesTr" / "scan1_0000.nii.gz").is_symlink()


def test_datalist_that_finds_nothing(tmp_path, capsys):
    message = fails(["datalist", "--data", str(tmp_path)], capsys)
    assert message.startswith("error: ")
    assert "found no image" in message
    assert "imagesTr" in message
    assert not (tmp_path / "dataset.json").exists()
    missing = fails(["datalist", "--data", str(tmp_path / "none")], capsys)
    assert "none: no such file or folder" in missing


def test_datalist_with_duplicates(tmp_path, capsys):
    make_dataset(tmp_path / "Dataset001_A", "a")
    make_dataset(tmp_path / "Dataset001_A", "a", ending=".nii")
    message = fails(["datalist", "--data", str(tmp_path)], capsys)
    assert "a_0000.nii.gz" in message
    assert "a_0000.nii;" in message
    assert not (tmp_path / "dataset.json").exists()


def test_datalist_with_unpaired_labels(tmp_path, capsys):
    make_dataset(tmp_path / "Dataset001_A", "a b", "a c")
    assert "c.nii.gz" in fails(["datalist", "--data", str(tmp_path), "--labels"], capsys)
    assert not (tmp_path / "dataset.json").exists()


# weights, phantom


def test_weights_prints_what_matched(tmp_path, capsys):
    encoder = HybridEncoder(1, 32, *TINY.values(), vit_depth=1, num_heads=2)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    main.main(["weights", str(tmp_path / "encoder.pth"), *TINY_FLAGS])
    output = capsys.readouterr().out
    assert f"matched    {len(encoder.state_dict()):4d} keys" in output
    model = build_hybird(1, 3, 32, **{k.removeprefix("encoder_"): v for k, v in TINY.items()}, vit_depth=1, num_heads=2)
    num_decoder = sum(key.startswith("decoder.") for key in model.state_dict())
    assert f"missing    {num_decoder:4d} (randomly initialised: decoder.* {num_decoder})" in output


def test_weights_that_do_not_fit(tmp_path, capsys):
    assert "none.pth: no such file" in fails(["weights", "none.pth", *TINY_FLAGS], capsys)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert "other.pth" in fails(["weights", str(tmp_path / "other.pth"), *TINY_FLAGS], capsys)
    (tmp_path / "torn.pth").write_bytes(b"torn")
    assert "torn.pth" in fails(["weights", str(tmp_path / "torn.pth"), *TINY_FLAGS], capsys)


def test_weights_of_networks_of_others(tmp_path, capsys):
    path = str(tmp_path / "resnet.pth")
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), path)
    main.main(["weights", path, "--model", "timm/resnet18"])
    report = capsys.readouterr().out
    assert "matched     120 keys, covering 100.0% of the model's parameters" in report
    assert "unexpected    2 (fc.weight, fc.bias: head of the file's network, not part of this model)" in report
    main.main(["weights", path, "--model", "torchvision/resnet18"])
    assert "missing       2 (randomly initialised: fc.* 2)" in capsys.readouterr().out
    assert "out_channels, decoder_width: not read for timm/resnet18" in fails(
        ["weights", path, "--model", "timm/resnet18", "--out_channels", "3", "--decoder_width", "32"], capsys
    )
    assert "did you mean timm/resnet18?" in fails(["weights", path, "--model", "timm/resnet_18"], capsys)
    assert "the model expects shape" in fails(["weights", path, "--model", "monai/resnet18"], capsys)
    assert "none of its 122 keys" in fails(["weights", path, "--model", "monai/segresnet"], capsys)


def test_weights_of_a_transformer_for_another_size(tmp_path, capsys):
    import timm

    path = str(tmp_path / "vit.pth")
    torch.save(timm.create_model("test_vit", img_size=64).state_dict(), path)
    main.main(["weights", path, "--model", "timm/test_vit", "--crop_size", "64"])
    assert "adapted       0" in capsys.readouterr().out
    main.main(["weights", path, "--model", "timm/test_vit", "--crop_size", "32", "48"])
    assert "adapted       1 (pos_embed: (1, 17, 64) resampled to (1, 7, 64), by timm)" in capsys.readouterr().out


def test_export_for_detectron2(tmp_path, capsys):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    words = ["export", "--detectron2", str(tmp_path / "resnet.pth"), str(tmp_path / "resnet.pkl")]
    main.main(words)
    assert "resnet.pkl: 100 tensors, 11.19 M numbers" in capsys.readouterr().out
    assert "--decoder: not read with --detectron2" in fails([*words, "--decoder"], capsys)
    assert "expected a path that ends in .pkl" in fails([*words[:-1], "x.safetensors"], capsys)


def test_phantom_writes_both_datasets(tmp_path):
    main.main(["phantom", "--out", str(tmp_path), "--num_labelled", "1", "--num_unlabelled", "1", "--seed", "3"])
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz"))
    assert len(written) == 3
    assert written[0].startswith("Dataset900_PhantomLabelled/imagesTr/")
    assert written[1].startswith("Dataset900_PhantomLabelled/labelsTr/")
    assert written[2].startswith("Dataset901_PhantomUnlabelled/imagesTr/")


# compare


def write_validations(folder, *lines):
    """A run folder with lines of validations in its metrics.jsonl."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i} | line) + "\n" for i, line in enumerate(lines))
    )


def write_scores(folder, case, digest):
    """Scores of one case in a run folder."""
    write_json(folder / "scores" / "summary.json", {"protocol": {"data_digest": digest}})
    heading = "case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels"
    (folder / "scores" / "cases.csv").write_text(f"{heading}\n{case},liver,0.5,1.0,0.5,9,9\n")


def test_compare_names_a_folder_that_is_no_run(tmp_path, capsys):
    assert str(tmp_path) in fails(["compare", str(tmp_path)], capsys)


def test_compare_prints_the_best_validation_of_each_run(tmp_path, capsys):
    write_validations(tmp_path / "own", *({"dice_mean": d, "dice": {"liver": d}} for d in (0.5, 0.75, 0.25)))
    write_validations(tmp_path / "scratch", {"dice_mean": 0.5, "dice": {"liver": 0.5}})
    (tmp_path / "scratch" / "dice.json").write_text("{}")  # of an earlier version
    main.main(["compare", str(tmp_path / "own"), str(tmp_path / "scratch")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["organ", "own", "scratch", "difference"]
    assert lines[2].split() == ["liver", "0.750", "0.500", "+0.250"]


def test_compare_serves_classification(tmp_path, capsys):
    metrics = {"accuracy": 0.5, "f1": 0.25}
    write_validations(tmp_path / "own", metrics | {"accuracy": 0.75, "auc": 0.9}, metrics)
    write_validations(tmp_path / "scratch", metrics)
    main.main(["compare", str(tmp_path / "own"), str(tmp_path / "scratch")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert rows[0] == ["metric", "own", "scratch"]
    assert rows[1:3] == [["AUC", "0.900", "-"], ["accuracy", "0.750", "0.500"]]
    write_validations(tmp_path / "other", {"dice_mean": 0.5, "dice": {"liver": 0.5}})
    told = fails(["compare", str(tmp_path / "own"), str(tmp_path / "other")], capsys)
    assert "expected runs of one kind, got own: classification, other: segmentation" in told


def test_runs_validated_on_other_cases_are_pointed_out(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, case in zip(folders, ("x", "x", "y"), strict=True):
        write_validations(folder, {"dice_mean": 0.5, "dice": {"liver": 0.5}})
        write_scores(folder, case, None)
    main.main(["compare", *map(str, folders[:2])])
    assert "WARNING" not in capsys.readouterr().out
    for folder, digest in zip(folders, ("one", "another"), strict=False):
        write_scores(folder, "x", digest)
    main.main(["compare", *map(str, folders[:2])])
    assert "WARNING" in capsys.readouterr().out
    main.main(["compare", str(folders[0]), str(folders[2])])
    assert "WARNING: the runs were validated on different cases" in capsys.readouterr().out


# Errors


def test_a_bug_keeps_its_traceback():
    """Only what this package raises on purpose, and trouble with files, is shortened."""
    with pytest.raises(ValueError, match="broadcast"):
        run_verb.run_verb(lambda argv: torch.zeros(2).numpy().__setitem__(slice(None), [1, 2, 3]), [])
    with pytest.raises(json.JSONDecodeError):
        run_verb.run_verb(lambda argv: json.loads("{"), [])
    with pytest.raises(KeyError):
        run_verb.run_verb(lambda argv: {}["a"], [])


def test_trouble_with_files_is_one_line_wherever_it_is_noticed(capsys):
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(lambda argv: Path("none").stat(), [])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: 'none'\n"


def test_a_diverged_training_is_exit_code_1(monkeypatch, capsys):
    def failed(argv: list[str]) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(run_verb, "raised_here", lambda error: True)
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(failed, [])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_every_rank_prints_its_error_with_the_rank(monkeypatch, capsys):
    assert fails(["pretrain", "--mask_ratio", "2"], capsys).startswith("error: mask_ratio")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fails(["pretrain", "--mask_ratio", "2"], capsys).startswith("error: mask_ratio")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        assert fails(["pretrain", "--mask_ratio", "2"], capsys).startswith(f"error (rank {rank}): mask_ratio")


@pytest.mark.parametrize("error", [ModuleNotFoundError, NotImplementedError, ValueError, OSError])
def test_a_missing_extra_or_an_unsupported_network_is_one_line(error, monkeypatch, capsys):
    def failed(argv: list[str]) -> None:
        raise error("moco needs lightly: pip install 'hyspark[views]'")

    monkeypatch.setattr(run_verb, "raised_here", lambda error: True)
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(failed, [])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: moco needs lightly: pip install 'hyspark[views]'\n"


def test_a_missing_dependency_is_one_line(monkeypatch, capsys):
    """As in a checkout that was updated without `make setup`."""

    def failed(argv: list[str]) -> None:
        import no_such_package  # noqa: F401

    monkeypatch.setattr(run_verb, "raised_here", lambda error: True)
    monkeypatch.setattr(commands, "check", failed)
    assert fails(["check"], capsys) == (
        f"error: no_such_package: not installed, and needed by hyspark {__version__}; "
        f"install it with: {install_command()}\n"
    )


def test_the_example_of_every_verb_parses():
    """What the help shows can be typed."""
    for verb in main.VERBS:
        parser = completion.verb_parser(verb)
        examples = parser.description.partition("Example:")[2].replace("\\\n", " ").strip().splitlines()
        assert examples
        for example in examples:
            program, shown, *words = shlex.split(example)
            assert (program, shown) == ("hyspark", verb)
            extra = completion.verb_parser(verb).parse_args(words, known_only=True).extra_args
            assert not extra or verb == "benefit"


# Completion


def test_completion_scripts(capsys, monkeypatch):
    main.main(["--completion", "bash"])
    script = capsys.readouterr().out
    for word in (*main.VERBS, "--batch_size", "--mask_ratio", "--num_unlabelled", "released"):
        assert word in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "expected one of bash, zsh, tcsh, got fish" in fails(["--completion", "fish"], capsys)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert install_command("completion") in fails(["--completion", "zsh"], capsys)


def test_verbs_of_earlier_versions_still_work(capsys):
    for verb, expected in (("finetune_classify", "hyspark finetune-classifier"), ("classify", "hyspark classify")):
        with pytest.raises(SystemExit) as exit_:
            main.main([verb, "--help"])
        assert exit_.value.code == 0
        assert f"usage: {expected}" in capsys.readouterr().out


def test_the_scripts_show_their_help(tmp_path):
    """From another folder, as a user would. Neither they nor the work on data files wait for torch."""
    code = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as error:\n"
        "        print('exit code', error.code)\n"
        "import hyspark.data.importing.write, hyspark.data.quality.check, hyspark.data.slices.write_slices\n"
        "print('heavy:', sorted({'torch', 'torchvision', 'timm', 'monai', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    scripts = [str(ROOT / name) for name in ("generate_js.py", "train.py", "finetune_btcv.py")]
    done = subprocess.run([sys.executable, "-c", code, *scripts], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit code 0") == 3
    assert "heavy: []" in done.stdout
    for text in ("usage: hyspark datalist", "usage: hyspark pretrain", "usage: hyspark finetune"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []


# Errors of machines and files


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 4 GiB"), "not enough memory (Unable to allocate 4 GiB); use smaller batches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\n#0"), "not enough memory ([enforce"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory (CUDA out of memory"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "--device cuda: torch cannot compute"),
    ],
)
def test_faults_of_the_machine_are_one_line(error, expected, capsys):
    def failing(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(failing, [])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith(f"error: {expected}")
    assert message.count("\n") == 1


def test_a_damaged_file_is_named_though_a_library_notices_it(tmp_path, capsys):
    """From the function of this package that was reading it."""
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    code = compile("import json\ndef read(path): return json.loads(path.read_text())", run_verb.__file__, "exec")
    names: dict = {}
    exec(code, names)
    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(lambda argv: names["read"](path), [])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: unreadable (JSONDecodeError: ")


def test_control_c_is_one_line(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_verb.run_verb(interrupted, [])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "stopped by Control-C\n"


def test_output_that_nobody_reads_is_no_error():
    """As in `hyspark ... | head -1`."""
    code = "from hyspark.cli.run_verb import run_verb; run_verb(lambda argv: print('a\\n' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_a_flag_may_empty_what_a_recipe_sets(tmp_path):
    (tmp_path / "r.yaml").write_text("test_dir: other\nsubject_regex: x\n")
    words = ["--config", str(tmp_path / "r.yaml"), "--test_dir", "", "--subject_regex", ""]
    config = parsing.read_config(SegmentationConfig, "hyspark finetune", words)
    assert (config.test_dir, config.subject_regex) == ("", "")


def test_a_bug_of_writing_is_no_damaged_file(tmp_path):
    with pytest.raises(TypeError):
        run_verb.run_verb(lambda argv: write_json(tmp_path / "a.json", {"a": object()}), [])


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, logging.INFO),
        ({"RANK": "2", "LOCAL_RANK": "0"}, logging.WARNING),
        ({"RANK": "3", "LOCAL_RANK": "1"}, logging.ERROR),
    ],
)
def test_one_process_of_a_machine_shows_warnings(monkeypatch, variables, level):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_up_log()
    assert LOG.level == level
