"""What a number or a text stands for, said in its annotation: for readers, and for `towline.config`, which reads "5s"
where seconds are meant and "64KiB" where bytes are."""

from __future__ import annotations

import enum
import os
from typing import Annotated, TypeAlias

__all__ = ["Bytes", "FileMode", "FilePath", "Seconds", "Unit"]


class Unit(enum.Enum):
    """What it stands for."""

    SECONDS = "s"
    BYTES = "B"
    FILE_MODE = "mode"
    FILE_PATH = "path"


Seconds: TypeAlias = Annotated[float, Unit.SECONDS]
"""A length of time."""

Bytes: TypeAlias = Annotated[int, Unit.BYTES]
"""A size."""

FileMode: TypeAlias = Annotated[int, Unit.FILE_MODE]
"""The permissions of a file, as ``chmod`` takes them: 0o600."""

FilePath: TypeAlias = Annotated[str | os.PathLike[str], Unit.FILE_PATH]
"""Where a file is. In a configuration a relative one is taken from where that stands."""
