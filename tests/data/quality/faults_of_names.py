"""Faults of names, as a table."""

import os
import shutil
from collections.abc import Callable

from tests.data.quality.faults_of_files import Expected, Fault, as_pair, into_folder, rename, unpacked
from tests.data.quality.small_data import SmallData, ct, save


def names(name: str, expected: Expected, edit: Callable[[SmallData], object]) -> Fault:
    return Fault(f"names: {name}", "set", expected, lambda data, case: edit(data))


def labelled(name: str, expected: Expected, edit: Callable[[SmallData], object]) -> Fault:
    """A fault that concerns runs with labels alone."""
    return Fault(name, "labelled", expected, lambda data, case: edit(data))


def both(data: SmallData, case: str, new: str) -> None:
    """Rename both files of a case."""
    rename(data.image(case), case, new)
    rename(data.label(case), case, new)


def beside(name: str, content: bytes = b"x") -> Callable[[SmallData], object]:
    return lambda data: (data.folder / "imagesTr" / name).write_bytes(content)


def all_named(*new: str) -> Callable[[SmallData], object]:
    return lambda data: [both(data, case, name) for case, name in zip(data.cases, new, strict=False)]


def without_channels(data: SmallData) -> None:
    for case in data.cases:
        rename(data.image(case), "_0000", "")


def add_channel(data: SmallData) -> None:
    for case in data.cases:
        save(data.folder / "imagesTr" / f"{case}_0001.nii.gz", ct(9))


ODD = [
    *(
        Fault(f"image {name}", "image", "agree", edit)
        for name, edit in {
            "as a folder": lambda d, c: into_folder(d.image(c)),
            "as a pair of files": lambda d, c: as_pair(d.image(c)),
            "without channel": lambda d, c: rename(d.image(c), "_0000", ""),
            "of another channel": lambda d, c: rename(d.image(c), "_0000", "_0001"),
            "of channel 00": lambda d, c: rename(d.image(c), "_0000", "_00"),
            "missing, its label there": lambda d, c: d.image(c).unlink(),
            "under another ending": lambda d, c: rename(d.image(c), ".nii.gz", ".mha"),
            "hidden": lambda d, c: rename(d.image(c), c, f".{c}"),
            "in a folder below": lambda d, c: (
                os.mkdir(d.folder / "imagesTr/more"),
                os.replace(d.image(c), d.folder / "imagesTr/more" / d.image(c).name),
            ),
        }.items()
    ),
    *(
        Fault(f"label {name}", "label", "agree", edit)
        for name, edit in {
            "as a folder": lambda d, c: into_folder(d.label(c)),
            "as a pair of files": lambda d, c: as_pair(d.label(c)),
            "with a channel": lambda d, c: rename(d.label(c), ".nii", "_0000.nii"),
            "of another case": lambda d, c: rename(d.label(c), c, "other"),
            "hidden": lambda d, c: rename(d.label(c), c, f".{c}"),
            "under another ending": lambda d, c: rename(d.label(c), ".nii.gz", ".nrrd"),
            "with a second file": lambda d, c: save(d.label(c).with_suffix(""), d.organs(c)),
        }.items()
    ),
    names(
        "AppleDouble files",
        "fine",
        lambda d: [
            p.with_name(f"._{p.name}").write_bytes(b"\0\5\x16\7")
            for p in [*(d.folder / "imagesTr").iterdir(), *(d.folder / "labelsTr").iterdir()]
        ],
    ),
    names("hidden files", "fine", beside(".DS_Store")),
    names("another channel", "fine", add_channel),
    names("without channels", "fine", without_channels),
    names("a case plain and compressed", "refused", lambda d: save(d.image("p01").with_suffix(""), d.voxels("p01"))),
    names(
        "a case in two cases of its ending",
        "refused",
        lambda d: shutil.copy(d.image("p01"), d.image("p01").with_name("p01_0000.NII.GZ")),
    ),
    names("a case with and without channel", "agree", lambda d: save(d.image("p01").with_name("p01.nii.gz"), ct(8))),
    labelled("names: a label alone", "refused", lambda d: shutil.copy(d.label("p01"), d.label("p99"))),
    names("an image alone", "otherwise", lambda d: save(d.image("p99"), ct(7))),
    labelled("names: images alone", "otherwise", lambda d: shutil.rmtree(d.folder / "labelsTr")),
    labelled("names: no file among the labels", "otherwise", lambda d: [d.label(c).unlink() for c in d.cases]),
    names("spaces", "fine", all_named("a b", "c d")),
    names("unicode", "fine", all_named("Müller", "胃")),
    names("plus and brackets", "fine", all_named("a+b", "c[1](2)")),
    names("quotes", "fine", all_named("a'b", 'c"d')),
    names("a line break", "agree", all_named("a\nb")),
    names("a leading minus", "fine", all_named("-rf")),
    names("dots", "fine", all_named("a.b.c", "1.2.840.113")),
    names("numbers", "fine", all_named("0001", "0002")),
    names("upper and lower case", "fine", all_named("scan", "SCAN")),
    names(
        "BTCV",
        "fine",
        lambda d: [
            (rename(d.image(c), f"{c}_0000", f"img000{i}"), rename(d.label(c), c, f"label000{i}"))
            for i, c in enumerate(d.cases)
        ],
    ),
    names("BIDS", "fine", all_named("sub-01_ses-1_ct", "sub-02_ses-1_ct", "sub-03_ses-1_ct", "sub-04_ses-1_ct")),
    names("visits of one subject", "otherwise", all_named("p01_visit1", "p01_visit2", "p01_visit3", "p01_visit4")),
    names("markers within names", "fine", all_named("ct_scan_0017", "ct_scan_0018", "ct_scan_0019", "ct_scan_0020")),
    names("text files", "otherwise", beside("readme.txt")),
    names("other volumes", "otherwise", beside("p77.mha")),
    names("compressed by bzip2", "otherwise", beside("p77_0000.nii.bz2")),
    names(
        "one scan twice",
        "otherwise",
        lambda d: (shutil.copy(d.image("p01"), d.image("p77")), shutil.copy(d.label("p01"), d.label("p77"))),
    ),
    names(
        "no image",
        "refused",
        lambda d: [p.unlink() for p in [*(d.folder / "imagesTr").iterdir(), *(d.folder / "labelsTr").iterdir()]],
    ),
    names("one case alone", "otherwise", lambda d: [p.unlink() for c in d.cases[1:] for p in (d.image(c), d.label(c))]),
    names("plain files all", "fine", lambda d: [unpacked(p) for c in d.cases for p in (d.image(c), d.label(c))]),
    names(
        "images of tests beside",
        "fine",
        lambda d: ((d.folder / "imagesTs").mkdir(), save(d.folder / "imagesTs/q_0000.nii.gz", ct(5))),
    ),
]
"""Faults of names."""
