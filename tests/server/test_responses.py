"""/v1/responses, and all three APIs by the official client."""

import json

import httpx
import pytest
from running import NAME, TOKENIZER, served

openai = pytest.importorskip("openai")

SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def url():
    with served() as running:
        yield running.url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_chats(client):
    messages = [{"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, temperature=0)
    assert whole.usage.completion_tokens == 9 and whole.choices[0].finish_reason == "length"
    details = whole.usage.prompt_tokens_details
    assert details.cached_tokens + details.cache_write_tokens == len(TOKENIZER.chat(messages))
    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        max_completion_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 9


def test_the_official_client_completes_and_lists_models(client):
    answer = client.completions.create(model=NAME, prompt="a", max_tokens=4, logprobs=1)
    assert len(answer.choices[0].logprobs.tokens) == 4
    assert [model.id for model in client.models.list()] == [NAME]


def test_the_official_client_reads_errors(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="2048") as error:
        client.completions.create(model=NAME, prompt="a" * 3000)
    assert error.value.code == "context_length_exceeded"


def test_a_tool_call_comes_back_parsed(client):
    tool = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        tools=[tool],
        tool_choice="required",
        max_tokens=300,
        seed=1,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint" and set(json.loads(call.function.arguments)) == {"size"}


def test_a_response_has_text_and_usage(client):
    answer = client.responses.create(
        model=NAME, input="Hello", instructions="Be kind", max_output_tokens=9, temperature=0
    )
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    assert answer.usage.input_tokens == len(TOKENIZER.chat(messages))
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    details = answer.usage.input_tokens_details
    assert details.cached_tokens + details.cache_write_tokens == answer.usage.input_tokens
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, temperature=0)
    assert answer.output_text == chat.choices[0].message.content


def test_a_stream_of_a_response_ends_with_it_whole(client):
    given = {"model": NAME, "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}
    whole = client.responses.create(**given, max_output_tokens=9, temperature=0)
    events = list(client.responses.create(**given, max_output_tokens=9, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_calls_a_tool(client, stream):
    tool = {"type": "function", "name": "paint", "parameters": SCHEMA}
    given = {"model": NAME, "input": "x", "tools": [tool], "tool_choice": "required", "temperature": 0}
    answer = client.responses.create(**given, max_output_tokens=300, stream=stream)
    if stream:
        answer = list(answer)[-1].response
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "paint"
    assert set(json.loads(call.arguments)) == {"size"}
    later = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert client.responses.create(model=NAME, input=later, max_output_tokens=3).usage.output_tokens <= 3


def test_a_response_has_the_form_that_is_required(client):
    form = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    answer = client.responses.create(
        model=NAME, input="x", text={"format": form}, max_output_tokens=300, temperature=0
    )
    assert set(json.loads(answer.output_text)) == {"size"}


#: (change, what the message says)
REFUSED = {
    "an earlier response": ({"previous_response_id": "resp_1"}, "keeps none"),
    "one that is stored": ({"store": True}, "keeps none"),
    "one in the background": ({"background": True}, "keeps none"),
    "a conversation": ({"conversation": "conv_1"}, "keeps none"),
    "an item that is none": ({"input": [{"type": "reasoning"}]}, "reasoning"),
    "a call without its id": ({"input": [{"type": "function_call", "name": "x"}]}, "call_id|arguments"),
    "a tool of the host": ({"tools": [{"type": "web_search"}]}, "functions are all"),
    "a form that is none": ({"text": {"format": {"type": "xml"}}}, "xml"),
    "a file": ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused(client, change, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**({"model": NAME, "input": "x", "max_output_tokens": 3} | change))


def test_store_may_be_false(client):
    assert client.responses.create(model=NAME, input="x", store=False, max_output_tokens=2).store is False


def test_the_async_client_streams(url):
    import asyncio

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(i):
                stream = await client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": str(i)}], max_tokens=5, stream=True
                )
                return [chunk async for chunk in stream]

            return await asyncio.gather(*(ask(i) for i in range(8)))

    answers = asyncio.run(main())
    assert all(chunks[-1].choices[0].finish_reason for chunks in answers)


def test_curl_of_the_documentation_works(url):
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 20}'
    answer = httpx.post(
        f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
