"""What people type: values, mistakes, and the one line that answers a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from towline.cli import main
from towline.cli._failure import Failure, exit_code
from towline.cli._options import FileKeys, Options, seconds, size
from towline.errors import (
    ConfigError,
    ConnectFailed,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    KeyFileError,
    LossReason,
    SessionLost,
    StackError,
    TowlineError,
    UnknownHost,
)
from towline.layers.encryption.keys import Psk, StaticKey

TARGET = "tcp://127.0.0.1:1"


@pytest.fixture
def psk_file(tmp_path: Path) -> str:
    path = tmp_path / "psk"
    Psk.generate().write(path)
    return str(path)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --messages 0", "--messages: 0, where 1 to 100,000,000 will do"),
        ("demo --size 15", "--size: 15, where 16 to"),
        ("demo --size 5000000", "--size: 5,000,000, where 16 to 4,194,304 will do"),
        ("demo --cut-every -1", "--cut-every: -1 s, where 0.01 or more will do"),
        ("demo --messages many", "--messages"),
        ("demo --endpoint pipe://x", "--endpoint: the demo runs over tcp and unix, not pipe://x"),
        ("demo --endpoint nonsense", "--endpoint: 'nonsense' is not an endpoint"),
        ("demo --nonsense", "--nonsense"),
        ("nonsense", "nonsense"),
        ("listen tcp://127.0.0.1:0 --psk-file {psk}", "--to is missing: give it, or --config FILE that says so"),
        ("listen --to {target} --psk-file {psk}", "ENDPOINT is missing"),
        ("listen tcp://127.0.0.1:0 --to {target}", "give either --psk-file FILE, or --keys FILE and --allow FILE"),
        ("listen nonsense --to {target} --psk-file {psk}", "ENDPOINT: 'nonsense' is not an endpoint"),
        ("listen tcp://127.0.0.1:0 --to tcp://nonsense --psk-file {psk}", "--to: 'tcp://nonsense' has no port"),
        ("listen tcp://127.0.0.1:0 --to tcp://h:0 --psk-file {psk}", "--to: tcp://h:0 can be listened on, but not"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --allow x", "give either --psk-file FILE, or"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file nowhere", "nowhere: cannot be read: No such file"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {readable}", "others than its owner have access"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {phrase}", "a pre-shared key is 32 random bytes"),
        (
            "listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --buffer lots",
            "--buffer: expected a size such as '64KiB', '16MiB' or '1GB', or a number of bytes, got 'lots'",
        ),
        (
            "listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --buffer 1KiB",
            "--buffer: 1,024 bytes, where 65,536",
        ),
        (
            "listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --retry-for 0",
            "--retry-for: 0 s, where more than 0",
        ),
        ("listen memory://x --to memory://y --psk-file {psk}", "memory://y"),
        ("listen tcp://127.0.0.1:0 --to fd://3 --psk-file {psk}", "--to: fd://3 can be listened on, but not connected"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --metrics x", "--metrics: 'x' is not an address"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --admin tcp://x:1", "--admin: tcp://x:1 is not the"),
        ("listen tcp://127.0.0.1:0 --to {target} --psk-file {psk} --log-format xml", "--log-format"),
        ("top tcp://127.0.0.1:1", "SOCKET: tcp://127.0.0.1:1 is not the path of a Unix socket"),
        ("drain /x --timeout -1", "--timeout"),
        ("forward tcp://127.0.0.1:0 --via {target} --psk-file {psk} --heartbeat 0", "--heartbeat: 0 s, where more"),
        ("forward tcp://127.0.0.1:0 --via {target} --keys {psk}", "give either --psk-file FILE, or --keys FILE and"),
        ("forward tcp://127.0.0.1:0 --via {target} --keys {psk} --peer x", "--peer: not the server's public key"),
        ("forward memory://x --via {target} --psk-file {psk}", "memory://x"),
        ("ping {target} --psk-file {psk} --count -1", "--count: -1, where 0 or more is needed"),
        ("ping {target} --psk-file {psk} --interval 0", "--interval: 0 s, where more than 0 is needed"),
        ("ping tcp://*:1 --psk-file {psk}", "ENDPOINT: tcp://*:1 can be listened on, but not connected to"),
        ("keygen {psk}", "is there already, and is not overwritten"),
        ("keygen /nowhere/key", "/nowhere/key: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str, message: str, psk_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readable, phrase = tmp_path / "readable", tmp_path / "phrase"
    readable.write_text("x")
    readable.chmod(0o644)
    phrase.write_text("correct horse battery staple")
    phrase.chmod(0o600)
    line = arguments.format(target=TARGET, psk=psk_file, readable=readable, phrase=phrase)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("towline: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert "correct horse" not in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: towline" in out + err


@pytest.mark.parametrize(
    "command", ["", "demo", "listen", "forward", "ping", "top", "sessions", "reconnect", "drain", "keygen"]
)
def test_help_says_what_the_exit_codes_mean(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Exit codes:" in out
    assert "4  gave up" in out


def test_no_key_is_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("listen", "forward", "ping"):
        main([command, "--help"])
    options = {
        word for word in capsys.readouterr().out.split() if word.startswith("--") and not word.endswith((":", "."))
    }
    assert {word for word in options if "psk" in word or "key" in word} == {"--psk-file", "--keys"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from towline.cli import main; main(['--help']);"
        "print([name for name in ('trio', 'uvloop', 'rich.live', 'h11', 'opentelemetry.sdk', 'towline.tunnel', "
        "'towline.cli._demo', 'towline.cli._admin', 'towline.testing') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


def test_without_typer_it_says_what_to_install() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a);"
        "from towline.cli import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "towline: the command line needs typer and rich: pip install 'towline[cli]'\n"


# --- exit codes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Failure("x"), 2),
        (Failure("x", 4), 4),
        (KeyFileError("x"), 2),
        (StackError("x"), 2),
        (HandshakeRefused("x"), 3),
        (HandshakeFailed("x"), 3),
        (HandshakeFailed("x", ended=True), 4),
        (HandshakeTimeout("x"), 4),
        (ConnectFailed("x"), 1),
        (UnknownHost("x"), 1),
        (SessionLost(LossReason.GAVE_UP), 4),
        (SessionLost(LossReason.EXPIRED), 4),
        (SessionLost(LossReason.REVOKED), 3),
        (SessionLost(LossReason.ABORTED), 1),
        (TowlineError("x"), 1),
        (OSError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


# --- values --------------------------------------------------------------------------------------------------------


def test_lengths_of_time_and_sizes_are_read_as_in_a_file_and_seconds_without_a_unit() -> None:
    assert [seconds("-x", text) for text in ("5", "0.5", "500ms", "1m30s", " 2 ")] == [5, 0.5, 0.5, 90, 2]
    assert [size("-x", text) for text in ("65536", "8MiB", "512 KiB", "2GB")] == [65536, 8 << 20, 512 << 10, 2 * 10**9]
    assert seconds("-x", None) is size("-x", None) is None


@pytest.mark.parametrize("text", ["", "x", "-1", "5 minutes", "1e3", "nan", "inf"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="-x: expected a duration"):
        seconds("-x", text)


@pytest.mark.parametrize(("text", "hint"), [("8M", "is it '8MiB'"), ("", "expected"), ("-1", "expected")])
def test_what_is_no_size_is_refused(text: str, hint: str) -> None:
    with pytest.raises(Failure, match=f"-x: expected a size .*{hint}|-x: {hint}"):
        size("-x", text)


def read(*, psk_file: str | None = None, keys: str | None = None, **trust: str) -> FileKeys:
    options = Options(None, "--allow FILE")
    options.secrets(psk_file, keys, **trust)
    found = options.read().keys
    assert found is not None
    return found


def test_the_peer_is_a_key_or_a_line(tmp_path: Path) -> None:
    mine, theirs = StaticKey.generate(), StaticKey.generate()
    mine.write(tmp_path / "key")
    line = theirs.public_line("the server")
    for peer in (line, " ".join(line.split()[:2]), line.split()[1]):
        assert "fingerprint" in repr(read(keys=str(tmp_path / "key"), peer=peer))


def test_keys_are_read_again(tmp_path: Path) -> None:
    anna, bert = StaticKey.generate(), StaticKey.generate()
    key_file, allow_file = tmp_path / "key", tmp_path / "allow"
    StaticKey.generate().write(key_file)
    allow_file.write_text(f"{anna.public_line('anna')}\n{bert.public_line('bert')}\n")
    keys = read(keys=str(key_file), allow=str(allow_file))
    assert keys.reload() == frozenset()
    allow_file.write_text(f"{bert.public_line('bert')}\n")
    assert keys.reload() == {anna.public_key}
    allow_file.write_text("nonsense\n")
    before = repr(keys)
    with pytest.raises(ConfigError, match="line 1"):
        keys.reload()
    assert repr(keys) == before, "a broken file changes nothing"


# --- keygen --------------------------------------------------------------------------------------------------------


def test_keygen_writes_a_secret_that_only_its_owner_may_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "psk"
    assert main(["keygen", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    out = capsys.readouterr().out
    assert out == f"{Psk.from_file(path).fingerprint}\n"
    assert path.read_text().strip() not in out


def test_keygen_static_prints_the_line_for_the_allow_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"
    assert main(["keygen", "--static", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == f"{StaticKey.from_file(path).public_line()}\n"
