"""`paged-kv serve` as a process of its own: it answers, ends by a signal, and shows itself in a terminal."""

# ruff: noqa: E402
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "tokenizers", "jinja2", "httpx"):
    pytest.importorskip(package)

import httpx

from paged_kv.commands import cli, top

CHAT = {"messages": [{"role": "user", "content": "def f("}], "max_tokens": 8}


class Served:
    """A process; `url` when it listens."""

    def __init__(self, *options, **environment):
        usual = ["--model", "tiny-bitnet", "--port", "0", "--memory", "64MiB"]
        command = [sys.executable, "-m", "paged_kv", "serve", *usual, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:\d+", self.line)
        self.url = found[0] if found else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_may_end_when_a_signal_comes(number):
    with Served("--drain", "20") as served:
        results = []

        def ask():
            body = {**CHAT, "max_tokens": 900, "ignore_eos": True}
            results.append(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        served.process.send_signal(number)
        thread.join()
        assert results[0].status_code == 200 and results[0].json()["usage"]["completion_tokens"] == 900
        served.process.communicate(timeout=30)
        assert served.process.returncode == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")


def test_what_runs_too_long_is_cut_off():
    with Served("--drain", "1") as served:
        threads = [threading.Thread(target=_long_stream, args=(served.url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begin = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        served.process.communicate(timeout=30)
        assert time.monotonic() - begin < 10 and served.process.returncode == 0
        for thread in threads:
            thread.join()


def _long_stream(url):
    body = {**CHAT, "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            for _ in answer.iter_lines():
                pass
    except httpx.HTTPError:
        pass  # the connection was cut


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port"),
        (["--model", "tiny-bitnet", "--context", "0"], "--context"),
        (["--model", "/nothing"], "/nothing"),
        (["--api-key", " x"], "API key"),
        (["--memory", "lots"], "memory"),
        (["--drain", "-1"], "--drain"),
        (["--max-sequences", "0"], "--max-sequences"),
    ],
)
def test_options_that_are_none_are_refused(options, words, capsys):
    assert cli.main(["serve", *options]) == 2
    assert words in capsys.readouterr().err


# ---- top


def frame(**changes):
    stats = {
        "used": 2,
        "kept": 1,
        "free": 7,
        "tokens": 20,
        "sequences": 1,
        "queried": 10,
        "hits": 5,
        "evictions": 0,
    }
    usual = {
        "t": 0.0,
        "kind": "full",
        "page_size": 16,
        "num_pages": 10,
        "pages": [0, 2, 1, 0, -1, 1, 6, 2, 0, 0, 2, 1, 0, -1, -1],
        "seqs": [[0, 5, 20, [0, 1]]],
        "gone": [],
        "stats": stats,
    }
    return json.loads(json.dumps(usual | changes))


def test_a_view_shows_what_frames_say():
    view = top.View()
    view.take(frame())
    marks = "".join(mark for mark, _ in view.cells(100))
    assert marks == "■◆▫·······" and "2 used, 1 kept, 7 free of 10 pages" in view.numbers()
    assert view.cells(100)[0][1] == top.HUES[5]
    assert "utilization 62 %" in view.numbers() and "hits 50 %" in view.numbers()
    view.take(frame(kind="delta", t=1.0, pages=[0, 0, 0, -1, -1], seqs=[], gone=[0]))
    assert "".join(mark for mark, _ in view.cells(5)) == "◆▫···"


def test_it_answers_those_who_have_the_key_and_shows_itself(capsys):
    pytest.importorskip("rich")
    with Served("--name", "small", PAGED_KV_API_KEY="secret") as served:
        assert served.line.startswith("small at http://127.0.0.1:")
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret"}
        body = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=60, headers=headers).json()
        assert body["model"] == "small" and body["usage"]["completion_tokens"] <= 8
        assert cli.main(["top", served.url]) == 2
        assert "401" in capsys.readouterr().err
        assert cli.main(["top", f"{served.url}/v1", "--frames", "2", "--api-key", "secret"]) == 0
        out = capsys.readouterr().out
        assert "pages" in out and "tokens/s" in out and "·" in out
        served.process.send_signal(signal.SIGTERM)
        _, err = served.process.communicate(timeout=30)
        assert served.process.returncode == 0 and err == ""


@pytest.mark.parametrize("url", ["nothing", "http://127.0.0.1:1"])
def test_a_server_that_is_none_is_said(url, capsys):
    pytest.importorskip("rich")
    assert cli.main(["top", url]) == 2
    assert url in capsys.readouterr().err
