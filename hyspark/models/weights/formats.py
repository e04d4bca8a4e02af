"""Recognise what a file is by its first bytes, and describe files that hold no weights of PyTorch, with what to do."""

import re
import shlex
from pathlib import Path

SIGNATURES = (
    (0, rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (0, rb"\s*(?:\xef\xbb\xbf)?\s*<(?i:!doctype|html|head|\?xml)", "a web page or an error message of a server{title}"),
    (0, rb"\x1f\x8b", "compressed by gzip; unpack it: `gunzip -c {path} > {stem}`, and give {stem}"),
    (0, rb"BZh", "compressed by bzip2; unpack it: `bunzip2 -c {path} > {stem}`, and give {stem}"),
    (0, rb"\xfd7zXZ", "compressed by xz; unpack it: `xz -dc {path} > {stem}`, and give {stem}"),
    (0, rb"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it: `zstd -dc {path} > {stem}`, and give {stem}"),
    (0, rb"7z\xbc\xaf|Rar!", "an archive; unpack it, and give the file of weights in it"),
    (257, rb"ustar", "a tar archive; unpack it: `tar -xf {path}`, and give the file of weights in it"),
    (0, rb"\x89HDF\r\n", "HDF5, as Keras and TensorFlow write it; ask for weights of PyTorch, or convert them there"),
    (4, rb"TFL3", "a TensorFlow Lite model; ask for the weights of PyTorch"),
    (0, rb"GGUF", "a quantised model in GGUF; ask for the weights of PyTorch"),
    (0, rb"MATLAB", "a MATLAB file; ask for the weights of PyTorch"),
    (344, rb"n\+1\x00", "a NIfTI volume, no weights"),
    (128, rb"DICM", "a DICOM file, no weights"),
    (0, rb"\x89PNG|\xff\xd8\xff", "an image, no weights"),
    (
        0,
        rb"\x08[\x01-\x14][\x10\x12\x1a\x3a]",
        "an ONNX model; its names are not the network's: ask for the weights of PyTorch",
    ),
)
"""Offset, pattern and description of files that hold no weights of PyTorch."""
SUFFIXES = {
    ".onnx": "an ONNX model; its names are not the network's: ask for the weights of PyTorch",
    ".h5": "HDF5, as Keras and TensorFlow write it; ask for weights of PyTorch, or convert them there",
    ".keras": "a Keras model; ask for weights of PyTorch, or convert them there",
    ".pb": "a TensorFlow graph; ask for weights of PyTorch, or convert them there",
    ".index": "part of a TensorFlow checkpoint; ask for weights of PyTorch, or convert them there",
    ".msgpack": "weights of Flax; ask for those of PyTorch, or convert them there",
    ".tflite": "a TensorFlow Lite model; ask for the weights of PyTorch",
    ".engine": "a TensorRT engine; ask for the weights of PyTorch",
    ".yaml": "settings, no weights",
    ".yml": "settings, no weights",
}
"""Descriptions by the end of the name, where the first bytes do not decide."""
TENSORFLOW = re.compile(r"\.data-\d{5}-of-\d{5}$")
PICKLE = re.compile(rb"\x80[\x02-\x05]")
LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What follows the first two bytes in files of torch.save before version 1.6."""
LONGEST_END = 22 + 65535
"""Most bytes of the last record of a zip archive, with its comment."""
ZIP64_END = 56 + 20
"""Bytes of the two records before it in large archives."""


def format_of(path: Path) -> str:
    """Recognise the format of a file.

    Returns:
        "torch", "safetensors", "index" (JSON of the parts of one state dict), "numpy", "pickle" (not by torch.save), or
        "" for any other.
    """
    head = read_head(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 10**8:
        return "safetensors"
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if head.startswith(b"PK"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return "numpy" if first.endswith(b".npy") else "torch"
    if PICKLE.match(head):
        return "torch" if head[2:].startswith(LEGACY_TORCH) else "pickle"
    return "index" if path.name.endswith(".index.json") else ""


def describe_foreign(path: Path) -> str:
    """Describe a file that holds no weights of PyTorch, and what to do; empty for one of unknown format."""
    head = read_head(path)
    if not head:
        return "the file is empty: truncated, or its download failed; download it again"
    for offset, pattern, what in SIGNATURES:
        if re.match(pattern, head[offset:]):
            return f"the file is {fill_in(what, path, head)}"
    if TENSORFLOW.search(path.name):
        return f"the file is {SUFFIXES['.index']}"
    if path.suffix.lower() in SUFFIXES:
        return f"the file is {SUFFIXES[path.suffix.lower()]}"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = "" if error.start < len(head) - 4 else head[: error.start].decode()
    if text.strip() and (text.isprintable() or not re.search(r"[\x00-\x08\x0e-\x1f]", text)):
        return f"the file is a text, no weights (it begins {' '.join(text[:60].split())!r}); give the file of weights"
    return ""


def fill_in(what: str, path: Path, head: bytes) -> str:
    """Fill path and title into a description."""
    found = re.search(r"<(?i:title|message|code)>\s*([^<]{1,80})", head.decode(errors="replace"))
    title = f" ({' '.join(found[1].split())}); " if found else "; "
    title += "download the file itself, from GitHub by its `raw` or `releases` address"
    stem = path.stem if path.suffix in (".gz", ".bz2", ".xz", ".zst") and path.stem else "weights.pth"
    stem = shlex.quote(str(path.with_name(stem))) if path.name != stem else "weights_unpacked.pth"
    return what.format(path=shlex.quote(str(path)), stem=stem, title=title)


def describe_zip(path: Path) -> str:
    """Describe a zip archive that torch.save did not write, and what to do; empty for a damaged one."""
    names = zip_names(path)
    ends = {name.partition("/")[2] for name in names}
    shown = shlex.quote(str(path))
    literal = repr(str(path))
    if "constants.pkl" in ends and any(end.startswith("code/") for end in ends):
        return (
            "the file is a TorchScript archive, which holds code; if you trust its author, write its weights alone: "
            f'`torch.save(torch.jit.load({literal}, map_location="cpu").state_dict(), "plain.pth")`'
        )
    if "archive_format" in ends and any(end.startswith("models/") for end in ends):
        return (
            "the file is a program of torch.export; if you trust its author, write its weights alone: "
            f'`torch.save(dict(torch.export.load({literal}).state_dict), "plain.pth")`'
        )
    if "data.pkl" in ends or not names:
        return ""
    if "model.weights.h5" in names:
        return f"the file is {SUFFIXES['.keras']}"
    return (
        "the file is a zip archive that torch.save did not write; unpack it: "
        f"`python -m zipfile -e {shown} unpacked`, and give the file of weights in it"
    )


def zip_names(path: Path) -> list[str]:
    """List the names in the directory at the end of a zip archive; none of a damaged one."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - LONGEST_END))
        end = file.read()
        at = end.rfind(b"PK\x05\x06")
        if at < 0 or len(end) < at + 20:
            return []
        length = int.from_bytes(end[at + 12 : at + 16], "little")
        file.seek(max(0, size - len(end) + at - length - ZIP64_END))  # with room for a second ending, of large archives
        directory = file.read(length + ZIP64_END)
    names = []
    at = directory.find(b"PK\x01\x02")
    while at >= 0 and directory[at : at + 4] == b"PK\x01\x02":
        lengths = [int.from_bytes(directory[at + k : at + k + 2], "little") for k in (28, 30, 32)]
        names.append(directory[at + 46 : at + 46 + lengths[0]].decode(errors="replace"))
        at += 46 + sum(lengths)
    return names


def describe_folder(path: Path) -> str:
    """Describe a folder in a path's stead, and what to do."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        shown = shlex.quote(str(path))
        return (
            "a folder of torch.distributed.checkpoint; make one file of it: "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shown} plain.pth`"
        )
    if "zero_to_fp32.py" in names:
        return (
            f"a folder of DeepSpeed; make one file of it: `cd {shlex.quote(str(path))} && python zero_to_fp32.py . "
            "plain`, and give the file in plain"
        )
    if "data.pkl" in names and "data" in names:
        return "an unpacked file of torch.save; download it again, without unpacking it (browsers on macOS unpack)"
    if "saved_model.pb" in names:
        return f"a folder with {SUFFIXES['.pb']}"
    endings = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".index.json", ".pkl", ".npz")
    found = [name for name in names if name.endswith(endings)]
    index = [name for name in found if name.endswith(".index.json")]
    shown = ", ".join((index or found)[:5]) + (", ..." if len(index or found) > 5 else "")
    return f"a folder; give one of its files: {shown}" if found else "a folder without files of weights"


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(4096)
