"""`paged-kv generate`: the text of a folder's model, and a report that adds up."""

import json
import shutil

import pytest

from paged_kv.commands import bench_model, cli
from paged_kv.commands import generate as generation
from paged_kv.models.bitnet import TINY_BITNET, BitNetModel, DecoderConfig
from paged_kv.serving.generate import generate

CONFIG = DecoderConfig(2048, 64, 96, 2, 4, 2, 16, 128, 10000.0, 1e-5, 0, (1, 2047))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (generation, bench_model):
        monkeypatch.setattr(module, "CEILING_BYTES", 2**22)


@pytest.fixture
def folder(tmp_path):
    BitNetModel.random(CONFIG, seed=2).save_pretrained(tmp_path)
    shutil.copy(TINY_BITNET / "tokenizer.json", tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = cli.main(["generate", *map(str, arguments)])
    return code, capsys.readouterr()


def tokenizer():
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(TINY_BITNET / "tokenizer.json"))


def test_one_prompt_is_printed_as_it_grows_and_reported(capsys, folder):
    code, shown = run(capsys, "--model", folder, "--prompt", "import os", "--max-tokens", 9)
    assert code == 0
    ids = tokenizer().encode("import os").ids  # the tokenizer adds nothing, so nothing is added
    expected = generate(BitNetModel.from_pretrained(folder), [ids], max_new_tokens=9).ids[0]
    text, report = shown.out.split("\n\nkernel ")
    assert text == tokenizer().decode(expected.tolist())
    for line in (
        "prompt ",
        "decode ",
        "a step ",
        "reads ",
        "memory ",
        "against     no cache",
        "concatenated",
    ):
        assert line in report


def test_several_prompts_as_json(capsys):
    prompts = ["def f(", "class A:", "#"]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    code, shown = run(capsys, *options, "--max-tokens", 5, "--json", "--no-compare")
    assert code == 0 and shown.out.count("\n") == 1
    report = json.loads(shown.out)
    ids = [[0, *tokenizer().encode(prompt).ids] for prompt in prompts]
    expected = generate(BitNetModel.tiny(), ids, max_new_tokens=5).ids
    assert report["texts"] == [tokenizer().decode(new.tolist()) for new in expected]
    assert report["prompt_tokens"] == sum(map(len, ids)) and report["new_tokens"] == sum(map(len, expected))
    assert report["weights_ms"] + report["attention_ms"] <= report["ms_per_step"]
    assert report["weight_bytes"] == BitNetModel.tiny().weight_bytes < report["bytes_per_step"]
    assert report["no_cache_tokens_per_s"] is None


def test_one_new_token_has_no_decode_steps(capsys):
    code, shown = run(capsys, "--prompt", "x", "--max-tokens", 1, "--json")
    report = json.loads(shown.out)
    assert code == 0 and report["decode_tokens_per_s"] == 0 and report["bytes_per_step"] == 0


def test_a_stop_id_ends_the_text(capsys):
    ids = [0, *tokenizer().encode("import os").ids]
    third = int(generate(BitNetModel.tiny(), [ids], max_new_tokens=3, stop_ids=()).ids[0][2])
    _, shown = run(capsys, "--prompt", "import os", "--stop-id", third, "--json", "--no-compare")
    assert json.loads(shown.out)["new_tokens"] <= 3


def test_what_makes_no_sense_is_refused(capsys, folder, tmp_path):
    for bad in (["--max-tokens", 0], ["--max-tokens", 5000], ["--model", tmp_path / "nowhere"]):
        code, shown = run(capsys, "--prompt", "x", *bad)
        assert code == 2 and shown.err.startswith("paged-kv: "), bad
    (folder / "config.json").unlink()
    code, shown = run(capsys, "--prompt", "x", "--model", folder)
    assert code == 2 and "config.json" in shown.err


def test_what_stays_in_the_cpus_cache_is_no_share_of_memorys_ceiling():
    assert generation.share_of_reads(0.84) == "84 % of the read ceiling"
    assert generation.share_of_reads(1.0) == "100 % of the read ceiling"
    assert "%" not in generation.share_of_reads(1.3) and "cache" in generation.share_of_reads(1.3)


def test_a_prompt_that_fails_is_said_and_the_others_are_shown(capsys, monkeypatch):
    usual = generation.generate_stream

    def with_a_failure(*given, **named):
        for index, id in usual(*given, **named):
            if index == 0:
                yield index, id
        yield 1, ValueError("no pages")

    monkeypatch.setattr(generation, "generate_stream", with_a_failure)
    code, shown = run(
        capsys, "--prompt", "import", "--prompt", "def", "--max-tokens", 3, "--json", "--no-compare"
    )
    assert code == 1 and "prompt 2 ended early: no pages" in shown.err
    first, second = json.loads(shown.out)["texts"]
    assert first and second == ""


@pytest.mark.parametrize(
    "options", [["--kv-budget", 256], ["--kv-ageing"], ["--kv-budget", 320, "--kv-ageing", "mass"]]
)
def test_a_long_text_goes_on_in_a_budget_and_in_fewer_bits(capsys, options):
    code, shown = run(
        capsys, "--prompt", "import os", "--max-tokens", 400, "--json", "--no-compare", *options
    )
    assert code == 0 and json.loads(shown.out)["new_tokens"] == 400
