"""Label maps of RTSTRUCT and DICOM-SEG files, by structures of known shape."""

import copy

import numpy as np
import pydicom
import pytest

from hyspark.data.readers.find import find_volumes
from hyspark.data.structures.class_names import ClassNames
from hyspark.data.structures.label_maps import label_series
from hyspark.data.structures.objects import read_label_object, volumes_of_object
from hyspark.utils.private_text import shown
from tests.data.readers.known_series import KNOWN, made_series, save
from tests.data.structures.structure_files import write_rtstruct, write_seg

SHAPE = (31, 27, 9)
CLASSES = ClassNames({"a": 1, "b": 2, "c": 3}, {name: (name,) for name in "abc"})
C, R = np.meshgrid(np.arange(SHAPE[0]), np.arange(SHAPE[1]), indexing="ij")


@pytest.fixture
def slices(tmp_path):
    return made_series(tmp_path / "made", np.zeros(SHAPE, np.int16))


def volume_of(folder):
    (volume,) = find_volumes([folder], min_slices=2, skip=folder / "x", num_workers=1, progress=False).volumes
    return volume


def labels_of(folder, *paths):
    made = label_series(volume_of(folder).series, [read_label_object(path) for path in paths], CLASSES)
    return made.labels, [shown(note) for note in made.notes], [shown(fault) for fault in made.faults], made


def circle(column, row, radius, part, height=None, corners=90):
    """A circle in voxels of a slice, as points in mm; `height` along its normal instead of the slice's."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + 0.01
    flat = np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], 1)
    directions = np.array(part.ImageOrientationPatient, float).reshape(2, 3)
    spacing = np.array(part.PixelSpacing, float)[::-1]
    points = np.array(part.ImagePositionPatient, float) + flat * spacing @ directions
    return points if height is None else points + height * np.cross(*directions)


def disc(column, row, radius):
    return (C - column) ** 2 + (R - row) ** 2 < radius**2


@pytest.mark.parametrize(
    "name", ["plain", "gantry tilt", "one slice missing", "distances change", "enhanced multi-frame"]
)
def test_circles_with_holes_lie_on_their_slices(tmp_path, slices, name):
    in_order = copy.deepcopy(slices)
    KNOWN[name](tmp_path / "in", slices)
    if len(slices) != len(in_order) or name != "enhanced multi-frame":
        in_order = slices
    contours = [circle(14.3, 13.2, 9.1, part) for part in in_order[2:6]]
    contours += [circle(15.3, 12.2, 4.1, part) for part in in_order[3:5]]  # a hole
    contours += [contours[0], ("POINT", [[0, 0, 0]]), ("OPEN_PLANAR", contours[0][:9])]
    write_rtstruct(tmp_path / "rt", in_order, {"A ": contours, "other": contours, "b": []})
    labels, notes, faults, made = labels_of(tmp_path / "in", tmp_path / "rt")
    expected = np.zeros((*SHAPE[:2], len(in_order)), np.uint8)
    expected[:, :, 2:6][disc(14.3, 13.2, 9.1)] = 1
    expected[:, :, 3:5][disc(15.3, 12.2, 4.1)] = 0
    assert (labels != expected).sum() <= 2  # a circle of 90 corners
    assert notes == ["a: 2 contours of points or lines not used", "a: 1 contour repeat another and are not used"]
    assert faults == []
    assert made.voxels == {"a": int((labels == 1).sum()), "b": 0}


def test_a_keyhole_is_a_hole(tmp_path, slices):
    save(tmp_path / "in", slices)
    outer, inner = circle(14.3, 13.2, 9.1, slices[4]), circle(14.3, 13.2, 4.1, slices[4])[::-1]
    keyhole = np.concatenate([outer, outer[:1], inner[-1:], inner, outer[:1]])
    write_rtstruct(tmp_path / "rt", slices, {"a": [keyhole]})
    labels = labels_of(tmp_path / "in", tmp_path / "rt")[0]
    assert np.array_equal(labels[:, :, 4] == 1, disc(14.3, 13.2, 9.1) & ~disc(14.3, 13.2, 4.1))
    assert not labels[:, :, [3, 5]].any()


@pytest.mark.parametrize(
    ("heights", "taken", "is_noted"),
    [
        ([4, 6, 8], [2, 3, 4], False),
        ([4.9, 6.9], [2, 3], True),  # between slices at 4, 6, 8
        ([4, 8, 12], [2, 3, 4, 5, 6, 7], True),  # every second slice
        ([2, 14], [1, 7], False),  # two parts
        ([4, 5, 6, 7, 8], [2, 3, 4], False),  # closer than the slices
        ([6], [3], False),
    ],
)
def test_slices_take_the_nearest_contours(tmp_path, slices, heights, taken, is_noted):
    save(tmp_path / "in", slices)
    contours = [circle(14.3, 13.2, 6.1, slices[0], height) for height in heights]
    write_rtstruct(tmp_path / "rt", slices, {"a": contours})
    labels, notes, _, _ = labels_of(tmp_path / "in", tmp_path / "rt")
    assert np.flatnonzero(labels.any((0, 1))).tolist() == taken
    assert bool(notes) == is_noted


def test_contours_beyond_the_slices_are_counted(tmp_path, slices):
    save(tmp_path / "in", slices)
    contours = [circle(14.3, 13.2, 6.1, slices[0], height) for height in (-8, -6, 0, 2, 30)]
    write_rtstruct(tmp_path / "rt", slices, {"a": contours})
    labels, notes, _, _ = labels_of(tmp_path / "in", tmp_path / "rt")
    assert np.flatnonzero(labels.any((0, 1))).tolist() == [0, 1]
    assert notes == ["a: contours at 3 of 5 positions lie on no slice, and are not used"]


def test_contours_across_the_slices_and_damaged_ones_are_named(tmp_path, slices):
    save(tmp_path / "in", slices)
    flat = circle(14.3, 13.2, 6.1, slices[3])
    write_rtstruct(tmp_path / "rt", slices, {"a": [flat[:, [2, 1, 0]]], "b": [flat.ravel()[:-1]], "c": [flat]})
    labels, _, faults, _ = labels_of(tmp_path / "in", tmp_path / "rt")
    assert set(np.unique(labels)) == {0, 3}
    assert faults[0].startswith("rt: a (a): its contours lie across the slices, by up to 12")
    assert faults[1] == "rt: b (b): ContourData: expected three coordinates a point, found 269 numbers"


def test_overlaps_and_versions(tmp_path, slices):
    """The later class of the list counts where classes overlap, the newest file where files hold the same class."""
    save(tmp_path / "in", slices)
    small, large = ([circle(14.3, 13.2, radius, slices[4])] for radius in (4.1, 9.1))
    write_rtstruct(tmp_path / "new", slices, {"b": small, "a": large}, StructureSetDate="20250101")
    write_rtstruct(tmp_path / "old", slices, {"b": large, "c": [circle(14.3, 13.2, 1.1, slices[4])]})
    labels, notes, _, made = labels_of(tmp_path / "in", tmp_path / "new", tmp_path / "old")
    expected = np.select([disc(14.3, 13.2, 1.1), disc(14.3, 13.2, 4.1), disc(14.3, 13.2, 9.1)], [3, 2, 1])
    assert np.array_equal(labels[:, :, 4], expected)
    assert notes == ["b in several files; the newest counts"]
    assert made.overlaps == {"a": int(disc(14.3, 13.2, 4.1).sum()), "b": int(disc(14.3, 13.2, 1.1).sum())}


def test_what_a_file_refers_to(tmp_path, slices):
    save(tmp_path / "in" / "a", slices)
    other = copy.deepcopy(slices)
    for number, data in enumerate(other):
        data.SeriesInstanceUID = "1.2.9"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.9.{number}"
    save(tmp_path / "in" / "b", other)
    volumes = find_volumes([tmp_path / "in"], min_slices=2, skip=tmp_path, num_workers=1, progress=False).volumes
    for refers, expected, note in [
        ("images", ["a"], ""),
        ("series", ["a"], ""),
        ("frame", ["a", "b"], "drawn on another series in the same frame of reference"),
    ]:
        write_rtstruct(tmp_path / refers, slices, {"a": []}, refers=refers)
        found, text = volumes_of_object(read_label_object(tmp_path / refers), volumes)
        assert (sorted(volume.source.name for volume in found), text) == (expected, note)
    elsewhere = copy.deepcopy(slices)
    for data in elsewhere:
        data.FrameOfReferenceUID = "1.2.3.4"
    write_rtstruct(tmp_path / "frame", elsewhere, {"a": []}, refers="frame")
    assert volumes_of_object(read_label_object(tmp_path / "frame"), volumes) == ([], "")


def random_pixels():
    draw = np.random.default_rng(3)
    return (draw.integers(0, 4, SHAPE[::-1]) * (draw.random(SHAPE[::-1]) < 0.5)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
@pytest.mark.parametrize("name", ["plain", "gantry tilt", "one slice missing", "enhanced multi-frame"])
def test_segments_are_read_to_the_voxel(tmp_path, slices, kind, name):
    KNOWN[name](tmp_path / "in", slices)
    sources = [pydicom.dcmread(path) for path in sorted((tmp_path / "in").iterdir())]
    groups = sources[0].get("PerFrameFunctionalGroupsSequence", ())
    heights = [group.PlanePositionSequence[0].ImagePositionPatient[2] for group in groups]
    pixels = random_pixels()[: max(len(sources), len(heights))]
    pixels[2] = 0
    write_seg(tmp_path / "seg", sources, pixels, ["A", "b", "C"], kind)
    labels, notes, faults, _ = labels_of(tmp_path / "in", tmp_path / "seg")
    in_order = pixels[np.argsort(heights)] if heights else pixels
    assert np.array_equal(labels.transpose(2, 1, 0), in_order)
    assert faults == []
    assert bool(notes) == (kind == "FRACTIONAL")


def test_fractions_count_from_one_half(tmp_path, slices):
    save(tmp_path / "in", slices)
    fractions = np.random.default_rng(1).random((*SHAPE[::-1], 1))
    write_seg(tmp_path / "seg", slices, fractions, ["a"], "FRACTIONAL", max_fractional_value=100)
    labels = labels_of(tmp_path / "in", tmp_path / "seg")[0].transpose(2, 1, 0)
    shown = fractions[..., 0]
    assert (labels[shown > 0.51] == 1).all()
    assert (labels[shown < 0.49] == 0).all()


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_segment_on_a_parallel_grid_is_resampled(tmp_path, slices, axes):
    """A box in another series: voxels of half the size, more of them, its axes in another order."""
    save(tmp_path / "in", slices)
    low, high = np.array([5.25, 6.25, 3.0]), np.array([20.25, 15.25, 11.0])  # mm, between the centres of voxels
    spacing = np.array([0.5, 0.5, 1.0])[list(axes)]
    origin, shape = np.array([-5.0, -5, -3]), np.array([90, 80, 30])[list(axes)]
    positions = [np.arange(n) * step for n, step in zip(shape, spacing, strict=True)]
    directions = np.eye(3)[list(axes)]
    where = origin + (
        positions[0][:, None, None, None] * directions[0]
        + positions[1][None, :, None, None] * directions[1]
        + positions[2][None, None, :, None] * directions[2]
    )
    box = ((where > low) & (where < high)).all(-1)
    sources = []
    for k in range(shape[2]):
        data = copy.deepcopy(slices[0])
        data.Rows, data.Columns = int(shape[1]), int(shape[0])
        data.PixelSpacing = [spacing[1], spacing[0]]
        data.ImageOrientationPatient = [*directions[0], *directions[1]]
        data.ImagePositionPatient = [*(origin + positions[2][k] * directions[2])]
        data.SliceThickness = spacing[2]
        data.SOPInstanceUID = f"1.2.8.{k}"
        sources.append(data)
    write_seg(tmp_path / "seg", sources, box.transpose(2, 1, 0).astype(np.uint8), ["a"])
    labels, notes, faults, _ = labels_of(tmp_path / "in", tmp_path / "seg")
    centres = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * [1, 1, 2]
    expected = ((centres > low) & (centres < high)).all(-1)
    assert faults == []
    assert notes == ["a: on another grid; slices take the nearest voxels"]
    assert np.array_equal(labels == 1, expected)


def test_a_segment_on_an_oblique_grid_is_refused(tmp_path, slices):
    save(tmp_path / "in", slices)
    turned = copy.deepcopy(slices)
    for data in turned:
        data.ImageOrientationPatient = [0.8, 0.6, 0, -0.6, 0.8, 0]
    write_seg(tmp_path / "seg", turned, random_pixels(), ["a", "b", "c"])
    labels, _, faults, _ = labels_of(tmp_path / "in", tmp_path / "seg")
    assert not labels.any()
    assert faults[0] == "seg: a (a): its grid is not parallel to the slices of the series; resample it"


def test_damaged_files_are_named(tmp_path, slices):
    save(tmp_path / "in", slices)
    write_seg(tmp_path / "seg", slices, random_pixels(), ["a", "b", "c"])
    data = pydicom.dcmread(tmp_path / "seg")
    del data.SharedFunctionalGroupsSequence
    data.save_as(tmp_path / "seg")
    faults = labels_of(tmp_path / "in", tmp_path / "seg")[2]
    assert faults[0].startswith("seg: unreadable as SEG (expected position, orientation and spacing of each frame")
    write_rtstruct(tmp_path / "rt", slices, {})
    with pytest.raises(ValueError, match="expected structures, found a RTSTRUCT without any"):
        read_label_object(tmp_path / "rt")
    (tmp_path / "rt").write_bytes((tmp_path / "rt").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"unreadable as DICOM|expected structures"):
        read_label_object(tmp_path / "rt")
