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
        if type(copied) is not type(error) or copied.args != error.args:  # its __init__ makes its text, say
            copied = _without_init(error)
    except Exception:
        try:
            copied = _without_init(error)
        except Exception:
            return None
    if "__notes__" in copied.__dict__:
        copied.__notes__ = list(copied.__notes__)
    return copied


def _without_init(error: Exception) -> Exception:
    made = type(error).__new__(type(error), *error.args)
    if type(made) is not type(error):
        raise TypeError
    made.args = error.args
    made.__dict__.update(error.__dict__)
    if isinstance(error, OSError) and isinstance(made, OSError):
        for name in ("errno", "strerror", "filename", "filename2"):
            if getattr(error, name) is not None:
                setattr(made, name, getattr(error, name))
    return made
