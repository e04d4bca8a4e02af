"""What lies in the folder in which the commands of a page are typed: made of phantoms, once a session, then copied.

Each function below `MAKERS` writes into a folder that holds what its `needs` have written. Names:

    labelled    data/Dataset042_Mine: 6 labelled CTs
    others      data/Dataset043_Others: 2 labelled CTs
    scans       new_scans: 2 CTs, scan_000.nii.gz and scan_001.nii.gz
    pacs        pacs_export: DICOM of two patients, CT with a localizer and MR
    clinic      pacs_export: CT that can be referred to, and an RTSTRUCT of one patient
    mr          data/Dataset044_MR: 4 labelled MR of two channels
    slices      slices/train/1, slices/val/1: PNG slices of data/Dataset042_Mine
    images      data/COVID-CT: train, val and test with the classes COVID and NonCOVID
    pretrained  ckpt/debug: a finished pre-training on data/Dataset042_Mine
    finetuned   ckpt/mine: a finished fine-tuning on data/Dataset042_Mine, from ckpt/debug
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from pydicom import dcmread

from hyspark.data.synthetic.phantom import make_phantom, write_phantoms
from tests.data.readers.dicom_files import write_series, write_slice
from tests.docs.blocks import ROOT, SCRIPTS
from tests.docs.shortened import COARSE, in_folder, typed_here

COPIED = ("configs", "benchmarks")
WEIGHTS = "hyspark_1kpretrained_timm_style.pth"


def lay_out(folder: Path) -> None:
    """Make a folder look like a checkout after `make setup`: scripts, recipes, released weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SCRIPTS, "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("data", "ckpt", ".venv/bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()
    for path in (ROOT / "ckpt").glob("hyspark_*"):
        (folder / "ckpt" / path.name).symlink_to(path)


def labelled_set(folder: Path, name: str, num: int, seed: int) -> None:
    """Write labelled CTs as a data set of this name."""
    write_phantoms(folder / "raw", num_labelled=num, num_unlabelled=0, seed=seed, spacings=COARSE, progress=False)
    shutil.move(folder / "raw" / "Dataset900_PhantomLabelled", folder / "data" / name)
    (folder / "raw").rmdir()


def labelled(folder: Path) -> None:
    labelled_set(folder, "Dataset042_Mine", 6, 0)


def others(folder: Path) -> None:
    labelled_set(folder, "Dataset043_Others", 2, 7)


def scans(folder: Path) -> None:
    (folder / "new_scans").mkdir()
    for number in range(2):
        phantom = make_phantom(900 + number, spacing=COARSE[number], orientation="LPS")
        nib.save(nib.Nifti1Image(phantom.image, phantom.affine), folder / "new_scans" / f"scan_{number:03d}.nii.gz")


def pacs(folder: Path) -> None:
    out = folder / "pacs_export"
    for number in range(2):
        hu = make_phantom(950 + number, spacing=(8.0, 8.0, 8.0), orientation="LPS").image
        size = {"Rows": hu.shape[1], "Columns": hu.shape[0], "PixelSpacing": [8.0, 8.0], "PatientID": f"DOE{number}"}
        write_series(out, hu, spacing=8.0, prefix=f"ct{number}_", SeriesInstanceUID=f"1.2.{number}", **size)
    scout = {"SeriesInstanceUID": "1.3", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "PatientID": "DOE0"}
    write_slice(out / "scout", np.zeros((8, 8), np.int16), (0, 0, 0), **scout)
    mr = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "RescaleIntercept": 0, "PatientID": "DOE1"}
    write_series(out / "mr", np.abs(hu), spacing=8.0, SeriesInstanceUID="1.4", **size | mr)


def clinic(folder: Path) -> None:
    """CT of two patients, and contours on five slices of the first."""
    from tests.data.structures.structure_files import write_rtstruct  # skips where highdicom is not installed

    out = folder / "pacs_export"
    for number in range(2):
        hu = make_phantom(950 + number, spacing=(8.0, 8.0, 8.0), orientation="LPS").image
        uids = {"SeriesInstanceUID": f"1.2.{number}", "StudyInstanceUID": f"1.3.{number}", "PatientID": f"DOE{number}"}
        size = {"Rows": hu.shape[1], "Columns": hu.shape[0], "PixelSpacing": [8.0, 8.0]}
        frame = {"FrameOfReferenceUID": f"1.4.{number}"}
        write_series(out, hu, spacing=8.0, prefix=f"ct{number}_", **size, **uids, **frame)
    slices = [dcmread(path) for path in sorted(out.glob("ct0_*"))]
    slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))

    def box(row: int, column: int, edge: int) -> list[np.ndarray]:
        corners = np.array([(column, row), (column + edge, row), (column + edge, row + edge), (column, row + edge)])
        middle = len(slices) // 2
        positions = [np.array(one.ImagePositionPatient, float) for one in slices[middle - 2 : middle + 3]]
        return [np.column_stack([8.0 * corners + at[:2], np.full(4, at[2])]) for at in positions]

    structures = {"Right_Lung": box(8, 6, 8), "left lung": box(8, 26, 8), "Aorta_thoracica": box(14, 18, 4)}
    write_rtstruct(out / "structures" / "rt0", slices, structures | {"liver": box(12, 12, 4)})


def mr(folder: Path) -> None:
    """A made-up contrast: each structure has a signal of its own, between 0 and about 2000."""
    out = folder / "data" / "Dataset044_MR"
    (out / "imagesTr").mkdir(parents=True)
    (out / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        phantom = make_phantom(970 + number, spacing=COARSE[number % 2])
        for channel in range(2):
            signal = np.clip(phantom.image + 1000.0, 0, None) * (0.4 + 0.3 * channel)
            signal += 90 * phantom.label + rng.rayleigh(20, phantom.image.shape)
            image = nib.Nifti1Image(signal.astype(np.int16), phantom.affine)
            nib.save(image, out / "imagesTr" / f"mr_{number:03d}_{channel:04d}.nii.gz")
        nib.save(nib.Nifti1Image(phantom.label, phantom.affine), out / "labelsTr" / f"mr_{number:03d}.nii.gz")
    known = json.loads((folder / "data/Dataset042_Mine/dataset.json").read_text())
    known |= {"channel_names": {"0": "T1", "1": "T2"}, "numTraining": 4}
    (out / "dataset.json").write_text(json.dumps(known))


def slices(folder: Path) -> None:
    typed(folder, "slices --source data/Dataset042_Mine --out slices --stride 4")


def images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("val", 3), ("test", 3)):
        for label, name in enumerate(("COVID", "NonCOVID")):
            (folder / "data/COVID-CT" / part / name).mkdir(parents=True)
            for number in range(num):
                pixels = rng.integers(0, 120, (72, 80), dtype=np.uint8)
                pixels[:40, :40] += np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / "data/COVID-CT" / part / name / f"{part}_{number}.png")


def pretrained(folder: Path) -> None:
    typed(folder, "pretrain --data data/Dataset042_Mine --out ckpt/debug")


def finetuned(folder: Path) -> None:
    typed(folder, f"finetune --data data/Dataset042_Mine --weights ckpt/debug/{WEIGHTS} --out ckpt/mine")


def typed(folder: Path, line: str) -> None:
    """Call a verb in a folder, shortened."""
    with in_folder(folder):
        reply = typed_here(["hyspark", *line.split()])
    assert reply.code == 0, reply.err


MAKERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "labelled": (labelled, ()),
    "others": (others, ()),
    "scans": (scans, ()),
    "pacs": (pacs, ()),
    "clinic": (clinic, ()),
    "mr": (mr, ("labelled",)),
    "slices": (slices, ("labelled",)),
    "images": (images, ()),
    "pretrained": (pretrained, ("labelled",)),
    "finetuned": (finetuned, ("pretrained",)),
}
"""Workspaces by name: what writes them, and those that come before."""


def with_needed(names: list[str]) -> list[str]:
    """List workspaces and those that they need, in the order of making."""
    found: list[str] = []
    for name in names:
        assert name in MAKERS, f"no workspace {name}; there are {', '.join(MAKERS)}"
        found += [one for one in (*with_needed(list(MAKERS[name][1])), name) if one not in found]
    return found


def fill(folder: Path, names: list[str], cache: Path) -> None:
    """Fill a page's folder with its workspaces, which a session makes once."""
    lay_out(folder)
    for name in with_needed(names):
        made = cache / name
        if not (made / "made").exists():
            shutil.rmtree(made, ignore_errors=True)
            fill(made, list(MAKERS[name][1]), cache)
            MAKERS[name][0](made)
            (made / "made").touch()
        shutil.copytree(made, folder, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns(*KEPT))


KEPT = (*COPIED, "made", "hyspark_openkbp.*")
"""What `lay_out` has written already."""
