"""Small weights and volumes of the embedding's tests."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file

from hyspark.models.encoder import HybridEncoder

SHAPES = {"encoder_widths": [6, 6, 12, 12, 24], "encoder_depths": [1] * 5, "expansions": [2] * 5}
SHAPES |= {"vit_depth": 1, "num_heads": 12}
MADE = {"spacing": [4.0, 4.0, 4.0], "hu_min": -175.0, "hu_max": 250.0, "input_size": [32]}
SPACING, WINDOW = (4.0, 4.0, 4.0), 32


def small_encoder() -> HybridEncoder:
    torch.manual_seed(3)
    widths, depths = SHAPES["encoder_widths"], SHAPES["encoder_depths"]
    return HybridEncoder(1, WINDOW, widths, depths, SHAPES["expansions"], 1, 12).eval()


def write_weights(path: Path, **about: object) -> Path:
    """Write the weights of `small_encoder` with the settings that made them."""
    known = {**SHAPES, **MADE, **about}
    metadata = {name: json.dumps(value) for name, value in known.items() if value is not None}
    save_file({key: value.contiguous() for key, value in small_encoder().state_dict().items()}, path, metadata)
    return path


def write_volume(path: Path, hu: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), path)
    return path


def body(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Hounsfield units (h, w, d): noise of tissue in air."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000.0)
    inner = tuple(slice(n // 8, n - n // 8) for n in shape)
    hu[inner] = rng.integers(-150, 240, hu[inner].shape)
    return hu
