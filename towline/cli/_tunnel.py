"""``towline listen`` and ``towline forward``: the tunnel of `towline.tunnel`, with signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import anyio

from towline.endpoint import Endpoint
from towline.errors import MisuseError, TowlineError
from towline.stack import Stack
from towline.tunnel import check, forward, listen

from ._failure import CLEAN, FAILED, Failure
from ._options import FileKeys, Tunnel

__all__ = ["run_forward", "run_listen"]

logger = logging.getLogger("towline.cli")

DRAIN_TIMEOUT: Final = 30.0
"""How long connections may take to finish after SIGTERM: below what systemd waits (90 s)."""

CHECK_TIMEOUT: Final = 2.0
"""How long a forward tries to reach the far end before it says that it is ready."""

_STOP: Final = (signal.SIGINT, signal.SIGTERM)
_HANGUP: Final = getattr(signal, "SIGHUP", None)
_SIGNALS: Final = _STOP if _HANGUP is None else (*_STOP, _HANGUP)


async def run_listen(tunnel: Tunnel, endpoint: Endpoint, to: Endpoint) -> int:
    """Serve until told to stop; returns the exit code."""
    with anyio.open_signal_receiver(*_SIGNALS) as signals:
        async with listen(tunnel.stack, endpoint, to) as exit_:

            def hang_up() -> None:
                removed = _reload(tunnel.keys)
                if removed:
                    exit_.revoke(removed)

            _ready(exit_.endpoint)
            return await _until_stopped(signals, hang_up, exit_.drain)


async def run_forward(tunnel: Tunnel, local: Endpoint, via: Endpoint, retry_for: float) -> int:
    """Forward until told to stop; returns the exit code."""
    with anyio.open_signal_receiver(*_SIGNALS) as signals:
        async with forward(tunnel.stack, local, via, retry_for=retry_for) as entrance:

            def hang_up() -> None:
                _reload(tunnel.keys)
                logger.info("%d sessions reconnect", entrance.reconnect())

            await _reach(tunnel.stack, via)
            _ready(entrance.endpoint)
            return await _until_stopped(signals, hang_up, entrance.drain)


async def _reach(stack: Stack, via: Endpoint) -> None:
    """See that the far end lets us in. What may pass, such as a server that is down, is only said.

    Raises:
        HandshakeFailed, UnknownHost: what no waiting mends: it is better to end than to refuse every connection.
    """
    try:
        with anyio.fail_after(CHECK_TIMEOUT):
            await check(stack, via)
    except TimeoutError:
        logger.warning("%s does not answer yet; it is tried again for each connection", via)
    except TowlineError as error:
        if not error.retryable:
            raise
        logger.warning("%s; it is tried again for each connection", error)


def _reload(keys: FileKeys | None) -> frozenset[bytes]:
    if keys is None:
        return frozenset()
    try:
        removed = keys.reload()
    except (Failure, MisuseError) as error:
        logger.error("the keys stay what they were: %s", error)
        return frozenset()
    logger.info("the key files are read again")
    return removed


def _ready(endpoint: Endpoint) -> None:
    print(f"listening on {endpoint}", flush=True)


async def _until_stopped(
    signals: AsyncIterator[signal.Signals],
    hang_up: Callable[[], None],
    drain: Callable[[float], Awaitable[int]],
) -> int:
    async for number in signals:
        if number != _HANGUP:
            break
        hang_up()
    logger.info("draining, for %g s at most; a second signal ends it at once", DRAIN_TIMEOUT)
    code = FAILED

    async def end_at_once() -> None:
        nonlocal code
        async for number in signals:
            if number != _HANGUP:
                code = 128 + number
                tasks.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_at_once)
        if await drain(DRAIN_TIMEOUT) == 0:
            code = CLEAN
        tasks.cancel_scope.cancel()
    return code
