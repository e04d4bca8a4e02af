"""A folder for the salt of pseudonyms, so that no test writes into the home folder."""

import pytest


@pytest.fixture(autouse=True)
def _own_salt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
