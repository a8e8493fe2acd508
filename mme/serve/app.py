"""The HTTP interface: its requests, answers and errors.

    POST /recommend   lists of items for histories
    GET  /health      200 while a model serves
    GET  /metrics     Prometheus
    GET  /docs        OpenAPI

A wrong request gets 422 and names the field; a full queue gives 503 with Retry-After, and a body that is too large 413. No
field of a request names a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException

from mme import __version__
from mme.errors import UserError, one_line
from mme.inference.requests import RecommendationRequest, as_table
from mme.serve.batching import Batcher, QueueFull
from mme.serve.holder import ModelHolder

ItemId = int | str
MAX_EVENTS = 100_000  # per history
MAX_HISTORIES = 1_024  # per request
MAX_K = 1_000
MAX_ERRORS = 10  # named in one answer
MAX_LISTED = 1_000_000  # candidates or blocked items per request


class History(BaseModel):
    """One user's events, oldest first. Further fields are feature columns by name."""

    model_config = ConfigDict(extra="allow")

    item_ids: list[ItemId] = Field(max_length=MAX_EVENTS)
    timestamps: list[int] = Field(max_length=MAX_EVENTS, description="Seconds since 1970, one per item.")
    user_id: int | str | None = None
    request_timestamp: int | None = Field(None, description="Time of the list. Default: the last event's time.")

    @model_validator(mode="after")
    def _as_many_times_as_items(self) -> History:
        if len(self.item_ids) != len(self.timestamps):
            raise ValueError(
                f"{len(self.item_ids)} item_ids and {len(self.timestamps)} timestamps: expected equal numbers"
            )
        return self


class RecommendBody(BaseModel):
    """The body of `POST /recommend`."""

    model_config = ConfigDict(extra="forbid")

    histories: list[History] = Field(min_length=1, max_length=MAX_HISTORIES)
    k: int = Field(10, ge=1, le=MAX_K)
    exclude_seen: bool = True
    candidates: list[ItemId] | None = Field(None, max_length=MAX_LISTED, description="Rank these items only.")
    blocked: list[ItemId] = Field(
        default_factory=list, max_length=MAX_LISTED, description="Never recommend these items."
    )
    unknown: Literal["skip", "refuse"] = Field(
        "skip", description="Items that the model does not know: skip ignores them, refuse is an error."
    )


class Recommendation(BaseModel):
    """One history's list, best item first."""

    user_id: int | str | None = None
    item_ids: list[ItemId]
    scores: list[float]
    fallback: bool = Field(description="The history has no known item, so these are the most popular items.")


class RecommendAnswer(BaseModel):
    """The answer of `POST /recommend`, in the order of the histories."""

    model: str
    results: list[Recommendation]
    unknown_items: int


@dataclass(frozen=True)
class ServeSettings:
    """Limits and intervals of the server.

    Attributes:
        max_batch: number of histories that are encoded together.
        max_wait_ms: time that the first request of a batch waits for others if the last batch had several.
        max_waiting: number of histories that may wait; further requests get 503.
        reload_every_s: interval between checks for a newer model; 0: never.
        max_body_bytes: maximum size of a request's body.
    """

    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_waiting: int = 2_048
    reload_every_s: float = 5.0
    max_body_bytes: int = 16 << 20


def create_app(holder: ModelHolder, settings: ServeSettings) -> FastAPI:
    """The application that serves the holder's model."""
    measures = _Measures(holder)
    batcher = Batcher(
        holder.rank, settings.max_batch, settings.max_wait_ms / 1e3, settings.max_waiting, measures.batch_size.observe
    )
    measures.registry_gauge("mme_waiting_histories", "Histories in the queue", lambda: batcher.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run())]
        if settings.reload_every_s:
            tasks.append(asyncio.create_task(_reload(holder, settings.reload_every_s, measures)))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="mme", version=__version__, summary="Recommendations of a trained model", lifespan=lifespan)

    @app.exception_handler(StarletteHTTPException)
    async def undecodable(request: Request, error: StarletteHTTPException) -> Response:
        """Turns FastAPI's 400 for a body that is not UTF-8 into the 422 of a body that is not JSON."""
        if error.status_code == 400:
            return _unprocessable([{"loc": ["body"], "msg": error.detail, "type": "json_invalid"}])
        return await http_exception_handler(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        """FastAPI's own answer repeats the values that were sent, of which NaN and unpaired surrogates are not JSON."""
        return _unprocessable(error.errors()[:MAX_ERRORS])

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        too_large = await _too_large(request, settings.max_body_bytes)
        start = time.perf_counter()
        response = too_large or await call_next(request)
        if request.url.path == "/recommend":
            measures.requests.labels(str(response.status_code)).inc()
            measures.latency.observe(time.perf_counter() - start)
        return response

    @app.post("/recommend", response_model=RecommendAnswer)
    async def recommend(body: RecommendBody) -> Any:
        try:
            histories = as_table([history.model_dump(exclude_none=True) for history in body.histories])
            request = RecommendationRequest(
                histories, body.k, body.exclude_seen, body.candidates, body.blocked, body.unknown
            )
            answer = await batcher.submit(request)
        except QueueFull as error:
            raise HTTPException(503, "too many requests are waiting", headers={"Retry-After": "1"}) from error
        except UserError as error:
            return _unprocessable([{"loc": ["body", "histories"], "msg": str(error), "type": "value_error"}])
        results = [
            Recommendation(user_id=history.user_id, item_ids=items, scores=scores, fallback=fallback)
            for history, items, scores, fallback in zip(
                body.histories, answer.item_ids, answer.scores, answer.fallback, strict=True
            )
        ]
        return RecommendAnswer(model=answer.model, results=results, unknown_items=answer.unknown_items)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": holder.name, "items": holder.num_items}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Measures:
    """The metrics for `/metrics`, in a separate registry, so that one process can hold several applications."""

    def __init__(self, holder: ModelHolder) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mme_requests", "Requests by status", ["status"], registry=self.registry)
        self.latency = Histogram("mme_request_seconds", "Time to answer", registry=self.registry)
        self.batch_size = Histogram(
            "mme_batch_histories",
            "Histories encoded together",
            registry=self.registry,
            buckets=[2**n for n in range(11)],
        )
        self.reloads = Counter("mme_reloads", "Reloads by outcome", ["outcome"], registry=self.registry)
        self.registry_gauge("mme_items", "Items that the model knows", lambda: holder.num_items)

    def registry_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)


async def _reload(holder: ModelHolder, every_s: float, measures: _Measures) -> None:
    """Loads newer models periodically; the current one serves until the newer one is ready."""
    while True:
        await asyncio.sleep(every_s)
        outcome = await asyncio.to_thread(holder.reload)
        if outcome is not None:
            measures.reloads.labels(outcome).inc()


def _unprocessable(errors: Iterable[dict[str, Any]]) -> Response:
    """422 with place, message and type of each error, in characters that any client can show."""
    detail = [
        {
            "loc": [one_line(part) if isinstance(part, str) else part for part in error["loc"]],
            "msg": one_line(str(error["msg"])),
            "type": error["type"],
        }
        for error in errors
    ]
    return JSONResponse({"detail": detail}, status_code=422)


async def _too_large(request: Request, limit: int) -> Response | None:
    """The error for a body that is over the limit or has no declared length; None if the body is acceptable."""
    declared = request.headers.get("content-length")
    if declared is not None and declared.isascii() and declared.isdigit():
        size = int(declared)
    elif request.method == "POST":
        return JSONResponse({"detail": "Content-Length is required"}, status_code=411)
    else:
        size = 0
    if size > limit:
        return JSONResponse({"detail": f"body of {size} bytes, expected at most {limit}"}, status_code=413)
    return None
