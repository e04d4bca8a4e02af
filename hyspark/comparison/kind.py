"""What segmentation and classification runs differ in when they are compared."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyspark.evaluation.score_table import ScoreTable
from hyspark.training.run_folder import checkpoint_file


class RunKind(ABC):
    """A kind of fine-tuning runs. Settings are of the task's own class.

    Attributes:
        verb: Command that makes a run.
        program: Words of another program that makes it; empty for the verb.
        samples: What is scored, in the plural.
        metrics: Metrics that are compared.
        shown: Metrics with a table of their own in the report, and their titles; the first is drawn.
        reading: How to read the report's tables, in Markdown.
        scored_weights: Which weights of a run are scored and what chose them, by what is scored (test, validation).
    """

    verb: str
    program: Sequence[str] = ()
    samples: str
    metrics: Sequence[str]
    shown: Mapping[str, str]
    reading: str
    scored_weights: Mapping[str, str]

    def settings(self, base: Any) -> Any:
        """Return the settings of all runs as this kind reads them.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: A setting has no meaning here.
        """
        return base

    def has_weights(self, config: Any) -> bool:
        """Check that the folder of a run holds trained weights."""
        return checkpoint_file(config).is_file()

    @abstractmethod
    def scores_folder(self, config: Any) -> Path:
        """Return the folder of a run's scores: of the test samples if there are some, else of the validation ones."""

    @abstractmethod
    def samples_per_step(self, config: Any) -> int:
        """Return the number of samples that `samples_per_second` in metrics.jsonl counts in a step."""

    @abstractmethod
    def num_training(self, config: Any) -> int:
        """Count the labelled training samples."""

    @abstractmethod
    def data_digest(self, config: Any) -> str:
        """Compute a digest of all data that runs train on or are scored on, for any number of labels and any seed."""

    @abstractmethod
    def check_data(self, configs: Sequence[Any], initial_weights: Mapping[str, str]) -> None:
        """Check the data and the initial weights before the first of the runs with these settings.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: Data or weights do not fit.
        """

    @abstractmethod
    def comparable(self, table: ScoreTable) -> ScoreTable:
        """Return the scores that are compared, of a run's table."""

    @abstractmethod
    def names(self, cases: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        """Return the entries of benefit.json on what was scored."""

    @abstractmethod
    def mean(self, tables: Sequence[ScoreTable], metric: str, targets: Sequence[str]) -> dict[str, Any]:
        """Average a metric over runs.

        Args:
            tables: A table for each seed, with the same cases and targets.
            metric: One of the metrics.
            targets: The targets.

        Returns:
            "mean", "low" and "high" of its interval, "by_seed" as a sequence, and further entries.
        """

    @abstractmethod
    def difference(
        self, own: Sequence[ScoreTable], baseline: Sequence[ScoreTable], metric: str, targets: Sequence[str]
    ) -> dict[str, Any]:
        """Average the difference of a metric over pairs of runs.

        Args:
            own: A table for each seed, with the same cases and targets.
            baseline: Likewise, for the same seeds.
            metric: One of the metrics.
            targets: The targets.

        Returns:
            "mean", "low" and "high" of its interval, and further entries.
        """

    def sections(self, numbers: Mapping[str, Any]) -> list[str]:
        """Write further sections of the report, in Markdown, below the tables of metrics."""
        return []
