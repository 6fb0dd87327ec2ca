"""The engine behind HTTP: requests that arrive together become one batch, within limits.

Needs FastAPI and uvicorn: `pip install 'peft-elp[serve]'`.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile

from .engine import Engine, NotLoadedError, Request, UnknownAdapterError, compare

try:
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi import Request as HTTPRequest
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
except ImportError as error:
    raise ImportError(f"The server needs FastAPI ({error}): pip install 'peft-elp[serve]'") from error

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0  # at the folder of adapters


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Args:
        batch_size: How many recordings are answered at a time.
        wait_s: How long a batch waits for further requests.
        queue: How many requests are under way at most. A further one is refused with status 429.
        timeout_s: How long a request may take, its upload included. Then its status is 504.
        upload_bytes: The size of a request. A larger one is refused with status 413.

    Raises:
        ValueError: A limit is not positive.
    """

    batch_size: int = 16
    wait_s: float = 0.005
    queue: int = 64
    timeout_s: float = 60.0
    upload_bytes: int = 50_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0 and name != "wait_s":
                raise ValueError(f"{name} must be positive, got {value}.")


class Batcher:
    """Collects what is asked at the same time, and asks the engine in one thread.

    Args:
        engine: Answers batches.
        limits: How many requests are taken on.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self._queue: asyncio.Queue[tuple[Request, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._under_way = 0
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer what is asked, and look at the folder of adapters."""
        self._tasks = [asyncio.create_task(self._answer()), asyncio.create_task(self._look())]
        yield
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown()

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def within_limits(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do the work of one request, unless there are too many or it takes too long."""
        if self._under_way >= self.limits.queue:
            raise HTTPException(429, f"{self.limits.queue} requests are under way already. Try again later.")
        self._under_way += 1
        try:
            return await asyncio.wait_for(work(), self.limits.timeout_s)
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"There was no answer within {self.limits.timeout_s:g} s.") from error
        finally:
            self._under_way -= 1

    async def ask(self, *requests: Request) -> list[Any]:
        """Return the answers to requests, which may share a batch with others."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in requests]
        for pair in zip(requests, futures, strict=True):
            self._queue.put_nowait(pair)
        answers = await asyncio.gather(*futures)
        for error in answers:
            if isinstance(error, Exception):
                raise error
        return answers

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the engine between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _answer(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(self.limits.wait_s)
            while len(batch) < self.limits.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(request, future) for request, future in batch if not future.done()]  # Some were given up.
            try:
                answers = await self.call(self.engine.answer, [request for request, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.call(self.engine.look)
            except Exception:
                logger.exception("The folder of adapters could not be read.")


def make_app(engine: Engine, limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """Make the server's application, for any ASGI server.

    Args:
        engine: Answers the requests.
        limits: What is taken on.
        api_key: What clients have to send as `Authorization: Bearer ...`. None: nothing.

    Examples:
        >>> app = make_app(Engine({"emotions": "me/emotions"}))  # doctest: +SKIP
        >>> uvicorn.run(app)  # doctest: +SKIP
    """
    limits = limits or Limits()
    batcher = Batcher(engine, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    async def check_key(request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            raise HTTPException(401, "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.")

    app = FastAPI(title="peft_elp", lifespan=lifespan)
    guarded = [Depends(check_key)]

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    async def refuse(_: HTTPRequest, error: Exception) -> JSONResponse:
        status, message = _told(error)
        if status == 500:
            logger.error("A request could not be answered.", exc_info=error)
        # The form of OpenAI's errors, which their client shows.
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)

    async def answered(
        request: HTTPRequest, task: Any, files: tuple[str, ...], options: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], list[Any]]:
        """Return the fields of a request, with the names of its files, and the answers to these."""

        async def work() -> tuple[dict[str, Any], list[Any]]:
            fields, contents = await _fields(request, files, ("model", *options), limits.upload_bytes)
            engine.check(fields["model"], task)
            recordings = [{"path": fields[file], "bytes": contents[file]} for file in files]
            return fields, await batcher.ask(*(Request(fields["model"], task, one) for one in recordings))

        try:
            return await batcher.within_limits(work)
        except HTTPException:
            raise
        except Exception as error:
            status, message = _told(error)
            if status == 500:
                raise
            raise HTTPException(status, message) from error

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Tell whether requests are answered."""
        if not batcher.healthy:
            raise HTTPException(503, "The server does not answer requests.")
        return {"status": "ok", "adapters": len(engine.adapters)}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """List the adapters, as OpenAI's clients ask for models."""
        found = [{"id": name, "object": "model", "created": 0, "owned_by": "peft_elp"} for name in engine.adapters]
        return {"object": "list", "data": found}

    @app.post("/v1/audio/transcriptions", dependencies=guarded, openapi_extra=_body("file", response_format="string"))
    async def transcriptions(request: HTTPRequest) -> Response:
        """Write down what is said, as OpenAI's clients ask for it."""
        fields, (text,) = await answered(request, "transcribe", ("file",), ("response_format",))
        form = fields.get("response_format", "json")
        if form not in ("json", "text"):
            raise HTTPException(422, f"response_format must be 'json' or 'text', got {form!r}.")
        return PlainTextResponse(text) if form == "text" else JSONResponse({"text": text})

    @app.post("/classify", dependencies=guarded, openapi_extra=_body("file", top_k="integer"))
    async def classify(request: HTTPRequest) -> dict[str, Any]:
        """Name the labels of a recording, the likeliest first."""
        fields, (labels,) = await answered(request, "classify", ("file",), ("top_k",))
        return {"file": fields["file"], "labels": labels[: _number(fields, "top_k", int, least=1)]}

    @app.post("/embed", dependencies=guarded, openapi_extra=_body("file"))
    async def embed(request: HTTPRequest) -> dict[str, Any]:
        """Return the embedding of a voice."""
        fields, (embedding,) = await answered(request, "embed", ("file",))
        return {"file": fields["file"], "embedding": embedding.tolist()}

    @app.post("/verify", dependencies=guarded, openapi_extra=_body("file_a", "file_b", threshold="number"))
    async def verify(request: HTTPRequest) -> dict[str, Any]:
        """Compare the voices of two recordings."""
        fields, (one, other) = await answered(request, "embed", ("file_a", "file_b"), ("threshold",))
        threshold = _number(fields, "threshold", float, least=-1)
        if threshold is None:
            threshold = await batcher.call(engine.threshold, fields["model"])
        found = compare(one, other, threshold)
        return {"score": found.score, "threshold": threshold, "same": found.same}

    return app


def _told(error: Exception) -> tuple[int, str]:
    """Return the status and the sentence of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    for kind, status in ((UnknownAdapterError, 404), (NotLoadedError, 503), (ValueError, 422)):
        if isinstance(error, kind):
            return status, str(error)
    return 500, "The request could not be answered. The server's log says why."


async def _fields(
    request: HTTPRequest, files: tuple[str, ...], options: tuple[str, ...], most: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the fields of a form or of JSON, and the content of the files among them."""
    limited = _limited(request, most)
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            given = await limited.json()
            if not isinstance(given, Mapping):
                raise TypeError("The body must be a JSON object.")
            contents = {name: base64.b64decode(given[name], validate=True) for name in files if name in given}
            fields = {**given, **dict.fromkeys(contents, "The recording")}
        else:
            async with limited.form(max_files=len(files), max_fields=100) as form:
                uploads = {name: one for name, one in form.items() if isinstance(one, UploadFile)}
                contents = {name: await one.read() for name, one in uploads.items()}
                fields = {**form, **{name: one.filename or "The recording" for name, one in uploads.items()}}
    except (ValueError, TypeError) as error:
        raise HTTPException(422, f"The request cannot be read: {error}") from error
    for name in (*files, "model"):
        if name not in (contents if name in files else fields):
            raise HTTPException(
                422, f"The field {name!r} is missing" + (" or is not a file." if name in files else ".")
            )
    if unknown := sorted(fields.keys() - {*files, *options}):
        known = ", ".join((*files, *options))
        raise HTTPException(422, f"The field {unknown[0]!r} is not supported here. The fields are {known}.")
    return fields, contents


def _limited(request: HTTPRequest, most: int) -> HTTPRequest:
    """Return the request, whose body is read no further than a limit."""
    taken = 0
    refusal = HTTPException(413, f"The request is larger than {most:,} bytes.", {"connection": "close"})

    async def receive() -> Any:
        nonlocal taken
        message = await request.receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise refusal
        return message

    if int(request.headers.get("content-length", 0)) > most:
        raise refusal
    return HTTPRequest(request.scope, receive)


def _number(fields: Mapping[str, Any], name: str, kind: Callable[[Any], Any], least: float) -> Any:
    if name not in fields:
        return None
    try:
        number = kind(fields[name])
    except (TypeError, ValueError):
        number = None
    if number is None or not number >= least:
        raise HTTPException(422, f"{name} must be a number from {least:g}, got {json.dumps(fields[name])[:40]}.")
    return number


def _body(*files: str, **options: str) -> dict[str, Any]:
    """Describe the body of a request for the page with the interface."""

    def schema(file: dict[str, str]) -> dict[str, Any]:
        fields = {**dict.fromkeys(files, file), **{name: {"type": kind} for name, kind in options.items()}}
        properties = {"model": {"type": "string"}, **fields}
        return {"schema": {"type": "object", "required": ["model", *files], "properties": properties}}

    content = {
        "multipart/form-data": schema({"type": "string", "format": "binary"}),
        "application/json": schema({"type": "string", "format": "byte", "description": "in base64"}),
    }
    return {"requestBody": {"required": True, "content": content}}
