"""Entries of the store from before headers were read by the standard of NIfTI.

Preparation used to replace the affine of a file whose edges by pixdim differ from it. Entries of such files hold
another grid than the file's, and are prepared again. All others hold what preparation gives now, and are marked so.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.store import READER, checksums
from hyspark.data.readers.geometry import Grid, pair_fault
from hyspark.data.readers.header import NiftiError, read_nifti_header

HARMLESS_FAULTS = ("no orientation", "sform and qform disagree")
"""Kinds of fault of a header that was read alike."""


def outdated_entries(folders: Mapping[Case, Path]) -> list[Path]:
    """List the intact entries of cases whose headers were read otherwise; the others are marked as current."""
    outdated = []
    for case, folder in folders.items():
        content = json.loads((folder / "entry.json").read_bytes())
        if content.get("reader") == READER:
            continue
        if not was_read_alike(case):
            outdated.append(folder)
            continue
        del content["checksums"]["entry.json"]
        known = content.pop("checksums")
        content["reader"] = READER
        content["checksums"] = known | checksums(folder, ["entry.json"], content)
        with suppress(OSError):  # of a store that may only be read: the headers are read at every start
            temporary = folder / f".entry-{os.getpid()}.json"
            temporary.write_text(json.dumps(content))
            os.replace(temporary, folder / "entry.json")
    return outdated


def was_read_alike(case: Case) -> bool:
    """Return whether the files of a case had the geometry that their headers have by the standard."""
    try:
        headers = [read_nifti_header(path) for path in (case.image, case.label) if path]
    except NiftiError:
        return False
    for header in headers:
        edges = np.array(header.raw["pixdim"][1:4], dtype=np.float64)
        is_odd = any(kind not in HARMLESS_FAULTS for kind, _ in header.faults)
        if is_odd or not np.allclose(edges, voxel_sizes(header.affine)):
            return False
    grids = [Grid(header.shape, header.affine) for header in headers]
    return len(grids) == 1 or pair_fault(*grids) is None
