"""The `hyspark` command: its verbs. Modules are imported when a verb is called, so that the help is fast."""

import sys
from collections.abc import Sequence
from importlib import import_module

from hyspark.cli.run_verb import run_verb
from hyspark.utils.exit_codes import DONE, WRONG_USE
from hyspark.utils.text import nearest
from hyspark.utils.version import VERSION

VERB_GROUPS = {
    "data": {
        "datalist": "Write dataset.json from nnU-Net folders (generate_js.py).",
        "check": "Find everything that is wrong with a data set.",
        "phantom": "Write procedural CTs in nnU-Net layout.",
        "import": "Convert DICOM, NRRD and other scans to a data set in nnU-Net layout, without names of patients.",
        "slices": "Write CTs, NIfTI or DICOM, as folders of PNG slices.",
    },
    "train": {
        "pretrain": "Pre-train a network on unlabelled CT or MR (train.py).",
        "finetune": "Fine-tune the segmentation network on labelled CT or MR (finetune_btcv.py).",
        "finetune-classifier": "Fine-tune a classifier on labelled images.",
    },
    "use": {
        "predict": "Predict label maps of volumes, or class probabilities of images.",
        "evaluate": "Score a fine-tuned network on labelled cases.",
        "embed": "Compute a vector per volume or region from an encoder, and probe the vectors for labels.",
    },
    "weights": {
        "weights": "Print which keys of a weights file fit a network.",
        "export": "Write pre-trained weights as one small .safetensors file, or in the form of another program.",
    },
    "study": {
        "benefit": "Fine-tune from several initial weights on several numbers of labels, and report the differences.",
        "compare": "Print the scores of fine-tuning runs side by side.",
    },
}
"""Verbs by purpose, with their help; each is a function of hyspark.cli.commands, with _ for -."""
VERBS = {verb: text for verbs in VERB_GROUPS.values() for verb, text in verbs.items()}
EARLIER = {"finetune_classify": "finetune-classifier", "classify": "classify"}
"""Verbs of earlier versions, which still work and are not listed, with their present functions."""
FUNCTIONS = {**EARLIER, "import": "import_scans"}
"""Functions whose names are not those of their verbs; import is a word of Python's own."""
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> None:
    """Call the verb that comes first, with the words behind it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--version":
        print(f"hyspark {VERSION}")
        return
    if argv and argv[0] == "--completion":
        run_verb(lambda words: import_module("hyspark.cli.completion").print_completion(words), argv[1:])
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(DONE if argv else WRONG_USE)
    if argv[0] not in (*VERBS, *EARLIER):
        print(
            f"error: no verb {argv[0]!r}; the verbs are {', '.join(VERBS)}{nearest(argv[0], VERBS)}",
            file=sys.stderr,
        )
        sys.exit(WRONG_USE)
    function = FUNCTIONS.get(argv[0], argv[0]).replace("-", "_")
    run_verb(lambda words: getattr(import_module("hyspark.cli.commands"), function)(words), argv[1:])


def usage() -> str:
    """Write the verbs in their groups."""
    lines = [
        "usage: hyspark VERB [flags]",
        "       hyspark VERB --help             the flags of a verb, with an example",
        "       hyspark --version",
        f"       hyspark --completion SHELL      a completion script, for {', '.join(SHELLS)}",
    ]
    for group, verbs in VERB_GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:21s}{text}" for verb, text in verbs.items())]
    return "\n".join(lines)
