"""Agreement of class probabilities with the truth: accuracy, AUC, macro F1; of a set of images, and of resamples of it.

Probabilities are (n, classes), the truth (n,) holds class numbers:
- AUC is the area under the ROC curve. With two classes it is that of the second (in sorted order). With more it is the
  mean over classes of each against the rest.
- F1 is the mean over the classes that occur, in the truth or among the predictions.

A resample is given by how often each image is drawn, (resamples, n). The AUC is no mean over images, so it is computed
anew for each resample. It is the fraction of pairs of a positive and a negative image in the right order, ties counting
half (Hanley and McNeil, Radiology 1982), by one sort and sums of weights.
"""

import math

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

CLASSIFICATION_METRICS = {"auc": "AUC", "accuracy": "accuracy", "f1": "macro F1"}
"""Metrics of a set of images: by key, the title in reports."""
MAX_WEIGHTS = 5_000_000
"""Elements of an array of weights; more resamples are computed in chunks."""


def classification_scores(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Compute the metrics of a set of images.

    Args:
        truth: Class numbers (n,).
        probabilities: (n, classes).

    Returns:
        Values by metric; the AUC is NaN if a class does not occur.
    """
    predicted = probabilities.argmax(1)
    num_classes = probabilities.shape[1]
    auc = math.nan
    if len(np.unique(truth)) == num_classes:
        auc = roc_auc_score(truth, probabilities[:, 1] if num_classes == 2 else probabilities, multi_class="ovr")
    return {
        "auc": float(auc),
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, average="macro")),
    }


def confusion_matrix(truth: np.ndarray, probabilities: np.ndarray) -> list[list[int]]:
    """Count images: a row for each true class, a column for each predicted one."""
    num_classes = probabilities.shape[1]
    counts = np.bincount(num_classes * truth + probabilities.argmax(1), minlength=num_classes**2)
    matrix: list[list[int]] = counts.reshape(num_classes, num_classes).tolist()
    return matrix


def resampled_metric(metric: str, truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute a metric in each resample.

    Args:
        metric: A key of CLASSIFICATION_METRICS.
        truth: Class numbers (n,).
        probabilities: (n, classes).
        weights: How often each image is drawn, (resamples, n).

    Returns:
        (resamples,); NaN where the metric is undefined.
    """
    measure = {"auc": resampled_auc, "accuracy": resampled_accuracy, "f1": resampled_f1}[metric]
    size = max(1, MAX_WEIGHTS // max(1, len(truth)))
    chunks = [weights[start : start + size] for start in range(0, len(weights), size)]
    return np.concatenate([measure(truth, probabilities, chunk) for chunk in chunks])


def resampled_accuracy(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the accuracy in each resample."""
    is_right = probabilities.argmax(1) == truth
    return weights @ is_right.astype(float) / weights.sum(1)


def resampled_f1(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the macro F1 in each resample, over the classes that occur in it."""
    classes = np.arange(probabilities.shape[1])
    true, predicted = (values[:, None] == classes for values in (truth, probabilities.argmax(1)))
    both, either = weights @ (true & predicted), weights @ (true.astype(float) + predicted)
    return mean_of_defined(np.divide(2 * both, either, out=np.full(both.shape, np.nan), where=either > 0))


def resampled_auc(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the AUC in each resample; with more than two classes, over those that occur in it.

    As in `classification_scores`, it is NaN if a class does not occur in the set of images at all.
    """
    num_classes = probabilities.shape[1]
    if len(np.unique(truth)) < num_classes:
        return np.full(len(weights), np.nan)
    classes = [1] if num_classes == 2 else range(num_classes)
    return mean_of_defined(np.stack([binary_auc(truth == c, probabilities[:, c], weights) for c in classes], 1))


def binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the AUC of a score in each resample; NaN where no image is positive, or none is negative.

    Args:
        positive: bool (n,).
        score: (n,).
        weights: (resamples, n).
    """
    order = np.argsort(score, kind="stable")
    score, positive = score[order], positive[order]
    drawn = np.take(weights, order, axis=1)
    negative = np.zeros((len(weights), len(score) + 1))  # number of negative images among the first 0, 1, 2, ...
    np.cumsum(drawn * ~positive, axis=1, out=negative[:, 1:])
    of_positive = np.take(drawn, np.flatnonzero(positive), axis=1)
    # Of equal scores half count: the mean of the negative ones before the first of them, and up to the last.
    below, upto = (
        np.take(negative, np.searchsorted(score, score[positive], side), axis=1) for side in ("left", "right")
    )
    pairs = (of_positive * (below + upto)).sum(1) / 2
    total = of_positive.sum(1) * negative[:, -1]
    return np.divide(pairs, total, out=np.full(len(weights), np.nan), where=total > 0)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Average over the last axis without NaN; NaN if all values are."""
    defined = ~np.isnan(values)
    sums, counts = np.where(defined, values, 0).sum(-1), defined.sum(-1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
