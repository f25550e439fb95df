"""What makes another export: everything that decides what a module computes, and nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_trtcheck.model.sources.pytorch.module import fingerprint
from tests.torch import networks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CODE = """
import torch
from torch import nn
from functools import partial

SCALE = 2.0

def helped(x):
    return torch.relu(x) * SCALE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.table = torch.ones(3)
        self.act = partial(torch.sum, dim=1)
        self.depth = 2

    def forward(self, x, power=2):
        for _ in range(self.depth):
            x = helped(self.fc(x))
        return x ** power
"""


def made(code: str = CODE) -> Any:
    module = types.ModuleType("users_net")
    exec(compile(code, "users_net.py", "exec"), vars(module))
    sys.modules["users_net"] = module
    return module.Net()


def digest(module: Any) -> str:
    found = fingerprint().add(module)
    assert not found.unknown
    return found.digest()


def in_place(net: Any) -> None:
    with torch.no_grad():
        net.fc.weight[0, 0] += 1e-3


def by_data(net: Any) -> None:
    net.fc.weight.data[0, 0] += 1e-3  # which its version does not tell


def by_numpy(net: Any) -> None:
    net.fc.weight.detach().numpy()[0, 0] += 1e-3


def swapped(net: Any) -> None:
    net.fc.weight.data[[0, 1]] = net.fc.weight.data[[1, 0]]


def of_a_buffer(net: Any) -> None:
    net.seen[1] = 5


def of_a_plain_tensor(net: Any) -> None:
    net.table[0] = 5


def of_an_attribute(net: Any) -> None:
    net.depth = 3


def of_a_partial(net: Any) -> None:
    net.act = functools.partial(torch.sum, dim=0)


def of_a_hook(net: Any) -> None:
    net.fc.register_forward_hook(lambda _, __, output: output * 2)


def of_its_forward(net: Any) -> None:
    net.forward = lambda x: x


def of_its_class(net: Any) -> None:
    type(net).forward = lambda self, x: self.fc(x)


def of_a_layer(net: Any) -> None:
    net.fc = nn.Linear(4, 4, bias=False)


CHANGES = [
    in_place,
    by_data,
    by_numpy,
    swapped,
    of_a_buffer,
    of_a_plain_tensor,
    of_an_attribute,
    of_a_partial,
    of_a_hook,
    of_its_forward,
    of_its_class,
    of_a_layer,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_module_is_seen(change: Callable[[Any], None]) -> None:
    net = made()
    before = digest(net)
    assert digest(net) == before
    change(net)
    assert digest(net) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu(x)", "torch.tanh(x)"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("power=2", "power=3"),
        ("range(self.depth)", "range(self.depth + 1)"),
        ("* SCALE", "+ SCALE"),
    ],
)
def test_a_change_of_the_code_is_seen(old: str, new: str) -> None:
    before = digest(made())
    assert digest(made("# a comment\n\n" + CODE)) == before
    assert digest(made(CODE.replace(old, new))) != before


def test_what_decides_nothing_is_not_seen() -> None:
    net = made()
    before = digest(net)
    assert digest(made()) == before
    assert digest(net.eval()) == before
    net(torch.rand(1, 4)).sum().backward()
    assert digest(net) == before


def test_code_that_was_put_in_the_place_of_installed_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(net := made())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight)
    assert digest(net) != before


def test_a_helper_of_a_helper_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    code = CODE.replace("torch.relu(x) * SCALE", "users_helpers.scaled(torch.relu(x))")
    helpers = types.ModuleType("users_helpers")
    exec(
        compile("def scaled(x): return twice(x)\ndef twice(x): return x * 2", "users_helpers.py", "exec"), vars(helpers)
    )
    monkeypatch.setitem(sys.modules, "users_helpers", helpers)
    net = made("import users_helpers\n" + code)
    before = digest(net)
    exec(compile("def twice(x): return x * 3", "users_helpers.py", "exec"), vars(helpers))
    assert digest(net) != before


def test_a_class_that_pytorch_made_of_the_users_is_looked_into() -> None:
    def parametrized(code: str) -> Any:
        net = made(code)
        nn.utils.parametrizations.weight_norm(net.fc)
        nn.utils.parametrize.register_parametrization(net, "table", nn.Identity())
        return net

    code = CODE.replace("self.table = torch.ones(3)", "self.table = nn.Parameter(torch.ones(3))")
    before = digest(parametrized(code))
    assert digest(parametrized(code)) == before
    assert digest(parametrized(code.replace("x ** power", "x * power"))) != before


def test_a_module_by_the_name_of_one_of_pythons_is_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    digests = set()
    for body in ("x + 1", "x + 2"):
        net = f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x): return {body}\n"
        (tmp_path / "colorsys.py").write_text(net)
        spec = importlib.util.spec_from_file_location("colorsys", tmp_path / "colorsys.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "colorsys", module)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        spec.loader.exec_module(module)
        sys.dont_write_bytecode = before
        digests.add(digest(module.Net()))
    assert len(digests) == 2


def test_a_traced_module_is_known_by_its_code() -> None:
    digests = [digest(torch.fx.symbolic_trace(made())) for _ in range(2)]
    assert digests[0] == digests[1]
    assert digest(torch.fx.symbolic_trace(made(CODE.replace("torch.relu", "torch.tanh")))) != digests[0]


def test_what_cannot_be_known_is_said() -> None:
    net = made()
    net.socket = iter([])
    net.lock = __import__("threading").Lock()
    assert "a lock" in fingerprint().add(net).unknown


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from tests.torch.networks import Blocks\n"
        "from pytest_trtcheck.model.sources.pytorch.module import fingerprint\n"
        "print(fingerprint().add(Blocks()).digest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert runs == [digest(networks.Blocks())] * 2
