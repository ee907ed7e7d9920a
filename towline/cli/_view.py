"""The picture of the demo: live where it is looked at, else a plain line each second; at the end the proof."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from ._format import round_trip, size

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from ._demo import Progress, Report

__all__ = ["View", "open_view"]

LINE_EVERY: Final = 1.0


class View(Protocol):
    """Shows how a demo stands, and how it ended."""

    def show(self, progress: Progress) -> None: ...

    def prove(self, report: Report) -> None: ...


@contextmanager
def open_view(*, to_stderr: bool) -> Generator[View]:
    """A live view on a terminal, else plain lines; on stderr if stdout is for the result alone."""
    stream = sys.stderr if to_stderr else sys.stdout
    if not stream.isatty():
        yield _PlainView(stream)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)  # honours NO_COLOR
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield _LiveView(stream, live)


class _Rate:
    """Messages a second, over the time since it was asked last."""

    def __init__(self) -> None:
        self._received = 0
        self._at = 0.0

    def __call__(self, report: Report) -> float:
        received, seconds = report.received - self._received, report.seconds - self._at
        self._received, self._at = report.received, report.seconds
        return received / seconds if seconds > 0 else 0.0


class _PlainView:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rate = _Rate()
        self._due = LINE_EVERY
        self._trouble = ""

    def show(self, progress: Progress) -> None:
        self._trouble = progress.trouble
        if progress.seconds < self._due:
            return
        self._due += LINE_EVERY
        report = progress.report()
        rate = self._rate(report)
        self._print(
            f"{report.seconds:4.0f} s  {report.received:,} of {progress.total:,} messages  {rate:,.0f}/s  "
            f"round trip {round_trip(progress.rtt)}  cuts {report.cuts}  resumes {report.resumes}  "
            f"replayed {report.replayed:,}  buffer {size(progress.buffered)}"
        )

    def prove(self, report: Report) -> None:
        _prove(self._stream, report, self._trouble)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _LiveView:
    def __init__(self, stream: TextIO, live: Live) -> None:
        self._stream = stream
        self._live = live
        self._rate = _Rate()
        self._trouble = ""

    def show(self, progress: Progress) -> None:
        self._trouble = progress.trouble
        self._live.update(self._table(progress), refresh=True)

    def _table(self, progress: Progress) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        report = progress.report()
        rate = self._rate(report)
        table = Table.grid(padding=(0, 3))
        table.add_column(justify="left", style="bold")
        table.add_column(justify="right")
        table.add_row("received", ProgressBar(total=progress.total, completed=report.received, width=40))
        table.add_row("throughput", f"{rate:,.0f} messages/s, {size(rate * progress.size)}/s")
        table.add_row("round trip", round_trip(progress.rtt))
        table.add_row("cuts", f"{report.cuts}")
        table.add_row("resumes", f"{report.resumes}")
        table.add_row("replayed", f"{report.replayed:,} messages")
        table.add_row("buffer", size(progress.buffered))
        return table

    def prove(self, report: Report) -> None:
        self._live.stop()
        _prove(self._stream, report, self._trouble)


def _prove(stream: TextIO, report: Report, trouble: str) -> None:
    lines = [
        f"{name:12}{getattr(report, name):>14,}"
        for name in ("sent", "received", "lost", "duplicated", "reordered", "corrupted")
    ]
    lines.append(
        f"The link was cut {report.cuts} times in {report.seconds:.1f} s, the session resumed {report.resumes} times, "
        f"and {report.replayed:,} messages were sent again."
    )
    if trouble:
        lines.append(f"Trouble: {trouble}")
    if report.is_proof:
        lines.append("Every message arrived once, in order and as it was sent.")
    else:
        lines.append("THE PROMISE WAS BROKEN.")
    print("\n".join(lines), file=stream, flush=True)
