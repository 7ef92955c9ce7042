"""`streamfill zmq-keys create`: new CURVE keys of a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "Keys that are there already are never replaced. Copy the folder to each machine of the "
        "cluster over a connection that you trust; machines with prefill servers only need no "
        "server.secret. To lock somebody out, make new keys in another folder and restart."
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="made if need be; secrets in it have mode 0600"
    )


def run(args: argparse.Namespace) -> int:
    """Makes them, and says where they are; never what they are."""
    from streamfill.curve.keys import create_keys

    folder = args.folder.expanduser().absolute()
    for path in create_keys(folder):
        print(path)
    print(f'The cluster file has to name the folder: zmq_keys_dir = "{folder}"')
    return 0
