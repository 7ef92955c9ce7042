"""What docs/traces.md says about the format and the shipped traces holds."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from streamfill.traces.files import read_requests
from streamfill.traces.format import Request, Segment, TraceHeader

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")


def table_fields(heading: str) -> set[str]:
    """The first column of the table below a heading."""
    part = PAGE.split(f"### {heading}", 1)[1].split("\n#", 1)[0]
    return set(re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE))


def test_the_example_is_a_trace(tmp_path: Path) -> None:
    """The example can be copied into a file and read."""
    example = re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert example is not None
    path = tmp_path / "example.jsonl"
    path.write_text(example[1], encoding="utf-8")
    assert [request.id for request in read_requests(path)] == ["q0", "q1"]


def test_every_field_is_explained() -> None:
    """The tables have the fields of the format, all of them and no other."""
    assert table_fields("The header") == set(TraceHeader.__struct_fields__)
    assert table_fields("A request") == set(Request.__struct_fields__)
    assert table_fields("A segment") == set(Segment.__struct_fields__) - {"delay_ms"}


def test_every_kind_of_content_has_an_example() -> None:
    """The examples of the table of contents are segments of that kind."""
    rows = re.findall(r'^\| `(\w+)` \| `(\{".*?\})` \|', PAGE, flags=re.MULTILINE)
    assert len(rows) == 6
    for field, example in rows:
        segment = msgspec.json.decode(example, type=Segment)
        assert getattr(segment, field) is not None


@pytest.mark.parametrize("name", ["crawl-small", "ann-small"])
def test_figures_of_the_shipped_traces(name: str) -> None:
    """The published table has the mean number of segments that the file has."""
    requests = list(read_requests(ROOT / "traces" / f"{name}.jsonl"))
    mean = sum(len(request.segments) for request in requests) / len(requests)
    assert f"| `{name}`, {len(requests)} requests |" in PAGE
    part = PAGE.split(f"| `{name}`, ", 1)[1]
    row = re.search(r"\| segments \| ([\d.]+) \|", part)
    assert row is not None
    assert float(row[1]) == pytest.approx(mean, abs=0.006)
