"""What a server counts for one stream, against a model that knows the state of each token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.messages.control import PreemptionAction
from streamfill.serving.account import (
    NUM_PREEMPTIONS_KEPT,
    NUM_RUNS_KEPT,
    RunOutcome,
    WorkAccount,
)


def ran(account: WorkAccount, up_to: int, cached: int, **fields: int) -> RunOutcome:
    """A run of a second that nothing disturbed, unless ``fields`` say so."""
    return account.ran(
        start_s=1.0,
        end_s=2.0,
        up_to=up_to,
        num_valid=fields.get("valid", up_to),
        num_in_tree=fields.get("in_tree", cached),
        num_cached=cached,
    )


def test_what_was_evicted_is_computed_again() -> None:
    """Computed twice, recomputed once; the loss is noted when it is seen, once."""
    account = WorkAccount()
    assert ran(account, 40, 0) == RunOutcome(40, 0)
    assert not account.observe(40, 40, 3.0)
    assert account.observe(15, 40, 4.0)
    assert not account.observe(15, 40, 5.0)
    assert ran(account, 50, 15) == RunOutcome(35, 25)
    account.answered(50)
    assert (account.num_computed, account.num_recomputed, account.num_reused) == (75, 25, 0)
    (loss,) = account.message(6.0).preemptions
    assert (loss.age_s, loss.num_tokens) == (2.0, 25)


def test_what_others_computed_is_reused() -> None:
    """It is neither computed nor recomputed, until it is lost and computed here."""
    account = WorkAccount()
    account.observe(30, 40, 0.0)
    ran(account, 40, 30)
    account.answered(40)
    assert (account.num_computed, account.num_reused) == (10, 30)
    assert account.observe(0, 40, 1.0)
    assert ran(account, 40, 0) == RunOutcome(40, 10)
    account.answered(40)
    assert account.num_reused == 0


def test_what_an_update_replaced_is_not_recomputed() -> None:
    """The client threw it away; nothing was evicted, with pages and while a run was under way."""
    account = WorkAccount(page_size=16)
    ran(account, 32, 0)
    account.cut(20)
    assert not account.observe(16, 40, 1.0)
    assert ran(account, 40, 16) == RunOutcome(24, 0)
    account = WorkAccount(page_size=16)
    assert ran(account, 32, 0, valid=20) == RunOutcome(32, 0)
    assert not account.observe(16, 20, 1.0)
    assert ran(account, 32, 16) == RunOutcome(16, 0)


def test_the_last_token_is_no_recomputation() -> None:
    """It is computed for its logits, with its page, where all of the prompt is cached."""
    for page_size, cached in ((1, 31), (16, 16)):
        account = WorkAccount(page_size)
        ran(account, 32, 0)
        assert ran(account, 32, cached, in_tree=32) == RunOutcome(32 - cached, 0)


def test_kv_that_went_between_plan_and_run_counts_as_lost() -> None:
    """The engine found less than the plan relied on."""
    account = WorkAccount()
    ran(account, 40, 0)
    assert ran(account, 50, 10, in_tree=40) == RunOutcome(40, 30)
    (loss,) = account.message(2.0).preemptions
    assert (loss.age_s, loss.num_tokens) == (1.0, 30)


def test_a_look_at_a_part_says_nothing_of_the_rest() -> None:
    """What lies behind the tokens that were looked at is still there."""
    account = WorkAccount(page_size=16)
    ran(account, 64, 0)
    assert not account.observe(32, 40, 1.0)
    assert account.observe(0, 64, 2.0)
    assert account.message(2.0).preemptions[0].num_tokens == 64


def test_nothing_happened() -> None:
    """A stream that found everything elsewhere has nothing to tell."""
    account = WorkAccount()
    account.observe(40, 40, 0.0)
    ran(account, 40, 40)
    assert account.is_empty


@pytest.mark.parametrize("num_runs", [NUM_RUNS_KEPT, NUM_RUNS_KEPT + 1, 5 * NUM_RUNS_KEPT])
def test_many_runs_are_merged(num_runs: int) -> None:
    """The number of runs stays bounded; tokens, time spent and order stay right."""
    account = WorkAccount()
    for number in range(num_runs):
        account.ran(
            start_s=3.0 * number,
            end_s=3.0 * number + 1,
            up_to=number + 1,
            num_valid=number + 1,
            num_in_tree=number,
            num_cached=number,
        )
    message = account.message(3.0 * num_runs)
    assert len(message.runs) <= NUM_RUNS_KEPT
    assert sum(run.num_tokens for run in message.runs) == num_runs == account.num_computed
    assert sum(run.start_age_s - run.end_age_s for run in message.runs) == num_runs
    ages = [age for run in message.runs for age in (run.start_age_s, run.end_age_s)]
    assert ages == sorted(ages, reverse=True)


def test_many_preemptions_are_merged() -> None:
    """Their number stays bounded, and what was lost still adds up."""
    account = WorkAccount()
    for number in range(3 * NUM_PREEMPTIONS_KEPT):
        account.observe(10, 10, number)
        assert account.observe(0, 10, number)
    losses = account.message(0.0).preemptions
    assert len(losses) == NUM_PREEMPTIONS_KEPT
    assert sum(loss.num_tokens for loss in losses) == 30 * NUM_PREEMPTIONS_KEPT


_OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 20)),
    st.tuples(st.just("cut"), st.integers(0, 60)),
    st.tuples(st.just("evict"), st.integers(0, 40)),
    st.tuples(st.just("others compute"), st.integers(1, 60)),
    st.tuples(st.just("run"), st.integers(1, 20)),
)


@given(st.lists(_OPERATION, max_size=40), st.sampled_from([1, 4]))
def test_every_token_is_accounted_for(operations: list[tuple[str, int]], page_size: int) -> None:
    """However a stream grows, shrinks, is evicted and served by others: the sums are those of a
    model that looks at each token."""

    def whole(num_tokens: int) -> int:
        return num_tokens - num_tokens % page_size

    account = WorkAccount(page_size)
    own: list[bool] = []
    num_cached = num_computed = num_recomputed = num_lost = 0
    for what, amount in operations:
        match what:
            case "append":
                own += [False] * amount
            case "cut" if amount < len(own):
                del own[amount:]
                for place in range(whole(amount), amount):
                    own[place] = False
                account.cut(amount)
                num_cached = min(num_cached, whole(amount))
            case "evict":
                lost = min(num_cached, whole(amount))
                num_cached -= lost
                num_lost += lost
            case "others compute":
                num_cached = max(num_cached, whole(min(amount, len(own))))
            case "run" if num_cached < len(own):
                up_to = min(len(own), whole(num_cached + amount) or page_size)
                if up_to > num_cached:
                    ran(account, up_to, num_cached)
                    num_computed += up_to - num_cached
                    num_recomputed += sum(own[num_cached:up_to])
                    own[num_cached:up_to] = [True] * (up_to - num_cached)
                    num_cached = whole(up_to)
        account.observe(num_cached, len(own), 0.0)
    account.answered(len(own))
    message = account.message(0.0)
    assert sum(run.num_tokens for run in message.runs) == message.num_computed_tokens
    assert message.num_computed_tokens == num_computed
    assert message.num_recomputed_tokens == num_recomputed
    assert message.num_reused_tokens == own.count(False)
    assert sum(loss.num_tokens for loss in message.preemptions) == num_lost
    if not any(what == "cut" for what, _ in operations):
        assert num_computed - num_recomputed + message.num_reused_tokens == len(own)


def test_a_loss_is_made_good_for_but_for_the_end_of_a_block() -> None:
    """What is less than a block is computed with what is new; the way is that of the most."""
    account = WorkAccount()
    ran(account, 100, 0)
    assert account.observe(0, 100, 1.0)
    account.explain_loss(PreemptionAction.SWAP, "idle", 0.5)
    assert account.recovered(PreemptionAction.SWAP, 60, 0.25) == []
    (recovery,) = account.recovered(PreemptionAction.RECOMPUTE, 30, 0.125)
    assert recovery == (PreemptionAction.RECOMPUTE, 100, 0.5, 0.375)
    (loss,) = account.message(2.0).preemptions
    assert (loss.action, loss.predicted_s, loss.actual_s) == ("swap", 0.5, 0.375)
    assert account.recovered(PreemptionAction.SWAP, 10, 1.0) == []
