"""What clients send: the fields of OpenAI's API that are served, and vLLM's additions to it.

A field that is not listed is ignored, as those servers do; one that is listed and would change the answer in
a way that is not built is refused by the route, never ignored.

Imports pydantic (the extra `serve`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

#: Samples of a request, stop strings of it, and tokens beside each one.
MAX_N, MAX_STOPS, MAX_TOP_LOGPROBS = 16, 16, 20
#: Messages, blocks of a message, tools, prompts of one request, and ids of one.
MAX_ITEMS, MAX_PROMPTS, MAX_IDS = 4096, 64, 1_000_000

Number = Annotated[float, Field(allow_inf_nan=False)]
Stops = Annotated[list[StrictStr], Field(max_length=MAX_STOPS)]
Id = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]


class Body(BaseModel):
    """Fields beyond those of a class are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    include_usage: StrictBool = False


class CacheOptions(Body):
    """How long the pages of a prompt are worth keeping.

    ttl : seconds, or as "30m"
    """

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: Annotated[StrictInt, Field(ge=1, le=10**9)] | StrictStr | None = None


class Kept(Body):
    """What every request may say of the cache, of its order and of the generator."""

    model: StrictStr | None = None
    stream: StrictBool = False
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1, le=100)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[StrictStr, Field(max_length=1024)] | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=1024)] | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: StrictStr | None = None


class Sampled(Kept):
    """What chat and completions have in common."""

    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    stop: StrictStr | Stops | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: StrictBool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None


class Message(Body):
    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] | None = None
    tool_call_id: StrictStr | None = None


class Function(Body):
    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_ITEMS)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    modalities: list[StrictStr] | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: StrictBool = False
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None


class ResponsesRequest(Kept):
    """POST /v1/responses."""

    input: StrictStr | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    previous_response_id: StrictStr | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation."""

    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[Id], Field(max_length=MAX_IDS)]
