"""Write what pages show of the code: `python -m docs.site.reference`; `tests/test_docs.py` fails where it is not done.

Such parts stand between `<!-- generated NAME -->` and `<!-- end of NAME -->`, in pages that are prose otherwise. The
last column of a table with the title "more" (and "value" of the metrics) is written by hand: it is taken over.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import operator
import re
import typing
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import pytest_trtcheck
from docs.site import compatibility, docstrings, explained
from docs.site.links import ROOT, pages
from docs.site.tables import GENERATED, first_name, kept, table, together
from pytest_trtcheck import __main__ as commands
from pytest_trtcheck import errors, metrics, record, spec, strategies
from pytest_trtcheck.backends import base
from pytest_trtcheck.check import steps
from pytest_trtcheck.choices import PRECISIONS, Option, is_pair
from pytest_trtcheck.model import sources
from pytest_trtcheck.plugin import fixtures, options
from pytest_trtcheck.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def _code(value: object) -> str:
    return f"`{value}`"


def option_table(old: str) -> str:
    """Every option of `OPTIONS`."""
    more = kept(old, "more")

    def row(option: Option) -> list[str]:
        flag = option.flag + (f"={option.metavar}" if option.metavar else "")
        choices = f": {', '.join(map(_code, option.choices))}" if option.choices else ""
        names = "<br>".join(map(_code, [*([] if option.ini_only else [flag]), option.variable, option.name]))
        by_hand = more.get(first_name(names), "")
        return [names, option.kind, _default(option.default), option.help + choices, by_hand]

    header = ["flag, environment, ini key", "kind", "default", "meaning", "more"]
    return table(header, [row(option) for option in options.OPTIONS])


def _default(value: object) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, tuple):
        return _code(", ".join(value))
    return (
        ("yes" if value else "no")
        if isinstance(value, bool)
        else _code(f"{value:g}" if isinstance(value, float) else value)
    )


def marker(function: Callable[..., object]) -> Callable[[str], str]:
    """The arguments of a marker."""

    def write(old: str) -> str:
        more, said = kept(old, "more"), docstrings.of(function).parameters
        given = inspect.signature(function).parameters
        rows = [[_code(name), _literal(given[name].default), text, more.get(name, "")] for name, text in said.items()]
        return table(["argument", "default", "meaning", "more"], together(rows))

    return write


def _literal(value: object) -> str:
    return "–" if value is None else _code(json.dumps(value) if isinstance(value, str) else repr(value))


def fixture_table(*, to_override: bool) -> Callable[[str], str]:
    """The fixtures that users override, or those that they use."""

    def write(old: str) -> str:
        more, rows = kept(old, "more"), []
        for name, fixture in vars(fixtures).items():
            text = docstrings.joined(docstrings.of(fixture).text) if name.startswith("trt_") else ""
            if text and text.startswith("Override: ") is to_override:
                shown = re.match(r"(`[^`]*`): (.*)", text) or re.match(r"(?:Override: )?()(.*)", text)
                assert shown
                rows.append([shown[1] or _code(name), shown[2], more.get(name, "")])
        return table(["fixture", "what it gives" if to_override else "what it is", "more"], rows)

    return write


def fields_table(cls: type) -> Callable[[str], str]:
    """The fields of a dataclass of ours."""

    def write(old: str) -> str:
        more, said = kept(old, "more"), docstrings.attributes(cls)
        rows = [
            [_code(n), _literal(each.default), said[n], more.get(n, "")] for each in fields(cls) if (n := each.name)
        ]
        return table(["option", "default", "what it is", "more"], together(rows))

    return write


def metric_table(old: str) -> str:
    """Every metric, with its default limits."""
    by_hand = kept(old, "value")
    single = [each for each in PRECISIONS if not is_pair(each)]

    def row(metric: metrics.Metric) -> list[str]:
        limits = [f"{metric.default(each):.3g}" for each in single] if metric.default else ["none"] * len(single)
        return [_code(metric.name), by_hand.get(metric.name, ""), "at least" if metric.at_least else "at most", *limits]

    return table(["metric", "value", "limit", *single], [row(each) for each in metrics.METRICS.values()])


def command_help(_: str) -> str:
    """What `python -m pytest_trtcheck` does, as it says itself; not as argparse lays it out, which changes."""
    (subparsers,) = (each for each in commands.parser()._actions if isinstance(each, argparse._SubParsersAction))
    parts = []
    for name, command in subparsers.choices.items():
        given = [each for each in command._actions if not isinstance(each, argparse._HelpAction)]
        usage = " ".join(_usage(each) for each in given if each.required or not each.option_strings)
        usage += " [options]" if any(each.option_strings and not each.required for each in given) else ""
        parts.append(f"## {name}\n\n```text\npython -m pytest_trtcheck {name} {usage}\n```\n\n{command.description}\n")
        formatter = command._get_formatter()
        rows = [[_code(_usage(each).strip("[]")), formatter._expand_help(each) if each.help else ""] for each in given]
        parts.append(table(["argument", "meaning"], rows))
        if command.epilog:
            parts.append(f"```text\n{command.epilog.strip()}\n```\n")
    return "\n".join(parts)


def _usage(action: argparse.Action) -> str:
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else None
    value = str(action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return {"+": f"{value} ...", "*": f"[{value} ...]", "?": f"[{value}]"}.get(str(action.nargs), value)
    flag = ", ".join(action.option_strings)
    shown = flag if action.nargs == 0 else f"{flag}={value}"
    return shown if action.required else f"[{shown}]"


def report_fields(_: str) -> str:
    """Every key of the JSON report: the schema's words, else those of the record's type."""
    schema = json.loads((ROOT / "docs/report.schema.json").read_text(encoding="utf-8"))
    parts: list[str] = []
    done: set[str] = set()

    def walk(title: str, node: dict[str, Any], cls: type | None) -> None:
        rows, below = [], []
        said = docstrings.attributes(cls) if cls else {}
        types = typing.get_type_hints(cls) if cls else {}
        for key, given in node.get("properties", {}).items():
            inner, is_list = _resolved(given, schema)
            text = given.get("description") or inner.get("description") or said.get(key, "")
            rows.append([_code(key), _type(given, schema), "yes" if key in node.get("required", ()) else "", text])
            if inner.get("properties"):
                reference = given.get("$ref") or json.dumps(inner, sort_keys=True)
                if reference not in done:
                    done.add(reference)
                    below.append(
                        (f"{title}.{key}".lstrip(".") + ("[]" if is_list else ""), inner, _record(types.get(key)))
                    )
        heading = f"## {_code(title)}\n\n" if title else ""
        parts.append(f"{heading}{table(['key', 'type', 'always', 'meaning'], rows)}")
        for each in below:
            walk(*each)

    walk("", schema, record.RunRecord)
    return "\n".join(parts)


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The object that a schema is of, or holds many of."""
    if reference := node.get("$ref"):
        return _resolved(_referred(reference, schema), schema)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        found, is_list = _resolved(choice, schema)
        if found.get("properties"):
            return found, is_list
    if isinstance(node.get("items"), dict):
        return _resolved(node["items"], schema)[0], True
    return node, False


def _referred(reference: str, schema: dict[str, Any]) -> dict[str, Any]:
    return functools.reduce(operator.getitem, reference.removeprefix("#/").split("/"), schema)


def _type(node: dict[str, Any], schema: dict[str, Any]) -> str:
    if "const" in node:
        return _code(json.dumps(node["const"]))
    if "enum" in node:
        return " or ".join(_code(json.dumps(each)) for each in node["enum"])
    if reference := node.get("$ref"):
        found = _referred(reference, schema)
        return reference.rpartition("/")[2] if "properties" in found else _type(found, schema)
    choices = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if choices:
        return " or ".join(dict.fromkeys(_type(each, schema) for each in choices))
    kinds = node.get("type", "any")
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    if isinstance(node.get("items"), dict) and "array" in names:
        names[names.index("array")] = f"array of {_type(node['items'], schema)}"
    return " or ".join(names)


def _record(hint: object) -> type | None:
    """The record type that an annotation holds."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next(filter(None, map(_record, typing.get_args(hint))), None)


def _errors() -> dict[str, object]:
    found = {name: getattr(errors, name) for name in ("CheckFailed", "CheckError")}
    return found | {
        each.__name__: each for each in vars(errors).values() if _is_error(each) and each.__name__ not in found
    }


def _is_error(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, errors.CheckError)


def _named(module: Any, *names: str) -> dict[str, object]:
    return {name: getattr(module, name) for name in names}


PUBLIC: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "What a check is asked": (
        "pytest_trtcheck",
        _named(pytest_trtcheck, "Tolerance", "Calibration", "Case", "Search", "BuildOptions"),
    ),
    "Metrics": ("pytest_trtcheck.metrics", _named(metrics, "top1", "detections", "of_arrays", "Metric", "Score")),
    "Inputs for Hypothesis": ("pytest_trtcheck.strategies", _named(strategies, "inputs", "Inputs")),
    "Errors": ("pytest_trtcheck.errors", _errors()),
    "What runs a model": ("pytest_trtcheck.backends.base", _named(base, "Runner")),
    "A backend of your own": (
        "pytest_trtcheck.backends.base",
        _named(base, "Backend", "Machine", "EngineSpec", "Built", "Acceptance"),
    ),
    "A model source of your own": ("pytest_trtcheck.model.sources", _named(sources, "Source", "Opening", "Examples")),
    "A report of your own": ("pytest_trtcheck.report", {"Report": Report}),
    "An option of your own": ("pytest_trtcheck.choices", {"Option": Option}),
}
"""What users import, and where from. The markers have a page of their own."""


def python_api(_: str) -> str:
    """Signature, docstring and members of everything public."""
    parts = []
    for title, (module, things) in PUBLIC.items():
        parts.append(f"## {title}\n\nIn `{module}`.\n")
        parts += [_documented(name, thing) for name, thing in things.items()]
    return "\n".join(parts)


def _documented(name: str, thing: object) -> str:
    found = docstrings.of(thing)
    parts = [f"### `{name}`\n"]
    if not isinstance(thing, type) or is_dataclass(thing) or thing in {errors.CheckError, Report, Option}:
        parts.append(f"```python\n{docstrings.signature(thing, name)}\n```\n")
    parts.append(f"{found.text}\n")
    said = docstrings.attributes(thing) if isinstance(thing, type) else found.parameters
    if said and not (_is_error(thing) and thing is not errors.CheckError):
        parts.append(table(["name", "meaning"], together([_code(each), text] for each, text in said.items())))
    if isinstance(thing, type) and not _is_error(thing) and (members := list(_members(thing))):
        parts.append(table(["member", "what it does"], members))
    if raises := found.sections.get("Raises"):
        parts.append(table(["raises", "when"], together([_code(each), text] for each, text in raises.items())))
    if found.example:
        parts.append(f"```pycon\n{found.example}\n```\n")
    return "\n".join(parts)


def _members(cls: type) -> Iterator[list[str]]:
    for name, member in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and (text := docstrings.of(function).text):
            shown = name if isinstance(member, property) else docstrings.signature(function, name, width=10_000)
            yield [_code(shown), docstrings.joined(text)]


def rooms(_: str) -> str:
    """The rows of the import contract, and what each room says of itself."""
    contracts = compatibility.project()["tool"]["importlinter"]["contracts"]
    (layers,) = [each["layers"] for each in contracts if each["id"] == "rows"]
    rows = []
    for row, names in zip(range(len(layers) - 1, -1, -1), layers, strict=True):
        for name in re.split(r" [|:] ", names):
            folder = ROOT / "pytest_trtcheck" / name
            file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            shown = _code(f"{name}/" if folder.is_dir() else f"{name}.py")
            rows.append([str(row), shown, docstrings.joined(said.partition("\n\n")[0])])
    return table(["row", "room", "what it is"], rows)


def check_steps(_: str) -> str:
    """The steps of a check, in their order."""
    rows = []
    for step in steps.CHECKING:
        where = step.__module__.removeprefix("pytest_trtcheck.").replace(".", "/")
        rows.append([_code(step.__name__), docstrings.joined(docstrings.of(step).text), _code(f"{where}.py")])
    return table(["step", "what is known behind it", "in"], rows)


PARTS: Mapping[str, Callable[[str], str]] = {
    "options": option_table,
    "trt-parity": marker(pytest_trtcheck.trt_parity),
    "trt-latency": marker(pytest_trtcheck.trt_latency),
    "fixtures-to-override": fixture_table(to_override=True),
    "fixtures-to-use": fixture_table(to_override=False),
    "build-options": fields_table(spec.BuildOptions),
    "metrics": metric_table,
    "commands": command_help,
    "report": report_fields,
    "python": python_api,
    "rooms": rooms,
    "steps": check_steps,
    "pythons": compatibility.pythons,
    "libraries": compatibility.libraries,
    "tensorrts": compatibility.tensorrts,
    "gpu-runs": compatibility.gpu_runs,
    "gpus": compatibility.gpus,
    "cuda": compatibility.cuda,
    "platforms": compatibility.platforms,
    "emulated-operators": explained.operator_table,
    "emulated-precisions": explained.precision_table,
    "emulated-models": explained.model_table,
    "latencies": explained.latency_table,
}
"""What may stand between the comments, by name: from what stands there to what should."""


def names(page: str) -> list[str]:
    """The parts that stand in a page."""
    return [found[1] for found in GENERATED.finditer((ROOT / page).read_text(encoding="utf-8"))]


def current(page: str) -> str:
    """A page with what the code says now."""
    text = (ROOT / page).read_text(encoding="utf-8")

    def part(found: re.Match[str]) -> str:
        name, old = found.groups()
        return f"<!-- generated {name} -->\n\n{PARTS[name](old).strip()}\n\n<!-- end of {name} -->"

    return GENERATED.sub(part, text)


if __name__ == "__main__":
    for each in pages():
        if (new := current(each)) != (ROOT / each).read_text(encoding="utf-8"):
            (ROOT / each).write_text(new, encoding="utf-8")
            print(each)
