"""Label maps as DICOM-SEG, with a binary segment for each class."""

import warnings
from copy import copy
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from hyspark.data.readers.series import Series
from hyspark.data.readers.source_slices import SourceSlice
from hyspark.data.writers.source_images import COPIED, TYPE_2, Segments, check_segments, copy_identity, read_source
from hyspark.utils.install import extra_error

SEG_NUMBER = 9000
"""What is added to the number of the source's series."""
MAX_LABEL = 64
"""Characters of a segment's label."""
TUMOUR_WORDS = ("tumor", "tumour", "cancer", "carcinoma", "neoplasm", "metastasis", "metastases")
SIDE_WORDS = ("left", "right", "l", "r")


def dicom_seg_file(labels: np.ndarray, series: Series, segments: Segments) -> bytes:
    """Make the content of a DICOM-SEG file of a label map.

    Every class has a segment, whose number is the class's value, and empty frames are omitted. A map without any
    label becomes empty frames at its middle slice, since a file without frames is not valid.

    Args:
        labels: label map `(columns, rows, slices)` on the grid of the series.
        series: the series that it belongs to, whose patient and study are copied.
        segments: classes of the map.

    Raises:
        ModuleNotFoundError: highdicom is not installed.
        ValueError: the source lacks elements that are referred to.
    """
    check_segments(labels, series, segments)
    slices = read_source(series)
    highdicom = import_highdicom()
    identity = taken_identity(slices)
    unify_planes(slices, is_even=not series.uneven)
    sources, frames = as_frames(labels, slices)
    has_labels = bool(frames.any())
    positions = None
    if not has_labels:
        shown = slices[len(slices) // 2]
        sources, frames = [shown.data], frames[:1]
        positions = [highdicom.PlanePositionSequence("PATIENT", shown.header.position)]
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "HySparK", codes.DCM.ArtificialIntelligence, segments.version, parameters={"weights": segments.weights}
    )
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:MAX_LABEL],
            segmented_property_category=property_of(name)[0],
            segmented_property_type=property_of(name)[1],
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*colour),
        )
        for number, (name, colour) in enumerate(zip(segments.names, segments.colours, strict=True), 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values of the source that violate the standard
        made = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=generate_uid(),
            series_number=SEG_NUMBER + int(sources[0].get("SeriesNumber") or 0),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="HySparK",
            manufacturer_model_name="hyspark",
            software_versions=segments.version,
            device_serial_number=segments.weights,
            plane_positions=positions,
            omit_empty_frames=has_labels,
            content_label="SEGMENTATION",
            series_description="HySparK segmentation",
        )
        made.ContentCreatorName = ""
        copy_identity(identity, made)
        buffer = BytesIO()
        made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def import_highdicom() -> Any:
    """Import highdicom, which an extra of this package brings; raise ModuleNotFoundError if it is missing."""
    try:
        import highdicom
    except ImportError as error:
        raise extra_error(error, "DICOM-SEG needs highdicom", "dicom", "highdicom") from error
    return highdicom


def taken_identity(slices: list[SourceSlice]) -> Dataset:
    """Empty the elements of patient and study of all images, and return those of the first.

    highdicom copies them, and refuses values that break the standard, which scanners and anonymisers write.
    """
    first = slices[0].data
    identity = Dataset({first[name].tag: copy(first[name]) for name in COPIED if name in first})
    for data in {id(part.data): part.data for part in slices}.values():
        data.pop("SpecificCharacterSet", None)
        for name in TYPE_2:
            setattr(data, name, "")
    return identity


def unify_planes(slices: list[SourceSlice], *, is_even: bool) -> None:
    """Give all images of a series the orientation and the pixel measures of its first slice.

    highdicom takes them from the images, and expects that they are equal to the last digit and complete. The distance
    of slices replaces SpacingBetweenSlices, which some scanners write as a negative number.
    """
    plane, first, last = (np.array(value) for value in (slices[0].header.plane, *ends_of(slices)))
    distance = abs(float(np.cross(plane[4:7], plane[7:]) @ (last - first))) / max(1, len(slices) - 1)
    measures = Dataset()
    measures.PixelSpacing = [f"{value:.10g}" for value in plane[2:4]]
    measures.SliceThickness = f"{slices[0].header.thickness:.10g}"
    if is_even and distance:
        measures.SpacingBetweenSlices = f"{distance:.10g}"
    orientation = Dataset()
    orientation.ImageOrientationPatient = [f"{value:.10g}" for value in plane[4:]]
    for data in {id(part.data): part.data for part in slices}.values():
        if "SharedFunctionalGroupsSequence" in data:
            (shared,) = data.SharedFunctionalGroupsSequence
            shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
        else:
            data.pop("SpacingBetweenSlices", None)
            data.update(measures)
            data.update(orientation)


def ends_of(slices: list[SourceSlice]) -> tuple[Any, Any]:
    """Return the positions of the first and the last slice, in mm."""
    return slices[0].header.position, slices[-1].header.position


def as_frames(labels: np.ndarray, slices: list[SourceSlice]) -> tuple[list[Any], np.ndarray]:
    """Arrange labels as the frames `(frames, rows, columns)` of their source images.

    Raises:
        ValueError: several multi-frame files make one series.
    """
    sources = list({id(part.data): part.data for part in slices}.values())
    stack = np.ascontiguousarray(labels.transpose(2, 1, 0))
    if all(part.header.frame is None for part in slices):
        return sources, stack
    if len(sources) > 1:
        raise ValueError(
            f"{slices[0].header.path.name}: expected one multi-frame file, found {len(sources)} of one scan, to which "
            "a DICOM-SEG cannot refer; use --format rtstruct or nifti"
        )
    frames = np.zeros((int(sources[0].NumberOfFrames), *stack.shape[1:]), stack.dtype)
    for part, shown in zip(slices, stack, strict=True):
        frames[part.header.frame] = shown
    return sources, frames


def property_of(name: str) -> tuple[Code, Code]:
    """Look up the category and the type of a class by its name in SNOMED CT; those of tissue if it is unknown."""
    words = [word for word in name.lower().replace("_", " ").replace("-", " ").split() if word not in SIDE_WORDS]
    if any(word in TUMOUR_WORDS for word in words):
        return codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    for found in ("".join(words), "".join(words).removesuffix("s")):
        if found in coded_structures():
            return codes.SCT.AnatomicalStructure, coded_structures()[found]
    return codes.SCT.Tissue, codes.SCT.Tissue


@cache
def coded_structures() -> dict[str, Code]:
    """Return the codes of anatomical structures that may be segmented (CID 7192), by name in small letters."""
    structures = codes.CID7192
    named = {name.lower(): getattr(structures, name) for name in dir(structures) if name[0].isupper()}
    return {name: code for name, code in named.items() if isinstance(code, Code)}
