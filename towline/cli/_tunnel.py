"""``towline listen`` and ``forward``: the tunnel of `towline.tunnel`, with signals and what an operator wants."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

import anyio

from towline.endpoint import Endpoint
from towline.errors import TowlineError
from towline.stack import Stack
from towline.tunnel import Entrance, Exit, check, forward, listen

from ._admin import Orders
from ._failure import CLEAN, FAILED, Failure
from ._notify import Notifier
from ._operate import Operating, operated
from ._options import FileKeys, Tunnel

if TYPE_CHECKING:
    from ._metrics import Metrics

__all__ = ["run_forward", "run_listen"]

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT: Final = 30.0
"""How long connections may take to finish after SIGTERM: below what systemd waits (90 s)."""

CHECK_TIMEOUT: Final = 2.0
"""How long a forward tries to reach the far end before it says that it is ready."""

_STOP: Final = (signal.SIGINT, signal.SIGTERM)
_HANGUP: Final = getattr(signal, "SIGHUP", None)
_SIGNALS: Final = _STOP if _HANGUP is None else (*_STOP, _HANGUP)


async def run_listen(tunnel: Tunnel, endpoint: Endpoint, to: Endpoint, operating: Operating) -> int:
    """Serve until told to stop; returns the exit code."""
    with anyio.open_signal_receiver(*_SIGNALS) as signals, operating.measured() as metrics:
        stack = tunnel.stack if metrics is None else metrics.instrument(tunnel.stack)
        async with listen(stack, endpoint, to) as exit_:

            def hang_up() -> None:
                removed = _reload(tunnel.keys)
                if removed:
                    exit_.revoke(removed)

            return await _run(exit_, operating, metrics, signals, hang_up)


async def run_forward(tunnel: Tunnel, local: Endpoint, via: Endpoint, retry_for: float, operating: Operating) -> int:
    """Forward until told to stop; returns the exit code."""
    with anyio.open_signal_receiver(*_SIGNALS) as signals, operating.measured() as metrics:
        stack = tunnel.stack if metrics is None else metrics.instrument(tunnel.stack)
        async with forward(stack, local, via, retry_for=retry_for) as entrance:

            def hang_up() -> None:
                _reload(tunnel.keys)
                count = entrance.reconnect()
                logger.info("%d sessions reconnect", count, extra={"event": "sessions.reconnect", "count": count})

            await _reach(tunnel.stack, via)
            return await _run(entrance, operating, metrics, signals, hang_up)


async def _reach(stack: Stack, via: Endpoint) -> None:
    """See that the far end lets us in. What may pass, such as a server that is down, is only said.

    Raises:
        HandshakeFailed, UnknownHost: what no waiting mends: it is better to end than to refuse every connection.
    """
    fields = {"event": "far_end.unreachable", "endpoint": str(via)}
    try:
        with anyio.fail_after(CHECK_TIMEOUT):
            await check(stack, via)
    except TimeoutError:
        logger.warning("%s does not answer yet; it is tried again for each connection", via, extra=fields)
    except TowlineError as error:
        if not error.retryable:
            raise
        logger.warning("%s; it is tried again for each connection", error, extra={**fields, "reason": str(error)})


def _reload(keys: FileKeys | None) -> frozenset[bytes]:
    if keys is None:
        return frozenset()
    try:
        removed = keys.reload()
    except Exception as error:  # of any kind: a file that is wrong must not end what runs
        logger.error(
            "the keys stay what they were: %s",
            error,
            exc_info=None if isinstance(error, (Failure, TowlineError)) else error,
            extra={"event": "keys.not_reloaded", "reason": str(error)},
        )
        return frozenset()
    logger.info("the key files are read again", extra={"event": "keys.reloaded", "removed": len(removed)})
    return removed


async def _run(
    tunnel: Exit | Entrance,
    operating: Operating,
    metrics: Metrics | None,
    signals: AsyncIterator[signal.Signals],
    hang_up: Callable[[], None],
) -> int:
    notifier = Notifier()

    def reload() -> None:
        notifier.reloading()
        hang_up()
        notifier.ready()

    async with operated(tunnel, operating, notifier, metrics) as orders:
        print(f"listening on {tunnel.endpoint}", flush=True)
        notifier.ready()
        timeout = await _until_stopped(signals, reload, orders)
        notifier.stopping()
        logger.info(
            "draining, for %g s at most; a second signal ends it at once",
            timeout,
            extra={"event": "draining", "timeout": timeout},
        )
        return await _drain(signals, tunnel, timeout, orders)


async def _until_stopped(signals: AsyncIterator[signal.Signals], reload: Callable[[], None], orders: Orders) -> float:
    """Wait for a signal, or an order, to stop; returns how long connections may take to finish."""
    timeout = DRAIN_TIMEOUT

    async def ordered() -> None:
        nonlocal timeout
        await orders.asked.wait()
        timeout = orders.timeout
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ordered)
        async for number in signals:
            if number != _HANGUP:
                break
            reload()
        tasks.cancel_scope.cancel()
    return timeout


async def _drain(
    signals: AsyncIterator[signal.Signals],
    tunnel: Exit | Entrance,
    timeout: float,
    orders: Orders,
) -> int:
    code = FAILED

    async def end_at_once() -> None:
        nonlocal code
        async for number in signals:
            if number != _HANGUP:
                code = 128 + number
                orders.drained(len(tunnel.carried))
                tasks.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_at_once)
        cut_off = await tunnel.drain(timeout)
        orders.drained(cut_off)
        if cut_off == 0:
            code = CLEAN
        tasks.cancel_scope.cancel()
    return code
