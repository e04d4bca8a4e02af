"""The configs of a MONAI bundle: a recipe of MONAI's transforms that computes what `hyspark predict` does.

Differences to a recipe without these steps, each of which moves labels:

- windows are cut from the foreground, and a smaller volume is padded with the lowest value before the last linear map;
- scores are brought to the file's grid before the likeliest class is taken, and beyond the foreground is background.

MONAI has no transform for the last, as its nearest neighbour of a voxel halfway is one or the other; and none for
intensities by the values of a volume (mr, none), or one per channel. The recipe names those of `bundle_transforms`.
"""

from typing import Any

from hyspark.config.segmentation import SegmentationConfig, network_options
from hyspark.data.datasets.words import FIRST_CHANNELS
from hyspark.data.intensity import hu_maps, intensities_of
from hyspark.evaluation.segmentation.inference import TrainedNetwork
from hyspark.evaluation.segmentation.label_grids import label_dtype
from hyspark.training.initial_weights import INPUT_SETTINGS

RAS_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]
"""Names of the axes, which MONAI takes from the space of the affine otherwise."""
OWN = "hyspark.exports.bundle_transforms"


def inference_config(trained: TrainedNetwork) -> dict[str, Any]:
    """Return configs/inference.json of a network."""
    config, names = trained.config, trained.names
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "seg",
        "output_dtype": f"$numpy.{label_dtype(len(names)).name}",
        "separate_folder": False,
        "resample": False,
    }
    return {
        "imports": ["$import glob", "$import numpy", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": images_expression(config),
        "network_def": network_config(trained),
        "network": "$@network_def.to(@device)",
        "preprocessing": compose(preprocessing(config)),
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(config.crop_shape),
            "sw_batch_size": config.sw_batch_size,
            "overlap": config.infer_overlap,
            "mode": "gaussian",
        },
        "postprocessing": compose([*labels_on_file(), save]),
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "strict": True,
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def evaluation_config(trained: TrainedNetwork) -> dict[str, Any]:
    """Return configs/evaluate.json, which is merged over inference.json: the Dice of each organ, on the file's grid."""
    one_hot = {
        "_target_": "AsDiscreted",
        "keys": ["pred", "label"],
        "to_onehot": len(trained.names),
    }
    return {
        "labels_dir": "$@bundle_root + '/labels'",
        "labels": "$sorted(glob.glob(@labels_dir + '/*.nii.gz'))",
        "with_label": compose([load(["label"]), "@preprocessing"]),
        "dataset#data": "$[{**image, 'label': label} for image, label in zip(@datalist, @labels, strict=True)]",
        "dataset#transform": "@with_label",
        "postprocessing": compose([*labels_on_file(), one_hot]),
        "key_metric": {
            "val_mean_dice": {
                "_target_": "MeanDice",
                "include_background": False,
                "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
            }
        },
        "evaluator#key_val_metric": "@key_metric",
        "handlers": [
            inference_config(trained)["handlers"][0],
            {
                "_target_": "MetricsSaver",
                "save_dir": "@output_dir",
                "metrics": ["val_mean_dice"],
                "metric_details": ["val_mean_dice"],
                "batch_transform": "$lambda batch: [one['image'].meta for one in batch]",
                "summary_ops": "*",
            },
        ],
    }


def load(keys: list[str]) -> dict[str, Any]:
    """Return the transform that loads NIfTI files, (1, h, w, d) each."""
    return {"_target_": "LoadImaged", "keys": keys, "reader": "NibabelReader", "ensure_channel_first": True}


def compose(transforms: list[Any]) -> dict[str, Any]:
    """Return the config of transforms in order."""
    return {"_target_": "Compose", "transforms": transforms}


def network_config(trained: TrainedNetwork) -> dict[str, Any]:
    """Return the config of the network, built by `hyspark.build_hybird`."""
    config = trained.config
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in network_options(config).items()}
    return {
        "_target_": "hyspark.build_hybird",
        "in_channel": config.in_channels,
        "n_classes": len(trained.names),
        "img_size": list(config.crop_shape),
        **options,
    }


def images_expression(config: SegmentationConfig) -> str:
    """Return the expression of the images in dataset_dir, sorted: a dict for each, of the file of each channel by key.

    The only channel of a network that reads the first one may have any name.
    """
    pairs = zip(channel_keys(config), config.image_channels, strict=True)
    ends = {key: f"{channel:04d}.nii.gz" for key, channel in pairs}
    first = next(iter(ends.values()))
    if config.image_channels == FIRST_CHANNELS:
        return "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii.gz'))]"
    files = f"{{key: path[:-{len(first)}] + end for key, end in {ends}.items()}}"
    return f"$[{files} for path in sorted(glob.glob(@dataset_dir + '/*_{first}'))]"


def channel_keys(config: SegmentationConfig) -> list[str]:
    """Return the keys that the channels are loaded by. MONAI takes a key such as image_0 for metadata of image."""
    channels = config.image_channels
    return ["image"] if len(channels) == 1 else [f"channel_{channel:04d}" for channel in channels]


def preprocessing(config: SegmentationConfig) -> list[dict[str, Any]]:
    """Return the transforms from a file to the network's input."""
    key = {"keys": "image"}
    intensities = set(intensities_of(config))
    crop: list[dict[str, Any]] = [
        {"_target_": "CropForegroundd", **key, "source_key": "image", "allow_smaller": True},
        {"_target_": f"{OWN}.MarkRegiond", **key, "name": "inside"},
        {"_target_": "SpatialPadd", **key, "spatial_size": list(config.crop_shape)},
    ]
    grid: list[dict[str, Any]] = [
        {"_target_": "Orientationd", **key, "axcodes": "RAS", "labels": RAS_LABELS},
        {"_target_": "Spacingd", **key, "pixdim": list(config.spacing), "mode": "bilinear"},
    ]
    keys = channel_keys(config)
    steps: list[dict[str, Any]] = [load(keys)]
    if len(keys) > 1:  # loaded as a list, MONAI would take them for one file with channels, and save no label map
        steps.append({"_target_": "ConcatItemsd", "keys": keys, "name": "image"})
        steps.append({"_target_": "DeleteItemsd", "keys": keys})
    if intensities <= {"ct"} or intensities <= {"ct-zscore"}:
        window = {"a_min": config.hu_min, "a_max": config.hu_max, "b_min": 0.0, "b_max": 1.0, "clip": True}
        steps += [*grid, {"_target_": "ScaleIntensityRanged", **key, **window}, *crop, *zscores(config)]
    else:
        settings = {name: getattr(config, name) for name in INPUT_SETTINGS}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        measure = {"_target_": f"{OWN}.MeasureScalesd", **key, "settings": plain}
        finish = {"_target_": f"{OWN}.ToInputd", **key, "settings": plain}
        steps += [measure, *grid, {"_target_": f"{OWN}.ToFractionsd", **key}, *crop, finish]
    return [*steps, {"_target_": "EnsureTyped", **key, "dtype": "$torch.float32"}]


def zscores(config: SegmentationConfig) -> list[dict[str, Any]]:
    """Return the transform from fractions of the HU window to z-scores; none for intensity ct."""
    maps = [one for one in hu_maps(config) if one is not None]
    if not maps:
        return []
    return [
        {
            "_target_": "NormalizeIntensityd",
            "keys": "image",
            "subtrahend": [-one.intercept / one.slope for one in maps],
            "divisor": [1 / one.slope for one in maps],
            "channel_wise": True,
        }
    ]


def labels_on_file() -> list[dict[str, Any]]:
    """Return the transforms from class scores to a label map on the grid of the image's file."""
    return [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {"_target_": "MaskIntensityd", "keys": "pred", "mask_key": "inside"},
    ]
