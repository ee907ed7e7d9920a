"""The listening end of a stack: accepts links, lets the layers negotiate, and counts strangers.

Each link is served in a task of its own, so that nothing it does, or fails to do, delays the next one. Until its peer
has proved itself it is a *stranger*, and strangers are few: when there are too many, the one that has waited longest,
of the source that has most of them, goes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio

from towline.endpoint import Endpoint
from towline.errors import LinkLost, TowlineError
from towline.link import Link
from towline.scope import Drainable, Scope
from towline.service import Service
from towline.transport import Listener

__all__ = ["Server"]

logger = logging.getLogger(__name__)

GOODBYE_TIMEOUT: Final = 1.0
"""How long links may take for their last word when the server is closed."""

LOG_INTERVAL: Final = 1.0
"""Failed handshakes are logged once in so many seconds, with the number of those passed over."""


class Server:
    """What ``async with stack.serve(...)`` gives.

    Attributes:
        endpoint: what is really bound: connect to this.
    """

    def __init__(
        self,
        listener: Listener,
        service: Service[Link, None],
        scope: Scope,
        *,
        holders: Sequence[Drainable] = (),
        max_pending: int = 256,
        max_pending_per_source: int = 64,
    ) -> None:
        self.endpoint: Endpoint = listener.endpoint
        self.max_pending = max_pending
        self.max_pending_per_source = max_pending_per_source
        self._listener = listener
        self._service = service
        self._scope = scope
        self._holders = holders  # of sessions; the scope may have those of other servers
        self._links: set[Link] = set()
        self._strangers: dict[Link, None] = {}  # in the order of their arrival
        self._quiet: anyio.Event | None = None
        self._closed = False
        self._log_at = float("-inf")
        self._passed_over = 0

    def __repr__(self) -> str:
        return f"<Server {self.endpoint} links={len(self._links)} sessions={len(self.sessions)}>"

    @property
    def sessions(self) -> Sequence[Any]:
        """The sessions that live here, attached or not; empty for a stack without `Resume`."""
        return [session for server in self._holders for session in server.sessions]

    async def run(self) -> None:
        """Accept until cancelled or closed."""
        await self._listener.serve(self._accepted)

    def _accepted(self, link: Link) -> None:
        link.bind(self._scope)
        self._links.add(link)
        self._strangers[link] = None
        link.on_established = self._admit(link)
        self._turn_away()
        self._scope.task_group.start_soon(self._serve, link)

    def _admit(self, link: Link) -> Callable[[], None]:
        return lambda: self._forget_stranger(link)

    def _forget_stranger(self, link: Link) -> None:
        self._strangers.pop(link, None)

    def _turn_away(self) -> None:
        """Hold the limits on strangers. A source is an address; links of one machine have none and share no limit."""
        counts = Counter(link.source for link in self._strangers)
        newest = next(reversed(self._strangers))
        crowded = newest.source if newest.source and counts[newest.source] > self.max_pending_per_source else None
        if crowded is None and len(self._strangers) <= self.max_pending:
            return
        if crowded is None:
            crowded = counts.most_common(1)[0][0]
        oldest = next(link for link in self._strangers if link.source == crowded)
        del self._strangers[oldest]
        oldest.abort(LinkLost("too many connections are waiting for their handshake"))

    async def _serve(self, link: Link) -> None:
        try:
            await self._service(link)
        except (TowlineError, OSError) as error:
            self._log(link, error)
        except Exception:
            logger.exception("%r: failed", link, extra={"event": "link.failed", **self._log_fields(link)})
        finally:
            link.abort(LinkLost("its service has ended"))
            self._strangers.pop(link, None)
            self._links.discard(link)
            if self._quiet is not None and not self._links:
                self._quiet.set()

    def _log(self, link: Link, error: Exception) -> None:
        now = self._scope.clock()
        if now - self._log_at < LOG_INTERVAL:
            self._passed_over += 1
            return
        passed_over, self._log_at, self._passed_over = self._passed_over, now, 0
        logger.info(
            "%s: a connection from %s failed: %s%s",
            self.endpoint,
            link.source or "here",
            error,
            f" (and {passed_over} more)" if passed_over else "",
            extra={
                "event": "handshake.failed",
                "reason": str(error),
                "passed_over": passed_over,
                **self._log_fields(link),
            },
        )

    def _log_fields(self, link: Link) -> dict[str, object]:
        return {"endpoint": str(self.endpoint), "source": link.source}

    async def drain(self, deadline: float = 30.0) -> int:
        """Begin no new session, tell every client, let sessions finish for ``deadline`` seconds, and cut off the rest.

        A client whose link is lost meanwhile finds the server listening, since it must resume to finish.

        Returns:
            How many sessions were cut off.
        """
        cut_off = 0
        for server in self._holders:
            cut_off += await server.drain(deadline)
        await self._listener.aclose()
        return cut_off

    async def aclose(self) -> None:
        """Stop accepting and end every session now; `drain` first to let them finish. Idempotent."""
        if self._closed:
            await anyio.lowlevel.checkpoint()
            return
        self._closed = True
        await self._listener.aclose()
        for server in self._holders:
            await server.drain(0)
        for link in self._links:
            link.finish(GOODBYE_TIMEOUT)
        self._quiet = anyio.Event()
        if self._links:
            with anyio.move_on_after(GOODBYE_TIMEOUT):
                await self._quiet.wait()
