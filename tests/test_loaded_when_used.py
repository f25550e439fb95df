"""What is imported for symbolic sizes alone is loaded with the first of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_trtcheck.model import late

USED = "print(str(ir.SymbolicDim('N') + 1), 'sympy.core' in sys.modules, len(sys.meta_path))"


@pytest.mark.skipif(sys.version_info < late._SAFE, reason="this Python's LazyLoader is not safe among threads")
def test_symbolic_sizes_alone_load_sympy() -> None:
    loaded = "print([name in sys.modules for name in ('sympy.core', 'onnx_ir.passes')])"
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-c", f"import sys; {imports}; {loaded}; {USED}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for imports in ("from pytest_trtcheck.model.graph import ir", "import onnx_ir as ir, onnx_ir.passes.common")
    )
    assert ours == ["[False, True]", theirs[1]]


def test_an_import_that_fails_within_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "_SAFE", (3, 0))
    before = list(sys.meta_path)
    with pytest.raises(ImportError), late.loaded_when_used("colorsys", "no_such_module"):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert sys.meta_path == before
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with late.loaded_when_used("colorsys"):
        import colorsys
    assert "ONE_THIRD" not in object.__getattribute__(colorsys, "__dict__")
    assert colorsys.ONE_THIRD == 1 / 3
