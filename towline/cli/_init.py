"""``towline init``: configurations to begin with, each with its comments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ._failure import Failure

__all__ = ["CASES", "run_init"]

_HEAD: Final = """\
# {title}
#
#   towline check {name}     what is wrong or unwise here, and what stack it makes
#
# Durations: "250ms", "5s", "1m30s", "2h". Sizes: "64KiB", "16MiB". Relative paths start at this file.
# A variable of the environment overrides it: TOWLINE__LAYERS__0__TTL=10m is "ttl" of the first layer.
"""

_SESSION: Final = """\
# Layers, outermost first. Both ends must have the same, but for those that only the dialling end uses.

# Sessions that outlive their links.
[[layers]]
kind = "resume"
ttl = "5m"                # a session without a link lives so long
buffer = "8MiB"           # what may be under way to the other end; when it is full, the sender waits

# How the dialling end comes back.
[[layers]]
kind = "retry"
policy = { kind = "exponential", cap = "30s" }

# Notices a link that is silent, and so dead.
[[layers]]
kind = "heartbeat"
interval = "5s"
timeout = "15s"

[[layers]]
kind = "framing"
"""

_PSK: Final = """
# One key that both ends share. Make it with: towline keygen psk
[[layers]]
kind = "encryption"
psk = { file = "psk" }
"""

_ENDS: Final = """\
# Where the two ends meet.
endpoint = "tcp://server.example:7000"

# towline listen --config {name}: beside the server program.
[listen]
endpoint = "tcp://*:7000"         # all interfaces
to = "tcp://127.0.0.1:5432"       # the server program

# towline forward --config {name}: where clients are.
[forward]
local = "tcp://127.0.0.1:5432"    # clients connect here

"""

CASES: Final[Mapping[str, tuple[str, str]]] = {
    "tunnel": ("A tunnel for any TCP program, with one key that both ends share.", _ENDS + _SESSION + _PSK),
    "tunnel-keys": (
        "A tunnel for any TCP program, in which each end has a key pair of its own.",
        _ENDS
        + _SESSION
        + """
# Make this end's pair with: towline keygen --static key
# It prints a line, which goes into the file "allow" of the other end. SIGHUP reads both files again.
[[layers]]
kind = "encryption"

[layers.keys]
key = { file = "key" }
trust = { kind = "allow-list", file = "allow" }
""",
    ),
    "calls": (
        "Calls with answers, for a program of yours: both its server and its clients.",
        """\
#   config = StackConfig.from_file("{name}", environ=os.environ)
#   async with config.build().serve(config.endpoint, router): ...        the server
#   async with config.build().open() as client: await client(request)    a client

endpoint = "tcp://server.example:7000"

# A call has so long, with all its attempts.
[[layers]]
kind = "timeout"
seconds = "10s"

# Calls that failed, and may be made again. A budget keeps retries from making an overload worse.
[[layers]]
kind = "retry"
policy = { kind = "standard-policy", max_attempts = 3 }

# Connects to the endpoint when a call needs it, and again when the connection is lost for good.
[[layers]]
kind = "reconnect"

[[layers]]
kind = "rpc"
max_calls = 1000

"""
        + _SESSION
        + _PSK,
    ),
    "sessions": (
        "Messages that arrive once and in order, for a program of yours: both its ends.",
        """\
#   config = StackConfig.from_file("{name}", environ=os.environ)
#   async with config.build().serve(config.endpoint, handler): ...               one end
#   async with config.build().connect(config.endpoint) as session: ...           the other

endpoint = "tcp://server.example:7000"

"""
        + _SESSION
        + _PSK,
    ),
    "tls": (
        "A tunnel with certificates (X.509) in the place of keys.",
        _ENDS
        + _SESSION
        + """
# Each end needs its own part only: [layers.server] to listen, [layers.client] to dial.
[[layers]]
kind = "tls"

[layers.server]
certificate = "server.pem"
key = "server.key"
client_ca = "clients-ca.pem"      # who may connect: only those with a certificate of this authority

[layers.client]
ca = "server-ca.pem"              # who the server must be certified by; left out, the system's authorities
certificate = "client.pem"
key = "client.key"
""",
    ),
}
"""The cases, with a title and the text. ``{name}`` in it is the file's."""


def run_init(case: str, file: str | None) -> None:
    """Print a configuration, or write it to a new file.

    Raises:
        Failure: if there is no such case, or the file is there already.
    """
    if case not in CASES:
        raise Failure(f"CASE: there is no {case!r}: {', '.join(CASES)}")
    title, text = CASES[case]
    name = Path(file).name if file is not None else "towline.toml"
    text = f"{_HEAD.format(title=title, name=name)}\n{text.replace('{name}', name)}"
    if file is None:
        print(text, end="")
        return
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise Failure(f"{file}: is there already, and is not overwritten") from None
    except OSError as error:
        raise Failure(f"{file}: cannot be written: {error.strerror}") from None
    print(f"{file} is written: change it to your needs, then: towline check {file}")
