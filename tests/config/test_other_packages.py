"""Layers, policies, transports and stores of other packages: one is installed for real, and used by a new process."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CODE = {
    "acme/__init__.py": "",
    "acme/layers.py": '''
from dataclasses import dataclass
from towline.units import Bytes, Seconds

@dataclass(frozen=True)
class Chaos:
    """Layer: fail now and then."""

    pause: Seconds
    chunk: Bytes = 1024
    name: str | None = None
    hook: object = None

    def __call__(self, service):
        return service
''',
    "acme/policies.py": '''
from dataclasses import dataclass
from towline.policies import Budget, Rate, StandardPolicy

@dataclass(frozen=True)
class Stubborn:
    """Never gives up."""

    times: int = 3

    def session(self, request, /, *, clock, random):
        return StandardPolicy(max_attempts=self.times).session(request, clock=clock, random=random)

@dataclass(frozen=True)
class Purse(Budget):
    coins: int

    def withdraw(self):
        return True

    @property
    def balance(self):
        return self.coins
''',
    "acme/transports.py": """
from dataclasses import dataclass
from towline.transport import Transport

@dataclass(frozen=True)
class Pigeon(Transport):
    schemes = ("tcp",)
    wings: int = 2

    async def __call__(self, dial, /):
        raise NotImplementedError

    async def listen(self, endpoint):
        raise NotImplementedError
""",
    "acme/stores.py": """
from towline.layers.resume import MemoryStore

class Shelf(MemoryStore):
    def __init__(self, *, boards: int = 3) -> None:
        super().__init__(max_detached=boards)
""",
    "acme/broken.py": "import there_is_no_such_module\n",
    "acme_towline-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-towline\nVersion: 1.0\n",
    "acme_towline-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "acme_towline-1.0.dist-info/entry_points.txt": """
[towline.layers]
acme-chaos = acme.layers:Chaos
acme-broken = acme.broken:Anything
acme-function = acme.layers:dataclass
acme-transport = acme.transports:Pigeon
framing = acme.layers:Chaos

[towline.policies]
stubborn = acme.policies:Stubborn
purse = acme.policies:Purse

[towline.transports]
pigeon = acme.transports:Pigeon

[towline.stores]
shelf = acme.stores:Shelf
""",
    "acme_towline-1.0.dist-info/RECORD": "",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acme")
    wheel = folder / "acme_towline-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in CODE.items():
            archive.writestr(name, text)
    target = folder / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--disable-pip-version-check", "--target", str(target), str(wheel)),
        ],
        check=True,
        capture_output=True,
    )
    return target


def run(installed: Path, code: str) -> str:
    path = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", path + code], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = '''
from towline.config import StackConfig
from towline.stack import Stack
config = StackConfig.from_toml("""
[[layers]]
kind = "acme-chaos"
pause = "1m"
chunk = "2KiB"

[[layers]]
kind = "retry"
policy = { kind = "stubborn", times = 5 }

[[layers]]
kind = "retry"
policy = { kind = "standard-policy", budget = { kind = "purse", coins = 7 } }

[[layers]]
kind = "resume"
new_store = { kind = "shelf", boards = 9 }

[[layers]]
kind = "framing"

[[transports]]
kind = "pigeon"
""")
'''


def test_its_classes_are_made_by_name(installed: Path) -> None:
    shown = run(
        installed,
        USE
        + """
from acme.layers import Chaos
from acme.policies import Purse, Stubborn
from acme.transports import Pigeon
from towline import Framing, Retry, StandardPolicy
stack = config.build()
assert stack.layers[0] == Chaos(pause=60, chunk=2048)
assert stack.layers[1] == Retry(Stubborn(5))
assert stack.layers[2] == Retry(StandardPolicy(budget=Purse(7)))
assert stack.layers[3].new_store().max_detached == 9
assert stack.layers[4] == Framing()  # a name of the library's is the library's
assert stack.transports == (Pigeon(),)
print(stack.to_config().model_dump_json())
assert StackConfig.from_json(stack.to_config().model_dump_json()).build().layers[:3] == stack.layers[:3]
""",
    )
    assert shown == (
        '{"endpoint":null,"layers":[{"kind":"acme-chaos","pause":"1m","chunk":"2KiB"},'
        '{"kind":"retry","policy":{"kind":"stubborn","times":5}},'
        '{"kind":"retry","policy":{"kind":"standard-policy","budget":{"kind":"purse","coins":7}}},'
        '{"kind":"resume","new_store":{"kind":"shelf","boards":9}},"framing"],"transports":["pigeon"]}'
    )


def test_a_stack_made_in_code_of_its_classes_is_written_by_name(installed: Path) -> None:
    code = """
from towline import Retry
from towline.stack import Stack
from acme.layers import Chaos
from acme.policies import Stubborn
print(Stack(Chaos(5), Retry(Stubborn())).to_config().model_dump(mode="json")["layers"])
"""
    assert run(installed, code) == "[{'kind': 'acme-chaos', 'pause': '5s'}, {'kind': 'retry', 'policy': 'stubborn'}]"


def test_the_schema_has_them(installed: Path) -> None:
    code = """
from towline.config import StackConfig
schema = StackConfig.model_json_schema()
chaos, options = schema["$defs"]["Chaos"], schema["$defs"]["Chaos"]["properties"]
print(chaos["required"], sorted(options), options["chunk"]["default"], "Purse" in schema["$defs"])
"""
    assert run(installed, code) == "['kind', 'pause'] ['chunk', 'kind', 'name', 'pause'] 1KiB True"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("acme-broken", "the layer 'acme-broken' of the package acme-towline cannot be imported: ModuleNotFoundError:"),
        ("acme-function", "'acme-function' of the package acme-towline is no layer"),
        ("acme-chaoss", "there is no layer of kind 'acme-chaoss': did you mean 'acme-chaos'?"),
        ("acme-chaos", "layers.0.pause: is missing"),
    ],
)
def test_what_cannot_be_used_is_said_with_whose_it_is(installed: Path, layer: str, message: str) -> None:
    code = f"""
from towline.config import StackConfig
from towline.errors import ConfigError
try:
    StackConfig.from_toml('layers = ["{layer}"]')
except ConfigError as error:
    print(error)
"""
    assert message in run(installed, code)


def test_nothing_is_imported_that_is_not_named(installed: Path) -> None:
    code = """
from towline.config import StackConfig
StackConfig.from_toml('layers = ["retry", "framing"]')
print([name for name in sys.modules if name.startswith("acme")])
"""
    assert run(installed, code) == "[]"
