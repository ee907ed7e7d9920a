"""Backoff: the series, number by number, and what holds for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from random import Random
from statistics import fmean, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.policies import Backoff, Jitter

GOLDEN: list[tuple[Backoff, list[float]]] = [
    (Backoff.constant(0.5, jitter="none"), [0.5, 0.5, 0.5, 0.5]),
    (Backoff.constant(0, jitter="none"), [0, 0, 0]),
    (Backoff.linear(initial=1, step=2, jitter="none"), [1, 3, 5, 7, 9]),
    (Backoff.linear(initial=1, step=2, jitter="none").cap(6), [1, 3, 5, 6, 6]),
    (Backoff.exponential(jitter="none"), [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]),
    (Backoff.exponential(initial=0.1, cap=0.5, first=None, jitter="none"), [0.1, 0.2, 0.4, 0.5, 0.5]),
    (Backoff.exponential(initial=1, factor=3, cap=math.inf, first=0, jitter="none"), [0, 1, 3, 9, 27]),
    (Backoff.exponential(initial=8, factor=0.5, first=None, jitter="none"), [8, 4, 2, 1, 0.5]),
    (Backoff.exponential(first=5, cap=2, jitter="none"), [2, 0.25, 0.5, 1, 2]),
    (Backoff.fibonacci(initial=10, jitter="none"), [10, 10, 20, 30, 50, 80]),
    (Backoff.fibonacci(initial=10, jitter="none").cap(45), [10, 10, 20, 30, 45, 45]),
]
"""Every law of growth with the numbers it must give. A change here is a change for users."""

lengths = st.floats(0, 1e9)


@st.composite
def backoffs(draw: st.DrawFn) -> tuple[Backoff, float]:
    """Any backoff, with the cap that holds for it."""
    jitter: Jitter = draw(st.sampled_from(["full", "none"]))
    backoff = draw(
        st.one_of(
            st.builds(Backoff.constant, lengths, jitter=st.just(jitter)),
            st.builds(Backoff.linear, initial=lengths, step=lengths, jitter=st.just(jitter)),
            st.builds(Backoff.fibonacci, initial=lengths, jitter=st.just(jitter)),
            st.builds(
                Backoff.exponential,
                initial=lengths,
                factor=st.floats(0.001, 1e6),
                cap=st.just(math.inf),
                first=st.none() | lengths,
                jitter=st.just(jitter),
            ),
        )
    )
    cap = draw(lengths | st.just(math.inf))
    return backoff.cap(cap), cap


@pytest.mark.smoke
@pytest.mark.parametrize(("backoff", "expected"), GOLDEN, ids=lambda value: repr(value))
def test_a_series_without_jitter_is_exactly_its_law(backoff: Backoff, expected: list[float]) -> None:
    assert list(islice(backoff.delays(Random(0)), len(expected))) == expected


def test_the_default_for_connecting_is_one_early_retry_then_a_quarter_second_up_to_thirty() -> None:
    assert repr(Backoff.exponential()) == (
        "Backoff.exponential(initial=0.25, factor=2.0, first=0.1, cap=30.0, jitter='full')"
    )


@given(case=backoffs(), seed=st.integers(), n=st.integers(0, 2000))
def test_every_delay_is_finite_never_negative_and_never_above_the_cap(
    case: tuple[Backoff, float], seed: int, n: int
) -> None:
    backoff, cap = case
    for delay in islice(backoff.delays(Random(seed), skip=n), 50):
        assert 0 <= delay <= cap
        assert math.isfinite(delay)


def test_a_series_without_a_cap_stops_growing_where_numbers_end() -> None:
    steep = Backoff.exponential(initial=1, factor=1e300, cap=math.inf, first=None, jitter="none")
    assert list(islice(steep.delays(Random(0)), 4))[2:] == [pytest.approx(1.797e308, rel=1e-3)] * 2


@given(case=backoffs(), seed=st.integers(), n=st.integers(0, 30))
def test_delays_can_be_drawn_again_and_by_many_at_once(case: tuple[Backoff, float], seed: int, n: int) -> None:
    backoff, _ = case
    first, second = backoff.delays(Random(seed)), backoff.delays(Random(seed))
    assert list(islice(first, n)) == list(islice(second, n))


def test_two_clients_draw_different_delays() -> None:
    backoff = Backoff.exponential()
    assert list(islice(backoff.delays(Random(1)), 5)) != list(islice(backoff.delays(Random(2)), 5))


@pytest.mark.parametrize("n", [3, 50], ids=["growing", "at the cap"])
def test_full_jitter_spreads_evenly_from_zero_also_at_the_cap(n: int) -> None:
    backoff, random = Backoff.exponential(initial=1, cap=8, first=None), Random(7)
    drawn = [next(backoff.delays(random, skip=n)) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(4, rel=0.02)
    assert min(drawn) < 0.02 * 8
    assert max(drawn) > 0.98 * 8
    for n_tenths, cut in enumerate(quantiles(drawn, n=10), start=1):
        assert cut == pytest.approx(0.8 * n_tenths, abs=0.1)


def test_take_ends_the_series() -> None:
    backoff = Backoff.fibonacci(initial=1, jitter="none").take(3)
    assert list(backoff.delays(Random(0))) == [1, 1, 2]
    assert list(backoff.take(5).delays(Random(0))) == [1, 1, 2]
    assert list(backoff.take(0).delays(Random(0))) == []


def test_skip_leaves_out_the_beginning_and_draws_nothing_for_it() -> None:
    backoff = Backoff.fibonacci(initial=1)
    drawn = next(backoff.delays(Random(3), skip=4))
    assert drawn == 5 * Random(3).random()


def test_hold_goes_on_with_the_last_value_of_a_series_that_ended() -> None:
    backoff = Backoff.linear(initial=1, step=1, jitter="none").take(3)
    assert list(islice(backoff.delays(Random(0), hold=True), 5)) == [1, 2, 3, 3, 3]
    assert list(islice(backoff.delays(Random(0), skip=100, hold=True), 2)) == [3, 3]
    assert list(backoff.delays(Random(0), skip=100)) == []
    assert list(backoff.take(0).delays(Random(0), hold=True)) == []


def test_a_cap_only_ever_lowers() -> None:
    assert Backoff.constant(9).cap(3).cap(5) == Backoff.constant(9).cap(3)
    assert Backoff.exponential(cap=3) == Backoff.exponential(cap=math.inf).cap(3)
    assert list(Backoff.constant(9).cap(0).take(1).delays(Random(0))) == [0]


@given(case=backoffs(), n=st.none() | st.integers(0, 5))
def test_the_repr_makes_an_equal_value(case: tuple[Backoff, float], n: int | None) -> None:
    backoff = case[0] if n is None else case[0].take(n)
    made = eval(repr(backoff), {"Backoff": Backoff, "math": math})
    assert made == backoff
    assert hash(made) == hash(backoff)


def test_what_differs_is_not_equal() -> None:
    assert Backoff.constant(1) != Backoff.constant(2)
    assert Backoff.constant(1) != Backoff.constant(1, jitter="none")
    assert Backoff.constant(1) != Backoff.constant(1).take(3)
    assert Backoff.constant(1) != Backoff.fibonacci(initial=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Backoff.constant(-1), "delay is -1, where .* 0 or more"),
        (lambda: Backoff.constant(math.nan), "delay is nan, where .* 0 or more"),
        (lambda: Backoff.constant(math.inf), "delay is inf, where a finite number"),
        (lambda: Backoff.constant(10**400), "where a finite number"),
        (lambda: Backoff.linear(initial=-0.5, step=1), "initial is -0.5, where .* 0 or more"),
        (lambda: Backoff.linear(initial=1, step=-2), "step is -2, where .* 0 or more"),
        (lambda: Backoff.fibonacci(initial=math.nan), "initial is nan, where .* 0 or more"),
        (lambda: Backoff.exponential(initial=-1), "initial is -1, where .* 0 or more"),
        (lambda: Backoff.exponential(factor=0), "factor is 0, where .* above 0"),
        (lambda: Backoff.exponential(factor=-2), "factor is -2, where .* above 0"),
        (lambda: Backoff.exponential(factor=math.nan), "factor is nan, where .* above 0"),
        (lambda: Backoff.exponential(factor=math.inf), "factor is inf, where a finite number"),
        (lambda: Backoff.exponential(first=-0.1), "first is -0.1, where .* 0 or more"),
        (lambda: Backoff.exponential(cap=-30), "cap is -30, where 0 or more"),
        (lambda: Backoff.constant(1).cap(math.nan), "cap is nan, where 0 or more"),
        (lambda: Backoff.constant(1).take(-1), "take is -1, where 0 or more"),
        (lambda: Backoff.constant(1, jitter="half"), "jitter is 'half', where 'full' or 'none'"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_with_both_values(make: Callable[[], Backoff], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
