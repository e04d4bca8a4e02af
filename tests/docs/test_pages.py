"""What pages name exists: verbs, flags, recipes, targets, scripts, files, links; the README's tree is the tree."""

import re
import shlex

import pytest

from tests.docs.blocks import OUTPUTS, ROOT, SCRIPTS, blocks_of, commands_of, name_of, pages, simple_commands
from tests.docs.links import dead_links, load_generator
from tests.docs.shown_commands import all_flags, inline_code, wrong_words

PAGES = pages()
CHANGELOG = ROOT / "CHANGELOG.md"
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
INLINE = re.compile(
    r"(\$ |\w+=\S* |(srun|nohup|nice|time|env|sudo) )*(\S*/)?(hyspark|python3?(\.\d+)?|make|torchrun|pip)(?= \S)"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_blocks_can_be_typed(page):
    found = []
    for block in blocks_of(page):
        for command in commands_of(block):
            whole = block.language not in OUTPUTS and block.mark != "exit"
            found += [f"{command.name}: {wrong}" for wrong in wrong_words(command.words, whole=whole)]
    assert found == []


def wrong_sentence(text):
    """What is wrong with the commands of a text between backticks, if it begins with one."""
    if not INLINE.match(text) or text.count("'") % 2 or text.count('"') % 2:
        return []
    return [wrong for words in simple_commands(text) for wrong in wrong_words(words, whole=False)]


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name_of)
def test_commands_of_sentences_can_be_typed(page):
    known, found = all_flags(), []
    for line, text in inline_code(page):
        if re.match(r"--[a-z]", text):
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", text)
            wrong = [flag for flag in flags if flag not in known]
        else:
            wrong = wrong_sentence(text)
        found += [f"{name_of(page)}:{line}: {text}: {one}" for one in wrong]
    assert found == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hyspark finetun --data x", "no verb finetun"),
        ("hyspark pretrain --batchsize 4", "no flag --batchsize"),
        ("hyspark pretrain --batch_size four", "invalid int value: 'four'"),
        ("hyspark pretrain --mask_ratio 2", "mask_ratio must lie between"),
        ("python train.py --config configs/pretrain_none.yaml", "no recipe"),
        ("torchrun --nproc_per_node=4 train.py --model=spark/nothing/x --crop_siz 3", "no flag --crop_siz"),
        ("hyspark benefit --out o --initial_weights a=none --task classify --crops_per_volume 2", "crops_per_volume"),
        ("make dmo", "no target dmo"),
        ("pip install '.[dicomm]'", "no extra dicomm"),
        ("python benchmarks/none.py", "no script"),
        (".venv/bin/hyspark pretrain --batchsize 4", "no flag --batchsize"),
        ("CUDA_VISIBLE_DEVICES=0 nice hyspark finetun", "no verb finetun"),
        ("hyspark check data && hyspark finetun", "no verb finetun"),
        ("$ python ./train.py --batchsize 4", "no flag --batchsize"),
        ("python3.12 -m hyspark finetun", "no verb finetun"),
    ],
)
def test_what_cannot_be_typed_is_found(text, message):
    found = [wrong for words in simple_commands(text) for wrong in wrong_words(words)]
    assert any(message in wrong for wrong in found)


@pytest.mark.parametrize(
    "text",
    [
        "hyspark VERB --help",
        "hyspark pretrain --config pretrain --exp_dir=a --bs 4",
        "torchrun --nproc_per_node=4 train.py --config configs/pretrain.yaml --data data --batch_size 12",
        "python finetune_btcv.py --config ckpt/mine/config.yaml --seed $seed",
        "hyspark --version",
        "make gpu MINUTES=3",
    ],
)
def test_what_can_be_typed_passes(text):
    assert list(wrong_words(shlex.split(text))) == []


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"(?<![\w/])(?:hyspark|tests|benchmarks|configs)/[\w/]+\.(?:py|yaml)", page.read_text()):
            written = {block.argument for block in blocks_of(page) if block.mark == "file"}
            assert (ROOT / name).is_file() or name in written, f"{name_of(page)}: {name}"


@pytest.fixture(scope="module")
def generated():
    return {f"docs/{path}": text for path, text in load_generator().generated_pages().items()}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG, ROOT / "SECURITY.md", *NOTEBOOKS], ids=name_of)
def test_links_lead_somewhere(page, generated):
    assert list(dead_links(page, generated)) == []


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](none.md)", "none.md"),
        ('[a](none.md "A title")', "none.md"),
        ("![a](none.png)", "none.png"),
        ("[a][1]\n\n[1]: none.md", "none.md"),
        ('<a href="none.md">a</a> <img alt="b" src="none.png">', "none.md none.png"),
        ("# One: two `three`\n[a](#one-two-three) [b](#none)", "#none"),
        ("[a](other.md#here) [b](other.md#none)", "other.md#none"),
        ("# Twice\n# Twice\n[a](#twice-1)", ""),
        ("[a](https://example.org) `[b](none.md)`\n```text\n[c](none.md)\n```", ""),
    ],
)
def test_dead_links_are_found(tmp_path, text, dead):
    (tmp_path / "other.md").write_text("# Other\n\n## A { #here }\n")
    (tmp_path / "page.md").write_text(text)
    assert " ".join(dead_links(tmp_path / "page.md", {})) == dead


def test_the_tree_is_the_tree():
    """Each room of the picture names the modules that are in it."""
    homes = [page for page in PAGES if "\ngenerate_js.py  train.py" in page.read_text()]
    (tree,) = [re.search(r"```\w*\n(generate_js\.py.*?)```", p.read_text(), flags=re.DOTALL).group(1) for p in homes]
    assert set(SCRIPTS) == set(re.findall(r"\w+\.py", tree))
    shown: dict[str, str] = {}
    room, outer = "", ""
    for line in tree[tree.index("\nhyspark/") :].splitlines()[2:]:
        if found := re.match(r"( +)(\w+)/ +(.*)", line):
            outer = found[2] if len(found[1]) == 2 else outer
            room = found[2] if len(found[1]) == 2 else f"{outer}/{found[2]}"
            shown[room] = found[3]
        else:
            shown[room] += line
    package = ROOT / "hyspark"
    rooms = {path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")} - {"."}
    assert set(shown) == rooms
    for name, text in shown.items():
        modules = {path.stem for path in (package / name).glob("*.py")} - {"__init__"}
        assert modules <= set(re.findall(r"\w+", text)), name
