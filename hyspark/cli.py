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
from typing import Any

from tap import to_tap_class

from hyspark.config import nearest
from hyspark.config_classify import ClassifyConfig
from hyspark.config_finetune import FinetuneConfig
from hyspark.config_pretrain import PretrainConfig
from hyspark.flags import (
    BenefitArguments,
    CheckArguments,
    ClassifyArguments,
    CompareArguments,
    DatalistArguments,
    EvaluateArguments,
    ExportArguments,
    PhantomArguments,
    PredictArguments,
    SlicesArguments,
    WeightsArguments,
)
from hyspark.recipes import ConfigT, field_help, read_yaml


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


def check(argv: Sequence[str]) -> None:
    """Look for everything that is wrong with a data set."""
    args = parse(CheckArguments(prog="hyspark check", allow_abbrev=False), argv)
    from hyspark import check_page
    from hyspark.data.check import check as look
    from hyspark.data.estimate import estimate
    from hyspark.data.settings import PrepareSettings

    examined, found = look(Path(args.data), hu_min=args.hu_min, num_workers=args.prepare_workers)
    cost = estimate(examined, PrepareSettings(spacing=args.spacing, hu_min=args.hu_min))
    lines = check_page.facts(examined, cost, args.spacing)
    print(check_page.text(examined, found.findings, lines))
    print(f"\nreport {check_page.write(Path(args.out), args.data, examined, found.findings, lines, cost)}")
    if any(finding.severity != "note" for finding in check_page.all_findings(examined, found.findings)):
        sys.exit(1)


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


def finetune_classify(argv: Sequence[str]) -> None:
    """Fine-tune for the classification of images (finetune_classify.py)."""
    config = read_config(ClassifyConfig, "hyspark finetune_classify", argv)
    from hyspark.engine.classify import finetune_classify as run

    run(config)


def weights(argv: Sequence[str]) -> None:
    """Print what of a weights file fits the segmentation network, or another one."""
    from hyspark.models.weights import load_pretrained

    args = parse(WeightsArguments(prog="hyspark weights", allow_abbrev=False), argv)
    print(load_pretrained(other_network(args) if args.model else segmentation_network(args), args.path))


def segmentation_network(args: WeightsArguments) -> Any:
    """The segmentation network that the flags describe."""
    from hyspark.models.segmentation import build_hybird

    return build_hybird(
        args.in_channel or 1,
        args.n_classes,
        args.img_size[0] if len(args.img_size) == 1 else args.img_size,
        widths=args.encoder_widths,
        depths=args.encoder_depths,
        expansions=args.expansions,
        vit_depth=args.vit_depth,
        num_heads=args.num_heads,
        decoder=args.decoder,
        decoder_width=args.decoder_width,
        decoder_min_width=args.decoder_min_width,
    )


def other_network(args: WeightsArguments) -> Any:
    """The network of others that the flags name; raises ValueError for flags of the segmentation network."""
    from hyspark.models.zoo import build_backbone

    own = [
        *("n_classes", "encoder_widths", "encoder_depths", "expansions", "vit_depth", "num_heads"),
        *("decoder", "decoder_width", "decoder_min_width"),
    ]
    if given := [name for name in own if getattr(args, name) != getattr(WeightsArguments, name)]:
        raise ValueError(f"{', '.join(given)}: of the segmentation network; leave out for {args.model}")
    of_images = args.model.startswith(("timm/", "torchvision/"))
    axes = len(args.img_size) if len(args.img_size) > 1 else 2 if of_images else 3
    return build_backbone(args.model, args.in_channel or (3 if of_images else 1), axes).network


def export(argv: Sequence[str]) -> None:
    """Write pre-trained weights as one small .safetensors file, or a ResNet for detectron2."""
    import torch

    from hyspark.models.detection import write_detectron2
    from hyspark.models.export import export_weights

    args = parse(ExportArguments(prog="hyspark export", allow_abbrev=False), argv)
    if args.detectron2 and args.decoder:
        raise ValueError("--decoder is of pre-training; detectron2 has none, leave it out")
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[args.precision]
    if args.detectron2:
        weights = write_detectron2(args.source, Path(args.out), dtype)
    else:
        weights = export_weights(args.source, Path(args.out), dtype, decoder=args.decoder)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    print(f"{args.out}: {len(weights)} tensors, {millions:.2f} M numbers, {Path(args.out).stat().st_size / 1e6:.2f} MB")


def phantom(argv: Sequence[str]) -> None:
    """Write procedural CTs to try things with."""
    from hyspark.data.phantom import write_phantoms

    args = parse(PhantomArguments(prog="hyspark phantom", allow_abbrev=False), argv)
    write_phantoms(Path(args.out), num_labelled=args.num_labelled, num_unlabelled=args.num_unlabelled, seed=args.seed)


def slices(argv: Sequence[str]) -> None:
    """Write CTs, NIfTI or DICOM, as folders of PNG slices."""
    args = parse(SlicesArguments(prog="hyspark slices", allow_abbrev=False), argv)
    from hyspark.data import slices as data
    from hyspark.data.settings import PictureSettings

    low, high = args.hu_min, args.hu_max
    if args.scaling == "window":
        low = PretrainConfig.hu_min if low is None else low
        high = PretrainConfig.hu_max if high is None else high
    try:
        record = data.write_slices(
            [Path(source) for source in args.source],
            Path(args.out),
            PictureSettings(
                axis=args.axis, stride=args.stride, scaling=args.scaling, hu_min=low, hu_max=high, size=args.size
            ),
            val_fraction=args.val_fraction,
            seed=args.seed,
            min_slices=args.min_slices,
            num_workers=args.prepare_workers,
        )
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    print(data.summary(record))
    print(f"written to {args.out}; every volume: {Path(args.out) / data.RECORD}")
    for failed in record["failed"]:
        print(f"not read: {failed['source']}: {failed['why']}", file=sys.stderr)
    if record["failed"]:
        sys.exit(1)


def compare(argv: Sequence[str]) -> None:
    """Print the Dice of fine-tuning runs side by side."""
    args = parse(CompareArguments(prog="hyspark compare", allow_abbrev=False), argv)
    from hyspark.engine.dice_file import read_scores
    from hyspark.engine.evaluate import have_same_cases
    from hyspark.report import dice_table

    folders = [Path(f) for f in args.folders]
    unique = len({folder.name for folder in folders}) == len(folders)
    titles = {folder: folder.name if unique else str(folder) for folder in folders}
    print("Dice, best weights of each run")
    print(dice_table({titles[folder]: read_scores(folder)["best"] for folder in folders}, difference=True))
    if not have_same_cases(folders):
        print("WARNING: the runs were validated on different cases, so that these numbers cannot be compared")
    for folder in folders:
        print(f"{titles[folder]}: report {folder / 'report.html'}, pictures {folder / 'pictures'}")


def evaluate(argv: Sequence[str]) -> None:
    """Score a fine-tuned network on labelled cases."""
    args = parse(EvaluateArguments(prog="hyspark evaluate", allow_abbrev=False), argv)
    from hyspark.engine import evaluate as engine
    from hyspark.engine.scorebook import text_table

    summary = engine.evaluate(
        Path(args.weights),
        Path(args.data),
        Path(args.out),
        part=args.part,
        scoring=engine.Scoring(args.overlap, args.flips, args.largest_component, args.tolerance),
        device=args.device,
        store_dir=args.store_dir,
        prepare_workers=args.prepare_workers,
    )
    print(text_table(summary))
    print(f"scores of each case, table, protocol and pictures: {args.out}")


def predict(argv: Sequence[str]) -> None:
    """Write label maps for volumes."""
    args = parse(PredictArguments(prog="hyspark predict", allow_abbrev=False), argv)
    from hyspark.engine import predict as engine
    from hyspark.engine.evaluate import Scoring

    failures = engine.predict(
        Path(args.weights),
        [Path(path) for path in args.inputs],
        Path(args.out),
        scoring=Scoring(args.overlap, args.flips, args.largest_component),
        device=args.device,
        num_workers=args.prepare_workers,
        overwrite=args.overwrite,
    )
    for why in failures.values():
        print(f"not predicted: {why}", file=sys.stderr)
    if failures:
        sys.exit(1)


def classify(argv: Sequence[str]) -> None:
    """Write class probabilities for images, and scores where they lie in folders of the classes."""
    args = parse(ClassifyArguments(prog="hyspark classify", allow_abbrev=False), argv)
    from hyspark.class_scores import metrics_text
    from hyspark.engine import classified as engine

    summary = engine.classify(Path(args.weights), Path(args.images), Path(args.out), args.device)
    if summary:
        print(f"{metrics_text(summary['metrics'])} on {summary['protocol']['num_images']} images")
    print(f"probabilities of each image: {Path(args.out) / 'predictions.csv'}")


def benefit(argv: Sequence[str]) -> None:
    """Fine-tune from several starts at several numbers of labels, and report what pre-training gives."""
    parser = BenefitArguments(prog="hyspark benefit", allow_abbrev=False)
    args = parser.parse_args(list(argv), known_only=True)
    config_class: Any = {"segment": FinetuneConfig, "classify": ClassifyConfig}[args.task]
    base = read_config(config_class, "hyspark benefit", args.extra_args, also=options(parser))
    from hyspark.engine import benefit as engine

    starts = engine.read_starts(args.starts)
    try:
        failed = engine.benefit(
            base,
            Path(args.out),
            starts,
            engine.numbers_of(base, args.num_labelled, args.label_fractions),
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


def run(function: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a verb; an error that this package raised for the user becomes one message and exit code 2, or 1 for a
    failed training.
    """
    try:
        function(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if not isinstance(error, OSError) and not raised_here(error):
            raise
        # One of each machine speaks, whose disk or data may be the cause.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
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
