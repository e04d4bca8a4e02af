"""The version of the package, which pyproject.toml and CITATION.cff share."""

__version__ = "0.2.0"
