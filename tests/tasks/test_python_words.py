"""From Python, messages name arguments; commands in them stay as they are typed."""

import logging

import pytest

import hyspark
from hyspark.tasks.python_words import argument_names, in_python_words
from hyspark.utils.log import LOG


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--overlap: expected 0 <= x < 1, got 2", "overlap: expected 0 <= x < 1, got 2"),
        ("or exclude them with --on_bad_case skip", "or exclude them with on_bad_case='skip'"),
        ("lower the rate, or use --precision fp32.", "lower the rate, or use precision='fp32'."),
        ("use --dataloader_workers 0; the same", "use dataloader_workers=0; the same"),
        ("use --device=cpu", "use device='cpu'"),
        ("--num_labelled and --label_fractions", "num_labelled and label_fractions"),
        ("make it by: hyspark datalist --data d --out e", "make it by: hyspark datalist --data d --out e"),
        ("use torchrun --nproc_per_node=2, or --device cpu", "use torchrun --nproc_per_node=2, or device='cpu'"),
        ("a file a--b.nii.gz", "a file a--b.nii.gz"),
    ],
)
def test_flags_become_arguments(text, expected):
    assert argument_names(text) == expected


def test_errors_and_logs_of_a_call(caplog):
    @in_python_words
    def work():
        LOG.warning("%d of %s; --store_dir names another folder", 2, "--data")
        raise ValueError("--data: no such folder")

    with caplog.at_level(logging.WARNING, "hyspark"), pytest.raises(ValueError, match=r"^data: no such folder"):
        work()
    assert caplog.messages == ["2 of data; store_dir names another folder"]
    assert not LOG.filters


def test_the_public_functions_speak_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data .*: no such file or folder"):
        hyspark.pretrain(data=str(tmp_path / "none"), out=str(tmp_path / "run"))
