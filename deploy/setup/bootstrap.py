"""Sets up streamfill: makes `.venv` and installs everything into it. See `--help`.

Needs nothing but a Python. This file is kept to syntax that any Python 3 understands, so that one
that is too old gets to say so; the work is in `installer.py`.
"""

import os
import shutil
import subprocess
import sys

VERSION = sys.version_info[:2]
OLDEST = (3, 11)
TOO_NEW = (3, 13)

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if OLDEST <= VERSION < TOO_NEW:
    sys.path.insert(0, root)
    from deploy.setup.installer import main

    sys.exit(main(sys.argv[1:]))

check = "import sys; sys.exit(not {} <= sys.version_info[:2] < {})".format(OLDEST, TOO_NEW)
for name in ("python3.12", "python3.11"):
    found = shutil.which(name)
    if found and subprocess.call([found, "-c", check], stderr=subprocess.DEVNULL) == 0:
        sys.stderr.write("set-up: this Python is {}.{}; using {}\n".format(*VERSION, found))
        os.execv(found, [found, os.path.abspath(__file__)] + sys.argv[1:])
sys.stderr.write(
    "set-up: streamfill needs Python 3.11 or 3.12, this is {}.{} ({}).\n"
    "        Install one of them, then run `make setup PYTHON=/path/to/python3.11`.\n".format(
        *VERSION, sys.executable
    )
)
sys.exit(2)
