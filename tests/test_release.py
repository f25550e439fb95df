"""What must hold of a release: one version, a changelog, workflows that run what there is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_trtcheck
from docs.site import compatibility, versions

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2026-11-27

### Added

- Something.

## [1.2.2] - 2026-10-01

- Something else.
"""


@pytest.fixture(scope="module")
def unready() -> Callable[[str, str, str], list[str]]:
    return runpy.run_path(str(ROOT / ".ci/check_package.py"))["unready"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", []),
        ("[1.2.3]", "[1.2.4]", ["CHANGELOG.md has no section [1.2.3]"]),
        (" - 2026-11-27", "", ["CHANGELOG.md: the section [1.2.3] has no date, as in ## [1.2.3] - 2026-11-27"]),
        ("- Something.\n", "", ["CHANGELOG.md: the section [1.2.3] is empty"]),
        (
            "## [Unreleased]\n",
            "## [Unreleased]\n\n- More.\n",
            ["CHANGELOG.md: what stands under [Unreleased] belongs to the release"],
        ),
    ],
)
def test_a_release_needs_its_section_of_the_changelog(
    old: str, new: str, said: list[str], unready: Callable[[str, str, str], list[str]]
) -> None:
    assert unready("v1.2.3", "1.2.3", CHANGELOG.replace(old, new) if old else CHANGELOG) == said


def test_a_release_needs_the_tag_of_its_version(unready: Callable[[str, str, str], list[str]]) -> None:
    assert unready("v1.2.4", "1.2.3", CHANGELOG) == ["the tag v1.2.4 is not that of version 1.2.3"]


def test_the_version_stands_in_one_place() -> None:
    assert "version" in compatibility.project()["project"]["dynamic"]
    assert compatibility.project()["tool"]["hatch"]["version"] == {"path": "pytest_trtcheck/__init__.py"}
    version = re.escape(pytest_trtcheck.__version__)
    for path in ("pyproject.toml", "CITATION.cff", "tox.ini", "docs/site/conf.py"):
        assert not re.search(rf'version[^\n]*"{version}"', (ROOT / path).read_text(encoding="utf-8"))


def test_the_changelog_has_a_section_for_what_comes_next() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_environments_that_exist(workflow: Path) -> None:
    asked = re.findall(r"tox -e ([\w,-]+)", workflow.read_text(encoding="utf-8"))
    known = {section.removeprefix("testenv:") for section in compatibility.environments().sections()}
    assert asked
    assert {name for names in asked for name in names.split(",")} <= known | {"tests"}


def test_the_workflow_runs_what_ci_runs() -> None:
    """All but what needs the system's own Python, and the part for the oldest one, which has the whole suite there."""
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"environment: \[([^\]]+)\]", text)
    run = {name for names in re.findall(r"tox -e ([\w,-]+)", text) for name in names.split(",")}
    assert compatibility.in_ci() <= run | set(matrix.split(", ")) | {"triton", "py310"}


def test_versions_of_the_documentation_lie_side_by_side(tmp_path: Path) -> None:
    site, pages = tmp_path / "site", tmp_path / "pages"
    for version in ("0.9.0", "0.10.0", "0.9.1"):
        site.mkdir(exist_ok=True)
        (site / "index.html").write_text(version)
        versions.add(site, pages, version, "https://example.org/docs")
    assert (pages / "0.9.1/index.html").read_text() == "0.9.1"
    listed = versions.listed(pages)
    assert [(each["version"], each["url"], each.get("preferred", False)) for each in listed] == [
        ("0.10.0", "https://example.org/docs/0.10.0/", True),
        ("0.9.1", "https://example.org/docs/0.9.1/", False),
        ("0.9.0", "https://example.org/docs/0.9.0/", False),
    ]
    assert 'url=0.10.0/"' in (pages / "index.html").read_text()
    # Built again, a version replaces itself.
    (site / "index.html").write_text("mended")
    versions.add(site, pages, "0.9.0", "https://example.org/docs")
    assert (pages / "0.9.0/index.html").read_text() == "mended"
    assert len(versions.listed(pages)) == 3
