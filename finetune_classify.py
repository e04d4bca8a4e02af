"""Fine-tune a network for the classification of images: folders of classes, or a MedMNIST file.

    python finetune_classify.py --config configs/finetune_covidct.yaml --data data/COVID-CT --weights none \\
        --out ckpt/covidct_scratch
    python finetune_classify.py --config configs/finetune_covidct.yaml --data data/COVID-CT \\
        --weights ckpt/resnet50_spark.pth --label_fraction 0.1 --out ckpt/covidct_spark_10

The same command continues an interrupted run; --help lists every setting. The same as `hyspark finetune_classify`.
"""

from hyspark.cli.commands import finetune_classify
from hyspark.cli.exit_codes import run

if __name__ == "__main__":
    run(finetune_classify)
