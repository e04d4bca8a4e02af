"""Metrics of classified images: by hand, as scikit-learn has them, and the same in resamples."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from hyspark.evaluation.classification.metrics import (
    CLASSIFICATION_METRICS,
    classification_scores,
    confusion_matrix,
    resampled_metric,
)
from hyspark.evaluation.classification.scores import (
    Classified,
    class_metric_rows,
    confusion_rows,
    write_classification_scores,
)
from hyspark.evaluation.score_table import read_score_table
from hyspark.figures.mistakes import mistakes_figure


def two(probability):
    """(n,) of the second class -> (n, 2)."""
    second = np.array(probability)
    return np.stack([1 - second, second], 1)


def test_two_classes_by_hand():
    truth = np.array([0, 0, 0, 1, 1])
    probabilities = two([0.1, 0.6, 0.3, 0.4, 0.9])
    scores = classification_scores(truth, probabilities)
    # Of the 6 pairs one is in the wrong order: .6 of the first class, .4 of the second.
    assert scores["auc"] == pytest.approx(5 / 6)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    # Right: 2 of 3 and 1 of 2; predicted 3 and 2.
    assert scores["f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 4) / 2)
    assert confusion_matrix(truth, probabilities) == [[2, 1], [1, 1]]


def test_three_classes_by_hand():
    truth = np.array([0, 1, 2, 2])
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.1, 0.1, 0.8]])
    scores = classification_scores(truth, probabilities)
    assert scores["accuracy"] == 0.75
    assert scores["auc"] == pytest.approx((1 + 2 / 3 + (2 + 1.5) / 4) / 3)  # the tie of .3 counts half
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert confusion_matrix(truth, probabilities) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_without_a_class_there_is_no_auc():
    scores = classification_scores(np.array([1, 1]), two([0.2, 0.9]))
    assert np.isnan(scores["auc"])
    assert scores["accuracy"] == 0.5


def test_what_a_resample_says_of_a_set_without_a_class_is_what_its_scores_say():
    three = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1]])
    truth = np.array([0, 1, 1])
    assert np.isnan(classification_scores(truth, three)["auc"])
    assert np.isnan(resampled_metric("auc", truth, three, np.ones((2, 3)))).all()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_each_resample_is_what_scikit_learn_gives(num_classes):
    rng = np.random.default_rng(0)
    truth = rng.integers(num_classes, size=30)
    logits = rng.normal(size=(30, num_classes)).round(1) + np.eye(num_classes)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if num_classes == 2:
        probabilities = two(probabilities[:, 1].round(1))  # with ties
    weights = rng.multinomial(30, np.full(30, 1 / 30), 8).astype(float)
    ones = {name: resampled_metric(name, truth, probabilities, np.ones((1, 30)))[0] for name in CLASSIFICATION_METRICS}
    assert ones == pytest.approx(classification_scores(truth, probabilities))
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(30), weight.astype(int))
        values = {name: resampled_metric(name, truth, probabilities, weights)[row] for name in CLASSIFICATION_METRICS}
        y, p = truth[drawn], probabilities[drawn]
        score = p[:, 1] if num_classes == 2 else p
        assert values["auc"] == pytest.approx(roc_auc_score(y, score, multi_class="ovr"))
        assert values["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)))
        assert values["f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))


def test_many_resamples_in_parts_are_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    truth, probabilities = rng.integers(2, size=20), two(rng.uniform(size=20))
    weights = rng.multinomial(20, np.full(20, 1 / 20), 50).astype(float)
    whole = resampled_metric("auc", truth, probabilities, weights)
    monkeypatch.setattr("hyspark.evaluation.classification.metrics.MAX_WEIGHTS", 60)
    assert np.array_equal(resampled_metric("auc", truth, probabilities, weights), whole)


def test_a_resample_of_one_class_has_no_auc():
    weights = np.array([[2.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    values = resampled_metric("auc", np.array([0, 0, 1]), two([0.2, 0.3, 0.9]), weights)
    assert np.isnan(values[0])
    assert values[1] == 1


def test_scores_are_written_and_read_back(tmp_path):
    """A name that is no UTF-8 comes back as it was."""
    scored = Classified(("a/0.png", "b/\udcff.png", "b/2.png"), np.array([0, 1, 1]), two([0.9, 0.1, 1 / 3]), ("a", "b"))
    summary = write_classification_scores(tmp_path, scored, {"weights": "<w>"})
    assert summary["protocol"] == {"weights": "<w>", "num_images": 3}
    assert summary["metrics"]["accuracy"] == 0
    assert scored.mistakes == [0, 1, 2]
    read = Classified.from_table(read_score_table(tmp_path / "cases.csv"))
    assert (read.names, read.classes) == (scored.names, scored.classes)
    assert np.array_equal(read.truth, scored.truth)
    assert np.array_equal(read.probabilities, scored.probabilities)
    assert class_metric_rows(summary)[:3] == [["metric", "value"], ["AUC", "0.000"], ["accuracy", "0.000"]]
    assert confusion_rows(summary)[2] == ["true b", "2", "0"]
    (tmp_path / "cases.csv").write_text("file,truth,probability of a\nx,c,0.5\n")
    with pytest.raises(ValueError, match=r"cases\.csv: expected file, truth"):
        read_score_table(tmp_path / "cases.csv")


def test_the_picture_of_mistakes_shows_the_most_confident_first():
    truth = np.array([0, 1, 1, 0])
    scored = Classified(("a/$x$.png", "b/1.png", "b/2.png", "a/3.png"), truth, two([0.8, 0.1, 0.9, 0.4]), ("a", "b"))
    images = [torch.zeros(1, 4, 6, dtype=torch.uint8)] * 3 + [torch.zeros(3, 4, 6, dtype=torch.uint8)]
    figure = mistakes_figure(scored, images)
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["1.png\nb, taken for a (90%)", "$x$.png\na, taken for b (80%)"]
    assert mistakes_figure(Classified(("a",), np.array([1]), two([0.8]), ("a", "b")), images) is None
