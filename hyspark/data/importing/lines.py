"""What was found -> lines of the record, without private texts, and lines of the private table."""

from typing import Any

from hyspark.data.importing.choose import thickness_of
from hyspark.data.importing.pseudonyms import Pseudonyms
from hyspark.data.readers.elements import Header
from hyspark.data.readers.volumes import NotUsed, Volume
from hyspark.utils.private_text import without_private

IMPORTED, EXCLUDED, FAILED = "imported", "excluded", "failed"
PRIVATE_COLUMNS = (
    *("id", "status", "case", "patient", "study", "patient_id", "study_uid", "series_uid", "description", "source"),
)
"""Columns of the private table."""
SeriesEntry = dict[str, Any]


def header_of(one: Volume | NotUsed) -> Header | None:
    """Return the header of a slice of a DICOM series; None for other files."""
    if isinstance(one, NotUsed):
        return one.header
    return one.series.header if one.series else None


def patient_of(one: Volume | NotUsed) -> str:
    """Return the ID of the patient, else name and birth date, else what stands for them; empty if unknown."""
    header = header_of(one)
    known = (header.patient or header.person) if header else ""
    return known or (one.patient if isinstance(one, Volume) else "")


def scan_id(one: Volume | NotUsed, pseudonyms: Pseudonyms) -> str:
    """Return digits that stand for a scan, or for a file that is no volume."""
    return pseudonyms.of("scan", f"{patient_of(one)}\0{one.identity}")


def case_name(volume: Volume, pseudonyms: Pseudonyms) -> str:
    """Return the name of the case of a volume: subject and scan."""
    return f"{pseudonyms.patient(patient_of(volume))}_{scan_id(volume, pseudonyms)}"


def entry_of(
    one: Volume | NotUsed, status: str, pseudonyms: Pseudonyms, *, why: str = "", keep_descriptions: bool = False
) -> SeriesEntry:
    """Make the line of the record for a volume, or for files that are none.

    Args:
        one: the volume or the files.
        status: IMPORTED, EXCLUDED or FAILED.
        pseudonyms: what stands for ids.
        why: the reason, with private parts marked.
        keep_descriptions: whether the line has SeriesDescription.
    """
    header, patient = header_of(one), patient_of(one)
    study = header.mark("StudyInstanceUID") if header else ""
    entry: SeriesEntry = {
        "id": scan_id(one, pseudonyms),
        "status": status,
        "case": case_name(one, pseudonyms) if isinstance(one, Volume) and status == IMPORTED else "",
        "patient": pseudonyms.patient(patient) if patient else "",
        "study": pseudonyms.of("study", study) if study else "",
        "series": pseudonyms.of("series", header.series) if header and header.series else "",
        "format": one.file_format if isinstance(one, Volume) else "dicom" if header else "",
        "files": len(one.files) if isinstance(one, Volume) else one.num_files,
    }
    if header:
        entry |= {"modality": header.modality, "kernel": header.mark("ConvolutionKernel")}
    if isinstance(one, Volume) and one.series:
        entry |= {"slices": len(one.series.slices), "thickness": thickness_of(one)}
    if header and keep_descriptions:
        entry["description"] = header.mark("SeriesDescription")
    return entry | ({"why": without_private(why)} if why else {})


def private_row(one: Volume | NotUsed, entry: SeriesEntry) -> dict[str, str]:
    """Make the line of the private table for a line of the record."""
    header = header_of(one)
    known = {name: str(entry[name]) for name in PRIVATE_COLUMNS[:5]}
    return known | {
        "patient_id": patient_of(one),
        "study_uid": header.mark("StudyInstanceUID") if header else "",
        "series_uid": header.series if header else "",
        "description": header.mark("SeriesDescription") if header else "",
        "source": str(one.source),
    }
