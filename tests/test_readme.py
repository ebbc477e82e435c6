"""What the README says can be run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    example, answer, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(answer, "README.md", "exec"), {"__name__": "readme"})  # it needs a model
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    assert shown.startswith("101 8 CacheStats(")


def test_every_command_and_file_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"\]\(([^)]+)\)|`((?:paged_kv|native|docs)/[^`]*)`", README):
        assert (ROOT / (path[0] or path[1])).exists()
