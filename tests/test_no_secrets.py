"""Case 48, whole: the bytes of a key, in any form, are looked for in all that a stack says of itself."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from towline import Encryption, Framing, Heartbeat, Psk, Reconnect, Request, Response, Resume, Retry, Rpc, Stack
from towline.config import StackConfig
from towline.errors import TowlineError
from towline.layers import AllowList, StaticKey, StaticKeys
from towline.layers.resume import ClientSession
from towline.telemetry import Telemetry
from towline.testing import Chaos
from towline.transports import Memory

Found: TypeAlias = Callable[[list[bytes], bytes], list[bytes]]


def test_the_search_finds_what_it_looks_for(found: Found) -> None:
    secret = os.urandom(32)
    for leak in (secret, secret.hex().encode(), base64.b64encode(secret), repr(secret).encode()):
        assert found([secret], b"so the key is " + leak + b", then")
    assert not found([secret], os.urandom(10_000))


# --- within a program -----------------------------------------------------------------------------------------------


async def echo(request: Request, /) -> Response:
    if request.payload == b"fail":
        raise ValueError("this went wrong")
    return Response(request.payload)


async def test_case_48_no_log_span_repr_error_or_dump_of_a_program_holds_a_key(
    found: Found,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "towline")
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = Telemetry(tracer_provider=tracers, meter_provider=meters)

    psk, ours, theirs = Psk.generate(), StaticKey.generate(), StaticKey.generate()
    secrets = [psk.secret, ours.secret, theirs.secret]
    said: list[str] = []

    def keep(*values: Any) -> None:
        for value in values:
            said.extend((repr(value), str(value), f"{value!s:>5}"))
            with contextlib.suppress(Exception):
                said.append(repr(pickle.dumps(value)))
            if isinstance(value, BaseException):
                said.extend(traceback.format_exception(value))

    def layers(own: StaticKey, other: StaticKey) -> tuple[Any, ...]:
        keys = StaticKeys(own, trust=AllowList([other.public_line("the other")]), psk=psk)
        return (Rpc(), Resume(), Retry(), Heartbeat(), Framing(), Encryption(keys=keys))

    chaos = Chaos(Memory(), seed=3)
    server = telemetry.instrument(Stack(*layers(theirs, ours), transports=(chaos,)))
    client = telemetry.instrument(
        Stack(Retry(), Reconnect("memory://here"), *layers(ours, theirs), transports=(chaos,))
    )
    async with server.serve("memory://here", echo) as listening, client.open() as call:
        assert (await call(Request("echo", b"hello"))).payload == b"hello"
        for session in listening.sessions:
            secrets.append(session.key)
            session.drop_link(TowlineError("cut"))
            keep(session, session.statistics, session.peer_identity)
        assert (await call(Request("echo", b"again"))).payload == b"again"
        with pytest.raises(TowlineError) as failed:
            await call(Request("echo", b"fail"))
        keep(failed.value, listening, call, call.stack)
        for wrong in (Encryption(psk=Psk.generate()), Encryption(psk=psk), Encryption(keys=_strange(theirs))):
            stack = telemetry.instrument(Stack(Rpc(), Resume(), Framing(), wrong, transports=(chaos,)))
            with pytest.raises(TowlineError) as refused:
                async with stack.connect("memory://here"):
                    pass
            keep(refused.value, stack, stack.layers)
    for stack in (server, client):
        keep(stack, stack.describe(), *stack.layers)
        with contextlib.suppress(TowlineError):
            config = stack.to_config()
            keep(config, config.model_dump(), config.model_dump(mode="json"), config.model_dump_json())
    async with Stack(Resume(), Framing(), Encryption(psk=psk), transports=(Memory(),)).open() as plain:
        await plain.serve("memory://there", _ignore)
        session = await plain.connect("memory://there")
        assert isinstance(session, ClientSession)
        secrets.append(session._key)
        keep(session, await anext(session.events()))
        session.abort()
    spans = exporter.get_finished_spans()
    assert len(spans) > 10
    said += [span.to_json() for span in spans]
    data = reader.get_metrics_data()
    assert data is not None
    said.append(data.to_json())
    records = [*caplog.records]
    assert len(records) > 10
    said += [record.getMessage() + repr(record.__dict__) for record in records]
    for line in said:
        assert found(secrets, line.encode()) == [], line


def _strange(known: StaticKey) -> StaticKeys:
    return StaticKeys(StaticKey.generate(), trust=AllowList([known.public_line()]))


async def _ignore(session: Any) -> None:
    await anyio.sleep(1)


def every_file(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_a_configuration_that_is_written_down_holds_no_key(found: Found, tmp_path: Path) -> None:
    psk = Psk.generate()
    config = Stack(Framing(), Encryption(psk=psk)).to_config("tcp://localhost:1")
    (tmp_path / "a.json").write_text(config.model_dump_json())
    psk.write(tmp_path / "psk")
    from_file = StackConfig.from_dict(
        {"layers": ["framing", {"kind": "encryption", "psk": {"file": str(tmp_path / "psk")}}]}
    )
    (tmp_path / "b.json").write_text(from_file.model_dump_json())
    for path in every_file(tmp_path):
        assert bool(found([psk.secret], path.read_bytes())) is (path.name == "psk")
    assert StackConfig.from_file(tmp_path / "b.json").build() == Stack(Framing(), Encryption(psk=psk))
