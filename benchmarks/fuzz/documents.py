"""What the tool wrote and reads again: reports, evidence, baselines, bundles, exports."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arrays  # type: ignore[import-not-found]
import mutations  # type: ignore[import-not-found]
from target import Found, Made, Target, checked, command, session, special  # type: ignore[import-not-found]

import models  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

REPORTS = Path(__file__).resolve().parents[2] / "tests" / "data" / "reports"


def hostile(path: Path, document: Any, draw: Random) -> None:
    """A JSON file, changed."""
    if draw.random() < 0.03:
        special(path, draw)
    else:
        path.write_bytes(mutations.json_text(document, draw))


class Reports(Target):  # type: ignore[misc]
    """Reports given to commands."""

    name, about = "reports", "JSON reports given to diff, merge and upgrade, as text, Markdown, HTML and JSON"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        named = draw.choice(sorted(REPORTS.glob("*.json")))
        other = {"upgrade_rtx_1.5.json": "upgrade_rtx_1.7.json"}.get(named.name, named.name)
        old, new = folder / "old.json", folder / "new.json"
        hostile(old, json.loads(named.read_text()), draw)
        hostile(new, json.loads((REPORTS / other).read_text()), draw)
        if draw.random() < 0.5:
            old = named
        page = [f"--html={folder / 'page.html'}"] * (draw.random() < 0.5)
        shown = ["--markdown"] * (draw.random() < 0.3)
        kind = draw.randrange(3)
        if kind == 0:
            return lambda: command("diff", *shown, "--fail-on=loss", old, new)
        if kind == 1:
            return lambda: command("merge", *shown, *page, "-o", folder / "merged.json", old, new)
        return lambda: command("upgrade", *shown, *page, f"--json={folder / 'verdict.json'}", old, new)


class Evidence(Made):  # type: ignore[misc]
    """Reports that are to prove something."""

    name, about = (
        "evidence",
        "reports given to --trt-require-evidence, unsigned, and signed with a key (which must be refused)",
    )

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        from pytest_trtcheck import gpu
        from pytest_trtcheck.backends.base import Machine
        from pytest_trtcheck.check.evidence import EvidenceReport
        from pytest_trtcheck.report import json_report

        key = b"0123456789abcdef" if draw.random() < 0.3 else None
        report = json.loads((self.made / "report.json").read_text())
        report["environment"]["gpu"] = {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"}
        for check in report["checks"]:
            check |= {"evidence": "engine", "gpu_ran": True, "backend": "tensorrt"}
        path = folder / "evidence.json"
        if key:
            report["signature"] = json_report._signature(report, key)
        hostile(path, report, draw)
        same = path.is_file() and not path.is_symlink() and _loads(path) == report
        machine = Machine(requested=gpu.find_gpu("A100"))
        model = str(self.made / "convolutions.onnx")
        inputs = models.inputs_of(self.made / "convolutions.onnx")

        def use() -> Found:
            run = json_report.read(path, key)
            if key and not same:
                return Found("wrong pass", "a changed report was taken for the signed one")
            evidence = EvidenceReport("evidence.json", run, signed=key is not None)
            nodeid, more = "test_seed.py::test_fails", {"tol": 1e-9, "inputs": inputs, "batch": (None,)}
            found = checked(model, folder, parsed=False, nodeid=nodeid, evidence=evidence, machine=machine, **more)
            return Found("wrong pass", found.said) if found.word == "pass" else found

        return use


def _loads(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


class Baselines(Made):  # type: ignore[misc]
    """What earlier runs recorded."""

    name, about = (
        "baselines",
        "baselines of errors and latency; a check that fails by its tolerance must not pass by them",
    )

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        self.copy(folder)
        (path,) = (folder / "baselines").rglob("*.json")
        document = json.loads(path.read_text())
        ((label, entry),) = document["tests"]["test_seed.py::test_passes"].items()
        document["tests"]["test_seed.py::test_fails"] = {label: entry, label.replace("int8+fp16", "fp16"): entry}
        entry["latency"] = LATENCY
        hostile(path, document, draw)
        updating = ["--trt-update-baseline"] * (draw.random() < 0.3)

        def use() -> Found:
            found = session(folder, "--trt-baseline=baselines", *updating, "test_seed.py")
            return Found("wrong pass", found.said) if found.said.startswith("0:") else found

        return use


LATENCY = {
    "cuda_graph": True,
    "distribution": {
        "bounds_ms": {"p50": [1.0, 1.1], "p99": [1.2, 1.3]},
        "confidence": 0.95,
        "quantiles_ms": {"p50": 1.05, "p99": 1.25},
        "samples": 1000,
    },
    "driver": "580.1",
    "input_shapes": {"x": [2, 3, 8, 8]},
    "measured": "GPU time",
    "model": "convolutions.onnx",
    "model_sha256": "0" * 64,
    "power_limit_w": 700.0,
    "power_mode": None,
    "recorded": "2026-01-01",
    "sm_mhz": 1980,
    "tensorrt": "tensorrt_rtx 1.5.0.114",
}


class Bundles(Made):  # type: ignore[misc]
    """What a failed check rests on."""

    name = "bundles"
    about = "failure bundles that are replayed: bundle.json with its checksum made right again, their models and arrays"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        from pytest_trtcheck.bundle import reading
        from pytest_trtcheck.cache import hash_file

        self.copy(folder)
        (path,) = (folder / "bundles").rglob("bundle.json")
        about = json.loads(path.read_text())
        signs = draw.random() < 0.8
        if draw.random() < 0.4:
            file = draw.choice([each for each in path.parent.rglob("*") if each.is_file() and each != path])
            if file.suffix == ".npz":
                arrays.rewritten(file, draw)
            else:
                file.write_bytes(models.mutated_model(file, draw))
            if signs:
                about["files"] = reading.hashes(path.parent)
                about["files"].pop("bundle.json", None)
                for what in ("model", "lowered"):
                    if about[what].get("file") == file.relative_to(path.parent).as_posix():
                        about[what]["sha256"] = hashlib.sha256(hash_file(file).encode()).hexdigest()
        else:
            about = mutations.of_json(about, draw)
        if signs and isinstance(about, dict):
            with suppress(ValueError, TypeError, RecursionError):
                about = reading.signed(about)
        path.write_bytes(
            json.dumps(about).encode("utf-8", "surrogatepass") if signs else mutations.json_text(about, draw)
        )

        def use() -> Found:
            found = session(folder, str(path))
            passed = found.said.startswith("0:") and not signs
            return Found("wrong pass", found.said) if passed else found

        return use


class Exports(Made):  # type: ignore[misc]
    """What is shipped."""

    name, about = "exports", "release.json and manifest.json of --trt-export, looked at, merged and exported into again"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        self.copy(folder)
        release = folder / "release"
        path = draw.choice(sorted(release.rglob("*.json")))
        hostile(path, json.loads(path.read_text()), draw)
        kind = draw.randrange(3)
        if kind == 0:
            return lambda: command("release", release)
        if kind == 1:
            (folder / "into").mkdir()
            return lambda: command("release", folder / "into", release)
        return lambda: session(folder, "--trt-export=release", "test_seed.py")
