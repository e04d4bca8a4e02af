"""Keys of a file that a third-party network does not have: why they may be ignored, and when they may not."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from hyspark.models.weights.prefixes import COUNTER
from hyspark.utils.text import count_of

HEAD_MODULES = (
    *("fc", "_fc", "classifier", "head", "heads", "head_dist", "class_layers", "last_linear", "classification_head"),
    *("aux1", "aux2", "AuxLogits", "segmentation_head", "conv_final", "output_block", "deep_supervision_heads"),
    *("out", "out_tr", "final_conv", "seg_outputs", "seg_layers", "decoder.seg_layers"),
)
"""Modules that give class scores in networks of torchvision, MONAI, nnU-Net and Models Genesis; those of timm declare
theirs.
"""
DECODER_MODULES = (
    *("decoder", "up_layers", "up_samples", "upsamples", "up_projection"),
    *(f"decoder{level}" for level in range(1, 6)),
)
"""Modules behind the encoder in nnU-Net's networks, and in MONAI's FlexibleUNet, SegResNet, DynUNet and Swin UNETR."""
IGNORED_KEYS = {
    r"encoder_k\.": "momentum encoder of MoCo, encoder_q is used",
    r"(val_)?queue\d*(_ptr)?$": "queue of MoCo",
    r"target_network\.": "momentum encoder of BYOL, online_network is used",
    r"online_network\.projector\.": "projection head of BYOL",
    r"online_network\.predictor\.": "predictor of BYOL",
    r"(projection_head|projection|projector|project|proj_head|contrastive_head)\.": "projection head of pre-training",
    r"predict\.": "predictor of BYOL",
    r"(predictor|prediction_head)\.": "predictor of pre-training",
    r"(dino|ibot)_(head|loss|patch_loss)\.": "head of DINO or iBOT",
    r"teacher\.": "momentum encoder of pre-training, encoder is used",
    r"(momentum|ema|target)_\w+\.|(ema|model_ema)\.": "momentum encoder of pre-training",
    r"criterion\.memory_bank\.": "queue of MoCo",
    r"(criterion|loss|losses|loss_fn|loss_func)\.": "part of a loss",
    r"prototypes": "prototypes of SwAV",
    r"decoder_(embed|blocks|norm|pred)\.|decoder_pos_embed$": "decoder of MAE",
    r"(.*\.)?mask_token$": "token of hidden patches in pre-training",
    r"(lm_head|rotation_head|reconstruction_head)\.": "head of pre-training",
    r"encoder\.norm\.": "norm behind the encoder of pre-training",
    r"(dense_decoder|densify_norms|densify_projs|mask_tokens|densify)\.": "decoder of pre-training",
    r"n_averaged$": "number of averaged steps",
    r"(imn_m|imn_s|norm_black)$": "stored by SparK, not used",
    r"((pixel|image)_)?(mean|std)$|normali[sz]\w*\.(mean|std)$": "normalisation of images, no weights",
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|freqs_cis)$": "table, which the network computes",
    rf"({'|'.join(map(re.escape, HEAD_MODULES))})\.": "head of the file's network, not part of this model",
    rf"({'|'.join(DECODER_MODULES)})\.": "decoder, not part of this model",
}
"""Patterns of keys that a file may have beside those of the network, with the reasons."""
TRANSFORMER_TOKENS = {
    r"(register_tokens|reg_token|storage_tokens)$": ("register tokens", "timm/vit_small_patch14_reg4_dinov2"),
    r"dist_token$": ("a distillation token", "timm/deit_tiny_distilled_patch16_224"),
}
"""Tokens that a transformer's blocks compute with, and a network that has them."""


def reason_to_ignore(rest: str, target: str, wanted: Mapping[str, Tensor]) -> str | None:
    """Find the reason to ignore a key that the model does not have; None if there is none."""
    if target.endswith(COUNTER) and target.removesuffix(COUNTER) + ".running_mean" in wanted:
        return "number of batches, which the model's norms do not count"
    return next((why for pattern, why in IGNORED_KEYS.items() if re.match(pattern, rest)), None)


def check_unexplained(unexplained: Mapping[str, str], body: Iterable[str], name: str) -> dict[str, str]:
    """Check the keys of a file without a reason to be ignored; the network's own have all been matched.

    They are ignored beside the network, such as a further head. Within its stages and blocks, or as the next one of
    them, they show that the file is of a larger or another network: what was loaded would compute other features.

    Args:
        unexplained: keys of the file, by their name in the network, its prefix aside.
        body: names of the network, its prefix and its heads aside.
        name: name of the file, for messages.

    Returns:
        The reason by the file's key.

    Raises:
        ValueError: keys lie within the network's stages.
    """
    stages = {stage_of(rest) for rest in body}
    inner = [key for rest, key in unexplained.items() if stage_of(rest) in stages]
    if inner:
        shown = ", ".join(inner[:3]) + (", ..." if len(inner) > 3 else "")
        raise ValueError(
            f"{name}: expected no more layers than the network's, which all match, got "
            f"{count_of(len(inner), 'further key')} in its stages ({shown}); the file is of a larger network, or of "
            "another of its family: use that one (--model)"
        )
    return dict.fromkeys(unexplained.values(), "not part of this model")


def check_tokens(unexplained: Mapping[str, str], name: str) -> None:
    """Raise ValueError if a file has tokens of a transformer that the network does not have.

    Without them the weights of the blocks would compute other features.

    Args:
        unexplained: keys of the file, by their name in the network, its prefix aside.
        name: name of the file, for messages.
    """
    for rest, key in unexplained.items():
        for pattern, (what, example) in TRANSFORMER_TOKENS.items():
            if re.match(pattern, rest):
                raise ValueError(
                    f"{name}: {key}: the file's network has {what}, this one has none; use one that has, as --model "
                    f"{example}"
                )


def stage_of(key: str) -> str:
    """Return the first part of a name, without a number at its end: `layer` of `layer3.0.conv1.weight`."""
    first, dot, _ = key.partition(".")
    return first.rstrip("0123456789") if dot else key
