"""Files of runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from streamfill.errors import ConfigError, TraceError
from streamfill.loadgen.environment import Environment, LoadAverage, environment, file_digest
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.run_file import RunFile, SavedRun, read_records, records_path
from streamfill.observability.lifetime import LifetimeEvent
from tests.unit.loadgen.run_builders import client_events, event, failed, record, result

HERE = Environment(cpu="c", num_cores=2, memory_bytes=1, platform="p", versions={"python": "3"})


def saved(run: int = 0) -> SavedRun:
    events = (
        event(LifetimeEvent.OPENED, 0.25),
        event(LifetimeEvent.COMPUTE_DONE, 1.5, segment=1, num_tokens=7),
    )
    records = [record(0, server_events=events, client_events=client_events()), failed(1)]
    return SavedRun(
        result=result(*records, run=run),
        environment=HERE,
        load=LoadAverage(start=0.5, end=1.5),
        config={"seed": 3},
        goodput=Goodput(objectives_ms={"e2e_ms": 1.0}),
    )


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """Runs are appended, also by a second process, and read back equal in their order."""
    path = tmp_path / "runs.jsonl"
    for run in range(2):
        each = saved(run)
        RunFile(path, saves_records=True).add(each, summarise(each.result))
    assert list(read_records(path)) == [saved(0), saved(1)]
    assert list(read_records(records_path(path))) == [saved(0), saved(1)]


def test_lines_have_figures_and_environment(tmp_path: Path) -> None:
    """Each line has the customary keys, the load, the environment and the options."""
    path = tmp_path / "runs.jsonl"
    each = saved()
    RunFile(path, saves_records=False).add(each, summarise(each.result))
    (line,) = (json.loads(text) for text in path.read_text().splitlines())
    assert line["p50_ttft_ms"] == pytest.approx(500)
    assert line["failures"] == {"UNAVAILABLE": 1}
    assert line["load_average"] == {"start": 0.5, "end": 1.5}
    assert line["environment"]["cpu"] == "c"
    assert line["config"] == {"seed": 3}
    assert not records_path(path).exists()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """A file that cannot be written, is missing or is something else is named."""
    with pytest.raises(ConfigError, match="--output-file"):
        RunFile(tmp_path / "no" / "runs.jsonl", saves_records=True)
    with pytest.raises(ConfigError, match="--save-records"):
        list(read_records(tmp_path / "none.jsonl"))
    broken = tmp_path / "x.records.jsonl.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_records(broken))


def test_a_line_that_is_no_run(tmp_path: Path) -> None:
    """The number of the line is in the error."""
    path = tmp_path / "runs.jsonl"
    RunFile(path, saves_records=True).add(saved(), summarise(saved().result))
    with records_path(path).open("ab") as file:
        file.write(gzip.compress(b'{"schema": 2}\n'))
    with pytest.raises(ConfigError, match="line 2 is no run"):
        list(read_records(path))


def test_a_damaged_file(tmp_path: Path) -> None:
    """What cannot be unpacked, or is not UTF-8, is said like any other file that is wrong."""
    path = tmp_path / "runs.records.jsonl.gz"
    packed = bytearray(gzip.compress(b" ".join(b"%d" % number for number in range(9999))))
    packed[100:140] = bytes(each ^ 0x55 for each in packed[100:140])
    path.write_bytes(packed)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_records(path))
    for line in (b'{"config": {"\xff": 1}}', b'{"config": {"a": ' + b"[" * 9999):
        path.write_bytes(gzip.compress(line + b"\n"))
        with pytest.raises(ConfigError, match="line 1 is no run"):
            list(read_records(path))


def test_environment_names_no_folder(tmp_path: Path) -> None:
    """Trace and model are named without their folders; the digest is of the content."""
    trace = tmp_path / "t.jsonl"
    trace.write_bytes(b"abc")
    found = environment(trace=trace, model=str(tmp_path / "SmolLM2"))
    assert (found.trace, found.model) == ("t.jsonl", "SmolLM2")
    assert found.trace_digest == "ba7816bf8f01cfea"
    assert found.num_cores >= 1
    assert found.memory_bytes > 1 << 20
    assert {"python", "streamfill"} <= set(found.versions)
    assert str(tmp_path) not in repr(found)


def test_digest_of_a_missing_file(tmp_path: Path) -> None:
    """A trace that cannot be read is named."""
    with pytest.raises(TraceError, match=r"none\.jsonl: cannot be read"):
        file_digest(tmp_path / "none.jsonl")
