import pickle

import pytest
import torch

from hyspark.training import checkpoint


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
    whole = checkpoint.make_state(7, {"batch_size": 4}, "2 cases", model=layer, optimizer=optimizer)
    checkpoint.save(checkpoint.add_checksum(whole), path)
    state = checkpoint.read_checkpoint(path)
    assert (state["step"], state["config"], state["data"]) == (7, {"batch_size": 4}, "2 cases")
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
        checkpoint.read_checkpoint(path)


def test_a_torn_file_is_named(tmp_path):
    path = tmp_path / "torn.pth"
    checkpoint.save(
        checkpoint.add_checksum({"optimizer": {}, "format": checkpoint.CHECKPOINT_FORMAT, "x": torch.ones(1000)}), path
    )
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn\.pth"):
        checkpoint.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        checkpoint.read_checkpoint(tmp_path / "missing.pth")


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Wherever it lies: the file is refused, or gives the same state (bits that mean nothing, as padding)."""
    path = tmp_path / "state.pth"
    state = {
        "optimizer": {"step": 3},
        "format": checkpoint.CHECKPOINT_FORMAT,
        "model": {"w": torch.arange(600.0), "b": torch.ones(2)},
    }
    checkpoint.save(checkpoint.add_checksum(state), path)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found = checkpoint.read_checkpoint(path)
        except ValueError:
            refused += 1
            continue
        assert checkpoint.checksum(found) == checkpoint.checksum(state)
    assert refused > len(content) // 7 // 2


def test_the_checksum_is_of_all_that_a_state_holds():
    state = {"a": torch.ones(2), "b": {1: [1.0, "x"], 2: torch.zeros(3, dtype=torch.bfloat16)}, "c": torch.ones(())}
    seen = {checkpoint.checksum(state), checkpoint.checksum(dict(reversed(state.items())))}
    assert len(seen) == 1
    for changed in (
        state | {"a": torch.ones(1, 2)},
        state | {"a": torch.ones(2, dtype=torch.float64)},
        state | {"b": {1: [1.0, "y"], 2: state["b"][2]}},
        state | {"b": {1: [1.0], 2: state["b"][2]}},
        state | {"c": torch.zeros(())},
        state | {"d": None},
    ):
        seen.add(checkpoint.checksum(changed))
    assert len(seen) == 7
