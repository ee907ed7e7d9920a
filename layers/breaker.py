"""Leave alone what fails: `CircuitBreaker`, a transparent layer for connecting and calling alike.

The layer only carries out what a `Breaker` decides: it asks whether a call may go through, and tells how it ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, TypeVar

from towline.chance import SystemRandom
from towline.clock import Clock, now
from towline.errors import CallRejected, CircuitOpen, ClosedHere, DeadlineExceeded, MisuseError
from towline.hooks import AllOf, CallShed, Hooks, StateChanged, tell
from towline.policies.breaker import Breaker, BreakerChange, BreakerPolicy
from towline.policies.classify import Errors, excluder
from towline.service import Service, Wrapper
from towline.text import differing

__all__ = ["CircuitBreaker", "speaks_of_target"]

Q = TypeVar("Q")
R = TypeVar("R")


def speaks_of_target(error: Exception) -> bool:
    """Whether an error says something about what was called: every one but those that arose on this side.

    Not a failure of the target are: a call that a layer here turned away (`CallRejected`), a wrong call
    (`MisuseError`), a service or stream that was closed here, and a deadline that left no time to begin.

    >>> speaks_of_target(ConnectionResetError()), speaks_of_target(MisuseError())
    (True, False)
    """
    if isinstance(error, DeadlineExceeded):
        return error.sent is not False
    return not isinstance(error, (CallRejected, MisuseError, ClosedHere))


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """Layer: once what is inside has failed too often, turn calls away for a while instead of making them.

    Needs nothing from the layer inside it and promises what that one does, or `CircuitOpen`, raised at once, with the
    seconds until the next try as its ``retry_after``. For the dialling side only.

    Put it *inside* Retry, and one around each endpoint. Inside, since there it counts every attempt, and an open one
    ends the attempts: a `StandardPolicy` does not retry `CircuitOpen` (or waits for the next try, if told to). Around
    Retry it would see three failures as one and open late, while the attempts went on. One for each endpoint, since
    the failures of one must not cut off another. Put a Timeout inside it, or calls that hang are never failures.

    A cancelled call counts neither as a failure nor as a success, and neither does an error that is no failure; both
    give back the place of a probe. What comes back after the breaker has changed its state is passed on and does not
    count. ``ready_now`` is False while calls would be turned away.

    Attributes:
        policy: when it opens, for how long, and what closes it: every service that is wrapped gets a `Breaker` of its
            own. Or a `Breaker`: then all share it, and whoever made it can control it by hand. The one in use is the
            attribute ``breaker`` of the service.
        is_failure: which errors are failures of the target, as `Errors`. By default all but those that arose on this
            side; see `speaks_of_target`. Errors that mean "your request is wrong" should not be: they are answers. A
            group is one if one of its leaves is.
        is_failure_result: says of a response that it is a failure, such as a status of 500. It is passed on all the
            same.
        name: what the breakers are called in errors and events; by default the name of the function inside, if it is
            one. Only with a `BreakerPolicy`, since a `Breaker` has its name.
        clock: gives monotonic seconds; a `Breaker` has its own.
        random: for the jitter of breaks; a `Breaker` has its own. The default draws from the operating system, so it
            is safe after a fork.
        hooks: told once of every change of state, those by hand included, and of every call that is turned away. A
            `Breaker` keeps those that it was told to tell.

    Raises:
        TypeError: if ``policy`` is neither a policy nor a breaker, or ``is_failure`` names no class of exceptions.
        ValueError: if a `Breaker` is given together with a name.

    >>> import anyio
    >>> async def broken(request: str, /) -> str:
    ...     raise ConnectionResetError("reset")
    >>> guarded = CircuitBreaker(BreakerPolicy(consecutive=1))(broken)
    >>> async def main() -> None:
    ...     for _ in range(2):
    ...         try:
    ...             await guarded("hello")
    ...         except (ConnectionResetError, CircuitOpen) as error:
    ...             print(error)
    >>> anyio.run(main)
    reset
    circuit 'broken' is open (failures in a row: 1, limit: 1); next try in ... s
    """

    client_only: ClassVar[bool] = True

    policy: BreakerPolicy | Breaker = field(default_factory=BreakerPolicy)
    is_failure: Errors = field(default=speaks_of_target, kw_only=True)
    is_failure_result: Callable[[Any], bool] | None = field(default=None, kw_only=True)  # Any: the user knows the type
    name: str | None = field(default=None, kw_only=True)
    clock: Clock = field(default=now, kw_only=True)
    random: Random = field(default_factory=SystemRandom, kw_only=True, compare=False, repr=False)
    hooks: Hooks | None = field(default=None, kw_only=True)

    _fails: Callable[[Exception], bool] = field(init=False, repr=False, compare=False)

    __repr__ = differing

    def __post_init__(self) -> None:
        if isinstance(self.policy, Breaker):
            if self.name is not None:
                raise ValueError(f"name is {self.name!r}, but the breaker is called {self.policy.name!r} already")
        elif not isinstance(self.policy, BreakerPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"CircuitBreaker takes a BreakerPolicy or a Breaker, not {self.policy!r}")
        object.__setattr__(self, "_fails", excluder(self.is_failure))  # one leaf that failed is a failure

    def __call__(self, inner: Service[Q, R], /) -> _Guarded[Q, R]:
        return _Guarded(inner, self)


class _Guarded(Wrapper[Q, R]):
    """A service behind a breaker.

    Attributes:
        breaker: the breaker, to look at or to control by hand.
    """

    __slots__ = ("_fails", "_fails_result", "_hooks", "breaker")

    def __init__(self, inner: Service[Q, R], layer: CircuitBreaker) -> None:
        super().__init__(inner)
        if isinstance(layer.policy, Breaker):
            self.breaker = layer.policy
        else:
            name = getattr(inner, "__name__", "") if layer.name is None else layer.name
            self.breaker = Breaker(layer.policy, name=name, clock=layer.clock, random=layer.random)
        self._fails = layer._fails
        self._fails_result = layer.is_failure_result
        self._hooks = layer.hooks
        if layer.hooks is not None:
            self.breaker.watch(_Told(layer.hooks))

    async def __call__(self, request: Q, /) -> R:
        breaker = self.breaker
        call = breaker.admit()
        if call is None:
            raise self._rejection()
        failed: bool | None = None  # and so it stays if the call is cancelled
        try:
            response: R = await self.inner(request)
        except Exception as error:
            if self._fails(error):
                failed = True
            raise
        else:
            failed = self._fails_result is not None and bool(self._fails_result(response))
            return response
        finally:
            breaker.end(call, failed)

    def _rejection(self) -> CircuitOpen:
        error = self.breaker.rejection()
        if self._hooks is not None:
            tell(self._hooks.on_shed, CallShed("CircuitBreaker", error))
        return error

    def ready_now(self) -> bool:
        return self.breaker.ready_now() and super().ready_now()

    def refuses_now(self) -> bool:
        return not self.breaker.ready_now() or super().refuses_now()


class _Told:
    """What tells hooks. Equal for the same hooks, so that a breaker tells them once, however many services share it."""

    __slots__ = ("_hooks",)

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def __call__(self, change: BreakerChange, /) -> None:
        tell(self._hooks.on_state_change, StateChanged(change.name, change.old, change.new, change.reason))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Told):
            return False
        return other._hooks is self._hooks or (isinstance(other._hooks, AllOf) and other._hooks == self._hooks)
