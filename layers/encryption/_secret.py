"""What all objects that hold a key have in common: no pickles, and copies only where they are harmless."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

__all__ = ["Unpicklable"]


class Unpicklable:
    """A mixin: `pickle`, `copy.copy` and `copy.deepcopy` raise TypeError.

    A pickle would carry the key to a place that nobody watches; two copies of a cipher state would use one
    nonce twice, which gives both plaintexts away.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a secret: it cannot be pickled or copied")
