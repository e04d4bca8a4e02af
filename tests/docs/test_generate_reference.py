"""The generated reference: every verb, flag, setting and recipe once."""

import html
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import markdown
import pytest

from hyspark.cli.completion import verb_parser
from hyspark.cli.main import VERBS
from hyspark.config.recipes import SETTINGS_OF, field_help, read_yaml
from hyspark.config.yaml_files import recipe_files
from hyspark.utils.settings import field_info

SCRIPT = Path(__file__).parents[2] / "docs/generate_reference.py"


@pytest.fixture(scope="module")
def generator():
    spec = spec_from_file_location("generate_reference", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(generator):
    return generator.generated_pages()


def anchors(text):
    return re.findall(r"\{ #(\S+) \}", text)


def test_every_verb_is_on_the_page_once_with_an_example_that_names_it(generated):
    page = generated["reference/verbs.md"]
    assert re.findall(r"^## (\S+)", page, flags=re.MULTILINE) == list(VERBS)
    examples = re.findall(r"^```sh\n(.*?)```", page, flags=re.MULTILINE | re.DOTALL)
    assert [example.split()[1] for example in examples] == list(VERBS)
    assert len(set(anchors(page))) == len(anchors(page))


def test_every_flag_of_a_verb_is_in_its_section(generated, generator):
    sections = dict(re.findall(r"^## (\S+) \{.*?\n(.*?)(?=^## |\Z)", generated["reference/verbs.md"], re.M | re.S))
    for verb in VERBS.keys() - SETTINGS_OF.keys():
        for action in verb_parser(verb)._actions:
            name = next((flag for flag in action.option_strings if flag.startswith("--")), action.dest.upper())
            assert name == "--help" or sections[verb].count(f"[`{name}`]") == 1, f"{verb}: {name}"
    for verb, config in SETTINGS_OF.items():
        for name in field_info(config):
            assert sections[verb].count(f"(settings.md#{name})") == 1, f"{verb}: {name}"


def test_every_setting_is_on_the_page_once_with_all_of_its_help(generated, generator):
    page = generated["reference/settings.md"]
    names = {name for config in SETTINGS_OF.values() for name in field_info(config)}
    assert sorted(anchors(page)) == sorted(names)
    for config in SETTINGS_OF.values():
        for name, text in field_help(config).items():
            assert generator.escaped(" ".join(text.split())) in page, name
        for name, info in field_info(config).items():
            entry = re.search(rf"\{{ #{name} \}}.*?(?=\{{ #|\Z)", page, flags=re.DOTALL)[0]
            assert all(f"`{old}`" in entry for old in (*info.old, *info.old_axes)), name
            assert ("resume: may change" in entry) >= info.may_change, name
            assert all(method in entry for method in info.methods), name


def test_links_between_generated_pages_have_their_targets(generated):
    known = {anchor for anchor in anchors(generated["reference/settings.md"])}
    linked = set(re.findall(r"\(settings\.md#([^)]+)\)", generated["reference/verbs.md"]))
    assert linked <= known


def test_every_recipe_is_on_the_page_once_as_it_is(generated):
    page = generated["reference/recipes.md"]
    assert anchors(page) == list(recipe_files())
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for (name, path), block in zip(recipe_files().items(), blocks, strict=True):
        assert f"## {name} {{" in page
        assert block.strip() in path.read_text()


def test_a_recipe_shown_is_one_that_loads(generated, tmp_path):
    block = re.search(r"^## pretrain \{.*?^```yaml\n(.*?)^```", generated["reference/recipes.md"], re.M | re.S)[1]
    (tmp_path / "shown.yaml").write_text(block)
    config = SETTINGS_OF["pretrain"]
    assert read_yaml(tmp_path / "shown.yaml", config) == read_yaml(recipe_files()["pretrain"], config)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[DICOM](docs/how_to/prepare_data.md#a)", "DICOM"),
        ("[design](docs/explanation/design.md)", "[design](explanation/design.md)"),
        ("[changes](CHANGELOG.md)", "[changes](changelog.md)"),
        ("[data](data/README.md)", "data"),
        ("[paper](https://example.org)", "[paper](https://example.org)"),
    ],
)
def test_links_of_pages_of_the_root_point_into_the_site(generator, monkeypatch, tmp_path, text, shown):
    (tmp_path / "docs/explanation").mkdir(parents=True)
    (tmp_path / "docs/explanation/design.md").touch()
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert generator.links_of_site(text) == shown


def test_the_table_of_formats_is_the_changelogs(generator):
    shown = generator.on_page_markdown("before <!-- changelog: Formats --> after")
    assert "| checkpoint" in shown
    assert shown.endswith("after")
    with pytest.raises(ValueError, match="expected a section"):
        generator.on_page_markdown("<!-- changelog: Nothing -->")


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a_b and *c*", r"a\_b and \*c\*"), ("`a_b` <c> & \\", r"`a_b` &lt;c&gt; &amp; \\"), ("{a|b}", "{a&#124;b}")],
)
def test_plain_text_is_not_read_as_markdown(generator, text, kept):
    assert generator.escaped(text) == kept
    assert read(f"| flag |\n|---|\n| {generator.cell(kept)} |\n") == letters(f"flag {text}")


def read(page):
    """The letters of a page as a browser shows it, without those of blocks."""
    rendered = markdown.markdown(page, extensions=["tables", "attr_list", "fenced_code"])
    return letters(html.unescape(re.sub(r"<pre>.*?</pre>|<[^>]+>", "", rendered, flags=re.DOTALL)))


def letters(text):
    return re.sub(r"[\s`]", "", text)


def test_what_help_says_is_what_the_site_shows(generated):
    verbs, settings = read(generated["reference/verbs.md"]), read(generated["reference/settings.md"])
    for verb in VERBS:
        parser = verb_parser(verb)
        flags = [] if verb in SETTINGS_OF else [one for one in parser._actions if one.dest != "help"]
        texts = [
            parser.description.partition("Example:\n")[0],
            *((flag.help or "").replace("%%", "%") for flag in flags),
        ]
        assert [text for text in texts if letters(text) not in verbs] == []
    for config in SETTINGS_OF.values():
        assert [text for text in field_help(config).values() if letters(text) not in settings] == []
