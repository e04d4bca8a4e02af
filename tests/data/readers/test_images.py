"""Images are found, drawn and decoded as promised, and what is wrong with them is said with their names."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hyspark.data.batches.images import (
    Augmentation,
    ImageBatches,
    Normalisation,
    centre_crop,
    normalise,
    random_box,
    short_side,
    training_crop,
)
from hyspark.data.batches.loader import Shard
from hyspark.data.readers.images import (
    FoundImages,
    decode,
    find_classes,
    find_images,
    image_files,
    log_other_files,
    read_image,
)

NO_CHANGE = Augmentation((1.0, 1.0), 0.0, 0.0, 0.0)
AS_IT_IS = Normalisation(1, (0.0,), (1.0,))


def save(path, shape=(20, 30), value=100, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, shape[::-1], value).save(path)
    return path


def an_npz(path, **changed):
    images = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8)
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.uint8)
    arrays = {
        f"{part}_{kind}": v for part in ("train", "val", "test") for kind, v in (("images", images), ("labels", labels))
    }
    arrays |= changed
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.fixture
def folder(tmp_path):
    for part, counts in (("train", {"b": 3, "a": 2}), ("val", {"a": 1, "b": 1})):
        for name, num in counts.items():
            for i in range(num):
                save(tmp_path / "set" / part / name / f"{i}.png", value=10 * i)
    return tmp_path / "set"


# Finding


def test_files_that_are_not_used_are_counted_and_named(folder, caplog):
    caplog.set_level("INFO")
    train = folder / "train"
    for name in ("a/x.dcm", "a/n.npy", "a/h.heic", "a/Thumbs.db", "a/.hidden"):
        (train / name).write_bytes(b"x")
    save(train / "loose.png")
    log_other_files(train, find_images(folder)[0]["train"].sources)
    assert caplog.messages == [
        f"{train}: 1 file not used, in no folder of a class: loose.png",
        f"{train}: 3 files not used, no .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp: a/h.heic, a/n.npy, a/x.dcm",
    ]


def test_folders_of_classes(folder):
    save(folder / "train" / "a" / "deep" / "x.JPG")
    save(folder / "train" / "a" / ".hidden.png")
    save(folder / "train" / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "train" / "a" / "notes.txt").write_text("no image")
    parts, classes = find_images(folder)
    assert classes == ("a", "b")
    assert set(parts) == {"train", "val"}
    assert parts["train"].names == ("a/0.png", "a/1.png", "a/deep/x.JPG", "b/0.png", "b/1.png", "b/2.png")
    assert parts["train"].labels == (0, 0, 0, 1, 1, 1)
    assert [path.name for path in image_files(folder / "val")] == ["0.png", "0.png"]


def test_folders_that_do_not_fit(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a folder with train/CLASS and val/CLASS, or a MedMNIST \.npz, found neither"
    ):
        find_images(tmp_path / "none")
    (folder / "val").rename(folder / "valid")
    with pytest.raises(ValueError, match="got no folder val, but train, valid"):
        find_images(folder)
    (folder / "valid").rename(folder / "val")
    save(folder / "val" / "c" / "0.png")
    with pytest.raises(ValueError, match=r"val.c: expected one of the classes a, b"):
        find_images(folder)
    with pytest.raises(ValueError, match="expected images in folders of the classes c, found none"):
        find_classes(folder / "train" / "a", ["c"])
    (tmp_path / "one" / "train" / "a").mkdir(parents=True)
    (tmp_path / "one" / "val").mkdir()
    with pytest.raises(ValueError, match="two classes or more"):
        find_images(tmp_path / "one")


def test_a_medmnist_file(tmp_path):
    parts, classes = find_images(an_npz(tmp_path / "x.npz"))
    assert classes == ("0", "1", "2")
    assert set(parts) == {"train", "val", "test"}
    assert parts["val"].labels == (0, 1, 2, 0, 1, 2)
    assert parts["val"].names[1] == "val_1"
    images, wrong = decode(parts["train"], 8)
    assert not wrong
    assert torch.equal(images.images[0], torch.arange(64, dtype=torch.uint8).view(1, 8, 8))
    colours = np.zeros((6, 8, 8, 3), np.uint8)
    parts, _ = find_images(an_npz(tmp_path / "c.npz", train_images=colours, test_images=None, test_labels=None))
    assert set(parts) == {"train", "val"}
    assert decode(parts["train"], 4)[0].images[0].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": np.zeros((6, 14), np.uint8)}, "expected one label per image, got 14 .multi-label."),
        ({"train_images": np.zeros((6, 8, 8, 8), np.uint8)}, "train_images: expected uint8 .* volumes are not"),
        ({"train_images": np.zeros((6, 8, 8), np.float32)}, "train_images: expected uint8"),
        (
            {"train_labels": np.zeros((5, 1), np.uint8)},
            "train_labels: expected one integer from 0 for each of 6 images, got uint8",
        ),
        ({"val_images": None}, "expected 'val_images', got"),
        ({"val_labels": np.full((6, 1), 4, np.uint8)}, "none has the label 3, 4"),
        ({f"{part}_labels": np.zeros((6, 1), np.uint8) for part in ("train", "val", "test")}, "all labels are 0"),
    ],
)
def test_medmnist_files_of_another_kind(tmp_path, changed, message):
    with pytest.raises(ValueError, match=rf"x\.npz.*{message}"):
        find_images(an_npz(tmp_path / "x.npz", **changed))


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"x\.npz: unreadable as a MedMNIST file"):
        find_images(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match=r"y\.npz"):
        find_images(tmp_path / "y.npz")


# Decoding


def write_deep_png(path):
    """Colours of 16 bits, which Pillow does not write."""
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(4 * (1 + 4 * 3 * 2))), b"IEND": b""}
    parts = [struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in chunks.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_modes_of_image_files(tmp_path):
    save(tmp_path / "grey.png")
    save(tmp_path / "grey_alpha.png", mode="LA", value=(100, 0))
    save(tmp_path / "colour.png", mode="RGB", value=(1, 2, 3))
    save(tmp_path / "alpha.png", mode="RGBA", value=(1, 2, 3, 0))
    save(tmp_path / "deep.png", mode="I;16", value=30000)
    write_deep_png(tmp_path / "deep_colour.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "grey.png").read_bytes()[:45])
    (tmp_path / "text.png").write_text("no image")
    files = image_files(tmp_path)
    images, wrong = decode(FoundImages(tuple(f.name for f in files), tuple(range(len(files))), files), 20)
    found = dict(zip(images.names, images.images, strict=True))
    assert {name: tuple(image[:, 0, 0].tolist()) for name, image in found.items()} == {
        "alpha.png": (1, 2, 3),
        "colour.png": (1, 2, 3),
        "grey.png": (100,),
        "grey_alpha.png": (100,),
    }
    assert all(image.shape[1:] == (20, 30) for image in found.values())
    assert images.labels == tuple(i for i, f in enumerate(files) if f.name in found)
    assert set(wrong) == {"deep.png", "deep_colour.png", "broken.png", "text.png"}
    assert "expected 8 bits" in wrong["deep.png"]
    assert "expected 8 bits per channel, got pixels of mode RGB with 16 bits" in wrong["deep_colour.png"]
    assert wrong["text.png"] == f"{tmp_path / 'text.png'}: no image, or of an unknown format"


PICTURE = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
"""Two rows of three pixels."""
UPRIGHT = {
    1: PICTURE,
    2: PICTURE[:, ::-1],
    3: PICTURE[::-1, ::-1],
    4: PICTURE[::-1],
    5: PICTURE.T,
    6: np.rot90(PICTURE, -1),
    7: PICTURE[::-1, ::-1].T,
    8: np.rot90(PICTURE),
}
"""The picture as each EXIF orientation says to show it (EXIF 2.3, tag 274), computed without Pillow."""


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "packed.tiff", "a.webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_their_metadata_say(tmp_path, name, orientation):
    large = np.kron(PICTURE, np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    if name != "packed.tiff" or orientation in UPRIGHT:  # libtiff writes no others
        exif[274] = orientation  # 0 and 9 mean nothing
    lossless = {"a.webp": {"lossless": True}, "packed.tiff": {"compression": "tiff_lzw"}}.get(name, {})
    Image.fromarray(large).save(tmp_path / name, exif=exif.tobytes(), **lossless)
    image = read_image(tmp_path / name)
    expected = np.kron(UPRIGHT.get(orientation, PICTURE), np.ones((16, 16), np.uint8)).astype(int)
    assert image.shape[1:] == expected.shape
    assert np.abs(image[0].numpy() - expected).max() < 30


def test_a_damaged_orientation_says_nothing(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(read_image(tmp_path / "a.png")[0], PICTURE)


def test_palettes_inks_and_pages(tmp_path):
    """What Pillow converts keeps its values; what is no single picture of 8 bits is refused."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "clear.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "clear.png")[:, 0].T.tolist() == [[9, 8, 7], [200, 100, 50]]
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "inks.jpg", quality=100)
    assert read_image(tmp_path / "inks.jpg")[:, 8, 8].tolist() == pytest.approx([0, 255, 255], abs=3)
    grey = Image.fromarray(PICTURE)
    refused = {"pages.tif": "2 pages", "float.tif": "mode F", "deep.tif": "mode I;16", "wide.tif": "mode I"}
    grey.save(tmp_path / "pages.tif", save_all=True, append_images=[grey])
    grey.convert("F").save(tmp_path / "float.tif")
    Image.fromarray(PICTURE.astype(np.uint16) * 200).save(tmp_path / "deep.tif")
    grey.convert("I").save(tmp_path / "wide.tif")
    for name in ("moving.webp", "moving.png"):
        colour = grey.convert("RGB")
        colour.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", grey.size, 9)])
        refused[name] = "2 pages or frames"
    for name, why in refused.items():
        with pytest.raises(ValueError, match=why):
            read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
def test_images_that_are_cut_short_are_named(tmp_path, name):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 1, 5, 20, len(whole) // 2, len(whole) - 30):
        (tmp_path / name).write_bytes(whole[:size])
        images, wrong = decode(FoundImages(("a",), (0,), [tmp_path / name]), 8)
        assert len(images) == 0
        assert wrong["a"].startswith(f"{tmp_path / name}: ")


def test_the_shorter_side_is_as_asked(tmp_path):
    files = [save(tmp_path / name, shape) for name, shape in (("wide.png", (20, 50)), ("high.png", (60, 20)))]
    files.append(save(tmp_path / "small.png", (8, 9)))
    images, _ = decode(FoundImages(("wide", "high", "small"), (0, 1, 0), files), 10)
    assert [tuple(image.shape) for image in images.images] == [(1, 10, 25), (1, 30, 10), (1, 8, 9)]


# Batches


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (12, 16 + i), dtype=np.uint8) for i in range(5)]
    return decode(FoundImages(tuple("abcde"), (0, 1, 0, 1, 1), arrays), 12)[0]


def test_a_batch_is_a_function_of_seed_and_step(images):
    augmentation = Augmentation((0.5, 1.0), 0.5, 20.0, 0.3)
    batches = ImageBatches(images, Shard(4), 8, augmentation, Normalisation(3, (0.5,), (0.25,)), seed=0)
    first, again = batches[2], batches[2]
    assert torch.equal(first["image"], again["image"])
    assert first["image"].shape == (4, 3, 8, 8)
    assert first["image"].dtype == torch.float32
    assert [images.labels[images.names.index(name)] for name in first["cases"]] == first["label"].tolist()
    assert first["label"].dtype == torch.int64
    assert not torch.equal(first["image"], batches[3]["image"])
    assert not torch.equal(first["image"], replace(batches, seed=1)[2]["image"])
    halves = [replace(batches, shard=Shard(4, rank, 2))[2]["image"] for rank in range(2)]
    assert torch.equal(torch.cat(halves), first["image"])


def test_every_pass_takes_each_image_once(images):
    batches = ImageBatches(images, Shard(1), 8, NO_CHANGE, AS_IT_IS, seed=0)
    passes = [[batches[5 * number + i]["cases"][0] for i in range(5)] for number in range(2)]
    assert [sorted(names) for names in passes] == [list("abcde")] * 2
    assert passes[0] != passes[1]


def test_changes_can_be_switched_off_and_do_what_they_say():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 3
    rng = np.random.default_rng
    same = training_crop(image, 8, NO_CHANGE, rng(0))
    # Of a square, the only part of the whole area is the whole.
    torch.testing.assert_close(same, image.float() / 255)
    flipped = training_crop(image, 8, NO_CHANGE._replace(flip_prob=1.0), rng(0))
    assert torch.equal(flipped, same.flip(2))
    turned = training_crop(torch.full((1, 9, 9), 255, dtype=torch.uint8), 9, NO_CHANGE._replace(degrees=45.0), rng(1))
    assert turned[0, 4, 4] == 1
    assert turned.min() < 0.5  # corners come from beyond the image: black
    other = training_crop(image, 8, NO_CHANGE._replace(jitter=0.5), rng(0))
    assert 0 <= other.min() < other.max() <= 1
    assert not torch.allclose(other, same)
    assert np.corrcoef(other.flatten(), same.flatten())[0, 1] > 0.95


def test_parts_lie_in_the_image_and_have_the_area_asked_for():
    rng = np.random.default_rng(0)
    for shape in ((40, 60), (60, 40), (50, 50), (30, 200)):
        boxes = np.array([random_box(shape, (0.3, 0.9), rng) for _ in range(300)])
        top, left, height, width = boxes.T
        assert top.min() >= 0
        assert left.min() >= 0
        assert (top + height).max() <= shape[0]
        assert (left + width).max() <= shape[1]
        share = height * width / np.prod(shape)
        assert 0.27 < share.min() < 0.35
        assert 0.85 < share.max() < 0.93


def test_channels_and_scaling():
    grey = torch.tensor([[[0.0, 1.0]]])
    out = normalise(grey, Normalisation(3, (0.5, 0.0, 1.0), (0.5,)))
    assert out.tolist() == [[[-1.0, 1.0]], [[0.0, 2.0]], [[-2.0, 0.0]]]
    colour = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert normalise(colour, AS_IT_IS).shape == (1, 1, 1)
    assert normalise(colour, AS_IT_IS).item() == pytest.approx(0.2989, abs=1e-3)


def test_outside_of_training_it_is_the_middle_of_the_image():
    assert (short_side(224), short_side(7)) == (256, 8)
    image = torch.zeros(1, 8, 12, dtype=torch.uint8)
    image[:, :7, 2:9] = 255
    assert centre_crop(image, 7, AS_IT_IS).mean() == pytest.approx(1)
    image[:] = 0
    image[:, :, 2:10] = 255
    small = centre_crop(image[:, ::2, ::2], 14, AS_IT_IS)
    assert small.shape == (1, 14, 14)
    assert small.mean() == pytest.approx(1, abs=0.05)
