"""What a file of fine-tuning holds, from the file or its run folder."""

import pytest
import torch

from hyspark.evaluation.network_kind import kind_of_network


def test_the_kind_is_read_from_the_file_or_its_run_folder(tmp_path):
    contents = {"model": {}, "config": {}, "classes": ["background", "liver"]}
    torch.save(contents, tmp_path / "best.pth")
    assert kind_of_network(tmp_path) == "segmentation"
    torch.save(contents | {"weights": "best.pth after 3 steps"}, tmp_path / "best.pth")
    assert kind_of_network(tmp_path) == kind_of_network(tmp_path / "best.pth") == "classification"


def test_files_without_a_fine_tuned_network_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no best\.pth"):
        kind_of_network(tmp_path)
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: expected a fine-tuned network, got weights without settings"):
        kind_of_network(tmp_path / "x.pth")
    torch.save({"model": {}, "config": {}, "optimizer": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="got a state to continue training from"):
        kind_of_network(tmp_path / "x.pth")
