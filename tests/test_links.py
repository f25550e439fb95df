"""Links in the pages lead somewhere, wherever they are read: on a code host, on the site, on a package index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from docs.site import links, metadata

if TYPE_CHECKING:
    from pathlib import Path

CONTENTS = "docs/README.md"


@pytest.mark.parametrize("page", links.pages())
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    assert links.broken(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "other.md").write_text("# Here `it` is: now\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = """[a](../other.md#here-it-is-now) [b](../other.md#twice-1) [c](https://example.org/x) `[code](gone.md)`
[`d`](../other.md#no-heading) [e
f](gone.md) ![g](gone.png) [h](#gone) [i](../../outside.md) <!-- [j](gone.md) -->

```text
[k](gone.md)
```
"""
    (tmp_path / "docs/page.md").write_text(page)
    assert links.broken("docs/page.md", tmp_path) == [
        "docs/page.md:2: [`d`](../other.md#no-heading): other.md has no heading or anchor #no-heading",
        "docs/page.md:2: [e\nf](gone.md): there is no docs/gone.md",
        "docs/page.md:3: [g](gone.png): there is no docs/gone.png",
        "docs/page.md:3: [h](#gone): docs/page.md has no heading or anchor #gone",
        "docs/page.md:3: [i](../../outside.md): there is no ../outside.md",
    ]


def test_the_contents_list_every_page_once() -> None:
    text = (links.ROOT / CONTENTS).read_text(encoding="utf-8").partition("\n## ")[2]
    listed = [links.resolved(CONTENTS, link.target)[0] for link in links.links(text)]
    assert len(listed) == len(set(listed))
    assert {page for page in links.pages() if page.startswith("docs/")} - {CONTENTS} <= set(listed)


README = """# P

[what it does](docs/a.md#b) and [more
of it](CHANGELOG.md), [elsewhere](https://example.org/y), [below](#p)

```python
x = [f](docs/a.md)
```
"""


def test_a_description_has_absolute_links_where_the_repository_is_known() -> None:
    absolute = metadata.description(README, "https://example.org/o/r", "v1.2.3")
    assert [link.target for link in links.links(absolute)] == [
        "https://example.org/o/r/blob/v1.2.3/docs/a.md#b",
        "https://example.org/o/r/blob/v1.2.3/CHANGELOG.md",
        "https://example.org/y",
        "#p",
    ]
    assert "x = [f](docs/a.md)" in absolute


def test_a_description_has_no_broken_link_where_it_is_not_known() -> None:
    text = metadata.description(README, "", "v1.2.3")
    assert [link.target for link in links.links(text)] == ["https://example.org/y", "#p"]
    assert "what it does and more\nof it, [elsewhere]" in text


def test_the_metadata_names_the_addresses_that_are_known() -> None:
    assert metadata.urls("", "", "1.2.3") == {}
    known = metadata.urls("https://example.org/o/r", "https://example.org/docs", "1.2.3")
    # Beneath it, messages find the page of their error's code.
    assert known["Documentation"] == "https://example.org/docs/1.2.3"
    assert known["Repository"] == "https://example.org/o/r"
