"""Odd values of flags: one message and exit code 2, whatever the verb; work that a verb would do is not done."""

import pytest

from hyspark.cli import commands, completion, main, parsing
from hyspark.config.recipes import SETTINGS_OF
from hyspark.evaluation import network_kind
from hyspark.tasks import api

ODD = ["", "nan", "-1", "1e400", "folder", "a\0b"]
NEEDED = {
    "check": ["folder"],
    "compare": ["folder"],
    "weights": ["none.pth"],
    "export": ["none.pth", "out.safetensors"],
    "predict": ["folder", "folder", "--out", "out"],
    "evaluate": ["folder", "folder", "--out", "out"],
    "slices": ["--source", "folder", "--out", "out"],
    "benefit": ["--out", "out", "--initial_weights", "a=none", "--num_labelled", "1"],
}


def fails(argv, capsys):
    """The last line that a command prints before it ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main.main(argv)
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", [verb for verb in main.VERBS if verb not in SETTINGS_OF])
def test_odd_values_of_flags_have_no_traceback(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("hyspark.data.synthetic.phantom.write_phantoms", lambda *args, **kwargs: None)
    monkeypatch.setattr("hyspark.comparison.benefit.run_comparison", lambda *args, **kwargs: 0)
    monkeypatch.setattr(commands, "segmentation_network", lambda args: None)
    for action in completion.verb_parser(verb)._actions:
        for odd in ODD if action.option_strings and action.nargs != 0 else []:
            count = action.nargs if isinstance(action.nargs, int) else 1
            try:
                main.main([verb, *NEEDED.get(verb, []), action.option_strings[0], *[odd] * count])
            except SystemExit as ended:
                code = ended.code
                assert code in (0, 2), (action.dest, odd)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed", "lr", "flip_prob", "crop_size", "data", "config", "precision"])
def test_odd_values_of_settings_have_no_traceback(name, tmp_path, monkeypatch, capsys):
    """Of one setting of each type: the settings of all verbs that train are read and checked by the same functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("hyspark.tasks.pretrain.run_pretraining", lambda config: None)
    count = 3 if name == "flip_prob" else 1
    for odd in ODD:
        try:
            main.main(["pretrain", f"--{name}", *[odd] * count])
        except SystemExit as ended:
            code = ended.code
            assert code == 2, (name, odd)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights", "a.pth", "--in_channels", "-1"], "in_channels must not be negative"),
        (["weights", "a.pth", "--out_channels", "0"], "out_channels must be above 0"),
        (["weights", ""], "path: expected TEXT, got an empty text"),
        (["weights", "a\0b"], "expected a word without NUL characters"),
        (["check", "d", "--hu_min", "nan"], "--hu_min: expected a finite number, got nan"),
        (["check", "d", "--spacing", "1", "0", "1"], "--spacing: expected mm above 0 on each axis"),
        (["check", "d", "--prepare_workers", "-1"], "prepare_workers must not be negative"),
        (["slices", "--source", "s", "--out", ""], "--out: expected TEXT, got an empty text; is a variable unset?"),
        (["pretrain", "--data", ""], "--data: expected TEXT, got an empty text"),
        (["pretrain", "--config", ""], "no recipe at ''"),
        (["finetune", "--lr", "1e400"], "--lr: expected a finite number, got inf"),
        (
            [*["benefit", "--out", "o", "--initial_weights", "a=none", "--num_labelled"], "0"],
            "expected numbers above 0",
        ),
    ],
)
def test_the_message_names_the_flag(words, message, capsys):
    assert message in fails(words, capsys)


def test_no_initial_weights_may_be_spelled_as_before():
    config = parsing.read_config(SETTINGS_OF["pretrain"], "pretrain", ["--init_weight", ""])
    assert config.weights == "none"


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_a_flag_of_segmentation_at_its_default_is_refused_for_a_classifier(verb, monkeypatch, capsys):
    monkeypatch.setattr(api, "kind_of_network", lambda path: "classification")
    assert network_kind.kind_of_network is not api.kind_of_network
    words = [verb, "best.pth", "images", "--out", "out", "--prepare_workers", "0"]
    assert "prepare_workers: an option of segmentation" in fails(words, capsys)


def test_a_flag_of_the_segmentation_network_at_its_default_is_refused_for_another(capsys):
    words = ["weights", "a.pth", "--model", "timm/resnet18", "--decoder", "released"]
    assert "decoder: not read for timm/resnet18" in fails(words, capsys)
