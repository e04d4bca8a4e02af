"""Generate the reference of the site from the code: a hook of MkDocs, named in mkdocs.yml.

The pages of verbs, settings and recipes are written when the site is built, from what `--help` prints. The changelog
and the guide for contributors are shown from the root of the repository. The table of formats is the changelog's.
"""

import re
from argparse import Action
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from hyspark.cli.completion import verb_parser
from hyspark.cli.main import SHELLS, VERB_GROUPS, VERBS
from hyspark.config.recipes import SETTINGS_OF, field_help
from hyspark.config.yaml_files import recipe_files
from hyspark.utils.settings import GROUPS, FieldInfo, field_info

ROOT = Path(__file__).parents[1]
GROUP_TITLES = {
    "data": "Data",
    "network": "Network",
    "optimisation": "Optimisation",
    "run": "Run",
    "machine": "Machine",
}
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the root."""
TYPES = {int: "whole number", float: "number", str: "text"}


class Use(NamedTuple):
    """A setting as one verb has it."""

    hint: Any
    default: Any
    text: str
    info: FieldInfo


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site; MkDocs calls this by its name."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace <!-- changelog: TITLE --> by the newest section of this title; MkDocs calls this by its name."""
    return re.sub(r"<!-- changelog: (.+?) -->", lambda found: changelog_section(found[1]), markdown)


def changelog_section(title: str) -> str:
    """Return the text of the newest section of the changelog with a title.

    Raises:
        ValueError: There is none.
    """
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if found := re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, flags=re.DOTALL | re.MULTILINE):
        return found[1].strip()
    raise ValueError(f"CHANGELOG.md: expected a section '### {title}'")


def generated_pages() -> dict[str, str]:
    """Write all generated pages, by their paths below docs/."""
    pages = {"verbs": verbs_page(), "settings": settings_page(), "recipes": recipes_page()}
    shown = {path: links_of_site((ROOT / name).read_text("utf-8")) for path, name in FROM_ROOT.items()}
    return {f"reference/{name}.md": text for name, text in pages.items()} | shown


def links_of_site(text: str) -> str:
    """Point links of a page of the root into the site; those to files that the site lacks become their texts."""

    def rewritten(found: re.Match[str]) -> str:
        title, target = found.groups()
        if target.startswith(("http", "#")):
            return found[0]
        names = {name: path for path, name in FROM_ROOT.items()}
        inside = target.removeprefix("docs/") if target.startswith("docs/") else names.get(target, "")
        path = inside.partition("#")[0]
        return f"[{title}]({inside})" if path in names.values() or (ROOT / "docs" / path).is_file() else title

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", rewritten, text)


def verbs_page() -> str:
    """Write the page of verbs: help, example and flags of each."""
    parts = [
        "# Verbs",
        "`hyspark VERB [flags]`. Each verb prints this with `hyspark VERB --help`. What the verbs end with: "
        "[exit codes](exit_codes.md).",
        "`pip install 'hyspark[completion]'` and `eval \"$(hyspark --completion bash)\"` complete verbs and flags in "
        f"the shell. It may be {' or '.join(SHELLS)}.",
    ]
    rows = ["| group | verb | what it does |", "|---|---|---|"]
    for group, verbs in VERB_GROUPS.items():
        rows += [f"| {group} | [`{verb}`](#{verb}) | {escaped(text)} |" for verb, text in verbs.items()]
    parts.append("\n".join(rows))
    parts += [part for verb in VERBS for part in verb_parts(verb)]
    return "\n\n".join(parts) + "\n"


def verb_parts(verb: str) -> list[str]:
    """Write the section of a verb."""
    trains = verb in SETTINGS_OF
    parser: Any = verb_parser(verb)
    text, _, example = cleandoc(parser.description or "").partition("\nExample:\n")
    parts = [f"## {verb} {{ #{verb} }}", escaped(text.strip())]
    if example:
        parts.append(f"```sh\n{cleandoc(example)}\n```")
    if trains:
        settings = ", ".join(f"[`{name}`](settings.md#{name})" for name in field_info(SETTINGS_OF[verb]))
        parts.append(flag_table(verb, [action for action in parser._actions if action.dest == "config"]))
        parts.append(f"Every setting is a flag, `--NAME VALUE`: {settings}.")
        return parts
    shared = {name for config in SETTINGS_OF.values() for name in field_info(config)}
    own = {field for cls in type(parser).__mro__ for field in vars(cls).get("__annotations__", {})}
    known = [action for actions in parser.sections().values() for action in actions if action.dest != "help"]
    parts.append(flag_table(verb, known, {name: f"settings.md#{name}" for name in shared - own}))
    if earlier := parser.old_spellings():
        pairs = (f"`--{old}` for `--{new}`" for old, new in earlier.items())
        parts.append(f"Earlier spellings, which still work: {', '.join(pairs)}.")
    if verb == "benefit":
        parts.append(
            "All other flags are settings of [`finetune`](#finetune) or [`finetune-classifier`](#finetune-classifier)."
        )
    return parts


def flag_table(verb: str, actions: Iterable[Action], links: Mapping[str, str] | None = None) -> str:
    """Write flags as a table, in which each has an anchor, or a link to the setting that it is."""
    rows = ["| flag | values | meaning |", "|---|---|---|"]
    for action in actions:
        name = max(action.option_strings, key=len, default=action.dest.upper())
        if action.option_strings:
            name = next(flag for flag in action.option_strings if flag.startswith("--"))
        target = (links or {}).get(action.dest)
        anchor = f"[`{name}`]({target})" if target else f"[`{name}`](#{verb}-{action.dest}){{ #{verb}-{action.dest} }}"
        needed = " **(needed)**" if action.required and action.option_strings else ""
        text = escaped((action.help or "").replace("%%", "%"))
        rows.append(f"| {anchor}{needed} | {cell(values_of(action))} | {cell(text)} |")
    return "\n".join(rows)


def values_of(action: Action) -> str:
    """Describe the values that a flag takes."""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices if choice != "")
    several = " ..." if action.nargs in ("+", "*") else ""
    if action.nargs == 0:
        return "no value"
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar.startswith("{"):
        return ", ".join(f"`{choice}`" for choice in metavar.strip("{}").split(","))
    if isinstance(action.nargs, int):
        return " ".join([f"`{metavar or 'TEXT'}`"] * action.nargs)
    return f"`{metavar or 'TEXT'}{several}`"


def settings_page() -> str:
    """Write the page of settings: each once, with what every verb that reads it makes of it."""
    uses = setting_uses()
    parts = [
        "# Settings",
        "One name everywhere: `mask_ratio` is the flag `--mask_ratio`, the key `mask_ratio:` of a "
        "[YAML recipe](recipes.md), and the argument `mask_ratio=` of [`hyspark.pretrain`](python.md). Flags override "
        "a recipe, and a recipe overrides the defaults below.",
        "- **Verbs** that have the setting come first in the line below it.\n"
        "- **Resume**: whether the command may continue a run with another value. Without the word, it may not.\n"
        "- **Earlier spellings**, those of the published command lines among them, still work as flags and keys.",
    ]
    for group in GROUPS:
        parts.append(f"## {GROUP_TITLES[group]}")
        members = {name: by_verb for name, by_verb in uses.items() if first_use(by_verb).info.group == group}
        matters = {name: any(use.info.first for use in by_verb.values()) for name, by_verb in members.items()}
        parts += [setting_entry(name, members[name]) for name in sorted(members, key=lambda name: not matters[name])]
    return "\n\n".join(parts) + "\n"


def setting_uses() -> dict[str, dict[str, Use]]:
    """Collect the settings of all verbs that train: by name, then by verb."""
    found: dict[str, dict[str, Use]] = {}
    for verb, config in SETTINGS_OF.items():
        hints, texts, infos = get_type_hints(config), field_help(config), field_info(config)
        for field in fields(config):
            default = None if field.default is MISSING else field.default
            use = Use(hints[field.name], default, " ".join(texts[field.name].split()), infos[field.name])
            found.setdefault(field.name, {})[verb] = use
    return found


def first_use(by_verb: Mapping[str, Use]) -> Use:
    """Return a setting as the first of its verbs has it, which decides its group."""
    return next(iter(by_verb.values()))


def setting_entry(name: str, by_verb: Mapping[str, Use]) -> str:
    """Write a setting as a section; what differs between verbs stands in a list of them."""
    uses = list(by_verb.values())
    types, defaults = {type_text(use.hint) for use in uses}, {default_of(use.default) for use in uses}
    merged: dict[str, list[str]] = {}
    for verb, use in by_verb.items():
        own = [type_text(use.hint)] * (len(types) > 1) + [default_of(use.default)] * (len(defaults) > 1)
        brackets = f" ({', '.join(own)})" if own else ""
        merged.setdefault(f"{brackets}: {escaped(use.text)}", []).append(verb)
    if len(merged) == 1:
        lines = [next(iter(merged)).removeprefix(": ")]
    else:
        lines = [f"- *{', '.join(verbs)}*{text}" for text, verbs in merged.items()]
    facts = [*types] * (len(types) == 1) + [*defaults] * (len(defaults) == 1)
    if methods := uses[0].info.methods:
        facts.append(f"read by the method{'s' if len(methods) > 1 else ''} {', '.join(methods)}")
    if any(use.info.may_change for use in uses):
        facts.append("resume: may change")
    if not any(use.info.affects_results for use in uses):
        facts.append("changes no result by more than rounding")
    if earlier := dict.fromkeys(old for use in uses for old in (*use.info.old, *use.info.old_axes)):
        facts.append(f"earlier {', '.join(f'`{old}`' for old in earlier)}")
    verbs_of = f"**{', '.join(by_verb)}**"
    shown = f"<small>{' · '.join([verbs_of, *facts])}</small>"
    return "\n".join([f"### `{name}` {{ #{name} }}", "", *lines, "", shown])


def type_text(hint: Any) -> str:
    """Describe the type of a setting."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if get_origin(hint) is tuple:
        kind = TYPES[inner[0]]
        plural = {"text": "texts"}.get(kind, f"{kind}s")
        return f"one {kind} or several" if Ellipsis in inner else f"{len(inner)} {plural}"
    if hint is bool:
        return "`--NAME` or `--no-NAME`; in YAML `true` or `false`"
    return TYPES[hint]


def default_of(value: Any) -> str:
    """Describe a default value."""
    if isinstance(value, tuple):
        return f"default `{' '.join(map(str, value))}`" if value else "default empty"
    return "default empty" if value == "" else f"default `{str(value).lower() if isinstance(value, bool) else value}`"


def recipes_page() -> str:
    """Write the page of recipes: the comment at the head of each, and its values."""
    files = recipe_files()
    parts = [
        "# Recipes",
        "A recipe is a YAML file of [settings](settings.md). `--config NAME` finds those of the package from any "
        "folder, `--config FILE` reads your own; flags override both.",
        "\n".join(f"- [`{name}`](#{name}): {escaped(first_sentence(path))}" for name, path in files.items()),
    ]
    for name, path in files.items():
        values = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        yaml = "\n".join(values).strip()
        parts += [f"## {name} {{ #{name} }}", comment_text(path), f"```yaml\n{yaml}\n```"]
    return "\n\n".join(parts) + "\n"


def head_of(path: Path) -> list[str]:
    """Return the lines of the comment at the head of a recipe, without the sign of a comment."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a recipe."""
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(head_of(path)).partition("  ")[0])[0]


def comment_text(path: Path) -> str:
    """Write the head of a recipe in Markdown: indented lines are commands, others are text."""
    parts: list[str] = []
    commands: list[str] = []
    for line in [*head_of(path), ""]:
        if line.startswith("  "):
            commands.append(line.removeprefix("  "))
            continue
        if commands:
            parts += ["", "```sh", *commands, "```", ""]
            commands = []
        parts.append(escaped(line))
    return "\n".join(parts).strip()


def escaped(text: str) -> str:
    """Keep characters of plain text from being read as Markdown or HTML, but for those in `code`."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else escaped_prose(p) for p in pieces)


def escaped_prose(text: str) -> str:
    """Escape what Python-Markdown reads, but for `code`; it knows no backslash before < and |."""
    marked = re.sub(r"([\\*_\[\]])", r"\\\1", text.replace("&", "&amp;"))
    return marked.replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def cell(text: str) -> str:
    """Put a text on the one line of a table's cell."""
    return " ".join(text.split())
