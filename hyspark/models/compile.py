"""torch.compile for the repeated blocks of this package's networks, one by one."""

from timm.models.vision_transformer import Block
from torch import nn

from hyspark.models.blocks import FusionBlock, MedNeXtBlock, MedNeXtUpBlock
from hyspark.models.light_decoder import LightDecoderLevel

BLOCKS = (MedNeXtBlock, MedNeXtUpBlock, FusionBlock, LightDecoderLevel, Block)
VARIANTS = 64
"""Compiled versions of one type of block that torch may keep, one per width and shape. Its own limit is 8."""


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compile every block of a network in place.

    The names of the weights stay. A block is compiled at its first call, once per shape of its input.

    Args:
        network: the network, on any device.
        backend: backend of torch.compile.

    Returns:
        The number of blocks.
    """
    import torch._dynamo.config as dynamo  # takes seconds, and few runs compile

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)
