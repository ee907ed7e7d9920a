"""Turn calls away instead of letting them wait: `LoadShed`, a transparent layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from towline.errors import Overloaded
from towline.hooks import CallShed, Hooks, tell
from towline.service import Service, Wrapper, ready_now, refuses_now
from towline.text import differing

__all__ = ["LoadShed"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LoadShed:
    """Layer: a call that would have to wait for room fails at once with `Overloaded`.

    Needs a layer inside it that limits something and says so (`ready_now`), such as ConcurrencyLimit, RateLimit or
    Buffer; around anything else it does nothing. Put it outside all of them that are to be asked. A caller that is
    turned away at once can go elsewhere, while one that waits in a queue that only grows will hardly get its answer
    while it still wants it.

    The hint is exact on one event loop: between it and the place that a call takes inside, nothing waits. Limits
    further in than a layer that itself waits first (a Retry that makes its second attempt, say) are not asked again.

    A LoadShed is always ready itself, since a call to it never waits for room.

    Attributes:
        hooks: told of every call that is turned away.

    >>> import anyio
    >>> from towline.layers.limit import ConcurrencyLimit
    >>> async def slow(request: str, /) -> str:
    ...     await anyio.sleep(0.01)
    ...     return request
    >>> async def main() -> None:
    ...     call = LoadShed()(ConcurrencyLimit(1)(slow))
    ...     async with anyio.create_task_group() as group:
    ...         group.start_soon(call, "first")
    ...         await anyio.sleep(0)
    ...         try:
    ...             await call("second")
    ...         except Overloaded as error:
    ...             print(error)
    >>> anyio.run(main)
    no room for another call: it would have to wait
    """

    client_only: ClassVar[bool] = False

    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Shedding(inner, self.hooks)


class _Shedding(Wrapper[Q, R]):
    """A service that nobody waits for."""

    __slots__ = ("_hooks",)

    def __init__(self, inner: Service[Q, R], hooks: Hooks | None) -> None:
        super().__init__(inner)
        self._hooks = hooks

    async def __call__(self, request: Q, /) -> R:
        if not ready_now(self.inner) and not refuses_now(self.inner):  # what refuses says best itself why
            raise self._refused()
        response: R = await self.inner(request)
        return response

    def _refused(self) -> Overloaded:
        error = Overloaded("no room for another call: it would have to wait")
        if self._hooks is not None:
            tell(self._hooks.on_shed, CallShed("LoadShed", error))
        return error

    def ready_now(self) -> bool:
        return True

    def refuses_now(self) -> bool:
        return not ready_now(self.inner) or refuses_now(self.inner)  # one that refuses may be ready to do so
