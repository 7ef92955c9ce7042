"""What is wrong with a hand-off run, and its figures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamfill.stream.state import StreamState
from tests.chaos.handoff_kills import Kill
from tests.chaos.handoff_streams import PlayedStream
from tests.chaos.judge import Rule, Violation

RECOVERY_S = 10.0
"""From a kill to an answer that needed a server of that role, and to the next token of a stream
that lost its server."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What followed a kill, in seconds from it; None: nothing of the kind."""

    kill: Kill
    role_s: float | None
    """To the end of the next answer that was begun afterwards and needed a server of the role."""
    server_s: float | None
    """Likewise, of the very server, started again."""


def recovery(kill: Kill, played: Sequence[PlayedStream]) -> Recovery:
    """What the streams say about it."""
    later = [each for each in played if each.is_done and each.committed_s > kill.at_s]
    role = [each.ended_s for each in later if each.used(kill.role)]
    server = [each.ended_s for each in later if each.used(kill.role) == kill.server_id]
    return Recovery(
        kill=kill,
        role_s=min(role) - kill.at_s if role else None,
        server_s=min(server) - kill.at_s if server else None,
    )


def silences_s(kills: Sequence[Kill], played: Sequence[PlayedStream]) -> list[float]:
    """From a kill to the next token, of each stream that was tried again and waited for it."""
    return [
        min(later) - kill.at_s
        for kill in kills
        for each in played
        if each.result is not None
        and each.result.metadata.num_attempts > 1
        and 0 < each.committed_s < kill.at_s < each.ended_s
        and (later := [time_s for time_s in each.token_times_s if time_s > kill.at_s])
    ]


def judge_played(wanted: Sequence[PlayedStream], played: Sequence[PlayedStream]) -> list[Violation]:
    """Every stream is answered, as undisturbed, with each token once."""
    found = []
    for ours, theirs in zip(played, wanted, strict=True):
        problems: list[tuple[Rule, str]] = []
        if ours.is_done == bool(ours.errors):
            problems.append((Rule.ONE_ENDING, f"done {ours.is_done}, errors {ours.errors}"))
        if not ours.is_done:
            problems.append((Rule.OUTCOME, f"not answered: {ours.errors}"))
        if ours.indices != list(range(len(ours.indices))):
            problems.append((Rule.TOKENS, f"token numbers {ours.indices}"))
        # What came before an error has to be right, too.
        compared = theirs.token_ids if ours.is_done else theirs.token_ids[: len(ours.token_ids)]
        if ours.token_ids != compared:
            problems.append((Rule.ANSWER, f"{ours.token_ids} instead of {compared}"))
        elif ours.is_done and _end_of(ours) != _end_of(theirs):
            text = f"{_end_of(ours)} instead of {_end_of(theirs)}"
            problems.append((Rule.ANSWER, text))
        found += [Violation(rule=rule, text=text, number=ours.number) for rule, text in problems]
    return found


def judge_endings(
    played: Sequence[PlayedStream],
    prefix: str,
    endings: Mapping[str, Sequence[StreamState]],
) -> list[Violation]:
    """The router ended each stream once, as its client says."""
    found = []
    for each in played:
        states = list(endings.get(f"{prefix}{each.number}", []))
        wanted = [StreamState.DONE] if each.is_done else states[:1]
        if len(states) != 1 or states != wanted:
            text = f"the router says {[str(state) for state in states]}, done {each.is_done}"
            found.append(Violation(rule=Rule.ONE_ENDING, text=text, number=each.number))
    return found


def judge_disturbance(
    recoveries: Sequence[Recovery],
    silences: Sequence[float],
    faults: Counter[str],
    *,
    fewest_faults: int,
    num_kills: int,
    recovery_s: float = RECOVERY_S,
) -> list[Violation]:
    """It was disturbed as it should have been, and nobody waited for longer than is allowed."""
    found = []
    if faults.total() < fewest_faults:
        text = f"{faults.total()} faults, fewer than {fewest_faults}"
        found.append(Violation(rule=Rule.FAULTS, text=text))
    if len(recoveries) != num_kills:
        text = f"{len(recoveries)} of {num_kills} servers were killed"
        found.append(Violation(rule=Rule.FAULTS, text=text))
    for each in recoveries:
        if each.role_s is None or each.role_s > recovery_s:
            text = f"{each.kill.server_id}: the role answered again after {each.role_s} s"
            found.append(Violation(rule=Rule.RECOVERY, text=text))
        if each.server_s is None:
            text = f"{each.kill.server_id}: it made no answer after its restart"
            found.append(Violation(rule=Rule.RECOVERY, text=text))
    found += [
        Violation(rule=Rule.RECOVERY, text=f"a stream waited {silence_s:.1f} s for its next token")
        for silence_s in silences
        if silence_s > recovery_s
    ]
    return found


def _end_of(played: PlayedStream) -> tuple[str, str, int] | None:
    result = played.result
    if result is None:
        return None
    return result.text, result.finish_reason, result.usage.num_prompt_tokens
