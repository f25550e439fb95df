"""Markers where they can't do their work: refused, never ignored. Each test here is green where nobody looks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.plugin import hooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite


def outcomes(run: Run) -> dict[str, str]:
    """Verdicts of the checks by the name of the test."""
    return {record["nodeid"].partition("::")[2]: record["verdict"] for record in run.checks}


UNITTEST = """
import unittest

class TestMethod(unittest.TestCase):
    @trt_parity("missing.onnx")
    def test_method(self): ...

    def test_unmarked(self): ...

@pytest.mark.trt_latency(p50_ms=1)
class TestWhole(unittest.TestCase):
    def test_first(self): ...

class TestAwaited(unittest.IsolatedAsyncioTestCase):
    @pytest.mark.trt_parity("conv.onnx", batch=1)
    async def test_awaited(self): ...

@pytest.mark.xfail
class TestExpected(unittest.TestCase):
    @trt_parity("missing.onnx")
    def test_expected(self): ...

class Base(unittest.TestCase):
    pytestmark = trt_parity("missing.onnx")

class TestInherited(Base):
    def test_inherited(self): ...
"""


def test_unittest_methods_are_refused(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(test_unit=UNITTEST)
    run = run_everywhere()
    run.result.assert_outcomes(passed=1, errors=5)
    assert set(outcomes(run).values()) == {"error"}
    assert len(run.checks) == 5
    assert "unittest runs the methods of TestMethod by itself" in " ".join(run.text.split())
    assert "call the fixture trt_check" in run.text


ADDED = """
class Custom(pytest.Item):
    def runtest(self): ...

class CustomFile(pytest.File):
    def collect(self):
        yield Custom.from_parent(self, name="custom")

def pytest_collect_file(file_path, parent):
    return CustomFile.from_parent(parent, path=file_path) if file_path.suffix == ".custom" else None

class Other(pytest.Function):
    def runtest(self): ...

def pytest_pycollect_makeitem(collector, name, obj):
    return Other.from_parent(collector, name=name) if name.startswith("other_") else None

def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in {"custom", "test_late", "parity", "test_it.documented"}:
            item.add_marker(trt_parity())
        if item.name == "test_late_list":
            item.add_marker(trt_parity(precision=["fp16", "bf16"]))

@pytest.fixture
def trt_model():
    return "gemm.onnx"

@pytest.fixture
def trt_inputs():
    return np.ones((2, 4), np.float32)

@pytest.fixture
def applied(request):
    request.applymarker(trt_parity("missing.onnx"))
"""

IT = """
def documented():
    '''
    >>> 1 + 1
    2
    '''

@trt_parity("missing.onnx")
def other_function(): ...

def test_late(): ...
def test_late_list(): ...
def test_applied(applied): ...
def test_in_the_body(request):
    request.node.add_marker(trt_parity("missing.onnx"))

@pytest.mark.parametrize("which", [1, pytest.param(2, marks=trt_parity())])
def test_one_of_two(which): ...

@pytest.mark.parametrize("which", [pytest.param(1, marks=trt_parity(batch=[1, 2]))])
def test_list(which): ...
"""


def test_markers_of_hooks_and_on_items_of_other_kinds_are_followed_or_refused(suite: Suite) -> None:
    (suite.path / "some.custom").touch()
    suite.write(conftest=ADDED, test_it=IT)
    run = suite.run("--doctest-modules", "test_it.py", "some.custom", "conv.onnx")
    assert outcomes(run) == {
        "custom": "error",
        "parity": "error",
        "test_it.documented": "error",
        "other_function": "error",
        "test_late": "pass",
        "test_late_list": "error",
        "test_applied": "error",
        "test_in_the_body": "error",
        "test_one_of_two[2]": "pass",
        "test_list[1]": "error",
    }
    assert run.check("test_late")["inputs"] == "trt_inputs"
    run.result.assert_outcomes(passed=3, failed=3, errors=5)
    for text in (
        "(Custom): only test functions are run",
        "(DoctestItem): only test functions are run",
        "lists fp16, bf16, and came too late",
        "was added while the test was running",
        "what ran it, an Other, never called the function",
    ):
        assert text in " ".join(run.text.split())  # However it is wrapped.


NO_TEST = {
    "helper": ('@trt_parity("x.onnx")\ndef helper(): ...\n', "marks the function helper (test_bad.py:"),
    "class": ('@trt_parity("x.onnx")\nclass Helper:\n    def test_it(self): ...\n', "marks the class Helper"),
    "empty class": ('@trt_parity("x.onnx")\nclass TestIt:\n    def helper(self): ...\n', "marks TestIt, in which"),
    "method": ('class TestIt:\n    @trt_parity("x.onnx")\n    def helper(self): ...\n', "the function helper"),
    "unittest method": (
        "import unittest\nclass TestIt(unittest.TestCase):\n    def test_it(self): ...\n"
        '    @trt_parity("x.onnx")\n    def helper(self): ...\n',
        "the function helper",
    ),
    "method of a class of another name": (
        'class ItTests:\n    @trt_parity("x.onnx")\n    def test_it(self): ...\n',
        "marks the function test_it (test_bad.py:",
    ),
    "turned off": ('@trt_parity("x.onnx")\ndef test_it(): ...\ntest_it.__test__ = False\n', "the function test_it"),
    "fixture": ('@trt_parity("x.onnx")\n@pytest.fixture\ndef it(): ...\n', "fixture"),
    "fixture inside": ('@pytest.fixture\n@trt_parity("x.onnx")\ndef it(): ...\n', "fixture"),
    "maker": (
        "def make_model(): ...\n@pytest.mark.trt_parity(make_model)\ndef test_it(): ...\n",
        "write @pytest.mark.trt_parity(model=make_model), or import trt_parity",
    ),
    "maker with a default": (
        "def make_model(size=1): ...\n@pytest.mark.trt_parity(make_model)\ndef test_it(): ...\n",
        "write @pytest.mark.trt_parity(model=make_model)",
    ),
    "maker's class": (
        "class Net:\n    def __init__(self, size=1): ...\n@pytest.mark.trt_parity(Net)\ndef test_it(): ...\n",
        "write @pytest.mark.trt_parity(model=Net)",
    ),
    "maker elsewhere": (
        "import makers\n@pytest.mark.trt_parity(makers.make_model)\ndef test_it(): ...\n",
        "write @pytest.mark.trt_parity(model=make_model)",
    ),
    "no parentheses": ("@trt_parity\ndef test_it(): ...\n", "write @trt_parity(…) with parentheses"),
    "stacked": (
        "@trt_latency(p50_ms=1)\n@trt_parity\ndef test_it(): ...\n",
        "write @trt_latency(…) with parentheses",
    ),
    "class without parentheses": ("@trt_parity\nclass TestIt:\n    def test_it(self): ...\n", "with parentheses"),
    "pytest_mark": ('pytest_mark = trt_parity("x.onnx")\n', "pytest_mark holds trt markers, and pytest reads none"),
    "pytestmarks": ('pytestmarks = [trt_parity("x.onnx")]\n', "call it pytestmark"),
    "PYTESTMARK of a class": (
        'class TestIt:\n    PYTESTMARK = [trt_parity("x.onnx")]\n    def test_it(self): ...\n',
        "PYTESTMARK holds trt markers",
    ),
    "lambda": ('test_it = trt_parity("x.onnx")(lambda: None)\n', "above a function made by def"),
}


@pytest.mark.parametrize("case", NO_TEST)
def test_a_marker_on_what_is_no_test_is_a_collection_error(suite: Suite, case: str) -> None:
    text, message = NO_TEST[case]
    suite.write(
        makers="def make_model(): ...\n", test_bad=f"{text}\ndef test_good(): ...\n", test_other="def test_b(): ..."
    )
    run = suite.run()
    assert run.result.ret == pytest.ExitCode.INTERRUPTED
    run.result.assert_outcomes(errors=1)
    assert message in run.text
    suite.run("--continue-on-collection-errors", "test_other.py").result.assert_outcomes(passed=1)


def test_a_marked_module_without_tests_is_a_collection_error(suite: Suite) -> None:
    suite.write(test_none='pytestmark = trt_parity("x.onnx")\n')
    run = suite.run()
    run.result.assert_outcomes(errors=1)
    assert "marks test_none.py, in which pytest finds no test" in run.text


@pytest.mark.parametrize("where", ["conftest.py", "sub/conftest.py", "sub/__init__.py"])
def test_a_pytestmark_that_pytest_does_not_read_is_a_collection_error(suite: Suite, where: str) -> None:
    (suite.path / "sub").mkdir()
    (suite.path / "sub/__init__.py").touch()
    (suite.path / "sub/test_below.py").write_text("def test_below(): ...\n")
    text = 'from pytest_trtcheck import trt_parity\npytestmark = [trt_parity("conv.onnx", batch=1, tol=1e-12)]\n'
    (suite.path / where).write_text(text)
    run = suite.run("sub")
    run.result.assert_outcomes(errors=1)
    assert f"trt_parity is in the pytestmark of {suite.path / where}, which pytest does not read" in run.said


def test_a_pytestmark_of_a_conftest_may_be_imported_and_be_another_marks(suite: Suite) -> None:
    suite.write(
        conftest='pytestmark = [trt_parity("conv.onnx", batch=1)]\n',
        test_it="from conftest import pytestmark\ndef test_it(): ...\n",
    )
    suite.run().result.assert_outcomes(passed=1)
    suite.write(conftest="pytestmark = pytest.mark.skip\n", test_it="def test_it(): ...\n")
    suite.run().result.assert_outcomes(passed=1)
    suite.write(
        conftest='PYTESTMARK = [trt_parity("conv.onnx", batch=1)]\npytest_mark = pytest.mark.skip\n',
        test_it="from conftest import PYTESTMARK, pytest_mark\npytestmark = PYTESTMARK\ndef test_it(): ...\n",
    )
    suite.run().result.assert_outcomes(passed=1)


PLAIN = """
{definition}

@trt_parity("conv.onnx", batch=1)
def test_marked(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", batch=1)

@trt_parity("conv.onnx", batch=1)
class TestOverrides:
    @pytest.fixture
    def trt_inputs(self): return {{"image": np.ones((1, 3, 16, 16), np.float32)}}

    @pytest.fixture
    def trt_build_options(self): return None

    def test_overridden(self): ...
"""


@pytest.mark.parametrize("where", ["module", "conftest"])
@pytest.mark.parametrize(
    "definition",
    [
        "def trt_inputs(): ...",
        "trt_inputs = {'image': np.ones((1, 3, 16, 16), np.float32)}",
        "from pytest_trtcheck import BuildOptions\ndef trt_build_options(): return BuildOptions(io='fp16')",
    ],
)
def test_what_is_called_like_a_fixture_and_is_none_is_an_error(suite: Suite, definition: str, where: str) -> None:
    test = PLAIN.format(definition=definition if where == "module" else "")
    suite.write(test_it=test, conftest=definition if where == "conftest" else "")
    run = suite.run()
    run.result.assert_outcomes(passed=1, failed=2)
    name = "trt_build_options" if "trt_build_options" in definition else "trt_inputs"
    assert f"{name} of {'test_it' if where == 'module' else 'conftest'} is a" in run.said
    assert "and no fixture: the check would not use it" in run.said


def test_a_fixture_that_gives_nothing_is_named_beside_what_was_taken_instead(suite: Suite) -> None:
    suite.write(
        test_it="""
@pytest.fixture
def trt_inputs():
    {"image": np.ones((1, 3, 16, 16), np.float32)}  # return was forgotten

@trt_parity("conv.onnx", batch=1)
def test_marked(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", batch=1)
""",
        test_other='@trt_parity("conv.onnx", batch=1)\ndef test_other(): ...\n',
    )
    run = suite.run()
    run.result.assert_outcomes(passed=3)
    said = "inputs were generated (seed 0): the fixture trt_inputs gives None"
    assert [said in run.check(test)["notes"] for test in ("marked", "by_hand", "other")] == [True, True, False]


MISSPELLED = """
@pytest.fixture
def {fixture}(): return None

@trt_parity("conv.onnx", batch=1)
def test_marked(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", batch=1)

def test_inputs_of_its_own(trt_check):
    trt_check("conv.onnx", {{"image": np.ones((1, 3, 16, 16), np.float32)}})
"""


@pytest.mark.parametrize(
    ("fixture", "meant"),
    [
        ("trt_input", "trt_inputs"),
        ("trtInputs", "trt_inputs"),
        ("trt_imputs", "trt_inputs"),
        ("trt_build_option", "trt_build_options"),
        ("trt_buildoptions", "trt_build_options"),
    ],
)
def test_a_fixture_that_is_called_nearly_as_ours_is_an_error(suite: Suite, fixture: str, meant: str) -> None:
    suite.write(test_it=MISSPELLED.format(fixture=fixture))
    run = suite.run()
    run.result.assert_outcomes(passed=int(meant == "trt_inputs"), failed=2 + int(meant != "trt_inputs"))
    assert f"the fixture {fixture} of test_it is used by no test, and nothing else gives {meant}" in run.said
    assert f"→ call it {meant}" in run.said


@pytest.mark.parametrize("fixture", ["trt_input", "trt_build_option"])
@pytest.mark.parametrize("selected", ["", "-ktest_marked"])
def test_a_fixture_that_any_test_asks_for_is_its_own(suite: Suite, fixture: str, selected: str) -> None:
    suite.write(test_it=f"{MISSPELLED.format(fixture=fixture)}\ndef test_other({fixture}): ...\n")
    suite.run(*filter(None, [selected])).result.assert_outcomes(
        passed=1 if selected else 4, deselected=3 * bool(selected)
    )


@pytest.mark.parametrize("fixture", ["trt_inputs_small", "trt_inputs2", "trt_output", "trt_model_input", "inputs"])
def test_a_fixture_with_a_name_of_its_own_is_no_error(suite: Suite, fixture: str) -> None:
    suite.write(test_it=MISSPELLED.format(fixture=fixture))
    suite.run().result.assert_outcomes(passed=3)


def test_what_is_called_like_a_fixture_and_is_not_needed_is_no_error(suite: Suite) -> None:
    suite.write(
        test_it="""
def trt_inputs(): return {"image": np.ones((1, 3, 16, 16), np.float32)}
def trt_model(): return "conv.onnx"
trt_calibration = 3

@trt_parity(trt_model, batch=1)
def test_marked():
    return trt_inputs()

def test_by_hand(trt_check, trt_build):
    trt_check(trt_model, trt_inputs())
    trt_build(trt_model)
"""
    )
    suite.run().result.assert_outcomes(passed=2)


CALLED = """
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@trt_parity("conv.onnx", batch=1)
def test_named(precision): ...

@pytest.fixture(params=["bf16"])
def precision(request): return request.param

@trt_parity("conv.onnx", batch=1)
def test_by_fixture(precision): ...

@pytest.mark.parametrize("precision", ["double", 3, None, np.zeros(3)], ids=repr)
@trt_parity("conv.onnx", batch=1)
def test_other(precision): ...

class TestTaken:
    @pytest.fixture
    def trt_model(self, precision): return {"fp16": "conv.onnx", "bf16": "./conv.onnx"}[precision]

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    @trt_parity(batch=1)
    def test_taken(self, precision): ...
"""


def test_a_parameter_precision_that_the_check_does_not_take_is_an_error(suite: Suite) -> None:
    suite.write(test_it=CALLED)
    run = suite.run()
    run.result.assert_outcomes(passed=7, errors=2)
    assert "test_named[bf16]: is called by the parameter precision=bf16, and would be checked in fp16" in run.said


IDLE = """
@pytest.mark.parametrize("seed", [0, 1])
@trt_parity("conv.onnx", batch=1)
def test_seed(seed): ...

@pytest.mark.parametrize(("tol", "batch"), [(0.1, 1)])
@trt_parity("conv.onnx", batch=1)
class TestBoth:
    def test_both(self, tol, batch): ...
"""

TAKEN = """
@pytest.mark.parametrize("batch", [1, 2])
@trt_parity("conv.onnx")
def test_returned(batch):
    return {"image": np.ones((batch, 3, 16, 16), np.float32)}

@pytest.mark.parametrize("batch", [1, 2])
class TestFixture:
    @pytest.fixture
    def trt_inputs(self, batch): return {"image": np.ones((batch, 3, 16, 16), np.float32)}

    @trt_parity("conv.onnx")
    def test_fixture(self, batch): ...

@pytest.mark.parametrize("batch", [1, 2])
class TestRequest:
    @pytest.fixture
    def trt_inputs(self, request):
        return {"image": np.ones((request.getfixturevalue("batch"), 3, 16, 16), np.float32)}

    @trt_parity("conv.onnx")
    def test_request(self, batch): ...

@pytest.mark.parametrize("tol", [pytest.param(0.1, marks=trt_parity("conv.onnx", batch=1, tol=0.1))])
def test_param(tol): ...

@pytest.fixture(params=[0, 1])
def seed(request): ...

@trt_parity("conv.onnx", batch=1)
def test_effect(seed): ...

@pytest.mark.parametrize("which", [0, 1])
@trt_parity("conv.onnx", batch=1)
def test_other(which): ...
"""


def test_a_parameter_that_nothing_of_the_check_can_take_is_an_error(suite: Suite) -> None:
    suite.write(test_it=IDLE)
    run = suite.run()
    run.result.assert_outcomes(failed=3)
    assert "test_seed[1]: there is a test for each seed, and all would be checked alike" in run.said
    assert "there is a test for each tol and batch" in run.said
    suite.write(test_it=TAKEN)
    suite.run().result.assert_outcomes(passed=11)


SOUND = """
def make_model():
    return "conv.onnx"

small = trt_parity(make_model, batch=1)

@small
def test_variable(): ...

@trt_parity(lambda: open("gemm.onnx", "rb").read())
def test_bytes(): ...

@pytest.mark.trt_parity(model=make_model, batch=1)
def test_named(): ...

class Base:
    pytestmark = [trt_parity("missing.onnx")]
    def test_inherited(self): ...

class TestDerived(Base): ...

@trt_parity("conv.onnx", batch=1)
class TestCloser(Base): ...

@trt_parity("conv.onnx", batch=1)
class Mixin:
    def test_mixed(self): ...

class TestMixed(Mixin): ...

from pytest import mark

class Proxy:
    __class__ = property(lambda self: self.anything)

    def __getattr__(self, name):
        raise RuntimeError("not bound")

proxy = Proxy()
"""


def test_what_markers_may_be_given_and_where_the_closest_counts(suite: Suite) -> None:
    suite.write(test_sound=SOUND)
    run = suite.run()
    assert outcomes(run) == {
        "test_variable": "pass",
        "test_bytes": "pass",
        "test_named": "pass",
        "TestDerived::test_inherited": "error",
        "TestCloser::test_inherited": "pass",
        "TestMixed::test_mixed": "pass",
    }
    assert run.check("test_bytes")["model"] == "<lambda>()"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lambda: 3", "gave an int, which is no model"),
        ("lambda: None", "gave None, which is no model"),
        ("lambda size: 3", "takes arguments"),
        ("lambda: 1 / 0", "failed to make the model: ZeroDivisionError"),
        ('lambda: "missing.onnx"', "missing.onnx: no such model file"),
    ],
)
def test_a_callable_that_makes_no_model(suite: Suite, model: str, message: str) -> None:
    suite.write(test_bad=f"@trt_parity({model})\ndef test_bad(): ...\n")
    run = suite.run()
    run.result.assert_outcomes(failed=1)
    assert outcomes(run) == {"test_bad": "error"}
    assert message in run.text


def test_the_lists_take_parameters_with_marks_and_names(suite: Suite) -> None:
    suite.write(
        test_it="""
xfail, skip = pytest.mark.xfail(strict=True), pytest.mark.skip(reason="not here")

PRECISIONS = ["fp16", pytest.param("bf16", marks=xfail), pytest.param("fp32", marks=skip)]

@trt_parity("conv.onnx", precision=PRECISIONS, tol=1e-3)
def test_precision():
    return np.ones((2, 3, 16, 16), np.float32)

@trt_parity("conv.onnx", batch=(pytest.param(1, id="one"), pytest.param(2, marks=trt_latency(p50_ms=2)), 3))
def test_batch(): ...

@trt_parity("conv.onnx", batch=1, backend=[pytest.param("tensorrt-rtx", marks=skip), "emulated"])
def test_backend(): ...

@trt_parity("conv.onnx", precision=pytest.param("bf16", marks=skip))
def test_alone(): ...

@trt_parity("conv.onnx", batch=1, precision=["fp16", pytest.param("fp61")])
def test_typo(): ...
"""
    )
    run = suite.run("-rx")
    run.result.assert_outcomes(passed=5, skipped=3, xfailed=1, errors=1)
    assert outcomes(run) == {
        "test_precision[fp16]": "pass",
        "test_precision[bf16]": "fail",
        **{f"test_batch[{name}]": "pass" for name in ("one", "batch2", "batch3")},
        "test_backend[onnxruntime]": "pass",
        "test_typo": "error",
    }
    assert [each["nodeid"][-8:] for each in run.checks if (each["latency"] or {}).get("budgets")] == ["[batch2]"]
    assert "precision='fp61': expected one of" in run.said
    assert {each["gpu_ran"] for each in run.checks} == {False}, "of one that was refused, too"


def test_given_twice_in_one_place(suite: Suite) -> None:
    suite.write(
        test_twice="""
pytestmark = [trt_parity("conv.onnx", batch=1), trt_parity("gemm.onnx")]
def test_module(): ...

@trt_parity("conv.onnx", batch=1)
@trt_parity("gemm.onnx")
class TestTwice:
    def test_class(self): ...
"""
    )
    run = suite.run()
    run.result.assert_outcomes(errors=2)
    assert run.text.count("given twice for one test") >= 2


ELSEWHERE = """
import functools

def test_imported(): ...

class TestImported:
    def test_method(self): ...

class ForHere:
    def test_for_here(self): ...

def wrapped(function):
    def inner():
        return function()
    return inner
"""

HERE = """
import functools

from elsewhere import ForHere, TestImported, test_imported, wrapped
from elsewhere import test_imported as test_renamed

pytestmark = trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=1)

def test_own(): ...

def given(batch): ...

test_partial = functools.partial(given, 1)

@wrapped
def test_wrapped_by_another_module(): ...

class TestOwn(ForHere):
    def test_method(self): ...
"""


def test_a_modules_marks_do_not_reach_what_it_imports(suite: Suite) -> None:
    suite.write(elsewhere=ELSEWHERE, test_here=HERE)
    run = suite.run("-v")
    checked = {
        *("test_own", "test_partial", "test_wrapped_by_another_module"),
        *("TestOwn::test_method", "TestOwn::test_for_here"),
    }
    assert set(outcomes(run)) == {f"{name}[{precision}]" for name in checked for precision in ("fp16", "bf16")}
    run.result.assert_outcomes(passed=10 + 3)


AWAITED = """
import asyncio

@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param

@pytest.mark.{plugin}
@trt_parity("conv.onnx", precision=["fp16", "bf16"])
async def test_inputs():
    await asyncio.sleep(0)
    return np.ones((3, 3, 16, 16), np.float32)

@pytest.mark.{plugin}
@trt_parity("conv.onnx")
async def test_bad_inputs():
    return np.ones((3, 3, 16, 17), np.float32)

class TestMethods:
    @pytest.mark.{plugin}
    @trt_parity("conv.onnx")
    async def test_method(self):
        return np.ones((3, 3, 16, 16), np.float32)

@trt_parity("conv.onnx", batch=1)
async def test_nobody_runs_it(): ...

def hidden(function):
    def called():
        return function()
    return called

@trt_parity("conv.onnx", batch=1)
@hidden
async def test_hidden(): ...

@trt_parity("conv.onnx", batch=1)
def test_generator():
    return (number for number in range(3))
"""


@pytest.mark.parametrize("plugin", ["asyncio", "anyio"])
def test_coroutines_are_run_by_their_plugin_and_what_they_return_is_fed(suite: Suite, plugin: str) -> None:
    pytest.importorskip({"asyncio": "pytest_asyncio"}.get(plugin, plugin))
    suite.write(test_awaited=AWAITED.format(plugin=plugin))
    ignored = "ignore:The configuration option:pytest.PytestDeprecationWarning"
    run = suite.run("-W", ignored, plugins=[plugin])
    found = {name.replace("-asyncio", "").replace("[asyncio]", ""): verdict for name, verdict in outcomes(run).items()}
    assert found == {
        "test_inputs[fp16]": "pass",
        "test_inputs[bf16]": "pass",
        "test_bad_inputs": "error",
        "test_nobody_runs_it": "error",
        "TestMethods::test_method": "pass",
        "test_hidden": "error",
        "test_generator": "error",
    }
    assert {record["inputs"] for record in run.checks if "test_inputs" in record["nodeid"]} == {"returned"}
    run.result.assert_outcomes(passed=3, failed=4)
    assert "returned a coroutine, which nothing has run" in run.text


def test_a_test_that_yields_is_refused(suite: Suite) -> None:
    suite.write(
        test_yields='@pytest.mark.asyncio\n@trt_parity("conv.onnx", batch=1)\nasync def test_yields():\n    yield 1\n'
    )
    ignored = ("-W", "ignore:The configuration option", "-W", "ignore:Tests based on asynchronous generators")
    run = suite.run(*ignored, plugins=["asyncio"])
    run.result.assert_outcomes(errors=1)
    assert "a test that yields cannot be checked" in run.text


EXPECTED = """
import threading
from concurrent.futures import ThreadPoolExecutor
@pytest.mark.xfail
@trt_parity("missing.onnx")
def test_missing(): ...

@pytest.mark.xfail(raises=Exception, strict=True)
@trt_parity("missing.onnx")
def test_missing_and_any_error(): ...

@pytest.mark.xfail(raises=CheckFailed)
@trt_parity("missing.onnx")
def test_missing_and_a_failure(): ...

@pytest.mark.xfail
@trt_parity("conv.onnx", fantasy=1)
def test_bad_argument(): ...

@pytest.mark.xfail
def test_by_hand(trt_build):
    trt_build("missing.onnx")

@pytest.mark.xfail(raises=(CheckError, CheckFailed), strict=True)
@trt_parity("missing.onnx")
def test_named(): ...

@pytest.mark.xfail(raises=CheckFailed, strict=True)
@trt_parity("conv.onnx", batch=1, tol=0)
def test_fail(): ...

@pytest.mark.xfail(strict=True)
@trt_parity("conv.onnx", batch=1, tol=0)
def test_fail_and_any(): ...

@pytest.mark.xfail(raises=CheckError)
@trt_parity("conv.onnx", batch=1, tol=0)
def test_fail_and_an_error(): ...

@pytest.mark.xfail(strict=True)
@trt_parity("conv.onnx", batch=1)
def test_strict(): ...

@pytest.fixture
def broken():
    raise FileNotFoundError("weights.pt")

@pytest.mark.xfail
@trt_parity("conv.onnx", batch=1)
def test_without_weights(broken): ...

@pytest.mark.xfail
@trt_parity("conv.onnx", batch=1)
def test_typo():
    return {"image": np.zero((1, 3, 16, 16))}

@pytest.mark.xfail
def test_typo_by_hand(trt_check):
    trt_check("conv.onnx", np.zero((1, 3, 16, 16)))

@pytest.mark.xfail(raises=FileNotFoundError)
@trt_parity("conv.onnx", batch=1)
def test_without_weights_named(broken): ...

@pytest.mark.xfail
def test_assertion_by_hand(trt_check):
    assert 1 == 2

@trt_parity("conv.onnx", batch=1)
def test_imperative():
    pytest.xfail("not yet")

def test_in_a_thread(trt_check):
    thread = threading.Thread(target=lambda: pytest.raises(CheckError, trt_check, "missing.onnx"))
    thread.start()
    thread.join()

def test_in_a_pool(trt_check):
    with ThreadPoolExecutor() as pool:
        pool.submit(trt_check, "conv.onnx", batch=1, tol=0)

def test_in_a_pool_and_misspelled(trt_check):
    with ThreadPoolExecutor() as pool:
        pool.submit(trt_check, "conv.onnx", batch=1, tolerance=0)

def test_in_a_pool_by_hand(trt_build):
    with ThreadPoolExecutor() as pool:
        pool.submit(trt_build, "missing.onnx")

@trt_parity("conv.onnx", batch=1)
def test_in_a_pool_beside_a_marker(trt_check):
    with ThreadPoolExecutor() as pool:
        pool.submit(trt_check, "conv.onnx", batch=1, tol=0)

class TestWithoutData:
    @pytest.fixture
    def trt_inputs(self):
        pytest.skip("no data")

    def test_in_a_pool(self, trt_check):
        with ThreadPoolExecutor() as pool:
            pool.submit(trt_check, "conv.onnx", batch=1)

def test_in_a_pool_and_fine(trt_check):
    with ThreadPoolExecutor() as pool:
        pool.submit(trt_check, "conv.onnx", batch=1)

def test_skips_over_it(trt_check):
    try:
        trt_check("conv.onnx", batch=1, tol=0)
    except CheckFailed:
        pytest.skip("not today")

def test_caught(trt_check):
    with pytest.raises(CheckFailed):
        trt_check("conv.onnx", batch=1, tol=0)
    with pytest.raises(CheckError):
        trt_check("missing.onnx")
    with pytest.raises(AssertionError):
        trt_check("conv.onnx", batch=1, tol=0)
"""


def test_no_xfail_hides_that_a_check_was_not_made(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(test_expected=EXPECTED)
    run = run_everywhere("--trt-diagnose=0", "-v")
    run.result.assert_outcomes(passed=2, failed=13, errors=2, xfailed=6, skipped=2)
    expected = {record["nodeid"].partition("::")[2] for record in run.checks if record.get("expected_failure")}
    assert expected == {"test_named", "test_fail", "test_fail_and_any"}
    # What the test's own code caught is in the report as it is, and is said.
    text = " ".join(run.text.split())
    assert (
        "3 checks failed in a test that passed, whose own code caught the error: test_expected.py::test_caught" in text
    )
    assert (
        "1 check failed in a test that was skipped, whose own code caught the error: test_expected.py::test_sk" in text
    )
    assert "Traceback" not in run.text


def test_where_the_plugin_is_not_loaded_a_marker_is_an_error(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("missing.onnx")\ndef test_it(): ...\n')
    result = suite.pytester.runpytest_subprocess("-p", "no:trtcheck")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["trt_parity: the plugin pytest-trtcheck is not loaded, so that nothing would be checked"]
    )
    # Whoever imports a test module outside of pytest wants its functions.
    assert suite.pytester.run(sys.executable, "-c", "import test_it").ret == 0


def test_where_the_plugin_is_not_loaded_a_marker_of_a_conftest_fails_its_tests(suite: Suite) -> None:
    suite.write(
        conftest='CHECK = trt_parity("conv.onnx", batch=1)\n',
        test_it="from conftest import CHECK\n\n@CHECK\ndef test_it(): ...\n\ndef test_other(): ...\n",
        test_all="from conftest import CHECK\n\npytestmark = CHECK\n\ndef test_all(): ...\n",
        test_parameter="from conftest import CHECK\n\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=CHECK), 2])\ndef test_parameter(x): ...\n",
        own="CHECK = trt_parity('conv.onnx', batch=1)\n",
    )
    result = suite.pytester.runpytest_subprocess("-p", "no:trtcheck")
    result.assert_outcomes(errors=3, passed=2)
    result.stdout.fnmatch_lines(["a trt marker: the plugin pytest-trtcheck is not loaded, so that nothing*"])
    assert suite.pytester.run(sys.executable, "-c", "import conftest").ret == 0
    # What is loaded before the plugin may make marks, and so may a conftest that loads it.
    suite.pytester.runpytest_subprocess("-p", "own").assert_outcomes(passed=5)
    with (suite.path / "conftest.py").open("a") as conftest:
        conftest.write(f"pytest_plugins = ['{hooks.__name__}']\n")
    suite.pytester.runpytest_subprocess("-p", "no:trtcheck").assert_outcomes(passed=5)


def test_a_list_of_tests_says_which_cannot_be_checked(suite: Suite) -> None:
    suite.write(
        test_bad='@trt_parity("x.onnx", precision="fp61")\ndef test_bad(): ...\n\ndef test_good(): ...\n',
        test_unit="import unittest\nclass TestIt(unittest.TestCase):\n    @trt_parity()\n    def test_it(self): ...\n",
    )
    run = suite.run("--collect-only", "-q")
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR test_bad.py::test_bad: trt_parity: precision='fp61'" in run.text
    assert "ERROR test_unit.py::TestIt::test_it: trt markers don't work" in run.text
    assert "test_bad.py::test_good" in run.text
    suite.write(test_bad="def test_good(): ...\n", test_unit="def test_good(): ...\n")
    assert suite.run("--collect-only", "-q").result.ret == 0
