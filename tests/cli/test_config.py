"""``towline check``, ``init`` and ``schema``; and what becomes of a file, the environment and options together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from towline.cli import main
from towline.cli._init import CASES
from towline.cli._options import Options
from towline.config import StackConfig, TunnelConfig, advise
from towline.endpoint import Endpoint
from towline.errors import ConfigError
from towline.layers import Encryption, Heartbeat, Psk, Resume, StaticKey
from towline.layers.encryption.trust import AllowList
from towline.stack import Stack

GOOD = """\
endpoint = "tcp://db.example:7000"

[listen]
endpoint = "tcp://*:7000"
to = "tcp://127.0.0.1:5432"

[forward]
local = "tcp://127.0.0.1:5432"

[[layers]]
kind = "resume"

[[layers]]
kind = "retry"
policy = "exponential"

[[layers]]
kind = "heartbeat"

[[layers]]
kind = "framing"

[[layers]]
kind = "encryption"
psk = { file = "psk" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Psk.generate().write(tmp_path / "psk")
    StaticKey.generate().write(tmp_path / "key")
    (tmp_path / "allow").write_text(StaticKey.generate().public_line("anna") + "\n")
    (tmp_path / "tunnel.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- check: what is wrong -------------------------------------------------------------------------------------------

RESUME = '[[layers]]\nkind = "resume"\n'
FRAMING = '[[layers]]\nkind = "framing"\n'
HEARTBEAT = '[[layers]]\nkind = "heartbeat"\n'
ENCRYPTION = '[[layers]]\nkind = "encryption"\n'
RETRY = '[[layers]]\nkind = "retry"\n'

BROKEN = [
    # what is no TOML
    ("endpoint = tcp://a:1", "1: it is no TOML: Invalid value"),
    ('[[layers]\nkind = "resume"', "1: it is no TOML: Expected ']]' at the end of an array declaration"),
    ('endpoint = "tcp://a:1"\nendpoint = "tcp://b:1"', "2: it is no TOML: Cannot overwrite a value"),
    ('endpoint = "tcp://a:1', "1: it is no TOML: Illegal character"),
    # names
    ('endpiont = "tcp://a:1"', "1: endpiont: there is no such option: did you mean 'endpoint'?"),
    ('\n[[layer]]\nkind = "resume"', "2: layer: there is no such option: did you mean 'layers'?"),
    ('[[layers]]\nkind = "framng"', "1: layers.0: there is no layer of kind 'framng': did you mean 'framing'?"),
    ('[[layers]]\nkind = "Heartbeat"', "1: layers.0: there is no layer of kind 'Heartbeat': did you mean 'heartbeat'?"),
    ('[[layers]]\nkind = "circuit_breaker"', "1: layers.0: there is no layer of kind 'circuit_breaker': did you mean"),
    ('[[layers]]\nkind = "websocket"', "1: layers.0: there is no layer of kind 'websocket': known: buffer, circuit-b"),
    ("[[layers]]\nttl = 5", "1: layers.0: this layer says no kind; known: buffer, "),
    (RESUME + 'tll = "5m"', "3: layers.0.tll: there is no such option: did you mean 'ttl'?"),
    (RESUME + "colour = 5", "3: layers.0.colour: there is no such option: known: attach_timeout, buffer"),
    (RETRY + 'policy = "exponentail"', "3: layers.0.policy: there is no policy of kind 'exponentail': did you mean 'e"),
    (
        RETRY + 'policy = { kind = "exponential", factr = 3 }',
        "3: layers.0.policy.factr: there is no such option: did you mean 'factor'?",
    ),
    (
        RETRY + 'policy = { kind = "standard-policy", budget = "tps" }',
        "3: layers.0.policy.budget: there is no budget of kind 'tps': did you mean 'tps-budget'?",
    ),
    (
        RETRY + 'policy = { kind = "standard-policy", on = "ConectionLost" }',
        "3: layers.0.policy.on: there is no error 'ConectionLost': did you mean 'ConnectionLost'?",
    ),
    ('[[transports]]\nkind = "udp"', "1: transports.0: there is no transport of kind 'udp': known: fd, memory"),
    (
        '[listen]\nto = "tcp://a:1"\nfrom = "tcp://b:1"',
        "3: listen.from: there is no such option: known: admin, endpoint",
    ),
    # values
    ('endpoint = "a:1"', "1: endpoint: 'a:1' is not an endpoint: expected one of tcp://host:port"),
    ('endpoint = "tcp://a"', "1: endpoint: 'tcp://a' has no port: write tcp://a:PORT"),
    ('endpoint = "tcp://a:99999"', "1: endpoint: "),
    (RESUME + 'ttl = "5"', "3: layers.0.ttl: expected a duration such as '250ms', '5s', '1m30s' or '2h', got '5': is"),
    (RESUME + 'ttl = "five minutes"', "3: layers.0.ttl: expected a duration"),
    (RESUME + "ttl = -1", "3: layers.0.ttl: expected a duration"),
    (RESUME + 'buffer = "64k"', "3: layers.0.buffer: expected a size such as '64KiB', '16MiB' or '1GB', or a number"),
    (RESUME + "max_sessions = 1.5", "3: layers.0.max_sessions: expected a whole number"),
    (HEARTBEAT + 'interval = "5s"\ntimeout = "1s"', "3: layers.0.interval: interval is 5 s and timeout 1 s, where"),
    (FRAMING + "max_frame_size = 0", "3: layers.0.max_frame_size: "),
    (RETRY + "policy = 5", "3: layers.0.policy: a int is no policy that a configuration knows"),
    ("layers = 5", "1: layers: expected a list"),
    ('[[transports]]\nkind = "unix"\nmode = 600', "3: transports.0.mode: expected permissions such as '0600', as text"),
    ('[[layers]]\nkind = "timeout"', "1: layers.0.seconds: is missing"),
    (
        '[[layers]]\nkind = "buffer"\nbound = 5\non_full = "drop"',
        "4: layers.0.on_full: Input should be 'wait' or",
    ),
    ('[[layers]]\nkind = "rate-limit"\nrate = 5', "1: layers.0: RateLimit(5) does not say for how many seconds: per"),
    # what only code can say
    ('[[layers]]\nkind = "filter"', "1: layers.0: Filter needs accept, which only code can say: add it to the stack"),
    # keys
    (ENCRYPTION, "1: layers.0: Encryption needs psk="),
    (ENCRYPTION + 'psk = { file = "nowhere" }', "3: layers.0.psk: {folder}/nowhere: cannot be read: No such file"),
    (ENCRYPTION + 'psk = { file = "open" }', "3: layers.0.psk: {folder}/open: others than its owner have access"),
    (ENCRYPTION + 'psk = "correct horse battery staple"', "3: layers.0.psk: a pre-shared key is 32 random bytes, no"),
    (ENCRYPTION + 'psk = "**********"', "3: layers.0.psk: that is a mask, as it stands in what was printed"),
    (ENCRYPTION + 'psk = { env = "NO_SUCH_KEY" }', "3: layers.0.psk: the environment has no variable NO_SUCH_KEY"),
    (
        ENCRYPTION + 'keys = { key = { file = "key" }, trust = { kind = "allow-list", file = "psk" } }',
        "3: layers.0.keys.trust: {folder}/psk, line 1: must be 'x25519 <base64> comment'",
    ),
    (ENCRYPTION + 'psk = { file = "psk" }\nsuite = "AES"', "4: layers.0.suite: suite has 'AES', where 25519_"),
    # order
    (RESUME, "1: layers: Resume needs frames from the layer inside it, but the transport gives bytes: put Framing bet"),
    (FRAMING + RESUME, "1: layers: Resume needs frames from the layer inside it, but the transport gives bytes: put F"),
    (RESUME + FRAMING + FRAMING, "1: layers: Framing stands twice in this stack: leave one out"),
    (RESUME + 'max_message = "5MiB"\n' + FRAMING + 'max_frame_size = "1MiB"', "1: layers: Resume has max_message 5,24"),
    ('layers = ["reconnect", "rpc", "framing"]', "1: layers.0.target: is missing"),
    (RESUME + '[[layers]]\nkind = "rpc"\n' + FRAMING, "1: layers: "),
]


@pytest.mark.parametrize(("text", "advice"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_is_told_in_the_right_line(
    text: str, advice: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (folder / "open").write_bytes((folder / "psk").read_bytes())
    (folder / "broken.toml").write_text(text + "\n")
    assert main(["check", "broken.toml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"towline: broken.toml:{advice.replace('{folder}', str(folder))}"), err
    assert err.count("\n") == 1, err


def test_there_are_forty_of_them_and_more() -> None:
    assert len(BROKEN) >= 40
    assert len({advice for _, advice in BROKEN}) >= 40


def test_all_that_is_wrong_is_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.toml").write_text('endpoint = "a"\n' + RESUME + 'ttl = "5"\ntll = 1\n' + RETRY + "policy = 1\n")
    assert main(["check", "broken.toml"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1:3] for line in told] == [
        ["broken.toml:1", "endpoint"],
        ["broken.toml:4", "layers.0.ttl"],
        ["broken.toml:5", "layers.0.tll"],
        ["broken.toml:8", "layers.1.policy"],
    ]


# --- check: what is right, and what is unwise -----------------------------------------------------------------------


def test_a_good_one_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tunnel.toml", "--strict"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["application", "messages"]
    assert lines[1].endswith("both ends: needs frames, gives messages")
    assert [line.split("(")[0].strip() for line in lines[1:6]] == [
        "Resume",
        "Retry",
        "Heartbeat",
        "Framing",
        "Encryption",
    ]
    assert lines[6].split() == ["transport", "bytes"]
    assert lines[8:] == [
        "both ends must have: resume/1, heartbeat/1, framing/1, encryption/1",
        "endpoint: tcp://db.example:7000",
        "listen.endpoint: tcp://*:7000",
        "listen.to: tcp://127.0.0.1:5432",
        "forward.local: tcp://127.0.0.1:5432",
        "tunnel.toml: nothing is wrong",
    ]


def plain(layers: str, head: str = 'endpoint = "tcp://db.example:1"') -> str:
    return f"{head}\n{layers}"


GOOD_LAYERS = GOOD.partition("[[layers]]")[1] + GOOD.partition("[[layers]]")[2]

NO_BUDGET = 'layers = [{ kind = "retry", policy = { kind = "standard-policy", budget = "none" } }, "rpc", "framing"]'

UNWISE = [
    ("", "unwise.toml: there is no layer, so what is connected is the bare transport"),
    (
        'layers = [{ kind = "reconnect", target = "tcp://db.example:1" }, "rpc", "framing"]',
        "unwise.toml:1: layers.0.target: nothing protects what goes over tcp://db.example:1",
    ),
    (
        'layers = [{ kind = "retry", policy = { kind = "failover", endpoints = ["tcp://10.0.0.5:1"] } }, "framing"]',
        "unwise.toml:1: layers.0.policy.endpoints.0: nothing protects what goes over tcp://10.0.0.5:1",
    ),
    (
        plain(RESUME + RETRY + HEARTBEAT + FRAMING),
        "unwise.toml:1: endpoint: nothing protects what goes over tcp://db.e",
    ),
    (plain(RESUME + RETRY + FRAMING, ""), "unwise.toml:2: layers.0: without a heartbeat, a link that dies silently"),
    (plain(RESUME + HEARTBEAT + FRAMING, ""), "unwise.toml:2: layers.0: without a retry inside resume, a lost link is"),
    (
        plain(RESUME + 'ttl = "20s"\n' + RETRY + HEARTBEAT + 'timeout = "30s"\n' + FRAMING, ""),
        "unwise.toml:9: layers.2.timeout: a dead link is noticed after 30s, when the session (20s) is already over",
    ),
    (
        plain(RESUME + RETRY + HEARTBEAT + 'interval = "10s"\n' + FRAMING, ""),
        "unwise.toml:6: layers.2.timeout: with 15s of patience and a beat each 10s, one that comes late ends",
    ),
    (
        plain(
            'layers = [{ kind = "retry", policy = { kind = "standard-policy", budget = "none" } }, "rpc", "framing"]',
            "",
        ),
        "unwise.toml:2: layers.0.policy: calls are retried without a budget",
    ),
    (
        plain(
            'layers = [{ kind = "retry", policy = { kind = "standard-policy", budget = "none" } }, "rpc", "framing"]',
            "",
        ),
        "unwise.toml:2: layers.0.policy: nothing ends these retries but the caller",
    ),
    (
        plain('layers = ["circuit-breaker", "retry", "rpc", "framing"]', ""),
        "unwise.toml:2: layers.0: the breaker stands outside the retry (layers.1), so it sees one failure",
    ),
    (
        plain(RESUME + 'max_message = "64KiB"\n' + RETRY + HEARTBEAT + FRAMING + 'max_frame_size = "1GiB"\n', ""),
        "unwise.toml:11: layers.3.max_frame_size: a peer may announce frames of 1GiB, and no message is",
    ),
    (
        ENCRYPTION
        + 'keys = { key = { file = "key" }, trust = { kind = "known-hosts", path = "k", allow_first_use = true } }',
        "unwise.toml:3: layers.0.keys.trust.allow_first_use: whoever answers the first time is believed",
    ),
    (ENCRYPTION + 'psk = "{key}"', "unwise.toml:3: layers.0.psk: the key itself stands here, and goes wherever this"),
    (
        plain(RESUME + 'ttl = "5s"\n' + RETRY + FRAMING, ""),
        "unwise.toml:4: layers.0.ttl: a session without a link lives 5s, less than most interruptions",
    ),
    (
        plain(RESUME + 'ttl = "1h"\n' + RETRY + HEARTBEAT + FRAMING, ""),
        "unwise.toml:2: layers.0.tombstone_ttl: a session that is over is remembered for 10m, less than its client",
    ),
    (
        plain(RESUME + 'buffer = "1GiB"\n' + RETRY + HEARTBEAT + FRAMING, ""),
        "unwise.toml:4: layers.0.buffer: one session may hold 1032MiB of memory at each end",
    ),
    (
        'layers = [{ kind = "buffer", bound = 100000 }]',
        "unwise.toml:1: layers.0.bound: 100,000 calls may wait",
    ),
    (
        plain(RESUME + RETRY + HEARTBEAT + FRAMING, '[listen]\nto = "tcp://a:1"\nendpoint = "tcp://*:1"'),
        "unwise.toml:1: listen: anybody who reaches tcp://*:1 reaches tcp://a:1",
    ),
    (
        plain(GOOD_LAYERS, '[forward]\nlocal = "tcp://0.0.0.0:1"'),
        "unwise.toml:2: forward.local: other machines can use the entrance at tcp://0.0.0.0:1 as well, without a key",
    ),
    (
        plain(GOOD_LAYERS, '[forward]\nlocal = "tcp://127.0.0.1:1"\nretry_for = "1h"'),
        "unwise.toml:3: forward.retry_for: a way back is looked for during 1h, and the session lives 5m",
    ),
]


@pytest.mark.parametrize(("text", "advice"), UNWISE, ids=range(len(UNWISE)))
def test_what_is_unwise_is_told_with_what_to_do_instead(
    text: str, advice: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Psk.from_file(folder / "psk").secret.hex()
    (folder / "unwise.toml").write_text(text.replace("{key}", key))
    assert main(["check", "unwise.toml"]) == 0
    out, err = capsys.readouterr()
    assert any(line.startswith(f"advice: {advice}") for line in err.splitlines()), err
    assert out.splitlines()[-1].startswith("unwise.toml: nothing is wrong; see the advice (")
    assert key not in out + err
    assert main(["check", "unwise.toml", "--strict"]) == 1


def test_every_rule_has_a_file_here() -> None:
    from towline.config._advice import RULES

    for _, text in RULES:
        start = text.partition("{")[0][:15]
        assert any(f": {start}" in advice for _, advice in UNWISE), text


def test_the_recommended_stack_needs_no_advice(folder: Path) -> None:
    stack = Stack.resilient(psk=Psk.from_file("psk"))
    assert advise(stack.to_config("tcp://db.example:7000")) == []
    assert advise(StackConfig.from_toml('layers = ["framing"]')) == []


def test_a_table_and_the_environment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "app.toml").write_text('[tool.app]\nname = "x"\n\n[tool.app.link]\nlayers = ["heartbeat", "framing"]\n')
    assert main(["check", "app.toml", "--table", "tool.app.link"]) == 0
    assert "Heartbeat()" in capsys.readouterr().out
    monkeypatch.setenv("TOWLINE__LAYERS__0__INTERVAL", "7s")
    assert main(["check", "app.toml", "--table", "tool.app.link", "--environment"]) == 0
    assert "Heartbeat(interval=7.0)" in capsys.readouterr().out
    assert main(["check", "app.toml"]) == 2
    assert capsys.readouterr().err.startswith("towline: app.toml:1: tool: there is no such option")


# --- init and schema ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_file_to_begin_with_is_right_and_wise(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "tls":
        import trustme

        ca = trustme.CA()
        for name in ("server-ca.pem", "clients-ca.pem"):
            ca.cert_pem.write_to_path(folder / name)
        for name in ("server", "client"):
            issued = ca.issue_cert("server.example")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
    assert main(["init", case, "new.toml"]) == 0
    assert "new.toml is written" in capsys.readouterr().out
    assert main(["check", "new.toml", "--strict"]) == 0, capsys.readouterr().err
    text = (folder / "new.toml").read_text()
    assert "{" + "name}" not in text
    assert "{" + "title}" not in text
    assert main(["init", case]) == 0
    assert capsys.readouterr().out.endswith(text.replace("new.toml", "towline.toml"))
    assert main(["init", case, "new.toml"]) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err


def test_init_names_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "nonsense"]) == 2
    assert "CASE: there is no 'nonsense': tunnel, tunnel-keys, calls, sessions, tls" in capsys.readouterr().err
    assert main(["init", "--help"]) == 0
    assert "tunnel, tunnel-keys, calls, sessions, tls" in " ".join(capsys.readouterr().out.split())


def test_the_schema_is_that_of_a_tunnel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == TunnelConfig.model_json_schema()


# --- a file, the environment, options -------------------------------------------------------------------------------


def test_options_override_the_environment_which_overrides_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOWLINE__LAYERS__0__TTL", "2m")
    monkeypatch.setenv("TOWLINE__LAYERS__2__INTERVAL", "2s")
    monkeypatch.setenv("TOWLINE__LISTEN__TO", "tcp://127.0.0.1:1")
    options = Options("tunnel.toml", "--allow FILE")
    options.secrets(None, None)
    tunnel = options.read()
    assert tunnel.config.layers[0] == Resume(ttl=120)
    assert tunnel.config.layers[2] == Heartbeat(interval=2)
    assert tunnel.config.listen is not None
    assert tunnel.config.listen.to == Endpoint.parse("tcp://127.0.0.1:1")
    options.heartbeat("--heartbeat", 1)
    options.retry_for("--retry-for", 20)
    options.buffer("--buffer", 1 << 20)
    tunnel = options.read()
    assert tunnel.config.layers[0] == Resume(ttl=20, attach_timeout=20, buffer=1 << 20, max_message=(1 << 20) - 128)
    assert tunnel.config.layers[2] == Heartbeat(interval=1, timeout=3)
    assert options.patience(tunnel) == 20


def test_options_for_keys_replace_those_of_the_file(folder: Path) -> None:
    other = Psk.generate()
    other.write(folder / "other")
    options = Options("tunnel.toml", "--allow FILE")
    options.secrets("other", None)
    assert options.read().config.layers[4] == Encryption(psk=other)
    options = Options("tunnel.toml", "--allow FILE")
    options.secrets(None, "key", allow="allow")
    [*_, layer] = options.read().config.layers
    assert layer.psk is None
    assert layer.keys.key == StaticKey.from_file("key")
    assert layer.keys.trust == AllowList.from_file("allow")


def test_a_forward_is_as_patient_as_the_file_says(folder: Path) -> None:
    file = folder / "tunnel.toml"
    options = Options("tunnel.toml", "--peer KEY")
    options.secrets(None, None)
    assert options.patience(options.read()) == 300
    file.write_text(GOOD.replace("[forward]", '[forward]\nretry_for = "1m"'))
    assert options.patience(options.read()) == 60
    options.retry_for("--retry-for", 7)
    assert options.patience(options.read()) == 7


def test_keys_are_read_again_with_the_file(folder: Path) -> None:
    file = folder / "tunnel.toml"
    options = Options("tunnel.toml", "--allow FILE")
    options.secrets(None, None)
    keys = options.read().keys
    assert keys is not None
    before = repr(keys)
    (folder / "psk").unlink()
    Psk.generate().write(folder / "psk")
    assert keys.reload() == frozenset()
    assert repr(keys) != before
    after = repr(keys)
    file.write_text("nonsense")
    with pytest.raises(ConfigError, match="it is no TOML"):
        keys.reload()
    assert repr(keys) == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("listen --config none.toml", "none.toml: cannot be read: No such file or directory"),
        ("listen --config tunnel.toml --heartbeat 20000d", "--heartbeat: "),
        ("listen --config plain.toml --heartbeat 5", "--heartbeat: the stack of plain.toml has no heartbeat"),
        ("listen --config plain.toml", "ENDPOINT is missing: give it, or --config FILE that says so"),
        ("listen tcp://127.0.0.1:0 --config plain.toml", "--to is missing"),
        ("forward --config plain.toml", "LOCAL is missing"),
        ("forward tcp://127.0.0.1:0 --config plain.toml", "--via is missing"),
        ("ping --config plain.toml", "--interval: the stack of plain.toml has no heartbeat"),
        ("listen --config tunnel.toml --psk-file none", "--psk-file: {folder}/none: cannot be read"),
        ("listen --config tunnel.toml --psk-file psk --keys key", "give either --psk-file FILE, or --keys FILE and"),
        ("listen --config tunnel.toml --keys psk", "--keys: {folder}/psk: is not a private key in PEM"),
        ("check", "FILE"),
    ],
)
def test_a_mistake_names_the_option_or_the_file(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "plain.toml").write_text('layers = ["resume", "framing"]\n')
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.replace("{folder}", str(folder)) in err
