"""The KV transport: copies the KV of token sequences from one server rank to another.

::

    prefill rank                                        decode rank
    gather(k, v, slots) -> staging
    KvSender.submit ──Hello/Welcome──(ZeroMQ)──────────▶ KvReceiver
        Offer ─────────────────────────────────────────▶ checked, staging reserved
        ◀───────────────────────────── Accept or Refuse
        chunks ───────────────(shared memory where both
                        are on one machine's CPU, else a
                        group of two over Gloo or NCCL)─▶ into staging
        ◀──────────────────────────── Complete or Abort
    KvSender.poll -> TransferOutcome                    KvReceiver.poll -> IncomingTransfer
                                                        scatter(staging, k, v, slots), release

It knows torch and ZeroMQ, not sglang. `interface` is the contract, `sender` and `receiver` the real
thing, `fake` the one for tests. This module imports nothing, so that `layout` works without torch.
"""
