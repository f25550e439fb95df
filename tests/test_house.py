"""The import contracts hold, and each of them would notice."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "pytest_trtcheck", tmp_path / "pytest_trtcheck", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"], cwd=house, capture_output=True, text=True, check=False
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_contracts_hold(house: Path) -> None:
    code, output = lint(house)
    assert code == 0, output
    assert "2 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors.py", "from pytest_trtcheck import plugin", "pytest_trtcheck.errors is not allowed to import"),
        ("model/inputs.py", "from pytest_trtcheck import precision", "pytest_trtcheck.model is not allowed to import"),
        ("gpu/__init__.py", "from pytest_trtcheck import latency", "pytest_trtcheck.gpu is not allowed to import"),
        ("plugin/options.py", "import numpy", "pytest_trtcheck.plugin.options is not allowed to import numpy"),
        ("stray.py", "", "not listed as layers: - pytest_trtcheck.stray"),
    ],
    ids=["up", "within row 2", "sibling", "heavy", "no row"],
)
def test_a_planted_import_breaks_a_contract(house: Path, module: str, line: str, complaint: str) -> None:
    with (house / "pytest_trtcheck" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    code, output = lint(house)
    assert code != 0
    assert complaint in output, output
