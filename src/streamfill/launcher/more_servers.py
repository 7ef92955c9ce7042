"""One more server for a cluster that runs already: its settings, checked, and its process. Pure,
but for a free port that is looked for."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from streamfill.config import (
    ClusterConfig,
    ServerConfig,
    ServerSection,
    check_cluster,
    from_mapping,
    with_absolute_files,
)
from streamfill.errors import ConfigError
from streamfill.launcher.plan import (
    ProcessSpec,
    endpoints_of,
    gpus_of,
    server_config,
    server_spec,
    thread_share,
)
from streamfill.launcher.ports import Ports, choose_metrics_port
from streamfill.messages.common import Role


@dataclass(frozen=True, kw_only=True)
class ServerPlanner:
    """What every server of the cluster has in common."""

    config: ClusterConfig
    """As the cluster was started with."""
    model_path: Path
    """Absolute folder of the model."""
    ports: Ports
    num_cores: int
    """CPU cores that this cluster may use."""
    run_dir: Path
    """Absolute folder for the configuration files."""
    python: str = sys.executable

    def plan(
        self,
        role: Role,
        settings: Mapping[str, Any],
        taken_ids: Collection[str],
        running: Sequence[ProcessSpec],
    ) -> ProcessSpec:
        """One more server.

        Args:
            settings: values of keys of the role's section that are to differ from the cluster's.
            taken_ids: ids that were ever used, here or elsewhere.
            running: the processes of this machine.

        Raises:
            ConfigError: a setting is none of the role's, or its value cannot work.
        """
        section = self._section(role, settings)
        index = _free_index(role, taken_ids)
        server_id = f"{role.value}-{index}"
        servers = _servers_of(running)
        taken_ports = [x.metrics_port for x in servers if x.metrics_port]
        metrics_port = choose_metrics_port(
            role.value, section, self.config.metrics_host, index, taken_ports
        )
        metrics = {} if metrics_port is None else {server_id: metrics_port}
        made = server_config(
            self.config,
            role,
            section,
            index,
            share=thread_share(self.num_cores, len(servers) + 1),
            model_path=self.model_path,
            endpoints=endpoints_of(self.config, self.ports),
            ports=replace(self.ports, metrics=metrics),
        )
        if "base_gpu_id" in settings:  # said of this server alone
            made = msgspec.structs.replace(made, base_gpu_id=section.base_gpu_id)
        used = {gpu for server in servers for gpu in gpus_of(server)}
        shares_gpu = not used.isdisjoint(gpus_of(made))
        return server_spec(made, shares_gpu=shares_gpu, run_dir=self.run_dir, python=self.python)

    def _section(self, role: Role, settings: Mapping[str, Any]) -> ServerSection:
        own = self.config.prefill if role is Role.PREFILL else self.config.decode
        prefix = f"{role.value}."
        given = {key.removeprefix(prefix): value for key, value in settings.items()}
        if "count" in given:
            remedy = "one server is added at a time; leave it out"
            raise ConfigError("--set count", given["count"], remedy)
        data = msgspec.to_builtins(own) | given
        source = "the command line"
        section = from_mapping(ServerSection, data, source)
        # At least one of each, so that what has to fit together is compared.
        sections = {
            each.value: msgspec.structs.replace(
                section if each is role else old, count=max(1, old.count)
            )
            for each, old in (
                (Role.PREFILL, self.config.prefill),
                (Role.DECODE, self.config.decode),
            )
        }
        checked = check_cluster(msgspec.structs.replace(self.config, **sections))
        made: ServerSection = getattr(with_absolute_files(checked), role.value)
        return made


def _free_index(role: Role, taken_ids: Collection[str]) -> int:
    """One above all that were ever used, so that no name means two servers in logs and metrics."""
    prefix = f"{role.value}-"
    numbers = [
        int(rest)
        for rest in (name.removeprefix(prefix) for name in taken_ids if name.startswith(prefix))
        if rest.isascii() and rest.isdecimal()
    ]
    return max(numbers, default=-1) + 1


def _servers_of(running: Sequence[ProcessSpec]) -> list[ServerConfig]:
    roles = {role.value for role in Role}
    return [
        msgspec.json.decode(spec.config_json, type=ServerConfig)
        for spec in running
        if spec.kind.value in roles
    ]
