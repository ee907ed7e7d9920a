"""The demo: messages both ways through a link that keeps being cut, and the proof that nothing became of them.

Every message carries its direction, its number and content that follows from these and the seed. So the receiver
knows what must come next, byte for byte, and can say of anything else what it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import anyio

from towline.endpoint import Endpoint
from towline.errors import TowlineError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume, Session
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.stack import Stack
from towline.testing import ChaosProxy

from ._failure import Failure

__all__ = ["Ledger", "Payloads", "Progress", "Report", "Settings", "run_demo"]

DURATION: Final = 10.0
"""The senders spread their messages over so many seconds, as long as the link keeps up."""

BURSTS: Final = 40
"""In so many bursts, so that buffers fill and links are cut with much under way."""

SMALLEST: Final = 16
LARGEST: Final = 4 << 20
MOST: Final = 100_000_000

BLOCK: Final = 1 << 16
"""Contents are slices of a random block that is this much longer than a message."""

STRIDE: Final = 40_503
"""The slices of two messages in a row are so far apart; odd, so that 65 536 in a row all differ."""

_HEAD: Final = struct.Struct(">cQ")

SHOW_EVERY: Final = 0.25
GOODBYE_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo is asked to do. Build it with `checked`."""

    messages: int
    size: int
    cut_every: float
    seed: int
    scheme: str
    endpoint: Endpoint | None

    @classmethod
    def checked(cls, *, messages: int, size: int, cut_every: float, seed: int, endpoint: str) -> Settings:
        """The settings from the options.

        Raises:
            Failure: if one makes no sense.
        """
        for option, value, least, most in (
            ("--messages", messages, 1, MOST),
            ("--size", size, SMALLEST, LARGEST),
        ):
            if not least <= value <= most:
                raise Failure(f"{option}: {value:,}, where {least:,} to {most:,} will do")
        if cut_every != 0 and not 0.01 <= cut_every <= 1e6:
            raise Failure(f"--cut-every: {cut_every:g} s, where 0.01 or more will do, or 0 for never")
        scheme, parsed = endpoint.removesuffix("://"), None
        if scheme not in ("tcp", "unix"):
            try:
                parsed = Endpoint.parse(endpoint)
            except ValueError as error:
                raise Failure(f"--endpoint: {error}") from None
            scheme = parsed.scheme
            if scheme not in ("tcp", "unix"):
                raise Failure(f"--endpoint: the demo runs over tcp and unix, not {parsed}")
        return cls(messages, size, cut_every, seed, scheme, parsed)


class Payloads:
    """The messages of one direction.

    Args:
        direction: one byte.
        size: of each message.
        seed: of their contents.
    """

    def __init__(self, direction: bytes, size: int, seed: int) -> None:
        self.direction = direction
        self._rest = size - _HEAD.size
        self._block = random.Random(f"{seed} {direction!r}").randbytes(BLOCK + self._rest)

    def __call__(self, number: int) -> bytes:
        """Message ``number``, counted from 0."""
        start = number * STRIDE % BLOCK
        return _HEAD.pack(self.direction, number) + self._block[start : start + self._rest]

    def number(self, message: bytes) -> int | None:
        """Which message this is, byte for byte; None if it is none of this direction."""
        if len(message) != self._rest + _HEAD.size:
            return None
        number: int = _HEAD.unpack_from(message)[1]
        return number if self(number) == message else None


class Ledger:
    """The books of one direction: what was sent, what came, and what became of the difference.

    Attributes:
        sent: messages that were sent.
        received: messages that came, whatever they were.
        duplicated: messages that had come before.
        reordered: messages that came after one with a higher number.
        corrupted: messages that nobody sent like that.
    """

    def __init__(self, payloads: Payloads, total: int) -> None:
        self.payloads = payloads
        self.total = total
        self.sent = 0
        self.received = 0
        self.duplicated = 0
        self.reordered = 0
        self.corrupted = 0
        self._next = 0  # one after the highest number that came
        self._seen = bytearray(total)

    @property
    def lost(self) -> int:
        """Messages that should have been sent and did not come as they were."""
        return self.total - sum(self._seen)

    def receive(self, messages: Sequence[bytes]) -> None:
        """Book what came."""
        payloads, seen = self.payloads, self._seen
        self.received += len(messages)
        for message in messages:
            number = self._next
            if number < self.total and message == payloads(number):
                seen[number] = 1
                self._next += 1
            else:
                self._book_unexpected(message)

    def _book_unexpected(self, message: bytes) -> None:
        number = self.payloads.number(message)
        if number is None or number >= self.total:
            self.corrupted += 1
        elif self._seen[number]:
            self.duplicated += 1
        else:
            self._seen[number] = 1
            if number < self._next:
                self.reordered += 1
            else:
                self._next = number + 1


@dataclass(frozen=True, slots=True)
class Report:
    """The result, as sums over both directions."""

    sent: int
    received: int
    lost: int
    duplicated: int
    reordered: int
    corrupted: int
    cuts: int
    resumes: int
    replayed: int
    seconds: float

    @property
    def is_proof(self) -> bool:
        """Whether every message came once, in order and as it was."""
        return not (self.lost or self.duplicated or self.reordered or self.corrupted)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Progress:
    """What a view may show at any moment; both ends are in this process."""

    ledgers: tuple[Ledger, ...]
    proxy: ChaosProxy
    size: int
    sessions: list[Session]
    began: float
    trouble: str = ""
    rtt: float | None = None
    """The last round trip that the client measured, in seconds."""

    @property
    def total(self) -> int:
        return sum(ledger.total for ledger in self.ledgers)

    @property
    def seconds(self) -> float:
        return anyio.current_time() - self.began

    @property
    def buffered(self) -> int:
        """What waits in both replay buffers, in bytes."""
        return sum(session.buffered for session in self.sessions)

    def report(self) -> Report:
        """The result so far."""
        ledgers = self.ledgers
        return Report(
            sent=sum(ledger.sent for ledger in ledgers),
            received=sum(ledger.received for ledger in ledgers),
            lost=sum(ledger.lost for ledger in ledgers),
            duplicated=sum(ledger.duplicated for ledger in ledgers),
            reordered=sum(ledger.reordered for ledger in ledgers),
            corrupted=sum(ledger.corrupted for ledger in ledgers),
            cuts=self.proxy.cuts,
            # One resume is seen by both ends: the client's count, which misses none.
            resumes=self.sessions[0].statistics.resumes if self.sessions else 0,
            replayed=sum(session.statistics.replayed for session in self.sessions),
            seconds=round(self.seconds, 3),
        )


async def run_demo(settings: Settings, show: Callable[[Progress], None]) -> Report:
    """Run the demo.

    Args:
        settings: what to do.
        show: called a few times a second with how it stands.

    Raises:
        ConnectFailed: if the endpoint cannot be bound.
    """
    stack = Stack(
        Resume(),
        Retry(Backoff.exponential(initial=0.05)),
        Heartbeat(interval=0.1, timeout=0.4),  # so that a black hole is seen at once (D31)
        Framing(),
        Encryption(psk=Psk.generate()),
    )
    outward, inward = (
        Ledger(Payloads(direction, settings.size, settings.seed), settings.messages) for direction in (b">", b"<")
    )
    finished = anyio.Event()

    async def handler(session: Session) -> None:
        progress.sessions.append(session)
        try:
            await _both(lambda: _send(session, inward), lambda: _receive(session, outward))
        except TowlineError as error:
            progress.trouble = progress.trouble or f"server: {error}"
            raise
        finally:
            finished.set()

    with _endpoint(settings) as endpoint:
        async with (
            stack.serve(endpoint, handler) as server,
            ChaosProxy(server.endpoint, seed=settings.seed, cut_every=settings.cut_every or None) as proxy,
        ):
            progress = Progress((outward, inward), proxy, settings.size, [], anyio.current_time())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_show, progress, show)
                try:
                    async with stack.connect(proxy.endpoint) as session:
                        progress.sessions.insert(0, session)
                        await _both(lambda: _send(session, outward), lambda: _receive(session, inward))
                except TowlineError as error:
                    # Not the end: the books say what it means.
                    progress.trouble = progress.trouble or f"client: {error}"
                if progress.sessions:
                    with anyio.move_on_after(GOODBYE_TIMEOUT):
                        await finished.wait()
                tasks.cancel_scope.cancel()
            return progress.report()


@contextlib.contextmanager
def _endpoint(settings: Settings) -> Generator[Endpoint]:
    """Where the server listens."""
    if settings.endpoint is not None:
        yield settings.endpoint
    elif settings.scheme == "tcp":
        yield Endpoint.parse("tcp://127.0.0.1:0")
    else:
        directory = tempfile.mkdtemp(prefix="towline-")
        try:
            yield Endpoint("unix", path=os.path.join(directory, "demo"))
        finally:
            shutil.rmtree(directory, ignore_errors=True)


async def _show(progress: Progress, show: Callable[[Progress], None]) -> None:
    while True:
        if progress.sessions:
            progress.rtt = progress.sessions[0].rtt or progress.rtt
        show(progress)
        await anyio.sleep(SHOW_EVERY)


async def _both(*parts: Callable[[], Awaitable[None]]) -> None:
    """Run parts at once; the first error ends the others and is raised as it is."""
    errors: list[Exception] = []

    async def guarded(part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except Exception as error:
            errors.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for part in parts:
            tasks.start_soon(guarded, part)
    if errors:
        raise errors[0]


async def _send(session: Session, ledger: Ledger) -> None:
    began = anyio.current_time()
    total, payloads = ledger.total, ledger.payloads
    for burst in range(1, BURSTS + 1):
        for number in range(ledger.sent, burst * total // BURSTS):
            await session.send(payloads(number))
            ledger.sent += 1
        await anyio.sleep_until(began + burst * DURATION / BURSTS)
    await session.send_eof()


async def _receive(session: Session, ledger: Ledger) -> None:
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            ledger.receive(await session.receive_many())
