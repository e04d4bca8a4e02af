"""The probe against scikit-learn called by hand; patients stay on one side; labels, splits, intervals, report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hyspark
from hyspark.cli import main
from hyspark.data.datasets.cases import Case
from hyspark.evaluation.embedding import probe
from hyspark.evaluation.embedding.probe import HEADS, fitted_probabilities, probe_vectors, score_of
from hyspark.evaluation.embedding.probe_data import ProbeData, ProbeOptions, check_labels, read_probe_data
from hyspark.evaluation.embedding.report import estimate_text
from hyspark.evaluation.embedding.vectors import VectorTable
from hyspark.utils.install import install_command
from tests.evaluation.embedding.small import body, write_volume, write_weights

AFFINE = np.diag([4.0, 4, 4, 1])
OPTIONS = {"device": "cpu", "prepare_workers": 1}


def data_of(truth, patients, folds, features=None):
    truth = np.asarray(truth)
    features = np.zeros((len(truth), 0)) if features is None else features
    classes = [str(value) for value in np.unique(truth)]
    return ProbeData(np.arange(len(truth)), truth, classes, np.asarray(patients), features, folds, "a split")


@pytest.fixture
def separable():
    """60 rows of 30 patients with a weak difference between two classes, split in halves by patient."""
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(30), 2)
    truth = np.repeat(rng.permutation(np.arange(30) % 2), 2)
    x = rng.normal(size=(60, 8)) + 0.7 * truth[:, None]
    return x, data_of(truth, patients, [(np.arange(40), np.arange(40, 60))])


def by_hand(name, value):
    return LogisticRegression(C=value, max_iter=5000) if name == "logistic" else KNeighborsClassifier(value)


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_are_those_of_scikit_learn(name, separable):
    x, data = separable
    fit, score = data.folds[0]
    inner = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    found = {}
    for value in [value for value in HEADS[name].values if name == "logistic" or value < 32]:
        model = make_pipeline(StandardScaler(), by_hand(name, value))
        chances = cross_val_predict(
            model, x[fit], data.truth[fit], groups=data.patients[fit], cv=inner, method="predict_proba"
        )
        found[value] = roc_auc_score(data.truth[fit], chances[:, 1])
    best = max(found, key=found.get)
    expected = make_pipeline(StandardScaler(), by_hand(name, best)).fit(x[fit], data.truth[fit])
    probabilities, chosen = fitted_probabilities(x, data, HEADS[name])
    assert chosen == [best]
    np.testing.assert_allclose(probabilities, expected.predict_proba(x[score]), rtol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_scored_rows_are_in_no_fit(name, separable):
    x, data = separable
    before, _ = fitted_probabilities(x, data, HEADS[name])
    changed = x.copy()
    changed[41:] = 1000 * changed[41:] + 77
    after, _ = fitted_probabilities(changed, data, HEADS[name])
    np.testing.assert_array_equal(before[0], after[0])


def of_patients(num_patients=24, rows_each=6):
    """Vectors that say who the patient is, and nothing of the class, which is the patient's by lot."""
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(num_patients), rows_each)
    truth = np.repeat(rng.permutation(np.arange(num_patients) % 2), rows_each)
    x = np.repeat(rng.normal(size=(num_patients, 6)), rows_each, axis=0) + 1e-3 * rng.normal(size=(len(truth), 6))
    return x, truth, patients


def labelled_table(tmp_path, truth, patients, heading="case,patient,side\n", words=None):
    names = [f"c{i:03d}" for i in range(len(truth))]
    table = VectorTable(
        tuple(names), ("volume",) * len(names), np.zeros((len(names), 3)), np.ones(len(names)), (), np.zeros((0, 0))
    )
    more = [""] * len(names) if words is None else [f",{word}" for word in words]
    lines = [f"{n},p{p},{'ab'[t]}{m}\n" for n, p, t, m in zip(names, patients, truth, more, strict=True)]
    (tmp_path / "labels.csv").write_text(heading + "".join(lines))
    return table, {name: Case(name, "", Path(f"{name}.nii.gz")) for name in names}


def test_a_patient_is_never_on_both_sides(tmp_path, monkeypatch):
    """With folds over rows, neighbours find each patient again: an AUC of 1. Over patients there is nothing to find."""
    x, truth, patients = of_patients()
    given = labelled_table(tmp_path, truth, patients)
    data = read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side"), *given)
    assert np.array_equal(np.sort(data.scored), np.arange(len(truth)))
    fits = []
    real = probe.fit_and_classify

    def record(classifiers, x, truth, scored, num_classes):
        fits.append([{owner[value] for value in rows[:, 0]} for rows in (x, scored)])
        return real(classifiers, x, truth, scored, num_classes)

    monkeypatch.setattr(probe, "fit_and_classify", record)
    owner = dict(zip(x[:, 0], patients, strict=True))
    found = probe_vectors(x, {}, data)
    assert len(fits) == 2 * 5 * (1 + 5)  # heads, folds, inner folds
    assert not any(fit & scored for fit, scored in fits)
    (auc,) = [row["auc"] for row in found["rows"] if row["head"] == "knn"]
    leaking = [(fit, score) for fit, score in StratifiedKFold(5, shuffle=True, random_state=0).split(x, truth)]
    leaked, _ = fitted_probabilities(x, data._replace(folds=leaking), HEADS["knn"]._replace(values=(5,)))
    assert roc_auc_score(truth[np.concatenate([s for _, s in leaking])], leaked[:, 1]) == 1
    assert auc["mean"] < 0.75


def test_a_patient_on_both_sides_of_an_official_split_is_refused(tmp_path):
    given = labelled_table(
        tmp_path, [0, 1, 0, 1], [1, 2, 1, 3], "case,patient,side,split\n", ["train"] * 2 + ["val"] * 2
    )
    with pytest.raises(ValueError, match="column split: patients on both sides: p1"):
        read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side"), *given)


def test_an_official_split_is_kept(tmp_path):
    words = ["train", "test", "Training", "train", "test"]
    given = labelled_table(tmp_path, [0, 1, 1, 0, 0], [1, 2, 3, 4, 5], "case,patient,side,split\n", words)
    data = read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side"), *given)
    ((fit, score),) = data.folds
    assert (fit.tolist(), score.tolist()) == ([0, 2, 3], [1, 4])
    assert data.protocol == "the split of labels.csv"


def test_patients_are_those_of_the_names_without_a_column(tmp_path):
    names = [f"p{i:02d}_visit{j}" for i in range(10) for j in (1, 2)]
    table = VectorTable(tuple(names), ("volume",) * 20, np.zeros((20, 3)), np.ones(20), (), np.zeros((0, 0)))
    (tmp_path / "labels.csv").write_text("case,side\n" + "".join(f"{n},{'ab'[int(n[2]) % 2]}\n" for n in names))
    cases = {name: Case(name, "", Path(f"{name}.nii.gz")) for name in names}
    data = read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side"), table, cases)
    assert data.patients.tolist() == [name[:3] for name in names]
    for fit, score in data.folds:
        assert not set(data.patients[fit]) & set(data.patients[score])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("case,b\na,1\n", {}, "expected the columns side; it has case, b"),
        ("case,side\nc000,1\nc000,2\n", {}, "line 3: c000 volume comes twice"),
        (
            "case,side\nc000,1\nc001,1\n",
            {},
            "column side: expected 2 to 20 classes among rows of the volumes, got 1: 1",
        ),
        ("case,side\nx,1\ny,2\n", {}, "got 0"),
        ("case,side,f\nc000,1,2\nc001,2,\n", {"features": ("f",)}, "c001: column f: expected a number, got ''"),
        ("case,side\nc000,1\nc001,2\n", {"features": ("side",)}, "--features side: expected columns of numbers"),
        ("case,side\nc000,1\nc001,2\n", {}, "--folds 5: expected as many patients of each class, but 1 has 1, 2 has 1"),
        (
            "case,side,split\nc000,1,train\nc001,2,dev\n",
            {},
            "column split: expected train, and validation or test, got dev",
        ),
        ("case,side,split\nc000,1,train\nc001,2,train\n", {}, "expected training and scored rows, got train alone"),
        ("case,side,split\nc000,1,train\nc001,2,val\nc002,2,test\n", {}, "expected one scored part, got test, val"),
    ],
)
def test_faulty_labels_are_refused(text, options, message, tmp_path):
    given = labelled_table(tmp_path, [0, 1, 0], [1, 2, 3])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side", **options), *given)


def test_regions_need_their_names(tmp_path):
    table = VectorTable(("a", "a"), ("x", "y"), np.zeros((2, 3)), np.ones(2), (), np.zeros((0, 0)))
    (tmp_path / "labels.csv").write_text("case,side\na,1\n")
    with pytest.raises(ValueError, match="line 2: a has 2 regions; expected a column region with one of x, y"):
        read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side"), table, {})


def test_intervals_are_over_patients_with_pairs_kept():
    """By hand: patients drawn with replacement, all rows of a drawn one, the AUC anew, the same ones on both sides."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), rng.integers(1, 5, 20))
    truth = rng.integers(0, 2, len(patients))
    one, other = (rng.random(len(truth)) + weight * truth for weight in (0.5, 0.2))
    data = data_of(truth, patients, [(np.arange(0), np.arange(len(truth)))])
    both = [[np.stack([1 - score, score], 1)] for score in (one, other)]
    found, difference = score_of(data, both[0])["auc"], score_of(data, *both)["auc"]

    def auc(rows, score):
        positive, negative = (score[rows[truth[rows] == value]] for value in (1, 0))
        return (positive[:, None] > negative).mean()

    drawn = []
    for _ in range(1500):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(0, 20, 20)])
        drawn.append([auc(rows, score) for score in (one, other)])
    drawn = np.array(drawn)
    assert found["mean"] == pytest.approx(roc_auc_score(truth, one))
    assert difference["mean"] == pytest.approx(roc_auc_score(truth, one) - roc_auc_score(truth, other))
    for estimate, values in ((found, drawn[:, 0]), (difference, drawn[:, 0] - drawn[:, 1])):
        expected = np.quantile(values, [0.025, 0.975])
        np.testing.assert_allclose([estimate["low"], estimate["high"]], expected, atol=0.03)


def test_random_weights_are_averaged_over_seeds(separable):
    x, data = separable
    features = data.truth[:, None] + np.random.default_rng(1).normal(0, 0.4, (60, 1))
    data = data._replace(features=features)
    random = {0: x, 5: np.random.default_rng(8).normal(size=x.shape)}
    found = probe_vectors(x.astype(np.float32), random, data)
    rows = {(row["head"], row["input"]): row for row in found["rows"]}
    assert rows["logistic", "random weights"]["seeds"] == 2
    aucs = []
    for vectors in random.values():
        probabilities, _ = fitted_probabilities(vectors.astype(float), data, HEADS["logistic"])
        aucs.append(roc_auc_score(data.truth[data.scored], probabilities[:, 1]))
    assert rows["logistic", "random weights"]["auc"]["mean"] == pytest.approx(np.mean(aucs), abs=1e-6)
    pairs = {(row["input"], row["minus"]) for row in found["differences"]}
    assert pairs == set(probe.COMPARED)
    (row,) = [r for r in found["differences"] if (r["head"], r["minus"]) == ("logistic", "random weights")]
    assert row["auc"]["mean"] == pytest.approx(aucs[0] - np.mean(aucs), abs=1e-6)
    assert row["auc"]["low"] <= 0 <= row["auc"]["high"]


@pytest.fixture
def bright_and_dark(tmp_path):
    """16 small CTs of 8 patients, dark and bright ones, with labels."""
    lines = ["case,patient,tissue,size\n"]
    for number in range(16):
        hu = body((16, 16, 8), number)
        hu[hu > -1000] = hu[hu > -1000] / 4 + (120 if number // 2 % 2 else -80)
        write_volume(tmp_path / "scans" / f"ct_{number:02d}.nii.gz", hu, AFFINE)
        lines.append(f"ct_{number:02d},p{number // 2},{('dark', 'bright')[number // 2 % 2]},{number % 5}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    return tmp_path / "scans"


@pytest.mark.curves
def test_the_verb_writes_scores_report_and_picture(bright_and_dark, tmp_path, capsys):
    weights, out = write_weights(tmp_path / "encoder.safetensors"), tmp_path / "out"
    words = ["--probe", str(tmp_path / "labels.csv"), "--target", "tissue", "--features", "size", "--folds", "2"]
    words += ["--random_seeds", "0", "4", "--stages", "1", "--device", "cpu", "--prepare_workers", "1"]
    main.main(["embed", str(weights), str(bright_and_dark), "--out", str(out), *words])
    printed = capsys.readouterr().out
    content = json.loads((out / "probe.json").read_text())
    assert content["classes"] == {"bright": 8, "dark": 8}
    assert (content["num_scored"], content["num_scored_patients"]) == (16, 8)
    (row,) = [r for r in content["rows"] if (r["head"], r["input"]) == ("logistic", "embedding")]
    assert row["auc"]["mean"] == 1
    page = (out / "probe.md").read_text()
    for text in ("1.000 [1.000, 1.000]", "random weights (2 seeds)", "embedding and features minus features"):
        assert text in page
        assert text in printed
    assert "by 2-fold cross-validation" in page
    with Image.open(out / "probe.png") as picture:
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert len(colours) > 20


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"target": "side"}, "expected the columns side; it has case, patient, tissue, size"),
        ({}, {"features": ("tissue",)}, "features tissue: expected columns of numbers"),
        ({"p2,dark,4": "p2,dark,x"}, {"features": ("size",)}, "ct_04: column size: expected a number, got 'x'"),
        ({"ct_05": "ct_04"}, {}, "line 7: ct_04 volume comes twice"),
        ({"bright": "dark"}, {}, "column tissue: expected 2 to 20 classes among rows of the volumes, got 1: dark"),
        ({}, {"folds": 5}, "folds=5: expected as many patients of each class, but bright has 4, dark has 4"),
        ({}, {"grid": 20.0}, "folds=5: expected as many patients of each class, but bright has 4, dark has 4"),
        (
            {"size": "size,split", "dark,": "dark,train", "bright,0": "bright,0,dev"},
            {},
            "column split: expected train, and validation or test, got",
        ),
        (
            {"p1,": "p3,", "p5,": "p3,", "p7,": "p3,"},
            {"folds": 2},
            "folds=2: expected as many patients of each class",
        ),
        ({f"p{n},b": "p3,b" for n in (5, 7)}, {"folds": 2}, "two patients of each class or more in each training part"),
    ],
)
def test_labels_are_checked_before_anything_is_embedded(change, options, message, bright_and_dark, tmp_path):
    text = (tmp_path / "labels.csv").read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "labels.csv").write_text(text)
    given = {"probe": tmp_path / "labels.csv", "target": "tissue", **options, **OPTIONS}
    with pytest.raises(ValueError, match=message):
        hyspark.embed(write_weights(tmp_path / "e.safetensors"), bright_and_dark, tmp_path / "out", **given)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_rows_of_no_volume_are_named_before_anything_is_embedded(tmp_path, caplog):
    """Where names differ by an ending, no error of the remaining rows says so."""
    (tmp_path / "l.csv").write_text("case,y\n" + "".join(f"c{i}.nii.gz,{i % 2}\n" for i in range(8)))
    cases = {f"c{i}": Case(f"c{i}", "d", tmp_path / f"c{i}_0000.nii.gz") for i in range(8)}
    with pytest.raises(ValueError, match="got 0"):
        check_labels(ProbeOptions(tmp_path / "l.csv", "y"), cases, {case: ["volume"] for case in cases})
    assert "l.csv: no volume is named as the case of 8 rows, such as c0.nii.gz, c1.nii.gz" in caplog.text


def test_umap_needs_an_extra(bright_and_dark, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    given = {"probe": tmp_path / "labels.csv", "target": "tissue", "picture": "umap"}
    with pytest.raises(ModuleNotFoundError, match="umap-learn: ") as raised:
        hyspark.embed(write_weights(tmp_path / "e.safetensors"), bright_and_dark, tmp_path / "out", **given, **OPTIONS)
    assert install_command("umap") in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_patients_are_compared_without_blanks_and_never_unknown(tmp_path):
    _, truth, patients = of_patients(6, 2)
    given = labelled_table(tmp_path, truth, [f"{p}{' ' * (i % 2)}" for i, p in enumerate(patients)])
    data = read_probe_data(ProbeOptions(tmp_path / "labels.csv", "side", folds=2), *given)
    assert sorted(set(data.patients)) == [f"p{p}" for p in range(6)]
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace(",p0,", ",,").replace(",p1 ,", ",NaN,"))
    with pytest.raises(ValueError, match="column patient: expected one in each row with a class, got none of c0"):
        read_probe_data(ProbeOptions(path, "side", folds=2), *given)


def test_a_class_that_is_nan_is_none(tmp_path):
    _, truth, patients = of_patients(8, 1)
    given = labelled_table(tmp_path, truth, patients)
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace("p0,a", "p0,nan").replace("p0,b", "p0,nan"))
    data = read_probe_data(ProbeOptions(path, "side", folds=2), *given)
    assert data.classes == ["a", "b"]
    assert len(data.truth) == 7


def test_a_single_scored_patient_has_no_interval(separable):
    _, data = separable
    one = data._replace(patients=np.zeros(60, int))
    chances = np.tile([0.4, 0.6], (20, 1))
    found = score_of(one, [chances])["accuracy"]
    assert np.isfinite(found["mean"])
    assert np.isnan([found["low"], found["high"]]).all()
    assert estimate_text(found) == f"{found['mean']:.3f}"
