"""``--metrics``: health, metrics and a live page over HTTP. It only shows: nothing that is sent here changes anything.

There is no authentication, so it listens on this machine alone unless told otherwise. There, too, somebody else's page
may talk to it from a browser: so a name in the ``Host`` header that is not this machine's is refused, which stops a
foreign name that was pointed at 127.0.0.1, and no other origin may read an answer.

One request a connection, no bodies, and h11 reads what comes in: the little that is left is in this file.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import anyio
import h11
from pydantic import TypeAdapter

from towline.endpoint import Endpoint, is_loopback
from towline.errors import TowlineError
from towline.link import Link
from towline.scope import plain_task_group
from towline.stage import Driver
from towline.transports import Tcp

from ._status import Snapshot, Watch, summary

if TYPE_CHECKING:
    from ._metrics import Metrics

__all__ = ["serve_web"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
"""At once; those above are reset. A few pages, and what scrapes."""

MAX_FOLLOWERS: Final = 16
"""Pages that are open; more are told to come back. Each costs a snapshot four times a second."""

MAX_HEAD: Final = 8 << 10
"""Bytes of a request's line and headers, as in most servers: a browser's have one KiB or two."""

REQUEST_TIMEOUT: Final = 5.0
"""Seconds for a request to arrive: who opens a connection asks at once."""

WRITE_TIMEOUT: Final = 10.0
"""Seconds for a client to take an answer, or the next piece of one."""

TEXT: Final = "text/plain; charset=utf-8"
EVENTS: Final = "text/event-stream"

_ALWAYS: Final = (
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)

_encode: Final = TypeAdapter(Snapshot).dump_json


@dataclass(frozen=True, slots=True)
class _Answer:
    body: bytes
    status: int = 200
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = field(default=())


def _line(text: str, status: int = 200, *headers: tuple[str, str]) -> _Answer:
    return _Answer(f"{text}\n".encode(), status, headers=headers)


@asynccontextmanager
async def serve_web(endpoint: Endpoint, watch: Watch, metrics: Metrics | None) -> AsyncGenerator[Endpoint]:
    """Answer HTTP for as long as the block runs; gives what is really bound.

    Args:
        endpoint: where.
        watch: what is shown.
        metrics: what is measured; None where the extra is not installed.

    Raises:
        ConnectFailed: if the address cannot be bound.
    """
    listener = await Tcp().listen(endpoint)
    try:
        bound = listener.endpoint
        site = _Site(watch, metrics, is_local=is_loopback(bound.host))
        fields = {"event": "web.listening", "endpoint": str(bound)}
        if not site.is_local:
            logger.warning(
                "--metrics: whoever reaches %s can read it, as there is no authentication", bound, extra=fields
            )
        logger.info("a live page is at %s/", str(bound).replace("tcp://", "http://"), extra=fields)
        async with plain_task_group() as tasks:

            def accepted(link: Link) -> None:
                if site.connections >= MAX_CONNECTIONS:
                    link.driver.abort()
                else:
                    site.connections += 1
                    tasks.start_soon(site.serve, link.driver)

            tasks.start_soon(listener.serve, accepted)
            try:
                yield bound
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await listener.aclose()


class _Site:
    """Answers requests."""

    def __init__(self, watch: Watch, metrics: Metrics | None, *, is_local: bool) -> None:
        self.is_local = is_local
        self.connections = 0
        self._watch = watch
        self._metrics = metrics
        self._followers = 0
        self._page = _page()
        self._encoded: tuple[Snapshot | None, bytes] = (None, b"")
        self._paths: Mapping[str, Callable[[], _Answer]] = {
            "/": lambda: self._page,
            "/livez": lambda: _line("ok"),
            "/readyz": self._ready,
            "/metrics": self._measured,
        }

    async def serve(self, driver: Driver) -> None:
        """Serve one connection: one request, one answer."""
        try:
            await self._exchange(h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD), driver)
        except (TowlineError, OSError, TimeoutError, h11.ProtocolError) as error:
            logger.debug("a request was not answered: %s", error, extra={"event": "web.failed", "reason": str(error)})
        except Exception:
            logger.exception("a request failed", extra={"event": "web.failed"})
        finally:
            self.connections -= 1
            driver.abort()

    async def _exchange(self, connection: h11.Connection, driver: Driver) -> None:
        request: h11.Request | None = None
        try:
            with anyio.fail_after(REQUEST_TIMEOUT):
                request = await _read(connection, driver)
            if request is None:  # it was only looked whether anybody listens
                return
            answer = self._answer(request)
        except h11.RemoteProtocolError as error:
            answer = _line(str(error), error.error_status_hint)
        if answer is not None:
            await _write(connection, driver, answer, with_body=request is None or request.method != b"HEAD")
        else:
            await self._stream(connection, driver)
        with anyio.fail_after(WRITE_TIMEOUT):
            await driver.aclose()

    def _answer(self, request: h11.Request) -> _Answer | None:
        """What a request is answered; None for the stream."""
        host = dict(request.headers).get(b"host", b"").decode("latin-1")
        name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if self.is_local and host and not is_loopback(name.lower().removesuffix(".")):
            return _line("this is another host", 421)
        if request.method not in (b"GET", b"HEAD"):
            return _line("only GET", 405, ("Allow", "GET, HEAD"))
        path = request.target.partition(b"?")[0].decode("latin-1")
        if path == "/events":
            if self._followers >= MAX_FOLLOWERS:
                return _line(f"there are {MAX_FOLLOWERS} pages open", 503, ("Retry-After", "5"))
            return _Answer(b"", content_type=EVENTS) if request.method == b"HEAD" else None
        found = self._paths.get(path)
        return (
            found() if found is not None else _line("there is no such page: /, /events, /livez, /readyz, /metrics", 404)
        )

    def _ready(self) -> _Answer:
        snapshot = self._watch.refresh()
        return _line(summary(snapshot), 503 if snapshot.is_draining else 200)

    def _measured(self) -> _Answer:
        if self._metrics is None:
            from ._metrics import INSTALL

            return _line(INSTALL, 501)
        self._watch.refresh()
        return _Answer(self._metrics.text(), content_type=self._metrics.content_type)

    async def _stream(self, connection: h11.Connection, driver: Driver) -> None:
        """Server-sent events: a snapshot each, four a second. Who takes them slowly gets fewer."""
        self._followers += 1
        try:
            await _send(connection, driver, _head(200, EVENTS))
            await _send(connection, driver, h11.Data(b"retry: 1000\n\n"))
            async for snapshot in self._watch.follow():
                await _send(connection, driver, h11.Data(self._event(snapshot)))
            await _send(connection, driver, h11.EndOfMessage())
        finally:
            self._followers -= 1

    def _event(self, snapshot: Snapshot) -> bytes:
        if self._encoded[0] is not snapshot:  # once for all who follow
            self._encoded = snapshot, b"data: " + _encode(snapshot) + b"\n\n"
        return self._encoded[1]


async def _read(connection: h11.Connection, driver: Driver) -> h11.Request | None:
    received = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await driver.read()
            received += len(data)
            if received > MAX_HEAD:  # h11 only bounds what is not complete
                raise h11.RemoteProtocolError("the request is too large", error_status_hint=431)
            connection.receive_data(data)
        else:
            return event if isinstance(event, h11.Request) else None


async def _write(connection: h11.Connection, driver: Driver, answer: _Answer, *, with_body: bool) -> None:
    length = ("Content-Length", str(len(answer.body)))
    data = connection.send(_head(answer.status, answer.content_type, length, *answer.headers)) or b""
    if with_body:
        data += connection.send(h11.Data(answer.body)) or b""
    with anyio.fail_after(WRITE_TIMEOUT):
        await driver.write(data)


async def _send(connection: h11.Connection, driver: Driver, event: h11.Event) -> None:
    with anyio.fail_after(WRITE_TIMEOUT):
        await driver.write(connection.send(event) or b"")


def _head(status: int, content_type: str, *headers: tuple[str, str]) -> h11.Response:
    return h11.Response(
        status_code=status,
        reason=HTTPStatus(status).phrase,
        headers=[("Content-Type", content_type), *_ALWAYS, *headers],
    )


def _page() -> _Answer:
    """The page, with a policy that lets run what is in it, and nothing else."""
    text = importlib.resources.files(__package__ or "towline.cli").joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inside)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return _Answer(
        text.encode(), content_type="text/html; charset=utf-8", headers=(("Content-Security-Policy", policy),)
    )
