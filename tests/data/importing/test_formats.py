"""Formats other than DICOM: NRRD, MetaImage, pairs, FreeSurfer's, folders of pictures; by other readers."""

import builtins

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image

from hyspark.utils.install import install_command
from tests.data.importing.imports import HU, images, lines, out_of, refused, run_import

VOXELS = np.tile(HU, (3, 2, 1))
"""(x, y, z): 12 x 10 x 9"""
AFFINE = np.array([[0.0, 1.5, 0, -20], [-0.75, 0, 0, 30], [0, 0, 3, 7], [0, 0, 0, 1]])
"""Of RAS; its first axis points to the back, its second to the right."""


def write_volume(path, voxels=VOXELS, affine=AFFINE):
    """A file by SimpleITK, whose axes point to the left, the back and the head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(voxels.transpose(2, 1, 0))
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path))
    return path


def reference(voxels=VOXELS, affine=AFFINE):
    return nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))


def assert_equal(out, expected=None):
    expected = expected or reference()
    (entry,) = lines(out, "imported")
    image = nibabel.load(out / entry["file"])
    assert np.array_equal(np.asanyarray(image.dataobj), np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-5)
    return entry


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd", "hdr", "gipl"])
def test_volumes_of_simpleitk(tmp_path, ending, capsys):
    affine = np.diag([-1.5, -0.75, 3, 1]) if ending == "gipl" else AFFINE  # it has no directions
    write_volume(tmp_path / "in" / "patient" / f"scan.{ending}", affine=affine)
    entry = assert_equal(run_import(tmp_path / "in"), reference(affine=affine))
    assert entry["format"] == ending
    assert "files of other kinds" not in capsys.readouterr().out  # the voxels' file is a part of it


@pytest.mark.parametrize("ending", ["mgz", "mgh", "nii", "nii.gz"])
def test_volumes_of_nibabel(tmp_path, ending):
    (tmp_path / "in").mkdir()
    kind = nibabel.MGHImage if ending.startswith("mg") else nibabel.Nifti1Image
    nibabel.save(kind(VOXELS.astype(np.float32), AFFINE), tmp_path / "in" / f"scan.{ending}")
    entry = assert_equal(run_import(tmp_path / "in"))
    assert entry["values"] == "int16"  # whole numbers are stored as such


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (VOXELS / 7, "float32"),
        (VOXELS.astype(np.float64), "int16"),
        (VOXELS.astype(np.int32) + 40000, "uint16"),
        (VOXELS.astype(np.int32) * 1000, "int32"),
    ],
)
def test_types_of_values(tmp_path, values, kind):
    write_volume(tmp_path / "in" / "scan.mha", values)
    out = run_import(tmp_path / "in", "--modality=MR")
    assert lines(out)[0]["values"] == kind
    assert np.array_equal(images(out)[0], np.asanyarray(reference(values.astype(kind)).dataobj))


def test_the_modality_of_files_that_state_none_is_that_of_their_values(tmp_path, capsys):
    write_volume(tmp_path / "ct" / "scan.nrrd")
    write_volume(tmp_path / "mr" / "scan.nrrd", VOXELS + 1024)
    out = run_import(tmp_path / "ct")
    assert '"0": "CT"' in (out / "dataset.json").read_text()
    assert "--intensity" not in capsys.readouterr().out
    run_import(tmp_path / "mr", f"--out={tmp_path / 'other'}")
    assert '"0": "unknown"' in (tmp_path / "other" / "dataset.json").read_text()
    assert "--intensity mr" in capsys.readouterr().out


def write_pictures(folder, voxels=VOXELS, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate((voxels - voxels.min()).transpose(2, 1, 0), 1):
        Image.fromarray(pixels.astype(np.uint16)).save(folder / f"slice{number}.{ending}")
    return voxels - voxels.min()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_folders_of_slices(tmp_path, ending):
    """Also names with numbers beyond 9, and as many folders of one name as there are patients."""
    voxels = np.concatenate([VOXELS, VOXELS[:, :, ::-1]], axis=2)
    values = write_pictures(tmp_path / "in" / "p1" / "slices", voxels, ending)
    write_pictures(tmp_path / "in" / "p2" / "slices", voxels + 5, ending)
    out = run_import(tmp_path / "in", "--slice_spacing", "0.5", "0.75", "3")
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, np.diag([-0.5, -0.75, 3, 1])))
    entries = lines(out, "imported")
    assert len(entries) == 2
    for entry in entries:
        image = nibabel.load(out / entry["file"])
        assert np.array_equal(np.asanyarray(image.dataobj), np.asanyarray(expected.dataobj))
        assert np.array_equal(image.affine, expected.affine)
    assert {entry["format"] for entry in entries} == {"pictures"}
    assert len({entry["patient"] for entry in entries}) == 2


def test_a_tiff_of_several_pages_is_a_volume(tmp_path):
    (tmp_path / "in").mkdir()
    pages = [Image.fromarray((page + 1024).astype(np.uint16)) for page in VOXELS.transpose(2, 1, 0)]
    pages[0].save(tmp_path / "in" / "scan.tif", save_all=True, append_images=pages[1:])
    out = run_import(tmp_path / "in", "--slice_spacing", "1", "1", "2")
    assert np.array_equal(images(out)[0], VOXELS[::-1, ::-1] + 1024)


def test_pictures_without_spacing_are_an_error_by_name(tmp_path, capsys):
    write_pictures(tmp_path / "in" / "slices")
    message = refused(tmp_path / "in", capsys)
    assert f"{tmp_path / 'in' / 'slices'}: 9 pictures, which state no distances; give mm between columns" in message
    write_volume(tmp_path / "in" / "scan.nrrd")
    message = refused(tmp_path / "in", capsys, code=1)
    assert "--slice_spacing X Y Z" in message
    assert len(images(out_of(tmp_path / "in"))) == 1
    assert "--slice_spacing: expected mm above 0" in refused(tmp_path / "in", capsys, "--slice_spacing", "1", "0", "2")


def test_pictures_that_make_no_volume_say_why(tmp_path, capsys):
    write_pictures(tmp_path / "in" / "sizes")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in" / "sizes" / "small.png")
    write_pictures(tmp_path / "in" / "colours")
    Image.fromarray(np.eye(3, dtype=np.uint8)[None] * 200).save(tmp_path / "in" / "colours" / "slice3.png")
    write_pictures(tmp_path / "in" / "torn")
    (tmp_path / "in" / "torn" / "slice2.png").write_bytes(b"no picture")
    write_volume(tmp_path / "in" / "scan.nrrd")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in" / "thumbnail.jpg")
    message = refused(tmp_path / "in", capsys, "--slice_spacing", "1", "1", "1", code=1)
    assert "sizes: pictures of different sizes: 4 x 4, 10 x 12 pixels" in message
    assert "colours: slice3.png: expected one grey value per pixel, got colours" in message
    assert "torn: slice2.png: unreadable picture" in message


def test_files_that_are_no_volume_say_why(tmp_path, capsys):
    folder = tmp_path / "in"
    write_volume(folder / "good.nrrd")
    cut = write_volume(folder / "cut.nrrd")
    cut.write_bytes(cut.read_bytes()[:-50])
    write_volume(folder / "gone.mhd")
    (folder / "gone.raw").unlink()
    (folder / "text.mha").write_text("nothing")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((9, 9, 9, 3)), isVector=True), str(folder / "rgb.nrrd"))
    SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.Image(9, 9, 9, 2)] * 2), str(folder / "time.nrrd"))
    nibabel.save(nibabel.analyze.AnalyzeImage(VOXELS, None), folder / "old.hdr")
    write_volume(folder / "good_seg.nrrd", (VOXELS > 0).astype(np.uint8))
    message = refused(folder, capsys, code=1)
    for name, why in {
        "cut.nrrd": "unreadable as nrrd",
        "gone.mhd": "unreadable as mhd",
        "text.mha": "unreadable as mha",
        "rgb.nrrd": "expected one volume of one number per voxel, got 9 x 9 x 9 with 3 numbers",
        "time.nrrd": "expected one volume of one number per voxel, got 9 x 9 x 9 x 2 with 1 numbers",
        "old.hdr": "Analyze, which does not state right and left",
    }.items():
        assert f"{name}: {why}" in message
    assert len(lines(out_of(folder), "imported")) == 1
    assert [entry["why"] for entry in lines(out_of(folder), "excluded")] == ["a label map by its name or folder"]


def test_a_missing_reader_says_what_to_install(tmp_path, capsys, monkeypatch):
    write_volume(tmp_path / "in" / "scan.nrrd")
    real = builtins.__import__

    def without(name, *args, **known):
        if name == "SimpleITK":
            raise ModuleNotFoundError("No module named 'SimpleITK'", name=name)
        return real(name, *args, **known)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refused(tmp_path / "in", capsys)
    assert f"need SimpleITK: {install_command('formats')}" in message


def test_a_reader_that_fills_missing_voxels_is_refused(tmp_path, capsys, monkeypatch):
    write_volume(tmp_path / "in" / "scan.nrrd")
    monkeypatch.setattr(SimpleITK, "__version__", "2.3.1")
    message = refused(tmp_path / "in", capsys)
    assert "SimpleITK: expected version 2.4 or later, found 2.3.1" in message
    assert 'pip install "SimpleITK>=2.4"' in message


def test_sheared_axes_are_noted(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.9
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(VOXELS, sheared), tmp_path / "in" / "scan.nii")
    out = run_import(tmp_path / "in")
    (entry,) = lines(out)
    assert "its axes are not perpendicular" in entry["notes"][-1]
    image = nibabel.load(out / entry["file"])
    np.testing.assert_allclose(image.affine, reference(affine=sheared).affine, atol=1e-5)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (0, 1)


def test_axes_without_directions_are_noted(tmp_path):
    folder = tmp_path / "in"
    for name in ("known.nrrd", "known.mha"):
        write_volume(folder / name)
    header = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 12 10 9\nspacings: 1 2 3\nendian: little\nencoding: raw\n\n"
    (folder / "unknown.nrrd").write_bytes(header + VOXELS.astype("<i2").tobytes(order="F"))
    write_volume(folder / "old.gipl", affine=np.eye(4))
    out = run_import(folder)
    notes = sorted((entry["format"], *entry["notes"]) for entry in lines(out))
    text = "it states no directions; its axes are taken to point to the left, the back and the head"
    assert notes == [("gipl", text), ("mha",), ("nrrd",), ("nrrd", text)]
    (entry,) = [entry for entry in lines(out) if entry["format"] == "nrrd" and entry["notes"]]
    expected = reference(VOXELS, np.diag([-1.0, -2.0, 3.0, 1.0]))
    image = nibabel.load(out / entry["file"])
    assert np.array_equal(np.asanyarray(image.dataobj), np.asanyarray(expected.dataobj))
    assert np.array_equal(image.affine, expected.affine)


def test_label_maps_and_other_channels_of_nifti_are_named(tmp_path, capsys):
    folder = tmp_path / "in" / "Dataset007_Else"
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(VOXELS, AFFINE), folder / f"{name}.nii.gz")
    out = run_import(tmp_path / "in")
    assert [entry["why"] for entry in lines(out, "excluded")] == ["a label map"]
    assert "1 another channel (e.g. " in capsys.readouterr().out
    assert len(images(out)) == 1


def test_label_maps_and_channels_of_other_formats_are_named(tmp_path, capsys):
    folder = tmp_path / "in" / "Dataset008_Mha"
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a"):
        write_volume(folder / f"{name}.mha")
    write_volume(tmp_path / "in" / "loose" / "masks" / "p1.nrrd")
    write_volume(tmp_path / "in" / "loose" / "p1.nrrd")
    write_volume(tmp_path / "in" / "loose" / "p1.mha")
    out = run_import(tmp_path / "in")
    assert sorted(entry["why"] for entry in lines(out, "excluded")) == [
        "1 label maps",
        "a label map by its name or folder",
    ]
    assert "1 another channel (e.g. " in capsys.readouterr().out
    assert len(images(out)) == 3


def test_filters_apply_to_all_formats(tmp_path, capsys):
    write_volume(tmp_path / "in" / "thick.nrrd")
    write_volume(tmp_path / "in" / "flat.nrrd", VOXELS[:, :, :2])
    message = refused(tmp_path / "in", capsys, "--max_thickness=2", "--kernel=b30")
    assert "no ConvolutionKernel, which --kernel asks for" in message
    write_volume(tmp_path / "in" / "thin.nrrd", affine=np.diag([-1.0, -1.0, 2.0, 1.0]))
    out = run_import(tmp_path / "in", "--max_thickness=2")
    assert sorted(entry["why"] for entry in lines(out, "excluded")) == [
        "2 slices, fewer than --min_slices 8",
        "slices of 3 mm, above --max_thickness 2",
    ]
