"""The search for a check's worst input: it finds what ordinary inputs miss, and sound models pass it."""

from __future__ import annotations

import re
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import Search
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import explorer as explorers
from pytest_trtcheck.check import search as searches
from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.explorer import Explorer
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.model import values
from pytest_trtcheck.model.values import Span
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Suite

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SIZE = 64
DIRECTION = np.random.default_rng(0).normal(size=(SIZE, 1)).astype(np.float32)
DIRECTION *= np.sqrt(12) / np.linalg.norm(DIRECTION)
VALUES = np.random.default_rng(1).normal(size=(SIZE, 8)).astype(np.float32)


def cancelling(shape: tuple[int | str, ...] = ("N", SIZE), gain: float = 1.0, size: int = SIZE) -> onnx.ModelProto:
    """(x·v + e^z) − e^z, where z is a projection of the input: the larger e^z, the less is left of x·v in FP16."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Mul", ["z", "gain"], ["scaled"]),
        helper.make_node("Exp", ["scaled"], ["e"]),
        helper.make_node("MatMul", ["x", "v"], ["h"]),
        helper.make_node("Add", ["h", "e"], ["sum"]),
        helper.make_node("Sub", ["sum", "e"], ["y"]),
    ]
    weights = {"w": DIRECTION[:size], "v": VALUES[:size], "gain": np.asarray(gain, np.float32)}
    inputs = {"x": (FLOAT, (*shape[:-1], size))}
    return onnx_models.model(nodes, inputs, {"y": (FLOAT, (*shape[:-1], 8))}, weights)


def checked(
    proto: onnx.ModelProto, folder: Path, *, inputs: object = None, option: int | None = None, **arguments: Any
) -> CheckRecord:
    spec = from_marker("trt_parity", (), arguments)
    request = Request(
        "tests/test_a.py::test_a",
        proto,
        (folder,),
        spec,
        inputs=inputs,
        inputs_source="returned",
        search_folder=folder / "trtcheck_inputs",
    )
    checker = Checker(Cache(folder / "cache"), backend="onnxruntime", allowance=Allowance(0), search=option)
    return checker.check(request)


def fp16(x: NDArray[np.float32], gain: float = 1.0) -> NDArray[np.float64]:
    """What the model computes, rounded after each step, in numpy."""
    half = np.float16
    h = (x.astype(half).astype(np.float32) @ VALUES.astype(half).astype(np.float32)).astype(half)
    z = (x.astype(half).astype(np.float32) @ DIRECTION.astype(half).astype(np.float32)).astype(half)
    e = np.exp((z * half(gain)).astype(np.float32)).astype(half)
    return np.asarray((h + e).astype(half) - e, np.float64)


def test_what_ordinary_inputs_miss_is_found_shrunk_and_kept(tmp_path: Path) -> None:
    assert checked(cancelling(), tmp_path, batch=1).verdict == "pass"
    record = checked(cancelling(), tmp_path, batch=1, search=2000)
    found = record.search
    assert record.verdict == "fail"
    assert found is not None
    assert found.own_usage < 0.5
    assert found.usage > 1
    assert found.found_at is not None
    assert found.found_at <= found.tries <= 2000
    assert found.ranges == {"x": (0.0, 1.0)}
    assert found.changed is not None
    assert 0 < found.changed < SIZE
    assert record.cases == 2
    assert record.message is not None
    assert record.message.startswith(f"an input that a search found fails (try {found.found_at:,} of 2,000): ")

    # What is kept fails by itself, computed in numpy; and each later check is judged by it, without a search.
    (path,) = (tmp_path / "trtcheck_inputs").iterdir()
    assert found.kept == f"trtcheck_inputs/{path.name}"
    kept = np.load(path)["0/x"]
    exact = kept.astype(np.float64) @ VALUES.astype(np.float64)
    assert np.abs(fp16(kept) - exact).max() / np.abs(exact).max() > 0.005
    again = checked(cancelling(), tmp_path, batch=1)
    assert again.verdict == "fail"
    assert again.search is None
    assert again.message is not None
    assert again.message.startswith("input 1, which an earlier search found and kept, fails\n")

    # The model that was mended passes on it too.
    mended = checked(cancelling(gain=0.01), tmp_path, batch=1)
    assert mended.verdict == "pass"
    assert mended.cases == 2
    assert any(f"inputs [1] come from {found.kept}" in note for note in mended.notes)


def test_a_sound_model_passes_and_says_how_near_it_came(tmp_path: Path) -> None:
    record = checked(cancelling(gain=0.01), tmp_path, batch=2, search=300)
    found = record.search
    assert record.verdict == "pass"
    assert found is not None
    assert (found.tries, found.asked) == (300, 300)
    assert found.own_usage <= found.usage < 1
    assert found.metric == "max"
    assert not (tmp_path / "trtcheck_inputs").exists()
    assert any(note.startswith("search: 300 tries in ") and "x from 0 to 1" in note for note in record.notes)
    same = checked(cancelling(gain=0.01), tmp_path, batch=2, search=300).search
    assert same is not None
    assert same.usage == found.usage


@pytest.mark.parametrize("shape", [(1, SIZE), ("N", SIZE)], ids=["fixed", "batch of 4"])
def test_whole_cases_and_every_row(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    batch = {} if isinstance(shape[0], int) else {"batch": 4}
    record = checked(cancelling(shape), tmp_path, search=2000, **batch)
    assert record.verdict == "fail"
    assert record.search is not None
    assert record.search.elements == SIZE


def test_an_overflow_that_no_error_announces(tmp_path: Path) -> None:
    """Until an inner tensor leaves FP16, the output errs no more than anywhere: its size leads there."""
    nodes = [
        helper.make_node("Sub", ["x", "half"], ["c"], name="sub"),
        helper.make_node("MatMul", ["c", "w"], ["z"], name="matmul"),
        helper.make_node("Mul", ["z", "gain"], ["large"], name="grow"),
        helper.make_node("Mul", ["large", "small"], ["s"], name="shrink"),
        helper.make_node("Add", ["s", "bias"], ["y"], name="add"),
    ]
    numbers = {"half": 0.5, "gain": 65504 / 7, "small": 1e-4, "bias": 9.0}
    weights = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    proto = onnx_models.model(nodes, {"x": (FLOAT, ["N", SIZE])}, {"y": (FLOAT, ["N", 1])}, {**weights, "w": DIRECTION})
    record = checked(proto, tmp_path, batch=1, search=2000)
    assert record.verdict == "fail"
    assert record.search is not None
    assert record.search.usage == float("inf")
    kept = checked(proto, tmp_path / "kept", batch=1, search=300, keep_fp32=["grow", "shrink"])
    assert kept.verdict == "pass"


def test_ranges_come_from_the_inputs_unless_they_are_given(tmp_path: Path) -> None:
    inputs = np.random.default_rng(2).uniform(0.4, 0.6, (3, SIZE)).astype(np.float32)
    record = checked(cancelling(), tmp_path, inputs=inputs, search=200)
    assert record.verdict == "pass"
    assert record.search is not None
    assert record.search.ranges["x"] == (inputs.min(), inputs.max())
    wider = checked(cancelling(), tmp_path, inputs=inputs, search=Search(2000, {"x": (0, 1)}))
    assert wider.verdict == "fail"


def test_what_lies_outside_the_ranges_differs_as_well(tmp_path: Path) -> None:
    own = np.full((1, SIZE), 0.5, np.float32)
    own[0, :5] = 7
    record = checked(cancelling(), tmp_path, inputs=own, search=Search(2000, (0, 1)), tol=0.02)
    assert record.search is not None
    assert record.search.changed is not None
    (path,) = (tmp_path / "trtcheck_inputs").iterdir()
    assert record.search.changed == (np.abs(np.load(path)["0/x"] - own) > 1e-6).sum() >= 5


def test_tokens_are_searched_and_masks_are_not(tmp_path: Path) -> None:
    table = np.random.default_rng(3).normal(size=(500, 4)).astype(np.float32)
    table[417] = 300.0
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "rows"], ["squares"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["weights"], to=FLOAT),
        helper.make_node("Mul", ["squares", "weights"], ["y"]),
    ]
    proto = onnx_models.model(
        nodes,
        {"ids": (INT64, ["N", 8]), "mask": (INT64, ["N", 8])},
        {"y": (FLOAT, ["N", 8, 4])},
        {"table": table, "last": np.array([2])},
    )
    inputs = {"ids": np.arange(8)[None], "mask": np.ones((1, 8), np.int64)}
    record = checked(proto, tmp_path, inputs=inputs, search=Search(3000, {"ids": (0, 499)}))
    assert record.verdict == "fail"
    assert record.search is not None
    assert record.search.held == ("mask (int64: give it a range to search it)",)
    assert record.search.changed == 1
    (path,) = (tmp_path / "trtcheck_inputs").iterdir()
    kept = np.load(path)
    assert (kept["0/ids"] == 417).sum() == 1
    assert (kept["0/mask"] == 1).all()


def test_inputs_that_the_reference_itself_does_not_stand_are_left_out(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Sqrt", ["x"], ["y"])], {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, ["N", 4])}
    )
    record = checked(proto, tmp_path, batch=1, search=Search(100, (-1, 1)), tol=0.9)
    assert record.verdict == "pass"
    assert record.search is not None
    assert record.search.unusable > 10


def test_inputs_on_which_a_metric_cannot_be_computed_are_counted(tmp_path: Path) -> None:
    def fragile(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
        if np.abs(expected).max() > 20:
            raise ValueError("it is beyond me")
        return float(np.abs(actual - expected).max())

    record = checked(cancelling(gain=0.01), tmp_path, batch=1, metric=fragile, tol=9, search=Search(100, (-3, 3)))
    (said,) = [note for note in record.notes if note.startswith("search: ")]
    assert re.search(r"; not judged: \d+ on which a metric cannot be computed$", said)


def test_a_search_ends_with_its_time(tmp_path: Path) -> None:
    record = checked(cancelling(gain=0.01), tmp_path, batch=1, search=Search(10_000_000, seconds=0.2))
    assert record.verdict == "pass"
    assert record.search is not None
    assert 0 < record.search.tries < 10_000_000
    assert any(f"search: {record.search.tries:,} of 10,000,000 tries" in note for note in record.notes)


def test_the_option_takes_the_place_of_the_number_and_leaves_the_ranges(tmp_path: Path) -> None:
    record = checked(cancelling(gain=0.01), tmp_path, batch=1, search=Search(7, (0.2, 0.3)), option=50)
    assert record.search is not None
    assert record.search.asked == 50
    assert record.search.ranges == {"x": (0.2, 0.3)}


def test_what_cannot_be_searched_is_an_error_where_the_check_asks_and_a_note_where_an_option_does(
    tmp_path: Path,
) -> None:
    inputs = np.full((1, SIZE), 0.5, np.float32)
    asked = checked(cancelling(gain=0.01), tmp_path, inputs=inputs, search=10)
    assert asked.verdict == "error"
    assert asked.message is not None
    assert "no input is searched (x (it has one value))" in asked.message
    told = checked(cancelling(gain=0.01), tmp_path, inputs=inputs, option=10)
    assert told.verdict == "pass"
    assert any(note.startswith("no worse input was searched: no input is searched") for note in told.notes)


def test_a_check_that_fails_on_its_own_inputs_is_not_searched(tmp_path: Path) -> None:
    record = checked(cancelling(), tmp_path, inputs=(DIRECTION.T > 0).astype(np.float32), search=100)
    assert record.verdict == "fail"
    assert record.search is None
    assert any("does not pass on its own" in note for note in record.notes)


def test_kept_inputs_that_are_stale_or_broken_are_errors_that_say_so(tmp_path: Path) -> None:
    assert checked(cancelling(), tmp_path, batch=1, search=2000).verdict == "fail"
    (path,) = (tmp_path / "trtcheck_inputs").iterdir()
    other = checked(cancelling(size=32), tmp_path, batch=1)
    assert other.verdict == "error"
    assert other.message is not None
    assert f"trtcheck_inputs/{path.name}[0]: input 'x': dimension 1 is 64, the model fixes it at 32" in other.message
    assert f"→ delete trtcheck_inputs/{path.name}" in other.message
    declared = checked(cancelling(), tmp_path, batch=2)
    assert declared.verdict == "error"
    assert declared.message is not None
    assert "x[0] is 1, declared 2" in declared.message
    assert "parametrize the test" in declared.message
    rows = np.random.default_rng(0).random((1, SIZE)).astype(np.float32)
    score: dict[str, Any] = {"score": lambda outputs, _: outputs["y"][:, 0], "max_drop": 9}
    scored = checked(cancelling(), tmp_path, inputs=[rows, rows], **score)
    said = f"the inputs kept in trtcheck_inputs/{path.name} were not judged: they have no labels for the score"
    assert said in scored.notes
    path.write_bytes(path.read_bytes()[:200])
    broken = checked(cancelling(), tmp_path, batch=1)
    assert broken.verdict == "error"
    assert broken.message is not None
    assert "cannot be read" in broken.message


def test_a_place_that_cannot_be_written_to_changes_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "trtcheck_inputs").write_text("a file stands where the folder would")
    record = checked(cancelling(), tmp_path, batch=1, search=2000)
    assert record.verdict == "fail"
    assert record.search is not None
    assert record.search.kept is not None
    assert record.search.kept.startswith("not kept: ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "search=0: expected an integer of at least 1"),
        (True, "search=True: expected how many inputs to try, or a Search"),
        ("many", "search='many': expected how many inputs to try"),
        (Search(0), "search: tries=0: expected an integer of at least 1"),
        (Search(seconds=0), "search: seconds=0: expected a number above 0"),
        (Search(ranges=(1, 0)), "search: ranges=(1, 0): expected (low, high)"),
        (Search(ranges={"x": 3}), "search: ranges['x']=3: expected (low, high)"),  # type: ignore[dict-item]
        (Search(ranges=(0, float("inf"))), "expected (low, high)"),
    ],
)
def test_ill_typed_arguments(value: object, expected: str) -> None:
    with pytest.raises(ArgumentError) as error:
        from_marker("trt_parity", (), {"search": value})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ({"z": (0, 1)}, "search: ranges: <ModelProto test> has no input 'z'"),
        ({"x": (0, 1e39)}, "search: ranges['x']=0, 1e+39: float32 ends at 3.40282e+38"),
    ],
)
def test_ranges_that_do_not_fit_the_model(tmp_path: Path, ranges: Any, expected: str) -> None:
    record = checked(cancelling(), tmp_path, batch=1, search=Search(10, ranges))
    assert record.verdict == "error"
    assert record.message is not None
    assert record.message.startswith(expected)


def test_a_row_of_an_open_batch_that_is_no_sample_of_its_own(tmp_path: Path) -> None:
    """Softmax over the batch: what fails beside other rows need not fail alone, and the whole case decides."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], axis=0),
    ]
    proto = onnx_models.model(
        nodes, {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, ["N", 4])}, {"scale": np.asarray(1000, np.float32)}
    )
    record = checked(proto, tmp_path, batch=1, search=200)
    assert record.verdict == "pass"
    assert record.search is not None
    assert record.search.usage <= 1


def test_an_output_that_is_small_where_it_fails_is_said_to_be(tmp_path: Path) -> None:
    """A single sum crosses zero, where any rounding is a large part of it."""
    proto = onnx_models.model(
        [helper.make_node("MatMul", ["x", "v"], ["y"])],
        {"x": (FLOAT, ["N", 16])},
        {"y": (FLOAT, ["N", 1])},
        {"v": VALUES[:16, :1]},
    )
    record = checked(proto, tmp_path, batch=1, search=2000)
    assert record.verdict == "fail"
    assert record.message is not None
    assert "times as large there as on the check's own inputs" in record.message
    assert "allclose" in record.message
    absolute = checked(proto, tmp_path / "other", batch=1, search=2000, metric="allclose")
    assert absolute.verdict == "pass"


# --- the explorer ----------------------------------------------------------------------------------------------------


def explored(score: Any, size: int, tries: int, seed: int) -> tuple[float, int]:
    explorer = Explorer([np.full(size, 0.5)], np.ones(size, bool), np.random.default_rng(seed))
    used = 0
    while used < tries and explorer.best_score <= 1:
        points = explorer.propose()
        used += len(points)
        explorer.observe(points, score(points))
    return explorer.best_score, used


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [64, 2000])
def test_far_along_a_direction_under_noise(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=size)
    direction *= np.sqrt(12) / np.linalg.norm(direction)

    def score(points: NDArray[np.float64]) -> NDArray[np.float64]:
        # Beyond 1 at 6 standard deviations; rounding leaves some random share of it.
        return np.asarray(np.exp2((points - 0.5) @ direction - 5) * rng.uniform(0.1, 0.5, len(points)))

    best, used = explored(score, size, 2000, seed)
    assert best > 1, used


def test_a_narrow_place_of_a_few_elements() -> None:
    def score(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(0.05 / np.maximum(np.abs(points[:, 3:9] - 0.3).max(axis=1), 1e-9))

    assert all(explored(score, 64, 2000, seed)[0] > 1 for seed in range(3))


def test_what_cannot_be_judged_leads_nowhere() -> None:
    best, _ = explored(lambda points: np.zeros(len(points)), 8, 200, 0)
    assert best == 0
    best, _ = explored(lambda points: np.where(points[:, 0] > 0.9, np.inf, 0.1), 8, 500, 0)
    assert best == np.inf


@pytest.mark.parametrize("most", [1, 3])
def test_of_large_inputs_few_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    for module in (explorers, searches):
        monkeypatch.setattr(module, "AT_ONCE", most * SIZE + SIZE - 1)
    scores, sizes = searches._Hunt.scores, []

    def counted(hunt: searches._Hunt, points: NDArray[np.float64]) -> NDArray[np.float64]:
        sizes.append(len(points))
        return scores(hunt, points)

    monkeypatch.setattr(searches._Hunt, "scores", counted)
    record = checked(cancelling(), tmp_path, batch=1, search=4000)
    assert record.verdict == "fail"
    assert record.search is not None
    assert record.search.changed is not None
    assert 0 < record.search.changed < SIZE
    assert max(sizes) == most


def test_the_span_of_inputs_that_do_not_fit_into_memory() -> None:
    class Cases(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in super().__iter__():
                yield {"x": np.full(1 << 18, number, np.float32), "nothing": np.full(3, np.nan)}

    tracemalloc.start()
    assert values.seen("x", Cases(range(32))) == Span(0.0, 31.0)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert values.seen("nothing", Cases(range(2))) is None


# --- the plugin ------------------------------------------------------------------------------------------------------


def test_the_option_searches_every_check_of_a_run(suite: Suite) -> None:
    onnx_models.save(cancelling(), suite.path / "ranker.onnx")
    suite.write(
        test_a="""
        @trt_parity("ranker.onnx", batch=1)
        def test_ranker(): ...

        @trt_parity("conv.onnx", precision="bf16", batch=1)
        def test_conv(): ...
        """.replace("\n        ", "\n")
    )
    assert suite.run("-q").result.ret == 0
    run = suite.run("-q", "--trt-search=400", "--trt-diagnose=0", "--trt-bundle=failed")
    assert {check["nodeid"].rpartition("::")[2]: check["verdict"] for check in run.checks} == {
        "test_ranker": "fail",
        "test_conv": "pass",
    }
    assert run.check("test_conv")["search"]["tries"] == 400
    assert "an input that a search found fails" in run.text
    assert (suite.path / "trtcheck_inputs" / "test_a.py-test_ranker-ranker.onnx-fp16.npz").exists()
    # The bundle holds it, and replays the failure.
    (bundle,) = suite.path.glob("failed/*/bundle.json")
    assert suite.run("-q", str(bundle), "--trt-diagnose=0").checks[0]["verdict"] == "fail"
    assert suite.run("-q", "-n2", "--trt-diagnose=0").check("test_ranker")["verdict"] == "fail"
