"""``python -m prefill_server --config-file FILE``: see ``engine.process``."""

from __future__ import annotations

from prefill_server.factory import build
from streamfill.engine.process import leave, main
from streamfill.messages.common import Role

if __name__ == "__main__":
    leave(main(Role.PREFILL, build))
