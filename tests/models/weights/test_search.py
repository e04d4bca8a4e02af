"""The state dict of a file is found wherever it lies; of several, the rule is clear, or the choice is the user's."""

import re

import pytest
import torch
from torch import nn

from hyspark import load_pretrained
from hyspark.cli.main import main
from tests.models.weights.tiny import Tiny, has_loaded, numbers, without_head

OWN, OTHER = numbers(1), numbers(2)
ADAM = torch.optim.Adam(Tiny().parameters())
for group in ADAM.param_groups[0]["params"]:
    ADAM.state[group] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(group)}
MOMENTS = {name: torch.zeros_like(value) for name, value in OWN.items()}


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def nested(weights):
    """Module by module, as in Flax."""
    tree = {}
    for key, value in weights.items():
        *modules, last = key.split(".")
        level = tree
        for module in modules:
            level = level.setdefault(module, {})
        level[last] = value
    return tree


WHOLE = {
    "nnU-Net": {"network_weights": OWN, "optimizer_state": ADAM.state_dict(), "grad_scaler_state": {"scale": 1.0}},
    "a trainer": {"net": OWN, "optimizer": ADAM.state_dict(), "best": torch.tensor(0.5), "epoch": 3},
    "Lightning": {"state_dict": prefixed(OWN, "model.net."), "optimizer_states": [ADAM.state_dict()], "callbacks": {}},
    "DeepSpeed": {"module": OWN, "optimizer": None, "lr_scheduler": {"last": 1}},
    "averaged": prefixed(OWN, "module.") | {"n_averaged": torch.tensor(5)},
    "compiled and wrapped": prefixed(OWN, "_orig_mod.module."),
    "far down": {"a": {"b": [{"c": OWN}]}},
    "Flax": nested(OWN),
    "moments of Adam by name": {"exp_avg": MOMENTS, "params": OWN},
    "numpy": {"model": {key: value.numpy() for key, value in OWN.items()}},
    "twice the same": {"one": OWN, "two": dict(OWN)},
    "the usual key before an average": {"model": OWN, "model_ema": OTHER},
    "an average in a callback": {"state_dict": OWN | {"loss.weight": torch.ones(1)}, "callbacks": {"EMA": OTHER}},
    "any key before an average": {"net": OWN, "ema": {"module": OTHER}},
    "an average alone": {"model_ema": OWN},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_all_is_found(kind):
    model = Tiny()
    extra = {"an average in a callback": "net.", "averaged": ""}.get(kind)
    contents = WHOLE[kind]
    if extra:  # beside the network, below a prefix, lies another weight
        contents = contents | {"state_dict": prefixed(OWN, extra) | {"loss.weight": torch.ones(1)}}
    report = load_pretrained(model, contents)
    assert has_loaded(model, OWN)
    assert report.missing == ()


DINO = {
    "student": prefixed(without_head(OTHER), "module.backbone.") | {"module.head.mlp.weight": torch.ones(2)},
    "teacher": prefixed(without_head(OWN), "backbone.") | {"head.mlp.weight": torch.ones(2)},
}
BODY = {
    "DINO": DINO,
    "DINO in one": prefixed(without_head(OTHER), "student.backbone.")
    | prefixed(without_head(OWN), "teacher.backbone."),
    "mmseg": {
        "meta": {"epoch": 1},
        "state_dict": prefixed(without_head(OWN), "backbone.") | {"decode_head.conv.weight": torch.ones(2)},
    },
    "parts": {"backbone": without_head(OWN), "head": {"weight": torch.ones(2)}},
    "children by index": nn.Sequential(*list(Tiny().children())[:-1]).state_dict(),
    "children by index below a prefix": prefixed(
        nn.Sequential(*list(Tiny().children())[:-1]).state_dict(), "backbone."
    ),
}


@pytest.mark.parametrize("kind", BODY)
def test_the_backbone_is_found(kind):
    model = Tiny()
    report = load_pretrained(model, BODY[kind])
    assert set(report.missing) == {"fc.weight", "fc.bias"}
    assert "index" in kind or has_loaded(model, without_head(OWN))


def test_what_was_used_is_reported_and_can_be_chosen():
    report = load_pretrained(Tiny(), DINO)
    assert (report.source, report.alternatives) == ("teacher", ("student",))
    assert "source     teacher; --weights_key chooses another (student)" in str(report)
    model = Tiny()
    load_pretrained(model, DINO, key="student")
    assert has_loaded(model, without_head(OTHER))
    report = load_pretrained(model, BODY["DINO in one"])
    assert "outside of teacher.backbone.*, which is used" in report.unexpected.values()
    load_pretrained(model, BODY["DINO in one"], key="student")
    assert has_loaded(model, without_head(OTHER))


@pytest.mark.parametrize(
    "contents",
    [
        {"net_a": OWN, "net_b": OTHER},
        [OWN, OTHER],
        {"folds": {"0": {"state_dict": OWN}, "1": {"state_dict": OTHER}}},
        prefixed(OWN, "one.") | prefixed(OTHER, "two."),
    ],
)
def test_a_choice_that_is_the_users_is_refused_with_a_flag_that_works(contents, tmp_path):
    torch.save(contents, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth") as error:
        load_pretrained(Tiny(), tmp_path / "two.pth")
    flag, key = re.search(r"--(weights_key) (\S+)", str(error.value)).groups()
    model = Tiny()
    load_pretrained(model, tmp_path / "two.pth", **{flag.removeprefix("weights_"): key})
    assert has_loaded(model, OWN)
    with pytest.raises(ValueError, match=r"under 'nothing', which is no key; its keys are|under 'nothing'"):
        load_pretrained(Tiny(), contents, key="nothing")


def test_the_flag_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hyspark.cli.commands.third_party_network", lambda args, argv: Tiny())
    torch.save({"a": OWN, "b": OTHER}, tmp_path / "two.pth")
    with pytest.raises(SystemExit) as stopped:
        main(["weights", str(tmp_path / "two.pth"), "--model", "tiny"])
    assert stopped.value.code == 2
    assert "2 state dicts match equally well: a, b" in capsys.readouterr().err
    main(["weights", str(tmp_path / "two.pth"), "--model", "tiny", "--weights_key", "b"])
    said = capsys.readouterr().out
    assert "matched      23 keys, covering 100.0% of the model's parameters (100% of its 23 tensors)" in said


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ([torch.ones(1)] * 3, "a list with 3 tensors without names"),
        ({"optimizer": ADAM.state_dict(), "epoch": 1}, "only the keys optimizer, epoch"),
        ({"conv1.weight": OWN["conv1.weight"]} | {f"x.{i}": torch.ones(1) for i in range(9)}, "1 of the network's 23"),
        (prefixed(OWN, "encoder.layer.0.attention."), None),
        ({f"encoder.layer.{i}.attention.q": torch.ones(1) for i in range(9)}, "Hugging Face transformers"),
        ({f"res2.{i}.conv1.norm.weight": torch.ones(1) for i in range(9)}, "those of detectron2"),
        ({f"m{i}": value for i, value in enumerate(OWN.values())}, "by names of another library"),
        ({f"m{i}.kernel": torch.ones(1) for i in range(9)}, "JAX or Keras"),
    ],
)
def test_what_does_not_match_is_refused_with_the_likeliest_reason(contents, says):
    if says is None:  # the right names under an unusual prefix match
        assert load_pretrained(Tiny(), contents).missing == ()
        return
    with pytest.raises(ValueError, match=re.escape(says)):
        load_pretrained(Tiny(), contents)


BAD = {
    "a NaN": (lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), "36 of 144 numbers are not finite"),
    "an infinity": (lambda x: x / 0, "144 of 144 numbers are not finite"),
    "beyond the range": (lambda x: x.double() * 1e300, "beyond the range of torch.float32"),
    "integers": (lambda x: (100 * x).to(torch.int8), "got torch.int8; it is quantised"),
    "no numbers": (lambda x: x.to("meta"), "its shape but no numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_refused_by_key(kind):
    change, says = BAD[kind]
    model = Tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"the state dict: layer1\.0\.weight: .*{re.escape(says)}"):
        load_pretrained(model, OWN | {"layer1.0.weight": change(OWN["layer1.0.weight"])})
    assert has_loaded(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype):
    model, weights = Tiny(), {key: value.to(dtype) for key, value in OWN.items()}
    assert load_pretrained(model, weights).missing == ()
    assert has_loaded(model, weights)
    assert model.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["model.", "net.", "network.", "module.model.", "net.module."])
def test_this_packages_networks_below_a_holder(make_hybird, prefix):
    model, source = make_hybird(1, 3, 32), make_hybird(1, 3, 32).state_dict()
    report = load_pretrained(model, {"network_weights": {prefix + key: value for key, value in source.items()}})
    assert report.missing == ()
    assert has_loaded(model, source)
