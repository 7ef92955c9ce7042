"""Questions to several servers: whose answer counts, and how long is waited."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from router.placement import ServerState
from router.questions import Questions
from router.servers import Server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from tests.unit.messages.samples import SERVER_TO_ROUTER
from tests.unit.router.cluster_for_tests import PATIENCE_S, until


class Line:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.questions = Questions(self.send)

    def send(self, server: Server, message: r.RouterToServer) -> None:
        assert isinstance(message, r.FlushCache)
        self.sent.append((server.server_id, message.request_id))

    async def ask(
        self, servers: list[Server], timeout_s: float = PATIENCE_S
    ) -> dict[str, bool | None]:
        question = r.FlushCache(request_id=self.questions.new_id())
        answers = await self.questions.ask(servers, question, s.CacheFlushed, timeout_s)
        return {str(name): None if each is None else each.ok for name, each in answers.items()}


def server(server_id: str) -> Server:
    (facts,) = (each for each in SERVER_TO_ROUTER if isinstance(each, s.Register))
    return Server(
        facts=msgspec.structs.replace(facts, server_id=server_id),
        identity=server_id.encode(),
        router_incarnation=1,
        heard_s=0.0,
        registered_s=0.0,
    )


async def test_each_server_is_asked_once_and_answers_for_itself() -> None:
    """An answer of another server, to another question or of another kind is none."""
    line, first, second = Line(), server("a"), server("b")
    call = asyncio.create_task(line.ask([first, second]))
    await until(lambda: len(line.sent) == 2)
    assert line.sent == [("a", 1), ("b", 1)]
    line.questions.answered(server("c"), s.CacheFlushed(request_id=1, ok=False))
    line.questions.answered(first, s.CacheFlushed(request_id=2, ok=False))
    line.questions.answered(first, s.CacheFlushed(request_id=1, ok=True))
    line.questions.answered(first, s.CacheFlushed(request_id=1, ok=False))
    line.questions.answered(second, s.PolicySet(request_id=1, ok=True, policy="fcfs"))
    assert await call == {"a": True, "b": None}


async def test_a_server_that_is_late_dead_or_dies_has_no_answer() -> None:
    """And what it says afterwards is dropped; the next question has a number of its own."""
    line, late, dead, dying = Line(), server("late"), server("dead"), server("dying")
    dead.state = ServerState.DEAD
    call = asyncio.create_task(line.ask([late, dead, dying], timeout_s=0.05))
    await until(lambda: len(line.sent) == 2)
    line.questions.lost(dying)
    assert await call == {"late": None, "dead": None, "dying": None}
    line.questions.answered(late, s.CacheFlushed(request_id=1, ok=True))
    call = asyncio.create_task(line.ask([late]))
    await until(lambda: len(line.sent) == 3)
    assert line.sent[-1] == ("late", 2)
    line.questions.answered(late, s.CacheFlushed(request_id=2, ok=False))
    assert await call == {"late": False}


@pytest.mark.parametrize("servers", [[], ["dead"]])
async def test_nobody_to_ask_is_no_wait(servers: list[str]) -> None:
    """The answer is there at once."""
    line = Line()
    asked = [server(name) for name in servers]
    for each in asked:
        each.state = ServerState.DEAD
    got = await asyncio.wait_for(line.ask(asked, timeout_s=10 * PATIENCE_S), PATIENCE_S)
    assert got == dict.fromkeys(servers)
    assert not line.sent
