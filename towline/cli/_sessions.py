"""``towline sessions``, ``drain`` and ``reconnect``: one question or order to a program that runs."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
from pydantic import TypeAdapter

from towline.endpoint import Endpoint
from towline.text import printable

from ._admin import ANSWER_TIMEOUT, Admin, DrainRequest, ReconnectRequest, named_errors, open_admin
from ._failure import CLEAN, FAILED
from ._format import duration, round_trip, size
from ._status import SessionStatus, Snapshot, summary

__all__ = ["run_drain", "run_reconnect", "run_sessions"]

T = TypeVar("T")


async def run_sessions(endpoint: Endpoint, *, as_json: bool) -> int:
    """Print how a tunnel stands; returns the exit code."""
    snapshot = await _ask(endpoint, lambda admin: admin.snapshot())
    if as_json:
        print(json.dumps(TypeAdapter(Snapshot).dump_python(snapshot, mode="json")), flush=True)
        return CLEAN
    print(printable(f"{snapshot.role} {snapshot.endpoint} to {snapshot.target}: {summary(snapshot)}"))
    if snapshot.sessions:
        print("\n".join(_table([_HEADER, *map(_row, snapshot.sessions)])), flush=True)
    return CLEAN


async def run_reconnect(endpoint: Endpoint, session: str) -> int:
    """Give one session, or all of them, a new link; returns the exit code."""
    count = await _ask(endpoint, lambda admin: admin.reconnect(ReconnectRequest(session)))
    print(f"{count} session{'' if count == 1 else 's'} reconnect{'s' if count == 1 else ''}", flush=True)
    return CLEAN


async def run_drain(endpoint: Endpoint, timeout: float) -> int:
    """Let a program end, and wait for it; returns the exit code."""
    cut_off = await _ask(endpoint, lambda admin: admin.drain(DrainRequest(timeout)), more_time=timeout)
    if cut_off:
        print(f"it has ended; connections that were cut off: {cut_off}", flush=True)
        return FAILED
    print("it has ended, and every connection had finished", flush=True)
    return CLEAN


async def _ask(endpoint: Endpoint, question: Callable[[Admin], Awaitable[T]], *, more_time: float = 0.0) -> T:
    with named_errors(endpoint):
        with anyio.fail_after(ANSWER_TIMEOUT + more_time):
            async with open_admin(endpoint) as admin:
                return await question(admin)


_HEADER = (
    "SESSION",
    "STATE",
    "PEER",
    "AGE",
    "ROUND TRIP",
    "SENT",
    "RECEIVED",
    "BUFFER",
    "CREDIT",
    "CUTS",
    "LAST CUT BY",
)


def _row(session: SessionStatus) -> tuple[str, ...]:
    away = "" if session.detached_for is None else f" {duration(session.detached_for)}"
    return (
        session.id,
        f"{session.state}{away}",
        session.peer or "local",
        duration(session.age),
        round_trip(session.rtt),
        f"{size(session.send_rate)}/s",
        f"{size(session.receive_rate)}/s",
        f"{size(session.buffered)} of {size(session.buffer)}",
        size(session.credit),
        str(session.cuts),
        session.last_error or "-",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they need to be: the last one is open, so that nothing is cut off in a pipe.

    >>> _table([("ID", "STATE"), ("3f2a91bc", "attached")])
    ['ID        STATE', '3f2a91bc  attached']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return [printable(line.rstrip()) for line in lines]
