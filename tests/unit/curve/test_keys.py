"""The folder of CURVE keys, its command, and where it must be there."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamfill.cli.main import main
from streamfill.config import (
    ClusterConfig,
    ControllerSection,
    RouterConfig,
    RouterSection,
    ServerSection,
    check_cluster,
)
from streamfill.curve.keys import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    SERVER_SECRET,
    create_keys,
    keys_to_listen,
    read_connect_keys,
    read_listen_keys,
)
from streamfill.errors import ConfigError


def test_the_command_makes_keys_that_only_their_owner_may_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says where they are, and nothing of the secrets, whatever the umask is."""
    folder = tmp_path / "a" / "keys"
    before = os.umask(0)
    try:
        assert main(["zmq-keys", "create", str(folder)]) == 0
    finally:
        os.umask(before)
    said = capsys.readouterr()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in (SERVER_SECRET, CLIENT_SECRET):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert (folder / name).read_text().strip() not in said.out + said.err
    assert f'zmq_keys_dir = "{folder}"' in said.out
    assert read_listen_keys(str(folder)).admitted == {read_connect_keys(str(folder)).public}


def test_keys_are_never_replaced(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster that runs with them would lose its members at the next restart."""
    before = (Path(folder) / SERVER_SECRET).read_bytes()
    assert main(["zmq-keys", "create", folder]) == 2
    assert "has server.public already; name another folder" in capsys.readouterr().err
    assert (Path(folder) / SERVER_SECRET).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*cannot be written"):
        create_keys(tmp_path / "file")


def test_secrets_are_not_shown(folder: str) -> None:
    """Neither in a representation, nor by pickling."""
    secret = (Path(folder) / CLIENT_SECRET).read_text().strip()
    keys = read_connect_keys(folder)
    assert secret not in repr(keys) + str(read_listen_keys(folder))
    assert keys.secret.reveal().decode() == secret
    with pytest.raises(TypeError):
        pickle.dumps(keys)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "cannot be read"),
        (b"", 0o600, "is no key of 40 characters"),
        (b"x" * 40_000, 0o600, "is no key"),
        (b"\xff" * 40, 0o600, "is no key"),
        (b'"' * 40, 0o600, "is no key"),
        (b"1" * 40, 0o640, "mode 0640"),
        (b"1" * 40, 0o600, "does not belong to its client.public"),
    ],
)
def test_bad_files_are_named(folder: str, content: bytes | None, mode: int, said: str) -> None:
    """With what is wrong and what to do, and never with what is in them."""
    path = Path(folder) / CLIENT_SECRET
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_connect_keys(folder)
    assert said in str(caught.value)
    assert folder in str(caught.value)
    if content:
        assert content[:40].decode("latin-1") not in str(caught.value)


def settings(**values: Any) -> RouterConfig:
    return RouterConfig(model_path="m", host="h", grpc_port=0, zmq_port=0, **values)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.0.0.7", "host.example.org"])
def test_others_need_keys(folder: str, host: str) -> None:
    """Where other machines can reach it nobody listens without, unless that is said to be meant."""
    with pytest.raises(ConfigError) as caught:
        keys_to_listen(settings(), "router.zmq_host", host)
    for part in ("router.zmq_host", host, "streamfill zmq-keys create", "allow_plain_zmq = true"):
        assert part in str(caught.value)
    assert keys_to_listen(settings(allow_plain_zmq=True), "router.zmq_host", host) is None
    assert keys_to_listen(settings(zmq_keys_dir=folder), "router.zmq_host", host) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    """And has none unless they are given."""
    assert keys_to_listen(settings(), "router.zmq_host", host) is None


@pytest.mark.parametrize("host", ["::", "::1", "[::1]", "fd00::7"])
def test_links_use_ipv4(host: str) -> None:
    """With leave to listen anywhere too. Clients may come by IPv6."""
    with pytest.raises(ConfigError, match=r"router\.zmq_host.* IPv4 address or a name"):
        keys_to_listen(settings(allow_plain_zmq=True), "router.zmq_host", host)
    router = RouterSection(host="::", zmq_host="127.0.0.1")
    check_cluster(ClusterConfig(router=router))


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("router.host", {"router": RouterSection(host="0.0.0.0")}),
        ("router.zmq_host", {"router": RouterSection(zmq_host="10.0.0.7")}),
        ("controller.host", {"controller": ControllerSection(host="0.0.0.0")}),
        ("decode.host", {"decode": ServerSection(host="10.0.0.7")}),
    ],
)
def test_a_cluster_file_is_refused_before_anything_starts(
    folder: str, key: str, section: dict[str, Any]
) -> None:
    """By the key of the address; with keys, or with leave, it is not."""
    config = ClusterConfig(**section)
    with pytest.raises(ConfigError, match="zmq_keys_dir") as caught:
        check_cluster(config)
    assert caught.value.key == key
    check_cluster(msgspec.structs.replace(config, zmq_keys_dir=folder))
    check_cluster(msgspec.structs.replace(config, allow_plain_zmq=True))


def test_addresses_that_nobody_listens_at_do_not_matter() -> None:
    """Prefill servers only connect; and where there are no decode servers none listens."""
    check_cluster(ClusterConfig(prefill=ServerSection(host="10.0.0.7")))
    check_cluster(ClusterConfig(decode=ServerSection(host="10.0.0.7", count=0)))


def test_a_cluster_file_with_bad_keys_is_refused(folder: str) -> None:
    """Before any process starts."""
    (Path(folder) / SERVER_PUBLIC).unlink()
    with pytest.raises(ConfigError, match=r"server\.public"):
        check_cluster(ClusterConfig(zmq_keys_dir=folder))
