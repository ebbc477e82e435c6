import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from family import chat_folder

from paged_kv import extras
from paged_kv.commands import cli, demo, demo_prompts
from paged_kv.commands.live_line import LiveLine

SMALL = ["demo", "--max-tokens", "3", "--sequences", "3"]


def run(capsys, *arguments):
    code = cli.main(arguments)
    return code, capsys.readouterr()


def test_three_ways_of_serving_give_the_same_tokens(capsys):
    code, shown = run(capsys, *SMALL)
    assert code == 0
    assert shown.out.endswith("same tokens: yes\n")
    assert "paged is faster by" in shown.out and "\r" not in shown.out
    assert "--- " in shown.out and "«" in shown.out


def test_json_is_one_line_of_figures(capsys):
    code, shown = run(capsys, *SMALL, "--json", "--temperature", "0")
    assert code == 0 and shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert result["same_tokens"] is True
    assert [way["way"] for way in result["ways"]] == ["no cache", "concatenated", "paged"]
    paged = result["ways"][-1]
    assert paged["new_tokens"] == 9 and paged["tokens_per_s"] > 0 and paged["bytes_held"] > 0
    assert 0 < paged["utilization"] <= 1 and 0 < paged["attend_share"] < 1


def test_other_tokens_are_told_and_exit_with_1(capsys, monkeypatch):
    concatenated = demo.Serving.concatenated

    def with_one_token_changed(self, pool_pages):
        served = concatenated(self, pool_pages)
        served.new_ids[1][2] += 1
        return served

    monkeypatch.setattr(demo.Serving, "concatenated", with_one_token_changed)
    code, shown = run(capsys, *SMALL)
    assert code == 1
    assert shown.out.endswith("same tokens: no\n")


def test_prompts_can_be_given(capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import os\n")
    code, shown = run(capsys, *SMALL[:3], "--prompt", "def f(x):", "--file", str(path), "--seed", "3")
    assert code == 0
    assert "2 prompts" in shown.out and f"--- {path}" in shown.out


def test_a_model_with_a_chat_template_answers_questions(capsys, tmp_path):
    folder = chat_folder(tmp_path)
    code, shown = run(capsys, "demo", "--model", str(folder), "--max-tokens", "4", "--sequences", "9")
    assert code == 0 and shown.out.endswith("same tokens: yes\n")
    assert shown.out.count("\n--- ") == 6 and f"--- {demo_prompts.QUESTIONS[3]}\n" in shown.out
    code, shown = run(capsys, "demo", "--model", str(folder), "--max-tokens", "4", "--prompt", "Hi", "--json")
    assert code == 0 and json.loads(shown.out)["same_tokens"]
    code, shown = run(capsys, "demo", "--model", str(folder), "--prompt", "Hi " * 600)
    assert code == 2 and "a question has" in shown.err


def test_what_cannot_be_served_is_an_error_in_one_line(capsys):
    for bad in (["--max-tokens", "1023"], ["--max-tokens", "0"], ["--sequences", "0"], ["--file", "/none"]):
        code, shown = run(capsys, "demo", *bad)
        assert code == 2 and shown.err.startswith("paged-kv: ") and shown.err.count("\n") == 1
    code, shown = run(capsys, *SMALL, "--temperature", "-1")
    assert code == 2 and "temperature" in shown.err


def test_a_missing_module_is_replaced_and_the_output_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_prompts, "STANDARD_LIBRARY", tmp_path)
    code, shown = run(capsys, *SMALL)
    assert code == 0
    assert "of paged_kv instead of bisect.py, which this Python lacks" in shown.out


def test_a_missing_package_is_an_error_that_names_the_extra():
    with pytest.raises(ImportError, match=r"no_such_package: pip install 'paged_kv\[demo\]'"):
        extras.require("no_such_package", "demo")


def test_ctrl_c_ends_it_cleanly():
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_kv", "demo", "--max-tokens", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # What a shell starts in the background ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "prompts of" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "interrupted"


def test_the_live_line_writes_over_itself_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        live = LiveLine(stream)
        live.update("one")
        live.clear()
    assert terminal.getvalue() == "\r\033[Kone\r\033[K"
    assert pipe.getvalue() == ""


def test_a_plot_is_drawn(capsys, tmp_path):
    code, _ = run(capsys, *SMALL, "--plot", str(tmp_path / "pages.png"))
    assert code == 0
    assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG")


def test_info_tells_machine_kernel_memory_and_ceiling(capsys):
    code, shown = run(capsys, "info")
    assert code == 0
    for word in ("machine", "kernel        ", "memory", "read ceiling", "GB/s"):
        assert word in shown.out
