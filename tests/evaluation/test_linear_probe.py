import json

import numpy as np
import pytest
import torch
from torch import nn

from hyspark.data.datasets.cases import UNANNOTATED
from hyspark.data.preprocessing.store import StoredVolume, write_entry
from hyspark.evaluation.linear_probe import (
    CROPS_PER_VOLUME,
    VOXELS_PER_CLASS,
    Probe,
    cut_probe,
    features_at,
    find_probe_cases,
    labelled_box,
    mean,
    probe_crop,
    probe_encoder,
    take_probe,
)
from hyspark.evaluation.probe_head import IGNORED, fit_head, probe_scores
from hyspark.models.encoder import HybridEncoder

SIZE = (32, 32, 32)


class Told(nn.Module):
    """Stands for an encoder whose finest map says the intensity bands that it is asked for, beside noise."""

    def __init__(self, num_bands):
        super().__init__()
        self.num_bands = num_bands
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, volumes):
        bands = (volumes * 10).round().long()[:, 0].clamp(max=self.num_bands - 1)
        noise = torch.rand(volumes.shape, generator=torch.Generator().manual_seed(0))
        finest = torch.cat([nn.functional.one_hot(bands, self.num_bands).movedim(-1, 1).float(), noise], dim=1)
        return [finest, *(volumes[..., ::s, ::s, ::s] * 0 for s in (2, 4, 8, 16))]


def volume(folder, name, organs, shape=(40, 44, 48)):
    """A stored volume with one box for each organ, of this intensity: label 3 has intensity .3."""
    image, label = np.full(shape, 0.0, np.float32), np.zeros(shape, np.uint8)
    for place, organ in enumerate(organs):
        box = (slice(8, 16), slice(8, 20), slice(4 + 12 * place, 12 + 12 * place))
        image[box], label[box] = organ / 10, organ
    folder.mkdir(parents=True, exist_ok=True)
    write_entry(folder / name, image=image, label=label, affine=np.eye(4), source=name)
    return StoredVolume(folder / name, name)


@pytest.fixture
def halves(tmp_path):
    return [volume(tmp_path, f"{half}{i}", (1, 2, 3)) for half in "ab" for i in range(2)]


def encoder():
    torch.manual_seed(0)
    return HybridEncoder(1, 32, (6, 6, 12, 12, 24), (1,) * 5, (2,) * 5, 1)


# Cases


def test_validation_cases_of_a_splits_file_are_not_used(tmp_path):
    for name in "abc":
        for file in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "c"], "validation": ["b"]}))
    cases = find_probe_cases(tmp_path, 2)
    assert {c.name for c in [*cases.fit, *cases.score]} == {"a", "c"}
    assert len(cases.fit) == len(cases.score) == 1
    assert cases.names == {0: "background", 1: "liver"}
    with pytest.raises(ValueError, match=r"probe_cases is 3, but .* has 2 labelled training cases"):
        find_probe_cases(tmp_path, 3)


def test_a_data_list_is_read_and_its_halves_share_no_subject(tmp_path):
    names = [f"{subject}_t{visit}" for subject in "abcdef" for visit in (1, 2)]
    for name in names:
        for kind in ("image", "label"):
            (tmp_path / f"{kind}_{name}.nii.gz").touch()
    entries = [{"image": f"image_{n}.nii.gz", "label": f"label_{n}.nii.gz"} for n in names]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries[:10], "validation": entries[10:]}))
    for path in (tmp_path, tmp_path / "dataset.json"):
        cases = find_probe_cases(path, 10)
        fit, score = ({c.name.removeprefix("image_")[0] for c in half} for half in (cases.fit, cases.score))
        assert fit
        assert score
        assert not fit & score
        assert fit | score == set("abcde")
    with pytest.raises(ValueError, match="all of one subject"):
        find_probe_cases(tmp_path, 1)


# Crops


def test_ignored_voxels_are_no_class(tmp_path):
    volumes = [volume(tmp_path, name, (1, 2, UNANNOTATED)) for name in "ab"]
    probe = cut_probe(volumes[:1], volumes[1:], {}, SIZE)
    assert probe.names == ["class_0", "class_1", "class_2"]
    assert all((crop.label != IGNORED).any() for crop in (*probe.fit, *probe.score))
    assert any((crop.label == IGNORED).any() for crop in (*probe.fit, *probe.score))


def test_crops_are_the_same_every_time_and_the_classes_take_turns(tmp_path):
    # Boxes far apart, and crops so small that each holds one organ only.
    stored = volume(tmp_path, "v", (1, 2, 3))
    boxes = [labelled_box(stored, (6, 6, 6), 0, n) for n in range(3)]
    assert [int(label.max()) for _, label in boxes] == [1, 2, 3]
    again = labelled_box(stored, (6, 6, 6), 0, 2)
    assert all(np.array_equal(a, b) for a, b in zip(boxes[2], again, strict=True))


def test_an_empty_label_is_an_error_that_names_the_volume(tmp_path):
    with pytest.raises(ValueError, match="hollow: its label is empty"):
        labelled_box(volume(tmp_path, "hollow", ()), SIZE, 0, 0)


def test_a_class_in_one_half_only_is_ignored(tmp_path):
    fit, score = volume(tmp_path, "fit", (1, 2)), volume(tmp_path, "score", (3, 2))
    probe = cut_probe([fit], [score], {0: "background", 2: "liver"}, (40, 44, 48))
    assert probe.names == ["background", "liver"]
    assert len(probe.fit) == len(probe.score) == CROPS_PER_VOLUME
    (crop, _) = probe.fit
    label = torch.from_numpy(fit.read("label", (0, 0, 0), (40, 44, 48)))
    for value, number in ((0, 0), (1, IGNORED), (2, 1)):
        assert (crop.label[label == value] == number).all()
    assert set(crop.label.flatten()[crop.voxels].tolist()) == {0, 1}
    with pytest.raises(ValueError, match=r"no class is labelled in both halves .*raise probe_cases"):
        cut_probe([volume(tmp_path, "one", (1,))], [volume(tmp_path, "two", (2,))], {}, (40, 44, 48))


def test_voxels_are_drawn_evenly_over_the_classes():
    label = np.zeros(SIZE, int)
    label[:2, :5, :5] = 1
    label[10:20, :, :] = 2
    label[25:] = IGNORED
    crop = probe_crop(np.zeros((1, *SIZE), np.float32), label)
    drawn = torch.bincount(crop.label.flatten()[crop.voxels])
    assert drawn.tolist() == [VOXELS_PER_CLASS, 50, VOXELS_PER_CLASS]
    assert len(set(crop.voxels.tolist())) == len(crop.voxels)


# Head and score


def test_a_voxels_features_are_what_the_head_sees_there():
    torch.manual_seed(0)
    maps = [torch.rand(1, c, *(s // k for s in (32, 16, 48))) for c, k in ((2, 1), (3, 2), (4, 4), (5, 8), (6, 16))]
    crop = probe_crop(np.zeros((1, 32, 16, 48), np.float32), np.random.default_rng(0).integers(0, 3, (32, 16, 48)))
    features = features_at(maps, crop)
    assert features.shape == (3 * VOXELS_PER_CLASS, 20)
    torch.testing.assert_close(features[:, :2].T, maps[0][0].flatten(1)[:, crop.voxels])
    weight, bias = torch.rand(4, 20), torch.rand(4)
    scores = probe_scores(maps, weight, bias)
    assert scores.shape == (1, 4, 32, 16, 48)
    torch.testing.assert_close(scores[0].flatten(1)[:, crop.voxels].T, features @ weight.T + bias)


def test_intercepts_go_half_the_way_to_the_true_shares():
    torch.manual_seed(0)
    features, labels = torch.rand(400, 3) * 7 + 5, torch.arange(400) % 2
    shares = torch.tensor([0.9, 0.1])
    fair = fit_head(features, labels, torch.tensor([0.5, 0.5]))
    weight, bias = fit_head(features, labels, shares)
    assert torch.equal(weight, fair[0])
    assert (bias - fair[1])[0] - (bias - fair[1])[1] == pytest.approx(np.log(9) / 2, abs=1e-5)
    # Features that say nothing: at their mean the two classes are as likely as their shares, half the way.
    scores = features.mean(0) @ fair[0].T + fair[1]
    assert float(scores[0] - scores[1]) == pytest.approx(0, abs=1e-4)


def test_features_that_tell_the_classes_give_dice_1_and_those_that_do_not_give_little(halves):
    probe = cut_probe(halves[:2], halves[2:], {1: "spleen"}, SIZE)
    known = probe_encoder(Told(4), probe)
    assert list(known) == ["spleen", "class_2", "class_3"]
    assert all(value == pytest.approx(1) for value in known.values())
    assert mean(known) == pytest.approx(1)
    blind = probe_encoder(Told(1), probe)
    assert mean(blind) < 0.1


def test_the_dice_is_over_all_voxels_of_all_scoring_crops(halves):
    probe = cut_probe(halves[:2], halves[2:], {}, SIZE)
    # The encoder cannot tell 2 from 3, and there are more voxels of 3 than of 2 in what the head is fitted on.
    first, *_ = probe.fit
    more = probe_crop(first.image.numpy(), np.where(first.label == 2, IGNORED, first.label))
    told = Told(3)
    dice = probe_encoder(told, Probe([*probe.fit, more, more], probe.score, probe.names))
    label = torch.stack([crop.label for crop in probe.score])
    two, three = (label == 2).sum(), (label == 3).sum()
    assert dice["class_1"] == pytest.approx(1)
    assert dice["class_2"] == 0
    assert dice["class_3"] == pytest.approx(float(2 * three / (two + 2 * three)))


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_and_the_random_state_are_left_as_they_were(halves, training):
    model = encoder().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = cut_probe(halves[:2], halves[2:], {}, SIZE)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first = probe_encoder(model, probe)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert probe_encoder(model, probe) == first


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_that_fails_is_a_warning(halves, training, caplog):
    model = encoder().train(training)
    probe = cut_probe(halves[:2], halves[2:], {}, SIZE)

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(no_memory)
    take_probe(model, probe, log=None, step=4, epoch=1)
    assert "epoch 1: no probe Dice after 5 steps: out of memory" in caplog.text
    assert model.training == training
