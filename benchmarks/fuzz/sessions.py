"""What a user writes: arguments of markers and fixtures; options on the command line, in ini file and environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import mutations  # type: ignore[import-not-found]
from target import Found, Target, copied, session  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

PRELUDE = """
import collections.abc
import itertools
import numpy as np
import pytest
from pytest_trtcheck import *
from pytest_trtcheck import metrics
from pytest_trtcheck.spec import BuildOptions, Calibration, Case, Tolerance
import pytest_trtcheck

class Bad:
    def __repr__(self): raise RuntimeError("no repr")
    def __eq__(self, other): raise RuntimeError("no eq")
    __hash__ = None
    def __bool__(self): raise RuntimeError("no bool")
    def __len__(self): raise RuntimeError("no len")
    def __iter__(self): raise RuntimeError("no iter")

class Endless:
    def __iter__(self):
        for number in range(10 ** 6):
            yield number

class Unending(collections.abc.Mapping):
    def __getitem__(self, key): return 1.0
    def __iter__(self): return map(str, itertools.count())
    def __len__(self): return 1

RECURSIVE = []
RECURSIVE.append(RECURSIVE)
X = {"x": np.ones((2, 4), np.float32)}
"""

SOUND = {
    "model": ("'functions.onnx'", "'functions.onnx'", "'half.onnx'", "'no.onnx'", "lambda: 'functions.onnx'", "b''"),
    "precision": (
        "'fp16'",
        "'int8+fp16'",
        "['fp16', 'bf16']",
        "'FP16'",
        "pytest.param('fp16', marks=pytest.mark.skip)",
    ),
    "tol": ("0.1", "{'y': 0.1}", "{'*': 1}", "Tolerance(max=1)", "Tolerance(parts={'y': [(1, 0, 2)]})", "{}"),
    "metric": ("'max'", "'l2'", "lambda a, b: 0.0", "metrics.top1(axis=1)", "lambda a, b: None", "print"),
    "score": ("lambda outputs, case: np.ones(2)", "lambda o, c: 1 / 0", "print"),
    "aggregate": ("np.mean", "lambda a: 'x'"),
    "max_drop": ("0.1", "-1"),
    "lower_is_better": ("True",),
    "reference": (
        "'half.onnx'",
        "SOURCE",
        "lambda inputs: inputs",
        "lambda inputs: {'y': np.zeros((2, 4))}",
        "'no.npz'",
    ),
    "engine": ("'half.onnx'", "'no.plan'"),
    "calibration": ("[X]", "X", "'*.npz'", "iter([X])", "Calibration([X], max_samples=1)"),
    "batch": ("1", "[1, 2]", "2"),
    "shapes": ("{'x': (2, 4)}", "{'x': ((1, 4), (2, 4), (8, 4))}", "{'x': (0, 4)}", "{'x': (2**40, 4)}"),
    "keep_fp32": ("'*'", "['product']", "'auto'", "['[']"),
    "exclude": ("'*'", "['product']"),
    "seed": ("0", "-1", "2**70"),
    "backend": ("'onnxruntime'", "'auto'", "['onnxruntime', 'torch']", "'triton'"),
}
LATENCY = {
    **dict.fromkeys(
        ("p50_ms", "p99_ms", "min_qps", "memory_mib"), ("1.0", "{'T4': 1, 'default': 2}", "{'sm75': 1}", "-1")
    ),
    "min_speedup": ("{'fp32': 2.0}", "{'fp32': {'T4': 2}}", "{'torch': 1}"),
    "instances": ("1", "0"),
    "transfers": ("True",),
    "max_seconds": ("1",),
}
RETURNED = ("X", "X", "None", "[X, X]", "X['x']", "{'x': 'a'}", "{'x': np.full((2, 4), np.nan)}", "[]", "{}", "(X, 3)")
FIXTURES = ("trt_model", "trt_inputs", "trt_calibration", "trt_build_options")


def argument(name: str, draw: Random, known: dict[str, tuple[str, ...]] = SOUND) -> str:
    sound = known.get(name, ())
    return draw.choice(sound) if sound and draw.random() < 0.6 else mutations.literal(draw)


def arguments(draw: Random, known: dict[str, tuple[str, ...]], most: int = 4) -> str:
    names = draw.sample(sorted(known), draw.randrange(most + 1))
    if draw.random() < 0.05:
        names.append(draw.choice(("tolerance", "precison", "x")))
    return ", ".join(f"{name}={argument(name, draw, known)}" for name in names if name != "model")


def test(number: int, draw: Random) -> str:
    """One test, marked or with a fixture."""
    kind = draw.randrange(6)
    if kind == 0:
        call = draw.choice(
            (
                f"trt_check({argument('model', draw)}, {draw.choice(RETURNED)}, {arguments(draw, SOUND)})",
                f"trt_build({argument('model', draw)}, {argument('precision', draw)})({draw.choice(RETURNED)})",
                f"trt_reference({argument('model', draw)})({draw.choice(RETURNED)})",
                f"trt_benchmark({mutations.literal(draw)}, {mutations.literal(draw)})",
                f"trt_check({argument('model', draw)}, {mutations.literal(draw)})",
            )
        )
        return f"def test_{number}({call.partition('(')[0]}):\n    {call}\n"
    model = "" if draw.random() < 0.2 else f"{argument('model', draw)}, "
    marks = [f"@trt_parity({model}{arguments(draw, SOUND)})"]
    if draw.random() < 0.2:
        marks.append(f"@trt_latency({arguments(draw, LATENCY)})")
    returned = draw.choice(RETURNED) if draw.random() < 0.8 else mutations.literal(draw)
    used = draw.choice(("", "", "", "trt_engine"))
    return "\n".join([*marks, f"def test_{number}({used}):", f"    return {returned}", ""])


class Markers(Target):  # type: ignore[misc]
    """Marker arguments, through real collection."""

    name, about = (
        "markers",
        "arguments of markers and fixtures, and what tests and overridden fixtures return, in real runs",
    )

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        copied("onnx", folder)
        parts = [PRELUDE, *(test(number, draw) for number in range(6))]
        for name in FIXTURES:
            if draw.random() < 0.1:
                option = draw.choice(("io", "plugins", "custom_ops", "workspace_mib"))
                options = f"BuildOptions({option}={mutations.literal(draw)})"
                value = options if name == "trt_build_options" and draw.random() < 0.5 else mutations.literal(draw)
                parts.append(f"@pytest.fixture\ndef {name}():\n    return {value}\n")
        name = f"test_{draw.getrandbits(60):x}.py"  # pytest imports a module of one name once
        (folder / name).write_text("\n\n".join(parts), encoding="utf-8", errors="surrogatepass")
        listed = ["--collect-only"] * (draw.random() < 0.1)
        reports = [f"--trt-report={folder / 'r.json'}", f"--junitxml={folder / 'j.xml'}"] * (draw.random() < 0.5)
        return lambda: session(folder, "--trt-diagnose=0", *listed, *reports, name)


TEXTS = tuple(text for text in mutations.TEXTS if "/" not in text and "~" not in text and text != "\ud800")
TYPICAL = (
    *(
        "1",
        "3",
        "0.5",
        "fp16,bf16",
        "T4",
        "A100,T4",
        "H200",
        "sm80",
        "onnxruntime",
        "auto",
        "cpu",
        "skip",
        "report.json",
    ),
    *("sub", "20 GiB", "1 B", "9" * 400, "9" * 5000, "1e400", "MyBoard = 8.7", "X=", "=8.7", "T4 = 99.9", "[x"),
    *("localhost:8000", "http://", "grpc://[::1", "host:99999", "http://a:b@c/d", "models = x/y", "*.onnx = a/b/c"),
)


class Options(Target):  # type: ignore[misc]
    """Options."""

    name, about = "options", "values of every option on the command line, in the ini file and in the environment"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        from pytest_trtcheck.plugin.options import OPTIONS

        copied("onnx", folder)
        model = folder / "half.onnx"
        (folder / "test_fuzz.py").write_text(
            "import numpy as np\nfrom pytest_trtcheck import trt_parity\n\n@trt_parity('half.onnx')\ndef test():\n"
            "    return {'x': np.ones((2, 4), np.float32)}\n"
        )
        lines, given, environment = ["[pytest]"], [], {}
        for option in draw.sample(OPTIONS, draw.choice((1, 1, 2, 3))):
            if option.name in {"trt_cache_dir", "trt_triton_url"} and draw.random() < 0.7:
                continue
            text = draw.choice(TYPICAL) if draw.random() < 0.5 else draw.choice(TEXTS)
            where = draw.randrange(3)
            if where == 0 and not option.ini_only:
                given.append(option.flag if option.kind == "flag" else f"{option.flag}={text}")
            elif where == 1 and "\0" not in text:
                environment[option.variable] = text
            else:
                lines.append(f"{option.name} = {text}".replace("\n", "\n    ").replace("\0", "0"))
        (folder / "pytest.ini").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        what = draw.choice(("test_fuzz.py", str(model)))

        def use() -> Found:
            kept = dict(os.environ)
            os.environ.update(environment)
            try:
                return session(folder, "--trt-diagnose=0", *given, what, emulated=draw.random() < 0.5)
            finally:
                os.environ.clear()
                os.environ.update(kept)

        return use
