"""How this package was installed, for advice that can be typed."""

import shlex
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def find_checkout() -> Path | None:
    """Return the checkout that this package lies in; None if it was installed from a wheel."""
    folder = PACKAGE.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "configs").is_dir() else None


def install_command(extra: str) -> str:
    """Write the command that installs what an extra of this package needs."""
    folder = find_checkout()
    if folder is None:
        return f"pip install 'hyspark[{extra}]'"
    where = "." if folder == Path.cwd() else folder
    return f"pip install -e {shlex.quote(f'{where}[{extra}]')}"
