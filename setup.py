"""The build of a wheel takes the recipes of configs/ into the package, where `--config NAME` finds them."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ELSEWHERE = r"(?!https?:|mailto:|#)"
PICTURE = re.compile(rf'!\[[^\]]*\]\({ELSEWHERE}[^)]*\)|<img\b[^>]*\bsrc="{ELSEWHERE}[^>]*>')
CAPTION = re.compile(rf"^!\[[^\]]*\]\({ELSEWHERE}[^)]*\)\n\n\*[^*\n](?:[^*]|\n)*?\*\n\n", flags=re.MULTILINE)
LINK = re.compile(rf"\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\({ELSEWHERE}[^)]*\)")
BLOCK = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)


class BuildWithRecipes(build_py):
    """Copy the modules, and configs/*.yaml to hyspark/recipes, into a folder without modules of earlier builds."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "hyspark", "recipes")
            folder.mkdir(parents=True, exist_ok=True)
            for recipe in sorted((ROOT / "configs").glob("*.yaml")):
                self.copy_file(str(recipe), str(folder / recipe.name))


def describe_package(readme: str) -> str:
    """Make a README readable without the checkout: pictures and captions are dropped, links become plain text."""
    parts = BLOCK.split(readme)
    texts = (part if BLOCK.match(part) else LINK.sub(r"\1", PICTURE.sub("", CAPTION.sub("", part))) for part in parts)
    return "".join(texts)


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithRecipes},
        long_description=describe_package((ROOT / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
