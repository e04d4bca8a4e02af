"""Every verb finds the same files in a layout; no image is opened, so files are empty."""

import json
from pathlib import Path

import pytest

from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.build import build_datalist
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.quality.check import find_dataset
from hyspark.data.readers.find import find_volumes
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from hyspark.tasks.pretrain import find_pretraining_cases
from hyspark.training.labelled_cases import find_run_cases

CLASSES = {"background": 0, "liver": 1}
DECATHLON = {"0": "background", "1": "liver"}
NUM = range(6)


def entries(image, label=""):
    both = [{"image": image.format(i)} | ({"label": label.format(i)} if label else {}) for i in NUM]
    return [entry | {"fold": i} for i, entry in enumerate(both)]


def without_fold(listed):
    return [{key: value for key, value in entry.items() if key != "fold"} for entry in listed]


# Layout: files of case {}, the image first, then its label if it has one; further files; JSON files by path.
LAYOUTS = {
    "nnunet v2": (
        ["Dataset001_A/imagesTr/c{}_0000.nii.gz", "Dataset001_A/labelsTr/c{}.nii.gz"],
        ["Dataset001_A/imagesTr/c0_0001.nii.gz", "Dataset001_A/imagesTs/t_0000.nii.gz", "Dataset001_A/.x_0000.nii.gz"],
        {"Dataset001_A/dataset.json": {"labels": CLASSES, "channel_names": {"0": "CT", "1": "PET"}}},
    ),
    "nnunet v2 without channel names": (
        ["imagesTr/c{}_0000.nii.gz", "labelsTr/c{}.nii.gz"],
        ["imagesTr/c0_0001.nii.gz", "imagesTr/notes.txt", "imagesTr/odd.nii.gz", "imagesTr/scan.mha"],
        {},
    ),
    "nnunet v2 with a list of files": (
        ["elsewhere/scan{}.nii.gz", "elsewhere/truth/scan{}.nii.gz"],
        ["elsewhere/other0.nii.gz"],
        {
            "Dataset001_A/dataset.json": {
                "labels": CLASSES,
                "dataset": {
                    f"c{i}": {
                        "images": [f"../elsewhere/scan{i}.nii.gz", f"../elsewhere/other{i}.nii.gz"],
                        "label": f"../elsewhere/truth/scan{i}.nii.gz",
                    }
                    for i in NUM
                },
            }
        },
    ),
    "nnunet v1": (
        ["imagesTr/c{}_0000.nii.gz", "labelsTr/c{}.nii.gz"],
        ["imagesTr/c0_0001.nii.gz"],
        {
            "dataset.json": {
                "labels": DECATHLON,
                "modality": {"0": "CT", "1": "PET"},
                "numTraining": 6,
                "training": without_fold(entries("./imagesTr/c{}.nii.gz", "./labelsTr/c{}.nii.gz")),
                "test": ["./imagesTs/t.nii.gz"],
            }
        },
    ),
    "decathlon": (
        ["Task01_A/imagesTr/liver_{}.nii.gz", "Task01_A/labelsTr/liver_{}.nii.gz"],
        ["Task01_A/imagesTr/._liver_0.nii.gz", "Task01_A/imagesTs/liver_9.nii.gz"],
        {},
    ),
    "decathlon with folds": (
        ["imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz"],
        [],
        {
            "dataset.json": {
                "labels": DECATHLON,
                "training": entries("imagesTr\\liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz"),
            }
        },
    ),
    "amos, cases of four digits": (["imagesTr/amos_000{}.nii.gz", "labelsTr/amos_000{}.nii.gz"], [], {}),
    "word, unlabelled": (["imagesTr/word_001{}.nii.gz"], [], {}),
    "capitals": (["A{}.NII.GZ"], [], {}),
    "btcv": (["imagesTr/img000{}.nii.gz", "labelsTr/label000{}.nii.gz"], [], {}),
    "btcv, loose": (["img/img000{}.nii.gz", "label/label000{}.nii.gz"], [], {}),
    "kits": (["case_0000{}/imaging.nii.gz", "case_0000{}/segmentation.nii.gz"], [], {}),
    "lits": (["volume-{}.nii", "segmentation-{}.nii"], [], {}),
    "segthor": (["Patient_0{}/Patient_0{}.nii.gz", "Patient_0{}/GT.nii.gz"], [], {}),
    "totalsegmentator": (
        ["s000{}/ct.nii.gz"],
        ["s0000/segmentations/liver.nii.gz", "s0000/segmentations/spleen.nii.gz", "meta.csv"],
        {},
    ),
    "bids": (
        ["sub-0{}/ses-1/ct/sub-0{}_ses-1_ct.nii.gz", "derivatives/seg/sub-0{}/ses-1/ct/sub-0{}_ses-1_dseg.nii.gz"],
        ["derivatives/reg/sub-00/sub-00_space-MNI_ct.nii.gz"],
        {"dataset_description.json": {"Name": "x"}},
    ),
    "loose, other formats beside": (["scans/p{}.nii.gz"], ["scans/q.mha", "scans/r.nrrd", "scans/s.dcm"], {}),
    "two channels": (["p{}_0000.nii.gz"], ["p0_0001.nii.gz", "p1_0001.nii.gz"], {}),
    "labels beside": (["p{}.nii.gz", "p{}_seg.nii.gz"], ["p0/mask_1.nii.gz"], {}),
    "named folders": (["images/p{}.nii.gz", "manual_masks/p{}.nii.gz"], [], {}),
    "flare21": (["TrainingImg/train_00{}_0000.nii.gz", "TrainingMask/train_00{}.nii.gz"], [], {}),
    "instance22": (["data/00{}.nii.gz", "label/00{}.nii.gz"], [], {}),
    "abdomenct-1k": (["CT-1K-ImagePart1/Case_0000{}_0000.nii.gz", "Mask/Case_0000{}.nii.gz"], [], {}),
    "mosmed": (["studies/CT-1/study_000{}.nii.gz", "masks/study_000{}_mask.nii.gz"], [], {}),
    "covid-19-ct-seg": (["COVID-19-CT-Seg_20cases/c_00{}.nii.gz", "Lung_Mask/c_00{}.nii.gz"], [], {}),
    "verse": (
        ["train/rawdata/sub-v00{}/sub-v00{}_ct.nii.gz", "train/derivatives/sub-v00{}/sub-v00{}_seg-vert_msk.nii.gz"],
        ["train/derivatives/sub-v000/sub-v000_snp.nii.gz"],
        {},
    ),
    "capitals within words": (["p{}CT.nii.gz", "p{}Seg.nii.gz"], [], {}),
    "segthor in a folder of its name": (
        ["SegTHOR/train/Patient_0{}/Patient_0{}.nii.gz", "SegTHOR/train/Patient_0{}/GT.nii.gz"],
        [],
        {},
    ),
    "numbers that labels have": (["imgs/case_000{}.nii.gz", "gts/case_000{}.nii.gz"], [], {}),
    "masks of organs beside": (["p{}/image.nii.gz"], ["p0/liver.nii.gz", "p0/kidney_left.nii.gz"], {}),
    "a mask of an organ beside": (["p{}/ct.nii.gz", "p{}/liver_tumor.nii.gz"], [], {}),
    "predictions beside": (
        ["p{}.nii.gz", "p{}_seg.nii.gz"],
        ["p0_pred.nii.gz", "predictions/p1.nii.gz", "pred/p1_seg.nii.gz"],
        {},
    ),
    "predictions as labels": (["p{}.nii.gz", "labels/p{}_pred.nii.gz"], [], {}),
    "amos, further folders": (
        ["imagesTr/amos_000{}.nii.gz", "labelsTr/amos_000{}.nii.gz"],
        ["imagesVa/amos_0008.nii.gz", "labelsVa/amos_0008.nii.gz", "extra/x.nii.gz", "imagesTr/sub/y.nii.gz"]
        + ["old_labels/amos_0001.nii.gz", "x.mha"],
        {},
    ),
    "topcow": (["imagesTr/topcow_00{}_0000.nii.gz"], ["cow_seg_labelsTr/topcow_000.nii.gz"], {}),
    "numbered from 0000": (["scan_000{}.nii.gz"], [f"scan_00{i}.nii.gz" for i in range(10, 40)], {}),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """The folder, its images and its labels."""
    names, further, lists = LAYOUTS[request.param]
    files = [[tmp_path / name.replace("{}", str(i)) for name in names] for i in NUM]
    if request.param == "numbered from 0000":
        files += [[tmp_path / name] for name in (f"scan_00{i}.nii.gz" for i in range(10, 40))]
    for file in [*(f for case in files for f in case), *(tmp_path / name for name in further)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name, content in lists.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\ufeff" + json.dumps(content))
    images = {case[0] for case in files}
    return tmp_path, images, {case[1] for case in files if len(case) > 1}


def images_of(cases):
    found = [case.image for case in cases]
    assert len(set(found)) == len(found)
    assert len({case.name for case in cases}) == len(found)
    return set(found)


def test_all_verbs_find_the_same_images(layout):
    folder, images, labels = layout
    listed = build_datalist(folder)
    assert images_of(listed.training) == images
    checked = find_dataset(folder)
    assert images_of(checked.cases) == images
    assert {case.label for case in checked.cases if case.label} == labels
    assert [f for f in checked.findings if f.severity == "error"] == []
    training, validation = find_pretraining_cases(PretrainConfig(data=str(folder)))
    assert images_of([*training, *validation]) == images
    assert validation
    if not (folder / "Dataset001_A/dataset.json").exists() or (folder / "Dataset001_A/imagesTr").is_dir():
        found = find_volumes([folder], min_slices=1, skip=Path(), num_workers=1, progress=False)
        assert {volume.source for volume in found.volumes} == images
    assert images_of(read_inputs([folder]).cases) == images
    if (folder / "imagesTr").is_dir():
        odd = {file for file in (folder / "imagesTr").glob("odd.nii.gz")}  # a name that only check knows for odd
        assert images_of(read_inputs([folder / "imagesTr"]).cases) == images | odd


def test_labelled_verbs_find_the_same_pairs(layout):
    folder, images, labels = layout
    config = SegmentationConfig(data=str(folder))
    if not labels:
        for find in (lambda: find_run_cases(config), lambda: find_labelled(folder), lambda: build_labelled(folder)):
            with pytest.raises((ValueError, FileNotFoundError), match="images but no label"):
                find()
        return
    run = find_run_cases(config)
    assert images_of([*run.training, *run.validation]) == images
    assert {case.label for case in [*run.training, *run.validation]} == labels
    pairs = {case.image: case.label for case in [*run.training, *run.validation]}
    assert {case.image: case.label for case in find_labelled(folder, "all").cases} == pairs
    assert {case.image: case.label for case in build_labelled(folder).training} == pairs
    key = [str(image).removesuffix(".nii.gz") for image in pairs]
    assert len(key) == len(NUM)


def build_labelled(folder):
    return build_datalist(folder, labels=True)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("nnunet v2", ["another channel", "c0_0001.nii.gz", "imagesTs", "t_0000.nii.gz"]),
        ("nnunet v2 without channel names", ["c0_0001", "notes.txt", "odd.nii.gz", "scan.mha", "convert it to NIfTI"]),
        ("nnunet v2 with a list of files", ["5 files not used", "other0.nii.gz"]),
        ("totalsegmentator", ["2 files not used", "s0000/segmentations/liver.nii.gz", "--ml"]),
        ("loose, other formats beside", ["3 files not used", "q.mha", "r.nrrd", "s.dcm"]),
        ("two channels", ["2 files not used, another channel", "p0_0001.nii.gz"]),
        ("bids", ["derivatives/reg"]),
        ("verse", ["sub-v000_snp"]),
        ("masks of organs beside", ["2 files not used, several label maps of one image", "kidney_left", "p0/liver"]),
        ("predictions beside", ["3 files not used, a prediction by its name; to train on it, move it into a folder"]),
        (
            "amos, further folders",
            ["in labelsVa, which is for tests: labelsVa/amos_0008", "below imagesTr; move", "x.mha"],
        ),
        (
            "amos, further folders",
            ["outside of imagesTr: extra/x", "label maps outside of labelsTr: old_labels/amos_0001"],
        ),
        ("topcow", ["labelsTr, which is missing; name their folder labelsTr to use them: cow_seg_labelsTr/topcow_000"]),
    ],
    indirect=["layout"],
)
def test_files_that_are_not_used_are_counted_and_named(layout, words):
    text = "\n".join(build_datalist(layout[0]).unused)
    assert [word for word in words if word not in text and word != "5 files not used"] == []
    assert "c0_0001" not in text or "numTraining" not in text
    assert ".x_0000" not in text
    assert "._liver" not in text


def test_doubtful_files_are_named(tmp_path):
    """Two files for a case, a link into a data set, a folder of the name of a file, a file in the place of a folder."""
    for name in ("loose/x.nii.gz", "loose/x.nii", "data/Dataset001_A/imagesTr/c_0000.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for find in (lambda: read_inputs([tmp_path / "loose"]).cases, lambda: build_datalist(tmp_path / "loose")):
        with pytest.raises(ValueError, match=r"x\.nii\.gz: another file for the case of .*x\.nii; expected one file"):
            find()
    data = tmp_path / "data"
    (data / "again").symlink_to(data / "Dataset001_A")
    (data / "Dataset001_A/imagesTr/d_0000.nii.gz").mkdir()
    listed = build_datalist(data)
    assert [case.name for case in listed.training] == ["c"]
    assert [line for line in listed.unused if "d_0000" not in line] == []
    assert "1 file not used, a folder of the name of a file" in listed.unused[0]
    with pytest.raises(ValueError, match=r"x\.nii\.gz: expected a folder of data or a decathlon JSON, got one volume"):
        find_dataset(tmp_path / "loose/x.nii.gz")


def test_explicit_files_of_other_channels_and_label_maps_are_not_predicted(tmp_path):
    names = ["p_0000.nii.gz", "p_0001.nii.gz", "q.nii.gz", "q_seg.nii.gz", "r_0001.nii.gz"]
    for name in names:
        (tmp_path / name).touch()
    given = [tmp_path / name for name in names]
    assert [case.image.name for case in read_inputs(given[::-1]).cases] == ["q.nii.gz", "p_0000.nii.gz"]
    assert [case.name for case in read_inputs([tmp_path / "r_0001.nii.gz"]).cases] == ["r_0001"]
    assert [case.name for case in read_inputs([tmp_path / "q_seg.nii.gz"]).cases] == ["q_seg"]
    assert [case.image.name for case in read_inputs([tmp_path]).cases] == ["p_0000.nii.gz", "q.nii.gz"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["A/001.nii.gz", "B/001.nii.gz", "truth/001.nii.gz"], "a label map whose name fits several images"),
        (["data/1.nii.gz", "masks/liver/1.nii.gz", "masks/lung/1.nii.gz"], "several label maps of one image"),
        (["m1.nii.gz", "m2.nii.gz", "mask_c1.nii.gz"], "a label map without an image of its name"),
        (["images/p.nii.gz", "p_pred.nii.gz"], "a prediction by its name"),
    ],
)
def test_a_label_map_that_is_not_used_has_its_reason(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=reason):
        find_run_cases(SegmentationConfig(data=str(tmp_path)))
