"""A diagnosis in words, for the text of a failed test."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.record import BLAMED, number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.record import BlameRecord

WIDTH = 96
LABELLED = 15
"""Columns before a row's text."""
_SHOWN = 3


def verdict(blame: BlameRecord | Mapping[str, Any]) -> str:
    """Who is to blame, in one line."""
    return f"{BLAMED[blame['step']]} is to blame, {blame['headline']}"


def explain(blame: BlameRecord | Mapping[str, Any]) -> str:
    """The lines to print for a `blame`; one is wider than WIDTH only for a single long name, which is left whole."""
    return "\n".join(_lines(blame))


def _lines(blame: BlameRecord | Mapping[str, Any]) -> Iterator[str]:
    yield from _row("to blame", f"{BLAMED[blame['step']]}: {blame['headline']}")
    yield from _row("error", _steps(blame["errors"]))
    if blame["parts"]:
        alone = ", ".join(f"{part} alone {figure(number(value))}" for part, value in blame["parts"].items())
        yield from _row("parts", f"of the two, {alone}")
    culprit = blame["culprit"]
    if culprit:
        what = "constant" if culprit["is_constant"] else "tensor"
        part = f", which computes in {culprit['part']}" if culprit.get("part") else ""
        at = f"node {culprit['node']!r} ({culprit['op_type']}){part}"
        yield from _row("where", f"{what} {culprit['tensor']!r} at {at}")
        if culprit.get("module"):
            yield from _row("module", culprit["module"])
        yield from _row("what", culprit["detail"])
        yield from _row("jump", _jump(culprit))
        if blame["others"]:
            shown = ", ".join(map(repr, blame["others"][:_SHOWN]))
            more = len(blame["others"]) - _SHOWN
            label = "or" if culprit["kind"] == "engine" else "also"
            yield from _row(label, shown + (f" and {more} more nodes" if more > 0 else ""))
    elif blame["contributions"]:
        yield from _row("most of it", _contributions(blame["contributions"]))
    yield from _keep(blame)
    yield from _calibration(blame["calibration"] or {})
    for note in blame["notes"]:
        yield from _row("note", note)


def _steps(errors: Mapping[str, Any]) -> str:
    shown = {name: number(errors[name]) for name in ("lowered", "engine", "total")}
    limit = f", the limit is {errors['limit']:g}" if errors["limit"] is not None else ""
    metric = f"{errors['metric']} of {errors['output']!r}"
    if errors.get("export") is not None:
        return f"{metric}: source → export in FP32 {figure(number(errors['export']))}{limit}"
    if shown["engine"] is None:
        return f"{metric}: FP32 → lowered {figure(shown['lowered'])}{limit}"
    return (
        f"{metric}: FP32 → lowered {figure(shown['lowered'])}, lowered → engine {figure(shown['engine'])}, "
        f"in all {figure(shown['total'])}{limit}"
    )


def _contributions(contributions: Sequence[Mapping[str, Any]]) -> str:
    shares = [(each["node"], number(each["share"]) or 0.0) for each in contributions[:_SHOWN]]
    shown = ", ".join(f"{node!r} {share:.2g}×" for node, share in shares)
    return f"{shown} the error, each lowered alone" + ("; errors cancel in part" if shares[0][1] > 1 else "")


def _jump(culprit: Mapping[str, Any]) -> str:
    own, before, after = (number(culprit[name]) for name in ("own", "before", "after"))
    if own is None or before is None or after is None:
        return ""
    return f"relative error {before:.2g} before this node, {after:.2g} behind it; {own:.2g} of its own making"


def figure(value: float | None) -> str:
    """A metric's value."""
    return "unknown" if value is None else f"{value:.3g}"


def _keep(blame: BlameRecord | Mapping[str, Any]) -> Iterator[str]:
    names = blame["keep_fp32"]
    if not names:
        return
    value = number(blame["keep_value"])
    how = "confirmed on all inputs" if blame["confirmed"] else "not confirmed"
    by = "by emulation"
    if blame["confirmed_by"] == "engine":
        by = f"on the engine ({figure(number(blame['keep_emulated']))} by emulation)"
    if value is None:
        what = "no error, and nothing to compare: these inputs exercise nothing, and the check says so then;"
        yield from _row("right with", f"{what} {how} {by}:")
    else:
        yield from _row("passes with", f"{blame['errors']['metric']} {figure(value)}, {how} {by}:")
    yield from argument(names)


def argument(names: Sequence[str]) -> list[str]:
    """`keep_fp32=[…]` to paste, on as many lines as it takes; a name is never broken."""
    quoted = [json.dumps(name, ensure_ascii=False) for name in names]
    line = f"    keep_fp32=[{', '.join(quoted)}]"
    if len(line) <= WIDTH:
        return [line]
    return ["    keep_fp32=[", *(f"        {name}," for name in quoted), "    ]"]


def _calibration(audit: Mapping[str, Any]) -> Iterator[str]:
    label = "calibration"
    for method in audit.get("methods", ()):
        if method["passes"]:
            yield from _row(label, f'method="{method["method"]}" passes ({figure(number(method["value"]))})')
            label = ""
    for each in audit.get("outside", ())[:_SHOWN]:
        if each["share"] > audit["limit"]:
            yield from _row(
                label,
                f"{each['share']:.1%} of tensor {each['tensor']!r} lies outside its range of ±{each['amax']:.4g} "
                f"(max|x| {each['max_abs']:.4g}), most of it in test input {each['worst']}",
            )
            label = ""
    for flag in audit.get("flags", ())[:_SHOWN]:
        yield from _row(label, f"{flag['label']}: {flag['what']}" + (f", {flag['detail']}" if flag["detail"] else ""))
        label = ""
    if (more := len(audit.get("flags", ())) - _SHOWN) > 0:
        yield from _row(label, f"… and {more} more in the report")


def _row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label}".ljust(LABELLED),
        subsequent_indent=" " * LABELLED,
        break_long_words=False,
        break_on_hyphens=False,
    )
