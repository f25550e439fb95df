"""`trt_latency` given several times: which of them judges a test, and which of them is in nobody's way and so wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite


def judged(run: Run) -> dict[str, dict[str, float]]:
    """By test, the budgets that hold for it: without a GPU they are recorded as not measured."""
    found = {}
    for record in run.checks:
        budgets = (record.get("latency") or {}).get("budgets", [])
        assert all(each["verdict"] == "not_measured" for each in budgets)
        limits = {each["name"]: each.get("limit_ms", each.get("limit")) for each in budgets}
        found[record["nodeid"].partition("::")[2]] = limits
    return found


def errors(run: Run) -> dict[str, str]:
    """By test that ended in an error, its code."""
    return {each["nodeid"].partition("::")[2]: each["code"] for each in run.checks if each["verdict"] == "error"}


STACKED = """
@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 4, 8])
@trt_latency(p50_ms=1, p99_ms=2)
@trt_latency(p50_ms=4, batch=[4, 8])
@pytest.mark.trt_latency(p50_ms=8, batch=8, precision="bf16")
def test_narrowest(): ...

@pytest.mark.trt_latency(p50_ms=3, batch=1)
@pytest.mark.trt_latency(min_qps=5, precision=["bf16"], batch=4)
@pytest.mark.trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 4])
def test_gaps(): ...

@trt_parity("conv.onnx", batch=[1, 4])
class TestWhole:
    pytestmark = [trt_latency(p50_ms=10, batch=1), trt_latency(p50_ms=40, batch=4)]

    def test_of_the_class(self): ...

    @trt_latency(p90_ms=7)
    def test_closer(self): ...

    @trt_parity("conv.onnx", batch=4)
    def test_one(self): ...

class TestDerived(TestWhole): ...

@trt_latency(p50_ms=100, batch=4)
class TestOver(TestWhole):
    test_closer = test_one = None
"""


def test_the_narrowest_that_fits_judges_whole(suite: Suite) -> None:
    suite.write(test_it=STACKED)
    run = suite.run()
    assert errors(run) == {}
    found = judged(run)
    assert {name: found.pop(name) for name in list(found) if name.startswith("test_narrowest")} == {
        **{f"test_narrowest[{precision}-batch1]": {"p50_ms": 1, "p99_ms": 2} for precision in ("fp16", "bf16")},
        **{f"test_narrowest[fp16-batch{batch}]": {"p50_ms": 4} for batch in (4, 8)},
        "test_narrowest[bf16-batch4]": {"p50_ms": 4},
        "test_narrowest[bf16-batch8]": {"p50_ms": 8},
    }
    assert {name: found.pop(name) for name in list(found) if name.startswith("test_gaps")} == {
        "test_gaps[fp16-batch1]": {"p50_ms": 3},
        "test_gaps[bf16-batch1]": {"p50_ms": 3},
        "test_gaps[fp16-batch4]": {},
        "test_gaps[bf16-batch4]": {"min_qps": 5},
    }
    for name in ("TestWhole", "TestDerived"):
        assert found.pop(f"{name}::test_of_the_class[batch1]") == {"p50_ms": 10}
        assert found.pop(f"{name}::test_of_the_class[batch4]") == {"p50_ms": 40}
        assert found.pop(f"{name}::test_one") == {"p50_ms": 40}
        assert found.pop(f"{name}::test_closer[batch1]") == {"p90_ms": 7}
        assert found.pop(f"{name}::test_closer[batch4]") == {"p90_ms": 7}
    # The class itself is closer than its base: the marks of that are no more.
    assert found == {"TestOver::test_of_the_class[batch1]": {}, "TestOver::test_of_the_class[batch4]": {"p50_ms": 100}}


IN_VAIN = """
@trt_parity("conv.onnx", batch=[1, 4])
@trt_latency(p50_ms=1)
@trt_latency(p50_ms=2, batch=16)
def test_batch(): ...

@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=1)
@trt_latency(p50_ms=2, precision="int8")
def test_precision(): ...

@trt_parity("conv.onnx", batch=1)
@trt_latency(p50_ms=2, precision="pf16")
def test_typo(): ...

@trt_latency(p50_ms=2, precision="int8")
def test_alone(): ...

shared = trt_latency(p50_ms=2, batch=4)

@trt_parity("conv.onnx", batch=[1, 4])
@shared
def test_shared(): ...

@trt_parity("conv.onnx", batch=1)
@shared
def test_shared_in_vain(): ...

@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 4])
@trt_latency(p50_ms=2, precision="fp16")
@trt_latency(p50_ms=3, batch=4)
def test_two_ways(): ...

@trt_parity("conv.onnx", batch=[1, 4])
@trt_latency(p50_ms=2, batch=[4, 1])
@trt_latency(p50_ms=3, batch=[1, 4])
def test_twice(): ...

@trt_latency(p50_ms=2, batch=1)
@trt_latency(p50_ms=2, precision="int8")
class TestReached:
    @trt_parity("conv.onnx", batch=[1, 4])
    def test_it(self): ...

@trt_latency(p50_ms=2, precision="bf16")
class TestNothing:
    def test_nothing_is_left(self): ...

    @trt_parity("conv.onnx", precision="bf16", batch=1)
    def test_fits(self): ...

@trt_parity("conv.onnx", engine="a.plan")
@trt_latency(p50_ms=2, precision="fp16")
def test_engine(): ...

@trt_parity("conv.onnx", batch=[1, 4])
@trt_latency(p50_ms=1, batch=4)
def test_sound(): ...
"""
WRONG = {
    "test_batch[batch1]": "marker-unmatched",
    "test_batch[batch4]": "marker-unmatched",
    "test_precision[fp16]": "marker-unmatched",
    "test_precision[bf16]": "marker-unmatched",
    "test_typo": "argument-value",
    "test_alone": "marker-unmatched",
    "test_shared_in_vain": "marker-unmatched",
    "test_two_ways[fp16-batch4]": "argument-conflict",
    "test_twice": "marker-misplaced",
    "TestReached::test_it[batch1]": "marker-unmatched",
    "TestReached::test_it[batch4]": "marker-unmatched",
    "TestNothing::test_nothing_is_left": "marker-unmatched",
    "test_engine": "argument-missing",
}


def test_a_mark_that_fits_no_test_is_an_error_of_those_that_it_marks(suite: Suite) -> None:
    suite.write(test_it=IN_VAIN)
    run = suite.run()
    assert errors(run) == WRONG
    assert "trt_latency(batch=16, …) fits no test that it marks" in run.said
    assert "they are checked in fp16 with batch 1, fp16 with batch 4: name one of these" in run.said
    assert "did you mean 'fp16'?" in run.said
    assert "trt_latency(batch=4, …) and trt_latency(precision='fp16', …) fit fp16 with batch 4" in run.said
    assert judged(run)["test_sound[batch4]"] == {"p50_ms": 1}
    run.result.assert_outcomes(passed=8, errors=len(WRONG))


def test_a_list_of_tests_says_so_too(suite: Suite) -> None:
    suite.write(test_it=IN_VAIN)
    run = suite.run("--collect-only", "-q")
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    for name in WRONG:
        assert f"ERROR test_it.py::{name}: " in run.text
    assert "test_sound[batch1]: " not in run.text


SELECTED = """
pytestmark = trt_latency(p50_ms=9, precision="bf16")

@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 4])
@trt_latency(p50_ms=1, batch=1)
@trt_latency(p50_ms=4, batch=4)
def test_it(): ...

@trt_parity("conv.onnx", batch=[1, 4])
@trt_latency(p50_ms=4, batch=5)
def test_wrong(): ...

class TestFp16:
    @trt_parity("conv.onnx", batch=1)
    def test_it(self): ...

class TestBf16:
    @trt_parity("conv.onnx", batch=1, precision="bf16")
    def test_it(self): ...
"""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("-k", "batch1 and fp16 and test_it"), ["test_it[fp16-batch1]"]),
        (("test_it.py::test_it[bf16-batch4]",), ["test_it[bf16-batch4]"]),
        (("test_it.py::TestFp16::test_it",), ["TestFp16::test_it"]),
        (("test_it.py::test_wrong[batch1]",), ["test_wrong[batch1]"]),
        (("--deselect", "test_it.py::test_wrong", "-k", "fp16"), ["test_it[fp16-batch1]", "test_it[fp16-batch4]"]),
        (("-k", "wrong"), ["test_wrong[batch1]", "test_wrong[batch4]"]),
    ],
)
def test_what_was_not_selected_counts(suite: Suite, arguments: tuple[str, ...], names: list[str]) -> None:
    suite.write(test_it=SELECTED)
    run = suite.run(*arguments)
    assert set(names) <= {each["nodeid"].partition("::")[2] for each in run.checks}
    assert set(errors(run)) == {name for name in names if "wrong" in name}
    assert errors(run) == {} or "fits no test that it marks" in run.said


def test_a_mark_of_the_module_that_fits_none_of_its_tests(suite: Suite) -> None:
    text = SELECTED.partition("class TestBf16")[0].replace('["fp16", "bf16"]', '"fp16"')
    suite.write(test_it=text)
    run = suite.run()
    assert errors(run) == {
        "test_wrong[batch1]": "marker-unmatched",
        "test_wrong[batch4]": "marker-unmatched",
        "TestFp16::test_it": "marker-unmatched",
    }


AT_RUN_TIME = """
def images(rows):
    return np.ones((rows, 3, 16, 16), np.float32)

@trt_parity("conv.onnx")
@trt_latency(p50_ms=1)
@trt_latency(p50_ms=4, batch=4)
def test_returned():
    return images(4)

@trt_parity("conv.onnx")
@trt_latency(p50_ms=4, batch=4)
def test_another():
    return images(5)

@trt_parity("conv.onnx")
@trt_latency(p50_ms=1)
@trt_latency(p50_ms=4, batch=4)
def test_only_the_other():
    return images(5)

@pytest.mark.parametrize("rows", [1, 4, 5])
@trt_parity("conv.onnx", precision=["fp16", "bf16"])
@trt_latency(p50_ms=1, batch=1)
@trt_latency(p50_ms=4, batch=4)
@trt_latency(p50_ms=8, batch=4, precision="bf16")
def test_own(rows):
    return images(rows)

@trt_latency(p50_ms=4, batch=3)
@trt_latency(p50_ms=5, batch=4)
class TestShapes:
    @trt_parity("conv.onnx", shapes={"image": (3, 3, 16, 16)})
    def test_three(self): ...

    @trt_parity("conv.onnx", shapes={"image": (4, 3, 16, 16)})
    def test_four(self): ...

@trt_parity("fixed.onnx")
@trt_latency(p50_ms=2, batch=2)
def test_fixed(): ...

@trt_parity("fixed.onnx")
@trt_latency(p50_ms=2, batch=1)
def test_fixed_otherwise(): ...

@trt_latency(p50_ms=2, batch=2)
def test_without_parity():
    return images(2)

@trt_latency(p50_ms=2, batch=2)
def test_without_parity_otherwise():
    return images(3)

@pytest.fixture
def trt_model():
    return "conv.onnx"
"""


def test_where_the_inputs_tell_the_batch_they_decide(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    import onnx

    model = onnx.load(suite.path / "conv.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, suite.path / "fixed.onnx")
    suite.write(test_it=AT_RUN_TIME)
    run = run_everywhere()
    assert errors(run) == dict.fromkeys(
        [
            *("test_another", "test_only_the_other", "test_own[fp16-5]", "test_own[bf16-5]"),
            *("test_fixed_otherwise", "test_without_parity_otherwise"),
        ],
        "marker-unmatched",
    )
    assert {name: limits for name, limits in judged(run).items() if limits} == {
        "test_returned": {"p50_ms": 4},
        "test_own[fp16-1]": {"p50_ms": 1},
        "test_own[bf16-1]": {"p50_ms": 1},
        "test_own[fp16-4]": {"p50_ms": 4},
        "test_own[bf16-4]": {"p50_ms": 8},
        "TestShapes::test_three": {"p50_ms": 4},
        "TestShapes::test_four": {"p50_ms": 5},
        "test_fixed": {"p50_ms": 2},
        "test_without_parity": {"p50_ms": 2},
    }
    assert "trt_latency(batch=4, …) fits no test: the returned inputs hold 5 rows" in run.said


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("batch=0", "batch=0: expected an integer of at least 1"),
        ("batch=[1, 1]", "at least one batch size, each named once"),
        ("batch=[]", "at least one batch size"),
        ("batch='8'", "expected an integer"),
        ("precision=[]", "at least one precision"),
        ("precision=16", "expected one of fp32"),
    ],
)
def test_what_it_may_be_limited_to(suite: Suite, argument: str, expected: str) -> None:
    suite.write(test_it=f'@trt_parity("conv.onnx", batch=1)\n@trt_latency(p50_ms=1, {argument})\ndef test_it(): ...\n')
    run = suite.run()
    assert errors(run) == {"test_it": "argument-value"}
    assert f"trt_latency: {argument.partition('=')[0]}=" in run.said
    assert expected in run.said


def test_marks_of_hooks_and_parameters_count(suite: Suite) -> None:
    suite.write(
        conftest="""
def pytest_collection_modifyitems(items):
    for item in items:
        if item.name == "test_late":
            item.add_marker(trt_latency(p50_ms=1, batch=4))
            item.add_marker(trt_latency(p50_ms=2))
        if item.name == "test_late_in_vain":
            item.add_marker(trt_latency(p50_ms=1, batch=5))

@pytest.fixture
def limited(request):
    request.applymarker(trt_latency(p50_ms=1, batch=5))
""",
        test_it="""
@trt_parity("conv.onnx", batch=4)
def test_late(): ...

@trt_parity("conv.onnx", batch=4)
def test_late_in_vain(): ...

@trt_parity("conv.onnx", batch=4)
def test_by_a_fixture(limited): ...

@pytest.mark.parametrize("which", [
    pytest.param(1, marks=trt_parity("conv.onnx", batch=1)),
    pytest.param(4, marks=trt_parity("conv.onnx", batch=4)),
    pytest.param(5, marks=[trt_parity("conv.onnx", batch=5), trt_latency(p50_ms=5, batch=5)]),
])
@trt_latency(p50_ms=4, batch=4)
def test_which(which): ...
""",
    )
    run = suite.run()
    assert errors(run) == dict.fromkeys(("test_late_in_vain", "test_by_a_fixture"), "marker-unmatched")
    assert {name: limits for name, limits in judged(run).items() if limits} == {
        "test_late": {"p50_ms": 1},
        "test_which[4]": {"p50_ms": 4},
        "test_which[5]": {"p50_ms": 5},
    }


def test_only_the_failed_ones_again(suite: Suite) -> None:
    suite.write(test_it=SELECTED.replace("    def test_it(self): ...", "    def test_it(self): return 1 / 0", 1))
    arguments = ("--deselect=test_it.py::test_wrong", "-p", "no:anyio", "-p", "no:asyncio")
    suite.pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=5, failed=1)
    result = suite.pytester.runpytest_inprocess(*arguments, "--lf", "--trt-report=report.json")
    assert "ZeroDivisionError" in result.stdout.str()
    assert "marker-unmatched" not in (suite.path / "report.json").read_text()
