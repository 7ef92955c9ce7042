"""The router's view of a server's cache is what the server has, whatever was lost on the way."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement.cache_aware import CacheAwarePolicy
from router.placement.follower import ASK_AGAIN_S, ResidencyFollower
from router.placement.interface import PlacementContext
from router.placement.placer import Placer
from router.placement.simple import LeastLoadedPolicy
from streamfill.messages import server_to_router as s
from streamfill.serving.residency import ResidencyReports
from streamfill.stream.ids import ServerId
from streamfill.stream.prefix_blocks import BlockKey, block_keys
from tests.support.fake_engine import FakeEngine

SERVER = ServerId("p")
BLOCK_TOKENS = 4


class _World:
    """A server's reports, a lossy line, and the router's view behind it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.policy = CacheAwarePolicy(PlacementContext(options={"block_tokens": "4"}))
        self.follower = ResidencyFollower(Placer(self.policy, "cache-aware"), self._ask)
        self.to_server: deque[int] = deque()
        self.to_router: deque[s.ServerToRouter] = deque()
        self.num_asked = 0
        self.start_server()

    def start_server(self) -> None:
        """A new incarnation, empty; the router hears of it."""
        self.engine = FakeEngine(pool_tokens=256)
        self.reports = ResidencyReports(self.engine, self.to_router.append, lambda: self.now_s)
        self.to_server.clear()
        self.to_router.clear()
        self.follower.follow(SERVER, self.now_s)

    def _ask(self, server_id: ServerId, block_tokens: int) -> None:
        assert server_id == SERVER
        self.num_asked += 1
        self.to_server.append(block_tokens)

    def truth(self) -> set[BlockKey]:
        paths = self.engine.cache.all_paths()
        return {key for path in paths for key in block_keys(path, BLOCK_TOKENS)}

    def exchange(self, *, lose_asked: bool = False, fate: str = "deliver") -> None:
        """What waits on the line arrives, is lost, or arrives twice."""
        while self.to_server:
            block_tokens = self.to_server.popleft()
            if not lose_asked:
                self.reports.watch(block_tokens)
        self.reports.publish(is_idle=True)
        while self.to_router:
            report = self.to_router.popleft()
            assert isinstance(report, s.Residency)
            for _ in range({"deliver": 1, "lose": 0, "twice": 2}[fate]):
                self.follower.heard(SERVER, report, self.now_s)

    def settle(self) -> None:
        """Nothing is lost for some seconds."""
        for _ in range(12):
            self.now_s += ASK_AGAIN_S / 4
            self.follower.tick(self.now_s)
            self.exchange()


_EVENTS = ("insert", "insert", "insert", "evict", "flush", "restart")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_after_any_losses_the_view_becomes_the_truth(data: st.DataObject) -> None:
    """Blocks come, go and are cleared, reports and requests are lost or come twice, the server is
    replaced: once the line works the view is exactly what the server has."""
    world = _World()
    for _ in range(data.draw(st.integers(1, 25))):
        world.now_s += data.draw(st.sampled_from([0.0, 0.2, 2.0]))
        match data.draw(st.sampled_from(_EVENTS)):
            case "insert":
                ids = data.draw(st.lists(st.integers(0, 1), max_size=16))
                if world.engine.cache.num_pages + len(ids) <= 200:
                    world.engine.cache.insert(ids)
            case "evict":
                world.engine.cache.evict(min(3, world.engine.cache.num_pages))
            case "flush":
                world.engine.flush()
            case _:
                world.start_server()
        if data.draw(st.booleans()):
            world.exchange(
                lose_asked=data.draw(st.booleans()),
                fate=data.draw(st.sampled_from(["deliver", "lose", "twice"])),
            )
        world.follower.tick(world.now_s)
    world.settle()
    assert world.policy.view.held(SERVER) == world.truth()


def test_reports_without_losses_need_one_question() -> None:
    """Changes are enough, and what is told is little."""
    world = _World()
    world.exchange()
    for number in range(10):
        world.now_s += 0.2
        world.engine.cache.insert([number] * 8)
        world.exchange()
        assert world.policy.view.held(SERVER) == world.truth()
    assert world.num_asked == 1
    assert world.follower.num_gaps == 0


def test_the_loss_of_the_last_report_is_noticed() -> None:
    """By the number that an idle server repeats; and one question mends it."""
    world = _World()
    world.exchange()
    world.engine.cache.insert([5] * 8)
    world.now_s += 0.2
    world.exchange(fate="lose")
    assert not world.policy.view.held(SERVER)
    world.now_s += 1.5
    world.exchange()
    assert world.follower.num_gaps == 1
    world.now_s += 0.2
    world.exchange()
    assert world.policy.view.held(SERVER) == world.truth()
    assert world.num_asked == 2


def test_a_gap_keeps_the_old_view_until_everything_is_known() -> None:
    """What was right mostly still is."""
    world = _World()
    world.engine.cache.insert([5] * 8)
    world.exchange()
    before = world.policy.view.held(SERVER)
    assert before
    for fate in ("lose", "deliver"):
        world.now_s += 0.2
        world.engine.cache.insert([len(fate)] * 8)
        world.exchange(fate=fate)
    assert world.follower.num_gaps == 1
    assert world.policy.view.held(SERVER) == before


def test_nobody_is_asked_for_a_policy_that_does_not_look() -> None:
    """Servers keep no record then."""
    asked: list[ServerId] = []
    placer = Placer(LeastLoadedPolicy(PlacementContext()), "least-loaded")
    follower = ResidencyFollower(placer, lambda server_id, _: asked.append(server_id))
    follower.follow(SERVER, 0.0)
    follower.tick(100.0)
    assert not asked
