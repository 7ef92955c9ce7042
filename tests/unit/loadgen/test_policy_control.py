"""Setting the policy of a cluster under measurement, and putting the old one back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from streamfill.errors import FailedPreconditionError, UnavailableError
from streamfill.loadgen.fake_router import fake_router
from streamfill.loadgen.fake_service import FakeBehaviour
from streamfill.loadgen.policy_control import restored_policies, use_policy
from streamfill.loadgen.targets.fake import FakeTarget
from streamfill.loadgen.targets.openai import OpenAITarget
from streamfill.loadgen.targets.streamfill import StreamfillTarget


def cluster(policy_by_server: Mapping[str, str]) -> FakeTarget:
    fake = FakeTarget()
    fake.policy_by_server = dict(policy_by_server)
    return fake


async def measure(fake: FakeTarget, said: list[str], error: Exception | None = None) -> None:
    async with restored_policies(fake, said.append):
        await use_policy(fake, "mcps")
        if error is not None:
            raise error


async def test_one_server_that_refuses_is_named() -> None:
    """That others took the policy is no comfort."""
    fake = cluster({"prefill-0": "fcfs", "prefill-1": "fcfs"})
    fake.refusals["prefill-1", "mcps"] = "too old"
    with pytest.raises(FailedPreconditionError, match="mcps was refused: prefill-1: too old"):
        await use_policy(fake, "mcps")


async def test_a_target_without_policies_is_refused() -> None:
    """A server of others cannot be told how to schedule."""
    target = OpenAITarget("http://127.0.0.1:1", model="m", api_key=None)
    try:
        with pytest.raises(FailedPreconditionError, match="openai has no scheduling policy"):
            await use_policy(target, "fcfs")
    finally:
        await target.close()


async def test_over_the_wire() -> None:
    """Options arrive, the router's reason comes back, and nobody there is an error of its own."""
    behaviour = FakeBehaviour(
        policy="edf", refuses_policy=lambda spec: "not today" if spec == "mcps" else ""
    )
    async with fake_router(behaviour) as (address, service):
        target = StreamfillTarget(address)
        try:
            assert await target.policies() == {"prefill-0": "edf"}
            await use_policy(target, "lcas(order=newest)")
            assert service.policies_set == ["lcas(order=newest)"]
            assert await target.policies() == {"prefill-0": "lcas(order=newest)"}
            with pytest.raises(
                FailedPreconditionError, match=r"prefill-0: not today \(it has lcas"
            ):
                await use_policy(target, "mcps")
        finally:
            await target.close()
    gone = StreamfillTarget("127.0.0.1:1")
    try:
        with pytest.raises(FailedPreconditionError, match="fcfs cannot be set"):
            await use_policy(gone, "fcfs")
    finally:
        await gone.close()


async def test_one_policy_is_put_back_for_all() -> None:
    """In one call, so that servers that start later have it too."""
    fake, said = cluster({"prefill-0": "edf(slo_ms=9)", "prefill-1": "edf(slo_ms=9)"}), list[str]()
    await measure(fake, said)
    assert fake.policies_set == ["mcps", "edf(slo_ms=9)"]
    assert said == []


async def test_different_policies_are_put_back_one_by_one() -> None:
    """Each server has its own again."""
    before = {"prefill-0": "edf", "prefill-1": "fcfs"}
    fake, said = cluster(before), list[str]()
    await measure(fake, said)
    assert fake.policy_by_server == before
    assert said == []


@pytest.mark.parametrize(
    ("before", "parts"),
    [
        ({"prefill-0": ""}, ["not known", "mcps on prefill-0"]),
        (
            {"prefill-0": "", "prefill-1": "fcfs"},
            ["prefill-0: its policy from before is not known", "fcfs on prefill-1"],
        ),
    ],
)
async def test_what_is_not_known_is_left_and_said(before: dict[str, str], parts: list[str]) -> None:
    """The line names what is in force now."""
    fake, said = cluster(before), list[str]()
    await measure(fake, said)
    assert fake.policy_by_server["prefill-0"] == "mcps"
    assert len(said) == 1
    assert all(part in said[0] for part in parts)


async def test_a_failure_to_put_back_hides_nothing() -> None:
    """The error of the block comes through, and a line says why the policy stays."""
    fake, said = cluster({"prefill-0": "edf"}), list[str]()
    fake.refusals["prefill-0", "edf"] = "no more"
    with pytest.raises(UnavailableError, match="crash"):
        await measure(fake, said, UnavailableError("crash"))
    assert said == [
        "The policy could not be put back (prefill-0: no more). Left in force: mcps on prefill-0."
    ]
