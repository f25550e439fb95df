"""What the plugin works with, and what proves it: read from what proves it, so that the two never part.

tox.ini and `.ci/run` say what runs on every change, pyproject.toml what is admitted, `tests/test_tensorrt_api.py` whose
bindings are looked at, `.ci/check_installs.py` what is resolved, and the reports in docs/measured what ran on a GPU.
"""

from __future__ import annotations

import configparser
import json
import re
import runpy
import sys
from collections import Counter
from typing import Any

from docs.site.links import ROOT
from docs.site.tables import table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNTRIED = "untried"


def read(path: str) -> str:
    """A file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads(read("pyproject.toml"))


def environments() -> configparser.ConfigParser:
    """tox.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(read("tox.ini"))
    return parser


def in_ci() -> set[str]:
    """The environments that `.ci/run` runs, each with what it is told to run of it."""
    found = re.findall(r"run (?:--discover \S+ )?-e ([\w,-]+)", read(".ci/run"))
    return {name for names in found for name in names.split(",")}


def pythons(_: str) -> str:
    """Each Python."""
    (matrix,) = re.findall(r"python: \[([^\]]+)\]", read(".github/workflows/ci.yml"))
    installs, rows = _installs(), []
    for version in installs["PYTHONS"]:
        short = f"py{version.replace('.', '')}"
        proofs = {
            "`tests`: the suite, in the workflow's matrix": f'"{version}"' in matrix,
            f"`{short}`: a part of it, in `.ci/run`": short in in_ci(),
            "`lowest`: the suite with the oldest libraries": _base(environments()) == version,
        }
        gone = [f"{extra} on {platform}" for (platform, extra), no in installs["NOT_THERE"].items() if version in no]
        resolved = "every extra" + (f" but {', '.join(gone)}" if gone else "")
        rows.append([version, _said(proofs), resolved])
    return table(["Python", "run by", "resolved by `installs`"], rows)


def _base(parser: configparser.ConfigParser) -> str:
    return parser.get("testenv:lowest", "base_python").removeprefix("python")


def _installs() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci/check_installs.py"))


def _said(proofs: dict[str, bool]) -> str:
    return "; ".join(text for text, holds in proofs.items() if holds) or UNTRIED


def lower_bounds() -> dict[str, tuple[str, str]]:
    """By library, the extra that asks for it (empty: always) and the oldest version that pyproject.toml admits."""
    given = project()["project"]
    asked = {"": given["dependencies"], **given["optional-dependencies"]}
    found: dict[str, tuple[str, str]] = {}
    for extra, requirements in asked.items():
        for each in requirements:
            if bound := re.match(r"([\w-]+)(?:\[[^\]]*\])?>=([\w.]+)", each):
                found.setdefault(bound[1], (extra, bound[2]))
    return found


def pinned() -> dict[str, str]:
    """The versions that the environment of the oldest ones holds."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", environments().get("testenv:lowest", "deps"), re.MULTILINE))


def libraries(_: str) -> str:
    """Each library: the oldest one, and what runs the newest."""
    runs = dict.fromkeys(("", "cpu", "hypothesis", "benchmark", "report", "remote"), "tests")
    runs |= {"torch": "torch", "tensorflow": "keras", "triton": "triton", "s3": "s3"}
    rows = []
    for name, (extra, oldest) in lower_bounds().items():
        if name.startswith("tensorrt"):
            continue
        newest = (
            f"`{runs[extra]}`, in `.ci/run`"
            if runs.get(extra) in in_ci()
            else "`installs` resolves it; the GPU runs below"
        )
        proved = _said({"`lowest`: the suite": name in pinned()})
        rows.append([name, f"`[{extra}]`" if extra else "", oldest, proved, newest])
    return table(["library", "extra", "from", "the oldest is proved by", "the newest is proved by"], rows)


def releases() -> list[str]:
    """The releases whose bindings are looked at, TensorRT-RTX's with "rtx " before them."""
    (listed,) = re.findall(r"^TAKEN = \((.*?)^\)", read("tests/test_tensorrt_api.py"), re.MULTILINE | re.DOTALL)
    return re.findall(r'"((?:rtx )?\d[\w.]+)"', re.sub(r"#.*", "", listed))


def tensorrts(_: str) -> str:
    """Each release of TensorRT and TensorRT-RTX."""
    (chosen,) = re.findall(r'tensorrt-api -- -k "([^"]+)"', read(".ci/run"))
    (held,) = re.findall(r"tensorrt-rtx==([\d.]+)", " ".join(map(str, project()["dependency-groups"]["test"])))
    ran = {f"{'rtx ' if module == 'tensorrt_rtx' else ''}{version}": names for module, version, names in _engines()}
    rows = []
    for release in releases():
        version, name = release.removeprefix("rtx "), "TensorRT-RTX" if release.startswith("rtx ") else "TensorRT"
        proofs = {
            "`tests` builds them without a GPU, in `.ci/run`": release == f"rtx {held}",
            f"ran on {' and '.join(ran.get(release, []))}": release in ran,
        }
        bindings = f"`tensorrt-api`, {'in `.ci/run`' if version in chosen.split(' or ') else 'by hand'}"
        rows.append([f"{name} {version}", bindings, _said(proofs)])
    return table(["release", "its bindings are checked by", "engines"], rows)


def _reports() -> list[tuple[str, dict[str, Any]]]:
    """The JSON reports of GPU runs, by their path from docs/."""
    files = sorted((ROOT / "docs/measured").rglob("*.json"))
    read = [
        (path.relative_to(ROOT / "docs").as_posix(), json.loads(path.read_text(encoding="utf-8"))) for path in files
    ]
    return [(path, each) for path, each in read if isinstance(each, dict) and "schema_version" in each]


def _gpu(report: dict[str, Any]) -> str:
    return str(report["environment"]["gpu"]["name"]).removeprefix("NVIDIA ")


def _engines() -> list[tuple[str, str, list[str]]]:
    """The TensorRTs whose engines a report has, with the GPUs that ran them."""
    found: dict[tuple[str, str], list[str]] = {}
    for _, report in _reports():
        if any(check["evidence"] == "engine" for check in report["checks"]):
            library = report["environment"]["tensorrt"]
            found.setdefault((library["module"], library["version"]), []).append(_gpu(report))
    return [(*library, list(dict.fromkeys(names))) for library, names in found.items()]


def gpu_runs(_: str) -> str:
    """What ran on a GPU, report by report."""
    rows = []
    for path, report in _reports():
        where = report["environment"]
        versions = {"tensorrt_rtx": where["tensorrt"]["version"], "tensorrt": where["tensorrt"]["version"]}
        versions |= {"onnxruntime-cuda": where["onnxruntime"]}
        ran = Counter(check["backend"] for check in report["checks"] if check["evidence"] in {"engine", "provider"})
        for backend, checks in sorted(ran.items()):
            system = f"`{backend}` {versions.get(backend, '')}".strip()
            link = f"[{path.removeprefix('measured/')}]({path})"
            rows.append([_gpu(report), where["driver"], system, f"{checks} checks", where["python"], link])
    return table(["GPU", "driver", "system", "ran", "Python", "report"], rows)


def gpus(_: str) -> str:
    """The GPUs of docs/install.md, and what is known of each."""
    listed = re.findall(r"^\| ([^|]+) \| (\d+\.\d[^|]*) \| ([^|]+) \|$", read("docs/install.md"), re.MULTILINE)
    capabilities = {_gpu(report): report["environment"]["gpu"]["compute_capability"] for _, report in _reports()}
    ran = {name for _, _, names in _engines() for name in names}
    named = {gpu for gpu in ran if any(gpu.split()[0] in names.split(", ") for names, _, _ in listed)}
    (built,) = re.findall(r"--trt-gpu=(\w+)", read(".ci/run_example.py"))
    rows = []
    for names, capability, admitted in [*listed, *((gpu, capabilities[gpu], "–") for gpu in sorted(ran - named))]:
        proofs = {
            "engines of TensorRT-RTX ran on it": any(gpu.split()[0] in names.split(", ") for gpu in ran),
            "`example` builds TensorRT-RTX's engines for it, in `.ci/run`; none ran": names == built,
        }
        rows.append([names, capability, admitted, _said(proofs)])
    return table(["GPU", "compute capability", "TensorRT, by NVIDIA", "proved by"], rows)


CUDA_13_DRIVER = 580
"""The first driver of CUDA 13."""


def cuda(_: str) -> str:
    """CUDA, by its major version."""
    drivers = sorted({report["environment"]["driver"] for _, report in _reports()})
    majors: dict[int, list[str]] = {13: [], 12: []}
    for driver in drivers:
        majors[13 if int(driver.partition(".")[0]) >= CUDA_13_DRIVER else 12].append(driver)
    resolved, rows = "`installs` resolves the extras", []
    for major, ran in majors.items():
        rows.append([f"CUDA {major}", f"{resolved}; {_with_drivers(ran)}"])
    return table(["CUDA", "proved by"], [*rows, ["JetPack 6, JetPack 7", UNTRIED]])


def _with_drivers(drivers: list[str]) -> str:
    return f"the GPU runs, with driver {', '.join(drivers)}" if drivers else "never run"


def platforms(_: str) -> str:
    """Each operating system and processor."""
    known = {
        "Linux x86_64": "`.ci/run`, and the GPU runs",
        "Windows": "`installs`; `types` and some tests as on Windows, as far as Linux can refuse what Windows refuses; "
        "never run there",
    }
    rows = [[name, known.get(name, "`installs`; never run there")] for name in _installs()["PLATFORMS"]]
    return table(["platform", "proved by"], [*rows, ["macOS", UNTRIED]])
