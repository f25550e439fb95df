"""Identity of what a Python object computes: its values, its weights, and the code that it runs.

Code counts by what it does (bytecode, constants, names), not by where it stands, so that a comment changes nothing.
What is installed counts by the content of its distribution; functions that were put in its place are looked into.
What can't be told apart for sure is listed in `unknown`: such an object must not be taken from a cache.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import logging
import re
import sys
import sysconfig
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import hash_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range)
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
OF_CLASSES = frozenset(
    {
        "__doc__",
        "__module__",
        "__dict__",
        "__weakref__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__parameters__",
        "__orig_bases__",
        "__type_params__",
        "_abc_impl",
    }
)
"""What a class's namespace holds beside what it computes."""
_LARGE = 1 << 18
"""Bytes from which another thread is worth it."""
_BY_VERSION = frozenset({"torch", "numpy", "onnx", "onnxscript"})
"""Packages whose version says all: releases that nobody edits."""


class Fingerprint:
    """Takes in objects, one after the other.

    Parameters
    ----------
    fields
        What of an object's attributes counts, by its type; for objects with state that decides nothing.
    """

    def __init__(self, fields: Mapping[type, Callable[[Any], Mapping[str, object]]] | None = None) -> None:
        self.unknown: list[str] = []
        self._fields = dict(fields or {})
        self._digest = hashlib.sha256(sys.version.encode())
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []
        self._blobs: list[tuple[int, Callable[[], memoryview]]] = []
        self._packages: set[str] = set()

    def add(self, value: object) -> Fingerprint:
        """Take in an object, and all that it refers to."""
        try:
            self._visit(value)
        except RecursionError:
            self.unknown.append(f"a {type(value).__qualname__} that is nested too deeply")
        return self

    def digest(self) -> str:
        """Of all that was taken in, in hex."""
        total = self._digest.copy()
        # Weights are nearly all of the work, and hashing large ones leaves Python's lock.
        with ThreadPoolExecutor(2, "trtcheck-hash") as pool:
            digests = [pool.submit(_hashed, blob) if size >= _LARGE else _hashed(blob) for size, blob in self._blobs]
            for each in digests:
                total.update(each if isinstance(each, bytes) else each.result())
        for package in sorted(self._packages):
            total.update(f"{package}\0{_content_of(package)}".encode())
        return total.hexdigest()

    # --- the walk ----------------------------------------------------------------------------------------------------

    def _token(self, *words: object) -> None:
        self._digest.update("\0".join(map(str, words)).encode(errors="surrogatepass") + b"\1")

    def _visit(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._token("enum", type(value).__qualname__, value.name)
            return
        if isinstance(value, _PLAIN):
            self._token(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._token("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        self._look(value)

    def _look(self, value: Any) -> None:  # noqa: PLR0912 - one case a kind of object
        kind = type(value)
        if isinstance(value, dict):
            self._token("dict", kind.__qualname__, len(value))
            for key, item in value.items():
                self._visit(key)
                self._visit(item)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._several("method", value.__func__, value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self._several(kind.__name__, value.__func__)
        elif isinstance(value, weakref.ref):
            self._several("weak", value())
        elif isinstance(value, property):
            self._several("property", value.fget, value.fset)
        elif isinstance(value, functools.partial):
            self._several("partial", value.func, value.args, value.keywords)
        elif isinstance(value, types.ModuleType):
            self._token("module", value.__name__)
        elif isinstance(value, _BUILT_IN):
            self._token("built-in", getattr(value, "__qualname__", value))
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (list, tuple)) and kind in {list, tuple}:
            self._several(kind.__name__, *value)
        elif isinstance(value, (set, frozenset)):
            # The order of a set is that of this process alone.
            members = [Fingerprint(self._fields).add(each) for each in value]
            self.unknown += [each for member in members for each in member.unknown]
            self._token(kind.__name__, *sorted(member.digest() for member in members))
        elif isinstance(value, logging.Logger):
            self._token("logger")
        elif not self._tensor(value):
            self._object(value)

    def _several(self, name: str, *values: object) -> None:
        self._token(name, len(values))
        for value in values:
            self._visit(value)

    def _code(self, code: types.CodeType) -> None:
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        self._token("code", *counts, code.co_code.hex(), *code.co_names, *code.co_freevars, *code.co_cellvars)
        self._several("constants", *code.co_consts)

    def _function(self, function: types.FunctionType) -> None:
        if is_installed_function(function):
            self._installed(function)
            return
        self._token("function", function.__qualname__)
        self._several("parts", function.__code__, function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self._visit(cell.cell_contents)
            except ValueError:
                self._token("empty cell")
        self._several("decorated", getattr(function, "__wrapped__", None))
        self._named(function.__globals__, set(_globals(function.__code__)), set(names_in(function.__code__)))

    def _named(self, namespace: Mapping[str, object], names: set[str], attributes: set[str]) -> None:
        """What code reaches by global names, and by the attributes of modules among them."""
        for name in sorted(names):
            if name in namespace:
                value = namespace[name]
            elif name in sys.modules and not is_stdlib(name.partition(".")[0]):
                value = sys.modules[name]  # imported inside of the function
            else:
                continue
            if not isinstance(value, types.ModuleType):
                self._token("global", name)
                self._visit(value)
            elif id(value) not in self._seen:
                self._visit(value)
                self._of_module(value, attributes)

    def _of_module(self, module: types.ModuleType, names: set[str]) -> None:
        found = vars(module)
        if not is_installed(module.__name__):
            self._named({name: found[name] for name in names if name in found}, names, names)
            return
        self._packages.add(module.__name__.partition(".")[0])
        for name in sorted(names & set(found)):
            each = found[name]
            if isinstance(each, types.ModuleType):
                if id(each) not in self._seen:
                    self._visit(each)
                    self._of_module(each, names)
            elif isinstance(each, types.FunctionType) and not is_installed_function(each):
                self._token("put in place", name)
                self._visit(each)

    def _class(self, cls: type) -> None:
        if is_installed(cls.__module__):
            self._installed(cls)
            for name, each in vars(cls).items():
                if isinstance(each, types.FunctionType) and not is_installed_function(each):
                    self._token("put in place", name)
                    self._visit(each)
            # Made at run time by an installed package of a class that is not (parametrizations, for one).
            self._several("bases", *(each for each in cls.__mro__ if not is_installed(each.__module__)))
            return
        self._token("class", cls.__qualname__)
        self._several("bases", *cls.__bases__)
        for name, each in vars(cls).items():
            if name not in OF_CLASSES:
                self._token("attribute", name)
                self._visit(each)

    def _installed(self, value: Any) -> None:
        self._token("installed", value.__module__, value.__qualname__)
        self._packages.add(str(value.__module__).partition(".")[0])

    def _tensor(self, value: Any) -> bool:
        """Take in an array or tensor; False if it is none."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            self._token("tensor", type(value).__name__, value.dtype, tuple(value.shape), value.device.type)
            if value.device.type == "meta":
                return True
            if value.layout != torch.strided or value.is_quantized:
                self.unknown.append(f"a tensor of layout {value.layout}")
                return True
            self._blobs.append((value.nbytes, lambda: _bytes_of(torch, value)))
            return True
        if torch is not None and isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            self._token(type(value).__name__, value)
            return True
        if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
            self._token("array", value.dtype.str, value.shape)
            if value.dtype.hasobject:
                self._several("items", *value.ravel().tolist())
            else:
                self._blobs.append((value.nbytes, lambda: memoryview(value.tobytes())))
            return True
        return False

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._token("object")
        self._visit(kind)
        fields = next((fields for each, fields in self._fields.items() if isinstance(value, each)), None)
        if fields is not None:
            self._visit(dict(fields(value)))
            return
        slots = [name for each in kind.__mro__ for name in slots_of(each) if hasattr(value, name)]
        if hasattr(value, "__dict__") or slots:
            self._visit({**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}})
            if isinstance(value, (list, tuple)):
                self._several("items", *value)
            return
        if isinstance(value, (list, tuple)):
            self._several("items", *value)
            return
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever it raises: it can't be taken apart
            self.unknown.append(f"a {kind.__qualname__}")
            return
        self._several("reduced", *(reduced[:3] if isinstance(reduced, tuple) else (reduced,)))


def _hashed(blob: Callable[[], memoryview]) -> bytes:
    return hashlib.sha256(blob()).digest()


def slots_of(cls: type) -> tuple[str, ...]:
    """The attributes that a class's own `__slots__` names."""
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in {"__dict__", "__weakref__"})


def names_in(code: types.CodeType) -> Iterator[str]:
    """Every name of a global or an attribute that code reads, that of its inner functions as well."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from names_in(each)


def _globals(code: types.CodeType) -> Iterator[str]:
    """The global names that code reads, and the modules that it imports."""
    for each in dis.get_instructions(code):
        if each.opname in {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "IMPORT_NAME"}:
            yield str(each.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _globals(inner)


def _bytes_of(torch: Any, tensor: Any) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


# --- what is installed -----------------------------------------------------------------------------------------------


@functools.cache
def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to a distribution whose files are listed."""
    top = str(module).partition(".")[0]
    if is_stdlib(top):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and _is_of_distribution(file) and (top in _BY_VERSION or _record(top) is not None)


@functools.cache
def is_stdlib(top: str) -> bool:
    """Whether a module is Python's own; by where it lies, as a user's may bear the same name."""
    if top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return top in sys.stdlib_module_names and (file is None or _is_of_python(file))


def _is_of_distribution(file: str) -> bool:
    return bool({"site-packages", "dist-packages"} & set(Path(file).parts))


def _is_of_python(file: str) -> bool:
    folders = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return not _is_of_distribution(file) and file.startswith(tuple(folders))


def is_installed_function(function: types.FunctionType) -> bool:
    """Whether a function is one of Python's own or of a distribution, wherever it was put."""
    file = function.__code__.co_filename
    if file.startswith("<frozen "):
        return True
    return (_is_of_distribution(file) or _is_of_python(file)) and is_installed(function.__module__)


@functools.cache
def _record(package: str) -> Path | None:
    """The list of a distribution's files with their hashes."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return None
    folder = Path(file).parents[Path(file).name == "__init__.py"]
    name = re.sub(r"[-_.]+", "_", package).lower()
    for found in folder.glob("*.dist-info"):
        if re.sub(r"[-_.]+", "_", found.name.partition("-")[0]).lower() == name and (found / "RECORD").is_file():
            return found / "RECORD"
    for each in metadata.packages_distributions().get(package, ()):
        name = f"{each.replace('-', '_')}-{metadata.version(each)}.dist-info"
        listing = Path(str(metadata.distribution(each).locate_file(name)))
        if (listing / "RECORD").is_file():
            return listing / "RECORD"
    return None


@functools.cache
def _content_of(package: str) -> str:
    if is_stdlib(package):
        return ""
    if package in _BY_VERSION:
        return str(getattr(sys.modules.get(package), "__version__", ""))
    record = _record(package)
    return hash_bytes(record.read_bytes()) if record is not None else ""
