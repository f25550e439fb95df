"""The bindings of a TensorRT release, imported without TensorRT: what they offer, as type stubs.

A wheel of bindings holds one extension module. The libraries that it links are replaced by an empty one under their
names, compiled here. Nothing can be built or run with it; its classes, members and signatures can all be read.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("tensorrt", "tensorrt_rtx")

# A class of a stub stands for its instances, so what `import tensorrt as trt` gives needs a class of its own.
MODULE_CLASS = "TensorRT"
_ANY_SEQUENCE = r"""    @property
    def \1(self) -> Dims: ...
    @\1.setter
    def \1(self, value: Dims | collections.abc.Sequence[int]) -> None: ..."""
_SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
)
_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so\.\d+): cannot open shared object file")
_MISSING_SYMBOL = re.compile(r"undefined symbol: (\w+)")


@dataclass(frozen=True)
class Release:
    """A release whose bindings lie unpacked in `folder`, beside the empty libraries that they link.

    Parameters
    ----------
    name
        `tensorrt` or `tensorrt_rtx`.
    version
        As the index has it.
    """

    name: str
    version: str
    folder: Path

    @property
    def numbers(self) -> tuple[int, ...]:
        """(10, 14, 1, 48)."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version.partition(".post")[0]))

    def run(self, code: str, *arguments: str) -> str:
        """The output of Python code that can import the release by its name."""
        done = self._python(code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(Path(__file__).parents[2])]),
        }
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def link(self, compiler: str) -> None:
        """Compile the empty libraries, as many and with as many symbols as the bindings ask for."""
        libraries: set[str] = set()
        symbols = set(_SYMBOLS)
        while (done := self._python(f"import {self.name}")).returncode != 0:
            library = _MISSING_LIBRARY.search(done.stderr)
            symbol = _MISSING_SYMBOL.search(done.stderr)
            if library is None and symbol is None:
                raise AssertionError(f"{self.name} {self.version} cannot be imported:\n{done.stderr}")
            if library is not None:
                assert library[1] not in libraries, done.stderr
                libraries.add(library[1])
            else:
                assert symbol is not None
                assert symbol[1] not in symbols, done.stderr
                symbols.add(symbol[1])
            source = self.folder / "empty.c"
            source.write_text("".join(f"void *{each}(void) {{ return 0; }}\n" for each in sorted(symbols)))
            for each in libraries:
                command = [
                    compiler,
                    "-shared",
                    "-fPIC",
                    f"-Wl,-soname,{each}",
                    "-o",
                    str(self.folder / each),
                    str(source),
                ]
                subprocess.run(command, check=True)

    def write_stubs(self, into: Path) -> None:
        """Write what the bindings' signatures say as the stub package `trt_release`.

        It holds all names of the release, and `TensorRT`, the type of the module itself.
        """
        bindings = f"{self.name}_bindings.{self.name}"
        generate = (
            "import sys, logging; logging.disable(); from pybind11_stubgen import main; "
            f"import {self.name}; main(['--ignore-all-errors', '-o', sys.argv[1], {bindings!r}])"
        )
        self.run(generate, str(into))
        stub = _mended((into / f"{self.name}_bindings" / f"{self.name}.pyi").read_text())
        package = into / "trt_release"
        package.mkdir()
        (package / "_api.pyi").write_text(stub)
        names = re.findall(r"^class (\w+)[(:]", stub, re.MULTILINE)
        functions = re.findall(r"^def \w+\(.*$", stub, re.MULTILINE)
        module = "\n".join(
            [
                "import builtins, collections.abc, typing",
                "from trt_release import _api",
                "from trt_release._api import *",
                f"def import_module(name: str) -> {MODULE_CLASS}: ...",
                f"class {MODULE_CLASS}:",
                "    __version__: str",
                *(f"    {name}: type[_api.{name}]" for name in names),
                *(f"    @staticmethod\n    {_qualified(line, names)} ..." for line in functions),
            ]
        )
        (package / "__init__.pyi").write_text(module + "\n")


def _mended(stub: str) -> str:
    """What a generated stub leaves out or says less truly than it could."""
    stub = re.sub(r"(:|->) \.\.\.(?=[,)\]=:\n])", r"\1 typing.Any", stub)
    stub = re.sub(r"(typing_extensions\.)?\b[Cc]apsule(Type)?\b", "typing.Any", stub)
    stub = re.sub(r"(?<=-> |.: )bool\b", "builtins.bool", stub)  # `bool` alone is a data type of TensorRT.
    # Dims are made from any sequence of integers, and are one; IHostMemory is a buffer. Signatures tell neither.
    stub = re.sub(r"(\w+: Dims)(?=[,)])", r"\1 | collections.abc.Sequence[int]", stub)
    stub = re.sub(r"^    (\w+): Dims$", _ANY_SEQUENCE, stub, flags=re.MULTILINE)
    stub = stub.replace("class Dims:\n", "class Dims:\n    def __iter__(self) -> collections.abc.Iterator[int]: ...\n")
    stub = stub.replace(
        "class IHostMemory:\n", "class IHostMemory:\n    def __buffer__(self, flags: int) -> memoryview: ...\n"
    )
    return "\n".join([*map(_parsable, stub.splitlines()), "import builtins, collections.abc, typing", ""])


def _parsable(line: str) -> str:
    """A signature that Python cannot have (a parameter called `in`, none without a default behind one) with any."""
    signature = re.fullmatch(r"( *)def (\w+)\(.*\) -> .*:", line)
    if signature is None:
        return line
    try:
        ast.parse(f"{line.strip()} ...")
    except SyntaxError:
        return f"{signature[1]}def {signature[2]}(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:"
    return line


def _qualified(line: str, names: list[str]) -> str:
    known = set(names)
    return re.sub(r"(?<![\w.])[A-Z]\w+", lambda match: f"_api.{match[0]}" if match[0] in known else match[0], line)


def obtain(name: str, version: str, cache: Path, compiler: str) -> Release:
    """A release, downloaded (once for a `cache`) and made to import.

    Raises
    ------
    LookupError
        The index has no wheel of it for this Python, or cannot be reached; what pip said.
    """
    major = int(version.partition(".")[0])
    folder = cache / f"{name}-{version}-{sys.implementation.cache_tag}"
    release = Release(name, version, folder)
    if (folder / "complete").exists():
        return release
    folder.mkdir(parents=True, exist_ok=True)
    newer = name == "tensorrt_rtx" or major >= 11
    distributions = [f"{name}-cu{cuda}-bindings" for cuda in (("13", "12") if newer else ("12", "13"))]
    if major < 10 and name == "tensorrt":
        distributions = ["tensorrt-bindings"]
    said = ""
    for distribution in distributions:
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        done = subprocess.run(
            [sys.executable, *command, f"{distribution}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
        said += done.stderr
    else:
        raise LookupError(said.strip().splitlines()[-1] if said.strip() else "pip said nothing")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # As the package `tensorrt` itself does, which beside this holds nothing.
    package = folder / name
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(
        f"from {name}_bindings import *\nfrom {name}_bindings import __version__\n"
        if (folder / f"{name}_bindings").is_dir()
        else (package / "__init__.py").read_text()
    )
    release.link(compiler)
    (folder / "complete").touch()
    return release
