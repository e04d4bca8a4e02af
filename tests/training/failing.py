"""What a process under torchrun is part of: rank 1 fails, or is killed, while rank 0 waits for it.

torchrun --standalone --nproc_per_node=2 -m tests.training.failing HOW
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from hyspark.cli.run_verb import run_verb
from hyspark.training import distributed
from hyspark.training.signals import catch_stop_signals


def fail(argv: list[str]) -> None:
    """Fail on rank 1 before the ranks join, or inside of what they do together."""
    (how,) = argv
    processes = distributed.find_processes("cpu")
    if how == "early" and processes.rank == 1:
        Path("missing.nii.gz").stat()
    with catch_stop_signals(), distributed.join_process_group(processes):
        if how in ("killed", "stopped") and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":  # here, by torchrun, as soon as it sees that rank 1 was killed
            time.sleep(60)
        distributed.mean_over_processes(torch.zeros(1), processes)


if __name__ == "__main__":
    run_verb(fail, sys.argv[1:])
