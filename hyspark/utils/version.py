"""The version of this package, which `hyspark --version`, `hyspark.__version__` and the wheel take from here."""

VERSION = "0.2.0"
