"""What is instrumented, and when; and that nothing which fails in an SDK harms a call or a session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from opentelemetry import metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Sampler

from towline import (
    Backoff,
    CircuitBreaker,
    Encryption,
    Framing,
    Heartbeat,
    LinkLost,
    Psk,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Rpc,
    Stack,
    StackError,
    StandardPolicy,
    Timeout,
    open_stream,
)
from towline.layers.rpc import Peer
from towline.telemetry import Telemetry

INSIDE = (
    Rpc(),
    Resume(),
    Retry(Backoff.constant(1)),
    Heartbeat(),
    Framing(),
    Encryption(psk=Psk(bytes(range(32)))),
)


async def echo(request: Request, /) -> Response:
    return Response(request.payload)


@pytest.mark.smoke
async def test_without_an_sdk_a_stack_is_what_was_given() -> None:
    stack: Stack[Any, Any, Any, Any] = Stack(Retry(), CircuitBreaker(), Reconnect("memory://calls"), *INSIDE)
    for telemetry in (
        Telemetry(),
        Telemetry(tracer_provider=trace.NoOpTracerProvider(), meter_provider=metrics.NoOpMeterProvider()),
    ):
        instrumented = telemetry.instrument(stack)
        assert not telemetry.is_heard
        assert instrumented._to_open().layers is instrumented.layers
        assert all(mine is theirs for mine, theirs in zip(instrumented.layers, stack.layers, strict=True))

        async def double(number: int, /) -> int:
            return 2 * number

        assert type(telemetry.instrument(Stack(Timeout(5)))(double)) is type(Stack(Timeout(5))(double))
    server = Stack(*INSIDE)
    async with server.serve("memory://calls", echo), Telemetry().instrument(server).connect("memory://calls") as call:
        assert type(call) is Peer
        assert (await call(Request("get", b"x"))).payload == b"x"


def test_an_sdk_that_is_turned_off_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    providers = TracerProvider(shutdown_on_exit=False), MeterProvider(shutdown_on_exit=False)
    assert not Telemetry(tracer_provider=providers[0], meter_provider=providers[1]).is_heard


def test_to_ask_whether_anybody_listens_leaves_nothing_behind() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, (metrics.Meter, trace.Tracer)) for each in gc.get_objects())

    stack = Telemetry().instrument(Stack(Resume(), Framing()))
    before = alive()
    for _ in range(100):
        assert stack._to_open() is stack
    assert alive() == before


def test_an_instrumented_stack_looks_like_what_it_is_made_of(recorder: Any) -> None:
    stack: Stack[Any, Any, Any, Any] = Stack(Retry(), Reconnect("memory://calls"), *INSIDE)
    instrumented = recorder.telemetry.instrument(stack)
    assert instrumented == stack
    assert repr(instrumented) == repr(stack)
    assert instrumented.describe() == stack.describe()
    assert instrumented.wire == instrumented._to_open().wire == stack.wire
    assert len(instrumented._to_open().layers) == len(stack.layers) + 3
    assert recorder.telemetry.is_heard


def test_a_layer_more_is_instrumented_with_the_rest(recorder: Any) -> None:
    encryption = INSIDE[-1]
    instrumented = recorder.telemetry.instrument(Stack(Resume(), Framing())).layer(encryption)
    assert instrumented == Stack(Resume(), Framing(), encryption)
    assert instrumented._to_open().layers[-1].hooks is not None


def test_what_is_instrumented_is_so_as_a_whole_and_once(recorder: Any) -> None:
    instrumented = recorder.telemetry.instrument(Stack(Retry(), Timeout(5)))
    with pytest.raises(StackError, match="instrumented"):
        Stack(Timeout(9), instrumented)
    with pytest.raises(StackError, match="instrumented"):
        Telemetry().instrument(instrumented)


async def test_an_sdk_that_comes_later_is_heard_from_then_on(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Telemetry().instrument(Stack(*INSIDE))
    async with stack.serve("memory://calls", echo):
        async with stack.connect("memory://calls") as call:
            await call(Request("before"))
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: recorder.tracer_provider)
        async with stack.connect("memory://calls") as call:
            await call(Request("after"))
    assert [span.name for span in recorder.spans if span.kind.name == "CLIENT"] == ["after"]


@pytest.mark.parametrize("which", ["tracer_provider", "meter_provider"])
async def test_spans_alone_and_measurements_alone_will_do(recorder: Any, which: str) -> None:
    only: dict[str, Any] = {which: getattr(recorder, which)}
    telemetry = Telemetry(**only)
    stack = telemetry.instrument(Stack(*INSIDE))
    async with stack.serve("memory://calls", echo), stack.connect("memory://calls") as call:
        await call(Request("get"))
        async with open_stream(call, Request("get")) as stream:
            await stream.response()
    assert bool(recorder.spans) is (which == "tracer_provider")
    assert recorder.count("rpc.client.call.duration") == (2 if which == "meter_provider" else 0)


# --- what fails ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    """A bug in an SDK."""


class BrokenAtStart(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise Broken


class BrokenAtEnd(SpanProcessor):
    def on_end(self, span: Any) -> None:
        raise Broken


class BrokenSampler(Sampler):
    def should_sample(self, *args: Any, **kwargs: Any) -> Any:
        raise Broken

    def get_description(self) -> str:
        return "broken"


class BrokenInstrument:
    def __getattr__(self, name: str) -> Any:
        def raises(*args: Any, **kwargs: Any) -> Any:
            raise Broken

        return raises


class BrokenMeter(metrics.NoOpMeter):
    def _broken(self, *args: Any, **kwargs: Any) -> Any:
        return BrokenInstrument()

    create_counter = create_histogram = _broken


class BrokenMeterProvider(metrics.MeterProvider):
    def get_meter(self, *args: Any, **kwargs: Any) -> metrics.Meter:
        return BrokenMeter("broken")


class BrokenPropagator:
    fields = frozenset({"traceparent"})

    def inject(self, *args: Any, **kwargs: Any) -> None:
        raise Broken

    def extract(self, *args: Any, **kwargs: Any) -> Any:
        raise Broken


def broken_at_start() -> dict[str, Any]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BrokenAtStart())
    return {"tracer_provider": provider}


def broken_at_end() -> dict[str, Any]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BrokenAtEnd())
    return {"tracer_provider": provider}


def broken_sampler() -> dict[str, Any]:
    return {"tracer_provider": TracerProvider(BrokenSampler(), shutdown_on_exit=False)}


class BrokenProvider(TracerProvider):
    def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
        raise Broken


def broken_provider() -> dict[str, Any]:
    return {"tracer_provider": BrokenProvider(shutdown_on_exit=False)}


def broken_meter() -> dict[str, Any]:
    return {"meter_provider": BrokenMeterProvider()}


@pytest.fixture
def broken_propagator() -> Iterator[None]:
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(BrokenPropagator())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    yield
    propagate.set_global_textmap(before)


async def all_goes_well(telemetry: Telemetry) -> None:
    failures = iter([True])

    async def handler(request: Request, /) -> Response:
        for _ in failures:
            raise ConnectionResetError
        if request.stream is not None:
            await request.stream.send(b"message")
        await anyio.sleep(3)
        return Response(b"answer")

    policy = StandardPolicy(Backoff.constant(1), on=Exception, idempotent=True)
    server = telemetry.instrument(Stack(*INSIDE))
    client = telemetry.instrument(Stack(Retry(policy), CircuitBreaker(), Reconnect("memory://calls"), *INSIDE))
    async with server.serve("memory://calls", handler) as listening, client.open() as call:

        async def cut() -> None:
            await anyio.sleep(2)
            listening.sessions[0].drop_link(LinkLost("cut"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cut)
            assert (await call(Request("get"))).payload == b"answer"
        async with open_stream(call, Request("tail")) as stream:
            assert await stream.receive() == b"message"
            assert (await stream.response()).payload == b"answer"


@pytest.mark.parametrize("options", [broken_at_start, broken_at_end, broken_sampler, broken_provider, broken_meter])
async def test_an_sdk_that_raises_harms_no_call_and_no_session(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    await all_goes_well(Telemetry(**options()))
    assert "Broken" in caplog.text
    assert not trace.get_current_span().get_span_context().is_valid


async def test_a_propagator_that_raises_harms_no_call(
    recorder: Any, broken_propagator: None, caplog: pytest.LogCaptureFixture
) -> None:
    await all_goes_well(recorder.telemetry)
    assert "Broken" in caplog.text
    assert len(recorder.named("get", "CLIENT")) == 3


async def test_what_observes_raises_nothing_where_a_session_ends_meanwhile(recorder: Any) -> None:
    stack = recorder.telemetry.instrument(Stack(Resume(), Framing()))

    async def ends(session: Any) -> None:
        await session.receive()

    async with stack.serve("memory://calls", ends):
        for _ in range(3):
            async with stack.connect("memory://calls") as session:
                await session.send(b"x")
                assert recorder.count("towline.sessions", side="dialling", state="attached") == 1
    assert recorder.count("towline.sessions") == 0
