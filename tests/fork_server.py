"""Processes without the seconds of their imports: they are forked from a server that has imported everything."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "hyspark.data.preprocessing.estimate",
        "hyspark.data.quality.check",
        "hyspark.evaluation.segmentation.predict",
        "hyspark.planning.trial_steps",
        "hyspark.tasks.classification",
        "hyspark.tasks.pretrain",
        "hyspark.tasks.segmentation",
    ]
)
