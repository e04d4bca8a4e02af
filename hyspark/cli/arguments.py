"""The flags of the verbs, but for those of training, which are the fields of its settings (hyspark.config)."""

from typing import Literal, get_args, get_type_hints

from tap import Tap

from hyspark.config.pretrain import PretrainConfig
from hyspark.config.shared import RunSettings
from hyspark.data.settings import Axis, Scaling


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


class CheckArguments(Tap):
    """Look for everything that is wrong with a data set. Exit code 0: neither error nor warning; 1: some; 2: it could
    not be checked.
    """

    data: str  # nnU-Net data set, a folder that holds some, or a decathlon JSON
    out: str = "check"  # Folder for check.html and check.json
    spacing: tuple[float, float, float] = (
        PretrainConfig.spacing
    )  # mm that volumes will be prepared at, for the estimates
    hu_min: float = PretrainConfig.hu_min  # HU up to which all is air to training
    prepare_workers: int = 0  # Processes; 0 takes one per core

    def configure(self) -> None:
        self.add_argument("data")


class WeightsArguments(Tap):
    """Load weights into the segmentation network, or another one, and print what matched."""

    path: str  # A .pth, .pt or .safetensors file
    model: str = ""  # Another network, as in pre-training: timm/resnet50, torchvision/resnet50, monai/segresnet
    in_channel: int = 0  # Input channels; 0 takes one, or three for a network of timm or torchvision
    n_classes: int = 14  # Classes, background included
    img_size: tuple[int, ...] = (96,)  # Crop size, one number or one per axis
    encoder_widths: tuple[int, ...] = PretrainConfig.encoder_widths  # Channels of the five stages
    encoder_depths: tuple[int, ...] = PretrainConfig.encoder_depths  # Blocks in the five stages
    expansions: tuple[int, ...] = PretrainConfig.expansions  # Expansion in the five stages
    vit_depth: int = PretrainConfig.vit_depth  # Transformer blocks
    num_heads: int = PretrainConfig.num_heads  # Attention heads
    decoder: Literal["released", "light"] = "released"  # Decoder of the network
    decoder_width: int = PretrainConfig.decoder_width  # Channels of the light decoder at its deepest level
    decoder_min_width: int = 0  # Channels that each of its levels takes at least

    def configure(self) -> None:
        self.add_argument("path")


class ExportArguments(Tap):
    """Write the encoder of a checkpoint, or all of it, as one small .safetensors file, to hand on; or a ResNet for
    detectron2.
    """

    source: str  # A pre-training checkpoint or encoder file, or a fine-tuned network
    out: str  # The .safetensors file to write; for detectron2, a .pkl
    precision: Literal["fp16", "fp32"] = "fp16"  # Number format in the file
    decoder: bool = False  # The light decoder of pre-training too, for fine-tuning with --decoder light
    detectron2: bool = False  # A ResNet in detectron2's names, for its MODEL.WEIGHTS

    def configure(self) -> None:
        self.add_argument("source")
        self.add_argument("out")


class SegmentArguments(Tap):
    """What scoring and predicting have in common."""

    out: str  # Folder to write to
    overlap: float | None = None  # Overlap of neighbouring windows, 0 <= x < 1; by default as in fine-tuning
    flips: tuple[int, ...] = ()  # Average over flips of these axes: 0 left-right, 1 back-front, 2 foot-head
    largest_component: bool = False  # Keep the largest connected part of each class only
    device: str = "auto"  # auto takes a GPU where there is one
    prepare_workers: int = 0  # Processes that prepare volumes; 0 takes as many as there are cores for

    def configure(self) -> None:
        self.add_argument("weights")
        self.add_argument("--device", choices=get_args(get_type_hints(RunSettings)["device"]))


class EvaluateArguments(SegmentArguments):
    """Score a fine-tuned network on labelled cases: Dice, HD95 and surface Dice per organ, on the labels' own grid."""

    weights: str  # best.pth of a fine-tuning run, or its run folder
    data: str  # nnU-Net data set (imagesTr, labelsTr), all of whose labelled cases are scored, or a decathlon JSON
    part: Literal["", "all", "training", "validation"] = (
        ""  # Of a JSON; by default validation where it lists such, else all
    )
    tolerance: float = 2.0  # Of the normalised surface Dice, in mm
    store_dir: str = ""  # Folder of prepared volumes; by default `prepared` in the data's folder

    def configure(self) -> None:
        super().configure()
        self.add_argument("data")


class PredictArguments(SegmentArguments):
    """Write a label map for each volume, CASE.nii.gz in its own geometry, with its header."""

    weights: str  # best.pth of a fine-tuning run, or its run folder
    inputs: list[str]  # NIfTI files, and folders that hold some
    overwrite: bool = False  # Replace label maps that are there

    def configure(self) -> None:
        super().configure()
        self.add_argument("inputs", nargs="+")


class ClassifyArguments(Tap):
    """Write predictions.csv for the images below a folder; where its folders are the classes, cases.csv, summary.json
    and the most confident mistakes, too.
    """

    weights: str  # best.pth of a run of finetune_classify, or its run folder
    images: str  # Folder with images
    out: str  # Folder to write to
    device: str = "auto"  # auto takes a GPU where there is one

    def configure(self) -> None:
        self.add_argument("weights")
        self.add_argument("images")
        self.add_argument("--device", choices=get_args(get_type_hints(RunSettings)["device"]))


class PhantomArguments(Tap):
    """Write procedural labelled and unlabelled CTs in nnU-Net layout, to try things with."""

    out: str = "data/demo"  # Folder to write to
    num_labelled: int = 6  # Cases with labels
    num_unlabelled: int = 12  # Cases without
    seed: int = 0  # Seed of the anatomy


class SlicesArguments(Tap):
    """Write the slices of CTs, NIfTI or DICOM, as PNG files: OUT/train/1 and OUT/val/1, no patient in both. The same
    command on the same folder continues. Exit code 1: some volume could not be read.
    """

    source: list[str]  # NIfTI files, and folders of NIfTI files, nnU-Net data sets or DICOM series, at any depth
    out: str  # Folder to write to
    axis: Axis = "axial"  # Planes to write
    stride: int = 1  # Every so many-th slice
    scaling: Scaling = "minmax"  # Black and white: the range of each slice, or a window
    hu_min: float | None = None  # HU that lower values are set to; by default none, in a window as in pre-training
    hu_max: float | None = None  # HU that higher values are set to; the same
    size: int = 0  # Pixels of the short side; 0 keeps the resolution
    val_fraction: float = 0.2  # Share of patients in val
    seed: int = 0  # Seed of the split
    min_slices: int = 8  # DICOM series of fewer slices are skipped, as localizers are
    prepare_workers: int = 0  # Volumes at a time, a process each; 0 takes one per core


class CompareArguments(Tap):
    """Print the Dice of fine-tuning runs side by side."""

    folders: list[str]  # Run folders

    def configure(self) -> None:
        self.add_argument("folders", nargs="+")


class BenefitArguments(Tap):
    """Does pre-training pay? Fine-tune from several starts with the same seeds, cases and budget, and report what
    differs. Flags of `hyspark finetune` (--config, --data_dir, --max_steps, ...), or with --task classify those of
    `hyspark finetune_classify`, go to all runs.
    """

    out: str  # Folder of the runs and the report; the same command on it continues
    starts: list[str]  # NAME=FILE, or NAME=none for one from scratch; the others are compared with the first
    task: Literal["segment", "classify"] = "segment"  # What is fine-tuned for
    num_labelled: tuple[int, ...] = ()  # Numbers of labelled training cases
    label_fractions: tuple[float, ...] = ()  # Shares of the training cases, in place of their numbers
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds; each draws its labelled cases, batches and fresh weights
    jobs: int = 1  # Runs side by side
    plan: bool = False  # Print the runs and which are finished; run nothing
