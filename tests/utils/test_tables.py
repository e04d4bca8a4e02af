"""CSV files of users: what is read of them, and what would be read wrongly."""

import pytest

from hyspark.utils.tables import read_csv


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_values_are_read_by_name_and_line(tmp_path, encoding):
    """As programs write them: spaces, blank lines, lines of commas, quotes, short rows, a column without a name."""
    text = 'case, Größe ,patient,\r\n a ,"1,5", p \r\n\r\n,,,\r\nb\r\n'
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    columns, rows = read_csv(tmp_path / "x.csv", ("case", "patient"))
    assert columns == ["case", "Größe", "patient", ""]
    assert rows == {
        2: {"case": "a", "Größe": "1,5", "patient": "p", "": ""},
        5: {"case": "b", "Größe": "", "patient": "", "": ""},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,size\na,8\nb,8,79\n", ", line 3: expected 2 values, got 3; put values with a comma in quotes"),
        ("case,Patient\na,p\n", ": expected the column patient, got Patient; rename it"),
        ("case,y,y\na,1,2\n", ": two columns are named y; rename one"),
        ("case,y\na,groß\n".encode("latin-1"), ": expected a CSV file in UTF-8, got another"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"x\.csv{message}"):
        read_csv(tmp_path / "x.csv", ("case", "patient"))
