"""Completion of verbs and flags in shells: `hyspark --completion bash` prints a script for the shell."""

from argparse import ArgumentParser
from collections.abc import Sequence

from hyspark.cli import arguments
from hyspark.cli.main import SHELLS, VERBS
from hyspark.cli.parsing import Arguments, config_parser
from hyspark.config.recipes import SETTINGS_OF
from hyspark.utils.install import extra_error


def print_completion(argv: Sequence[str]) -> None:
    """Print the completion script of a shell.

    Raises:
        ValueError: The shell is unknown.
        ModuleNotFoundError: shtab is not installed.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ValueError(f"--completion: expected one of {', '.join(SHELLS)}, got {' '.join(argv) or 'nothing'}")
    try:
        import shtab
    except ImportError as error:
        raise extra_error(error, "--completion needs shtab", "completion", "shtab") from error
    print(shtab.complete(all_verbs(), argv[0]))


def all_verbs() -> ArgumentParser:
    """Make one parser with all verbs, for tools that read parsers."""
    top = ArgumentParser(prog="hyspark")
    verbs = top.add_subparsers(dest="verb")
    for verb, text in VERBS.items():
        parser = verbs.add_parser(verb, help=text, add_help=False)
        for action in verb_parser(verb)._actions:
            parser._add_action(action)
    return top


def verb_parser(verb: str) -> Arguments:
    """Make the parser of a verb."""
    prog = f"hyspark {verb}"
    if verb in SETTINGS_OF:
        return config_parser(SETTINGS_OF[verb], prog)
    made: Arguments = getattr(arguments, f"{verb.capitalize()}Arguments")(prog=prog, allow_abbrev=False)
    return made
