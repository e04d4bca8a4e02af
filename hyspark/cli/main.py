"""The `hyspark` command: its verbs. What they need is imported when one is called, so that help comes at once."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from hyspark.cli.exit_codes import run
from hyspark.utils.text import nearest

GROUPS = {
    "data": {
        "datalist": "Write dataset.json from nnU-Net folders (generate_js.py).",
        "check": "Look for everything that is wrong with a data set.",
        "phantom": "Write procedural CTs to try things with.",
        "slices": "Write CTs, NIfTI or DICOM, as folders of PNG slices.",
    },
    "train": {
        "pretrain": "Pre-train on unlabelled CT (train.py).",
        "finetune": "Fine-tune for segmentation (finetune_btcv.py).",
        "finetune_classify": "Fine-tune for the classification of images (finetune_classify.py).",
    },
    "use": {
        "predict": "Write label maps for volumes.",
        "evaluate": "Score a fine-tuned network on labelled cases.",
        "classify": "Write class probabilities for images, and scores where they lie in folders of the classes.",
    },
    "weights": {
        "weights": "Print what of a weights file fits the segmentation network, or another one.",
        "export": "Write pre-trained weights as one small .safetensors file, or a ResNet for detectron2.",
    },
    "study": {
        "benefit": "Fine-tune from several starts at several numbers of labels, and report what pre-training gives.",
        "compare": "Print the Dice of fine-tuning runs side by side.",
    },
}
"""Verbs by what they are for, with their help; each is a function of hyspark.cli.commands."""
VERBS = {verb: text for verbs in GROUPS.values() for verb, text in verbs.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Call the verb that comes first with the flags behind it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--version":
        print(f"hyspark {installed_version()}")
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if argv else 2)
    if argv[0] not in VERBS:
        print(
            f"error: no verb {argv[0]!r}; the verbs are {', '.join(VERBS)}{nearest(argv[0], VERBS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    run(getattr(import_module("hyspark.cli.commands"), argv[0]), argv[1:])


def usage() -> str:
    """Write the verbs in their groups."""
    lines = ["usage: hyspark VERB [flags]; hyspark VERB --help lists the flags; hyspark --version"]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:19s}{text}" for verb, text in verbs.items())]
    return "\n".join(lines)


def installed_version() -> str:
    """Look up the version of the installed package."""
    try:
        return version("hyspark")
    except PackageNotFoundError:
        return "(not installed: run from a folder)"
