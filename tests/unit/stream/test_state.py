"""A stream goes forward and ends exactly once."""

from __future__ import annotations

import pytest

from streamfill.stream.ids import StreamId
from streamfill.stream.state import IllegalTransitionError, StreamState, StreamStateMachine

S = StreamState
ENDINGS = {S.DONE, S.ABORTED, S.REJECTED, S.FAILED, S.DEADLINE}
ALLOWED = {
    S.OPEN: {S.COMMITTED, S.ABORTED, S.REJECTED, S.FAILED, S.DEADLINE},
    S.COMMITTED: {S.DECODING, S.ABORTED, S.REJECTED, S.FAILED, S.DEADLINE},
    S.DECODING: {S.DONE, S.ABORTED, S.FAILED, S.DEADLINE},
}
PATHS = {
    S.OPEN: [],
    S.COMMITTED: [S.COMMITTED],
    S.DECODING: [S.COMMITTED, S.DECODING],
    S.DONE: [S.COMMITTED, S.DECODING, S.DONE],
    S.ABORTED: [S.ABORTED],
    S.REJECTED: [S.REJECTED],
    S.FAILED: [S.FAILED],
    S.DEADLINE: [S.DEADLINE],
}


def stream_in(state: StreamState) -> StreamStateMachine:
    machine = StreamStateMachine(StreamId(42))
    for step in PATHS[state]:
        machine.advance(step)
    return machine


@pytest.mark.parametrize("current", StreamState)
@pytest.mark.parametrize("wanted", StreamState)
def test_only_the_drawn_transitions_exist(current: StreamState, wanted: StreamState) -> None:
    """Any other transition raises with both states and the id, and changes nothing."""
    machine = stream_in(current)
    if wanted in ALLOWED.get(current, set()):
        machine.advance(wanted)
        assert machine.state is wanted
        return
    with pytest.raises(IllegalTransitionError, match=f"42 cannot go from {current} to {wanted}"):
        machine.advance(wanted)
    assert machine.state is current


@pytest.mark.parametrize("first", sorted(ENDINGS))
@pytest.mark.parametrize("second", sorted(ENDINGS))
def test_the_first_ending_stays(first: StreamState, second: StreamState) -> None:
    """Late news of another ending is told by the result and changes nothing."""
    machine = stream_in(first)
    assert machine.is_terminal
    assert machine.finish(second) is False
    assert machine.state is first


def test_finish_ends_a_living_stream_once() -> None:
    """The call that ends the stream is told so; a state that is no ending is refused."""
    machine = stream_in(S.DECODING)
    with pytest.raises(IllegalTransitionError):
        machine.finish(S.COMMITTED)
    assert machine.finish(S.DONE) is True
    assert machine.finish(S.DONE) is False
