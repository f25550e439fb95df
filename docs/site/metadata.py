"""What a package says of itself that follows from one setting: `repository` in pyproject.toml.

Hatchling loads this file as it builds (`[tool.hatch.metadata.hooks.custom]`), alone: what it shares with the site is
read from beside it.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # the site and the tests only ask for addresses
    MetadataHookInterface = object  # type: ignore[assignment,misc,unused-ignore]

ROOT = Path(__file__).resolve().parents[2]


def setting(name: str) -> str:
    """An address of the project's own, from the one table that has them; empty where it is not known yet."""
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.hatch.metadata.hooks.custom]")[2]
    found = re.search(rf'^{name} = "([^"]*)"', table.partition("\n[")[0], re.MULTILINE)
    return found[1].rstrip("/") if found else ""


def in_repository(path: str, repository: str | None = None, version: str = "HEAD") -> str | None:
    """The address of a file of the repository; None where nobody knows the repository's."""
    repository = setting("repository") if repository is None else repository
    return f"{repository}/blob/{version}/{path}" if repository else None


def description(readme: str, repository: str, version: str) -> str:
    """README for a package index, which has no files beside it: links are absolute, or, without an address, text."""
    shared = runpy.run_path(str(Path(__file__).with_name("links.py")))

    def address(target: str) -> str | None:
        if target.startswith("#") or shared["is_elsewhere"](target):
            return target
        return in_repository(target, repository, version)

    return shared["rewritten"](readme, address)  # type: ignore[no-any-return]


def urls(repository: str, documentation: str, version: str) -> dict[str, str]:
    """The project's links, as far as they are known; each version has its own documentation."""
    known = {"Documentation": f"{documentation}/{version}" if documentation else ""}
    if repository:
        changelog = f"{repository}/blob/HEAD/CHANGELOG.md"
        known |= {"Repository": repository, "Issues": f"{repository}/issues", "Changelog": changelog}
    return {name: address for name, address in known.items() if address}


class AddressesHook(MetadataHookInterface):
    """Fills in what pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """README and the project's links, with the addresses that are known."""
        repository, documentation = setting("repository"), setting("documentation")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        text = description(readme, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(repository, documentation, metadata["version"])
