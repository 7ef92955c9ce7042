"""The scheduling policy of a cluster that is measured: set before a run, put back at the end.

1. `restored_policies` notes what is in force on a cluster that others use too.
2. `use_policy` sets a policy through the client API before a run; no server is started anew.
3. At the end of the block each server gets back what it had. What cannot be put back is said.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from streamfill.errors import FailedPreconditionError, StreamError
from streamfill.loadgen.target import Target

logger = logging.getLogger(__name__)


@runtime_checkable
class ScheduledTarget(Protocol):
    """A target whose prefill servers can be told how to schedule."""

    async def set_policy(self, spec: str, server_id: str | None = None) -> Mapping[str, str]:
        """Change the policy of all prefill servers, or of one. Called while no request is open.

        Args:
            spec: canonical, such as ``lcas(order=newest)``.

        Returns:
            by server, why it kept another policy; empty: all have the new one.

        Raises:
            StreamError: no server took it, or none answers.
        """
        ...

    async def policies(self) -> Mapping[str, str]:
        """The policy in force on each living prefill server; empty where it has not said. Raises
        ``StreamError``."""
        ...


async def use_policy(target: Target, spec: str) -> None:
    """All prefill servers schedule by this policy when it returns.

    Raises:
        FailedPreconditionError: a server keeps another one, with its reason, or the target has no
            policies.
        StreamError: the target does not answer.
    """
    if not isinstance(target, ScheduledTarget):
        raise FailedPreconditionError(f"{target.name} has no scheduling policy to set")
    try:
        refusals = await target.set_policy(spec)
    except StreamError as error:
        raise FailedPreconditionError(f"the policy {spec} cannot be set: {error}") from error
    if refusals:
        reasons = "; ".join(f"{server}: {reason}" for server, reason in sorted(refusals.items()))
        raise FailedPreconditionError(f"the policy {spec} was refused: {reasons}")


@asynccontextmanager
async def restored_policies(target: Target, say: Callable[[str], None]) -> AsyncIterator[None]:
    """What servers schedule by is at the end of the block what it was at its start, whatever ended
    it; where that cannot be, ``say`` gets a line that tells which policy is left in force."""
    if not isinstance(target, ScheduledTarget):
        yield
        return
    before = await _known(target)
    try:
        yield
    finally:
        await _restore(target, before, say)


async def _restore(
    target: ScheduledTarget, before: Mapping[str, str], say: Callable[[str], None]
) -> None:
    known = {server: policy for server, policy in before.items() if policy}
    problem = "" if known else "the policy from before the measurement is not known"
    try:
        if len(known) == len(before) and len(set(known.values())) == 1:
            # In one go, so that servers that start later get it too.
            refusals = dict(await target.set_policy(next(iter(known.values()))))
        else:
            refusals = {s: "its policy from before is not known" for s in before if s not in known}
            for server, policy in known.items():
                refusals |= await target.set_policy(policy, server)
        if refusals:
            problem = "; ".join(f"{server}: {why}" for server, why in sorted(refusals.items()))
    except StreamError as error:
        problem = str(error)
    if problem:
        after = await _known(target)
        left = ", ".join(f"{policy or 'unknown'} on {s}" for s, policy in sorted(after.items()))
        say(f"The policy could not be put back ({problem}). Left in force: {left or 'unknown'}.")


async def _known(target: ScheduledTarget) -> Mapping[str, str]:
    """Empty where the target does not answer: that must not hide what ends the block."""
    try:
        return await target.policies()
    except StreamError as error:
        logger.warning("the policies in force are not known error=%s", error)
        return {}
