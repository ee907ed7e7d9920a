"""The server of the trace across two processes: ``python server.py BACKEND``.

It tells where it listens. Its handler tells that it has begun, and goes on when a line comes; the first call is turned
away then. When a line comes after the second call, it ends, and prints what it has told OpenTelemetry, one JSON object
a line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anyio
import anyio.to_thread
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from towline import (
    CallFailed,
    Encryption,
    Framing,
    Heartbeat,
    Psk,
    Request,
    Response,
    Resume,
    Rpc,
    Stack,
    StatusCode,
)
from towline.telemetry import Telemetry

STACK: Stack[Any, Any, Any, Any] = Stack(
    Rpc(), Resume(), Heartbeat(interval=60, timeout=180), Framing(), Encryption(psk=Psk(bytes(range(32))))
)


async def main() -> None:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("server")
    calls = 0
    answered = anyio.Event()

    async def handler(request: Request, /) -> Response:
        nonlocal calls
        calls += 1
        with tracer.start_as_current_span("work"):
            print("begun", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            if calls == 1:
                raise CallFailed(StatusCode.UNAVAILABLE)
        answered.set()
        return Response(b"answer")

    telemetry = Telemetry(tracer_provider=provider, meter_provider=MeterProvider([reader]))
    async with telemetry.instrument(STACK).serve("tcp://127.0.0.1:0", handler) as server:
        print(server.endpoint, flush=True)
        await answered.wait()
        await anyio.to_thread.run_sync(sys.stdin.readline)
    for span in exporter.get_finished_spans():
        print(json.dumps({"span": json.loads(span.to_json())}))
    data = reader.get_metrics_data()
    assert data is not None
    print(json.dumps({"metrics": json.loads(data.to_json())}), flush=True)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1])
