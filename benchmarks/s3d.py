"""S3D, nnssl's masked convolutions, from a checkout that the caller names; nothing of it is shipped here.

The convolutions compute every voxel and multiply by the mask. They are used as the trainers of nnssl use them: the
encoder is converted, and the mask is set in their module before a step. The input is masked, which the trainers do not
do. The one module that defines them is loaded by its path, since the package imports what a step does not need.
"""

import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

MODULE = "src/nnssl/architectures/spark_utils.py"
SUPPORTED = (nn.Conv3d, nn.InstanceNorm3d)
"""Layers along positions that are converted with their weights."""
MIXING = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def check(checkout: str) -> None:
    """Raise ValueError if a folder is not a checkout of nnssl."""
    if not (Path(checkout) / MODULE).is_file():
        raise ValueError(f"--nnssl {checkout}: expected a checkout of nnssl with {MODULE}, got none")


@lru_cache
def load(checkout: str) -> ModuleType:
    """Load the module of the masked convolutions."""
    spec = importlib.util.spec_from_file_location("nnssl_spark_utils", Path(checkout) / MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def converts(network: nn.Module) -> bool:
    """Whether all layers of a network that mix positions are converted: 3D convolutions and InstanceNorm."""
    return all(isinstance(module, SUPPORTED) for module in network.modules() if isinstance(module, MIXING))


def convert(network: nn.Module, checkout: str) -> nn.Module:
    """Convert the layers of a network in place."""
    converted: nn.Module = load(checkout).convert_to_spark_cnn(network)
    return converted


def set_mask(visible: Tensor, checkout: str) -> None:
    """Set the mask (b, 1, *grid) of the next step; all samples have equally many visible patches."""
    load(checkout)._cur_active = visible.float()
