"""Tasks in worker processes, each a JSON line in and one out: a crash or a hang costs one task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Task = dict[str, Any]


def serve(handle: Callable[[Task], Task]) -> None:
    """The worker's side: answer tasks from stdin until it closes."""
    # TensorRT's libraries print to stdout too; answers go where they can't.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = handle(task)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps({"id": task["id"], **answer}) + "\n")


def request(model: str, plan: str, precision: str, capability: list[int]) -> dict[str, Any]:
    """What the plugin's builder is asked: the engine of this model for the GPU here, or a portable one."""
    options: dict[str, Any] = {
        "plugins": [],
        "tf32": None,
        "workspace_mib": None,
        "optimization_level": None,
        "sparsity": False,
        "version_compatible": False,
        "hardware_compatible": "none",
        "timing_cache": False,
    }
    return {
        "module": "tensorrt_rtx",
        "model": model,
        "plan": plan,
        "precision": precision,
        "options": options,
        "profile": {},
        "timing_cache": None,
        "target": {"compute_capability": capability, "here": True},
    }


def run(
    script: Path,
    tasks: Iterable[Task],
    *,
    processes: int,
    task_s: float,
    deadline: float = float("inf"),
    log: Path = Path(os.devnull),
) -> Iterator[Task]:
    """The answers of all tasks as they come; those not begun by `deadline` (monotonic seconds) are left out.

    `log` gets what the workers print.
    """
    waiting: Queue[Task] = Queue()
    answers: Queue[Task | None] = Queue()
    for task in tasks:
        waiting.put(task)
    threads = [
        threading.Thread(target=_work, args=(_Crew(script, task_s, deadline, log), waiting, answers), daemon=True)
        for _ in range(processes)
    ]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < processes:
        answer = answers.get()
        if answer is None:
            ended += 1
        else:
            yield answer


@dataclass(frozen=True)
class _Crew:
    """What every worker is told."""

    script: Path
    task_s: float
    deadline: float
    log: Path


def _work(crew: _Crew, waiting: Queue[Task], answers: Queue[Task | None]) -> None:
    task_s, deadline = crew.task_s, crew.deadline
    child: subprocess.Popen[str] | None = None
    try:
        while time.monotonic() < deadline:
            try:
                task = waiting.get_nowait()
            except Empty:
                break
            if child is None:
                child = _start(crew.script, crew.log)
            limit = min(task_s, max(deadline - time.monotonic() + 5, 1))
            timer = threading.Timer(limit, child.kill)
            timer.start()
            began = time.monotonic()
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(json.dumps(task) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except OSError:
                line = ""
            timer.cancel()
            took = round(time.monotonic() - began, 3)
            if line:
                answers.put({**json.loads(line), "took_s": took})
            else:
                child.kill()
                code, child = child.wait(), None
                what = f"no answer within {limit:.0f} s" if took >= limit else f"the process ended ({code})"
                answers.put({"id": task["id"], "error": what, "took_s": took})
    finally:
        if child is not None:
            child.kill()
        answers.put(None)


def _start(script: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("a") as sink:
        return subprocess.Popen(
            [sys.executable, str(script), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            bufsize=1,
        )
