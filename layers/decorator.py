"""Make an async function try again by itself: `retryable`, a decorator.

It puts a `Retry` around the function, as if the function were a service and its arguments the request (a `Call`). What
is particular to functions is here: what to do instead when all attempts have failed (``recover``), and attempts that
somebody else makes, such as a broker that delivers a message again (``state``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import replace
from random import Random
from typing import Any, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, cast, overload

import anyio

from towline.clock import Clock, now
from towline.hooks import Hooks
from towline.layers._call import NO_CALL, AnyFunction, Call, Parameters, Recovering, Recovery
from towline.layers._course import RANDOM
from towline.layers.by_key import ByKey, Stateful
from towline.layers.retry import Retry, _Retrying
from towline.policies import Backoff, Budget, Errors, Policy, StandardPolicy, TpsBudget
from towline.policies.standard import DEFAULT_BACKOFF, retry_after
from towline.service import Wrapper

__all__ = ["Call", "retryable"]

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U", covariant=True)
V = TypeVar("V")
Y = TypeVar("Y")
S = TypeVar("S")


# --- sources ---------------------------------------------------------------------------------------------------------


class _Source(AsyncGenerator[Y, S]):
    """What an async generator function gives, tried again until there is a first item, and never after it.

    No generator itself: nothing may be held open where one waits to be asked for an item (PEP 789).
    """

    __slots__ = ("__weakref__", "_call", "_generator", "_is_beginning", "_is_begun", "_is_empty", "_layer", "_make")

    def __init__(self, make: Callable[..., AsyncGenerator[Y, S]], layer: Retry, call: Call) -> None:
        self._make = make
        self._layer = layer
        self._call = call
        self._generator: AsyncGenerator[Y, S] | None = None  # that of the last attempt
        self._is_begun = self._is_beginning = self._is_empty = False

    async def _first(self, call: Call, /) -> Y | None:
        if self._generator is not None:
            await self._generator.aclose()  # it has given an item, and the policy did not want it
        self._generator = self._make(*call.args, **call.kwargs)
        self._is_empty = False
        try:
            return await anext(self._generator)
        except StopAsyncIteration:
            self._is_empty = True
            return None

    async def _begin(self, value: S | None) -> Y:
        if value is not None:
            raise TypeError("there is no item yet that something other than None could be sent in answer to")
        self._is_begun = self._is_beginning = True
        try:
            first = await self._layer(self._first)(self._call)  # not kept: that would be a cycle
        finally:
            self._is_beginning = False
            self._call = NO_CALL
        if self._is_empty:
            raise StopAsyncIteration
        return cast(Y, first)

    def _begun(self) -> AsyncGenerator[Y, S]:
        if self._is_beginning:
            raise RuntimeError("this source is asked for its first item already")
        return _nothing() if self._generator is None else self._generator

    def __anext__(self) -> Coroutine[Any, Any, Y]:
        return self._begun().__anext__() if self._is_begun else self._begin(None)

    def asend(self, value: S, /) -> Coroutine[Any, Any, Y]:
        return self._begun().asend(value) if self._is_begun else self._begin(value)

    def athrow(self, typ: Any, /, *deprecated: Any) -> Coroutine[Any, Any, Y]:
        """Raise an error in the generator; before there is one, it is raised from here."""
        self._is_begun = True
        return self._begun().athrow(typ, *deprecated)

    def aclose(self) -> Coroutine[Any, Any, None]:
        """Close the generator."""
        self._is_begun = True
        return self._begun().aclose()


async def _nothing() -> AsyncGenerator[Any, Any]:
    return
    yield


# --- the decorator ---------------------------------------------------------------------------------------------------


class _Decorator(Protocol):
    """Gives a function back with the signature that it had."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __call__(self, function: Callable[P, AsyncGenerator[Y, S]], /) -> Callable[P, AsyncGenerator[Y, S]]: ...
    @overload
    def __call__(self, function: Callable[P, AsyncIterator[Y]], /) -> Callable[P, AsyncIterator[Y]]: ...


class _RecoveringDecorator(Protocol[U]):
    """Gives a function back that may answer with what recovers, too."""

    def __call__(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T | U]]: ...


class _Settings(TypedDict, total=False):
    """What all forms of `retryable` take."""

    on: Errors | None
    not_on: Errors
    on_result: Callable[[Any], bool] | None
    max_attempts: int | None
    max_elapsed: float | None
    backoff: Backoff | None
    budget: Budget | Literal["own"] | None
    delay_from: Callable[[Exception], float | None] | None
    idempotent: bool | Callable[..., bool] | None
    policy: Policy | None
    state: ByKey | Callable[..., Hashable] | None
    hooks: Hooks | None
    clock: Clock
    sleep: Callable[[float], Awaitable[object]]
    random: Random


@overload
def retryable(*, recover: None = ..., **settings: Unpack[_Settings]) -> _Decorator: ...
@overload
def retryable(
    *,
    recover: Callable[..., Awaitable[V]] | Mapping[type[Exception], Callable[..., Awaitable[V]]],
    **settings: Unpack[_Settings],
) -> _RecoveringDecorator[V]: ...
@overload
def retryable(
    *, recover: Callable[..., V] | Mapping[type[Exception], Callable[..., V]], **settings: Unpack[_Settings]
) -> _RecoveringDecorator[V]: ...
def retryable(
    function: object = None,
    /,
    *,
    on: Errors | None = None,
    not_on: Errors = (),
    on_result: Callable[[Any], bool] | None = None,
    max_attempts: int | None = None,
    max_elapsed: float | None = None,
    backoff: Backoff | None = None,
    budget: Budget | Literal["own"] | None = "own",
    delay_from: Callable[[Exception], float | None] | None = None,
    idempotent: bool | Callable[..., bool] | None = None,
    policy: Policy | None = None,
    recover: AnyFunction | Mapping[type[Exception], AnyFunction] | None = None,
    state: ByKey | Callable[..., Hashable] | None = None,
    hooks: Hooks | None = None,
    clock: Clock = now,
    sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    random: Random = RANDOM,
) -> Any:  # what the overloads say
    """Decorator: call an async function again while it fails.

    It keeps its name, its signature and its types, and the one that was decorated is its ``__wrapped__``. The last
    error is raised itself, marked as `Retry` marks it (see `given_up`). Functions and methods, what
    ``functools.partial`` makes of them, and objects with an async ``__call__`` may be decorated; ``@classmethod`` and
    ``@staticmethod`` go above it.

    An **async generator function** is called again only as long as it has given no item; what fails later is raised,
    since nobody could take back the items before. ``on_result`` judges its first item, or None if there is none.

    ``on`` has no default, unlike that of `StandardPolicy`: an error of somebody else's does not say of itself whether
    trying again makes sense. ``policy=StandardPolicy()`` retries those that do say so.

    **What to do instead** (``recover``) is asked for every error that would leave, also for one that was not worth a
    retry; so name the errors that it can do something about, or it will hide bugs. Nothing is recovered from a
    cancellation.

    **With a key** (``state``) nothing is repeated here: each call is one attempt, its error is raised at once, and
    whoever called makes the next attempt by calling again, as a broker does that delivers a message again. How many
    attempts there were, and when it may be tried again, is kept by key, in this process. A call that comes too early
    waits for the rest of the delay; calls with the same key wait for one another, so a call must not make another one
    within. After the last attempt, the next call does not call the function: it gives what ``recover`` answers, or else
    the last error again (a copy), and the key is forgotten. It is forgotten on success, too, and see `ByKey`. A budget
    that counts what is under way counts a key that is kept.

    Args:
        on: the errors to retry, as `Errors`.
        not_on: errors that are not retried although ``on`` has them.
        on_result: says of a result that it is to be asked for again; in the end the last one is returned.
        max_attempts: attempts in all, the first included; 3 by default.
        max_elapsed: seconds from the first attempt to the beginning of the last.
        backoff: the delays.
        budget: what retries are paid from; by default one of their own for all functions that this decorator is put on,
            None for none. Functions that call the same target should share one.
        delay_from: the delay that an error itself asks for, or None; by default its ``retry_after``.
        idempotent: whether a call may be carried out twice; a function is called with the same arguments. None does not
            know, and refuses only after errors that say the request was sent.
        policy: a policy instead of all the above. Its requests are `Call` values.
        recover: a function, async or not, that is called with the error and then the same arguments; or one for each
            class of errors, of which the closest is taken. What it answers is returned.
        state: a function of the same arguments, which gives the key; or a `ByKey`.
        hooks: told of every attempt, of every retry before the wait for it, and of giving up.
        clock: gives the time in seconds.
        sleep: waits for a number of seconds.
        random: for jitter.

    Raises:
        TypeError: if there is neither ``on`` nor ``policy``, or ``policy`` and what it stands for; if ``on_result``
            meets ``state``; and from the decorator, for what is no async function, since to wait it would have to
            block; if ``recover``, ``state`` or ``idempotent`` does not take the function's arguments; and if there is
            ``recover`` or ``state`` for an async generator function.
        ValueError: if a number is out of bounds, as `StandardPolicy` says.

    >>> @retryable(on=ConnectionError, max_attempts=2, recover={OSError: lambda error, name: f"no answer for {name}"})
    ... async def ask(name: str) -> str:
    ...     raise ConnectionResetError
    >>> anyio.run(ask, "Ada")
    'no answer for Ada'
    """
    if function is not None:
        raise TypeError("write @retryable(on=...): which errors to retry has no default")
    given = (on, on_result, max_attempts, max_elapsed, backoff, delay_from, idempotent)
    if policy is None:
        if on is None:
            raise TypeError("retryable needs on=, the errors to retry, or policy=")
        policy = StandardPolicy(
            DEFAULT_BACKOFF if backoff is None else backoff,
            on=on,
            not_on=not_on,
            on_result=on_result,
            max_attempts=max_attempts,
            max_elapsed=max_elapsed,
            delay_from=retry_after if delay_from is None else delay_from,
            idempotent=None if callable(idempotent) else idempotent,
            budget=TpsBudget(clock=clock) if budget == "own" else budget,
        )
    elif any(each is not None for each in given) or not_on != () or budget != "own":
        raise TypeError("retryable takes either policy=, or what a StandardPolicy is made of, not both")
    if state is not None and isinstance(policy, StandardPolicy) and policy.on_result is not None:
        raise TypeError("on_result says of a result that it is not one; with state= nobody would call again after it")
    layer = Retry(policy, clock=clock, sleep=sleep, random=random, hooks=hooks)
    by_key = state if isinstance(state, ByKey) or state is None else ByKey(state)

    def decorate(function: AnyFunction, /) -> AnyFunction:
        return _decorated(function, layer, idempotent if callable(idempotent) else None, recover, by_key)

    return decorate


def _decorated(
    function: AnyFunction,
    layer: Retry,
    idempotent: Callable[..., bool] | None,
    recover: AnyFunction | Mapping[type[Exception], AnyFunction] | None,
    by_key: ByKey | None,
) -> AnyFunction:
    is_source = _is_source(function)
    if is_source and (recover is not None or by_key is not None):
        raise TypeError(f"{function!r} is an async generator function, for which there is no recover= and no state=")
    parameters = Parameters(function)
    if idempotent is not None:
        layer = replace(layer, policy=_for_calls(layer.policy, idempotent, parameters))

    if is_source:

        @_wraps(function)
        def source(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            return _Source(function, layer, Call(args, kwargs))

        return source

    def service(request: Call, /) -> Any:  # the coroutine itself: one frame less to go through
        return function(*request.args, **request.kwargs)

    recovery = None if recover is None else Recovery(recover, parameters)
    retrying: Wrapper[Call, Any] = layer(service)
    if by_key is not None:
        assert isinstance(retrying, _Retrying)
        parameters.check(by_key.key, "state")
        retrying = Stateful(retrying, by_key, parameters, recovery)
    elif recovery is not None:
        retrying = Recovering(retrying, recovery)

    @_wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await retrying(Call(args, kwargs))

    return call


def _for_calls(policy: Policy | Backoff, idempotent: Callable[..., bool], parameters: Parameters) -> StandardPolicy:
    assert isinstance(policy, StandardPolicy)  # made from what the decorator was given
    parameters.check(idempotent, "idempotent")
    return replace(policy, idempotent=functools.partial(parameters.apply, idempotent))


def _is_source(function: object) -> bool:
    """Whether it is an async generator function.

    Raises:
        TypeError: if it is no async function either.
    """
    if type(function) in (classmethod, staticmethod):
        raise TypeError(f"put @{type(function).__name__} above @retryable, which takes the function itself")
    plain = _plain(function)
    for each in (plain, None if isinstance(plain, type) else inspect.getattr_static(type(plain), "__call__", None)):
        if inspect.iscoroutinefunction(each):
            return False
        if inspect.isasyncgenfunction(each):
            return True
    raise TypeError(f"retryable takes async functions, and {function!r} is none: to wait, it would have to block")


def _plain(function: object) -> object:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _wraps(function: AnyFunction) -> Callable[[AnyFunction], AnyFunction]:
    plain = _plain(function)
    if plain is function and inspect.isroutine(function):
        return functools.wraps(function)

    def wrap(wrapper: AnyFunction) -> AnyFunction:
        named = plain if inspect.isroutine(plain) else type(plain)
        functools.update_wrapper(wrapper, named, updated=())
        wrapper.__dict__["__wrapped__"] = function
        return wrapper

    return wrap
