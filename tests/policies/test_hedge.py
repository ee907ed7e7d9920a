"""What is learnt about how long calls take, and the delay that follows from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.policies.hedge import LONGEST, SHORTEST, Percentile, RotatingHistogram

TOWERS = [1, 1, 1, 1, 1, 1, 1, 1, 10, 10]
"""The latencies of Tower's own tests, in milliseconds."""


def histogram_of(*seconds: float, window: float = 60.0) -> RotatingHistogram:
    """One that reads ``seconds`` at the time ``window``."""
    histogram = RotatingHistogram(window)
    for each in seconds:
        histogram.record(each, now=0)
    return histogram


# --- the percentile ------------------------------------------------------------------------------------------------


def test_h1_towers_latencies_give_a_delay_of_ten_milliseconds_at_the_90th_percentile() -> None:
    histogram = histogram_of(*(each / 1000 for each in TOWERS))
    assert Percentile(0.9, min_points=10).delay(histogram, now=60) == 0.010
    assert Percentile(0.8, min_points=10).delay(histogram, now=60) == pytest.approx(0.001, rel=1 / 64)


def test_h2_below_min_points_there_is_no_delay() -> None:
    histogram = histogram_of(*[1.0] * 9)
    assert Percentile(0.9, min_points=10).delay(histogram, now=60) == math.inf
    assert Percentile(0.9, min_points=9).delay(histogram, now=60) == 1.0


def test_what_was_recorded_in_this_period_counts_only_in_the_next() -> None:
    histogram = histogram_of(*[1.0] * 20)
    assert Percentile().delay(histogram, now=59.999) == math.inf
    assert Percentile().delay(histogram, now=60) == 1.0


def test_the_delay_does_not_change_within_a_period() -> None:
    histogram = histogram_of(*[1.0] * 20)
    percentile = Percentile()
    assert percentile.delay(histogram, now=60) == 1.0
    for _ in range(100):
        histogram.record(5.0, now=61)
    assert percentile.delay(histogram, now=119) == 1.0
    assert percentile.delay(histogram, now=120) == 5.0


def test_the_delay_is_never_below_the_least_that_is_asked_for() -> None:
    histogram = histogram_of(*[0.0001] * 20)
    assert Percentile().delay(histogram, now=60) == 0.001
    assert Percentile(at_least=0.25).delay(histogram, now=60) == 0.25
    assert Percentile(at_least=0).delay(histogram, now=60) == 0.0001


@pytest.mark.parametrize(
    ("share", "rank"), [(0.05, 5), (0.07, 7), (0.29, 29), (0.5, 50), (0.95, 95), (0.951, 96), (0.99, 99), (1, 100)]
)
def test_the_percentile_is_the_least_value_that_so_many_calls_met(share: float, rank: int) -> None:
    # each in a bucket of its own, and in an order that is not theirs
    values = [1.1**n for n in range(1, 101)]
    histogram = histogram_of(*values[::2], *values[1::2])
    found = histogram.percentile(share, now=60)
    assert values[rank - 1] <= found <= values[rank - 1] * (1 + 1 / 64)


def test_different_shares_of_one_histogram_are_kept_apart() -> None:
    histogram = histogram_of(1.0, 2.0)
    assert histogram.percentile(0.5, now=60) == pytest.approx(1.0, rel=1 / 64)
    assert histogram.percentile(1, now=60) == 2.0
    assert histogram.percentile(0.5, now=60) == pytest.approx(1.0, rel=1 / 64)


def test_an_empty_histogram_has_no_points_and_a_percentile_of_0() -> None:
    histogram = RotatingHistogram(60)
    assert histogram.count(now=0) == 0
    assert histogram.percentile(0.95, now=0) == 0


@settings(deadline=None)
@given(
    st.lists(st.floats(SHORTEST, LONGEST), min_size=1, max_size=60),
    st.floats(0, 1, exclude_min=True),
)
def test_what_is_read_is_at_most_one_part_in_64_above_what_was_recorded(values: list[float], share: float) -> None:
    exact = sorted(values)[max(math.ceil(share * len(values) - 1e-9), 1) - 1]
    found = histogram_of(*values).percentile(share, now=60)
    assert exact <= found <= min(exact * (1 + 1 / 64), max(values))


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_h9_the_rotating_histogram_forgets_after_2_periods() -> None:
    histogram = RotatingHistogram(window=10)
    histogram.record(0.5, now=100)  # the first period begins with the first call
    assert [histogram.count(now) for now in (100, 109.9, 110, 119.9)] == [0, 0, 1, 1]
    assert histogram.count(now=120) == 0


def test_h9_two_idle_periods_clear_what_was_written_and_what_is_read() -> None:
    for idle, left in ((19.9, 1), (20, 0), (25, 0), (1e9, 0)):
        histogram = RotatingHistogram(window=10)
        histogram.record(0.5, now=0)
        assert histogram.count(now=idle) == left
        assert histogram.count(now=idle + 20) == 0


def test_h9_a_period_without_a_call_leaves_nothing_to_read() -> None:
    histogram = RotatingHistogram(window=10)
    histogram.record(0.5, now=0)
    histogram.record(0.5, now=10)
    histogram.record(0.5, now=10)
    assert [histogram.count(now) for now in (10, 20, 30, 40)] == [1, 2, 0, 0]


def test_periods_keep_their_rhythm_however_late_somebody_asks() -> None:
    histogram = RotatingHistogram(window=10)
    histogram.record(0.5, now=0)
    histogram.record(0.5, now=14)  # in the period from 10 to 20
    assert histogram.count(now=19.9) == 1
    assert histogram.count(now=20) == 1
    histogram.record(0.5, now=57)  # after two idle periods, in that from 50 to 60
    assert histogram.count(now=60) == 1
    assert histogram.count(now=70) == 0


def test_a_clock_that_goes_back_or_leaps_harms_nothing() -> None:
    histogram = RotatingHistogram(window=10)
    histogram.record(0.5, now=100)
    histogram.record(0.5, now=50)
    assert histogram.count(now=0) == 0
    assert histogram.count(now=10) == 2
    assert histogram.count(now=1e300) == 0


@pytest.mark.parametrize("seconds", [0, -1, math.nan, SHORTEST, 1e-300])
def test_what_is_too_short_to_be_told_apart_counts_as_the_shortest(seconds: float) -> None:
    assert histogram_of(seconds).percentile(1, now=60) == SHORTEST


@pytest.mark.parametrize("seconds", [math.inf, LONGEST, 1e300])
def test_what_is_too_long_to_be_told_apart_counts_as_the_longest(seconds: float) -> None:
    assert histogram_of(seconds).percentile(1, now=60) == LONGEST


def test_the_memory_is_bounded_whatever_is_recorded() -> None:
    histogram = RotatingHistogram(window=60)
    seconds = SHORTEST / 2
    while seconds < 2 * LONGEST:
        histogram.record(seconds, now=0)
        seconds *= 1.001
    assert len(histogram._write.buckets) == 2369
    assert histogram._write.total > 20_000


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, -0.1, 1.001, 95, math.nan, math.inf])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share is {share}, where a number above 0 and up to 1 is expected"):
        Percentile(share)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_points is 0, where 1 or more is expected"):
        Percentile(min_points=0)
    for window in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"window is {window}, where a finite number above 0 is expected"):
            Percentile(window=window)
    for at_least in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"at_least is {at_least}, where a finite number of 0 or more is expected"):
            Percentile(at_least=at_least)


def test_h9_after_the_clock_went_back_it_goes_on_forgetting() -> None:
    histogram = RotatingHistogram(window=10)
    for _ in range(30):
        histogram.record(0.5, now=500_000)
    assert histogram.count(500_010) == 30
    assert histogram.count(20) == 30
    assert histogram.count(29) == 30
    assert histogram.count(50) == 0


def test_percentiles_are_values() -> None:
    assert Percentile(0.9) == Percentile(0.9, window=30)
    assert repr(Percentile(0.9)) == "Percentile(share=0.9)"
