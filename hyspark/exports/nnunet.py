"""Pre-trained weights as one file for nnU-Net's own training, by two routes.

- `nnUNetv2_train -pretrained_weights` takes `network_weights`: every key of its network but the segmentation layers.
- `nnUNetv2_train_pretrained`, of nnU-Net after version 2.8.1, also reads `nnssl_adaptation_plan` and `citations`.

nnU-Net compares the shapes of weights alone. So axes, spacing, intensity and strides are held against the plan here.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyspark.exports.nnunet_fit import ADVICE, PlanFit, fit_weights
from hyspark.models.axis_order import permute_axes, relative_order
from hyspark.models.nnunet_network import build_network, run_encoder, turn_kernels, turned_architecture
from hyspark.models.nnunet_plans import OWN_SETTINGS, NnunetPlan, read_plan, split_plan_name, to_network_axes
from hyspark.models.weights.files import read_contents
from hyspark.models.weights.load import load_pretrained
from hyspark.training import checkpoint
from hyspark.utils.atomic import whole_path
from hyspark.utils.version import VERSION

SEGMENTATION = ".seg_layers."
"""Part of the names of layers that nnU-Net never loads."""
FEATURE_TOLERANCE = 1e-3
"""Largest difference of features, as a fraction of the largest value, that counts as rounding."""
CITATIONS = {
    "spark": (
        "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for Convolutional "
        "Networks: Sparse and Hierarchical Masked Modeling. ICLR."
    ),
    "moco": (
        "Chen, X., Fan, H., Girshick, R., & He, K. (2020). Improved baselines with momentum contrastive learning. "
        "arXiv:2003.04297."
    ),
    "byol": (
        "Grill, J.-B., et al. (2020). Bootstrap your own latent: A new approach to self-supervised learning. NeurIPS."
    ),
    "swav": (
        "Caron, M., et al. (2020). Unsupervised learning of visual features by contrasting cluster assignments. "
        "NeurIPS."
    ),
}
"""Papers of the methods of pre-training."""
SOFTWARE = (
    "Tang, F., Xu, R., Yao, Q., Fu, X., Quan, Q., Zhu, H., Liu, Z., & Zhou, S. K. (2024). HySparK: Hybrid Sparse "
    "Masking for Large Scale Medical Image Pre-Training. MICCAI."
)


def write_nnunet(source: str | Path, plans: str, out: Path, key: str = "") -> str:
    """Write pre-trained weights for nnU-Net's training of a plan.

    Args:
        source: checkpoint or encoder file of a pre-training run.
        plans: PLANS.json or PLANS.json:CONFIGURATION of the data set to train on.
        out: the .pth file to write.
        key: key of the state dict in the source, see `load_pretrained`.

    Returns:
        The lines to print: what was written, what differs from the plan, the commands to type.

    Raises:
        FileNotFoundError: there is no source or no plan.
        ValueError: `out` does not end in .pth; the weights do not fit the plan, or do not say what they were made with.
        ModuleNotFoundError: dynamic_network_architectures is not installed.
        RuntimeError: the file does not give the features of the weights.
    """
    if out.suffix != ".pth":
        raise ValueError(f"{out}: expected a path that ends in .pth, as nnU-Net's own files")
    plan = read_plan(*split_plan_name(plans))
    contents = read_contents(source)
    fit = fit_weights(contents, Path(source), plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same decoder in every export
        pretrained = build_pretrained(source, plan, fit, key)
        target = build_network(plan.architecture, len(plan.schemes))
    axes = relative_order(fit.axis_order, plan.axis_order)
    encoder = {
        name: turn_kernels(value, axes) for name, value in pretrained.state_dict().items() if is_of_encoder(name)
    }
    target.load_state_dict(target.state_dict() | encoder)
    content = nnunet_content(target, plan, fit)
    with whole_path(out) as path:
        checkpoint.save(content, path)
        difference = largest_difference(pretrained, path, plan, fit)
    encoder_part: Any = target.encoder
    num = sum(value.numel() for value in encoder_part.parameters())
    return "\n".join(
        [
            f"{out}: encoder of {num / 1e6:.2f} M numbers, {out.stat().st_size / 1e6:.2f} MB; its decoder is randomly "
            "initialised, as nnU-Net does",
            f"checked: features of a random crop differ by {difference:.0e} of the largest from those of {source}",
            *fit.notes,
            *commands(plan, out),
        ]
    )


def is_of_encoder(name: str) -> bool:
    """Return whether a key of a U-Net is one of its encoder, not by the alias in its decoder."""
    return name.startswith("encoder.")


def build_pretrained(source: str | Path, plan: NnunetPlan, fit: PlanFit, key: str) -> nn.Module:
    """Build the plan's network in the axes that the weights were made with, and load them.

    Raises:
        ValueError: as `load_pretrained`; or weights of the encoder are missing or were adapted.
    """
    axes = relative_order(plan.axis_order, fit.axis_order)
    network = build_network(turned_architecture(plan.architecture, axes), len(plan.schemes))
    report = load_pretrained(network, source, key)
    if wrong := [name for name in (*report.missing, *report.adapted) if is_of_encoder(name)]:
        raise ValueError(
            f"{source}: expected all weights of the plan's encoder, in their shapes; {len(wrong)} are missing or other "
            f"({', '.join(wrong[:3])}); {ADVICE}"
        )
    return network


def nnunet_content(network: nn.Module, plan: NnunetPlan, fit: PlanFit) -> dict[str, Any]:
    """Make the content of the file, of plain data and tensors alone.

    Args:
        network: the plan's network with the pre-trained encoder.
        plan: the plan.
        fit: what the weights were made with.
    """
    architecture = plan.architecture
    configuration = {
        "spacing": list(to_network_axes(fit.spacing, plan.axis_order)),
        "patch_size": list(to_network_axes(fit.crop_size, plan.axis_order)),
    }
    stem, projections = stem_of(network)
    adaptation = {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"].rpartition(".")[2],
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "architecture_kwargs": architecture["arch_kwargs"],  # of which the dynamic trainer reads kernels and stages
        "pretrain_plan": {"configurations": {plan.configuration: configuration}},
        "pretrain_num_input_channels": len(plan.schemes),
        "recommended_downstream_patchsize": list(to_network_axes(plan.patch_size, plan.axis_order)),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": projections,
        "key_to_lpe": None,
    }
    papers = [("Pre-training method", fit.method, CITATIONS[fit.method])] if fit.method in CITATIONS else []
    return {
        "network_weights": {name: x for name, x in network.state_dict().items() if SEGMENTATION not in name},
        "nnssl_adaptation_plan": adaptation,
        "citations": [
            {"type": kind, "name": name, "apa_citations": [text]}
            for kind, name, text in [*papers, ("Pre-training software", "HySparK", SOFTWARE)]
        ],
        OWN_SETTINGS: {
            "version": VERSION,
            "made_with": fit.settings | {"axis_order": list(plan.axis_order)},  # kernels may have been turned
            "plan": plan.content,
        },
    }


def stem_of(network: nn.Module) -> tuple[str, list[str]]:
    """Find the stem of a U-Net's encoder, and the names of its first convolution, which has an alias.

    A plain encoder has no stem, but a first stage.
    """
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    stem = next(name for name in ("encoder.stem", "encoder.stages.0") if name in names)
    weights = {name: value for name, value in network.state_dict().items() if name.startswith(f"{stem}.")}
    first = next(iter(weights.values())).data_ptr()
    return stem, [name.removesuffix(".weight") for name, value in weights.items() if value.data_ptr() == first]


def largest_difference(pretrained: nn.Module, file: Path, plan: NnunetPlan, fit: PlanFit) -> float:
    """Compare the features of a file, loaded as nnU-Net does, with those of the pre-trained network.

    Args:
        pretrained: network with the weights, in the axes that they were made with.
        file: the file.
        plan: the plan.
        fit: what the weights were made with.

    Returns:
        The largest difference, as a fraction of the largest value of its map.

    Raises:
        RuntimeError: a weight is missing or of another shape, or features differ by more than rounding.
    """
    network = build_network(plan.architecture, len(plan.schemes))
    load_as_nnunet(network, file)
    size = [2 * edge for edge in plan.stride]
    crop = torch.randn(1, len(plan.schemes), *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run_encoder(pretrained.eval(), permute_axes(crop, fit.axis_order))
        found = run_encoder(network.eval(), permute_axes(crop, plan.axis_order))
    axes = relative_order(fit.axis_order, plan.axis_order)
    differences = [
        float((one - permute_axes(other, axes)).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    ]
    if not all(one < FEATURE_TOLERANCE for one in differences):  # NaN too
        shown = ", ".join(f"{one:.2g}" for one in differences)
        raise RuntimeError(
            f"{file.name}: its features differ from those of the weights by {shown} of the largest of each map, "
            "expected rounding; nothing is written"
        )
    return max(differences)


def load_as_nnunet(network: nn.Module, file: Path) -> None:
    """Load a file as `nnUNetv2_train -pretrained_weights` does; raise RuntimeError where that would fail."""
    given = torch.load(file, map_location="cpu", weights_only=True)["network_weights"]
    own = {name: x for name, x in network.state_dict().items() if SEGMENTATION not in name}
    if wrong := [name for name, x in own.items() if name not in given or given[name].shape != x.shape]:
        raise RuntimeError(f"{file}: {len(wrong)} weights are missing or of another shape ({', '.join(wrong[:3])})")
    network.load_state_dict(network.state_dict() | {name: given[name] for name in own})


def commands(plan: NnunetPlan, out: Path) -> list[str]:
    """Write the commands to type for both routes."""
    number = re.sub(r"\D*0*(\d+).*", r"\1", plan.dataset)
    train = f"{number} {shlex.quote(plan.configuration)} 0"
    planned, file = shlex.quote(plan.name), shlex.quote(str(out.absolute()))
    name = re.sub(r"\W+", "_", out.stem)
    lines = ["next, with nnU-Net 2 as released:"]
    lines.append(f"  nnUNetv2_train {train} -p {planned} -pretrained_weights {file}")
    if plan.configuration == "3d_fullres":
        lines.append("or, with an nnU-Net that has nnUNetv2_train_pretrained:")
        lines.append(f"  nnUNetv2_plan_like_dynamic -d {number} -n {name} -pc {file} -pl {planned}")
        lines.append(f"  nnUNetv2_train_pretrained {train} -p ptPlans_dynamic__{name} -tr DynamicPretrainedTrainer")
    return lines
