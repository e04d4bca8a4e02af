"""Command lines: flags -> settings -> one call; of the `hyspark` command and the scripts at the top level."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import unwrap
from pathlib import Path
from typing import Any

from hyspark.cli.arguments import (
    BenefitArguments,
    CheckArguments,
    ClassifyArguments,
    CompareArguments,
    DatalistArguments,
    EmbedArguments,
    EvaluateArguments,
    ExportArguments,
    ImportArguments,
    NetworkArguments,
    PhantomArguments,
    PredictArguments,
    SlicesArguments,
    WeightsArguments,
)
from hyspark.cli.parsing import check_values, given_flags, options, parse, present_words, read_config
from hyspark.config.checks import not_negative, positive
from hyspark.config.classification import ClassificationConfig
from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig, network_options
from hyspark.config.shared import EncoderSettings
from hyspark.utils.exit_codes import FOUND, INTERRUPTED
from hyspark.utils.settings import field_info


def datalist(argv: Sequence[str]) -> None:
    """Write dataset.json from nnU-Net folders (generate_js.py)."""
    from hyspark.data.datasets import build, datalist_json
    from hyspark.data.datasets.organize import organize_by_names
    from hyspark.data.datasets.subjects import warn_of_split

    args = parse(DatalistArguments(prog="hyspark datalist", allow_abbrev=False), argv)
    if bool(args.organize_from) != bool(args.organize_to):
        raise ValueError(
            "--organize_from and --organize_to go together: the folder of loose files, and the data set to make"
        )
    channels = channel_numbers(args.channel)
    if args.organize_from:
        num = organize_by_names(Path(args.organize_from), Path(args.organize_to), copy=args.copy, channels=channels)
        print(f"{num} images {'copied' if args.copy else 'linked'} into {args.organize_to}/imagesTr")
    found = build.build_datalist(
        Path(args.data),
        labels=args.labels,
        channels=channels,
        splits=args.splits,
        val_fraction=args.val_fraction,
        seed=args.seed,
        subject_regex=args.subject_regex,
        fold=args.fold,
    )
    for line in found.unused:
        print(line, file=sys.stderr)
    if args.splits and args.val_fraction:
        warn_of_split(found.training, found.validation, args.subject_regex)
    path = Path(args.out) if args.out else Path(args.data) / "dataset.json"
    datalist_json.write_datalist(found, path)
    for dataset, numbers in build.count_cases(found).items():
        print(f"{dataset}: " + ", ".join(f"{num} {kind.replace('_', ' ')}" for kind, num in numbers.items()))
    print(f"written to {path}")


def channel_numbers(words: Sequence[str]) -> tuple[int, ...]:
    """Convert the words of --channel to numbers.

    Raises:
        ValueError: A word is no number of up to four digits, or one comes twice.
    """
    if not words or len(set(map(int, filter(str.isdecimal, words)))) < len(words) or max(map(len, words)) > 4:
        raise ValueError(
            f'--channel: expected numbers as in nnU-Net\'s file names ("0000", or 0 1), got {" ".join(words)!r}'
        )
    return tuple(map(int, words))


def check(argv: Sequence[str]) -> None:
    """Find everything that is wrong with a data set."""
    args = parse(CheckArguments(prog="hyspark check", allow_abbrev=False), argv)
    not_negative(args, "prepare_workers")
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing: expected mm above 0 on each axis, got {args.spacing}")
    from hyspark.data.preprocessing.estimate import estimate_preparation
    from hyspark.data.quality.check import check_dataset
    from hyspark.data.settings import PrepareSettings
    from hyspark.reports import data_check_page

    given = {field.name: getattr(args, field.name) for field in fields(PrepareSettings)}
    settings = PrepareSettings(**given)
    examined, found = check_dataset(Path(args.data), num_workers=args.prepare_workers, **given)
    cost = estimate_preparation(examined, settings)
    lines = data_check_page.data_set_facts(examined, cost, args.spacing)
    print(data_check_page.data_check_text(examined, found.findings, lines))
    page = data_check_page.write_data_check(Path(args.out), args.data, examined, found.findings, lines, cost)
    print(f"\nreport {page}")
    if any(finding.severity != "note" for finding in data_check_page.all_findings(examined, found.findings)):
        sys.exit(FOUND)


def pretrain(argv: Sequence[str]) -> None:
    """Pre-train a network on unlabelled CT or MR (train.py)."""
    config = read_config(PretrainConfig, "hyspark pretrain", argv)
    from hyspark.tasks.pretrain import run_pretraining

    run_pretraining(config)


def finetune(argv: Sequence[str]) -> None:
    """Fine-tune the segmentation network on labelled CT or MR (finetune_btcv.py)."""
    config = read_config(SegmentationConfig, "hyspark finetune", argv)
    from hyspark.tasks.segmentation import run_segmentation

    name_unscored(config, run_segmentation(config))


def finetune_classifier(argv: Sequence[str]) -> None:
    """Fine-tune a classifier on labelled images."""
    config = read_config(ClassificationConfig, "hyspark finetune-classifier", argv)
    from hyspark.tasks.classification import run_classification

    name_unscored(config, run_classification(config))


def weights(argv: Sequence[str]) -> None:
    """Print which keys of a weights file fit a network."""
    args = parse(WeightsArguments(prog="hyspark weights", allow_abbrev=False), argv)
    not_negative(args, "in_channels")
    positive(args, "out_channels")
    from hyspark.models.weights.load import load_pretrained
    from hyspark.training.initial_weights import describe_inputs

    network = third_party_network(args, argv) if args.model else planned_network(args, argv)
    network = network or segmentation_network(args)
    report = load_pretrained(network, args.path, args.weights_key)
    print("\n".join([str(report), *describe_inputs(report.made_with)]))


def segmentation_network(args: WeightsArguments) -> Any:
    """Build the segmentation network that the flags describe."""
    from hyspark.models.segmentation import build_hybird

    return build_hybird(
        args.in_channels or 1,
        args.out_channels,
        args.crop_size[0] if len(args.crop_size) == 1 else args.crop_size,
        **network_options(args),
    )


def third_party_network(args: WeightsArguments, argv: Sequence[str]) -> Any:
    """Build the third-party network that the flags name; raise ValueError for flags of the segmentation network."""
    from hyspark.models.backbones import build_backbone
    from hyspark.models.nnunet_plans import is_plan, read_plan, split_plan_name

    check_third_party_flags(args, argv, args.model)
    of_images = args.model.startswith(("timm/", "torchvision/"))
    planned = len(read_plan(*split_plan_name(args.model)).schemes) if is_plan(args.model) else 1
    axes = len(args.crop_size) if len(args.crop_size) > 1 else 2 if of_images else 3
    edges: tuple[int, ...] = ()
    if "crop_size" in given_flags(args, argv):
        edges = args.crop_size * (axes if len(args.crop_size) == 1 else 1)
    return build_backbone(args.model, args.in_channels or (3 if of_images else planned), axes, edges).network


def planned_network(args: WeightsArguments, argv: Sequence[str]) -> Any:
    """Build the network of the nnU-Net plan that the file of weights holds; None if it holds none."""
    from hyspark.config.nnunet import plan_in_file
    from hyspark.models.nnunet_network import build_from_plan
    from hyspark.models.weights.files import made_with, read_contents

    contents = read_contents(args.path)
    plan = plan_in_file(contents, args.path)
    if plan is None:
        return None
    check_third_party_flags(args, argv, f"the network of the plan {plan.name}, which {args.path} holds")
    channels = made_with(contents).get("image_channels", plan.schemes)
    return build_from_plan(plan, args.in_channels or len(channels)).network


def check_third_party_flags(args: WeightsArguments, argv: Sequence[str], name: str) -> None:
    """Raise ValueError for flags of the segmentation network, which a third-party one does not read."""
    own = ("out_channels", *field_info(EncoderSettings), "decoder", "decoder_width", "decoder_min_width")
    if given := [flag for flag in own if flag in given_flags(args, argv)]:
        raise ValueError(f"{', '.join(given)}: not read for {name}, but for the segmentation network; drop them")


def export(argv: Sequence[str]) -> None:
    """Write pre-trained weights as one small .safetensors file, or in the form of another program."""
    args = parse(ExportArguments(prog="hyspark export", allow_abbrev=False), argv)
    from hyspark.cli.export_forms import write_form

    print(write_form(args))


def phantom(argv: Sequence[str]) -> None:
    """Write procedural CTs in nnU-Net layout."""
    from hyspark.data.synthetic.phantom import write_phantoms

    args = parse(PhantomArguments(prog="hyspark phantom", allow_abbrev=False), argv)
    write_phantoms(Path(args.out), num_labelled=args.num_labelled, num_unlabelled=args.num_unlabelled, seed=args.seed)


def slices(argv: Sequence[str]) -> None:
    """Write CTs, NIfTI or DICOM, as folders of PNG slices."""
    args = parse(SlicesArguments(prog="hyspark slices", allow_abbrev=False), argv)
    from hyspark.data.settings import PictureSettings
    from hyspark.data.slices import record as slices_record
    from hyspark.data.slices import write_slices

    low, high = args.hu_min, args.hu_max
    if args.scaling == "window":
        low = PretrainConfig.hu_min if low is None else low
        high = PretrainConfig.hu_max if high is None else high
    try:
        record = write_slices.write_slices(
            [Path(source) for source in args.source],
            Path(args.out),
            PictureSettings(
                axis=args.axis, stride=args.stride, scaling=args.scaling, hu_min=low, hu_max=high, size=args.size
            ),
            val_fraction=args.val_fraction,
            seed=args.seed,
            min_slices=args.min_slices,
            keep_patient_id=args.keep_patient_id,
            num_workers=args.prepare_workers,
        )
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(slices_record.summarise_slices(record))
    print(f"written to {args.out}; every volume: {Path(args.out) / slices_record.RECORD}")
    for failed in record["failed"]:
        print(f"not read: {failed['source']}: {failed['why']}", file=sys.stderr)
    if record["failed"]:
        sys.exit(FOUND)


def import_scans(argv: Sequence[str]) -> None:
    """Convert DICOM, NRRD and other scans to a data set in nnU-Net layout, without names of patients."""
    args = parse(ImportArguments(prog="hyspark import", allow_abbrev=False), argv)
    not_negative(args, "prepare_workers")
    if args.slice_spacing and min(args.slice_spacing) <= 0:
        raise ValueError(f"--slice_spacing: expected mm above 0 on each axis, got {args.slice_spacing}")
    if args.label_names and not args.labels:
        raise ValueError("--label_names: read with --labels alone; add --labels")
    from hyspark.data.importing import choice, import_labels, pseudonyms, record, summary, write
    from hyspark.data.structures.class_names import read_class_names

    classes = read_class_names(Path(args.label_names)) if args.label_names else None
    labels = None
    salt_file = Path(args.salt_file) if args.salt_file else pseudonyms.default_salt_file()
    try:
        with record.hold_data_set(Path(args.out)):
            imported = write.import_volumes(
                [Path(source) for source in args.sources],
                Path(args.out),
                choice.Choice(
                    args.modality,
                    args.choose,
                    args.kernel,
                    args.series_description,
                    args.min_slices,
                    args.max_thickness,
                ),
                salt_file=salt_file,
                slice_spacing=args.slice_spacing,
                keep_descriptions=args.keep_descriptions,
                private_table=Path(args.private_table) if args.private_table else None,
                num_workers=args.prepare_workers,
            )
            if args.labels:
                labels = import_labels.import_labels(imported, classes, num_workers=args.prepare_workers)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(summary.summarise_import(imported, salt_file))
    if labels:
        print(import_labels.summarise_labels(labels, imported.out))
    for source, why in imported.failed:
        print(f"not imported: {source}: {why}", file=sys.stderr)
    for fault in labels.faults if labels else ():
        print(f"no label: {fault}", file=sys.stderr)
    if imported.cases:
        print("next:", *summary.next_commands(imported), sep="\n  ")
    if imported.failed or (labels and labels.faults):
        sys.exit(FOUND)


def compare(argv: Sequence[str]) -> None:
    """Print the scores of fine-tuning runs side by side."""
    args = parse(CompareArguments(prog="hyspark compare", allow_abbrev=False), argv)
    from hyspark.comparison.side_by_side import runs_text

    print(runs_text([Path(folder) for folder in args.folders]))


def evaluate(argv: Sequence[str]) -> None:
    """Score a fine-tuned network on labelled cases."""
    args = parse(EvaluateArguments(prog="hyspark evaluate", allow_abbrev=False), argv)
    from hyspark.evaluation.classification.scores import metrics_text
    from hyspark.evaluation.segmentation.scores import summary_text
    from hyspark.tasks import api

    evaluate_data = unwrap(api.evaluate)  # with flags, not arguments, in its messages
    options = given_options(args, argv)
    evaluation = evaluate_data(args.weights, args.data, args.out, device=args.device, **options)
    if not is_main_process():
        return
    summary = evaluation.summary
    if "metrics" in summary:
        print(f"{metrics_text(summary['metrics'])} on {summary['protocol']['num_images']} images")
    else:
        print(summary_text(summary))
    print(f"scores of each case, protocol and pictures: {args.out}")
    name_failures("not scored", evaluation.failures)


def predict(argv: Sequence[str]) -> None:
    """Predict label maps of volumes, or class probabilities of images."""
    args = parse(PredictArguments(prog="hyspark predict", allow_abbrev=False), argv)
    from hyspark.tasks import api

    made = unwrap(api.predict)(args.weights, args.inputs, args.out, device=args.device, **given_options(args, argv))
    if not is_main_process():
        return
    print(
        f"{len(made.files)} written: {made.files[0]}{', ...' if made.files[1:] else ''}"
        if made.files
        else "none written"
    )
    name_failures("not predicted", made.failures)


def embed(argv: Sequence[str]) -> None:
    """Compute a vector per volume or region from an encoder, and probe the vectors for labels."""
    args = parse(EmbedArguments(prog="hyspark embed", allow_abbrev=False), argv)
    from hyspark.tasks import embedding

    given = sorted(given_flags(args, argv) - {"help", "out", "device"})
    made = unwrap(embedding.embed)(
        args.weights, args.inputs, args.out, device=args.device, **{name: getattr(args, name) for name in given}
    )
    if not is_main_process():
        return
    print(embedding.summarise_embeddings(made))
    name_failures("not embedded", made.failures)


def name_unscored(config: SegmentationConfig | ClassificationConfig, folder: Path) -> None:
    """Print a line on each case that a training did not score at its end; exits with FOUND if there are any."""
    from hyspark.evaluation.protocol import unscored_cases

    if not (config.dry_run or config.replay):
        name_failures("not scored", unscored_cases(folder))


def name_failures(title: str, failures: Mapping[str, str]) -> None:
    """Print a line on each case that failed, on the main process; exits with FOUND if there are any."""
    if not failures or not is_main_process():
        return
    for name, why in failures.items():
        print(f"{title}: {why if name in why else f'{name}: {why}'}", file=sys.stderr)
    sys.exit(FOUND)


def is_main_process() -> bool:
    """Check that this process is the one that reports, of those that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def given_options(args: NetworkArguments, argv: Sequence[str]) -> dict[str, Any]:
    """Return the flags of evaluate and predict that are given, except --out and --device."""
    return {name: getattr(args, name) for name in sorted(given_flags(args, argv) - {"help", "out", "device"})}


def classify(argv: Sequence[str]) -> None:
    """Write class probabilities for images, and scores where they lie in folders of the classes."""
    args = parse(ClassifyArguments(prog="hyspark classify", allow_abbrev=False), argv)
    from hyspark.evaluation.classification.predict import predict_and_score
    from hyspark.evaluation.classification.scores import metrics_text

    summary, failures = predict_and_score(Path(args.weights), Path(args.images), Path(args.out), args.device)
    if summary:
        print(f"{metrics_text(summary['metrics'])} on {summary['protocol']['num_images']} images")
    print(f"probabilities of each image: {Path(args.out) / 'predictions.csv'}")
    name_failures("not predicted", failures)


def benefit(argv: Sequence[str]) -> None:
    """Fine-tune from several initial weights on several numbers of labels, and report the differences."""
    parser = BenefitArguments(prog="hyspark benefit", allow_abbrev=False)
    args = parser.parse_args(present_words(argv, parser.old_spellings()), known_only=True)
    check_values(parser, args)
    if (args.engine, args.task) == ("nnunet", "classify"):
        parser.error("--engine nnunet: nnU-Net trains networks for segmentation; drop --task classify")
    config_class: Any = {"segment": SegmentationConfig, "classify": ClassificationConfig}[args.task]
    if args.engine == "nnunet":
        config_class = NnunetTrainingConfig
    base = read_config(config_class, "hyspark benefit", args.extra_args, also=options(parser))
    from hyspark.comparison import benefit as comparison_benefit

    try:
        failed = comparison_benefit.run_comparison(
            base,
            Path(args.out),
            comparison_benefit.read_initial_weights(args.initial_weights),
            comparison_benefit.labelled_numbers(base, args.num_labelled, args.label_fractions),
            args.seeds,
            num_at_once=args.jobs,
            plan_only=args.plan,
        )
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if failed:
        sys.exit(FOUND)
