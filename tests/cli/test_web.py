"""What is answered over HTTP, to real sockets: health, metrics, the page and its stream, and its limits."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest

from towline import Framing, Heartbeat, Resume, Stack
from towline.cli import _web
from towline.cli._metrics import Metrics
from towline.cli._status import Snapshot, Watch
from towline.cli._web import serve_web
from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, LinkLost
from towline.service import Dial
from towline.stage import Driver
from towline.transports import Tcp
from towline.tunnel import Exit, listen

pytestmark = pytest.mark.real_time

LOOPBACK = "tcp://127.0.0.1:0"


@asynccontextmanager
async def open_site(
    address: str = LOOPBACK, *, with_metrics: bool = True
) -> AsyncGenerator[tuple[Endpoint, Watch, Exit]]:
    with Metrics() as metrics:
        stack = metrics.instrument(Stack(Resume(), Heartbeat(), Framing()))
        async with listen(stack, LOOPBACK, "tcp://127.0.0.1:9") as exit_:
            watch = Watch(exit_)
            metrics.observe(watch)
            async with (
                serve_web(Endpoint.parse(address), watch, metrics if with_metrics else None) as bound,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(watch.run)
                yield bound, watch, exit_
                tasks.cancel_scope.cancel()


async def connect(endpoint: Endpoint) -> Driver:
    return (await Tcp()(Dial(Endpoint.parse(f"tcp://127.0.0.1:{endpoint.port}")))).driver


async def read_all(driver: Driver) -> bytes:
    data = b""
    with anyio.fail_after(20):
        while more := await driver.read():
            data += more
    driver.abort()
    return data


class Answer:
    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    @property
    def text(self) -> str:
        return self.body.decode()


async def send(endpoint: Endpoint, request: bytes) -> Answer:
    driver = await connect(endpoint)
    try:
        await driver.write(request)
        return Answer(await read_all(driver))
    finally:
        driver.abort()


async def get(endpoint: Endpoint, path: str, host: str = "localhost", method: str = "GET") -> Answer:
    return await send(endpoint, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


# --- what is there -------------------------------------------------------------------------------------------------


async def test_health() -> None:
    async with open_site() as (site, watch, exit_):
        alive, ready = await get(site, "/livez"), await get(site, "/readyz?verbose")
        assert (alive.status, alive.text) == (200, "ok\n")
        assert (ready.status, ready.text) == (200, "0 sessions\n")
        await exit_.drain(0)
        watch.refresh()
        alive, ready = await get(site, "/livez"), await get(site, "/readyz")
        assert alive.status == 200
        assert (ready.status, ready.text) == (503, "draining, 0 sessions\n")


async def test_metrics_are_what_prometheus_reads() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async with open_site() as (site, watch, _):
        answer = await get(site, "/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        assert samples["towline_tunnel_waiting",] == 0
        assert samples["towline_tunnel_traffic_bytes_total", "sent"] == 0
        # The names of sessions would be a series each, for ever.
        assert not any("session_id" in name for name, *_ in samples)
        assert watch.snapshot.version in answer.text


async def test_without_the_extra_metrics_say_what_to_install() -> None:
    async with open_site(with_metrics=False) as (site, _, _):
        answer = await get(site, "/metrics")
        assert answer.status == 501
        assert answer.text == "metrics need the extra 'metrics': pip install 'towline[cli,metrics]'\n"
        assert (await get(site, "/livez")).status == 200


async def test_the_page_is_one_file_under_a_strict_policy() -> None:
    async with open_site() as (site, _, _):
        page = await get(site, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, source in (("script", policy["script-src"]), ("style", policy["style-src"])):
        inside = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
        assert len(inside) == 1
        assert source == f"'sha256-{base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()}'"
    assert not re.search(r"https?://|\bsrc=|\bhref=|\bstyle=|\bon\w+=\"|innerHTML|@import|url\(", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
    assert not any(name.startswith("access-control") for name in page.headers)


async def test_the_stream_is_snapshots() -> None:
    async with open_site() as (site, _, exit_):
        driver = await connect(site)
        await driver.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        with anyio.fail_after(20):
            while data.count(b"data: ") < 3 or not data.endswith(b"\n\n\r\n"):
                data += await driver.read()
        driver.abort()
        assert b"text/event-stream" in data
        events = [json.loads(line) for line in re.findall(rb"data: (\{.*\})\n\n", data)]
        assert all(event["endpoint"] == str(exit_.endpoint) and event["sessions"] == [] for event in events)
        assert events[0]["uptime"] < events[-1]["uptime"]


async def test_the_stream_ends_with_the_tunnels_watch() -> None:
    async with open_site() as (site, watch, _):
        driver = await connect(site)
        await driver.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await driver.read()
        watch.close()
        assert (await read_all(driver)).endswith(b"0\r\n\r\n")


# --- what is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nabcd", 405),
        (b"DELETE /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: 10.0.0.1:9090\r\n\r\n", 421),
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000, 431),
        (b"GET /livez HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: towline.localhost\r\n\r\n", 200),
        (b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
    ],
)
async def test_each_request_has_its_answer(request_: bytes, status: int) -> None:
    async with open_site() as (site, _, _):
        answer = await send(site, request_)
        assert answer.status == status, answer.text
        assert answer.headers["connection"] == "close"
        assert (await get(site, "/livez")).status == 200


@pytest.mark.parametrize("path", ["/", "/livez", "/events", "/metrics", "/nothing"])
async def test_head_is_the_head_alone(path: str) -> None:
    async with open_site() as (site, _, _):
        answer = await get(site, path, method="HEAD")
        assert answer.status == (404 if path == "/nothing" else 200)
        assert answer.body == b""


async def test_who_is_silent_or_slow_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_web, "REQUEST_TIMEOUT", 0.1)
    async with open_site() as (site, _, _):
        for beginning in (b"", b"GET / HT"):
            driver = await connect(site)
            if beginning:
                await driver.write(beginning)
            with anyio.fail_after(20), contextlib.suppress(LinkLost):
                assert await driver.read() == b""
            driver.abort()


async def test_who_does_not_take_the_stream_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_web, "WRITE_TIMEOUT", 0.2)

    def encode(_: Snapshot) -> bytes:
        return b"x" * (8 << 20)

    monkeypatch.setattr(_web, "_encode", encode)
    monkeypatch.setattr(_web, "MAX_FOLLOWERS", 1)
    async with open_site() as (site, _, _):
        slow = await connect(site)
        await slow.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await slow.read()
        with anyio.fail_after(20):
            while (await get(site, "/events", method="HEAD")).status == 503:  # noqa: ASYNC110 -- it is far away
                await anyio.sleep(0.05)
        slow.abort()


async def test_connections_and_pages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_web, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(_web, "MAX_FOLLOWERS", 1)
    async with open_site() as (site, _, _):
        page = await connect(site)
        await page.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in await page.read()
        answer = await get(site, "/events")
        assert (answer.status, answer.text) == (503, "there are 1 pages open\n")
        others = [await connect(site) for _ in range(2)]
        with pytest.raises((LinkLost, ConnectFailed)):  # it is reset as soon as it is there
            await send(site, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for driver in others:
            driver.abort()
        with anyio.fail_after(20):
            while True:
                try:
                    assert (await get(site, "/livez")).status == 200
                    break
                except (LinkLost, ConnectFailed):
                    await anyio.sleep(0.02)
        page.abort()


# --- where ---------------------------------------------------------------------------------------------------------


async def test_beyond_loopback_it_warns_and_takes_any_name(caplog: pytest.LogCaptureFixture) -> None:
    async with open_site("tcp://0.0.0.0:0") as (site, _, _):
        assert (await get(site, "/livez", host="proxy.example")).status == 200
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.getMessage() == (f"--metrics: whoever reaches {site} can read it, as there is no authentication")


async def test_on_loopback_it_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    async with open_site():
        pass
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


async def test_a_port_in_use_is_an_error() -> None:
    async with open_site() as (site, watch, _):
        with pytest.raises(ConnectFailed, match="is in use"):
            async with serve_web(site, watch, None):
                pass
