import gzip

import pytest

from hyspark.utils.digests import content_digest
from hyspark.utils.paths import load_json

CONTENT = bytes(range(256)) * 9000  # more than is read at a time


def test_compression_changes_no_digest(tmp_path):
    files = {
        "a.nii": CONTENT,
        "b.nii.gz": gzip.compress(CONTENT, 1),
        "c.nii.gz": gzip.compress(CONTENT, 9),
        "d.png": CONTENT,
    }
    for name, held in files.items():
        (tmp_path / name).write_bytes(held)
    assert len({content_digest(tmp_path / name) for name in files}) == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda held: gzip.compress(held) + gzip.compress(b"")])
@pytest.mark.parametrize("place", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_any_byte_changes_the_digest(tmp_path, pack, place):
    """Of blocks that end in an empty one, too, as bgzip writes them."""
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    path = tmp_path / ("x.tif" if pack is bytes else "x.nii.gz")
    found = set()
    for held in (CONTENT, bytes(changed), CONTENT[:-1]):
        path.write_bytes(pack(held))
        found.add(content_digest(path))
    assert len(found) == 3


@pytest.mark.parametrize("name", ["empty.nii", "empty.nii.gz"])
def test_files_that_hold_next_to_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert content_digest(tmp_path / name) == "0" * 16


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"c": 1, "a": 2, "a": 3}}]'])
def test_a_key_that_is_set_twice_is_an_error_of_its_file(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match='the key "a" is set twice') as error:
        load_json(file)
    assert str(error.value).startswith(f"{file}: ")
