"""The core as the owners of API keys see it: their own streams, within their limits.

Wraps the core for both services. Whose call it is stands in `account.CALLER`; where nothing does,
that is a bug of ours, and the call fails.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

from router.access.account import CALLER, KeyAccount
from router.interface import (
    Acknowledged,
    ClusterInfo,
    CommitOptions,
    OpenOptions,
    PolicyOutcome,
    Resumed,
    ResumePoint,
    Segment,
    ServerInfo,
    ServerStreams,
    StreamEvent,
    StreamHandle,
    StreamManager,
    StreamStatus,
)
from router.watch.frames import Frame
from router.watch.wish import WatchWish
from streamfill.errors import (
    InternalError,
    PermissionDeniedError,
    StreamError,
    StreamNotFoundError,
    UnauthenticatedError,
)
from streamfill.messages.common import StreamMode
from streamfill.stream.ids import ServerId


class GuardedManager:
    """Implements `interface.StreamManager`. Its methods raise as the core's do, and further
    UnauthenticatedError where the key was removed meanwhile."""

    def __init__(self, core: StreamManager) -> None:
        self._core = core

    async def open(self, options: OpenOptions) -> StreamHandle:
        """For the caller's tenant.

        Raises:
            ResourceExhaustedError: a limit of the caller's key is reached.
        """
        account = _caller()
        account.check_tokens()
        place = account.take_stream()
        owned = replace(
            options,
            tenant=account.entry.tenant,
            payer=place,
            namespace=account.standing.namespace,
            share=account.standing.share,
        )
        try:
            return GuardedHandle(await self._core.open(owned), account)
        except BaseException:
            place.ended()
            raise

    def get(self, stream_id: int) -> StreamHandle:
        """Raises StreamNotFoundError also where the stream is another tenant's."""
        account = _caller()
        return GuardedHandle(self._owned(stream_id, account), account)

    def info(self) -> ClusterInfo:
        """The cluster as a whole, which is no secret between tenants."""
        return self._core.info()

    def token_bytes(self, token_id: int) -> bytes:
        """As the core."""
        return self._core.token_bytes(token_id)

    async def wait_readiness_change(self) -> bool:
        """As the core. No client asks for it."""
        return await self._core.wait_readiness_change()

    async def flush_caches(self, timeout_s: float) -> Mapping[ServerId, bool]:
        """Raises PermissionDeniedError: the caller's key is no operator's."""
        _check_operator("FlushCaches")
        return await self._core.flush_caches(timeout_s)

    async def set_policy(
        self,
        policy: str,
        options: Mapping[str, str],
        server_id: ServerId | None,
        timeout_s: float,
    ) -> Mapping[ServerId, PolicyOutcome]:
        """Raises PermissionDeniedError: the caller's key is no operator's."""
        _check_operator("SetPolicy")
        return await self._core.set_policy(policy, options, server_id, timeout_s)

    async def describe_streams(
        self, stream_id: int | None, timeout_s: float
    ) -> Mapping[ServerId, ServerStreams]:
        """Of the caller's tenant, in the order of their turn among all."""
        account = _caller()
        if stream_id is not None:
            self._owned(stream_id, account)
        described = await self._core.describe_streams(stream_id, timeout_s)
        return {
            name: replace(
                each, streams=[s for s in each.streams if self._is_own(s.stream_id, account)]
            )
            for name, each in described.items()
        }

    async def watch(self, wish: WatchWish) -> AsyncGenerator[Frame, None]:
        """The caller's tenant's streams; everybody's for an operator.

        Raises:
            UnauthenticatedError: the key was removed meanwhile, or is one of another kind now.
        """
        account = _caller()
        tenant = _sight(account)
        async with aclosing(self._core.watch(replace(wish, tenant=tenant))) as frames:
            async for frame in frames:
                account.check()
                if _sight(account) != tenant:
                    raise UnauthenticatedError("this API key was changed; connect again")
                yield frame

    async def drain_server(
        self, server_id: ServerId, answers_s: float | None, *, force: bool
    ) -> ServerInfo:
        """Raises PermissionDeniedError: the caller's key is no operator's."""
        _check_operator("DrainServer")
        return await self._core.drain_server(server_id, answers_s, force=force)

    async def resume_server(self, server_id: ServerId) -> ServerInfo:
        """Raises PermissionDeniedError: the caller's key is no operator's."""
        _check_operator("ResumeServer")
        return await self._core.resume_server(server_id)

    async def drain(self, timeout_s: float) -> None:
        """As the core. No client asks for it."""
        await self._core.drain(timeout_s)

    def _owned(self, stream_id: int, account: KeyAccount) -> StreamHandle:
        handle = self._core.get(stream_id)
        if account.entry.is_operator or handle.tenant == account.entry.tenant:
            return handle
        # In the words of the core: whether there is one is nobody else's business.
        raise StreamNotFoundError(f"there is no stream {stream_id}, or not any more")

    def _is_own(self, stream_id: int, account: KeyAccount) -> bool:
        try:
            self._owned(stream_id, account)
        except StreamNotFoundError:  # of another tenant, or gone since its server was asked
            return False
        return True


class GuardedHandle:
    """Implements `interface.StreamHandle` for the holder of one key. A committed answer comes to
    its end even when the key is removed meanwhile; nothing else does."""

    def __init__(self, core: StreamHandle, account: KeyAccount) -> None:
        self._core = core
        self._account = account

    @property
    def stream_id(self) -> int:
        return self._core.stream_id

    @property
    def mode(self) -> StreamMode:
        return self._core.mode

    @property
    def tenant(self) -> str:
        return self._core.tenant

    def status(self) -> StreamStatus:
        """See `interface.StreamHandle`."""
        return self._core.status()

    async def append(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """See `interface.StreamHandle`. Refused further while too many tokens were used."""
        self._account.check()
        self._account.check_tokens()
        return await self._core.append(segment, client_seq)

    async def update(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """As ``append``."""
        self._account.check()
        self._account.check_tokens()
        return await self._core.update(segment, client_seq)

    def change_at_once(self, segment: Segment, client_seq: int | None = None) -> bool:
        """As ``append``."""
        self._account.check()
        self._account.check_tokens()
        return self._core.change_at_once(segment, client_seq)

    def acknowledged(self) -> Acknowledged:
        """See `interface.StreamHandle`."""
        return self._core.acknowledged()

    async def commit(self, options: CommitOptions, client_seq: int | None = None) -> None:
        """See `interface.StreamHandle`."""
        self._account.check()
        await self._core.commit(options, client_seq)

    def events(
        self, on_acknowledged: Callable[[], bool] | None = None
    ) -> AsyncIterator[StreamEvent]:
        """See `interface.StreamHandle`."""
        return self._core.events(on_acknowledged)

    async def cancel(self, reason: str) -> None:
        """See `interface.StreamHandle`. Possible in any case."""
        await self._core.cancel(reason)

    def note_refused(self, client_seq: int, error: StreamError) -> None:
        """See `interface.StreamHandle`."""
        self._core.note_refused(client_seq, error)

    @property
    def is_resumable(self) -> bool:
        return self._core.is_resumable

    @property
    def num_resumptions(self) -> int:
        return self._core.num_resumptions

    def resume(self, point: ResumePoint) -> Resumed:
        """See `interface.StreamHandle`. The stream counts as the key's again, beyond its limit
        too, as it did before."""
        place = self._account.take_stream_back()
        is_taken = False
        try:
            resumed = self._core.resume(replace(point, payer=place))
            is_taken = resumed.is_paid_anew
        finally:
            if not is_taken:
                place.ended()
        return resumed


def _caller() -> KeyAccount:
    account = CALLER.get()
    if account is None:
        raise InternalError("a call came to the core without the API key that it was let in with")
    account.check()
    return account


def _sight(account: KeyAccount) -> str | None:
    """Whose streams the holder of the key sees: a tenant's, or for None everybody's."""
    return None if account.entry.is_operator else account.entry.tenant


def _check_operator(call: str) -> None:
    account = _caller()
    if not account.entry.is_operator:
        raise PermissionDeniedError(
            f"{call} changes the cluster for everybody, which the API key {account.entry.name} "
            "may not do; it takes one that was made with `streamfill keys add NAME --operator`"
        )
