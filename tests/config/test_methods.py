"""The methods of pre-training that are listed are those of the settings."""

from dataclasses import replace

from hyspark.config.pretrain import METHODS, PretrainConfig, list_methods


def test_every_listed_method_is_one_of_the_settings():
    assert list_methods() == list(METHODS) == ["hyspark", "spark", "moco", "byol", "swav"]
    config = PretrainConfig(exp_name="a", data="b", out="c")
    for method in list_methods():
        assert replace(config, model=method if method == "hyspark" else f"{method}/timm/resnet18").method == method
