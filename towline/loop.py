"""Which event loop runs this: asyncio's (uvloop's is one), or trio's. Here alone is that asked.

anyio hides the difference, and nearly all code is the better for it. What is done for every call or every read is not:
there a loop's own timer, future or callback costs a third of what serves both.
"""

from __future__ import annotations

from asyncio import CancelledError

import anyio

try:
    from sniffio import current_async_library_cvar as _library
except ImportError:  # anyio does without it, too, and then asks asyncio itself
    _library = None  # type: ignore[assignment]

__all__ = ["is_asyncio", "tell_anyio"]


def is_asyncio() -> bool:
    """Whether asyncio runs this, by whatever loop.

    Raises:
        RuntimeError: outside an event loop.
    """
    return anyio.get_cancelled_exc_class() is CancelledError


def tell_anyio() -> None:
    """Let anyio know in the current context that asyncio runs it, where no task says so: in a callback of the loop's.

    Where ``anyio.run`` has started the loop a context variable says it too, but an application may start it otherwise.
    """
    if _library is not None:
        _library.set("asyncio")
