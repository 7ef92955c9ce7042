"""`/metrics` over a real socket."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.errors import ConfigError
from streamfill.observability.exposition import CONNECTION_TIMEOUT_S, MAX_CONNECTIONS, MetricsServer
from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric
from tests.support.metrics import scrape
from tests.support.waiting import wait_until

PATIENCE_S = 20.0


@pytest.fixture
def metrics() -> MetricSet:
    return MetricSet("router", lambda: 0.0)


@pytest.fixture
def server(metrics: MetricSet) -> Iterator[MetricsServer]:
    served = MetricsServer(metrics.registry, host="127.0.0.1", port=0, section="router")
    yield served
    served.close()


def test_values_move(metrics: MetricSet, server: MetricsServer) -> None:
    """Each scrape tells what was counted until then."""
    tokens = metrics.counter(Metric.TOKENS_OUT)
    assert scrape(server.port).value(Metric.TOKENS_OUT) == 0
    tokens.inc(5)
    assert scrape(server.port).value(Metric.TOKENS_OUT) == 5


def test_another_path_is_told_the_right_one(server: MetricsServer) -> None:
    """404, with the path to try."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=PATIENCE_S)
    with caught.value as reply:
        assert (reply.code, reply.read()) == (404, b"try /metrics\n")


def ask(port: int, *authorizations: str) -> int:
    """The status of a scrape with these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.putrequest("GET", "/metrics")
        for value in authorizations:
            connection.putheader("Authorization", value)
        connection.endheaders()
        reply = connection.getresponse()
        assert (reply.status == 401) == ("Bearer" in reply.headers.get("WWW-Authenticate", ""))
        assert (reply.status == 401) != (b"streamfill_" in reply.read())
        return reply.status


def test_a_token_is_asked_for(
    metrics: MetricSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is a file with one; a new one counts at once, and while there is none nobody is
    answered. No token is in the log."""
    file = tmp_path / "token"
    first, second = "a" * 32, "b" * 32
    file.write_text(f"{first}\n")
    server = MetricsServer(
        metrics.registry, host="127.0.0.1", port=0, section="router", token_file=str(file)
    )
    with contextlib.closing(server):
        assert ask(server.port, f"Bearer {first}") == 200
        assert ask(server.port, f"bearer  {first}") == 200
        for wrong in ((), ("Bearer",), (f"Basic {first}",), (f"Bearer {first}x",)):
            assert ask(server.port, *wrong) == 401
        assert ask(server.port, f"Bearer {first}", f"Bearer {first}") == 401
        assert ask(server.port, "Bearer \xe4") == 401
        file.write_text(second)
        assert ask(server.port, f"Bearer {first}") == 401
        assert ask(server.port, f"Bearer {second}") == 200
        file.unlink()
        assert ask(server.port, f"Bearer {second}") == 401
    assert "scrape_refused peer=127.0.0.1" in caplog.text
    assert first not in caplog.text
    assert second not in caplog.text


@pytest.mark.parametrize(
    "content", [None, b"", b"short", b"two words of many letters", b"\xff" * 40]
)
def test_a_token_that_will_not_do_stops_the_start(
    metrics: MetricSet, tmp_path: Path, content: bytes | None
) -> None:
    """By its file; what is in it is not shown."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="openssl rand") as caught:
        MetricsServer(
            metrics.registry, host="127.0.0.1", port=0, section="router", token_file=str(file)
        )
    assert (caught.value.key, caught.value.value) == ("metrics_token_file", str(file))
    if content:
        assert content.decode("latin-1") not in str(caught.value)


def test_an_open_port_warns(
    metrics: MetricSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where other machines reach it and it asks for nothing."""
    file = tmp_path / "token"
    file.write_text("a" * 32)
    for host, token_file, num_warnings in (
        ("127.0.0.1", None, 0),
        ("0.0.0.0", str(file), 0),
        ("0.0.0.0", None, 1),
    ):
        server = MetricsServer(
            metrics.registry, host=host, port=0, section="router", token_file=token_file
        )
        server.close()
        assert caplog.text.count("metrics_open_to_the_network") == num_warnings


def test_openmetrics_is_spoken_to_those_who_ask(server: MetricsServer) -> None:
    """By the Accept header, as Prometheus does."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
        assert reply.read().endswith(b"# EOF\n")


def test_silent_connections_do_not_keep_others_out_for_ever(
    metrics: MetricSet, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a bound connections are closed unheard, and those that say nothing run into a
    time-out."""
    monkeypatch.setattr("streamfill.observability.exposition._Handler.timeout", 3.0)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_CONNECTIONS)]
    try:
        wait_until("all are counted", lambda: not _is_answered(server.port), PATIENCE_S)
        wait_until("they ran into the time-out", lambda: _is_answered(server.port), PATIENCE_S)
    finally:
        for each in silent:
            each.close()


def _is_answered(port: int) -> bool:
    try:
        scrape(port)
    except OSError:
        return False
    return True


def test_garbage_is_survived(server: MetricsServer) -> None:
    """Whoever speaks no HTTP gets an error or nothing, and the next scrape its answer."""
    post = b"POST /metrics HTTP/1.0\r\n\r\n"
    for garbage in (bytes(100), b"GET\r\n\r\n", b"A" * 100_000, post):
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.settimeout(PATIENCE_S)
            answer = b""
            with contextlib.suppress(OSError):  # it hangs up on some of it
                stranger.sendall(garbage)
                stranger.shutdown(socket.SHUT_WR)
                answer = stranger.recv(1000)
            assert b"200 OK" not in answer
    assert scrape(server.port).names


def test_a_source_that_fails_is_logged(
    metrics: MetricSet, server: MetricsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its scrape fails, the process and the log line say why, and the server goes on."""
    broken = [True]

    def samples() -> list[Sample]:
        if broken[0]:
            raise RuntimeError("a bug")
        return [Sample(Metric.READY, 1)]

    metrics.add_source(samples)
    with caplog.at_level(logging.ERROR):
        assert not _is_answered(server.port)
        wait_until("the line", lambda: "scrape_failed" in caplog.text, PATIENCE_S)
    broken[0] = False
    assert scrape(server.port).value(Metric.READY) == 1


def test_a_port_in_use_is_named(metrics: MetricSet) -> None:
    """With its key and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="is in use on 127") as caught:
            MetricsServer(metrics.registry, host="127.0.0.1", port=port, section="prefill")
    assert (caught.value.key, caught.value.value) == ("prefill.metrics_port", port)


def test_a_foreign_host_is_named(metrics: MetricSet) -> None:
    """By the key of the host."""
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        MetricsServer(metrics.registry, host="192.0.2.1", port=0, section="decode")
    assert caught.value.key == "metrics_host"


def test_close_gives_the_port_back_at_once(metrics: MetricSet) -> None:
    """And ends the thread, without waiting for a connection."""
    before = set(threading.enumerate())
    server = MetricsServer(metrics.registry, host="127.0.0.1", port=0, section="router")
    scrape(server.port)
    with socket.create_connection(("127.0.0.1", server.port)):
        began_s = time.monotonic()
        server.close()
        assert time.monotonic() - began_s < CONNECTION_TIMEOUT_S / 2
    wait_until("the end of its threads", lambda: set(threading.enumerate()) <= before, PATIENCE_S)
    with socket.create_server(("127.0.0.1", server.port)):
        pass


def test_an_ipv6_address_will_do(metrics: MetricSet) -> None:
    """Where the machine has the loopback one."""
    try:
        server = MetricsServer(metrics.registry, host="::1", port=0, section="router")
    except ConfigError:
        pytest.skip("no IPv6 here")
    try:
        url = f"http://[::1]:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
            assert reply.status == 200
    finally:
        server.close()
