"""The app: routes of OpenAI's API, and what keeps a failure from being shown or from spreading.

    Limits (key, body) ── route ── worker thread: tokenize, submit ── Handle ── whole answer, or events

Imports completions, responses, stream and limits.
"""

from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ..errors import PagedKVError
from .completions import (
    ChatAnswer,
    CompletionAnswer,
    cache_headers,
    chat_prompt,
    completion_prompts,
)
from .errors import ApiError, api_error, refused
from .limits import MAX_BODY_BYTES, MAX_SECONDS, Limits
from .metrics import Metrics
from .pool import HEADERS, Feed, page
from .responses import ResponseAnswer, response_prompt
from .schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from .service import Service, Submitted, plain
from .stream import EventStream, unless_left

#: What every route may answer beside its own.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request is wrong, or too large for the model or the pool.",
        401: "The API key is missing or unknown.",
        404: "There is no such route or model.",
        405: "The route takes another method.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to come again.",
        501: "An extra is missing.",
        503: "The server ends.",
        504: "The request was not done in time.",
    }.items()
}


def create_app(
    service: Service,
    *,
    api_keys: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_seconds: float = MAX_SECONDS,
) -> FastAPI:
    """The ASGI app of a service.

    api_keys : one of them is needed, by all but /health; none: none is
    max_body_bytes, max_seconds : of a request's body, and for it to come
    """

    app = FastAPI(title="paged_kv", version="1", docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_middleware(Limits, api_keys=api_keys, max_body_bytes=max_body_bytes, max_seconds=max_seconds)
    _add_handlers(app)
    _add_generation(app, service)
    _add_queries(app, service)
    return app


def _add_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def of_known(request: Request, error: Exception) -> Response:
        return answer(api_error(error))

    async def of_fields(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # Where a field may be of several types, the others only say that it is none of theirs.
        first = min(error.errors(), key=lambda one: one["type"].endswith("_type"))
        place = _place(first["loc"][1:], error.body)
        return answer(refused(f"{place or 'the body'}: {first['msg']}"[:500], place or None))

    async def of_routes(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return answer(ApiError(error.status_code, str(error.detail)))

    app.add_exception_handler(ApiError, of_known)
    app.add_exception_handler(PagedKVError, of_known)
    app.add_exception_handler(ImportError, of_known)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_routes)


def _place(parts: tuple[Any, ...], body: Any) -> str:
    """The field that an error is about, without the types that were tried on it."""
    found = list[str]()
    for part in parts:
        is_there = isinstance(body, dict | list) and (
            part in body if isinstance(body, dict) else type(part) is int
        )
        if not is_there and isinstance(body, dict) and part == parts[-1] and len(found) == len(parts) - 1:
            return ".".join([*found, str(part)])  # a field that is missing
        if not is_there:
            break
        found.append(str(part))
        body = body[part]
    return ".".join(found)


def _add_generation(app: FastAPI, service: Service) -> None:
    def submitted(prompts: Callable[[], list[Any]]) -> list[Submitted]:
        """Submit all prompts of a request, or none."""
        done: list[Submitted] = []
        try:
            for prompt in prompts():
                done.append(service.submit(prompt))
        except BaseException:
            for one in done:
                one.handle.cancel()
            raise
        return done

    async def answered(
        request: Request, answer: Any, whole: Callable[[], Any], headers: dict[str, str]
    ) -> Response:
        handles = [one.handle for one in answer]

        async def all_done() -> None:
            for handle in handles:
                await handle.wait()

        if not await unless_left(request.receive, handles, all_done()):
            return Response(status_code=499)  # which no client reads
        return JSONResponse(whole(), headers=headers)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Any:
        _require_model(service, body.model)
        key = request.scope["paged_kv_key"]
        found = await service.run(lambda: submitted(lambda: [chat_prompt(service, body, key)]))
        answer = ChatAnswer(service, found, body)
        if body.stream:
            return EventStream(answer.events(body), answer.handles, cache_headers(found))
        return await answered(request, found, lambda: answer.whole(answer.choices()), cache_headers(found))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        _require_model(service, body.model)
        key = request.scope["paged_kv_key"]
        found = await service.run(lambda: submitted(lambda: completion_prompts(service, body, key)))
        answer = CompletionAnswer(service, found, body)
        if body.stream:
            return EventStream(answer.events(body), answer.handles, cache_headers(found))
        return await answered(request, found, lambda: answer.whole(answer.choices()), cache_headers(found))

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Any:
        _require_model(service, body.model)
        key = request.scope["paged_kv_key"]
        found = await service.run(lambda: submitted(lambda: [response_prompt(service, body, key)]))
        answer = ResponseAnswer(service, found[0], body)
        if body.stream:
            return EventStream(answer.events(), [answer.handle], cache_headers(found))
        return await answered(request, found, answer.whole, cache_headers(found))


def _require_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise ApiError(
            404,
            f"there is no model {name!r:.100}; this server has {service.name!r}",
            param="model",
            code="model_not_found",
        )


def _add_queries(app: FastAPI, service: Service) -> None:
    engine, metrics, feed = service.engine, Metrics(service), Feed(service)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        config = engine.model.config
        model = {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "paged_kv",
            "max_model_len": min(config.max_position_embeddings, engine.cache.max_seq_len),
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.is_open else 503)

    @app.get("/", response_class=HTMLResponse)
    async def pool() -> Response:
        return HTMLResponse(page(), headers=HEADERS)

    @app.get("/pool/frames", response_model=None)
    async def frames() -> Response:
        return EventStream(feed.frames(), [], {})

    @app.get("/metrics")
    async def exposed() -> Response:
        return PlainTextResponse(metrics.text(), media_type=metrics.media_type)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise refused("give exactly one of prompt and messages", "prompt")

        def work() -> list[int]:
            if body.messages is not None:
                messages = [plain(message) for message in body.messages]
                return service.chat_ids(messages, add_generation_prompt=body.add_generation_prompt)
            ids = service.tokenizer.encode(body.prompt or "")
            return ids if body.add_special_tokens else ids[len(service.tokenizer.begin_ids) :]

        ids = await service.run(work)
        return {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": engine.model.config.max_position_embeddings,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        size = engine.model.config.vocab_size
        for i, id in enumerate(body.tokens):
            if id >= size:
                raise refused(f"tokens[{i}] is {id}; ids lie outside 0 to {size - 1}", "tokens")
        return {
            "prompt": await service.run(lambda: service.tokenizer.decode(body.tokens, special_tokens=True))
        }
