"""Which errors something applies to: one way of saying it, for every layer that must know.

An error matches a class, a predicate, or one of several of these. An `ExceptionGroup` matches when every leaf of it
does: a group with one error that must not be retried must not be either. What is no `Exception` (a cancellation, a
keyboard interrupt) never comes here, and cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

from towline.errors import MisuseError

__all__ = ["Errors", "excluder", "is_transient", "matcher", "says_retryable"]

OneKind: TypeAlias = type[Exception] | Callable[[Exception], bool]

Errors: TypeAlias = OneKind | tuple[OneKind, ...]
"""Which errors: a class, a function that says so of one that is no group, or a tuple of such. With `says_retryable` in
it, those that say so themselves as well: ``on=(ConnectionError, says_retryable)``."""


def matcher(errors: Errors) -> Callable[[Exception], bool]:
    """A function that says whether an error matches; a group does when all its leaves do.

    Raises:
        TypeError: if ``errors`` is none of what `Errors` names, or a class that is no ``Exception``.

    >>> lost = matcher((ConnectionError, EOFError))
    >>> lost(EOFError()), lost(ValueError())
    (True, False)
    >>> lost(ExceptionGroup("both", [EOFError(), ConnectionResetError()]))
    True
    >>> lost(ExceptionGroup("one", [EOFError(), ValueError()]))
    False
    """
    matches = _of_one(errors)
    return lambda error: matches(error) or all(map(matches, _leaves(error)))


def excluder(errors: Errors) -> Callable[[Exception], bool]:
    """As `matcher`, but one leaf of a group is enough: for errors that rule something out.

    >>> excluder(ValueError)(ExceptionGroup("one", [EOFError(), ValueError()]))
    True
    """
    matches = _of_one(errors)
    return lambda error: matches(error) or any(map(matches, _leaves(error)))


def says_retryable(error: Exception) -> bool:
    """Whether an error says of itself that doing the same again may succeed: by ``retryable``, and nothing else."""
    return all(getattr(leaf, "retryable", False) is True for leaf in _leaves(error))


def is_transient(error: Exception) -> bool:
    """Whether an attempt to connect that raised this may succeed later: it says so, or is an OSError that does not say.

    >>> is_transient(ConnectionRefusedError()), is_transient(ValueError())
    (True, False)
    """
    # D9: by ``retryable`` wherever there is one. HandshakeFailed is an OSError too, through anyio's
    # ConnectionFailed, and must not count as one.
    if isinstance(error, MisuseError):
        return False
    retryable = getattr(error, "retryable", None)
    return isinstance(error, OSError) if retryable is None else retryable is True


def _of_one(errors: Errors) -> Callable[[Exception], bool]:
    # one checker sees a tuple of unknowns here, the other one no need to be told
    kinds = cast("tuple[OneKind, ...]", errors if isinstance(errors, tuple) else (errors,))  # type: ignore[redundant-cast]
    classes: list[type[Exception]] = []
    functions: list[Callable[[Exception], bool]] = []
    for each in kinds:
        if isinstance(each, type):
            _check_class(each)
            classes.append(each)
        elif not callable(each):
            raise TypeError(f"{each!r} is no class of exceptions, and no function that says which")
        else:
            functions.append(each)
    named = tuple(classes)
    if not functions:
        return lambda error: isinstance(error, named)
    return lambda error: (
        isinstance(error, named)
        or (not isinstance(error, ExceptionGroup) and any(function(error) for function in functions))
    )


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        group = cast("ExceptionGroup[Exception]", error)  # isinstance cannot say what kind of exceptions it holds
        for each in group.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _check_class(each: type) -> None:
    if not issubclass(each, BaseException):
        raise TypeError(f"{each!r} is no class of exceptions")
    if not issubclass(each, Exception):
        raise TypeError(f"{each.__name__} is no Exception: it ends a task or a program, and is never retried")
