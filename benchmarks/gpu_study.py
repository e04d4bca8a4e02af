"""Pre-training and few-label fine-tuning in minutes of one GPU: what two CPU cores cannot do. See `make gpu-study`.

    python benchmarks/gpu_study.py prepare --data data --out data/gpu_study        # on any machine: a folder to copy
    python benchmarks/gpu_study.py run --data data/gpu_study --out ckpt/gpu_study --minutes 6      # on the GPU

`run` pre-trains for half of its time, then fine-tunes from these weights and from random ones, seed by seed. The same
command continues: a pre-training that was stopped goes on, finished runs stay. OUT/results holds all that is worth
keeping, at most 8 files below 16 MB, written as they come; a new OUT with this folder alone continues, too.
"""

import os
import sys
import time
from pathlib import Path

from tap import Tap

ROOT = Path(__file__).parents[1]


class PrepareArguments(Tap):
    """Make the data folder: images and labels, small enough to copy, and lists."""

    data: str  # Folder with the nnU-Net data sets
    out: str = "data/gpu_study"  # Folder to write
    labelled: str = "Dataset501_OpenKBP"  # Data set to fine-tune on; its cases without labels are pre-trained on, too
    unlabelled: list[str] = ["Dataset502_BodyCT"]  # noqa: RUF012  # Further data sets to pre-train on
    spacing: tuple[float, float, float] = (2.5, 2.5, 2.5)  # mm; a patch is 16 voxels
    max_mb: float = 40  # Size of the folder in MB; unlabelled cases that do not fit are excluded
    seed: int = 0  # Order in which unlabelled cases are taken


class RunArguments(Tap):
    """Pre-train, fine-tune, score. The same command continues. Exit code 75: pre-training is not finished."""

    data: str = "data/gpu_study"  # Folder made by prepare
    out: str = "ckpt/gpu_study"  # Folder of runs and results
    minutes: float = 6  # Time of this call, all included
    device: str = "cuda"  # cuda; or cpu, which takes tiny networks and proves that everything works
    jobs: int = 8  # Fine-tuning runs side by side
    num_labelled: tuple[int, ...] = (5, 10)  # Numbers of labelled training cases
    max_seeds: int = 20  # Seeds after which the study is complete
    pretrain_config: str = str(ROOT / "configs/pretrain_gpu_study.yaml")  # Recipe of pre-training
    finetune_config: str = str(ROOT / "configs/finetune_gpu_study.yaml")  # Recipe of fine-tuning


class Arguments(Tap):
    """A study for one GPU in minutes."""

    def configure(self) -> None:
        self.add_subparsers(dest="step", required=True)
        self.add_subparser("prepare", PrepareArguments, help="make the folder that is copied to the GPU machine")
        self.add_subparser("run", RunArguments, help="pre-train, fine-tune and score within a time")


def prepare(arguments: PrepareArguments) -> None:
    """Make the data folder and print its size."""
    import study_data

    a = arguments
    out = Path(a.out)
    found = study_data.prepare(
        Path(a.data), out, a.labelled, a.unlabelled, spacing=a.spacing, max_mb=a.max_mb, seed=a.seed
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / study_data.MB
    print(
        f"{out}: {size:.1f} MB, {found['num_volumes']} volumes for {' x '.join(map(str, found['spacing_mm']))} mm: "
        f"{found['num_training_labelled']} labelled to train on, {found['num_validation']} to validate on, "
        f"{found['num_unlabelled']} without labels, {found['num_unlabelled_excluded']} more excluded by --max_mb"
    )


def run(arguments: RunArguments, begun: float) -> None:
    """Run the study until its time is up."""
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # progress bars that do not fill a log
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OSError("--device cuda: expected a CUDA device, got none; --device cpu runs the study at toy size")
    import study_stages
    from study_time import Budget

    code = study_stages.run(arguments, Budget(begun, 60 * arguments.minutes))
    if code:
        sys.exit(code)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and do the step; errors for users are one line and exit code 2."""
    begun = time.monotonic()
    arguments = Arguments(prog="benchmarks/gpu_study.py", description=__doc__).parse_args(argv)
    from hyspark.cli.run_verb import run_verb

    run_verb(lambda _: prepare(arguments) if arguments.step == "prepare" else run(arguments, begun), [])


if __name__ == "__main__":
    main()
