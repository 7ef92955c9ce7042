"""When the router is ready, and why it is not. Pure.

A request needs a prefill server that takes new streams; a decode server that does makes a pair of
it. Any prefill server can hand over to any decode server, since the router takes in none whose
model, vocabulary or page size differs. Without a pair prefill servers write whole answers
themselves, which is slower for everybody else there; `router.ready_without_decode` says whether
that counts as ready. Servers that are suspect, drain or are dead take nothing new and count as
little as if they were not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.placement import ServerState
from streamfill.messages.common import Role


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether new streams can be served now."""

    ready: bool
    reason: str
    """Why they cannot, or not by a pair of servers. Empty: by a pair."""


def readiness(
    servers: Iterable[tuple[Role, ServerState]], *, stopping: bool, without_decode: bool
) -> Readiness:
    """From the servers that the router knows.

    Args:
        stopping: the router takes nothing new any more.
        without_decode: prefill servers alone are enough.
    """
    if stopping:
        return Readiness(False, "the router is shutting down")
    known = list(servers)
    states = {role: [state for each, state in known if each is role] for role in Role}
    if ServerState.ALIVE not in states[Role.PREFILL]:
        return Readiness(False, _missing("prefill", states[Role.PREFILL]))
    if ServerState.ALIVE in states[Role.DECODE]:
        return Readiness(True, "")
    missing = _missing("decode", states[Role.DECODE])
    if without_decode:
        return Readiness(True, f"prefill servers answer by themselves: {missing}")
    return Readiness(False, missing)


def _missing(role: str, states: list[ServerState]) -> str:
    """In the words of the status: which servers there are, and how."""
    counts = [(state, states.count(state)) for state in ServerState if state in states]
    if not counts:
        return f"no {role} server is there"
    shown = ", ".join(f"{count} {state}" for state, count in counts)
    return f"no {role} server takes new streams ({shown})"
