"""One call that meets two cuts of the link below its session, and one retry: what both processes tell, exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import IO, Any, cast

import anyio
import anyio.to_thread
import pytest

from towline import (
    Backoff,
    CallFailed,
    Encryption,
    Framing,
    Heartbeat,
    Psk,
    Reconnect,
    Request,
    Resume,
    Retry,
    Rpc,
    Stack,
    StandardPolicy,
)
from towline.hooks import Hooks, LinkAttached, LinkDetached
from towline.testing import ChaosProxy

pytestmark = pytest.mark.real_time

LOST = "towline.errors.LinkLost"
PLACE = {"network.transport": "tcp", "server.address": "127.0.0.1", "server.port": 0}


class Attached(Hooks):
    """Lets the test wait for the next link."""

    def __init__(self) -> None:
        self.epoch = 0
        self.is_over = False
        self._changed = anyio.Event()

    def on_attach(self, event: LinkAttached, /) -> None:
        self.epoch = event.session.epoch
        self._change()

    def on_detach(self, event: LinkDetached, /) -> None:
        self.is_over = event.session.state.is_over
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def reach(self, epoch: int) -> None:
        while self.epoch < epoch:
            await self._changed.wait()

    async def wait_over(self) -> None:
        while not self.is_over:
            await self._changed.wait()


class Span:
    """A span, from whichever process."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.name: str = found["name"]
        self.kind: str = found["kind"].removeprefix("SpanKind.")
        self.id: str = found["context"]["span_id"]
        self.trace: str = found["context"]["trace_id"]
        self.parent: str | None = found["parent_id"]
        self.status: str = found["status"]["status_code"]
        self.attributes: dict[str, Any] = found["attributes"]
        if "server.port" in self.attributes:  # another one every time
            self.attributes["server.port"] = 0
        self.events = [(event["name"], event["attributes"]) for event in found["events"]]
        self.links = [(link["context"]["span_id"], link["attributes"]) for link in found["links"]]
        self.began: str = found["start_time"]


def points(data: Any) -> Counter[tuple[str, str]]:
    """Each measurement by its name and its attributes: its value, or how often it was measured."""
    found: Counter[tuple[str, str]] = Counter()
    for resource in data["resource_metrics"]:
        for scope in resource["scope_metrics"]:
            for metric in scope["metrics"]:
                for point in metric["data"]["data_points"]:
                    about = {**point["attributes"]}
                    if "server.port" in about:
                        about["server.port"] = 0
                    words = " ".join(str(value) for _, value in sorted(about.items()))
                    found[metric["name"], words] += point["count"] if "count" in point else point["value"]
    return found


@pytest.mark.parametrize("theirs", ["asyncio", "trio"])
async def test_a_call_with_two_cuts_and_one_retry_is_told_exactly(
    recorder: Any, anyio_backend: Any, theirs: str
) -> None:
    attached = Attached()
    program = Path(__file__).with_name("server.py")
    with subprocess.Popen(  # noqa: ASYNC220 -- it is talked to in threads
        [sys.executable, str(program), theirs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        commands, output = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        async def line() -> str:
            text: str = await anyio.to_thread.run_sync(output.readline)
            return text.strip()

        try:
            endpoint = await line()
            async with ChaosProxy(endpoint) as proxy:
                policy = StandardPolicy(Backoff.constant(0.01), on=CallFailed, idempotent=True)
                stack = Stack(
                    Retry(policy),
                    Reconnect(proxy.endpoint),
                    Rpc(),
                    Resume(hooks=attached),
                    Retry(Backoff.constant(0.01)),
                    Heartbeat(interval=60, timeout=180),
                    Framing(),
                    Encryption(psk=Psk(bytes(range(32)))),
                )

                async def network() -> None:
                    assert await line() == "begun"
                    for epoch in (2, 3):
                        assert proxy.cut_now("reset") == 1
                        await attached.reach(epoch)
                    commands.write("go on\n")
                    assert await line() == "begun"
                    commands.write("go on\n")

                with recorder.tracer.start_as_current_span("user"):
                    async with recorder.telemetry.instrument(stack).open() as call, anyio.create_task_group() as tasks:
                        tasks.start_soon(network)
                        assert (await call(Request("get"))).payload == b"answer"
                        # The server ends the session, so both ends know how the last link ends.
                        commands.write("end\n")
                        await attached.wait_over()
                assert proxy.connections == 3
            rest = await anyio.to_thread.run_sync(output.read)
            assert process.wait() == 0
        finally:
            process.kill()
    told = [json.loads(each) for each in rest.splitlines()]
    theirs_told = [Span(each["span"]) for each in told if "span" in each]
    ours_told = [Span(json.loads(span.to_json())) for span in recorder.spans]
    check_calls(ours_told, theirs_told)
    check_connections([span for span in ours_told if span.name == "towline.connection"], "dialling")
    check_connections([span for span in theirs_told if span.name == "towline.connection"], "listening")
    check_below(ours_told, theirs_told)
    check_client_counts(points(json.loads(recorder.metrics_data().to_json())))
    check_server_counts(points(next(each["metrics"] for each in told if "metrics" in each)))


def check_calls(ours: list[Span], theirs: list[Span]) -> None:
    (user,) = [span for span in ours if span.name == "user"]
    whole, first, second = [span for span in ours if span.name == "get"]
    first_answer, second_answer = sorted((span for span in theirs if span.name == "get"), key=lambda span: span.began)
    first_work, second_work = sorted((span for span in theirs if span.name == "work"), key=lambda span: span.began)
    assert {span.trace for span in (whole, first, second, first_answer, second_answer, first_work)} == {user.trace}
    assert [span.parent for span in (whole, first, second)] == [user.id, whole.id, whole.id]
    assert [span.parent for span in (first_answer, second_answer)] == [first.id, second.id]
    assert [span.parent for span in (first_work, second_work)] == [first_answer.id, second_answer.id]
    about = {"rpc.system.name": "towline", "rpc.method": "get", **PLACE}
    good = {**about, "rpc.status_code": "OK"}
    bad = {**about, "rpc.status_code": "UNAVAILABLE", "error.type": "UNAVAILABLE"}
    assert [span.attributes for span in (whole, first, second)] == [good, bad, {**good, "towline.resend_count": 1}]
    assert [span.attributes for span in (first_answer, second_answer)] == [bad, good]
    assert [span.kind for span in (whole, first, second)] == ["CLIENT"] * 3
    assert [span.kind for span in (first_answer, second_answer)] == ["SERVER"] * 2
    assert [span.status for span in (whole, first, second)] == ["UNSET", "ERROR", "UNSET"]
    assert [span.status for span in (first_answer, second_answer)] == ["ERROR", "UNSET"]
    assert whole.events == [("towline.retry", {"error.type": "UNAVAILABLE", "towline.resend_count": 1})]
    others = [first, second, first_answer, second_answer]
    assert all(span.events == [] for span in others)
    assert all(span.links == [] for span in [whole, *others])


def check_connections(found: list[Span], side: str) -> None:
    one, two, three = sorted(found, key=lambda span: span.began)
    assert [span.links for span in (one, two, three)] == [
        [],
        [(one.id, {"towline.epoch": 1})],
        [(two.id, {"towline.epoch": 2})],
    ]
    about = {"towline.side": side, **PLACE}
    assert [span.attributes for span in (one, two, three)] == [
        {**about, "towline.epoch": 1, "error.type": LOST},
        {**about, "towline.epoch": 2, "error.type": LOST},
        {**about, "towline.epoch": 3},
    ]
    assert [span.status for span in (one, two, three)] == ["ERROR", "ERROR", "UNSET"]
    assert [[name for name, _ in span.events] for span in (one, two, three)] == [
        ["towline.established"],
        ["towline.resumed"],
        ["towline.resumed"],
    ]
    assert {span.kind for span in found} == {"INTERNAL"}


def check_below(ours: list[Span], theirs: list[Span]) -> None:
    """Every dial and every handshake, below its connection."""
    for spans in (ours, theirs):
        names = {span.id: span.name for span in spans}
        below = Counter(
            (names.get(span.parent or ""), span.name, span.attributes.get("towline.layer"))
            for span in spans
            if span.name in ("towline.connection", "towline.dial", "towline.handshake")
        )
        if spans is ours:
            assert below == {
                ("user", "towline.connection", None): 3,
                ("towline.connection", "towline.dial", None): 3,
                ("towline.dial", "towline.handshake", "Encryption"): 3,
                ("towline.connection", "towline.handshake", "Resume"): 3,
            }
            assert len(spans) == 1 + 3 + sum(below.values())
        else:
            assert below == {
                (None, "towline.connection", None): 3,
                ("towline.connection", "towline.handshake", "Encryption"): 3,
                ("towline.connection", "towline.handshake", "Resume"): 3,
            }
            assert len(spans) == 2 + 2 + sum(below.values())


def check_client_counts(found: Counter[tuple[str, str]]) -> None:
    expected = {
        ("rpc.client.call.duration", "tcp get OK towline 127.0.0.1 0"): 1,
        ("towline.attempts", "UNAVAILABLE call"): 1,
        ("towline.attempts", "call"): 1,
        ("towline.attempts", "dial"): 3,
        ("towline.retries", "UNAVAILABLE call"): 1,
        ("towline.cuts", f"{LOST} dialling"): 2,
        ("towline.resumes", "dialling"): 2,
        ("towline.outage.duration", "dialling"): 2,
    }
    check_counts(found, expected, "dialling")


def check_server_counts(found: Counter[tuple[str, str]]) -> None:
    expected = {
        ("rpc.server.call.duration", "UNAVAILABLE tcp get UNAVAILABLE towline 127.0.0.1 0"): 1,
        ("rpc.server.call.duration", "tcp get OK towline 127.0.0.1 0"): 1,
        ("towline.cuts", f"{LOST} listening"): 2,
        ("towline.resumes", "listening"): 2,
        ("towline.outage.duration", "listening"): 2,
    }
    check_counts(found, expected, "listening")


def check_counts(found: Counter[tuple[str, str]], expected: dict[tuple[str, str], int], side: str) -> None:
    # How much of an acknowledgement a cut swallows, the network decides; and what is looked at is looked at any time.
    vague = ("towline.replay.", "towline.replayed.", "towline.sessions")
    assert {key: value for key, value in found.items() if not key[0].startswith(vague)} == expected
    assert {about for name, about in found if name.startswith("towline.replayed.")} == {side}
