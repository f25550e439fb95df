"""The search for a smallest set, and the words that a diagnosis is put into."""

from __future__ import annotations

import random
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_trtcheck.diagnose import Blame, Errors, explain, keeping
from pytest_trtcheck.diagnose.culprit import Culprit, Kind
from pytest_trtcheck.diagnose.subject import Budget, BudgetSpent
from pytest_trtcheck.diagnose.text import LABELLED, WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Trials:
    """Suffices when all that is needed is there; counts how often it was asked."""

    def __init__(self, needed: set[int], most: int = 10_000) -> None:
        self.needed, self.left, self.asked = needed, most, 0

    def __call__(self, chosen: Sequence[int]) -> bool:
        if self.left <= 0:
            raise BudgetSpent
        self.left -= 1
        self.asked += 1
        return self.needed <= set(chosen)


@given(needed=st.sets(st.integers(0, 99), min_size=1, max_size=6))
def test_exactly_what_is_needed_is_found(needed: set[int]) -> None:
    trials = Trials(needed)
    assert keeping.fewest(range(100), trials) == sorted(needed)


def test_a_good_ranking_makes_it_short() -> None:
    trials = Trials({0, 1, 2})
    assert keeping.fewest(range(500), trials) == [0, 1, 2]
    assert trials.asked < 15


def test_none_where_not_even_all_suffice() -> None:
    assert keeping.fewest(range(10), Trials({10})) is None
    assert keeping.fewest([], Trials({1})) is None


@given(most=st.integers(0, 40), needed=st.sets(st.integers(0, 30), min_size=1, max_size=4))
def test_the_best_that_the_budget_allowed(most: int, needed: set[int]) -> None:
    trials = Trials(needed, most)
    found = keeping.fewest(range(31), trials)
    assert trials.asked <= most
    assert found is None or needed <= set(found)


@given(needed=st.sets(st.integers(0, 9)), extra=st.sets(st.integers(10, 19)))
def test_needless_ones_are_left_out(needed: set[int], extra: set[int]) -> None:
    items = sorted(needed | extra)
    found = keeping.without_needless(items, Trials(needed))
    assert set(found) == needed or (not needed and len(found) <= 1)


@given(seed=st.integers(0, 10_000), most=st.integers(1, 12))
def test_none_of_what_is_left_can_go_though_less_may_be_enough_where_more_was_not(seed: int, most: int) -> None:
    """Rounding errors cancel out, or do not: a set may be enough and a larger one not."""
    items = tuple(range(12))

    def suffices(chosen: Sequence[int]) -> bool:
        return tuple(chosen) == items or random.Random(f"{seed} {tuple(chosen)}").random() < 0.3

    found = keeping.without_needless(items, suffices, most)
    assert suffices(found)
    assert len(found) == 1 or not any(suffices([each for each in found if each != item]) for item in found)


def test_the_budget() -> None:
    budget = Budget(seconds=100, trials=2)
    budget.spend()
    budget.spend()
    with pytest.raises(BudgetSpent):
        budget.spend()
    assert Budget(seconds=0, trials=5).is_over()
    with pytest.raises(BudgetSpent):
        Budget(seconds=-1, trials=5).spend()


def test_a_part_of_the_budget_ends_before_the_whole() -> None:
    budget = Budget(seconds=100, trials=5)
    with budget.part(0.5):
        budget.spend()
        assert 40 < budget.left_s() <= 50
    with budget.part(0.0), pytest.raises(BudgetSpent):
        budget.spend()
    assert budget.tried == 1
    assert 90 < budget.left_s() <= 100
    budget.start()
    assert budget.tried == 0


# --- words -----------------------------------------------------------------------------------------------------------

CULPRIT = Culprit("/block/Mul", "Mul", "/block/Mul_output_0", "overflow", "max|x| 70,000 is beyond FP16's 65,504")
ERRORS = Errors("max", 0.01, "logits", 0.5, None, 0.5)


def blame(**fields: Any) -> dict[str, Any]:
    return Blame(**{"step": "precision", "headline": "tensor 'a' overflows", "errors": ERRORS, **fields}).to_dict()


def test_the_first_line_says_who_is_to_blame() -> None:
    first: Callable[[dict[str, Any]], str] = lambda each: explain(each).splitlines()[0]  # noqa: E731
    assert first(blame()) == "  to blame     the precision: tensor 'a' overflows"
    assert first(blame(step="engine", headline="x")) == "  to blame     the engine: x"
    assert first(blame(step="both", headline="x")) == "  to blame     the precision as well as the engine: x"


def test_the_argument_can_be_pasted() -> None:
    short, awkward = ("a", "b"), ('a"b', "back\\slash", "x" * 90, "/model.0/[conv]/Conv*")
    for names in (short, awkward):
        text = explain(blame(culprit=CULPRIT, keep_fp32=names, keep_value=0.002, confirmed=True))
        pasted = text[text.index("keep_fp32=") :]
        assert eval(f"dict({pasted})") == {"keep_fp32": list(names)}
        assert "passes with  max 0.002, confirmed on all inputs" in text


def test_every_step_is_told() -> None:
    errors = Errors("max", 0.01, "logits", 0.001, float("inf"), float("inf"))
    text = explain(blame(step="engine", errors=errors, notes=("one thing", "another")))
    assert "FP32 → lowered 0.001, lowered → engine inf, in all inf, the limit is 0.01" in " ".join(text.split())
    assert text.count("  note  ") == 2


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
@example("a short word " * 20, "and another " * 20)
@example("/model/layers.0/" * 10, "0")
@example("\U0002ebe1" * 9, "0")  # Nine characters, of which `repr` makes 92.
def test_only_one_long_word_makes_a_line_wider_than_the_terminal(name: str, detail: str) -> None:
    culprit = Culprit(name, "Mul", name, "rounding", detail)
    calibration = {
        "limit": 0.01,
        "outside": [{"tensor": name, "amax": 1.0, "share": 0.5, "max_abs": 2.0, "worst": 0}],
        "flags": [{"what": "constant", "index": 0, "label": detail, "detail": detail}] * 5,
        "methods": [{"method": "entropy", "value": 0.01, "passes": True}],
    }
    text = explain(blame(culprit=culprit, others=(name,) * 5, calibration=calibration, notes=(detail,)))
    # Behind the label: words are what textwrap takes for them.
    assert all(len(line) <= WIDTH or " " not in line[LABELLED:].strip(" ") for line in text.split("\n"))


def test_the_documentation_names_every_key() -> None:
    """docs/diagnosis.md is what a program that reads the JSON report goes by."""
    lines = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("| key | what it holds |") + 2 :]
    rows = {key: row for row in table for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(rows) == set(blame()) - {"traced"}, "which is for the graph, in a form of its own"
    nested: dict[str, Any] = {"errors": ERRORS, "culprit": CULPRIT}
    for key, part in nested.items():
        assert {each.name for each in fields(part)} <= set(re.findall(r"`(\w+)`", rows[key])), key
    kinds = {row.split("|")[1].strip(" `") for row in lines[lines.index("| `kind` | what went wrong |") + 2 :][:9]}
    assert kinds | {"engine", "export"} == set(get_args(Kind))
