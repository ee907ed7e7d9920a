"""The command line: tunnels, what is needed to operate them, and files to configure them.

Nothing heavy is imported before a command needs it, so that ``--help`` and a mistyped option answer at once.

    _app      the commands and their options; what becomes of errors
    _options  what was typed, on top of a file: keys, stacks
    _check    what is wrong or unwise in a file
    _init     files to begin with
    _demo     the demo without a picture      _view      its picture
    _tunnel   listen and forward: signals     _ping      round trips
    _operate  what stands beside a tunnel     _notify    the service manager
    _status   how a tunnel stands, as values  _admin     the socket that tells it, and takes orders
    _top      the live view of it             _sessions  single questions and orders
    _web      health and a page over HTTP     _metrics   for Prometheus
    _log      text or JSON                    _format    numbers for people
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the entry point of ``towline``.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code; ``towline --help`` says what each means.
    """
    if any(importlib.util.find_spec(name) is None for name in ("typer", "rich")):
        print("towline: the command line needs typer and rich: pip install 'towline[cli]'", file=sys.stderr)
        return 2
    from ._app import run

    _hold_standard_streams()
    return run(argv)


def _hold_standard_streams() -> None:
    """Give each of descriptors 0, 1 and 2 that is closed something harmless.

    Else the next socket or file would get that number, be written to by whoever prints, and end an event loop that
    takes it for a standard stream.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
