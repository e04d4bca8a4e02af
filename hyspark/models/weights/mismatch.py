"""Errors for files whose names are not a network's, with the likeliest reason and what to do."""

import re
from collections.abc import Mapping

from torch import Tensor

OWN_ALONE = (
    "; HySparK's networks take HySparK's weights alone, `hyspark weights` and classification take others by --model"
)
"""What to add for a network of this package."""
BY_FACTORY = "give a function that builds it, --model PACKAGE.MODULE:FACTORY"
LIKELY_REASONS = {
    r"(^|\.)embeddings\.(layer\d|stem)\.": (
        "they are those of HySparK's own network; drop --model, and give a prefix of the names by --weights_key"
    ),
    r"(^|\.)conv_blocks_context\.\d+\.\d+\.(conv|norm)\d\.": f"they are those of STU-Net; {BY_FACTORY}",
    r"(^|\.)(conv_blocks_context|encoder\.stages\.\d+\.(\d+\.convs|blocks\.\d+\.conv\d)|stages\.\d+\.\d+\.convs)\.": (
        f"they are those of nnU-Net; give its plan, --model nnunet/PLANS.json, or {BY_FACTORY.removeprefix('give ')}"
    ),
    r"(^|\.)(down_tr\d+|up_tr\d+)\.": f"they are those of the 3D U-Net of Models Genesis and SuPreM; {BY_FACTORY}",
    r"(^|\.)layers[1-4]\.0\.(0\.)?blocks\.": (
        f"they are those of Swin UNETR; {BY_FACTORY} (monai.networks.nets.SwinUNETR)"
    ),
    r"(^|\.)(encoder\.)?(conv_init|layers\.\d+\.blocks\.\d+\.conv\d)\.": (
        f"they are those of MONAI's SegResNetDS or VISTA3D; {BY_FACTORY} (monai.networks.nets.SegResNetDS)"
    ),
    r"(^|\.)model\.(\d+\.)+submodule\.": f"they are those of MONAI's UNet; {BY_FACTORY} (monai.networks.nets.UNet)",
    r"(^|\.)(convInit|down_layers)\.": "they are those of MONAI's SegResNet (--model monai/segresnet)",
    r"(^|\.)image_encoder\.blocks\.": "they are those of Segment Anything (--model timm/samvit_base_patch16)",
    r"(^|\.)visual\.transformer\.resblocks\.": "they are those of CLIP (--model timm/vit_base_patch16_clip_224)",
    r"(^|\.)(embedder\.embedder\.|encoder\.(stages|layer)\.\d+\.(layers|attention)\.|embeddings\.patch_embeddings\.)": (
        "they are those of Hugging Face transformers; use a file of timm or torchvision"
    ),
    r"(^|\.)(stem\.conv1\.norm\.|res[2-5]\.\d+\.(shortcut|conv1)\.norm\.)": (
        "they are those of detectron2, whose ResNets may stride elsewhere; use the file from which it was converted"
    ),
    r"(^|\.)(res\d+_\d+_branch|conv1_w$)": "they are those of Caffe2; use a file of timm or torchvision",
    r"(^|[./])(kernel|scale)$": "they are those of JAX or Keras, whose axes differ; use a file of PyTorch",
    r"(qweight|qzeros|_packed_params|\.scale_weight|\.SCB)$": "they are quantised; use the weights before quantisation",
    r"(^|\.)layer[1-4]\.\d+\.(conv|bn)[123]\.": (
        "they are those of a ResNet (--model timm/resnet50, torchvision/resnet50, or monai/resnet50 for volumes)"
    ),
    r"(^|\.)features\.denseblock\d": "they are those of a DenseNet (--model torchvision/densenet121)",
    r"(^|\.)features\.\d+\.\d+\.(block|attn|mlp|layer_scale)\b": (
        "they are those of torchvision's networks (--model torchvision/convnext_tiny, torchvision/swin_t, ...)"
    ),
    r"(^|\.)layers\.\d\.blocks\.\d+\.attn\.": (
        "they are those of a Swin transformer (--model timm/swin_tiny_patch4_window7_224)"
    ),
    r"(^|\.)(stages\.\d\.\d+\.(dwconv|pwconv1)|stages\.\d\.blocks\.\d+\.conv_dw)\.": (
        "they are those of a ConvNeXt (--model timm/convnext_tiny)"
    ),
    r"(^|\.)[4-7]\.\d+\.(conv|bn)[123]\.": "they are those of a ResNet by index (--model timm/resnet50)",
    r"(^|\.)blocks\.(\d+\.)+attn\.": "they are those of a vision transformer (--model timm/vit_base_patch16_224)",
    r"(lora_[AB]\.|\.adapter)": "they are an adapter (LoRA) of a network; merge it into the network first",
}
"""Reasons why names do not match, by a pattern of names."""


def no_match_error(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str, more: str = "") -> ValueError:
    """Create the error for a state dict without a key of the model, with more to say of such files."""
    return ValueError(
        f"{name}: none of its {len(given)} keys is one of the model's (its first is {next(iter(given))!r}, "
        f"the model's {next(iter(wanted))!r}); {likely_reason(given, wanted)}{more}"
    )


def few_match_error(num: int, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> ValueError:
    """Create the error for a state dict of which few keys are the model's, which may be by chance."""
    return ValueError(
        f"{name}: {num} of the network's {len(wanted)} tensors match by name, and the file has {len(given)} (its first "
        f"is {next(iter(given))!r}, the model's {next(iter(wanted))!r}); expected half of them; "
        f"{likely_reason(given, wanted)}"
    )


def likely_reason(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Find the likeliest reason why the names of a file do not match a network's."""
    for pattern, reason in LIKELY_REASONS.items():
        if sum(bool(re.search(pattern, key)) for key in given) >= 0.05 * len(given):
            return f"its names are not the model's: {reason}"
    rest = [tuple(value.shape) for value in wanted.values()]
    same = 0
    for value in given.values():
        if tuple(value.shape) in rest:
            rest.remove(tuple(value.shape))
            same += 1
    if same >= 0.8 * len(wanted):
        return f"{same} tensors have the shapes of the model's: it may be this network by names of another library"
    return (
        "they are those of no network that is known here; load it into its own network: load_pretrained(network, ...), "
        "or --model PACKAGE.MODULE:FACTORY by a function that builds it"
    )
