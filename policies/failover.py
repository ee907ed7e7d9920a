"""Go elsewhere: a policy that changes the next request, so that a retry tries the next endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from towline.clock import Clock
from towline.endpoint import Endpoint
from towline.service import Dial

from .retry import Answer, Attempt, NotCloneable, Policy, PolicySession
from .standard import StandardPolicy

if TYPE_CHECKING:
    from random import Random

__all__ = ["Failover"]


def _of_dial(request: Any, /) -> Any:
    return request.endpoint


def _redirected(request: Any, endpoint: Any, /) -> Any:
    return replace(request, endpoint=endpoint)


@dataclass(frozen=True, slots=True, init=False)
class Failover:
    """A policy that decides as another one does, and sends each retry to the next of several endpoints.

    The first attempt goes where the request says; the retries go through ``endpoints`` in order, and begin again at
    the end. Within a round nothing is waited for, since another endpoint has not failed yet; after a full round the
    other policy's delay applies.

    A session that exists is known only to the endpoint that made it, so a `Dial` on its way back there is left alone
    (D8), unless ``cluster`` says that all endpoints share their sessions.

    Args:
        endpoints: where to go, as text, as `Endpoint`, or as whatever ``change`` takes.
        policy: decides whether there is a retry.
        where: says which endpoint a request goes to; by default that of a `Dial`.
        change: makes the request for another endpoint; by default it changes a `Dial`.
        cluster: any of the endpoints can resume the session of any other.

    Raises:
        ValueError: if there are no endpoints.
        TypeError: if only one of ``where`` and ``change`` is given.
        EndpointError: if one cannot be read.

    >>> Failover(["tcp://a.example:7000", "tcp://b.example:7000"]).endpoints[1]
    Endpoint('tcp://b.example:7000')
    """

    endpoints: tuple[Any, ...]
    policy: Policy
    where: Callable[[Any], Any]  # Any: requests and endpoints of the user's
    change: Callable[[Any, Any], Any]
    cluster: bool = field(default=False)

    def __init__(
        self,
        endpoints: Iterable[Any],
        policy: Policy | None = None,
        *,
        where: Callable[[Any], Any] | None = None,
        change: Callable[[Any, Any], Any] | None = None,
        cluster: bool = False,
    ) -> None:
        if (where is None) is not (change is None):
            raise TypeError("give both where= and change=, or neither: they speak of the same requests")
        chosen = tuple(Endpoint.parse(each) if change is None else each for each in endpoints)
        if not chosen:
            raise ValueError("there are no endpoints to fail over to")
        object.__setattr__(self, "endpoints", chosen)
        object.__setattr__(self, "policy", StandardPolicy() if policy is None else policy)
        object.__setattr__(self, "where", _of_dial if where is None else where)
        object.__setattr__(self, "change", _redirected if change is None else change)
        object.__setattr__(self, "cluster", cluster)

    def session(self, request: Any, /, *, clock: Clock, random: Random) -> PolicySession[Any, Any]:
        """Open the state of one request; see `Policy.session`."""
        session = self.policy.session(request, clock=clock, random=random)
        if isinstance(request, Dial) and request.pinned and not self.cluster:
            return session
        targets, here = list(self.endpoints), self.where(request)
        start = targets.index(here) + 1 if here in targets else 0
        return _Session(self, session, targets[start:] + targets[:start], tried=min(start, 1))


class _Session(PolicySession[Any, Any]):
    """One request that goes from endpoint to endpoint."""

    __slots__ = ("_inner", "_next", "_policy", "_targets", "_tried")

    def __init__(self, policy: Failover, inner: PolicySession[Any, Any], targets: list[Any], *, tried: int) -> None:
        self._policy = policy
        self._inner = inner
        self._targets = targets
        self._next = 0
        self._tried = tried  # of the targets, in this round

    def before(self) -> float:
        return self._inner.before()

    def clone_request(self, request: Any, /) -> Any | NotCloneable:
        return self._inner.clone_request(request)

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        answer = self._inner.retry(attempt)
        if answer is None:
            return None
        targets = self._targets
        attempt.request = self._policy.change(attempt.request, targets[self._next])
        self._next = (self._next + 1) % len(targets)
        is_round_over = self._tried == len(targets)
        self._tried = 1 if is_round_over else self._tried + 1
        return answer if is_round_over or not isinstance(answer, float | int) else 0.0

    def end(self) -> None:
        self._inner.end()
