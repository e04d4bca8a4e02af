"""Labelled images for classification: folders of classes, or a MedMNIST file. Found first, then decoded into memory.

An image is a uint8 tensor (c, h, w), c = 1 for grey and 3 for colour, its shorter side at most as long as the caller
says.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from hyspark.data.seeds import rng_at
from hyspark.utils.processes import available_cores
from hyspark.utils.text import listing

PARTS = ("train", "val", "test")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes of 8 bits a channel or less."""
GREY = ("1", "L", "LA")


@dataclass(frozen=True)
class FoundImages:
    """Images that were found, not decoded yet: names, class numbers, and files or uint8 arrays (h, w) or (h, w, 3)."""

    names: tuple[str, ...]
    labels: tuple[int, ...]
    sources: Sequence[Path | np.ndarray]

    def take(self, indices: Sequence[int]) -> "FoundImages":
        """Some of them."""
        names, labels = tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices)
        return FoundImages(names, labels, [self.sources[i] for i in indices])


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with their names and class numbers."""

    images: Sequence[Tensor]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def find_images(data: Path) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """The parts of a data set (train, val, and test where there is one), and the names of the classes, sorted.

    data: folder with train/CLASS/IMAGE and so on, or a MedMNIST file. Raises FileNotFoundError where there is neither;
    ValueError for a part that is missing, and for classes and images that do not fit.
    """
    if data.suffix == ".npz":
        return read_medmnist(data)
    if not data.is_dir():
        raise FileNotFoundError(
            f"no images at {data}; give a folder with train/CLASS and val/CLASS, or a MedMNIST .npz"
        )
    folders = {path.name: path for path in sorted(data.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    for part in PARTS[:2]:
        if part not in folders:
            raise ValueError(
                f"{data} has no folder {part}, but {listing(folders) or 'none at all'}; expected train/CLASS/IMAGE, "
                "val/CLASS/IMAGE and, where there is a test part, test/CLASS/IMAGE"
            )
    classes = tuple(class_folders(folders["train"]))
    if len(classes) < 2:
        raise ValueError(f"{folders['train']}: expected a folder for each of two classes or more, got {list(classes)}")
    parts = {part: find_classes(folders[part], classes) for part in PARTS if part in folders}
    if missing := sorted(set(range(len(classes))) - set(parts["train"].labels)):
        raise ValueError(f"{folders['train']}: no image in {', '.join(classes[i] for i in missing)}")
    return parts, classes


def has_test_part(data: Path) -> bool:
    """Whether a data set has one, without a look at its images."""
    if data.suffix != ".npz":
        return (data / "test").is_dir()
    if not data.is_file():
        return False
    with np.load(data, allow_pickle=False) as file:
        return "test_images" in file.files


def find_classes(folder: Path, classes: Sequence[str]) -> FoundImages:
    """The images below CLASS folders, by class and name; a class may have none.

    Raises FileNotFoundError where there is no such folder; ValueError for a folder that is no class, and where there is
    no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected one that holds {', '.join(classes)}")
    found = class_folders(folder)
    for name in found:
        if name not in classes:
            raise ValueError(f"{folder / name} is none of the classes {', '.join(classes)}")
    files = [(path, classes.index(name)) for name in found for path in image_files(folder / name)]
    if not files:
        raise ValueError(f"{folder} holds no images in folders of the classes {', '.join(classes)}")
    names = tuple(path.relative_to(folder).as_posix() for path, _ in files)
    return FoundImages(names, tuple(label for _, label in files), [path for path, _ in files])


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by their endings, sorted, without hidden ones and those in hidden folders."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_medmnist(path: Path) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """The parts of a MedMNIST file of 2D images, with the numbers of the classes as their names (medmnist.com).

    Raises FileNotFoundError; ValueError for volumes, for several labels an image, and for what is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no MedMNIST file at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a torn zip archive raises many kinds
        raise ValueError(f"{path} cannot be read as a MedMNIST file; is it damaged? ({error})") from error
    parts = {}
    for part in PARTS:
        if f"{part}_images" not in arrays and part == "test":
            continue
        try:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}; it holds {listing(arrays)}") from None
        parts[part] = FoundImages(*check_medmnist(path, part, images, labels))
    num = 1 + max(label for found in parts.values() for label in found.labels)
    missing = sorted(set(range(num)) - set(parts["train"].labels))
    if num < 2 or missing:
        raise ValueError(
            f"{path}: expected two classes or more, 0 to the largest label, each with training images, but "
            + (f"none has the label {', '.join(map(str, missing[:9]))}" if missing else "all labels are 0")
        )
    return parts, tuple(map(str, range(num)))


def check_medmnist(
    path: Path, part: str, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[str, ...], tuple[int, ...], list[np.ndarray]]:
    """Names, labels and images of a part; raises ValueError where they are of another kind."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(f"{path} has {labels.shape[1]} labels for each image (multi-label); one for each is expected")
    is_2d = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if not is_2d or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: {part}_images should be uint8 (n, h, w) or (n, h, w, 3), but they are {images.dtype} "
            f"{images.shape}; volumes are not for this network"
        )
    flat = labels.reshape(-1)
    if len(flat) != len(images) or not len(images) or not np.issubdtype(flat.dtype, np.integer) or flat.min() < 0:
        raise ValueError(f"{path}: {part}_labels do not fit: {labels.dtype} {labels.shape} for {len(images)} images")
    return tuple(f"{part}_{i}" for i in range(len(images))), tuple(int(x) for x in flat), list(images)


def nested_subset(found: FoundImages, num: int, seed: int) -> list[int]:
    """Indices of `num` images, in their order, each class with its share and at least one; a smaller subset of the
    same seed lies within a larger one. The draw depends on names and classes, not on the order.

    Raises ValueError where there are fewer images, or more classes.
    """
    by_class: dict[int, list[int]] = {}
    for index in sorted(range(len(found.names)), key=lambda i: found.names[i]):
        by_class.setdefault(found.labels[index], []).append(index)
    if not len(by_class) <= num <= len(found.names):
        raise ValueError(
            f"num_labelled is {num}, but it takes at least one image of each of the {len(by_class)} classes, and there "
            f"are {len(found.names)} training images"
        )
    # The k-th image of a class of m comes at k / m of the way, so that every beginning has the shares of the whole.
    order = []
    for label, indices in sorted(by_class.items()):
        drawn = rng_at(seed, "labelled", label).permutation(len(indices))
        order += [(place / len(indices), label, indices[d]) for place, d in enumerate(drawn)]
    return sorted(index for _, _, index in sorted(order)[:num])


def decode(found: FoundImages, short_side: int) -> tuple[ImageSet, dict[str, str]]:
    """The images in memory, larger ones with their shorter side so long, and why others cannot be used, by name."""

    def one(source: Path | np.ndarray) -> Tensor | str:
        try:
            image = read_image(source) if isinstance(source, Path) else as_tensor(source)
            return image if min(image.shape[1:]) <= short_side else with_short_side(image, short_side)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "it is no image, or of an unknown kind" if isinstance(error, UnidentifiedImageError) else error
            return f"{source}: {reason}" if isinstance(source, Path) else str(reason)

    with ThreadPoolExecutor(available_cores()) as pool:
        results = list(pool.map(one, found.sources))
    wrong = {name: why for name, why in zip(found.names, results, strict=True) if isinstance(why, str)}
    kept = found.take([i for i, result in enumerate(results) if isinstance(result, Tensor)])
    return ImageSet([r for r in results if isinstance(r, Tensor)], kept.labels, kept.names), wrong


def read_image(path: Path) -> Tensor:
    """An image file as uint8 (1, h, w), or (3, h, w) where it has colours; transparency is left aside.

    Raises OSError or ValueError for what cannot be read, and for more than 8 bits a channel.
    """
    with Image.open(path) as image:
        # Of more bits, Pillow keeps grey values as they are, but cuts off colours.
        layouts = {str(tile.args) for tile in getattr(image, "tile", ())}
        if image.mode not in EIGHT_BIT or any(";16" in layout for layout in layouts):
            kind = image.mode if image.mode not in EIGHT_BIT else f"{image.mode} with 16 bits"
            raise ValueError(f"its pixels are of the kind {kind}; expected 8 bits: choose a window and save it so")
        return as_tensor(np.array(image.convert("L" if image.mode in GREY else "RGB")))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (h, w) or (h, w, 3) -> (c, h, w)."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def with_short_side(image: Tensor, length: int) -> Tensor:
    """(c, h, w) resized, its aspect kept; an image whose shorter side is so long stays as it is."""
    return transforms.resize(image, [length], antialias=True).contiguous()
