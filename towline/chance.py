"""Where random numbers come from, unless somebody says otherwise: the system, which nobody has to seed."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["SystemRandom"]


class SystemRandom(random.SystemRandom):
    """The system's generator. It has no state, so a copy or a pickle of it is just another one.

    >>> import copy
    >>> 0 <= copy.deepcopy(SystemRandom()).random() < 1
    True
    """

    def __reduce__(self) -> tuple[type[SystemRandom], tuple[()]]:
        return SystemRandom, ()

    def __deepcopy__(self, memo: Any) -> SystemRandom:
        return self
