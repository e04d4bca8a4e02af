"""The build of a wheel takes the recipes of configs/ into the package, where `--config NAME` finds them."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithRecipes(build_py):
    """Copy the modules, and configs/*.yaml to hyspark/recipes."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "hyspark", "recipes")
            folder.mkdir(parents=True, exist_ok=True)
            for recipe in sorted((ROOT / "configs").glob("*.yaml")):
                self.copy_file(str(recipe), str(folder / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
