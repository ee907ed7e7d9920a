"""The few calls of Windows that named pipes need, and the numbers that go with them.

Everything above talks to the protocol `WinApi`, so that all of it runs on any system over a stand-in.
`Kernel32` is the real one. It decides nothing: each method is one call, and gives back the code that the call
left behind, 0 for success.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

__all__ = ["Kernel32", "Operation", "WinApi", "describe"]

FILE_NOT_FOUND: Final = 2
ACCESS_DENIED: Final = 5
HANDLE_EOF: Final = 38
BROKEN_PIPE: Final = 109
SEM_TIMEOUT: Final = 121
PIPE_BUSY: Final = 231
NO_DATA: Final = 232
PIPE_NOT_CONNECTED: Final = 233
PIPE_CONNECTED: Final = 535
OPERATION_ABORTED: Final = 995
IO_PENDING: Final = 997

_TEXTS: Final = {
    FILE_NOT_FOUND: "nobody listens on it",
    ACCESS_DENIED: "access denied",
    HANDLE_EOF: "the end was reached",
    BROKEN_PIPE: "the other end was closed",
    SEM_TIMEOUT: "the system's time limit has passed",
    PIPE_BUSY: "all instances of the pipe are in use",
    NO_DATA: "the other end is being closed",
    PIPE_NOT_CONNECTED: "the other end has disconnected",
    OPERATION_ABORTED: "the operation was cancelled",
}


def describe(code: int) -> str:
    """A Windows error code in words.

    >>> describe(231)
    'all instances of the pipe are in use (Windows error 231)'
    """
    return f"{_TEXTS.get(code, 'the system refuses')} (Windows error {code})"


class Operation:
    """One overlapped operation, from its start until its buffer is the system's no more.

    Attributes:
        buffer: what is read into or written from; the system may use it until the operation is complete.
        code: how it ended; None while it has not.
        n: the bytes that it moved.
        native: what the `WinApi` keeps with it.
    """

    __slots__ = ("buffer", "code", "n", "native")

    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer
        self.code: int | None = None
        self.n = 0
        self.native: Any = None


class WinApi(Protocol):
    """What is called. No method blocks, except `result`."""

    def create_named_pipe(self, path: str, *, first: bool, instances: int, size: int) -> tuple[int, int]:
        """A new instance for this process's user alone, not from the network, in bytes, overlapped: handle
        and code.

        Args:
            first: fail if there is an instance already, whosever it is.
            instances: the most that there may be.
            size: bytes that the system buffers in each direction.
        """
        ...

    def create_file(self, path: str) -> tuple[int, int]:
        """Connect to an instance, letting the server identify us but not act for us: handle and code."""
        ...

    def prepare(self, operation: Operation) -> int:
        """Before an operation is started: code."""
        ...

    def connect_named_pipe(self, handle: int, operation: Operation) -> int: ...

    def read_file(self, handle: int, operation: Operation) -> int: ...

    def write_file(self, handle: int, operation: Operation) -> int: ...

    def result(self, handle: int, operation: Operation) -> tuple[int, int]:
        """Wait until an operation that was started is complete: code, and bytes moved. Called in any
        thread."""
        ...

    def cancel(self, handle: int, operation: Operation | None) -> None:
        """Cancel one operation, or all; each then completes, with `OPERATION_ABORTED` unless it was done
        before."""
        ...

    def release(self, operation: Operation) -> None:
        """After an operation is complete."""
        ...

    def disconnect_named_pipe(self, handle: int) -> None:
        """Server only: cut the client off; what it has not read is lost to it."""
        ...

    def close_handle(self, handle: int) -> None: ...


# Each is as the Windows headers have it.
_INVALID_HANDLE: Final = ctypes.c_void_p(-1).value or 0
_PIPE_ACCESS_DUPLEX: Final = 0x3
_FILE_FLAG_OVERLAPPED: Final = 0x40000000
_FILE_FLAG_FIRST_PIPE_INSTANCE: Final = 0x00080000
_PIPE_TYPE_BYTE: Final = 0x0
_PIPE_REJECT_REMOTE_CLIENTS: Final = 0x8
_GENERIC_READ_WRITE: Final = 0xC0000000
_OPEN_EXISTING: Final = 3
_SECURITY_SQOS_PRESENT: Final = 0x00100000
_SECURITY_IDENTIFICATION: Final = 0x00010000

_OWNER_ONLY: Final = "D:P(D;;GA;;;NU)(A;;GA;;;OW)"
"""Nobody who comes over the network, then all rights for the owner, and nobody else: the default descriptor
would let everyone on the machine read."""


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", ctypes.c_size_t),
        ("internal_high", ctypes.c_size_t),
        ("offset", ctypes.c_uint32),
        ("offset_high", ctypes.c_uint32),
        ("event", ctypes.c_void_p),
    )


class _SecurityAttributes(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("descriptor", ctypes.c_void_p),
        ("inherit", ctypes.c_int),
    )


class Kernel32:
    """`WinApi` by ctypes.

    Raises:
        OSError: if this is not Windows.
    """

    def __init__(self) -> None:
        load: Any = getattr(ctypes, "WinDLL", None)  # Any: ctypes has these on Windows only
        if load is None:
            raise OSError("there is no kernel32 on this system")
        self._last_error: Any = getattr(ctypes, "get_last_error")  # noqa: B009 -- see above
        self._kernel: Any = load("kernel32", use_last_error=True)
        self._advapi: Any = load("advapi32", use_last_error=True)
        handle, dword, pointer = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
        text, boolean = ctypes.c_wchar_p, ctypes.c_int
        for function, result, arguments in (
            (self._kernel.CreateNamedPipeW, handle, (text, *[dword] * 6, pointer)),
            (self._kernel.CreateFileW, handle, (text, dword, dword, pointer, dword, dword, handle)),
            (self._kernel.CreateEventW, handle, (pointer, boolean, boolean, text)),
            (self._kernel.ConnectNamedPipe, boolean, (handle, pointer)),
            (self._kernel.ReadFile, boolean, (handle, pointer, dword, pointer, pointer)),
            (self._kernel.WriteFile, boolean, (handle, pointer, dword, pointer, pointer)),
            (self._kernel.GetOverlappedResult, boolean, (handle, pointer, pointer, boolean)),
            (self._kernel.CancelIoEx, boolean, (handle, pointer)),
            (self._kernel.DisconnectNamedPipe, boolean, (handle,)),
            (self._kernel.CloseHandle, boolean, (handle,)),
            (self._kernel.LocalFree, handle, (handle,)),
            (
                self._advapi.ConvertStringSecurityDescriptorToSecurityDescriptorW,
                boolean,
                (text, dword, pointer, pointer),
            ),
        ):
            function.restype = result
            function.argtypes = arguments

    def _code(self, succeeded: object) -> int:
        return 0 if succeeded else int(self._last_error())

    def _handle(self, handle: int | None) -> tuple[int, int]:
        if handle is None or handle == _INVALID_HANDLE:
            return 0, self._code(False)
        return handle, 0

    def create_named_pipe(self, path: str, *, first: bool, instances: int, size: int) -> tuple[int, int]:
        descriptor = ctypes.c_void_p()
        convert = self._advapi.ConvertStringSecurityDescriptorToSecurityDescriptorW
        if not convert(_OWNER_ONLY, 1, ctypes.byref(descriptor), None):
            return 0, self._code(False)
        try:
            attributes = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, 0)
            access = _PIPE_ACCESS_DUPLEX | _FILE_FLAG_OVERLAPPED
            return self._handle(
                self._kernel.CreateNamedPipeW(
                    path,
                    access | (_FILE_FLAG_FIRST_PIPE_INSTANCE if first else 0),
                    _PIPE_TYPE_BYTE | _PIPE_REJECT_REMOTE_CLIENTS,
                    instances,
                    size,
                    size,
                    0,
                    ctypes.byref(attributes),
                )
            )
        finally:
            self._kernel.LocalFree(descriptor)

    def create_file(self, path: str) -> tuple[int, int]:
        flags = _FILE_FLAG_OVERLAPPED | _SECURITY_SQOS_PRESENT | _SECURITY_IDENTIFICATION
        return self._handle(self._kernel.CreateFileW(path, _GENERIC_READ_WRITE, 0, None, _OPEN_EXISTING, flags, None))

    def prepare(self, operation: Operation) -> int:
        event = self._kernel.CreateEventW(None, True, False, None)
        if not event:
            return self._code(False)
        overlapped = _Overlapped(event=event)
        # The array shares its memory with the bytearray, which can neither move nor shrink while it exists.
        array = (ctypes.c_char * len(operation.buffer)).from_buffer(operation.buffer)
        operation.native = (overlapped, array)
        return 0

    def connect_named_pipe(self, handle: int, operation: Operation) -> int:
        return self._code(self._kernel.ConnectNamedPipe(handle, ctypes.byref(operation.native[0])))

    def read_file(self, handle: int, operation: Operation) -> int:
        overlapped, array = operation.native
        return self._code(self._kernel.ReadFile(handle, array, len(array), None, ctypes.byref(overlapped)))

    def write_file(self, handle: int, operation: Operation) -> int:
        overlapped, array = operation.native
        return self._code(self._kernel.WriteFile(handle, array, len(array), None, ctypes.byref(overlapped)))

    def result(self, handle: int, operation: Operation) -> tuple[int, int]:
        n = ctypes.c_uint32()
        done = self._kernel.GetOverlappedResult(handle, ctypes.byref(operation.native[0]), ctypes.byref(n), True)
        return self._code(done), n.value

    def cancel(self, handle: int, operation: Operation | None) -> None:
        self._kernel.CancelIoEx(handle, None if operation is None else ctypes.byref(operation.native[0]))

    def release(self, operation: Operation) -> None:
        overlapped, _ = operation.native
        operation.native = None
        self._kernel.CloseHandle(overlapped.event)

    def disconnect_named_pipe(self, handle: int) -> None:
        self._kernel.DisconnectNamedPipe(handle)

    def close_handle(self, handle: int) -> None:
        self._kernel.CloseHandle(handle)
