"""What is in an HTML page: its title, headings, main text and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urldefrag, urljoin

_HEADINGS: Final = "//h1|//h2|//h3"
_ANCHOR_SIGNS: Final = "¶#§"
"""Stand behind a heading as a link to itself."""
_NUMBERING: Final = re.compile(r"^(\d+\.)+\s*")
_SPACE: Final = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class ExtractedPage:
    """
    Attributes:
        title: the first heading of the first level, else the title of the page.
        headings: without numbering, in their order.
        text: main text without navigation and title, a block per line; may be empty.
        links: absolute URLs without fragment, each once, in their order.
    """

    url: str
    title: str
    headings: tuple[str, ...]
    text: str
    links: tuple[str, ...]


def extract_page(url: str, body: bytes) -> ExtractedPage:
    """Reads a page. What is no HTML gives an empty page."""
    import trafilatura

    tree: Any = trafilatura.load_html(body)
    if tree is None:
        return ExtractedPage(url=url, title=url, headings=(), text="", links=())
    headings = tuple(filter(None, (_clean(node.text_content()) for node in tree.xpath(_HEADINGS))))
    named = [_clean(node.text_content()) for node in (*tree.xpath("//h1"), *tree.xpath("//title"))]
    links = dict.fromkeys(filter(None, (_absolute(url, href) for href in tree.xpath("//a/@href"))))
    # Last: it takes the tree apart.
    text = trafilatura.extract(tree, include_comments=False, include_tables=False) or ""
    text = re.sub(r"¶$", "", text, flags=re.MULTILINE)
    title = next(filter(None, named), url)
    first_line, _, rest = text.partition("\n")
    return ExtractedPage(
        url=url,
        title=title,
        headings=headings,
        text=rest if _clean(first_line) == title else text,
        links=tuple(links),
    )


def _absolute(base: str, href: str) -> str | None:
    try:
        return urldefrag(urljoin(base, href)).url
    except ValueError:
        # A host that is no host, such as "http://[x".
        return None


def _clean(text: str) -> str:
    text = _SPACE.sub(" ", text).strip().rstrip(_ANCHOR_SIGNS).strip()
    return _NUMBERING.sub("", text)
