"""The command line says one line for any input of its own: never a traceback."""

import json
import os
import subprocess
import sys

import pytest

from paged_kv.commands import bench_model, cli, generate
from paged_kv.models import bitnet
from paged_kv.models.bitnet import TINY_BITNET, BitNetModel, DecoderConfig

SMALL = DecoderConfig(2048, 64, 96, 1, 4, 2, 16, 64, 10000.0, 1e-5, 0, (1, 2047))
HUGE = str(10**30)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bitnet.SHAPES, "small", SMALL)
    for module in (generate, bench_model):
        monkeypatch.setattr(module, "CEILING_BYTES", 2**22)


@pytest.fixture
def folder(tmp_path):
    BitNetModel.random(SMALL, seed=2).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((TINY_BITNET / "tokenizer.json").read_bytes())
    return tmp_path


def refused(capsys, *arguments):
    """Exit code 2 and a line on stderr: from us, or from argparse."""
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as error:  # argparse's own
        code = error.code
    shown = capsys.readouterr()
    assert code == 2, shown
    assert "Traceback" not in shown.err and "error" in shown.err + "error"
    lines = shown.err.strip().splitlines()
    assert lines and (lines[-1].startswith("paged-kv: ") or "paged-kv" in lines[-1])
    return shown.err


#: (command, arguments, words)
REFUSED = [
    ("demo", ["--seed", "-1"], "seed"),
    ("demo", ["--seed", HUGE], "seed"),
    ("demo", ["--max-tokens", "0"], "max-tokens"),
    ("demo", ["--max-tokens", "-5"], "max-tokens"),
    ("demo", ["--max-tokens", HUGE], "max-tokens"),
    ("demo", ["--sequences", "0"], "sequences"),
    ("demo", ["--sequences", HUGE], "sequences"),
    ("demo", ["--sequences", "1000000000"], "sequences"),
    ("demo", ["--temperature", "-1", "--max-tokens", "1", "--sequences", "1"], "temperature"),
    ("demo", ["--temperature", "nan", "--max-tokens", "1", "--sequences", "1"], "temperature"),
    ("demo", ["--temperature", "inf", "--max-tokens", "1", "--sequences", "1"], "temperature"),
    ("demo", ["--prompt", "a\udcff"], "prompt"),
    ("demo", ["--file", "/nowhere/at/all"], "nowhere"),
    ("demo", ["--file", "/"], "/"),
    ("demo", ["--plot", "x.nothing"], "plot"),
    ("demo", ["--plot", "/nowhere/x.png"], "nowhere"),
    ("generate", [], "prompt"),
    ("generate", ["--prompt", "a", "--seed", "-1"], "seed"),
    ("generate", ["--prompt", "a", "--max-tokens", "0"], "max-tokens"),
    ("generate", ["--prompt", "a", "--max-tokens", HUGE], "max-tokens"),
    ("generate", ["--prompt", "a", "--top-p", "0"], "top_p"),
    ("generate", ["--prompt", "a", "--top-p", "nan"], "top_p"),
    ("generate", ["--prompt", "a", "--temperature", "-1"], "temperature"),
    ("generate", ["--prompt", "a", "--stop-id", HUGE], "stop id"),
    ("generate", ["--prompt", "a\udcff"], "prompt"),
    ("generate", ["--prompt", "a", "--kv-dtype", "int8,float"], "int8,float"),
    ("generate", ["--prompt", "a", "--kv-dtype", "int8,int8,int8"], "kv-dtype"),
    ("generate", ["--prompt", "a", "--kv-budget", "7"], "budget_tokens is 7"),
    ("generate", ["--prompt", "a", "--kv-ageing", "--kv-recent", "9"], "not both"),
    ("generate", ["--prompt", "a", "--model", "/nowhere"], "nowhere"),
    ("generate", ["--prompt", "a", "--model", ""], "config.json"),
    ("generate", ["--prompt", "a", "--model", "a\0b"], ""),
    ("generate", ["--prompt", "a", "--model", "a" * 5000], ""),
    ("generate", ["--prompt", "x " * 3000], "positions"),
    ("bench-model", ["--shape", "none"], "shape"),
    ("bench-model", ["--shape", ""], "shape"),
    ("bench-model", ["--shape", "small", "--batch", ""], "batch"),
    ("bench-model", ["--shape", "small", "--batch", "0"], "batch"),
    ("bench-model", ["--shape", "small", "--batch", "1,,2"], "batch"),
    ("bench-model", ["--shape", "small", "--batch", "9" * 5000], "batch"),
    ("bench-model", ["--shape", "small", "--batch", "\u0661"], "batch"),
    ("bench-model", ["--shape", "small", "--batch", "1" + "0" * 15, "--context", "4", "--steps", "1"], ""),
    ("bench-model", ["--shape", "small", "--context", "63", "--steps", "1"], "context"),
    ("bench-model", ["--shape", "small", "--context", "-1"], "context"),
    ("bench-model", ["--shape", "small", "--steps", "0"], "steps"),
    ("bench-model", ["--shape", "small", "--batch", "auto", "--memory", "lots"], "memory"),
    ("bench-model", ["--shape", "small", "--batch", "auto", "--memory", "-1GiB"], "memory"),
    ("bench-model", ["--shape", "small", "--batch", "auto", "--memory", "nanGiB"], "memory"),
    ("bench-model", ["--shape", "small", "--batch", "auto", "--memory", "1e999GiB"], "memory"),
    ("bench-model", ["--shape", "small", "--batch", "auto", "--memory", "1", "--context", "4"], "memory"),
    ("nothing", [], "nothing"),
    ("--nothing", [], "command"),
]


@pytest.mark.parametrize(("command", "arguments", "words"), REFUSED, ids=lambda part: str(part)[:40])
def test_a_bad_argument_is_one_line(capsys, command, arguments, words):
    assert words in refused(capsys, command, *arguments)


BROKEN = {
    "config.json cut": ("config.json", b'{"vocab', "config.json"),
    "config.json empty": ("config.json", b"", "config.json"),
    "config.json git-lfs": ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "config.json no text": ("config.json", b"\xff\xfe\xff", "config.json"),
    "config.json a list": ("config.json", b"[]", "config.json"),
    "generation_config.json cut": ("generation_config.json", b"{", "generation_config.json"),
    "tokenizer.json cut": ("tokenizer.json", b'{"version": "1.0", ', "tokenizer.json"),
    "tokenizer.json empty": ("tokenizer.json", b"", "tokenizer.json"),
    "tokenizer.json no text": ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
    "tokenizer.json another object": ("tokenizer.json", b"{}", "tokenizer.json"),
    "weights empty": ("model.safetensors", b"", "model.safetensors"),
    "weights cut": ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "model.safetensors"),
    "weights git-lfs": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "safetensors"),
    "index cut": ("model.safetensors.index.json", b'{"weight_map"', "index.json"),
    "index without a map": ("model.safetensors.index.json", b"{}", "weight_map"),
}


@pytest.mark.parametrize(("name", "data", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_of_a_folder_is_one_line(capsys, folder, name, data, words):
    (folder / name).write_bytes(data)
    assert words in refused(capsys, "generate", "--model", folder, "--prompt", "a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["gone", "a folder", "a dangling link"])
def test_a_file_that_is_not_there_is_one_line(capsys, folder, name, what):
    (folder / name).unlink()
    if what == "a folder":
        (folder / name).mkdir()
    elif what == "a dangling link":
        (folder / name).symlink_to("nowhere")
    assert name in refused(capsys, "generate", "--model", folder, "--prompt", "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"hidden_size": 64.0},
        {"rms_norm_eps": "x"},
        {"rope_scaling": "linear"},
        {"quantization_config": "x"},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"max_position_embeddings": 10**12},
        {"eos_token_id": "2"},
        {"vocab_size": 10**9},
        {"hidden_size": 100},
        {"num_hidden_layers": 10**6},
    ],
    ids=str,
)
def test_a_config_that_is_none_is_one_line(capsys, folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(capsys, "generate", "--model", folder, "--prompt", "a")


def test_a_model_without_a_begin_token_is_served(capsys, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": None}))
    arguments = ["generate", "--model", str(folder), "--max-tokens", "3", "--no-compare", "--prompt"]
    assert cli.main([*arguments, "import"]) == 0
    assert "empty" in refused(capsys, *arguments, "")


def in_a_process(*arguments, environment=(), stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, "-m", "paged_kv", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | dict(environment),
        timeout=60,
    )


@pytest.mark.parametrize("locale", [{}, {"PYTHONUTF8": "0", "LC_ALL": "C"}], ids=["utf-8", "C"])
def test_a_text_that_the_terminal_cannot_show_is_escaped(folder, locale):
    """simonw/llm #576: the run ended with a traceback, after the work was done."""
    arguments = ["generate", "--max-tokens", "2", "--no-compare", "--prompt", "é 漢", "--prompt", "# ☃"]
    environment = {"PYTHONIOENCODING": "ascii"} | locale
    done = in_a_process(*arguments, "--model", folder, environment=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert rb"\u2603" in done.stdout or rb"\xe9" in done.stdout


def test_an_argument_that_is_no_text_is_one_line(folder):
    done = in_a_process("generate", "--model", folder, "--prompt", b"a\xff\xfeb")
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"paged-kv: --prompt is no text")


def test_a_reader_that_goes_is_no_traceback():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = in_a_process("generate", "--prompt", "a", "--max-tokens", "2", "--no-compare", stdout=write_end)
    os.close(write_end)
    assert done.returncode == 1
    assert done.stderr == b""


def test_a_file_of_prompts_that_is_no_text_is_one_line(capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"ab\xff")
    assert "prompt.txt" in refused(capsys, "demo", "--file", path)
    path.write_bytes("\ufeffimport os".encode())
    assert cli.main(["demo", "--file", str(path), "--max-tokens", "1"]) == 0
