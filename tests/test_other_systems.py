"""Every module can be imported without what only POSIX systems have, as on Windows."""

import subprocess
import sys
from pathlib import Path

import hyspark

ROOT = Path(hyspark.__file__).parents[1]
MEASURES_MEMORY = {"hyspark.data.preprocessing.estimate", "hyspark.reports.data_check_page"}
"""Modules that still need `resource`."""
OF_NNUNET = {"hyspark.nnunet_trainers.nnUNetTrainer_HySparK"}
"""Modules that nnU-Net alone imports."""
CODE = """
import importlib, os, pkgutil, signal, sys
import torch, torch.distributed, torch.utils.tensorboard, matplotlib.figure, monai, timm, nibabel, pydicom, PIL.Image
import scipy.ndimage, sklearn.metrics, blosc2, isal.igzip, filelock, psutil, tap, yaml, jinja2, tqdm.contrib.logging
for name in ("resource", "fcntl", "termios", "pwd", "grp", "posix"):
    sys.modules[name] = None
for module, names in ((os, "sched_getaffinity fork getuid killpg setsid uname"), (signal, "SIGUSR1 SIGKILL SIGALRM")):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
import hyspark
names = [found.name for found in pkgutil.walk_packages(hyspark.__path__, "hyspark.")]
assert len(names) > 100
for name in names:
    if name != "hyspark.__main__":
        try:
            importlib.import_module(name)
        except Exception as error:
            print(name, repr(error))
from hyspark.utils.processes import STOP_SIGNALS, available_cores
assert STOP_SIGNALS == (signal.SIGTERM,)
assert available_cores() >= 1
"""


def test_every_module_is_imported_without_posix():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed = {line.split()[0] for line in done.stdout.splitlines()}
    assert failed <= MEASURES_MEMORY | OF_NNUNET, done.stdout
