"""The pages whose blocks need PyTorch, run as tests/test_docs_run.py runs the others."""

from __future__ import annotations

import pytest

for library in ("tomllib", "markdown_it", "yaml"):
    pytest.importorskip(library, reason=f"without {library} no page is read")

from tests.docs import run  # noqa: E402 - behind the libraries that it needs
from tests.docs.page import ROOT, pages, read  # noqa: E402


@pytest.mark.parametrize("name", [path.relative_to(ROOT).as_posix() for path in pages("torch")])
def test_a_page_runs(name: str, pytester: pytest.Pytester) -> None:
    run.check(read(ROOT / name), "torch", pytester)
