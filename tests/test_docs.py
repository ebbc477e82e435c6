"""The documents' code runs, and what they point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))


def code_blocks():
    for path in DOCUMENTS:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{path.name}-{i}")


@pytest.mark.parametrize("code", list(code_blocks()))
def test_a_code_block_runs(code):
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_are_there(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:paged_kv|native|tests|benchmarks|docs)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        tests = "".join(test.read_text() for test in (ROOT / "tests").rglob("test_*.py"))
        assert name.endswith(".py") or f"def {name}" in tests, name


def test_pages_of_results_stay_short():
    """Answers first: history and what lost are in docs/lab/, which has one form."""
    for name in ("performance.md", "bitnet.md"):
        assert len((ROOT / "docs" / name).read_text().splitlines()) <= 120
    table = (ROOT / "README.md").read_text().partition("| question |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) - 2 <= 8
    pages = [path for path in (ROOT / "docs/lab").glob("*.md") if path.name != "README.md"]
    for path in pages:
        text = path.read_text()
        for part in ("# ", "**Question.**", "**Setup.**", "## Tried", "**Verdict.**", "**Where it lives.**"):
            assert part in text, (path.name, part)
        assert f"({path.name})" in (ROOT / "docs/lab/README.md").read_text()
