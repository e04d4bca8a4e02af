"""Pre-train HySparK on unlabelled CT.

    python train.py --exp_name=debug --data=./data --model=hyspark --batch_size=4 --out=ckpt/debug
    python train.py --config configs/pretrain_coarse_cpu.yaml --data data
    torchrun --nproc_per_node=4 train.py --config configs/pretrain.yaml --data data --batch_size 12

The same command continues an interrupted run; --help lists every setting. The same as `hyspark pretrain`.
"""

from hyspark.cli.commands import pretrain
from hyspark.cli.run_verb import run_verb

if __name__ == "__main__":
    run_verb(pretrain)
