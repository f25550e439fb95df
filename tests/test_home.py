"""Where files go for an account, and for one that has no home."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Suite


def test_a_tilde_is_the_home_directory_wherever_it_was_given(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    home = suite.path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRTCHECK_HTML", "~/variable.html")
    monkeypatch.delenv("TRTCHECK_CACHE_DIR")
    suite.pytester.makeini("[pytest]\ntrt_cache_dir = ~/kept\n")
    suite.write(test_a="@trt_parity('conv.onnx', batch=1)\ndef test_a(): ...\n")
    suite.run("--trt-report=~/given.json").result.assert_outcomes(passed=1)
    assert sorted(each.name for each in home.iterdir() if each.name != ".cache") == [
        "given.json",
        "kept",
        "variable.html",
    ]
    assert not (suite.path / "~").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="an account without a home is a container's on Linux")
def test_an_account_without_a_home(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `docker run --user 12345`: no HOME, no passwd entry. What names `~` is looked up as it is."""

    def nobody(*_: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRTCHECK_CACHE_DIR")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("pwd.getpwnam", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(suite.path / "tmp"))
    (suite.path / "tmp").mkdir()
    suite.write(
        test_a="@trt_parity('conv.onnx', batch=1)\ndef test_a(): ...\n\n"
        "@trt_parity('~/conv.onnx', batch=1)\ndef test_b(): ...\n"
    )
    run = suite.run("--basetemp=base")
    run.result.assert_outcomes(passed=1, failed=1)
    assert "~/conv.onnx: no such model file" in run.check("test_b")["message"]
    assert (suite.path / "tmp" / f"pytest-trtcheck-{os.getuid()}" / "v1").is_dir()
