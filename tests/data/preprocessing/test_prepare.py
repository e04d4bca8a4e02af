"""Preparation equals MONAI's transforms written out, refuses what it cannot use, and is done once per volume."""

import os
import re
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
from monai.transforms import CropForeground, LoadImage, Orientation, ScaleIntensityRange, Spacing

from hyspark.data.batches.crops import crop_start
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing import entry_files
from hyspark.data.preprocessing import prepare as prepare_module
from hyspark.data.preprocessing import store as store_module
from hyspark.data.preprocessing.entry_files import is_intact, is_sound
from hyspark.data.preprocessing.prepare import (
    failure_message,
    killed_preparation,
    prepare_case,
    prepare_missing,
    stored_volumes,
)
from hyspark.data.preprocessing.store import EARLIER_FORMAT, StoredVolume, entry_folder, open_array
from hyspark.data.quality import case_files
from hyspark.data.readers.nifti import read_voxels
from hyspark.data.settings import PrepareSettings
from hyspark.data.synthetic.phantom import make_phantom
from hyspark.utils.processes import KILLED

COARSE = PrepareSettings(spacing=(6.0, 6.0, 6.0))
RNG = np.random.default_rng(0)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1]) if affine is None else affine), path)
    return path


def write_phantom(folder: Path, name: str, seed: int = 1, **kwargs) -> Case:
    """A small trunk on disk, with its label."""
    phantom = make_phantom(seed, extent_scale=0.5, **kwargs)
    image = write_nifti(folder / f"{name}_0000.nii.gz", phantom.image, phantom.affine)
    return Case(name, "Dataset001_Test", image, write_nifti(folder / f"{name}.nii.gz", phantom.label, phantom.affine))


def write_case(folder: Path, name: str, voxels: np.ndarray, label: np.ndarray | None = None) -> Case:
    image = write_nifti(folder / f"{name}_0000.nii.gz", voxels)
    return Case(name, "D", image, None if label is None else write_nifti(folder / f"{name}.nii.gz", label))


def prepare(cases: list[Case], store: Path, settings: PrepareSettings = COARSE, **kwargs) -> list[StoredVolume]:
    failed = prepare_missing(cases, settings, store, **{"num_workers": 1, "progress": False, **kwargs})
    if failed:
        raise ValueError(failure_message(failed, len(cases)))
    return stored_volumes(cases, settings, store)


def whole(volume: StoredVolume, array: str) -> np.ndarray:
    return volume.read(array, (0, 0, 0), volume.entry.shape)


def noise(*shape: int) -> np.ndarray:
    return RNG.normal(0, 80, shape).astype(np.float32)


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def monai_pipeline(case: Case, settings: PrepareSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and affine by MONAI's array transforms, one after the other."""
    turn = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    image, label = (turn(LoadImage(ensure_channel_first=True)(path)) for path in (case.image, case.label))
    image = Spacing(settings.spacing, mode="bilinear")(image)
    label = Spacing(settings.spacing, mode="nearest")(label)
    image = ScaleIntensityRange(settings.hu_min, settings.hu_max, 0, 1, clip=True)(image)
    crop = CropForeground(allow_smaller=True)
    low, high = crop.compute_bounding_box(image)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return image.numpy()[0][box], label.numpy()[0][box], crop(image).affine.numpy()


@pytest.mark.filterwarnings("ignore::UserWarning:monai", "ignore::FutureWarning:monai")
@pytest.mark.parametrize(
    ("orientation", "spacing", "target"),
    [
        ("RAS", (6.0, 6.0, 6.0), (6.0, 6.0, 6.0)),
        ("LPS", (5.0, 4.0, 8.0), (6.0, 6.0, 6.0)),
        ("SAR", (3.0, 3.0, 9.0), (4.0, 5.0, 6.0)),
        ("PIR", (7.0, 7.0, 4.0), (3.5, 3.5, 5.0)),
    ],
)
def test_equals_the_monai_pipeline_written_out(tmp_path, orientation, spacing, target):
    case = write_phantom(tmp_path, "a", orientation=orientation, spacing=spacing)
    settings = PrepareSettings(spacing=target, hu_min=-150.0, hu_max=230.0)
    volume = prepare([case], tmp_path / "store", settings)[0]
    image, label, affine = monai_pipeline(case, settings)
    assert volume.entry.shape == image.shape
    assert np.abs(whole(volume, "image") - image).max() <= 2 / 65535
    assert np.array_equal(whole(volume, "label"), label)
    assert len(np.unique(label)) > 5
    assert np.allclose(volume.entry.affine, affine, atol=1e-4)
    assert volume.entry.source == str(case.image)
    assert volume.name == "a"


def test_stored_orientation_does_not_matter(tmp_path):
    cases = [write_phantom(tmp_path, code, orientation=code, spacing=(5.0, 4.0, 7.0)) for code in ("RAS", "LPS", "SAR")]
    first, *others = prepare(cases, tmp_path / "store")
    for other in others:
        assert other.entry.shape == first.entry.shape
        assert np.allclose(other.entry.affine, first.entry.affine, atol=1e-3)
        assert np.abs(whole(other, "image") - whole(first, "image")).max() < 1e-3
        assert np.mean(whole(other, "label") != whole(first, "label")) < 1e-3  # nearest may fall either way at a tie


def test_window_goes_to_zero_and_one_with_clipping(tmp_path):
    ramp = np.broadcast_to(np.linspace(-1000, 1000, 41, dtype=np.float32)[:, None, None], (41, 8, 8))
    settings = PrepareSettings(hu_min=-100.0, hu_max=300.0)
    values = whole(prepare([write_case(tmp_path, "ramp", ramp)], tmp_path / "store", settings)[0], "image")
    expected = np.clip((ramp + 100) / 400, 0, 1)
    assert np.allclose(values, expected[expected[:, 0, 0] > 0], atol=2e-5)  # air is cropped away
    assert values.max() == 1


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64, 1), (1, 40, 40), (5, 6, 7)])
def test_small_and_thin_volumes(tmp_path, shape):
    voxels = np.abs(noise(*shape)) + 1
    case = write_case(tmp_path, "thin", voxels, (voxels > 80).astype(np.uint8))
    volume = prepare([case], tmp_path / "store", PrepareSettings())[0]
    assert volume.entry.shape == shape
    crop = volume.read("image", crop_start((0, 0, 0), shape, (96, 96, 96)), (96, 96, 96))
    assert np.count_nonzero(crop) == np.prod(shape)
    assert np.allclose(crop[crop > 0], np.clip((voxels.ravel() + 175) / 425, 0, 1), atol=2e-5)


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path):
    case = write_case(tmp_path, "a", noise(8, 9, 10, 1), np.ones((8, 9, 10), np.uint8))
    assert prepare([case], tmp_path / "store", PrepareSettings())[0].entry.shape == (8, 9, 10)


def test_one_error_lists_every_broken_file_with_its_reason(tmp_path):
    good = noise(12, 12, 12)
    nan = good.copy()
    nan[6, 6, 6] = np.nan
    darkest = np.full((9, 9, 9), -174.9999, np.float32)  # above the window's edge, but stored as 0
    darkest[0, 0, 0] = -500
    label = (good > 0).astype(np.int16)
    cases = {
        "1 voxels that are no number": write_case(tmp_path, "nan", nan),
        "the value -1000 everywhere": write_case(tmp_path, "air", np.full((12, 12, 12), -1000, np.int16)),
        r"values from -500 to -175.*Hounsfield": write_case(tmp_path, "darkest", darkest),
        r"shape \(12, 12, 12, 2\)": write_case(tmp_path, "4d", noise(12, 12, 12, 2)),
        r"shape \(12, 12\)": write_case(tmp_path, "2d", noise(12, 12)),
        "a file that is not compressed": write_case(tmp_path, "unreadable", good),
        "no bytes": write_case(tmp_path, "empty", good),
        "ended before": write_case(tmp_path, "truncated", good),
        "12, 12, 6 voxels, the image 12, 12, 12": write_case(tmp_path, "other", good, label[..., :6]),
        "values 0.5.*whole numbers": write_case(tmp_path, "fraction", good, label * 0.5),
        "values -1.*whole numbers": write_case(tmp_path, "negative", good, -label),
        "values 300.*whole numbers": write_case(tmp_path, "large", good, label * 300),
        "up to 16.5 mm .0, 0, 11 voxels": write_case(tmp_path, "mirrored", good, label),
        "corners up to 16.5 mm": write_case(tmp_path, "stretched", good, label),
    }
    by_name = {case.name: case for case in cases.values()}
    by_name["unreadable"].image.write_bytes(b"this is no volume")
    by_name["empty"].image.write_bytes(b"")
    packed = by_name["truncated"].image.read_bytes()
    by_name["truncated"].image.write_bytes(packed[: len(packed) // 2])
    write_nifti(by_name["mirrored"].label, label, np.diag([1.5, 1.5, -1.5, 1]))
    write_nifti(by_name["stretched"].label, label, np.diag([1.5, 1.5, 3, 1]))

    store = tmp_path / "store"
    with pytest.raises(ValueError, match="fix them or remove them from the data list") as error:
        prepare([write_case(tmp_path, "good", good), *cases.values()], store, PrepareSettings())
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{len(cases)} of {len(cases) + 1} volumes are unusable")
    assert len(lines) == 1 + len(cases)
    for reason, case in cases.items():
        line = next(line for line in lines if re.search(rf"/{case.name}(_0000)?\.nii\.gz: ", line))
        assert re.search(reason, line), line
    entries = [path for path in store.iterdir()]
    assert len(entries) == 1  # the good one, whole; nothing is left of the others
    assert {path.name for path in entries[0].iterdir()} == {"image.b2nd", "counts.npy", "entry.json"}


def test_all_of_many_broken_files_are_named(tmp_path):
    cases = []
    for number in range(23):
        path = tmp_path / f"case{number:02d}_0000.nii.gz"
        path.write_bytes(b"broken")
        cases.append(Case(f"case{number:02d}", "D", path))
    with pytest.raises(ValueError, match="23 of 23 volumes") as error:
        prepare(cases, tmp_path / "store")
    assert all(f"{case.image}: " in str(error.value) for case in cases)


def test_what_cannot_be_prepared_is_told_apart_from_the_rest(tmp_path, caplog):
    good = write_phantom(tmp_path, "good", spacing=(8.0, 8.0, 8.0))
    bad = write_case(tmp_path, "bad", np.full((12, 12, 12), 7, np.int16))
    gone = Case("gone", "D", tmp_path / "gone_0000.nii.gz")
    thin = write_case(tmp_path, "thin", noise(20, 20, 2))
    failed = prepare_missing([good, bad, gone, thin], COARSE, tmp_path / "store", 1, progress=False)
    assert list(failed) == [str(bad.image), str(gone.image)]
    assert "the value 7 everywhere" in failed[str(bad.image)][0]
    assert "missing" in failed[str(gone.image)][0]
    assert str(thin.image) in caplog.text  # a warning, and prepared
    assert not prepare_missing([good, thin], COARSE, tmp_path / "store", 1, progress=False)


@pytest.mark.parametrize("name", ["image.b2nd", "label.b2nd", "counts.npy", "entry.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut short", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path, caplog, name, fault):
    cases = [write_phantom(tmp_path, f"case{n}", seed=n, spacing=(8.0, 8.0, 8.0)) for n in range(2)]
    volumes = prepare(cases, tmp_path / "store")
    sound = files_below(volumes[1].folder)
    image = whole(volumes[0], "image")
    path = volumes[0].folder / name
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        place = content.index(b'"max_label"') + 13 if name == "entry.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    elif fault == "cut short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    open_array.cache_clear()
    again = prepare(cases, tmp_path / "store")
    assert again == volumes
    assert "does not match its checksum" in caplog.text
    assert is_intact(volumes[0].folder)
    assert np.array_equal(whole(again[0], "image"), image)
    assert files_below(volumes[1].folder) == sound


def test_of_very_many_reasons_the_first_are_listed():
    message = failure_message({f"{i}.nii.gz": (f"{i}.nii.gz: damaged",) for i in range(180)}, 200)
    lines = message.splitlines()
    assert lines[0].startswith("180 of 200 volumes are unusable")
    assert len(lines) == 52
    assert lines[50:] == ["  49.nii.gz: damaged", "  and 130 more, which `hyspark check` lists"]


@pytest.mark.spawn
def test_two_workers_give_what_one_gives(tmp_path):
    cases = [write_phantom(tmp_path, f"case{n}", seed=n, spacing=(8.0, 8.0, 8.0)) for n in range(3)]
    single = prepare(cases, tmp_path / "single")
    several = prepare(cases, tmp_path / "several", num_workers=2)
    assert [volume.name for volume in several] == ["case0", "case1", "case2"]
    for one, two in zip(single, several, strict=True):
        assert one.entry == two.entry
        for array in ("image", "label"):
            assert np.array_equal(whole(one, array), whole(two, array))
    assert len(list((tmp_path / "several").iterdir())) == 3


def test_second_call_prepares_nothing(tmp_path):
    cases = [write_phantom(tmp_path, f"case{n}", seed=n, spacing=(8.0, 8.0, 8.0)) for n in range(2)]
    first = prepare(cases, tmp_path / "store")
    before = files_below(tmp_path / "store")
    for case in cases:  # no one looks into the files again
        stat = case.image.stat()
        case.image.write_bytes(b"x" * stat.st_size)
        os.utime(case.image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare(cases, tmp_path / "store") == first
    assert prepare(cases[::-1], tmp_path / "store") == first[::-1]
    assert files_below(tmp_path / "store") == before


@pytest.mark.parametrize("change", [{"spacing": (7.0, 6.0, 6.0)}, {"hu_min": -100.0}, {"hu_max": 300.0}])
def test_changed_settings_make_a_new_entry(tmp_path, change):
    case = write_phantom(tmp_path, "a", spacing=(8.0, 8.0, 8.0))
    old = prepare([case], tmp_path / "store")[0]
    new = prepare([case], tmp_path / "store", replace(COARSE, **change))[0]
    assert new.folder != old.folder
    assert whole(new, "image").shape != whole(old, "image").shape or (whole(new, "image") != whole(old, "image")).any()
    assert prepare([case], tmp_path / "store")[0] == old


@pytest.mark.parametrize("which", ["image", "label"])
def test_touched_file_makes_a_new_entry(tmp_path, which):
    case = write_phantom(tmp_path, "a", spacing=(8.0, 8.0, 8.0))
    old = prepare([case], tmp_path / "store")[0]
    path = getattr(case, which)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    assert prepare([case], tmp_path / "store")[0].folder != old.folder


def test_with_and_without_label_are_two_entries(tmp_path):
    case = write_phantom(tmp_path, "a", spacing=(8.0, 8.0, 8.0))
    labelled, bare = prepare([case, replace(case, label=None)], tmp_path / "store")
    assert (labelled.folder / "label.b2nd").exists()
    assert not (bare.folder / "label.b2nd").exists()


def test_unwritable_store_names_the_flag(tmp_path):
    case = write_case(tmp_path, "a", noise(8, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"file/store.*--store_dir"):
        prepare([case], tmp_path / "file" / "store")


def test_progress_is_shown_only_when_asked_for(tmp_path, capsys):
    case = write_case(tmp_path, "a", noise(8, 8, 8))
    prepare([case], tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    prepare([case], tmp_path / "loud", progress=True)
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("surprise"), "surprise"),
        (MemoryError("5 GB"), "lower prepare_workers"),
        (RuntimeError("codec"), "codec"),
    ],
)
@pytest.mark.parametrize("where", ["region_above", "write_entry"])
def test_an_error_that_nobody_foresaw_costs_its_case_alone(tmp_path, monkeypatch, where, error, reason):
    cases = [write_case(tmp_path, name, noise(12, 12, 12)) for name in ("a", "b")]
    before, calls = getattr(prepare_module, where), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(prepare_module, where, fail)
    failed = prepare_missing(cases, PrepareSettings(), tmp_path / "store", 1, progress=False)
    assert list(failed) == [str(cases[0].image)]
    (line,) = failed[str(cases[0].image)]
    assert line.startswith(f"{cases[0].image}: ")
    assert reason in line
    assert stored_volumes(cases[1:], PrepareSettings(), tmp_path / "store")[0].entry.shape == (12, 12, 12)


def test_a_codec_that_fails_for_want_of_room_ends_the_preparation(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Could not write")

    monkeypatch.setattr(prepare_module, "write_entry", fail)
    monkeypatch.setattr(prepare_module, "has_room", lambda folder, num_bytes: False)
    with pytest.raises(OSError, match=r"store: prepared volumes are not writable \(Could not write\).*--store_dir"):
        prepare([write_case(tmp_path, "a", noise(12, 12, 12))], tmp_path / "store", PrepareSettings())


def test_a_case_whose_process_was_killed_is_named():
    case = Case("a", "D", Path("a_0000.nii.gz"))
    outcome = killed_preparation(case, COARSE, Path("entry"))
    assert outcome.errors == (f"a_0000.nii.gz: {KILLED}",)


def test_each_file_is_read_once(tmp_path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(case_files, "read_voxels", lambda header: read.append(header.path) or read_voxels(header))
    case = write_phantom(tmp_path, "a", spacing=(8.0, 8.0, 8.0))
    prepare([case], tmp_path / "store")
    assert read == [case.image, case.label]


def test_what_is_no_ct_is_refused_unless_the_window_fits(tmp_path):
    case = write_case(tmp_path, "mr", RNG.integers(0, 1401, (20, 20, 20), np.int16))
    with pytest.raises(ValueError, match=r"mr_0000.nii.gz: values from 0 to 1400.*or set hu_min and hu_max"):
        prepare([case], tmp_path / "store", PrepareSettings())
    with pytest.raises(ValueError, match=r"^values from 0 to 1400"):
        prepare_case(case, PrepareSettings())
    assert prepare([case], tmp_path / "store", PrepareSettings(hu_min=0.0, hu_max=1400.0))


def test_entries_of_the_earlier_format_are_made_anew_and_named(tmp_path, caplog):
    case = write_case(tmp_path, "a", noise(12, 12, 12))
    earlier = entry_folder(tmp_path / "store", COARSE, case.image, None, store_format=EARLIER_FORMAT)
    earlier.mkdir(parents=True)
    (volume,) = prepare([case], tmp_path / "store")
    assert volume.folder != earlier
    assert f"1 volumes are of store format {EARLIER_FORMAT}" in caplog.text
    assert earlier.name in caplog.text
    caplog.clear()
    prepare([case], tmp_path / "store")
    assert caplog.text == ""


def test_a_blosc2_that_loses_voxels_is_refused(tmp_path, monkeypatch):
    case = write_case(tmp_path, "a", noise(12, 12, 12))
    (volume,) = prepare([case], tmp_path / "store")
    open_array.cache_clear()
    monkeypatch.setattr(blosc2, "__version__", "3.7.2")
    for use in (lambda: prepare([case], tmp_path / "store"), lambda: whole(volume, "image")):
        with pytest.raises(ImportError, match=r'^blosc2: expected version 3.8 or later, found 3.7.2.*"blosc2>=3.8"$'):
            use()


def test_checksums_are_computed_only_of_files_that_were_touched(tmp_path, monkeypatch):
    cases = [write_case(tmp_path, name, noise(12, 12, 12)) for name in ("a", "b")]
    volumes = prepare(cases, tmp_path / "store")
    checked: list[Path] = []
    before = entry_files.is_intact
    monkeypatch.setattr(entry_files, "is_intact", lambda folder: checked.append(folder) or before(folder))
    prepare(cases, tmp_path / "store")
    assert checked == []
    os.utime(volumes[0].folder / "image.b2nd", ns=(0, 2**62))
    os.utime(volumes[0].folder / "image.b2nd", ns=(0, 0))  # by the time of change alone
    prepare(cases, tmp_path / "store")
    assert checked == [volumes[0].folder]
    prepare(cases, tmp_path / "store")
    assert checked == [volumes[0].folder]  # once
    with (volumes[1].folder / "image.b2nd").open("ab") as file:
        file.write(b"x")
    assert not is_sound(volumes[1].folder)


def test_an_entry_that_is_damaged_under_a_run_is_named(tmp_path, monkeypatch):
    (volume,) = prepare([write_case(tmp_path, "a", noise(12, 12, 12))], tmp_path / "store")

    class Broken:
        def __getitem__(self, box):
            raise RuntimeError("Error while getting the slice")

    monkeypatch.setattr(store_module, "open_array", lambda path: Broken())
    with pytest.raises(ValueError, match=rf"^{volume.folder}: .*Error while getting the slice.*delete this folder"):
        whole(volume, "image")
