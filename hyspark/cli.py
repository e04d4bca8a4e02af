"""Command lines: flags -> settings -> one call. The scripts at the top level and the `hyspark` command are these
functions.
"""

import os
import sys
import traceback
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tap import Tap, to_tap_class

from hyspark.config import FinetuneConfig, PretrainConfig, nearest
from hyspark.recipes import ConfigT, field_help, read_yaml


class DatalistArguments(Tap):
    """Write dataset.json for every Dataset*/imagesTr below a folder."""

    data_path: str = "data"  # Folder with nnU-Net data sets (DatasetXXX_Name/imagesTr), or one of them
    output: str = ""  # Where to write; by default <data_path>/dataset.json
    labels: bool = False  # Labelled cases only, each with its label, for fine-tuning
    splits: str = ""  # A splits.json, or auto: each data set's own splits.json, else a seeded split by subject
    val_fraction: float = 0.2  # Share of subjects in the validation part of a seeded split
    seed: int = 0  # Seed of the split
    channel: str = "0000"  # Which channel's files to list
    organize_from: str = ""  # First link the NIfTI files below this folder into --organize_to
    organize_to: str = ""  # nnU-Net data set folder to make, e.g. data/Dataset042_Mine
    copy: bool = False  # Copy files instead of linking them


class WeightsArguments(Tap):
    """Load weights into the segmentation network and print what matched."""

    path: str  # A .pth, .pt or .safetensors file
    in_channel: int = 1  # Input channels
    n_classes: int = 14  # Classes, background included
    img_size: tuple[int, ...] = (96,)  # Crop size, one number or one per axis
    encoder_widths: tuple[int, ...] = PretrainConfig.encoder_widths  # Channels of the five stages
    encoder_depths: tuple[int, ...] = PretrainConfig.encoder_depths  # Blocks in the five stages
    expansions: tuple[int, ...] = PretrainConfig.expansions  # Expansion in the five stages
    vit_depth: int = PretrainConfig.vit_depth  # Transformer blocks
    num_heads: int = PretrainConfig.num_heads  # Attention heads

    def configure(self) -> None:
        self.add_argument("path")


class ExportArguments(Tap):
    """Write the encoder of a checkpoint as one small .safetensors file, to hand on."""

    source: str  # A pre-training checkpoint or encoder file, or a fine-tuned network
    out: str  # The .safetensors file to write
    precision: Literal["fp16", "fp32"] = "fp16"  # Number format in the file

    def configure(self) -> None:
        self.add_argument("source")
        self.add_argument("out")


class PhantomArguments(Tap):
    """Write procedural labelled and unlabelled CTs in nnU-Net layout, to try things with."""

    out: str = "data/demo"  # Folder to write to
    num_labelled: int = 6  # Cases with labels
    num_unlabelled: int = 12  # Cases without
    seed: int = 0  # Seed of the anatomy


class CompareArguments(Tap):
    """Print the Dice of fine-tuning runs side by side."""

    folders: list[str]  # Run folders

    def configure(self) -> None:
        self.add_argument("folders", nargs="+")


class BenefitArguments(Tap):
    """Does pre-training pay? Fine-tune from several starts with the same seeds, cases and budget, and report what
    differs. Flags of `hyspark finetune` (--config, --data_dir, --max_steps, ...) go to all runs.
    """

    out: str  # Folder of the runs and the report; the same command on it continues
    starts: list[str]  # NAME=FILE, or NAME=none for one from scratch; the others are compared with the first
    num_labelled: list[int]  # Numbers of labelled training cases
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds; each draws its labelled cases, batches and fresh weights
    jobs: int = 1  # Runs side by side
    plan: bool = False  # Print the runs and which are finished; run nothing


def datalist(argv: Sequence[str]) -> None:
    """Write dataset.json from nnU-Net folders (generate_js.py)."""
    from hyspark.data import datalist as lists
    from hyspark.data.organize import organize_by_names

    args = parse(DatalistArguments(prog="hyspark datalist", allow_abbrev=False), argv)
    if bool(args.organize_from) != bool(args.organize_to):
        raise ValueError(
            "--organize_from and --organize_to go together: the folder of loose files, and the data set to make"
        )
    if args.organize_from:
        num = organize_by_names(Path(args.organize_from), Path(args.organize_to), copy=args.copy)
        print(f"{num} images {'copied' if args.copy else 'linked'} into {args.organize_to}/imagesTr")
    found = lists.build(
        Path(args.data_path),
        labels=args.labels,
        channel=args.channel,
        splits=args.splits,
        val_fraction=args.val_fraction,
        seed=args.seed,
    )
    path = Path(args.output) if args.output else Path(args.data_path) / "dataset.json"
    lists.write(found, path)
    for dataset, numbers in lists.counts(found).items():
        print(f"{dataset}: " + ", ".join(f"{num} {kind.replace('_', ' ')}" for kind, num in numbers.items()))
    print(f"written to {path}")


def pretrain(argv: Sequence[str]) -> None:
    """Pre-train on unlabelled CT (train.py)."""
    config = read_config(PretrainConfig, "hyspark pretrain", argv)
    from hyspark.engine.pretrain import pretrain as run

    run(config)


def finetune(argv: Sequence[str]) -> None:
    """Fine-tune for segmentation (finetune_btcv.py)."""
    config = read_config(FinetuneConfig, "hyspark finetune", argv)
    from hyspark.engine.finetune import finetune as run

    run(config)


def weights(argv: Sequence[str]) -> None:
    """Print what of a weights file fits the segmentation network."""
    from hyspark.models.segmentation import build_hybird
    from hyspark.models.weights import load_pretrained

    args = parse(WeightsArguments(prog="hyspark weights", allow_abbrev=False), argv)
    size = args.img_size[0] if len(args.img_size) == 1 else args.img_size
    model = build_hybird(
        args.in_channel,
        args.n_classes,
        size,
        widths=args.encoder_widths,
        depths=args.encoder_depths,
        expansions=args.expansions,
        vit_depth=args.vit_depth,
        num_heads=args.num_heads,
    )
    print(load_pretrained(model, args.path))


def export(argv: Sequence[str]) -> None:
    """Write an encoder as one small .safetensors file."""
    import torch

    from hyspark.models.export import export_encoder

    args = parse(ExportArguments(prog="hyspark export", allow_abbrev=False), argv)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[args.precision]
    weights = export_encoder(args.source, Path(args.out), dtype)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    print(f"{args.out}: {len(weights)} tensors, {millions:.2f} M numbers, {Path(args.out).stat().st_size / 1e6:.2f} MB")


def phantom(argv: Sequence[str]) -> None:
    """Write procedural CTs to try things with."""
    from hyspark.data.phantom import write_phantoms

    args = parse(PhantomArguments(prog="hyspark phantom", allow_abbrev=False), argv)
    write_phantoms(Path(args.out), num_labelled=args.num_labelled, num_unlabelled=args.num_unlabelled, seed=args.seed)


def compare(argv: Sequence[str]) -> None:
    """Print the Dice of fine-tuning runs side by side."""
    args = parse(CompareArguments(prog="hyspark compare", allow_abbrev=False), argv)
    from hyspark.engine.evaluate import read_scores
    from hyspark.report import dice_table

    folders = [Path(f) for f in args.folders]
    unique = len({folder.name for folder in folders}) == len(folders)
    titles = {folder: folder.name if unique else str(folder) for folder in folders}
    print("Dice, best weights of each run")
    print(dice_table({titles[folder]: read_scores(folder)["best"] for folder in folders}, difference=True))
    for folder in folders:
        print(f"{titles[folder]}: report {folder / 'report.html'}, pictures {folder / 'pictures'}")


def benefit(argv: Sequence[str]) -> None:
    """Fine-tune from several starts at several numbers of labels, and report what pre-training gives."""
    parser = BenefitArguments(prog="hyspark benefit", allow_abbrev=False)
    args = parser.parse_args(list(argv), known_only=True)
    base = read_config(FinetuneConfig, "hyspark benefit", args.extra_args, also=options(parser))
    from hyspark.engine import benefit as engine

    starts = engine.read_starts(args.starts)
    try:
        failed = engine.benefit(
            base,
            Path(args.out),
            starts,
            args.num_labelled,
            args.seeds,
            num_at_once=args.jobs,
            plan_only=args.plan,
        )
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(1)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "datalist": datalist,
    "pretrain": pretrain,
    "finetune": finetune,
    "weights": weights,
    "export": export,
    "phantom": phantom,
    "compare": compare,
    "benefit": benefit,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `hyspark` command: a verb, then its flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hyspark VERB [flags]; hyspark VERB --help lists the flags\n")
        for name, function in VERBS.items():
            print(f"  {name:10s}{(function.__doc__ or '').strip()}")
        sys.exit(0 if argv else 2)
    if argv[0] not in VERBS:
        print(
            f"error: no verb {argv[0]!r}; the verbs are {', '.join(VERBS)}{nearest(argv[0], VERBS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    run(VERBS[argv[0]], argv[1:])


def run(function: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a verb; an error that this package raised for the user becomes one message and exit code 2, or 1 for a
    failed training.
    """
    try:
        function(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if not isinstance(error, OSError) and not raised_here(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code; others keep their traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parent in Path(last.filename).parents


def options(parser: Any) -> list[str]:
    """The flags that a parser knows."""
    return [option for action in parser._actions for option in action.option_strings]


def parse(parser: Any, argv: Sequence[str], also: Sequence[str] = ()) -> Any:
    """Parsed flags; raises ValueError, naming the nearest flag, for an unknown one.

    also: flags of the command that were parsed before.
    """
    args = parser.parse_args(list(argv), known_only=True)
    if args.extra_args:
        flag = args.extra_args[0].split("=")[0]
        raise ValueError(f"unknown argument {flag!r}{nearest(flag, [*also, *options(parser)])}; --help lists all")
    return args


def read_config(config_class: type[ConfigT], prog: str, argv: Sequence[str], also: Sequence[str] = ()) -> ConfigT:
    """Settings from defaults, then the YAML that --config names, then flags. Every field is a flag.

    also: of `parse`.
    Raises ValueError for an unknown key or flag and for values that do not fit.
    """
    base: Any = to_tap_class(config_class)
    help_texts = field_help(config_class)

    class Flags(base):
        def configure(self) -> None:
            self.add_argument("--config", type=str, default="", help="YAML recipe (see configs/); flags override it")
            for field in fields(config_class):
                assert field.default is not MISSING
                extra = {"action": BooleanOptionalAction} if isinstance(field.default, bool) else {}
                text = help_texts[field.name].replace("%", "%%") + " (default: %(default)s)"
                self.add_argument(f"--{field.name}", default=field.default, help=text, **extra)

    parser = Flags(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    path = recipe_path(argv)
    if path:
        parser.set_defaults(**read_yaml(path, config_class))
    args = parse(parser, argv, also)
    return config_class(**{f.name: getattr(args, f.name) for f in fields(config_class)})


def recipe_path(argv: Sequence[str]) -> str:
    """The value of --config (the last one, as for every flag), or nothing."""
    path = ""
    for word, following in pairwise([*argv, ""]):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config":
            path = following
    return path
