"""Hooks: they do nothing by default, and can harm nothing."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any, cast

import anyio
import pytest

from towline import hooks
from towline.errors import LinkLost
from towline.hooks import (
    AllOf,
    AttemptEnded,
    CallShed,
    ConnectBegan,
    ConnectEnded,
    GaveUp,
    GiveUp,
    HandshakeEnded,
    HedgeStarted,
    Hooks,
    LinkAttached,
    LinkDetached,
    RetryScheduled,
    RoundTripMeasured,
    SessionEnded,
    StateChanged,
    tell,
    tell_handshake,
)
from towline.testing import memory_link_pair

NOTHING = cast(Any, None)  # events are values: nothing here looks at a session or a link

EVENTS = {
    "on_attempt": AttemptEnded(1, 0.5, None, handled=False),
    "on_retry_scheduled": RetryScheduled(2, 0.5, None),
    "on_give_up": GaveUp(3, 1.5, GiveUp.ATTEMPTS, None),
    "on_state_change": StateChanged("db", "closed", "open", "5 failures of 10"),
    "on_hedge": HedgeStarted(2, 0.1, None),
    "on_shed": CallShed("LoadShed", ValueError()),
    "on_connect_begin": ConnectBegan(None),
    "on_connect_end": ConnectEnded(None, ValueError()),
    "on_handshake": HandshakeEnded("Encryption", NOTHING, 0.1, None),
    "on_attach": LinkAttached(NOTHING, NOTHING, True, 3, 300),
    "on_detach": LinkDetached(NOTHING, NOTHING, LinkLost("cut"), True),
    "on_session_end": SessionEnded(NOTHING, None),
    "on_round_trip": RoundTripMeasured(NOTHING, 0.1),
}


def test_every_hook_does_nothing_by_default() -> None:
    assert set(EVENTS) == {name for name in vars(Hooks) if name.startswith("on_")}
    for name, event in EVENTS.items():
        assert getattr(Hooks(), name)(event) is None


def test_every_event_has_a_hook_that_takes_it() -> None:
    takes = {inspect.signature(getattr(Hooks, name)).parameters["event"].annotation for name in EVENTS}
    assert takes == {type(event).__name__ for event in EVENTS.values()}
    assert takes | {"AllOf", "GiveUp", "Hooks", "tell", "tell_handshake"} == set(hooks.__all__)


def test_a_hook_that_raises_is_logged_with_what_it_raised(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("a bug in a hook")

    with caplog.at_level(logging.ERROR, logger="towline.hooks"):
        tell(broken, EVENTS["on_attempt"])
    assert "a bug in a hook" in caplog.text


def test_what_ends_a_program_goes_through() -> None:
    def interrupted(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell(interrupted, EVENTS["on_attempt"])


class Kept(Hooks):
    def __init__(self) -> None:
        self.events: list[object] = []

    def on_handshake(self, event: HandshakeEnded, /) -> None:
        self.events.append(event)


def _keep(told: list[tuple[str, object]], which: str, event: object) -> None:
    told.append((which, event))


@pytest.mark.parametrize("name", EVENTS)
def test_several_hooks_as_one_are_each_told_of_everything(name: str) -> None:
    told: list[tuple[str, object]] = []
    one, other = Hooks(), Hooks()
    for which, each in (("one", one), ("other", other)):
        setattr(each, name, partial(_keep, told, which))
    getattr(AllOf(one, other), name)(EVENTS[name])
    assert told == [("one", EVENTS[name]), ("other", EVENTS[name])]
    assert AllOf(one, other) == AllOf(one, other) != AllOf(other, one)


def test_of_several_hooks_one_that_raises_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("a bug in a hook")

    one, kept = Hooks(), Kept()
    one.on_handshake = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, logger="towline.hooks"):
        AllOf(one, kept).on_handshake(cast(HandshakeEnded, EVENTS["on_handshake"]))
    assert kept.events == [EVENTS["on_handshake"]]
    assert "a bug in a hook" in caplog.text


async def test_a_handshake_is_told_whatever_becomes_of_it() -> None:
    kept = Kept()
    link, _ = memory_link_pair()
    with tell_handshake(kept, "Here", link):
        await anyio.sleep(0.5)
    with pytest.raises(ValueError, match="no"), tell_handshake(kept, "Here", link):
        raise ValueError("no")
    with anyio.move_on_after(1), tell_handshake(kept, "Here", link):
        await anyio.sleep_forever()
    with tell_handshake(None, "Here", link):
        pass
    done, failed, cancelled = cast(list[HandshakeEnded], kept.events)
    assert done == HandshakeEnded("Here", link, 0.5, None)
    assert isinstance(failed.error, ValueError)
    assert cancelled.elapsed == 1
    assert isinstance(cancelled.error, anyio.get_cancelled_exc_class())
