"""HySparK: pre-train a hybrid CNN + transformer on unlabelled CT by masking, and fine-tune it for segmentation."""

from hyspark.models.hidden import hidden
from hyspark.models.pretraining import build_hyspark
from hyspark.models.pyramid import build_spark
from hyspark.models.segmentation import build_hybird
from hyspark.models.weights import LoadReport, load_pretrained

__all__ = ["LoadReport", "build_hybird", "build_hyspark", "build_spark", "hidden", "load_pretrained"]
