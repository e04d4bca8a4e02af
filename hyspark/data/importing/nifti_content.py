"""Voxels and affine -> the content of a NIfTI file: integers where values are integers, one position in both forms."""

import nibabel
import numpy as np
from isal import igzip
from nibabel.affines import voxel_sizes
from numpy.typing import DTypeLike

from hyspark.data.readers.stacks import TILT
from hyspark.utils.private_text import PrivateError

GZIP_LEVEL = 2
"""Level of ISA-L's compression: a tenth larger than zlib's own level, in a tenth of its time."""
INTEGERS = (np.int16, np.uint16, np.int32)
"""Types of whole numbers, the first that holds all values is taken."""


def nifti_content(voxels: np.ndarray, affine: np.ndarray, dtype: DTypeLike | None = None) -> bytes:
    """Make the content of a .nii.gz of voxels `(h, w, d)` and their affine `(4, 4)` to mm.

    Their type is the given one, or that of `as_stored`.

    The quaternion (qform) and the matrix (sform) say the same. Of sheared axes the matrix alone is valid.
    """
    image = nibabel.Nifti1Image(as_stored(voxels) if dtype is None else voxels.astype(dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=int(not is_sheared(affine)))
    image.header.set_xyzt_units("mm")
    return bytes(igzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))


def is_sheared(affine: np.ndarray) -> bool:
    """Return whether axes are not perpendicular, as with a tilted gantry; SimpleITK does not read such images."""
    directions = affine[:3, :3] / voxel_sizes(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > TILT)


def as_stored(voxels: np.ndarray) -> np.ndarray:
    """Convert values to the type they are stored in: whole numbers to integers, others to float32."""
    low, high = voxels.min(), voxels.max()
    for kind in INTEGERS:
        if voxels.dtype == kind:
            return voxels
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            whole = voxels.astype(kind)
            if np.array_equal(whole, voxels):
                return whole
            break
    values = voxels.astype(np.float32)
    if not np.isfinite(values).all():
        raise PrivateError(f"values from {low:g} to {high:g}, which float32 does not hold")
    return values
