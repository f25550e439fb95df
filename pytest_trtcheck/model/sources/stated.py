"""What a user's function or object is, in words that are the same on every machine.

`model.sources.fingerprint` tells objects apart on one machine, for its cache: by bytecode, and the content of what is
installed. Evidence and shared engines come from other machines, whose Python may be another one: here code counts by
its source.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import operator
import os
import sys
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.cache import hash_bytes, hash_file
from pytest_trtcheck.metrics import METRICS, Metric
from pytest_trtcheck.model.arrays import as_array
from pytest_trtcheck.model.sources.fingerprint import (
    OF_CLASSES,
    is_installed,
    is_installed_function,
    is_stdlib,
    names_in,
    slots_of,
)
from pytest_trtcheck.spec import Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_LONG = 1000
"""Characters of which a digest is shown instead."""
_MOST = 100_000
"""Objects that one statement takes in: it is made in every check, evidence or not."""
_DEEPEST = 100


class Statement:
    """Takes values apart: code by its source, with defaults, closures, `self` and the globals that it reads; objects by
    class and attributes, arrays and files by their content, what is installed by its name and its own source.

    What can't be taken apart, whatever the reason, is listed in `untold`: another one may look the same.
    """

    def __init__(self) -> None:
        self.untold: list[str] = []
        self._known: dict[int, str] = {}
        self._alive: list[object] = []
        self._room = _MOST
        self._depth = 0

    def of(self, value: object) -> str:
        """What a value is; no longer than `_LONG`."""
        self._room -= len(value) if isinstance(value, (tuple, list, dict, set, frozenset)) else 1
        key = id(value)
        if key not in self._known:
            self._alive.append(value)
            self._known[key] = f"again {self._depth}"  # where it holds itself
            self._depth += 1
            try:
                text = self._look(value) if self._room >= 0 and self._depth <= _DEEPEST else None
            except Exception:  # whatever an object of the user's raises
                text = None
            if text is None:
                text = f"a {type(value).__qualname__}"
                self.untold.append(text)
            self._depth -= 1
            self._known[key] = text if len(text) <= _LONG else f"{text[:80]}… ({_digest(text)})"
        return self._known[key]

    def _several(self, *values: object) -> str:
        return f"({', '.join(map(self.of, values))})"

    def _look(self, value: Any) -> str:  # noqa: PLR0911 - one case a kind of object
        kind = type(value)
        if isinstance(value, os.PathLike) or (kind is str and os.path.isabs(value) and os.path.isfile(value)):  # noqa: PTH113, PTH117
            return _path(Path(value))
        if kind in _PLAIN:
            return repr(value)
        if kind in {tuple, list}:
            return self._several(*value)
        if kind in {dict, types.MappingProxyType}:
            return self._several(*(item for pair in value.items() for item in pair))
        if kind in {set, frozenset}:
            return f"{{{', '.join(sorted(map(self.of, value)))}}}"
        if kind in {np.ndarray, np.memmap} or isinstance(value, np.generic) or _is_tensor(value):
            return self._array(as_array(value))
        if isinstance(value, Metric) and METRICS.get(value.name) == value:
            return value.name
        if isinstance(value, Tolerance):
            return self.of(value.arguments())
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        return self._object(value)

    def _array(self, array: np.ndarray[Any, Any]) -> str:
        content = self.of(array.tolist()) if array.dtype.hasobject else hash_bytes(array.tobytes())[:16]
        return f"array {array.dtype} {array.shape} {content}"

    def _object(self, value: Any) -> str:  # noqa: PLR0911 - likewise
        kind: Any = type(value)
        if kind in _LOCKS:
            return "lock"
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.CodeType):
            return self._several(value.co_code, value.co_names, value.co_consts)
        if isinstance(value, functools.partial):
            return self._several(value.func, value.args, value.keywords, vars(value))
        if isinstance(value, types.MethodType):
            return self._several(value.__func__, value.__self__)
        if isinstance(value, property):
            return self._several(value.fget, value.fset)
        if isinstance(value, (staticmethod, classmethod)):
            return self.of(value.__func__)
        reduce = copyreg.dispatch_table.get(kind)
        reduced = reduce(value) if reduce else value.__reduce_ex__(2)
        if isinstance(reduced, str):
            return self._global(value, reduced)
        state: dict[str, object] = {}
        if kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__:
            # All of it: what it has itself pickled may leave some out.
            slots = {name for each in kind.__mro__ for name in slots_of(each) if hasattr(value, name)}
            state = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in sorted(slots)}}
        return f"{self.of(kind)} {self._several(state, *reduced[:3], *map(list, filter(None, reduced[3:5])))}"

    def _global(self, value: Any, name: str) -> str:
        """What is pickled by its name alone: compiled, or a decorator's."""
        if hasattr(value, "__wrapped__"):
            return f"{name} {self._several(type(value), value.__wrapped__)}"
        module = getattr(value, "__module__", None) or type(value).__module__
        if operator.attrgetter(name)(sys.modules[module]) is not value:
            raise ValueError("another one has that name")
        return f"{module}.{name}"

    def _class(self, cls: type) -> str:
        if _is_others(cls.__module__):
            return f"{cls.__module__}.{_named(cls, cls)}"
        # Functions that were generated (dataclasses) follow from the source, and their code hangs on Python's version.
        held = {
            name: each
            for name, each in vars(cls).items()
            if name not in OF_CLASSES
            and (not name.startswith("__") or isinstance(each, types.FunctionType))
            and not (isinstance(each, types.FunctionType) and each.__code__.co_filename.startswith("<"))
        }
        return f"{_named(cls, cls)} {self._several(cls.__bases__, held)}"

    def _function(self, function: types.FunctionType) -> str:
        is_own = not (_is_others(function.__module__) or is_installed_function(function))
        code = function.__code__
        text, source = _named(function, code), _source(code)
        if not is_own and "<locals>" not in function.__qualname__:
            return f"{function.__module__}.{text}"
        held: dict[str, object] = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
        held |= {"closure": [each.cell_contents for each in function.__closure__ or ()], **vars(function)}
        if is_own:
            held["globals"] = dict(_reached(function.__globals__, set(names_in(code)), set()))
        if not source or source.count("lambda") > 1:  # of which this is one
            held["code"] = code
        held = {name: each for name, each in held.items() if not isinstance(each, (tuple, list, dict)) or each}
        return f"{text} {self.of(held)}"


def _is_others(module: str | None) -> bool:
    """Whether a module is of this package, or installed."""
    return is_installed(module) or str(module).partition(".")[0] == "pytest_trtcheck"


def _reached(namespace: Mapping[str, object], names: set[str], seen: set[str]) -> Iterator[tuple[str, object]]:
    """The globals that code reads, and those of the user's modules among them."""
    for name in sorted(names & namespace.keys()):
        value = namespace[name]
        if name.startswith("__"):
            continue
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif value.__name__ not in seen:
            seen.add(value.__name__)
            yield name, value
            if not _is_others(value.__name__):
                yield from ((f"{name}.{each}", held) for each, held in _reached(vars(value), names, seen))


def _is_tensor(value: object) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _source(code: types.CodeType | type) -> str:
    """Its text; empty where there is none that can be read."""
    try:
        return inspect.getsource(code)
    except Exception:  # typed in, generated or compiled; or the file is another one by now (SyntaxError, TokenError)
        return ""


def _named(value: types.FunctionType | type, code: types.CodeType | type) -> str:
    """A name and its source; of Python's own the name, which means the same in every version."""
    if is_stdlib(str(value.__module__).partition(".")[0]):
        return value.__qualname__
    source = _source(code)
    return f"{value.__qualname__} (source {_digest(source)})" if source else f"{value.__qualname__} (source unknown)"


def _digest(text: str) -> str:
    return hash_bytes(text.encode(errors="surrogatepass"))[:16]


def _path(path: Path) -> str:
    """A file by its content. Of what is absolute, only the name is the same on every machine."""
    name = path.name if path.is_absolute() else path.as_posix()
    return f"{name} {hash_file(path)[:16]}" if path.is_file() else name
