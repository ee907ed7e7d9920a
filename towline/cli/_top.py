"""``towline top``: a tunnel as it stands now, redrawn as long as somebody looks; plain lines where nobody can look.

The program that is watched may end and come back: then the view says so, and goes on with the new one.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TextIO

import anyio
from anyio.abc import TaskGroup

from towline.endpoint import Endpoint
from towline.errors import ConnectionLost
from towline.scope import plain_task_group
from towline.text import printable

from ._admin import ANSWER_TIMEOUT, named_errors, open_admin
from ._failure import CLEAN, Failure
from ._format import duration, round_trip, size
from ._status import SessionStatus, Snapshot, summary

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

__all__ = ["Change", "changes", "run_top"]

AGAIN_AFTER: Final = 0.5
"""Seconds until it is tried again to reach a program that has gone."""

LINE_EVERY: Final = 1.0
"""Seconds between two lines that say how it stands; what happens is said at once."""

KEPT_CHANGES: Final = 100
"""More than any terminal has lines for."""


class Change(NamedTuple):
    """Something that happened between two snapshots."""

    style: str
    text: str


def changes(before: Snapshot | None, now: Snapshot) -> list[Change]:
    """What has happened since the last snapshot."""
    if before is None:
        return [Change("", f"watching {now.role} {now.endpoint}")]
    if before.pid != now.pid:
        return [Change("yellow", "the program was restarted: its sessions are new")]
    found: list[Change] = []
    then = {session.id: session for session in before.sessions}
    for session in now.sessions:
        old = then.pop(session.id, None)
        if old is None:
            found.append(Change("", f"{session.id} began" + (f" ({session.peer})" if session.peer else "")))
        if session.cuts > (old.cuts if old else 0):
            found.append(Change("red", f"{session.id} lost its link: {session.last_error}"))
        if session.resumes > (old.resumes if old else 0):
            replayed = session.replayed - (old.replayed if old else 0)
            found.append(
                Change("green", f"{session.id} goes on over a new link, {replayed:,} messages were sent again")
            )
    if len(now.sessions) == now.attached + now.detached:  # else it may only have been left out
        found += [Change("", f"{short_id} is over") for short_id in then]
    if now.is_draining and not before.is_draining:
        found.append(Change("yellow", "draining: nothing new is accepted"))
    return found


class _View(Protocol):
    def show(self, snapshot: Snapshot) -> None: ...

    def gone(self, why: str) -> None: ...


async def run_top(endpoint: Endpoint) -> int:
    """Watch until told to stop; returns the exit code."""
    try:
        with _open_view() as view:
            async with plain_task_group() as tasks:
                tasks.start_soon(_stop_by_signal, tasks)
                if sys.stdin.isatty() and sys.stdout.isatty():
                    tasks.start_soon(_stop_by_key, tasks)
                await _watch(endpoint, view)
    except BrokenPipeError:  # as in `towline top SOCKET | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLEAN


async def _watch(endpoint: Endpoint, view: _View) -> None:
    was_there = False
    while True:
        why = "the program has ended"
        try:
            with named_errors(endpoint):
                async with open_admin(endpoint) as admin:
                    with anyio.fail_after(ANSWER_TIMEOUT):
                        view.show(await admin.snapshot())
                    was_there = True
                    async for snapshot in _Guarded(admin.follow()):
                        view.show(snapshot)
        except Failure as error:
            if not was_there:
                raise
            if not isinstance(error.__cause__, ConnectionLost):  # which here is the end of who listened
                why = str(error)
        view.gone(why)
        await anyio.sleep(AGAIN_AFTER)


class _Guarded(AsyncIterator[Snapshot]):
    """Snapshots, each of which comes in time after the one before it.

    The first has no bound: the deadline under which a stream is opened goes with it, and is that of the whole stream.
    """

    def __init__(self, snapshots: AsyncIterator[Snapshot]) -> None:
        self._snapshots = snapshots
        self._bound = float("inf")

    async def __anext__(self) -> Snapshot:
        with anyio.fail_after(self._bound):
            snapshot = await anext(self._snapshots)
        self._bound = ANSWER_TIMEOUT
        return snapshot


async def _stop_by_signal(tasks: TaskGroup) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            tasks.cancel_scope.cancel()
            return


async def _stop_by_key(tasks: TaskGroup) -> None:
    with _single_keys(sys.stdin.fileno()) as stdin:
        while True:
            await anyio.wait_readable(stdin)
            pressed = os.read(stdin, 1024)
            if not pressed:
                return
            if b"q" in pressed.lower():
                tasks.cancel_scope.cancel()


@contextmanager
def _single_keys(descriptor: int) -> Generator[int]:
    """Each key is read when it is pressed, and is not shown."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _open_view() -> Generator[_View]:
    if not sys.stdout.isatty():
        yield _PlainView(sys.stdout)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()  # honours NO_COLOR, and asks for the terminal's size anew for each drawing
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield _LiveView(console, live)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _rates(of: Snapshot | SessionStatus) -> tuple[str, str]:
    return f"{size(of.send_rate)}/s", f"{size(of.receive_rate)}/s"


class _PlainView:
    """A line for each thing that happens, and one a second that says how it stands."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before: Snapshot | None = None
        self._due = float("-inf")
        self._is_gone = False

    def show(self, snapshot: Snapshot) -> None:
        for change in changes(self._before, snapshot):
            self._print(change.text)
        self._before, self._is_gone = snapshot, False
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LINE_EVERY
            sent, received = _rates(snapshot)
            self._print(f"{summary(snapshot)}; sent {sent}, received {received}; {snapshot.cuts} cuts")

    def gone(self, why: str) -> None:
        if not self._is_gone:
            self._print(f"no connection, trying again: {why}")
        self._is_gone = True

    def _print(self, text: str) -> None:
        print(f"{_clock()}  {printable(text)}", file=self._stream, flush=True)


class _Column(NamedTuple):
    title: str
    needs: int  # the width of a terminal from which on it is shown
    is_number: bool = False
    shrinks: bool = False  # where the terminal is too narrow for all


_COLUMNS: Final = (
    _Column("session", 0),
    _Column("state", 0),
    _Column("peer", 90, shrinks=True),
    _Column("age", 80, True),
    _Column("round trip", 60, True),
    _Column("sent", 50, True),
    _Column("received", 50, True),
    _Column("buffer", 72, True),
    _Column("credit", 120, True),
    _Column("cuts", 0, True),
    _Column("last cut by", 100, shrinks=True),
)


class _LiveView:
    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live
        self._before: Snapshot | None = None
        self._changes: collections.deque[tuple[str, Change]] = collections.deque(maxlen=KEPT_CHANGES)
        self._is_gone = False

    def show(self, snapshot: Snapshot) -> None:
        self._note(*changes(self._before, snapshot))
        self._before, self._is_gone = snapshot, False
        self._draw(snapshot)

    def gone(self, why: str) -> None:
        if not self._is_gone:
            self._note(Change("red", f"no connection, trying again: {why}"))
        self._is_gone = True
        if self._before is not None:
            self._draw(self._before)

    def _note(self, *found: Change) -> None:
        self._changes.extend((_clock(), change) for change in found)

    def _draw(self, snapshot: Snapshot) -> None:
        from rich.console import Group

        width, height = self._console.size
        head = self._head(snapshot)
        below = min(len(self._changes), max(3, height // 3))
        # The heading of the table, an empty line on either side of it, and the last line.
        room = max(1, height - len(head) - below - 4)
        shown = snapshot.sessions[:room]
        left_out = snapshot.attached + snapshot.detached - len(shown)
        if left_out:
            shown = shown[: room - 1]
            left_out = snapshot.attached + snapshot.detached - len(shown)
        parts: list[RenderableType] = [*head, "", self._table(shown, width)]
        if left_out:
            parts.append(self._text(f"and {left_out:,} more", "dim"))
        parts.append("")
        parts += [self._text(f"{at}  {change.text}", change.style) for at, change in [*self._changes][-below:]]
        parts.append(self._text("q quits", "dim"))
        self._live.update(Group(*parts), refresh=True)

    def _head(self, snapshot: Snapshot) -> list[RenderableType]:
        from rich.text import Text

        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(printable(f"towline {snapshot.role} "), "bold")
        title.append(printable(f"{snapshot.endpoint} to {snapshot.target}"))
        title.append(f"  up {duration(snapshot.uptime)}", "dim")
        sent, received = _rates(snapshot)
        line = Text(no_wrap=True, overflow="ellipsis")
        if self._is_gone:
            line.append("no connection, trying again", "bold red")
        else:
            alarm = "bold red" if snapshot.detached or snapshot.is_draining else "bold green"
            line.append(summary(snapshot), alarm)
        line.append(f"   sent {sent}, received {received}")
        line.append(
            f"   {snapshot.cuts:,} cuts, {snapshot.resumes:,} resumed, {snapshot.replayed:,} messages again", "dim"
        )
        return [title, line]

    def _table(self, sessions: list[SessionStatus], width: int) -> Table:
        from rich.table import Table

        gap = 2 if width >= 120 else 1
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
        shown = [number for number, column in enumerate(_COLUMNS) if width >= column.needs]
        for number in shown:
            column = _COLUMNS[number]
            table.add_column(
                column.title,
                justify="right" if column.is_number else "left",
                no_wrap=not column.shrinks,
                overflow="ellipsis",
            )
        for session in sessions:
            cells = self._cells(session)
            table.add_row(*(cells[number] for number in shown), style="dim" if self._is_gone else "")
        return table

    def _cells(self, session: SessionStatus) -> list[RenderableType]:
        sent, received = _rates(session)
        is_detached = session.detached_for is not None
        state = f"no link {duration(session.detached_for)}" if session.detached_for is not None else session.state
        share = session.buffered / max(1, session.buffer)
        full = "red" if share > 0.8 else "yellow" if share > 0.5 else ""
        return [
            self._text(session.id),
            self._text(state, "bold red" if is_detached else "green"),
            self._text(session.peer or "local"),
            self._text(duration(session.age)),
            self._text(round_trip(session.rtt)),
            self._text(sent),
            self._text(received),
            self._text(f"{size(session.buffered)} {share:4.0%}", full),
            self._text(size(session.credit)),
            self._text(f"{session.cuts:,}"),
            self._text(session.last_error, "" if is_detached else "dim"),
        ]

    def _text(self, text: str, style: str = "") -> RenderableType:
        from rich.text import Text

        # As text: what an error says is no markup, and what a peer's name holds cannot move the cursor.
        return Text(printable(text), style, no_wrap=True, overflow="ellipsis")
