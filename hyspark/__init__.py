"""HySparK: pre-train a network on unlabelled CT by masking, and fine-tune it for segmentation or classification.

The public names are imported when they are used, so that `import hyspark` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyspark.utils import version

__version__ = version.VERSION

if TYPE_CHECKING:
    from hyspark.config.pretrain import list_methods
    from hyspark.models.backbones import Backbone, list_backbones
    from hyspark.models.hub_networks import Encoder, Segmenter
    from hyspark.models.masked_autoencoder import build_hyspark
    from hyspark.models.masking.context import hidden
    from hyspark.models.masking.packed import packed
    from hyspark.models.segmentation import build_hybird
    from hyspark.models.spark import build_spark
    from hyspark.models.weights.load import LoadReport, load_pretrained
    from hyspark.tasks.api import evaluate, finetune, predict, pretrain
    from hyspark.tasks.embedding import embed

MODULES = {
    "Backbone": "models.backbones",
    "Encoder": "models.hub_networks",
    "LoadReport": "models.weights.load",
    "Segmenter": "models.hub_networks",
    "build_hybird": "models.segmentation",
    "build_hyspark": "models.masked_autoencoder",
    "build_spark": "models.spark",
    "embed": "tasks.embedding",
    "evaluate": "tasks.api",
    "finetune": "tasks.api",
    "hidden": "models.masking.context",
    "list_backbones": "models.backbones",
    "list_methods": "config.pretrain",
    "load_pretrained": "models.weights.load",
    "packed": "models.masking.packed",
    "predict": "tasks.api",
    "pretrain": "tasks.api",
}
"""Modules of the public names."""
__all__ = [
    "Backbone",
    "Encoder",
    "LoadReport",
    "Segmenter",
    "build_hybird",
    "build_hyspark",
    "build_spark",
    "embed",
    "evaluate",
    "finetune",
    "hidden",
    "list_backbones",
    "list_methods",
    "load_pretrained",
    "packed",
    "predict",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"hyspark.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
