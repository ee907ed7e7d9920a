"""Backoff: the series, number by number, and what holds for all of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import islice, pairwise, permutations
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.policies import Backoff, Jitter

NAMES = {"Backoff": Backoff, "Jitter": Jitter, "math": math}
"""What a repr needs to be evaluated."""

GOLDEN: list[tuple[Backoff, list[float]]] = [
    (Backoff.constant(0.5, jitter="none"), [0.5, 0.5, 0.5, 0.5]),
    (Backoff.constant(0, jitter="none"), [0, 0, 0]),
    (Backoff.of(0.1, 0.5, 2, hold=True, jitter="none"), [0.1, 0.5, 2, 2, 2]),
    (Backoff.linear(initial=1, step=2, jitter="none"), [1, 3, 5, 7, 9]),
    (Backoff.linear(initial=1, step=2, jitter="none").cap(6), [1, 3, 5, 6, 6]),
    (Backoff.linear(initial=0.1, step=0.1, jitter="none"), [0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6]),
    (Backoff.polynomial(initial=1, jitter="none"), [1, 4, 9, 16, 25]),
    (Backoff.polynomial(initial=0.5, degree=3, jitter="none").cap(20), [0.5, 4, 13.5, 20, 20]),
    (Backoff.polynomial(initial=3, degree=0, jitter="none"), [3, 3, 3]),
    (Backoff.polynomial(initial=1, degree=0.5, jitter="none"), [1, math.sqrt(2), math.sqrt(3), 2]),
    (Backoff.exponential(jitter="none"), [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]),
    (Backoff.exponential(initial=0.1, cap=0.5, first=None, jitter="none"), [0.1, 0.2, 0.4, 0.5, 0.5]),
    (Backoff.exponential(initial=1, factor=3, cap=math.inf, first=0, jitter="none"), [0, 1, 3, 9, 27]),
    (Backoff.exponential(initial=8, factor=0.5, first=None, jitter="none"), [8, 4, 2, 1, 0.5]),
    (Backoff.exponential(first=5, cap=2, jitter="none"), [2, 0.25, 0.5, 1, 2]),
    (Backoff.fibonacci(initial=10, jitter="none"), [10, 10, 20, 30, 50, 80]),
    (Backoff.fibonacci(initial=10, jitter="none").cap(45), [10, 10, 20, 30, 45, 45]),
    (Backoff.fibonacci(initial=1, second=2, jitter="none"), [1, 2, 3, 5, 8]),
    (Backoff.constant(0).take(1) + Backoff.linear(initial=1, step=1, jitter="none"), [0, 1, 2, 3]),
]
"""Every law of growth with the numbers it must give. A change here is a change for users."""

VECTORS = Path(__file__).parents[1] / "vectors" / "backoff"

CASES: list[Any] = [  # Any: what JSON holds
    pytest.param(case, id=f"{path.stem}: {case['theirs']}")
    for path in sorted(VECTORS.glob("*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
]

JITTERS = [
    Jitter.full(),
    Jitter.equal(),
    Jitter.proportional(0.2),
    Jitter.proportional(1),
    Jitter.additive(1),
    Jitter.additive(100),
    Jitter(low=1, high=1.99),
    Jitter(low=0.5, high=1.5, extra=0.5),
]
"""Each kind, and one that adds more than the cap of the tests."""


class Lowest(Random):
    """Draws the least there is."""

    def random(self) -> float:
        return 0.0


class Highest(Random):
    """Draws the most there is."""

    def random(self) -> float:
        return 1 - 2**-53


class Refusing(Random):
    """Is not to be drawn from."""

    def random(self) -> float:
        raise AssertionError("drawn from")


def some(backoff: Backoff, n: int, random: Random | None = None, *, skip: int = 0, hold: bool = False) -> list[float]:
    return list(islice(backoff.delays(random or Random(0), skip=skip, hold=hold), n))


# --- what any composition is made of -----------------------------------------------------------------------


lengths = st.floats(0, 1e9)
extremes = lengths | st.sampled_from([0.0, 5e-324, 1e-300, 1e300, 1.7e308])
randoms = st.builds(Random, st.integers()) | st.builds(Lowest) | st.builds(Highest)


def any_jitter(a: float, b: float, extra: float) -> Jitter:
    return Jitter(low=min(a, b), high=max(a, b), extra=extra)


def any_list(delays: list[float], hold: bool) -> Backoff:
    return Backoff.of(*delays, hold=hold)


def any_random(a: float, b: float) -> Backoff:
    return Backoff.random(min(a, b), max(a, b))


jitters = (
    st.sampled_from(["full", "equal", "none"])
    | st.builds(Jitter.proportional, st.floats(0, 1))
    | st.builds(Jitter.additive, extremes)
    | st.builds(any_jitter, st.floats(0, 100), st.floats(0, 100, exclude_min=True), extremes)
)


@st.composite
def series(draw: st.DrawFn) -> Backoff:
    """Any backoff that is not put together, without a cap."""
    some = draw(st.sampled_from([lengths, extremes]))
    backoff: Backoff = draw(
        st.one_of(
            st.builds(Backoff.constant, some),
            st.builds(any_list, st.lists(some, min_size=1, max_size=4), st.booleans()),
            st.builds(Backoff.linear, initial=some, step=some),
            st.builds(Backoff.polynomial, initial=some, degree=st.floats(0, 400)),
            st.builds(
                Backoff.exponential,
                initial=some,
                factor=st.floats(0.001, 1e6) | st.sampled_from([1e-300, 1e300]),
                cap=st.just(math.inf),
                first=st.none() | some,
            ),
            st.builds(Backoff.fibonacci, initial=some, second=st.none() | some),
            st.builds(any_random, some, some),
            st.builds(Backoff.decorrelated, initial=some, cap=st.just(math.inf)),
            st.builds(Backoff.smooth, initial=some, cap=st.just(math.inf)),
        )
    )
    jitter: Any = draw(st.none() | jitters)
    return backoff if jitter is None else backoff.jitter(jitter)


def with_end(backoff: Backoff, n: int) -> Backoff:
    return backoff if backoff._ends else backoff.take(n)


@st.composite
def backoffs(draw: st.DrawFn, depth: int = 2) -> tuple[Backoff, float]:
    """Any backoff, with the cap that holds for it."""
    backoff, cap = draw(series()), math.inf
    for _ in range(draw(st.integers(0, 3)) if depth else 0):
        match draw(st.sampled_from(["cap", "jitter", "take", "until", "+"])):
            case "cap":
                ours = draw(extremes)
                backoff, cap = backoff.cap(ours), min(cap, ours)
            case "jitter":
                backoff = backoff.jitter(draw(jitters))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            case "take":
                backoff = backoff.take(draw(st.integers(0, 10)))
            case "until":
                backoff = backoff.until(draw(extremes))
            case _:
                other, cap_of_other = draw(backoffs(depth - 1))
                backoff, cap = with_end(backoff, draw(st.integers(0, 3))) + other, max(cap, cap_of_other)
    return backoff, cap


# --- golden series -----------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("backoff", "expected"), GOLDEN, ids=lambda value: repr(value))
def test_b2_a_series_without_jitter_is_exactly_its_law_and_draws_nothing(
    backoff: Backoff, expected: list[float]
) -> None:
    assert some(backoff.jitter("none"), len(expected), Refusing()) == expected


@pytest.mark.parametrize("case", CASES)
def test_b6_the_series_of_other_projects_can_be_had(case: dict[str, Any]) -> None:
    backoff: Backoff = eval(case["ours"], NAMES)
    if "delays" in case:
        expected: list[float] = case["delays"]
        random = Random(case["seed"]) if "seed" in case else Refusing()
        if expected != [0] * len(expected):  # else it may be jittered, and is 0 all the same
            assert some(backoff, len(expected), random) == pytest.approx(expected, rel=1e-12, abs=1e-300)
        else:
            assert some(backoff, len(expected)) == expected
        if "ends" in case:
            assert list(backoff.delays(Random(0))) == expected
    elif "between" in case:
        bounds: list[tuple[float, float]] = case["between"]
        assert some(backoff, len(bounds), Lowest()) == pytest.approx([low for low, _ in bounds])
        assert some(backoff, len(bounds), Highest()) == pytest.approx([high for _, high in bounds])
        for seed in range(100):
            for delay, (low, high) in zip(some(backoff, len(bounds), Random(seed)), bounds, strict=True):
                assert low * (1 - 1e-12) <= delay <= high * (1 + 1e-12)
    else:
        average, theirs = (fmean, case["means"]) if "means" in case else (median, case["medians"])
        random = Random(8)
        walks = [some(backoff, len(theirs), random) for _ in range(15_000)]
        ours = [average(column) for column in zip(*walks, strict=True)]
        assert ours == pytest.approx(theirs, rel=case["within"])


def test_b6_the_vectors_are_all_there() -> None:
    assert sorted(path.stem for path in VECTORS.glob("*.json")) == [
        "aws",
        "goretry",
        "grpc-a6",
        "litl-backoff",
        "polly",
        "rust-retry",
        "spring-retry",
        "stamina",
        "tenacity",
        "tokio-retry",
        "tower",
        "urllib3",
    ]


def test_b6_the_named_series_are_exact() -> None:
    assert some(Backoff.fibonacci(initial=10, jitter="none"), 6) == [10, 10, 20, 30, 50, 80]
    thousand = Backoff.exponential(initial=1000, factor=2.0, cap=math.inf, first=None, jitter="none")
    assert some(thousand, 6) == [1000, 2000, 4000, 8000, 16000, 32000]
    assert some(Backoff.polynomial(initial=1, degree=2, jitter="none"), 3) == [1, 4, 9]


def test_the_default_for_connecting_is_one_early_retry_then_a_quarter_second_up_to_thirty() -> None:
    assert repr(Backoff.exponential()) == (
        "Backoff.exponential(initial=0.25, factor=2.0, first=0.1, cap=30.0, jitter='full')"
    )


# --- bounds ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(case=backoffs(), random=randoms, n=st.integers(0, 40) | st.integers(0, 2000))
def test_b1_every_delay_is_finite_never_negative_and_never_above_the_cap(
    case: tuple[Backoff, float], random: Random, n: int
) -> None:
    backoff, cap = case
    for delay in some(backoff, 50, random, skip=n, hold=True):
        assert 0 <= delay <= cap
        assert math.isfinite(delay)


LONG = [
    Backoff.constant(1e308),
    Backoff.of(1, 1e308, hold=True),
    Backoff.linear(initial=1e308, step=1e308),
    Backoff.polynomial(initial=1, degree=300),
    Backoff.polynomial(initial=0, degree=300),
    Backoff.exponential(initial=1e-300, factor=1e300, cap=math.inf, first=None),
    Backoff.exponential(initial=0, factor=1e300, cap=math.inf, first=None),
    Backoff.exponential(initial=1, factor=2, cap=math.inf, first=None),
    Backoff.exponential(initial=1, factor=0.5, first=None),
    Backoff.fibonacci(initial=1e-300),
    Backoff.random(1, 1.7e308),
    Backoff.decorrelated(initial=1, cap=math.inf),
    Backoff.smooth(initial=1, cap=math.inf),
]
"""All series, where they get out of hand."""


@pytest.mark.parametrize("backoff", LONG, ids=repr)
@pytest.mark.parametrize(
    "jitter",
    [
        "none",
        "full",
        "equal",
        Jitter.proportional(1),
        Jitter.additive(1.7e308),
        Jitter(low=0, high=100),
        Jitter(low=0, high=0.01),
    ],
)
@pytest.mark.parametrize("random", [Random(1), Lowest(), Highest()], ids=["some", "lowest", "highest"])
def test_b1_all_2000_delays_are_finite_and_below_the_cap(backoff: Backoff, jitter: Any, random: Random) -> None:
    for cap in (math.inf, 30.0):
        delays = some(backoff.jitter(jitter).cap(cap), 2001, random)
        assert len(delays) == 2001
        assert all(0 <= delay <= cap for delay in delays)
        assert all(map(math.isfinite, delays))


@pytest.mark.parametrize("backoff", LONG, ids=repr)
def test_b1_a_series_goes_on_as_long_as_anyone_asks(backoff: Backoff) -> None:
    (delay,) = some(backoff.cap(30), 1, skip=50_000)
    assert 0 <= delay <= 30


def test_a_series_without_a_cap_stops_growing_where_numbers_end() -> None:
    steep = Backoff.exponential(initial=1, factor=1e300, cap=math.inf, first=None, jitter="none")
    assert some(steep, 4)[2:] == [pytest.approx(1.797e308, rel=1e-3)] * 2
    assert some(Backoff.polynomial(initial=1, degree=1e308, jitter="none"), 3)[1:] == some(steep, 4)[2:]
    assert some(Backoff.smooth(initial=1, cap=math.inf), 1, Random(0), skip=1100)[0] > 1e306


def test_nothing_times_too_much_is_nothing() -> None:
    assert set(some(Backoff.polynomial(initial=0, degree=400, jitter="none"), 2000)) == {0}
    assert set(some(Backoff.exponential(initial=0, factor=1e300, first=None, jitter="none"), 2000)) == {0}
    assert some(Backoff.decorrelated(initial=1e308, cap=math.inf), 3, Lowest()) == [1e308] * 3


# --- jitter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 50], ids=["growing", "at the cap"])
def test_b3_full_jitter_spreads_evenly_from_zero_also_at_the_cap(n: int) -> None:
    backoff, random = Backoff.exponential(initial=1, cap=8, first=None), Random(7)
    drawn = [next(backoff.delays(random, skip=n)) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(4, rel=0.02)
    assert min(drawn) < 0.02 * 8
    assert max(drawn) > 0.98 * 8
    for n_tenths, cut in enumerate(quantiles(drawn, n=10), start=1):
        assert cut == pytest.approx(0.8 * n_tenths, rel=0.1)


def test_b3_equal_jitter_keeps_half_of_every_wait() -> None:
    backoff = Backoff.exponential(initial=1, cap=8, first=None, jitter="equal")
    random = Random(7)
    for n, value in enumerate([1, 2, 4, 8, 8]):
        drawn = [next(backoff.delays(random, skip=n)) for _ in range(2_000)]
        assert value / 2 <= min(drawn) < value * 0.51
        assert value * 0.99 < max(drawn) <= value
        assert fmean(drawn) == pytest.approx(0.75 * value, rel=0.02)


def test_b3_decorrelated_delays_are_at_least_the_initial_one_and_at_most_three_times_the_last() -> None:
    backoff = Backoff.decorrelated(initial=0.1, cap=5)
    for seed in range(500):
        delays = some(backoff, 40, Random(seed))
        assert 0.1 <= delays[0] <= 0.1 * 3
        for before, delay in pairwise(delays):
            assert 0.1 <= delay <= min(5, 3 * before)


def test_b3_each_walk_of_a_decorrelated_backoff_has_its_own_state() -> None:
    backoff, random = Backoff.decorrelated(initial=1, cap=math.inf), Highest()
    first, second = backoff.delays(random), backoff.delays(random)
    assert [next(first), next(first), next(first), next(second)] == pytest.approx([3, 9, 27, 3])


def test_b3_random_delays_are_even_between_their_bounds() -> None:
    drawn = some(Backoff.random(0.5, 1.5), 20_000, Random(7))
    assert fmean(drawn) == pytest.approx(1, rel=0.02)
    for n_tenths, cut in enumerate(quantiles(drawn, n=10), start=1):
        assert cut == pytest.approx(0.5 + 0.1 * n_tenths, rel=0.05)


@pytest.mark.parametrize(
    ("jitter", "low", "high"),
    [
        ("full", 0, 10),
        ("equal", 5, 10),
        ("none", 10, 10),
        (Jitter.proportional(0.2), 8, 12),
        (Jitter.additive(3), 10, 13),
        (Jitter(low=1, high=2), 10, 20),
        (Jitter(low=0.5, high=1.5, extra=1), 5, 16),
    ],
)
def test_jitter_draws_from_low_times_the_value_to_high_times_the_value_and_extra(
    jitter: Any, low: float, high: float
) -> None:
    backoff = Backoff.constant(10, jitter=jitter)
    assert some(backoff, 1, Lowest()) == pytest.approx([low])
    assert some(backoff, 1, Highest()) == pytest.approx([high])


def test_proportional_jitter_may_exceed_its_value_but_never_the_cap() -> None:
    backoff = Backoff.constant(10, jitter=Jitter.proportional(0.2))
    assert some(backoff.cap(12), 1, Highest()) == pytest.approx([12])
    assert some(backoff.cap(11), 1, Highest()) == pytest.approx([11])
    assert some(backoff.cap(11), 1, Lowest()) == pytest.approx([11 / 1.2 * 0.8])


@pytest.mark.parametrize("jitter", JITTERS, ids=repr)
@pytest.mark.parametrize(
    "series",
    [
        Backoff.constant(1e6),
        Backoff.of(1e6, hold=True),
        Backoff.linear(initial=1, step=1),
        Backoff.polynomial(initial=1),
        Backoff.exponential(initial=1, first=None),
        Backoff.fibonacci(initial=1),
        Backoff.constant(1).take(3) + Backoff.constant(1e6),
    ],
    ids=repr,
)
def test_b5_jitter_still_spreads_at_the_cap_and_ends_there(jitter: Jitter, series: Backoff) -> None:
    random = Random(5)
    backoff = series.jitter(jitter).cap(30)
    drawn = [next(backoff.delays(random, skip=40)) for _ in range(2_000)]
    limit = max(30 - jitter.extra, 0) / jitter.high
    shortest = jitter.low * limit
    assert len(set(drawn)) > 1_900
    assert sum(delay == 30 for delay in drawn) < 20
    assert shortest <= min(drawn) < shortest + 0.01 * (30 - shortest)
    assert 30 - 0.01 * (30 - shortest) < max(drawn) <= 30
    assert fmean(drawn) == pytest.approx((shortest + 30) / 2, rel=0.05)


@pytest.mark.parametrize(
    "backoff",
    [
        Backoff.random(10, 50).cap(30),
        Backoff.random(40, 50).cap(30),
        Backoff.smooth(initial=1, cap=30),
        Backoff.smooth(initial=100, cap=30),
        Backoff.smooth(initial=1, cap=30, jitter="equal"),
        Backoff.decorrelated(initial=1, cap=30),
        Backoff.decorrelated(initial=30, cap=30),
        Backoff.decorrelated(initial=1000, cap=30),
    ],
    ids=repr,
)
def test_b5_series_that_are_random_themselves_still_spread_at_the_cap(backoff: Backoff) -> None:
    random = Random(5)
    drawn = [some(backoff, 41, random)[-1] for _ in range(2_000)]
    at_the_cap = sum(delay == 30 for delay in drawn)
    is_cut_off = backoff == Backoff.decorrelated(initial=1, cap=30)  # AWS's way: one in three, or so
    assert at_the_cap < (800 if is_cut_off else 20)
    assert len(set(drawn)) > 1_980 - at_the_cap
    assert 28 < max(drawn) <= 30
    assert quantiles(drawn, n=10)[0] < 25


def test_b5_at_the_cap_a_smooth_step_is_spread_as_any_step_is() -> None:
    random = Random(5)
    free, held = Backoff.smooth(initial=1, cap=math.inf), Backoff.smooth(initial=1, cap=1000)
    longest = 1.5 / 1.4 * 2**20
    ours = quantiles([some(held, 21, random)[-1] / 1000 for _ in range(5_000)], n=10)
    theirs = quantiles([some(free, 21, random)[-1] / longest for _ in range(5_000)], n=10)
    assert ours == pytest.approx(theirs, abs=0.02)


def test_b8_the_medians_of_the_smooth_series_double() -> None:
    random = Random(8)
    walks = [some(Backoff.smooth(initial=1, cap=math.inf), 6, random) for _ in range(20_000)]
    medians = [median(column) for column in zip(*walks, strict=True)]
    assert medians == pytest.approx([0.90, 1.14, 2, 4, 8, 16], rel=0.05)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(), initial=st.floats(0.001, 1000))
def test_b8_the_smooth_series_is_the_published_formula(seed: int, initial: float) -> None:
    random, expected, before = Random(seed), list[float](), 0.0
    for n in range(100):
        t = n + random.random()
        at = 2**t * math.tanh(math.sqrt(4 * t))
        expected.append(initial * (at - before) / 1.4)
        before = at
    backoff = Backoff.smooth(initial=initial, cap=math.inf)
    for n, (ours, theirs) in enumerate(zip(some(backoff, 100, Random(seed)), expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=initial * 2**n * 1e-12)
    capped = some(backoff.cap(initial * 2**50), 100, Random(seed))
    assert capped[:49] == some(backoff, 49, Random(seed))  # a cap that is not reached changes nothing


@settings(deadline=None, max_examples=50)
@given(jitter=jitters)
def test_a_jitter_shows_how_to_make_it(jitter: Any) -> None:
    ours = Backoff.constant(1, jitter=jitter)
    assert eval(repr(ours), NAMES) == ours
    if isinstance(jitter, Jitter):
        assert eval(repr(jitter), NAMES) == jitter
        assert hash(eval(repr(jitter), NAMES)) == hash(jitter)


@pytest.mark.parametrize(
    ("jitter", "text"),
    [
        (Jitter.full(), "Jitter.full()"),
        (Jitter.equal(), "Jitter.equal()"),
        (Jitter.none(), "Jitter.none()"),
        (Jitter.proportional(0), "Jitter.none()"),
        (Jitter.additive(0), "Jitter.none()"),
        (Jitter.proportional(0.2), "Jitter.proportional(0.2)"),
        (Jitter.proportional(0.3), "Jitter.proportional(0.3)"),
        (Jitter.proportional(1), "Jitter.proportional(1.0)"),
        (Jitter.additive(1), "Jitter.additive(1.0)"),
        (Jitter(low=1, high=2), "Jitter(low=1.0, high=2.0, extra=0.0)"),
        (Jitter(low=1, high=2, extra=3), "Jitter(low=1.0, high=2.0, extra=3.0)"),
    ],
)
def test_a_jitter_is_shown_as_it_is_written(jitter: Jitter, text: str) -> None:
    assert repr(jitter) == text


def test_a_name_stands_for_its_jitter() -> None:
    assert Backoff.constant(1, jitter="full") == Backoff.constant(1, jitter=Jitter.full()) == Backoff.constant(1)
    assert Backoff.constant(1, jitter="equal") == Backoff.constant(1).jitter(Jitter.equal())
    assert Backoff.constant(1, jitter="none") == Backoff.constant(1).jitter("none")
    assert "jitter=Jitter.proportional(0.2)" in repr(Backoff.constant(1, jitter=Jitter.proportional(0.2)))


def test_what_is_random_itself_takes_no_jitter_unless_told_to() -> None:
    for backoff in (Backoff.random(1, 2), Backoff.decorrelated(initial=1), Backoff.smooth(initial=1)):
        assert repr(backoff).endswith("jitter='none')")
        assert some(backoff.jitter("full"), 1, Random(3)) < some(backoff, 1, Random(3))


# --- B4: what is refused -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(initial=st.floats(0.001, 1e6), factor=st.floats(1, 100), over=st.floats(1, 100), n=st.integers(0, 2000))
def test_b4_the_base_begins_at_initial_and_stays_between_it_and_the_cap(
    initial: float, factor: float, over: float, n: int
) -> None:
    cap = initial * over
    base = Backoff.exponential(initial=initial, factor=factor, cap=cap, first=None, jitter="none")
    assert some(base, 1) == [initial]
    assert initial <= some(base, 1, skip=n)[0] <= cap


def test_b4_jitter_is_above_zero_unless_there_is_none() -> None:
    # Tower's has none at base == max either; see b5
    tower = Backoff.exponential(initial=50, cap=50, first=None, jitter=Jitter(low=1, high=1.99))
    assert 50 / 1.99 < some(tower, 1, Random(1))[0] < 50
    assert some(tower.jitter("none"), 1, Random(1)) == [50]
    assert some(Backoff.exponential(initial=0, first=None, jitter=Jitter(low=1, high=1.99)), 1) == [0]


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Backoff.constant(-1), "delay is -1, where .* 0 or more"),
    (lambda: Backoff.constant(math.nan), "delay is nan, where .* 0 or more"),
    (lambda: Backoff.constant(math.inf), "delay is inf, where a finite number"),
    (lambda: Backoff.constant(10**400), "where a finite number"),
    (lambda: Backoff.of(), "of has 0 delays, where 1 or more"),
    (lambda: Backoff.of(1, -2), "delay is -2, where .* 0 or more"),
    (lambda: Backoff.of(1, math.nan, hold=True), "delay is nan, where .* 0 or more"),
    (lambda: Backoff.linear(initial=-0.5, step=1), "initial is -0.5, where .* 0 or more"),
    (lambda: Backoff.linear(initial=1, step=-2), "step is -2, where .* 0 or more"),
    (lambda: Backoff.polynomial(initial=-1), "initial is -1, where .* 0 or more"),
    (lambda: Backoff.polynomial(initial=1, degree=-1), "degree is -1, where .* 0 or more"),
    (lambda: Backoff.polynomial(initial=1, degree=math.nan), "degree is nan, where .* 0 or more"),
    (lambda: Backoff.polynomial(initial=1, degree=math.inf), "degree is inf, where a finite number"),
    (lambda: Backoff.fibonacci(initial=math.nan), "initial is nan, where .* 0 or more"),
    (lambda: Backoff.fibonacci(initial=1, second=-1), "second is -1, where .* 0 or more"),
    (lambda: Backoff.exponential(initial=-1), "initial is -1, where .* 0 or more"),
    (lambda: Backoff.exponential(factor=0), "factor is 0, where .* above 0"),
    (lambda: Backoff.exponential(factor=-2), "factor is -2, where .* above 0"),
    (lambda: Backoff.exponential(factor=math.nan), "factor is nan, where .* above 0"),
    (lambda: Backoff.exponential(factor=math.inf), "factor is inf, where a finite number"),
    (lambda: Backoff.exponential(first=-0.1), "first is -0.1, where .* 0 or more"),
    (lambda: Backoff.exponential(cap=-30), "cap is -30, where 0 or more"),
    (lambda: Backoff.random(-1, 1), "shortest is -1, where .* 0 or more"),
    (lambda: Backoff.random(1, math.inf), "longest is inf, where a finite number"),
    (lambda: Backoff.random(2, 1), r"shortest is 2, where longest \(1\) or less"),  # Tower: min > max
    (lambda: Backoff.decorrelated(initial=-1), "initial is -1, where .* 0 or more"),
    (lambda: Backoff.decorrelated(initial=1, cap=-1), "cap is -1, where 0 or more"),
    (lambda: Backoff.smooth(initial=math.nan), "initial is nan, where .* 0 or more"),
    (lambda: Backoff.smooth(initial=1, cap=math.nan), "cap is nan, where 0 or more"),
    (lambda: Backoff.constant(1).cap(math.nan), "cap is nan, where 0 or more"),
    (lambda: Backoff.constant(1).cap(-1), "cap is -1, where 0 or more"),
    (lambda: (Backoff.of(1) + Backoff.of(1)).cap(-1), "cap is -1, where 0 or more"),
    (lambda: Backoff.constant(1).take(-1), "take is -1, where 0 or more"),
    (lambda: Backoff.constant(1).until(-1), "until is -1, where 0 or more"),
    (lambda: Backoff.constant(1).until(math.nan), "until is nan, where 0 or more"),
    (lambda: Backoff.constant(1).delays(Random(), skip=-1), "skip is -1, where 0 or more"),
    (
        lambda: Backoff.constant(1, jitter="half"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        "jitter is 'half', where 'full', 'equal', 'none' or a Jitter",
    ),
    (
        lambda: Backoff.constant(1).jitter(0.2),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        "jitter is 0.2, where 'full', 'equal', 'none' or a Jitter",
    ),
    (lambda: Jitter.proportional(-0.1), "proportional jitter is -0.1, where 0 to 1"),
    (lambda: Jitter.proportional(20), "proportional jitter is 20, where 0 to 1"),
    (lambda: Jitter.proportional(math.nan), "proportional jitter is nan, where 0 to 1"),
    (lambda: Jitter.additive(-1), "additive jitter is -1, where .* 0 or more"),
    (lambda: Jitter.additive(math.inf), "additive jitter is inf, where a finite number"),
    (lambda: Jitter.additive(math.nan), "additive jitter is nan, where .* 0 or more"),
    (lambda: Jitter(low=2, high=1), r"low is 2, where 0 or more, up to high \(1\)"),
    (lambda: Jitter(low=-1, high=1), "low is -1, where 0 or more"),
    (lambda: Jitter(low=math.nan, high=1), "low is nan, where 0 or more"),
    (lambda: Jitter(low=0, high=0), "high is 0, where a factor above 0, up to 100"),
    (lambda: Jitter(low=1, high=1 + 100), "high is 101, where a factor above 0, up to 100"),  # Tower: jitter > 100
    (lambda: Jitter(low=1, high=math.inf), "high is inf, where a factor above 0, up to 100"),
    (lambda: Jitter(low=1, high=math.nan), "high is nan, where a factor above 0, up to 100"),
    (lambda: Jitter(low=1, high=1, extra=-1), "extra is -1, where .* 0 or more"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_b4_a_parameter_that_makes_no_sense_is_refused_with_both_values(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_b4_a_cap_below_the_first_value_is_no_mistake_since_caps_are_set_from_outside() -> None:
    # Where Tower refuses max < min, and max == 0
    assert some(Backoff.exponential(initial=20, cap=10, first=None, jitter="none"), 2) == [10, 10]
    assert some(Backoff.constant(9).cap(0).take(1), 2) == [0]


def test_only_a_whole_number_of_delays_can_be_taken() -> None:
    with pytest.raises(TypeError, match=r"take is 2\.5, where a whole number is expected"):
        Backoff.constant(1).take(2.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --- sessions ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), seed=st.integers(), n=st.integers(0, 30))
def test_b7_delays_can_be_drawn_again_and_by_many_at_once(case: tuple[Backoff, float], seed: int, n: int) -> None:
    backoff, _ = case
    first, second = backoff.delays(Random(seed)), backoff.delays(Random(seed))
    ours, theirs = list[float](), list[float]()
    for _ in range(n):
        ours += islice(first, 1)
        theirs += islice(second, 1)
    assert ours == theirs == some(backoff, n, Random(seed))


@pytest.mark.parametrize(
    "backoff",
    [Backoff.exponential(), Backoff.random(1, 2), Backoff.decorrelated(initial=1), Backoff.smooth(initial=1)],
    ids=repr,
)
def test_b7_two_clients_draw_different_delays_and_so_do_two_requests_of_one(backoff: Backoff) -> None:
    assert some(backoff, 5, Random(1)) != some(backoff, 5, Random(2))
    random = Random(1)
    assert some(backoff, 5, random) != some(backoff, 5, random)


def test_b7_requests_that_share_a_backoff_do_not_share_a_position() -> None:
    backoff = Backoff.of(1, 2, jitter="none") + Backoff.fibonacci(initial=3, jitter="none")
    random = Random(1)
    walks = [backoff.delays(random) for _ in range(100)]
    assert [[next(walk) for walk in walks] for _ in range(5)] == [[value] * 100 for value in (1, 2, 3, 3, 6)]


def test_making_an_iterator_draws_nothing() -> None:
    for hold in (False, True):
        for skip in (0, 3):
            Backoff.exponential().delays(Refusing(), skip=skip, hold=hold)


# --- take, until, cap, + -----------------------------------------------------------------------------------


def test_take_ends_the_series() -> None:
    backoff = Backoff.fibonacci(initial=1, jitter="none").take(3)
    assert list(backoff.delays(Random(0))) == [1, 1, 2]
    assert list(backoff.take(5).delays(Random(0))) == [1, 1, 2]
    assert list(backoff.take(0).delays(Random(0))) == []


def test_a_list_stops_at_its_end_unless_it_holds_the_last() -> None:
    assert list(Backoff.of(0.1, 0.5, 2, jitter="none").delays(Random(0))) == [0.1, 0.5, 2]
    assert some(Backoff.of(0.1, 0.5, 2, hold=True, jitter="none"), 6) == [0.1, 0.5, 2, 2, 2, 2]
    assert list(Backoff.of(7, jitter="none").delays(Random(0))) == [7]
    assert list(Backoff.of(1, 2, jitter="none").take(5).delays(Random(0))) == [1, 2]
    assert list(Backoff.of(1, 2, hold=True, jitter="none").take(3).delays(Random(0))) == [1, 2, 2]


def test_until_stops_before_the_delays_together_exceed_the_total() -> None:
    backoff = Backoff.exponential(initial=1, first=None, jitter="none")
    assert list(backoff.until(7).delays(Random(0))) == [1, 2, 4]
    assert list(backoff.until(6.9).delays(Random(0))) == [1, 2]
    assert list(backoff.until(0.5).delays(Random(0))) == []
    assert list(backoff.until(0).delays(Random(0))) == []
    assert list(backoff.until(7).until(6).delays(Random(0))) == [1, 2]
    assert some(backoff.until(math.inf), 6) == some(backoff, 6)
    assert backoff.until(math.inf) == backoff


def test_until_counts_what_is_given_out_with_jitter_and_cap() -> None:
    backoff = Backoff.constant(10, jitter="none").until(7)
    assert list(backoff.delays(Random(0))) == []
    assert list(backoff.cap(2).delays(Random(0))) == [2, 2, 2]
    assert len(some(backoff.jitter("full"), 100, Lowest())) == 100


def test_until_ends_for_good() -> None:
    delays = Backoff.of(1, 10, 1, jitter="none").until(5).delays(Random(0))
    assert list(delays) == [1]
    assert list(delays) == []


def test_a_chain_goes_on_with_the_right_one_after_the_end_of_the_left_one() -> None:
    quick, slow = Backoff.constant(0).take(1), Backoff.linear(initial=1, step=1, jitter="none")
    assert some(quick + slow, 4) == [0, 1, 2, 3]
    assert some(quick + slow.take(2) + quick + slow, 6) == [0, 1, 2, 0, 1, 2]
    assert some(Backoff.of(5, 6, jitter="none") + slow, 4) == [5, 6, 1, 2]
    assert some(slow.until(3) + slow, 4) == [1, 2, 1, 2]
    assert some(slow.take(0) + slow, 2) == [1, 2]
    assert list((quick + slow).take(3).delays(Random(0))) == [0, 1, 2]
    assert list((slow.take(2) + slow).take(3).until(3.5).delays(Random(0))) == [1, 2]


def test_the_delay_that_ends_one_part_is_not_drawn_for_the_next() -> None:
    random = Random(3)
    backoff = Backoff.constant(1).take(2) + Backoff.constant(1).take(1)
    assert list(backoff.delays(random)) == some(Backoff.constant(1), 3, Random(3))
    again = Random(3)
    assert [again.random() for _ in range(3)][-1] != random.random() == again.random()


@pytest.mark.parametrize(
    "endless",
    [
        Backoff.constant(1),
        Backoff.of(1, hold=True),
        Backoff.exponential().until(math.inf),
        Backoff.of(1) + Backoff.random(1, 2),
    ],
    ids=repr,
)
def test_nothing_can_be_added_to_what_has_no_end(endless: Backoff) -> None:
    with pytest.raises(ValueError, match=r"has no end, so what is added to it would never come: end it with take or"):
        _ = endless + Backoff.constant(1)
    for ended in (endless.take(3), endless.until(3)):
        assert isinstance(ended + endless, Backoff)


def test_only_a_backoff_can_be_added() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Backoff.of(1) + 1  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue]


def test_a_cap_only_ever_lowers() -> None:
    assert Backoff.constant(9).cap(3).cap(5) == Backoff.constant(9).cap(3)
    assert Backoff.exponential(cap=3) == Backoff.exponential(cap=math.inf).cap(3)
    assert Backoff.decorrelated(initial=1, cap=3) == Backoff.decorrelated(initial=1).cap(3)
    assert Backoff.smooth(initial=1, cap=3) == Backoff.smooth(initial=1).cap(3)
    assert list(Backoff.constant(9).cap(0).take(1).delays(Random(0))) == [0]


def test_cap_and_jitter_hold_for_all_parts_of_a_chain() -> None:
    a, b = Backoff.of(1, 9), Backoff.constant(7, jitter="equal")
    assert (a + b).cap(5) == a.cap(5) + b.cap(5)
    assert (a + b).jitter("none") == a.jitter("none") + b.jitter("none")
    assert some((a + b).jitter("none").cap(5), 4) == [1, 5, 5, 5]


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), cap=extremes, n=st.integers(0, 10), total=extremes, jitter=jitters)
def test_the_order_of_changes_makes_no_difference(
    case: tuple[Backoff, float], cap: float, n: int, total: float, jitter: Any
) -> None:
    changes: list[Callable[[Backoff], Backoff]] = [
        lambda backoff: backoff.cap(cap),
        lambda backoff: backoff.take(n),
        lambda backoff: backoff.until(total),
        lambda backoff: backoff.jitter(jitter),
    ]
    made = set[Backoff]()
    for order in permutations(changes):
        backoff = case[0]
        for change in order:
            backoff = change(backoff)
        made.add(backoff)
    assert len(made) == 1


@settings(deadline=None, max_examples=50)
@given(a=backoffs(1), b=backoffs(1), c=backoffs(1))
def test_chains_are_equal_however_they_are_put_together(
    a: tuple[Backoff, float], b: tuple[Backoff, float], c: tuple[Backoff, float]
) -> None:
    first, second, third = with_end(a[0], 3), with_end(b[0], 3), c[0]
    assert (first + second) + third == first + (second + third)


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), random=randoms, n=st.integers(0, 20), skip=st.integers(0, 3))
def test_take_gives_at_most_that_many(case: tuple[Backoff, float], random: Random, n: int, skip: int) -> None:
    assert len(some(case[0].take(n), 100, random, skip=skip)) <= max(n - skip, 0)


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), random=randoms, total=extremes, skip=st.integers(0, 3))
def test_until_gives_at_most_that_much(case: tuple[Backoff, float], random: Random, total: float, skip: int) -> None:
    spent = 0.0
    for delay in some(case[0].until(total), 200, random, skip=skip):
        spent += delay
    assert spent <= total


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), seed=st.integers(), n=st.integers(0, 20), total=extremes)
def test_a_limit_leaves_the_delays_before_it_as_they_are(
    case: tuple[Backoff, float], seed: int, n: int, total: float
) -> None:
    free = some(case[0], 200, Random(seed))
    limited = some(case[0].take(n).until(total), 200, Random(seed))
    assert limited == free[: len(limited)]
    assert len(limited) in (n, len(free)) or sum(free[: len(limited) + 1]) > total


# --- skip and hold -----------------------------------------------------------------------------------------


def test_skip_leaves_out_the_beginning_and_draws_nothing_for_it() -> None:
    backoff = Backoff.fibonacci(initial=1)
    drawn = next(backoff.delays(Random(3), skip=4))
    assert drawn == 5 * Random(3).random()


@settings(deadline=None, max_examples=50)
@given(case=backoffs(), skip=st.integers(0, 20))
def test_skip_leaves_out_the_beginning_of_any_backoff(case: tuple[Backoff, float], skip: int) -> None:
    class Half(Random):
        def random(self) -> float:
            return 0.5

    backoff = case[0]
    assert some(backoff, 10, Half(), skip=skip) == some(backoff, skip + 10, Half())[skip:]


def test_skipped_delays_count_as_average_ones() -> None:
    backoff = Backoff.constant(2).until(5) + Backoff.constant(7, jitter="none")  # 1 + 1 + 1 + 1 + 1
    assert some(backoff, 2, Highest(), skip=5) == [7, 7]
    (delay,) = some(backoff, 1, Highest(), skip=3)
    assert delay == pytest.approx(2)
    assert some(Backoff.decorrelated(initial=1, cap=math.inf), 1, Highest(), skip=2) == pytest.approx([3 * 3.5])


def test_hold_goes_on_with_the_last_value_of_a_series_that_ended() -> None:
    backoff = Backoff.linear(initial=1, step=1, jitter="none").take(3)
    assert some(backoff, 5, hold=True) == [1, 2, 3, 3, 3]
    assert some(backoff, 2, skip=2, hold=True) == [3, 3]
    assert some(backoff, 2, skip=3, hold=True) == [3, 3]
    assert some(backoff, 2, skip=100, hold=True) == [3, 3]
    assert list(backoff.delays(Random(0), skip=100)) == []
    assert list(backoff.take(0).delays(Random(0), hold=True)) == []


def test_hold_goes_on_with_the_last_value_whatever_ended_it() -> None:
    linear = Backoff.linear(initial=1, step=1, jitter="none")
    assert some(Backoff.of(1, 5, jitter="none"), 4, hold=True) == [1, 5, 5, 5]
    assert some(linear.until(7), 5, hold=True) == [1, 2, 3, 3, 3]
    assert some(linear.until(7), 2, skip=3, hold=True) == [3, 3]
    assert some(linear.until(0.5), 2, hold=True) == [1, 1]
    assert some((linear.take(2) + Backoff.of(9, 8, jitter="none")), 6, hold=True) == [1, 2, 9, 8, 8, 8]
    assert some((linear.take(5) + linear).take(3), 5, hold=True) == [1, 2, 3, 3, 3]
    assert some(linear, 4, hold=True) == [1, 2, 3, 4]


def test_what_is_held_is_drawn_anew() -> None:
    for backoff in (
        Backoff.exponential(initial=1, first=None, cap=8).take(10),
        Backoff.random(1, 8).take(10),
        Backoff.decorrelated(initial=1, cap=8).take(10),
        Backoff.smooth(initial=1, cap=8).take(10),
    ):
        held = some(backoff, 300, Random(1), hold=True)[10:]
        assert len(set(held)) > 150
        assert all(0 <= delay <= 8 for delay in held)


# --- as a value --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(case=backoffs())
def test_the_repr_makes_an_equal_value(case: tuple[Backoff, float]) -> None:
    backoff = case[0]
    made = eval(repr(backoff), NAMES)
    assert made == backoff
    assert hash(made) == hash(backoff)
    assert repr(made) == repr(backoff)


@pytest.mark.parametrize(
    ("backoff", "text"),
    [
        (Backoff.of(1, 2), "Backoff.of(1.0, 2.0, hold=False, jitter='full')"),
        (Backoff.linear(initial=1, step=2).cap(3), "Backoff.linear(initial=1.0, step=2.0, jitter='full').cap(3.0)"),
        (Backoff.polynomial(initial=1), "Backoff.polynomial(initial=1.0, degree=2.0, jitter='full')"),
        (Backoff.fibonacci(initial=1), "Backoff.fibonacci(initial=1.0, jitter='full')"),
        (Backoff.random(1, 2), "Backoff.random(1.0, 2.0, jitter='none')"),
        (Backoff.decorrelated(initial=1), "Backoff.decorrelated(initial=1.0, cap=30.0, jitter='none')"),
        (Backoff.smooth(initial=1, cap=math.inf), "Backoff.smooth(initial=1.0, cap=math.inf, jitter='none')"),
        (
            Backoff.constant(1).take(3).until(2),
            "Backoff.constant(1.0, jitter='full').take(3).until(2.0)",
        ),
        (
            (Backoff.of(1) + Backoff.constant(2)).take(3).cap(4),
            "(Backoff.of(1.0, hold=False, jitter='full').cap(4.0) + Backoff.constant(2.0, jitter='full').cap(4.0))"
            ".take(3)",
        ),
        (
            (Backoff.of(1) + Backoff.of(2)).until(5) + Backoff.of(3),
            "(Backoff.of(1.0, hold=False, jitter='full') + Backoff.of(2.0, hold=False, jitter='full')).until(5.0)"
            " + Backoff.of(3.0, hold=False, jitter='full')",
        ),
    ],
)
def test_the_repr_is_how_it_is_made(backoff: Backoff, text: str) -> None:
    assert repr(backoff) == text


def test_what_differs_is_not_equal() -> None:
    different = [
        Backoff.constant(1),
        Backoff.constant(2),
        Backoff.constant(1, jitter="none"),
        Backoff.constant(1).take(3),
        Backoff.constant(1).until(3),
        Backoff.constant(1).cap(3),
        Backoff.of(1),
        Backoff.of(1, hold=True),
        Backoff.of(1) + Backoff.of(1),
        Backoff.of(1, 1),
        Backoff.fibonacci(initial=1),
        Backoff.random(1, 1),
        Backoff.decorrelated(initial=1),
        Backoff.smooth(initial=1),
    ]
    assert len(set(different)) == len(different)


def test_a_backoff_cannot_be_changed_and_changes_make_new_ones() -> None:
    backoff = Backoff.of(1, 2)
    before = repr(backoff)
    made = {backoff.take(1), backoff.cap(1), backoff.until(1), backoff.jitter("none"), backoff + backoff}
    assert backoff not in made
    assert repr(backoff) == before
    with pytest.raises(FrozenInstanceError):
        backoff._count = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        Jitter.full().low = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


@settings(deadline=None, max_examples=50)
@given(case=backoffs())
def test_a_backoff_survives_copying_and_pickling(case: tuple[Backoff, float]) -> None:
    backoff = case[0]
    assert copy.deepcopy(backoff) == backoff
    assert pickle.loads(pickle.dumps(backoff)) == backoff
    assert some(pickle.loads(pickle.dumps(backoff)), 10, Random(1)) == some(backoff, 10, Random(1))
