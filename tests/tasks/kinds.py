"""One small setting for each kind of pre-training, to be put into those of the fixture `pretraining`."""

from dataclasses import asdict

from hyspark.config.shared import EncoderSettings

PLANES = {"slices": "axial", "in_channels": 3, "crop_size": (64,)}
OTHERS = asdict(EncoderSettings())
SIAMESE = OTHERS | PLANES | {"decoder_width": 768, "head_width": 16}
PRETRAININGS = {
    "packed": {},
    "masked": {"compute": "masked"},
    "hidden in convolutions": {"hide": "convolutions"},
    "hidden in the input": {"hide": "input"},
    "hidden in the input, 2D": {"hide": "input", "slices": "axial", "crop_size": (32,)},
    "packed, 2D": {"slices": "axial", "crop_size": (32,)},
    "spark timm": OTHERS | PLANES | {"model": "spark/timm/test_resnet", "decoder_width": 32, "mask_ratio": 0.5},
    "spark segresnet": OTHERS | {"model": "spark/monai/segresnet", "decoder_width": 16, "mask_ratio": 0.5},
    "spark dynunet": OTHERS | {"model": "spark/monai/dynunet", "decoder_width": 16, "mask_ratio": 0.5},
    "moco": SIAMESE | {"model": "moco/timm/test_resnet", "queue_size": 8},
    "byol": SIAMESE | {"model": "byol/timm/test_resnet"},
    "swav": SIAMESE | {"model": "swav/timm/test_resnet", "prototypes": 6, "local_views": 1},
}
