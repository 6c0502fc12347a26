"""The routes: completions, chats, embeddings, models, health."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from jpq_export import __version__
from jpq_export.errors import JpqError, UsageError
from jpq_export.runtime.batching import Sequence
from jpq_export.runtime.bundle import Bundle
from jpq_export.serve.answers import (
    Form,
    Refusal,
    embeddings_body,
    error_body,
    event,
    json_response,
    refusal_of,
    refusal_response,
)
from jpq_export.serve.embedder import Embedder
from jpq_export.serve.guard import Guard
from jpq_export.serve.requests import ChatBody, CompletionBody, EmbeddingBody, Generation
from jpq_export.serve.worker import BusyError, Job, Piece, ServerError, Worker

DONE = "data: [DONE]\n\n"
CLIENT_LEFT = 499  # as nginx counts it; nobody reads this
T = TypeVar("T")
router = APIRouter()


@dataclass(frozen=True)
class Service:
    """What is served: a bundle under the name `model`, by the thread that fits its kind."""

    bundle: Bundle
    model: str
    thread: Worker | Embedder
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def worker(self) -> Worker:
        """UsageError for a sentence encoder."""
        if not isinstance(self.thread, Worker):
            raise UsageError(f"{self.model} is a sentence encoder, it generates no text; use /v1/embeddings")
        return self.thread

    @property
    def embedder(self) -> Embedder:
        """UsageError for a text generator."""
        if not isinstance(self.thread, Embedder):
            raise UsageError(f"{self.model} generates text, it has no embeddings; serve a sentence encoder")
        return self.thread

    def check_model(self, name: str) -> None:
        """Refuse another model's name: its answers would not be what was asked for."""
        if name != self.model:
            raise Refusal(404, f"model {name!r} is not served here; use {self.model!r}", code="model_not_found")


def make_service(bundle: Bundle, *, model: str, slots: int, queue: int) -> Service:
    """Start the thread for a bundle: `slots` sequences run at a time, `queue` others (or texts' requests) wait."""
    embeds = bundle.encoder is not None
    return Service(bundle, model, Embedder(bundle, queue=queue) if embeds else Worker(bundle, slots=slots, queue=queue))


def make_app(service: Service, *, api_key: str | None = None, local: bool = True) -> FastAPI:
    """The application; `local` and `api_key` as in `Guard`. Its end closes the service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.thread.close)

    app = FastAPI(title="jpq-export", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    for kind in (JpqError, BusyError, ServerError, Refusal):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _refuse_unforeseen)
    app.add_middleware(Guard, api_key=api_key, local=local)
    return app


@router.get("/health")
async def health(request: Request) -> Response:
    """What runs and what waits; needs no key."""
    running, waiting = request.app.state.service.thread.load
    return json_response({"status": "ok", "running": running, "waiting": waiting})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model."""
    return json_response({"object": "list", "data": [_model(request.app.state.service)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """The one model, by name."""
    service: Service = request.app.state.service
    service.check_model(name)
    return json_response(_model(service))


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue prompts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    encode = service.bundle.encode
    worker = service.worker
    prompts = await asyncio.to_thread(lambda: [encode(text) if isinstance(text, str) else text for text in body.prompt])
    sequences = make_sequences(service, body, prompts, body.max_tokens)
    return await _answer(request, worker, body, sequences, Form(body.model, False, sum(map(len, prompts))))


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer messages."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    worker = service.worker
    messages = [message.plain() for message in body.messages]
    ids = await asyncio.to_thread(service.bundle.encode_chat, messages, where=service.model)
    room = max(service.bundle.capacity - len(ids), 1)  # 1 for a prompt without room, which is refused as such
    new = body.max_completion_tokens or body.max_tokens or room
    sequences = make_sequences(service, body, [ids], new)
    return await _answer(request, worker, body, sequences, Form(body.model, True, len(ids)))


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Embed texts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    embedder, bundle = service.embedder, service.bundle
    dimension = bundle.encoder.dimension if bundle.encoder else None
    if body.dimensions not in (None, dimension):
        raise Refusal(400, f"dimensions: got {body.dimensions}, this model has {dimension}; leave it out")
    rows = await asyncio.to_thread(
        lambda: [bundle.encode(text) if isinstance(text, str) else text for text in body.input]
    )
    vectors = await unless_left(request, embedder.embed(rows))
    if vectors is None:
        return Response(status_code=CLIENT_LEFT)
    tokens = sum(map(len, rows))
    return json_response(embeddings_body(vectors, model=body.model, tokens=tokens, form=body.encoding_format))


def make_sequences(service: Service, body: Generation, prompts: list[list[int]], new: int) -> list[Sequence]:
    """`body.n` continuations of every prompt; Refusal when they are more than the server ever takes."""
    if len(prompts) * body.n > service.worker.most:
        raise Refusal(
            400,
            f"{len(prompts)} prompts times n = {body.n}: the server takes at most {service.worker.most} at once; "
            "send several requests",
        )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    options = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "stop": body.stop}
    return [
        service.bundle.sequence(ids, max_new_tokens=new, seed=seed + turn, **options)
        for ids in prompts
        for turn in range(body.n)
    ]


class EventStream(StreamingResponse):
    """A job's events. However it ends, the job's slots are free afterwards."""

    def __init__(self, worker: Worker, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._worker, self._job = worker, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send; ends early when the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)


async def _answer(
    request: Request, worker: Worker, body: Generation, sequences: list[Sequence], form: Form
) -> Response:  # fmt: skip
    job = Job(sequences)
    worker.submit(job)
    if body.stream:
        return EventStream(worker, job, _events(job, form, with_usage=body.stream_options.include_usage))
    try:
        pieces = await unless_left(request, _all(job))
    finally:
        worker.cancel(job)
    return Response(status_code=CLIENT_LEFT) if pieces is None else json_response(form.whole(pieces, job))


async def _events(job: Job, form: Form, *, with_usage: bool) -> AsyncIterator[str]:
    for chunk in form.opening(job):
        yield event(chunk)
    try:
        async for piece in job.pieces():
            yield event(form.part(piece))
    except ServerError as error:  # the status was sent long ago
        yield event(error_body(refusal_of(error)))
        return
    if with_usage:
        yield event(form.closing(job))
    yield DONE


async def _all(job: Job) -> list[Piece]:
    return [piece async for piece in job.pieces()]


async def unless_left(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and an end to it, when the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body was read: only the end of the connection can come
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


def _model(service: Service) -> dict[str, Any]:
    facts = {"id": service.model, "object": "model", "created": service.created, "owned_by": "jpq-export"}
    return facts | {"context_length": service.bundle.capacity}


async def _refuse(_request: Request, error: Exception) -> Response:
    return refusal_response(refusal_of(error))


async def _refuse_body(_request: Request, error: Exception) -> Response:
    """One line for a body that is no JSON or has wrong fields."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    lines, params = [], []
    for problem in problems[:3]:
        place = ".".join(str(part) for part in problem["loc"][1:])
        said = {"extra_forbidden": "not supported here; leave it out", "missing": "missing"}
        lines.append(f"{place}: {said.get(problem['type'], problem['msg'].removeprefix('Value error, '))}")
        params.append(place)
    return refusal_response(Refusal(400, "; ".join(lines), param=params[0] if params else None))


async def _refuse_route(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    routes = "POST /v1/completions, /v1/chat/completions, /v1/embeddings; GET /v1/models, /health"
    return refusal_response(Refusal(status, f"{detail}; there is {routes}" if status in (404, 405) else detail))


async def _refuse_unforeseen(_request: Request, _error: Exception) -> Response:
    return refusal_response(Refusal(500, "the server failed; its log says why", code="server_error"))
