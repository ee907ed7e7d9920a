"""Links that fail on purpose: at a given byte, after a given time, or as a seed says.

    Chaos(Tcp(), cuts=[Cut(sent=100), Cut(received=7, how="close")])     the first link, the second; then none
    Chaos(Memory(), seed=1, mean=5000)                                   every link, at random bytes

The failure is real to the stack above: it sees what a network shows it, no sooner and no later.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import LinkLost
from towline.link import Link
from towline.service import Dial
from towline.stage import Driver
from towline.transport import Listener, Transport

__all__ = ["Chaos", "ChaosDriver", "Cut", "How"]

How = Literal["reset", "close", "blackhole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where and how a link fails. The first limit that is reached counts.

    Attributes:
        sent: after so many bytes that the dialling side sent; what is beyond never leaves.
        received: after so many bytes that it received; what is beyond never arrives.
        seconds: after so long.
        how: ``reset`` aborts both sides; ``close`` ends both directions as if on purpose; ``blackhole`` swallows
            everything from then on, and tells nobody.
    """

    sent: int | None = None
    received: int | None = None
    seconds: float | None = None
    how: How = "reset"


class ChaosDriver(Driver):
    """A driver that fails as its `Cut` says."""

    def __init__(self, inner: Driver, cut: Cut) -> None:
        self._inner = inner
        self._cut = cut
        self.inline = inner.inline
        self.is_cut = False
        self._sent = 0
        self._received = 0
        self._closed = anyio.Event()
        self._reading: anyio.CancelScope | None = None
        self._cut_at = math.inf if cut.seconds is None else anyio.current_time() + cut.seconds

    @property
    def accepted(self) -> int:  # type: ignore[override]
        return self._inner.accepted

    @property
    def unsent(self) -> bool:  # type: ignore[override]
        return self._inner.unsent and not self.is_cut

    def cut_now(self) -> None:
        """Fail at once."""
        if self.is_cut:
            return
        self.is_cut = True
        if self._cut.how == "reset":
            self._inner.abort()
        if self._reading is not None:
            self._reading.cancel()

    async def read(self) -> bytes:
        limit = self._cut.received
        data = b""
        if limit is not None and self._received >= limit:
            self.cut_now()
        if not self.is_cut:
            with anyio.CancelScope(deadline=self._cut_at) as self._reading:
                data = await self._inner.read()
            if self._reading.cancelled_caught:
                self.cut_now()
            self._reading = None
        if self.is_cut:
            return await self._read_cut()
        limit = self._cut.received  # it may have been changed meanwhile
        if limit is not None and data:
            data = data[: max(0, limit - self._received)]
            if not data:
                self.cut_now()
                return await self._read_cut()
        self._received += len(data)
        return data

    async def _read_cut(self) -> bytes:
        if self._cut.how == "reset":
            raise LinkLost("the link was cut")
        if self._cut.how == "close":
            await self._inner.aclose()
            return b""
        await self._closed.wait()
        raise LinkLost("it was aborted here")

    def _take(self, data: bytes | bytearray) -> tuple[bytes | bytearray, bool]:
        limit = self._cut.sent
        if self.is_cut:
            return b"", True
        if anyio.current_time() >= self._cut_at:
            return b"", True
        if limit is not None and self._sent + len(data) > limit:
            data = data[: limit - self._sent]
            self._sent = limit
            return data, True
        self._sent += len(data)
        return data, False

    async def write(self, data: bytes | bytearray) -> None:
        part, cut = self._take(data)
        if not self.is_cut:
            await self._inner.write(part)
        if cut:
            self._after_cut()
            await anyio.lowlevel.checkpoint()

    def write_now(self, data: bytes | bytearray) -> None:
        part, cut = self._take(data)
        if part:
            self._inner.write_now(part)
        if cut:
            self._after_cut()

    def _after_cut(self) -> None:
        self.cut_now()
        if self._cut.how == "reset":
            raise LinkLost("the link was cut")

    async def send_eof(self) -> None:
        if not self.is_cut:
            await self._inner.send_eof()

    def abort(self) -> None:
        self._closed.set()
        self._inner.abort()

    async def aclose(self) -> None:
        self._closed.set()
        await self._inner.aclose()

    @property
    def description(self) -> str:
        return f"{self._inner.description}, to be cut"


class Chaos(Transport):
    """A transport whose dialled links fail on purpose; what listens is left alone.

    Args:
        inner: what really connects.
        cuts: how the first, the second, … link fails; links after the last one live.
        seed: instead: every link fails, at a random byte in a random direction.
        mean: with a seed: how many bytes a link carries on average.
        how: with a seed: the ways to fail, one at random.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        cuts: Iterable[Cut] = (),
        seed: int | None = None,
        mean: int = 10_000,
        how: tuple[How, ...] = ("reset", "close"),
    ) -> None:
        self.inner = inner
        self.drivers: list[ChaosDriver] = []
        self.links: list[Link] = []
        self.is_calm = False
        self._cuts = iter(cuts)
        self._random = None if seed is None else random.Random(seed)
        self._mean = mean
        self._how = how

    @property
    def schemes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the transport inside."""
        return self.inner.schemes

    @property
    def cuts(self) -> int:
        """How many links have failed."""
        return sum(driver.is_cut for driver in self.drivers)

    def _next(self) -> Cut:
        if self.is_calm:
            return Cut()
        if self._random is None:
            return next(self._cuts, Cut())
        at = int(self._random.expovariate(1 / self._mean))
        how = self._random.choice(self._how)
        return Cut(sent=at, how=how) if self._random.random() < 0.5 else Cut(received=at, how=how)

    async def __call__(self, dial: Dial, /) -> Link:
        link = await self.inner(dial)
        cut = self._next()
        driver = ChaosDriver(link.driver, cut)
        link.driver = driver
        self.drivers.append(driver)
        self.links.append(link)
        return link

    async def listen(self, endpoint: Endpoint) -> Listener:
        return await self.inner.listen(endpoint)
