"""The checked-in stubs and what importing the API costs."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from streamfill.api import generate
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.types import (
    ClusterInfo,
    Metadata,
    PolicyResult,
    Progress,
    SamplingOptions,
    Server,
    ServerStreams,
    StreamDecision,
    Usage,
)
from streamfill.errors import ErrorCode
from streamfill.messages import common
from streamfill.messages.common import Sampling

IMPORT_TIMEOUT_S = 60.0


def test_the_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        checked_in = (generate.SOURCE_ROOT / name).read_text(encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") == checked_in, (
            f"run `make proto`: {name}"
        )


def test_everything_in_the_proto_file_is_commented() -> None:
    """The file is the API's documentation; only the names of gRPC's own codes say all."""
    lines = (generate.SOURCE_ROOT / generate.PROTO).read_text(encoding="utf-8").splitlines()
    what = re.compile(r"^ +.* = [0-9]+;$|^ *(rpc|message|enum|service) ")
    bare = [
        line.strip()
        for before, line in pairwise(lines)
        if what.match(line) and not before.strip().startswith("//")
    ]
    assert [line for line in bare if not line.startswith("CODE_")] == []


def test_the_client_types_have_the_fields_of_the_messages() -> None:
    """A field that is added on one side only is found here."""
    for kind, message in (
        (Progress, pb.Acknowledged),
        (Usage, pb.Usage),
        (ClusterInfo, pb.ServerInfoResponse),
        (Server, pb.Server),
        (SamplingOptions, pb.Sampling),
        (PolicyResult, pb.PolicyResult),
        (ServerStreams, pb.ServerStreams),
        (StreamDecision, pb.StreamDecision),
    ):
        assert set(kind.__annotations__) == set(message.DESCRIPTOR.fields_by_name)
    fields = set(pb.AnswerMetadata.DESCRIPTOR.fields_by_name)
    assert set(Metadata.__annotations__) == fields - {"lifetime"}


def test_a_decision_has_the_fields_of_the_wire_behind() -> None:
    """Whatever a server tells about a stream reaches the client."""
    names = {field.name for field in msgspec.structs.fields(common.StreamDecision)}
    assert set(StreamDecision.__annotations__) == names


def test_the_sampling_options_are_those_of_the_wire_behind() -> None:
    """Every option of the API has its field in the messages to the servers, and the reverse."""
    renamed = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    renamed["logprobs"] = "num_logprobs"
    names = {renamed.get(name, name) for name in SamplingOptions.__annotations__}
    router_only = {"stop", "skip_special_tokens"}
    assert names - router_only == {field.name for field in msgspec.structs.fields(Sampling)}


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_code_has_its_number(code: ErrorCode) -> None:
    """By gRPC's names."""
    assert f"CODE_{code}" in pb.Code.keys()  # noqa: SIM118 - an enum wrapper, no mapping


def test_the_client_needs_grpc_and_protobuf_only() -> None:
    """The `client` extra names no other package."""
    program = (
        "import sys, streamfill.api\n"
        "heavy = {'torch', 'sglang', 'msgspec', 'zmq', 'numpy', 'tokenizers', 'rich', 'router'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_S,
        check=False,
        env={"PYTHONPATH": str(generate.SOURCE_ROOT)},
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
