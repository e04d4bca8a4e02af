"""Faults of single files, as a table: what is done to a case, and what has to come of it."""

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from tests.data.quality.small_data import AFFINE, SHAPE, SmallData, compress

Expected = Literal["refused", "otherwise", "fine", "agree"]
Where = Literal["image", "label", "set", "labelled"]


@dataclass(frozen=True)
class Fault:
    """An edit of a data set.

    Attributes:
        name: its name.
        where: what is edited: a case's image or label, or the set; labelled: the set, for the labelled runs alone.
        expected: refused: an error, and the runs refuse it. otherwise: a warning or a note, and the runs do not
            refuse it. fine: no error, and the runs do not refuse it. agree: `check` and the runs agree, whatever they
            say.
        edit: does it to the named case; faults of the set ignore the name.
    """

    name: str
    where: Where
    expected: Expected
    edit: Callable[[SmallData, str], object]


def image(name: str, expected: Expected, change: Callable[[Path], object]) -> Fault:
    """A fault of an image file."""
    return Fault(f"image {name}", "image", expected, lambda data, case: change(data.image(case)))


def image_and_label(name: str, expected: Expected, change: Callable[[Path], object]) -> Fault:
    """One edit of both files of a case."""
    return Fault(
        f"image and label {name}",
        "image",
        expected,
        lambda data, case: [change(path) for path in (data.image(case), data.label(case))],
    )


def label(name: str, expected: Expected, change: Callable[[Path], object]) -> Fault:
    """A fault of a label file."""
    return Fault(f"label {name}", "label", expected, lambda data, case: change(data.label(case)))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


def middle_byte(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.nii.gz")


def link_away(path: Path) -> None:
    target = path.with_name(f".{path.name}.elsewhere")
    os.replace(path, target)
    path.symlink_to(target)


def into_folder(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / path.name).write_bytes(content)


def rename(path: Path, old: str, new: str) -> Path:
    target = path.with_name(path.name.replace(old, new))
    os.replace(path, target)
    return target


def unpacked(path: Path) -> Path:
    """Store a file plain, under the ending .nii."""
    content = gzip.decompress(path.read_bytes())
    path.unlink()
    path.with_suffix("").write_bytes(content)
    return path.with_suffix("")


def as_pair(path: Path) -> None:
    whole = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    nib.save(nib.Nifti1Pair(np.asanyarray(whole.dataobj), whole.affine), path.with_suffix("").with_suffix(".hdr"))


def mgz(path: Path) -> None:
    image = nib.MGHImage(np.ones(SHAPE, np.int16), AFFINE)
    path.write_bytes(compress(image.to_bytes()))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n" + bytes(16)
DICOM = bytes(128) + b"DICM" + bytes(64)
BODIES = {"HTML": b"<!DOCTYPE html><html>404</html>", "LFS pointer": POINTER, "PNG": PNG, "NRRD": NRRD, "DICOM": DICOM}


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def write_plain(content: bytes) -> Callable[[Path], object]:
    return lambda path: unpacked(path).write_bytes(content)


FILES = [
    *(make("dangling link", "refused", dangle) for make in (image, label)),
    *(make("link to a hidden file", "fine", link_away) for make in (image, label)),
    *(make("of no bytes", "refused", write(b"")) for make in (image, label)),
    *(make("one byte", "refused", write(b"\x1f")) for make in (image, label)),
    *(make("gzip of nothing", "refused", write(compress(b""))) for make in (image, label)),
    *(make("cut in half", "refused", half) for make in (image, label)),
    *(
        make("without its last four bytes", "refused", lambda p: p.write_bytes(p.read_bytes()[:-4]))
        for make in (image, label)
    ),
    *(make("wrong checksum", "refused", lambda p: flip_byte(p, -6)) for make in (image, label)),
    *(make("a flipped byte", "refused", middle_byte) for make in (image, label)),
    image("wrong length at its end", "refused", lambda p: flip_byte(p, -2)),
    image("zeros behind", "agree", lambda p: p.write_bytes(p.read_bytes() + bytes(512))),
    image("garbage behind", "agree", lambda p: p.write_bytes(p.read_bytes() + b"garbage" * 9)),
    image(
        "two gzip members",
        "fine",
        lambda p: p.write_bytes(b"".join(map(compress, halves(gzip.decompress(p.read_bytes()))))),
    ),
    image(
        "two gzip members, the second cut",
        "refused",
        lambda p: p.write_bytes(b"".join(map(compress, halves(gzip.decompress(p.read_bytes()))))[:-9]),
    ),
    image("plain data named .gz", "refused", lambda p: p.write_bytes(gzip.decompress(p.read_bytes()))),
    image("gz data named .nii", "refused", lambda p: rename(p, ".nii.gz", ".nii")),
    *(image(f"{kind} named .nii.gz", "refused", write(body)) for kind, body in BODIES.items()),
    *(image(f"{kind} in gzip", "refused", write(compress(body))) for kind, body in BODIES.items()),
    *(image(f"{kind} named .nii", "refused", write_plain(body)) for kind, body in BODIES.items()),
    label("HTML named .nii.gz", "refused", write(BODIES["HTML"])),
    image("MGZ named .nii.gz", "refused", mgz),
    image("plain", "fine", unpacked),
    label("plain", "fine", unpacked),
    image("plain and cut", "refused", lambda p: half(unpacked(p))),
    image("plain, with bytes behind", "agree", lambda p: (q := unpacked(p)).write_bytes(q.read_bytes() + b"x" * 99)),
    image("upper-case ending", "fine", lambda p: rename(p, ".nii.gz", ".NII.GZ")),
    image("mixed-case ending", "fine", lambda p: rename(p, ".nii.gz", ".Nii.Gz")),
    image("plain, upper-case ending", "fine", lambda p: rename(unpacked(p), ".nii", ".NII")),
    label("upper-case ending", "fine", lambda p: rename(p, ".nii.gz", ".NII.GZ")),
]
"""Faults that need a look at bytes alone."""


def halves(content: bytes) -> tuple[bytes, bytes]:
    return content[:4000], content[4000:]
