"""Are the answers of several runs of the same requests the same?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from streamfill.loadgen.records import RequestRecord, RunResult


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Difference(_Struct, frozen=True, kw_only=True):
    """One request that one run answered otherwise than the run that it is compared with."""

    index: int
    """The request's place in the trace."""
    request_id: str
    label: str
    run: int
    expected_label: str
    expected_run: int
    is_text: bool
    """The answers were compared as text, since one of them has no token ids."""
    position: int
    """Of the first token, or character, that differs."""
    expected: int | str | None
    """What stands there in the run that is compared with; None: its answer ended before."""
    found: int | str | None


class Identity(_Struct, frozen=True, kw_only=True):
    """Whether all compared runs gave the same answers.

    Attributes:
        is_identical: every request that completed in all runs has exactly the same answer in all of
            them, and there is at least one.
        num_compared: requests that completed in all runs.
        num_different: those of them of which at least one run differs.
        num_different_by_label: for each mode that differs, the answers of all its runs that do.
        differences: at most one for each request and run.
    """

    is_identical: bool
    num_compared: int
    num_different: int
    num_different_by_label: dict[str, int]
    differences: tuple[Difference, ...]


def compare_outputs(results: Sequence[RunResult]) -> Identity:
    """Compares the answers of all runs, request by request, with those of the first run that has
    token ids; without any, with the first run's text. Warm-up requests are left out."""
    by_index = [_completed(result) for result in results]
    common = sorted(set.intersection(*(set(each) for each in by_index))) if by_index else []
    differences: list[Difference] = []
    for index in common:
        answers = [(result, each[index]) for result, each in zip(results, by_index, strict=True)]
        expected = next((a for a in answers if a[1].token_ids is not None), answers[0])
        for answer in answers:
            found = _difference(expected, answer)
            if found is not None:
                differences.append(found)
    return Identity(
        is_identical=bool(common) and not differences,
        num_compared=len(common),
        num_different=len({difference.index for difference in differences}),
        num_different_by_label=dict(Counter(difference.label for difference in differences)),
        differences=tuple(differences),
    )


def _completed(result: RunResult) -> dict[int, RequestRecord]:
    return {
        record.index: record
        for record in result.records
        if record.error_code is None and not record.is_warm_up
    }


def _difference(
    expected: tuple[RunResult, RequestRecord], found: tuple[RunResult, RequestRecord]
) -> Difference | None:
    (expected_run, expected_record), (found_run, found_record) = expected, found
    is_text = expected_record.token_ids is None or found_record.token_ids is None
    left: Sequence[Any] = expected_record.text if is_text else expected_record.token_ids or ()
    right: Sequence[Any] = found_record.text if is_text else found_record.token_ids or ()
    if left == right:
        return None
    pairs = enumerate(zip_longest(left, right))
    position, (wanted, got) = next(each for each in pairs if each[1][0] != each[1][1])
    return Difference(
        index=expected_record.index,
        request_id=expected_record.request_id,
        label=found_run.label,
        run=found_run.run,
        expected_label=expected_run.label,
        expected_run=expected_run.run,
        is_text=is_text,
        position=position,
        expected=wanted,
        found=got,
    )
