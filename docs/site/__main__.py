"""Build the site: `python -m docs.site OUT`. A warning, a broken link among them, fails it.

The pages are plain Markdown that reads as well on a code host. What a site needs besides is made here, in a folder
beside OUT: README becomes the home page, the lists of docs/README.md become the navigation, and links lead to the pages
of the site; what is no page of it is linked in the repository, where that is known, and is plain text elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from docs.site import links, metadata

CONTENTS = "docs/README.md"
PAGES = {
    "README.md": "index.md",
    CONTENTS: "contents.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
    "example_project/README.md": "example.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Where pages of the repository lie on the site; one below docs/ lies where it lies there."""

_TITLED = re.compile(r'^(`{3,})(\w+) title="([^"\n]+)"[ \t]*$', re.MULTILINE)

_LOADED = re.compile(r'(?:\bsrc|<link\b[^>]*\bhref)="((?:https?:)?//[^"]+)"')
"""What a browser asks for without being told to; a site is read offline, too."""


def place(path: str) -> str | None:
    """Where a file of the repository lies on the site; None: it is no part of it."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def staged(path: str) -> str:
    """A page as the site has it."""

    def address(target: str) -> str | None:
        if target.startswith("#") or links.is_elsewhere(target):
            return target
        file, anchor = links.resolved(path, target)
        to, anchor = place(file), f"#{anchor}" if anchor else ""
        if to is None or (links.ROOT / file).is_dir():
            return metadata.in_repository(file + anchor)
        return os.path.relpath(to, Path(place(path) or "").parent).replace(os.sep, "/") + anchor

    text = links.rewritten((links.ROOT / path).read_text(encoding="utf-8"), address)
    # A block that is a file is shown with its name.
    return _TITLED.sub(r"\1{code-block} \2\n:caption: \3\n", text)


def navigation() -> str:
    """The contents as Sphinx wants them: for every heading of docs/README.md the pages that its list links."""
    trees = []
    for section in re.split(r"^## ", staged(CONTENTS), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        linked = {link.target: link.text.replace("`", "") for link in links.links(text) if link.target.endswith(".md")}
        entries = [f"{text[:1].upper()}{text[1:]} <{page.removesuffix('.md')}>" for page, text in linked.items()]
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {title.strip()}\n\n{chr(10).join(entries)}\n```\n")
    return "\n".join(trees)


def main(out: Path) -> int:
    """Stage and build; the exit status."""
    work = out.with_name(f"{out.name}-pages")
    for each in (work, out):
        shutil.rmtree(each, ignore_errors=True)
    shutil.copytree(links.ROOT / "docs", work, ignore=shutil.ignore_patterns("site", "*.md", "__pycache__"))
    for path in links.pages():
        if (to := place(path)) is not None:
            (work / to).parent.mkdir(parents=True, exist_ok=True)
            (work / to).write_text(staged(path), encoding="utf-8")
    with (work / "index.md").open("a", encoding="utf-8") as home:
        home.write(f"\n{navigation()}")
    # The sidebar shows it on every page.
    contents = work / PAGES[CONTENTS]
    contents.write_text(f"---\norphan: true\n---\n\n{contents.read_text(encoding='utf-8')}", encoding="utf-8")
    trees, here = out.with_name(f"{out.name}-trees"), Path(__file__).parent
    status: int = sphinx(["-W", "--keep-going", "-q", "-c", str(here), "-d", str(trees), str(work), str(out)])
    asked = {found for page in out.rglob("*.html") for found in _LOADED.findall(page.read_text(encoding="utf-8"))}
    for address in sorted(asked):
        print(f"a page would load {address} from another host")
    return status or int(bool(asked))


if __name__ == "__main__":
    status = main(Path(sys.argv[1]).resolve())
    print("the site could not be built as it stands" if status else f"the site is in {sys.argv[1]}")
    sys.exit(status)
