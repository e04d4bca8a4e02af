"""Formats of predicted label maps: NIfTI, and DICOM objects that refer to their series."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from isal import igzip
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.scan_inputs import ScanCase
from hyspark.data.readers.nifti import label_file
from hyspark.data.writers.dicom_seg import dicom_seg_file, import_highdicom
from hyspark.data.writers.rtstruct import rtstruct_file
from hyspark.data.writers.source_images import Segments
from hyspark.evaluation.network_kind import fine_tuned_file
from hyspark.figures.panels import class_colours
from hyspark.utils.digests import content_digest
from hyspark.utils.log import LOG
from hyspark.utils.text import listing
from hyspark.utils.version import VERSION

LabelFormat = Literal["nifti", "dicom-seg", "rtstruct"]
LABEL_ENDINGS: dict[LabelFormat, str] = {"nifti": ".nii.gz", "dicom-seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
"""Endings of the files, by format."""
IN_ORDER = np.array([[0, 1], [1, 1], [2, 1]])
"""Orientation of axes that stay as they are."""

NO_SEGMENTS = Segments((), (), "", "")


@dataclass(frozen=True)
class LabelOutput:
    """How label maps are written.

    Attributes:
        file_format: The format.
        segments: The classes, for DICOM.
    """

    file_format: LabelFormat = "nifti"
    segments: Segments = NO_SEGMENTS

    def encode(self, labels: np.ndarray, case: Case) -> bytes:
        """Make the content of the file of a case's label map, on the grid of its image.

        Raises:
            ValueError: The DICOM series lacks elements that are referred to.
        """
        if self.file_format == "nifti" or not isinstance(case, ScanCase):
            return bytes(igzip.compress(label_file(labels, case.image), mtime=0))
        present = set(np.unique(labels).tolist())
        absent = [name for value, name in enumerate(self.segments.names, 1) if value not in present]
        if len(absent) == len(self.segments.names):
            LOG.warning("%s: no voxel of any class; its file holds no region", case.name)
        elif absent:
            LOG.info("%s: no voxel of %s", case.name, listing(absent))
        turned = ornt_transform(IN_ORDER, io_orientation(case.series.affine))
        own = apply_orientation(labels, turned)
        write = dicom_seg_file if self.file_format == "dicom-seg" else rtstruct_file
        return write(own, case.series, self.segments)


def label_output(file_format: LabelFormat, weights: Path, names: Sequence[str]) -> LabelOutput:
    """Describe how label maps of a network are written.

    Args:
        file_format: The format.
        weights: The network's file or folder, see `fine_tuned_file`.
        names: Classes of the network, background first.

    Raises:
        ModuleNotFoundError: The format needs a package that is not installed.
        ValueError: There is no such format.
    """
    if file_format not in LABEL_ENDINGS:
        raise ValueError(f"--format: expected {', '.join(LABEL_ENDINGS)}, got {file_format}")
    if file_format == "nifti":
        return LabelOutput()
    if file_format == "dicom-seg":
        import_highdicom()
    LOG.info("%s: files hold the patient's name and ID, copied from the series", file_format)
    colours = np.rint(255 * class_colours(len(names))[1:, :3]).astype(int)
    file = fine_tuned_file(weights)
    rgb = [(int(red), int(green), int(blue)) for red, green, blue in colours]
    return LabelOutput(file_format, Segments(names[1:], rgb, VERSION, content_digest(file)))
