"""Pre-train HySparK on unlabelled CT.

    python train.py --exp_name=debug --data_path=./data --model=hyspark --bs=4 --exp_dir=debug_hyspark_1
    torchrun --nproc_per_node=4 train.py --exp_name=debug --data_path=./data --model=hyspark --bs=12
    --exp_dir=debug_hyspark_ddp_4 python train.py --config configs/pretrain_cpu.yaml --data_path data

The same command continues an interrupted run; --help lists every setting. The same as `hyspark pretrain`.
"""

from hyspark.cli import pretrain, run

if __name__ == "__main__":
    run(pretrain)
