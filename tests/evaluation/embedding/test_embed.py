"""`hyspark embed`: the vectors of plain torch on a CT prepared by MONAI, files, regions, resuming, faults of cases."""

import csv
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms
from monai.data import MetaTensor
from safetensors import safe_open
from safetensors.torch import save_file

import hyspark
from hyspark.cli import main
from hyspark.evaluation.embedding import embed as module
from hyspark.evaluation.embedding import pooling
from hyspark.utils.exit_codes import FOUND, WRONG_USE
from hyspark.utils.install import install_command
from tests.data.readers.dicom_files import write_series
from tests.evaluation.embedding.small import WINDOW, body, small_encoder, write_volume, write_weights

AFFINE = np.array([[-2.5, 0, 0, 60], [0, 2, 0, -40], [0, 0, 5, -30], [0, 0, 0, 1]])
WORDS = ["--device", "cpu", "--prepare_workers", "1"]
OPTIONS = {"device": "cpu", "prepare_workers": 1}


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path / "encoder.safetensors")


@pytest.fixture
def scans(tmp_path):
    """Two CTs."""
    for number in range(2):
        write_volume(tmp_path / "scans" / f"ct_{number}.nii.gz", body((40, 36, 18), number), AFFINE)
    return tmp_path / "scans"


def prepared_by_monai(path, spacing=(4, 4, 4), window=(-175, 250)):
    """A CT as the small weights have seen CTs: (1, h, w, d) and its affine."""
    file = nib.load(path)
    prepare = transforms.Compose(
        [
            transforms.Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            transforms.Spacing(spacing, mode="bilinear"),
            transforms.ScaleIntensityRange(*window, 0, 1, clip=True),
        ]
    )
    return prepare(MetaTensor(torch.from_numpy(file.get_fdata(dtype=np.float32)[None]), affine=file.affine))


def plain_vector(image, box):
    """The mean features of a box that one window holds, with plain torch."""
    pads, inner = [], []
    for n, voxels in zip(image.shape[1:], box, strict=True):
        size = min(WINDOW, -(-n // 16) * 16)
        before = (size - n) // 2
        assert n <= size
        pads.insert(0, (before, size - n - before))
        inner.append(slice(voxels.start + before, voxels.stop + before))
    padded = torch.nn.functional.pad(image.as_tensor()[None], [n for pad in pads for n in pad])
    with torch.no_grad():
        maps = small_encoder()(padded)
    grown = [torch.nn.functional.interpolate(x, padded.shape[2:], mode="nearest")[0] for x in maps]
    return np.concatenate([x[(slice(None), *inner)].flatten(1).mean(1).numpy() for x in grown])


def test_vectors_are_those_of_plain_torch(weights, scans, tmp_path):
    made = hyspark.embed(weights, scans, tmp_path / "out", **OPTIONS)
    assert made.table.cases == ("ct_0", "ct_1")
    assert made.table.regions == ("volume", "volume")
    assert made.failures == {}
    for number, vector in enumerate(made.vectors):
        image = prepared_by_monai(scans / f"ct_{number}.nii.gz")
        above = np.argwhere(image[0].numpy() > 0)
        box = [slice(a, b + 1) for a, b in zip(above.min(0), above.max(0), strict=True)]
        np.testing.assert_allclose(vector, plain_vector(image, box), rtol=1e-3, atol=1e-4)
        middle = (above.min(0) + above.max(0)) / 2
        world = nib.affines.apply_affine(np.asarray(image.affine), middle)
        np.testing.assert_allclose(made.table.centres[number], world, atol=1e-3)
    assert not np.allclose(*made.vectors, rtol=1e-3)


def test_settings_replace_those_of_the_weights_with_a_warning(weights, scans, tmp_path, caplog):
    given = {"spacing": (5.0, 5.0, 6.0), "hu_min": -1000.0, "hu_max": 400.0}
    made = hyspark.embed(weights, scans / "ct_0.nii.gz", tmp_path / "out", **given, **OPTIONS)
    image = prepared_by_monai(scans / "ct_0.nii.gz", (5, 5, 6), (-1000, 400))
    above = np.argwhere(image[0].numpy() > 0)
    box = [slice(a, b + 1) for a, b in zip(above.min(0), above.max(0), strict=True)]
    np.testing.assert_allclose(made.vectors[0], plain_vector(image, box), rtol=1e-3, atol=1e-4)
    assert f"{weights} was made with spacing 4.0 4.0 4.0, volumes are embedded with 5.0 5.0 6.0" in caplog.text
    assert "was made with hu_min -175.0" in caplog.text


def test_files_hold_the_same_numbers(weights, scans, tmp_path, capsys):
    main.main(["embed", str(weights), str(scans), "--out", str(tmp_path / "out"), "--stages", "2", "5", *WORDS])
    assert "2 vectors of 36 numbers" in capsys.readouterr().out
    with safe_open(tmp_path / "out/embeddings.safetensors", "np") as file:
        vectors, about = file.get_tensor("embeddings"), file.metadata()
    rows = list(csv.DictReader((tmp_path / "out/embeddings.csv").read_text().splitlines()))
    columns = json.loads(about["columns"])
    assert columns[0] == "s2_000"
    assert columns[-1] == "s5_023"
    assert [row["case"] for row in rows] == json.loads(about["cases"]) == ["ct_0", "ct_1"]
    np.testing.assert_allclose([[float(row[name]) for name in columns] for row in rows], vectors, rtol=1e-6)
    assert json.loads(about["settings"])["preparation"]["spacing"] == [4, 4, 4]


def test_boxes_and_labels_of_one_place_have_one_vector(weights, scans, tmp_path):
    """A label map on the file's grid, and a box in mm around the same voxels."""
    label = np.zeros((40, 36, 18), np.uint8)
    label[8:24, 10:20, 6:12] = 3
    for number in range(2):
        write_volume(tmp_path / "labels" / f"ct_{number}.nii.gz", label, AFFINE)
    image = prepared_by_monai(scans / "ct_0.nii.gz")
    labelled = transforms.Compose(
        [
            transforms.Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            transforms.Spacing((4, 4, 4), mode="nearest"),
        ]
    )(MetaTensor(torch.from_numpy(label[None].astype(np.float32)), affine=AFFINE))[0].numpy()
    at = np.argwhere(labelled == 3)
    low, high = (nib.affines.apply_affine(np.asarray(image.affine), corner) for corner in (at.min(0), at.max(0)))
    row = ",".join(f"{edge}" for axis in range(3) for edge in (low[axis] - 1, high[axis] + 1))
    (tmp_path / "boxes.csv").write_text(f"case,region,x_min,x_max,y_min,y_max,z_min,z_max\nct_0,nodule,{row}\n")
    by_label = hyspark.embed(weights, scans, tmp_path / "a", labels=tmp_path / "labels", **OPTIONS)
    by_box = hyspark.embed(weights, scans, tmp_path / "b", boxes=tmp_path / "boxes.csv", **OPTIONS)
    assert by_label.table.regions == ("label_3", "label_3")
    assert (by_box.table.cases, by_box.table.regions) == (("ct_0",), ("nodule",))
    np.testing.assert_allclose(by_box.vectors[0], by_label.vectors[0], rtol=1e-5)
    box = [slice(a, b + 1) for a, b in zip(at.min(0), at.max(0), strict=True)]
    np.testing.assert_allclose(by_box.vectors[0], plain_vector(image, box), rtol=1e-3, atol=1e-4)


def test_a_grid_covers_the_foreground(weights, scans, tmp_path):
    made = hyspark.embed(weights, scans / "ct_0.nii.gz", tmp_path / "out", grid=40, stages=(1,), **OPTIONS)
    whole = hyspark.embed(weights, scans / "ct_0.nii.gz", tmp_path / "whole", stages=(1,), **OPTIONS)
    assert len(made.vectors) == len(set(made.table.regions)) > 4
    weighted = (made.vectors * made.table.voxels[:, None]).sum(0) / whole.table.voxels[0]
    np.testing.assert_allclose(weighted, whole.vectors[0], rtol=1e-4, atol=1e-5)


def test_label_maps_of_a_data_set_are_not_read(weights, tmp_path):
    data = tmp_path / "Dataset001_Mine"
    write_volume(data / "imagesTr/a_0000.nii.gz", body((20, 20, 9)), AFFINE)
    write_volume(data / "labelsTr/a.nii.gz", np.zeros((5, 5, 5)), AFFINE)  # of another grid
    (data / "dataset.json").write_text('{"labels": {"background": 0, "b": 1}, "channel_names": {"0": "CT"}}')
    made = hyspark.embed(weights, data, tmp_path / "out", **OPTIONS)
    assert (made.table.cases, made.failures) == (("a",), {})


@pytest.fixture
def passes(monkeypatch):
    """Counts the forward passes."""
    seen = []
    real = pooling.cut_window
    monkeypatch.setattr(pooling, "cut_window", lambda *args: seen.append(1) or real(*args))
    return seen


def test_the_same_call_continues(weights, scans, tmp_path, passes, monkeypatch):
    out = tmp_path / "out"
    whole = hyspark.embed(weights, scans, tmp_path / "whole", **OPTIONS)
    real = module.pool_regions
    monkeypatch.setattr(module, "pool_regions", lambda *args, **known: (real(*args, **known), passes.append("x"))[0])
    num = len(passes)
    hyspark.embed(weights, scans / "ct_0.nii.gz", out, **OPTIONS)
    first = passes[num:]
    hyspark.embed(weights, scans, out, **OPTIONS)
    assert passes[num:] == first * 2  # the second volume alone
    again = hyspark.embed(weights, scans, out, **OPTIONS)
    assert passes[num:] == first * 2
    assert np.array_equal(again.vectors, whole.vectors)
    hyspark.embed(weights, scans, out, pooling="max", **OPTIONS)
    assert passes[num:] == first * 4
    hyspark.embed(weights, scans, out, **OPTIONS)  # vectors of other settings were replaced
    assert passes[num:] == first * 6
    write_volume(scans / "ct_1.nii.gz", body((40, 36, 18), 7), AFFINE)
    changed = hyspark.embed(weights, scans, out, **OPTIONS)
    assert passes[num:] == first * 7
    assert np.array_equal(changed.vectors[0], whole.vectors[0])
    assert not np.allclose(changed.vectors[1], whole.vectors[1])


def test_other_weights_at_the_same_path_are_not_those_before(weights, scans, tmp_path):
    first = hyspark.embed(weights, scans, tmp_path / "out", **OPTIONS)
    network = small_encoder()
    with torch.no_grad():
        network.embeddings.stem.weight.add_(0.1)
    with safe_open(weights, "pt") as file:
        about = file.metadata()
    save_file(dict(network.state_dict()), weights, about)
    second = hyspark.embed(weights, scans, tmp_path / "out", **OPTIONS)
    assert not np.allclose(first.vectors, second.vectors)


def test_an_unreadable_volume_ends_no_other(weights, scans, tmp_path, capsys):
    (scans / "broken.nii.gz").write_bytes(b"no NIfTI")
    write_volume(scans / "empty.nii.gz", np.full((9, 9, 9), 40), AFFINE)
    boxes = tmp_path / "boxes.csv"
    with pytest.raises(SystemExit) as stop:
        main.main(["embed", str(weights), str(scans), "--out", str(tmp_path / "out"), *WORDS])
    assert stop.value.code == FOUND
    printed = capsys.readouterr()
    assert "2 vectors of" in printed.out
    assert "not embedded: " in printed.err
    assert str(scans / "broken.nii.gz") in printed.err
    boxes.write_text(
        "case,region,x_min,x_max,y_min,y_max,z_min,z_max\nct_0,in,0,9,0,9,0,9\nct_0,far,900,909,0,9,0,9\n"
        "broken,in,0,9,0,9,0,9\n"
    )
    made = hyspark.embed(weights, scans, tmp_path / "boxed", boxes=boxes, **OPTIONS)
    assert made.table.regions == ("in",)
    assert set(made.failures) == {"broken", "ct_0/far"}
    assert "lies outside of the volume" in made.failures["ct_0/far"]
    again = hyspark.embed(weights, scans, tmp_path / "boxed", boxes=boxes, **OPTIONS)
    assert again.failures == made.failures
    with pytest.raises(ValueError, match=r"none of 1 volumes has a vector:\n  broken: "):
        hyspark.embed(weights, scans / "broken.nii.gz", tmp_path / "none", **OPTIONS)


def test_dicom_is_read_as_predict_reads_it(weights, tmp_path):
    """The series and a NIfTI of the same voxels have one vector; no file of the scan is left."""
    hu = body((24, 24, 12))
    write_series(tmp_path / "pacs", hu, spacing=4.0, Rows=24, Columns=24, PixelSpacing=[4.0, 4.0])
    made = hyspark.embed(weights, tmp_path / "pacs", tmp_path / "out", **OPTIONS)
    (name,) = made.table.cases
    assert name.startswith("study-")
    write_volume(tmp_path / "same.nii.gz", hu, np.diag([-4.0, -4, 4, 1]))
    same = hyspark.embed(weights, tmp_path / "same.nii.gz", tmp_path / "same", **OPTIONS)
    np.testing.assert_allclose(made.vectors, same.vectors, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "out/.scans").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": (1,)}, "unknown option 'stage'; options are .*; did you mean stages?"),
        ({"stages": (0,)}, "stages: expected different numbers from 1 to 5, got 0"),
        ({"grid": 9, "labels": "x"}, "labels and grid: expected one kind of region"),
        ({"window": (20,)}, "window: expected a positive multiple of 16 voxels on every axis"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing must be above 0"),
        ({"folds": 3}, "folds: read with probe alone; add probe"),
        ({"pooling": "sum"}, "pooling: expected mean or max, got 'sum'"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"labels": "no"}, "labels no: no such folder"),
        ({"boxes": "no.csv"}, r"boxes no\.csv: no such file"),
        ({"probe": "no.csv", "target": "a"}, r"probe no\.csv: no such file"),
        ({"model": "timm/resnet18", "window": (32,)}, "those of HySparK.s own network; drop model"),
    ],
)
def test_wrong_options_are_refused_by_name(weights, scans, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hyspark.embed(weights, scans, tmp_path / "out", **options, **OPTIONS)


def test_parquet_needs_an_extra(weights, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["embed", str(weights), str(scans), "--out", str(tmp_path / "out"), "--parquet", *WORDS])
    assert stop.value.code == WRONG_USE
    assert f"--parquet needs pyarrow: {install_command('parquet')}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parquet_holds_the_same_numbers(weights, scans, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'hyspark[parquet]'")
    made = hyspark.embed(weights, scans, tmp_path / "out", parquet=True, **OPTIONS)
    table = parquet.read_table(made.files[2])
    assert table.column("case").to_pylist() == ["ct_0", "ct_1"]
    vectors = np.stack([table.column(name).to_numpy() for name in made.table.columns], 1)
    assert np.array_equal(vectors, made.vectors)


def test_a_label_that_the_spacing_loses_is_named(weights, scans, tmp_path):
    image = nib.load(scans / "ct_0.nii.gz")
    values = np.zeros(image.shape, np.uint8)
    middle = [n // 2 for n in image.shape]
    values[tuple(slice(m - 5, m + 5) for m in middle)] = 1
    values[tuple(middle)] = 2
    (tmp_path / "labels").mkdir()
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "labels/ct_0.nii.gz")
    given = {"labels": tmp_path / "labels", "spacing": (16.0, 16.0, 16.0), "stages": (1,), **OPTIONS}
    made = hyspark.embed(weights, scans / "ct_0.nii.gz", tmp_path / "out", **given)
    assert (made.table.regions, list(made.failures)) == (("label_1",), ["ct_0/label_2"])
    assert "on no voxel of the prepared grid" in made.failures["ct_0/label_2"]
