"""docs/status_page.md names what there is and the numbers that are in force."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from router.http import status
from router.watch import hub, timeline, wish
from router.watch.frames import Frame, StreamChange

PAGE = (Path(__file__).parents[3] / "docs" / "status_page.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())


@pytest.mark.parametrize(
    "words",
    [
        status.EVENTS_PATH,
        *(f"`{each}`" for each in (*wish.Show, *wish.Sort)),
        *(f"`{field.name}`" for field in msgspec.structs.fields(status.StatusQuery)),
        f"up to {wish.MAX_SEARCH_CHARS} characters",
        f"1 to {wish.MAX_LIMIT}, by default {wish.DEFAULT_LIMIT}",
        f"up to {hub.MAX_ENDED} for up to {hub.ENDED_KEPT_S / 60:g} minutes",
        f"At most {hub.MAX_VIEWERS} pages may be open, {hub.MAX_VIEWERS_OF_TENANT} of one tenant",
        f"takes none for {status.SLOW_S:g} s is dropped",
        f"the newest {timeline.MAX_ROWS} segments",
    ],
)
def test_names_and_numbers_are_those_of_the_code(words: str) -> None:
    """Each of the page is the one that is in force."""
    assert words in WORDS


@pytest.mark.parametrize("kind", [Frame, StreamChange])
def test_every_field_of_a_frame_is_named(kind: type[msgspec.Struct]) -> None:
    """The page speaks of all that is sent, but for `id` and the mark of what is new."""
    names = {field.name for field in msgspec.structs.fields(kind)} - {"id", "is_new"}
    assert not [name for name in names if f"`{name}`" not in PAGE]


def test_intervals_are_those_of_the_code() -> None:
    """Two samples a second, schedulers asked once a second at most."""
    assert (hub.SAMPLE_INTERVAL_S, hub.DESCRIBE_INTERVAL_S) == (0.5, 1.0)
    assert "reads all streams twice a second" in WORDS
    assert "once a second at most" in WORDS


def test_a_script_keeps_as_many_rows_as_the_router() -> None:
    """More would be drawn that the router forgot, fewer would be missing."""
    script = (status._FOLDER / "model.js").read_text(encoding="utf-8")
    assert f"const MAX_ROWS = {timeline.MAX_ROWS};" in script
