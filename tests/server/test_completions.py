"""/v1/completions and /v1/chat/completions, by plain HTTP."""

import json

import httpx
import pytest
from running import END, NAME, TOKENIZER, pure_model, served

from paged_kv.serving.generate import generate

MODEL = pure_model()


@pytest.fixture(scope="module")
def url():
    with served() as running:
        yield running.url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def expected(ids, max_tokens, **options):
    found = generate(MODEL, [ids], max_new_tokens=max_tokens, stop_ids=(END,), tokenizer=TOKENIZER, **options)
    return found.texts[0]


def events_of(answer):
    """The data of a stream; its last line is [DONE]."""
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
TEXT = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0}


def test_a_completion_has_the_text_that_generate_draws(client):
    answer = client.post("/v1/completions", json={"model": NAME, **TEXT})
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion" and body["model"] == NAME
    assert body["choices"][0]["text"] == expected(TOKENIZER.encode("Once upon"), 12)
    usage = body["usage"]
    assert usage["prompt_tokens"] == 9 and usage["total_tokens"] == 9 + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] + details["cache_write_tokens"] == 9


def test_a_chat_follows_the_template(client):
    body = client.post("/v1/chat/completions", json=CHAT).json()
    ids = TOKENIZER.chat(CHAT["messages"])
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected(ids, 12), "refusal": None}
    assert body["object"] == "chat.completion" and body["usage"]["prompt_tokens"] == len(ids)


def test_a_later_turn_finds_the_earlier_one(client):
    first = client.post("/v1/chat/completions", json={**CHAT, "cache_salt": "turns"})
    assert first.headers["x-paged-kv-cache"].startswith("first; cached=0")
    text = first.json()["choices"][0]["message"]["content"]
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": text},
        {"role": "user", "content": "More"},
    ]
    second = client.post("/v1/chat/completions", json={**CHAT, "messages": messages, "cache_salt": "turns"})
    details = second.json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= first.json()["usage"]["prompt_tokens"]
    assert f"cached={details['cached_tokens']}" in second.headers["x-paged-kv-cache"]
    other = client.post("/v1/chat/completions", json={**CHAT, "messages": messages, "cache_salt": "others"})
    assert other.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_stream_has_the_same_text_and_the_usage_at_its_end(client):
    whole = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(answer)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == whole["finish_reason"] and set(reasons[:-1]) <= {None}
    assert len({event["id"] for event in events}) == 1


def test_a_stream_of_a_completion_has_the_same_text(client):
    whole = client.post("/v1/completions", json=TEXT).json()["choices"][0]
    events = events_of(client.post("/v1/completions", json={**TEXT, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_several_prompts_and_samples_have_places(client):
    body = {**TEXT, "prompt": ["a", "bc"], "n": 2, "temperature": 1, "seed": 3}
    whole = client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["prompt_tokens"] == 3
    texts = ["", "", "", ""]
    for event in events_of(client.post("/v1/completions", json={**body, "stream": True})):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    ids = {**TEXT, "prompt": TOKENIZER.encode("Once upon")}
    assert client.post("/v1/completions", json=ids).json()["choices"][0]["text"] == expected(
        ids["prompt"], 12
    )


def test_a_seed_gives_the_same_text_again(client):
    body = {**CHAT, "temperature": 1.5, "seed": 11, "max_tokens": 30}
    one, same, other = (
        client.post("/v1/chat/completions", json=body | {"seed": seed}).json()["choices"][0]["message"][
            "content"
        ]
        for seed in (11, 11, -12)
    )
    assert one == same != other


def test_log_probabilities_name_tokens_and_bytes(client):
    body = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 4 and all(len(one["top_logprobs"]) == 2 for one in content)
    for one in content:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0
        assert one["bytes"] == list(one["token"].encode())
    events = events_of(client.post("/v1/chat/completions", json={**body, "stream": True}))
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert [one for part in streamed for one in part["content"]] == content
    old = client.post("/v1/completions", json={**TEXT, "logprobs": 2, "max_tokens": 4}).json()["choices"][0]
    assert [len(old["logprobs"][name]) for name in ("tokens", "token_logprobs", "top_logprobs")] == [4] * 3
    assert old["logprobs"]["text_offset"][0] == 0


def test_stop_strings_end_a_text(client):
    whole = client.post("/v1/completions", json={**TEXT, "max_tokens": 40}).json()["choices"][0]["text"]
    stop = whole[8:10]
    cut = client.post("/v1/completions", json={**TEXT, "max_tokens": 40, "stop": stop}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 999}, "is_red": {"type": "boolean"}},
    "required": ["size", "is_red"],
    "additionalProperties": False,
}


def test_an_answer_has_the_form_that_is_required(client):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        body = {**CHAT, "response_format": form, "max_tokens": 300, "temperature": 1, "seed": seed}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"size", "is_red"}
    form = {"type": "regex", "pattern": "(yes|no)"}
    body = {**CHAT, "response_format": form, "temperature": 1}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] in (
        "yes",
        "no",
    )


TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(client, stream):
    choice = {"type": "function", "function": {"name": "paint"}}
    body = {**CHAT, "tools": [TOOL], "tool_choice": choice, "max_tokens": 300, "seed": 1, "stream": stream}
    answer = client.post("/v1/chat/completions", json=body)
    if stream:
        choices = [event["choices"][0] for event in events_of(answer)]
        (call,) = [call for one in choices for call in one["delta"].get("tool_calls", [])]
        reason = choices[-1]["finish_reason"]
    else:
        one = answer.json()["choices"][0]
        (call,), reason = one["message"]["tool_calls"], one["finish_reason"]
        assert one["message"]["content"] is None
    assert reason == "tool_calls" and call["type"] == "function" and call["id"]
    assert call["function"]["name"] == "paint"
    assert set(json.loads(call["function"]["arguments"])) == {"size", "is_red"}


def test_tokens_go_out_and_come_back(client):
    text = "Füße <turn>"
    found = client.post("/tokenize", json={"prompt": text}).json()
    assert found["count"] == len(found["tokens"]) and found["tokens"] == TOKENIZER.encode(text)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    assert chat["tokens"] == TOKENIZER.chat(CHAT["messages"])


def test_the_models_and_the_health_are_shown(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == NAME and model["max_model_len"] == 2048
    assert client.get("/health").status_code == 200


#: (route, body or its change, status, what the message says, the field)
WRONG = {
    "no messages": ("chat/completions", {"messages": []}, 400, "messages", "messages"),
    "a message without a role": (
        "chat/completions",
        {"messages": [{"content": "x"}]},
        400,
        "role",
        "messages.0.role",
    ),
    "an image": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "image_url",
        "messages",
    ),
    "another model": ("chat/completions", {"model": "gpt"}, 404, "gpt", "model"),
    "too many samples": ("chat/completions", {"n": 17}, 400, "16", "n"),
    "too hot": ("chat/completions", {"temperature": -1}, 400, "0", "temperature"),
    "a temperature that is none": ("chat/completions", {"temperature": "hot"}, 400, "number", "temperature"),
    "an integer that is text": ("chat/completions", {"max_tokens": "5"}, 400, "integer", "max_tokens"),
    "no tokens": ("chat/completions", {"max_tokens": 0}, 400, "1", "max_tokens"),
    "more than the context": ("chat/completions", {"max_tokens": 5000}, 400, "2048", None),
    "a long prompt": ("completions", {"prompt": "x" * 3000}, 400, "2048", None),
    "an id that is none": ("completions", {"prompt": [5000]}, 400, "5000", None),
    "no prompt": ("completions", {"prompt": []}, 400, "prompt", None),
    "an empty prompt": ("completions", {"prompt": ""}, 400, "empty", None),
    "a bias": ("chat/completions", {"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias"),
    "a penalty": ("completions", {"presence_penalty": 1}, 400, "presence_penalty", "presence_penalty"),
    "echo": ("completions", {"echo": True}, 400, "echo", "echo"),
    "too many stops": ("completions", {"stop": ["x"] * 17}, 400, "16", None),
    "an empty stop": ("completions", {"stop": ""}, 400, "stop", None),
    "top_logprobs alone": ("chat/completions", {"top_logprobs": 2}, 400, "logprobs", "top_logprobs"),
    "stream options alone": ("completions", {"stream_options": {}}, 400, "stream", "stream_options"),
    "an unknown form": (
        "chat/completions",
        {"response_format": {"type": "xml"}},
        400,
        "xml",
        "response_format",
    ),
    "a schema that is none": (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        400,
        "grammar",
        None,
    ),
    "a tool that is none": ("chat/completions", {"tool_choice": "required"}, 400, "no tools", "tool_choice"),
    "another tool": (
        "chat/completions",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        400,
        "paint",
        "tool_choice",
    ),
    "a ttl that is none": (
        "chat/completions",
        {"prompt_cache_options": {"ttl": "soon"}},
        400,
        "soon",
        "prompt_cache_options.ttl",
    ),
    "half a surrogate": ("completions", {"prompt": "\ud800"}, 400, "text", None),
}


@pytest.mark.parametrize(("route", "change", "status", "words", "param"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_openais_form(client, route, change, status, words, param):
    body = (CHAT if route.startswith("chat") else TEXT) | change
    answer = client.post(
        f"/v1/{route}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/nothing", b"", 404),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400),
        ("POST", "/tokenize", b"{}", 400),
        ("POST", "/detokenize", b'{"tokens": [258]}', 400),
        ("POST", "/detokenize", b'{"tokens": [99999999999999999999]}', 400),
    ],
)
def test_what_is_no_request_is_refused_in_the_same_form(client, method, path, content, status):
    answer = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
