"""From words to settings: flags made of the fields of a dataclass, over a YAML recipe."""

import math
import re
from argparse import SUPPRESS, Action, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import cleandoc
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tap import Tap, to_tap_class

from hyspark.config.nnunet import plan_defaults
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import Config, ConfigT, axis_values, field_help, old_spellings, read_yaml
from hyspark.utils.settings import GROUPS, FieldInfo, field_info
from hyspark.utils.text import nearest

METAVARS = {int: "N", float: "X", str: "TEXT"}
"""Placeholders of values in the help, by their type."""
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)
"""Words that are values, not flags; argparse itself does not know exponents."""
EMPTY_BY_DEFAULT = {f.name for config in get_args(Config) for f in fields(config) if f.default == ""}
MAY_BE_EMPTY = EMPTY_BY_DEFAULT - {"out"} | {"weights"}
"""Settings that a flag may set to an empty text over a recipe, since that is their default, or was."""
EARLIER_SETTINGS = {old: new for config_class in get_args(Config) for old, new in old_spellings(config_class).items()}
"""Earlier spellings of the settings of all kinds of training, each with the present one."""


class Arguments(Tap):
    """Flags of a verb. The help has an example on top and, for many flags, groups."""

    def old_spellings(self) -> dict[str, str]:
        """Return the earlier spellings of flags, each with the present one, without dashes."""
        return {}

    def _add_argument(self, *flags: str, **known: Any) -> None:
        """Add a flag; its help is the comment behind the class variable, with the default."""
        name = flags[0].lstrip("-")
        if name in self.class_variables:
            hint = self._annotations[name]
            default = getattr(self, name, "")
            text = f"{self.class_variables[name]['comment']}{'' if default is None else default_text(default)}"
            known.setdefault("help", text.replace("%", "%%"))
            if (
                flags[0].startswith("-")
                and get_origin(hint) is not Literal
                and hint is not bool
                and "choices" not in known
            ):
                known.setdefault("metavar", metavar_of(hint))
        super()._add_argument(*flags, **known)
        kind: Any = self._actions[-1].type
        if kind and not hasattr(kind, "__name__"):  # of tuples; argparse names it in messages
            kind.__name__ = {"N": "whole number", "X": "number"}.get(str(self._actions[-1].metavar), "value")

    def sections(self) -> dict[str, list[Action]]:
        """Return the flags by section of the help."""
        shown = [action for action in self._actions if action.help != SUPPRESS]
        return {
            "arguments": [action for action in shown if not action.option_strings],
            "flags": sorted((action for action in shown if action.option_strings), key=lambda one: not one.required),
        }

    def format_help(self) -> str:
        """Write the usage, the description with its example, and the sections."""
        text, _, example = cleandoc(self.description or "").partition("\nExample:\n")
        sections = {title: actions for title, actions in self.sections().items() if actions}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(text)
        help_text = formatter.format_help()
        if example:
            help_text += f"\nexample:\n{example.rstrip()}\n"
        for title, actions in sections.items():
            formatter = self._get_formatter()
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
            help_text += f"\n{formatter.format_help()}"
        return help_text


def options(parser: Any) -> list[str]:
    """List the flags that a parser knows."""
    return [option for action in parser._actions for option in action.option_strings]


def parse(parser: Any, argv: Sequence[str], also: Sequence[str] = ()) -> Any:
    """Parse the words of a verb.

    Args:
        parser: Parser of the verb.
        argv: Words behind the verb.
        also: Further flags of the verb, parsed before.

    Raises:
        ValueError: There is an unknown flag; the message names the nearest one.
    """
    old = parser.old_spellings()
    parser._negative_number_matcher = NEGATIVE_NUMBER
    args = parser.parse_args(present_words(argv, old), known_only=True)
    check_values(parser, args)
    if args.extra_args:
        flag = args.extra_args[0].split("=")[0]
        known = {*also, *options(parser)}
        renamed = {f"--{before}": f"--{present}" for before, present in (EARLIER_SETTINGS | old).items()}
        suggestion = nearest(flag, known, {b: p for b, p in renamed.items() if p in known})
        raise ValueError(f"unknown argument {flag!r}{suggestion}; --help lists all")
    return args


def check_values(parser: Any, args: Any) -> None:
    """Check what holds for the values of all flags.

    Raises:
        ValueError: A number is not finite, or a text is empty although it is not so by default.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        name = action.option_strings[0] if action.option_strings else action.dest
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
            if value == "" and action.default != "" and action.dest not in MAY_BE_EMPTY:
                raise ValueError(
                    f"{name}: expected {action.metavar or 'TEXT'}, got an empty text; is a variable unset?"
                )


def present_words(argv: Sequence[str], old: Mapping[str, str]) -> list[str]:
    """Replace earlier spellings of flags by the present ones.

    Raises:
        ValueError: A flag is given in two spellings.
    """
    words = []
    spelled: dict[str, str] = {}
    for word in argv:
        if "\0" in word:
            raise ValueError(f"{word!r}: expected a word without NUL characters")
        flag, equals, value = word.partition("=")
        present = f"--{old.get(flag[2:], flag[2:])}" if flag.startswith("--") else flag
        if present.startswith("--") and spelled.setdefault(present, flag) != flag:
            raise ValueError(f"{spelled[present]} and {flag} are one setting; use {present} alone")
        words.append(f"{present}{equals}{value}" if present != flag else word)
    return words


def given_flags(parser: Any, argv: Sequence[str]) -> set[str]:
    """Return the names of the flags that are given, at their defaults too."""
    typed = {word.partition("=")[0] for word in present_words(argv, parser.old_spellings()) if word.startswith("--")}
    return {action.dest for action in parser._actions if typed & set(action.option_strings)}


def config_parser(config_class: type, prog: str) -> Arguments:
    """Make the parser of a verb whose flags are the fields of its settings."""
    base: Any = to_tap_class(config_class)
    infos: dict[str, FieldInfo] = field_info(config_class)

    class Flags(Arguments, base):
        def configure(self) -> None:
            text = "YAML recipe, a file or a name such as openkbp; an unknown name lists all; flags override it."
            self.add_argument("--config", type=str, default="", help=text, metavar="YAML")
            add_settings(self, config_class)

        def old_spellings(self) -> dict[str, str]:
            return old_spellings(config_class)

        def sections(self) -> dict[str, list[Action]]:
            by_name = {action.dest: action for action in self._actions}
            first = ["config", *(name for name, info in infos.items() if info.first)]
            sections = {"flags that matter first": [by_name[name] for name in first]}
            for group in GROUPS:
                sections[group] = [by_name[n] for n, info in infos.items() if info.group == group and n not in first]
            return sections

    usage = f"{prog} [--config YAML] [--FLAG VALUE ...]"
    return Flags(prog=prog, usage=usage, description=config_class.__doc__, allow_abbrev=False)


def read_config(config_class: type[ConfigT], prog: str, argv: Sequence[str], also: Sequence[str] = ()) -> ConfigT:
    """Read settings: defaults, over them nnU-Net's plan, the YAML that --config names, and the flags.

    Args:
        config_class: Class of the settings; every field is a flag.
        prog: Program and verb, for the help.
        argv: Words behind the verb.
        also: Further flags of the verb, parsed before.

    Raises:
        ValueError: There is an unknown key or flag, or a value that does not fit.
        FileNotFoundError: There is no such recipe, or no such plan.
    """
    parser = config_parser(config_class, prog)
    recipe: dict[str, Any] = {}
    if (path := recipe_path(argv)) is not None:
        recipe = read_yaml(path, config_class)
        parser.set_defaults(**recipe)
    words = gathered_axes(argv, config_class, recipe)
    args = parse(parser, words, also)
    values = {f.name: getattr(args, f.name) for f in fields(config_class)}
    if config_class is PretrainConfig:
        values |= plan_defaults(values, given_flags(parser, words) | recipe.keys())
    return config_class(**values)


def add_settings(parser: Arguments, config_class: Any) -> None:
    """Make each field of a dataclass of settings a flag."""
    help_texts, hints = field_help(config_class), get_type_hints(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        extra: dict[str, Any] = {} if get_origin(hint) is Literal else {"metavar": metavar_of(hint)}
        if isinstance(field.default, bool):
            extra = {"action": BooleanOptionalAction}
        parser._annotations[field.name] = hint  # from which typed-argument-parser takes the type
        text = f"{help_texts[field.name]}{default_text(field.default)}".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **extra)


def metavar_of(hint: Any) -> str | None:
    """Return the placeholder of values of a type, or of its first argument as in tuple[int, ...]."""
    return METAVARS.get(next((inner for inner in get_args(hint) if inner in METAVARS), hint))


def default_text(value: Any) -> str:
    """Write a default value at the end of a help text; nothing for an empty one."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is False else str(value)
    return f" (default: {text})" if text else ""


def gathered_axes(argv: Sequence[str], config_class: type, recipe: Mapping[str, Any]) -> list[str]:
    """Replace earlier flags of one axis each, such as --roi_x, by the flag of all axes.

    Args:
        argv: Words behind the verb.
        config_class: Class of the settings.
        recipe: Settings that the flags override.

    Raises:
        ValueError: Both spellings are given.
    """
    words = list(argv)
    for name, info in field_info(config_class).items():
        edges = axis_values(recipe.get(name, getattr(config_class, name)), info.old_axes) if info.old_axes else []
        given, kept, rest = [], [], iter(words)
        for word in rest:
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and flag[2:] in info.old_axes:
                given.append(flag)
                value = value if equals else next(rest, "")
                if not value.isdigit():
                    raise ValueError(f"{flag}: expected a number of voxels, got {value!r}")
                edges[info.old_axes.index(flag[2:])] = value
            else:
                kept.append(word)
        if given and any(word.split("=")[0] == f"--{name}" for word in words):
            raise ValueError(f"{', '.join(given)} and --{name} are one setting; use --{name} alone")
        words = [*kept, f"--{name}", *map(str, edges)] if given else words
    return words


def recipe_path(argv: Sequence[str]) -> str | None:
    """Find the value of --config, the last one as for every flag; None if it is not given."""
    path = None
    for word, following in pairwise([*argv, ""]):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config":
            path = following
    return path
