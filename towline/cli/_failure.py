"""What ends the program with one line and an exit code. The codes are here, and nowhere else."""

from __future__ import annotations

from towline.errors import (
    HandshakeFailed,
    LossReason,
    MisuseError,
    SessionLost,
)

__all__ = ["CLEAN", "FAILED", "GAVE_UP", "INTERRUPTED", "REFUSED", "USAGE", "Failure", "exit_code"]

CLEAN = 0
FAILED = 1
USAGE = 2
REFUSED = 3
GAVE_UP = 4
INTERRUPTED = 130


class Failure(Exception):
    """The program ends with this line.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ends the program.

    >>> exit_code(MisuseError("a bad option"))
    2
    """
    match error:
        case Failure():
            return error.code
        case MisuseError():
            return USAGE
        case HandshakeFailed():
            return GAVE_UP if error.retryable else REFUSED
        case SessionLost(reason=LossReason.GAVE_UP | LossReason.EXPIRED):
            return GAVE_UP
        case SessionLost(reason=LossReason.REVOKED):
            return REFUSED
        case _:
            return FAILED
