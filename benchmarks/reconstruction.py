"""The picture of the README: the held-out CT of median error, as the shipped weights reconstruct it.

    python benchmarks/reconstruction.py --data data/Dataset501_OpenKBP

One mask hides patches in a crop from the upper end of every validation case. The error is the mean absolute error of
hidden voxels of the body, in units of the CT window. The picture shows the case of median error.
"""

from pathlib import Path

import numpy as np
import torch
from tap import Tap
from torch import Tensor

from hyspark.data.batches.crops import crop_start
from hyspark.data.datasets.build import read_folder
from hyspark.data.preprocessing.prepare import prepare_case
from hyspark.data.settings import PrepareSettings
from hyspark.figures.panels import reconstruction_panel, save_figure
from hyspark.models.masked_autoencoder import MaskedAutoencoder, build_hyspark, reconstruct
from hyspark.models.masking.mask import draw_visible, grid_of, visible_at
from hyspark.models.weights.files import made_with, read_contents
from hyspark.models.weights.load import load_pretrained


class Arguments(Tap):
    """Draw the reconstruction of median error."""

    data: str  # nnU-Net data set folder; its validation cases are reconstructed
    weights: str = "ckpt/hyspark_openkbp.safetensors"  # An encoder with its light decoder
    out: str = "docs/reconstruction.png"  # PNG file to write
    size: tuple[int, int, int] = (80, 64, 80)  # Voxels of the crop
    seed: int = 0  # Seed of the mask


def build_from(path: Path, size: tuple[int, ...]) -> tuple[MaskedAutoencoder, PrepareSettings]:
    """Build the network that a file describes, for crops of a size, and the settings that its CTs were prepared by."""
    made = made_with(read_contents(path))
    options = {name: made[name] for name in ("expansions", "vit_depth", "num_heads", "decoder_width")}
    options |= {name: made[f"encoder_{name}"] for name in ("widths", "depths")}
    network = build_hyspark(size, made["mask"], **options).eval()
    print(load_pretrained(network, path))
    return network, PrepareSettings(spacing=tuple(made["spacing"]), hu_min=made["hu_min"], hu_max=made["hu_max"])


def upper_crop(image: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Cut a crop (1, 1, *size) from the upper end of an RAS image (h, w, d); what lies outside of it is 0."""
    centre = [image.shape[0] // 2, image.shape[1] // 2, image.shape[2] - size[2] // 2]
    crop = np.zeros(size, np.float32)
    start = crop_start(centre, image.shape, size)
    box = [slice(max(a, 0), min(a + n, m)) for a, n, m in zip(start, size, image.shape, strict=True)]
    to = [slice(part.start - a, part.stop - a) for part, a in zip(box, start, strict=True)]
    crop[tuple(to)] = image[tuple(box)]
    return torch.from_numpy(crop)[None, None]


@torch.no_grad()
def main(args: Arguments) -> None:
    """Reconstruct all validation cases, print their errors, and draw the median one."""
    network, settings = build_from(Path(args.weights), args.size)
    cases = read_folder(Path(args.data), seed=0, val_fraction=0.2).validation
    visible = draw_visible(grid_of(args.size), network.mask_ratio, [torch.Generator().manual_seed(args.seed)])
    seen = visible_at(visible, args.size)
    results = []
    for case in cases:
        volume = upper_crop(prepare_case(case, settings)["image"][0], args.size)
        result = reconstruct(volume, network(volume, visible)).clamp(0, 1)
        error = (result - volume).abs()[~seen & (volume > 0)].mean().item()
        results.append((error, case.name, volume, result))
    results.sort(key=lambda row: row[:2])
    for error, name, *_ in results:
        print(f"{name}  {error:.3f}")
    rank = (len(results) - 1) // 2
    _, name, *shown = results[rank]
    title = f"{name}, held out: rank {rank + 1} of {len(results)} by error"
    volume, mask, result = (array[0, 0].numpy() for array in (shown[0], seen, shown[1]))
    save_figure(reconstruction_panel(volume, mask, result, title=title, spacing=settings.spacing), Path(args.out))


if __name__ == "__main__":
    main(Arguments().parse_args())
