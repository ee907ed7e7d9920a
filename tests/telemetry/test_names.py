"""The table of names in the reference is what an SDK collects: no less, and no more."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from towline import (
    Backoff,
    BreakerPolicy,
    CallFailed,
    CircuitBreaker,
    Encryption,
    Framing,
    HandshakeFailed,
    Heartbeat,
    LinkLost,
    Psk,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Router,
    Rpc,
    Stack,
    StandardPolicy,
    StatusCode,
)
from towline.hooks import Hooks, RetryScheduled
from towline.testing import ChaosProxy

pytestmark = pytest.mark.real_time

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "telemetry.md"

INSIDE = (
    Rpc(),
    Resume(),
    Heartbeat(interval=0.05, timeout=5),
    Framing(),
    Encryption(psk=Psk(bytes(range(32)))),
)


class Row(NamedTuple):
    name: str
    what: str
    unit: str
    attributes: frozenset[str]


def documented() -> dict[Row, bool]:
    """The rows of the table, with whether they are stable."""
    rows: dict[Row, bool] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            name, what, unit, attributes, stable = cells
            row = Row(name.strip("`"), what, unit.strip("`"), frozenset(re.findall(r"`([^`]+)`", attributes)))
            rows[row] = {"yes": True, "no": False}[stable]
    return rows


def collected(recorder: Any) -> set[Row]:
    """What a recorder has, in the same form."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for span in recorder.spans:
        name = span.name if span.name.startswith("towline.") else "{rpc.method}"
        found[name, f"span, {span.kind.name}", ""] |= set(span.attributes)
        for event in span.events:
            found[event.name, "event", ""] |= set(event.attributes)
        for link in span.links:
            found[name, "link", ""] |= set(link.attributes)
    for metric in recorder.metrics().values():
        for point in metric.data.data_points:
            found[metric.name, kind_of(metric), metric.unit] |= set(point.attributes)
    return {Row(*key, frozenset(attributes)) for key, attributes in found.items()}


def kind_of(metric: Any) -> str:
    kind = type(metric.data).__name__
    if kind == "Sum":
        return "counter" if metric.data.is_monotonic else "up-down counter"
    return kind.lower()


class Opens(Hooks):
    """Opens a proxy when the first dial has failed."""

    proxy: ChaosProxy

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        self.proxy.is_open = True


async def all_that_happens(recorder: Any) -> None:
    """Each thing that is measured, once at least."""
    failures = iter([StatusCode.UNAVAILABLE] * 2)
    refuses = False
    router = Router()

    @router.method("get")
    async def get(request: Request, /) -> Response:
        for code in failures:
            raise CallFailed(code)
        await anyio.sleep(0.2)
        return Response(b"answer")

    on = StandardPolicy(Backoff.constant(0.01), on=CallFailed, idempotent=True, max_attempts=2)
    server_stack = Stack(Rpc(), Resume(authorize=lambda peer: not refuses), *INSIDE[2:])
    opens = Opens()
    async with (
        recorder.telemetry.instrument(server_stack).serve("tcp://127.0.0.1:0", router) as server,
        ChaosProxy(server.endpoint) as proxy,
    ):
        opens.proxy = proxy
        proxy.is_open = False
        below = (*INSIDE[:2], Retry(Backoff.constant(0.01), hooks=opens), *INSIDE[2:])
        breaker = CircuitBreaker(BreakerPolicy(consecutive=2), name="database")
        client = Stack(Retry(on), breaker, Reconnect(proxy.endpoint), *below)
        async with recorder.telemetry.instrument(client).open() as call:
            with pytest.raises(CallFailed):  # two attempts, and the breaker opens
                await call(Request("get"))
        async with recorder.telemetry.instrument(Stack(*below)).connect(proxy.endpoint) as peer:
            with pytest.raises(CallFailed):
                await peer(Request("no such method"))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(peer, Request("get"))
                await anyio.sleep(0.1)
                (session,) = server.sessions[-1:]
                session.drop_link(LinkLost("cut"))
            await anyio.sleep(0.2)
            recorder.metrics()
        refuses = True
        with pytest.raises(HandshakeFailed):
            async with recorder.telemetry.instrument(Stack(*INSIDE)).connect(server.endpoint):
                pass


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the checkout")
async def test_the_table_is_what_is_collected(recorder: Any) -> None:
    await all_that_happens(recorder)
    assert collected(recorder) == set(documented())


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the checkout")
def test_what_has_no_convention_has_our_name() -> None:
    rows = documented()
    assert rows
    for row, is_stable in rows.items():
        assert row.name.startswith("towline.") is not is_stable, row.name
        foreign = {name for name in row.attributes if not name.startswith(("towline.", "rpc.", "server.", "network."))}
        assert foreign <= {"error.type"}, row.name


async def test_no_measurement_has_an_attribute_without_end(recorder: Any, tmp_path: Path) -> None:
    stack = recorder.telemetry.instrument(Stack(*INSIDE))

    async def answer(request: Request, /) -> Response:
        return Response()

    endpoint = f"unix://{tmp_path}/s"
    async with stack.serve(endpoint, answer):
        for _ in range(3):
            async with stack.connect(endpoint) as call:
                await call(Request("get"))
    assert all(str(tmp_path) not in str(metric) for metric in recorder.metrics().values())
    (metric,) = [each for name, each in recorder.metrics().items() if name == "rpc.client.call.duration"]
    (point,) = metric.data.data_points
    assert point.count == 3
