"""`make demo`, with the environment the tests run in."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_ends_with_a_table_of_organs_it_has_learnt(tmp_path):
    variables = [
        f"BIN={Path(sys.executable).parent}",
        "INSTALLED=pyproject.toml",
        f"DEMO={tmp_path}/data",
        f"RUNS={tmp_path}",
    ]
    done = subprocess.run(
        ["make", "demo", *variables],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lungs = re.search(r"right_lung +([\d.]+) +([\d.]+)", done.stdout)
    assert lungs, done.stdout[-3000:]
    assert min(float(v) for v in lungs.groups()) > 0.5
    assert (tmp_path / "demo" / "report.html").is_file()
