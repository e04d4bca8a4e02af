"""What is said of a package of an extra that cannot be imported."""

import sys
from functools import partial

import pytest

from hyspark.data.readers.other_formats import require_simpleitk
from hyspark.evaluation.embedding.report import import_umap
from hyspark.evaluation.embedding.vectors import import_pyarrow
from hyspark.evaluation.segmentation.deployed import import_for_onnx
from hyspark.utils.install import install_command

PACKAGES = {
    "umap": (import_umap, "umap"),
    "pyarrow": (import_pyarrow, "parquet"),
    "onnxruntime": (partial(import_for_onnx, "onnxruntime"), "onnx"),
    "SimpleITK": (require_simpleitk, "formats"),
}


@pytest.fixture(params=PACKAGES)
def package(request, tmp_path, monkeypatch):
    """A package that lies first in the path; what imports it, and its extra."""
    for name in [name for name in sys.modules if name.partition(".")[0] == request.param]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / request.param).mkdir()
    return tmp_path / request.param / "__init__.py", *PACKAGES[request.param]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise ImportError('libtbb.so.12: cannot open shared object file')", "libtbb.so.12: cannot open shared"),
        ("import a_missing_dependency", "No module named 'a_missing_dependency'"),
    ],
)
def test_a_package_that_is_installed_and_fails_names_the_cause(package, code, cause):
    file, load, extra = package
    file.write_text(code)
    with pytest.raises(ImportError, match=f"which is installed and fails to import: {cause}") as raised:
        load()
    assert not isinstance(raised.value, ModuleNotFoundError)
    assert str(raised.value).endswith(f"anew: {install_command(extra)}")
