"""The Retry layer: it does what the policy says, and nothing else."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.clock import Clock
from towline.endpoint import Endpoint
from towline.errors import (
    CircuitOpen,
    ConnectFailed,
    HandshakeRefused,
    LinkLost,
    MisuseError,
    TowlineError,
    UnknownHost,
)
from towline.hooks import AttemptEnded, GaveUp, Hooks, RetryScheduled
from towline.layers.retry import Retry, given_up
from towline.policies import (
    NOT_CLONEABLE,
    Answer,
    Attempt,
    Backoff,
    GiveUp,
    NotCloneable,
    PolicySession,
    StandardPolicy,
    TpsBudget,
)
from towline.service import Dial, load, ready_now
from towline.testing import MockClock, cancel_at_every_await

SERIES = Backoff.linear(initial=1, step=1, jitter="none")
ENDPOINT = Endpoint.parse("tcp://localhost:7000")


@dataclass
class Scripted:
    """A service that raises the given errors in turn; then it answers, or raises the last one for ever."""

    errors: Sequence[Exception]
    for_ever: bool = False
    requests: list[object] = field(default_factory=list[object])

    async def __call__(self, request: object, /) -> str:
        await anyio.lowlevel.checkpoint()
        self.requests.append(request)
        number = len(self.requests)
        if number <= len(self.errors):
            raise self.errors[number - 1]
        if self.for_ever:
            raise self.errors[-1]
        return f"answer to attempt {number}"

    @property
    def calls(self) -> int:
        return len(self.requests)


@dataclass
class Recorded(PolicySession[Any, Any]):
    """A policy that says what it is told to, and records what it was asked."""

    before_first: float = 0.0
    says: list[Answer] = field(default_factory=list[Answer])
    asked: list[object] = field(default_factory=list[object])
    ended: int = 0

    def session(self, request: object, /, *, clock: Clock, random: Random) -> Recorded:
        self.asked.append((request, clock, random))
        return self

    def before(self) -> float:
        return self.before_first

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        self.asked.append((attempt.number, attempt.error or attempt.response, attempt.time_left))
        return self.says.pop(0) if self.says else None

    def end(self) -> None:
        self.ended += 1


class Busy(TowlineError):
    retryable = True
    retry_after = 42.0


def mocked(policy: StandardPolicy | Backoff = SERIES) -> tuple[Retry, MockClock]:
    clock = MockClock()
    return Retry(policy, clock=clock, sleep=clock.sleep), clock


@pytest.mark.smoke
async def test_a_failure_is_tried_again_until_it_succeeds() -> None:
    retry, clock = mocked()
    service = Scripted([LinkLost("cut"), LinkLost("cut")])
    assert await retry(service)("hello") == "answer to attempt 3"
    assert clock.slept == [1, 2]
    assert service.requests == ["hello"] * 3


async def test_r2_three_attempts_are_three_calls_and_the_last_error_itself_is_raised() -> None:
    retry, clock = mocked()
    raised = [LinkLost("1"), LinkLost("2"), LinkLost("3")]
    with pytest.raises(LinkLost) as caught:
        await retry(Scripted(raised, for_ever=True))("hello")
    assert caught.value is raised[2]
    assert clock.slept == [1, 2]


async def test_an_error_that_is_final_is_raised_at_once() -> None:
    retry, clock = mocked()
    service = Scripted([HandshakeRefused("no")])
    with pytest.raises(HandshakeRefused):
        await retry(service)(Dial(ENDPOINT))
    assert service.calls == 1
    assert clock.slept == []


async def test_a_success_is_not_slept_for() -> None:
    retry, clock = mocked()
    assert await retry(Scripted([]))("hello") == "answer to attempt 1"
    assert clock.slept == []


async def test_a_first_connect_gives_up_within_thirty_seconds_of_the_loops_own_clock() -> None:
    start = anyio.current_time()
    service = Scripted([ConnectFailed("refused")], for_ever=True)
    with pytest.raises(ConnectFailed):
        await Retry(Backoff.constant(7, jitter="none"))(service)(Dial(ENDPOINT))
    assert anyio.current_time() - start == pytest.approx(28)
    assert service.calls == 5


async def test_an_unknown_host_fails_a_first_connect_at_once_and_is_retried_on_the_way_back() -> None:
    retry, clock = mocked()
    with pytest.raises(UnknownHost):
        await retry(Scripted([UnknownHost("nowhere")]))(Dial(ENDPOINT))
    assert clock.slept == []
    again = Dial(ENDPOINT, cause=LinkLost("cut"))
    assert await retry(Scripted([UnknownHost("nowhere")]))(again) == "answer to attempt 2"


async def test_a_dial_that_names_failures_waits_before_its_first_attempt() -> None:
    retry, clock = mocked()
    service = Scripted([ConnectFailed("refused")])
    dial = Dial(ENDPOINT, failures=4, cause=LinkLost("cut"))
    assert await retry(service)(dial) == "answer to attempt 2"
    assert clock.slept == [4, 5]


async def test_what_the_peer_asked_for_is_waited_before_the_first_attempt() -> None:
    retry, clock = mocked()
    await retry(Scripted([]))(Dial(ENDPOINT, failures=1, cause=Busy()))
    assert clock.slept == [42]


async def test_the_way_back_is_tried_for_as_long_as_the_caller_waits() -> None:
    start = anyio.current_time()
    service = Scripted([ConnectFailed("refused")], for_ever=True)
    with anyio.move_on_after(315) as scope:
        await Retry()(service)(Dial(ENDPOINT, cause=LinkLost("cut")))
    assert scope.cancelled_caught
    assert anyio.current_time() - start == pytest.approx(315)
    assert service.calls > 15


async def test_r10_a_wait_that_cannot_end_before_the_callers_deadline_is_not_begun() -> None:
    start = anyio.current_time()
    service = Scripted([LinkLost("cut")], for_ever=True)
    with pytest.raises(LinkLost), anyio.fail_after(1):
        await Retry(Backoff.constant(5, jitter="none"))(service)("hello")
    assert service.calls == 1
    assert anyio.current_time() == start


async def test_the_policy_is_told_how_long_the_caller_waits() -> None:
    policy, error = Recorded(), LinkLost("cut")
    with pytest.raises(LinkLost), anyio.fail_after(60):
        await Retry(policy)(Scripted([error]))("hello")
    assert policy.asked[1] == (1, error, pytest.approx(60))
    with pytest.raises(LinkLost):
        await Retry(policy)(Scripted([error]))("hello")
    assert policy.asked[3] == (1, error, math.inf)


async def test_r9_cancelling_an_attempt_ends_the_call_and_never_asks_the_policy() -> None:
    policy, calls = Recorded(), 0

    async def slow(request: str, /) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep_forever()

    with anyio.move_on_after(1) as scope:
        await Retry(policy)(slow)("hello")
    assert scope.cancelled_caught
    assert calls == 1
    assert len(policy.asked) == 1  # to open the session
    assert policy.ended == 1


async def test_r9_cancelling_a_wait_ends_the_call_without_another_attempt() -> None:
    service = Scripted([LinkLost("cut")], for_ever=True)
    async with anyio.create_task_group() as group:
        group.start_soon(Retry(Backoff.constant(1000, jitter="none"))(service), "hello")
        await anyio.sleep(10)
        group.cancel_scope.cancel()
    assert service.calls == 1


async def test_r21_a_loop_of_failures_without_delay_can_be_cancelled() -> None:
    async def broken(request: Dial, /) -> None:
        raise ConnectFailed("refused")  # no checkpoint

    with anyio.CancelScope() as scope:
        scope.cancel()
        await Retry(Backoff.constant(0))(broken)(Dial(ENDPOINT, cause=LinkLost("cut")))
    assert scope.cancelled_caught


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=repr)
def test_r11_what_ends_the_program_is_not_retried(error: BaseException) -> None:
    async def interrupted(request: str, /) -> None:
        raise error

    call = Retry(Recorded(), clock=MockClock())(interrupted)("hello")
    with pytest.raises(type(error)):
        call.send(None)


async def test_a_policy_can_wait_before_a_dial_and_retry_a_response_that_it_does_not_like() -> None:
    policy, clock = Recorded(before_first=3, says=[0, 2, None]), MockClock()
    service = Scripted([LinkLost("cut")])
    random = Random(0)
    retry = Retry(policy, clock=clock, sleep=clock.sleep, random=random)
    assert await retry(service)(Dial(ENDPOINT)) == "answer to attempt 3"
    assert clock.slept == [3, 0, 2]
    assert policy.asked[0] == (Dial(ENDPOINT), clock, random)
    assert policy.asked[2:] == [(2, "answer to attempt 2", math.inf), (3, "answer to attempt 3", math.inf)]
    assert policy.ended == 1


async def test_a_policy_can_wait_for_something_other_than_time() -> None:
    repaired = anyio.Event()
    policy, clock = Recorded(says=[repaired.wait(), None]), MockClock()
    service = Scripted([LinkLost("cut")])
    async with anyio.create_task_group() as group:
        group.start_soon(Retry(policy, clock=clock, sleep=clock.sleep)(service), "hello")
        await anyio.sleep(1000)
        assert service.calls == 1
        repaired.set()
    assert service.calls == 2
    assert clock.slept == []


async def test_r7_concurrent_calls_do_not_share_their_attempts() -> None:
    calls = 0

    async def broken(request: int, /) -> None:
        nonlocal calls
        calls += 1
        raise LinkLost(str(request))

    call = Retry(StandardPolicy(SERIES, budget=None))(broken)

    async def one(request: int) -> None:
        with pytest.raises(LinkLost, match=rf"^{request}\b"):
            await call(request)

    async with anyio.create_task_group() as group:
        for request in range(100):
            group.start_soon(one, request)
    assert calls == 300


async def test_one_layer_wraps_many_services() -> None:
    retry, clock = mocked()
    one, other = retry(Scripted([LinkLost("cut")])), retry(Scripted([]))
    assert await one("hello") == "answer to attempt 2"
    assert await other("hello") == "answer to attempt 1"
    assert clock.slept == [1]


async def test_r22_errors_leave_no_reference_cycle() -> None:
    class Tracked(LinkLost):
        pass

    seen: list[weakref.ref[Exception]] = []

    async def broken(request: str, /) -> None:
        error = Tracked("cut")
        seen.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    retry, _ = mocked()
    gc.collect()
    gc.disable()
    try:
        with suppress(LinkLost):
            await retry(broken)("hello")
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


# --- observers
# -----------------------------------------------------------------------------------------------


class Observed(Hooks):
    """Hooks that write down what they are told."""

    def __init__(self, log: list[object]) -> None:
        self.log = log

    def on_attempt(self, event: AttemptEnded, /) -> None:
        self.log.append(event)

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        self.log.append(event)

    def on_give_up(self, event: GaveUp, /) -> None:
        self.log.append(event)


async def test_r18_hooks_are_told_of_the_attempt_then_of_the_retry_then_comes_the_wait() -> None:
    log: list[object] = []
    clock = MockClock()

    async def sleep(seconds: float) -> None:
        log.append(f"slept {seconds:g}")
        await clock.sleep(seconds)

    async def broken(request: str, /) -> None:
        clock.advance(0.5)
        log.append("attempt")
        raise error

    error = LinkLost("cut")
    policy = StandardPolicy(SERIES, max_attempts=2)
    with pytest.raises(LinkLost):
        await Retry(policy, clock=clock, sleep=sleep, hooks=Observed(log))(broken)("hello")
    assert log == [
        "attempt",
        AttemptEnded(1, 0.5, error, handled=True),
        RetryScheduled(2, 1, error),
        "slept 1",
        "attempt",
        AttemptEnded(2, 0.5, error, handled=False),
        GaveUp(2, 2.0, GiveUp.ATTEMPTS, error),
    ]


async def test_hooks_are_told_of_a_success_and_of_no_giving_up_then() -> None:
    log: list[object] = []
    assert await Retry(hooks=Observed(log))(Scripted([]))("hello") == "answer to attempt 1"
    assert log == [AttemptEnded(1, 0, None, handled=False)]


@pytest.mark.parametrize(
    ("policy", "error", "reason"),
    [
        (StandardPolicy(SERIES), ValueError(), "not_retryable"),
        (StandardPolicy(SERIES, max_attempts=1), LinkLost("cut"), "attempts"),
        (StandardPolicy(SERIES.take(0)), LinkLost("cut"), "backoff_exhausted"),
        (StandardPolicy(SERIES, max_elapsed=0.5), LinkLost("cut"), "elapsed"),
        (StandardPolicy(SERIES, budget=TpsBudget(min_per_sec=0)), LinkLost("cut"), "budget"),
        (StandardPolicy(SERIES, clone=lambda request: NOT_CLONEABLE), LinkLost("cut"), "not_cloneable"),
        (StandardPolicy(SERIES, on=LinkLost, idempotent=False), LinkLost("cut"), "not_idempotent"),
        (StandardPolicy(SERIES, on=CircuitOpen), CircuitOpen("open", 1), "breaker"),
        (StandardPolicy(Backoff.constant(100, jitter="none")), LinkLost("cut"), "deadline"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_hooks_are_told_why_it_gives_up(policy: StandardPolicy, error: Exception, reason: str) -> None:
    log: list[object] = []
    with pytest.raises(type(error)), anyio.fail_after(50):
        await Retry(policy, hooks=Observed(log))(Scripted([error], for_ever=True))("hello")
    assert log[-1] == GaveUp(1, 0, GiveUp(reason), error)


async def test_the_observer_of_a_dial_is_told_before_every_attempt_and_before_its_wait() -> None:
    events: list[object] = []
    clock = MockClock()

    def of_the_dial(attempt: int, delay: float, error: Exception | None) -> None:
        events.append((attempt, delay, error))

    async def sleep(seconds: float) -> None:
        events.append(f"slept {seconds:g}")
        await clock.sleep(seconds)

    cut, refused = LinkLost("cut"), ConnectFailed("refused")
    retry = Retry(SERIES, clock=clock, sleep=sleep)
    await retry(Scripted([refused]))(Dial(ENDPOINT, failures=2, cause=cut, on_attempt=of_the_dial))
    assert events == [(1, 2, cut), "slept 2", (2, 3, refused), "slept 3"]


async def test_r18_a_hook_that_raises_is_logged_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hooks):
        def on_attempt(self, event: AttemptEnded, /) -> None:
            raise RuntimeError("a bug in a hook")

        def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
            raise RuntimeError("a bug in a hook")

    def broken(*args: object) -> None:
        raise RuntimeError("a bug in an observer")

    clock = MockClock()
    retry = Retry(SERIES, clock=clock, sleep=clock.sleep, hooks=Broken())
    with caplog.at_level(logging.ERROR):
        dial = Dial(ENDPOINT, on_attempt=broken)
        assert await retry(Scripted([ConnectFailed("refused")]))(dial) == "answer to attempt 2"
    assert len(caplog.records) == 5
    assert "a bug in a hook" in caplog.text
    assert "a bug in an observer" in caplog.text


def test_the_observer_of_a_dial_is_no_part_of_its_value() -> None:
    observed = Dial(ENDPOINT, on_attempt=lambda attempt, delay, error: None)
    assert observed == Dial(ENDPOINT)
    assert repr(observed) == repr(Dial(ENDPOINT))
    assert hash(observed) == hash(Dial(ENDPOINT))


# --- Tower's own tests of retry
# ------------------------------------------------------------------------------


class Always(PolicySession[str, str]):
    """Retry every error."""

    def session(self, request: str, /, *, clock: Clock, random: Random) -> PolicySession[str, str]:
        return self

    def retry(self, attempt: Attempt[str, str], /) -> Answer:
        return None if attempt.error is None else 0.0


class Limit(PolicySession[str, str]):
    """Retry so many errors."""

    def __init__(self, retries: int) -> None:
        self.retries = retries

    def session(self, request: str, /, *, clock: Clock, random: Random) -> PolicySession[str, str]:
        return Limit(self.retries)

    def retry(self, attempt: Attempt[str, str], /) -> Answer:
        if attempt.error is None or self.retries == 0:
            return None
        self.retries -= 1
        return 0.0


class UnlessRejected(Always):
    def retry(self, attempt: Attempt[str, str], /) -> Answer:
        return None if str(attempt.error) == "reject" else super().retry(attempt)


class CannotClone(Always):
    def clone_request(self, request: str, /) -> str | NotCloneable:
        return NOT_CLONEABLE

    def retry(self, attempt: Attempt[str, str], /) -> Answer:
        raise AssertionError("asked about a request that cannot be cloned")


class OutOfRetries(Exception):
    pass


class Mutating(PolicySession[str, str]):
    """Marks each further request, and makes an error of the last response."""

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def session(self, request: str, /, *, clock: Clock, random: Random) -> PolicySession[str, str]:
        return Mutating(self.remaining)

    def retry(self, attempt: Attempt[str, str], /) -> Answer:
        if self.remaining == 0:
            attempt.error = OutOfRetries("out of retries")
            return None
        self.remaining -= 1
        attempt.request = "retrying"
        return 0.0


async def test_r1_retry_errors() -> None:
    service = Scripted([ValueError("retry me")])
    assert await Retry(Always())(service)("hello") == "answer to attempt 2"
    assert service.requests == ["hello", "hello"]


async def test_r1_retry_limit() -> None:
    service = Scripted([ValueError(f"retry {n}") for n in (1, 2, 3)], for_ever=True)
    with pytest.raises(ValueError, match=r"^retry 3$"):
        await Retry(Limit(2))(service)("hello")
    assert service.calls == 3


async def test_r1_retry_error_inspection() -> None:
    service = Scripted([ValueError("retry 1"), ValueError("reject")])
    with pytest.raises(ValueError, match=r"^reject$"):
        await Retry(UnlessRejected())(service)("hello")
    assert service.calls == 2


async def test_r1_retry_cannot_clone_request() -> None:
    service = Scripted([ValueError("retry 1")])
    with pytest.raises(ValueError, match=r"^retry 1$"):
        await Retry(CannotClone())(service)("hello")
    assert service.requests == ["hello"]


async def test_r1_success_with_cannot_clone() -> None:
    assert await Retry(CannotClone())(Scripted([]))("hello") == "answer to attempt 1"


async def test_r1_retry_mutating_policy() -> None:
    service = Scripted([])
    with pytest.raises(OutOfRetries, match="out of retries"):
        await Retry(Mutating(2))(service)("hello")
    assert service.requests == ["hello", "retrying", "retrying"]


# --- the other scenarios
# -------------------------------------------------------------------------------------


async def test_a_policy_can_turn_a_failure_into_a_response_and_into_another_error() -> None:
    class Instead(Always):
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def retry(self, attempt: Attempt[str, str], /) -> Answer:
            attempt.error, attempt.response = self.error, "instead"
            return None

    assert await Retry(Instead(None))(Scripted([ValueError("x")]))("hello") == "instead"
    cause = ValueError("x")
    with pytest.raises(OutOfRetries) as caught:
        await Retry(Instead(OutOfRetries()))(Scripted([cause]))("hello")
    assert caught.value.__cause__ is cause


async def test_r3_one_attempt_is_one_call_and_no_sleep() -> None:
    retry, clock = mocked(StandardPolicy(SERIES, max_attempts=1))
    service = Scripted([LinkLost("cut")], for_ever=True)
    with pytest.raises(LinkLost):
        await retry(service)("hello")
    assert service.calls == 1
    assert clock.slept == []


async def test_r3_no_attempt_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0, where 1 or more is expected"):
        StandardPolicy(max_attempts=0)


async def test_r4_the_waits_follow_the_backoff() -> None:
    backoff = Backoff.exponential(initial=0.1, factor=2, cap=0.5, first=None, jitter="none")
    retry, clock = mocked(StandardPolicy(backoff, max_attempts=6))
    with pytest.raises(LinkLost):
        await retry(Scripted([LinkLost("cut")], for_ever=True))("hello")
    assert clock.slept == [0.1, 0.2, 0.4, 0.5, 0.5]


async def test_r5_a_response_is_asked_for_again_and_the_last_one_returned_or_an_error_raised() -> None:
    def unwanted(response: str) -> bool:
        return True

    retry, clock = mocked(StandardPolicy(SERIES, on_result=unwanted))
    assert await retry(Scripted([]))("hello") == "answer to attempt 3"
    assert clock.slept == [1, 2]
    strict, _ = mocked(StandardPolicy(SERIES, on_result=unwanted, result_error=OutOfRetries))
    with pytest.raises(OutOfRetries, match="answer to attempt 3"):
        await strict(Scripted([]))("hello")


async def test_r8_the_same_policy_gives_the_same_waits_again() -> None:
    retry, clock = mocked(StandardPolicy(SERIES))
    call = retry(Scripted([LinkLost("cut")], for_ever=True))
    for _ in range(3):
        with pytest.raises(LinkLost):
            await call("hello")
    assert clock.slept == [1, 2] * 3


async def test_r10_the_deadline_of_the_caller_stops_a_retry_within_it() -> None:
    start = anyio.current_time()
    policy = StandardPolicy(Backoff.constant(5, jitter="none"))
    with pytest.raises(LinkLost), anyio.fail_after(1):
        await Retry(policy)(Scripted([LinkLost("cut")], for_ever=True))("hello")
    assert anyio.current_time() - start < 1


async def test_r13_retry_after_is_honoured_exactly_and_the_backoff_begins_again() -> None:
    retry, clock = mocked(StandardPolicy(SERIES, max_attempts=5))
    errors = [LinkLost("cut"), LinkLost("cut"), Busy(), LinkLost("cut")]
    assert await retry(Scripted(errors))("hello") == "answer to attempt 5"
    assert clock.slept == [1, 2, 42, 1]


async def test_r14_a_request_is_cloned_once_for_each_attempt_and_the_callers_own_is_left_alone() -> None:
    clones: list[list[str]] = []

    def clone(request: list[str]) -> list[str]:
        clones.append(list(request))
        return clones[-1]

    calls = 0

    async def greedy(request: list[str], /) -> str:
        nonlocal calls
        calls += 1
        request.append("header")
        if calls < 3:
            raise LinkLost("cut")
        return "done"

    retry, _ = mocked(StandardPolicy(SERIES, clone=clone))
    mine = ["body"]
    assert await retry(greedy)(mine) == "done"
    assert mine == ["body"]
    assert clones == [["body", "header"]] * 3


async def test_r15_a_request_that_cannot_be_cloned_is_sent_once_itself() -> None:
    retry, clock = mocked(StandardPolicy(SERIES, clone=lambda request: NOT_CLONEABLE))
    service, body = Scripted([LinkLost("cut")]), object()
    with pytest.raises(LinkLost):
        await retry(service)(body)
    assert service.requests == [body]
    assert service.requests[0] is body
    assert clock.slept == []


async def test_r16_three_attempts_within_three_are_three_and_not_nine() -> None:
    inner, _ = mocked(StandardPolicy(SERIES))
    outer, _ = mocked(StandardPolicy(SERIES, on=Exception))
    service = Scripted([LinkLost("cut")], for_ever=True)
    with pytest.raises(LinkLost) as caught:
        await outer(inner(service))("hello")
    assert service.calls == 3
    mark = given_up(caught.value)
    assert mark is not None
    assert (mark.attempts, mark.reason) == (3, GiveUp.ATTEMPTS)
    assert caught.value.__notes__ == ["Retry gave up after attempt 3: there are no more attempts (max_attempts)"]


async def test_r16_what_the_inner_one_did_not_retry_the_outer_one_may() -> None:
    inner, _ = mocked(StandardPolicy(SERIES, on=LinkLost))
    outer, _ = mocked(StandardPolicy(SERIES, on=KeyError))
    service = Scripted([KeyError(), KeyError()])
    assert await outer(inner(service))("hello") == "answer to attempt 3"
    assert given_up(KeyError()) is None


async def test_r16_an_error_that_a_policy_makes_of_a_response_is_final_too() -> None:
    def unwanted(response: str) -> bool:
        return True

    inner, _ = mocked(StandardPolicy(SERIES, on_result=unwanted, result_error=OutOfRetries))
    outer, _ = mocked(StandardPolicy(SERIES, on=OutOfRetries))
    service = Scripted([])
    with pytest.raises(OutOfRetries):
        await outer(inner(service))("hello")
    assert service.calls == 3


async def test_r16_an_error_that_is_raised_again_by_the_next_call_is_judged_afresh() -> None:
    retry, _ = mocked(StandardPolicy(SERIES))
    error = LinkLost("the one and only")
    service = Scripted([error], for_ever=True)
    call = retry(service)
    elsewhere, _ = mocked(StandardPolicy(SERIES))
    for each in (call, call, elsewhere(service)):
        with pytest.raises(LinkLost):
            await each("hello")
    assert service.calls == 9
    assert len(error.__notes__) == 1


@dataclass(frozen=True)
class Frozen(Exception):
    number: int = 1


class Untouchable(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("no marks")


@pytest.mark.parametrize("error", [Frozen(), Untouchable()], ids=repr)
async def test_r2_an_error_that_cannot_be_marked_is_raised_all_the_same(error: Exception) -> None:
    retry, _ = mocked(StandardPolicy(SERIES, on=Exception, idempotent=True))
    service = Scripted([error], for_ever=True)
    with pytest.raises(type(error)) as caught:
        await retry(service)("hello")
    assert caught.value is error
    assert service.calls == 3
    assert given_up(error) is None


@pytest.mark.parametrize("answer", [math.nan, -1.0, "soon", object()])
async def test_an_answer_that_makes_no_sense_is_misuse_and_hides_nothing(answer: Any) -> None:
    error = LinkLost("cut")
    policy = Recorded(says=[answer])
    with pytest.raises(MisuseError, match="the policy answered") as caught:
        await Retry(policy)(Scripted([error]))("hello")
    assert caught.value.__context__ is error
    with pytest.raises(MisuseError, match="the policy answered"):
        await Retry(Recorded(says=[answer]))(Scripted([]))("hello")


async def test_r20_a_backoff_that_ends_ends_the_retries() -> None:
    retry, _ = mocked(StandardPolicy(SERIES.take(1), max_attempts=10))
    service = Scripted([LinkLost("cut")], for_ever=True)
    with pytest.raises(LinkLost):
        await retry(service)("hello")
    assert service.calls == 2


async def test_r22_a_policys_own_error_leaves_no_reference_cycle() -> None:
    seen: list[weakref.ref[Exception]] = []

    class Tracked(Exception):
        pass

    def fail(response: str) -> Exception:
        error = Tracked()
        seen.append(weakref.ref(error))
        return error

    retry, _ = mocked(StandardPolicy(SERIES, on_result=lambda response: True, result_error=fail))
    gc.collect()
    gc.disable()
    try:
        with suppress(Tracked):
            await retry(Scripted([]))("hello")
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", [StandardPolicy(SERIES), StandardPolicy(SERIES, budget=None)])
async def test_cancelled_anywhere_it_leaves_nothing_behind(policy: StandardPolicy) -> None:
    async def call() -> None:
        with suppress(LinkLost):
            await Retry(policy)(Scripted([LinkLost("cut")], for_ever=True))("hello")

    assert await cancel_at_every_await(call) == 5


async def test_hints_are_those_of_the_service_inside() -> None:
    class Busy(Scripted):
        def ready_now(self) -> bool:
            return False

        def load(self) -> float:
            return 7.0

    call = Retry()(Busy([]))
    assert not ready_now(call)
    assert load(call) == 7


# --- the value
# -----------------------------------------------------------------------------------------------


def test_a_backoff_stands_for_the_standard_policy() -> None:
    assert Retry(SERIES) == Retry(StandardPolicy(backoff=SERIES))
    assert Retry() == Retry(Backoff.exponential())
    assert Retry(SERIES) != Retry()


def test_retry_is_for_the_dialling_side_only() -> None:
    assert Retry.client_only


def test_a_class_of_policies_is_no_policy() -> None:
    with pytest.raises(TypeError, match=r"StandardPolicy is a class: write StandardPolicy\(...\)"):
        Retry(StandardPolicy)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("nonsense", [3, None, "exponential"])
def test_what_is_no_policy_is_refused_when_the_layer_is_made(nonsense: object) -> None:
    with pytest.raises(TypeError, match="takes a policy or a Backoff, not"):
        Retry(nonsense)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --- properties
# ----------------------------------------------------------------------------------------------


@given(
    took=st.lists(st.floats(0, 10), min_size=1, max_size=30),
    max_elapsed=st.floats(0, 100),
    max_attempts=st.integers(1, 20),
    failures=st.integers(0, 10),
    seed=st.integers(),
)
async def test_sleeps_never_exceed_max_elapsed_and_calls_never_max_attempts(
    took: list[float], max_elapsed: float, max_attempts: int, failures: int, seed: int
) -> None:
    clock, calls = MockClock(), 0

    async def broken(request: Dial, /) -> None:
        nonlocal calls
        clock.advance(took[calls % len(took)])
        calls += 1
        raise ConnectFailed("refused")

    policy = StandardPolicy(max_elapsed=max_elapsed, max_attempts=max_attempts)
    retry = Retry(policy, clock=clock, sleep=clock.sleep, random=Random(seed))
    with pytest.raises(ConnectFailed):
        await retry(broken)(Dial(ENDPOINT, failures=failures))
    assert sum(clock.slept) <= max_elapsed + 1e-9
    assert all(delay >= 0 for delay in clock.slept)
    assert 1 <= calls <= max_attempts


async def test_misuse_is_never_retried() -> None:
    for dial in (Dial(ENDPOINT), Dial(ENDPOINT, failures=1, cause=LinkLost("cut"))):
        retry, _ = mocked()
        service = Scripted([MisuseError("wrong")])
        with pytest.raises(MisuseError):
            await retry(service)(dial)
        assert service.calls == 1
