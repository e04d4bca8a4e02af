"""Volumes of other formats than NIfTI and DICOM: NRRD, MetaImage, NIfTI pairs, FreeSurfer's, stacks of pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from PIL import Image

from hyspark.data.datasets.file_names import BY_NIBABEL, BY_SIMPLEITK
from hyspark.utils.install import extra_error, require_version
from hyspark.utils.private_text import PrivateError, private
from hyspark.utils.text import first_line

DATA_ENDINGS = {
    ".mhd": (".raw", ".zraw", ".raw.gz"),
    ".nhdr": (".raw", ".raw.gz", ".gz", ".img"),
    ".hdr": (".img", ".img.gz"),
}
"""Endings of the file of voxels beside that of a header."""
HEADER_BYTES = 4096
ORIENTATION = {
    **dict.fromkeys((".nrrd", ".nhdr"), rb"^space( dimension)?:"),
    **dict.fromkeys((".mha", ".mhd"), rb"^(TransformMatrix|Orientation|Rotation|AnatomicalOrientation)\s*="),
    ".gipl": b"",
}
"""Fields of a header that state the directions of axes, by the file's ending; empty for a format without any."""
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Endings of 2D slices."""
LEAST_SIMPLEITK = "2.4"
"""Earlier ones fill the voxels that a MetaImage file lacks."""
GREY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")
"""Pillow's modes of one number per pixel."""


@dataclass(frozen=True)
class PictureStack:
    """2D slices that make one volume.

    Attributes:
        files: a file for each slice in order, or one file of several pages.
        spacing: mm between columns, rows and slices.
    """

    files: tuple[Path, ...]
    spacing: tuple[float, float, float]


def require_simpleitk() -> Any:
    """Import SimpleITK, which reads NRRD and MetaImage; raise ModuleNotFoundError with what to install."""
    try:
        import SimpleITK
    except ImportError as error:
        formats = ", ".join(BY_SIMPLEITK)
        raise extra_error(error, f"{formats} need SimpleITK", "formats", "SimpleITK") from error
    require_version(SimpleITK, LEAST_SIMPLEITK, "reads MetaImage files that are cut short")
    return SimpleITK


def detached_files(header: Path) -> list[Path]:
    """List the files of voxels that lie beside a header's file."""
    endings = DATA_ENDINGS.get(header.suffix.lower(), ())
    return [file for ending in endings if (file := header.with_suffix(ending)).is_file()]


def read_other_format(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels of a volume `(h, w, d)`, and their affine `(4, 4)` to mm in RAS.

    Raises:
        PrivateError: if the file is damaged, or no volume of one number per voxel.
    """
    read = read_by_nibabel if path.suffix.lower() in BY_NIBABEL else read_by_simpleitk
    try:
        voxels, affine = read(path)
    except (PrivateError, ImportError):
        raise
    except Exception as error:  # a damaged file may raise anything
        # ITK's "Reason:" is the last error of the system, whatever that was.
        lines = [line for line in str(error).strip().splitlines() if line and not line.startswith("Reason:")]
        why = re.sub(r"^ITK ERROR: \w+\(\w+\): ", "", lines[-1]) if lines else type(error).__name__
        raise PrivateError(f"unreadable as {path.suffix.lower()[1:]}; is it cut short? ({private(why)})") from error
    if voxels.ndim != 3:
        raise PrivateError(f"expected one volume, got an array of shape {voxels.shape}")
    return voxels, affine


def read_by_simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file by SimpleITK; its axes point to the left, the back and the head."""
    library = require_simpleitk()
    reader = library.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        size, number = " x ".join(map(str, reader.GetSize())), reader.GetNumberOfComponents()
        raise PrivateError(f"expected one volume of one number per voxel, got {size} with {number} numbers")
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return library.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def read_by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a pair of NIfTI, or FreeSurfer's format, by nibabel."""
    if path.suffix.lower() != ".hdr":
        content = path.read_bytes()
        image: Any = nibabel.MGHImage.from_bytes(igzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        return volume_of(np.asanyarray(image.dataobj)), image.affine
    image = nibabel.load(path)
    if isinstance(image, nibabel.analyze.AnalyzeImage) and not isinstance(image, nibabel.Nifti1Pair):
        raise PrivateError("Analyze, which does not state right and left; convert it to NIfTI with its orientation")
    return volume_of(np.asanyarray(image.dataobj)), image.affine


def volume_of(voxels: np.ndarray) -> np.ndarray:
    """Return the volume of an array whose fourth axis has one entry; any other array unchanged."""
    return voxels[..., 0] if voxels.ndim == 4 and voxels.shape[3] == 1 else voxels


def natural_order(files: Sequence[Path]) -> list[Path]:
    """Sort files by name, numbers in names by their value: slice2 before slice10."""

    def key(file: Path) -> list[tuple[int, int, str]]:
        parts = re.findall(r"\d+|\D+", file.name)
        return [(0, int(part), part) if part.isdecimal() else (1, 0, part.lower()) for part in parts]

    return sorted(files, key=key)


def why_unoriented(path: Path) -> str:
    """Explain that a file does not state the directions of its axes; empty if it does, or is of another format."""
    pattern = ORIENTATION.get(path.suffix.lower())
    if pattern is None:
        return ""
    with path.open("rb") as file:
        if pattern and re.search(pattern, file.read(HEADER_BYTES), re.MULTILINE):
            return ""
    return "it states no directions; its axes are taken to point to the left, the back and the head"


def num_pages(file: Path) -> int:
    """Count the pages of a picture; 0 if it is unreadable."""
    try:
        with Image.open(file) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged file may raise anything
        return 0


def read_pictures(stack: PictureStack) -> tuple[np.ndarray, np.ndarray]:
    """Read 2D slices as voxels `(h, w, d)`, and their affine `(4, 4)` to mm in RAS.

    They are taken as axial slices as they are displayed, seen from the feet, the first one lowest.

    Raises:
        PrivateError: if a picture is unreadable or in colours, or sizes differ.
    """
    slices: list[np.ndarray] = []
    for file in stack.files:
        try:
            with Image.open(file) as image:
                for page in range(getattr(image, "n_frames", 1)):
                    image.seek(page)
                    slices.append(grey_pixels(image, file))
        except PrivateError:
            raise
        except Exception as error:  # a damaged file may raise anything
            raise PrivateError(f"{private(file.name)}: unreadable picture ({private(first_line(error))})") from error
    if len(sizes := {one.shape for one in slices}) > 1:
        found = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(sizes))
        raise PrivateError(f"pictures of different sizes: {found} pixels")
    return np.stack(slices).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([*stack.spacing, 1.0])


def grey_pixels(image: Image.Image, file: Path) -> np.ndarray:
    """Return the pixels `(rows, columns)` of an opened picture; raise PrivateError for colours."""
    layouts = {str(tile[3]) for tile in getattr(image, "tile", ())}
    if image.mode in GREY_MODES:
        values = np.array(image.convert("L") if image.mode in ("1", "LA") else image)
        return values.astype(values.dtype.newbyteorder("="))
    colours = np.array(image.convert("RGB"))
    if any(";16" in layout for layout in layouts) or (colours != colours[..., :1]).any():
        raise PrivateError(f"{private(file.name)}: expected one grey value per pixel, got colours")
    return colours[..., 0]
