"""The task's score as users ask for it: real runs of pytest, with a fault planted for every verdict."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from onnx import helper

from pytest_trtcheck.check import arguments, scoring
from pytest_trtcheck.errors import ArgumentError, InputError
from pytest_trtcheck.model import inputs, labelled, memory
from pytest_trtcheck.model.onnx_model import load
from pytest_trtcheck.precision.quantization import calibration_data
from pytest_trtcheck.report import diff
from pytest_trtcheck.report.json_report import read as load_report
from pytest_trtcheck.report.upgrade import questions
from pytest_trtcheck.spec import Case
from tests import onnx_models
from tests.onnx_models import FLOAT
from tests.test_evidence import OPTIONS, on_gpu, reason, save
from tests.test_parity import require_schema

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

HEAD = """
from pytest_trtcheck import Case

rng = np.random.default_rng(0)
LABELS = rng.integers(0, 10, 2000)
X = np.zeros((2000, 11), np.float32)
X[np.arange(2000), LABELS] = 1
X[:, :10] += rng.random((2000, 10)).astype(np.float32) / 4


def top1(outputs, case):
    return outputs["logits"].argmax(axis=1) == case.labels


def batches(count=2000, broken=0, size=100):
    # What the last column marks, bad.onnx takes for class 0, and good.onnx does not.
    x = X[:count].copy()
    x[np.flatnonzero(LABELS[:count])[:broken], 10] = 1
    return [Case({"x": x[i : i + size]}, LABELS[i : min(i + size, count)]) for i in range(0, count, size)]

"""
BAD = '"bad.onnx", reference="good.onnx", score=top1, max_drop=0.01'


def write_models(folder: Path) -> None:
    """Two classifiers: `bad.onnx` is wrong about what it is told to be wrong about."""
    for name, wrong in (("good", 0.0), ("bad", 50.0)):
        weights = np.vstack([np.eye(10), wrong * np.eye(10)[:1]]).astype(np.float32)
        node = helper.make_node("Gemm", ["x", "w"], ["logits"], name="classify")
        proto = onnx_models.model([node], {"x": (FLOAT, ["N", 11])}, {"logits": (FLOAT, ["N", 10])}, {"w": weights})
        onnx_models.save(proto, folder / f"{name}.onnx")


@pytest.fixture
def task(suite: Suite) -> Suite:
    write_models(suite.path)
    return suite


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_verdicts_follow_what_the_model_gets_right(task: Suite, workers: tuple[str, ...]) -> None:
    task.write(
        test_task=f"""{HEAD}
@trt_parity("good.onnx", score=top1, max_drop=0.01)
def test_sound(): return batches()

@trt_parity({BAD})
def test_flips_4_percent(): return batches(broken=80)

@trt_parity({BAD})
def test_too_few(): return batches(count=100)

@trt_parity("good.onnx", reference="bad.onnx", score=top1, max_drop=0.01)
def test_better_than_the_reference(): return batches(broken=80)

@trt_parity({BAD})
def test_from_a_generator():
    return ((c.inputs["x"], c.labels) for c in batches(broken=80))

@trt_parity({BAD}, tol=1e-2)
def test_by_a_tolerance_too(): return batches(broken=1)

def test_by_hand(trt_check):
    record = trt_check("good.onnx", batches(), score=top1, max_drop=0.01)
    assert record.score.value == 1.0 and record.parity is None

@trt_parity("good.onnx", score=lambda outputs, case: 1.0 - top1(outputs, case), max_drop=0.01, lower_is_better=True)
def test_an_error_rate(): return batches()
"""
    )
    run = (task.run_apart if workers else task.run)(*workers, "--trt-html=r.html", "--junitxml=r.xml")
    require_schema(run.report)
    passed = {"test_sound", "test_better_than_the_reference", "test_by_hand", "test_an_error_rate"}
    verdicts = {check["nodeid"].split("::")[1]: check["verdict"] for check in run.checks}
    assert {name for name, verdict in verdicts.items() if verdict == "pass"} == passed
    assert verdicts["test_too_few"] == "inconclusive"
    assert verdicts["test_flips_4_percent"] == verdicts["test_from_a_generator"] == "fail"
    run.result.assert_outcomes(passed=4, failed=4)

    flips = run.check("test_flips_4_percent")
    score = flips["score"]
    assert (score["reference"], score["value"], score["samples"], score["disagreeing"]) == (1.0, 0.96, 2000, 80)
    assert score["lower"] > 0.01
    assert [(each["case"], each["reference"], each["value"]) for each in score["worst"]] == [(0, 1.0, 0.0)] * 10
    assert flips["parity"] is None
    assert flips["evidence"] == "emulated"
    assert score["errors"]["logits"] > 1
    assert "top1 fell from 1 to 0.96: a loss of 0.04 (" in flips["message"]
    assert "changed: inputs[0] sample " in flips["message"]
    assert "outputs, not judged" in flips["message"]
    few = run.check("test_too_few")
    assert few["score"]["samples_to_decide"] == pytest.approx(600, rel=0.1)
    assert "too few samples to decide; about 6" in few["message"]
    both = run.check("test_by_a_tolerance_too")
    assert (both["score"]["verdict"], both["parity"]["verdict"]) == ("pass", "fail")
    assert "differs from" in both["message"]
    assert "reference → now" in run.text
    assert "1.000 → 0.9600" in run.text
    page = (task.path / "r.html").read_text()
    assert "1.000 → 0.9600" in page
    properties = {each.get("name"): each.get("value") for each in ET.parse(task.path / "r.xml").iter("property")}
    assert properties["trtcheck.score_verdict"] in verdicts.values()
    assert "trtcheck.score_drop" in properties


def test_a_loader_that_shuffles_is_paired_all_the_same(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
class Sampler: ...
class RandomSampler(Sampler): ...

class Loader:
    sampler = RandomSampler()
    passes = 0
    def __iter__(self):
        Loader.passes += 1
        cases = batches(broken=60)
        for index in np.random.default_rng().permutation(len(cases)):
            yield [cases[index].inputs["x"], cases[index].labels]

@trt_parity({BAD})
def test_shuffled(): return Loader()

def test_read_once(): assert Loader.passes == 1
"""
    )
    run = task.run()
    score = run.check("test_shuffled")["score"]
    assert (score["reference"], score["value"], score["disagreeing"]) == (1.0, 0.97, 60)
    run.result.assert_outcomes(passed=1, failed=1)


def test_what_is_wrong_with_a_score_is_said_in_the_users_words(task: Suite) -> None:
    broken = {
        "nan": "np.where(np.arange(100) == 7, np.nan, 1.0)",
        "infinite": "np.full(100, np.inf)",
        "raises": "case.labels[100]",
        "scalar": "float((outputs['logits'].argmax(1) == case.labels).mean())",
        "too_many": "np.ones(101)",
        "matrix": "outputs['logits']",
        "words": "['right'] * 100",
        "nothing": "None",
    }
    tests = "".join(
        f'\n@trt_parity("good.onnx", score=lambda outputs, case: {body}, max_drop=0.1)\n'
        f"def test_{name}(): return batches(200)\n"
        for name, body in broken.items()
    )
    tests += """
@trt_parity("good.onnx", score=top1, max_drop=0.1)
def test_without_labels(): return [{"x": X[:100]}]

@trt_parity("good.onnx", score=lambda outputs, case: np.ones(len(case.labels)), max_drop=0.1)
def test_of_no_output():
    return batches()

@trt_parity("good.onnx", score=top1, max_drop=0.1)
def test_labels_in_another_order():
    return [Case(case.inputs, np.random.default_rng(3).permutation(case.labels)) for case in batches()]

def errors(outputs, case):
    return [(int(outputs["logits"].argmax() != case.labels), 1)]

def rate(items):
    return sum(wrong for wrong, _ in items) / sum(words for _, words in items)

WORDS = dict(score=errors, aggregate=rate, max_drop=0.1, lower_is_better=True)

@trt_parity("good.onnx", **WORDS)
def test_words_in_another_order():
    return [Case(X[i : i + 1], LABELS[i - 1]) for i in range(1, 150)]

@trt_parity("good.onnx", **WORDS)
def test_words_in_order():
    return [Case(X[i : i + 1], LABELS[i]) for i in range(1, 150)]

@trt_parity("good.onnx", score=top1, max_drop=0.1)
def test_labels_sorted():
    order = np.argsort(LABELS)
    return [Case(X[order[i : i + 50]], LABELS[order[i : i + 50]]) for i in range(0, 2000, 50)]

def broken_top1(outputs, case):
    return outputs["logits"].argmax(axis=1)[: len(case.labels)]

@trt_parity("good.onnx", score=broken_top1, max_drop=0.1)
def test_without_labels_it_fails(): return [{"x": X[:100]}]

@trt_parity("good.onnx", score=lambda outputs, case: outputs["scores"], max_drop=0.1)
def test_without_labels_it_asks_for_another_output(): return [{"x": X[:100]}]

@trt_parity("good.onnx", score=top1, max_drop=0.1)
def test_without_inputs(): ...

@trt_parity("good.onnx", score=top1, max_drop=0.1)
def test_no_case(): return []

@trt_parity("good.onnx", score=top1, max_drop=0.1, batch=32)
def test_another_batch(): return batches(200)

@trt_parity("good.onnx", score=lambda o, c: list(zip(o["logits"].argmax(1), c.labels)), max_drop=0.1,
            aggregate=lambda items: float("nan"))
def test_aggregate(): return batches(200)
"""
    run = task.write(test_task=HEAD + tests).run()
    said = {
        check["nodeid"].split("::test_")[1]: check["message"] for check in run.checks if check["verdict"] == "error"
    }
    expected = {
        "nan": "gave nan for sample 7 on the reference's outputs of returned inputs[0]",
        "infinite": "gave inf for sample 0 on the reference's outputs of returned inputs[0], and 99 others",
        "raises": "IndexError: index 100 is out of bounds",
        "scalar": "gave 1 item of returned inputs[0], which hold 100 rows and 100 labels",
        "too_many": "gave 101 items of returned inputs[0], which hold 100 rows and 100 labels",
        "matrix": "gave shape [100, 10] on",
        "words": "gave items that are no numbers (str)",
        "nothing": "gave None on",
        "without_labels": "the reference itself scores 0: no engine could lose more than max_drop=0.1",
        "of_no_output": "outputs of zeros, and outputs with all signs changed, score as the reference's do",
        "labels_in_another_order": "an engine that knows nothing would lose no more than max_drop=0.1",
        "words_in_another_order": "an engine that knows nothing would lose no more than max_drop=0.1",
        "without_labels_it_fails": "these inputs have no labels: give Case(inputs, labels)",
        "without_labels_it_asks_for_another_output": "it takes (outputs, case) and returns an array",
        "without_inputs": "there is nothing to score: neither the test nor trt_inputs gives inputs",
        "no_case": "there is no case",
        "another_batch": "batch=32 is declared, input 'x' holds 100 rows",
        "aggregate": "aggregate <lambda> gave nan on the items of all 200 samples",
    }
    assert set(said) == set(expected)
    for name, text in expected.items():
        assert text in said[name], name
    assert "Traceback" not in run.text
    assert {run.check(name)["verdict"] for name in ("test_words_in_order", "test_labels_sorted")} == {"pass"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_drop": 0.1}, "max_drop=0.1: there is no score="),
        ({"aggregate": max}, "aggregate=<built-in function max>: there is no score="),
        ({"lower_is_better": True}, "lower_is_better=True: there is no score="),
        ({"score": max}, "score= needs max_drop=: without it nothing is judged"),
        ({"score": "top1", "max_drop": 0.1}, "expected a callable"),
        ({"score": max, "max_drop": -0.1}, "max_drop=-0.1: expected a number of at least 0"),
        ({"score": max, "max_drop": float("nan")}, "expected a number of at least 0"),
        ({"score": max, "max_drop": 0.1, "aggregate": "map"}, "aggregate='map': expected a callable"),
        ({"score": max, "max_drop": 0.1, "lower_is_better": "yes"}, "expected True or False"),
        ({"score": max, "max_drop": 0.1, "metric": "cosine"}, "metric=cosine beside score= needs tol="),
        ({"score": max, "max_drop": 0.1, "keep_fp32": "auto"}, "keep_fp32='auto' beside score= needs tol="),
    ],
)
def test_arguments_that_would_judge_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        arguments.from_marker("trt_parity", (), given)
    assert said in str(caught.value)


def test_what_no_gpu_ran_is_said(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
@trt_parity("good.onnx", score=top1, max_drop=0.01)
def test_sound(): return batches()

@trt_parity("good.onnx", precision="fp32", score=top1, max_drop=0.01)
def test_fp32(): return batches()
"""
    )
    run = task.run("--trt-require-gpu")
    run.result.assert_outcomes(failed=2)
    assert "the score was emulated on the CPU" in run.check("test_sound")["message"]
    run = task.run()
    run.result.assert_outcomes(passed=1, skipped=1)
    assert run.check("test_fp32")["score"]["verdict"] == "not_measured"
    assert "score not measured (1 check)" in run.text


def test_what_fails_its_task_is_not_exported(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
@trt_parity("good.onnx", score=top1, max_drop=0.01)
def test_sound(): return batches()

@trt_parity({BAD})
def test_flips(): return batches(broken=80)

@trt_parity("good.onnx", precision="bf16", score=top1, max_drop=0.01)
def test_too_few(): return batches(count=100)
"""
    )
    run = task.run("--trt-export=out")
    run.result.assert_outcomes(passed=1, failed=2)
    (folder,) = (task.path / "out/typed").iterdir()
    assert folder.name == "good_fp16"
    (judged,) = json.loads((folder / "manifest.json").read_text())["judged"]
    assert judged["score"]["name"] == "top1"
    assert judged["score"]["max_drop"] == 0.01
    assert judged["evidence"] == "emulated"


def test_a_bundle_says_that_the_score_is_not_in_it(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
@trt_parity({BAD})
def test_score(): return batches(broken=80)

@trt_parity({BAD}, tol=1e-2)
def test_both(): return batches(broken=80)
"""
    )
    run = task.run("--trt-bundle=bundles")
    alone, both = run.check("test_score"), run.check("test_both")
    assert any("no failure bundle holds the score top1" in note for note in alone["notes"])
    assert any("the score top1 is code" in note for note in both["notes"])
    assert [path.name for path in (task.path / "bundles").iterdir()] == ["test_task.py-test_both"]
    replay = task.run("bundles/test_task.py-test_both/bundle.json")
    assert replay.checks[0]["verdict"] == "fail"
    assert replay.checks[0].get("score") is None


def test_a_diff_tells_a_drop_that_grew(task: Suite) -> None:
    records = []
    for broken in (0, 60, 70):
        mark = BAD.replace("0.01", "0.2")
        task.write(test_task=f"{HEAD}\n@trt_parity({mark})\ndef test_it(): return batches(broken={broken})\n")
        task.run()
        records.append(load_report(task.path / "report.json"))
    # As if the engine had become worse: what is planted in the inputs would be other inputs.
    (check,) = records[0].checks
    reports = [replace(records[0], checks=(replace(check, score=each.checks[0].score),)) for each in records]
    worse = diff.diff(reports[0], reports[1])
    assert [(each.what, each.direction) for each in worse.checks[0].changes] == [("top1 drop", "worse")]
    assert diff.diff(reports[1], reports[0]).checks[0].kind == "better"
    assert not diff.diff(reports[1], reports[2]).checks
    pairs = ((reports[0], reports[1]), (reports[1], reports[2]), (reports[1], reports[0]))
    limits = questions.Limits()
    answers = [questions.answers(one.checks[0], two.checks[0], (one, two), limits) for one, two in pairs]
    outcomes = [[each.outcome for each in found if "top1" in each.text] for found in answers]
    assert outcomes == [["fail"], ["pass"], ["pass"]]


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    return load(onnx_models.save(onnx_models.conv_net(), tmp_path / "conv.onnx"))


IMAGES = np.arange(2 * 3 * 16 * 16, dtype=np.float32).reshape(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        (Case({"image": IMAGES}, "text"), "text"),
        (Case(IMAGES), None),
        (IMAGES, None),
        ({"image": IMAGES}, None),
        ({"image": IMAGES, "label": [1, 2]}, [1, 2]),
        ({"image": IMAGES, "label": 1, "id": 2}, {"label": 1, "id": 2}),
        ((IMAGES, [1, 2]), [1, 2]),
        ([IMAGES, [1, 2], "a"], ([1, 2], "a")),
    ],
)
def test_labels_are_what_lies_beside_the_inputs(classifier: Any, item: Any, labels: Any) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter([item, item])

    cases, found = labelled.held(Loader(), classifier, "inputs")
    assert found == [labels, labels]
    for case in cases:
        np.testing.assert_array_equal(case["image"], IMAGES)


@pytest.mark.parametrize("most", [0, IMAGES.nbytes, 1 << 30])
def test_cases_beyond_the_memory_come_back_from_a_file(most: int) -> None:
    buffer = IMAGES.copy()

    def cases() -> Iterator[dict[str, Any]]:
        for number in range(4):
            buffer[:] = number
            yield {
                "x": buffer,
                "empty": np.zeros((0, 3)),
                "text": np.array(number),
                "odd": np.arange(number, dtype="i1"),
            }

    held = labelled.Held(cases(), most, "inputs")
    assert len(held) == 4
    for number in (3, 0, 2, 1):
        case = held[number]
        assert (case["x"] == number).all()
        assert case["x"].shape == IMAGES.shape
        assert case["empty"].shape == (0, 3)
        assert case["odd"].tolist() == list(range(number))
    assert len(held[1:3]) == 2
    assert [int(case["text"]) for case in held] == [0, 1, 2, 3]


class _Refilled(Sequence[Any]):
    """Three items, each written over the one before: what `make` makes of the array that they share."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.buffer = np.empty((2, 11), np.float32)
        self.item = make(self.buffer)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        self.buffer[:] = index
        return self.item


class _Loader:
    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class _Labels(NamedTuple):
    classes: Any


KINDS: list[Callable[[Any], Any]] = [_Loader, iter, lambda items: items]
MAKES: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: {"x": x},
    lambda x: OrderedDict(x=x),
    lambda x: UserDict(x=x),
]


@pytest.mark.parametrize("kind", KINDS, ids=["loader", "generator", "sequence"])
@pytest.mark.parametrize("make", MAKES, ids=["array", "mapping", "ordered", "user"])
def test_an_item_is_what_it_was_before_the_next_was_written_over_it(
    kind: Callable[[Any], Any], make: Callable[[Any], Any], tmp_path: Path
) -> None:
    write_models(tmp_path)
    model = load(tmp_path / "good.onnx")
    assert [sample["x"].max() for sample in calibration_data.load(kind(_Refilled(make)), model.inputs)] == [0, 1, 2]
    if kind is not iter:
        assert [case["x"].max() for case in inputs.cases_from(kind(_Refilled(make)), model, "inputs")] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS, ids=["loader", "generator", "sequence"])
def test_labels_are_what_they_were_before_the_next_were_written_over_them(
    kind: Callable[[Any], Any], tmp_path: Path
) -> None:
    write_models(tmp_path)
    given = kind(_Refilled(lambda x: Case({"x": x}, _Labels([x, (x,)]))))
    cases, labels = labelled.held(given, load(tmp_path / "good.onnx"), "inputs")
    assert [case["x"].max() for case in cases] == [0, 1, 2]
    assert [(each.classes[0].max(), each.classes[1][0].max()) for each in labels] == [(0, 0), (1, 1), (2, 2)]


def test_a_score_may_change_what_it_is_given(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
def in_place(outputs, case):
    outputs["logits"] -= outputs["logits"].max(axis=1, keepdims=True)
    case.inputs["x"][:] = 0
    labels = case.labels
    labels += 1
    return outputs["logits"].argmax(axis=1) + 1 == labels

@trt_parity("good.onnx", score=in_place, max_drop=0.01, tol=1e-2)
def test_sound(): return batches()

@trt_parity({BAD.replace("top1", "in_place")}, tol=1e-2)
def test_flips_4_percent(): return batches(broken=80)
"""
    )
    run = task.run()
    sound, flips = run.check("test_sound"), run.check("test_flips_4_percent")
    assert (sound["verdict"], sound["score"]["reference"], sound["score"]["disagreeing"]) == ("pass", 1, 0)
    assert (flips["verdict"], flips["score"]["reference"], flips["score"]["disagreeing"]) == ("fail", 1, 80)
    assert flips["parity"]["verdict"] == "fail"


def test_items_of_a_score_that_fills_one_array(task: Suite) -> None:
    task.write(
        test_task=f"""{HEAD}
FOUND = np.zeros((100, 1))

def filled(outputs, case):
    FOUND[:, 0] = top1(outputs, case)
    return list(FOUND)

@trt_parity({BAD.replace("top1", "filled")}, aggregate=lambda items: sum(each[0] for each in items) / len(items))
def test_flips_4_percent(): return batches(broken=80)
"""
    )
    (record,) = task.run().checks
    assert (record["verdict"], record["score"]["reference"]) == ("fail", 1)


def test_strings_are_held_in_memory() -> None:
    held = labelled.Held([{"text": np.array(["a", "bc"], object)}], 0, "inputs")
    assert held[0]["text"].tolist() == ["a", "bc"]


@pytest.mark.parametrize("size", [1, 1000])
def test_cases_without_end_leave_room_for_others(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tempfile.gettempdir())._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(memory, "limit_bytes", lambda: 500_000)
    case = {"x": np.zeros(size, np.float32)}
    with pytest.raises(InputError, match=r"^train inputs: no end after \d+ cases and 4") as info:
        labelled.Held(itertools.repeat(case), 100_000, "train inputs")
    assert ("half of what was free" in str(info.value)) == (size == 1000)


def test_labels_have_an_identity() -> None:
    labels = [np.arange(3), ["a", "b"], {"boxes": np.zeros((1, 4))}, None, "ab", 1.5, b"x", np.array(["a", None])]
    found = [labelled.digest([each]) for each in labels]
    assert len(set(found)) == len(labels)
    assert found == [labelled.digest([each]) for each in labels]
    others = [np.arange(3.0), ["ab"], {"boxes": np.zeros((4, 1))}, "None", "a", 1, b"y", np.array(["a", "b"], object)]
    assert not set(found) & {labelled.digest([each]) for each in others}
    assert labelled.digest([object()]) == labelled.digest([object()])


def test_evidence_of_another_score_or_other_labels_proves_nothing(task: Suite) -> None:
    text = f"{HEAD}\n@trt_parity({BAD})\ndef test_it(): return batches()\n"
    save(task, on_gpu(task.write(test_it=text).run().report))
    assert task.run(*OPTIONS).check("test_it")["proof"]["file"] == "gpu.json"
    task.write(test_it=text.replace("max_drop=0.01", "max_drop=0.02"))
    assert reason(task.run(*OPTIONS)).startswith("--trt-require-evidence=gpu.json: other score")
    task.write(
        test_it=text.replace("return batches()", "return [Case(c.inputs, c.labels.tolist()) for c in batches()]")
    )
    assert reason(task.run(*OPTIONS)).startswith("--trt-require-evidence=gpu.json: other score")


def test_records_of_scores_are_read_again(task: Suite) -> None:
    task.write(test_task=f"{HEAD}\n@trt_parity({BAD})\ndef test_it(): return batches(broken=80)\n")
    run = task.run()
    (check,) = load_report(task.path / "report.json").checks
    assert check.score is not None
    assert json.loads(check.to_json()) == {**run.checks[0], "outcome": "failed"}
    assert check.score.worst[0].reference == 1.0


def test_a_search_beside_a_score_is_refused_and_by_the_option_left_out(suite: Suite) -> None:
    write_models(suite.path)
    suite.write(test_it=f"{HEAD}@trt_parity({BAD}, tol=1.0, search=10)\ndef test_it():\n    return batches(200)\n")
    (record,) = suite.run().checks
    assert record["verdict"] == "error"
    assert "a score needs labels" in record["message"]
    suite.write(test_it=f"{HEAD}@trt_parity({BAD}, tol=1.0)\ndef test_it():\n    return batches(200)\n")
    (record,) = suite.run("--trt-search=10").checks
    assert record["score"] is not None
    assert any("a score needs labels" in note for note in record["notes"])


RARE = """
def classes(outputs, case):
    return np.stack([case.labels, outputs["logits"].argmax(axis=1) == case.labels], axis=1)


def balanced(items):
    return np.mean([items[items[:, 0] == number, 1].mean() for number in np.unique(items[:, 0])])


def loss(outputs, case):
    weights = np.exp(20 * outputs["logits"])
    return -np.log(weights[np.arange(len(case.labels)), case.labels] / weights.sum(axis=1))


def some(rare):
    kept = np.concatenate([np.flatnonzero(LABELS == 3)[:rare], np.flatnonzero(LABELS != 3)])
    return [Case({"x": X[kept]}, LABELS[kept])]
"""


def test_what_few_samples_could_cost_unseen_is_reckoned_with(task: Suite) -> None:
    task.write(
        test_rare=f"""{HEAD}{RARE}
@trt_parity("good.onnx", score=classes, aggregate=balanced, max_drop=0.05)
def test_rare(): return some(5)


@trt_parity("good.onnx", score=classes, aggregate=balanced, max_drop=0.05)
def test_many(): return some(100)


@trt_parity("good.onnx", score=loss, lower_is_better=True, max_drop=0.005)
def test_loss(): return batches()


@trt_parity("good.onnx", score=lambda *found: loss(*found).clip(0, 1), lower_is_better=True, max_drop=0.005)
def test_clipped(): return batches()
"""
    )
    run = task.run()
    verdicts = {check["nodeid"].split("::test_")[1]: check["verdict"] for check in run.checks}
    assert verdicts == {"rare": "inconclusive", "many": "pass", "loss": "inconclusive", "clipped": "pass"}
    assert "0 of which changed" in run.check("test_rare")["message"]
    for name, cost in {"rare": "0.02", "loss": "0.001"}.items():
        message = run.check(f"test_{name}")["message"]
        assert f"a sample whose outputs are lost costs up to {cost}" in message


def test_lost_outputs_that_take_long_to_score_are_left_and_told(task: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOST_S", 0.0)
    task.write(
        test_slow=f"""{HEAD}{RARE}
import time

def slow(outputs, case):
    if outputs["logits"].max() <= 0 or outputs["logits"].min() < -0.5:
        time.sleep(1)
    return top1(outputs, case)

@trt_parity("good.onnx", score=slow, max_drop=0.05)
def test_slow(): return batches(500)
"""
    )
    record = task.run().check("test_slow")
    assert record["verdict"] == "pass"
    assert "score slow: what a sample has to lose is not known of 400 of 500 samples" in " ".join(record["notes"])
