"""Volumes whose files store their axes in another order than x, y, z, of which nnU-Net keeps the order of the file."""

from collections.abc import Sequence

from nibabel.orientations import io_orientation

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.store_size import sample_evenly
from hyspark.data.readers.nifti import file_grid


def find_permuted(cases: Sequence[Case]) -> tuple[list[str], int]:
    """Find volumes whose first axis is not nearest to x, the second to y and the third to z, by their headers.

    Args:
        cases: The cases; of many, a sample is read.

    Returns:
        Names of such cases, and the number of headers that were read.
    """
    found, num = [], 0
    for case in sample_evenly(cases):
        try:
            affine = file_grid(case.image).affine
        except (OSError, ValueError):
            continue  # preparation names unreadable files
        num += 1
        if list(io_orientation(affine)[:, 0]) != [0, 1, 2]:
            found.append(case.name)
    return found, num
