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
    CircuitOpen,
    ConnectFailed,
    Elapsed,
    EndpointError,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    LinkLost,
    LossReason,
    Overloaded,
    ProtocolViolation,
    RateLimited,
    ServiceClosed,
    SessionLost,
    StackError,
    TowlineError,
    UnknownHost,
)
from towline.policies import (
    NOT_CLONEABLE,
    Answer,
    Attempt,
    Backoff,
    Budget,
    GiveUp,
    Policy,
    StandardPolicy,
    TpsBudget,
)
from towline.service import Dial
from towline.testing import MockClock

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


class Asked:
    """A session of a policy, asked about one outcome after another."""

    def __init__(
        self, request: object = CALL, policy: Policy | None = None, *, now: float = 0.0, seed: int = 0
    ) -> None:
        policy = StandardPolicy(SERIES, budget=None) if policy is None else policy
        self.request = request
        self.clock = MockClock(now)
        self.session = policy.session(request, clock=self.clock, random=Random(seed))
        self.last: Attempt[Any, Any] = Attempt(request)

    def before(self) -> float:
        return self.session.before()

    def failed(self, number: int, error: Exception, *, now: float | None = None, **facts: Any) -> Answer:
        """What it says to an error; ``now`` moves the clock first."""
        if now is not None:
            self.clock.advance(now - self.clock())
        self.last = Attempt(self.request, number=number, error=error, **facts)
        return self.session.retry(self.last)

    def answered(self, number: int, response: object) -> Answer:
        self.last = Attempt(self.request, number=number, response=response)
        return self.session.retry(self.last)


def answers(session: Asked, *errors: Exception, now: float = 0.0) -> list[Answer]:
    """What the policy says to each error in turn, when no time passes at all."""
    session.clock.advance(now)
    return [session.failed(n, error) for n, error in enumerate(errors, start=1)]


def ended() -> HandshakeFailed:
    return HandshakeFailed("closed without a word", ended=True)


# --- calls
# ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_call_is_tried_three_times_by_default() -> None:
    assert answers(Asked(CALL), *[LinkLost("cut")] * 3) == [1, 2, None]


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
    assert (answers(Asked(CALL), error) != [None]) is retried


def test_a_foreign_error_can_say_that_it_is_retryable() -> None:
    error = Foreign()
    error.retryable = True  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert answers(Asked(CALL), error) == [1]
    assert answers(Asked(FIRST), error) == [1]


def test_one_attempt_means_no_retry() -> None:
    session = Asked(CALL, StandardPolicy(max_attempts=1))
    assert answers(session, LinkLost("cut")) == [None]


def test_a_response_is_returned() -> None:
    assert Asked(CALL).answered(1, "response") is None


# --- calls: what is retried
# ----------------------------------------------------------------------------------


def calling(**settings: Any) -> Asked:
    without_budget: dict[str, Any] = {"budget": None}  # the default one wants an event loop
    return Asked(CALL, StandardPolicy(SERIES, **without_budget | settings))


def says_again(error: Exception) -> bool:
    return str(error) == "again"


def test_r6_on_names_the_errors_and_their_subclasses() -> None:
    for error, retried in [(ConnectionResetError(), True), (OSError(), True), (ValueError(), False)]:
        assert (calling(on=OSError).failed(1, error) == 1) is retried
    assert calling(on=(KeyError, OSError)).failed(1, KeyError()) == 1
    assert calling(on=says_again).failed(1, Foreign("again")) == 1


def test_r6_not_on_beats_on() -> None:
    picky: dict[str, Any] = {"on": OSError, "not_on": (FileNotFoundError, ConnectionRefusedError)}
    assert calling(**picky).failed(1, ConnectionResetError()) == 1
    assert calling(**picky).failed(1, ConnectionRefusedError()) is None
    assert calling(not_on=LinkLost).failed(1, LinkLost("says it is retryable")) is None


def test_on_overrides_what_an_error_says_of_itself() -> None:
    assert calling(on=SessionLost).failed(1, SessionLost(LossReason.EXPIRED)) == 1
    assert calling(on=OSError).failed(1, LinkLost("says it is retryable")) is None


def test_r12_a_group_is_retried_only_if_all_its_leaves_match() -> None:
    both = ExceptionGroup("both", [OSError(), ExceptionGroup("inner", [ConnectionResetError()])])
    mixed = ExceptionGroup("mixed", [OSError(), ExceptionGroup("inner", [ValueError()])])
    assert calling(on=OSError).failed(1, both) == 1
    assert calling(on=OSError).failed(1, mixed) is None
    assert calling().failed(1, ExceptionGroup("ours", [LinkLost("cut"), LinkLost("cut")])) == 1
    assert calling().failed(1, ExceptionGroup("ours", [LinkLost("cut"), ValueError()])) is None


def test_r12_one_leaf_in_not_on_is_enough() -> None:
    mixed = ExceptionGroup("mixed", [OSError(), FileNotFoundError()])
    assert calling(on=OSError, not_on=FileNotFoundError).failed(1, mixed) is None


@pytest.mark.parametrize("nonsense", [KeyboardInterrupt, (OSError, SystemExit), "OSError", 3, (OSError, "x")])
def test_r11_what_ends_a_program_cannot_be_asked_for(nonsense: Any) -> None:
    for settings in ({"on": nonsense}, {"not_on": nonsense}):
        with pytest.raises(TypeError):
            StandardPolicy(**settings)


def test_what_was_closed_here_is_never_retried() -> None:
    for error in (ServiceClosed("closed"), anyio.ClosedResourceError()):
        asked = calling(on=Exception)
        assert asked.failed(1, error) is None
        assert asked.last.reason is GiveUp.NOT_RETRYABLE


def test_c10_an_open_breaker_ends_it_unless_the_policy_is_to_wait_for_it() -> None:
    asked = calling(on=Exception)
    assert asked.failed(1, CircuitOpen("open", 4.0)) is None
    assert asked.last.reason is GiveUp.BREAKER
    assert calling(on=Exception, wait_when_open=True).failed(1, CircuitOpen("open", 4.0)) == 4
    assert calling(on=OSError, wait_when_open=True).failed(1, CircuitOpen("open", 4.0)) == 4
    assert calling(not_on=CircuitOpen, wait_when_open=True).failed(1, CircuitOpen("open", 4.0)) is None


def test_what_a_layer_here_turned_away_is_retried_by_default() -> None:
    assert calling(idempotent=False).failed(1, Overloaded("full")) == 1
    assert calling(idempotent=False).failed(1, RateLimited("too soon", 0.25)) == 0.25


# --- calls: what may be made twice
# ---------------------------------------------------------------------------


class Sent(Foreign):
    def __init__(self, sent: bool | None) -> None:
        super().__init__(sent)
        self.sent = sent


@pytest.mark.parametrize(
    ("idempotent", "sent", "retried"),
    [
        (None, True, False),
        (None, False, True),
        (None, None, True),
        (True, True, True),
        (True, None, True),
        (False, False, True),
        (False, True, False),
        (False, None, False),
    ],
)
def test_r19_what_may_have_been_carried_out_is_repeated_only_if_it_may_be(
    idempotent: bool | None, sent: bool | None, retried: bool
) -> None:
    asked = calling(on=Sent, idempotent=idempotent)
    assert (asked.failed(1, Sent(sent)) == 1) is retried
    assert asked.last.reason is (None if retried else GiveUp.NOT_IDEMPOTENT)


def test_r19_idempotent_can_be_a_function_of_the_request() -> None:
    policy = StandardPolicy(SERIES, budget=None, on=Sent, idempotent=lambda request: request == "read")
    assert Asked("read", policy).failed(1, Sent(True)) == 1
    assert Asked("write", policy).failed(1, Sent(True)) is None
    assert Asked("write", policy).failed(1, Sent(False)) == 1


def test_a_call_that_took_too_long_is_repeated_only_if_it_may_be() -> None:
    assert calling(on=Elapsed).failed(1, Elapsed(5)) is None
    assert calling(on=Elapsed, idempotent=True).failed(1, Elapsed(5)) == 1


# --- calls: how often, how long, at what cost
# -----------------------------------------------------------------


class Purse(Budget):
    """So many retries, and a record of what it was asked."""

    counts_calls = True

    def __init__(self, coins: int) -> None:
        self.coins = coins
        self.log: list[str] = []

    def withdraw(self) -> bool:
        self.log.append("withdraw")
        self.coins -= 1
        return self.coins >= 0

    def deposit(self) -> None:
        self.log.append("deposit")

    def release(self) -> None:
        self.log.append("release")

    def enter(self) -> None:
        self.log.append("enter")

    def leave(self) -> None:
        self.log.append("leave")

    @property
    def balance(self) -> float:
        return self.coins


def test_nothing_is_withdrawn_for_a_retry_that_is_not_made() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], GiveUp]] = [
        ({"on": OSError}, {}, GiveUp.NOT_RETRYABLE),
        ({"on": Foreign}, {"given_up_inside": True}, GiveUp.INNER),
        ({"on": Foreign, "idempotent": False}, {}, GiveUp.NOT_IDEMPOTENT),
        ({"on": Foreign, "max_attempts": 1}, {}, GiveUp.ATTEMPTS),
        ({"on": Foreign, "backoff": SERIES.take(0)}, {}, GiveUp.BACKOFF),
        ({"on": Foreign, "max_elapsed": 0.5}, {}, GiveUp.ELAPSED),
        ({"on": Foreign}, {"time_left": 0.5}, GiveUp.DEADLINE),
    ]
    for settings, facts, reason in cases:
        purse = Purse(1)
        defaults: dict[str, Any] = {"backoff": SERIES, "budget": purse}
        asked = Asked(CALL, StandardPolicy(**defaults | settings))
        assert asked.failed(1, Foreign(), **facts) is None
        assert asked.last.reason is reason
        assert purse.log == ["enter"]


def test_an_empty_budget_ends_it() -> None:
    asked = calling(on=Foreign, budget=Purse(1), max_attempts=10)
    assert asked.failed(1, Foreign()) == 1
    assert asked.failed(2, Foreign()) is None
    assert asked.last.reason is GiveUp.BUDGET


def test_a_budget_that_counts_calls_hears_of_every_beginning_and_end() -> None:
    purse = Purse(10)
    asked = calling(on=Foreign, budget=purse)
    asked.failed(1, Foreign())
    asked.failed(2, Foreign())
    asked.session.end()
    assert purse.log == ["enter", "withdraw", "release", "withdraw", "release", "leave"]


def test_a_success_pays_in_or_every_request_does() -> None:
    by_success, by_request = Purse(1), Purse(1)
    calling(budget=by_success).answered(1, "done")
    calling(budget=by_request, deposit="request").answered(1, "done")
    calling(budget=by_request, deposit="request").failed(1, Foreign())
    calling(budget=by_success).failed(1, Foreign())
    assert by_success.log == ["enter", "deposit", "enter"]
    assert by_request.log == ["enter", "deposit", "enter", "deposit"]


def test_policies_have_budgets_of_their_own_unless_they_are_given_one() -> None:
    shared = TpsBudget()
    assert StandardPolicy().budget is not StandardPolicy().budget
    assert StandardPolicy(budget=shared).budget is StandardPolicy(budget=shared).budget
    assert StandardPolicy(budget=None).budget is None


def test_a_connect_costs_no_budget() -> None:
    purse = Purse(0)
    assert answers(Asked(FIRST, StandardPolicy(SERIES, budget=purse)), ConnectFailed("refused")) == [1]
    assert purse.log == []


def test_r4_the_delays_are_the_backoffs_and_none_comes_after_the_last_attempt() -> None:
    backoff = Backoff.exponential(initial=0.1, factor=2, cap=0.5, first=None, jitter="none")
    asked = Asked(CALL, StandardPolicy(backoff, max_attempts=6, budget=None))
    assert answers(asked, *[LinkLost("cut")] * 6) == [0.1, 0.2, 0.4, 0.5, 0.5, None]


def test_r13_what_the_error_asks_for_can_be_read_by_the_user() -> None:
    def header(error: Exception) -> float | None:
        return float(str(error)) if str(error) else None

    asked = calling(on=Foreign, delay_from=header, max_attempts=9)
    assert answers(asked, Foreign(""), Foreign(""), Foreign("7.5"), Foreign(""), Foreign("1e9")) == [1, 2, 7.5, 1, 300]


def pending(response: object) -> bool:
    return response == "pending"


def test_r5_a_response_can_be_asked_for_again() -> None:
    asked = calling(on_result=pending)
    assert asked.answered(1, "pending") == 1
    assert asked.answered(2, "done") is None
    assert asked.last.reason is None
    assert asked.last.error is None


def test_r5_at_the_end_the_last_response_is_returned_or_an_error_is_made_of_it() -> None:
    asked = calling(on_result=pending)
    assert [asked.answered(n, "pending") for n in (1, 2, 3)] == [1, 2, None]
    assert asked.last.error is None
    assert asked.last.reason is GiveUp.ATTEMPTS
    strict = calling(on_result=pending, result_error=Foreign, max_attempts=1)
    assert strict.answered(1, "pending") is None
    assert isinstance(strict.last.error, Foreign)


def test_r15_what_cannot_be_cloned_says_so_and_none_is_a_request_like_any_other() -> None:
    stream = StandardPolicy(clone=lambda request: NOT_CLONEABLE)
    assert Asked(CALL, stream).session.clone_request("body") is NOT_CLONEABLE
    assert Asked(CALL, StandardPolicy(clone=lambda request: None)).session.clone_request("x") is None
    assert Asked(CALL).session.clone_request(None) is None


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
    assert (answers(Asked(FIRST), error) != [None]) is retried


def test_a_first_connect_has_no_limit_of_attempts() -> None:
    assert answers(Asked(FIRST), *[ConnectFailed("refused")] * 20) == [*range(1, 21)]


def test_three_endings_without_a_word_in_a_row_are_taken_for_a_refusal() -> None:
    assert answers(Asked(FIRST), ended(), ended(), ended()) == [1, 2, None]


def test_endings_that_are_not_in_a_row_do_not_add_up() -> None:
    errors = [ended(), ended(), ConnectFailed("refused"), ended(), ended(), ended()]
    assert answers(Asked(FIRST), *errors) == [1, 2, 3, 4, 5, None]


def test_a_first_connect_begins_no_wait_that_ends_after_thirty_seconds() -> None:
    session = Asked(FIRST, StandardPolicy(backoff=Backoff.constant(10, jitter="none")), now=1000)
    assert session.failed(1, ConnectFailed("refused"), now=1020) == 10
    assert session.failed(2, ConnectFailed("refused"), now=1020.1) is None


def test_max_elapsed_can_be_set_and_lifted() -> None:
    steady = Backoff.constant(10, jitter="none")
    short = Asked(FIRST, StandardPolicy(backoff=steady, max_elapsed=5))
    assert answers(short, ConnectFailed("refused")) == [None]
    endless = Asked(FIRST, StandardPolicy(backoff=steady, max_elapsed=math.inf))
    assert answers(endless, ConnectFailed("refused"), now=1e6) == [10]


def test_a_wait_that_would_reach_the_callers_deadline_is_not_begun() -> None:
    for request in (FIRST, CALL):
        session = Asked(request)
        assert session.failed(1, LinkLost("cut"), time_left=1.5) == 1
        assert session.failed(2, LinkLost("cut"), time_left=2) is None


def test_a_first_connect_that_failed_before_waits_first_but_within_its_limit() -> None:
    assert Asked(Dial(ENDPOINT, failures=3)).before() == 3
    assert Asked(Dial(ENDPOINT, failures=31)).before() == 30


def test_a_first_connect_needs_no_wait() -> None:
    assert Asked(FIRST).before() == 0
    assert Asked(CALL).before() == 0


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
    assert (answers(Asked(AGAIN), error) != [None]) is retried


def test_the_way_back_has_no_limit_of_attempts_time_deadline_or_endings() -> None:
    policy = StandardPolicy(backoff=SERIES.cap(30).take(40), max_attempts=2, max_elapsed=1)
    session = Asked(AGAIN, policy)
    for attempt in range(1, 101):
        error = ended() if attempt % 5 else UnknownHost("nowhere.example")
        delay = session.failed(attempt, error, now=attempt * 1000.0, time_left=0.0)
        assert delay == min(attempt, 30)


def test_the_way_back_starts_at_the_failures_that_were_and_goes_on_from_there() -> None:
    session = Asked(Dial(ENDPOINT, failures=3, cause=LinkLost("cut")))
    assert session.before() == 3
    assert answers(session, LinkLost("cut"), LinkLost("cut")) == [4, 5]


def test_a_link_that_carried_something_is_made_again_at_once() -> None:
    session = Asked(AGAIN)
    assert session.before() == 0
    assert answers(session, LinkLost("cut"), LinkLost("cut")) == [1, 2]


def test_the_cause_can_ask_for_the_wait() -> None:
    for failures in (0, 1, 7):
        assert Asked(Dial(ENDPOINT, failures=failures, cause=Busy(42))).before() == 42


def test_a_backoff_without_delays_never_waits_and_never_retries() -> None:
    session = Asked(Dial(ENDPOINT, failures=5, cause=LinkLost("cut")), StandardPolicy(SERIES.take(0)))
    assert session.before() == 0
    assert answers(session, LinkLost("cut")) == [None]


# --- retry_after
# ---------------------------------------------------------------------------------------------


def test_retry_after_replaces_the_delay_and_starts_the_backoff_over() -> None:
    errors = [LinkLost("cut"), LinkLost("cut"), Busy(7), LinkLost("cut")]
    assert answers(Asked(FIRST), *errors) == [1, 2, 7, 1]


def test_retry_after_can_be_zero() -> None:
    assert answers(Asked(FIRST), Busy(0)) == [0]


def test_retry_after_is_bounded_on_the_way_back_and_refused_where_there_is_a_limit() -> None:
    assert answers(Asked(AGAIN), Busy(1e9), Busy(math.inf)) == [300, 300]
    assert answers(Asked(AGAIN, StandardPolicy(max_retry_after=5)), Busy(1e9)) == [5]
    assert answers(Asked(FIRST), Busy(31)) == [None]


@pytest.mark.parametrize("nonsense", [-1, math.nan, "tomorrow", None])
def test_a_retry_after_that_is_no_length_of_time_is_ignored(nonsense: float | None) -> None:
    assert answers(Asked(AGAIN), Busy(nonsense)) == [1]


# --- settings and properties
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0, where 1 or more"),
        ({"max_attempts": -1}, "max_attempts is -1, where 1 or more"),
        ({"max_attempts": math.nan}, "max_attempts is nan, where 1 or more"),
        ({"max_elapsed": -1}, "max_elapsed is -1, where 0 or more"),
        ({"max_elapsed": math.nan}, "max_elapsed is nan, where 0 or more"),
        ({"max_retry_after": -1}, "max_retry_after is -1, where 0 or more"),
        ({"max_retry_after": math.nan}, "max_retry_after is nan, where 0 or more"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_both_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StandardPolicy(**settings)


async def later(request: object) -> bool:
    return True


@pytest.mark.parametrize("nonsense", ["no", 1, later])
def test_what_cannot_say_whether_a_call_is_idempotent_is_refused(nonsense: Any) -> None:
    with pytest.raises(TypeError, match="idempotent is"):
        StandardPolicy(idempotent=nonsense)


@pytest.mark.parametrize("asked", [math.nan, -1.0, 10**400])
def test_what_is_no_wait_is_not_asked_for(asked: float) -> None:
    def says(error: Exception) -> float:
        return asked

    assert calling(on=Foreign, delay_from=says).failed(1, Foreign()) == (300 if asked > 1 else 1)
    error = Foreign()
    error.retry_after = asked  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert calling(on=Foreign).failed(1, error) == (300 if asked > 1 else 1)


def test_what_is_no_backoff_is_refused() -> None:
    with pytest.raises(TypeError, match="backoff is 3, where a Backoff is expected"):
        StandardPolicy(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_equal_settings_make_equal_policies() -> None:
    assert StandardPolicy() == StandardPolicy(backoff=Backoff.exponential())
    assert StandardPolicy() != StandardPolicy(max_attempts=3)


def test_sessions_of_one_policy_do_not_share_state() -> None:
    policy = StandardPolicy(backoff=SERIES)
    one, other = Asked(FIRST, policy), Asked(FIRST, policy)
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
    session = Asked(Dial(ENDPOINT, failures), policy, seed=seed)
    slept = session.before()
    now = slept
    attempts = 1
    for error, took in steps:
        now += took
        delay = session.failed(attempts, error, now=now)
        if delay is None:
            break
        assert isinstance(delay, float)
        assert delay >= 0
        now += delay
        slept += delay
        attempts += 1
    assert slept <= max_elapsed + 1e-9
    assert attempts <= max_attempts
