"""The `hyspark` command: its verbs."""

import sys
from collections.abc import Callable, Sequence

from hyspark.cli.commands import (
    benefit,
    check,
    classify,
    compare,
    datalist,
    evaluate,
    export,
    finetune,
    finetune_classify,
    phantom,
    predict,
    pretrain,
    slices,
    weights,
)
from hyspark.cli.exit_codes import run
from hyspark.utils.text import nearest

VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "datalist": datalist,
    "check": check,
    "pretrain": pretrain,
    "finetune": finetune,
    "finetune_classify": finetune_classify,
    "weights": weights,
    "export": export,
    "phantom": phantom,
    "slices": slices,
    "evaluate": evaluate,
    "predict": predict,
    "classify": classify,
    "compare": compare,
    "benefit": benefit,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `hyspark` command: a verb, then its flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hyspark VERB [flags]; hyspark VERB --help lists the flags\n")
        for name, function in VERBS.items():
            print(f"  {name:19s}{(function.__doc__ or '').strip()}")
        sys.exit(0 if argv else 2)
    if argv[0] not in VERBS:
        print(
            f"error: no verb {argv[0]!r}; the verbs are {', '.join(VERBS)}{nearest(argv[0], VERBS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    run(VERBS[argv[0]], argv[1:])
