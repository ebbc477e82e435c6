"""Text to ids and back: what a person types is text, and characters come whole."""

import json
import threading

import pytest
from family import fields_of, save, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.models.bitnet import TINY_BITNET
from paged_kv.text.chat_template import ChatTemplate
from paged_kv.text.tokenizer import ModelTokenizer, begin_ids, open_tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

BEGIN, END = 0, 1
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def plain():
    return open_tokenizer(TINY_BITNET / "tokenizer.json")


def with_turns(**flags):
    """The small model's tokenizer with two special tokens more."""
    made = plain()
    made.add_special_tokens([tokenizers.AddedToken(f"<|im_{name}|>", **flags) for name in ("start", "end")])
    return made


@pytest.fixture(scope="module")
def chat():
    return ModelTokenizer(with_turns(), [BEGIN], ChatTemplate(TEMPLATE, {}))


def test_a_text_is_behind_what_the_model_expects(chat):
    assert chat.encode("import os") == [BEGIN, *plain().encode("import os").ids]
    assert ModelTokenizer(plain()).encode("import os") == plain().encode("import os").ids


def test_a_special_token_in_a_text_is_text(chat):
    text = "a<|im_end|>b"
    assert chat.encode(text) == [BEGIN, *plain().encode(text).ids]
    assert chat.encode(text, special_tokens=True) == [BEGIN, *with_turns().encode(text).ids]
    assert chat.decode(chat.encode(text)) == text


def test_a_conversation_is_what_the_template_says(chat):
    messages = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Yes?"}]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    assert chat.chat(messages, add_generation_prompt=False) == with_turns().encode(rendered).ids
    assert chat.chat(messages) == with_turns().encode(rendered + "<|im_start|>assistant\n").ids


@pytest.mark.parametrize(
    "content", ["<|im_end|>", "a <|im_start|><|im_end|>\n\n b", "\uf8f0<|im_end|>", "<|im_<|im_end|>"]
)
def test_a_turn_that_a_person_types_ends_none(chat, content):
    ids = chat.chat([{"role": "user", "content": content}])
    special = [id for id in ids if id >= plain().get_vocab_size()]
    start, end = (with_turns().token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    assert special == [start, end, start]
    shown = chat.decode(ids, special_tokens=True)
    assert shown == f"<|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"


@given(
    parts=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", " ", "\n", "é", "x", "\uf8f1"]), max_size=9
    )
)
def test_any_content_has_the_turns_of_the_template(parts):
    tokenizer = ModelTokenizer(with_turns(), [], ChatTemplate(TEMPLATE.replace(" | trim", ""), {}))
    content = "".join(parts)
    ids = tokenizer.chat([{"role": "user", "content": content}], add_generation_prompt=False)
    assert sum(id >= plain().get_vocab_size() for id in ids) == 2
    assert tokenizer.decode(ids, special_tokens=True) == f"<|im_start|>user\n{content}<|im_end|>\n"


def test_special_tokens_that_take_white_space_take_it():
    """As Phi's, with rstrip; in a conversation where a person has typed a special token too."""
    made = with_turns(rstrip=True, lstrip=True)
    tokenizer = ModelTokenizer(made, [], ChatTemplate(TEMPLATE, {}))
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "<|im_end|>"}]
    first = tokenizer.chat(messages[:1], add_generation_prompt=False)
    both = tokenizer.chat(messages, add_generation_prompt=False)
    assert both[: len(first)] == first


def test_what_is_no_conversation_is_refused(chat):
    for messages in ("hi", [], {}, [{"content": "x"}], ["hi"], [{"role": 5}]):
        with pytest.raises(ArgumentError, match="messages"):
            chat.chat(messages)
    with pytest.raises(ArgumentError, match="no chat template"):
        ModelTokenizer(plain()).chat([{"role": "user", "content": "x"}])
    everything = "".join(chr(code) for code in range(0xF8F0, 0xF8FF))
    with pytest.raises(ArgumentError, match=r"U\+F8F0"):
        chat.chat([{"role": "user", "content": "<|im_end|>" + everything}])


def test_a_text_that_is_none_is_refused(chat):
    for text in (5, b"x", "\ud800"):
        with pytest.raises(ArgumentError, match="is no text"):
            chat.encode(text)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_stream_gives_the_text_in_whole_characters(text):
    tokenizer = ModelTokenizer(plain())
    stream, ids = tokenizer.stream(), tokenizer.encode(text)
    pieces = [stream.add(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


@given(st.lists(st.integers(0, 2047), max_size=40))
def test_a_stream_of_any_ids_is_their_text(ids):
    """Bytes that are no characters included; the two ways give the same text."""
    tokenizer = ModelTokenizer(plain())
    slow = tokenizer.stream()
    slow._pieces = None
    for stream in (tokenizer.stream(), slow):
        assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)


def test_half_a_character_is_shown_at_the_end():
    tokenizer = ModelTokenizer(plain())
    ids = tokenizer.encode("a🙂")
    stream = tokenizer.stream()
    assert (
        "".join(map(stream.add, ids[:-1])) == "a" and stream.finish() == tokenizer.decode(ids[:-1])[1:] != ""
    )


def test_threads_share_one(chat):
    text, wrong = "a<|im_end|>b" * 20, []
    expected = {flag: chat.encode(text, special_tokens=flag) for flag in (False, True)}

    def encode(flag):
        for _ in range(50):
            if chat.encode(text, special_tokens=flag) != expected[flag]:
                wrong.append(flag)

    threads = [threading.Thread(target=encode, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- folders


@pytest.fixture
def folder(tmp_path):
    fields = fields_of("llama") | {"vocab_size": 4096}
    save(tmp_path, fields, tensors_of(fields))
    with_turns().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


SETTINGS = {
    "in the config": ({"chat_template": "{{ bos_token }}{{ messages[0].content }}"}, None, "<|im_start|>Hi"),
    "one of several": (
        {"chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]},
        None,
        "yes",
    ),
    "a file of its own": ({"chat_template": "no"}, "{{ eos_token }}", "<|im_end|>"),
}


@pytest.mark.parametrize(("settings", "file", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_the_template_of_a_folder_is_found(folder, settings, file, expected):
    tokens = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    tokenizer = ModelTokenizer.from_pretrained(folder)
    assert (
        tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hi"}]), special_tokens=True) == expected
    )


def test_a_folder_without_a_template_has_none(folder):
    assert ModelTokenizer.from_pretrained(folder).chat_template is None


#: What the tokenizer's post-processor adds, add_bos_token, and what begins a prompt then.
BEGINNINGS = {
    "nothing is said": ([], None, []),
    "the config says so": ([], True, [BEGIN]),
    "the tokenizer adds it": ([BEGIN], None, [BEGIN]),
    "both": ([BEGIN], True, [BEGIN]),
    "the config forbids it": ([BEGIN], False, []),
    "two tokens": ([END, BEGIN], None, [END, BEGIN]),
}


@pytest.mark.parametrize(("added", "add_bos_token", "expected"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_prompt_begins_as_the_model_was_trained(tmp_path, added, add_bos_token, expected):
    """A begin token that a model never saw gives wrong text, silently."""
    processed = plain()
    if added:
        processors = tokenizers.processors
        tokens = [(processed.id_to_token(id), id) for id in added]
        template = " ".join(name for name, _ in tokens) + " $A"
        processed.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    if add_bos_token is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add_bos_token}))
    assert begin_ids(tmp_path, processed, BEGIN) == expected


@pytest.mark.parametrize("content", ["[", "[1]", '{"add_bos_token": "yes"}'])
def test_a_tokenizer_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"tokenizer_config\.json"):
        begin_ids(tmp_path, plain(), BEGIN)
