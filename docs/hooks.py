"""CONTRIBUTING.md is a page of the site too: its links, which begin at the repository's root, are made relative."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's text; for the contributing page, CONTRIBUTING.md with links into `docs/`."""
    if page.file.src_uri != "contributing.md":
        return markdown
    with open("CONTRIBUTING.md", encoding="utf-8") as file:
        return file.read().replace("](docs/", "](")
