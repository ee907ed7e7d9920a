"""The circuit breaker as a state machine: scenarios C1 to C11, its windows, and a naive model that it agrees with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from towline.errors import CircuitOpen
from towline.policies import Backoff
from towline.policies.breaker import (
    TRANSITIONS,
    Admitted,
    Breaker,
    BreakerChange,
    BreakerCounts,
    BreakerInput,
    BreakerPolicy,
    BreakerState,
    step,
)

CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, ISOLATED = BreakerState.HALF_OPEN, BreakerState.ISOLATED

GROWING = Backoff.exponential(initial=5, factor=2, cap=300, first=None, jitter="none")


class Clock:
    """A clock that a test sets, backwards too, and that counts how often it is read."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now


@dataclass
class Bench:
    """A breaker with a clock of its own, and what it told."""

    policy: BreakerPolicy = field(default_factory=BreakerPolicy)
    clock: Clock = field(default_factory=Clock)
    changes: list[BreakerChange] = field(default_factory=list[BreakerChange])

    def __post_init__(self) -> None:
        self.breaker = Breaker(
            self.policy, name="db", clock=self.clock, random=Random(1), on_change=self.changes.append
        )

    def begin(self) -> Admitted:
        call = self.breaker.admit()
        assert call is not None
        return call

    def call(self, failed: bool | None, *, times: int = 1, seconds: float = 0.0) -> None:
        for _ in range(times):
            call = self.begin()
            self.clock.now += seconds
            self.breaker.end(call, failed)

    def trip(self) -> None:
        while self.breaker.state is CLOSED:
            self.call(True)

    def half_open(self) -> None:
        """Open it, and let the break pass."""
        self.trip()
        left = self.breaker.retry_after
        assert left is not None
        self.clock.now += left

    @property
    def steps(self) -> list[tuple[str, str]]:
        return [(str(change.old), str(change.new)) for change in self.changes]


def bench(**of_policy: Any) -> Bench:  # Any: the settings of a policy
    of_policy.setdefault("break_for", GROWING)
    return Bench(BreakerPolicy(**of_policy))


# --- the table


ALLOWED = {
    ("CLOSED", "TRIP"): "OPEN",
    ("CLOSED", "ISOLATE"): "ISOLATED",
    ("CLOSED", "CLOSE"): "CLOSED",
    ("OPEN", "PROBE"): "HALF_OPEN",
    ("OPEN", "ISOLATE"): "ISOLATED",
    ("OPEN", "CLOSE"): "CLOSED",
    ("HALF_OPEN", "RELAPSE"): "OPEN",
    ("HALF_OPEN", "RECOVER"): "CLOSED",
    ("HALF_OPEN", "ISOLATE"): "ISOLATED",
    ("HALF_OPEN", "CLOSE"): "CLOSED",
    ("ISOLATED", "ISOLATE"): "ISOLATED",
    ("ISOLATED", "CLOSE"): "CLOSED",
}


@pytest.mark.parametrize("state", BreakerState)
@pytest.mark.parametrize("input_", BreakerInput)
def test_a_step_is_in_the_table_or_is_a_fault_of_the_program(state: BreakerState, input_: BreakerInput) -> None:
    allowed = ALLOWED.get((state.name, input_.name))
    if allowed is None:
        assert input_ not in TRANSITIONS[state]
        with pytest.raises(RuntimeError, match=f"^{input_.name} is not allowed in {state.name}$"):
            step(state, input_)
    else:
        assert step(state, input_) is TRANSITIONS[state][input_] is BreakerState[allowed]


def test_by_hand_it_can_be_isolated_and_closed_from_everywhere() -> None:
    for state in BreakerState:
        assert step(state, BreakerInput.ISOLATE) is ISOLATED
        assert step(state, BreakerInput.CLOSE) is CLOSED


# --- C1: when it opens


def test_c1_opens_at_the_ratio_only_with_min_calls() -> None:
    it = bench(failure_ratio=0.5, min_calls=10)
    it.call(True, times=9)
    assert it.breaker.state is CLOSED  # 9 of 9, but no 10
    it.call(True)
    assert it.breaker.state is OPEN
    assert it.changes == [BreakerChange("db", CLOSED, OPEN, "10 of 10 calls in 30 s failed, limit: 50 %")]


def test_c1_opens_at_exactly_the_ratio() -> None:
    it = bench(failure_ratio=0.5, min_calls=10)
    it.call(False, times=6)
    it.call(True, times=5)
    assert it.breaker.state is CLOSED  # 5 of 11
    assert it.breaker.counts == BreakerCounts(calls=11, failures=5, slow=0, consecutive=5, probes=0)
    it.call(True)  # 6 of 12
    assert it.breaker.state is OPEN


def test_c1_the_ratio_is_met_though_a_product_of_floats_would_miss_it() -> None:
    assert 0.07 * 100 > 7
    it = bench(failure_ratio=0.07, min_calls=100)
    it.call(False, times=93)
    it.call(True, times=6)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.breaker.state is OPEN


def test_c1_a_call_that_went_well_opens_nothing_even_as_the_last_of_min_calls() -> None:
    it = bench(failure_ratio=0.5, min_calls=10)
    it.call(True, times=9)
    it.call(False)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.breaker.state is OPEN


def test_c1_min_calls_of_one_opens_at_the_first_failure() -> None:
    it = bench(failure_ratio=1.0, min_calls=1)
    it.call(True)
    assert it.breaker.state is OPEN


def test_c1_so_many_failures_in_a_row_open_it_whatever_the_window_holds() -> None:
    it = bench(failure_ratio=0.5, min_calls=100, consecutive=3)
    it.call(False, times=1000)
    it.call(True, times=2)
    it.call(False)
    it.call(True, times=2)
    assert it.breaker.state is CLOSED
    assert it.breaker.counts.consecutive == 2
    it.call(True)
    assert it.breaker.state is OPEN
    assert it.changes[-1].reason == "failures in a row: 3, limit: 3"


def test_c1_a_run_of_failures_does_not_grow_old_but_the_window_does() -> None:
    it = bench(consecutive=3)
    for _ in range(2):
        it.call(True)
        it.clock.now += 1e6
    assert it.breaker.counts == BreakerCounts(calls=0, failures=0, slow=0, consecutive=2, probes=0)
    it.call(True)
    assert it.breaker.state is OPEN


def test_c1_a_run_alone_opens_it_and_no_ratio_does() -> None:
    it = bench(failure_ratio=None, consecutive=3)
    for _ in range(100):
        it.call(True, times=2)
        it.call(False)
    assert it.breaker.state is CLOSED
    it.call(True, times=3)
    assert it.breaker.state is OPEN


# --- C2: open


def test_c2_an_open_one_turns_calls_away_and_says_for_how_long() -> None:
    it = bench(consecutive=1)
    it.trip()
    assert it.breaker.admit() is None
    assert it.breaker.retry_after == 5.0
    assert not it.breaker.ready_now()
    it.clock.now += 3.75
    error = it.breaker.rejection()
    assert isinstance(error, CircuitOpen)
    assert error.retry_after == 1.25
    assert str(error) == "circuit 'db' is open (failures in a row: 1, limit: 1); next try in 1.2 s"
    assert it.breaker.rejection() is not error


def test_c2_one_without_a_name_says_so_less() -> None:
    breaker = Breaker(BreakerPolicy(consecutive=1, break_for=GROWING), clock=Clock(), random=Random())
    call = breaker.admit()
    assert call is not None
    breaker.end(call, True)
    assert str(breaker.rejection()) == "the circuit is open (failures in a row: 1, limit: 1); next try in 5.0 s"


def test_c2_the_break_is_over_exactly_when_it_said() -> None:
    it = bench(consecutive=1)
    it.trip()
    it.clock.now = 4.999
    assert it.breaker.admit() is None
    it.clock.now = 5.0
    assert it.breaker.admit() is not None


@pytest.mark.parametrize("opened", [0.1, 1e5 + 0.3, 1e7 + 0.7])
def test_c2_who_sleeps_for_retry_after_is_let_through_whatever_floats_round_to(opened: float) -> None:
    for n in range(200):
        it = bench(consecutive=1, break_for=Backoff.constant(5 + n / 7, jitter="none"))
        it.clock.now = opened
        it.trip()
        it.clock.now += n / 77
        left = it.breaker.retry_after
        assert left is not None
        it.clock.now += left - 1e-9  # asyncio lets a timer fire that much early
        assert it.breaker.admit() is not None


# --- C3: half open


@pytest.mark.parametrize("most", [1, 2, 5])
def test_c3_after_the_break_exactly_half_open_max_probes_are_let_through(most: int) -> None:
    it = bench(consecutive=1, half_open_max=most)
    it.half_open()
    probes = [it.breaker.admit() for _ in range(100)]
    assert sum(probe is not None for probe in probes) == most
    assert it.breaker.counts.probes == most
    assert it.breaker.retry_after is None
    assert not it.breaker.ready_now()
    error = it.breaker.rejection()
    assert error.retry_after is None
    assert str(error) == f"circuit 'db' is half open ({most} of {most} probes under way)"


def test_c3_reading_the_state_shows_half_open_when_the_break_is_over_but_changes_nothing() -> None:
    it = bench(consecutive=1)
    it.half_open()
    assert it.breaker.state is HALF_OPEN
    assert it.breaker.ready_now()
    assert it.breaker.retry_after == 0
    assert it.steps == [("closed", "open")]
    it.begin()
    assert it.breaker.state is HALF_OPEN
    assert it.steps == [("closed", "open"), ("open", "half_open")]
    assert it.changes[-1].reason == "the break of 5 s is over"


def test_c3_a_place_that_is_given_back_goes_to_the_next_probe() -> None:
    it = bench(consecutive=1, half_open_max=2, half_open_successes=5)
    it.half_open()
    first, _ = it.begin(), it.begin()
    assert it.breaker.admit() is None
    it.breaker.end(first, False)
    assert it.breaker.ready_now()
    it.begin()
    assert it.breaker.admit() is None


# --- C4: what probes decide


def test_c4_a_probe_that_succeeds_closes_it_and_everything_is_forgotten() -> None:
    it = bench(failure_ratio=0.5, min_calls=10)
    it.half_open()
    it.call(False)
    assert it.breaker.state is CLOSED
    assert it.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)
    assert it.steps == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    it.call(True, times=9)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.breaker.state is OPEN


def test_c4_each_probe_that_fails_opens_it_for_longer_and_closing_starts_anew() -> None:
    it = bench(consecutive=1)
    it.trip()
    breaks = [it.breaker.retry_after]
    for _ in range(7):
        left = it.breaker.retry_after
        assert left is not None
        it.clock.now += left
        it.call(True)
        assert it.breaker.state is OPEN
        breaks.append(it.breaker.retry_after)
    assert breaks == [5, 10, 20, 40, 80, 160, 300, 300]
    assert it.changes[-1].reason == "a probe failed"
    assert "(a probe failed)" in str(it.breaker.rejection())
    it.clock.now += 300
    it.call(False)
    it.trip()
    assert it.breaker.retry_after == 5


def test_c4_the_last_break_of_a_series_that_ends_is_repeated() -> None:
    it = bench(consecutive=1, break_for=GROWING.take(2))
    breaks: list[float | None] = []
    it.trip()
    for _ in range(4):
        breaks.append(it.breaker.retry_after)
        it.clock.now += breaks[-1] or 0
        it.call(True)
    assert breaks == [5, 10, 10, 10]


def test_c4_a_series_without_any_delay_is_no_break_at_all() -> None:
    it = bench(consecutive=1, break_for=GROWING.take(0))
    it.call(True)
    assert it.steps == [("closed", "open")]
    assert it.breaker.state is HALF_OPEN
    assert it.breaker.ready_now()


def test_c4_the_jitter_of_breaks_is_drawn_from_the_generator_that_is_given() -> None:
    policy = BreakerPolicy(consecutive=1, break_for=Backoff.constant(100, jitter="full"))

    def first_break(seed: int) -> float | None:
        breaker = Breaker(policy, clock=Clock(), random=Random(seed))
        call = breaker.admit()
        assert call is not None
        breaker.end(call, True)
        return breaker.retry_after

    assert first_break(1) == 100 * Random(1).random()
    assert first_break(1) == first_break(1) != first_break(2)


def test_c4_so_many_probes_must_succeed_in_turn() -> None:
    it = bench(consecutive=1, half_open_successes=3)
    it.half_open()
    it.call(False, times=2)
    assert it.breaker.state is HALF_OPEN
    it.call(False)
    assert it.breaker.state is CLOSED


def test_c4_one_failure_among_the_probes_opens_it_again_and_they_are_counted_anew() -> None:
    it = bench(consecutive=1, half_open_successes=3)
    it.half_open()
    it.call(False, times=2)
    it.call(True)
    assert it.breaker.retry_after == 10
    it.clock.now += 10
    it.call(False, times=2)
    assert it.breaker.state is HALF_OPEN
    it.call(False)
    assert it.breaker.state is CLOSED


# --- C5: a probe that says nothing


def test_c5_a_cancelled_probe_frees_its_place_and_decides_nothing() -> None:
    it = bench(consecutive=1)
    it.half_open()
    for _ in range(10):
        probe = it.begin()
        assert it.breaker.admit() is None
        it.breaker.end(probe, None)
        assert it.breaker.state is HALF_OPEN
        assert it.breaker.counts.probes == 0
    it.call(False)
    assert it.breaker.state is CLOSED


# --- C6: late results


@pytest.mark.parametrize("failed", [False, True, None])
def test_c6_a_late_result_from_before_it_opened_changes_nothing_in_any_later_state(failed: bool | None) -> None:
    it = bench(consecutive=1, half_open_max=2, half_open_successes=2)
    late = [it.begin() for _ in range(6)]
    it.trip()
    it.breaker.end(late[0], failed)
    assert it.breaker.state is OPEN
    assert it.breaker.retry_after == 5
    it.clock.now += 5
    it.breaker.end(late[1], failed)
    assert it.steps == [("closed", "open")]

    first, second = it.begin(), it.begin()
    it.breaker.end(late[2], failed)
    assert it.breaker.state is HALF_OPEN
    assert it.breaker.counts.probes == 2  # it frees no place that it never had
    assert it.breaker.admit() is None

    it.breaker.end(first, False)
    it.breaker.end(late[3], failed)
    assert it.breaker.state is HALF_OPEN  # it is no second success

    it.breaker.end(second, False)
    assert it.breaker.state is CLOSED
    it.breaker.end(late[4], failed)
    assert it.breaker.state is CLOSED
    assert it.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)

    it.breaker.isolate()
    it.breaker.end(late[5], failed)
    assert it.breaker.state is ISOLATED


@pytest.mark.parametrize("failed", [False, True, None])
def test_c6_a_late_probe_of_an_earlier_half_open_state_changes_nothing_in_a_later_one(failed: bool | None) -> None:
    it = bench(consecutive=1, half_open_max=2)
    it.half_open()
    late, probe = it.begin(), it.begin()
    it.breaker.end(probe, True)
    assert it.breaker.retry_after == 10
    it.clock.now += 10
    it.begin()
    it.breaker.end(late, failed)
    assert it.breaker.state is HALF_OPEN
    assert it.breaker.counts.probes == 1


def test_c6_the_other_probes_do_not_count_once_one_has_closed_it() -> None:
    it = bench(consecutive=1, half_open_max=3)
    it.half_open()
    first, second, third = it.begin(), it.begin(), it.begin()
    it.breaker.end(first, False)
    it.breaker.end(second, True)
    it.breaker.end(third, True)
    assert it.breaker.state is CLOSED
    assert it.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)


# --- C7: windows


def test_c7_the_window_forgets_what_is_too_old() -> None:
    it = bench(failure_ratio=0.5, min_calls=10, window=30)
    it.call(True, times=9)
    it.clock.now = 29.999
    assert it.breaker.counts.calls == 9
    it.clock.now = 30.0
    assert it.breaker.counts == BreakerCounts(0, 0, 0, consecutive=9, probes=0)
    it.call(True, times=9)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.breaker.state is OPEN


@pytest.mark.parametrize("began", [0.0, 2.999, 100.0, 101.5, -47.0])
def test_c7_an_outcome_counts_for_nine_to_ten_tenths_of_the_window(began: float) -> None:
    it = bench(window=30)
    it.clock.now = began
    it.call(True)
    it.clock.now = began + 26.99
    assert it.breaker.counts.calls == 1
    it.clock.now = began + 30.01
    assert it.breaker.counts.calls == 0


def test_c7_what_is_forgotten_is_the_oldest_and_no_more() -> None:
    it = bench(window=10, min_calls=1000)
    for second in range(25):
        it.clock.now = second
        it.call(second % 2 == 0)
        it.call(False)
        expected = min(second + 1, 10)
        counts = it.breaker.counts
        assert counts.calls == 2 * expected
        assert counts.failures == sum(n % 2 == 0 for n in range(second - expected + 1, second + 1))


@pytest.mark.parametrize("gap", range(10, 45))
def test_c7_after_a_gap_longer_than_the_window_nothing_is_left_of_what_was_before(gap: int) -> None:
    it = bench(window=10, min_calls=1000)
    it.call(True)
    it.clock.now += gap
    assert it.breaker.counts.calls == 0
    it.call(False)
    it.clock.now += 9
    assert it.breaker.counts[:2] == (1, 0)


def test_c7_old_successes_do_not_dilute_new_failures() -> None:
    it = bench(failure_ratio=0.5, min_calls=10, window=30)
    it.call(False, times=10_000)
    it.clock.now += 31
    it.call(True, times=10)
    assert it.breaker.state is OPEN


def test_c7_a_window_of_calls_holds_the_last_ones_however_old() -> None:
    it = bench(failure_ratio=0.5, count=10, min_calls=10)
    it.call(True, times=4)
    it.clock.now += 1e9
    it.call(False, times=6)
    assert it.breaker.counts == BreakerCounts(calls=10, failures=4, slow=0, consecutive=0, probes=0)
    it.call(True)  # and the first of the four is out
    assert it.breaker.state is CLOSED
    assert it.breaker.counts.failures == 4
    it.call(True, times=3)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.breaker.state is OPEN
    assert it.changes[-1].reason == "5 of the last 10 calls failed, limit: 50 %"


def test_c7_a_window_of_calls_needs_no_clock_until_it_opens() -> None:
    it = bench(failure_ratio=1.0, count=100, min_calls=100)
    it.call(False, times=1000)
    it.call(True, times=99)
    assert it.breaker.counts == BreakerCounts(calls=100, failures=99, slow=0, consecutive=99, probes=0)
    assert it.breaker.state is CLOSED
    assert it.clock.readings == 0


def test_c7_a_window_of_time_reads_the_clock_once_per_call_and_twice_only_for_slow_calls() -> None:
    it = bench()
    it.call(False, times=100)
    assert it.clock.readings == 100
    it = bench(slow_call=1.0)
    it.call(False, times=100)
    assert it.clock.readings == 200


def test_c7_a_huge_gap_empties_the_window_and_costs_no_time() -> None:
    it = bench(min_calls=1000)
    it.call(True, times=5)
    it.clock.now = 1e15
    assert it.breaker.counts.calls == 0
    it.call(True, times=5)
    assert it.breaker.counts.calls == 5


def test_c7_a_clock_that_goes_back_makes_nothing_younger_and_no_break_longer() -> None:
    it = bench(min_calls=1000, window=30)
    it.clock.now = 100
    it.call(True)
    it.clock.now = 40
    it.call(True)
    assert it.breaker.counts.failures == 2
    it.clock.now += 27  # both are 27 s old for the breaker, in the bucket that began at 99
    assert it.breaker.counts.failures == 2
    it.clock.now += 3
    assert it.breaker.counts.failures == 0


def test_c7_a_clock_that_goes_back_in_a_break_only_stands_still() -> None:
    it = bench(consecutive=1)
    it.clock.now = 1000
    it.trip()
    it.clock.now = 1002
    assert it.breaker.retry_after == 3
    it.clock.now = 0
    assert it.breaker.retry_after == 3
    it.clock.now = 2
    assert it.breaker.retry_after == 1
    it.clock.now = 3
    assert it.breaker.state is HALF_OPEN


def test_c7_memory_does_not_grow_with_calls() -> None:
    def sizes(breaker: Breaker) -> int:
        window: Any = breaker._window
        return len(window._ring if breaker.policy.count else window._buckets)

    for it in (bench(min_calls=10**9), bench(count=50, min_calls=50)):
        before = sizes(it.breaker)
        for _ in range(1000):
            it.clock.now += 0.5
            it.call(None)
            it.call(False)
        assert sizes(it.breaker) == before


# --- C8: what does not count


def test_c8_calls_that_say_nothing_are_not_counted() -> None:
    it = bench(failure_ratio=0.5, min_calls=10, consecutive=3)
    it.call(True, times=2)
    it.call(None, times=100)
    assert it.breaker.counts == BreakerCounts(calls=2, failures=2, slow=0, consecutive=2, probes=0)
    it.call(True)  # and they did not break the run
    assert it.breaker.state is OPEN


# --- C9: by hand


def test_c9_an_isolated_one_turns_calls_away_until_it_is_closed() -> None:
    it = bench()
    it.breaker.isolate("maintenance until noon")
    it.clock.now += 1e9
    assert it.breaker.state is ISOLATED
    assert it.breaker.admit() is None
    assert not it.breaker.ready_now()
    assert it.breaker.retry_after is None
    error = it.breaker.rejection()
    assert error.retry_after is None
    assert str(error) == "circuit 'db' is isolated (maintenance until noon)"
    it.breaker.close()
    it.call(False)
    assert it.changes == [
        BreakerChange("db", CLOSED, ISOLATED, "maintenance until noon"),
        BreakerChange("db", ISOLATED, CLOSED, "by hand"),
    ]


def with_a_probe_under_way(it: Bench) -> None:
    it.half_open()
    it.begin()


@pytest.mark.parametrize("prepare", [Bench.trip, Bench.half_open, with_a_probe_under_way])
def test_c9_it_is_isolated_and_closed_from_open_and_half_open(prepare: Callable[[Bench], object]) -> None:
    it = bench(consecutive=1)
    prepare(it)
    it.breaker.close()
    assert it.breaker.state is CLOSED
    assert it.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)
    it = bench(consecutive=1)
    prepare(it)
    it.breaker.isolate()
    assert it.breaker.state is ISOLATED
    it.clock.now += 1e9
    assert it.breaker.admit() is None


def test_c9_closing_by_hand_forgets_everything_and_breaks_start_anew() -> None:
    it = bench(consecutive=3)
    it.call(True, times=2)
    under_way = it.begin()
    it.breaker.close()
    it.breaker.end(under_way, True)
    assert it.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)
    assert it.changes == []
    it.half_open()
    it.call(True)
    assert it.breaker.retry_after == 10
    it.breaker.close()
    it.trip()
    assert it.breaker.retry_after == 5


def test_c9_isolating_twice_is_told_once() -> None:
    it = bench()
    it.breaker.isolate("first")
    it.breaker.isolate("second")
    assert it.steps == [("closed", "isolated")]
    assert "first" in str(it.breaker.rejection())


# --- C10: who is told


def test_c10_every_change_is_told_once_to_each_listener() -> None:
    it = bench(consecutive=1)
    other: list[BreakerChange] = []
    it.breaker.watch(other.append)
    it.breaker.watch(other.append)
    it.breaker.watch(it.changes.append)
    it.half_open()
    for _ in range(10):
        it.breaker.admit()
    it.breaker.close()
    assert it.steps == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    assert other == it.changes


def test_c10_who_is_told_finds_the_change_complete_and_may_make_another() -> None:
    it = bench(consecutive=1)
    seen: list[tuple[BreakerState, bool]] = []

    def isolate_on_probe(change: BreakerChange) -> None:
        seen.append((it.breaker.state, it.breaker.ready_now()))
        if change.new is HALF_OPEN:
            it.breaker.isolate()

    it.breaker.watch(isolate_on_probe)
    it.half_open()
    assert it.breaker.admit() is None
    assert it.breaker.state is ISOLATED
    assert seen == [(OPEN, False), (HALF_OPEN, True), (ISOLATED, False)]


def test_c10_who_is_told_of_a_probe_may_close_it_and_the_call_is_let_through() -> None:
    it = bench(consecutive=1)
    it.breaker.watch(lambda change: it.breaker.close() if change.new is HALF_OPEN else None)
    it.half_open()
    it.call(True)  # counted as a call of the closed state
    assert it.steps == [("closed", "open"), ("open", "half_open"), ("half_open", "closed"), ("closed", "open")]
    assert it.breaker.retry_after == 5


# --- C11: recovery


def test_c11_constant_traffic_does_not_put_off_the_end_of_a_break() -> None:
    it = bench(consecutive=3)
    it.trip()
    let_through: list[float] = []
    for n in range(100):
        it.clock.now = n / 8
        call = it.breaker.admit()
        if call is not None:
            let_through.append(it.clock.now)
            it.breaker.end(call, False)
    assert let_through[0] == 5
    assert len(let_through) == 100 - 40
    assert it.breaker.state is CLOSED


def test_c11_constant_traffic_that_fails_is_let_through_once_per_break() -> None:
    it = bench(consecutive=1)
    it.trip()
    probed: list[float] = []
    for n in range(1200):
        it.clock.now = n / 8
        call = it.breaker.admit()
        if call is not None:
            probed.append(it.clock.now)
            it.breaker.end(call, True)
    assert probed == [5, 15, 35, 75]


# --- slow calls


def test_slow_calls_open_it_at_their_share_though_they_succeed() -> None:
    it = bench(failure_ratio=None, slow_call=2.0, slow_ratio=0.5, min_calls=4, window=1000)
    it.call(False, seconds=2.0)  # exactly as long as it may take
    assert it.breaker.counts.slow == 0
    it.call(False, seconds=1.0)
    it.call(False, seconds=2.5)
    assert it.breaker.state is CLOSED
    assert it.breaker.counts == BreakerCounts(calls=3, failures=0, slow=1, consecutive=0, probes=0)
    it.call(False, seconds=2.5)
    assert it.breaker.state is OPEN
    assert it.changes[-1].reason == "2 of 4 calls in 1000 s took more than 2 s, limit: 50 %"


def test_slow_calls_count_whether_they_fail_or_not_but_not_if_they_say_nothing() -> None:
    it = bench(slow_call=2.0, slow_ratio=1.0, min_calls=3, failure_ratio=1.0)
    it.call(None, seconds=9)
    it.call(True, seconds=3)
    it.call(False, seconds=3)
    assert it.breaker.counts == BreakerCounts(calls=2, failures=1, slow=2, consecutive=0, probes=0)
    it.call(True, seconds=3)
    assert it.breaker.state is OPEN
    assert it.changes[-1].reason == "3 of 3 calls in 30 s took more than 2 s, limit: 100 %"


def test_a_slow_call_that_went_well_does_not_open_it_by_the_ratio_of_failures() -> None:
    it = bench(failure_ratio=0.5, min_calls=4, slow_call=2.0, slow_ratio=1.0)
    it.call(True, times=3)
    it.call(False, seconds=3)
    assert it.breaker.state is CLOSED
    it.call(True)
    assert it.changes[-1].reason == "4 of 5 calls in 30 s failed, limit: 50 %"


def test_slow_calls_are_counted_in_a_window_of_calls_too() -> None:
    it = bench(failure_ratio=None, slow_call=2.0, slow_ratio=0.5, count=4, min_calls=4)
    it.call(False, seconds=3)
    it.call(False, times=5)
    assert it.breaker.counts == BreakerCounts(calls=4, failures=0, slow=0, consecutive=0, probes=0)
    it.call(False, seconds=3)
    assert it.breaker.state is CLOSED
    it.call(False, seconds=3)
    assert it.breaker.state is OPEN


def test_a_slow_probe_has_failed() -> None:
    it = bench(consecutive=1, slow_call=2.0)
    it.half_open()
    it.call(False, seconds=3)
    assert it.breaker.state is OPEN
    assert it.breaker.retry_after == 10
    assert it.changes[-1].reason == "a probe took 3 s, limit: 2 s"
    it.clock.now += 10
    it.call(False, seconds=2)
    assert it.breaker.state is CLOSED


# --- settings


def test_the_defaults_are_half_of_ten_calls_in_half_a_minute_and_breaks_from_5_to_300_seconds() -> None:
    policy = BreakerPolicy()
    assert (policy.failure_ratio, policy.min_calls, policy.window, policy.count) == (0.5, 10, 30, None)
    assert (policy.consecutive, policy.slow_call, policy.slow_ratio) == (None, None, 1.0)
    assert (policy.half_open_max, policy.half_open_successes) == (1, 1)
    assert policy.break_for == Backoff.exponential(initial=5, factor=2, cap=300, first=None, jitter="equal")
    breaks = policy.break_for.delays(Random(1), hold=True)
    series = [next(breaks) for _ in range(20)]
    for n, seconds in enumerate(series):
        longest = min(5 * 2**n, 300)
        assert longest / 2 <= seconds <= longest


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"failure_ratio": 0}, "failure_ratio is 0, where more than 0 and at most 1 is expected"),
        ({"failure_ratio": 1.01}, "failure_ratio is 1.01, where more than 0 and at most 1 is expected"),
        ({"failure_ratio": math.nan}, "failure_ratio is nan, where more than 0 and at most 1 is expected"),
        ({"slow_ratio": 0}, "slow_ratio is 0, where more than 0 and at most 1 is expected"),
        ({"slow_ratio": 1.5}, "slow_ratio is 1.5, where more than 0 and at most 1 is expected"),
        ({"slow_ratio": math.nan}, "slow_ratio is nan, where more than 0 and at most 1 is expected"),
        ({"min_calls": 0}, "min_calls is 0, where 1 or more is expected"),
        ({"min_calls": math.nan}, "min_calls is nan, where 1 or more is expected"),
        ({"count": 0}, "count is 0, where 1 or more is expected"),
        ({"consecutive": 0}, "consecutive is 0, where 1 or more is expected"),
        ({"half_open_max": 0}, "half_open_max is 0, where 1 or more is expected"),
        ({"half_open_successes": 0}, "half_open_successes is 0, where 1 or more is expected"),
        ({"window": 0}, "window is 0, where a finite number of 0.001 or more is expected"),
        ({"window": math.inf}, "window is inf, where a finite number of 0.001 or more is expected"),
        ({"window": math.nan}, "window is nan, where a finite number of 0.001 or more is expected"),
        ({"slow_call": 0}, "slow_call is 0, where more than 0 is expected"),
        ({"slow_call": math.nan}, "slow_call is nan, where more than 0 is expected"),
        ({"count": 9}, "min_calls is 10, where at most 9 (count) is expected"),
        ({"count": 9, "failure_ratio": None, "slow_call": 1}, "min_calls is 10, where at most 9 (count) is expected"),
        (
            {"failure_ratio": None},
            "failure_ratio, consecutive and slow_call are all None, where one limit is expected",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_with_both_numbers(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the whole message is compared
        BreakerPolicy(**settings_)
    assert str(caught.value) == message


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    BreakerPolicy(failure_ratio=1, min_calls=1, window=0.001, count=1, consecutive=1, slow_call=1e-9, slow_ratio=1)
    BreakerPolicy(failure_ratio=1e-9, count=10, min_calls=10)
    BreakerPolicy(failure_ratio=None, consecutive=3, count=1)  # no share counts, so min_calls does not either


@pytest.mark.parametrize("break_for", [5.0, None, [5.0]])
def test_a_break_that_is_no_backoff_is_refused(break_for: Any) -> None:
    with pytest.raises(TypeError, match=r"^break_for is .*, where a Backoff is expected$"):
        BreakerPolicy(break_for=break_for)


def test_policies_are_values() -> None:
    assert BreakerPolicy(consecutive=3) == BreakerPolicy(consecutive=3) != BreakerPolicy()
    assert hash(BreakerPolicy()) == hash(BreakerPolicy())
    assert "consecutive=3" in repr(BreakerPolicy(consecutive=3))
    with pytest.raises(AttributeError):
        BreakerPolicy().consecutive = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_its_repr_says_how_it_stands_and_reads_no_clock() -> None:
    it = bench(min_calls=4)
    it.call(False)
    it.call(True, times=2)
    readings = it.clock.readings
    assert repr(it.breaker) == "<Breaker 'db': closed, 2 of 3 calls in 30 s failed>"
    assert it.clock.readings == readings
    it.half_open()
    readings = it.clock.readings
    assert repr(it.breaker) == "<Breaker 'db': open for 5 s, 3 of 4 calls in 30 s failed, limit: 50 %>"
    assert it.clock.readings == readings
    it.begin()
    assert repr(it.breaker) == "<Breaker 'db': half open, 1 of 1 probes under way>"
    it.breaker.isolate()
    assert repr(it.breaker) == "<Breaker 'db': isolated, by hand>"
    assert repr(bench(count=10).breaker) == "<Breaker 'db': closed, 0 of the last 0 calls failed>"


# --- a model


class Model:
    """What a breaker should do, told naively: every outcome is kept, and everything is worked out from them."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self.time = 0.0
        self.state = "closed"
        self.epoch = 0
        self.outcomes: list[tuple[float, bool, bool]] = []
        self.opened = 0.0
        self.breaks = 0  # since it was closed
        self.probing: set[int] = set()
        self.steps: list[tuple[str, str]] = []

    def go(self, new: str) -> None:
        if new != self.state:
            self.steps.append((self.state, new))
        elif new == "isolated":
            return
        self.state, self.epoch, self.outcomes, self.probing = new, self.epoch + 1, [], set()
        if new == "open":
            self.opened = self.time
            self.breaks += 1
        elif new == "closed":
            self.breaks = 0

    @property
    def left(self) -> float:
        return max(self.opened + min(math.ldexp(4, self.breaks - 1), 20) - self.time, 0.0)

    @property
    def shown(self) -> str:
        return "half_open" if self.state == "open" and self.left == 0 else self.state

    @property
    def retry_after(self) -> float | None:
        if self.state == "closed":
            return 0.0
        if self.state == "open":
            return self.left
        return 0.0 if self.state == "half_open" and len(self.probing) < self.policy.half_open_max else None

    @property
    def counted(self) -> list[tuple[float, bool, bool]]:
        if self.policy.count is not None:
            return self.outcomes[-self.policy.count :]
        return [each for each in self.outcomes if math.floor(each[0]) > math.floor(self.time) - 10]

    @property
    def run(self) -> int:
        run = 0
        for _, failed, _ in reversed(self.outcomes):
            if not failed:
                break
            run += 1
        return run

    def admit(self, call: int) -> bool:
        if self.retry_after != 0:
            return False
        if self.state == "open":
            self.go("half_open")
        if self.state == "half_open":
            self.probing.add(call)
        return True

    def end(self, call: int, epoch: int, seconds: float, failed: bool | None) -> None:
        if epoch != self.epoch:
            return
        self.probing.discard(call)
        if failed is None:
            return
        slow = self.policy.slow_call is not None and seconds > self.policy.slow_call
        self.outcomes.append((self.time, failed, slow))
        if self.state == "half_open":
            if failed or slow:
                self.go("open")
            elif len(self.outcomes) == self.policy.half_open_successes:
                self.go("closed")
        elif self.is_too_bad(failed, slow):
            self.go("open")

    def is_too_bad(self, failed: bool, slow: bool) -> bool:
        policy, counted = self.policy, self.counted
        if failed and policy.consecutive is not None and self.run >= policy.consecutive:
            return True
        if len(counted) < policy.min_calls:
            return False
        failures, slows = sum(each[1] for each in counted), sum(each[2] for each in counted)
        too_many = policy.failure_ratio is not None and failures / len(counted) >= policy.failure_ratio
        return (failed and too_many) or (slow and slows / len(counted) >= policy.slow_ratio)


class BreakerMachine(RuleBasedStateMachine):
    """Random calls that end in any order and in any way, while time passes, and someone turns the switches."""

    @initialize(
        ratio=st.sampled_from([None, 0.3, 0.5, 1.0]),
        min_calls=st.integers(1, 5),
        count=st.none() | st.integers(0, 4),
        consecutive=st.none() | st.integers(1, 4),
        slow_call=st.sampled_from([None, 2.0]),
        slow_ratio=st.sampled_from([0.5, 1.0]),
        most=st.integers(1, 3),
        successes=st.integers(1, 3),
    )
    def make(
        self,
        ratio: float | None,
        min_calls: int,
        count: int | None,
        consecutive: int | None,
        slow_call: float | None,
        slow_ratio: float,
        most: int,
        successes: int,
    ) -> None:
        policy = BreakerPolicy(
            failure_ratio=0.5 if ratio is consecutive is slow_call is None else ratio,
            min_calls=min_calls,
            window=10,
            count=None if count is None else min_calls + count,
            consecutive=consecutive,
            slow_call=slow_call,
            slow_ratio=slow_ratio,
            break_for=Backoff.exponential(initial=4, factor=2, cap=20, first=None, jitter="none"),
            half_open_max=most,
            half_open_successes=successes,
        )
        self.it = Bench(policy)
        self.model = Model(policy)
        self.calls: dict[int, tuple[Admitted, int, float]] = {}
        self.begun = 0

    @rule()
    def begin(self) -> None:
        self.begun += 1
        call = self.it.breaker.admit()
        assert self.model.admit(self.begun) is (call is not None)
        if call is not None:
            self.calls[self.begun] = call, self.model.epoch, self.model.time
        else:
            assert self.it.breaker.rejection().retry_after == self.model.retry_after

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), failed=st.sampled_from([False, True, True, None]))
    def end(self, data: st.DataObject, failed: bool | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.calls)))
        call, epoch, began = self.calls.pop(number)
        self.it.breaker.end(call, failed)
        self.model.end(number, epoch, self.model.time - began, failed)

    @rule(failed=st.sampled_from([False, True, True]), times=st.integers(1, 4))
    def call_through(self, failed: bool, times: int) -> None:
        for _ in range(times):
            self.begin()
            if self.begun in self.calls:
                call, epoch, began = self.calls.pop(self.begun)
                self.it.breaker.end(call, failed)
                self.model.end(self.begun, epoch, self.model.time - began, failed)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 4.0, 9.5, 10.0, 19.0]))
    def time_passes(self, seconds: float) -> None:
        self.it.clock.now += seconds
        self.model.time += seconds

    @rule(seconds=st.sampled_from([0.5, 1000.0]))
    def clock_goes_back(self, seconds: float) -> None:
        self.it.clock.now -= seconds

    @rule()
    def isolate(self) -> None:
        self.it.breaker.isolate()
        self.model.go("isolated")

    @rule()
    def close(self) -> None:
        self.it.breaker.close()
        self.model.go("closed")

    @invariant()
    def agrees(self) -> None:
        breaker, model = self.it.breaker, self.model
        assert breaker.state == model.shown
        assert breaker.retry_after == model.retry_after
        assert breaker.ready_now() is (model.retry_after == 0)
        if model.state == "closed":
            counted = model.counted
            failures, slow = sum(each[1] for each in counted), sum(each[2] for each in counted)
            assert breaker.counts == BreakerCounts(len(counted), failures, slow, model.run, 0)
        else:
            assert breaker.counts == BreakerCounts(0, 0, 0, 0, len(model.probing))
        assert self.it.steps == model.steps


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(deadline=None, max_examples=300, stateful_step_count=50)
