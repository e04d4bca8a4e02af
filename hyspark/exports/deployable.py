"""The network that is exported: of a run that was fine-tuned for segmentation."""

from collections.abc import Sequence
from pathlib import Path

from hyspark.evaluation.network_kind import read_fine_tuned
from hyspark.evaluation.segmentation.deployed import deployed_form
from hyspark.evaluation.segmentation.inference import TrainedNetwork, load_fine_tuned


def load_deployable(source: Path, out: Path, endings: Sequence[str] = ()) -> TrainedNetwork:
    """Load the network to export.

    Args:
        source: best.pth of a fine-tuning run, or the run folder.
        out: The file or folder to write.
        endings: Endings of the names that `out` may have; empty for a folder.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The source is no segmentation network of a fine-tuning run, or `out` does not fit.
    """
    if endings and out.suffix not in endings:
        raise ValueError(f"{out}: expected a path that ends in {' or '.join(endings)}, the format of the file")
    if not endings and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder for the bundle, got one that exists; name another")
    if deployed_form(source):
        raise ValueError(f"{source}: exported already; give the run folder or best.pth that it was exported from")
    if read_fine_tuned(source).kind == "classification":
        raise ValueError(
            f"{source}: expected a network fine-tuned for segmentation, got a classifier, which has no such export; "
            "its best.pth is read by `hyspark predict`"
        )
    return load_fine_tuned(source)
