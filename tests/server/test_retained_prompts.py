"""What a client says of its prompt's worth reaches the cache: ttl, breakpoints, and keys that separate."""

import httpx
import pytest
from running import TOKENIZER, served

SYSTEM = "You are a helpful assistant who knows everything there is to know about paged memory. " * 2


def chat(client, content, **fields):
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def cached(client, content):
    """Tokens of a prompt that are there; the question changes nothing but the order of use."""
    return chat(client, content).json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def fill(client, count):
    for i in range(count):
        body = {"prompt": f"{i:03} " * 40, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200


BREAKPOINT = [
    {"type": "text", "text": SYSTEM, "prompt_cache_breakpoint": {"type": "ephemeral"}},
    {"type": "text", "text": " Today is Monday."},
]


@pytest.mark.parametrize(
    ("content", "fields", "is_kept"),
    [
        (SYSTEM, {}, False),
        (SYSTEM, {"prompt_cache_options": {"ttl": "24h"}}, True),
        (SYSTEM, {"prompt_cache_options": {"ttl": 3600}}, True),
        (SYSTEM, {"prompt_cache_retention": "24h"}, True),
        (SYSTEM, {"prompt_cache_retention": "in_memory"}, False),
        (BREAKPOINT, {}, True),
        (BREAKPOINT, {"prompt_cache_options": {"mode": "explicit", "ttl": "1h"}}, True),
    ],
    ids=str,
)
def test_prompts_that_are_worth_keeping_outlive_others(content, fields, is_kept):
    with served(num_pages=50) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        chat(client, content, **fields)
        fill(client, 30)
        assert running.service.engine.cache.stats().num_evictions > 0
        text = SYSTEM if content is SYSTEM else SYSTEM + " It is Tuesday."
        length = len(TOKENIZER.encode(SYSTEM))
        assert (cached(client, text) > length) is is_kept


@pytest.mark.parametrize("ttl", ["soon", "5", "h", "0s", "-1h", "1.5h", "²h", "9999999999h"])
def test_a_ttl_that_is_none_is_refused(ttl):
    with served() as running:
        messages = [{"role": "user", "content": "x"}]
        body = {"messages": messages, "max_tokens": 1, "prompt_cache_options": {"ttl": ttl}}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_cache_options.ttl"


def test_priorities_are_those_of_vllm():
    """Lower ones go first."""
    with served() as running:
        service = running.service
        from paged_kv.server.schemas import CompletionRequest

        for given, expected in ((0, 0), (5, -5), (-5, 5), (-(2**31), 2**31 - 1), (2**31 - 1, 1 - 2**31)):
            body = CompletionRequest(prompt="x", priority=given)
            assert service.prompt(body, [5], b"", 1).priority == expected
