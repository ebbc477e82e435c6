"""`paged-kv chat`: turns of a conversation, which the prefix cache remembers."""

import io
import json
from contextlib import closing
from itertools import pairwise

import pytest
from family import chat_folder

from paged_kv import ArgumentError
from paged_kv.commands import chat, cli
from paged_kv.models.decoder import DecoderModel
from paged_kv.serving.generate import generate
from paged_kv.text.tokenizer import ModelTokenizer

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")


@pytest.fixture
def folder(tmp_path):
    return chat_folder(tmp_path)


def run(capsys, folder, *arguments):
    code = cli.main(["chat", "--model", str(folder), *map(str, arguments)])
    return code, capsys.readouterr()


def answers(folder, texts, system=None, num_new=9, **options):
    """What the model says to each, one turn after the other, without a cache in between."""
    model, tokenizer = DecoderModel.from_pretrained(folder), ModelTokenizer.from_pretrained(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in texts:
        messages.append({"role": "user", "content": text})
        ids = tokenizer.chat(messages)
        made = generate(model, [ids], max_new_tokens=num_new, tokenizer=tokenizer, **options)
        messages.append({"role": "assistant", "content": made.texts[0]})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_each_turn_goes_on_with_the_conversation(capsys, folder):
    texts = ["import os" * 20, "and <|im_end|> then?", "class A:"]
    prompts = [part for text in texts for part in ("--prompt", text)]
    code, shown = run(capsys, folder, *prompts, "--max-tokens", 9, "--system", "Say it in Python.", "--json")
    turns = [json.loads(line) for line in shown.out.splitlines()]
    assert code == 0
    assert [turn["text"] for turn in turns] == answers(folder, texts, "Say it in Python.")
    assert turns[0]["cached_tokens"] == 0
    for before, turn in pairwise(turns):  # all of the last turn's prompt is remembered
        assert turn["cached_tokens"] >= before["prompt_tokens"] - 1
        assert turn["prompt_tokens"] > before["prompt_tokens"] + before["new_tokens"] - 2
        assert before["pages_in_use"] <= turn["pages_in_use"] <= turn["pages"]


def test_one_answer_is_shown_as_it_comes_and_what_it_took(capsys, folder):
    code, shown = run(capsys, folder, "--prompt", "import", "--max-tokens", 9)
    text, took = shown.out.rsplit("\n[", 1)
    assert code == 0 and text == answers(folder, ["import"])[0]
    assert "of them cached" in took and "of 9 pages]" in took


def test_sampling_and_stop_strings_are_those_of_generate(capsys, folder):
    options = {"temperature": 0.9, "top_k": 40, "seed": 3}
    names = ("--temperature", 0.9, "--top-k", 40, "--seed", 3)
    whole = answers(folder, ["import"], **options)[0]
    stop = whole[4:6]
    _, shown = run(capsys, folder, "--prompt", "import", "--max-tokens", 9, *names, "--stop", stop, "--json")
    assert json.loads(shown.out)["text"] == whole.split(stop)[0]


def test_lines_of_a_terminal_are_answered_until_it_ends(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import\n\n/reset\nimport\n/exit\nnever\n"))
    code, shown = run(capsys, folder, "--max-tokens", 9)
    assert code == 0 and "512 tokens of context" in shown.out and shown.out.count("> ") >= 5
    assert shown.out.count(answers(folder, ["import"])[0]) == 2 and "A new conversation." in shown.out
    monkeypatch.setattr("sys.stdin", io.StringIO("import"))
    assert run(capsys, folder, "--max-tokens", 2)[0] == 0


def test_a_conversation_that_is_full_says_so_and_can_begin_again(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import\n" + "x " * 200 + "\n/reset\nimport\n"))
    code, shown = run(capsys, folder, "--max-tokens", 4, "--context", 60)
    assert code == 0 and "at most 60 fit; /reset" in shown.out
    assert shown.out.count(answers(folder, ["import"], num_new=4)[0]) == 2
    code, shown = run(capsys, folder, "--prompt", "x " * 200, "--context", 60)
    assert code == 2 and "at most 60 fit" in shown.err


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(folder):
    options = cli._parser().parse_args(["chat", "--model", str(folder)])
    found = chat.opened(options, chat.LiveLine(io.StringIO()))
    with found.model.new_cache(num_pages=9, max_sequences=1, max_seq_len=500) as cache:
        talk = chat.Conversation(found, cache, 9, chat.sampling_of(options), [])
        with closing(talk.answer("import")) as pieces:
            first = next(pieces) + next(pieces)
        assert talk.messages[-1] == {"role": "assistant", "content": first}
        assert talk.turn.new_tokens == 2 and talk.turn.text == first
        assert cache.stats().num_sequences == 0
        "".join(talk.answer("and then?"))
        assert talk.turn.cached_tokens > 0
        cache.check()


def test_what_cannot_be_is_one_line(capsys, folder):
    for arguments, words in (
        (["--json"], "--json needs --prompt"),
        (["--max-tokens", 0], "max-tokens"),
        (["--context", 513], "context"),
        (["--prompt", "a", "--top-k", -1], "top_k"),
        (["--prompt", "a", "--stop", ""], "stop"),
    ):
        code, shown = run(capsys, folder, *arguments)
        assert code == 2 and shown.err.startswith("paged-kv: ") and words in shown.err, arguments
    (folder / "tokenizer_config.json").unlink()
    code, shown = run(capsys, folder, "--prompt", "a")
    assert code == 2 and "no chat template" in shown.err


def test_a_bad_message_does_not_end_a_conversation(folder, capsys):
    options = cli._parser().parse_args(["chat", "--model", str(folder), "--max-tokens", "2"])
    found = chat.opened(options, chat.LiveLine(io.StringIO()))
    with found.model.new_cache(num_pages=2, max_sequences=1, max_seq_len=128) as cache:
        talk = chat.Conversation(found, cache, 2, chat.sampling_of(options), [])
        with pytest.raises(ArgumentError, match="128 fit"):
            next(talk.answer("x " * 300))
        assert talk.messages == []
        chat.converse(talk, io.StringIO("import\n"))
        assert len(talk.messages) == 2
