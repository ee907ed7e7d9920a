"""Draws one real trace: a call whose link is cut twice, from the client's span to the server's handler.

    python docs/diagrams/trace.py

writes ``trace.svg`` beside itself. Both ends run in this process, over memory and in virtual time, with OpenTelemetry's
SDK. The picture has an order and no scale: what is drawn is which span begins and ends before which.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import anyio
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from towline import (
    Backoff,
    Encryption,
    Framing,
    LinkLost,
    Psk,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Rpc,
    Stack,
)
from towline.telemetry import Telemetry
from towline.testing import virtual_time_backend

PICTURE = Path(__file__).with_suffix(".svg")


class Kept(NamedTuple):
    """A span, and the numbers of its beginning and its end among all that happened."""

    span: ReadableSpan
    began: int
    ended: int

    @property
    def id(self) -> int:
        context = self.span.context
        assert context is not None
        return context.span_id

    @property
    def trace(self) -> int:
        context = self.span.context
        assert context is not None
        return context.trace_id


class Keeper(SpanProcessor):
    """Keeps what ends, with the order in which things happen."""

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self._count = 0
        self._began: dict[int, int] = {}

    def _next(self) -> int:
        self._count += 1
        return self._count

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self._began[span.context.span_id] = self._next()

    def on_end(self, span: ReadableSpan) -> None:
        context = span.context
        assert context is not None
        self.kept.append(Kept(span, self._began[context.span_id], self._next()))


# --- what is drawn ----------------------------------------------------------------------------------------------------


async def play(keeper: Keeper) -> None:
    """One call, two cuts."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(keeper)
    tracer = provider.get_tracer("example")
    telemetry = Telemetry(tracer_provider=provider)
    inside = (Rpc(), Resume(), Retry(Backoff.constant(1)), Framing(), Encryption(psk=Psk.generate()))
    began = anyio.Event()

    async def handler(request: Request, /) -> Response:
        with tracer.start_as_current_span("your handler's own span"):
            began.set()
            await anyio.sleep(60)
        return Response()

    server = telemetry.instrument(Stack(*inside))
    client = telemetry.instrument(Stack(Retry(), Reconnect("memory://trace"), *inside))
    async with server.serve("memory://trace", handler) as listening:
        with tracer.start_as_current_span("your client's own span"):
            async with client.open() as call, anyio.create_task_group() as tasks:
                tasks.start_soon(call, Request("users.get"))
                await began.wait()
                for _ in range(2):
                    await anyio.sleep(10)
                    listening.sessions[0].drop_link(LinkLost("cut"))


def record() -> list[Kept]:
    """The spans of the client's trace, parents before children, in the order of their beginnings."""
    keeper = Keeper()
    backend, options = virtual_time_backend("asyncio")
    anyio.run(play, keeper, backend=backend, backend_options=options)
    (root,) = [each for each in keeper.kept if each.span.name == "your client's own span"]
    trace = sorted((each for each in keeper.kept if each.trace == root.trace), key=lambda each: each.began)
    found: list[Kept] = []

    def add(each: Kept) -> None:
        found.append(each)
        for child in trace:
            if child.span.parent is not None and child.span.parent.span_id == each.id:
                add(child)

    add(root)
    return found


# --- how --------------------------------------------------------------------------------------------------------------

ROW = 26
LABEL = 400
STEP = 18
INK, GREY, RED = "#1f2933", "#52606d", "#c0392b"
COLOURS = {"CLIENT": "#2f6fb7", "SERVER": "#2e8b57", "INTERNAL": "#7b8794"}


def words(each: Kept) -> str:
    """What a span is called, and what matters of it."""
    about = each.span.attributes or {}
    said = [each.span.name]
    if each.span.kind.name != "INTERNAL":
        said.append(each.span.kind.name)
    if "towline.epoch" in about:
        said.append(f"#{about['towline.epoch']}")
    if "towline.layer" in about:
        said.append(str(about["towline.layer"]))
    said += [event.name.removeprefix("towline.") for event in each.span.events]
    if "error.type" in about:
        said.append(str(about["error.type"]).rpartition(".")[2])
    return " · ".join(said)


def _bar(left: int, top: int, width: int, colour: str, edge: str = "") -> str:
    return f'<rect x="{left}" y="{top}" width="{width}" height="14" rx="3" fill="{colour}"{edge}/>'


def draw(spans: list[Kept]) -> str:
    """The picture."""
    moments = sorted(moment for each in spans for moment in (each.began, each.ended))
    place = {moment: LABEL + STEP * number for number, moment in enumerate(moments)}
    depths: dict[int, int] = {}
    rows = {each.id: number for number, each in enumerate(spans)}
    width, height = LABEL + STEP * len(moments), ROW * (len(spans) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        "<title>A call through two reconnects</title>",
        "<desc>The spans of one call, and of the connections under it: two are lost before the answer is there.</desc>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, each in enumerate(spans):
        parent = each.span.parent
        depth = depths[each.id] = 0 if parent is None else depths[parent.span_id] + 1
        top, left, right = ROW * row + ROW // 2, place[each.began], place[each.ended]
        edge = f' stroke="{RED}" stroke-width="2"' if each.span.status.status_code.name == "ERROR" else ""
        colour = COLOURS[each.span.kind.name]
        lines.append(f'<text x="{10 + 16 * depth}" y="{top + 13}">{escape(words(each))}</text>')
        lines.append(_bar(left, top + 2, right - left, colour, edge))
        for link in each.span.links:
            before = spans[rows[link.context.span_id]]
            start, end = place[before.ended], ROW * rows[before.id] + ROW // 2 + 16
            lines.append(
                f'<path d="M{left + 4} {top + 2} V{(top + end) // 2} H{start - 4} V{end}" fill="none" '
                f'stroke="{INK}" stroke-dasharray="3 2"/>'
            )
    bottom = ROW * len(spans) + ROW + 4
    key = [("CLIENT", COLOURS["CLIENT"]), ("SERVER", COLOURS["SERVER"]), ("INTERNAL", COLOURS["INTERNAL"])]
    for number, (name, colour) in enumerate(key):
        lines.append(_bar(10 + 90 * number, bottom, 14, colour))
        lines.append(f'<text x="{30 + 90 * number}" y="{bottom + 11}">{name}</text>')
    note = "in order, not to scale; dashed: a link; red: an error"
    lines.append(f'<text x="{LABEL}" y="{bottom + 11}" fill="{GREY}">{note}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(record()))
