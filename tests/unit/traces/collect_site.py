"""A tiny site in a folder, for tests of collectors: sixteen pages of prose with links."""

from __future__ import annotations

from pathlib import Path

_TOPICS = ("apples", "pears", "plums", "cherries")
_WORKS = ("planting", "pruning", "watering", "harvesting")


def make_site(folder: Path) -> Path:
    """Writes the pages; the first one links to all topics, each topic to its works."""
    folder.mkdir()
    links = "".join(f'<li><a href="{topic}.html">{topic}</a></li>' for topic in _TOPICS)
    (folder / "index.html").write_text(_page("The orchard", f"<ul>{links}</ul>"))
    for topic in _TOPICS:
        links = "".join(f'<p><a href="{topic}-{work}.html">{work}</a></p>' for work in _WORKS)
        (folder / f"{topic}.html").write_text(_page(f"About {topic}", links))
        for work in _WORKS:
            (folder / f"{topic}-{work}.html").write_text(_work_page(topic, work))
    return folder


def _work_page(topic: str, work: str) -> str:
    parts = [f"<h2>{work.title()} {topic} with the best tools</h2>"]
    for number in range(6):
        words = f"When you think of {work}, remember that {topic} need care number {number}. "
        parts.append(f"<p>{words * 2}The {work} of {topic} is described in books of the year.</p>")
    return _page(f"{work.title()} {topic}", "".join(parts))


def _page(title: str, body: str) -> str:
    return (
        f"<html><head><title>{title}</title></head><body><main><article><h1>{title}</h1>"
        f"{body}</article></main></body></html>"
    )
