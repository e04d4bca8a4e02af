"""Ranks without torchrun, and so without its seconds: processes of the fork server."""

import os
import socket
import sys
import traceback
from contextlib import closing

import torch

from tests.fork_server import SERVER

TASKS = {
    "PretrainConfig": ("hyspark.tasks.pretrain", "run_pretraining"),
    "SegmentationConfig": ("hyspark.tasks.segmentation", "run_segmentation"),
    "ClassificationConfig": ("hyspark.tasks.classification", "run_classification"),
}


def train_in_ranks(config, world_size=2, prepare=None):
    """Train by a configuration in processes with one thread each, which meet as torchrun's do; each calls `prepare`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    log = config.run_folder.with_suffix(".log")
    processes = [
        SERVER.Process(target=run_rank, args=(config, rank, world_size, port, log, prepare))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world_size, log.read_text()[-3000:]


def run_rank(config, rank, world_size, port, log, prepare):
    """Train as one of several ranks, with the output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    module, name = TASKS[type(config).__name__]
    try:
        getattr(sys.modules[module], name)(config)
    except BaseException:
        traceback.print_exc()
        raise
