"""What can be wrong with the files of a data set: each kind with its severity, what was expected, and what to do.

Errors are what training would fail on, or learn nonsense from; warnings are what someone should look at; notes are
good to know.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    severity: Severity
    expected: str
    advice: str


KINDS: dict[str, Kind] = {
    # The file
    "missing": Kind("error", "the file that the list names", "restore it, or take the case off the list"),
    "dangling link": Kind("error", "a link to a file that exists", "mend the link, or remove it"),
    "no permission": Kind("error", "a file that you may read", "change its permissions (chmod a+r)"),
    "empty file": Kind("error", "a NIfTI file", "copy or convert it again"),
    "not NIfTI": Kind("error", "a NIfTI file (.nii or .nii.gz)", "convert it, for example by dcm2niix, or remove it"),
    "damaged": Kind("error", "a whole file with the right checksum", "copy or convert it again"),
    # The header
    "not 3D": Kind("error", "one volume of three axes", "take one volume out of it, or remove it"),
    "colours": Kind("error", "one number a voxel", "it is a picture or a secondary capture; remove it"),
    "complex numbers": Kind("error", "real numbers", "it is no CT; remove it"),
    "impossible spacing": Kind(
        "error", "a spacing above 0 mm on each axis", "convert it again from the scanner's files"
    ),
    "odd spacing": Kind("warning", "voxels of .2 to 10 mm", "is the spacing in mm? convert it again if not"),
    "singular affine": Kind("error", "an affine that tells three axes apart", "convert it again"),
    "sheared affine": Kind(
        "warning", "axes at right angles", "was the gantry tilted? resample it upright if it matters"
    ),
    "sform and qform disagree": Kind("warning", "one place by both", "the sform is used; check left and right"),
    "no orientation": Kind(
        "warning", "a header that says where the patient lies", "check left and right, and the spacing"
    ),
    "localiser": Kind("warning", "at least 4 voxels on each axis", "if it is a scout view, remove it"),
    "thin": Kind("warning", "at least 16 voxels and 32 mm on each axis", "most of its crops will be padding"),
    "text that may name a patient": Kind("warning", "no personal data", "clear the header's texts before you share it"),
    # The voxels
    "NaN or infinite": Kind("error", "numbers", "convert it again, or set these voxels to air"),
    "constant": Kind("error", "more than one value", "the conversion failed, or it is blank; remove it"),
    "all air": Kind("error", "tissue in the HU window", "is it CT in Hounsfield units?"),
    "offset": Kind("warning", "Hounsfield units (air -1000, water 0)", "subtract 1024, or convert it again"),
    "8-bit": Kind("warning", "Hounsfield units (air -1000, water 0)", "it was windowed for viewing; convert it again"),
    "scaled": Kind("warning", "Hounsfield units (air -1000, water 0)", "it was normalised; convert it again"),
    "wrapped around": Kind("warning", "Hounsfield units (air -1000, water 0)", "store it as signed 16 bits"),
    # The label
    "label of another shape": Kind("error", "the image's shape", "resample the label to its image"),
    "label elsewhere": Kind("error", "the image's place", "mend the headers; voxels are not moved here"),
    "label not whole": Kind("error", "whole numbers from 0 to 255", "resample labels with nearest neighbour"),
    "undeclared class": Kind("error", "values that dataset.json declares", "declare the class, or mend the label"),
    "empty label": Kind("warning", "at least one organ", "is it the right file? such a case teaches background alone"),
    # The data set
    "label without image": Kind(
        "error", "imagesTr/CASE_0000 for each labelsTr/CASE", "add the image, or move the label away"
    ),
    "image without label": Kind("note", "a label for each image", "the image serves pre-training alone"),
    "two files for a case": Kind("error", "one file", "keep one of them"),
    "odd name": Kind("warning", "CASE_0000.nii.gz", "rename it; files of other names are not used"),
    "same content": Kind("warning", "each scan once", "keep one, or training and validation may share a patient"),
    "unused class": Kind("note", "an organ that some label holds", "nothing can be learned of it"),
    "no class names": Kind("note", "dataset.json with labels", "classes will be called by their values"),
    "unreadable list": Kind("error", "a JSON as nnU-Net or the decathlon has it", "mend it"),
}


@dataclass(frozen=True)
class Finding:
    """A fault of a file. kind: of KINDS. found: what is there."""

    kind: str
    file: str
    found: str

    @property
    def severity(self) -> Severity:
        """Of its kind."""
        return KINDS[self.kind].severity

    def __str__(self) -> str:
        kind = KINDS[self.kind]
        return f"{self.file}: {self.found}; expected {kind.expected}: {kind.advice}"
