"""Model card of a network: README.md with a YAML head that the Hugging Face Hub reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hyspark.evaluation.segmentation.metrics import ORGAN_METRICS
from hyspark.exports.measured_scores import MeasuredScores
from hyspark.models.nnunet_plans import PLANS_KEY
from hyspark.utils.tables import markdown_table
from hyspark.utils.text import flag_text

PIPELINE_TAGS = {"Segmenter": "image-segmentation"}
"""Task of a network on the Hub; that of all others computes features."""
FEATURES = "image-feature-extraction"
CARD_TAGS = ("hyspark", "medical-imaging", "pytorch")
PLACEHOLDER = "OWNER/NAME"
OF_THE_AUTHOR = "PACKAGE.MODULE:FACTORY"
"""Name of a network that its author wrote."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class CardFacts:
    """What the author of a model card states, and its scores.

    Attributes:
        name: Name of the model.
        license: Identifier of the licence of the weights, as the Hub spells it; empty if none is stated.
        datasets: Names of data sets on the Hub that the network was trained on.
        about: Text on the network: data, limits, intended use; Markdown.
        repo: OWNER/NAME on the Hub; empty if it is unknown.
        scores: Its scores.
    """

    name: str
    license: str = ""
    datasets: Sequence[str] = ()
    about: str = ""
    repo: str = ""
    scores: Sequence[MeasuredScores] = field(default_factory=list)

    @property
    def source(self) -> str:
        """What commands call the network: its address, or the folder."""
        return f"hf://{self.repo}" if self.repo else self.name


class Usage(NamedTuple):
    """How a kind of network is described and used: a sentence, Python and a command."""

    summary: str
    python: str
    command: str


def check_facts(facts: CardFacts) -> None:
    """Check what the author states.

    Raises:
        ValueError: The licence or the repository is no identifier of the Hub.
    """
    if facts.license and not LICENSE.fullmatch(facts.license):
        raise ValueError(
            f"--license: expected an identifier of the Hub such as apache-2.0, cc-by-nc-4.0 or other, got "
            f"{facts.license!r}"
        )
    if facts.repo and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", facts.repo):
        raise ValueError(f"--repo: expected {PLACEHOLDER}, got {facts.repo!r}")


def model_card(config: Mapping[str, Any], facts: CardFacts) -> str:
    """Write the model card of a network.

    Args:
        config: Content of its config.json.
        facts: What its author states.
    """
    pipeline = PIPELINE_TAGS.get(config["network"], FEATURES)
    data = ModelCardData(
        license=facts.license or None,
        library_name="hyspark",
        pipeline_tag=pipeline,
        tags=[*CARD_TAGS],
        datasets=[*facts.datasets] or None,
        model_name=facts.name if facts.scores else None,
        eval_results=[result for one in facts.scores for result in eval_results(one, pipeline)] or None,
    )
    usage = describe_usage(config, facts)
    parts = [
        f"# {facts.name}",
        usage.summary,
        "## Use",
        "With the Python package `hyspark`:",
        f"```python\n{usage.python}\n```",
        f"```sh\n{usage.command}\n```",
        "## Input",
        preprocessing_text(config),
        *(["## Scores", *map(scores_text, facts.scores)] if facts.scores else []),
        *(["## About", fit_text(facts.about)] if facts.about.strip() else []),
        "## Limits",
        "Not a medical device, and not for diagnosis. Scores on other scanners, protocols and patients may be lower."
        + ("" if facts.license else " The author states no licence of the weights."),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def fit_text(about: str) -> str:
    """Fit a page into a section: its title goes, headings sink by one level, links to files beside it become text."""
    lines = [line for line in about.strip().splitlines() if not line.startswith("# ")]
    text = re.sub(r"^(##+ )", r"#\1", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+://|#)[^)]*\)", r"\1", text).strip()


def eval_results(scores: MeasuredScores, pipeline: str) -> list[EvalResult]:
    """Convert scores to entries of the card's model-index."""
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=scores.kind,
            dataset_name=scores.cases,
            metric_type=metric,
            metric_value=round(value, 4),
            metric_name=f"{ORGAN_METRICS[metric][0]}, mean over organs",
        )
        for metric, value in scores.mean.items()
    ]


def scores_text(scores: MeasuredScores) -> str:
    """Write scores as a table, with what was scored."""
    means = ", ".join(f"{ORGAN_METRICS[key][0]} {ORGAN_METRICS[key][1].format(x)}" for key, x in scores.mean.items())
    return f"On {scores.cases}, means over organs: {means}. {scores.note}\n\n{markdown_table(scores.table)}"


def preprocessing_text(config: Mapping[str, Any]) -> str:
    """Write what the input of a network is made of, as a table."""
    rows = {name: value for name, value in config.get("preprocessing", {}).items() if value not in ([], None)}
    rows["crop_size"] = config["crop_size"]
    table = [["setting", "value"], *([name, flag_text(value)] for name, value in rows.items())]
    return (
        "Volumes in RAS orientation, resampled to `spacing` (mm), cropped to the foreground. `intensity` says which "
        "values the network sees: `ct` is `hu_min` to `hu_max` as 0 to 1, `ct-zscore` the same window less "
        "`input_mean`, divided by `input_std`; "
        "`mr` z-scores by the foreground of each volume; `zscore` those by all its voxels; "
        "`none` the values of the files.\n\n" + markdown_table(table)
    )


def describe_usage(config: Mapping[str, Any], facts: CardFacts) -> Usage:
    """Describe a network and how to use it."""
    size = ", ".join(map(str, config["crop_size"]))
    crop = f"crop = torch.zeros(1, {config['in_channels']}, {size})  # (batch, channels, *crop_size)"
    if config["network"] == "Segmenter":
        return Usage(
            f"Segmentation network with the classes {', '.join(config['classes'])}.",
            "import torch\n\nimport hyspark\n\n"
            f'network = hyspark.Segmenter.from_pretrained("{facts.source}")\n'
            f"print(network.classes, network.preprocessing)\n\n{crop}\n"
            "scores = network(crop)  # (batch, classes, *crop_size)",
            f"hyspark predict {facts.source} scans --out labels",
        )
    if config["network"] == "Encoder":
        return Usage(
            "Encoder that was pre-trained on unlabelled images by masking, to be fine-tuned.",
            "import torch\n\nimport hyspark\n\n"
            f'network = hyspark.Encoder.from_pretrained("{facts.source}")\n'
            f"print(network.preprocessing)\n\n{crop}\n"
            "features = network(crop)  # five maps, finest first",
            training_command(config, facts.source),
        )
    name = "a network of the author's own" if config["network"] == OF_THE_AUTHOR else f"`{config['network']}`"
    flags = (
        f" --model {config['network']} --in_channels {config['in_channels']} "
        f"--crop_size {flag_text(config['crop_size'])}"
    )
    if PLANS_KEY in config:
        name, flags = "the network of an nnU-Net plan, which `config.json` holds", ""
    return Usage(
        f"Weights of {name}, pre-trained on unlabelled images, by its own key names.",
        f'import hyspark\n\n{building_text(config)}\nprint(hyspark.load_pretrained(network, "{facts.source}"))',
        f"hyspark weights {facts.source}{flags}",
    )


def training_command(config: Mapping[str, Any], source: str) -> str:
    """Write the command that trains on from an encoder: a fine-tuning, or of 2D images a pre-training."""
    edges, rows = config["crop_size"], config.get("preprocessing", {})
    verb = "finetune" if len(edges) == 3 else "pretrain"
    shape = ("crop_size", "encoder_widths", "encoder_depths", "expansions", "vit_depth", "num_heads")
    given = {name: config[name] for name in shape} | rows
    if config["in_channels"] != len(rows.get("image_channels", [0])):
        given["in_channels"] = config["in_channels"]
    if verb == "finetune":
        given |= {"decoder": "light", "decoder_width": config["decoder_width"]} if config["decoder_width"] else {}
        given |= {"rot90_prob": 0} if edges[0] != edges[1] else {}
    else:
        given["crop_size"] = edges[0] if len(set(edges)) == 1 else edges
    flags = [f"--{name} {flag_text(value)}" for name, value in given.items() if value not in ([], None)]
    return " ".join([f"hyspark {verb} --data DATA --weights {source} --out RUN", *flags])


def building_text(config: Mapping[str, Any]) -> str:
    """Write how to build a third-party network in Python."""
    library, _, name = config["network"].partition("/")
    if library == "timm":
        return f'import timm\n\nnetwork = timm.create_model("{name}", in_chans={config["in_channels"]}, num_classes=0)'
    if library == "torchvision":
        return f"import torchvision\n\nnetwork = torchvision.models.{name}()"
    return "network = ...  # the network, built by its own package"
