"""A function seen as a service: its arguments are the request, and another function may answer in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from towline.policies import matcher
from towline.service import Service, Wrapper

__all__ = ["NO_CALL", "AnyFunction", "Call", "Parameters", "Recovering", "Recovery"]

V = TypeVar("V")

AnyFunction: TypeAlias = Callable[..., Any]  # Any: functions of every kind go through here


class Call(NamedTuple):
    """The request that a policy sees for a decorated function: the arguments of one call, as they were given.

    They are handed to every attempt as they are. A policy that must protect them from what an attempt does to them
    copies them: ``StandardPolicy(clone=copy.deepcopy)``.

    Attributes:
        args: those given by position; ``self`` is the first of a method's.
        kwargs: those given by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


NO_CALL: Final = Call((), {})


# --- the parameters of a function ------------------------------------------------------------------------------------


class Parameters:
    """The parameters of a function, for calling another one with the same arguments."""

    __slots__ = ("_signature",)

    def __init__(self, function: AnyFunction) -> None:
        self._signature = inspect.signature(function)

    def apply(self, function: Callable[..., V], call: Call, *first: object) -> V:
        """Call ``function`` with ``first`` and the arguments of ``call``.

        Always in one form, or what `check` has found would depend on how the call was written: by position what can be,
        with the defaults filled in.
        """
        bound = self._signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        return function(*first, *bound.args, **bound.kwargs)

    def check(self, function: object, word: str, *first: object) -> None:
        """Refuse now what `apply` could not call: it would be found out when there is trouble already.

        Raises:
            TypeError: if ``function`` is not to be called with such arguments.
        """
        if not callable(function):
            raise TypeError(f"{word} is {function!r}, where a function is expected")
        args, kwargs = list(first), dict[str, object]()
        for each in self._signature.parameters.values():
            if each.kind is each.KEYWORD_ONLY:
                kwargs[each.name] = None
            elif each.kind is not each.VAR_KEYWORD:  # nobody knows their names yet
                args.append(None)
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except ValueError:
            pass  # it has no signature, as some that are written in C
        except TypeError as error:
            takes = self._signature.replace(return_annotation=inspect.Signature.empty)
            after = "the error and then " if first else ""
            raise TypeError(
                f"{word}= must take {after}what the function takes, {takes}: {error} ({function!r})"
            ) from None


# --- what to do instead ----------------------------------------------------------------------------------------------


class Recovery:
    """What to do instead, by the class of the error."""

    __slots__ = ("_by_class", "_parameters")

    def __init__(self, recover: AnyFunction | Mapping[type[Exception], AnyFunction], parameters: Parameters) -> None:
        by_class: Mapping[type[Exception], AnyFunction] = {Exception: recover} if callable(recover) else recover
        self._by_class = dict(by_class)
        self._parameters = parameters
        matcher(tuple(self._by_class))  # refuses what is no class of exceptions
        for each in self._by_class.values():
            parameters.check(each, "recover", None)

    def find(self, error: Exception) -> AnyFunction | None:
        """The function for the closest class; None if there is none."""
        found = (self._by_class[each] for each in type(error).__mro__ if each in self._by_class)
        return next(found, None)

    async def recover(self, function: AnyFunction, error: Exception, call: Call) -> Any:
        answer = self._parameters.apply(function, call, error)
        return await answer if inspect.isawaitable(answer) else answer


class Recovering(Wrapper[Call, Any]):
    """A service that answers otherwise where the one inside raises."""

    __slots__ = ("_recovery",)

    def __init__(self, inner: Service[Call, Any], recovery: Recovery) -> None:
        super().__init__(inner)
        self._recovery = recovery

    async def __call__(self, request: Call, /) -> Any:
        try:
            return await self.inner(request)
        except Exception as error:
            function = self._recovery.find(error)
            if function is None:
                raise
            return await self._recovery.recover(function, error, request)
