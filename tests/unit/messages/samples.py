"""One message of every kind, each field set to something that is not its default."""

from __future__ import annotations

import msgspec

from streamfill.messages import control as c
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import (
    ComputeRun,
    Finish,
    FinishReason,
    HandoffTarget,
    KvPeer,
    Preemption,
    Role,
    Sampling,
    ServerCounters,
    Share,
    StreamAccount,
    StreamDecision,
    StreamMode,
    TokenLogprob,
)
from streamfill.preemption.costs import CopyCost, CostModel, RecomputeCost
from streamfill.stream.prefix_blocks import pack_keys

SAMPLING = Sampling(
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    frequency_penalty=0.25,
    presence_penalty=-0.25,
    repetition_penalty=1.25,
    max_new_tokens=32,
    min_new_tokens=2,
    stop_token_ids=(2, 5),
    ignore_eos=True,
    seed=11,
    num_logprobs=3,
)
COUNTERS = ServerCounters(
    num_streams=1,
    num_waiting=2,
    num_running=3,
    num_pending_tokens=4,
    num_used_tokens=5,
    num_cached_tokens=6,
    num_free_tokens=7,
    num_total_tokens=8,
    num_free_slots=9,
    num_total_slots=10,
    num_transfers=11,
    staging_bytes=12,
    num_malformed_frames=13,
    num_evicted_tokens=14,
    num_computed_tokens=15,
    plan_version=16,
    num_recomputed_tokens=17,
    num_preemptions=18,
    num_interruptions=26,
    num_handoff_bytes=19,
    num_early_bytes=5,
    num_swap_outs=20,
    num_swap_ins=21,
    swap_out_bytes=22,
    swap_in_bytes=23,
    num_host_tokens=24,
)
HANDOFF = HandoffTarget(
    transfer_id=9, server_id="decode-0", host="127.0.0.1", control_ports=(4001, 4002)
)

ROUTER_TO_SERVER: tuple[msgspec.Struct, ...] = (
    r.Registered(router_incarnation=77, heartbeat_interval_s=0.25),
    r.RegistrationRefused(reason="another model"),
    r.RouterHeartbeat(router_incarnation=77),
    r.OpenStream(
        stream_id=1,
        attempt=2,
        mode=StreamMode.UPDATE,
        priority=3,
        ttft_slo_s=0.25,
        namespace="5f2c",
        share=Share(tenant="5f2c", weight=2.0),
    ),
    r.Splice(
        stream_id=1,
        attempt=2,
        seq=3,
        keep_tokens=4,
        token_ids=pack_ids([5, 600_000]),
        commit_follows=True,
        next_in_s=1.5,
    ),
    r.Commit(
        stream_id=1,
        attempt=2,
        seq=4,
        num_prompt_tokens=6,
        sampling=SAMPLING,
        handoff=HANDOFF,
        keep_s=7.5,
    ),
    r.PushTo(
        stream_id=1,
        attempt=2,
        peer=KvPeer(server_id="decode-0", host="127.0.0.1", control_ports=(4001, 4002)),
    ),
    r.Generate(
        stream_id=1,
        attempt=2,
        prompt_ids=pack_ids([5, 6]),
        output_ids=pack_ids([7]),
        sampling=SAMPLING,
        transfer_id=9,
        namespace="5f2c",
        share=Share(tenant="5f2c", weight=2.0),
    ),
    r.HandOff(
        stream_id=1,
        attempt=2,
        target=HandoffTarget(
            transfer_id=9, server_id="decode-1", host="127.0.0.1", control_ports=(4001, 4002)
        ),
    ),
    r.HandoffFailed(stream_id=1, attempt=2, transfer_id=9),
    r.Cancel(stream_id=1, attempt=2),
    r.ResendOutput(stream_id=1, attempt=2, from_index=3),
    r.Forget(stream_id=1, attempt=2),
    r.FlushCache(request_id=8),
    r.SetPolicy(request_id=8, policy="lcas", options={"order": "newest"}),
    r.DescribeStreams(request_id=8),
    r.WatchResidency(block_tokens=32),
    r.Malformed(reason="not msgpack"),
)

SERVER_TO_ROUTER: tuple[msgspec.Struct, ...] = (
    s.Register(
        server_id="prefill-0",
        incarnation=123456789,
        role=Role.PREFILL,
        protocol_version=1,
        pid=4242,
        model_id="digest",
        vocab_size=49152,
        context_tokens=8192,
        pool_tokens=65536,
        page_size=16,
        tp_size=2,
        kv_host="127.0.0.1",
        kv_control_ports=(4001, 4002),
        engine_version="0.5.16",
    ),
    s.ServerHeartbeat(
        server_id="prefill-0",
        incarnation=123456789,
        loop_age_s=0.125,
        controller_alive=True,
        counters=COUNTERS,
    ),
    s.Received(stream_id=1, attempt=2, seq=3),
    s.ResyncRequest(stream_id=1, attempt=2, have_seq=-1),
    s.Progress(
        stream_id=1,
        attempt=2,
        seq=3,
        num_known_tokens=40,
        num_computed_tokens=30,
        num_invalidated_tokens=20,
    ),
    s.Output(
        stream_id=1,
        attempt=2,
        first_index=3,
        token_ids=pack_ids([8, 9]),
        logprobs=(TokenLogprob(token_id=8, logprob=-0.5, top=((8, -0.5), (9, -1.5))),),
        finish=Finish(reason=FinishReason.STOP, matched_token_id=2, message="end"),
        num_cached_tokens=30,
        kv_codec="float16",
        account=StreamAccount(
            num_computed_tokens=40,
            num_recomputed_tokens=10,
            num_reused_tokens=20,
            runs=(ComputeRun(start_age_s=1.5, end_age_s=1.25, num_tokens=40, reason="commit"),),
            preemptions=(
                Preemption(
                    age_s=0.5,
                    num_tokens=10,
                    action="swap",
                    reason="idle for 1.5 s",
                    predicted_s=0.25,
                    actual_s=0.125,
                ),
            ),
        ),
    ),
    s.HandoffReport(
        stream_id=1,
        attempt=2,
        transfer_id=9,
        ok=True,
        reason="none",
        num_tokens=40,
        num_bytes=1_843_200,
        seconds=0.0625,
        num_early_bytes=460_800,
    ),
    s.StreamFailed(stream_id=1, attempt=2, code="INTERNAL", message="broken"),
    s.Closed(stream_id=1, attempt=2),
    s.CacheFlushed(request_id=8, ok=True),
    s.PolicySet(
        request_id=8,
        ok=False,
        policy="lcas(order=newest)",
        reason="there is no policy 'x'; known: fcfs, lcas",
    ),
    s.StreamsDescribed(
        request_id=8,
        policy="lcas(order=newest)",
        streams=(
            StreamDecision(
                stream_id=1,
                state="open",
                num_known_tokens=40,
                num_computed_tokens=30,
                num_shared_tokens=20,
                priority=3,
                idle_s=1.5,
                expected_next_s=0.25,
                decision="no_budget",
                reason="the step's tokens went to others",
                victim_rank=2,
            ),
        ),
    ),
    s.Residency(
        block_tokens=32,
        after_seq=4,
        seq=5,
        is_complete=True,
        stored=pack_keys([1, 2**63 + 3]),
        removed=pack_keys([7]),
    ),
    s.Draining(server_id="prefill-0"),
    s.MalformedByRouter(reason="not msgpack"),
)

CONTROL: tuple[msgspec.Struct, ...] = (
    c.Telemetry(
        server_id="prefill-0",
        incarnation=123456789,
        report=3,
        num_free_tokens=10,
        num_cached_tokens=20,
        num_total_tokens=100,
        num_host_tokens=400,
        num_free_host_tokens=300,
        bytes_per_token=46_080,
        mode=c.PreemptionMode.SWAP,
        costs=CostModel(
            recompute=RecomputeCost(
                fixed_s=0.5, per_token_s=0.25, per_pair_s=0.125, pass_tokens=256
            ),
            swap_out=CopyCost(fixed_s=0.5, per_byte_s=0.25),
            swap_in=CopyCost(fixed_s=0.25, per_byte_s=0.5),
            copies_overlap=True,
        ),
        streams=(
            c.StreamTelemetry(
                stream_id=1,
                num_known_tokens=40,
                num_computed_tokens=30,
                residency=c.Residency.DEVICE,
                num_shared_tokens=4,
                num_saved_tokens=5,
                num_host_tokens=6,
                committed=True,
                active=True,
                idle_s=1.5,
                gaps_s=(0.5, 0.75),
                expected_next_s=0.25,
                was_preempted=True,
                priority=2,
            ),
        ),
    ),
    c.ControllerHello(),
    c.Plan(
        server_id="prefill-0",
        epoch=1_795_237_200_123,
        version=4,
        victims=(
            c.PlanEntry(
                stream_id=1,
                action=c.PreemptionAction.RECOMPUTE,
                reason="idle for 1.5 s",
                cost_s=0.25,
            ),
        ),
    ),
    c.ControllerStatus(
        epoch=1_795_237_200_123,
        num_servers=1,
        num_streams=2,
        num_plans=3,
        num_malformed_frames=4,
    ),
)
