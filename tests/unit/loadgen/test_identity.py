"""Whether runs gave the same answers."""

from __future__ import annotations

from streamfill.loadgen.identity import compare_outputs
from tests.unit.loadgen.run_builders import failed, record, result


def test_same_answers() -> None:
    """Equal token ids in all runs are identical, even if texts are missing."""
    runs = [
        result(record(0), record(1), label="oneshot"),
        result(record(0, text=""), record(1), label="stream"),
    ]
    found = compare_outputs(runs)
    assert found.is_identical
    assert (found.num_compared, found.num_different, found.differences) == (2, 0, ())


def test_first_difference() -> None:
    """A difference names request, position and both ids; later ones in it are not counted."""
    runs = [
        result(record(0), record(1), label="oneshot"),
        result(record(0), record(1, token_ids=(7, 1, 2)), label="stream", run=3),
    ]
    found = compare_outputs(runs)
    assert not found.is_identical
    assert (found.num_compared, found.num_different) == (2, 1)
    assert found.num_different_by_label == {"stream": 1}
    (difference,) = found.differences
    assert (difference.index, difference.position) == (1, 1)
    assert (difference.expected, difference.found) == (8, 1)
    assert (difference.label, difference.run) == ("stream", 3)
    assert not difference.is_text


def test_a_shorter_answer_differs() -> None:
    """An answer that is only the beginning of the other one is another answer."""
    runs = [result(record(0)), result(record(0, token_ids=(7, 8)), label="stream")]
    (difference,) = compare_outputs(runs).differences
    assert (difference.position, difference.expected, difference.found) == (2, 9, None)


def test_text_where_ids_are_missing() -> None:
    """A run without ids is compared by its text, and only with that run."""
    runs = [
        result(record(0, token_ids=None, text="abX"), label="vllm:oneshot"),
        result(record(0), label="oneshot"),
        result(record(0, text=""), label="stream"),
    ]
    (difference,) = compare_outputs(runs).differences
    assert difference.label == "vllm:oneshot"
    assert difference.is_text
    assert (difference.position, difference.expected, difference.found) == (2, "c", "X")


def test_failed_requests_are_not_compared() -> None:
    """A request counts only where it completed in every run; warm-ups never do."""
    runs = [
        result(record(0), record(1), record(2, is_warm_up=True)),
        result(failed(0), record(1), record(2, is_warm_up=True, token_ids=()), label="stream"),
    ]
    found = compare_outputs(runs)
    assert found.is_identical
    assert found.num_compared == 1


def test_nothing_to_compare_is_not_identical() -> None:
    """Without a request that completed everywhere nothing can be called identical."""
    assert not compare_outputs([result(record(0)), result(failed(0))]).is_identical
    assert not compare_outputs([]).is_identical
