"""Run example_project as its user would: its tests, and once more to see TensorRT engines built without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def pytest(*arguments: str) -> None:
    """Show and run one command of the user's; end with its exit status when it fails."""
    print(f"\n$ python -m pytest {' '.join(arguments)}\n", flush=True)
    if status := subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode:
        sys.exit(status)


def main(arguments: list[str]) -> None:
    """Judge on this machine; where there is no GPU, also build for one that is elsewhere."""
    pytest(*arguments)
    if any(Path("/dev").glob("nvidia[0-9]*")):
        print("\nThis machine has a GPU: the engines were built for it above.")
    else:
        pytest("--trt-gpu=A100", *arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
