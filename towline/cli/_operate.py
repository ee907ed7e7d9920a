"""What stands beside a tunnel that runs: the admin socket, the web page, and the service manager that is told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio

from towline.endpoint import Endpoint
from towline.scope import plain_task_group
from towline.tunnel import Entrance, Exit

from ._admin import Orders, serve_admin, socket_at
from ._failure import Failure
from ._notify import Notifier
from ._status import Watch, summary

if TYPE_CHECKING:
    from towline.config import ForwardConfig, ListenConfig

    from ._metrics import Metrics

__all__ = ["Operating", "operated"]

LOOPBACK: Final = "127.0.0.1"

STATUS_EVERY: Final = 1.0
"""Seconds between two looks for whether the service manager is to be told another status."""


@dataclass(frozen=True, slots=True)
class Operating:
    """What an operator wants beside a tunnel.

    Attributes:
        admin: where the admin socket is; None for none.
        metrics: where HTTP is answered; None for nowhere.
    """

    admin: Endpoint | None = None
    metrics: Endpoint | None = None

    @classmethod
    def of(cls, admin: str | None, metrics: str | None, end: ListenConfig | ForwardConfig | None) -> Operating:
        """From what was typed, and else from the file.

        Raises:
            Failure: if it makes no sense.
        """
        if end is not None:
            admin = end.admin if admin is None else admin
            metrics = end.metrics if metrics is None else metrics
        return cls.checked(admin, metrics)

    @classmethod
    def checked(cls, admin: str | None, metrics: str | None) -> Operating:
        """From what was typed.

        Raises:
            Failure: if it makes no sense.

        >>> Operating.checked(None, "9090").metrics
        Endpoint('tcp://127.0.0.1:9090')
        """
        return cls(
            None if admin is None else socket_at("--admin", admin),
            None if metrics is None else _address(metrics),
        )

    @contextlib.contextmanager
    def measured(self) -> Generator[Metrics | None]:
        """What measures, if it is wanted and installed: made before what it measures, and there for longer."""
        if self.metrics is not None:
            from ._metrics import Metrics, is_installed

            if is_installed():
                with Metrics() as metrics:
                    yield metrics
                return
        yield None


def _address(text: str) -> Endpoint:
    text = text.removeprefix("tcp://")
    try:
        endpoint = Endpoint.parse(f"tcp://{LOOPBACK}:{text}" if text.isdigit() else f"tcp://{text}")
    except ValueError:
        raise Failure(f"--metrics: {text!r} is not an address: write HOST:PORT, or PORT for {LOOPBACK}") from None
    return endpoint


@asynccontextmanager
async def operated(
    tunnel: Exit | Entrance, operating: Operating, notifier: Notifier, metrics: Metrics | None
) -> AsyncGenerator[Orders]:
    """Show and steer a tunnel for as long as the block runs.

    Raises:
        ConnectFailed, EndpointError: if an address cannot be listened on.
    """
    watch, orders = Watch(tunnel), Orders()
    async with contextlib.AsyncExitStack() as stack:
        if operating.admin is not None:
            await stack.enter_async_context(serve_admin(operating.admin, watch, orders))
        if operating.metrics is not None:
            from ._web import serve_web

            if metrics is not None:
                metrics.observe(watch)
            await stack.enter_async_context(serve_web(operating.metrics, watch, metrics))
        tasks = await stack.enter_async_context(plain_task_group())
        if operating.admin is not None or operating.metrics is not None:
            tasks.start_soon(watch.run)
        if notifier.is_heard:
            tasks.start_soon(_keep_telling, notifier, watch)
        try:
            yield orders
        finally:
            tasks.cancel_scope.cancel()


async def _keep_telling(notifier: Notifier, watch: Watch) -> None:
    """Say that the program lives, as often as is asked, and how it stands, when that has changed."""
    told = ""
    pause = STATUS_EVERY if notifier.watchdog is None else min(STATUS_EVERY, notifier.watchdog / 2)
    while True:
        words = summary(watch.refresh())
        if words != told:
            notifier.status(words)
            told = words
        if notifier.watchdog is not None:
            notifier.alive()
        await anyio.sleep(pause)
