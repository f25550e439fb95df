"""The numpy script that sizes the planted faults of benchmarks/bench_faults.py, on arrays whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks" / "faults"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"faults_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


size, zoo = script("size"), script("zoo")
BOXES, SCORES = zoo.Part("out", "boxes", 1, (0, 4)), zoo.Part("out", "scores", 1, (4, 6))


def detections() -> Any:
    """[1, 6, 50]: boxes in pixels, and scores of which every other one reaches 0.25."""
    array = np.zeros((1, 6, 50))
    array[:, :4] = 320.0
    array[:, 4:, ::2] = 0.8
    return array


def test_it_imports_nothing_of_the_plugin() -> None:
    assert (
        "pytest_trtcheck"
        not in (FOLDER / "size.py").read_text(encoding="utf-8").partition('"""')[2].partition('"""')[2]
    )


def test_each_part_is_sized_by_its_own_scale() -> None:
    actual = detections()
    actual[:, 4:] = 0
    found = size.size([BOXES, SCORES], [zoo.Decision(SCORES, 0.25)], [({"out": actual}, {"out": detections()})])
    assert found == {"errors": {"out/boxes": 0.0, "out/scores": 1.0}, "flipped": {"out/scores": 1.0}}
    assert size.must_be_caught(found, 0.05)
    # Over the whole output it would be 0.8 of 320.
    assert size.size([zoo.Part("out")], [], [({"out": actual}, {"out": detections()})])["errors"] == {"out": 0.0025}


def test_lost_and_invented_detections_count_among_those_of_either_side() -> None:
    actual = detections()
    actual[0, 4, :10:2] = 0.2
    actual[0, 5, 1] = 0.3
    found = size.size([], [zoo.Decision(SCORES, 0.25)], [({"out": actual}, {"out": detections()})])
    assert found["flipped"] == {"out/scores": pytest.approx(6 / 51)}


def test_too_few_detections_make_no_share() -> None:
    few = detections()[..., :4]
    found = size.size([], [zoo.Decision(SCORES, 0.25)], [({"out": np.zeros_like(few)}, {"out": few})])
    assert found["flipped"] == {"out/scores": None}
    assert size.largest(found["flipped"]) == 0.0


def test_rows_whose_largest_moves_have_flipped() -> None:
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    actual = np.array([[0.2, 0.8], [0.3, 0.7], [0.3, 0.7], [np.nan, 0.4]])
    pair = {"out": actual}, {"out": reference}
    found = size.size([zoo.Part("out")], [zoo.Decision(zoo.Part("out"))], [pair])
    assert found["flipped"] == {"out": 0.5}
    assert found["errors"] == {"out": float("inf")}


@pytest.mark.parametrize(
    ("error", "flipped", "must", "sound"),
    [
        (0.004, 0.0, False, True),
        (0.006, 0.0, False, False),
        (0.004, 0.02, False, False),
        (0.004, 0.05, True, False),
        (0.021, 0.0, True, False),
    ],
)
def test_what_must_be_caught_and_what_is_sound(error: float, flipped: float, must: bool, sound: bool) -> None:
    found = {"errors": {"a": 0.0, "b": error}, "flipped": {"a": flipped, "b": None}}
    assert size.must_be_caught(found, 0.01) == must
    assert size.is_sound(found, 0.01) == sound
