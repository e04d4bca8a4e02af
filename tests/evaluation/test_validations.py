"""Scores of a run's validations, from its metrics.jsonl."""

import json

from hyspark.evaluation.validations import read_validations


def write_metrics(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_best_validation_is_the_first_of_equals(tmp_path):
    steps = [{"step": step, "loss": 1.0} for step in range(4)]
    dice = [{"liver": 0.2}, {"liver": 0.8, "spleen": 0.4}, {"liver": 0.4, "spleen": 0.8}, {"liver": 0.5}]
    means = (0.2, 0.6, 0.6, 0.5)
    reviews = [{"step": i, "dice_mean": means[i], "dice": dice[i]} for i in range(4)]
    write_metrics(tmp_path, *steps, *reviews)
    found = read_validations(tmp_path)
    assert (found.kind, found.best, found.last) == ("segmentation", dice[1], dice[3])


def test_of_classification_the_best_accuracy_counts(tmp_path):
    lines = [{"step": 1, "accuracy": 0.9, "f1": 0.8}, {"step": 2, "accuracy": 0.5, "auc": 0.95, "f1": 0.4}]
    write_metrics(tmp_path, *lines)
    found = read_validations(tmp_path)
    assert found.kind == "classification"
    assert found.best == {"accuracy": 0.9, "macro F1": 0.8}
    assert found.last == {"AUC": 0.95, "accuracy": 0.5, "macro F1": 0.4}


def test_without_a_validation_there_is_nothing(tmp_path):
    assert read_validations(tmp_path) is None
    write_metrics(tmp_path, {"step": 0, "loss": 1.0, "probe_dice": 0.5})
    assert read_validations(tmp_path) is None
