"""How well class probabilities agree with the truth: accuracy, AUC, macro F1; of a set of images, and of many
resamples of it at once.

Probabilities are (n, classes), the truth (n,) holds class numbers. AUC is the area under the ROC curve: with two
classes that of the second (in sorted order); with more the mean over classes of each against the rest. The F1 is the
mean over the classes that occur, in the truth or among the predictions.

A resample is given by how often each image comes in it, (resamples, n). The AUC is no mean over images, so that it is
computed anew for each; it is the share of pairs of a positive and a negative image that are in the right order, ties
counting half (Hanley and McNeil, Radiology 1982), by one sort and sums of weights.
"""

import math

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

METRICS = {"auc": "AUC", "accuracy": "accuracy", "f1": "macro F1"}
"""Keys, and how reports call them."""
MOST_NUMBERS = 5_000_000
"""Of an array of weights; more resamples are done in parts."""


def class_scores(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The metrics of a set of images; the AUC is NaN where a class does not occur."""
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


def confusion(truth: np.ndarray, probabilities: np.ndarray) -> list[list[int]]:
    """Numbers of images: a row for each true class, a column for each predicted one."""
    num_classes = probabilities.shape[1]
    counts = np.bincount(num_classes * truth + probabilities.argmax(1), minlength=num_classes**2)
    table: list[list[int]] = counts.reshape(num_classes, num_classes).tolist()
    return table


def resampled(metric: str, truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A metric in each resample, (resamples,); NaN where it is not defined.

    weights: (resamples, n), how often each image comes.
    """
    measure = {"auc": resampled_auc, "accuracy": resampled_accuracy, "f1": resampled_f1}[metric]
    size = max(1, MOST_NUMBERS // max(1, len(truth)))
    parts = [weights[start : start + size] for start in range(0, len(weights), size)]
    return np.concatenate([measure(truth, probabilities, part) for part in parts])


def resampled_accuracy(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the images, as often as they come, whose most probable class is the true one."""
    right = probabilities.argmax(1) == truth
    return weights @ right.astype(float) / weights.sum(1)


def resampled_f1(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur in a resample."""
    classes = np.arange(probabilities.shape[1])
    true, predicted = (values[:, None] == classes for values in (truth, probabilities.argmax(1)))
    both, either = weights @ (true & predicted), weights @ (true.astype(float) + predicted)
    return mean_of_known(np.divide(2 * both, either, out=np.full(both.shape, np.nan), where=either > 0))


def resampled_auc(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC in each resample; with more than two classes over those that occur in it. NaN where a class does not occur at
    all, as in `class_scores`.
    """
    num_classes = probabilities.shape[1]
    if len(np.unique(truth)) < num_classes:
        return np.full(len(weights), np.nan)
    classes = [1] if num_classes == 2 else range(num_classes)
    return mean_of_known(np.stack([binary_auc(truth == c, probabilities[:, c], weights) for c in classes], 1))


def binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of a score (n,) for what is positive, bool (n,), in each resample; NaN where one side is empty."""
    order = np.argsort(score, kind="stable")
    score, positive = score[order], positive[order]
    drawn = np.take(weights, order, axis=1)
    negative = np.zeros((len(weights), len(score) + 1))  # so many among the first 0, 1, 2, ...
    np.cumsum(drawn * ~positive, axis=1, out=negative[:, 1:])
    of_positive = np.take(drawn, np.flatnonzero(positive), axis=1)
    # Of equal scores half count: the mean of the negative ones before the first of them, and up to the last.
    below, upto = (
        np.take(negative, np.searchsorted(score, score[positive], side), axis=1) for side in ("left", "right")
    )
    pairs = (of_positive * (below + upto)).sum(1) / 2
    total = of_positive.sum(1) * negative[:, -1]
    return np.divide(pairs, total, out=np.full(len(weights), np.nan), where=total > 0)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, NaN left out; NaN where nothing else is there."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0).sum(-1), known.sum(-1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
