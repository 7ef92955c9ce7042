"""``python -m decode_server --config-file FILE``: see ``engine.process``."""

from __future__ import annotations

import sys

from decode_server.factory import build
from streamfill.engine.process import main
from streamfill.messages.common import Role

if __name__ == "__main__":
    sys.exit(main(Role.DECODE, build))
