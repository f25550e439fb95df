"""What a target of the fuzz run is, and what may come of a case."""

from __future__ import annotations

import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from pytest_trtcheck.record import CheckRecord

CORPUS = Path(__file__).parent / "corpus"

FAILURES = ("unforeseen", "traceback", "wrong pass", "long text", "raw text", "escape", "memory", "hang", "crash")
"""What must not come of a case. All else is sound: a verdict, a clean error, or something that was read."""


@dataclass(frozen=True)
class Found:
    """What came of a case, in a word, and what was said."""

    word: str
    said: str = ""

    @classmethod
    def of(cls, record: CheckRecord) -> Found:
        """What came of a check."""
        return cls(record.verdict, record.message or "")


class Target(ABC):
    """One kind of input.

    Parameters
    ----------
    home
        A folder of the worker's own, for what is made once.
    """

    name: str
    about: str

    def __init__(self, home: Path) -> None:
        self.home = home

    @abstractmethod
    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        """Write hostile input into `folder`, an empty one; what is returned uses it as the tool would."""


def seed(draw: Random, kind: str, glob: str = "*") -> Path:
    """A file of the corpus."""
    return draw.choice(sorted(path for path in (CORPUS / kind).glob(glob) if path.is_file()))


def copied(kind: str, folder: Path) -> Path:
    """All of a kind's files of the corpus, in a folder where they can be changed."""
    return Path(shutil.copytree(CORPUS / kind, folder, dirs_exist_ok=True))


def checked(path: object, folder: Path, *, parsed: bool = True, **more: Any) -> Found:
    """Check a model as a marked test would, emulated; `parsed`: TensorRT-RTX's parser is asked too, if it is here."""
    from unittest.mock import patch

    from pytest_trtcheck.backends.tensorrt import acceptance
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.check.checker import Checker, Request
    from pytest_trtcheck.check.request import Allowance
    from pytest_trtcheck.spec import ParitySpec

    names = {"precision", "batch", "tol", "reference", "engine", "keep_fp32", "shapes", "metric"}
    asked = {name: more.pop(name) for name in list(more) if name in names}
    parity = ParitySpec(**{"precision": ("fp16",), "batch": (1,), **asked})
    settings: dict[str, Any] = {
        name: more.pop(name) for name in ("machine", "baselines", "cache", "evidence") if name in more
    }
    settings = {"cache": Cache(folder / "cache"), "backend": "onnxruntime", **settings}
    checker = Checker(allowance=Allowance(seconds=2), **settings)
    request = Request(
        nodeid=more.pop("nodeid", "test_fuzz.py::test"), model=path, folders=(folder,), parity=parity, **more
    )
    with patch.object(acceptance, "_installed", acceptance._installed if parsed else lambda _: None):
        return Found.of(checker.check(request))


def special(path: Path, draw: Random) -> None:
    """What is no regular file where one is expected, or a link to what never ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() or path.is_symlink():
        path.unlink()
    kind = draw.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir(exist_ok=True)
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{(opened := os.open(path.parent, os.O_RDONLY))}/{path.name}")
            os.close(opened)
    else:
        path.symlink_to(draw.choice(("/dev/zero", path.name, "/proc/self/mem", "/dev/full", "/dev/tty")))


SESSION = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:logging", "--color=no", "--import-mode=importlib", "--tb=short"),
    *("-p", "no:faulthandler", "-p", "no:asyncio", "-o", "addopts=", "--override-ini=trt_collect="),
)


def session(folder: Path, *arguments: str, emulated: bool = True) -> Found:
    """Run pytest in this process, as a user would in `folder`; what it printed, and whether anything broke."""
    import contextlib
    import io

    import pytest

    said = io.StringIO()
    chosen = (f"--trt-cache-dir={folder / 'cache'}", *(["--trt-backend=onnxruntime"] if emulated else []))
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = pytest.main([*SESSION, f"--rootdir={folder}", *chosen, *arguments])
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
    text = said.getvalue()
    # With --tb=short, a test that ends with an exception of ours shows where in the package that was raised.
    ours = [line for line in text.splitlines() if re.match(r"\S*pytest_trtcheck/\S+\.py:\d+: in ", line)]
    broken = (
        bool(ours) or status == pytest.ExitCode.INTERNAL_ERROR or "INTERNALERROR" in text or "Traceback (most" in text
    )
    return Found("traceback" if broken else "status", f"{int(status)}: {text}")


def command(*arguments: object) -> Found:
    """Run `python -m pytest_trtcheck …` in this process."""
    import contextlib
    import io

    from pytest_trtcheck.__main__ import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as ended:  # argparse, on what it does not take
            status = int(ended.code or 0)
    return Found("status", f"{status}: {said.getvalue()}")


MADE = """
import numpy as np
from pytest_trtcheck import trt_parity

x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@trt_parity("convolutions.onnx", tol=1e-9)
def test_fails():
    return {"x": x}


@trt_parity("convolutions.onnx", precision="int8+fp16", calibration=[{"x": x}], tol=0.5)
def test_passes():
    return {"x": x}
"""


class Made(Target):
    """A target whose seeds are what the tool itself writes: one run with a check that fails and one that passes."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.made = home / "made"
        self.made.mkdir()
        shutil.copy(CORPUS / "onnx" / "convolutions.onnx", self.made)
        (self.made / "test_seed.py").write_text(MADE)
        outputs = ("--trt-report=report.json", "--trt-baseline=baselines", "--trt-update-baseline")
        found = session(
            self.made, *outputs, "--trt-bundle=bundles", "--trt-export=release", "--trt-search=20", "test_seed.py"
        )
        if not (self.made / "report.json").exists():
            raise RuntimeError(found.said)

    def copy(self, folder: Path) -> None:
        """All of it, in a folder where it can be changed."""
        shutil.copytree(self.made, folder, dirs_exist_ok=True)
