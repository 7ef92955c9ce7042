"""docs/security.md names what there is and the numbers that are in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from router import service_server, stream_call, tls
from router.access import grpc_guard, key_ring
from router.http.keys import OPEN_PATHS
from streamfill.access.keys import KeyLimits
from streamfill.api.client import API_KEY_VARIABLE
from streamfill.cli.main import main
from streamfill.launcher.plan import OPERATOR_SOCKET
from streamfill.observability.logging import REPEAT_PERIOD_S

PAGE = (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        f"above {service_server.MAX_MESSAGE_BYTES // 2**20} MiB",
        f"begin to speak within {service_server.HANDSHAKE_MS // 1000} s",
        "not answer pings after "
        f"{(service_server.PING_INTERVAL_MS + service_server.PING_TIMEOUT_MS) // 1000} s",
        f"without a message is ended after {stream_call.FIRST_MESSAGE_S:g} s",
        f"at most every {REPEAT_PERIOD_S:g} s",
        f"`{OPERATOR_SOCKET}`",
        API_KEY_VARIABLE,
        *(f"`{path}`" for path in sorted(OPEN_PATHS)),
    ],
)
def test_names_and_numbers_are_those_of_the_code(words: str) -> None:
    """Each of the page is the one that is in force."""
    assert words in PAGE


def test_the_router_looks_at_the_file_as_often_as_the_page_says() -> None:
    """Every second; at certificates too."""
    assert key_ring.POLL_INTERVAL_S == tls.POLL_INTERVAL_S == 1.0
    assert "looks every second" in PAGE.replace("\n", " ")


def test_open_services_are_those_that_the_page_names() -> None:
    """And no other."""
    assert [name.split(".")[1] for name in grpc_guard.OPEN_SERVICES] == ["health", "reflection"]
    assert "The health and reflection services ask for no key" in PAGE


def test_every_limit_has_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    """On the page and on the command line."""
    with pytest.raises(SystemExit):
        main(["keys", "add", "--help"])
    help_text = capsys.readouterr().out
    for name in KeyLimits.__struct_fields__:
        option = f"--{name.replace('_', '-')}"
        assert f"`{option} " in PAGE
        assert option in help_text
