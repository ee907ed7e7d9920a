"""The standard policy, with no clock and no event loop: facts in, delays out."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.endpoint import Endpoint
from towline.errors import (
    BufferFull,
    ConnectFailed,
    EndpointError,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    LinkLost,
    LossReason,
    ProtocolViolation,
    SessionLost,
    StackError,
    TowlineError,
    UnknownHost,
)
from towline.policies import Backoff, Failure, Policy, PolicySession, StandardPolicy
from towline.service import Dial

SERIES = Backoff.linear(initial=1, step=1, jitter="none")
ENDPOINT = Endpoint.parse("tcp://localhost:7000")
FIRST = Dial(ENDPOINT)
AGAIN = Dial(ENDPOINT, cause=LinkLost("cut"))
CALL = "any request that is not a Dial"


class Busy(TowlineError):
    """A reply that asks to come back later."""

    retryable = True

    def __init__(self, retry_after: float | None) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Foreign(Exception):
    """An error of some other library."""


def open_session(
    request: object = CALL, policy: Policy | None = None, *, now: float = 0.0, seed: int = 0
) -> PolicySession:
    policy = StandardPolicy(backoff=SERIES) if policy is None else policy
    return policy.session(request, now=now, random=Random(seed))


def answers(session: PolicySession, *errors: Exception, now: float = 0.0) -> list[float | None]:
    """What the policy says to each error in turn, when no time passes at all."""
    return [session.failed(Failure(n, error, now)) for n, error in enumerate(errors, start=1)]


def ended() -> HandshakeFailed:
    return HandshakeFailed("closed without a word", ended=True)


# --- calls
# ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_call_is_tried_three_times_by_default() -> None:
    assert answers(open_session(CALL), *[LinkLost("cut")] * 3) == [1, 2, None]


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (LinkLost("cut"), True),
        (ConnectFailed("refused"), True),
        (BufferFull(8, 8), True),
        (HandshakeRefused("no"), False),
        (SessionLost(LossReason.EXPIRED), False),
        (StackError("order"), False),
        (ConnectionResetError("it may have been carried out"), False),
        (TimeoutError("it may have been carried out"), False),
        (Foreign("who knows"), False),
    ],
    ids=repr,
)
def test_a_call_is_retried_only_if_its_error_says_so(error: Exception, retried: bool) -> None:
    assert (answers(open_session(CALL), error) != [None]) is retried


def test_a_foreign_error_can_say_that_it_is_retryable() -> None:
    error = Foreign()
    error.retryable = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert answers(open_session(CALL), error) == [1]
    assert answers(open_session(FIRST), error) == [1]


def test_one_attempt_means_no_retry() -> None:
    session = open_session(CALL, StandardPolicy(max_attempts=1))
    assert answers(session, LinkLost("cut")) == [None]


def test_a_response_is_returned() -> None:
    assert open_session(CALL).succeeded("response") is None


# --- a first connect
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (ConnectFailed("refused"), True),
        (HandshakeTimeout("mute"), True),
        (ProtocolViolation("noise"), True),
        (LinkLost("cut"), True),
        (ConnectionRefusedError("plain"), True),
        (TimeoutError("plain"), True),
        (anyio.ConnectionFailed("plain"), True),
        (UnknownHost("nowhere.example"), False),
        (HandshakeFailed("no agreement"), False),
        (HandshakeRefused("no"), False),
        (EndpointError("no transport"), False),
        (BufferFull(8, 8), False),
        (Foreign("who knows"), False),
    ],
    ids=repr,
)
def test_a_first_connect_is_retried_by_what_the_error_says_of_itself(error: Exception, retried: bool) -> None:
    assert (answers(open_session(FIRST), error) != [None]) is retried


def test_a_first_connect_has_no_limit_of_attempts() -> None:
    assert answers(open_session(FIRST), *[ConnectFailed("refused")] * 20) == [*range(1, 21)]


def test_three_endings_without_a_word_in_a_row_are_taken_for_a_refusal() -> None:
    assert answers(open_session(FIRST), ended(), ended(), ended()) == [1, 2, None]


def test_endings_that_are_not_in_a_row_do_not_add_up() -> None:
    errors = [ended(), ended(), ConnectFailed("refused"), ended(), ended(), ended()]
    assert answers(open_session(FIRST), *errors) == [1, 2, 3, 4, 5, None]


def test_a_first_connect_begins_no_wait_that_ends_after_thirty_seconds() -> None:
    session = open_session(FIRST, StandardPolicy(backoff=Backoff.constant(10, jitter="none")), now=1000)
    assert session.failed(Failure(1, ConnectFailed("refused"), 1020)) == 10
    assert session.failed(Failure(2, ConnectFailed("refused"), 1020.1)) is None


def test_max_elapsed_can_be_set_and_lifted() -> None:
    steady = Backoff.constant(10, jitter="none")
    short = open_session(FIRST, StandardPolicy(backoff=steady, max_elapsed=5))
    assert answers(short, ConnectFailed("refused")) == [None]
    endless = open_session(FIRST, StandardPolicy(backoff=steady, max_elapsed=math.inf))
    assert answers(endless, ConnectFailed("refused"), now=1e6) == [10]


def test_a_wait_that_would_reach_the_callers_deadline_is_not_begun() -> None:
    for request in (FIRST, CALL):
        session = open_session(request)
        assert session.failed(Failure(1, LinkLost("cut"), 0.0, deadline=1.5)) == 1
        assert session.failed(Failure(2, LinkLost("cut"), 0.0, deadline=2)) is None


def test_a_first_connect_that_failed_before_waits_first_but_within_its_limit() -> None:
    assert open_session(Dial(ENDPOINT, failures=3)).before() == 3
    assert open_session(Dial(ENDPOINT, failures=31)).before() == 30


def test_a_first_connect_needs_no_wait() -> None:
    assert open_session(FIRST).before() == 0
    assert open_session(CALL).before() == 0


# --- the way back
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (ConnectFailed("refused"), True),
        (UnknownHost("nowhere.example"), True),
        (HandshakeFailed("no agreement"), True),
        (HandshakeRefused("a captive portal"), True),
        (HandshakeTimeout("mute"), True),
        (ended(), True),
        (LinkLost("cut"), True),
        (ProtocolViolation("an address that someone else has now"), True),
        (OSError("plain"), True),
        (StackError("order"), False),
        (BufferFull(8, 8), False),
        (SessionLost(LossReason.EXPIRED), False),
        (Foreign("who knows"), False),
    ],
    ids=repr,
)
def test_on_the_way_back_only_misuse_and_a_lost_session_are_final(error: Exception, retried: bool) -> None:
    assert (answers(open_session(AGAIN), error) != [None]) is retried


def test_the_way_back_has_no_limit_of_attempts_time_deadline_or_endings() -> None:
    policy = StandardPolicy(backoff=SERIES.cap(30).take(40), max_attempts=2, max_elapsed=1)
    session = open_session(AGAIN, policy)
    for attempt in range(1, 101):
        error = ended() if attempt % 5 else UnknownHost("nowhere.example")
        delay = session.failed(Failure(attempt, error, now=attempt * 1000.0, deadline=0.0))
        assert delay == min(attempt, 30)


def test_the_way_back_starts_at_the_failures_that_were_and_goes_on_from_there() -> None:
    session = open_session(Dial(ENDPOINT, failures=3, cause=LinkLost("cut")))
    assert session.before() == 3
    assert answers(session, LinkLost("cut"), LinkLost("cut")) == [4, 5]


def test_a_link_that_carried_something_is_made_again_at_once() -> None:
    session = open_session(AGAIN)
    assert session.before() == 0
    assert answers(session, LinkLost("cut"), LinkLost("cut")) == [1, 2]


def test_the_cause_can_ask_for_the_wait() -> None:
    for failures in (0, 1, 7):
        assert open_session(Dial(ENDPOINT, failures=failures, cause=Busy(42))).before() == 42


def test_a_backoff_without_delays_never_waits_and_never_retries() -> None:
    session = open_session(Dial(ENDPOINT, failures=5, cause=LinkLost("cut")), StandardPolicy(SERIES.take(0)))
    assert session.before() == 0
    assert answers(session, LinkLost("cut")) == [None]


# --- retry_after
# ---------------------------------------------------------------------------------------------


def test_retry_after_replaces_the_delay_and_starts_the_backoff_over() -> None:
    errors = [LinkLost("cut"), LinkLost("cut"), Busy(7), LinkLost("cut")]
    assert answers(open_session(FIRST), *errors) == [1, 2, 7, 1]


def test_retry_after_can_be_zero() -> None:
    assert answers(open_session(FIRST), Busy(0)) == [0]


def test_retry_after_is_bounded_on_the_way_back_and_refused_where_there_is_a_limit() -> None:
    assert answers(open_session(AGAIN), Busy(1e9), Busy(math.inf)) == [300, 300]
    assert answers(open_session(AGAIN, StandardPolicy(max_retry_after=5)), Busy(1e9)) == [5]
    assert answers(open_session(FIRST), Busy(31)) == [None]


@pytest.mark.parametrize("nonsense", [-1, math.nan, "tomorrow", None])
def test_a_retry_after_that_is_no_length_of_time_is_ignored(nonsense: float | None) -> None:
    assert answers(open_session(AGAIN), Busy(nonsense)) == [1]


# --- settings and properties
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0, where 1 or more"),
        ({"max_attempts": -1}, "max_attempts is -1, where 1 or more"),
        ({"max_elapsed": -1}, "max_elapsed is -1, where 0 or more"),
        ({"max_elapsed": math.nan}, "max_elapsed is nan, where 0 or more"),
        ({"max_retry_after": -1}, "max_retry_after is -1, where 0 or more"),
        ({"max_retry_after": math.nan}, "max_retry_after is nan, where 0 or more"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_both_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StandardPolicy(**settings)


def test_equal_settings_make_equal_policies() -> None:
    assert StandardPolicy() == StandardPolicy(backoff=Backoff.exponential())
    assert StandardPolicy() != StandardPolicy(max_attempts=3)


def test_sessions_of_one_policy_do_not_share_state() -> None:
    policy = StandardPolicy(backoff=SERIES)
    one, other = open_session(FIRST, policy), open_session(FIRST, policy)
    assert answers(one, LinkLost("cut"), LinkLost("cut")) == [1, 2]
    assert answers(other, LinkLost("cut"), LinkLost("cut")) == [1, 2]


errors = st.sampled_from(
    [LinkLost("cut"), ended(), ConnectFailed("refused"), Busy(0), Busy(3), Busy(1e9), OSError("plain")]
)


@given(
    failures=st.integers(0, 50),
    steps=st.lists(st.tuples(errors, st.floats(0, 10)), max_size=30),
    max_elapsed=st.floats(0, 100),
    max_attempts=st.integers(1, 20),
    seed=st.integers(),
)
def test_what_is_slept_never_exceeds_max_elapsed_nor_attempts_their_limit(
    failures: int,
    steps: list[tuple[Exception, float]],
    max_elapsed: float,
    max_attempts: int,
    seed: int,
) -> None:
    policy = StandardPolicy(max_elapsed=max_elapsed, max_attempts=max_attempts)
    session = open_session(Dial(ENDPOINT, failures), policy, seed=seed)
    now = slept = session.before()
    attempts = 1
    for error, took in steps:
        now += took
        delay = session.failed(Failure(attempts, error, now))
        if delay is None:
            break
        assert delay >= 0
        now += delay
        slept += delay
        attempts += 1
    assert slept <= max_elapsed + 1e-9
    assert attempts <= max_attempts
