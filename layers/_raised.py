"""Errors that one task meets and others raise."""

from __future__ import annotations

import copy
from types import TracebackType

__all__ = ["copy_of", "trim"]


def trim(error: Exception, file: str) -> None:
    """Take from an error's traceback the frames of ``file`` that come first.

    They hold a service that is going to hold the error, and nobody would free the one without the other.
    """
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == file:
        traceback = traceback.tb_next
    error.__traceback__ = traceback


def copy_of(error: Exception) -> Exception | None:
    """An error like this one that nobody has raised yet; None if its class does not let itself be copied.

    Whoever raises what another task has met needs one of its own: an object that several tasks raise collects the
    tracebacks of them all, and what one of them writes on it, all would read.

    >>> copy_of(ConnectionRefusedError(111, "Connection refused"))
    ConnectionRefusedError(111, 'Connection refused')
    """
    try:
        copied = copy.copy(error)
    except Exception:  # it takes other arguments than it keeps, say
        return None
    return copied if type(copied) is type(error) else None
