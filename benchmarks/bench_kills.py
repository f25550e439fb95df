"""SIGKILL at every sort of file event of a run, and at random moments of several runs at once.

    python benchmarks/bench_kills.py [--kills N] [--rounds N] [--seed S] [--json FILE]

One run of pytest checks a real net in FP16, INT8 and BF16 (the last one fails), builds engines for an A100 in
TensorRT-RTX, and writes into one folder: cache (with a limit that lets it evict), baselines, a bundle, an export, JSON
and HTML reports. It is run from nothing, and again where an earlier run left all that.

*At each event*: an audit hook in the process and in its builders sees what is opened for writing, renamed, removed or
locked below that folder; a run is killed right before event N. Each kind of event (what is done to which sort of file)
is hit at least once, `--kills` says how many there are in all. These runs are forks of a process that has the libraries
loaded. *At random moments*: three processes of their own, one of them with two xdist workers, share the folder; one, or
all, are killed with everything that they started. A run that hit fewer than nine in ten kinds holds no limits.

After each kill, a reader that shares nothing with the plugin looks at every file: cache entries match their checksums;
JSON, HTML and archives are whole; bundles and exports are what their manifests say; no process is left. Then the same
run is made to its end: the verdicts must be right, nobody waits, and nothing temporary may be left.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import reports  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = """
import numpy as np
from pytest_trtcheck import trt_parity

def sample(seed):
    return {"image": np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype("float32")}

SAMPLES = [sample(seed) for seed in range(4)]

@trt_parity("net.onnx")
def test_fp16():
    return SAMPLES[0]

@trt_parity("net.onnx", precision="int8", calibration=SAMPLES, tol=0.2)
def test_int8():
    return SAMPLES[0]

@trt_parity("net.onnx", precision="bf16", tol=1e-9)
def test_differs():
    return SAMPLES[0]
"""
RIGHT = {"test_fp16": "pass", "test_int8": "pass", "test_differs": "fail"}

# In every Python that the runs start, by its name; what it writes to is open before anything is watched.
HOOK = '''
import os, signal, sys

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock", "os.utime", "os.truncate", "os.link"}

def watch(root, log, role, at):
    """Note each event below `root` in a file of `log`, and die before number `at[1]` where the role is `at[0]`."""
    target = os.open(f"{log}/{role}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def hook(event, given):
        nonlocal count
        if event not in EVENTS or (event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = given[1] if event in {"os.rename", "os.link"} else given[0]
        folder = next((each for each in given[1:] if event in {"os.remove", "os.rmdir"} and each != -1), None)
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            path = os.fsdecode(path)
            if folder is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        except (OSError, TypeError):
            return
        if path.startswith("pipe:"):
            return
        path = os.path.abspath(path)
        if not path.startswith(root + "/") or "/pytest-of-" in path:
            return
        count += 1
        os.write(target, f"{event} {path[len(root) + 1:]}\\n".encode())
        if (role, count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

if "KILLS_ROOT" in os.environ:
    role = os.environ.get("KILLS_ROLE", "main")
    os.environ["KILLS_ROLE"] = "child"
    name, _, number = os.environ.get("KILLS_AT", "").partition(":")
    watch(os.environ["KILLS_ROOT"], os.environ["KILLS_LOG"], role, (name, int(number or 0)))
'''

PARTS = {
    "cache/v1/work": "cache: making, evicting",
    "cache/v1/entries": "cache: publishing",
    "cache/v1/used": "cache: claims",
    "cache/v1": "cache: notes",
    "cache": "cache: first steps",
    "baselines": "update-baseline",
    "bundles": "bundle",
    "export": "export",
    "report": "report",
    "tmp": "builder, scratch",
}
"""What a path below the folder belongs to; the longest that fits."""


_CHANCE = re.compile(
    r"(?<=\.trtcheck-export-)\w{8}|(?<=\.onnx\.data\.)\w{8}|(?<=tmp/)\w{8}$"
    r"|(?<![a-z])[0-9a-f]{12,}|held-[^/]*|[0-9]+"
)


def kind_of(event: str, path: str) -> str:
    """What is done to which sort of file: without what differs from run to run, and from one entry to another."""
    return f"{event} {_CHANCE.sub('*', path)}"


def part_of(event: str, path: str) -> str:
    if path.endswith(".lock"):
        return f"lock of {'the cache' if path.startswith('cache') else path.partition('/')[0]}"
    found = max((each for each in PARTS if path.startswith(each)), key=len, default=None)
    return f"{PARTS[found] if found else path} ({event.removeprefix('os.')})"


@dataclass
class Place:
    """The folder that runs share, and what a run in it is."""

    root: Path
    processes: int = 0

    @classmethod
    def make(cls, root: Path) -> Place:
        """A new one."""
        (root / "tmp").mkdir(parents=True)
        (root / "log").mkdir()
        (root / "hook").mkdir()
        (root / "hook" / "sitecustomize.py").write_text(HOOK)
        (root / "suite").mkdir()
        (root / "suite" / "test_net.py").write_text(TESTS)
        (root / "suite" / "pytest.ini").write_text("[pytest]\ntrt_cache_size = 1\n")
        write_net(root / "suite" / "net.onnx")
        return cls(root)

    def arguments(self, name: str = "report") -> list[str]:
        """Of pytest; the reports are called `name`."""
        plain = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:asyncio"]
        ours = {
            "gpu": "A100",
            "diagnose": "5",
            "cache-dir": self.root / "cache",
            "baseline": self.root / "baselines",
            "bundle": self.root / "bundles",
            "export": self.root / "export",
            "report": self.root / f"{name}.json",
            "html": self.root / f"{name}.html",
        }
        given = [f"--trt-{option}={value}" for option, value in ours.items()]
        suite = self.root / "suite"
        return [*plain, f"--rootdir={suite}", "--trt-update-baseline", *given, str(suite / "test_net.py")]

    def environment(self, at: tuple[str, int] = ("", 0)) -> dict[str, str]:
        """Of a process that is watched, and killed at an event of a role."""
        watched = {"ROOT": str(self.root), "LOG": str(self.root / "log"), "AT": f"{at[0]}:{at[1]}"}
        paths = [str(self.root / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            **{f"KILLS_{name}": value for name, value in watched.items()},
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "",  # or every process compiles every module
            "PYTHONPYCACHEPREFIX": str(self.root.parent / "compiled"),
            "OMP_NUM_THREADS": "1",
        }

    def age(self) -> None:
        """As if two hours had passed, with three more entries that nobody needs: what comes next evicts."""
        from pytest_trtcheck.cache import Cache, Key

        for number in range(3):
            key = Key("engine", f"old{number}", {"n": str(number)})
            Cache(self.root / "cache").get_or_make(key, lambda folder: (folder / "plan").write_bytes(bytes(100)))
        then = time.time() - 7200
        for path in self.root.glob("cache/v1/entries/*/*"):
            os.utime(path, (then, then))
        (self.root / "cache/v1/weight").unlink(missing_ok=True)

    def forget(self) -> None:
        """Without the entries of the run itself, so that it makes them again in a cache of many."""
        for kind in ("engine", "lowered", "blame", "reference"):
            shutil.rmtree(self.root / "cache/v1/entries" / kind, ignore_errors=True)

    def log(self) -> list[tuple[str, str, str]]:
        """(the process's role and number, event, path), as noted since the log was emptied."""
        return [
            (path.name, *line.split(" ", 1))  # type: ignore[misc]
            for path in sorted((self.root / "log").iterdir())
            for line in path.read_text(errors="replace").splitlines()
        ]

    def empty_log(self) -> None:
        """Forget the events."""
        for path in (self.root / "log").iterdir():
            path.unlink()


def write_net(path: Path) -> None:
    build = networks.Builder()
    value = build.node("Relu", [build.conv("image", (3, 8))])
    value = build.node("Add", [build.conv(value, (8, 8)), value])
    build.node("GlobalAveragePool", [build.conv(value, (8, 10))])
    networks.save(build, path, [1, 3, 16, 16], [1, 10, 1, 1])


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run went."""

    status: int
    """As `subprocess` has it: -9 is SIGKILL."""
    seconds: float
    text: str


def forked(place: Place, at: tuple[str, int] = ("", 0)) -> Ended:
    """One run of pytest, in a fork of this process."""
    output = place.root / "output.txt"
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(target, stream)
        environment = place.environment(at)
        os.environ.clear()
        os.environ.update(environment)
        os.environ["KILLS_ROLE"] = "child"  # of what it starts
        tempfile.tempdir = None
        os.chdir(place.root / "suite")
        scope: dict[str, Any] = {"__name__": "hook"}
        exec(compile(HOOK.partition("\nif ")[0], "hook", "exec"), scope)
        scope["watch"](str(place.root), str(place.root / "log"), "main", at)
        import pytest

        from pytest_trtcheck.cache import directory

        directory.remove_scratch.cache_clear()  # a process of its own has not looked for leftovers yet
        status = 70
        try:
            status = int(pytest.main(place.arguments()))
            loaded = (name for name in sys.modules if name.partition(".")[0] in {"hypothesis", "pytest_trtcheck"})
            (place.root.parent / "loaded").write_text("\n".join(loaded))
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), time.perf_counter() - start, output.read_text(errors="replace"))


def started(place: Place, name: str, workers: int) -> subprocess.Popen[bytes]:
    """One run in a process of its own, with its own group."""
    extra = [f"-n{workers}"] if workers else []
    with (place.root / f"{name}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *place.arguments(name), *extra],
            cwd=place.root / "suite",
            env=place.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def left_running(place: Place) -> list[int]:
    """The processes that runs in this folder started and that are still there."""
    mark = f"KILLS_ROOT={place.root}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes() + b"\0" and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for_none(place: Place, seconds: float = 10.0) -> list[int]:
    end = time.monotonic() + seconds
    while (found := left_running(place)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


# --- the reader ------------------------------------------------------------------------------------------------------


def problems(place: Place) -> Iterator[str]:
    """Every file that is half-written, or is not what something beside it says."""
    root = place.root
    for entry in root.glob("cache/v1/entries/*/*"):
        yield from (f"{entry.relative_to(root)}: {each}" for each in entry_problems(entry))
    for path in [*root.glob("report*.json"), *root.glob("baselines/**/*.json"), *root.glob("export/**/*.json")]:
        if "/.trtcheck-export" not in str(path):
            yield from not_json(path)
    for path in root.glob("report*.html"):
        if not path.read_text().rstrip().endswith("</html>"):
            yield f"{path.name} is cut off"
    yield from bundle_and_export_problems(root)


def bundle_and_export_problems(root: Path) -> Iterator[str]:
    exports = (path for path in root.glob("export/**/manifest.json") if ".trtcheck-export" not in str(path))
    for manifest in [*root.glob("bundles/*/bundle.json"), *exports]:
        if wrong := list(not_json(manifest)):
            yield from wrong
            continue
        for name, told in json.loads(manifest.read_text())["files"].items():
            expected = told if isinstance(told, str) else told["sha256"]
            file = manifest.parent / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                yield f"{file.relative_to(root)} is not what its manifest says"
    for folder in root.glob("bundles/[!.]*"):
        if not (folder / "bundle.json").is_file():
            yield f"{folder.relative_to(root)} has no bundle.json"
    for path in root.glob("bundles/[!.]*/*.npz"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                yield f"{path.relative_to(root)} is damaged"


def not_json(path: Path) -> Iterator[str]:
    try:
        json.loads(path.read_text())
    except ValueError as error:
        yield f"{path.name} is no JSON: {error}"


def entry_problems(entry: Path) -> Iterator[str]:
    try:
        crc, _, text = (entry / "manifest").read_bytes().partition(b"\n")
        if int(crc, 16) != zlib.crc32(text):
            yield "its manifest is damaged"
            return
        for name, (size, told, *_) in json.loads(text)["files"].items():
            data = (entry / "files" / name).read_bytes()
            if len(data) != size or int(told, 16) != zlib.crc32(data):
                yield f"{name} is damaged"
    except (OSError, ValueError) as error:
        yield str(error)
    for extra in entry.glob("extra/*"):
        data = extra.read_bytes()
        if int.from_bytes(data[:4], "big") != zlib.crc32(data[4:]):
            yield f"{extra.name} is damaged"


def temporary(place: Place) -> list[str]:
    """What is there for a moment only: none of it has a reason to stay when nothing runs."""
    cache = ("work/*", "used/*", ".*", "entries/*/*/.*")
    others = (
        "bundles/.*",
        "baselines/**/.*",
        "export/.*",
        ".*",
        "tmp/trtcheck-*",
        "**/*.lock",
        "**/*.part",
        "**/*.tmp",
    )
    found = (path for each in (*(f"cache/v1/{name}" for name in cache), *others) for path in place.root.glob(each))
    return sorted({str(path.relative_to(place.root)) for path in found if "pytest-of-" not in str(path)})


def verdict_problems(place: Place, ended: Ended, name: str = "report") -> Iterator[str]:
    """What is wrong with a run that was not disturbed."""
    if ended.status != 1:
        yield f"the run ended with {ended.status}: {ended.text[-1500:]}"
        return
    report = json.loads((place.root / f"{name}.json").read_text())
    found = {check["nodeid"].rpartition("::")[2]: check["verdict"] for check in report["checks"]}
    if found != RIGHT:
        yield f"verdicts {found}: {ended.text[-1500:]}"


# --- kills -----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What came out of kills of one kind."""

    kills: int = 0
    ended_before: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    left_after_kill: int = 0
    left_after_next: int = 0
    left: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def look(self, place: Place, where: str) -> None:
        """After a kill: what is there, and what the next run makes of it."""
        running = wait_for_none(place)
        found = [f"{len(running)} processes are left"] if running else []
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        found += problems(place)
        self.left_after_kill = max(self.left_after_kill, len(temporary(place)))
        place.empty_log()
        ended = forked(place)
        self.seconds.append(ended.seconds)
        found += [*verdict_problems(place, ended), *problems(place)]
        left = temporary(place)
        self.left_after_next = max(self.left_after_next, len(left))
        self.left.update("/".join(Path(each).parts[:-1]) for each in left)
        self.problems += [f"{where}: {each}" for each in found]
        for each in found:
            print(f"{where}: {each}", file=sys.stderr, flush=True)

    def holds(self, usual_s: float) -> bool:
        """Nothing was wrong, nobody waited, and nothing was left."""
        return not self.problems and not self.left_after_next and max(self.seconds, default=0) < 3 * usual_s + 10

    def to_json(self, usual_s: float) -> dict[str, Any]:
        """For the report."""
        return {
            "kills": self.kills,
            "ended_before_the_kill": self.ended_before,
            "killed_at": dict(sorted(self.parts.items())),
            "problems": self.problems,
            "temporary_after_kill_at_most": self.left_after_kill,
            "temporary_after_next_run_at_most": self.left_after_next,
            "temporary_after_next_run": dict(self.left),
            "next_run_s": {"median": round(statistics.median(self.seconds), 2), "most": round(max(self.seconds), 2)}
            if self.seconds
            else None,
            "undisturbed_run_s": round(usual_s, 2),
        }


def copied(template: Path, place: Place) -> None:
    """The folder as it was before."""
    for path in place.root.iterdir():
        if path.name not in {"hook", "suite", "log"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(template, place.root, dirs_exist_ok=True)
    (place.root / "tmp").mkdir(exist_ok=True)
    place.empty_log()


def kept(place: Place, template: Path) -> Path:
    shutil.copytree(place.root, template, ignore=shutil.ignore_patterns("hook", "suite", "log", "tmp"))
    return template


@dataclass(frozen=True)
class Point:
    """An event of a run from a state, by its number in the process that it is in."""

    state: str
    role: str
    number: int
    part: str
    kind: str


def say(text: str, found: Found) -> None:
    print(f"{text}: {found.kills} kills, {len(found.problems)} problems", file=sys.stderr, flush=True)


def at_each_event(
    place: Place, states: dict[str, Path], most: int, seed: int, until: float
) -> tuple[dict[str, Any], bool]:
    """Kill before events of a run from each state, `most` of them or until a time."""
    points: list[Point] = []
    usual = 0.0
    for state, template in states.items():
        copied(template, place)
        ended = forked(place)
        usual = max(usual, ended.seconds)
        if wrong := [*verdict_problems(place, ended), *problems(place)]:
            raise SystemExit(f"undisturbed, {state}: {wrong}")
        count: Counter[str] = Counter()
        for process, event, path in place.log():
            count[process] += 1
            role = process.partition("-")[0]
            points.append(Point(state, role, count[process], part_of(event, path), f"{role} {kind_of(event, path)}"))
    random.Random(seed).shuffle(points)
    # First one of each kind, then whatever there is.
    first = list({point.kind: point for point in points}.values())
    chosen = [*first, *(point for point in points if point not in first)][:most]
    found = Found()
    hit = set()
    for done, point in enumerate(chosen):
        if time.monotonic() > until:
            break
        copied(states[point.state], place)
        ended = forked(place, (point.role, point.number))
        killed = ended.status == -signal.SIGKILL or point.role == "child"
        hit |= {point.kind} if killed else set()
        found.kills += killed
        found.ended_before += not killed
        found.parts[point.part] += killed
        found.look(place, f"{point.state}, {point.role} before event {point.number}, {point.kind}")
        if done % 20 == 0:
            say(f"at each event: {done + 1} of {len(chosen)}", found)
    report = {"events": len(points), "kinds_of_events": len(first), "kinds_hit": len(hit), **found.to_json(usual)}
    return report, found.holds(usual)


def at_random(
    place: Place, states: dict[str, Path], rounds: int, seed: int, until: float
) -> tuple[dict[str, Any], bool]:
    """Kill one of three runs that share everything, or all; what is left stays for the next two rounds."""
    usual = 0.0
    for _ in range(2):  # the first compiles what it imports
        copied(states["old"], place)
        start = time.perf_counter()
        started(place, "report0", 0).wait()
        usual = time.perf_counter() - start
    found, rng = Found(), random.Random(seed)
    for number in range(rounds):
        if time.monotonic() > until:
            break
        if number % 3 == 0:
            copied(states[rng.choice(list(states))], place)
        place.empty_log()
        runs = [started(place, f"report{index}", workers) for index, workers in enumerate((0, 0, 2))]
        time.sleep(rng.uniform(0.2, 1.5) * usual)
        killed = rng.sample(runs, rng.choice((1, 3)))
        for run in killed:
            found.ended_before += run.poll() is not None
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # its workers are of its group, and its builders die with it
                found.kills += 1
                events = [each for each in place.log() if each[0] == f"main-{run.pid}"]
                found.parts[part_of(*events[-1][1:]) if events else "before the first event"] += 1
        for index, run in enumerate(runs):
            ended = Ended(run.wait(), 0, (place.root / f"report{index}.txt").read_text(errors="replace"))
            if run not in killed:
                wrong = verdict_problems(place, ended, f"report{index}")
                found.problems += [f"round {number}: beside one that was killed: {each}" for each in wrong]
        found.look(place, f"round {number}")
        say(f"at random: {number + 1} of {rounds}", found)
    return {"rounds": len(found.seconds), **found.to_json(usual)}, found.holds(usual)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs, and look at what is left.")
    parser.add_argument("--kills", type=int, default=400, help="the most kills at events, one of each kind first")
    parser.add_argument("--rounds", type=int, default=40, help="kills at random moments, of one or three runs each")
    parser.add_argument("--minutes", type=float, default=240.0, help="the longest that it may take, more or less")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import numpy  # noqa: F401 - in the process that all runs are forks of
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401

    start = time.monotonic()
    name = tempfile.mkdtemp(prefix="kills-")  # what cleans up by itself would do so at the end of each fork
    try:
        place = Place.make(Path(name, "shared"))
        states = {"new": kept(place, Path(name, "new"))}
        ended = forked(place)
        if wrong := list(verdict_problems(place, ended)):
            raise SystemExit("\n".join(wrong))
        for module in (place.root.parent / "loaded").read_text().split():
            importlib.import_module(module)
        place.age()
        place.forget()
        place.age()
        states["old"] = kept(place, Path(name, "old"))
        events, events_hold = at_each_event(place, states, given.kills, given.seed, start + 45 * given.minutes)
        moments, moments_hold = at_random(place, states, given.rounds, given.seed, start + 60 * given.minutes)
    finally:
        shutil.rmtree(name)
    holds: bool | None = events_hold and moments_hold
    if holds and events["kinds_hit"] < 0.9 * events["kinds_of_events"]:
        holds = None  # too few for the limits to mean anything
    reports.keep(
        {
            "benchmark": "kills",
            "seed": given.seed,
            "at_each_event": events,
            "at_random_moments": moments,
            "limits": {"problems": 0, "temporary_after_next_run": 0, "next_run": "3 times an undisturbed one and 10 s"},
            "within_limits": holds,
            "versions": {name: version(name) for name in ("pytest", "onnxruntime", "tensorrt-rtx", "filelock")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        },
        given.json,
    )


if __name__ == "__main__":
    main()
