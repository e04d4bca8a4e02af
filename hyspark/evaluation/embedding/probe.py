"""What simple classifiers find in vectors: logistic regression and nearest neighbours, with intervals over patients.

Everything is fitted on the training rows of a fold: the standardisation of each number, and the choice of the
regularisation or the number of neighbours, by the AUC in an inner cross-validation without a patient in two folds.

In a cross-validation the probabilities of all folds are scored together. An interval is that of a bootstrap over the
scored patients, and over the seeds of random weights. It takes the fitted classifiers as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from hyspark.evaluation.bootstrap import bootstrap_mean, num_resamples
from hyspark.evaluation.classification.metrics import resampled_metric
from hyspark.evaluation.embedding.probe_data import ProbeData, check_training_parts, grouped_folds, patients_per_class

INNER_FOLDS = 5
MAX_ITERATIONS_OF_FIT = 5000
PROBE_METRICS = {"auc": "AUC", "accuracy": "accuracy"}
VECTORS, RANDOM, FEATURES = "embedding", "random weights", "features"
BOTH, RANDOM_BOTH = "embedding and features", "random weights and features"
COMPARED = ((VECTORS, RANDOM), (VECTORS, FEATURES), (BOTH, FEATURES), (BOTH, RANDOM_BOTH))
"""Pairs whose differences are reported."""


class Head(NamedTuple):
    """A kind of classifier.

    Attributes:
        title: Its name in reports.
        make: Makes one of a value of its parameter.
        values: Values to choose from; of equally good ones the first is taken.
    """

    title: str
    make: Callable[[Any], Any]
    values: tuple[float, ...]


def logistic(regularisation: float) -> Any:
    """Make a logistic regression, by the inverse of the weight of its penalty."""
    return LogisticRegression(C=regularisation, max_iter=MAX_ITERATIONS_OF_FIT)


def neighbours(number: int) -> Any:
    """Make a classifier by the classes of the nearest neighbours."""
    return KNeighborsClassifier(number)


HEADS: Mapping[str, Head] = {
    "logistic": Head("logistic regression", logistic, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)),
    "knn": Head("nearest neighbours", neighbours, (41, 21, 11, 5)),
}


def probe_vectors(vectors: np.ndarray, random: Mapping[int, np.ndarray], data: ProbeData) -> dict[str, Any]:
    """Score classifiers of vectors, of vectors by random weights, of features, and of both together.

    Args:
        vectors: float32 (rows, c), rows of the table of vectors.
        random: Likewise of random weights, by seed.
        data: Labels, features and folds of some of these rows.

    Returns:
        "rows" and "differences": for each head and input, metrics with their means and intervals; "chosen": the
        parameters chosen in each fold.

    Raises:
        ValueError: There are too few patients.
    """
    check_training_parts(data)
    inputs = probe_inputs(vectors, random, data)
    rows, differences, chosen = [], [], []
    for name, head in HEADS.items():
        fitted = {title: [fitted_probabilities(x, data, head) for x in several] for title, several in inputs.items()}
        probabilities = {title: [found for found, _ in several] for title, several in fitted.items()}
        chosen += [{"head": name, "input": title, "values": [v for _, v in fits]} for title, fits in fitted.items()]
        for title, several in probabilities.items():
            rows.append({"head": name, "input": title, "seeds": len(several)} | score_of(data, several))
        for one, other in COMPARED:
            if one in probabilities and other in probabilities:
                row = {"head": name, "input": one, "minus": other}
                differences.append(row | score_of(data, probabilities[one], probabilities[other]))
    return {"rows": rows, "differences": differences, "chosen": chosen}


def probe_inputs(vectors: np.ndarray, random: Mapping[int, np.ndarray], data: ProbeData) -> dict[str, list[np.ndarray]]:
    """Return the inputs of classifiers by name, float64 (n, c) each; those of random weights one per seed."""
    inputs = {VECTORS: [vectors[data.positions].astype(float)]}
    if random:
        inputs[RANDOM] = [one[data.positions].astype(float) for one in random.values()]
    if data.features.shape[1]:
        inputs[FEATURES] = [data.features]
        for name, title in ((VECTORS, BOTH), (RANDOM, RANDOM_BOTH)):
            if name in inputs:
                inputs[title] = [np.hstack([x, data.features]) for x in inputs[name]]
    return inputs


def fitted_probabilities(x: np.ndarray, data: ProbeData, head: Head) -> tuple[np.ndarray, list[float]]:
    """Fit a head in each fold.

    Returns:
        The probabilities (scored rows, classes) of the scored rows, in the order of the folds, and the parameter chosen
        in each fold.
    """
    parts, chosen = [], []
    for fit, score in data.folds:
        best = choose_value(x[fit], data.truth[fit], data.patients[fit], head, len(data.classes))
        parts += fit_and_classify([head.make(best)], x[fit], data.truth[fit], x[score], len(data.classes))
        chosen.append(best)
    return np.concatenate(parts), chosen


def choose_value(x: np.ndarray, truth: np.ndarray, patients: np.ndarray, head: Head, num_classes: int) -> Any:
    """Choose the parameter of a head with the highest AUC in a cross-validation inside of the training rows."""
    num_folds = min(INNER_FOLDS, *patients_per_class(truth, patients))
    folds = grouped_folds(truth, patients, [str(n) for n in range(num_classes)], num_folds)
    scored = np.concatenate([score for _, score in folds])
    least = min(len(fit) for fit, _ in folds)
    values = [value for value in head.values if head.make is not neighbours or value <= least]
    made = [head.make(value) for value in values]
    by_fold = [fit_and_classify(made, x[fit], truth[fit], x[score], num_classes) for fit, score in folds]
    once = np.ones((1, len(scored)))
    aucs = [
        resampled_metric("auc", truth[scored], np.concatenate(parts), once)[0] for parts in zip(*by_fold, strict=True)
    ]
    return values[int(np.argmax(aucs))] if values else max(1, least // 2)


def fit_and_classify(
    classifiers: Sequence[Any], x: np.ndarray, truth: np.ndarray, scored: np.ndarray, num_classes: int
) -> list[np.ndarray]:
    """Fit classifiers on standardised rows, and compute the probabilities of scored ones.

    Returns:
        (n, classes) of each classifier, 0 for a class that the fit has not seen.
    """
    several = [np.zeros((len(scored), num_classes)) for _ in classifiers]
    if len(seen := np.unique(truth)) == 1:
        for found in several:
            found[:, seen] = 1
        return several
    scaler = StandardScaler().fit(x)
    x, scored = scaler.transform(x), scaler.transform(scored)
    for classifier, found in zip(classifiers, several, strict=True):
        fitted = classifier.fit(x, truth)
        found[:, fitted.classes_] = fitted.predict_proba(scored)
    return several


def score_of(
    data: ProbeData, probabilities: Sequence[np.ndarray], minus: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Compute the metrics of probabilities (n, classes) of each seed, or differences of two, with their intervals."""
    scored = data.scored
    truth = data.truth[scored]
    names, number = np.unique(data.patients[scored], return_inverse=True)
    num_seeds = max(len(probabilities), len(minus or ()))
    found = {}
    for metric in PROBE_METRICS:

        def by_seed(several: Sequence[np.ndarray], drawn: np.ndarray, metric: str = metric) -> np.ndarray:
            return np.stack([resampled_metric(metric, truth, one, drawn[:, number]) for one in several], 1)

        def measure(drawn: np.ndarray) -> np.ndarray:
            values = by_seed(probabilities, drawn)
            values = values - by_seed(minus, drawn) if minus else values
            return np.broadcast_to(values, (len(drawn), num_seeds))

        estimate = bootstrap_mean(measure, num_seeds, len(names), num_resamples=num_resamples(len(truth)))
        # A single patient has no interval.
        found[metric] = asdict(estimate if len(names) > 1 else replace(estimate, low=np.nan, high=np.nan))
    return found
