"""What the ranks of a server tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.errors import TransportError
from streamfill.serving import rank_mailbox
from streamfill.serving.rank_mailbox import PARTIAL_TIMEOUT_S, RankMailbox

NUM_RANKS = 3
PATIENCE_MS = 20_000


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[RankMailbox]]:
    endpoint = f"ipc://{tmp_path}/ranks"
    made = [RankMailbox(endpoint, rank, NUM_RANKS) for rank in range(NUM_RANKS)]
    yield made
    for mailbox in made:
        mailbox.close()


def _collect(root: RankMailbox, transfer_ids: list[int], num_wanted: int) -> list[int]:
    """What is complete on rank 0, as soon as the sockets have carried it there."""
    complete = root.complete(transfer_ids, 0.0)
    while len(complete) < num_wanted:
        (source,) = root.wake_sources()
        assert source.poll(PATIENCE_MS), "nothing came"
        complete += root.complete([], 0.0)
    return complete


def test_one_rank_has_no_socket() -> None:
    """What arrived there has arrived everywhere."""
    mailbox = RankMailbox("ipc://nowhere", 0, 1)
    assert mailbox.wake_sources() == []
    assert mailbox.exchange_ports(77) == (77,)
    mailbox.report([1])
    assert mailbox.complete([1, 2], 0.0) == [1, 2]
    assert mailbox.give_up(1e9) == []
    mailbox.close()


def test_rank_0_learns_all_ports_in_order(ranks: list[RankMailbox]) -> None:
    """The others know their own."""
    assert ranks[2].exchange_ports(12) == (12,)
    assert ranks[1].exchange_ports(11) == (11,)
    assert ranks[0].exchange_ports(10) == (10, 11, 12)


def test_a_rank_that_does_not_start_is_named(
    ranks: list[RankMailbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for it for ever."""
    monkeypatch.setattr(rank_mailbox, "START_TIMEOUT_S", 0.2)
    ranks[2].exchange_ports(12)
    (source,) = ranks[0].wake_sources()
    assert source.poll(PATIENCE_MS)
    with pytest.raises(TransportError, match=r"ranks \[1\] did not start"):
        ranks[0].exchange_ports(10)


def test_a_transfer_is_complete_when_every_rank_has_it(ranks: list[RankMailbox]) -> None:
    """In whichever order they report, and once only."""
    ranks[1].report([7, 8])
    ranks[2].report([8])
    assert _collect(ranks[0], [8], 1) == [8]
    ranks[2].report([7])
    assert _collect(ranks[0], [7], 1) == [7]
    assert ranks[0].complete([], 0.0) == []


def test_rank_0_hears_of_a_lossy_codec_before_the_transfer_is_complete(
    ranks: list[RankMailbox],
) -> None:
    """By whichever rank the KV came so: rank 0 marks the answers."""
    ranks[1].report([7], "float16")
    ranks[2].report([7])
    assert ranks[0].kv_codec == "none"
    assert _collect(ranks[0], [7], 1) == [7]
    assert ranks[0].kv_codec == "float16"


def test_a_transfer_that_fails_on_a_rank_is_given_up(ranks: list[RankMailbox]) -> None:
    """After a while, once; complete ones are not touched."""
    ranks[1].report([7, 8])
    ranks[2].report([8])
    assert _collect(ranks[0], [7, 8], 1) == [8]
    assert ranks[0].give_up(PARTIAL_TIMEOUT_S - 0.1) == []
    assert ranks[0].give_up(PARTIAL_TIMEOUT_S) == [7]
    assert ranks[0].give_up(PARTIAL_TIMEOUT_S) == []


def test_what_comes_after_a_transfer_was_given_up_is_given_up_too(
    ranks: list[RankMailbox],
) -> None:
    """Its last part alone does not make it complete."""
    assert ranks[0].complete([7], 0.0) == []
    assert ranks[0].give_up(PARTIAL_TIMEOUT_S) == [7]
    ranks[1].report([7])
    (source,) = ranks[0].wake_sources()
    assert source.poll(PATIENCE_MS)
    assert ranks[0].complete([], 100.0) == []
    assert ranks[0].give_up(100.0 + PARTIAL_TIMEOUT_S) == [7]
