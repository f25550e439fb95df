"""The mutants of a file: cosmic-ray's operators, and a few for what this package must not lose: its guards."""

from __future__ import annotations

import ast
import functools
import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Span = tuple[tuple[int, int], tuple[int, int]]
_LEAVING = ("raise_stmt", "return_stmt", "keyword")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Parameters
    ----------
    file
        Relative to the repository, with slashes.
    lines
        The lines, counted from 1, one of which a test must run to be worth running.
    text
        Whether the change lies in a message.
    """

    file: str
    operator: str
    line: int
    lines: tuple[int, int]
    function: str
    before: str
    after: str
    source: str
    text: bool

    @property
    def key(self) -> str:
        """Its name, which survives that lines move."""
        parts = (self.file, self.function, self.operator, self.before, self.after)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# --- operators of our own --------------------------------------------------------------------------------------------


_PAIRS = ("max", "min"), ("any", "all"), ("maximum", "minimum")
_OTHER = dict([*_PAIRS, *(pair[::-1] for pair in _PAIRS)])


class _Guarded(Operator):  # type: ignore[misc]
    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class RemoveGuard(_Guarded):
    """`if …: raise` (or return, continue, break) never leaves."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "if_stmt" and _leaves(node.children[3]):
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del index
        node.children[1] = parso.parse(" False")
        return node


class RemoveCall(_Guarded):
    """A call that is made for its effect is not made."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "expr_stmt" or node.type not in {"atom_expr", "power"}:
            return
        statement = node.parent is not None and node.parent.type == "simple_stmt"
        if statement and node.children[-1].type == "trailer" and node.children[-1].children[0].value == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del index
        return parso.parse(f"{node.get_first_leaf().prefix}pass")


class ReturnNone(_Guarded):
    """`return x` gives None."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del index
        node.children[1] = parso.parse(" None")
        return node


class DropEntry(_Guarded):
    """A mapping, such as a key's parts, lacks one of its entries."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        for start, stop in _entries(node):
            yield node.children[start].start_pos, node.children[stop - 1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        start, stop = _entries(node)[index]
        after = stop + 1 if stop < len(node.children) else stop
        kept = node.children[:start] + node.children[after:]
        return parso.parse("".join(child.get_code() for child in kept))


class SwapCall(_Guarded):
    """max for min, any for all, and the other way round."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if node.type == "name" and node.value in _OTHER and node.get_next_leaf().value in {"(", "."}:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del index
        node.value = _OTHER[node.value]
        return node


def _leaves(suite: Any) -> bool:
    """Whether a block ends by leaving: what follows it is not reached."""
    last = suite
    while last.type in {"suite", "simple_stmt"}:
        inner = [child for child in last.children if child.type != "newline"]
        if not inner:
            return False
        last = inner[-1]
    return last.type in _LEAVING


def _entries(node: Any) -> list[tuple[int, int]]:
    """The ranges of children that are one entry each of a mapping with several."""
    if node.type != "dictorsetmaker" or any(child.type in {"comp_for", "sync_comp_for"} for child in node.children):
        return []
    found, start = [], 0
    for index, child in enumerate([*node.children, None]):
        if child is None or (child.type == "operator" and child.value == ","):
            if index > start:
                found.append((start, index))
            start = index + 1
    one_each = all(any(child.get_code().strip() in {":", "**"} for child in node.children[a:b]) for a, b in found)
    return found if one_each else []


@functools.cache
def _operators() -> dict[str, Any]:
    theirs = {name.rpartition("/")[2]: plugins.get_operator(name) for name in plugins.operator_names()}
    # Those with arguments replace variables that one has to name.
    return {name: each() for name, each in theirs.items() if not each.arguments()} | {
        each.__name__: each() for each in (RemoveGuard, RemoveCall, ReturnNone, DropEntry, SwapCall)
    }


# --- the mutants of a file -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """Where an operator can change a file; not every change compiles, or changes anything."""

    file: Path
    operator: str
    occurrence: int
    span: Span


@dataclass(frozen=True)
class _Read:
    """A file, and what of it is left out, is text, and runs alone."""

    source: str
    tree: str
    left_out: tuple[Span, ...]
    texts: tuple[Span, ...]
    statements: tuple[tuple[int, int, str], ...]


@functools.cache
def _read(file: Path) -> _Read:
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    statements = sorted(_statements(tree), key=lambda each: each[1] - each[0])
    return _Read(source, ast.dump(tree), tuple(_left_out(tree)), tuple(_texts(tree)), tuple(statements))


def spots(file: Path) -> list[Spot]:
    """Every place of a file that an operator can change; annotations and the like aside."""
    read = _read(file)
    parsed = get_ast(read.source)
    found = []
    for name, operator in _operators().items():
        places = [place for node in ast_nodes(parsed) for place in operator.mutation_positions(node)]
        found += [
            Spot(file, name, occurrence, place)
            for occurrence, place in enumerate(places)
            if not _within(place, read.left_out)
        ]
    return found


def mutant(root: Path, spot: Spot) -> Mutant | None:
    """The file changed there; None where that is no Python, or the same Python."""
    read = _read(spot.file)
    mutated = mutate_code(read.source, _operators()[spot.operator], spot.occurrence)
    try:
        if mutated is None or ast.dump(ast.parse(mutated)) == read.tree:
            return None
    except SyntaxError:
        return None
    line = spot.span[0][0]
    before, after = _difference(read.source, mutated)
    lines, function = next(((a, b), name) for a, b, name in read.statements if a <= line <= b)
    return Mutant(
        file=spot.file.relative_to(root).as_posix(),
        operator=spot.operator,
        line=line,
        lines=lines,
        function=function,
        before=before,
        after=after,
        source=mutated,
        text=_within(spot.span, read.texts),
    )


def sample(root: Path, found: Iterable[Spot], count: int, seed: int) -> list[Mutant]:
    """At most `count` mutants: every place once before any place twice, since some operators have ten ways."""
    places: dict[tuple[Path, Span], list[Spot]] = defaultdict(list)
    for spot in found:
        places[spot.file, spot.span].append(spot)
    rng = random.Random(seed)
    queues = [rng.sample(each, len(each)) for _, each in sorted(places.items())]
    rng.shuffle(queues)
    chosen: dict[str, Mutant] = {}
    while len(chosen) < count and any(queues):
        for queue in queues:
            made = mutant(root, queue.pop()) if queue and len(chosen) < count else None
            if made is not None:
                chosen[made.key] = made
    return list(chosen.values())


def _difference(source: str, mutated: str) -> tuple[str, str]:
    old, new = source.splitlines(), mutated.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    end = next(
        (i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), min(len(old), len(new))
    )
    cut = min(len(old) - start, len(new) - start, end)
    before, after = old[start : len(old) - cut], new[start : len(new) - cut]
    return "\n".join(map(str.strip, before)), "\n".join(map(str.strip, after))


def _within(spot: Span, spans: Iterable[Span]) -> bool:
    return any(start <= spot[0] and spot[1] <= stop for start, stop in spans)


def _span(node: ast.expr | ast.stmt) -> Span:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _left_out(tree: ast.Module) -> list[Span]:
    """Annotations, what only type checkers read, imports, and what is exported."""
    found: list[Span] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            found.append(_span(node.annotation))
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            found.append(_span(node.returns))
        elif isinstance(node, ast.AnnAssign):
            found.append(_span(node.annotation))
            if ast.unparse(node.annotation) == "TypeAlias":
                found.append(_span(node))
        elif (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING") or isinstance(
            node, (ast.Import, ast.ImportFrom)
        ):
            found.append(_span(node))
    return found


def _texts(tree: ast.Module) -> list[Span]:
    """What only a message is made of: f-strings, and the arguments of what is raised."""
    found: list[Span] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append(_span(node))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += [_span(each) for each in node.exc.args]
    return found


def _statements(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """For each statement the lines that run it alone, without its block, and the function that it stands in.

    A function's own lines, and what stands in no function, run when the file is imported: their function is "".
    """
    yield 1, 10**9, ""

    def visit(node: ast.AST, name: str, running: str) -> Iterator[tuple[int, int, str]]:
        for child in ast.iter_child_nodes(node):
            inner, where = name, running
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
                where = inner if isinstance(child, ast.FunctionDef) else running
            if isinstance(child, (ast.stmt, ast.ExceptHandler)):
                assert child.end_lineno is not None
                body = getattr(child, "body", None)
                end = max(child.lineno, body[0].lineno - 1) if isinstance(body, list) and body else child.end_lineno
                yield child.lineno, end, running
            yield from visit(child, inner, where)

    yield from visit(tree, "", "")
