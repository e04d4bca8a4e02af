import pickle

import pytest
import torch

from hyspark.engine import checkpoint


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "state.pth"
    checkpoint.save({"a": torch.ones(3)}, path)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save({"a": lambda: None}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_training_state_survives_the_disk(tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "state.pth"
    checkpoint.save(checkpoint.training_state(7, {"bs": 4}, "2 cases", model=layer, optimizer=optimizer), path)
    state = checkpoint.read_training_state(path)
    assert (state["step"], state["config"], state["data"]) == (7, {"bs": 4}, "2 cases")
    assert torch.equal(state["model"]["weight"], layer.weight)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(1)}, "weights only"),
        ({"optimizer": {}, "format": 99}, "format 99"),
    ],
)
def test_what_cannot_be_continued_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        checkpoint.read_training_state(path)


def test_a_torn_file_is_named(tmp_path):
    path = tmp_path / "torn.pth"
    checkpoint.save({"optimizer": {}, "format": 1, "x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn\.pth"):
        checkpoint.read_training_state(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        checkpoint.read_training_state(tmp_path / "missing.pth")
