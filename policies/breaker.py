"""When to leave alone what fails, and when to try it again: a circuit breaker, as a state machine.

A target that fails is not helped by more calls, and a caller is not helped by waiting for one more failure. A breaker
counts outcomes; at a limit it opens and turns every call away for a while (a *break*); then it lets a few calls through
as *probes*, and they decide whether it closes or opens for longer.

Rule 1: a change of state happens in `Breaker._step` and nowhere else, and only as `TRANSITIONS` allows.
Rule 2: a result counts only in the state that let its call through. Every change begins a new *generation*, and what
comes back from an older one says nothing about now.
Rule 3: whatever was let through gives its place back, however it ended.

The states are those of Polly (with its manual one), the settings for slow calls resilience4j's, the growing break is
that of Finagle's failure accrual. It reads the clock that it is given and draws from the random generator that it is
given. It is for one event loop: nothing here waits, so nothing needs a lock.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from towline.clock import Clock, now
from towline.errors import CircuitOpen
from towline.text import differing
from towline.units import Seconds

from ._window import LastCalls, LastSeconds
from .backoff import Backoff

if TYPE_CHECKING:
    from random import Random

__all__ = [
    "TRANSITIONS",
    "Admitted",
    "Breaker",
    "BreakerChange",
    "BreakerCounts",
    "BreakerInput",
    "BreakerPolicy",
    "BreakerState",
    "step",
]

SHORTEST_WINDOW: Final = 0.001
"""Seconds. In less, no two calls would ever be counted together."""

EARLY: Final = 1e-6
"""Seconds by which a break may be cut short: a timer that was set for ``retry_after`` must not come too soon by the
rounding of a float, or by the nanosecond that asyncio allows itself."""

DEFAULT_BREAK: Final = Backoff.exponential(initial=5.0, cap=300.0, first=None, jitter="equal")
"""Finagle's. Half of each is jitter, so that clients which opened together do not all probe together."""


# --- the table -----------------------------------------------------------------------------------------------------


class BreakerState(enum.StrEnum):
    """What a breaker does with a call."""

    CLOSED = "closed"  # lets it through, and counts how it ends
    OPEN = "open"  # turns it away until the break is over
    HALF_OPEN = "half_open"  # lets a few through, which decide
    ISOLATED = "isolated"  # turns it away until somebody closes it by hand


CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN  # Python 3.11 takes longer to find a member than to compare it
HALF_OPEN, ISOLATED = BreakerState.HALF_OPEN, BreakerState.ISOLATED


class BreakerInput(enum.Enum):
    """What can happen to a breaker."""

    TRIP = enum.auto()  # outcomes have reached a limit
    PROBE = enum.auto()  # the break is over, and here is a call to try it with
    RELAPSE = enum.auto()  # a probe failed
    RECOVER = enum.auto()  # enough probes succeeded
    ISOLATE = enum.auto()  # by hand
    CLOSE = enum.auto()  # by hand


TRANSITIONS: Final[Mapping[BreakerState, Mapping[BreakerInput, BreakerState]]] = {
    CLOSED: {
        BreakerInput.TRIP: OPEN,
        BreakerInput.ISOLATE: ISOLATED,
        BreakerInput.CLOSE: CLOSED,  # forgets what it has counted
    },
    OPEN: {
        BreakerInput.PROBE: HALF_OPEN,
        BreakerInput.ISOLATE: ISOLATED,
        BreakerInput.CLOSE: CLOSED,
    },
    HALF_OPEN: {
        BreakerInput.RELAPSE: OPEN,
        BreakerInput.RECOVER: CLOSED,
        BreakerInput.ISOLATE: ISOLATED,
        BreakerInput.CLOSE: CLOSED,
    },
    ISOLATED: {
        BreakerInput.ISOLATE: ISOLATED,
        BreakerInput.CLOSE: CLOSED,
    },
}
"""Every allowed step. A pair that is not here is a fault of this program, since no call can bring it about."""


def step(state: BreakerState, input_: BreakerInput) -> BreakerState:
    """Return the state after ``input_``.

    Raises:
        RuntimeError: if ``input_`` cannot happen in ``state``.

    >>> step(BreakerState.CLOSED, BreakerInput.TRIP)
    <BreakerState.OPEN: 'open'>
    """
    try:
        return TRANSITIONS[state][input_]
    except KeyError:
        raise RuntimeError(f"{input_.name} is not allowed in {state.name}") from None


# --- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a `Breaker` opens, for how long, and what closes it again.

    It opens when a share of the calls in a window failed, or so many failed in a row, or a share of them was slow:
    whichever comes first, and each can be left out. Only a call that failed (or was slow) opens it, never one that went
    well, though that one may have been the last of ``min_calls``.

    The defaults open at half of at least 10 calls within 30 s: late enough that a handful of errors is nothing, since
    an open breaker turns away calls that would have succeeded, too. The window and the break are Finagle's.

    Attributes:
        failure_ratio: the share of failures in the window that opens it, above 0 up to 1; None to leave it out.
        min_calls: in a window with fewer calls no share counts.
        window: how far back calls are counted, in seconds; in 10 steps, so up to a tenth less.
        count: count the last so many calls instead, however old they are. ``window`` is not used then.
        consecutive: so many failures in a row open it, whatever the window holds; None to leave it out.
        slow_call: a call that takes longer than this many seconds is slow, though it may succeed. None to leave it out;
            then the clock is read once per call, not twice.
        slow_ratio: the share of slow calls in the window that opens it, above 0 up to 1. With ``slow_call`` only.
        break_for: how long it stays open: each failed probe takes the next delay, and closing starts anew. The
            last delay of a series that ends is repeated. By default 2.5 to 5 s, then twice as long each time, up to
            300 s. Full jitter is no good here: it draws breaks of next to nothing.
        half_open_max: how many probes may be under way at once. One that never ends keeps its place, so bound calls by
            a Timeout further inside.
        half_open_successes: how many probes must succeed, with none failing, until it closes. A slow one fails.

    Raises:
        ValueError: if a number is out of its range, no limit is left in, or ``count`` is below ``min_calls``.
        TypeError: if ``break_for`` is no `Backoff`.

    >>> BreakerPolicy(failure_ratio=None, consecutive=5).consecutive
    5
    >>> BreakerPolicy(failure_ratio=50)
    Traceback (most recent call last):
    ...
    ValueError: failure_ratio is 50, where more than 0 and at most 1 is expected
    """

    failure_ratio: float | None = field(default=0.5, kw_only=True)
    min_calls: int = field(default=10, kw_only=True)
    window: Seconds = field(default=30.0, kw_only=True)
    count: int | None = field(default=None, kw_only=True)
    consecutive: int | None = field(default=None, kw_only=True)
    slow_call: Seconds | None = field(default=None, kw_only=True)
    slow_ratio: float = field(default=1.0, kw_only=True)
    break_for: Backoff = field(default=DEFAULT_BREAK, kw_only=True)
    half_open_max: int = field(default=1, kw_only=True)
    half_open_successes: int = field(default=1, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if self.failure_ratio is None and self.consecutive is None and self.slow_call is None:
            raise ValueError("failure_ratio, consecutive and slow_call are all None, where one limit is expected")
        for name, ratio in (("failure_ratio", self.failure_ratio), ("slow_ratio", self.slow_ratio)):
            if ratio is not None and not 0 < ratio <= 1:  # NaN is not
                raise ValueError(f"{name} is {ratio}, where more than 0 and at most 1 is expected")
        for name, least in (
            ("min_calls", self.min_calls),
            ("count", self.count),
            ("consecutive", self.consecutive),
            ("half_open_max", self.half_open_max),
            ("half_open_successes", self.half_open_successes),
        ):
            if least is not None and not least >= 1:
                raise ValueError(f"{name} is {least}, where 1 or more is expected")
        if not SHORTEST_WINDOW <= self.window < math.inf:
            raise ValueError(f"window is {self.window}, where a finite number of {SHORTEST_WINDOW} or more is expected")
        if self.slow_call is not None and not self.slow_call > 0:
            raise ValueError(f"slow_call is {self.slow_call}, where more than 0 is expected")
        if self.count is not None and self.count < self.min_calls and self._has_ratio:
            raise ValueError(f"min_calls is {self.min_calls}, where at most {self.count} (count) is expected")
        if not isinstance(self.break_for, Backoff):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"break_for is {self.break_for!r}, where a Backoff is expected")

    @property
    def _has_ratio(self) -> bool:
        return self.failure_ratio is not None or self.slow_call is not None


# --- the machine ---------------------------------------------------------------------------------------------------


class Admitted(NamedTuple):
    """What a call holds that was let through. It is handed back to `Breaker.end`, once.

    Attributes:
        generation: between which two changes of state it was let through.
        started: when, on the breaker's clock; only if the policy has a ``slow_call``.
    """

    generation: int
    started: float


_new = cast(Callable[[type[Admitted], tuple[int, float]], Admitted], getattr(tuple, "__new__"))  # noqa: B009
"""What a NamedTuple's own ``__new__`` comes to, at half the price: one is made for every call that is timed."""


class BreakerChange(NamedTuple):
    """A breaker has changed its state.

    Attributes:
        name: the breaker's name.
        old: the state before.
        new: the state now.
        reason: why, for people.
    """

    name: str
    old: BreakerState
    new: BreakerState
    reason: str


class BreakerCounts(NamedTuple):
    """What a breaker has counted, for display.

    Attributes:
        calls: how many calls that count have ended in the window, since the last change of state.
        failures: how many of them failed.
        slow: how many of them were slow.
        consecutive: how many of the last calls failed in a row.
        probes: how many probes are under way.
    """

    calls: int
    failures: int
    slow: int
    consecutive: int
    probes: int


class Breaker:
    """Lets calls through, or not, by how the ones before them ended. The layer `CircuitBreaker` makes one per service.

    Make one yourself to share it between services, to look at it, or to control it by hand; it is for one target, or
    the failures of one would cut off another. Every call that `admit` lets through must be handed to `end`, once,
    however it ended. Its memory is bounded: 10 buckets, or a byte for each of ``count`` calls.

    The clock should be monotonic. One that goes back does no harm: time stands still for a moment, then goes on. The
    default is that of the event loop, so it cannot be asked how it stands outside of one; only its repr can always.

    Args:
        policy: when it opens, for how long, and what closes it.
        name: what it is called in errors and events.
        clock: gives monotonic seconds.
        random: for the jitter of breaks.
        on_change: called once for every change of state, when the change is complete; see `watch`.

    >>> from random import Random
    >>> policy = BreakerPolicy(consecutive=2, break_for=Backoff.constant(5, jitter="none"))
    >>> breaker = Breaker(policy, name="db", random=Random(), clock=lambda: 0.0)
    >>> for _ in range(2):
    ...     call = breaker.admit()
    ...     assert call is not None
    ...     breaker.end(call, failed=True)
    >>> breaker.admit() is None, breaker.state.value, breaker.retry_after
    (True, 'open', 5.0)
    >>> raise breaker.rejection()
    Traceback (most recent call last):
    ...
    towline.errors.CircuitOpen: circuit 'db' is open (failures in a row: 2, limit: 2); next try in 5.0 s
    """

    __slots__ = (
        "_admitted",
        "_break",
        "_breaks",
        "_clock",
        "_generation",
        "_latest",
        "_listeners",
        "_offset",
        "_probes",
        "_random",
        "_reason",
        "_recovered",
        "_run",
        "_slow_call",
        "_state",
        "_timed",
        "_until",
        "_window",
        "name",
        "policy",
    )

    def __init__(
        self,
        policy: BreakerPolicy,
        *,
        name: str = "",
        clock: Clock = now,
        random: Random,
        on_change: Callable[[BreakerChange], object] | None = None,
    ) -> None:
        self.policy = policy
        self.name = name
        self._clock = clock
        self._random = random
        self._listeners = [] if on_change is None else [on_change]
        self._latest = -math.inf
        self._offset = 0.0
        self._window = LastSeconds(policy.window) if policy.count is None else LastCalls(policy.count)
        self._timed = policy.count is None or policy.slow_call is not None
        self._slow_call = policy.slow_call
        self._state = CLOSED
        self._reason = ""
        self._generation = 0
        self._admitted = Admitted(0, 0.0)
        self._run = 0  # failures in a row
        self._probes = 0  # under way
        self._recovered = 0  # probes that have succeeded
        self._breaks: Iterator[float] | None = None
        self._break = 0.0
        self._until = 0.0

    # --- calls

    def admit(self) -> Admitted | None:
        """Let a call through, or turn it away: then there is a `rejection` for its caller."""
        if self._state is not CLOSED and not self._take_probe():
            return None
        if self._slow_call is None:
            return self._admitted
        return _new(Admitted, (self._generation, self._time()))

    def _take_probe(self) -> bool:
        if self._state is OPEN and self._break_left() == 0:
            self._step(BreakerInput.PROBE, f"the break of {self._break:g} s is over")
        # Not an else: whoever was told of that step may have taken another.
        if self._state is not HALF_OPEN:
            return self._state is CLOSED
        if self._probes >= self.policy.half_open_max:
            return False
        self._probes += 1
        return True

    def end(self, call: Admitted, failed: bool | None) -> None:
        """Take back what a call held.

        Args:
            call: what `admit` gave to it.
            failed: how it ended; None if that says nothing of the target: the call was cancelled, or the fault was the
                caller's.
        """
        if call.generation != self._generation:
            return  # rule 2
        if self._state is not CLOSED:
            self._probes -= 1
        if failed is None:
            return
        time = self._time() if self._timed else 0.0
        slow = self._slow_call is not None and time - call.started > self._slow_call
        if self._state is CLOSED:
            self._window.add(time, failed, slow)
            self._run = self._run + 1 if failed else 0
            if failed or slow:
                reason = self._limit_reached(failed, slow)
                if reason is not None:
                    self._step(BreakerInput.TRIP, reason)
        elif failed or slow:
            how = "failed" if failed else f"took {time - call.started:.3g} s, limit: {self._slow_call:g} s"
            self._step(BreakerInput.RELAPSE, f"a probe {how}")
        else:
            self._recovered += 1
            if self._recovered >= self.policy.half_open_successes:
                self._step(BreakerInput.RECOVER, f"probes that succeeded: {self._recovered}")

    def _limit_reached(self, failed: bool, slow: bool) -> str | None:
        policy, window = self.policy, self._window
        if failed and policy.consecutive is not None and self._run >= policy.consecutive:
            return f"failures in a row: {self._run}, limit: {policy.consecutive}"
        if window.calls < policy.min_calls:
            return None
        # A quotient, not a product: 7 of 100 are 0.07, but 0.07 * 100 is more than 7
        if failed and policy.failure_ratio is not None and window.failures / window.calls >= policy.failure_ratio:
            return f"{window.failures} {window} failed, limit: {_percent(policy.failure_ratio)}"
        if slow and window.slow / window.calls >= policy.slow_ratio:
            slow_ratio = _percent(policy.slow_ratio)
            return f"{window.slow} {window} took more than {policy.slow_call:g} s, limit: {slow_ratio}"
        return None

    def rejection(self) -> CircuitOpen:
        """A new error for a call that is turned away: says why, and with ``retry_after`` for how long."""
        retry_after = self.retry_after
        whose = f"circuit {self.name!r}" if self.name else "the circuit"
        if self._state is HALF_OPEN:
            told = f"half open ({self._probes} of {self.policy.half_open_max} probes under way)"
        else:
            told = f"{self._state} ({self._reason})"
        when = "" if retry_after is None else f"; next try in {retry_after:.1f} s"
        return CircuitOpen(f"{whose} is {told}{when}", retry_after)

    # --- by hand

    def isolate(self, reason: str = "by hand") -> None:
        """Turn every call away until `close`, such as for maintenance. What is under way goes on, and does not count.

        Args:
            reason: why, for people; it stands in the errors.
        """
        self._step(BreakerInput.ISOLATE, reason)

    def close(self, reason: str = "by hand") -> None:
        """Let every call through again, with nothing counted and the breaks starting anew.

        Args:
            reason: why, for people.
        """
        self._step(BreakerInput.CLOSE, reason)

    def watch(self, listener: Callable[[BreakerChange], object], /) -> None:
        """Call ``listener`` once for every change of state from now on, unless an equal one is called already.

        It is called when the change is complete, in the task that brought it about. It must not block or raise; it may
        change the state itself. It is kept as long as the breaker.
        """
        if listener not in self._listeners:
            self._listeners.append(listener)

    # --- what it says of itself

    @property
    def state(self) -> BreakerState:
        """The state; ``HALF_OPEN`` as soon as the break is over, since the next call would be a probe.

        Reading changes nothing, and nobody is told: the step itself is taken by that call.
        """
        if self._state is OPEN and self._break_left() == 0:
            return HALF_OPEN
        return self._state

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call is let through; 0 if one would be now.

        None if nobody knows: the breaker was isolated by hand, or all probes are under way.
        """
        if self._state is CLOSED:
            return 0.0
        if self._state is OPEN:
            return self._break_left()
        if self._state is HALF_OPEN and self._probes < self.policy.half_open_max:
            return 0.0
        return None

    def ready_now(self) -> bool:
        """Whether a call would be let through now."""
        return self.retry_after == 0

    @property
    def counts(self) -> BreakerCounts:
        """What is counted now."""
        if self._timed:
            self._window.expire(self._time())
        window = self._window
        return BreakerCounts(window.calls, window.failures, window.slow, self._run, self._probes)

    def __repr__(self) -> str:
        # No clock is read: it may need an event loop, which a debugger has not
        if self._state is CLOSED:
            told = f"closed, {self._window.failures} {self._window} failed"
        elif self._state is OPEN:
            told = f"open for {self._break:g} s, {self._reason}"
        elif self._state is HALF_OPEN:
            told = f"half open, {self._probes} of {self.policy.half_open_max} probes under way"
        else:
            told = f"isolated, {self._reason}"
        return f"<Breaker {self.name!r}: {told}>"

    # --- the one place where it changes

    def _step(self, input_: BreakerInput, reason: str) -> None:
        old, new = self._state, step(self._state, input_)
        if old is new is ISOLATED:
            return
        self._state = new
        self._reason = reason
        self._generation += 1
        self._admitted = Admitted(self._generation, 0.0)
        self._window.clear()
        self._run = self._probes = self._recovered = 0
        if new is OPEN:
            if self._breaks is None:
                self._breaks = self.policy.break_for.delays(self._random, hold=True)
            self._break = next(self._breaks, 0.0)  # a series without any delay is a break of none
            self._until = self._time() + self._break
        elif new is CLOSED:
            self._breaks = None
        if old is not new:
            change = BreakerChange(self.name, old, new, reason)
            for listener in tuple(self._listeners):
                listener(change)

    # --- time

    def _break_left(self) -> float:
        left = self._until - self._time()
        return left if left > EARLY else 0.0

    def _time(self) -> float:
        time = self._clock() + self._offset
        if time < self._latest:
            # The clock went back. What is counted must not grow younger, nor a break longer: go on from here.
            self._offset += self._latest - time
            return self._latest
        self._latest = time
        return time


def _percent(ratio: float) -> str:
    return f"{ratio * 100:g} %"
