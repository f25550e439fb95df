"""The pages whose blocks need PyTorch, run as tests/test_docs_run.py runs the others."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec

import pytest

for library in ("tomllib", "markdown_it", "yaml"):
    pytest.importorskip(library, reason=f"without {library} no page is read")

from tests.docs import run  # noqa: E402 - behind the libraries that it needs
from tests.docs.page import ROOT, pages, read  # noqa: E402

BESIDE = ("skl2onnx", "sklearn", "torchvision", "transformers")
"""What pages import beside PyTorch."""


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """pytester forgets what a run imports, and libraries in C load once."""
    for library in BESIDE:
        if find_spec(library) is not None:
            import_module(library)


@pytest.mark.parametrize("name", [path.relative_to(ROOT).as_posix() for path in pages("torch")])
def test_a_page_runs(name: str, pytester: pytest.Pytester) -> None:
    page = read(ROOT / name)
    for library in BESIDE:
        if find_spec(library) is None and re.search(rf"^(import|from) {library}\b", page.text, re.MULTILINE):
            pytest.skip(f"needs {library}: tox -e torch")
    run.check(page, "torch", pytester)
