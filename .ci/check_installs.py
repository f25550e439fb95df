"""Does every extra install on every platform and Python that docs/install.md names? Resolved, not installed; by uv.

Only wheels count: what an index has as source alone is not installed anywhere by us. TensorRT is the exception: its
distributions `tensorrt`, `tensorrt-cu12` and `tensorrt-rtx` are sources that do nothing but name the wheels of which
they consist, so those stand for them here. The libraries of TensorRT itself (`tensorrt-cu13-libs`) come from an index
of NVIDIA's, and are not looked at.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux aarch64, glibc 2.35": "aarch64-manylinux_2_35",  # JetPack 6
    "Linux aarch64, glibc 2.39": "aarch64-manylinux_2_39",  # JetPack 7, GH200, GB200
    "Windows": "x86_64-pc-windows-msvc",
}
WHEELS = {
    "tensorrt": ["tensorrt-cu13-bindings>=10.13.3"],
    "tensorrt-cu12": ["tensorrt-cu12-bindings>=10.1"],
    "rtx": ["tensorrt-rtx-cu13-bindings>=1.5; platform_machine != 'aarch64'",
            "tensorrt-rtx-cu13-libs>=1.5; platform_machine != 'aarch64'"],
}  # fmt: skip
"""What stands for the sources that an extra names."""
SOURCES = ("tensorrt", "tensorrt-cu12", "tensorrt-rtx")
_EXTRAS = _PROJECT.partition("optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = ("", *re.findall(r"^([\w-]+) = \[", _EXTRAS, re.MULTILINE))
SHOWN = (
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "cuda-bindings",
    *(w.split(">")[0] for ws in WHEELS.values() for w in ws),
)

ARM = tuple(platform for platform in PLATFORMS if "aarch64" in platform)
NOT_THERE: dict[tuple[str, str], set[str]] = {(platform, "tensorrt-cu12"): {"3.14"} for platform in ARM}
"""By platform and extra, the Pythons for which the index has no wheels, as docs/install.md says."""


def resolve(platform: str, python: str, extra: str) -> tuple[bool, str]:
    """Whether it resolves; the versions that matter, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        override, more = Path(folder, "override.txt"), Path(folder, "more.in")
        override.write_text("".join(f"{name}; sys_platform == 'none'\n" for name in SOURCES), encoding="utf-8")
        more.write_text("".join(f"{wheel}\n" for wheel in WHEELS.get(extra, [])), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-build",
            "--no-header",
            "--no-annotate",
        ]
        command += ["--python-platform", PLATFORMS[platform], "--python-version", python, "--override", str(override)]
        command += ["pyproject.toml", str(more), *(["--extra", extra] if extra else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return False, " ".join(done.stderr.split())[:300]
    versions = dict(line.split(" ;")[0].split("==") for line in done.stdout.splitlines() if "==" in line)
    return True, ", ".join(f"{name} {versions[name]}" for name in dict.fromkeys(SHOWN) if name in versions)


def main(*chosen: str) -> int:
    """Print the table, of all extras or of those chosen; 1 where it is not as documented."""
    extras = chosen or EXTRAS
    cells = [(platform, extra, python) for platform in PLATFORMS for extra in extras for python in PYTHONS]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda cell: resolve(cell[0], cell[2], cell[1]), cells)
        wrong, there = 0, 0
        for (platform, extra, python), (resolves, said) in zip(cells, results, strict=True):
            expected = python not in NOT_THERE.get((platform, extra), set())
            there += resolves
            wrong += resolves != expected
            unexpected = "" if resolves == expected else "  <- not as docs/install.md says"
            state = "ok" if resolves else "no"
            print(f"{platform:26} {extra or '(none)':14} {python:5} {state}  {said}{unexpected}", flush=True)
    print(f"{len(cells)} combinations, {there} resolve, {wrong} not as documented")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
