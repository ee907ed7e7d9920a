"""Rates and their meters: when the next call may begin, from nothing but the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.policies.rate import FixedWindow, Gcra, Meter, Rate


def taken(meter: Meter, now: float, limit: int = 10_000) -> int:
    """Take as many calls as may begin now; how many those were."""
    return next(n for n in range(limit) if meter.take(now) > 0)


BOTH: list[Callable[..., Rate]] = [FixedWindow, Gcra]


# --- Tower's tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("start", [0.0, 12345.678, 1e9])
def test_l1_one_call_in_100_ms_reaches_the_capacity(kind: Callable[..., Rate], start: float) -> None:
    meter = kind(1, 0.1).meter()
    assert meter.take(start) == 0
    assert meter.take(start) == pytest.approx(0.1, abs=1e-6)
    assert meter.wait(start + 0.05) == pytest.approx(0.05, abs=1e-6)
    assert meter.wait(start + 0.101) == 0
    assert meter.take(start + 0.101) == 0
    assert meter.take(start + 0.101) > 0


@pytest.mark.parametrize("kind", BOTH)
def test_l1_what_is_left_of_three_in_100_ms_is_reset(kind: Callable[..., Rate]) -> None:
    meter = kind(3, 0.1).meter()
    assert meter.take(0.0) == 0
    assert [meter.take(0.1), meter.take(0.1)] == [0, 0]
    assert meter.wait(0.1) == 0, "there were three again"
    assert meter.take(0.1) == 0
    assert meter.wait(0.1) > 0


# --- fixed windows ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_window_begins_with_the_first_call_after_the_last_one() -> None:
    meter = FixedWindow(2, per=10).meter()
    assert taken(meter, 5) == 2
    assert meter.wait(5) == 10
    assert meter.wait(14.5) == 0.5
    assert meter.take(20) == 0  # and not at 15
    assert meter.take(29) == 0
    assert meter.take(29) == 1
    assert taken(meter, 30) == 2


def test_a_fixed_window_allows_twice_as_many_across_its_boundary() -> None:
    meter = FixedWindow(3, per=1).meter()
    assert meter.take(0) == 0
    assert taken(meter, 0.875) == 2
    assert taken(meter, 1) == 3


def test_waiting_counts_nothing() -> None:
    for rate in (FixedWindow(2, per=1), Gcra(2, per=1)):
        meter = rate.meter()
        assert [meter.wait(0) for _ in range(10)] == [0] * 10
        assert taken(meter, 0) == 2
        assert meter.wait(0) == meter.wait(0) == meter.take(0) > 0


# --- an even pace ----------------------------------------------------------------------------------------------------


def test_after_a_burst_calls_begin_at_an_even_pace() -> None:
    meter = Gcra(4, per=1, burst=3).meter()
    assert taken(meter, 0) == 3
    assert meter.wait(0) == 0.25
    assert [taken(meter, quarter / 4) for quarter in range(1, 9)] == [1] * 8
    assert taken(meter, 2.5) == 2
    assert taken(meter, 100) == 3, "no more than a burst is saved up"


def test_without_a_burst_calls_are_all_the_same_time_apart() -> None:
    meter = Gcra(4, per=1, burst=1).meter()
    assert taken(meter, 0) == 1
    assert [meter.wait(0), meter.wait(0.125), meter.wait(0.25)] == [0.25, 0.125, 0]
    assert taken(meter, 10) == 1


def test_a_burst_is_the_number_of_calls_unless_it_is_given() -> None:
    assert Gcra(10, 1) == Gcra(10, 1, burst=10) != Gcra(10, 1, burst=9)
    assert taken(Gcra(10, 1).meter(), 0) == 10
    assert taken(Gcra(10, 1, burst=30).meter(), 0) == 30


def test_a_call_at_its_very_time_is_not_early_by_the_dust_of_floats() -> None:
    for start in (0.0, 1e6):
        for rate in (Gcra(10, per=1, burst=1), FixedWindow(1, per=0.1)):
            meter = rate.meter()
            assert [meter.take(start + n / 10) for n in range(1000)] == [0] * 1000
            assert meter.take(start + 99.95) == pytest.approx(0.05, abs=1e-6)


def test_dust_does_not_add_up_to_another_rate() -> None:
    meter = Gcra(10, per=1, burst=1).meter()
    early = 0.1 - 0.9e-7
    times = [n * early for n in range(100_000)]
    begun = sum(meter.take(time) == 0 for time in times)
    assert begun <= 10 * times[-1] + 2


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [FixedWindow(3, per=9), Gcra(3, per=9), Gcra(3, per=9, burst=1)], ids=repr)
def test_when_the_clock_goes_back_no_time_has_passed(rate: Rate) -> None:
    meter = rate.meter()
    assert taken(meter, 1e6) > 0
    for look in (meter.wait, meter.take):
        wait = look(7.0)
        assert 3 <= wait <= 9.001
    assert meter.take(7 + wait) == 0


@given(times=st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=50))
@settings(deadline=None)
def test_no_clock_makes_anybody_wait_longer_than_a_period(times: list[float]) -> None:
    for rate in (FixedWindow(2, per=1), Gcra(2, per=1)):
        meter = rate.meter()
        for now in times:
            assert 0 <= meter.wait(now) <= 1.001
            assert 0 <= meter.take(now) <= 1.001


# --- against a model -------------------------------------------------------------------------------------------------

ARRIVALS = st.lists(st.integers(0, 24), min_size=1, max_size=120)
"""How many sixteenths of a second after the one before."""


@given(arrivals=ARRIVALS, num=st.integers(1, 5), burst=st.integers(1, 6), per=st.sampled_from([0.25, 1.0, 3.0]))
@settings(deadline=None)
def test_in_any_span_no_more_calls_begin_than_the_burst_and_the_rate_allow(
    arrivals: list[int], num: int, burst: int, per: float
) -> None:
    meter, now, begun = Gcra(num, per, burst=burst).meter(), 0.0, list[float]()
    for sixteenths in arrivals:
        now += sixteenths / 16
        wait = meter.take(now)
        if wait == 0:
            begun.append(now)
            for n, first in enumerate(begun):
                assert len(begun) - n <= burst + (now - first) * num / per + 1e-6
        else:
            # and it was really too much: some span would have had one call more than is allowed
            spans = [len(begun) - n + 1 - burst - (now - first) * num / per for n, first in enumerate(begun)]
            assert max(spans) == pytest.approx(wait * num / per, abs=1e-4)


@given(arrivals=ARRIVALS, num=st.integers(1, 5), per=st.sampled_from([0.25, 1.0, 3.0]))
@settings(deadline=None)
def test_in_a_window_no_more_calls_begin_than_it_allows_and_no_fewer(arrivals: list[int], num: int, per: float) -> None:
    meter, now, windows = FixedWindow(num, per).meter(), 0.0, list[list[float]]()
    for sixteenths in arrivals:
        now += sixteenths / 16
        if not windows or now >= windows[-1][0] + per:
            windows.append([now])
            assert meter.take(now) == 0
        elif len(windows[-1]) < num:
            windows[-1].append(now)
            assert meter.take(now) == 0
        else:
            assert meter.take(now) == windows[-1][0] + per - now


@given(
    arrivals=ARRIVALS,
    rate=st.one_of(
        st.builds(FixedWindow, st.integers(1, 5), st.floats(0.01, 10)),
        st.builds(Gcra, st.integers(1, 5), st.floats(0.01, 10)),
    ),
)
@settings(deadline=None)
def test_after_the_wait_that_was_named_a_call_may_begin_and_not_before(arrivals: list[int], rate: Rate) -> None:
    meter, now = rate.meter(), 0.0
    for sixteenths in arrivals:
        now += sixteenths / 16
        wait = meter.take(now)
        if wait:
            # a wait of a few roundings of a float is over at once
            assert wait < 1e-4 or meter.wait(now + wait * 0.9) > 0
            now += wait
            assert meter.take(now) == 0


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num", [0, -1])
def test_a_number_of_calls_below_1_is_refused(kind: Callable[..., Rate], num: int) -> None:
    with pytest.raises(ValueError, match=rf"^num is {num}, where 1 or more is expected$"):
        kind(num, 1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num", [0.5, math.nan, "3", None])
def test_a_number_of_calls_that_is_not_whole_is_refused(kind: Callable[..., Rate], num: Any) -> None:
    with pytest.raises(TypeError, match=rf"^num is {num!r}, where a whole number is expected$"):
        kind(num, 1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("per", [0, -1, math.nan, math.inf])
def test_a_time_that_is_no_number_of_seconds_above_0_is_refused(kind: Callable[..., Rate], per: float) -> None:
    with pytest.raises(ValueError, match=rf"^per is {per}, where a number of seconds above 0 is expected$"):
        kind(1, per)


def test_a_burst_is_1_or_more() -> None:
    with pytest.raises(ValueError, match=r"^burst is 0, where 1 or more is expected$"):
        Gcra(1, 1, burst=0)
    with pytest.raises(TypeError, match=r"^burst is 1.5, where a whole number is expected$"):
        Gcra(1, 1, burst=1.5)  # type: ignore[arg-type]  # what is tested


def test_rates_are_values_and_each_meter_counts_for_itself() -> None:
    assert FixedWindow(3, 1) == FixedWindow(3, 1.0) != FixedWindow(4, 1)
    assert hash(Gcra(3, 1)) == hash(Gcra(3, 1))
    assert repr(FixedWindow(3, per=0.5)) == "FixedWindow(num=3, per=0.5)"
    assert repr(Gcra(3, per=0.5)) == "Gcra(num=3, per=0.5, burst=3)"
    for rate in (FixedWindow(3, 1), Gcra(3, 1)):
        one, other = rate.meter(), rate.meter()
        assert taken(one, 0) == 3
        assert taken(other, 0) == 3
