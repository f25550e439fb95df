"""How Sphinx draws the site; `python -m docs.site` stages the pages that it reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest_trtcheck

_HERE = Path(__file__).parent

project = "pytest-trtcheck"
author = "The pytest-trtcheck developers"
project_copyright = author
version = release = pytest_trtcheck.__version__

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["site"]
# As code hosts do: a heading's anchor is its text, and a web address is a link.
myst_heading_anchors = 6
myst_enable_extensions = ["linkify"]
myst_linkify_fuzzy_links = False
# Flags keep both of their dashes.
smartquotes = False
# What a block needs or prints stands in its info string, and shell sessions are read by people.
suppress_warnings = ["misc.highlighting_failure"]
# Only commands are copied from a console, without prompt and output.
copybutton_prompt_text = "$ "
copybutton_copy_empty_lines = False

html_theme = "pydata_sphinx_theme"
html_title = f"pytest-trtcheck {version}"
html_static_path = [str(_HERE / "static")]
html_css_files = ["site.css"]
templates_path = [str(_HERE / "templates")]
html_copy_source = html_show_sourcelink = False
html_sidebars = {"**": ["contents.html"]}
html_theme_options = {
    "logo": {"text": "pytest-trtcheck"},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "navigation_depth": 3,
    "show_toc_level": 2,
    "footer_start": ["sphinx-version"],
    "footer_end": [],
    "search_as_you_type": True,
}
# Where a release publishes, versions lie side by side, and each knows of the others. Elsewhere nothing is asked for.
if _versions := os.environ.get("DOCS_VERSIONS"):
    html_theme_options |= {
        "switcher": {"json_url": _versions, "version_match": os.environ.get("DOCS_VERSION", version)},
        "check_switcher": False,
        "navbar_end": ["version-switcher", "theme-switcher"],
        "show_version_warning_banner": True,
    }
