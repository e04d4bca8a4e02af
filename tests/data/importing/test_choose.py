"""Which scans are imported: filters, one scan of a study, and the name of the channel."""

import pydicom
import pytest

from hyspark.data.importing.choice import Choice
from hyspark.data.importing.choose import channel_name, choose_volumes, sequence_of
from hyspark.data.readers.dicom import read_header
from hyspark.data.readers.find import find_volumes
from tests.data.importing.imports import HU, lines, refused, run_import
from tests.data.readers.dicom_files import write_series, write_slice

SCANS = {
    "long": {"slices": 9, "spacing": 5.0, "ConvolutionKernel": "B30f", "SeriesDescription": "Abdomen venous 5.0"},
    "thin": {"slices": 8, "spacing": 1.0, "ConvolutionKernel": "B70f", "SeriesDescription": "Lung 1.0"},
    "overlapping": {"slices": 9, "spacing": 2.0, "ConvolutionKernel": "B30f", "SliceThickness": 6},
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Three scans of a study, one of another study of the patient, and one of another patient."""
    folder = tmp_path_factory.mktemp("in")
    scans = [("P1", "1.9.1", name) for name in SCANS] + [("P1", "1.9.2", "thin"), ("P2", "1.9.3", "long")]
    for number, (patient, study, name) in enumerate(scans):
        values = {"PatientID": patient, "StudyInstanceUID": study, "SeriesInstanceUID": f"1.2.{number}", **SCANS[name]}
        num = values.pop("slices")
        write_series(folder / f"{study}-{name}", HU[:, :, :num], **values)
    return find_volumes([folder], min_slices=1, skip=folder / "out", progress=False).volumes


def chosen(volumes, **choice):
    kept, excluded = choose_volumes(volumes, Choice(**choice))
    assert len(kept) + len(excluded) == len(volumes)
    return sorted(volume.source.name for volume in kept), {volume.source.name: why for volume, why in excluded}


ALL = ["1.9.1-long", "1.9.1-overlapping", "1.9.1-thin", "1.9.2-thin", "1.9.3-long"]


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({}, ALL),
        ({"choose": "most_slices"}, ["1.9.1-long", "1.9.2-thin", "1.9.3-long"]),  # the thinner of nine slices
        ({"choose": "thinnest"}, ["1.9.1-thin", "1.9.2-thin", "1.9.3-long"]),
        ({"kernel": "b30"}, ["1.9.1-long", "1.9.1-overlapping", "1.9.3-long"]),
        ({"kernel": "b30", "choose": "thinnest"}, ["1.9.1-long", "1.9.3-long"]),
        ({"series_description": "venous|LUNG"}, ["1.9.1-long", "1.9.1-thin", "1.9.2-thin", "1.9.3-long"]),
        ({"max_thickness": 5.0}, ["1.9.1-long", "1.9.1-thin", "1.9.2-thin", "1.9.3-long"]),
        ({"max_thickness": 4.9, "choose": "most_slices"}, ["1.9.1-thin", "1.9.2-thin"]),
        ({"modality": "MR"}, []),
    ],
)
def test_the_rule_takes_one_scan_of_each_study_after_the_filters(volumes, choice, kept):
    assert chosen(volumes, **choice)[0] == kept
    assert chosen(volumes[::-1], **choice)[0] == kept


def test_excluded_scans_say_why(volumes):
    assert chosen(volumes, kernel="b30", choose="most_slices")[1] == {
        "1.9.1-thin": "ConvolutionKernel does not match --kernel",
        "1.9.2-thin": "ConvolutionKernel does not match --kernel",
        "1.9.1-overlapping": "--choose most_slices: 9 slices of 6 mm; another scan of the study has 9 of 5 mm",
    }
    assert chosen(volumes, series_description="x")[1]["1.9.1-overlapping"].startswith("no SeriesDescription, which")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernel", "("], "--kernel: expected a regular expression, got '('"),
        (["--description", "["], "--series_description: expected a regular expression, got '['"),
        (["--min_slices", "0"], "--min_slices: expected at least 1, got 0"),
        (["--max_thickness", "-1"], "--max_thickness: expected mm above 0, or 0 for any, got -1"),
        (["--prepare_workers", "-1"], "prepare_workers"),
        (["--choose", "best"], "most_slices"),
        (["--modality", "US"], "'CT', 'MR', 'PT'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path, capsys, flags, message):
    write_series(tmp_path / "in", HU)
    assert message in refused(tmp_path / "in", capsys, *flags)


def test_choices_reach_the_record(tmp_path, capsys):
    for name, values in SCANS.items():
        values = {"SeriesInstanceUID": f"1.{len(name)}", "StudyInstanceUID": "1.9", **values}
        write_series(tmp_path / "in" / name, HU[:, :, : values.pop("slices")], **values)
    out = run_import(tmp_path / "in", "--choose=thinnest", "--description=5.0|1.0")
    assert [(entry["slices"], entry["thickness"], entry["kernel"]) for entry in lines(out, "imported")] == [
        (8, 1.0, "B70f")
    ]
    assert "no SeriesDescription, which --series_description asks for" in capsys.readouterr().out
    assert len(lines(out, "excluded")) == 2


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"SeriesDescription": "t1_mprage_sag_p2_iso"}, "T1"),
        ({"SeriesDescription": "Ax T2 FLAIR"}, "FLAIR"),
        ({"SeriesDescription": "AX T2 FSE FS"}, "T2"),
        ({"ProtocolName": "ep2d_diff_b1000"}, "DWI"),
        ({"DiffusionBValue": 1000.0}, "DWI"),
        ({"SeriesDescription": "dwi", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "ADC"),
        ({"SeriesDescription": "PD_TSE"}, "PD"),
        ({"SeriesDescription": "knee 4711"}, ""),
        ({}, ""),
    ],
)
def test_sequences_of_mr(tmp_path, values, name):
    write_slice(tmp_path / "a", HU[:, :, 0].T, (0, 0, 0), **{"Modality": "MR", **values})
    (header,) = read_header(tmp_path / "a")
    assert sequence_of(header) == name
    assert channel_name([header, header], "MR") == (name or "MR")
    assert channel_name([header], "CT") == "CT"


def test_b_values_of_manufacturers(tmp_path):
    write_slice(tmp_path / "a", HU[:, :, 0].T, (0, 0, 0), Modality="MR")
    data = pydicom.dcmread(tmp_path / "a")
    data.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "800")
    data.save_as(tmp_path / "a")
    (header,) = read_header(tmp_path / "a")
    assert header.mark("DiffusionBValue") == "800"
