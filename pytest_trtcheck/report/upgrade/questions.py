"""What a gate asks of a check that is in both reports; each answer says what it rests on."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.choices import parts_of
from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.record import ASKED_LIMITS, ASKED_SEARCH, SEVERITY, combine, is_bad, nodes_shown
from pytest_trtcheck.report import builds, diff, diff_changes
from pytest_trtcheck.report.text import format_number, format_optional
from pytest_trtcheck.report.upgrade import layers
from pytest_trtcheck.report.view import decisive, scored, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.record import CheckRecord, EngineRecord, LatencyRecord, PartitionRecord, RunRecord, Verdict

Question: TypeAlias = Literal["comparable", "verdict", "error", "score", "latency", "precision", "layers"]
Outcome: TypeAlias = Literal["pass", "inconclusive", "not compared", "fail"]
Allowable: TypeAlias = Literal["missing", "not-comparable", "not-measured", "emulated", "layers"]

ALLOWABLE: tuple[Allowable, ...] = get_args(Allowable)
"""What may be allowed to be not compared: checks that the new report lacks, or that were made in another way; parts
that were not measured; errors that are emulated, of which TensorRT knows nothing; layers that do not tell."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""From the best to the worst."""

_UPGRADES = frozenset(["TensorRT", "driver"])
"""What of the environment an emulated error says nothing of."""
_ALWAYS = "p50_ms"
_TAILS = ("p90_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Limits:
    """What an upgrade may cost.

    Parameters
    ----------
    error_ratio, error_share
        An error fails that is more than so many times what it was, and by more than this share of its limit. None: as
        for baselines (`baselines.errors.rises`), whose rule it is.
    slowdown
        The share by which a quantile of latency may rise.
    layer_slowdown, layer_share
        Layers fail that surely take longer by more than this share of their own time, and of the engine's.
    allowed
        What need not be compared.
    """

    error_ratio: float | None = None
    error_share: float | None = None
    slowdown: float = 0.05
    layer_slowdown: float = 0.25
    layer_share: float = 0.02
    allowed: frozenset[Allowable] = frozenset()


@dataclass(frozen=True)
class Finding:
    """The answer to a question about a check; where nothing was compared, `kind` is what would have to be allowed."""

    question: Question
    outcome: Outcome
    text: str
    kind: Allowable | None = None


def _contradiction(check: CheckRecord) -> str | None:
    """What of a record cannot be as the plugin writes it; None where nothing is seen."""
    parts_say = combine([part.verdict for part in check.parts.values()])
    if check.verdict != "error" and SEVERITY.index(check.verdict) < SEVERITY.index(parts_say):
        return f"its verdict is {check.verdict}, and that of a part {parts_say}"
    for (output, metric), judged in diff_changes.by_place(check).items():
        over = judged.limit is not None and diff_changes.cost(judged) > diff_changes.cost_of(judged, judged.limit)
        if judged.verdict == "pass" and over:
            return f"{output} {metric} is {judged.value_text}, and passed at {diff_changes.limit_text(judged)}"
    if check.evidence == "engine" and check.gpu_ran is False:
        return "an engine computed its outputs, and no GPU ran"
    told = Counter(layer.precision for layer in check.engine.layers if layer.precision) if check.engine else Counter()
    if told and check.engine and told != Counter(check.engine.layers_by_precision or {}):
        return "its layers are not those that layers_by_precision counts"
    latency = check.latency
    distribution = diff_changes.distribution_of(latency, check.nodeid) if latency else None
    if latency and latency.p50_ms and distribution is not None:
        low, high = distribution.bounds_ms.get(_ALWAYS, (0.0, float("inf")))
        if not low * 0.999 <= latency.p50_ms <= high * 1.001:
            return f"its p50 of {latency.p50_ms:g} ms is not that of its distribution, {low:g} to {high:g} ms"
    return None


# --- one check -------------------------------------------------------------------------------------------------------


def answers(
    old: CheckRecord, new: CheckRecord, runs: tuple[RunRecord, RunRecord], limits: Limits
) -> tuple[Finding, ...]:
    """What every question about a check comes to; where two records of it cannot be compared, why.

    Raises
    ------
    ReportError
        A latency distribution cannot be read.
    """
    obstacles = list(diff.obstacles(old, new, runs))
    data = [check.calibration.sha256 if check.calibration else None for check in (old, new)]
    if None not in data and data[0] != data[1]:
        obstacles.append(f"other calibration data: sha256 {str(data[0])[:8]}… before, {str(data[1])[:8]}… now")
    for name, check in (("old", old), ("new", new)):
        if (wrong := _contradiction(check)) is not None:
            obstacles.append(f"the {name} report was altered: {wrong}")
    if obstacles:
        return tuple(Finding("comparable", "not compared", text, "not-comparable") for text in obstacles)
    is_emulated = old.evidence == new.evidence == "emulated" and not _UPGRADES.isdisjoint(
        diff.changed(*runs, new.machine if runs[1].machines and runs[0].machines else None)
    )
    return (
        *_asked(old, new),
        *_verdict(old, new),
        *_error(old, new, limits, is_emulated=is_emulated),
        *_score(old, new, is_emulated=is_emulated),
        *_latency(old, new, limits),
        *_layers(old, new, limits),
    )


def _asked(old: CheckRecord, new: CheckRecord) -> Iterator[Finding]:
    """What was asked of it before, beside its limits, and is not any more, or otherwise."""
    # One that broke may not tell what is asked of it.
    before, after = old.asked or {}, new.asked or {}
    differing = [what for what in before if what != ASKED_LIMITS and after.get(what) != before[what]]
    if old.search and not (new.search and new.search.asked >= old.search.asked):
        differing.append(ASKED_SEARCH)
    elif old.search and new.search and new.search.is_cut_short and not old.search.is_cut_short:
        text = f"the {ASKED_SEARCH} was cut short: {new.search.shown_tries}"
        yield Finding("comparable", "not compared", text, "not-comparable")
    for what in dict.fromkeys(differing if new.verdict != "error" else ()):
        yield Finding("comparable", "not compared", f"other {what} than before, or none", "not-comparable")
    now = diff_changes.budgets(new)
    for name, budget in diff_changes.budgets(old).items():
        # Quantiles are held against each other, whatever budget is on them.
        if not re.fullmatch(r"p[0-9]+_ms", name) and budget.verdict != "not_measured" and new.latency is not None:
            two = now.get(name)
            if two is not None and two.verdict == "not_measured":
                yield Finding("latency", "not compared", f"{name} was measured in the old report alone", "not-measured")
            elif two is None or (two.limit, two.limit_ms) != (budget.limit, budget.limit_ms):
                text = f"another budget on {name} than before, or none"
                yield Finding("comparable", "not compared", text, "not-comparable")


def _verdict(old: CheckRecord, new: CheckRecord) -> Iterator[Finding]:
    same = old.verdict == new.verdict
    words = verdict_word(new) if same else f"{verdict_word(old)} → {verdict_word(new)}"
    newly = _newly_bad(old, new)
    if new.verdict == "not_measured":
        yield Finding("verdict", "not compared", words, "not-measured")
    elif new.verdict == "pass" and (old.outcome, new.outcome) == ("passed", "failed"):
        yield Finding("verdict", "fail", f"{words}, and its test failed, which passed before")
    elif new.verdict == old.verdict == "pass" and new.runs > old.runs:
        runs = f"it passed in run {new.runs} of its test, and before in run {old.runs}"
        yield Finding("verdict", "inconclusive", f"{words}: {runs}")
    elif new.verdict == "pass":
        yield Finding("verdict", "pass", words)
    elif same and new.verdict == "error":
        yield Finding("verdict", "not compared", f"an error in both: {new.headline}", "not-measured")
    elif newly and SEVERITY.index(new.verdict) <= SEVERITY.index(old.verdict):
        surely: Outcome = "inconclusive" if set(newly.values()) == {"inconclusive"} else "fail"
        yield Finding("verdict", surely, f"{words}, and what passed before does not any more: {listed(newly)}")
    elif same:
        yield Finding("verdict", "pass", f"{words} in both: nothing that the upgrade did")
    else:
        outcome: Outcome = "inconclusive" if new.verdict == "inconclusive" and old.verdict == "pass" else "fail"
        # A failure that is inconclusive now is no new one.
        is_better = new.verdict == "inconclusive" and old.verdict in {"fail", "error"}
        yield Finding("verdict", "pass" if is_better else outcome, f"{words}: {new.headline}")


def _newly_bad(old: CheckRecord, new: CheckRecord) -> dict[str, Verdict]:
    """What of a check passed, and does not any more: what else of it is bad hides that in its verdict."""
    before, after = _each_verdict(old), _each_verdict(new)
    return {what: verdict for what, verdict in after.items() if is_bad(verdict) and before.get(what) == "pass"}


def _each_verdict(check: CheckRecord) -> dict[str, Verdict]:
    """Of its parts, every limit on an output, and every budget."""
    found = {name: part.verdict for name, part in check.parts.items()}
    found |= {" ".join(place): judged.verdict for place, judged in diff_changes.by_place(check).items()}
    return found | {f"budget {each.name or each.quantile}": each.verdict for each in check.budgets}


def _error(old: CheckRecord, new: CheckRecord, limits: Limits, *, is_emulated: bool) -> Iterator[Finding]:
    if old.parity is None:
        return
    before, after = diff_changes.by_place(old), diff_changes.by_place(new)
    if not before or not after:
        where = "the old report alone" if before else "the new report alone" if after else "neither report"
        yield Finding("error", "not compared", f"outputs were compared in {where}", "not-measured")
        return
    if is_emulated:
        text = "emulated in both: TensorRT did not run, and these errors say nothing of it"
        yield Finding("error", "not compared", text, "emulated")
    for place, one in before.items():
        two = after.get(place)
        if two is None or two.limit != one.limit:
            now = "is not judged any more" if two is None else f"was judged by {diff_changes.limit_text(one)}"
            now += "" if two is None else f", and is by {diff_changes.limit_text(two)}"
            yield Finding("error", "not compared", f"{' '.join(filter(None, place))} {now}", "not-comparable")
    yield from _rises(old, new, limits)


def _score(old: CheckRecord, new: CheckRecord, *, is_emulated: bool) -> Iterator[Finding]:
    """Whether the task's score surely fell further than before: no bounds of the two drops overlap."""
    if old.score is None:
        return
    one, two = scored(old), scored(new)
    if new.score is None or one is None or two is None:
        where = "the old report alone" if one else "the new report alone" if two else "neither report"
        yield Finding("score", "not compared", f"the task was scored in {where}", "not-measured")
        return
    names = ("name", "max_drop", "lower_is_better", "samples", "labels_sha256")
    for name, before, after in zip(names, old.score.asked, new.score.asked, strict=True):
        if before != after:
            text = "other labels" if name == "labels_sha256" else f"another score: {name} was {before}, and is {after}"
            yield Finding("score", "not compared", text, "not-comparable")
            return
    if is_emulated:
        yield Finding("score", "not compared", "emulated in both: TensorRT did not run", "emulated")
    fell = new.score.fell_further_than(old.score)
    yield Finding("score", "fail" if fell else "pass", f"{two.name} drop {one.drop} → {two.drop}")


def _rises(old: CheckRecord, new: CheckRecord, limits: Limits) -> Iterator[Finding]:
    from pytest_trtcheck.baselines import errors

    assert old.parity is not None
    builds, engines = errors.of_builds(old)
    builds = builds or [errors.figures(old.parity)]
    values = {
        output: {
            name: tuple(build[output][name] for build in builds if name in build.get(output, {})) for name in found
        }
        for output, found in builds[0].items()
    }
    if new.rebuild and not any(build.errors for build in new.rebuild.builds):
        new = replace(new, rebuild=None)
    before = errors.ErrorBaseline(
        model=old.model,
        model_sha256=old.model_sha256,
        inputs_sha256=old.inputs_sha256,
        reference_sha256=old.reference_sha256,
        recorded="",
        engines=engines,
        made_with={},
        values=values,
    )
    given = {"ratio": limits.error_ratio, "share": limits.error_share}
    risen, count = errors.rises(before, new, **{name: value for name, value in given.items() if value is not None})
    for each in risen:
        now = "not computed" if each.value is None else format_number(each.value)
        text = f"{each.output} {each.metric} {format_number(each.before)} → {now}"
        yield Finding("error", "fail", f"{text}, allowed {format_number(each.allowed)}")
    if not count:
        yield Finding("error", "not compared", "no error is a number in both reports", "not-measured")
    elif not risen:
        one, two = decisive(old), decisive(new)
        words = f", the largest {one.metric} {one.value_text} → {two.value_text}" if one and two else ""
        yield Finding("error", "pass", f"{plural(count, 'error')} of the outputs, none risen{words}")


# --- latency ---------------------------------------------------------------------------------------------------------


def _latency(old: CheckRecord, new: CheckRecord, limits: Limits) -> Iterator[Finding]:
    before, after = old.latency, new.latency
    if before is None:
        return
    if after is None or not before.samples or not after.samples:
        where = "in neither report" if not (before.samples or (after and after.samples)) else ""
        where = where or ("in the new report alone" if not before.samples else "in the old report alone")
        yield Finding("latency", "not compared", f"measured {where}", "not-measured")
        return
    if otherwise := diff_changes.measured_otherwise(before.details, after.details):
        yield Finding("latency", "not compared", otherwise.removeprefix("not compared: "), "not-comparable")
        return
    if before.details.distribution is None or after.details.distribution is None:
        yield Finding("latency", "not compared", "a report has no distribution of it", "not-comparable")
        return
    budgeted = {f"{budget.quantile}_ms" for latency in (before, after) for budget in latency.budgets if budget.quantile}
    counted = {_ALWAYS, *budgeted}
    quantiles = (_ALWAYS, *_TAILS)
    found = [_quantile(name, before, after, new.nodeid, limits, counts=name in counted) for name in quantiles]
    yield from (each for each in found if each.outcome != "pass")
    if passed := [each.text for each in found if each.outcome == "pass"]:
        yield Finding("latency", "pass", "; ".join(passed))


def _quantile(
    name: str, old: LatencyRecord, new: LatencyRecord, nodeid: str, limits: Limits, *, counts: bool
) -> Finding:
    from pytest_trtcheck.latency import comparison

    before, after = diff_changes.distribution_of(old, nodeid), diff_changes.distribution_of(new, nodeid)
    assert before is not None
    assert after is not None
    waited = old.details.enqueue_bound or new.details.enqueue_bound
    found = comparison.compare(after, before, name=name, min_slowdown=limits.slowdown, enqueue_bound=waited)
    verdict = comparison.decided(found)
    short = name.removesuffix("_ms")
    values = [format_optional(each.quantile_ms(name)) for each in (before, after)]
    text = f"{short} {values[0]} → {values[1]} ms ({found.ratio - 1:+.1%}"
    if found.lower is not None and found.upper is not None:
        text += f", between {found.lower - 1:+.1%} and {found.upper - 1:+.1%}"
    text += ")"
    if verdict == "fail" and new.details.disturbances:
        verdict, text = "inconclusive", f"{text}, but it was disturbed: {'; '.join(new.details.disturbances)}"
    if verdict == "pass" and old.details.disturbances:
        # The old one looks slower than it is, and hides as much.
        verdict, text = "inconclusive", f"{text}, but before it was disturbed: {'; '.join(old.details.disturbances)}"
    if verdict == "inconclusive" and not counts:
        return Finding("latency", "pass", f"{short} not told: no budget is on it, and it is too uncertain")
    if verdict == "fail":
        return Finding("latency", "fail", f"{text}, allowed {found.allowed}")
    if verdict == "inconclusive":
        return Finding("latency", "inconclusive", f"{text}: too uncertain to tell, allowed {found.allowed}")
    return Finding("latency", "pass", text)


# --- layers ----------------------------------------------------------------------------------------------------------


def _layers(old: CheckRecord, new: CheckRecord, limits: Limits) -> Iterator[Finding]:
    yield from _partition(old.partition, new.partition)
    before, after = old.engine, new.engine
    if before is None:
        return
    target = f", built for {old.compiled_for}" if old.compiled_for else ""
    if after is None:
        kind: Allowable = "layers" if old.evidence == "engine" else "not-measured"
        yield Finding("precision", "not compared", f"there was an engine{target}, and there is none now", kind)
        return
    if old.compiled_for and new.compiled_for and old.compiled_for != new.compiled_for:
        text = f"there was an engine{target}, and now one for {new.compiled_for}"
        yield Finding("precision", "not compared", text, "not-comparable")
    if old.evidence != "engine":
        return
    yield from _precision(before, after, new.precision)
    yield from _layer_times(old, new, limits)


def _partition(old: PartitionRecord | None, new: PartitionRecord | None) -> Iterator[Finding]:
    """Of a model that ONNX Runtime divides: which nodes its provider left to others, and what kernels compute in."""
    if old is None:
        return
    if new is None:
        yield Finding("precision", "not compared", f"what {old.provider} computes is told before alone", "layers")
        return
    there = {node.name for node in old.elsewhere}
    moved = [node for node in new.elsewhere if node.name not in there]
    gone = _gone(old.kernels or {}, new.kernels or {})
    if moved:
        yield Finding("precision", "fail", f"{new.provider} leaves {len(moved)} more to others: {nodes_shown(moved)}")
    if gone:
        yield Finding("precision", "fail", f"no node computes in {' or '.join(gone)} any more")
    if not moved and not gone:
        yield Finding("precision", "pass", f"{new.provider} computes all that it did")


def _gone(old: Mapping[str, int], new: Mapping[str, int]) -> list[str]:
    """The narrow types that something computed in, and nothing does any more."""
    return [kind for kind, count in old.items() if count and new and kind in layers.NARROW and not new.get(kind)]


def _precision(old: EngineRecord, new: EngineRecord, precision: str | None) -> Iterator[Finding]:
    asked = parts_of(precision or "")
    gone = _gone(old.layers_by_precision or {}, new.layers_by_precision or {})
    if lost := [kind for kind in gone if kind in asked]:
        yield Finding("precision", "fail", f"no layer computes in {' or '.join(lost)} any more")
    named = [any(layer.nodes for layer in engine.layers) for engine in (old, new)]
    if not all(named):
        which = "neither report tells" if not any(named) else f"the {'new' if named[0] else 'old'} report does not tell"
        yield Finding("precision", "not compared", f"{which} which layer computes which ONNX node", "layers")
        return
    widened = layers.widened(old.layers, new.layers)
    for each in widened:
        yield Finding("precision", "fail", str(each))
    if untold := layers.untold(old.layers, new.layers):
        text = f"no layer of the new engine names {plural(len(untold), 'node')}: {listed(untold)}"
        yield Finding("precision", "not compared", text, "layers")
    elif not widened:
        told = len({node for layer in old.layers for node in layer.nodes})
        yield Finding("precision", "pass", f"{plural(told, 'node')}, none in a wider type than before")


def _layer_times(old: CheckRecord, new: CheckRecord, limits: Limits) -> Iterator[Finding]:
    assert old.engine is not None
    assert new.engine is not None
    engines = old.engine, new.engine
    totals = [layers.Took.of(engine.layers) for engine in engines]
    if not any(totals):
        if any(check.latency and check.latency.samples for check in (old, new)):
            yield Finding("layers", "not compared", _untimed(engines, totals), "layers")
        return
    if not all(totals):
        yield Finding("layers", "not compared", _untimed(engines, totals), "layers")
        return
    if (
        old.latency
        and new.latency
        and (otherwise := diff_changes.measured_otherwise(old.latency.details, new.latency.details))
    ):
        yield Finding("layers", "not compared", otherwise.removeprefix("not compared: "), "not-comparable")
        return
    groups = layers.groups(engines[0].layers, engines[1].layers)
    total = totals[0].ms if totals[0] else 0.0
    exact = all(
        side and check.latency and layers.adds_up(side.ms, check.latency.p50_ms)
        for side, check in zip(totals, (old, new), strict=True)
    )
    slower = layers.slower(groups, total, 1 + limits.layer_slowdown, limits.layer_share, exact=exact)
    for each in slower:
        outcome: Outcome = "fail" if each.surely else "inconclusive"
        yield Finding("layers", outcome, str(each) + ("" if each.surely else ": too uncertain to tell"))
    # What no group holds could not be compared; how much that is, is known.
    left = [_left(side, total.ms) for side, total in zip(_sums(groups), totals, strict=True) if total]
    most = f"{max(left):.0%} of the time is in layers that share no ONNX node with the other engine's"
    if max(left) > _MOST_LEFT:
        yield Finding("layers", "not compared", most, "layers")
    elif not slower:
        matched = f"{plural(len(groups), 'group')} of layers, none slower by more than {limits.layer_slowdown:.0%}"
        yield Finding("layers", "pass", matched + (f"; {most}" if max(left) > _MENTIONED else ""))


_MOST_LEFT, _MENTIONED = 0.25, 0.01
"""The share of an engine's time that may lie in layers that cannot be matched; and that is worth a word."""


def _sums(groups: Sequence[layers.Group]) -> tuple[float, float]:
    before, after = (
        sum(layer.time_ms or 0.0 for group in groups for layer in getattr(group, side)) for side in ("old", "new")
    )
    return before, after


def _left(matched_ms: float, total_ms: float) -> float:
    return 1 - matched_ms / total_ms if total_ms else 0.0


def _untimed(engines: Sequence[EngineRecord], totals: Sequence[object]) -> str:
    where = "in neither report" if not any(totals) else f"not in the {'new' if totals[0] else 'old'} report"
    reasons = [engine.layers_untimed for engine in engines if engine.layers_untimed]
    return f"layers were timed {where}" + (f": {reasons[0]}" if reasons else "")


def information(old: CheckRecord, new: CheckRecord) -> Iterator[str]:
    """What an upgrade changed, and nobody set a limit to."""
    if None not in {old.backend, new.backend} and old.backend != new.backend:
        yield f"backend {old.backend} → {new.backend}"
    before, after = old.engine, new.engine
    if before is None or after is None:
        return
    sizes = {
        "engine": (before.bytes, after.bytes),
        "device memory": (before.device_memory_bytes, after.device_memory_bytes),
    }
    for name, (one, two) in sizes.items():
        if one is not None and two is not None and one != two:
            yield f"{name} {format_bytes(one)} → {format_bytes(two)}" + (f" ({two / one - 1:+.0%})" if one else "")
    options = [builds.options(check) for check in (old, new)]
    if options[0] != options[1]:
        yield f"build options {options[0]} → {options[1]}"
    if old.lowered and new.lowered and old.lowered.key != new.lowered.key:
        yield "the typed ONNX file is another one"
    seconds = [format_number(engine.build_s) for engine in (before, after)]
    if seconds[0] != seconds[1]:
        yield f"built in {seconds[0]} → {seconds[1]} s"
    numbers = len(before.layers), len(after.layers)
    groups = layers.groups(before.layers, after.layers)
    otherwise = sum(group.is_fused_otherwise for group in groups)
    if all(numbers) and (numbers[0] != numbers[1] or otherwise):
        yield f"{numbers[0]} → {numbers[1]} layers, {plural(otherwise, 'group')} of them fused otherwise"
