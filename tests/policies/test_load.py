"""Load: the numbers of the Peak EWMA, and the drawing of two."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.policies.load import PeakEwma, two_of

# Tower's tests are in milliseconds; the formula does not know the unit.
MS = 1.0
SECOND = 1000 * MS


def test_p1_an_estimate_that_nothing_renews_decays() -> None:
    trips = PeakEwma(default_rtt=10 * MS, decay=SECOND).round_trips(now=0)
    assert trips.load(now=0) == 10.0
    assert trips.load(now=100 * MS) == pytest.approx(9.048, abs=0.0005)
    assert trips.load(now=200 * MS) == pytest.approx(8.187, abs=0.0005)


def test_p1_calls_under_way_multiply_and_a_slow_answer_is_the_estimate_at_once() -> None:
    trips = PeakEwma(default_rtt=20 * MS, decay=SECOND).round_trips(now=0)
    assert trips.load(now=0) == 20 * MS
    trips.begin()
    assert trips.load(now=100 * MS) > 20 * MS
    trips.begin()
    assert trips.load(now=200 * MS) > 40 * MS
    trips.end(rtt=200 * MS, now=300 * MS)
    assert trips.load(now=300 * MS) == 400 * MS
    trips.end(rtt=200 * MS, now=400 * MS)
    assert trips.load(now=400 * MS) == 200 * MS
    assert trips.load(now=1400 * MS) < 100 * MS
    assert trips.load(now=11_400 * MS) < 0.1 * MS


def test_the_load_of_an_endpoint_that_nobody_knows_is_the_default_and_counts_its_calls() -> None:
    trips = PeakEwma().round_trips(now=5)
    assert (trips.load(now=5), trips.pending) == (1.0, 0)
    trips.begin()
    trips.begin()
    assert (trips.load(now=5), trips.pending) == (3.0, 2)
    trips.end(rtt=1, now=5)
    assert (trips.load(now=5), trips.pending) == (2.0, 1)


def test_a_faster_answer_moves_the_estimate_by_the_time_that_has_passed() -> None:
    trips = PeakEwma(default_rtt=1, decay=10).round_trips(now=0)
    trips.begin()
    trips.end(rtt=0.2, now=5)
    weight = math.exp(-0.5)
    assert trips.load(now=5) == pytest.approx(1 * weight + 0.2 * (1 - weight))


def test_to_read_the_load_changes_nothing() -> None:
    read, unread = (PeakEwma().round_trips(now=0) for _ in range(2))
    for now in range(10):
        read.load(now)
    for trips in (read, unread):
        trips.begin()
        trips.end(rtt=0.1, now=10)
    assert read.load(now=10) == unread.load(now=10)


def test_a_call_without_an_answer_raises_the_estimate_and_never_lowers_it() -> None:
    trips = PeakEwma(default_rtt=1, decay=10).round_trips(now=0)
    trips.begin()
    trips.end(rtt=0.0, now=10, answered=False)
    assert trips.load(now=10) == pytest.approx(math.exp(-1))
    assert trips.pending == 0
    trips.begin()
    trips.end(rtt=0.5, now=10, answered=False)  # below the estimate as it was, above what it has sunk to
    assert trips.load(now=10) == 0.5
    trips.begin()
    trips.end(rtt=3.0, now=13, answered=False)
    assert trips.load(now=13) == 3.0


def test_a_clock_that_goes_backwards_ages_nothing() -> None:
    trips = PeakEwma(default_rtt=1, decay=1).round_trips(now=100)
    assert trips.load(now=50) == 1.0
    trips.begin()
    trips.end(rtt=0.5, now=50)
    assert trips.load(now=100) == 1.0


def test_a_huge_gap_leaves_nothing_of_an_estimate_and_is_no_overflow() -> None:
    trips = PeakEwma().round_trips(now=0)
    assert trips.load(now=1e300) == 0.0
    trips.begin()
    trips.end(rtt=0.25, now=1e300)
    assert trips.load(now=1e300) == 0.25


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.booleans()), max_size=30),
    st.floats(0, 10),
    st.floats(0.01, 100),
)
@settings(deadline=None)
def test_an_estimate_stays_between_nothing_and_the_longest_that_was_seen(
    calls: list[tuple[float, float, bool]], default: float, decay: float
) -> None:
    trips = PeakEwma(default_rtt=default, decay=decay).round_trips(now=0)
    now = 0.0
    longest = default
    for gap, rtt, answered in calls:
        now += gap
        before = trips.load(now)
        trips.begin()
        trips.end(rtt, now, answered=answered)
        longest = max(longest, rtt)
        assert 0 <= trips.load(now) <= longest * (1 + 1e-9)
        if answered:
            assert trips.load(now) >= min(before, rtt) * (1 - 1e-9)
        else:
            assert trips.load(now) == pytest.approx(max(before, rtt))


@pytest.mark.parametrize("default_rtt", [-1, math.inf, math.nan])
def test_a_default_that_is_no_time_is_refused(default_rtt: float) -> None:
    with pytest.raises(ValueError, match=rf"^default_rtt is {default_rtt}, where 0 or more is expected$"):
        PeakEwma(default_rtt=default_rtt)


@pytest.mark.parametrize("decay", [0, -1, math.inf, math.nan])
def test_a_decay_that_is_no_time_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"^decay is {decay}, where more than 0 is expected$"):
        PeakEwma(decay=decay)


def test_settings_are_equal_by_value_and_one_measures_many_endpoints() -> None:
    ewma = PeakEwma(default_rtt=0)
    assert ewma == PeakEwma(default_rtt=0, decay=10)
    assert repr(PeakEwma()) == "PeakEwma()"
    one, other = ewma.round_trips(now=0), ewma.round_trips(now=0)
    one.begin()
    one.end(rtt=1, now=1)
    assert (one.load(now=1), other.load(now=1)) == (1, 0)


# --- two of many -------------------------------------------------------------------------------------------------


@given(st.integers(2, 50), st.randoms(use_true_random=False))
def test_p2_two_of_many_are_never_the_same(count: int, random: Random) -> None:
    one, other = two_of(count, random)
    assert one != other
    assert 0 <= one < count
    assert 0 <= other < count


def test_p2_every_ordered_pair_is_as_likely_as_any_other() -> None:
    random = Random(1)
    drawn = Counter(two_of(4, random) for _ in range(24_000))
    assert len(drawn) == 4 * 3
    assert all(abs(count - 2000) < 200 for count in drawn.values()), drawn


def test_the_largest_draws_are_still_two_different_numbers() -> None:
    class Largest(Random):
        def random(self) -> float:
            return math.nextafter(1, 0)

    assert two_of(2, Largest()) == (0, 1)
    assert two_of(5, Largest()) == (3, 4)
