"""Pre-train HySparK on unlabelled CT.

    python train.py --exp_name=debug --data_path=./data --model=hyspark --bs=4 --exp_dir=ckpt/debug
    python train.py --config configs/pretrain_coarse_cpu.yaml --data_path data
    torchrun --nproc_per_node=4 train.py --config configs/pretrain.yaml --data_path data --bs 12

The same command continues an interrupted run; --help lists every setting. The same as `hyspark pretrain`.
"""

from hyspark.cli.commands import pretrain
from hyspark.cli.exit_codes import run

if __name__ == "__main__":
    run(pretrain)
