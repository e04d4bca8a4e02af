"""Findings in the files of a data set: kinds with severity, expectation and advice.

- error: training would fail on it, or learn nonsense from it;
- warning: someone should look at it;
- note: good to know.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding: its severity, the expected state, and advice."""

    severity: Severity
    expected: str
    advice: str


HU = "Hounsfield units (air -1000, water 0), or values that hu_min and hu_max were set to"
SET_WINDOW = "or set hu_min and hu_max to the range of such values for the run"
OF_MR = "for MR, check and train with --intensity mr"

FINDING_KINDS: dict[str, FindingKind] = {
    # The file
    "missing": FindingKind("error", "the file that the list names", "restore it, or take the case off the list"),
    "missing channel": FindingKind(
        "error",
        "a file for each of image_channels",
        "restore it, exclude the case, or train with other --image_channels",
    ),
    "dangling link": FindingKind("error", "a link to a file that exists", "fix the link, or remove it"),
    "no permission": FindingKind("error", "a file that you may read", "change its permissions (chmod a+r)"),
    "empty file": FindingKind("error", "a NIfTI file", "copy or convert it again"),
    "not NIfTI": FindingKind(
        "error", "a NIfTI file (.nii or .nii.gz)", "convert it, for example by dcm2niix, or remove it"
    ),
    "misnamed": FindingKind("error", "a name that says whether the file is compressed", "rename it"),
    "failed download": FindingKind("error", "a NIfTI file", "download the file itself"),
    "archive": FindingKind("error", "a NIfTI file", "unpack it, and use the NIfTI files in it"),
    "damaged": FindingKind("error", "a whole file with the right checksum", "copy or convert it again"),
    "too large": FindingKind("error", "a case that fits the memory", "lower --prepare_workers, or crop it"),
    "not as nnU-Net": FindingKind(
        "error",
        "an array of nnU-Net's: float32, channels and the three axes of its plan",
        "prepare the case again by nnUNetv2_preprocess",
    ),
    "not examined": FindingKind("error", "a case that can be examined", "convert it again, or remove it"),
    "not prepared": FindingKind("error", "a case that can be prepared", "fix it, or remove it"),
    # The header
    "not 3D": FindingKind(
        "error",
        "one volume of three axes",
        "if its volumes are channels, name those to read: --image_channels 0 1; else take one volume out of it",
    ),
    "colours": FindingKind("error", "one number a voxel", "it is a picture or a secondary capture; remove it"),
    "complex numbers": FindingKind("error", "real numbers", "it is no CT; remove it"),
    "impossible spacing": FindingKind(
        "error", "a spacing above 0 mm, and 1 mm to 10 m on each axis", "convert it again from the scanner's files"
    ),
    "odd spacing": FindingKind("warning", "voxels of .2 to 10 mm", "is the spacing in mm? convert it again if not"),
    "pixdim disagrees": FindingKind(
        "warning",
        "one spacing by pixdim and the sform",
        "the sform is used, as NIfTI says, but programs of ITK use pixdim; check the spacing",
    ),
    "not in mm": FindingKind("warning", "lengths in mm", "is its unit right? else set xyzt_units to 2"),
    "odd field": FindingKind("warning", "header fields as NIfTI defines them", "check the position; convert it again"),
    "singular affine": FindingKind("error", "an affine with three independent axes", "convert it again"),
    "sheared affine": FindingKind(
        "warning", "axes at right angles", "was the gantry tilted? resample it upright if it matters"
    ),
    "sform and qform disagree": FindingKind(
        "warning", "one position by both", "the sform is used, as NIfTI says; check left and right"
    ),
    "no orientation": FindingKind(
        "warning", "a header that says where the patient lies", "check left and right, and the spacing"
    ),
    "localiser": FindingKind("warning", "at least 4 voxels on each axis", "if it is a scout view, remove it"),
    "thin": FindingKind("warning", "at least 16 voxels and 32 mm on each axis", "most of its crops will be padding"),
    "text that may name a patient": FindingKind(
        "warning", "no personal data", "clear the header's texts before you publish it"
    ),
    "channel of another shape": FindingKind("error", "the shape of the first channel", "resample it to that grid"),
    "channel elsewhere": FindingKind(
        "error",
        "the position of the first channel, to half a voxel of each axis",
        "register and resample it to that grid",
    ),
    # The voxels
    "NaN or infinite": FindingKind("error", "numbers", "convert it again, or set these voxels to air, in a label to 0"),
    "constant": FindingKind("error", "more than one value", "the conversion failed, or it is blank; remove it"),
    "no foreground": FindingKind(
        "error",
        "a foreground of several values",
        "the conversion failed, or it is a mask; for a mask, --intensity none",
    ),
    "MR as CT": FindingKind("error", HU, OF_MR),
    "CT as MR": FindingKind("warning", "an image other than CT", "for CT, check and train with --intensity ct"),
    "all air": FindingKind("error", "tissue in the HU window", "is it CT in Hounsfield units?"),
    "offset": FindingKind("error", HU, "subtract what was added (1024 or 1000), or convert it again"),
    "inverted": FindingKind("error", HU, "air is bright; multiply it by -1, or convert it again"),
    "not HU": FindingKind(
        "error", HU, f"air, fat and tissue lie elsewhere, as of HU that were rescaled; convert it again, {SET_WINDOW}"
    ),
    "8-bit": FindingKind("error", HU, f"it was windowed for viewing; convert it again, {SET_WINDOW}; {OF_MR}"),
    "scaled": FindingKind("error", HU, f"it was normalised; convert it again, {SET_WINDOW}; {OF_MR}"),
    "wrapped around": FindingKind("error", HU, "negative values are read as unsigned; store it as signed 16 bits"),
    "narrow window": FindingKind(
        "error",
        "HU that were not clipped between hu_min and hu_max",
        "convert it again, or set hu_min and hu_max inside its range for the run",
    ),
    "label map": FindingKind("error", "an image", "it looks like a label map; name the image instead"),
    "like PET": FindingKind(
        "error", HU, f"it looks like PET; for PET, check and train with --intensity none; else {SET_WINDOW[3:]}"
    ),
    "no CT": FindingKind("error", HU, f"it looks like MR or another modality; {OF_MR}; else remove it, {SET_WINDOW}"),
    "another window": FindingKind(
        "error", "hu_min and hu_max around tissue, since the values are HU", "set them for HU, for example -175 and 250"
    ),
    "another modality": FindingKind(
        "warning", "an image of the declared modality", "the values are HU; name the channel CT if they are"
    ),
    "perhaps no CT": FindingKind(
        "warning",
        "air, fat or bone, by which CT in HU is recognised",
        "make sure that it is CT in HU, and name the channel CT in dataset.json",
    ),
    "background of 0": FindingKind("warning", "air of -1000 HU around the body", "set the background to -1024"),
    "another scale": FindingKind("note", "Hounsfield units", "it is taken, since hu_min and hu_max fit its values"),
    # The label
    "label of another shape": FindingKind("error", "the image's shape", "resample the label to its image"),
    "label elsewhere": FindingKind(
        "error", "the image's position, to half a voxel of each axis", "fix the headers; voxels are not moved here"
    ),
    "label not whole": FindingKind("error", "whole numbers from 0 to 255", "resample labels with nearest neighbour"),
    "label outside 0 to 255": FindingKind("error", "whole numbers from 0 to 255", "number the classes from 0"),
    "undeclared class": FindingKind(
        "error", "values that dataset.json declares", "declare the class, or fix the label"
    ),
    "unnamed class": FindingKind(
        "warning", "values that dataset.json names", "name them there, or set --out_channels, if they are classes"
    ),
    "different classes": FindingKind(
        "error", "one list of classes in all data sets", "run on one of them, --data FOLDER/DatasetXXX_NAME"
    ),
    "empty label": FindingKind(
        "warning", "at least one organ", "is it the right file? such a case teaches background alone"
    ),
    # The data set
    "label without image": FindingKind(
        "error", "imagesTr/CASE_0000 for each labelsTr/CASE", "add the image, or move the label away"
    ),
    "image without label": FindingKind("note", "a label for each image", "the image serves pre-training alone"),
    "two files for a case": FindingKind("error", "one file for the case", "keep one of them"),
    "two data sets of one name": FindingKind("error", "data sets of different names", "rename one of them"),
    "odd name": FindingKind("warning", "CASE_0000.nii.gz", "rename it; files of other names are not used"),
    "another format": FindingKind(
        "warning",
        '".nii.gz" or ".nii"',
        "convert such files by `hyspark import`; files of other formats are not used",
    ),
    "another channel": FindingKind("note", "a channel of image_channels", "the other channels are not used"),
    "unused label map": FindingKind(
        "note", "one label map for each image", "name it like its image, or combine label maps, to use it"
    ),
    "unused file": FindingKind("note", "an image to train on", "it is not used"),
    "listed twice": FindingKind("error", "each image once in a list", "remove the other entries"),
    "empty side": FindingKind(
        "warning",
        "cases for training and for validation",
        "name more cases, or change the split; fine-tuning needs both",
    ),
    "same content": FindingKind(
        "warning", "each scan once", "keep one, or training and validation may share a patient"
    ),
    "large subject": FindingKind(
        "warning", "subjects with at most a fifth of the cases", "splits keep the cases of a subject on one side"
    ),
    "pickled splits": FindingKind("warning", "splits_final.json", "convert it if you trust it"),
    "subject on both sides": FindingKind(
        "warning", "each subject on one side", "move its cases to one side; validation shows nothing new otherwise"
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

    @property
    def reason(self) -> str:
        """The finding in one line, without its file."""
        kind = FINDING_KINDS[self.kind]
        return f"{self.found}; expected {kind.expected}: {kind.advice}"

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def missing_channel(path: Path) -> Finding:
    """Make the finding of a further channel of a case that does not exist."""
    return Finding("missing channel", str(path), "no such file")
