"""Records of weights and data in the folder of a comparison, against which later calls are checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from hyspark.models.weights.model_folder import weights_file


def check_weights(out: Path, initial_weights: Mapping[str, str]) -> dict[str, str]:
    """Compute the digests of the initial weights, and add those that earlier calls recorded in `out`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The content of a file has changed since an earlier call.
    """
    record = out / "starts.json"
    digests: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    for name, weights in initial_weights.items():
        if weights == "none":
            continue
        file = weights_file(weights)
        if not file.is_file():
            raise FileNotFoundError(f"--initial_weights {name}={weights}: no such file")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digests.setdefault(name, digest) != digest:
            raise ValueError(
                f"{weights} is not the file that runs of {name!r} in {out} were started from: its content has changed; "
                "give it another name in --initial_weights, or name another --out"
            )
    return digests


def check_data_digest(out: Path, digest: str) -> str:
    """Compare the digest of the data with the one that an earlier call recorded in `out`.

    Returns:
        The digest.

    Raises:
        ValueError: They differ.
    """
    record = out / "data.json"
    known = json.loads(record.read_text())["digest"] if record.is_file() else digest
    if known != digest:
        raise ValueError(
            f"the data is not that of the runs in {out}: images, labels, or the lists of training, validation and test "
            f"cases have changed (digest was {known}, is {digest}); name another --out"
        )
    return digest
