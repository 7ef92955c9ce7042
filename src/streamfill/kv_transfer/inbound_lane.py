"""The receiver's half of one pair of ranks: a thread that owns the pair's group and receives.

A wait inside torch.distributed ends only by data, by the peer's closing or by its time-out.
So each group has a thread of its own, and whoever wants a lane to end says so, goes on, and
joins the thread later.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from streamfill.errors import TransportError
from streamfill.kv_transfer.codecs import CODECS, NO_CODEC
from streamfill.kv_transfer.faults import BEYOND_S, Faults
from streamfill.kv_transfer.group import Pair
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.rendezvous import RendezvousStore

_log = logging.getLogger(__name__)

_ENDED = "the session ended in mid-transfer"


@dataclass(frozen=True, eq=False)
class LaneJob:
    """One accepted transfer. The lane owns ``staging`` until it reports."""

    transfer_id: int
    staging: Tensor
    chunk_bytes: int
    cuts: Sequence[int]
    """As of ``Offer``."""
    checksum: int | None
    encoded: Tensor | None = None
    """Where it arrives, if it is written in a codec."""
    codec: str = NO_CODEC


@dataclass(frozen=True)
class LaneReport:
    """What became of a job. With an error the lane has ended and its group is gone."""

    epoch: int
    transfer_id: int
    error: str | None
    seconds: float


class ChecksumError(TransportError):
    """All bytes arrived, but they are not those that were sent."""


class InboundLane:
    """Receives the transfers of one session, one after the other."""

    def __init__(
        self,
        epoch: int,
        *,
        layout: KvLayout,
        store: RendezvousStore,
        make_group: Callable[[RendezvousStore], Pair],
        report: Callable[[LaneReport], None],
        chunk_s: float,
        faults: Faults | None,
    ) -> None:
        """Start the thread.

        Args:
            epoch: of the session.
            layout: of the KV.
            store: for the set-up of the group.
            make_group: called once, in the thread, at the first job; waits for the sender.
            report: called in the thread, exactly once per job.
            chunk_s: how long either side waits for the other.
            faults: of the receiver.
        """
        self.epoch = epoch
        self._layout = layout
        self._store = store
        self._make_group = make_group
        self._report = report
        self._chunk_s = chunk_s
        self._faults = faults
        self._stopping = False  # set by `stop`
        self._jobs: queue.SimpleQueue[LaneJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"kv-recv-{epoch}", daemon=True)
        self._thread.start()

    def start(self, job: LaneJob) -> None:
        """Receive a transfer; never blocks."""
        self._jobs.put(job)

    def put(self, key: str, value: bytes) -> None:
        """Take an entry of the sender's store; never blocks."""
        self._store.put(key, value)

    def stop(self) -> None:
        """End after the chunk at hand, failing its transfer; never blocks."""
        self._stopping = True
        self._store.fail(_ENDED)
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        group: Pair | None = None
        failure: str | None = None
        while (job := self._jobs.get()) is not None:
            begun_s = time.monotonic()
            if failure is None:
                try:
                    group = group or self._make_group(self._store)
                    self._receive(group, job)
                except TransportError as error:
                    failure = str(error)
                except Exception as error:  # noqa: BLE001 - the edge of this thread's loop
                    _log.exception("transfer %d failed", job.transfer_id)
                    failure = f"internal error: {error!r}"
            if failure is not None and group is not None:
                # Before the report, so that the sender, too, notices at once.
                group.close()
                group = None
            self._report(
                LaneReport(
                    epoch=self.epoch,
                    transfer_id=job.transfer_id,
                    error=failure,
                    seconds=time.monotonic() - begun_s,
                )
            )
        if group is not None:
            group.close()

    def _receive(self, group: Pair, job: LaneJob) -> None:
        into = job.staging if job.encoded is None else job.encoded
        num_bytes = into.numel()
        if self._faults is not None:
            group = self._faults.around(
                group,
                job.transfer_id,
                stall_s=self._chunk_s + BEYOND_S,
                has_checksum=job.checksum is not None,
            )
        begins = range(0, num_bytes, job.chunk_bytes)
        for begin in begins:
            self._obey()
            group.recv(into, begin, min(begin + job.chunk_bytes, num_bytes), job.cuts)
        for num_left in range(len(begins) - 1, 0, -1):
            group.flush(num_left)
            self._obey()
        group.flush()
        if job.checksum is not None:
            found = zlib.crc32(into.cpu().numpy().data)
            if found != job.checksum:
                raise ChecksumError(f"checksum is {found:#010x}, not {job.checksum:#010x}")
        if job.encoded is not None:
            CODECS[job.codec].decode(job.encoded, job.staging, self._layout)

    def _obey(self) -> None:
        if self._stopping:
            raise TransportError(_ENDED)
