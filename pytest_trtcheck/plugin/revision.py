"""Which revision of a repository was tested, for reports that are compared later."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION")
"""Where GitHub, GitLab, Jenkins and Azure say it: in a container, git is often missing or refuses the folder."""
_LONGEST_S = 5


def commit(folder: Path) -> str | None:
    """The commit that is checked out there, with "-dirty" where a file that it tracks was changed; None: not known."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_LONGEST_S, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return next(filter(None, map(os.environ.get, _VARIABLES)), None)
    return found.stdout.strip() or None
