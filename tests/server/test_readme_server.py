"""The README's commands for a server, word for word but for the address and the model's name."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running import NAME, served

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README[README.index("## A server") : README.index("## In transformers")]
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url():
    with served() as running:
        yield running.url


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)


def test_curl_asks(url):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    (command,) = blocks("sh")
    assert ADDRESS in command
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, url)], capture_output=True, text=True, check=True
    )
    assert '"finish_reason"' in done.stdout and '"cached_tokens"' in done.stdout


def test_the_official_client_asks(url, capsys):
    pytest.importorskip("openai")
    (script,) = blocks("python")
    assert ADDRESS in script and '"smollm2"' in script
    exec(compile(script.replace(ADDRESS, url).replace('"smollm2"', f'"{NAME}"'), "README.md", "exec"), {})
    assert capsys.readouterr().out
