"""Flags of the verbs, except those of training, which are the fields of its settings (hyspark.config)."""

from typing import Literal, get_args, get_type_hints

from hyspark.cli.parsing import Arguments, add_settings
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.shared import EncoderSettings, RunSettings
from hyspark.data.importing.choice import Rule
from hyspark.data.settings import Axis, PrepareSettings, Scaling

Part = Literal["", "all", "training", "validation"]
DEVICE_CHOICES = get_args(get_type_hints(RunSettings)["device"])


class DatalistArguments(Arguments):
    """Write the data list of a folder: nnU-Net data sets, or loose files that fit by their names.

    Example:
        hyspark datalist --data data --labels --splits auto --out data/labelled.json
    """

    data: str = "data"  # Folder of data: nnU-Net data sets (DatasetXXX_Name/imagesTr), one of them, or loose files
    out: str = ""  # File to write; by default DATA/dataset.json
    labels: bool = False  # List labelled cases only, each with its label, for fine-tuning
    splits: str = ""  # A splits file, or auto: each data set's splits.json or splits_final.json, else by subject
    fold: int = 0  # Fold for validation, of a splits file with folds
    val_fraction: float = 0.2  # Fraction of subjects in the validation part of a seeded split
    subject_regex: str = ""  # Pattern of the subject in case names; by default what precedes _visit, __, ...
    seed: int = 0  # Seed of the split
    channel: tuple[str, ...] = ("0000",)  # Channels whose files are listed: 0000, or 0 1 for two files a case
    organize_from: str = ""  # Before listing, link the NIfTI files below this folder into --organize_to
    organize_to: str = ""  # nnU-Net data set folder to make, e.g. data/Dataset042_Mine
    copy: bool = False  # Copy files instead of linking them

    def old_spellings(self) -> dict[str, str]:
        return {"data_path": "data", "output": "out"}


class CheckArguments(Arguments):
    """Find everything that is wrong with a data set.

    Exit codes: 0: no error or warning; 1: some; 2: it could not be checked.

    Example:
        hyspark check data/Dataset015_BTCV --out check
    """

    data: str  # Folder of data: an nnU-Net data set, a folder that holds some, loose files; or a decathlon JSON
    out: str = "check"  # Folder for check.html and check.json
    prepare_workers: int = 0  # Processes; 0 uses one per available core

    def configure(self) -> None:
        self.add_argument("data")
        add_settings(self, PrepareSettings)


class WeightsArguments(Arguments):
    """Load a weights file into the segmentation network, or a third-party one, and print what matched.

    Example:
        hyspark weights ckpt/encoder.pth
    """

    path: str  # Weights: .pth, .pt, .ckpt, .safetensors or its index, .npz, .pkl; a folder of these, or hf://OWNER/NAME
    weights_key: str = ""  # Key of the state dict in the file, if it holds several: model_ema, student
    model: str = ""  # Third-party network, as in pre-training: timm/resnet50, monai/segresnet, nnunet/PLANS.json
    in_channels: int = 0  # Input channels; 0 uses 1, the plan's of nnunet/, or 3 for timm/ and torchvision/
    out_channels: int = 14  # Classes, background included
    crop_size: tuple[int, ...] = (96,)  # Crop size in voxels, one number or one per axis
    decoder: Literal["released", "light"] = "released"  # Decoder of the segmentation network
    decoder_width: int = PretrainConfig.decoder_width  # Channels of the light decoder at its deepest level
    decoder_min_width: int = 0  # Least channels of a level of the light decoder

    def configure(self) -> None:
        self.add_argument("path")
        add_settings(self, EncoderSettings)

    def old_spellings(self) -> dict[str, str]:
        return {"in_channel": "in_channels", "n_classes": "out_channels", "img_size": "crop_size"}


class ExportArguments(Arguments):
    """Write the encoder of a checkpoint, or all of it, as one small .safetensors file; or the form of another program.

    A fine-tuned segmentation network is written as ONNX, TorchScript or a MONAI bundle, after its label map of an image
    was compared with that of `hyspark predict`.

    Example:
        hyspark export ckpt/pretrain/hyspark_1kpretrained_timm_style.pth encoder.safetensors
        hyspark export --onnx ckpt/btcv btcv.onnx
    """

    source: str  # A pre-training checkpoint or encoder file, or a fine-tuned network (best.pth, or its run folder)
    out: str  # File to write: .safetensors, .pkl (detectron2), .pth (nnU-Net), .onnx, .pt; a folder for hf and bundle
    weights_key: str = ""  # Key of the state dict in the source, if it holds several: model_ema, student
    precision: Literal["fp16", "fp32"] = "fp16"  # Precision of the numbers in the file
    decoder: bool = False  # Also the light decoder of pre-training, for fine-tuning with --decoder light
    detectron2: bool = False  # A ResNet in detectron2's names, for its MODEL.WEIGHTS
    hf: bool = False  # A folder for the Hugging Face Hub: config.json, model.safetensors and a model card
    license: str = ""  # With --hf: licence of the weights, as the Hub spells it: apache-2.0, cc-by-nc-4.0, other
    datasets: tuple[str, ...] = ()  # With --hf: data sets on the Hub that the network was trained on
    scores: tuple[str, ...] = ()  # With --hf: folders of `hyspark evaluate` for the network, for its model card
    about: str = ""  # With --hf: Markdown file with what the model card says on data, limits and use
    repo: str = ""  # With --hf: OWNER/NAME on the Hub, for the commands in the model card
    nnunet: bool = False  # The network of an nnU-Net plan, for nnUNetv2_train -pretrained_weights; needs --plans
    plans: str = ""  # With --nnunet: the plan to train, PLANS.json or PLANS.json:CONFIGURATION (3d_fullres)
    onnx: bool = False  # The segmentation network as ONNX, for any batch and size
    torchscript: bool = False  # The segmentation network as TorchScript, for crops of its training's size
    bundle: bool = False  # The segmentation network as a MONAI bundle, with the recipe that predict follows
    check: str = ""  # NIfTI file to compare predictions on; by default a region of a validation case, or a phantom

    def configure(self) -> None:
        self.add_argument("source")
        self.add_argument("out")


class NetworkArguments(Arguments):
    """Flags that evaluate and predict share."""

    out: str  # Folder to write to
    overlap: float | None = None  # Segmentation: overlap of neighbouring windows, 0 <= x < 1; by default the run's own
    flips: tuple[
        int, ...
    ] = ()  # Segmentation: average over flips of these axes (0 left-right, 1 back-front, 2 foot-head)
    largest_component: bool = False  # Segmentation: keep the largest component of each class only
    prepare_workers: int = 0  # Segmentation: processes that prepare volumes; 0 uses one per available core
    memory: float = 0  # Segmentation: GB of class scores in memory, more go to a file in OUT; 0 takes half of the free
    device: str = "auto"  # auto uses CUDA if it is available

    def configure(self) -> None:
        self.add_argument("weights")
        self.add_argument("--device", choices=DEVICE_CHOICES)


class EvaluateArguments(NetworkArguments):
    """Score a fine-tuned network on labelled cases.

    Segmentation: Dice, HD95 and surface Dice per organ, on the labels' own grid. Classification: AUC, accuracy and
    macro F1. Exit code 1: some cases were not scored; they are named, and the others are scored.

    Example:
        hyspark evaluate ckpt/btcv data/Dataset015_BTCV --out ckpt/btcv_scores
    """

    weights: str  # Fine-tuned network: best.pth, its run folder, a folder of export --hf, hf://OWNER/NAME, .onnx, .pt
    data: str  # nnU-Net data set (imagesTr, labelsTr), or a decathlon JSON; for a classifier, a folder CLASS/IMAGE
    part: Part = ""  # Segmentation: part of a JSON; by default validation if the JSON has one, else all
    tolerance: float = 2.0  # Segmentation: tolerance of the normalised surface Dice, in mm
    store_dir: str = ""  # Segmentation: folder of prepared volumes; by default `prepared` in the data folder

    def configure(self) -> None:
        super().configure()
        self.add_argument("data")
        self.add_argument("--part", metavar="{all,training,validation}")


class PredictArguments(NetworkArguments):
    """Predict with a fine-tuned network.

    Segmentation: a label map for each volume, CASE.nii.gz, in the volume's own geometry. Of a folder of DICOM, each
    series is a volume. DICOM-SEG and RTSTRUCT files refer to the series, and hold the patient's name and ID.
    Classification: predictions.csv with the probability of each class. Exit code 1: some cases were not predicted;
    they are named, and the others are written.

    Example:
        hyspark predict ckpt/btcv scans/*.nii.gz --out ckpt/btcv_labels
    """

    weights: str  # Fine-tuned network: best.pth, its run folder, a folder of export --hf, hf://OWNER/NAME, .onnx, .pt
    inputs: list[str]  # NIfTI files, and folders that hold some or DICOM series; for a classifier, one folder of images
    overwrite: bool = False  # Segmentation: replace existing label maps
    format: Literal["nifti", "dicom-seg", "rtstruct"] = "nifti"  # Segmentation: format; the last two are of DICOM
    min_slices: int = 8  # Segmentation: DICOM scans of fewer slices, such as localizers, are not predicted

    def configure(self) -> None:
        super().configure()
        self.add_argument("inputs", nargs="+")


class EmbedArguments(Arguments):
    """Compute a vector per volume, box, label or grid cell from an encoder, and probe the vectors for labels.

    Writes embeddings.safetensors and embeddings.csv, and with --probe the scores of logistic regression and nearest
    neighbours, beside random weights: probe.md, probe.json, probe.png. The same command continues. Exit code 1: some
    volumes or regions have no vector; they are named, and the others are written.

    Example:
        hyspark embed ckpt/hyspark_openkbp.safetensors scans/*.nii.gz --out vectors
    """

    weights: str  # File of weights, a run folder (pre-trained or fine-tuned), a folder of export --hf, hf://OWNER/NAME
    inputs: list[str]  # NIfTI files, and folders that hold some or DICOM series
    out: str  # Folder to write to
    boxes: str = ""  # CSV file of boxes to embed: case, x_min, x_max, y_min, y_max, z_min, z_max in mm, region
    labels: str = ""  # Folder of label maps CASE.nii.gz; each label of a volume is embedded
    grid: float = 0.0  # Edge in mm of the cells of a grid, each of which is embedded
    stages: tuple[int, ...] = ()  # Stages whose features are joined, 1 is the finest; by default all
    pooling: Literal["mean", "max"] = "mean"  # How the features of a region's voxels are pooled
    window: tuple[int, ...] = ()  # Voxels per axis of a window, one number or three; by default the weights' crop size
    model: str = ""  # Third-party network of the weights, if the file does not name it: monai/resnet18
    weights_key: str = ""  # Key of the state dict in the file, if it holds several: model_ema, student
    spacing: tuple[float, float, float] | None = None  # Spacing in mm; by default that of the weights, like all below
    intensity: tuple[str, ...] = ()  # Values that the network sees: ct, ct-zscore, mr or none
    hu_min: float | None = None  # HU that become 0
    hu_max: float | None = None  # HU that become 1
    image_channels: tuple[int, ...] = ()  # Channels that are read
    input_mean: tuple[float, ...] = ()  # ct-zscore: HU that become 0
    input_std: tuple[float, ...] = ()  # ct-zscore: HU that become a step of 1
    batch_size: int = 4  # Windows in one forward pass
    min_slices: int = 8  # DICOM scans of fewer slices, such as localizers, are not embedded
    prepare_workers: int = 0  # Processes that prepare volumes; 0 uses one per available core
    parquet: bool = False  # Also write embeddings.parquet
    probe: str = ""  # CSV file of labels: case, the target, and optionally region, patient, split, features
    target: str = ""  # Probe: column of the class
    features: tuple[str, ...] = ()  # Probe: columns of numbers, such as a diameter, probed alone and beside the vectors
    random_seeds: tuple[int, ...] = (0, 1, 2)  # Probe: seeds of random weights to compare with
    folds: int = 5  # Probe: folds of the cross-validation, if the file has no column split
    picture: Literal["pca", "umap"] = "pca"  # Probe: how the vectors are drawn in two dimensions
    device: str = "auto"  # auto uses CUDA if it is available

    def configure(self) -> None:
        self.add_argument("weights")
        self.add_argument("inputs", nargs="+")
        self.add_argument("--device", choices=DEVICE_CHOICES)
        self.add_argument("--spacing", metavar="X")


class ClassifyArguments(Arguments):
    """Write predictions.csv for the images below a folder.

    If its folders are the classes, also write the scores. `predict` and `evaluate` do the same.
    """

    weights: str  # best.pth of a classification run, or its run folder
    images: str  # Folder with images
    out: str  # Folder to write to
    device: str = "auto"  # auto uses CUDA if it is available

    def configure(self) -> None:
        self.add_argument("weights")
        self.add_argument("images")
        self.add_argument("--device", choices=DEVICE_CHOICES)


class PhantomArguments(Arguments):
    """Write procedural labelled and unlabelled CTs in nnU-Net layout.

    Example:
        hyspark phantom --out data/demo --num_labelled 6 --num_unlabelled 18
    """

    out: str = "data/demo"  # Folder to write to
    num_labelled: int = 6  # Cases with labels
    num_unlabelled: int = 12  # Cases without labels
    seed: int = 0  # Seed of the anatomy


class SlicesArguments(Arguments):
    """Write the slices of CTs, NIfTI or DICOM, as PNG files: OUT/train/1 and OUT/val/1, with no patient in both.

    The same command on the same folder continues. Exit code 1: some volume was unreadable.

    Example:
        hyspark slices --source scans --out data/slices --axis axial --stride 4
    """

    source: list[str]  # NIfTI files, and folders of NIfTI files, nnU-Net data sets or DICOM series, at any depth
    out: str  # Folder to write to
    axis: Axis = "axial"  # Orientation of the slices
    stride: int = 1  # Write each slice whose index is a multiple of this
    scaling: Scaling = "minmax"  # Black and white: the range of each slice, or a window
    hu_min: float | None = None  # HU to which lower values are clipped; by default none, in a window as in pre-training
    hu_max: float | None = None  # HU to which higher values are clipped; the same default
    size: int = 0  # Pixels of the short side; 0 keeps the resolution
    val_fraction: float = 0.2  # Fraction of patients in val
    seed: int = 0  # Seed of the split
    min_slices: int = 8  # DICOM scans of fewer slices, such as localizers, are skipped
    keep_patient_id: bool = False  # Show the PatientID of DICOM files in names and slices.json, not a pseudonym
    prepare_workers: int = 0  # Volumes at a time, a process each; 0 uses one per available core


class ImportArguments(Arguments):
    """Convert scans to a data set in nnU-Net layout, without the names of patients.

    Sources hold DICOM series in any folder and order, NIfTI, NRRD, MetaImage, or folders of 2D slices. The same command
    continues. Exit code 1: some series were unreadable; they are named, and the others are written.

    Example:
        hyspark import pacs_export --out data/Dataset042_Mine --choose most_slices
    """

    sources: list[str]  # Files and folders, searched at any depth
    out: str  # Data set folder to write, named as nnU-Net does, e.g. data/Dataset042_Mine
    modality: Literal["", "CT", "MR", "PT"] = ""  # Modality to import; needed if the sources hold several
    choose: Rule = "all"  # Scans of each study: all, the one of most slices, or the one of the thinnest
    kernel: str = ""  # Pattern of ConvolutionKernel, such as "b30|standard"; others are excluded; case is ignored
    series_description: str = ""  # Pattern of SeriesDescription (or --description); others are excluded
    min_slices: int = 8  # Scans of fewer slices, such as localizers, are excluded
    max_thickness: float = 0.0  # Scans of thicker slices, or slices further apart, are excluded, in mm; 0 takes all
    slice_spacing: tuple[float, float, float] | None = None  # For 2D slices: mm between columns, rows and slices
    keep_descriptions: bool = False  # Write SeriesDescription into import.jsonl; it may hold a name
    salt_file: str = ""  # Secret that ids are hashed with; by default ~/.config/hyspark/import_salt, made if missing
    labels: bool = False  # Write labelsTr from the RTSTRUCT and DICOM-SEG files in the sources
    label_names: str = ""  # YAML of classes with names of structures, {spleen: [Milz, "SPLEEN_*"]}; with --labels
    private_table: str = ""  # CSV to write with the ids, UIDs and paths behind the hashes, outside of OUT
    prepare_workers: int = 0  # Volumes at a time, a process each; 0 uses one per available core

    def configure(self) -> None:
        self.add_argument("sources", nargs="+")
        self.add_argument("--modality", metavar="{CT,MR,PT}")
        self.add_argument("--slice_spacing", metavar="X")

    def old_spellings(self) -> dict[str, str]:
        return {"description": "series_description"}  # a parser has a description of its own


class CompareArguments(Arguments):
    """Print the scores of fine-tuning runs side by side.

    Example:
        hyspark compare ckpt/btcv ckpt/btcv_scratch
    """

    folders: list[str]  # Run folders

    def configure(self) -> None:
        self.add_argument("folders", nargs="+")


class BenefitArguments(Arguments):
    r"""Find out whether pre-training pays.

    Fine-tunes from several initial weights with the same seeds, cases and budget, and reports the differences. Flags of
    `hyspark finetune` (--config, --data, --max_steps, ...) go to all runs; with --task classify, those of
    `hyspark finetune-classifier`. With --engine nnunet, nnU-Net trains, and --plans and --trainer go to all runs too.

    Example:
        hyspark benefit --config finetune_btcv --data data/Dataset015_BTCV --out ckpt/benefit \
            --initial_weights scratch=none own=ckpt/encoder.pth --num_labelled 5 10
    """

    out: str  # Folder of the runs and the report; the same command on it continues
    initial_weights: list[str]  # NAME=FILE, or NAME=none for random initialisation; the first is the baseline
    task: Literal["segment", "classify"] = "segment"  # What the network is fine-tuned for
    engine: Literal["hyspark", "nnunet"] = "hyspark"  # What trains; with nnunet, name the plan by --plans
    num_labelled: tuple[int, ...] = ()  # Numbers of labelled training cases
    label_fractions: tuple[float, ...] = ()  # Fractions of the training cases, instead of numbers
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds; each draws labelled cases, batches and random weights
    jobs: int = 1  # Runs side by side
    plan: bool = False  # Print the runs and which are finished; run nothing

    def old_spellings(self) -> dict[str, str]:
        return {"starts": "initial_weights"}
