"""The Retry layer: it does what the policy says, and nothing else."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, HandshakeRefused, LinkLost, MisuseError, TowlineError, UnknownHost
from towline.layers.retry import AttemptEvent, Retry
from towline.policies import Backoff, Failure, StandardPolicy
from towline.service import Dial
from towline.testing import MockClock

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
class Recorded:
    """A policy that says what it is told to, and records what it was asked."""

    before_first: float = 0.0
    on_failure: list[float | None] = field(default_factory=list[float | None])
    on_success: list[float | None] = field(default_factory=list[float | None])
    asked: list[object] = field(default_factory=list[object])

    def session(self, request: object, /, *, now: float, random: Random) -> Recorded:
        self.asked.append((request, now, random))
        return self

    def before(self) -> float:
        return self.before_first

    def failed(self, failure: Failure, /) -> float | None:
        self.asked.append(failure)
        return self.on_failure.pop(0)

    def succeeded(self, response: object, /) -> float | None:
        self.asked.append(response)
        return self.on_success.pop(0) if self.on_success else None


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


async def test_the_last_error_is_raised_itself_and_nothing_is_slept_after_it() -> None:
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


async def test_a_wait_that_cannot_end_before_the_callers_deadline_is_not_begun() -> None:
    start = anyio.current_time()
    service = Scripted([LinkLost("cut")], for_ever=True)
    with pytest.raises(LinkLost), anyio.fail_after(1):
        await Retry(Backoff.constant(5, jitter="none"))(service)("hello")
    assert service.calls == 1
    assert anyio.current_time() == start


async def test_the_policy_is_told_the_deadline_on_the_clock_of_the_layer() -> None:
    policy, clock = Recorded(on_failure=[None]), MockClock(5000)
    with pytest.raises(LinkLost), anyio.fail_after(60):
        await Retry(policy, clock=clock, sleep=clock.sleep)(Scripted([LinkLost("cut")]))("hello")
    failure = policy.asked[1]
    assert isinstance(failure, Failure)
    assert failure.now == 5000
    assert failure.deadline == pytest.approx(5060)


async def test_cancelling_an_attempt_ends_the_call_and_never_asks_the_policy() -> None:
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


async def test_cancelling_a_wait_ends_the_call_without_another_attempt() -> None:
    service = Scripted([LinkLost("cut")], for_ever=True)
    async with anyio.create_task_group() as group:
        group.start_soon(Retry(Backoff.constant(1000, jitter="none"))(service), "hello")
        await anyio.sleep(10)
        group.cancel_scope.cancel()
    assert service.calls == 1


async def test_a_loop_of_failures_without_delay_can_be_cancelled() -> None:
    async def broken(request: Dial, /) -> None:
        raise ConnectFailed("refused")  # no checkpoint

    with anyio.CancelScope() as scope:
        scope.cancel()
        await Retry(Backoff.constant(0))(broken)(Dial(ENDPOINT, cause=LinkLost("cut")))
    assert scope.cancelled_caught


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=repr)
def test_what_ends_the_program_is_not_retried(error: BaseException) -> None:
    async def interrupted(request: str, /) -> None:
        raise error

    call = Retry(Recorded(), clock=MockClock())(interrupted)("hello")
    with pytest.raises(type(error)):
        call.send(None)


async def test_a_policy_can_wait_before_and_retry_a_response_that_it_does_not_like() -> None:
    policy, clock = Recorded(before_first=3, on_failure=[0], on_success=[2, None]), MockClock()
    service = Scripted([LinkLost("cut")])
    random = Random(0)
    retry = Retry(policy, clock=clock, sleep=clock.sleep, random=random)
    assert await retry(service)("hello") == "answer to attempt 3"
    assert clock.slept == [3, 0, 2]
    assert policy.asked[0] == ("hello", 0, random)
    assert policy.asked[2:] == ["answer to attempt 2", "answer to attempt 3"]


async def test_concurrent_calls_do_not_share_their_attempts() -> None:
    calls = 0

    async def broken(request: int, /) -> None:
        nonlocal calls
        calls += 1
        raise LinkLost(str(request))

    call = Retry(SERIES)(broken)

    async def one(request: int) -> None:
        with pytest.raises(LinkLost, match=f"^{request}$"):
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


async def test_errors_leave_no_reference_cycle() -> None:
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


async def test_observers_are_told_before_every_attempt_and_before_its_wait() -> None:
    events: list[object] = []
    clock = MockClock()

    def of_the_dial(attempt: int, delay: float, error: Exception | None) -> None:
        events.append((attempt, delay, error))

    async def sleep(seconds: float) -> None:
        events.append(f"slept {seconds:g}")
        await clock.sleep(seconds)

    async def connect(dial: Dial, /) -> str:
        return await service(dial)

    cut, refused = LinkLost("cut"), ConnectFailed("refused")
    service = Scripted([refused])
    retry = Retry(SERIES, clock=clock, sleep=sleep, on_attempt=events.append)
    await retry(connect)(Dial(ENDPOINT, failures=2, cause=cut, on_attempt=of_the_dial))
    assert events == [
        AttemptEvent(1, 2, cut),
        (1, 2, cut),
        "slept 2",
        AttemptEvent(2, 3, refused),
        (2, 3, refused),
        "slept 3",
    ]


async def test_observers_are_told_of_a_first_attempt_that_waits_for_nothing() -> None:
    events: list[AttemptEvent] = []
    await Retry(on_attempt=events.append)(Scripted([]))("hello")
    assert events == [AttemptEvent(1, 0, None)]


async def test_an_observer_that_raises_is_logged_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug in an observer")

    clock = MockClock()
    retry = Retry(SERIES, clock=clock, sleep=clock.sleep, on_attempt=broken)
    service = Scripted([ConnectFailed("refused")])
    with caplog.at_level(logging.ERROR):
        assert await retry(service)(Dial(ENDPOINT, on_attempt=broken)) == "answer to attempt 2"
    assert len(caplog.records) == 4
    assert "a bug in an observer" in caplog.text


def test_the_observer_of_a_dial_is_no_part_of_its_value() -> None:
    observed = Dial(ENDPOINT, on_attempt=lambda attempt, delay, error: None)
    assert observed == Dial(ENDPOINT)
    assert repr(observed) == repr(Dial(ENDPOINT))
    assert hash(observed) == hash(Dial(ENDPOINT))


# --- the value
# -----------------------------------------------------------------------------------------------


def test_a_backoff_stands_for_the_standard_policy() -> None:
    assert Retry(SERIES) == Retry(StandardPolicy(backoff=SERIES))
    assert Retry() == Retry(Backoff.exponential())
    assert Retry(SERIES) != Retry()


def test_retry_is_for_the_dialling_side_only() -> None:
    assert Retry.client_only


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
