"""Pages in a form that tests would pass over are errors."""

import pytest

from tests.docs.page_form import faults_of

BAD = "hyspark nonsense"


def faults(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return "\n".join(faults_of(page))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"```bash\n{BAD}\n```\n", "page.md:1: a block in bash is not run"),
        (f"```shell\n{BAD}\n```\n", "a block in shell"),
        (f"```{{.sh}}\n{BAD}\n```\n", "a block in {.sh}"),
        (f"````py\n{BAD}\n````\n", "a block in py "),
        (f"~~~zsh\n{BAD}\n~~~\n", "a block in zsh"),
        (f"```\n{BAD}\n```\n", "names no language"),
        (f"text\n\n    {BAD}\n", "page.md:3: 'hyspark nonsense': a command stands in a fenced block"),
        ("text\n\n\tpip install x\n", "a command stands in a fenced block"),
        (f"text\n\n        $ OMP_NUM_THREADS=1 .venv/bin/{BAD}\n", "a command stands in a fenced block"),
        (f"> ```sh\n> {BAD}\n> ```\n", "begins on a line of its own"),
        (f"- ```sh\n  {BAD}\n  ```\n- ```sh\n  {BAD}\n  ```\n", "page.md:1: "),
        (f"<pre>{BAD}</pre>\n", "not in HTML"),
        (f"<!-- needs: a GPU -->\n\n\n```sh\n{BAD}\n```\n", "no mark before a block"),
        (f"<!-- need: a GPU -->\n```sh\n{BAD}\n```\n", "no mark"),
        (f"<!-- Slow -->\n```sh\n{BAD}\n```\n", "no mark"),
        ("<!-- workspaces: labelled -->\ntext\n", "no mark"),
        ("text <!-- needs: a GPU --> text\n", "no mark"),
        ("<!-- workspace: mr -->\n<!-- workspace: pacs -->\n", "two comments"),
        (f"<!-- needs: care -->\n```sh\n{BAD}\n```\n", "'care' is no reason"),
        (f"<!-- needs: a GPU, or ten minutes -->\n```sh\n{BAD}\n```\n", "is no reason"),
        ("<!-- needs: a GPU -->\n```python\nx = (\n```\n", "was never closed"),
        (f"<!-- exit: 1 -->\n```sh\n{BAD}\nhyspark check none\n```\n", "has one command"),
        (f"<!-- exit: one -->\n```sh\n{BAD}\n```\n", "no exit code"),
        (f"```sh\n{BAD} && ls\nls\n```\n", "&& hides failures"),
        (f"```sh\n{BAD} || true\n```\n", "|| hides failures"),
        (f"```sh\n{BAD} &\n```\n", "& hides failures"),
        (f"```text\nprinted\n`````\n```sh title=x\n{BAD} || ls\n```\n", "page.md:4: || hides"),
    ],
)
def test_what_would_be_passed_over_is_found(tmp_path, text, fault):
    assert fault in faults(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "<!--slow-->\n```sh\nls | head 2>&1; ls 'a && b' # || c\n```\n",
        "~~~sh\nls\n~~~\n````sh title='a'\nls\n`````\n",
        "1. A list\n\n    ```sh\n    hyspark --version\n    ```\n\n    continued\n",
        "<!-- file: job.sh -->\n```bash\na && b &\n```\n<!-- needs: SLURM -->\n```sh\nsbatch job.sh && ls\n```\n",
        "The mark `<!-- slow -->` in a sentence\n",
    ],
)
def test_other_forms_pass(tmp_path, text):
    assert faults(tmp_path, text) == ""
