"""Build the sdist and the wheel, install the wheel into a clean environment, and use the plugin from there.

What this catches and the test suite cannot: a module, `py.typed` or the entry point missing from the wheel, a
dependency that only the development environment has, data in the sdist, a description that a package index can't show.

`--release v1.2.3` is what the release workflow runs: the tag, the version and the changelog have to agree, and what was
built is left in dist/.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SDIST_KB, SDIST_FILE_KB = 1500, 300
"""The most that the sdist may take, and a file in it: it holds what the wheel is built from, and nothing else."""
ADDRESS = "https://example.org/owner/name"

# Written by hand to need nothing but what the wheel itself depends on. `y = (x * scale) / scale` is harmless in FP32;
# with scale = 60000 and x = 2 the product is beyond FP16's 65504, and a plugin that really emulates FP16 must fail it.
TEST = """
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import trt_parity


def model(scale: float) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [1], [scale])
    multiply = helper.make_node("Mul", ["x", "factor"], ["product"])
    divide = helper.make_node("Div", ["product", "factor"], ["y"])
    graph = helper.make_graph([multiply, divide], "scale", [x], [y], [factor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@trt_parity(model(2.0), precision="fp16")
def test_harmless():
    return {"x": np.linspace(0.5, 1.0, 8, dtype=np.float32).reshape(2, 4)}


@trt_parity(model(60000.0), precision="fp16")
def test_overflow():
    return {"x": np.linspace(1.0, 2.0, 8, dtype=np.float32).reshape(2, 4)}
"""

INI = """
[pytest]
addopts = --strict-markers --strict-config
filterwarnings = error
"""


def run(*command: str | Path, cwd: Path = ROOT, expect: int = 0) -> str:
    """Run a command and give its output; end everything when it does not exit as expected."""
    print("$", *(str(part) for part in command), flush=True)
    # Neither this project's pytest options nor a developer's cache may decide what is seen here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRTCHECK_", "PYTHONPATH"))}
    environment["TRTCHECK_CACHE_DIR"] = str(cwd / "trtcheck-cache")
    done = subprocess.run(
        command, check=False, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != expect:
        print(done.stdout)
        sys.exit(f"exit status {done.returncode}, expected {expect}")
    return done.stdout


def must(condition: bool, message: str) -> None:
    """End everything unless `condition` holds."""
    if not condition:
        sys.exit(message)


def unready(tag: str, version: str, changelog: str) -> list[str]:
    """What keeps a version from being released under a tag, a sentence each."""
    wrong = [] if tag == f"v{version}" else [f"the tag {tag} is not that of version {version}"]
    sections = dict(re.findall(r"^## \[([^\]]+)\](.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL))
    title, _, text = sections.get(version, "").partition("\n")
    if version not in sections:
        wrong.append(f"CHANGELOG.md has no section [{version}]")
    elif not re.fullmatch(r" - \d{4}-\d\d-\d\d", title.rstrip()):
        wrong.append(f"CHANGELOG.md: the section [{version}] has no date, as in ## [{version}] - 2026-11-27")
    elif not re.search(r"^- ", text, re.MULTILINE):
        wrong.append(f"CHANGELOG.md: the section [{version}] is empty")
    if re.search(r"^- ", sections.get("Unreleased", ""), re.MULTILINE):
        wrong.append("CHANGELOG.md: what stands under [Unreleased] belongs to the release")
    return wrong


def description(wheel: Path) -> tuple[str, list[str]]:
    """What a package index shows of a wheel, and the addresses that it links beside."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode("utf-8"))
    from readme_renderer import markdown

    html = markdown.render(str(metadata.get_payload()))
    must(html is not None, "README can't be shown by a package index")
    return str(html), metadata.get_all("Project-URL") or []


def check_description(wheel: Path) -> None:
    """No link of README is broken on a package index, whether the repository's address is known or not."""
    html, urls = description(wheel)
    # Headings link themselves.
    inner = [
        each for each in re.findall(r'href="([^"]*)"', html) if not each.startswith(("https://", "#user-content-"))
    ]
    must(not inner, f"README on a package index links what is not there: {inner}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "source")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests", "dist", "build"))
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        project = re.sub('^repository = ".*"', f'repository = "{ADDRESS}"', project, flags=re.MULTILINE)
        (copy / "pyproject.toml").write_text(project)
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, copy)
        addressed, urls = description(next(Path(folder).glob("*.whl")))
    must(f"Repository, {ADDRESS}" in urls, f"the repository's address is not in the metadata: {urls}")
    linked = re.findall(rf'href="{ADDRESS}/blob/v[^/"]+/([^"#]+)', addressed)
    must("docs/install.md" in linked, "with the repository's address README's links do not lead there")
    must(
        not (gone := [each for each in linked if not (ROOT / each).exists()]), f"README links what is not there: {gone}"
    )
    print(f"README on a package index: {len(linked)} links into the repository, where its address is known")


def check_sdist(sdist: Path) -> None:
    """It holds what the wheel is built from, and no data."""
    with tarfile.open(sdist) as archive:
        sizes = {each.name.partition("/")[2]: each.size / 1000 for each in archive.getmembers()}
    print(f"{sdist.name}: {len(sizes)} files, {sdist.stat().st_size / 1000:.0f} kB")
    must(sdist.stat().st_size < SDIST_KB * 1000, f"the sdist is larger than {SDIST_KB} kB")
    must(not (large := [name for name, size in sizes.items() if size > SDIST_FILE_KB]), f"in the sdist: {large}")


def check_wheel(wheel: Path) -> None:
    """Every module is in it, and nothing that is not the package's; a second build gives the same bytes."""
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pytest_trtcheck").rglob("*.py")}
    must(not (missing := sources - set(names)), f"not in the wheel: {missing}")
    must("pytest_trtcheck/py.typed" in names, "py.typed is not in the wheel")
    strangers = [name for name in names if not re.match(r"pytest_trtcheck(-[^/]+\.dist-info)?/", name)]
    must(not strangers, f"the wheel holds what it should not: {strangers}")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
        digests = {hashlib.sha256(each.read_bytes()).hexdigest() for each in (wheel, *Path(folder).glob("*.whl"))}
    must(len(digests) == 1, "two builds of the wheel differ")


def main(work: Path, tag: str | None) -> None:
    """Build, inspect, install and use, all below `work`."""
    dist, home = work / "dist", work / "project"
    for old in dist.glob("*"):
        old.unlink()
    home.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "build", "--outdir", dist)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_sdist(sdist)
    check_wheel(wheel)
    check_description(wheel)
    if tag is not None:
        wrong = unready(tag, wheel.name.split("-")[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        must(not wrong, "\n".join(["not ready for a release:", *wrong]))

    venv.create(work / "venv", with_pip=True, clear=True)
    python = work / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    run(python, "-m", "pip", "check")

    (home / "test_it.py").write_text(TEST)
    (home / "pytest.ini").write_text(INI)
    helped = [line for line in run(python, "-m", "pytest", "--help", cwd=home).splitlines() if "trt" in line]
    print(*helped, sep="\n")
    must(any("--trt-gpu" in line for line in helped), "pytest --help does not know the plugin")
    print(run(python, "-m", "pytest", "-k", "harmless", cwd=home))
    failed = run(python, "-m", "pytest", "-k", "overflow", cwd=home, expect=1)
    must("1 failed" in failed, f"the planted overflow did not fail its test:\n{failed}")
    explained = run(python, "-m", "pytest_trtcheck", "explain", "model-missing", cwd=home)
    must("Cause." in explained, "the wheel explains no error")
    print("the wheel works; the planted overflow failed its test, as it must")
    if tag is not None:
        shutil.copytree(dist, ROOT / "dist", dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="a folder for what is built")
    parser.add_argument("--release", metavar="TAG", help="the tag that a release is made of, such as v1.2.3")
    given = parser.parse_args()
    main(given.work.resolve(), given.release)
