"""A real proxy between real sockets that cuts what it carries: the network of the demo and of the tests of programs.

    async with ChaosProxy(server.endpoint, seed=1, cut_every=0.3) as proxy:
        ...  # connect to proxy.endpoint

It speaks TCP to TCP and Unix to Unix, knows nothing of what it carries, and fails as networks do: at a random byte, in
the middle of whatever that is.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from types import TracebackType
from typing import Final, Literal

import anyio
from anyio.abc import TaskGroup

from towline.endpoint import Endpoint
from towline.errors import EndpointError, LinkLost, TowlineError
from towline.link import Link
from towline.service import Dial
from towline.stage import Driver
from towline.transport import Listener, Transport
from towline.transports import Tcp, Unix

__all__ = ["ChaosProxy", "CutKind"]

CutKind = Literal["reset", "close", "blackhole"]

IDLE_SHARE: Final = 0.5
"""A connection that carries nothing when its time has come is cut this share of ``cut_every`` later."""


class ChaosProxy:
    """A proxy that carries connections to a target, and cuts each of them when its time has come.

    A connection lives for about ``cut_every`` seconds. Then a random part of the next read is still passed on, and it
    is cut, in one of these ways:

    - ``reset``: both sides see a reset (on Unix sockets, which have none, the end of the stream);
    - ``close``: both sides see the other end its direction, as if on purpose;
    - ``blackhole``: nothing is passed on any more, and nobody is told. The sockets stay open until the side that
      connected gives up.

    Args:
        target: where to: ``tcp://`` or ``unix://``.
        endpoint: where to listen; by default a free port of 127.0.0.1, or a socket in a temporary directory.
        seed: of all that is random here.
        cut_every: seconds that a connection lives: 0.75 to 1.25 times this, so on average just this. None: none is
            cut, except by `cut_now`.
        how: the ways, in turn.

    Attributes:
        endpoint: what is really bound: connect to this.
        cuts: connections that were cut.
        connections: connections that were accepted.
        is_calm: set it to True, and no more are cut.
        is_open: set it to False, and every connection is reset as soon as it is made.
    """

    def __init__(
        self,
        target: str | Endpoint,
        *,
        endpoint: str | Endpoint | None = None,
        seed: int = 0,
        cut_every: float | None = None,
        how: tuple[CutKind, ...] = ("reset", "close", "blackhole"),
    ) -> None:
        self.target = Endpoint.parse(target)
        self.cut_every = cut_every
        self.cuts = 0
        self.connections = 0
        self.is_calm = False
        self.is_open = True
        self._transport: Transport = _transport(self.target)
        self._directory: str | None = None
        self.endpoint = self._own_endpoint() if endpoint is None else Endpoint.parse(endpoint)
        self._how = how
        self._random = random.Random(seed)
        self._relays: set[_Relay] = set()
        self._listener: Listener | None = None
        self._tasks: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<ChaosProxy {self.endpoint} to {self.target} live={self.live} cuts={self.cuts}>"

    def _own_endpoint(self) -> Endpoint:
        if self.target.scheme == "tcp":
            return Endpoint.parse("tcp://127.0.0.1:0")
        self._directory = tempfile.mkdtemp(prefix="towline-")
        return Endpoint("unix", path=os.path.join(self._directory, "proxy"))

    async def __aenter__(self) -> ChaosProxy:
        try:
            self._listener = await self._transport.listen(self.endpoint)
        except BaseException:
            self._remove_directory()
            raise
        self.endpoint = self._listener.endpoint
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._listener.serve, self._accepted)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool | None:
        assert self._tasks is not None
        assert self._listener is not None
        self._tasks.cancel_scope.cancel()
        # An error of the block is not the task group's: it would leave as an ExceptionGroup.
        cancelled = isinstance(exc_val, anyio.get_cancelled_exc_class())
        try:
            if cancelled:
                return await self._tasks.__aexit__(exc_type, exc_val, exc_tb)
            await self._tasks.__aexit__(None, None, None)
            return None
        finally:
            with anyio.CancelScope(shield=True):
                await self._listener.aclose()
            self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def live(self) -> int:
        """Connections that are carried now: accepted, and not cut."""
        return sum(relay.is_live for relay in self._relays)

    def cut_now(self, how: CutKind | None = None) -> int:
        """Cut every connection at once, in this way or in the next one in turn. Returns how many."""
        live = [relay for relay in self._relays if relay.is_live]
        for relay in live:
            relay.cut(how)
        return len(live)

    def next_cut(self) -> CutKind:
        """Count a cut, and say in which way it is."""
        how = self._how[self.cuts % len(self._how)]
        self.cuts += 1
        return how

    def lifetime(self) -> float:
        """How long a new connection lives."""
        if self.cut_every is None:
            return float("inf")
        return self.cut_every * self._random.uniform(0.75, 1.25)

    def prefix(self, size: int) -> int:
        """How many bytes of the last read are passed on."""
        return self._random.randrange(size)

    def _accepted(self, link: Link) -> None:
        self.connections += 1
        if not self.is_open:
            link.driver.abort()
            return
        assert self._tasks is not None
        relay = _Relay(self, link.driver)
        self._relays.add(relay)
        self._tasks.start_soon(self._serve, relay)

    async def _serve(self, relay: _Relay) -> None:
        try:
            target = (await self._transport(Dial(self.target))).driver
        except TowlineError:
            relay.near.abort()
            self._relays.remove(relay)
            return
        except BaseException:
            relay.near.abort()
            raise
        try:
            await relay.run(target)
        finally:
            relay.near.abort()
            target.abort()
            self._relays.discard(relay)


class _Relay:
    """One connection through the proxy."""

    def __init__(self, proxy: ChaosProxy, near: Driver) -> None:
        self.near = near
        self._proxy = proxy
        self._how: CutKind | None = None
        self._cut_at = float("inf")
        self._scope = anyio.CancelScope()
        self._ended = 0

    @property
    def is_live(self) -> bool:
        return self._how is None

    def cut(self, how: CutKind | None = None) -> None:
        """End it, in the way that is next in turn unless ``how`` says another."""
        if self._how is None:
            turn = self._proxy.next_cut()
            self._how = how or turn
            self._scope.cancel()

    async def run(self, far: Driver) -> None:
        near = self.near
        life = self._proxy.lifetime()
        self._cut_at = anyio.current_time() + life
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, life * (1 + IDLE_SHARE))
            with self._scope:
                async with anyio.create_task_group() as pumps:
                    pumps.start_soon(self._pump, near, far)
                    pumps.start_soon(self._pump, far, near)
            tasks.cancel_scope.cancel()
        match self._how:
            case "close":
                await _close(near, far)
            case "blackhole":
                await _swallow(near, far)
            case _:
                if self._ended == 2:
                    await _close(near, far)
                # else: whoever called us aborts both

    async def _watch(self, seconds: float) -> None:
        """Cut what nothing moves on, or what is stuck."""
        if seconds == float("inf"):
            return
        while True:
            await anyio.sleep(seconds)
            if not self._proxy.is_calm:
                self.cut()

    async def _pump(self, source: Driver, sink: Driver) -> None:
        """Carry one direction until it ends, breaks, or its time has come."""
        try:
            while data := await source.read():
                if anyio.current_time() >= self._cut_at and not self._proxy.is_calm:
                    await sink.write(data[: self._proxy.prefix(len(data))])
                    self.cut()
                    return
                await sink.write(data)
            await sink.send_eof()
            self._ended += 1
        except LinkLost:
            # One side is broken: then so is the other. No cut, since nobody here did it.
            self._scope.cancel()


async def _close(*drivers: Driver) -> None:
    async with anyio.create_task_group() as tasks:
        for driver in drivers:
            tasks.start_soon(driver.aclose)


async def _swallow(near: Driver, far: Driver) -> None:
    """Take everything and tell nobody, until the near side gives up. The kernel's acknowledgements go on."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_discard, far)
        await _discard(near)
        tasks.cancel_scope.cancel()


async def _discard(driver: Driver) -> None:
    with contextlib.suppress(LinkLost):
        while await driver.read():
            pass


def _transport(endpoint: Endpoint) -> Transport:
    match endpoint.scheme:
        case "tcp":
            return Tcp()
        case "unix":
            return Unix()
        case _:
            raise EndpointError(f"ChaosProxy carries tcp:// and unix://, not {endpoint}")
