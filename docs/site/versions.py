"""The site of a release beside those of earlier ones: `python -m docs.site.versions SITE PAGES VERSION`.

PAGES is the folder that is served. Every version has a folder of its own there; `versions.json` is what the sites' menu
reads, and the first page leads to the newest one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from docs.site import metadata

MENU = "versions.json"


def add(site: Path, pages: Path, version: str, address: str) -> None:
    """Put a site beside the others, in the place of an earlier one of its version."""
    shutil.rmtree(pages / version, ignore_errors=True)
    shutil.copytree(site, pages / version)
    found = sorted((each.name for each in pages.iterdir() if re.match(r"\d", each.name)), key=_order, reverse=True)
    newest = found[0]
    menu: list[dict[str, object]] = [{"name": each, "version": each, "url": f"{address}/{each}/"} for each in found]
    menu[0] |= {"name": f"{newest} (newest)", "preferred": True}
    (pages / MENU).write_text(json.dumps(menu, indent=1), encoding="utf-8")
    refresh = f'<!doctype html>\n<meta http-equiv="refresh" content="0; url={newest}/">\n'
    (pages / "index.html").write_text(f'{refresh}<a href="{newest}/">pytest-trtcheck {newest}</a>\n', encoding="utf-8")
    # GitHub's pages would leave out what begins with an underscore.
    (pages / ".nojekyll").touch()


def listed(pages: Path) -> list[dict[str, object]]:
    """What the menu shows, the newest first."""
    return list(json.loads((pages / MENU).read_text(encoding="utf-8")))


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    source, target, name = sys.argv[1:]
    add(Path(source), Path(target), name, metadata.setting("documentation"))
