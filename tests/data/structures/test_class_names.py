"""Synonyms of classes: equal names before patterns, whatever their letter case and separators."""

import pytest

from hyspark.data.structures.class_names import class_names_found, read_class_names

TEXT = """
spleen: [Milz, "SPLEEN_*"]
left kidney: {value: 7, names: ["*kidney*left*", "Niere links"]}
kidney: "*kidney*"
GTV[1]:
"""


def test_names_have_their_class(tmp_path):
    (tmp_path / "names.yaml").write_text(TEXT)
    classes = read_class_names(tmp_path / "names.yaml")
    assert classes.values == {"spleen": 1, "left kidney": 7, "kidney": 3, "GTV[1]": 4}
    expected = {
        **{"SPLEEN": "spleen", "milz ": "spleen", "Spleen-new_2": "spleen", "spleen2": "", "Bowel": "", "": ""},
        **{"KIDNEY left": "left kidney", "Niere_links": "left kidney", "right Kidney": "kidney", "gtv[1]": "GTV[1]"},
    }
    assert {name: classes.class_of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- spleen", "expected {class: "),
        ("", "expected {class: "),
        ("a: [", "not valid YAML"),
        ("a: {value: 0}", "expected a value from 1 to 254, got 0"),
        ("a: {value: x}", "expected a value from 1 to 254, got 'x'"),
        ("a: {value: 1}\nb: {value: 1}", "expected one value for each class"),
        ("a: {b: c}", "a: expected {class: "),
        ("background: x", "background: expected {class: "),
    ],
)
def test_other_files_are_named(tmp_path, text, why):
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^--label_names .*names\.yaml: ") as caught:
        read_class_names(path)
    assert why in str(caught.value)


def test_each_name_found_is_a_class():
    assert class_names_found(["liver", "Liver", "left_kidney", "Left kidney", " "]).values == {
        "Left kidney": 1,
        "Liver": 2,
        "unnamed": 3,
    }
    with pytest.raises(ValueError, match="--labels: 300 names of structures, above 254 classes"):
        class_names_found(map(str, range(300)))
