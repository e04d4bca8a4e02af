"""HySparK: pre-train a hybrid CNN + transformer on unlabelled CT by masking, and fine-tune it for segmentation.

The names are imported when they are asked for: what needs no network, such as a process that reads volumes, does not
wait for the libraries of networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyspark.models.masked_autoencoder import build_hyspark
    from hyspark.models.masking.context import hidden
    from hyspark.models.segmentation import build_hybird
    from hyspark.models.spark import build_spark
    from hyspark.models.weights.load import LoadReport, load_pretrained

HOMES = {
    "LoadReport": "hyspark.models.weights.load",
    "build_hybird": "hyspark.models.segmentation",
    "build_hyspark": "hyspark.models.masked_autoencoder",
    "build_spark": "hyspark.models.spark",
    "hidden": "hyspark.models.masking.context",
    "load_pretrained": "hyspark.models.weights.load",
}
"""Modules of the public names."""
__all__ = ["LoadReport", "build_hybird", "build_hyspark", "build_spark", "hidden", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
