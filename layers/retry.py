"""Try again what failed: `Retry`, a transparent layer around connecting and calling alike.

The layer only carries out what a policy decides: it calls the service inside it, tells the policy how that
went, and sleeps for as long as the policy says.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random, SystemRandom
from typing import ClassVar, ParamSpec, TypeVar

import anyio

from towline.policies import Backoff, Failure, Policy, StandardPolicy
from towline.service import Dial, Service

__all__ = ["AttemptEvent", "Retry"]

Q = TypeVar("Q")
R = TypeVar("R")
P = ParamSpec("P")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttemptEvent:
    """An attempt is about to be made.

    Attributes:
        attempt: its number, counted from 1.
        delay: seconds until it begins.
        error: what went wrong before it; None for a first attempt, or after a response that the policy did
            not like.
    """

    attempt: int
    delay: float
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Retry:
    """Layer: repeat what failed, when and as often as a policy says.

    Needs nothing from the layer inside it and promises what that one does: the response, or the last error
    itself. Put it around connecting (inside Resume), around calls, or around both. What is inside it
    happens once per attempt, so a Timeout inside bounds an attempt and one outside bounds them all. For the
    dialling side only.

    Cancelling the call ends it at once, in an attempt as in a wait, and the policy is not asked. The caller's
    deadline is told to the policy, so that no wait is begun that cannot end in time.

    Attributes:
        policy: the policy; a `Backoff` stands for `StandardPolicy` with that backoff.
        clock: gives the time in seconds.
        sleep: waits for a number of seconds.
        random: for jitter. The default draws from the operating system, so it is safe after a fork.
        on_attempt: called before every attempt, and before the wait for it. So is ``on_attempt`` of a `Dial`.
            What it raises is logged and goes no further.

    Raises:
        TypeError: if ``policy`` is neither a policy nor a backoff.

    >>> from towline.endpoint import Endpoint
    >>> answers = iter([ConnectionRefusedError(), "connected"])
    >>> async def connect(dial: Dial, /) -> str:
    ...     answer = next(answers)
    ...     if isinstance(answer, Exception):
    ...         raise answer
    ...     return answer
    >>> retrying = Retry(Backoff.constant(0.01))(connect)
    >>> anyio.run(retrying, Dial(Endpoint.parse("tcp://localhost:7000")))
    'connected'
    """

    client_only: ClassVar[bool] = True

    policy: Policy | Backoff = field(default_factory=StandardPolicy)
    clock: Callable[[], float] = field(default=anyio.current_time, kw_only=True)
    sleep: Callable[[float], Awaitable[object]] = field(default=anyio.sleep, kw_only=True)
    random: Random = field(default_factory=SystemRandom, kw_only=True, compare=False, repr=False)
    on_attempt: Callable[[AttemptEvent], None] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.policy, Backoff):
            object.__setattr__(self, "policy", StandardPolicy(backoff=self.policy))
        elif not callable(getattr(self.policy, "session", None)):
            raise TypeError(f"Retry takes a policy or a Backoff, not {self.policy!r}")

    def __call__(self, inner: Service[Q, R], /) -> Service[Q, R]:
        assert not isinstance(self.policy, Backoff)  # it was replaced
        open_session, clock, sleep, random = self.policy.session, self.clock, self.sleep, self.random

        async def retrying(request: Q, /) -> R:
            session = open_session(request, now=clock(), random=random)
            dial = request if isinstance(request, Dial) else None
            attempt = 1
            before = session.before()
            self._tell(dial, attempt, before, dial.cause if dial else None)
            if before > 0:
                await sleep(before)
            while True:
                try:
                    response = await inner(request)
                except Exception as error:
                    # ``error`` ends with this block: a frame that kept it would be a cycle, since its
                    # traceback has the frame.
                    delay = session.failed(_failure(attempt, error, clock()))
                    if delay is None:
                        raise
                    self._tell(dial, attempt + 1, delay, error)
                else:
                    delay = session.succeeded(response)
                    if delay is None:
                        return response
                    self._tell(dial, attempt + 1, delay, None)
                attempt += 1
                await sleep(delay)  # also for 0: a checkpoint, or quick failures could not be cancelled

        return retrying

    def _tell(self, dial: Dial | None, attempt: int, delay: float, error: Exception | None) -> None:
        if self.on_attempt is not None:
            _guarded(self.on_attempt, AttemptEvent(attempt, delay, error))
        if dial is not None and dial.on_attempt is not None:
            _guarded(dial.on_attempt, attempt, delay, error)


def _failure(attempt: int, error: Exception, now: float) -> Failure:
    # The scope's deadline is on the event loop's clock, which need not be ours; what is left until it is a
    # length.
    time_left = anyio.current_effective_deadline() - anyio.current_time()
    return Failure(attempt, error, now, now + time_left)


def _guarded(hook: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    try:
        hook(*args, **kwargs)
    except Exception:
        logger.exception("on_attempt raised; the call goes on")
