"""``python -m decode_server --config-file FILE``: see ``engine.process``."""

from __future__ import annotations

from decode_server.factory import build
from streamfill.engine.process import leave, main
from streamfill.messages.common import Role

if __name__ == "__main__":
    leave(main(Role.DECODE, build))
