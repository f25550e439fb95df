"""Does TensorRT take the model? By the family's own parser where it is installed, and by the tables of all families.

Judged is the family that ships: the TensorRT that the backend names, with `auto` the one that is installed. Where none
is installed, or the backend is the emulation by name, only what no family takes stands against the model; what another
family refuses is a note.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from pytest_trtcheck.backends.base import Acceptance
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import TensorRTModule, hash_plugin
from pytest_trtcheck.backends.tensorrt.support import advice as known_advice
from pytest_trtcheck.cache import Cache, Key, hash_code
from pytest_trtcheck.errors import plural
from pytest_trtcheck.record import typed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.tensorrt.build import Parsed
    from pytest_trtcheck.backends.tensorrt.module import ModuleName
    from pytest_trtcheck.precision.families import Family, Finding
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.spec import BuildOptions

_FILE = "acceptance.json"
_SHOWN = 5


def acceptance(
    lowered: Lowered,
    label: str,
    asked: Sequence[ModuleName],
    options: BuildOptions,
    cache: Cache,
    *,
    builds: TensorRTModule | None = None,
    asks_parser: bool = True,
) -> Acceptance:
    """Whether TensorRT takes a lowered model, from the cache when nothing that decides it has changed.

    Parameters
    ----------
    lowered
        What TensorRT is given.
    label
        What messages call the model.
    asked
        The TensorRT that may be the one that ships.
    builds
        The TensorRT that is going to build it: it parses then anyway, so here only what it would not notice counts.
    asks_parser
        Whether the TensorRT that is installed judges; otherwise it is not said to be the one that ships.

    Raises
    ------
    ArgumentError
        A plugin library cannot be read.
    """
    installed = {name: version for name in asked if asks_parser and (version := _installed(name))}
    parts = {
        "lowered": lowered.key,
        "asked": ",".join(asked),
        "installed": json.dumps(installed),
        "builds": "" if builds is None else f"{builds.name} {builds.version}",
        "plugins": json.dumps([hash_plugin(plugin) for plugin in options.plugins]),
        "code": hash_code(
            "backends/tensorrt/acceptance.py",
            "backends/tensorrt/build*.py",
            "model/graph.py",
            "precision/families/*.py",
        ),
    }

    def make(folder: Path) -> None:
        found = _judged(
            lowered.path, label, asked=asked, installed=tuple(installed), plugins=options.plugins, builds=builds
        )
        (folder / _FILE).write_text(json.dumps(asdict(found)))

    entry = cache.get_or_make(Key("acceptance", label, parts), make)
    return entry.read_json(_FILE, lambda found: typed(found, Acceptance))


def _installed(name: str) -> str | None:
    """The version of an installed TensorRT module, without importing it; None where it is not there."""
    spec = find_spec(name)
    if spec is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return spec.origin or "unknown"


# --- judging ---------------------------------------------------------------------------------------------------------


def _judged(
    path: Path,
    label: str,
    *,
    asked: Sequence[ModuleName],
    installed: Sequence[ModuleName],
    plugins: Sequence[str],
    builds: TensorRTModule | None,
) -> Acceptance:
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision import families

    model = graph.read(path)
    foreign = {op_type for _, op_type in families.foreign_nodes(model)}
    parsed = tensorrt.parse(installed, path, plugins) if installed and builds is None else None
    unasked: list[str] = []
    if parsed is not None and not parsed.module:
        unasked = [f"the installed {' and '.join(installed)} could not be asked: {'; '.join(parsed.errors)}"]
        parsed = None
    # A library that nobody here can ask is taken at its user's word.
    provided = set(parsed.provided) if parsed is not None else foreign if plugins else set()
    tables = {family: families.findings(model, family, provided) for family in families.FAMILIES}
    judge = builds
    if parsed is not None and parsed.module:
        judge = TensorRTModule(parsed.module, parsed.version, handle=None)
    judging = tuple(family for family in families.FAMILIES if family.module in asked)
    if judge is not None:
        judging = (families.family_of(judge.name, judge.version),)
    mend = families.mending(model)
    shown, in_full = (_Telling(every, mend) for every in (False, True))
    reason, advice = shown.found(judging, tables, judge, parsed)
    refused = bool(reason)
    notes = [
        *unasked,
        *_unasked(plugins, foreign, judge),
        *_unknown(judging if judge is None else (), tables),
    ]
    needs_gpu = set(parsed.needs_gpu) if parsed is not None else set()
    own = frozenset.union(*(family.plugins for family in judging))
    return Acceptance(
        refusal=f"{label}: {reason}" if refused else "",
        advice=advice,
        notes=(*notes, *shown.other_families(judging, tables, refused=refused)),
        plugin_operators=tuple(sorted((foreign & (provided | own)) | needs_gpu)),
        judged_by=_judges(judging, judge, parsed),
        in_full=f"{label}: {in_full.found(judging, tables, judge, parsed)[0]}" if refused else "",
        notes_in_full=(*notes, *in_full.other_families(judging, tables, refused=refused)),
    )


def _judges(judging: Sequence[Family], judge: TensorRTModule | None, parsed: Parsed | None) -> str:
    """Who judged: a parser that was asked, and the rules of the families."""
    rules = f"the rules for {_titles(judging)} ({_sources(judging)})"
    if parsed is not None and judge is not None:
        return f"the parser of {judge.title} and {rules}"
    return rules if judge is not None else f"{rules}; no TensorRT's parser was asked"


_Found = tuple[str, str]
"""What stands against the model and what to do about it; two empty texts where nothing does."""


_Tables: TypeAlias = "Mapping[Family, tuple[list[Finding], list[str]]]"


@dataclass(frozen=True)
class _Telling:
    """How what was found is told.

    Parameters
    ----------
    every
        Whether all nodes are named, by rule; otherwise the first ones.
    mend
        What to quantize with instead, where that is known.
    """

    every: bool
    mend: str

    def found(
        self, judging: Sequence[Family], tables: _Tables, judge: TensorRTModule | None, parsed: Parsed | None
    ) -> _Found:
        """What stands against the model in the families that are judged."""
        if judge is None:
            return self._by_tables(judging, tables)
        table = tables[judging[0]][0]
        text, advice = self._by_module(judge, judging[0], table, parsed)
        takers = [family for family in tables if family.module != judge.name and not any(tables[family])]
        if text and table and takers:
            where = f"{_titles(takers)} would take it, by the tables: where one of them ships"
            advice += f"\n  → {where}, --trt-backend=onnxruntime emulates without asking {judge.title.split()[0]}"
        return text, advice

    def _by_module(
        self, module: TensorRTModule, family: Family, table: Sequence[Finding], parsed: Parsed | None
    ) -> _Found:
        """With a TensorRT installed: its parser has the last word on what a parser sees.

        Where that is going to build, and parses then, only what neither its parser nor its builder would notice.
        """
        who = f"{module.title} does not take the model"
        known = {"nobody", "builder"} if parsed is not None and family.knows(module.release) else {"nobody"}
        if parsed is None or not parsed.errors:
            return self._refused(who, [each for each in table if each.seen_by in known])
        text, advice = self._refused(who, table)
        quoted = "\n".join([f"{module.title} said:", *self._listed(parsed.errors)])
        return (
            f"{text}\n  {quoted}" if text else f"{who}. {quoted}",
            advice or "\n  → ".join(known_advice("\n".join(parsed.errors), is_rtx=module.is_rtx)),
        )

    def _by_tables(self, judging: Sequence[Family], tables: _Tables) -> _Found:
        """With no TensorRT installed: what none of the families takes."""
        if not all(tables[family][0] for family in judging):
            return "", ""
        shared = set.intersection(*({each.node for each in tables[family][0]} for family in judging))
        first = tables[judging[0]][0]
        *others, last = (family.title for family in judging)
        who = f"none of {', '.join(others)} and {last} takes the model" if others else f"{last} does not take the model"
        said = [each for each in first if each.node in shared] or first
        return self._refused(f"{who} (by {_sources(judging)})", said)

    def _refused(self, who: str, found: Sequence[Finding]) -> _Found:
        from pytest_trtcheck.precision.families import is_of_quantization

        if not found:
            return "", ""
        text = "\n".join([f"{who}:", *self._findings(found)])
        mended = [each for each in found if self.mend and is_of_quantization(each)]
        advice = [self.mend] * bool(mended) + [each.advice for each in found if each not in mended]
        return text, "\n  → ".join(dict.fromkeys(advice))

    def _findings(self, found: Sequence[Finding]) -> list[str]:
        if not self.every:
            return self._listed([str(each) for each in found])
        return [line for rule, nodes in _by_rule(found).items() for line in _of_rule(rule, nodes)]

    def _listed(self, lines: Sequence[str]) -> list[str]:
        distinct = list(dict.fromkeys(lines))
        most = len(distinct) if self.every else _SHOWN
        shown = [f"    {line}".replace("\n", "\n      ") for line in distinct[:most]]
        left = len(distinct) - most
        return [*shown, f"    and {left} more"] if left > 0 else shown

    def other_families(self, judging: Sequence[Family], tables: _Tables, *, refused: bool) -> list[str]:
        """What families would refuse that are not the one that ships, each text once."""
        texts: dict[str, list[Family]] = {}
        for family, (found, _) in tables.items():
            is_said = family in judging and (refused or len(judging) == 1)
            if found and not is_said:
                texts.setdefault(self._briefly(found).replace(family.title, "it"), []).append(family)
        return [
            f"{_titles(families)} would not take this model (by {_sources(families)}): {text}"
            for text, families in texts.items()
        ]

    def _briefly(self, found: Sequence[Finding]) -> str:
        if self.every:
            return "\n".join(["", *self._findings(found)])
        return f"{found[0]} (and {len(found) - 1} more)" if len(found) > 1 else str(found[0])


def _by_rule(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for each in found:
        groups.setdefault(each.rule, []).append(each)
    return groups


def _of_rule(rule: str, found: Sequence[Finding]) -> Iterator[str]:
    """A rule with the number of nodes that break it, and each of its problems with the names of all nodes."""
    count = len({each.node for each in found})
    yield f"    {rule}, {plural(count, 'node')}:"
    problems: dict[str, dict[str, None]] = {}
    for each in found:
        name = f"{each.node!r} ({each.op_type})" if each.op_type else repr(each.node)
        problems.setdefault(each.problem, {})[name] = None
    for problem, nodes in problems.items():
        yield f"      {problem}: {', '.join(nodes)}"


def _titles(families: Sequence[Family]) -> str:
    return " and ".join(family.title for family in families)


def _sources(families: Sequence[Family]) -> str:
    return "; ".join(dict.fromkeys(family.table for family in families))


# --- notes -----------------------------------------------------------------------------------------------------------


def _unasked(plugins: Sequence[str], foreign: set[str], judge: TensorRTModule | None) -> list[str]:
    if not plugins or not foreign or judge is not None:
        return []
    return [
        f"whether the plugin libraries provide {', '.join(sorted(foreign))} was not found out: no TensorRT was asked"
    ]


def _unknown(judging: Sequence[Family], tables: Mapping[Family, tuple[list[Finding], list[str]]]) -> list[str]:
    return [
        f"whether {family.title} takes {', '.join(tables[family][1])} was not found out: "
        f"{family.table} does not know it, and it is not installed"
        for family in judging
        if tables[family][1]
    ]
