"""Every block of README and docs: run where it can be, held against the code where it can't."""

from __future__ import annotations

import doctest
import sys
from collections import Counter
from pathlib import Path

import pytest

for library in ("tomllib", "markdown_it", "yaml"):
    pytest.importorskip(library, reason=f"without {library} no page is read")

from tests.docs import makers, output, run, static  # noqa: E402 - behind the libraries that they need
from tests.docs.page import REASONS, ROOT, Fault, pages, parse, read  # noqa: E402

PAGES = [path.relative_to(ROOT).as_posix() for path in pages()]

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="pages show what a machine without a GPU prints")


@pytest.fixture(autouse=True)
def loaded(all_loaded: None) -> None:
    """pytester forgets what a run imports."""


def text(faults: object) -> str:
    return "\n".join(map(str, faults))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name: str, pytestconfig: pytest.Config) -> None:
    if found := text(static.faults(read(ROOT / name), pytestconfig)):
        pytest.fail(found, pytrace=False)


@no_gpu
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name: str, pytester: pytest.Pytester) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pages show what TensorRT-RTX builds")
    page = read(ROOT / name)
    if "tests" not in page.environments():
        pytest.skip(f"its blocks run in tox's environment {', '.join(page.environments())}")
    if "--trt-cache=" in page.text:
        pytest.importorskip("fsspec", reason="the page shares a cache, which needs fsspec (extra remote)")
    run.check(page, "tests", pytester)


def test_how_many_blocks_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for name in PAGES for block in read(ROOT / name).blocks]
    counted = Counter(block.reason or "run" for block in blocks)
    with capsys.disabled():
        print(f"\n{len(blocks)} blocks:", ", ".join(f"{count} {each}" for each, count in counted.most_common()))
    assert set(counted) <= {"run", *REASONS}
    assert counted["run"] > len(blocks) * 2 / 3


def test_examples_in_docstrings_hold() -> None:
    runner, finder = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), doctest.DocTestFinder()
    said: list[str] = []
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == "pytest_trtcheck":
            for test in finder.find(module):
                runner.run(test, out=said.append)
    assert not said
    assert runner.tries >= 8


# What goes wrong on a page is found, and where. Each of these pages is right but for one thing.

RIGHT = """\
<!-- with: conv.onnx as models/conv.onnx -->
# A page

```python title="test_conv.py"
from pytest_trtcheck import trt_parity


@trt_parity("models/conv.onnx", precision="fp16", batch=2)
def test_conv(): ...
```

```console
$ pytest --trt-diagnose=5
…
model      precision  evidence  worst error  tolerance   verdict
conv.onnx  fp16       emulated      4.09e-4  max ≤ 0.01  pass
…
=== 1 passed in 0.10s ===
```

```python
from pytest_trtcheck import Tolerance

print(Tolerance(max=0.01).limits["max"])
```

<!-- output of: the block above -->
```text
0.01
```

<!-- not run: needs a GPU -->
```console
$ pytest --trt-gpu=A100 --trt-require-gpu
```
"""


@no_gpu
def test_a_page_that_is_right_has_no_fault(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> None:
    page = parse("page.md", RIGHT)
    assert text([*static.faults(page, pytestconfig), *run.run(page, "tests", pytester)]) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("--trt-diagnose=5", "--trt-diagnosis=5", "page.md:13: pytest has no option --trt-diagnosis=5"),
        ("--trt-diagnose=5", "--trt-diagnose=5s", "page.md:13: --trt-diagnose=5s: "),
        ("import Tolerance", "import Tolerances", "page.md:22: there is no Tolerances in pytest_trtcheck"),
        ("Tolerance(max=0.01)", "Tolerance(maximum=0.01)", "page.md:24: Tolerance: "),
        ("print(", "print((", "page.md:24: '(' was never closed"),
        ('precision="fp16"', 'precisions="fp16"', "page.md:8: trt_parity has no argument precisions"),
        ('precision="fp16"', 'precision="fp61"', "page.md:8: trt_parity: precision="),
        ("def test_conv():", "def test_conv(trt_modell):", "page.md:9: there is no fixture trt_modell"),
        ("--trt-gpu=A100", "--trt-gpu=A1000000", "page.md:34: --trt-gpu=A1000000: unknown GPU"),
        ("$ pytest --trt-gpu", "$ python -m pytest_trtcheck difff a\n$ pytest --trt-gpu", "page.md:34: python -m"),
        ("$ pytest --trt-gpu", "$ pip install pytest-trtcheck[cuda13]\n$ pytest --trt-gpu", "page.md:34: there is no"),
        ("# A page", "# A page\n\nSet `TRTCHECK_GPUX`.", "page.md:4: there is no variable TRTCHECK_GPUX"),
        ("# A page", "# A page\n\n```groovy\nsh 'pytest'\n```", "page.md:5: nothing runs a block of groovy"),
        ("<!-- output of: the block above -->\n", "", "page.md:28: a text block says whose output it is"),
    ],
)
def test_what_does_not_exist_is_found(right: str, wrong: str, expected: str, pytestconfig: pytest.Config) -> None:
    assert RIGHT.count(right) == 1
    assert expected in text(static.faults(parse("page.md", RIGHT.replace(right, wrong)), pytestconfig))


@no_gpu
def test_what_does_not_hold_is_found(pytester: pytest.Pytester) -> None:
    failing = """```python
from pytest_trtcheck import trt_parity


@trt_parity("gone.onnx")
def test_gone(): ...
```
"""
    first = "$ pytest --trt-diagnose"
    page = RIGHT.replace("4.09e-4", "4.10e-4").replace("print(", "print(1 / 0, ")
    page = page.replace("# A page\n", f"# A page\n\n{failing}")
    page = page.replace(first, f"$ curl x\n$ python -c 'raise SystemExit(3)'\n{first}")
    found = run.run(parse("page.md", page), "tests", pytester)
    assert [str(each).splitlines()[0] for each in found] == [
        "page.md:5: its tests do not pass:",
        "page.md:21: $ curl x: the tests run no curl: say why the block is not run",
        "page.md:22: $ python -c 'raise SystemExit(3)'",
        "page.md:23: $ pytest --trt-diagnose=5",
        "page.md:34: ZeroDivisionError: division by zero",
        "page.md:39: $ the block above: 'the block above'",
    ]
    assert "gone.onnx" in str(found[0])
    assert "ended with 3" in str(found[2])
    assert "-conv.onnx  fp16       emulated      4.10e-4  max ≤ 0.01  pass" in str(found[3])


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("needs a GPU", "is slow", "page.md:32: not run: 'is slow' is none of needs a GPU, "),
        ("<!-- not run:", "<!-- notrun:", "page.md:32: <!-- notrun: needs a GPU -->: what should the tests do?"),
        ("-->\n```text", "-->\n\nWords.\n\n```text", "page.md:29: no block behind 'output of'"),
        ("```text", "```", "page.md:28: a fence that names no language"),
        ('title="test_conv.py"', "name=x", "page.md:4: python name=x: only title="),
        ("# A page", "# A page\n\n    $ pytest", "page.md:4: a block by indentation"),
        ("<!-- with", "<!-- environment: jax -->\n<!-- with", "page.md:1: environment: 'jax' is none of tests, torch"),
    ],
)
def test_what_the_tests_cannot_read_is_refused(right: str, wrong: str, expected: str) -> None:
    with pytest.raises(Fault) as raised:
        parse("page.md", RIGHT.replace(right, wrong))
    assert expected in str(raised.value)


def test_what_changes_from_run_to_run_is_left_out_and_no_figure() -> None:
    same = [
        ("9 passed in 6.08s", "9 passed in 71.20s (0:01:11)"),
        ("=== 9 passed in 6.08s ===", "========= 9 passed in 61.08s ====="),
        ("tensorrt_rtx 1.7.1.116, recorded 2026-11-26", "tensorrt_rtx 1.8.0.4, recorded 2027-01-02"),
        ("3fa91b2c", "77c1e0aa"),
    ]
    other = [
        ("9 passed in 6.08s", "8 passed in 6.08s"),
        ("max 0.00400", "max 0.00401"),
        ("p50 1.2 ms", "p50 1.3 ms"),
        ("4.1 MiB", "5.0 MiB"),
        ("98.2 %", "98.3 %"),
        ("12345678", "12345679"),
    ]
    assert [pair for pair in same if output.difference([pair[0]], pair[1])] == []
    assert [pair for pair in other if not output.difference([pair[0]], pair[1])] == []


@pytest.mark.parametrize(
    ("page", "printed", "fits"),
    [
        ("a\n…\nd", "a\nb\nc\nd", True),
        ("a\n…\nd", "a\nd", True),
        ("a\n…\nd", "a\nd\ne", False),
        ("…\nb\n...\nd\n…", "a\nb\nc\nd\ne", True),
        ("…\nd\n…\nb\n…", "a\nb\nc\nd\ne", False),
        ("a\n…", "b\na", False),
        ("…\na\nb\n…", "a\na\nb", True),
        ("plugins: …", "plugins: xdist", True),
        ("plugins: …", "plugin: xdist", False),
        ("error 0.0100 here", "error 0.0103 here", False),
    ],
)
def test_a_line_of_dots_stands_for_any_number_of_lines(page: str, printed: str, fits: bool) -> None:
    assert (output.difference(page.splitlines(), printed) is None) == fits


def test_figures_may_differ_only_where_a_page_says_by_how_much() -> None:
    assert output.difference(["max 0.0100 of 12"], "max 0.0103 of 12", within=0.05) is None
    assert output.difference(["max 0.0100 of 12"], "max 0.0113 of 12", within=0.05)
    assert output.difference(["max 0.0100 of 12"], "max 0.0103 of 13", within=0.05)


def test_a_file_that_nothing_makes_is_told(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"nothing is called 'resnet\.onnx'"):
        makers.put("resnet.onnx", tmp_path / "x.onnx")
