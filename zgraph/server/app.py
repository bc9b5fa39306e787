"""The HTTP endpoints, as an ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from zgraph.errors import ContextLengthError, OverloadError, UsageError
from zgraph.inference.continuous import Made
from zgraph.inference.continuous import Request as Wanted
from zgraph.server.answers import Choice, Form, event, problem
from zgraph.server.metrics import Metrics
from zgraph.server.protocol import MAX_PROMPTS, ChatCompletion, Completion, parsed
from zgraph.server.text import TextStream, Words
from zgraph.server.worker import Ticket, Worker

USUAL_TOKENS = 16
"""New tokens of a completion that asks for no number."""

CLIENT_IS_GONE = 499


@dataclass(frozen=True)
class Limits:
    """Limits of requests, and of the time that they may take.

    Args:
        body_bytes: of a request.
        body_seconds: until a request is there as a whole.
        grace_seconds: that requests under way have when the server stops.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    grace_seconds: float = 30.0


class _Stream(StreamingResponse):
    """A stream whose requests end with it, however it ends, even before it began."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class _Under:
    """Requests of one call that are under way."""

    def __init__(self, server: Server, choices: list[Choice]) -> None:
        self.server, self.choices, self.begin = server, choices, time.perf_counter()
        self.heard: asyncio.Queue[tuple[int, Made]] = asyncio.Queue()
        self.tickets: list[Ticket] = []

    def start(self, wanted: list[Wanted]) -> None:
        """Hand them to the worker. Raises what `Worker.submit` does."""
        loop = asyncio.get_running_loop()

        def told(number: int) -> Callable[[Made], None]:
            def tell(made: Made) -> None:
                loop.call_soon_threadsafe(self.heard.put_nowait, (number, made))

            return tell

        self.tickets = self.server.worker.submit(wanted, [told(number) for number in range(len(wanted))])
        self.server.metrics.prompt_tokens.inc(sum(c.num_prompt for c in self.choices))

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Pieces of text with the number of their choice, until all have ended. Raises _FaultError."""
        left = len(self.choices)
        while left:
            number, made = await self.heard.get()
            choice = self.choices[number]
            if choice.finish_reason is not None:
                continue  # made before the worker heard that a string ended it
            if made.ended == "error":
                raise _FaultError
            if not choice.num_made:
                self.server.metrics.first_token.observe(time.perf_counter() - self.begin)
            self.server.metrics.made_tokens.inc()
            piece = choice.add(made.token, made.ended)
            if choice.finish_reason is not None:
                left -= 1
                self.server.worker.cancel([self.tickets[number]])
            if piece or choice.finish_reason is not None:
                yield number, piece

    def close(self) -> None:
        """Free their rows."""
        if any(c.finish_reason is None for c in self.choices) and any(not t.is_over for t in self.tickets):
            self.server.metrics.dropped.inc()
        self.server.worker.cancel(self.tickets)


class _FaultError(Exception):
    """A request ended without an answer."""


class Server:
    """The endpoints of one model.

    Args:
        worker: generates.
        words: its text.
        name: what clients call it.
        limits: what it takes.
        hosts: names that it is called by; None takes any. Pages of a browser cannot reach it by another name.
    """

    def __init__(
        self,
        worker: Worker,
        words: Words,
        name: str,
        limits: Limits | None = None,
        hosts: list[str] | None = None,
    ) -> None:
        self.worker, self.words, self.name, self.limits = worker, words, name, limits or Limits()
        self.metrics = Metrics(worker)
        self.created = int(time.time())
        routes = [
            Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
        self.app = Starlette(routes=routes, middleware=middleware, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.worker.close, self.limits.grace_seconds)

    def _counted(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose refusals are answers, and which is counted."""

        async def endpoint(request: Request) -> Response:
            try:
                found = await answer(request)
            except ContextLengthError as error:
                found = _refused(400, str(error), code="context_length_exceeded")
            except OverloadError as error:
                found = _refused(429 if self.worker.is_alive else 503, str(error), "overloaded_error")
                found.headers["Retry-After"] = "1"
            except UsageError as error:
                found = _refused(400, str(error))
            except _FaultError:
                found = _refused(500, "the model gave no answer; the server's log says why", "server_error")
            except ClientDisconnect:
                found = Response(status_code=CLIENT_IS_GONE)
            self.metrics.answers.labels(request.url.path, str(found.status_code)).inc()
            return found

        return endpoint

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        asked = parsed(Completion, body)
        if not 0 < len(asked.prompts) <= MAX_PROMPTS:
            raise UsageError(f"prompt: must be 1 to {MAX_PROMPTS} prompts")
        prompts = await asyncio.to_thread(
            lambda: [self.words.tokens(p) if isinstance(p, str) else p for p in asked.prompts]
        )
        return await self._answer(request, asked, prompts, asked.max_tokens or USUAL_TOKENS)

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        asked = parsed(ChatCompletion, body)
        tokens = await asyncio.to_thread(self.words.chat, [message.plain for message in asked.messages])
        room = self.worker.generator.max_len - len(tokens)
        return await self._answer(
            request, asked, [tokens], asked.max_completion_tokens or asked.max_tokens or max(room, 1)
        )

    async def _body(self, request: Request) -> bytes | Response:
        """The body, if it is JSON and not too large; or the refusal."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return _refused(415, "Content-Type must be application/json")
        whole = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    whole += piece
                    if len(whole) > self.limits.body_bytes:
                        return _refused(413, f"the body is larger than {self.limits.body_bytes:,} bytes")
        except TimeoutError:
            return _refused(408, f"the body was not there within {self.limits.body_seconds:g} s")
        return bytes(whole)

    async def _answer(
        self, request: Request, asked: Completion | ChatCompletion, prompts: list[list[int]], max_new_tokens: int
    ) -> Response:
        """The answer to a request, as a whole or as a stream."""
        if asked.model != self.name:
            return _refused(
                404, f"there is no model {asked.model[:200]!r}; here is {self.name!r}", code="model_not_found"
            )
        if asked.includes_usage and not asked.stream:
            raise UsageError("stream_options: is for streams; pass stream=true, or leave it out")
        form = Form(isinstance(asked, ChatCompletion), self.name)
        under = _Under(self, [Choice(TextStream(self.words, asked.stops), len(tokens)) for tokens in prompts])
        under.start([Wanted(tokens, max_new_tokens, asked.sampling, asked.seed) for tokens in prompts])
        if asked.stream:
            return _Stream(self._events(under, form, asked.includes_usage), under.close)
        try:
            await self._whole(request, under)
        finally:
            under.close()
        return JSONResponse(form.whole(under.choices))

    async def _whole(self, request: Request, under: _Under) -> None:
        """Wait for all of an answer. Raises ClientDisconnect if nobody waits for it any more."""

        async def made() -> None:
            async for _ in under.pieces():
                pass

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = asyncio.create_task(made()), asyncio.create_task(gone())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()

    async def _events(self, under: _Under, form: Form, includes_usage: bool) -> AsyncIterator[bytes]:
        try:
            async for number, text in under.pieces():
                yield form.piece(number, text, under.choices[number].finish_reason)
        except _FaultError:
            yield event(problem("the model gave no answer; the server's log says why", "server_error"))
            return
        if includes_usage:
            yield form.last(under.choices)
        yield event("[DONE]")

    async def _models(self, request: Request) -> Response:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "zgraph"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [about]})
        if name != self.name:
            return _refused(404, f"there is no model {name[:200]!r}; here is {self.name!r}", code="model_not_found")
        return JSONResponse(about)

    async def _health(self, _: Request) -> Response:
        is_well = self.worker.is_alive
        said = {"status": "ok" if is_well else "stopping", "ranks": self.worker.generator.calls.num_ranks}
        return JSONResponse(said, 200 if is_well else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def _refused(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> Response:
    return JSONResponse(problem(message, kind, code), status)
