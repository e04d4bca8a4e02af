"""Labelled images for classification: folders of classes, or a MedMNIST file; listed first, then decoded into memory.

An image is a uint8 tensor `(c, h, w)`, c = 1 for grey and 3 for colour. The caller limits its shorter side.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from hyspark.data.datasets.found import FoundData, log_unused
from hyspark.utils.processes import available_cores
from hyspark.utils.text import listing

SPLITS = ("train", "val", "test")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
OF_FILE_MANAGERS = ("Thumbs.db", "desktop.ini")
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with at most 8 bits per channel."""
GREY = ("1", "L", "LA")
SAMPLE_FORMAT, SIGNED = 339, 2
"""TIFF's tag of how numbers are stored, and its value for signed ones."""


@dataclass(frozen=True)
class FoundImages:
    """Images that are not decoded yet.

    Attributes:
        names: names of the images.
        labels: class index of each image.
        sources: file of each image, or uint8 array `(h, w)` or `(h, w, 3)`.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    sources: Sequence[Path | np.ndarray]

    def take(self, indices: Sequence[int]) -> "FoundImages":
        """Select images by their indices."""
        names, labels = tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices)
        return FoundImages(names, labels, [self.sources[i] for i in indices])


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with their class indices and names."""

    images: Sequence[Tensor]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int]) -> "ImageSet":
        """Select images by their indices."""
        names, labels = tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices)
        return ImageSet([self.images[i] for i in indices], labels, names)


def find_images(data: Path) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """List the images of a data set by split (train, val and, if present, test), and its sorted class names.

    Args:
        data: folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or a MedMNIST file.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if train or val is missing, or classes and images do not match.
    """
    if data.suffix == ".npz":
        return read_medmnist(data)
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data}: expected a folder with train/CLASS and val/CLASS, or a MedMNIST .npz, found neither"
        )
    folders = {path.name: path for path in sorted(data.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    for split in SPLITS[:2]:
        if split not in folders:
            raise ValueError(
                f"{data}: expected train/CLASS/IMAGE, val/CLASS/IMAGE and optionally test/CLASS/IMAGE, got no folder "
                f"{split}, but {listing(folders) or 'none at all'}"
            )
    classes = tuple(class_folders(folders["train"]))
    if len(classes) < 2:
        raise ValueError(f"{folders['train']}: expected a folder for each of two classes or more, got {list(classes)}")
    splits = {split: find_classes(folders[split], classes) for split in SPLITS if split in folders}
    if missing := sorted(set(range(len(classes))) - set(splits["train"].labels)):
        raise ValueError(f"{folders['train']}: no image in {', '.join(classes[i] for i in missing)}")
    return splits, classes


def has_test_split(data: Path) -> bool:
    """Return whether a data set has test images, without reading any."""
    if data.suffix != ".npz":
        return (data / "test").is_dir()
    if not data.is_file():
        return False
    with np.load(data, allow_pickle=False) as file:
        return "test_images" in file.files


def find_classes(folder: Path, classes: Sequence[str]) -> FoundImages:
    """List the images below CLASS folders, by class and name; a class may have none.

    Raises:
        FileNotFoundError: if `folder` does not exist.
        ValueError: if a folder is no class, or there is no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder that holds {', '.join(classes)}, found none")
    found = class_folders(folder)
    for name in found:
        if name not in classes:
            raise ValueError(f"{folder / name}: expected one of the classes {', '.join(classes)}")
    files = [(path, classes.index(name)) for name in found for path in image_files(folder / name)]
    if not files:
        raise ValueError(f"{folder}: expected images in folders of the classes {', '.join(classes)}, found none")
    names = tuple(path.relative_to(folder).as_posix() for path, _ in files)
    return FoundImages(names, tuple(label for _, label in files), [path for path, _ in files])


def class_folders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """List the image files below a folder by their endings, sorted, without hidden files and folders."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in files if not any(name.startswith(".") for name in path.relative_to(folder).parts))


def log_other_files(folder: Path, used: Collection[Path | np.ndarray]) -> None:
    """Log the files of a folder of images that are not used, without hidden ones and those of file managers."""
    known = {source for source in used if isinstance(source, Path)}
    found = FoundData(folder)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        names = path.relative_to(folder).parts
        if (
            path in known
            or not path.is_file()
            or names[-1] in OF_FILE_MANAGERS
            or any(n.startswith(".") for n in names)
        ):
            continue
        is_image = path.suffix.lower() in ENDINGS
        found.pass_over("unused file", "in no folder of a class" if is_image else f"no {listing(ENDINGS)}", path)
    log_unused(found.unused_lines())


def read_medmnist(path: Path) -> tuple[dict[str, FoundImages], tuple[str, ...]]:
    """Read the splits of a MedMNIST file of 2D images (medmnist.com); the class names are the class indices.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for volumes, several labels per image, or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such MedMNIST file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a torn zip archive raises many kinds
        raise ValueError(f"{path}: unreadable as a MedMNIST file ({error}); is it damaged?") from error
    splits = {}
    for split in SPLITS:
        if f"{split}_images" not in arrays and split == "test":
            continue
        try:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        except KeyError as error:
            raise ValueError(f"{path}: expected {error}, got {listing(arrays)}") from None
        splits[split] = FoundImages(*check_medmnist(path, split, images, labels))
    num = 1 + max(label for found in splits.values() for label in found.labels)
    missing = sorted(set(range(num)) - set(splits["train"].labels))
    if num < 2 or missing:
        raise ValueError(
            f"{path}: expected two classes or more, 0 to the largest label, each with training images, but "
            + (f"none has the label {', '.join(map(str, missing[:9]))}" if missing else "all labels are 0")
        )
    return splits, tuple(map(str, range(num)))


def check_medmnist(
    path: Path, split: str, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[str, ...], tuple[int, ...], list[np.ndarray]]:
    """Check one split and return its names, labels and images; raise ValueError for wrong types or shapes."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ValueError(f"{path}: expected one label per image, got {labels.shape[1]} (multi-label)")
    is_2d = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if not is_2d or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: {split}_images: expected uint8 (n, h, w) or (n, h, w, 3), got {images.dtype} {images.shape}; "
            "volumes are not for this network"
        )
    flat = labels.reshape(-1)
    if len(flat) != len(images) or not len(images) or not np.issubdtype(flat.dtype, np.integer) or flat.min() < 0:
        raise ValueError(
            f"{path}: {split}_labels: expected one integer from 0 for each of {len(images)} images, got {labels.dtype} "
            f"{labels.shape}"
        )
    return tuple(f"{split}_{i}" for i in range(len(images))), tuple(int(x) for x in flat), list(images)


def decode(found: FoundImages, short_side: int) -> tuple[ImageSet, dict[str, str]]:
    """Decode images into memory, in threads.

    Args:
        found: images to decode.
        short_side: pixels; an image with a longer shorter side is resized to it.

    Returns:
        The decoded images, and by name, why others are unreadable.
    """

    def decode_one(source: Path | np.ndarray) -> Tensor | str:
        try:
            image = read_image(source) if isinstance(source, Path) else as_tensor(source)
            return image if min(image.shape[1:]) <= short_side else with_short_side(image, short_side)
        except Exception as error:  # a damaged file may raise anything
            reason = "no image, or of an unknown format" if isinstance(error, UnidentifiedImageError) else error
            return f"{source}: {reason}" if isinstance(source, Path) else str(reason)

    with ThreadPoolExecutor(available_cores()) as pool:
        results = list(pool.map(decode_one, found.sources))
    wrong = {name: why for name, why in zip(found.names, results, strict=True) if isinstance(why, str)}
    kept = found.take([i for i, result in enumerate(results) if isinstance(result, Tensor)])
    return ImageSet([r for r in results if isinstance(r, Tensor)], kept.labels, kept.names), wrong


def read_image(path: Path) -> Tensor:
    """Read an image file as uint8 `(1, h, w)`, or `(3, h, w)` if it has colours.

    It is turned as its EXIF orientation says. Transparency, gamma and colour profiles are ignored.

    Raises:
        OSError: if the file is unreadable.
        ValueError: for more than 8 bits per channel, or several pages.
    """
    # Of a path, Pillow 13 maps an uncompressed TIFF with the sides of the turned image.
    with path.open("rb") as file, Image.open(file) as image:
        if why := why_unfit(image):
            raise ValueError(why)
        image.load()  # before its orientation: Pillow turns TIFF itself
        shown = upright(image)
        if shown.mode in ("P", "PA"):
            shown = shown.convert("RGBA")  # Pillow warns of a palette with transparency otherwise
        return as_tensor(np.array(shown.convert("L" if shown.mode in GREY else "RGB")))


def why_unfit(image: Image.Image) -> str:
    """Explain why an opened image is not one picture of 8 bits per channel; empty if it is."""
    # Of more bits, Pillow keeps grey values as they are, but cuts off colours. BGR;16 is 5 or 6 bits per channel.
    layouts = {str(tile[3]) for tile in getattr(image, "tile", ())}
    is_deep = any(";16" in layout and "BGR;16" not in layout for layout in layouts)
    if image.mode not in EIGHT_BIT or is_deep:
        kind = f"{image.mode} with 16 bits" if image.mode in EIGHT_BIT else image.mode
        return f"expected 8 bits per channel, got pixels of mode {kind}; choose a window and save it with 8 bits"
    if SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ()):
        return "expected 8 bits per channel without sign, got signed ones; choose a window and save it with 8 bits"
    # The further pictures of a JPEG in MPO are previews or another eye's view.
    if image.format != "MPO" and (num := getattr(image, "n_frames", 1)) > 1:
        return f"expected one picture, got {num} pages or frames; save each as a file of its own"
    return ""


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation says; without a readable one, leave it."""
    try:
        return ImageOps.exif_transpose(image) or image
    except Exception:  # a damaged EXIF block may raise anything, and says nothing of the orientation
        return image


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 `(h, w)` or `(h, w, 3)` to a tensor `(c, h, w)`."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def with_short_side(image: Tensor, length: int) -> Tensor:
    """Resize an image `(c, h, w)` to the length of its shorter side in pixels, keeping its aspect."""
    return transforms.resize(image, [length], antialias=True).contiguous()
