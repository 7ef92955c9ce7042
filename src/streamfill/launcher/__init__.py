"""Starts the processes of a cluster and keeps them running. Imports neither torch nor sglang.

The life of a cluster:

1. `ports`: the ports are chosen and checked, so that a port in use stops the start at once.
2. `plan`: the cluster file, the ports and the number of cores become a list of processes.
3. `state`: the run folder is locked and says who runs there; `streamfill status` reads it.
4. `supervisor`: all processes start together, each under `guard`, which ties its life to the
   launcher's; `managed_process` follows one of them, `ready_line` and `log_files` read and keep
   what it prints, `restart_policy` decides what follows its death.
5. `signals`: Ctrl-C or SIGTERM drains the router, then the servers, then the controller; a second
   one kills them all.
"""

from __future__ import annotations
