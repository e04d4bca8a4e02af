"""Label maps: in the geometry and with the header of their inputs, several at a time, broken files apart."""

import gzip
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Extension
from nibabel.orientations import axcodes2ornt, ornt_transform

from hyspark.cli.main import main
from hyspark.config.recipes import as_plain
from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.segmentation import predict
from hyspark.evaluation.segmentation.inference import TrainedNetwork, hybird_from_config
from hyspark.evaluation.segmentation.prepare_ahead import prepare_ahead
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.tasks import api
from hyspark.training import checkpoint

NAMES = ["background", "liver", "aorta"]
CONFIG = SegmentationConfig(
    encoder_widths=(6, 6, 12, 12, 24),
    encoder_depths=(1,) * 5,
    expansions=(2,) * 5,
    vit_depth=1,
    spacing=(2.0, 2.0, 3.0),
    crop_size=(16,),
)
GEOMETRY = ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b")


class Levels(torch.nn.Module):
    """The class whose level the voxel's brightness is nearest to: right wherever `write_volume` wrote it."""

    def forward(self, x):
        return torch.cat([-((x - (hu + 175) / 425).abs()) for hu in (-50, 80, 200)], dim=1)


@pytest.fixture
def weights(tmp_path):
    """A run folder with an untrained network."""
    contents = {"model": hybird_from_config(CONFIG, 3).state_dict(), "config": as_plain(CONFIG), "classes": NAMES}
    checkpoint.save(contents, tmp_path / "run" / "best.pth")
    return tmp_path / "run"


@pytest.fixture
def knowing(monkeypatch):
    """In place of the untrained network one that knows."""
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), CONFIG, NAMES, []))
    monkeypatch.setattr(api, "kind_of_network", lambda path: "segmentation")


def write_volume(path, orientation="RAS", turn=0.0):
    """A box of body with two organs at 2 x 2 x 3 mm, and scraps of one; returns its true label map, as it lies on the
    disk. turn: degrees by which the patient lies askew.
    """
    label = np.zeros((24, 22, 20), np.uint8)
    label[6:14, 6:14, 6:14] = 1
    label[16:20, 8:12, 4:15] = 2
    label[4, 4, 4] = 1
    image = np.full(label.shape, -1000, np.int16)
    image[2:22, 2:20, 2:18] = -50
    image[label == 1], image[label == 2] = 80, 200
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    affine = np.array([[cos, -sin, 0, -30], [sin, cos, 0, 12], [0, 0, 1, 500], [0, 0, 0, 1]]) @ np.diag([2, 2, 3, 1])
    turned = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    nifti = nibabel.Nifti1Image(image, affine).as_reoriented(turned)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.header["descrip"] = b"a patient's name"
    nifti.header["cal_max"] = 250
    nifti.header["scl_slope"], nifti.header["scl_inter"] = 1, 0
    nifti.header.extensions.append(Nifti1Extension("comment", b"a patient's name"))
    nifti.set_sform(nifti.affine, 1)
    nifti.set_qform(nifti.affine, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nifti, path)
    return nibabel.Nifti1Image(label, affine).as_reoriented(turned).get_fdata()


@pytest.mark.parametrize("turn", [0.0, 20.0])
@pytest.mark.parametrize(("orientation", "ending"), [("RAS", ".nii.gz"), ("LPS", ".nii"), ("SAR", ".nii.gz")])
def test_a_label_map_lies_where_its_volume_does(knowing, tmp_path, orientation, ending, turn):
    source = tmp_path / "in" / f"case_0000{ending}"
    truth = write_volume(source, orientation, turn)
    assert predict.predict_segmentation(tmp_path, [source], tmp_path / "out", device="cpu", num_workers=1) == {}
    found, given = nibabel.load(tmp_path / "out" / "case.nii.gz"), nibabel.load(source)
    assert np.array_equal(found.get_fdata(), truth)
    assert np.array_equal(found.affine, given.affine)
    for field in GEOMETRY:
        assert np.array_equal(found.header[field], given.header[field]), field


def test_a_header_says_a_label_map_and_names_nobody(knowing, tmp_path):
    write_volume(tmp_path / "in" / "case.nii.gz")
    predict.predict_segmentation(tmp_path, [tmp_path / "in"], tmp_path / "out", device="cpu", num_workers=1)
    path = tmp_path / "out" / "case.nii.gz"
    header = nibabel.load(path).header
    assert header.get_data_dtype() == np.uint8
    assert np.asarray(nibabel.load(path).dataobj).dtype == np.uint8
    assert header["cal_max"] == 0
    assert not header.extensions
    assert b"patient" in gzip.decompress((tmp_path / "in" / "case.nii.gz").read_bytes())
    assert b"patient" not in gzip.decompress(path.read_bytes())
    assert sorted(p.name for p in path.parent.iterdir()) == ["case.nii.gz"]


def test_several_volumes_and_a_broken_one(knowing, tmp_path, capsys):
    names = ("ras", "lps", "ial")
    truth = {name: write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", name.upper()) for name in names}
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no volume")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.uint8), np.eye(4)), tmp_path / "in" / "many.nii.gz")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", "any", f"{tmp_path}/in", "--out", f"{tmp_path}/out", "--device=cpu", "--prepare_workers=1"])
    assert exit_.value.code == 1
    told = capsys.readouterr().err
    assert "broken.nii.gz: unreadable as NIfTI" in told
    assert "many.nii.gz: expected one 3D volume" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ial.nii.gz", "lps.nii.gz", "ras.nii.gz"]
    for name, labels in truth.items():
        assert np.array_equal(nibabel.load(tmp_path / "out" / f"{name}.nii.gz").get_fdata(), labels)


def test_workers_keep_the_order(tmp_path):
    for name in "cab":
        write_volume(tmp_path / f"{name}.nii.gz")
    cases = predict.find_inputs([tmp_path / "c.nii.gz", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    ahead = list(prepare_ahead(cases, CONFIG, 2, 10**12))
    assert [case.name for case, _ in ahead] == ["c", "a", "b"]
    alone = list(prepare_ahead(cases, CONFIG, 1, 10**12))
    assert all(np.array_equal(a["image"], b["image"]) for (_, a), (_, b) in zip(ahead, alone, strict=True))


def test_only_the_largest_part_if_asked(knowing, tmp_path):
    truth = write_volume(tmp_path / "x.nii.gz")
    options = {"device": "cpu", "num_workers": 1, "scoring": Scoring(largest_component=True)}
    predict.predict_segmentation(tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", **options)
    truth[4, 4, 4] = 0
    assert np.array_equal(nibabel.load(tmp_path / "out" / "x.nii.gz").get_fdata(), truth)


def test_nothing_is_replaced_unasked(weights, tmp_path, capsys):
    write_volume(tmp_path / "in" / "x.nii.gz")
    words = ["predict", str(weights), str(tmp_path / "in"), "--device", "cpu", "--prepare_workers", "1"]
    main([*words, "--out", str(tmp_path / "out")])
    written = (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "replace them with --overwrite" in capsys.readouterr().err
    main([*words, "--out", str(tmp_path / "out"), "--overwrite", "--flips", "1", "2", "--overlap", "0.25"])
    assert (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns > written
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "in"), "--overwrite"])
    assert "would replace the volumes themselves" in capsys.readouterr().err


def test_inputs_that_cannot_be(tmp_path):
    for folder in ("a", "b"):
        write_volume(tmp_path / folder / "x_0000.nii.gz")
    with pytest.raises(ValueError, match="two volumes are named x"):
        predict.find_inputs([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(FileNotFoundError, match="c: no such file or folder"):
        predict.find_inputs([tmp_path / "c"])
    with pytest.raises(FileNotFoundError, match="holds no NIfTI file"):
        predict.find_inputs([tmp_path])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="is no NIfTI file"):
        predict.find_inputs([tmp_path / "x.txt"])


def test_flips_of_left_and_right_need_pairs(monkeypatch, tmp_path):
    sided = ["background", "left kidney", "right kidney"]
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), CONFIG, sided, []))
    write_volume(tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match="omit axis 0"):
        predict.predict_segmentation(
            tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", scoring=Scoring(flips=(0,)), device="cpu"
        )
    paired = replace(CONFIG, left_right=("left kidney=right kidney",))
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), paired, sided, []))
    options = {"scoring": Scoring(flips=(0,)), "device": "cpu", "num_workers": 1}
    assert predict.predict_segmentation(tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", **options) == {}
