"""The forms of `hyspark export`: a flag chooses one, and a function writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hyspark.cli.arguments import ExportArguments

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""Types of the numbers in a file, by their flag."""


class Form(NamedTuple):
    """A form of export.

    Attributes:
        write: Writes it, and returns the lines to print.
        reads: Flags that it reads, beside the source and the file to write.
    """

    write: Callable[[ExportArguments], str]
    reads: tuple[str, ...]


def write_form(args: ExportArguments) -> str:
    """Write the form that the flags choose.

    Args:
        args: The flags.

    Returns:
        The lines to print.

    Raises:
        ValueError: Two forms are chosen, or a flag is given that the form does not read; further errors as of the form.
    """
    chosen = [name for name in FORMS if name and getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in chosen)}: expected one form; give one of them")
    name = chosen[0] if chosen else ""
    flags = {flag for form in FORMS.values() for flag in form.reads} - set(FORMS[name].reads)
    if unread := sorted(flag for flag in flags if getattr(args, flag) != getattr(ExportArguments, flag)):
        form = f"with --{name}" if name else "without a flag of the form that reads it"
        raise ValueError(f"{', '.join(f'--{flag}' for flag in unread)}: not read {form}; drop it")
    return FORMS[name].write(args)


def write_safetensors(args: ExportArguments) -> str:
    """Write the encoder, or all of a pre-training network, as a .safetensors file."""
    from hyspark.models.weights.export import export_weights

    out = Path(args.out)
    weights = export_weights(args.source, out, DTYPES[args.precision], decoder=args.decoder, key=args.weights_key)
    return count_numbers(out, weights)


def write_resnet(args: ExportArguments) -> str:
    """Write a ResNet in detectron2's names."""
    from hyspark.models.weights.detectron2 import write_detectron2

    out = Path(args.out)
    return count_numbers(out, write_detectron2(args.source, out, DTYPES[args.precision], key=args.weights_key))


def write_hub_folder(args: ExportArguments) -> str:
    """Write a folder for the Hugging Face Hub."""
    from hyspark.exports.hub_folder import export_to_hub
    from hyspark.exports.model_card import CardFacts

    out = Path(args.out)
    about = Path(args.about).read_text(encoding="utf-8") if args.about else ""
    name = args.repo.rpartition("/")[2] or out.resolve().name
    facts = CardFacts(name, args.license, args.datasets, about, args.repo)
    scores = [Path(folder) for folder in args.scores]
    folder = export_to_hub(args.source, out, facts, scores=scores, decoder=args.decoder, key=args.weights_key)
    lines = [
        count_numbers(out / "model.safetensors", folder.weights),
        f"{out}: {folder.config['network']}, the same as {args.source}; read README.md, then: "
        f"hf upload {args.repo or 'OWNER/NAME'} {out}",
    ]
    return "\n".join(lines + ([] if args.license else ["README.md states no licence; --license NAME adds it"]))


def write_nnunet_weights(args: ExportArguments) -> str:
    """Write the network of an nnU-Net plan, for nnU-Net's own training."""
    from hyspark.exports.nnunet import write_nnunet

    if not args.plans:
        raise ValueError("--nnunet: expected --plans PLANS.json, the plan to train")
    return write_nnunet(args.source, args.plans, Path(args.out), args.weights_key)


def write_onnx_file(args: ExportArguments) -> str:
    """Write a fine-tuned segmentation network as ONNX."""
    from hyspark.exports.deploy import export_onnx

    return export_onnx(Path(args.source), Path(args.out), args.check)


def write_torchscript_file(args: ExportArguments) -> str:
    """Write a fine-tuned segmentation network as TorchScript."""
    from hyspark.exports.deploy import export_torchscript

    return export_torchscript(Path(args.source), Path(args.out), args.check)


def write_bundle_folder(args: ExportArguments) -> str:
    """Write a fine-tuned segmentation network as a MONAI bundle."""
    from hyspark.exports.deploy import export_bundle

    return export_bundle(Path(args.source), Path(args.out), args.check)


def count_numbers(file: Path, weights: Mapping[str, Tensor]) -> str:
    """Write the name of a file with its tensors, numbers and size."""
    millions = sum(value.numel() for value in weights.values()) / 1e6
    return f"{file}: {len(weights)} tensors, {millions:.2f} M numbers, {file.stat().st_size / 1e6:.2f} MB"


FORMS: Mapping[str, Form] = {
    "": Form(write_safetensors, ("weights_key", "precision", "decoder")),
    "detectron2": Form(write_resnet, ("weights_key", "precision")),
    "hf": Form(write_hub_folder, ("weights_key", "decoder", "license", "datasets", "scores", "about", "repo")),
    "nnunet": Form(write_nnunet_weights, ("weights_key", "plans")),
    "onnx": Form(write_onnx_file, ("check",)),
    "torchscript": Form(write_torchscript_file, ("check",)),
    "bundle": Form(write_bundle_folder, ("check",)),
}
"""The forms by their flag; the first one needs none."""
