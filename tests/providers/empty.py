"""Empty libraries in the place of CUDA, TensorRT and the driver, so that what links them loads.

Each function of them does nothing and says that all is well; memory is the host's, full of NaN, and copies are made. So
the CUDA provider of ONNX Runtime makes sessions and divides models as on a GPU, and computes nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_OF_NVIDIA = re.compile(r"Shared library: \[(lib(?:cu|nv)\S+)\]")
_NAMES = re.compile(r"cu|nv|createI|createNv|getPlugin|getBuilderP|getInfer|initLib|_ZTI.*nv")
_OBJECT = """
static void *nothing(void) { return 0; }
static void *methods[256], *object[512];
__attribute__((constructor)) static void fill(void) {
  for (int i = 0; i < 256; i++) methods[i] = (void *)nothing;
  object[0] = methods;
  for (int i = 1; i < 512; i++) object[i] = object;
}
void *malloc(unsigned long);
void *memcpy(void *, const void *, unsigned long), *memset(void *, int, unsigned long);
"""
_ALLOCATE = "int {}(void **to, unsigned long n) {{ *to = memset(malloc(n), 255, n); return 0; }}"
_COPY = "int {}(void *to, const void *from, unsigned long n) {{ memcpy(to, from, n); return 0; }}"
_BODIES = (
    (r"_ZTI.*", "char {}[64];"),
    (r"cudaGetDeviceCount", "int {}(int *count) {{ *count = 1; return 0; }}"),
    (r"cudaMalloc|cudaMallocHost|cudaHostAlloc", _ALLOCATE),
    (r"cudaMemcpy(Async)?", _COPY),
    (r"cudaGetError(String|Name)", 'const char *{}(void) {{ return "nothing"; }}'),
    (r"create.*|getPlugin.*|getBuilder.*", "void *{}(void) {{ return object; }}"),
    (r".*", "void *{}(void) {{ return 0; }}"),
)


def unpacked(requirement: str, cache: Path) -> Path:
    """The folder of a wheel, downloaded once.

    Raises
    ------
    LookupError
        The index has none for this Python, or cannot be reached; what pip said.
    """
    folder = cache / f"{requirement}-{sys.implementation.cache_tag}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([sys.executable, *command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip said nothing")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    (folder / "complete").touch()
    return folder


def link(libraries: list[Path], into: Path, *, leave_out: str = "") -> None:
    """Compile an empty library for each of NVIDIA's that these link, but those whose names begin so."""
    symbols: dict[str, set[str]] = {}
    needed: set[str] = set()
    for library in libraries:
        for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            symbols.setdefault(version.lstrip("@"), set()).add(name)
        needed |= set(_OF_NVIDIA.findall(_output("readelf", "-d", str(library))))
    unversioned = {name for name in symbols.get("", ()) if _NAMES.match(name)}
    into.mkdir(exist_ok=True)
    for library_name in needed:
        if leave_out and library_name.startswith(leave_out):
            continue
        source, versions = into / "empty.c", into / "versions.map"
        names = sorted(symbols.get(library_name) or unversioned)
        source.write_text(_OBJECT + "".join(_body(name) for name in names))
        options = [f"-Wl,-soname,{library_name}"]
        if library_name in symbols:
            versions.write_text(f"{library_name} {{ global: *; }};")
            options.append(f"-Wl,--version-script={versions}")
        command = ["cc", "-shared", "-fPIC", "-w", *options, "-o", str(into / library_name), str(source)]
        subprocess.run(command, check=True)


def _body(name: str) -> str:
    template = next(text for pattern, text in _BODIES if re.fullmatch(pattern, name))
    return template.format(name) + "\n"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
