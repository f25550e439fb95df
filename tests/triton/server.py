"""A real Triton server on a model repository: the binary that the PyPI package nvidia-pytriton bundles, on the CPU.

`TRITON_SERVER_PYTHON` names the Python of a virtual environment that has it. `python tests/triton/server.py FOLDER`
makes one, with Debian's Python, whose shared library the server's Python backend needs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE = "TRITON_SERVER_PYTHON"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime>=1.21")
_READY_S = 90.0


def why_not() -> str | None:
    """Why no server can be started; None where one can."""
    python = os.environ.get(VARIABLE)
    if not python:
        return f"{VARIABLE} names no Python with nvidia-pytriton: tox -e triton does"
    return None if _package(Path(python)).is_dir() else f"{VARIABLE}={python} has no nvidia-pytriton"


def _package(python: Path) -> Path:
    (site,) = python.parent.parent.glob("lib/python3.*/site-packages")
    return site / "pytriton"


class Server:
    """A server while the block lasts. A model that does not load keeps no other from being served.

    Parameters
    ----------
    repository
        The folder of its models.
    work
        Where the server's files are put.
    arguments
        Further ones of the server.
    """

    def __init__(self, repository: Path, work: Path, *arguments: str) -> None:
        self._repository = repository
        self._arguments = arguments
        self._log = work / "server.log"
        package = _package(Path(os.environ[VARIABLE]))
        version = package.parent.parent.name.removeprefix("python")
        backend = work / "backends" / "python"
        shutil.copytree(package / "tritonserver" / "backends" / "python", backend)
        stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, backend)
        self._binary = package / "tritonserver" / "bin" / "tritonserver"
        self._libraries = package.parent / "nvidia_pytriton.libs"
        self._backends = work / "backends"
        self.ports = _free_ports(3)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.ports[1]}"

    @property
    def log(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Server:
        bin_folder = Path(os.environ[VARIABLE]).parent
        ports = zip(("http", "grpc", "metrics"), self.ports, strict=True)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    self._binary,
                    f"--model-repository={self._repository}",
                    f"--backend-directory={self._backends}",
                    "--exit-on-error=false",
                    "--strict-readiness=false",
                    *self._arguments,
                    *(f"--{name}-port={port}" for name, port in ports),
                    *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "LD_LIBRARY_PATH": str(self._libraries),
                    "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
                },
            )
        until = time.monotonic() + _READY_S
        while not self._is_live():
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError(f"the server did not start:\n{self.log[-4000:]}")
            time.sleep(0.05)
        return self

    def _is_live(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http}/v2/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def make_environment(folder: Path) -> Path:
    """A virtual environment with the server; its Python."""
    python = os.environ.get("TRITON_SYSTEM_PYTHON", "/usr/bin/python3")
    found = folder / "bin" / "python"
    if not found.exists() or not _package(found).is_dir():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([found, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return found


def main(arguments: Sequence[str]) -> None:
    """Make the environment in the folder named first, and run what is named behind it with the variable set."""
    python = make_environment(Path(arguments[0]).absolute())
    if arguments[1:]:
        sys.exit(subprocess.run(arguments[1:], check=False, env={**os.environ, VARIABLE: str(python)}).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
