"""`StackConfig`: from files, text and the environment; and what it says of those that are wrong."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel, ValidationError

from towline.config import Duration, StackConfig
from towline.endpoint import Endpoint
from towline.errors import ConfigError, Fault
from towline.layers import (
    Encryption,
    Framing,
    Heartbeat,
    Hedge,
    Psk,
    Reconnect,
    Request,
    Response,
    Resume,
    Retry,
    Rpc,
    StaticKey,
    StaticKeys,
    Timeout,
    Tls,
    TlsClient,
)
from towline.layers.encryption.trust import AllowList, KnownHosts
from towline.policies import Backoff
from towline.stack import Stack
from towline.text import without_keys
from towline.transports import Memory, Tcp

TOML = """\
endpoint = "tcp://localhost:7000"

[[layers]]
kind = "resume"
ttl = "1m"

[[layers]]
kind = "retry"
policy = { kind = "exponential", cap = "5s" }

[[layers]]
kind = "framing"
"""

STACK = Stack(Resume(ttl=60), Retry(Backoff.exponential(cap=5)), Framing())

YAML = """\
endpoint: tcp://localhost:7000
layers:
  - kind: resume
    ttl: 1m
  - kind: retry
    policy: {kind: exponential, cap: 5s}
  - framing
"""


def faults(text: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_toml(text, **options)
    assert str(caught.value) == "\n".join(map(str, caught.value.faults))
    return str(caught.value).splitlines()


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        StackConfig.from_toml(TOML),
        StackConfig.from_yaml(YAML),
        StackConfig.from_json(json.dumps(StackConfig.from_toml(TOML).model_dump(mode="json"))),
        StackConfig.from_dict({"endpoint": "tcp://localhost:7000", "layers": list(STACK)}),
        StackConfig(endpoint=Endpoint.parse("tcp://localhost:7000"), layers=tuple(STACK)),
        StackConfig.from_environ(
            {
                "TOWLINE__ENDPOINT": "tcp://localhost:7000",
                "TOWLINE__LAYERS__0__KIND": "resume",
                "TOWLINE__LAYERS__0__TTL": "60s",
                "TOWLINE__LAYERS__1": '{ kind = "retry", policy = { kind = "exponential", cap = 5 } }',
                "TOWLINE__LAYERS__2": "framing",
                "TOWLINE_LOG": "no part of it",
                "PATH": "/bin",
            }
        ),
    ],
    ids=["toml", "yaml", "json", "dict", "model", "environ"],
)
def test_all_sources_give_the_same(config: StackConfig) -> None:
    assert config.build() == STACK
    assert config == STACK.to_config("tcp://localhost:7000")


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML), ("A.TOML", TOML)])
def test_a_file_is_read_by_its_ending(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert StackConfig.from_file(tmp_path / name).build() == STACK


def test_a_table_of_a_larger_file(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text('[project]\nname = "app"\n\n[tool.app.link]\nlayers = ["framing"]\n')
    assert StackConfig.from_file(file, table="tool.app.link").build() == Stack(Framing())
    with pytest.raises(ConfigError, match=r"pyproject.toml: there is no table \[tool.other\]"):
        StackConfig.from_file(file, table="tool.other")
    file.write_text('[project]\nname = "app"\n\n[tool.app.link]\nlayers = ["framng"]\n')
    with pytest.raises(ConfigError, match=r"pyproject.toml:5: layers\.0: there is no layer of kind 'framng'"):
        StackConfig.from_file(file, table="tool.app.link")


def test_it_is_a_model_like_any_other() -> None:
    class App(BaseModel):
        name: str
        patience: Duration = 5
        link: StackConfig

    app = App.model_validate(
        {"name": "app", "link": {"layers": ["framing", {"kind": "heartbeat", "interval": "1x"}]}}
        | {"link": {"layers": [{"kind": "heartbeat", "interval": "1s"}, "framing"]}}
    )
    assert app.link.build() == Stack(Heartbeat(interval=1), Framing())
    assert App.model_validate_json(app.model_dump_json()) == app
    with pytest.raises(ValidationError) as caught:
        App.model_validate({"name": "app", "link": {"layers": [{"kind": "heartbeat", "interval": "1x"}]}})
    assert caught.value.errors()[0]["loc"] == ("link", "layers", 0, "interval")


def test_a_model_of_your_own_adds_fields() -> None:
    class Link(StackConfig):
        name: str

    link = Link.from_toml('name = "db"\nlayers = ["framing"]')
    assert (link.name, link.build()) == ("db", Stack(Framing()))
    with pytest.raises(ConfigError, match="naem: there is no such option: did you mean 'name'"):
        Link.from_toml('name = "db"\nnaem = "db"')


def test_it_does_not_change() -> None:
    config = StackConfig.from_toml(TOML)
    with pytest.raises(ValidationError):
        config.endpoint = None
    assert copy.copy(config) == config
    assert hash(config.build()) == hash(STACK)


def test_transports_are_those_that_it_names() -> None:
    config = StackConfig.from_toml('[[transports]]\nkind = "tcp"\nnodelay = false\n\n[[transports]]\nkind = "memory"')
    assert config.build().transports == (Tcp(nodelay=False), Memory())
    assert StackConfig().build().transports == Stack().transports


def test_a_reconnect_goes_where_the_endpoint_is() -> None:
    text = 'endpoint = "tcp://localhost:7000"\nlayers = ["{}", "rpc", "framing"]'
    for layer in ("reconnect", '{ kind = "reconnect" }'):
        config = StackConfig.from_toml(text.replace('"{}"', layer if layer.startswith("{") else f'"{layer}"'))
        assert config.build() == Stack(Reconnect("tcp://localhost:7000"), Rpc(), Framing())
    other = StackConfig.from_toml(text.replace('"{}"', '{ kind = "reconnect", target = "tcp://there:1" }'))
    assert other.layers[0] == Reconnect("tcp://there:1")
    assert faults('layers = ["reconnect", "rpc", "framing"]') == ["line 1: layers.0.target: is missing"]


# --- the environment ------------------------------------------------------------------------------------------------


def test_the_environment_overrides_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    environ = {
        "TOWLINE__ENDPOINT": "tcp://other:1",
        "TOWLINE__LAYERS__0__TTL": "2m",
        "TOWLINE__LAYERS__0__MAX_SESSIONS": "7",
        "TOWLINE__LAYERS__1__POLICY": "exponential",
        "TOWLINE__LAYERS__2__MAX_FRAME_SIZE": "8MiB",
    }
    config = StackConfig.from_file(tmp_path / "a.toml", environ=environ)
    assert config.endpoint == Endpoint.parse("tcp://other:1")
    assert config.build() == Stack(
        Resume(ttl=120, max_sessions=7), Retry(Backoff.exponential()), Framing(max_frame_size=8 << 20)
    )
    assert StackConfig.from_file(tmp_path / "a.toml").build() == STACK
    prefixed = {"APP__LAYERS__0__TTL": "2m", **environ}
    assert StackConfig.from_file(tmp_path / "a.toml", environ=prefixed, prefix="APP").layers[0] == Resume(ttl=120)


def test_a_kind_alone_gets_options_from_the_environment() -> None:
    data = {"layers": ["heartbeat", "framing"]}
    environ = {"TOWLINE__LAYERS__0__TIMEOUT": "9s"}
    assert StackConfig.from_dict(data, environ=environ).layers[0] == Heartbeat(timeout=9)
    assert data == {"layers": ["heartbeat", "framing"]}


def test_lists_tables_and_flags_in_variables() -> None:
    environ = {
        "TOWLINE__LAYERS": '[{ kind = "circuit-breaker", is_failure = ["OSError"] }, "rpc", "framing"]',
        "TOWLINE__LAYERS__1__REVEALS_ERRORS": "true",
    }
    assert StackConfig.from_environ(environ).layers[1] == Rpc(reveals_errors=True)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TOWLINE__LAYERS__5__TTL": "1s"}, "TOWLINE__LAYERS__5__TTL in the environment: there are only 3 entries"),
        ({"TOWLINE__LAYERS__TTL": "1s"}, "there is a list, and 'ttl' is no number of an entry"),
        ({"TOWLINE__ENDPOINT__HOST": "x"}, "TOWLINE__ENDPOINT__HOST in the environment: expected an endpoint"),
        ({"TOWLINE__LAYERS__0__TTL": "1"}, "TOWLINE__LAYERS__0__TTL in the environment: expected a duration"),
        ({"TOWLINE__LAYERS__0__TTLL": "1s"}, "TOWLINE__LAYERS__0__TTLL in the environment: there is no such option"),
        (
            {"TOWLINE__LAYER": "1s"},
            "TOWLINE__LAYER in the environment: there is no such option: did you",
        ),
        ({"TOWLINE__LAYERS": "[1,"}, "TOWLINE__LAYERS in the environment: expected a list"),
        ({"TOWLINE__": "1s"}, "TOWLINE__ in the environment: "),
    ],
)
def test_a_variable_that_is_wrong_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_toml(TOML, environ=environ)
    assert message in str(caught.value)


# --- lines ----------------------------------------------------------------------------------------------------------


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tunnel.toml"
    file.write_text(
        """\
# a tunnel
endpoint = "tcp//localhost:7000"  # 2

[[layers]]
kind = "resume"
ttl = "5"  # 6
colour = 3  # 7

[[layers]]
# of an hour
kind = "retry"

[layers.policy]  # 13
kind = "exponential"

[[layers]]  # 16
kind = "framin"  # 17
"""
    )
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_file(file)
    told = [(fault.file, fault.line, fault.path) for fault in caught.value.faults]
    assert told == [
        (str(file), 2, "endpoint"),
        (str(file), 6, "layers.0.ttl"),
        (str(file), 7, "layers.0.colour"),
        (str(file), 16, "layers.2"),
    ]


def test_a_value_of_several_lines_is_told_by_its_first() -> None:
    assert faults('\nlayers = [\n  "resume",\n\n  "framng",\n]\n') == [
        "line 2: layers.1: there is no layer of kind 'framng': did you mean 'framing'?"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "line 1: it is no TOML: Invalid value"),
        ("[[layers]]\nkind = 'resume'\nkind = 'retry'", "line 3: it is no TOML: Cannot overwrite a value"),
        ("layers = 5", "line 1: layers: expected a list"),
        ("layers = [5]", "line 1: layers.0: a int is no layer that a configuration knows"),
        ("layers = [{}]", "line 1: layers.0: this layer says no kind; known: buffer, "),
        ("endpoint = 5", "line 1: endpoint: expected an endpoint such as tcp://host:port, tcp://[::1]:port, got 5"),
        ("[layers]\nkind = 'resume'", "line 1: layers: expected a list"),
        ("[[layers]]\nkind = 'resume'\nbuffer = '64k'", "line 3: layers.0.buffer: expected a size"),
        ("[[layers]]\nkind = 'resume'\nmax_sessions = true", "line 3: layers.0.max_sessions: expected a whole number"),
        ("layers = ['resume', 'encryption']", "line 1: layers.1: Encryption needs psk="),
        (
            "layers = ['resume']",
            "line 1: layers: Resume needs frames from the layer inside it, but the tran",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    told = faults(text)
    assert told[0].startswith(message), told


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    long, binary, ending = tmp_path / "long.toml", tmp_path / "binary.toml", tmp_path / "a.ini"
    long.write_bytes(b"#" * ((1 << 20) + 1))
    binary.write_bytes(b"a = 1\nb = '\xff'\n")
    ending.write_text("")
    for path, message in (
        (tmp_path / "none.toml", "none.toml: cannot be read: No such file or directory"),
        (tmp_path, "expected a name that ends in .toml, .json, .yaml, .yml"),
        (ending, "a.ini: expected a name that ends in .toml"),
        (long, "long.toml: longer than 1,048,576 bytes; that is no configuration"),
        (binary, "binary.toml:2: is not a text in UTF-8"),
    ):
        with pytest.raises(ConfigError) as caught:
            StackConfig.from_file(path)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (StackConfig.from_json, '{\n"layers": [,]}', "line 2: it is no JSON: Expecting value"),
        (StackConfig.from_json, "[1]", "expected a table"),
        (StackConfig.from_yaml, "a: [1\nb: 2", "it is no YAML: expected ',' or ']'"),
        (StackConfig.from_yaml, "- a", "expected a table"),
        (StackConfig.from_yaml, "a: !!python/object:os.system {}", "it is no YAML: could not determine a constructor"),
        (StackConfig.from_json, "[" * 100_000, "it is no JSON"),
    ],
)
def test_other_formats_say_what_is_wrong(read: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)


def test_without_its_package_yaml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"to read YAML, install towline\[yaml\]"):
        StackConfig.from_yaml(YAML)


def test_a_fault_shows_all_that_is_known() -> None:
    assert str(Fault("it is wrong")) == "it is wrong"
    assert str(Fault("it is wrong", "layers.0", "a.toml", 5)) == "a.toml:5: layers.0: it is wrong"
    assert str(Fault("it is wrong", line=5)) == "line 5: it is wrong"
    error = ConfigError([Fault("one", "a"), Fault("two", "b")])
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == "a: one\nb: two"
    assert pickle.loads(pickle.dumps(error)).faults == error.faults


# --- keys -----------------------------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    psk, key = Psk.generate(), StaticKey.generate()
    psk.write(tmp_path / "psk")
    key.write(tmp_path / "key")
    (tmp_path / "allow").write_text(key.public_line() + "\n")
    file = tmp_path / "a.toml"
    file.write_text("""
[[layers]]
kind = "encryption"

[layers.keys]
key = { file = "key" }
psk = { file = "psk" }
trust = { kind = "allow-list", file = "allow" }
""")
    assert StackConfig.from_file(file).build() == Stack(
        Encryption(keys=StaticKeys(key, trust=AllowList([key.public_line()]), psk=psk))
    )
    file.write_text("""
[[layers]]
kind = "encryption"
keys = { key = { file = "key" }, trust = { kind = "known-hosts", path = "known" } }
""")
    assert StackConfig.from_file(file).layers[0].keys.trust == KnownHosts(tmp_path / "known")
    os.chdir(tmp_path.parent)
    assert StackConfig.from_file(os.path.relpath(file)).layers[0].keys.key == key


@pytest.mark.parametrize(
    ("psk", "message"),
    [
        ('"{b64}"', None),
        ('"{hex}"', None),
        ('{ file = "psk" }', None),
        ('{ env = "TUNNEL_KEY" }', None),
        ('"**********"', "that is a mask"),
        ('"' + "0" * 64 + '"', "a key of zeros is none"),
        ('"correct horse battery staple"', "a pre-shared key is 32 random bytes, no passphrase"),
        ('"psk"', "a pre-shared key is 32 random bytes"),
        ('{ file = "none" }', "none: cannot be read: No such file or directory"),
        ('{ file = "open" }', "open: others than its owner have access"),
        ('{ env = "NO_KEY" }', "the environment has no variable NO_KEY"),
        ('{ path = "psk" }', 'expected a key: { file = "PATH" } or { env = "NAME" }, or the key itself'),
        ("5", "expected a key"),
    ],
)
def test_case_49_a_key_is_text_a_file_or_a_variable(
    psk: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Psk.generate()
    key.write(tmp_path / "psk")
    (tmp_path / "open").write_bytes((tmp_path / "psk").read_bytes())
    (tmp_path / "open").chmod(0o644)
    monkeypatch.setenv("TUNNEL_KEY", key.secret.hex())
    psk = psk.replace("{b64}", base64.b64encode(key.secret).decode()).replace("{hex}", key.secret.hex())
    (tmp_path / "a.toml").write_text(f'[[layers]]\nkind = "encryption"\npsk = {psk}\n')
    if message is None:
        assert StackConfig.from_file(tmp_path / "a.toml").build() == Stack(Encryption(psk=key))
    else:
        with pytest.raises(ConfigError) as caught:
            StackConfig.from_file(tmp_path / "a.toml")
        assert str(caught.value).startswith(f"{tmp_path / 'a.toml'}:3: layers.0.psk: ")
        assert message in str(caught.value)


def test_a_key_pair_is_from_a_file() -> None:
    trust = '{ kind = "allow-list", keys = [] }'
    text = f'[[layers]]\nkind = "encryption"\nkeys = {{ key = {{ env = "X" }}, trust = {trust} }}'
    assert "layers.0.keys.key: a key pair is read from a file" in faults(text)[0]


def leaks(secret: bytes) -> list[str]:
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], base64.b64encode(secret).decode()[:20]]


WRONG_PLACES = [
    '[[layers]]\nkind = "encryption"\npsk = "KEY"\nsuite = "none such"',
    '[[layers]]\nkind = "encryption"\npks = "KEY"',
    '[[layers]]\nkind = "KEY"',
    '[[layers]]\nkind = "encryption"\nsuite = "KEY"',
    '[[layers]]\nkind = "encryption"\nkeys = "KEY"',
    '[[layers]]\nkind = "encryption"\nkeys = { key = "KEY", trust = "KEY", psk = "KEY" }',
    '[[layers]]\nkind = "encryption"\nmax_age = "KEY"',
    '[[layers]]\nkind = "encryption"\nmax_record_size = "KEY"',
    '[[layers]]\nkind = "encryption"\npsk = "KEY"\nrekey_after = "KEY"',
    '[[layers]]\nkind = "encryption"\npsk = "KEYKEY"',
    '[[layers]]\nkind = "encryption"\npsk = ["KEY"]',
    '[[layers]]\nkind = "encryption"\npsk = { key = "KEY" }',
    '[[layers]]\nkind = "encryption"\npsk = { file = "KEY" }',
    '[[layers]]\nkind = "encryption"\npsk = "KEY"\n[[layers]]\nkind = "resume"',
    '[[layers]]\nkind = "circuit-breaker"\nis_failure = "KEY"',
    '[[layers]]\nkind = "buffer"\non_full = "KEY"\nbound = "KEY"',
    '[[layers]]\nkind = "retry"\npolicy = "KEY"',
    'endpoint = "KEY"',
    'endpoint = "tcp://KEY"',
    'endpoint = "KEY://host:1"',
    'layers = "KEY"',
    'layers = ["KEY"]',
    "KEY = 1",
    '"KEY" = 1',
    'psk = "KEY\n',
    "psk = KEY",
]


@pytest.mark.parametrize("text", WRONG_PLACES)
@pytest.mark.parametrize("form", ["base64", "hex"])
def test_case_48_no_error_shows_a_key_that_stands_in_the_wrong_place(text: str, form: str) -> None:
    secret = bytes(range(100, 132))
    key = secret.hex() if form == "hex" else base64.b64encode(secret).decode()
    shown: list[str] = []
    try:
        StackConfig.from_toml(text.replace("KEY", key))
    except ConfigError as error:
        shown += [str(error), repr(error), repr(error.__dict__), repr(error.__cause__), repr(error.args)]
        shown.append(repr(pickle.dumps(error)))
    try:
        StackConfig.model_validate(__import__("tomllib").loads(text.replace("KEY", key)))
    except ValidationError as error:
        shown += [str(error), repr(error), repr(error.errors()), error.json()]
        shown += [repr(error.__cause__)]
    except ValueError:
        pass  # no TOML
    assert shown
    for line in shown:
        assert not [leak for leak in leaks(secret) if leak in line], line


def test_case_48_nothing_that_is_made_of_it_shows_a_key(tmp_path: Path) -> None:
    psk = Psk.generate()
    config = StackConfig.from_dict({"layers": [{"kind": "encryption", "psk": psk.secret.hex()}]})
    stack = config.build()
    shown = [
        repr(config),
        str(config),
        repr(config.model_dump()),
        config.model_dump_json(),
        repr(config.model_dump(mode="json")),
        repr(stack),
        stack.describe(),
        repr(stack.to_config()),
        repr(config.layers[0]),
        json.dumps(StackConfig.model_json_schema()),
    ]
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(config)
    for line in shown:
        assert not [leak for leak in leaks(psk.secret) if leak in line], line
    with pytest.raises(ConfigError, match="that is a mask"):  # what was printed cannot be read again
        StackConfig.from_json(config.model_dump_json())
    assert copy.deepcopy(config) == config


# --- schema ---------------------------------------------------------------------------------------------------------


def test_the_schema_names_every_layer_with_its_options() -> None:
    schema = StackConfig.model_json_schema()
    resume = schema["$defs"]["Resume"]
    assert resume["properties"]["kind"] == {"const": "resume", "title": "Kind", "type": "string"}
    assert resume["required"] == ["kind"]
    assert resume["properties"]["ttl"]["default"] == "5m"
    assert resume["properties"]["buffer"]["default"] == "8MiB"
    assert resume["additionalProperties"] is False
    assert schema["$defs"]["Timeout"]["required"] == ["kind", "seconds"]
    kinds = {each["$ref"].rpartition("/")[2] for each in schema["properties"]["layers"]["items"]["anyOf"][:-1]}
    assert {"Resume", "Framing", "Encryption", "CircuitBreaker"} <= kinds
    assert schema["properties"]["layers"]["items"]["anyOf"][-1]["enum"] == [
        "circuit-breaker",
        "deadline",
        "encryption",
        "framing",
        "heartbeat",
        "lines",
        "load-shed",
        "retry",
        "rpc",
        "tls",
        "reconnect",
        "resume",
    ]


def test_what_is_valid_by_the_schema_is_read_and_the_other_way_round() -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(StackConfig.model_json_schema())
    good = json.loads(STACK.to_config("tcp://localhost:7000").model_dump_json(exclude_none=True))
    validator.validate(good)
    wrong: tuple[dict[str, Any], ...] = (
        {"layers": ["framng"]},
        {"layers": [{"kind": "resume", "ttll": 1}]},
        {"layers": [{"kind": "resume", "ttl": "5"}]},
        {"layers": [{"kind": "timeout"}]},
        {"endpoint": "nowhere"},
        {"layer": []},
    )
    for bad in wrong:
        assert not validator.is_valid(bad)
        with pytest.raises(ConfigError):
            StackConfig.from_dict(bad)


# --- both ends of one file ------------------------------------------------------------------------------------------

CALLS = """
endpoint = "memory://calls"
layers = [
  { kind = "timeout", seconds = "5s" },
  { kind = "retry", policy = { kind = "standard-policy", max_attempts = 3 } },
  "reconnect",
  "rpc",
  "resume",
  "heartbeat",
  "framing",
  { kind = "encryption", psk = { env = "CALLS_KEY" } },
]
"""


async def test_one_file_gives_both_ends_of_a_program_with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS_KEY", Psk.generate().secret.hex())
    config = StackConfig.from_toml(CALLS)

    async def echo(request: Request, /) -> Response:
        return Response(request.payload.upper())

    assert config.endpoint is not None
    stack = config.build()
    async with stack.serve(config.endpoint, echo), config.build().open() as client:
        assert (await client(Request("echo", b"hello"))).payload == b"HELLO"


async def test_one_file_gives_both_ends_of_a_session() -> None:
    config = StackConfig.from_toml(TOML, environ={"TOWLINE__ENDPOINT": "memory://here"})
    endpoint = config.endpoint
    assert endpoint is not None

    async def echo(session: Any) -> None:
        async for message in session:
            await session.send(message)

    async with config.build().serve(endpoint, echo), config.build().connect(endpoint) as session:
        await session.send(b"hello")
        with anyio.fail_after(5):
            assert await session.receive() == b"hello"


def test_layers_that_need_files_are_made_of_them(tmp_path: Path) -> None:
    import trustme

    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    file = tmp_path / "a.toml"
    file.write_text('[[layers]]\nkind = "tls"\nclient = { ca = "ca.pem" }\n')
    assert StackConfig.from_file(file).build() == Stack(Tls(client=TlsClient(ca=str(tmp_path / "ca.pem"))))
    file.write_text('[[layers]]\nkind = "tls"\nclient = { ca = "none.pem" }\n')
    with pytest.raises(ConfigError, match=r"a.toml:1: layers.0: .*none.pem: cannot be read"):
        StackConfig.from_file(file)
    assert Timeout(1) in StackConfig.from_toml('layers = [{ kind = "timeout", seconds = 1 }]').build()


# --- what was found to be wrong once --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "layers: !!bool KEY",
        "layers: !!timestamp zz",
        "x: &a {y: *a}",
        "x: !KEY y",
        "a: b: KEY",
        "*KEY",
        "[KEY",
        "a: !!int KEY",
        "? !!set {KEY}",
    ],
)
def test_yaml_of_any_kind_is_no_more_than_an_error(text: str) -> None:
    key = bytes(range(100, 132)).hex()
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_yaml(text.replace("KEY", key), environ={"TOWLINE__ENDPOINT": "memory://x"})
    error: BaseException | None = caught.value
    while error is not None:  # also what it would bring along
        assert key not in str(error)
        error = error.__context__


def test_a_few_aliases_that_stand_for_a_memory_full_are_refused_at_once() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match=r"an alias \(\*\) is not understood here"):
        StackConfig.from_yaml(bomb, environ={})


def test_on_and_yes_are_text_in_yaml() -> None:
    config = StackConfig.from_yaml("layers: [{kind: hedge, delay: 1s, on: TimeoutError}]")
    assert config.layers[0] == Hedge(1, on=TimeoutError)
    text = "layers: [{kind: circuit-breaker, name: trueish}, {kind: rpc, reveals_errors: true}, framing]"
    breaker, rpc, _ = StackConfig.from_yaml(text).layers
    assert (breaker.name, rpc.reveals_errors) == ("trueish", True)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_found_whatever_ends_them(end: str) -> None:
    lines = ['endpoint = "x"', "", "[[layers]]", 'kind = "resume"', "# of an hour", 'ttl = """', '5"""', "colour = 1"]
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_toml(end.join(lines))
    assert [fault.line for fault in caught.value.faults] == [1, 6, 8]


def test_lines_are_found_in_a_large_file_without_reading_it_once_for_each() -> None:
    rest = "".join(f'[[layers]]\nkind = "heartbeat"\ninterval = "{number}ms"\n' for number in range(1, 601))
    text = f"# {'x' * 1000}\n" * 100 + rest + "[[layers]]\nkind = 'nonsense'\n"
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_toml(text)
    assert caught.value.faults[0].line == text.count("\n") - 1


def test_the_eleventh_layer_comes_after_the_tenth() -> None:
    environ = {f"TOWLINE__LAYERS__{number}": f'{{ kind = "timeout", seconds = {number + 1} }}' for number in range(12)}
    assert StackConfig.from_environ(environ).layers == tuple(Timeout(number + 1) for number in range(12))


@pytest.mark.parametrize("psk", ['{ file = "nowhere" }', '"not a key"', '{ env = "NO_SUCH" }'])
def test_the_environment_puts_a_key_in_the_place_of_another(psk: str, tmp_path: Path) -> None:
    key = Psk.generate()
    key.write(tmp_path / "psk")
    text = f'layers = [{{ kind = "encryption", psk = {psk} }}]'
    environ = {"TOWLINE__LAYERS__0__PSK__FILE": str(tmp_path / "psk")}
    assert StackConfig.from_toml(text, environ=environ).build() == Stack(Encryption(psk=key))


def test_a_variable_is_blamed_for_what_it_makes_of_a_value() -> None:
    with pytest.raises(ConfigError, match=r"TOWLINE__LAYERS__<?\**>? in the env|is no number of an entry") as caught:
        StackConfig.from_environ({"TOWLINE__LAYERS": "[]", f"TOWLINE__LAYERS__{bytes(range(100, 132)).hex()}": "1"})
    assert bytes(range(100, 132)).hex() not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("factor", "true", "expected a number"),
        ("factor", '"two"', "expected a number"),
        ("take", "true", "expected a whole number"),
        ("take", "1.0", "expected a whole number"),
    ],
)
def test_numbers_are_numbers(option: str, value: str, message: str) -> None:
    text = f'layers = [{{ kind = "retry", policy = {{ kind = "exponential", {option} = {value} }} }}]'
    with pytest.raises(ConfigError, match=f"layers.0.policy.{option}: {message}"):
        StackConfig.from_toml(text)


@pytest.mark.parametrize("value", ["1", '"yes"', '"on"', "0"])
def test_flags_are_true_or_false(value: str) -> None:
    with pytest.raises(ConfigError, match="reveals_errors: expected true or false"):
        StackConfig.from_toml(f'layers = [{{ kind = "rpc", reveals_errors = {value} }}]')


def test_a_duration_that_no_file_can_say_is_not_written() -> None:
    with pytest.raises(ConfigError, match=r"Timeout\.seconds is for code only"):
        Stack(Timeout(1e12)).to_config()


def test_a_home_that_nobody_has_is_an_error_as_any_other() -> None:
    with pytest.raises(ConfigError, match=r"~nosuchuser/x: there is no such home directory"):
        StackConfig.from_toml('layers = [{ kind = "encryption", psk = { file = "~nosuchuser/x" } }]')
    with pytest.raises(ConfigError, match="there is no such home directory"):
        StackConfig.from_file("~nosuchuser/x.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: is not a file that holds something"):
        StackConfig.from_file(tmp_path / "a.toml")


def test_what_editors_put_there_is_let_through() -> None:
    assert StackConfig.from_json('{"$schema": "towline.json", "layers": ["framing"]}').build() == Stack(Framing())


def test_it_can_be_copied() -> None:
    config = StackConfig.from_toml(
        'layers = ["retry", "circuit-breaker", "reconnect", "rpc", "framing"]\nendpoint = "tcp://a:1"'
    )
    assert copy.deepcopy(config) == config.model_copy(deep=True) == config
    assert copy.deepcopy(config.build()) == config.build()


def test_transports_may_be_given_as_any_sequence() -> None:
    stack = Stack(Framing(), transports=[Tcp()])
    assert stack.to_config().build() == stack


def test_the_schema_is_made_in_many_threads_at_once() -> None:
    wanted = StackConfig.model_json_schema()
    with ThreadPoolExecutor(8) as threads:
        made = [threads.submit(StackConfig.model_json_schema) for _ in range(16)]
        assert all(each.result() == wanted for each in made)


def test_broken_json_is_not_shown() -> None:
    key = bytes(range(100, 132)).hex()
    with pytest.raises(ValidationError) as caught:
        StackConfig.model_validate_json('{"layers": [{"kind": "encryption", "psk": "' + key)
    assert key not in caught.value.json() + str(caught.value) + repr(caught.value.errors())
    assert StackConfig.model_validate_json('{"layers": ["framing"]}').build() == Stack(Framing())


ODD = bytes(each ^ 0x5A for each in range(3, 35))


@pytest.mark.parametrize(
    "key",
    [
        base64.b64encode(ODD).decode().rstrip("="),
        base64.urlsafe_b64encode(ODD).decode(),
        base64.urlsafe_b64encode(ODD).decode().rstrip("="),
        ODD.hex(":"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        'endpoint = "KEY"',
        'endpoint = "tcp://host:KEY"',
        'endpoint = "tcp://user:KEY@host:1"',
        '[[layers]]\nkind = "encryption"\npsk = { file = "KEY" }',
        '[[layers]]\nkind = "encryption"\npsk = { env = "KEY" }',
        '[[layers]]\nkind = "encryption"\npsk = { file = "psk" }\nsuite = "KEY"',
        '"KEY" = 1',
    ],
)
def test_case_48_keys_in_other_forms_are_masked_too(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StackConfig.from_toml(text.replace("KEY", key))
    assert key[:12] not in str(caught.value)


def test_the_paths_of_files_are_no_keys() -> None:
    for path in (
        "/home/anna/projects/towline/configuration/k",
        "/tmp/pytest-of-root/pytest-0/popen-gw0/file",
        "a" * 43,
    ):
        assert without_keys(f"{path}: cannot be read") == f"{path}: cannot be read"
