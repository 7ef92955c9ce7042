"""What `streamfill up` says when the cluster is ready."""

from __future__ import annotations

from streamfill.cli.up import http_lines
from streamfill.config import ClusterConfig, RouterSection

URL = "http://127.0.0.1:8000"


def test_addresses_for_http() -> None:
    """The API and the status page, where there is one; nothing without HTTP."""
    with_page, without = (ClusterConfig(router=RouterSection(status_page=x)) for x in (True, False))
    assert http_lines(URL, with_page)[1:] == [f"Status page: {URL}/status"]
    assert http_lines(URL, without) == [f"HTTP, as of the OpenAI API: {URL}/v1"]
    assert http_lines(None, with_page) == []
