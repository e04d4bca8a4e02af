"""What a MONAI bundle says of its network: configs/metadata.json, docs/README.md, LICENSE."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.intensity import intensities_of
from hyspark.evaluation.protocol import RUN_SCORES, read_summary
from hyspark.evaluation.segmentation.inference import TrainedNetwork
from hyspark.evaluation.segmentation.scores import summary_markdown
from hyspark.utils.version import VERSION

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
"""Address of the schema of metadata.json, which names its version; nothing is loaded from it here."""
LICENSE_TEXT = """The author of this bundle has not stated under which licence its weights may be used: replace this.

The code that it calls, hyspark, is under the Apache License 2.0; MONAI and PyTorch have licences of their own.
"""
SOURCES = ("data", "weights")
"""Keys of a protocol that name files of the machine of the training, which a bundle does not pass on."""


def bundle_metadata(trained: TrainedNetwork, name: str) -> dict[str, Any]:
    """Return configs/metadata.json of a network.

    Args:
        trained: The network.
        name: Name of the bundle.
    """
    config, names = trained.config, trained.names
    modality = modality_text(config)
    channels = {str(i): f"{intensity}, channel {number}" for i, (intensity, number) in enumerate(channels_of(config))}
    is_window = set(intensities_of(config)) == {"ct"}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by hyspark {VERSION}"},
        "monai_version": plain_version("monai"),
        "pytorch_version": plain_version("torch"),
        "numpy_version": plain_version("numpy"),
        "required_packages_version": {
            "hyspark": VERSION,
            "nibabel": plain_version("nibabel"),
            "pytorch-ignite": plain_version("pytorch-ignite"),
        },
        "name": name,
        "task": f"Segmentation of {', '.join(names[1:])} in {modality}",
        "description": f"HySparK fine-tuned for segmentation of {modality}, exported by hyspark {VERSION}.",
        "authors": "",
        "copyright": "",
        "data_type": "nibabel",
        "image_classes": ", ".join(channels.values()),
        "pred_classes": ", ".join(f"{value}: {name}" for value, name in enumerate(names)),
        "intended_use": "Research. Not for diagnosis.",
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor_format(config.in_channels, channels),
                    "format": "hounsfield" if modality == "CT" else "magnitude",
                    "modality": modality,
                    "value_range": [0, 1] if is_window else [],
                }
            },
            "outputs": {
                "pred": {
                    **tensor_format(len(names), {str(value): name for value, name in enumerate(names)}),
                    "format": "segmentation",
                    "value_range": [],
                }
            },
        },
    }


def tensor_format(num_channels: int, channels: Mapping[str, str]) -> dict[str, Any]:
    """Return what the input and the output of the network have in common."""
    return {
        "type": "image",
        "num_channels": num_channels,
        "spatial_shape": ["16*n", "16*n", "16*n"],
        "dtype": "float32",
        "is_patch_data": True,
        "channel_def": dict(channels),
    }


def plain_version(package: str) -> str:
    """Return the version of an installed package without its local part, as in 2.8.0 of 2.8.0+cpu."""
    return version(package).partition("+")[0]


def modality_text(config: SegmentationConfig) -> str:
    """Return the modality that the intensities are of, in words."""
    kinds = set(intensities_of(config))
    if kinds <= {"ct", "ct-zscore"}:
        return "CT"
    return "MR" if kinds == {"mr"} else "images"


def channels_of(config: SegmentationConfig) -> list[tuple[str, int]]:
    """Return intensity and number of each channel that is read."""
    return list(zip(intensities_of(config), config.image_channels, strict=True))


def bundle_readme(trained: TrainedNetwork, source: Path, name: str) -> str:
    """Write docs/README.md: classes, intensities, how to run the bundle, and the scores of the run.

    Args:
        trained: The network.
        source: Its best.pth or run folder.
        name: Name of the bundle.
    """
    config = trained.config
    classes = "\n".join(f"| {value} | {organ} |" for value, organ in enumerate(trained.names))
    flipped = f"\n- left and right: {', '.join(config.left_right)}" if config.left_right else ""
    files = ", ".join(f"CASE_{channel:04d}.nii.gz" for channel in config.image_channels)
    one = files if config.image_channels != (0,) else "CASE.nii.gz, or CASE_0000.nii.gz"
    return f"""# {name}

HySparK, fine-tuned for segmentation of {modality_text(config)}: {", ".join(trained.names[1:])}.
Research use, not for diagnosis.

| value | class |
|---|---|
{classes}

## Input and output

- images: NIfTI, one file per channel ({one})
- spacing of the network: {" x ".join(f"{edge:g}" for edge in config.spacing)} mm, in RAS orientation
- intensities: {intensity_text(config)}
- windows: {" x ".join(map(str, config.crop_shape))} voxels, overlap {config.infer_overlap:g}, Gaussian weights
- training images: {len(trained.trained_on) or "number unknown"}{flipped}

Label maps lie on the grid of their image: the class scores are brought there before the likeliest class is taken. The
scores of the whole image are in memory at once, 4 to 8 bytes per voxel and class; `hyspark predict` needs less.

## Run it

```sh
pip install "hyspark[bundle]"
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir OUT
python -m monai.bundle run --config_file "['configs/inference.json', 'configs/evaluate.json']" \\
    --dataset_dir IMAGES --labels_dir LABELS --output_dir OUT
```

Evaluation pairs images and labels in the order of their names; a label lies on the grid of its image.

## Scores of the training run

{run_scores_text(source)}
"""


def intensity_text(config: SegmentationConfig) -> str:
    """Describe in a line which values the network sees."""
    window = f"HU {config.hu_min:g} to {config.hu_max:g}"
    texts = {
        "ct": f"{window} become 0 to 1",
        "ct-zscore": f"{window}, less {listed(config.input_mean)}, divided by {listed(config.input_std)}",
        "mr": "z-scores by the foreground of each volume",
        "zscore": "z-scores by all voxels of each volume, its border of zeros excluded",
        "none": "the values of the files",
    }
    return "; ".join(f"channel {number}: {texts[intensity]}" for intensity, number in channels_of(config))


def listed(numbers: tuple[float, ...]) -> str:
    """Write numbers of one channel or of each."""
    return " and ".join(f"{number:g}" for number in numbers)


def run_scores_text(source: Path) -> str:
    """Write the scores that a run folder holds, of its validation and its test cases; no path, and no name of a case.

    Args:
        source: A best.pth or run folder.
    """
    folder = source if source.is_dir() else source.parent
    parts = []
    for name, title in zip(RUN_SCORES, ("Validation", "Test"), strict=True):
        if (folder / name / "summary.json").is_file():
            summary = read_summary(folder / name)
            protocol = {key: value for key, value in summary["protocol"].items() if key not in SOURCES}
            shown = {"organs": summary["organs"], "mean": summary["mean"], "protocol": protocol}
            parts.append(f"{title} cases:\n\n{summary_markdown(shown)}")
    return "\n".join(parts) or "None were measured."
