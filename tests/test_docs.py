"""The documents' code runs, and what they point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


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
