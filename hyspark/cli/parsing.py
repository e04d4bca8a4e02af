"""From words to settings: flags made of the fields of a dataclass, over a YAML recipe."""

from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any

from tap import to_tap_class

from hyspark.config.recipes import ConfigT, field_help, read_yaml
from hyspark.utils.text import nearest


def options(parser: Any) -> list[str]:
    """The flags that a parser knows."""
    return [option for action in parser._actions for option in action.option_strings]


def parse(parser: Any, argv: Sequence[str], also: Sequence[str] = ()) -> Any:
    """Parsed flags; raises ValueError, naming the nearest flag, for an unknown one.

    also: flags of the command that were parsed before.
    """
    args = parser.parse_args(list(argv), known_only=True)
    if args.extra_args:
        flag = args.extra_args[0].split("=")[0]
        raise ValueError(f"unknown argument {flag!r}{nearest(flag, [*also, *options(parser)])}; --help lists all")
    return args


def read_config(config_class: type[ConfigT], prog: str, argv: Sequence[str], also: Sequence[str] = ()) -> ConfigT:
    """Settings from defaults, then the YAML that --config names, then flags. Every field is a flag.

    also: of `parse`.
    Raises ValueError for an unknown key or flag and for values that do not fit.
    """
    base: Any = to_tap_class(config_class)
    help_texts = field_help(config_class)

    class Flags(base):
        def configure(self) -> None:
            self.add_argument("--config", type=str, default="", help="YAML recipe (see configs/); flags override it")
            for field in fields(config_class):
                assert field.default is not MISSING
                extra = {"action": BooleanOptionalAction} if isinstance(field.default, bool) else {}
                text = help_texts[field.name].replace("%", "%%") + " (default: %(default)s)"
                self.add_argument(f"--{field.name}", default=field.default, help=text, **extra)

    parser = Flags(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    path = recipe_path(argv)
    if path:
        parser.set_defaults(**read_yaml(path, config_class))
    args = parse(parser, argv, also)
    return config_class(**{f.name: getattr(args, f.name) for f in fields(config_class)})


def recipe_path(argv: Sequence[str]) -> str:
    """The value of --config (the last one, as for every flag), or nothing."""
    path = ""
    for word, following in pairwise([*argv, ""]):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config":
            path = following
    return path
