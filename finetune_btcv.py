"""Fine-tune the segmentation network on labelled CT: BTCV, or any nnU-Net data set or decathlon list.

    recipe="--config configs/finetune_btcv.yaml --data data/Dataset015_BTCV"
    python finetune_btcv.py $recipe --weights ckpt/encoder.pth --out ckpt/btcv
    python finetune_btcv.py $recipe --weights none --out ckpt/btcv_scratch

The same command continues an interrupted run; --help lists every setting. The same as `hyspark finetune`.
"""

from hyspark.cli.commands import finetune
from hyspark.cli.run_verb import run_verb

if __name__ == "__main__":
    run_verb(finetune)
