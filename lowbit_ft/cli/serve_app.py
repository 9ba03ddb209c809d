"""The web app of `transformers serve` for one model: what loads and unloads models is closed.

transformers builds a FastAPI app for any number of models. Ours serves the folder it was started on:

    routes      those in OPEN, and /v1/models, which lists the model; the rest is not there (404), so that no
                request loads another path or unloads this one
    a client    that leaves takes its request along: the handler is cancelled, and the generation ends with
                the token that it is at, where it would run to its last one and keep all others waiting
    signals     the first one ends the server once its requests are answered, a second one at once
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList

OPEN = frozenset({"/health", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/systemone"})

Message = MutableMapping[str, Any]
App = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@contextmanager
def one_model(name: str, typed: str) -> Iterator[None]:
    """For as long as this is open, `transformers serve` builds its app for the model `name` and no other.
    typed: another name of it, as its user gave the folder."""
    from transformers.cli.serving import server  # here: it needs the extra

    build = server.build_server

    def build_server(*handlers: Any, **options: Any) -> App:
        state = options["generation_state"]
        find = state.get_manager

        def get_manager(model_id: str, use_cb: bool = False) -> Any:
            manager = find(model_id, use_cb=use_cb)
            return manager if use_cb else Stoppable(manager)

        state.get_manager = get_manager
        for handler in (*handlers, *options.values()):
            if hasattr(handler, "_resolve_model"):
                _also_named(handler, name, typed)
        return Leaving(close(build(*handlers, **options), name))

    server.build_server = build_server
    try:
        yield
    finally:
        server.build_server = build


def _also_named(handler: Any, name: str, typed: str) -> None:
    """Let requests to this handler name the model as it was typed, too."""
    resolve = handler._resolve_model

    def resolved(body: dict[str, Any]) -> Any:
        if isinstance(wanted := body.get("model"), str) and wanted.rstrip("/") == typed:
            body["model"] = name
        return resolve(body)

    handler._resolve_model = resolved


def close(app: Any, name: str) -> Any:
    """The FastAPI app with the routes of OPEN alone, and a list of the one model."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in OPEN]
    listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lowbit_ft"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    return app


class Stoppable:
    """A generation manager of transformers whose whole answers can be cancelled too (streams can already)."""

    def __init__(self, manager: Any):
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        gone = threading.Event()

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            return ids.new_full((ids.shape[0],), gone.is_set(), dtype=torch.bool)

        watched = {"stopping_criteria": StoppingCriteriaList([stop])}  # pyright: ignore[reportArgumentType]
        answer = self._manager.generate_non_streaming(
            model, processor, {**inputs, **watched}, gen_config, request_id=request_id
        )
        try:
            # Its thread goes on to the end of a token and then has a result, which needs somebody to take it.
            return await asyncio.shield(asyncio.ensure_future(answer))
        except asyncio.CancelledError:
            gone.set()
            raise


class Leaving:
    """An ASGI app around another: it cancels a request whose client left, and listens for a second signal."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, _after_startup(send))
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue[Message] = asyncio.Queue()
        answered = left = False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def listen() -> None:
            nonlocal left
            while not left:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    left = True
                    if not answered:  # after an answer it says no more than that it is over
                        work.cancel()

        work = asyncio.ensure_future(self.app(scope, messages.get, answer))
        ears = asyncio.ensure_future(listen())
        try:
            await work
        except asyncio.CancelledError:
            work.cancel()
            if not left:  # the server itself is ending
                raise
        finally:
            ears.cancel()


def _after_startup(send: Any) -> Any:
    async def sent(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            _end_on_second()
        await send(message)

    return sent


def _end_on_second() -> None:
    """The handlers that are there (uvicorn's: no new requests, wait for those that run) for the first signal;
    the end of the process for a second one. The thread that generates cannot be interrupted, so nothing less
    than the system's exit ends it."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            sys.stdout.flush()
            os._exit(128 + number)
        seen.append(number)
        first = before[number]
        if callable(first):
            first(number, frame)

    for number in before:
        signal.signal(number, handler)
