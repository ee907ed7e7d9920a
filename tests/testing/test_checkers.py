"""The contract checkers find what is broken: a checker that passes everything proves nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from towline.errors import ProtocolViolation
from towline.layers.framing import FramingStage
from towline.link import CLEAN, Batch, Ended, Stage, Units
from towline.testing import StagePair, check_stage

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
