"""The command `streamfill`. Each sub-command is a module that is imported only when it is used."""

from __future__ import annotations
