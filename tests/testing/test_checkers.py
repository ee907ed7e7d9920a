"""The contract checkers find what is broken: a checker that passes everything proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import anyio
import pytest

from towline.errors import HandshakeTimeout, ProtocolViolation
from towline.layers.framing import FramingStage
from towline.link import Link
from towline.scope import Scope
from towline.service import Dial, Kind, Service, Side, Upgrade
from towline.stage import CLEAN, Batch, Ended, Stage, Units
from towline.testing import StagePair, check_layer, check_stage

FLUSHES: list[Units] = [[Batch([b"note"], [b"one", b""])], [Batch([], [b"two"]), Batch([b"n"], [b"three"])]]


def pair_of(make: Callable[[], Stage]) -> Callable[[], StagePair]:
    return lambda: (make(), make())


@pytest.mark.smoke
def test_a_stage_that_keeps_the_contract_passes() -> None:
    check_stage(pair_of(lambda: FramingStage(1 << 16)), *FLUSHES, bad=b"\xff\xff\xff\xff")
    check_stage(pair_of(Stage), [b"bytes", b"as they are"])


class _LosesTheSplit(FramingStage):
    """Decodes each read for itself."""

    def incoming(self, units: Units, now: float) -> Units:
        self._parts, self._have, self._need = [], 0, 4
        return super().incoming(units, now)


class _RaisesTooSoon(FramingStage):
    def incoming(self, units: Units, now: float) -> Units:
        good = super().incoming(units, now)
        if isinstance(self.ended, ProtocolViolation):
            raise self.ended
        return good


class _KeepsTalking(FramingStage):
    wants = True


class _NoticesNoEnd(FramingStage):
    def receive_eof(self, ended: Ended) -> None:
        pass


class _SpeaksAfterTheEnd(Stage):
    def incoming(self, units: Units, now: float) -> Units:
        self.ended = CLEAN if units else None
        return units or [b"again"]


class _TimesOutForEver(FramingStage):
    deadline = 1.0


class _ForgetsTheCleanEnd(FramingStage):
    def close(self) -> Units:
        return [b"\x00\x00"]  # half a header: the other end sees a torn frame


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (_LosesTheSplit, "split at"),
        (_RaisesTooSoon, "set `ended`"),
        (_KeepsTalking, "wants more"),
        (_NoticesNoEnd, "did not notice"),
        (_SpeaksAfterTheEnd, "an empty read"),
        (_TimesOutForEver, "its deadline is"),
        (_ForgetsTheCleanEnd, "after a close"),
    ],
)
def test_a_stage_that_breaks_a_promise_is_told_which(broken: type[Stage], complaint: str) -> None:
    def make() -> Stage:
        return broken(1 << 16) if issubclass(broken, FramingStage) else broken()

    flushes = FLUSHES if issubclass(broken, FramingStage) else [[b"bytes"]]
    with pytest.raises(AssertionError, match=complaint):
        check_stage(pair_of(make), *flushes, bad=b"\xff\xff\xff\xff")


# --- layers ----------------------------------------------------------------------------------------------------------


class Polite(Upgrade):
    """Both ends say hello, within a bound of its own; bytes pass as they are."""

    needs: ClassVar[tuple[Kind, ...]] = (Kind.BYTES,)
    gives: ClassVar[Kind] = Kind.BYTES
    wire: ClassVar[str] = "polite/1"

    async def upgrade(self, link: Link, side: Side) -> None:
        with anyio.move_on_after(5) as scope:
            await self.greet(link, side)
        if scope.cancelled_caught:
            raise HandshakeTimeout("no hello within 5 s")
        link.push(Stage())

    async def greet(self, link: Link, side: Side) -> None:
        await link.send([b"hello"])
        assert await link.receive_exactly(5) == b"hello"


class _WaitsForEver(Polite):
    async def upgrade(self, link: Link, side: Side) -> None:
        if side.is_dialling:
            await link.send([b"hello"])
            await link.receive_exactly(5)
        else:
            await link.receive_exactly(5)
            await link.send([b"hello"])
        link.push(Stage())


class _InTurn(Polite):
    async def greet(self, link: Link, side: Side) -> None:
        if side.is_dialling:
            await link.send([b"hello"])
        assert await link.receive_exactly(5) == b"hello"
        if not side.is_dialling:
            await link.send([b"hello"])


class _Swallows(_InTurn):
    async def upgrade(self, link: Link, side: Side) -> None:
        await super().upgrade(link, side)

        class Hole(Stage):
            def incoming(self, units: Units, now: float) -> Units:
                return [unit.replace(b"y", b"") for unit in units]

        link.push(Hole())


class _KeepsItsDriver(_InTurn):
    """Forgets the link when its handshake is cancelled."""

    def connector(self, inner: Service[Dial, Link], scope: Scope) -> Service[Dial, Link]:
        async def connect(dial: Dial, /) -> Link:
            link = await inner(dial)
            await self.upgrade(link, Side.DIALLING)  # not closed when this raises
            return link

        return connect


@pytest.mark.smoke
async def test_a_layer_that_keeps_the_contract_passes() -> None:
    await check_layer(_InTurn())


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (Polite, "no hello within 5 s"),
        (_WaitsForEver, "holds a dial for more than 60 s"),
        (_Swallows, "memory: round trips: no end within 600 s"),
        (_KeepsItsDriver, "open drivers are left"),
    ],
)
async def test_a_layer_that_breaks_a_promise_is_told_which(broken: type[Polite], complaint: str) -> None:
    # Polite says hello before it listens, on both ends: in lockstep that is a deadlock.
    with pytest.raises((AssertionError, HandshakeTimeout, TimeoutError), match=complaint):
        await check_layer(broken(), messages=[b"hello", b"y" * 1000, b"last"])
