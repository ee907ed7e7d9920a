"""Hooks: they do nothing by default, and can harm nothing."""

from __future__ import annotations

import inspect
import logging

import pytest

from towline import hooks
from towline.hooks import (
    AttemptEnded,
    CallShed,
    GaveUp,
    GiveUp,
    HedgeStarted,
    Hooks,
    RetryScheduled,
    StateChanged,
    tell,
)

EVENTS = {
    "on_attempt": AttemptEnded(1, 0.5, None, handled=False),
    "on_retry_scheduled": RetryScheduled(2, 0.5, None),
    "on_give_up": GaveUp(3, 1.5, GiveUp.ATTEMPTS, None),
    "on_state_change": StateChanged("db", "closed", "open", "5 failures of 10"),
    "on_hedge": HedgeStarted(2, 0.1, None),
    "on_shed": CallShed("LoadShed", ValueError()),
}


def test_every_hook_does_nothing_by_default() -> None:
    assert set(EVENTS) == {name for name in vars(Hooks) if name.startswith("on_")}
    for name, event in EVENTS.items():
        assert getattr(Hooks(), name)(event) is None


def test_every_event_has_a_hook_that_takes_it() -> None:
    takes = {inspect.signature(getattr(Hooks, name)).parameters["event"].annotation for name in EVENTS}
    assert takes == {type(event).__name__ for event in EVENTS.values()}
    assert takes | {"GiveUp", "Hooks", "tell"} == set(hooks.__all__)


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
