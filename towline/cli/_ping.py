"""``towline ping``: the round trips that `Heartbeat` measures on the link of an idle session.

A heartbeat goes through everything below `Resume`: the transport, the encryption, the framing, and the loops of both
programs.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
from typing import Final

import anyio
from anyio.abc import TaskGroup

from towline.endpoint import Endpoint
from towline.errors import LossReason, SessionLost, TowlineError
from towline.layers.resume import Detached, Resumed, Session
from towline.stack import Stack

from ._failure import CLEAN, FAILED, GAVE_UP, Failure

__all__ = ["run_ping"]

LOOK_EVERY: Final = 0.01
"""How often to look for a new measurement: far below what an interval makes sense for."""

GOODBYE_TIMEOUT: Final = 2.0


async def run_ping(stack: Stack, endpoint: Endpoint, count: int, interval: float) -> int:
    """Ping, print, and return the exit code."""
    times: list[float] = []
    error: SessionLost | None = None
    async with stack.open() as opened:
        began = anyio.current_time()
        try:
            session: Session = await opened.connect(endpoint)
        except TowlineError as failed:
            if failed.retryable:
                raise Failure(f"gave up: {failed}", GAVE_UP) from failed
            raise
        print(f"connected to {endpoint} in {_milliseconds(anyio.current_time() - began)}", flush=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_stop_by_signal, tasks)
            tasks.start_soon(_tell, session)
            # What ends it is raised below: an error must not leave the task group as an ExceptionGroup.
            error = await _measure(session, endpoint, times, count, interval)
            tasks.cancel_scope.cancel()
        with anyio.move_on_after(GOODBYE_TIMEOUT, shield=True), contextlib.suppress(TowlineError):
            await session.aclose()
            session.leave()
            await session.wait_closed()
    if times:
        _summarise(times)
    if error is not None and error.reason is LossReason.INTERNAL:
        raise Failure("the far end was reached, but cannot reach its own target", FAILED) from error
    if error is not None:
        raise error
    return CLEAN if times else FAILED


def _summarise(times: list[float]) -> None:
    print(
        f"{len(times)} round trips: min {_milliseconds(min(times))}, "
        f"median {_milliseconds(statistics.median(times))}, max {_milliseconds(max(times))}",
        flush=True,
    )


async def _measure(
    session: Session, endpoint: Endpoint, times: list[float], count: int, interval: float
) -> SessionLost | None:
    last: float | None = None
    while count == 0 or len(times) < count:
        await anyio.sleep(min(LOOK_EVERY, interval / 10))
        if session.state.is_over:
            return await _loss(session)
        now = session.rtt
        # The same number measured twice is another object.
        if now is not None and now is not last:
            times.append(now)
            print(f"{endpoint}: {len(times)}: {_milliseconds(now)}", flush=True)
        last = now
    return None


async def _loss(session: Session) -> SessionLost | None:
    """What ended the session; None if the target did, by ending its connection."""
    try:
        while True:
            await session.receive_many()  # the target may have spoken first
    except SessionLost as error:
        return error
    except (anyio.EndOfStream, anyio.ClosedResourceError):
        return None


async def _tell(session: Session) -> None:
    """Say when the link is lost and found."""
    async for event in session.events():
        match event:
            case Detached():
                print(f"link lost: {event.reason}", flush=True)
            case Resumed():
                print("link found again", flush=True)
            case _:
                pass


async def _stop_by_signal(tasks: TaskGroup) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            tasks.cancel_scope.cancel()
            return


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
