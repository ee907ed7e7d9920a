"""The commands and their options, and what becomes of an error: one line and an exit code, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

import typer

from towline.errors import TowlineError

from ._failure import CLEAN, FAILED, INTERRUPTED, Failure, exit_code
from ._log import LogFormat, complain, set_up_log

__all__ = ["app", "run"]

R = TypeVar("R")

EXIT_CODES: Final = """\
Exit codes:

\b
  0  all went well
  1  it failed while it ran: an unknown host, a port in use, a lost session, connections cut off
  2  the command line, a key file or an endpoint is wrong
  3  refused: one end does not accept the other's key, or what answers is no towline
  4  gave up: the other end was not reached, or not found again, in time
"""

PING_PATIENCE: Final = 5.0
"""How long ping tries to connect: somebody looks at it."""

app = typer.Typer(
    name="towline",
    help="Connections that outlive the network.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    # Plain help needs no import of rich, and errors are shown by `run`.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PskFile = Annotated[
    str | None, typer.Option("--psk-file", metavar="FILE", help="The key that both ends share (towline keygen FILE).")
]
KeysFile = Annotated[
    str | None, typer.Option("--keys", metavar="FILE", help="This end's own key pair (towline keygen --static FILE).")
]
PeerKey = Annotated[
    str | None, typer.Option("--peer", metavar="KEY", help="With --keys: the server's public key, in base64.")
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read all this from a file (towline init makes one). Options override the environment, which overrides "
        "the file.",
    ),
]
Heartbeat = Annotated[
    str | None,
    typer.Option(
        "--heartbeat",
        metavar="TIME",
        help="Ping when nothing was heard for so long; dead after three times that.  [default: 5s]",
    ),
]
Buffer = Annotated[
    str | None,
    typer.Option(
        "--buffer",
        metavar="SIZE",
        help="What each connection may have under way to the other end. When it is full, for example since the "
        "link is down, the program that sends is made to wait. Nothing is dropped.  [default: 8MiB]",
    ),
]
Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, help="Log connections and links; -vv logs more.", show_default=False),
]
Format = Annotated[LogFormat, typer.Option("--log-format", help="How records are written to stderr: one a line.")]
AdminSocket = Annotated[
    str | None,
    typer.Option("--admin", metavar="PATH", help="A Unix socket for towline top, sessions, drain and reconnect."),
]
MetricsAddress = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="[HOST:]PORT",
        help="Answer HTTP there, 127.0.0.1 by default: /, /livez, /readyz, /metrics.",
    ),
]
Socket = Annotated[str, typer.Argument(metavar="SOCKET", help="The PATH that the program was given by --admin.")]


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        code = app(args=None if argv is None else list(argv), prog_name="towline", standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Failure, TowlineError, OSError) as error:
        for line in (str(error) or type(error).__name__).splitlines():
            complain(_line(line))
        return exit_code(error)
    except Exception as error:
        # The parser's own errors. It comes with typer in some versions and as click in others.
        message: Callable[[], str] | None = getattr(error, "format_message", None)
        if message is not None:
            text = _line(message())
            if text:  # none: the help was shown in its place
                complain(text)
            return int(getattr(error, "exit_code", FAILED))
        if isinstance(error, typer.Exit):
            return error.exit_code
        if isinstance(error, typer.Abort):
            return INTERRUPTED
        raise
    return code if isinstance(code, int) else CLEAN


def _line(text: str) -> str:
    return " ".join(text.split())


def _run_async(function: Callable[[], Awaitable[R]], *, uvloop: bool = True) -> R:
    """Run on asyncio, with uvloop where that is installed.

    Args:
        function: what to run.
        uvloop: False for what measures time: uvloop's clock moves in steps of a millisecond.
    """
    import importlib.util

    import anyio

    options: dict[str, Any] = {}
    if uvloop and sys.platform != "win32" and importlib.util.find_spec("uvloop") is not None:
        options["use_uvloop"] = True
    return anyio.run(function, backend_options=options)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"towline {version('towline')}")
        raise typer.Exit


@app.callback()
def _towline(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


# --- the demo ------------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def demo(
    messages: Annotated[int, typer.Option(help="Messages in each direction.", metavar="N")] = 100_000,
    size: Annotated[int, typer.Option(help="Bytes in a message, 16 at least.", metavar="BYTES")] = 128,
    cut_every: Annotated[
        float, typer.Option("--cut-every", help="A link lives so long, on average; 0: for ever.", metavar="SECONDS")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Of everything random: contents, and where links are cut.")] = 1,
    endpoint: Annotated[
        str, typer.Option(help="What is used: tcp, unix (a temporary socket), or an endpoint.", metavar="ENDPOINT")
    ] = "tcp",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one object, last on stdout.")] = False,
) -> int:
    """See messages survive a link that keeps being cut; exits with 0 only if none was lost, doubled, moved or changed.

    A server, a client, and a real link between them that is cut at random bytes: reset, closed, and turned into a
    black hole, in turn. Both send all the time, for about ten seconds.
    """
    from ._demo import Settings, run_demo
    from ._view import open_view

    settings = Settings.checked(messages=messages, size=size, cut_every=cut_every, seed=seed, endpoint=endpoint)
    set_up_log(-1)
    with open_view(to_stderr=as_json) as view:
        report = _run_async(lambda: run_demo(settings, view.show), uvloop=False)
    view.prove(report)
    if as_json:
        print(report.to_json(), flush=True)
    return CLEAN if report.is_proof else FAILED


# --- the tunnel ----------------------------------------------------------------------------------------------------


@app.command("listen", epilog=EXIT_CODES)
def listen_(
    endpoint: Annotated[
        str | None, typer.Argument(metavar="ENDPOINT", help="Where forwards connect: tcp://0.0.0.0:7000.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="ENDPOINT", help="The server program: tcp://HOST:PORT, unix:///PATH.")
    ] = None,
    config: Config = None,
    psk_file: PskFile = None,
    keys: KeysFile = None,
    allow: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --keys: the public keys that may connect, one a line.")
    ] = None,
    retry_for: Annotated[
        str | None,
        typer.Option("--retry-for", metavar="TIME", help="Keep a session without a link for so long.  [default: 5m]"),
    ] = None,
    buffer: Buffer = None,
    heartbeat: Heartbeat = None,
    admin: AdminSocket = None,
    metrics: MetricsAddress = None,
    verbose: Verbose = 0,
    log_format: Format = LogFormat.TEXT,
) -> int:
    """The far end of a tunnel: connect every session to a server program.

    Prints one line with the bound endpoint when it is ready. SIGTERM and SIGINT drain: nothing new is accepted, and
    connections have 30 s to finish; a second signal ends all at once. SIGHUP reads the key files again, and ends
    the sessions of clients that are no longer allowed.
    """
    from ._operate import Operating
    from ._options import Options, chosen, dialled, seconds, size
    from ._tunnel import run_listen

    options = Options(config, "--allow FILE")
    options.secrets(psk_file, keys, allow=allow)
    options.retry_for("--retry-for", seconds("--retry-for", retry_for))
    options.buffer("--buffer", size("--buffer", buffer))
    options.heartbeat("--heartbeat", seconds("--heartbeat", heartbeat))
    tunnel = options.read()
    end = tunnel.config.listen
    here = chosen("ENDPOINT", endpoint, end.endpoint if end else None, tunnel.config.endpoint)
    target = dialled("--to", chosen("--to", to, end.to if end else None))
    operating = Operating.of(admin, metrics, end)
    set_up_log(verbose, log_format)
    return _run_async(lambda: run_listen(tunnel, here, target, operating))


@app.command("forward", epilog=EXIT_CODES)
def forward_(
    local: Annotated[
        str | None, typer.Argument(metavar="LOCAL", help="Where programs connect: tcp://127.0.0.1:6380.")
    ] = None,
    via: Annotated[
        str | None, typer.Option(metavar="ENDPOINT", help="Where towline listen is: tcp://HOST:PORT.")
    ] = None,
    config: Config = None,
    psk_file: PskFile = None,
    keys: KeysFile = None,
    peer: PeerKey = None,
    retry_for: Annotated[
        str | None,
        typer.Option(
            "--retry-for",
            metavar="TIME",
            help="Look so long for a way back, then reset the program's connection; the far end's --retry-for "
            "and 15 s bound it, too.  [default: 5m]",
        ),
    ] = None,
    buffer: Buffer = None,
    heartbeat: Heartbeat = None,
    admin: AdminSocket = None,
    metrics: MetricsAddress = None,
    verbose: Verbose = 0,
    log_format: Format = LogFormat.TEXT,
) -> int:
    """The near end of a tunnel: carry every connection that a program makes here.

    Prints one line with the bound endpoint when it is ready. The link to the far end may be cut at any time; a
    connection is reset only when its session is lost for good. On Unix sockets, which have no reset, the program then
    sees the end of its stream. SIGTERM and SIGINT drain: nothing new is accepted, and connections have 30 s to
    finish; a second signal ends all at once. SIGHUP reads the key files again and reconnects every session now.
    """
    from ._operate import Operating
    from ._options import Options, chosen, dialled, seconds, size
    from ._tunnel import run_forward

    options = Options(config, "--peer KEY")
    options.secrets(psk_file, keys, peer=peer)
    options.retry_for("--retry-for", seconds("--retry-for", retry_for))
    options.buffer("--buffer", size("--buffer", buffer))
    options.heartbeat("--heartbeat", seconds("--heartbeat", heartbeat))
    tunnel = options.read()
    end = tunnel.config.forward
    here = chosen("LOCAL", local, end.local if end else None)
    there = dialled("--via", chosen("--via", via, tunnel.config.endpoint))
    operating = Operating.of(admin, metrics, end)
    set_up_log(verbose, log_format)
    return _run_async(lambda: run_forward(tunnel, here, there, options.patience(tunnel), operating))


@app.command(epilog=EXIT_CODES)
def ping(
    endpoint: Annotated[
        str | None, typer.Argument(metavar="ENDPOINT", help="Where towline listen is: tcp://HOST:PORT.")
    ] = None,
    config: Config = None,
    psk_file: PskFile = None,
    keys: KeysFile = None,
    peer: PeerKey = None,
    count: Annotated[int, typer.Option(help="Round trips; 0: until it is interrupted.", metavar="N")] = 4,
    interval: Annotated[float, typer.Option(help="Seconds between them.", metavar="SECONDS")] = 1.0,
    verbose: Verbose = 0,
    log_format: Format = LogFormat.TEXT,
) -> int:
    """Measure round trips to a towline listen, through the whole stack.

    It opens one session, for which the far end makes one connection to its target, and sends nothing over it: what
    is measured are the heartbeats of the link below.
    """
    from ._options import Options, chosen, dialled, positive
    from ._ping import run_ping

    if count < 0:
        raise Failure(f"--count: {count}, where 0 or more is needed")
    options = Options(config, "--peer KEY")
    options.secrets(psk_file, keys, peer=peer)
    options.retry_for("ping", PING_PATIENCE)
    options.heartbeat("--interval", positive("--interval", interval))
    tunnel = options.read()
    there = dialled("ENDPOINT", chosen("ENDPOINT", endpoint, tunnel.config.endpoint))
    set_up_log(verbose, log_format)
    return _run_async(lambda: run_ping(tunnel.stack, there, count, interval), uvloop=False)


# --- configuration --------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="TOML, JSON or YAML, by the ending of its name.")],
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read only this table of it, such as tool.app.link.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there is any advice.")] = False,
    environment: Annotated[
        bool, typer.Option("--environment", help="Let TOWLINE__... variables override the file, as commands do.")
    ] = False,
) -> int:
    """Check a configuration: say what is wrong and in which line, draw the stack, and advise against what is unwise.

    Files that it names, such as keys, must be there.
    """
    from ._check import run_check

    return run_check(file, table, strict=strict, environment=environment)


@app.command(epilog=EXIT_CODES)
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors that complete and check as you type."""
    import json

    from towline.config import TunnelConfig

    print(json.dumps(TunnelConfig.model_json_schema(), indent=2))


def _known_cases(beginning: str) -> list[str]:
    from ._init import CASES

    return [case for case in CASES if case.startswith(beginning)]


@app.command(epilog=EXIT_CODES)
def init(
    case: Annotated[
        str,
        typer.Argument(
            metavar="CASE", help="One of: tunnel, tunnel-keys, calls, sessions, tls.", autocompletion=_known_cases
        ),
    ],
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A new file; by default it is printed.")] = None,
) -> None:
    """Write a configuration with comments, to begin with: for a tunnel, or for a program of yours."""
    from ._init import run_init

    run_init(case, file)


# --- a program that runs -------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def top(socket: Socket) -> int:
    """Watch a listen or forward: its sessions, what they carry, and each link that is cut, as it happens.

    On a terminal it is redrawn four times a second, until q or Ctrl-C; elsewhere it prints lines. When the program is
    restarted, it goes on with the new one.
    """
    from ._admin import socket_at
    from ._top import run_top

    endpoint = socket_at("SOCKET", socket)
    set_up_log(-1)
    return _run_async(lambda: run_top(endpoint))


@app.command(epilog=EXIT_CODES)
def sessions(
    socket: Socket,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known, as one object.")] = False,
) -> int:
    """Show the sessions of a listen or forward as they stand now."""
    from ._admin import socket_at
    from ._sessions import run_sessions

    endpoint = socket_at("SOCKET", socket)
    set_up_log(-1)
    return _run_async(lambda: run_sessions(endpoint, as_json=as_json))


@app.command(epilog=EXIT_CODES)
def reconnect(
    socket: Socket,
    session: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A session, as towline sessions shows it; default: all.")
    ] = None,
) -> int:
    """Give a session a new link now: a forward dials while the old link serves; a listen cuts it, and is dialled."""
    from ._admin import socket_at
    from ._sessions import run_reconnect

    endpoint = socket_at("SOCKET", socket)
    set_up_log(-1)
    return _run_async(lambda: run_reconnect(endpoint, session or ""))


@app.command(epilog=EXIT_CODES)
def drain(
    socket: Socket,
    timeout: Annotated[
        float, typer.Option(help="How long connections may take to finish.", metavar="SECONDS", min=0)
    ] = 30.0,
) -> int:
    """Let a listen or forward end as SIGTERM does, and wait for it; exits with 1 if connections were cut off."""
    from ._admin import socket_at
    from ._sessions import run_drain

    endpoint = socket_at("SOCKET", socket)
    set_up_log(-1)
    return _run_async(lambda: run_drain(endpoint, timeout))


# --- keys ----------------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def keygen(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A new file, readable by its owner only.")],
    static: Annotated[
        bool, typer.Option("--static", help="A key pair in place of a shared key; prints its public line.")
    ] = False,
) -> None:
    """Make a key. Without --static: a secret for both ends; copy the file over a safe channel.

    With --static: this end's key pair. The line that is printed is public: it goes into the other end's allow-list, and
    its second word into --peer.
    """
    from towline.layers.encryption.keys import Psk, StaticKey

    if static:
        key = StaticKey.generate()
        key.write(file)
        print(key.public_line())
    else:
        psk = Psk.generate()
        psk.write(file)
        print(psk.fingerprint)
