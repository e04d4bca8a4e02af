"""Findings in the files of a data set: kinds with severity, expectation and advice.

- error: training would fail on it, or learn nonsense from it;
- warning: someone should look at it;
- note: good to know.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding: its severity, the expected state, and advice."""

    severity: Severity
    expected: str
    advice: str


FINDING_KINDS: dict[str, FindingKind] = {
    # The file
    "missing": FindingKind("error", "the file that the list names", "restore it, or take the case off the list"),
    "dangling link": FindingKind("error", "a link to a file that exists", "fix the link, or remove it"),
    "no permission": FindingKind("error", "a file that you may read", "change its permissions (chmod a+r)"),
    "empty file": FindingKind("error", "a NIfTI file", "copy or convert it again"),
    "not NIfTI": FindingKind(
        "error", "a NIfTI file (.nii or .nii.gz)", "convert it, for example by dcm2niix, or remove it"
    ),
    "damaged": FindingKind("error", "a whole file with the right checksum", "copy or convert it again"),
    # The header
    "not 3D": FindingKind("error", "one volume of three axes", "take one volume out of it, or remove it"),
    "colours": FindingKind("error", "one number a voxel", "it is a picture or a secondary capture; remove it"),
    "complex numbers": FindingKind("error", "real numbers", "it is no CT; remove it"),
    "impossible spacing": FindingKind(
        "error", "a spacing above 0 mm on each axis", "convert it again from the scanner's files"
    ),
    "odd spacing": FindingKind("warning", "voxels of .2 to 10 mm", "is the spacing in mm? convert it again if not"),
    "singular affine": FindingKind("error", "an affine with three independent axes", "convert it again"),
    "sheared affine": FindingKind(
        "warning", "axes at right angles", "was the gantry tilted? resample it upright if it matters"
    ),
    "sform and qform disagree": FindingKind(
        "warning", "one position by both", "the sform is used; check left and right"
    ),
    "no orientation": FindingKind(
        "warning", "a header that says where the patient lies", "check left and right, and the spacing"
    ),
    "localiser": FindingKind("warning", "at least 4 voxels on each axis", "if it is a scout view, remove it"),
    "thin": FindingKind("warning", "at least 16 voxels and 32 mm on each axis", "most of its crops will be padding"),
    "text that may name a patient": FindingKind(
        "warning", "no personal data", "clear the header's texts before you publish it"
    ),
    # The voxels
    "NaN or infinite": FindingKind("error", "numbers", "convert it again, or set these voxels to air"),
    "constant": FindingKind("error", "more than one value", "the conversion failed, or it is blank; remove it"),
    "all air": FindingKind("error", "tissue in the HU window", "is it CT in Hounsfield units?"),
    "offset": FindingKind("warning", "Hounsfield units (air -1000, water 0)", "subtract 1024, or convert it again"),
    "8-bit": FindingKind(
        "warning", "Hounsfield units (air -1000, water 0)", "it was windowed for viewing; convert it again"
    ),
    "scaled": FindingKind("warning", "Hounsfield units (air -1000, water 0)", "it was normalised; convert it again"),
    "wrapped around": FindingKind("warning", "Hounsfield units (air -1000, water 0)", "store it as signed 16 bits"),
    # The label
    "label of another shape": FindingKind("error", "the image's shape", "resample the label to its image"),
    "label elsewhere": FindingKind("error", "the image's position", "fix the headers; voxels are not moved here"),
    "label not whole": FindingKind("error", "whole numbers from 0 to 255", "resample labels with nearest neighbour"),
    "undeclared class": FindingKind(
        "error", "values that dataset.json declares", "declare the class, or fix the label"
    ),
    "empty label": FindingKind(
        "warning", "at least one organ", "is it the right file? such a case teaches background alone"
    ),
    # The data set
    "label without image": FindingKind(
        "error", "imagesTr/CASE_0000 for each labelsTr/CASE", "add the image, or move the label away"
    ),
    "image without label": FindingKind("note", "a label for each image", "the image serves pre-training alone"),
    "two files for a case": FindingKind("error", "one file", "keep one of them"),
    "odd name": FindingKind("warning", "CASE_0000.nii.gz", "rename it; files of other names are not used"),
    "same content": FindingKind(
        "warning", "each scan once", "keep one, or training and validation may share a patient"
    ),
    "large subject": FindingKind(
        "warning", "subjects with at most a fifth of the cases", "splits keep the cases of a subject on one side"
    ),
    "unused class": FindingKind("note", "an organ that some label holds", "nothing can be learned of it"),
    "no class names": FindingKind("note", "dataset.json with labels", "classes will be called by their values"),
    "unreadable list": FindingKind("error", "a JSON as of nnU-Net or the decathlon", "fix it"),
}


@dataclass(frozen=True)
class Finding:
    """A finding in a file.

    Attributes:
        kind: a key of FINDING_KINDS.
        file: path of the file.
        found: the state of the file.
    """

    kind: str
    file: str
    found: str

    @property
    def severity(self) -> Severity:
        """Severity of the finding's kind."""
        return FINDING_KINDS[self.kind].severity

    def __str__(self) -> str:
        kind = FINDING_KINDS[self.kind]
        return f"{self.file}: {self.found}; expected {kind.expected}: {kind.advice}"
