"""How this package was installed, for advice that can be typed."""

import re
import shlex
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parents[1]


def find_checkout() -> Path | None:
    """Return the checkout that this package lies in; None if it was installed from a wheel."""
    folder = PACKAGE.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "configs").is_dir() else None


def install_command(extra: str = "") -> str:
    """Write the command that installs what this package needs, or an extra of it."""
    folder, brackets = find_checkout(), f"[{extra}]" * bool(extra)
    if folder is None:
        return f"pip install {shlex.quote(f'hyspark{brackets}')}"
    where = "." if folder == Path.cwd() else folder
    return f"pip install -e {shlex.quote(f'{where}{brackets}')}"


def extra_error(error: ImportError, need: str, extra: str, *modules: str) -> ImportError:
    """Make the error for a package of an extra that cannot be imported.

    Args:
        error: What its import raised.
        need: What needs which package, "--parquet needs pyarrow".
        extra: The extra that brings it.
        modules: Names of its modules, without those below them.

    Returns:
        A ModuleNotFoundError with the command to install it; for a package that is installed and fails, an ImportError
        with the cause.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in modules:
        return ModuleNotFoundError(f"{need}: {install_command(extra)} ({error})")
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    return ImportError(
        f"{need}, which is installed and fails to import: {cause}; repair what that names, or remove it and install it "
        f"anew: {install_command(extra)}"
    )


def require_version(module: ModuleType, least: str, fault: str) -> None:
    """Raise ImportError if a package is older than the first release without a fault.

    Args:
        module: The package, imported.
        least: The first release without it, two numbers.
        fault: What earlier ones do, a verb and its object.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])
    if found < tuple(int(part) for part in least.split(".")):
        name = module.__name__
        raise ImportError(
            f"{name}: expected version {least} or later, found {module.__version__}, which {fault}; "
            f'install it with: pip install "{name}>={least}"'
        )
