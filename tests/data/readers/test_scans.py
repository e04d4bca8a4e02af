"""Series that hold several scans: each is a volume of its own, no slice of one among those of another."""

import numpy as np
import pytest

from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from tests.data.readers.dicom_files import write_series, write_slice

NUM = 6
ONE, TWO = (np.random.default_rng(seed).integers(-1000, 1000, (4, 5, NUM)).astype(np.int16) for seed in (1, 2))


def found_in(folder, min_slices=3):
    return find_volumes([folder], min_slices=min_slices, skip=folder / "out", num_workers=1, progress=False)


def write_scan(folder, hu, *, start=0.0, step=2.0, backwards=False, **values):
    """Writes a scan; values may be functions of the slice's index."""
    for k in range(hu.shape[2]):
        own = {name: value(k) if callable(value) else value for name, value in values.items()}
        at = hu.shape[2] - 1 - k if backwards else k
        write_slice(folder / f"{k}", hu[:, :, at].T + 1024, (0, 0, start + step * at), **own)


def time(seconds):
    return f"{120000 + seconds:06d}"


BOTH = [
    ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
    ({"AcquisitionNumber": 1}, {}),
    ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}),
    ({"EchoNumbers": 1}, {"EchoNumbers": 2}),
    ({"TriggerTime": 100}, {"TriggerTime": 500}),
    ({"NominalPercentageOfCardiacPhase": 30}, {"NominalPercentageOfCardiacPhase": 70}),
    ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}),
    ({"KVP": 80}, {"KVP": 140}),
    ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}),
    ({"SeriesDescription": "native"}, {"SeriesDescription": "portal venous phase"}),
    ({"FrameOfReferenceUID": "1.5"}, {"FrameOfReferenceUID": "1.6"}),
    # By their order: one scan after the other, or each position twice.
    ({"AcquisitionTime": lambda k: time(k)}, {"AcquisitionTime": lambda k: time(20 + k)}),
    ({"AcquisitionTime": lambda k: time(2 * k)}, {"AcquisitionTime": lambda k: time(2 * k + 1)}),
    ({"TriggerTime": lambda k: 100 + k}, {"TriggerTime": lambda k: 500 - k}),
    ({"ContentTime": lambda k: time(k)}, {"ContentTime": lambda k: time(20 + k)}),
    ({"InstanceNumber": lambda k: 1 + k}, {"InstanceNumber": lambda k: 1 + NUM + k}),
    ({"InstanceNumber": lambda k: NUM - k}, {"InstanceNumber": lambda k: 2 * NUM - k, "start": 0.004}),
    # Positions that differ and lie between those of the other scan.
    ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2, "start": 1.0}),
    ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2, "start": 0.5}),
    ({"InstanceNumber": lambda k: 1 + k}, {"InstanceNumber": lambda k: 1 + NUM + k, "start": 0.5}),
    # One behind the other, with a gap.
    ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2, "start": 95.0}),
    # Another plane.
    ({}, {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}),
    ({}, {"PixelSpacing": [0.5, 0.5]}),
]


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_two_scans_of_a_series_are_two_volumes(tmp_path, first, second):
    write_scan(tmp_path / "a", ONE, **first)
    if "ImageOrientationPatient" in second:
        for k in range(NUM):
            write_slice(tmp_path / "b" / f"{k}", TWO[:, :, k].T + 1024, (k, 0, 0), **second)
    else:
        write_scan(tmp_path / "b", TWO, **second)
    found = found_in(tmp_path)
    assert (found.damaged, found.skipped) == ([], [])
    volumes = [(volume, *read_volume(volume)) for volume in found.volumes]
    assert len(volumes) == 2
    assert len({volume.name for volume, *_ in volumes}) == 2
    assert all(
        {path.parent.name for path in volume.files} in ({"a"}, {"b"}) and len(volume.files) == NUM
        for volume, *_ in volumes
    )
    assert all(volume.series.uneven == "" and volume.series.notes for volume, *_ in volumes)
    assert any(np.array_equal(voxels, ONE[::-1, ::-1]) for _, voxels, _ in volumes)


@pytest.mark.parametrize("step", [0.0049, 0.0051, 0.0099])
def test_positions_that_nearly_agree_are_one(tmp_path, step):
    """Whichever side of a rounded value they lie on."""
    write_scan(tmp_path / "a", ONE, AcquisitionNumber=1)
    write_scan(tmp_path / "b", TWO, AcquisitionNumber=2, start=step)
    assert [len(volume.files) for volume in found_in(tmp_path).volumes] == [NUM, NUM]


def test_phases_and_kernels_at_once(tmp_path):
    for phase in (1, 2, 3):
        for kernel in ("soft", "bone"):
            hu = ONE + 10 * phase + (kernel == "bone")
            write_scan(tmp_path / f"{phase}{kernel}", hu, TemporalPositionIdentifier=phase, ConvolutionKernel=kernel)
    found = found_in(tmp_path)
    values = {int(read_volume(volume)[0][0, 0, 0] - ONE[-1, -1, 0]) for volume in found.volumes}
    assert values == {10, 11, 20, 21, 30, 31}
    assert {volume.series.label for volume in found.volumes} >= {"TemporalPositionIdentifier 1, ConvolutionKernel bone"}


def test_scans_that_nothing_separates_are_named_and_not_mixed(tmp_path):
    write_scan(tmp_path / "a", ONE)
    write_scan(tmp_path / "b", TWO)
    found = found_in(tmp_path)
    assert found.volumes == []
    ((source, why),) = found.damaged
    assert "series 1.2.3" in source
    assert "up to 2 slices at one position, and no element of their headers separates the scans (12 slices" in why


@pytest.mark.parametrize(
    "values",
    [
        {"AcquisitionNumber": lambda k: k // 2},  # rotations of a scanner
        {"AcquisitionNumber": lambda k: k, "KVP": lambda k: 120 if k else 100},
        {"InstanceNumber": lambda k: k % 2},
        {"AcquisitionTime": lambda k: time(40 - k)},
    ],
)
def test_one_scan_stays_one(tmp_path, values):
    hu = np.concatenate([ONE, TWO], axis=2)
    write_scan(tmp_path, hu, **values)
    (volume,) = found_in(tmp_path).volumes
    assert np.array_equal(read_volume(volume)[0], hu[::-1, ::-1])
    assert volume.series.notes == ()
    assert volume.series.label == ""


def test_a_scout_in_the_series_leaves_the_scan_its_name(tmp_path):
    write_series(tmp_path / "in", ONE)
    (alone,) = found_in(tmp_path).volumes
    write_slice(tmp_path / "in" / "scout", ONE[:, :, 0].T, (0, 0, 0), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    found = found_in(tmp_path)
    (volume,) = found.volumes
    assert volume.name == alone.name
    assert np.array_equal(read_volume(volume)[0], ONE[::-1, ::-1])
    ((_, why),) = found.skipped
    assert "slices of different orientation; stack 2 of 2: 1 slices, fewer than --min_slices 3" in why


def test_partly_repeated_positions_give_a_whole_scan_and_a_short_one(tmp_path):
    write_scan(tmp_path / "a", ONE, AcquisitionNumber=1)
    write_scan(tmp_path / "b", TWO[:, :, :2], AcquisitionNumber=2)
    found = found_in(tmp_path)
    (volume,) = found.volumes
    assert np.array_equal(read_volume(volume)[0], ONE[::-1, ::-1])
    ((_, why),) = found.skipped
    assert why == "AcquisitionNumber 2: 2 slices, fewer than --min_slices 3"
