"""Which errors something applies to: one way of saying it, for every layer that must know.

An error matches a class, one of several classes, or a predicate. An `ExceptionGroup` matches when every leaf of it
does: a group with one error that must not be retried must not be either. What is no `Exception` (a cancellation, a
keyboard interrupt) never comes here, and cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

__all__ = ["Errors", "excluder", "matcher", "says_retryable"]

Errors: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
"""Which errors: a class, a tuple of classes, or a function that says so of one that is no group."""


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


def _of_one(errors: Errors) -> Callable[[Exception], bool]:
    if isinstance(errors, (type, tuple)):
        classes = cast("tuple[type[Exception], ...]", errors if isinstance(errors, tuple) else (errors,))
        for each in classes:
            _check_class(each)
        return lambda error: isinstance(error, classes)
    if not callable(errors):
        raise TypeError(f"{errors!r} is neither a class of exceptions, nor a tuple of them, nor a function")
    return lambda error: not isinstance(error, ExceptionGroup) and errors(error)


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        group = cast("ExceptionGroup[Exception]", error)  # isinstance cannot say what kind of exceptions it holds
        for each in group.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _check_class(each: object) -> None:
    if not isinstance(each, type) or not issubclass(each, BaseException):
        raise TypeError(f"{each!r} is no class of exceptions")
    if not issubclass(each, Exception):
        raise TypeError(f"{each.__name__} is no Exception: it ends a task or a program, and is never retried")
