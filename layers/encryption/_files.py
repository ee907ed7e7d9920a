"""Files that hold keys: who may read them, and how they are written so that nobody else ever can.

Every failure is a `KeyFileError` that names the file and never shows what is in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Final

from towline.errors import KeyFileError

__all__ = ["expand", "read_public", "read_secret", "replace_file", "write_new"]

MAX_KEY_FILE: Final = 1 << 20
"""No file of keys is longer: a wrong path, such as a device, must not fill the memory."""


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` filled in.

    Raises:
        KeyFileError: if it is the home of nobody.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise KeyFileError(f"{os.fspath(path)}: there is no such home directory") from None


def read_secret(path: Path) -> bytes:
    """Read a file that only its owner may read.

    Raises:
        KeyFileError: if it cannot be read, or others than its owner have access to it (not checked on
            Windows, whose modes say nothing).
    """
    return _read(path, secret=True)


def read_public(path: Path) -> str:
    """Read a file of public keys.

    Raises:
        KeyFileError: if it cannot be read, or is not text.
    """
    try:
        return _read(path, secret=False).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: not a text file") from None


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        # Nobody may ever write to what is a pipe; and a device has no end.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            # Asked of the open file, not of its name, which may mean another file by now.
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise KeyFileError(f"{path}: is not a file that holds something")
            mode = stat.S_IMODE(info.st_mode)
            if secret and sys.platform != "win32" and mode & 0o077:
                raise KeyFileError(f"{path}: others than its owner have access (mode {mode:04o}); chmod 600 it")
            data = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_KEY_FILE:
        raise KeyFileError(f"{path}: longer than {MAX_KEY_FILE:,} bytes; that is no file of keys")
    return data


def write_new(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, and that was not there before.

    Raises:
        KeyFileError: if it is there already, or cannot be written.
    """
    try:
        # The mode is given at creation: a chmod afterwards would leave a moment for others.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_BINARY", 0)  # Windows alone has, and needs, that one
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise KeyFileError(f"{path}: is there already, and is not overwritten") from None
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()  # half a key is worse than none
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error


def replace_file(path: Path, text: str) -> None:
    """Put ``text`` in the place of what the file held, whole or not at all.

    Raises:
        KeyFileError: if it cannot be written; the file is then what it was.
    """
    temporary = None
    try:
        path = path.resolve()  # through a symbolic link, not over it
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error
