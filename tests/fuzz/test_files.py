"""Files that somebody may have spoilt: a reader gives what is in them, or its documented error."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.access.key_file import read_keys
from streamfill.access.keys import KeyLimits, new_key
from streamfill.config import RouterConfig, ServerConfig, load_cluster_file, load_process_file
from streamfill.curve.keys import CLIENT_PUBLIC, create_keys, read_connect_keys, read_listen_keys
from streamfill.errors import ConfigError, StreamfillError, TraceError
from streamfill.observability.metrics_token import read_token
from streamfill.profiling.profile_file import load_profile
from streamfill.tls import TlsFiles, TlsOptions, read_tls
from streamfill.traces.files import TraceReader
from streamfill.traces.importers.bad_rows import BadRowError
from streamfill.traces.importers.convert import ImportJob, ImportSummary, import_trace
from streamfill.traces.importers.interface import ImportFormat, ImportOptions
from streamfill.traces.importers.registry import FORMATS
from tests.fuzz.bounds import FILE_FLOOR_BYTES, bounded_memory, examples
from tests.fuzz.strategies import altered, encodable, hostile

ROOT = Path(__file__).parents[2]
TLS_OPTIONS = TlsOptions(cert_file="cert", key_file="key", ca_file="ca")
TRACE = b"""{"type":"header","schema":1,"name":"t"}
{"type":"document","id":"d","text":"a text"}
{"type":"request","id":"a","arrival_ms":0,"mode":"append","output_tokens":3,"segments":[{"offset_ms":0,"text":"abc"}]}
{"type":"request","id":"b","arrival_ms":5,"mode":"update","output_tokens":3,"segments":[{"offset_ms":0,"document_ids":["d"]}]}
"""


def profile_sample() -> bytes:
    curve = {"coefficients": {"fixed_s": 0.1, "per_byte_s": 1e-9, "per_token_s": 1e-5}}
    curves = dict.fromkeys(("recompute", "swap_out", "swap_in"), curve)
    return msgspec.json.encode({"format": 1, "model": "m", "device_type": "cpu", "curves": curves})


def key_sample() -> bytes:
    entries = [new_key(name, limits=KeyLimits(max_streams=3))[1] for name in ("a", "b")]
    return b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)


def read_cluster(path: Path) -> object:
    return load_cluster_file(path)


def read_trace(path: Path) -> object:
    with TraceReader(path) as reader:
        return list(reader)


READERS: dict[str, tuple[Callable[[Path], object], list[bytes], type[StreamfillError]]] = {
    "cluster.toml": (
        read_cluster,
        [
            (ROOT / "deploy" / "local.toml").read_bytes(),
            b'name = "a"\n[prefill]\ncount = 2\npolicy_options = { order = "newest" }\n',
        ],
        ConfigError,
    ),
    "router.json": (
        lambda path: load_process_file(RouterConfig, path),
        [b'{"model_path": "m", "host": "h", "grpc_port": 1, "zmq_port": 2, "http_port": null}'],
        ConfigError,
    ),
    "server.json": (
        lambda path: load_process_file(ServerConfig, path),
        [
            b'{"role": "prefill", "server_id": "p", "model_path": "m", "router_endpoint": "e",'
            b' "controller_endpoint": null, "sglang": {"a": 1}}'
        ],
        ConfigError,
    ),
    "keys.jsonl": (lambda path: read_keys(path, "o"), [key_sample()], ConfigError),
    "profile.json": (
        lambda path: load_profile(path).cost_model(),
        [profile_sample()],
        ConfigError,
    ),
    "token": (read_token, [b"0123456789abcdef0123\n"], ConfigError),
    "trace.jsonl": (read_trace, [TRACE], TraceError),
    "trace.jsonl.gz": (
        read_trace,
        [gzip.compress(TRACE)],
        TraceError,
    ),
}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@examples(50)
def test_readers(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bytes that are none of it, or nearly it."""
    read, samples, error = READERS[name]
    path = tmp_path / name
    raw = data.draw(hostile(samples))
    path.write_bytes(raw)
    with bounded_memory(len(raw), FILE_FLOOR_BYTES):
        check(read, path, error)


@pytest.mark.parametrize("name", ["router.json", "server.json", "profile.json"])
@pytest.mark.parametrize("raw", [b'"\x80"', b'{"\x80":', b"[" * 200_000, b'{"a":' * 100_000])
def test_json_that_is_no_text_or_too_deep(tmp_path: Path, name: str, raw: bytes) -> None:
    """Is a wrong file like any other."""
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"is no valid JSON|is no cost profile"):
        READERS[name][0](path)


@pytest.mark.parametrize("name", ["router.json", "server.json", "profile.json"])
@given(data=st.data())
@examples(50)
def test_other_fields(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """JSON whose fields are something else."""
    read, samples, error = READERS[name]
    raw = encodable(
        msgspec.json.encode, data.draw(altered([msgspec.json.decode(each) for each in samples]))
    )
    if raw is not None:
        path = tmp_path / name
        path.write_bytes(raw)
        check(read, path, error)


IMPORTS: dict[str, list[bytes]] = {
    "stream2llm-anns": [
        b"StartTime_us,EndTime_us,StartIteration,EndIteration,PipelinePool\n"
        b'1000,3000,0,4,"(11,22)"\n3000,3500,4,5,"(22,11,33)"\n',
        b'{"11": "a text", "22": "another"}',
        b'{"3": {"query": "Who?", "trace_file": "input.csv"}}',
    ],
    "stream2llm-crawler": [
        b"type,query,content,startTime,endTime\n"
        b'tavily_search,Who?,,0.25,1.5\npage_scrape,,"late, ""quoted""\nline",1.5,3.75\n'
    ],
    "mooncake": [
        b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n' * 2
    ],
    "burstgpt": [
        b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        b"5,ChatGPT,472,18,490,Conversation log\n"
    ],
    "azure": [
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n",
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n",
    ],
    "openai-messages": [b'{"messages": [{"role": "user", "content": "Hi"}], "created": 3}\n'],
}


def imported(format: ImportFormat, source: Path, *, skip_bad: bool) -> ImportSummary:
    """The file as a trace."""
    return import_trace(
        ImportJob(
            format=format,
            paths=(source,),
            output=source.with_name("out.jsonl"),
            name="t",
            seed=0,
            limit=None,
            skip_bad=skip_bad,
            # Of one format only: the same file is everything that it reads.
            options=ImportOptions(request_rate=1.0, corpus=(source,), queries=source),
        )
    )


def source_of(folder: Path, samples: list[bytes], raw: bytes) -> Path:
    path = folder / f"input.{'jsonl' if samples[0].startswith(b'{') else 'csv'}"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", [name for name in IMPORTS if name != "stream2llm-anns"])
def test_samples_are_good(tmp_path: Path, name: str) -> None:
    """So that what is fuzzed comes further than the first line."""
    format = next(each for each in FORMATS if each.name == name)
    for sample in IMPORTS[name]:
        found = imported(format, source_of(tmp_path, IMPORTS[name], sample), skip_bad=False)
        assert found.num_requests > 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
@given(data=st.data())
@examples(40)
def test_importers(tmp_path: Path, format: ImportFormat, data: st.DataObject) -> None:
    """Files of other projects, with bad rows refused or passed over."""
    samples = IMPORTS[format.name]
    path = source_of(tmp_path, samples, data.draw(hostile(samples)))
    skip_bad = data.draw(st.booleans())
    check(lambda source: imported(format, source, skip_bad=skip_bad), path, TraceError)


@pytest.mark.parametrize(
    "line",
    [
        b"0\x00",
        b'{"timestamp": 0, "input_length": 1, "output_length": 1,'
        b' "hash_ids": ["x"], "hash_ids": []}',
        b"[" * 100_000,
    ],
)
def test_json_lines_whose_place_is_not_where_it_seems(tmp_path: Path, line: bytes) -> None:
    """Wrong before their end, and wrong as JSON behind it; or wrong in a name that is there twice;
    or without end: a bad row as others."""
    path = source_of(tmp_path, IMPORTS["mooncake"], IMPORTS["mooncake"][0] + line + b"\n")
    format = next(each for each in FORMATS if each.name == "mooncake")
    with pytest.raises(BadRowError, match="line 3"):
        imported(format, path, skip_bad=False)
    assert imported(format, path, skip_bad=True).num_requests == 2


@given(data=st.data())
@examples(40)
def test_zmq_keys(tmp_path: Path, data: st.DataObject) -> None:
    """A public key that was changed is another key, or none; nothing else happens."""
    folder = tmp_path / "keys"
    if not folder.exists():
        create_keys(folder)
    path = folder / CLIENT_PUBLIC
    path.write_bytes(data.draw(hostile([b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7\n"])))
    check(lambda _: read_listen_keys(str(folder)), folder, ConfigError)
    check(lambda _: read_connect_keys(str(folder)), folder, ConfigError)


PEM = b"-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUQ0\n-----END CERTIFICATE-----\n"


@given(data=st.data())
@examples(40)
def test_tls_files(tmp_path: Path, data: st.DataObject) -> None:
    """No PEM is read, and nothing is asked on the terminal."""
    path = tmp_path / "file.pem"
    path.write_bytes(data.draw(hostile([PEM])))
    for files in (TlsFiles(ca_file=str(path)), TlsFiles(cert_file=str(path), key_file=str(path))):
        check(partial(_read_tls, files), path, ConfigError)


def _read_tls(files: TlsFiles, _: Path) -> object:
    return read_tls(files, TLS_OPTIONS)


def check(read: Callable[[Path], object], path: Path, error: type[StreamfillError]) -> None:
    """It gives something, or its documented error with a reason."""
    said = "nothing"
    try:
        read(path)
    except error as found:
        said = str(found)
    assert said.strip()
