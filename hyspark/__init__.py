"""HySparK: pre-train a hybrid CNN + transformer on unlabelled CT by masking, and fine-tune it for segmentation.

The names are imported when they are asked for: what needs no network, such as a process that reads volumes, does not
wait for the libraries of networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyspark.models.hidden import hidden
    from hyspark.models.pretraining import build_hyspark
    from hyspark.models.pyramid import build_spark
    from hyspark.models.segmentation import build_hybird
    from hyspark.models.weights import LoadReport, load_pretrained

HOMES = {
    "LoadReport": "hyspark.models.weights",
    "build_hybird": "hyspark.models.segmentation",
    "build_hyspark": "hyspark.models.pretraining",
    "build_spark": "hyspark.models.pyramid",
    "hidden": "hyspark.models.hidden",
    "load_pretrained": "hyspark.models.weights",
}
"""Modules of the public names."""
__all__ = ["LoadReport", "build_hybird", "build_hyspark", "build_spark", "hidden", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
